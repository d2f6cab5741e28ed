"""One run through a killed worker, a SIGTERM and to its end, with the command as an operator types it; a take-over."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.controller.state import ReschedulingState, SchedulingState
from ray.train.v2.api.exceptions import PreemptionError
from ray.train.v2.api.preemption import PreemptionInfo
from rich.console import Console

from cluster import launch, recorder, runs, spare
from cluster.events import note
from cluster.recorder import Recorder, why
from pipelines.faults import InputError
from tests.trainer.test_checkpoint import commit
from trainer import manifest as manifests
from trainer import run as folder
from trainer import trace
from trainer.heartbeat import PeerLost
from trainer.lease import Fenced, Lease

ROOT = Path(__file__).parents[2]
STEPS = 40


class Command:
    """The command in a process of its own, with its own folder for temporary files. A context manager that ends it."""

    def __init__(self, arguments, scratch, place):
        self.out, self.err = place / "out", place / "err"
        compiled = {"TORCHINDUCTOR_CACHE_DIR": str(place / "compiled")}  # torch makes it when it is imported
        environment = os.environ | compiled | {"PYTHONPATH": str(ROOT), "TMPDIR": scratch}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *arguments],
                cwd=place, env=environment, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def until(self, condition):
        """Waits until ``condition`` gives something, and gives it back."""
        while not (found := condition()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.1)
                pytest.fail(f"ended with {self.process.returncode} too soon:\n{self.err.read_text()}")
        return found

    def end(self):
        """(exit status, stdout, stderr) once it has ended."""
        return self.process.wait(240), self.out.read_text(), self.err.read_text()


@pytest.fixture
def scratch():
    made = tempfile.mkdtemp(prefix="m-", dir="/tmp")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def typed_for(dataset, runs_folder):
    """A run of the demo's model, as an operator types it."""
    arguments = ["train", str(ROOT / "manifests/demo.yaml"), "--name", "tried", "--runs", str(runs_folder)]
    steps = {"first-frame": 10, "frames-3": STEPS - 16, "frames-5": 3, "frames-7": 3}
    for setting in (
        f"data={{train: {dataset}, eval: null}}",
        "clip.sizes=[[32, 32]]",
        "telemetry.log_every=1",
        "checkpoint.every_steps=5",
        *(f"stages.{stage}.steps={count}" for stage, count in steps.items()),
    ):
        arguments += ["--set", setting]
    return arguments


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_survives_all_of_it_and_every_clip_is_trained_on_once(small_dataset, tmp_path, scratch):
    arguments = typed_for(small_dataset, tmp_path / "my runs")
    run_url = str(tmp_path / "my runs" / "tried")

    def reached(step, attempt):
        return any(m["step"] >= step and m["attempt"] == attempt for m in runs.metrics(run_url))

    def starts():
        return [event for event in runs.events(run_url) if event["event"] == "start"]

    with Command(arguments, scratch, tmp_path) as first:
        first.until(lambda: reached(12, 1))
        os.kill(starts()[0]["workers"][1]["pid"], signal.SIGKILL)
        first.until(lambda: len(starts()) == 2)
        committed = starts()[1]["from_step"]
        assert committed >= 10
        first.until(lambda: reached(committed + 2, 2))
        os.killpg(first.process.pid, signal.SIGTERM)  # as timeout, systemd and Slurm do: Ray's processes get it too
        status, out, err = first.end()
        assert (status, out) == (75, ""), err
        assert "worker 1 killed; restarting from the last commit" in err
        assert f"attempt 2: 2 workers, from the checkpoint of step {committed}" in err
        assert "Traceback" not in err and "raylet" not in err
        state = runs.status(run_url)
        assert (state.state, state.restarts, state.causes) == ("stopped", 1, {"killed": 1})
        assert state.last_commit_step == state.step and f"a checkpoint of step {state.step} is committed" in err
        typed = shlex.split(err.strip().splitlines()[-1])
        assert typed[1:] == arguments

        status, out, err = Command([*typed[1:], "--json"], scratch, tmp_path).end()
        assert status == 0, err
        state = json.loads(out)
        assert (state["state"], state["step"], state["last_commit_step"]) == ("done", STEPS, STEPS)
        schedule = folder.load(run_url).schedule
        history = trace.history(run_url, schedule, STEPS)
        assert history.exact and history.places == schedule.clips
        assert os.listdir(scratch) == [], "nothing of Ray stays behind"
        assert Command(typed[1:], scratch, tmp_path).end()[0] == 0
        assert runs.status(run_url).state == "done" and len(starts()) == 3


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_processes_that_waited_take_a_killed_workers_place_and_a_killed_controller_is_replaced(
    small_dataset, tmp_path, scratch
):
    arguments = [*typed_for(small_dataset, tmp_path / "runs"), "--set", "stages.frames-3.steps=4000"]
    run_url = str(tmp_path / "runs" / "tried")

    def starts():
        return [event for event in runs.events(run_url) if event["event"] == "start"]

    def of_its_ray(name):
        found = [p for p in psutil.process_iter(["name", "environ"]) if p.info["name"].startswith(name)]
        return {p.pid for p in found if scratch in (p.info["environ"] or {}).get("TMPDIR", "")}

    with Command(arguments, scratch, tmp_path) as command:
        command.until(starts)
        ready = command.until(lambda: found if len(found := of_its_ray("ray::IDLE")) == 3 else None)
        os.kill(starts()[0]["workers"][0]["pid"], signal.SIGKILL)
        command.until(lambda: len(starts()) == 2)
        assert {worker["pid"] for worker in starts()[1]["workers"]} < ready
        (controller,) = of_its_ray("ray::TrainContr")
        os.kill(controller, signal.SIGKILL)
        command.until(lambda: len(starts()) == 3)
        command.process.send_signal(signal.SIGTERM)
        assert command.end()[0] == 75
        assert os.listdir(scratch) == [], "nothing of Ray stays behind"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [0.5, 6])  # it imports; it meets the others, as far as this machine is quick
