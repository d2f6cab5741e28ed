"""The controller's side of a run: an embedded Ray, the trainer, the signals, and a terminal that shows how it goes."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from cluster import runs
from cluster.events import Follower, note
from cluster.service import Service
from pipelines import storage
from pipelines.faults import InputError
from trainer import checkpoint
from trainer.lease import Fenced
from trainer.manifest import RunManifest
from trainer.metrics import PACE_LINES, seconds_left
from trainer.run import Outcome, is_done

RAY_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it waits for nodes to drain; there is one
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_worker_niceness": "0",  # training is what the machine is for
    "RAY_prestart_worker_first_driver": "0",  # all of ours have an environment of their own, which those lack
}
"""Environment of an embedded Ray on CPU: quick to see a death, quick to start. What the user has set stays."""

WORKER_DEFAULTS = {"TORCHDYNAMO_DISABLE": "1", "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2"}
"""Environment of the workers, on any Ray."""


@contextlib.contextmanager
def connected_ray(manifest: RunManifest) -> Iterator[str]:
    """The cluster that ``RAY_ADDRESS`` names, or a Ray of this command's own; a folder for Ray Train's notes."""
    worker = {key: os.environ.get(key, value) for key, value in WORKER_DEFAULTS.items()}
    if manifest.compile:
        del worker["TORCHDYNAMO_DISABLE"]
    if not manifest.workers.gpus:
        worker["DS_ACCELERATOR"] = "cpu"
    joins = bool(os.environ.get("RAY_ADDRESS"))
    # A worker whose machine does not answer is as lost as one that hangs. The ranks that wait for it speak first: they
    # know who waited for whom.
    silent = 2 * manifest.failure.hang_seconds
    train = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": f"{silent}"}
    # Ray reads the environment when it is imported.
    with _defaults({**train, **({} if joins else RAY_DEFAULTS | worker)}):
        import ray._private.worker

        # Ray tells of every dead worker at length, on stdout; events.jsonl says it in a line.
        logging.getLogger("ray._private.worker").setLevel(logging.CRITICAL)
        ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
        present = signal.getsignal(signal.SIGTERM)  # stays, in place of the handler that Ray would put here
        ray._private.utils.set_sigterm_handler = lambda handler: signal.signal(signal.SIGTERM, present)
        with _joined_ray(worker) if joins else _embedded_ray(manifest) as folder:
            yield folder


@contextlib.contextmanager
def _defaults(settings: Mapping[str, str]) -> Iterator[None]:
    """The environment with ``settings`` where nothing else was set, until the block ends."""
    added = {key: value for key, value in settings.items() if key not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for key in added:
            os.environ.pop(key, None)


@contextlib.contextmanager
def _joined_ray(environment: Mapping[str, str]) -> Iterator[str]:
    """The Ray that ``RAY_ADDRESS`` names, with ``environment`` for its workers."""
    import ray

    ray.init(runtime_env={"env_vars": dict(environment)}, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with tempfile.TemporaryDirectory(prefix="moviola-") as folder:
            yield folder
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _embedded_ray(manifest: RunManifest) -> Iterator[str]:
    """A Ray of this command's own, on loopback, with its own folder (yielded); gone when the body ends."""
    import ray

    needed = manifest.workers.greatest * manifest.workers.cpus
    root = tempfile.gettempdir()
    with _folder(root if len(root) < 32 else "/tmp") as folder:  # sockets with longer paths are refused
        try:
            with _deaf(), _lean():
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, int(needed + 0.999)),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    _temp_dir=folder,
                )
        except Exception as error:
            ray.shutdown()
            if type(error) not in (Exception, RuntimeError):  # what Ray raises where its processes don't come up
                raise
            raise InputError(
                f"Ray did not start: {str(error).split('. ')[0]}. Its processes need a moment of the machine, memory "
                f"and room in {root}: end what keeps it busy or full, then give the same command again"
            ) from None
        try:
            yield folder
        finally:
            with _lean():
                ray.shutdown()


