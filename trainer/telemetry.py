"""What a run says of itself: Prometheus metrics, metrics.jsonl, events.jsonl, traces, TensorBoard, the goodput ledger.

Rank 0 writes the run's files; every rank may serve metrics and writes its own trace. Files of a run on an object store
grow by ``storage.append_text`` from a background thread, never from the training thread.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from pipelines import storage
from pipelines.contracts import Batch
from pipelines.faults import InputError

Cause = Literal[
    "startup", "productive", "data_wait", "checkpoint", "evaluation", "lost",
    "recovery_detect", "recovery_schedule", "recovery_load", "recovery_first_step", "idle",
]  # fmt: skip
CAUSES: tuple[Cause, ...] = get_args(Cause)


class Ledger:
    """Every second of a run under one cause.

    Exactly one cause is running at any time, so the seconds add up to wall time by construction. Seconds of training
    steps wait as *uncommitted* until a checkpoint holds the step; then they count as productive, or as lost when the
    attempt dies first. So no counter ever falls, across restarts too.

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
        clock: Any = time.time,
    ) -> None:
        """``previous`` is the last known state of the run's ledger, ``launched`` when the present command began.

        ``restarted`` is when the launcher last learnt of a death; without it, its time counts as ``schedule``.
        """
        self._clock = clock
        self.seconds: dict[str, float] = dict.fromkeys(CAUSES, 0.0)
        self._pending: deque[tuple[int, float]] = deque()
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
            self.cause, self._mark = "recovery_schedule", known
            self.enter("recovery_load")

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
            self.seconds["productive"] += self._pending.popleft()[1]

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
        state = {"start": self.start, "time": self._clock(), "seconds": dict(self.seconds)}
        return {**state, "uncommitted": self.uncommitted, "stopped": stopped}


def goodput(state: Mapping[str, Any]) -> float:
    """Productive share of wall time in [0, 1], uncommitted steps included."""
    total = sum(state["seconds"].values()) + state["uncommitted"]
    return (state["seconds"]["productive"] + state["uncommitted"]) / total if total > 0 else 0.0


class Appender:
    """Grows text files of a run without holding up the training thread.

    Files on this machine's disks are written at once, so that a killed process loses no line. For an object store the
    lines wait for a background thread, which writes them every ``interval`` seconds and at ``flush``.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self._interval = interval
        self._lines: dict[str, list[str]] = {}
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def line(self, url: str, record: Mapping[str, Any]) -> None:
        """Appends one JSON line; floats keep full precision, NaN and infinities become strings."""
        if self._error is not None:
            raise self._error
        text = json.dumps(_plain(record)) + "\n"
        if not storage.is_remote(url):
            storage.append_text(url, text)
            return
        with self._lock:
            self._lines.setdefault(url, []).append(text)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="appender", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Writes what is waiting, in the caller's thread."""
        with self._writing:
            with self._lock:
                waiting, self._lines = self._lines, {}
            for url, lines in waiting.items():
                storage.append_text(url, "".join(lines))

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


class Metrics:
    """The Prometheus metrics of one rank, under ``moviola_``, in base units."""

    def __init__(self, run: str, rank: int) -> None:
        self.registry = CollectorRegistry()
        kept = {"labelnames": ("run", "rank"), "registry": self.registry}

        def gauge(name: str, text: str) -> Any:
            return Gauge(f"moviola_{name}", text, **kept).labels(run, str(rank))

        def counter(name: str, text: str) -> Any:
            return Counter(f"moviola_{name}", text, **kept).labels(run, str(rank))

        self.step = gauge("step", "Optimizer steps of the run so far.")
        self.attempt = gauge("attempt", "Number of this attempt; 1 is the first.")
        self.loss = Gauge("moviola_loss", "Loss terms.", ("run", "rank", "term"), registry=self.registry)
        self.learning_rate = gauge("learning_rate", "Learning rate of the last step.")
        self.gradient_norm = gauge("gradient_norm", "Global gradient norm before clipping.")
        self.clips_per_second = gauge("clips_per_second", "Clips of the whole run trained on a second.")
        self.last_commit_step = gauge("last_commit_step", "Step of the newest committed checkpoint.")
        self.last_commit_time = gauge("last_commit_timestamp_seconds", "When it was committed.")
        self.uncommitted = gauge("uncommitted_seconds", "Seconds of training that no checkpoint holds yet.")
        self.read_ahead = gauge("read_ahead_clips", "Clips that are read or being read ahead of training.")
        self.read_ahead_bytes = gauge("read_ahead_bytes", "Memory that the read-ahead holds.")
        self.steps = counter("steps", "Optimizer steps of this process.")
        self.clips = counter("clips", "Clips that this rank trained on.")
        self.frames = counter("frames", "Frames that this rank trained on.")
        self.bytes_read = counter("read_bytes", "Bytes fetched from storage by the loader.")
        self.retries = counter("storage_retries", "Storage requests that were tried again.")
        self.step_seconds = Histogram(
            "moviola_step_seconds",
            "Time of one optimizer step, without data wait.",
            buckets=tuple(0.01 * 2**i for i in range(14)),
            **kept,
        ).labels(run, str(rank))
        self._goodput = Counter(
            "moviola_goodput_seconds", "Seconds of the run by cause.", ("run", "cause"), registry=self.registry
        )
        self._skipped = Counter(
            "moviola_skipped_clips", "Clips skipped, by reason.", ("run", "rank", "reason"), registry=self.registry
        )
        self.info = Info("moviola_run", "What runs.", ("run",), registry=self.registry).labels(run)
        self._run, self._rank = run, str(rank)

    def ledger(self, state: Mapping[str, Any]) -> None:
        """Raises the goodput counters to the ledger's seconds."""
        self.uncommitted.set(state["uncommitted"])
        for cause, seconds in state["seconds"].items():
            _raise_to(self._goodput.labels(self._run, cause), seconds)

    def loader(self, state: Any) -> None:
        """Takes over the loader's own counters."""
        _raise_to(self.bytes_read, state.bytes_fetched)
        _raise_to(self.retries, state.retries)
        self.read_ahead.set(state.read_ahead_clips)
        self.read_ahead_bytes.set(state.read_ahead_bytes)
        for reason, count in state.skips.items():
            _raise_to(self._skipped.labels(self._run, self._rank, reason), count)

    def terms(self, values: Mapping[str, float]) -> None:
        """Sets the loss terms and statistics of a logged step."""
        for term, value in values.items():
            self.loss.labels(self._run, self._rank, term).set(value)