def test_a_worker_killed_as_it_starts_is_a_restart_like_another(seconds, small_dataset, tmp_path, scratch):
    run_url = str(tmp_path / "runs" / "tried")

    def workers():
        hooked = [
            p for p in psutil.process_iter(["environ"]) if spare.HOOK.items() <= (p.info["environ"] or {}).items()
        ]
        return [p for p in hooked if p.info["environ"].get("TMPDIR") == scratch]

    with Command(typed_for(small_dataset, tmp_path / "runs"), scratch, tmp_path) as command:
        command.until(lambda: len(workers()) == 2)
        time.sleep(seconds)
        workers()[0].kill()
        status, _, err = command.end()
        assert status == 0, err
        assert runs.status(run_url).causes == {"killed": 1} and "Traceback" not in err
        assert trace.history(run_url, folder.load(run_url).schedule, STEPS).exact
        assert os.listdir(scratch) == [], "nothing of Ray stays behind"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_run_that_another_attempt_took_over_ends_with_its_number(small_dataset, tmp_path, scratch):
    run_url = str(tmp_path / "runs" / "tried")
    with Command(typed_for(small_dataset, tmp_path / "runs"), scratch, tmp_path) as command:
        command.until(lambda: runs.metrics(run_url))
        Lease.take(run_url)
        status, _, err = command.end()
        assert status == 1 and "was replaced by attempt 2" in err and "Traceback" not in err
        assert "restarting" not in err
        assert runs.status(run_url).state == "silent", "not failed: the run is the other one's now"
        assert os.listdir(scratch) == [], "nothing of Ray stays behind"


@pytest.mark.nightly
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_signal_while_ray_starts_ends_it_with_the_line_to_go_on(small_dataset, tmp_path, scratch):
    arguments = typed_for(small_dataset, tmp_path / "runs")
    run_url = str(tmp_path / "runs" / "tried")
    with Command(arguments, scratch, tmp_path) as command:
        command.until(lambda: "metrics for Prometheus" in command.err.read_text())
        command.process.send_signal(signal.SIGTERM)
        status, _, err = command.end()
        assert status == 75 and "SIGTERM: stopping before a worker has begun" in err and "Traceback" not in err
        assert "stopped before its first checkpoint. To go on:" in err
        assert shlex.split(err.strip().splitlines()[-1])[1:] == arguments
        assert [e["event"] for e in runs.events(run_url) if e["event"] in ("start", "stopped")] == ["stopped"]
        assert os.listdir(scratch) == [], "nothing of Ray stays behind"