@contextlib.contextmanager
def _lean() -> Iterator[None]:
    """What ``ray.init`` and ``ray.shutdown`` take no arguments for: our start of workers, no process for logs and none
    for an autoscaler, and no second of waiting for each process to hear a SIGTERM that is blocked (:func:`_deaf`).
    """
    from ray._private import node, parameter

    class Parameters(parameter.RayParams):
        def __init__(self, **given: Any) -> None:
            setup_worker = str(Path(__file__).with_name("setup_worker.py"))
            super().__init__(**given, setup_worker_path=setup_worker, include_log_monitor=False, no_monitor=True)

    def kill(self: Any, allow_graceful: bool = False, **how: bool) -> None:
        node_kill(self, **how)

    rays, node_kill = parameter.RayParams, node.Node.kill_all_processes
    parameter.RayParams, node.Node.kill_all_processes = Parameters, kill
    try:
        yield
    finally:
        parameter.RayParams, node.Node.kill_all_processes = rays, node_kill


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """What is started in the block, and what that starts, hears no SIGTERM: one that a whole group of processes gets
    (from timeout, systemd, Slurm) is the command's to answer, and its workers are needed for a checkpoint.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _folder(root: str) -> Iterator[str]:
    """A folder for Ray. Those of commands that were killed go first: a lock that nobody holds tells them."""
    for old in Path(root).glob("moviola-*/alive"):
        with contextlib.suppress(OSError), old.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old.parent, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="moviola-", dir=root))
    try:
        with (folder / "alive").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield str(folder)
    finally:
        deadline = time.monotonic() + 5
        while folder.exists() and time.monotonic() < deadline:  # Ray's processes write as they end
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)


def fit(manifest: RunManifest, run_url: str, launch: str, scratch: str) -> Outcome:
    """One Ray Train run on the Ray that is connected; raises Ray Train's error when it failed or is out of restarts.

    Ray Train keeps its own notes below ``scratch``; none of them is needed afterwards.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2.api.config import LoggingConfig

    from cluster import spare
    from cluster.recorder import Recorder
    from cluster.worker import work

    class Trainer(TorchTrainer):
        """Without processes that deal out datasets of Ray Data, of which there are none, and that watch for a dead
        controller: one whose command lives is replaced by :func:`fit_again`, and Ray cleans up after a dead command.
        """

        def _create_default_callbacks(self) -> list[Any]:
            unused = (DatasetsCallback, PlacementGroupCleanerCallback)
            return [kept for kept in super()._create_default_callbacks() if not isinstance(kept, unused)]

    workers, failure = manifest.workers, manifest.failure
    # Ray sets it for an actor, which is too late for what was imported before.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, int(workers.cpus))))}
    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    trainer = Trainer(
        work,
        train_loop_config={"manifest": manifest.resolved(), "run_url": run_url, "launch": launch},
        torch_config=TorchConfig(
            backend="nccl" if workers.gpus else "gloo", timeout_s=max(1, round(failure.hang_seconds))
        ),
        scaling_config=ScalingConfig(
            num_workers=workers.count if isinstance(workers.count, int) else tuple(workers.count),
            use_gpu=workers.gpus > 0,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=workers.resize_seconds,
        ),
        run_config=RunConfig(
            name=manifest.name,
            storage_path=os.path.join(scratch, "train"),
            failure_config=FailureConfig(
                max_failures=failure.max_failures,
                max_preemption_failures=-1 if failure.max_preemptions == "unlimited" else failure.max_preemptions,
            ),
            worker_runtime_env={"env_vars": spare.HOOK | threads},
            callbacks=[Recorder(run_url, failure.grace_seconds, workers.resize_seconds)],
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    return trainer.fit().return_value


def fit_again(manifest: RunManifest, run_url: str, launch: str, scratch: str) -> Outcome:
    """:func:`fit`, with a new controller, as often as ``failure.max_failures`` allows, where Ray Train's own died or a
    worker did before its group trained: Ray Train gives up then, or leaves the rest of the group in its place.
    """
    from cluster.recorder import GONE, brief, cause, lost_at_start

    for left in range(manifest.failure.max_failures, -1, -1):
        try:
            return fit(manifest, run_url, launch, os.path.join(scratch, str(left)))
        except Exception as error:
            death = lost_at_start(error)
            if not left or not (death or isinstance(error, GONE)):
                raise
            kind = "preempted" if death and cause(death) == "preempted" else "killed"
            starting = {"starting": True} if death else {}
            note(run_url, "restart", cause=kind, rank=None, message=brief(death or error), **starting)
            _free()
    raise AssertionError("every turn of the loop returns or raises")


def _free() -> None:
    """Removes the placement groups of this job, which hold machines and outlive the controller that made them."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    job = ray.get_runtime_context().get_job_id()
    for number, facts in placement_group_table().items():
        if number.endswith(job) and facts["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number))))


Watcher = Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]


def foreground(
    manifest: RunManifest,
    run_url: str,
    console: Console,
    watch: Watcher | None = None,
    asked: list[int] | None = None,
) -> Outcome:
    """Trains on an embedded Ray and shows progress; the first Ctrl-C or SIGTERM asks for a committed checkpoint.

    A run whose last step is committed, and whole on storage, is done at once. ``watch`` is called with the new events
    and the new metrics a few times a second. ``asked`` holds the signals that came while the run was made ready; what
    is asked to stop while no attempt trains ends at once and leaves everything as it was. Returns ``done`` or
    ``stopped``; raises InputError when the run failed for a reason that the user can mend, Ray Train's error otherwise.
    """
    if is_done(manifest, run_url) and _is_whole(run_url):
        note(run_url, "done", step=manifest.schedule.steps)
        return "done"
    service = Service(manifest, run_url)
    note(run_url, "serving", address=service.address)
    console.print(f"metrics for Prometheus, and a report: http://{service.address}/targets, /report")
    events, metrics = (Follower(storage.join(run_url, f"{name}.jsonl")) for name in ("events", "metrics"))
    signals = asked if asked is not None else []

    def on_signal(number: int, frame: Any) -> None:
        signals.append(number)
        if len(signals) == 1:
            how = "stopping after this step, with a committed checkpoint …"
            if not training:
                how = "stopping before a worker has begun …"
            console.print(f"{signal.Signals(number).name}: {how}")
            runs.ask_to_stop(run_url, signal.Signals(number).name)
        elif len(signals) >= 3:
            console.print("stopped at once; what was trained since the last commit is lost")
            os._exit(1)
        else:
            console.print("still committing; once more to give up what was trained since the last commit")

    launch = uuid.uuid4().hex
    outcome: list[Outcome] = []
    failure: list[BaseException] = []
    attempts: set[int] = set()
    early: list[dict[str, Any]] = []
    """What attempts said before their start event, which says whose they are."""
    training = False
    scratch = ""

    def run() -> None:
        try:
            outcome.append(fit_again(manifest, run_url, launch, scratch))
        except BaseException as error:
            failure.append(error)

    def ours(new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What happened to this launch: another one may have taken the run over, and writes to the same logs."""
        nonlocal training
        attempts.update(e["attempt"] for e in new if e["event"] == "start" and e.get("launch") == launch)
        known = [*early, *new]
        mine = [e for e in known if e["attempt"] in attempts or e["event"] in ("restart", "resize")]
        early[:] = [e for e in known if e["attempt"] > max(attempts, default=0)]
        for event in mine:
            if event["event"] in ("start", "restart", "resize"):
                training = event["event"] == "start"
        return mine

    thread = threading.Thread(target=run, name="ray-train", daemon=True)

    def listen() -> dict[int, Any]:
        return {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    before = listen()
    try:
        if signals:
            raise SystemExit
        with connected_ray(manifest) as scratch, _bar(console, manifest) as show:
            listen()  # in place of the handler of Ray's C++, under which SIGTERM ends the process at once
            if signals:
                raise SystemExit
            thread.start()
            alive = True
            while alive:
                thread.join(0.3 if not storage.is_remote(run_url) else 2.0)
                alive = thread.is_alive()
                all_events, all_lines = events.new(), metrics.new()
                service.take(all_events, all_lines)
                happened = ours(all_events)
                if signals and alive and not training:  # nothing that is not committed can be saved
                    raise SystemExit
                logged = [line for line in all_lines if line["attempt"] in attempts]
                show(happened, logged)
                if watch is not None:
                    watch(happened, logged)
        if failure:
            fault = _fault(failure[0], manifest, run_url)
            if not isinstance(fault, Fenced):
                with contextlib.suppress(InputError):  # storage that can't be written may be the fault
                    note(run_url, "failed", message=storage.redact(str(fault)))
            raise fault
        return outcome[0]
    except (SystemExit, InputError) as error:
        if isinstance(error, InputError) and not (signals and not training):
            if thread.ident is None:  # Ray did not start
                note(run_url, "failed", message=storage.redact(str(error)))
            raise
        if thread.is_alive():
            thread.join(5)  # it has lost its Ray, and says so
        note(run_url, "stopped", step=checkpoint.newest_step(run_url) or 0)
        return "stopped"
    finally:
        service.take(events.new(), ())
        service.close(hurry=lambda: len(signals) > 1)
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_whole(run_url: str) -> bool:
    """Whether the newest checkpoint is what was written; where it isn't, training goes back, and says so."""
    try:
        found = checkpoint.newest(run_url)
        if found is None or found.step != checkpoint.newest_step(run_url):
            return False
        found.verify()
    except checkpoint.Damaged:
        return False
    return True


def _fault(error: BaseException, manifest: RunManifest, run_url: str) -> BaseException:
    """What a user is told of Ray Train's last error: an InputError, but for an error of ours, which stays as it is."""
    from cluster.recorder import GONE, brief, cause, decisive, lost_at_start

    inner = getattr(error, "controller_failure", error)
    if isinstance(inner, InputError):
        return inner
    deaths = getattr(inner, "worker_failures", {})
    if (
        not isinstance(inner, GONE)
        and not lost_at_start(error)
        and all(cause(death) == "error" for death in deaths.values())
    ):
        return error
    rank, death = decisive(deaths) if deaths else (None, inner)
    last = f"worker {rank}" if deaths else "one that only started" if lost_at_start(error) else "Ray Train's controller"
    committed = checkpoint.newest_step(run_url)
    kept = f"the checkpoint of step {committed} is committed" if committed else "no checkpoint is committed yet"
    remedy = "Out of memory is the usual cause (dmesg knows): lower batch, micro_batch or data.memory_mb"
    if cause(death) == "hung":
        remedy = "Its machine and its log know more; failure.hang_seconds says how long a rank may wait"
    return InputError(
        f"run {manifest.name} lost workers more often than failure.max_failures: {manifest.failure.max_failures} "
        f"allows; the last was {last}: {brief(death).rstrip('.')}. {remedy}. {kept}, and the same command "
        "goes on from there."
    )


@contextlib.contextmanager
def _bar(console: Console, manifest: RunManifest) -> Iterator[Watcher]:
    """A progress bar on a terminal; a line every few seconds elsewhere."""
    schedule = manifest.schedule
    progress = Progress(
        TextColumn("{task.fields[stage]:<14}"),
        BarColumn(bar_width=None),
        TextColumn("step {task.completed:>6.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[left]}"),
        console=console,
        disable=not console.is_terminal,
        expand=True,
    )
    task = progress.add_task("train", total=schedule.steps, stage="starting", loss="", speed="", left="")
    last_line = 0.0
    lately: deque[dict[str, Any]] = deque(maxlen=PACE_LINES)

    def show(happened: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        nonlocal last_line
        for event in happened:
            if event["event"] in ("start", "restart", "resize", "warning"):
                style = None if event["event"] == "start" else "yellow"
                console.print(runs.told(event), style=style, markup=False)
        if not logged:
            return
        lately.extend(logged)
        last = logged[-1]
        done, seconds = last["step"] + 1, seconds_left(schedule, lately)
        loss, speed = f"loss {float(last['loss']):.4f}", f"{last['clips_per_second']:.1f} clips/s"
        left = f"{runs.clock(seconds)} left"
        progress.update(task, completed=done, stage=last["stage"], loss=loss, speed=speed, left=left)
        if not console.is_terminal and (time.monotonic() - last_line > 5 or done == schedule.steps):
            last_line = time.monotonic()
            console.print(f"{last['stage']:<14} step {done:>6}/{schedule.steps}  {loss}  {speed}  {left}")

    with progress:
        yield show