def _raise_to(counter: Any, value: float) -> None:
    ahead = value - counter._value.get()
    if ahead > 0:
        counter.inc(ahead)


class Telemetry:
    """One rank's telemetry of one attempt; ``rank`` 0 also writes the run's files."""

    def __init__(
        self, *, name: str, run_url: str, rank: int, world: int, attempt: int, trace: bool, bind: str, port: int,
        tensorboard: bool = False,
    ) -> None:  # fmt: skip
        self.run_url, self.rank, self.world, self.attempt = run_url, rank, world, attempt
        self.metrics = Metrics(name, rank)
        self.metrics.attempt.set(attempt)
        self.last_commit = -1
        self._appender = Appender()
        self._trace_url = storage.join(run_url, "trace", f"rank-{rank:05d}-attempt-{attempt:04d}.jsonl")
        self._trace = trace
        self._server, self._thread = start_http_server(
            port if rank == 0 else 0, addr=bind, registry=self.metrics.registry
        )
        self.port = self._server.server_port
        self._board = _board(run_url) if tensorboard and rank == 0 else None

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line to events.jsonl (rank 0 only)."""
        if self.rank == 0:
            record = {"time": time.time(), "event": kind, "attempt": self.attempt, **fields}
            self._appender.line(storage.join(self.run_url, "events.jsonl"), record)

    def trained(self, batches: Sequence[Batch], seconds: float) -> None:
        """Counts one optimizer step of ``seconds``, data wait not included."""
        clips = sum(len(batch.places) for batch in batches if batch.weight > 0)
        self.metrics.steps.inc()
        self.metrics.step_seconds.observe(seconds)
        self.metrics.clips.inc(clips)
        self.metrics.frames.inc(sum(b.pixels_BCTHW.shape[0] * b.pixels_BCTHW.shape[2] for b in batches if b.weight > 0))

    def committed(self, step: int, ledger: Ledger) -> None:
        """Notes that a checkpoint of ``step`` is committed."""
        self.last_commit = step
        self.metrics.last_commit_step.set(step)
        self.metrics.last_commit_time.set(time.time())
        self.event("commit", step=step, ledger=ledger.state())

    def log(self, record: Mapping[str, Any], ledger: Ledger, loader_metrics: Any) -> None:
        """One logged step: a line of metrics.jsonl, the gauges, TensorBoard."""
        state = ledger.state()
        self.metrics.step.set(record["step"])
        self.metrics.ledger(state)
        self.metrics.loader(loader_metrics)
        self.metrics.terms({"loss": record["loss"], **record["terms"], **record["statistics"]})
        self.metrics.learning_rate.set(record["lr"])
        self.metrics.gradient_norm.set(record["grad_norm"])
        self.metrics.clips_per_second.set(record["clips_per_second"])
        if self.rank == 0:
            line = {"attempt": self.attempt, "world": self.world, **record, "time": state["time"], "ledger": state}
            self._appender.line(storage.join(self.run_url, "metrics.jsonl"), line)
        if self._board is not None:
            scalars = {"loss": record["loss"], "lr": record["lr"], "grad_norm": record["grad_norm"]}
            for tag, value in {**scalars, **record["terms"], **record["statistics"]}.items():
                self._board.add_scalar(f"train/{tag}", value, record["step"])

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


def _board(run_url: str) -> Any:
    if "://" in run_url and not run_url.startswith("file://"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(storage.join(run_url, "tensorboard").removeprefix("file://"))


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