def test_a_ray_that_does_not_start_is_a_failure_that_the_status_tells(tmp_path, small_dataset, monkeypatch):
    plain = {"name": "small", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    manifest, run_url = folder.claim(manifests.validate(plain, "m"), str(tmp_path))

    @contextlib.contextmanager
    def none(manifest):
        raise InputError("Ray did not start")
        yield

    monkeypatch.setattr(launch, "connected_ray", none)
    with pytest.raises(InputError, match="Ray did not start"):
        launch.foreground(manifest, run_url, Console(quiet=True))
    state = runs.status(run_url)
    assert (state.state, state.failure) == ("failed", "Ray did not start")


@pytest.fixture
def staged(tmp_path, small_dataset, monkeypatch):
    """A run, and ``foreground`` with a Ray that does no more than to write these events, each after the last; a
    callable among them is called.
    """
    plain = {"name": "small", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    manifest, run_url = folder.claim(manifests.validate(plain, "m"), str(tmp_path))
    gone = threading.Event()

    def foreground(*story):
        def fit(manifest, run_url, launch, scratch):
            for event in story:
                time.sleep(0.5)
                if callable(event):
                    event()
                else:
                    note(run_url, **{"launch": launch, **event})
            assert gone.wait(30), "it was not told to end"
            raise RuntimeError("it has lost its Ray")

        @contextlib.contextmanager
        def none(manifest):
            try:
                yield str(tmp_path)
            finally:
                gone.set()

        monkeypatch.setattr(launch, "connected_ray", none)
        monkeypatch.setattr(launch, "fit_again", fit)
        said = io.StringIO()
        return launch.foreground(manifest, run_url, Console(file=said, width=200)), said.getvalue()

    return foreground


def test_a_warning_before_an_attempt_trains_and_a_hang_are_shown_and_a_stop_between_two_attempts_waits_for_neither(
    staged,
):
    workers = [{"rank": 0, "host": "h", "pid": 1, "metrics": "h:1"}]
    outcome, said = staged(
        {"event": "warning", "attempt": 1, "message": "step-00000008 is damaged. Going back"},
        {"event": "start", "attempt": 1, "from_step": 4, "world": 1, "workers": workers},
        {"event": "warning", "attempt": 9, "message": "another launch's"},
        {
            "event": "restart",
            "cause": "hung",
            "rank": 0,
            "message": "rank 0 waited 9 s for rank 1, alive but elsewhere.",
        },
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert outcome == "stopped"
    assert "warning: step-00000008 is damaged. Going back" in said and "another launch's" not in said
    assert "rank 0 waited 9 s for rank 1, alive but elsewhere; restarting from the last commit" in said
    assert "SIGTERM: stopping before a worker has begun" in said


def test_a_run_is_done_only_where_its_last_checkpoint_is_whole(tmp_path):
    commit(str(tmp_path), (1, 2))
    assert launch._is_whole(str(tmp_path))
    file = tmp_path / "checkpoints/step-00000002/rank-00000.a1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert not launch._is_whole(str(tmp_path))
    (tmp_path / "checkpoints/step-00000002/manifest.json").write_text("{}")
    assert not launch._is_whole(str(tmp_path))


def test_what_a_user_is_told_of_the_end(tmp_path, small_dataset):
    plain = {"name": "small", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    manifest, run_url = folder.claim(manifests.validate(plain, "m"), str(tmp_path))
    ours = UserExceptionWithTraceback(ValueError("a defect"), "Traceback of it")
    for fault in (InputError("the disk is full"), Fenced("replaced")):
        with pytest.raises(type(fault), match=str(fault)) as told:
            errors = {0: ours, 1: UserExceptionWithTraceback(fault, "")}
            Recorder(run_url, 30, 60).after_worker_group_poll_status(SimpleNamespace(errors=errors))
        assert launch._fault(ControllerError(told.value), manifest, run_url) is told.value
    spent = launch._fault(WorkerGroupError("text", {1: RuntimeError("ActorDiedError: OOM")}), manifest, run_url)
    assert isinstance(spent, InputError)
    assert "failure.max_failures: 10" in str(spent) and "no checkpoint is committed yet" in str(spent)
    defect = WorkerGroupError("text", {0: ours})
    assert launch._fault(defect, manifest, run_url) is defect
    assert why(defect) == {"cause": "error", "rank": 0, "message": "Traceback of it"}
    killed = WorkerGroupError("text", {0: ours, 1: RuntimeError("ActorDiedError: gone")})
    assert (why(killed)["cause"], why(killed)["rank"]) == ("killed", 1), "the death, not what it did to the others"
    unreachable = WorkerGroupError("text", {1: RuntimeError("The actor 4fd6 is unavailable: RpcError")})
    assert why(unreachable)["cause"] == "killed", "a machine that is lost is no error of ours"
    waited = PeerLost("rank 0 waited 9 s in step 3 (forward and backward) for rank 1, without a sign of life for 9 s.")
    silent = WorkerHealthCheckTimeoutError("A worker health check has been hanging")
    hung = WorkerGroupError("text", {0: silent, 1: waited})
    assert why(hung) == {"cause": "hung", "rank": 1, "message": str(waited)}, "the one that says who waited for whom"
    told = launch._fault(hung, manifest, run_url)
    assert isinstance(told, InputError) and "for rank 1, without a sign of life for 9 s" in str(told)
    assert "failure.hang_seconds" in str(told) and "memory" not in str(told)
    assert "RAY_" not in why(WorkerGroupError("text", {0: silent}))["message"]
    full = OutOfMemoryError("4 worker(s) were killed due to the node running low on memory.\nat length\nset RAY_memory")
    assert why(WorkerGroupError("text", {1: full}))["cause"] == "killed"
    told = launch._fault(full, manifest, run_url)
    assert isinstance(told, InputError) and "the last was Ray Train's controller: 4 worker(s) were killed" in str(told)
    assert "running low on memory. Out of memory is the usual cause" in str(told) and "RAY_" not in str(told)
    drained = PreemptionError(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [1]}))
    assert (why(drained)["cause"], why(drained)["rank"]) == ("preempted", 1)


def test_workers_that_die_as_they_start_are_told_of_and_counted(tmp_path, small_dataset, monkeypatch):
    plain = {"name": "small", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    plain["failure"] = {"max_failures": 2}
    manifest, run_url = folder.claim(manifests.validate(plain, "m"), str(tmp_path))
    monkeypatch.setattr(recorder, "_look_again", lambda: None)
    died = ActorDiedError()
    unborn = WorkerGroupStartupFailedError("One of the worker actors failed to initialize")
    unborn.__cause__ = died

    def rescheduled(failure):
        state = ReschedulingState(ControllerError(failure))
        Recorder(run_url, 30, 60).after_controller_state_update(SchedulingState(None), state)

    rescheduled(WorkerGroupStartupTimeoutError(2))  # waits for machines, however long that takes
    with pytest.raises(ActorDiedError):
        rescheduled(unborn)

    reset = RayTaskError("setup", "Traceback\nDistNetworkError: Connection reset by peer", ConnectionError("reset"))
    ends = [ControllerError(died), ControllerError(reset), ControllerError(died)]

    def fit(*_):
        raise ends.pop(0)

    monkeypatch.setattr(launch, "fit", fit)
    monkeypatch.setattr(launch, "_free", lambda: None)
    with pytest.raises(ControllerError) as spent:
        launch.fit_again(manifest, run_url, "launch", str(tmp_path))
    state = runs.status(run_url)
    assert (state.restarts, state.causes) == (2, {"killed": 2})
    assert runs.told(runs.events(run_url)[-1]) == "a worker killed as it started; starting the group again"
    told = launch._fault(spent.value, manifest, run_url)
    assert isinstance(told, InputError) and "failure.max_failures: 2 allows; the last was one that only" in str(told)
    assert isinstance(launch._fault(died, manifest, run_url), InputError), "the controller, as often"

    ends = [ControllerError(ValueError("a defect"))]
    with pytest.raises(ControllerError, match="a defect"):
        launch.fit_again(manifest, run_url, "launch", str(tmp_path))
