"""What a run says of itself: Prometheus metrics, metrics.jsonl, events.jsonl, traces, TensorBoard, the goodput ledger.

Rank 0 writes the run's files; every rank may serve metrics and writes its own trace. Files of a run on an object store
grow by ``storage.append_text`` from a background thread, never from the training thread.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, start_http_server

from pipelines import storage
from pipelines.contracts import Batch
from pipelines.faults import FaultBudget, InputError
from trainer.board import Board
from trainer.manifest import RunManifest
from trainer.metrics import EVALUATED, Counts, RankMetrics, RunMetrics
from trainer.pictures import Views

Cause = Literal[
    "startup", "productive", "data_wait", "checkpoint", "evaluation", "lost",
    "recovery_detect", "recovery_schedule", "recovery_load", "recovery_first_step", "idle",
]  # fmt: skip
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Ledger:
    """Every second of a run under one cause.

    Exactly one cause is running at any time, so the seconds add up to wall time by construction. Seconds of training
    steps wait as *uncommitted* until a checkpoint holds the step; then they count as productive, or as lost when the
    attempt dies first. A step counts as productive once: where a checkpoint was damaged, training its steps again is
    lost work. So no counter ever falls, across restarts too.

    Recovery has four parts: ``detect`` from the last that was heard of the dead attempt until its death was known,
    ``schedule`` until the next attempt's processes have met, ``load`` until the checkpoint is restored,
    ``first_step`` until one step more is trained.
    """

    def __init__(
        self,
        previous: Mapping[str, Any] | None = None,
        *,
        launched: float | None = None,
        restarted: float | None = None,
        met: float | None = None,
        clock: Any = time.time,
    ) -> None:
        """``previous`` is the last known state of the run's ledger, ``launched`` when the present command began.

        ``restarted`` is when the launcher last learnt of a death; without it, its time counts as ``schedule``. ``met``
        is when the attempt's processes had met: now, unless it is given.
        """
        self._clock = clock
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._pending: deque[tuple[int, float]] = deque()
        self._kept = int(previous.get("kept", 0)) if previous else 0
        now = clock()
        begun = min(now, launched) if launched is not None else now
        if previous is None:
            previous = {"start": begun, "time": begun, "seconds": {}, "uncommitted": 0.0, "stopped": True}
        self.start = float(previous["start"])
        for cause, value in previous["seconds"].items():
            self.seconds[cause] += float(value)
        self.seconds["lost"] += float(previous["uncommitted"])
        left = float(previous["time"])
        self.cause: Cause
        if previous.get("stopped") or (launched is not None and launched > left):
            self.seconds["idle"] += max(0.0, begun - left)
            self.cause, self._mark = "startup", max(left, begun)
        else:
            known = min(max(left, restarted or left), max(left, now))
            self.seconds["recovery_detect"] += known - left
            met = min(max(known, now if met is None else met), max(known, now))
            self.seconds["recovery_schedule"] += met - known
            self.cause, self._mark = "recovery_load", met

    def ready(self) -> None:
        """The attempt is set up: what comes now, until a step is trained, is its first step."""
        if self.cause == "recovery_load":
            self.enter("recovery_first_step")

    def enter(self, cause: Cause) -> None:
        """Ends the running cause and begins another; what went by since the ledger began counts to the first."""
        self._settle()
        self.cause = cause

    @contextlib.contextmanager
    def span(self, cause: Cause) -> Iterator[None]:
        """Runs its body under ``cause``, then goes back to the cause before."""
        before = self.cause
        self.enter(cause)
        try:
            yield
        finally:
            self.enter(before)

    def trained(self, step: int) -> None:
        """Files the seconds since the last call to ``enter`` as the uncommitted seconds of ``step``."""
        now = self._clock()
        self._pending.append((step, now - self._mark))
        self._mark = now

    def commit(self, step: int) -> None:
        """A checkpoint now holds every step before ``step``: their seconds are productive."""
        while self._pending and self._pending[0][0] < step:
            trained, seconds = self._pending.popleft()
            self.seconds["productive" if trained >= self._kept else "lost"] += seconds
        self._kept = max(self._kept, step)

    def _settle(self) -> None:
        now = self._clock()
        self.seconds[self.cause] += now - self._mark
        self._mark = now

    @property
    def uncommitted(self) -> float:
        """Seconds of training that no checkpoint holds yet."""
        return sum(seconds for _, seconds in self._pending)

    def state(self, *, stopped: bool = False) -> dict[str, Any]:
        """Plain data for metrics.jsonl and checkpoints; ``stopped`` marks an orderly end, after which time is idle."""
        if self.cause != "productive":
            self._settle()
        now = self._clock()
        running = now - self._mark
        state = {"start": self.start, "time": now, "seconds": dict(self.seconds)}
        return {**state, "uncommitted": self.uncommitted + running, "kept": self._kept, "stopped": stopped}


def surviving(last: Mapping[str, Any] | None, saved: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The run's last known ledger, where training goes on from the checkpoint of ``step``, which holds ``saved``.

    Steps that the checkpoint holds are no lost work, also where the attempt died before it could say that they were
    committed. Where the logs are gone, or older than the checkpoint, its own counters are the last known.
    """
    if last is None or saved["time"] > last["time"]:
        last = saved
    known = saved["seconds"]["productive"] + saved["uncommitted"]
    productive = last["seconds"].get("productive", 0.0)
    kept = min(max(0.0, known - productive), last["uncommitted"])
    seconds = {**last["seconds"], "productive": productive + kept}
    whole = max(last.get("kept", 0), step)
    return {**last, "seconds": seconds, "uncommitted": last["uncommitted"] - kept, "kept": whole}


def of_earlier_commands(
    last: Mapping[str, Any] | None, events: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """The last known ledger with the time of the commands before the newest one that ``last`` says nothing of: those
    that failed as they started, or while an attempt was to be replaced. What was heard of them is in ``events``.
    """
    launches = [event["time"] for event in events if event["event"] == "launch"]
    if last is None and launches:
        last = {"start": launches[0], "time": launches[0], "seconds": {}, "uncommitted": 0.0, "stopped": True}
    for launched, following in pairwise(launches):
        heard = [e for e in events if max(launched, last["time"]) < e["time"] < following]
        if heard and (launched >= last["time"] or not last.get("stopped")):
            end = heard[-1]["time"]
            known = [event["time"] for event in heard if event["event"] in ("restart", "resize")]
            ledger = Ledger(
                last, launched=launched, restarted=min(known, default=None), met=end, clock=lambda end=end: end
            )
            last = ledger.state(stopped=True)
    return last


def newest_ledger(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The newest state of the ledger in lines of the logs. An attempt that was replaced, but lives, says nothing of it
    any more.
    """
    known = [line for line in lines if "ledger" in line]
    newest = max(known, key=lambda line: (line["attempt"], line["ledger"]["time"]), default=None)
    return newest["ledger"] if newest else None


def goodput(state: Mapping[str, Any]) -> float:
    """Productive share of wall time in [0, 1], uncommitted steps included."""
    total = sum(state["seconds"].values()) + state["uncommitted"]
    return (state["seconds"]["productive"] + state["uncommitted"]) / total if total > 0 else 0.0


class Appender:
    """Grows text files of a run without holding up the training thread.

    Files on this machine's disks are written at once, so that a killed process loses no line. For an object store the
    lines wait for a background thread, which writes them every ``interval`` seconds and at ``flush``. What only the
    newest of matters (:meth:`latest`) is always that thread's: every two seconds on disk, every ``interval`` elsewhere.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._lines: dict[str, list[str]] = {}
        self._latest: dict[str, Mapping[str, Any]] = {}
        self._written: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def line(self, url: str, record: Mapping[str, Any], written: Callable[[], None] | None = None) -> None:
        """Appends one JSON line; floats keep full precision, NaN and infinities become strings.

        ``written`` is called once it is on storage.
        """
        if self._error is not None:
            raise self._error
        text = json.dumps(_plain(record)) + "\n"
        if not storage.is_remote(url):
            storage.append_text(url, text)
            if written is not None:
                written()
            return
        with self._lock:
            self._lines.setdefault(url, []).append(text)
            if written is not None:
                self._written.append(written)
            self._start(url)

    def latest(self, url: str, record: Mapping[str, Any]) -> None:
        """Puts ``record`` in the place of the one before it, soon; what storage refuses is left out."""
        with self._lock:
            self._latest[url] = record
            self._start(url)

    def _start(self, url: str) -> None:
        if self._thread is None:
            self._interval = self._interval if storage.is_remote(url) else min(2.0, self._interval)
            self._thread = threading.Thread(target=self._run, name="appender", daemon=True)
            self._thread.start()

    def flush(self) -> None:
        """Writes what is waiting, in the caller's thread."""
        with self._writing:
            with self._lock:
                waiting, self._lines = self._lines, {}
                latest, self._latest = self._latest, {}
                written, self._written = self._written, []
            for url, lines in waiting.items():
                storage.append_text(url, "".join(lines))
            for url, record in latest.items():
                with contextlib.suppress(InputError):
                    self._replace(url, record)
            for call in written:
                call()

    def _replace(self, url: str, record: Mapping[str, Any]) -> None:
        """Where a newer attempt has written, one that was replaced, but lives, leaves that as it is."""
        found, attempt = storage.read_versioned(url), 0
        if found is not None:
            with contextlib.suppress(ValueError, KeyError):
                attempt = json.loads(found[0])["attempt"]
        if attempt <= record["attempt"]:
            data = (json.dumps(_plain(record), indent=1) + "\n").encode()
            storage.swap(url, data, found[1] if found else None)

    def close(self) -> None:
        """Writes everything and ends the thread; raises what the thread met."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(timeout=60)
        self.flush()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self.flush()
            except BaseException as error:
                self._error = error
                return


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


class Telemetry:
    """One rank's telemetry of one attempt; ``rank`` 0 also writes the run's files.

    ``before`` are the run's counters as the attempts before left them. ``alone`` says that no launcher follows the run
    and shows its metrics: then rank 0 serves them beside its own.
    """

    def __init__(
        self, manifest: RunManifest, run_url: str, *, rank: int = 0, world: int = 1, attempt: int = 1,
        before: Mapping[str, Any] | None = None, alone: bool = False,
    ) -> None:  # fmt: skip
        self.run_url, self.rank, self.world, self.attempt = run_url, rank, world, attempt
        self.budget = FaultBudget(manifest.data.skip_budget)
        self.metrics = RankMetrics(manifest.name, rank, self.budget)
        self.last_commit = -1
        self._counts = Counts(before)
        self._appender = Appender()
        self._trace_url = storage.join(run_url, "trace", f"rank-{rank:05d}-attempt-{attempt:04d}.jsonl")
        self._trace = manifest.trace
        registry = CollectorRegistry()
        registry.register(self.metrics)
        self._run: RunMetrics | None = None
        if alone and rank == 0:
            self._run = RunMetrics(manifest)
            self._run.take(*(read_lines(storage.join(run_url, f"{name}.jsonl")) for name in ("events", "metrics")))
            registry.register(self._run)
        bind, port = manifest.telemetry.bind, manifest.telemetry.port
        wanted = port and port + (0 if self._run else 1 + int(os.environ.get("LOCAL_RANK", "0")))
        try:
            self._server, self._thread = start_http_server(wanted, addr=bind, registry=registry)
        except OSError as error:
            if not wanted or error.errno != errno.EADDRINUSE:
                raise unbound(bind, error) from None
            self._server, self._thread = start_http_server(0, addr=bind, registry=registry)
            self.event("warning", message=f"rank {rank} can't serve its metrics on port {wanted}: {error.strerror}")
        self.address = f"{reachable(bind)}:{self._server.server_port}"
        self._board = Board(run_url) if manifest.telemetry.tensorboard and rank == 0 else None
        self._steps, self._waited, self._computed = 0, 0.0, 0.0

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line to events.jsonl (rank 0 only)."""
        if self.rank == 0:
            record = {"time": time.time(), "event": kind, "attempt": self.attempt, **fields}
            self._line("events", record, lambda run: run.take([record], ()))

    def _line(self, log: str, record: Mapping[str, Any], show: Callable[[RunMetrics], None]) -> None:
        run = self._run
        shown = (lambda: show(run)) if run is not None else None
        self._appender.line(storage.join(self.run_url, f"{log}.jsonl"), record, shown)

    def trained(self, step: int, batches: Sequence[Batch], seconds: float, flops: float) -> None:
        """Counts one optimizer step of ``seconds``, data wait not included; ``flops`` are this rank's so far."""
        self.metrics.step = step + 1
        own = self._counts.own
        for batch in batches:
            if batch.weight > 0:
                own["clips"] += len(batch.places)
                own["frames"] += batch.pixels_BCTHW.shape[0] * batch.pixels_BCTHW.shape[2]
        own["flops"] = flops
        self._counts.steps += 1
        self._counts.step_seconds.add(seconds)
        self._steps += 1
        self._computed += seconds

    def sums(self, loader_metrics: Any) -> Mapping[str, float]:
        """What this rank has counted in this attempt; the same names on every rank, for a sum over ranks."""
        self._counts.loader(loader_metrics)
        return self._counts.own

    def committed(
        self, step: int, ledger: Ledger, size: int | None = None, phases: Mapping[str, float] | None = None
    ) -> None:
        """Notes that a checkpoint of ``step`` is committed: its bytes, and the seconds that each phase took."""
        self.last_commit = step
        self.event("commit", step=step, bytes=size, seconds=dict(phases or {}), ledger=ledger.state())

    def alive(self, done: int, ledger: Ledger) -> None:
        """Notes that ``done`` steps are trained: where the attempt dies before it logs again, they were lost work."""
        if self.rank == 0:
            record = {"attempt": self.attempt, "step": done, "ledger": ledger.state()}
            self._appender.latest(storage.join(self.run_url, "ledger.json"), record)

    def evaluated(self, step: int, values: Mapping[str, Any], views: Sequence[Views]) -> None:
        """Notes what was measured on the weights of ``step`` optimizer steps, and shows some of its clips."""
        named = (*EVALUATED, "lpips_backbone", "clips")
        baselines = {name: {k: line[k] for k in EVALUATED} for name, line in values["baselines"].items()}
        self.event("evaluation", step=step, **{name: values[name] for name in named}, baselines=baselines)
        if self._board is not None:
            self._board.scalars("evaluation", step, {name: values[name] for name in EVALUATED})
            self._board.pictures(step, views)

    def log(self, record: Mapping[str, Any], summed: Mapping[str, float], ledger: Ledger, loader_metrics: Any) -> None:
        """One logged step: a line of metrics.jsonl, the gauges, TensorBoard. ``summed`` are all ranks' ``sums``."""
        wait = loader_metrics.wait_seconds
        self.metrics.waited = (wait - self._waited) / max(1, self._steps)
        self.metrics.computed = self._computed / max(1, self._steps)
        self.metrics.loader = loader_metrics
        self._steps, self._waited, self._computed = 0, wait, 0.0
        if self.rank == 0:
            state = ledger.state()
            line = {
                "attempt": self.attempt, "world": self.world, **record,
                "counters": self._counts.total(summed, self.world, state), "time": state["time"], "ledger": state,
            }  # fmt: skip
            self._line("metrics", line, lambda run: run.take((), [line]))
        if self._board is not None:
            scalars = {name: record[name] for name in ("loss", "lr", "grad_norm", "clips_per_second")}
            self._board.scalars("train", record["step"], {**scalars, **record["terms"], **record["statistics"]})

    def trace(self, step: int, stage: str, batches: Sequence[Batch]) -> None:
        """One line: which clips this rank trained on at this step."""
        if self._trace:
            trained = [batch for batch in batches if batch.weight > 0]
            line = {
                "attempt": self.attempt,
                "step": step,
                "stage": stage,
                "rank": self.rank,
                "place": [place for batch in trained for place in batch.places],
                "key": [str(source) for batch in trained for source in batch.sources],
            }
            if any(any(batch.substitutes) for batch in trained):
                line["substitute"] = [k for batch in trained for k in batch.substitutes]
            self._appender.line(self._trace_url, line)

    def flush(self) -> None:
        """Brings every line to storage; called before a commit, so that no committed step lacks its lines."""
        self._appender.flush()
        if self._board is not None:
            with contextlib.suppress(InputError):  # pictures are no reason to lose a checkpoint
                self._board.flush()

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        """Brings every line to storage where training failed."""
        if failed is not None:
            with contextlib.suppress(InputError):
                self.close()

    def close(self) -> None:
        """Writes everything out and ends the server."""
        try:
            self._appender.close()
        finally:
            if self._board is not None:
                self._board.close()
            self._server.shutdown()
            self._server.server_close()


def unbound(bind: str, error: OSError) -> InputError:
    """What a user is told where metrics can't be served on that address."""
    return InputError(
        f"telemetry.bind: {bind}: {socket.gethostname()} can't serve there: {(error.strerror or str(error)).lower()}. "
        "Use 127.0.0.1, or 0.0.0.0 where other machines shall see it",
        status=2,
    )


def reachable(bind: str) -> str:
    """Where others find what is bound to that address: the machine's own address where it is bound to all of them."""
    if bind not in ("", "0.0.0.0", "::"):
        return bind
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; picks the interface that leads outside
        return probe.getsockname()[0]
    return socket.gethostname()


def heard_last(run_url: str, happened: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What :meth:`Telemetry.alive` noted last, if the newest attempt did; ``happened`` are the run's events."""
    attempt = max((event["attempt"] for event in happened if event["event"] == "start"), default=0)
    with contextlib.suppress(storage.Missing, ValueError):
        record = json.loads(storage.read_bytes(storage.join(run_url, "ledger.json")))
        return record if record["attempt"] == attempt else None
    return None


def read_lines(url: str, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Whole JSON lines of a log; [] where there is none. ``tail_bytes`` reads only about that much of its end."""
    try:
        size = storage.size(url)
        start = max(0, size - tail_bytes) if tail_bytes else 0
        text = storage.read_bytes(url, start, size).decode(errors="replace") if size else ""
    except storage.Missing:
        return []
    lines = text.split("\n")[1 if start else 0 :]
    records = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records
