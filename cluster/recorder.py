"""What runs in Ray Train's controller: a run's restarts and resizes in its events, and a checkpoint before a resize.

Imported by the controller, so it imports little itself.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    ResizingState,
    RestartingState,
    RunningState,
)
from ray.train.v2.api.preemption import PreemptionInfo

from cluster import spare
from cluster.events import Follower, note
from cluster.worker import PEER_TROUBLE
from pipelines import storage
from pipelines.faults import InputError

DEATHS = (
    "ActorDied",
    "ActorUnavailable",
    "is unavailable",
    "died unexpectedly",
    "WorkerCrashed",
    "OutOfMemory",
    "SIGKILL",
)
"""In what Ray says of a process that is no more, or of one on a machine that does not answer."""
GONE = (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError)
"""What is raised to who waits for Ray Train's controller when its process is no more."""
HANGS = ("PeerLost", "WorkerHealthCheckTimeout")
"""Errors of a rank that waited in vain for another, and of one that answers nobody."""


class Recorder(ControllerCallback, WorkerGroupCallback):
    """Ends the launch where a restart won't help; else writes ``restart`` and ``resize`` to events.jsonl.

    Before a group that trains is taken down to be resized it is asked for a checkpoint, for ``grace`` seconds at most,
    so that no step is trained twice. ``look`` is how many seconds a running elastic group may miss a new node.
    """

    def __init__(self, run_url: str, grace: float, look: float) -> None:
        self._run_url = run_url
        self._grace, self._look = grace, look
        self._looked = 0.0
        self._group: Any = None

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Ray Train's hook."""
        self._group = worker_group
        spare.ask_later()

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Ray Train's hook; what it raises ends the run, without a restart."""
        for failed in worker_group_status.errors.values():
            original = getattr(failed, "_base_exc", failed)
            if isinstance(original, InputError):
                raise original

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ray Train's hook."""
        if isinstance(current_state, RestartingState) and not isinstance(previous_state, RestartingState):
            note(self._run_url, "restart", **why(current_state.training_failed_error))
        elif isinstance(current_state, ReschedulingState):
            failure = getattr(current_state.training_failed_error, "controller_failure", None)
            if isinstance(failure, WorkerGroupStartupFailedError):  # else it waits for machines
                raise failure.__cause__ or failure  # Ray Train would try for ever, beside what is left of the group
        elif isinstance(current_state, ResizingState):
            before, after = len(self._group.get_workers()), current_state.scaling_decision.num_workers
            committed = self._ask_to_leave()
            note(self._run_url, "resize", before=before, after=after, committed=committed)
        if not isinstance(current_state, RunningState) or time.monotonic() - self._looked > self._look:
            self._looked = time.monotonic()
            _look_again()

    def _ask_to_leave(self) -> bool:
        """Whether the group committed its last step and now waits to be taken down."""
        asked, said = time.time(), Follower(storage.join(self._run_url, "events.jsonl"))
        info = PreemptionInfo(deadline_ms=round(asked * 1000), preempted_node_to_ranks={})
        for worker in self._group.get_workers():
            worker.actor.mark_preempt.remote(info)
        while time.time() < asked + self._grace:
            for event in said.new():
                if event["event"] in ("leave", "done", "stopped", "hang", "error"):
                    return event["event"] in ("leave", "done", "stopped")
            time.sleep(2.0 if storage.is_remote(self._run_url) else 0.2)
        return False


def why(error: BaseException) -> dict[str, Any]:
    """Cause, rank (None for a whole group) and message of what ended a worker group."""
    deaths = getattr(error, "worker_failures", {})
    if not deaths:
        info = getattr(error, "preemption_info", None)
        rank = min(info.preempted_ranks, default=None) if info else None
        return {"cause": "preempted" if info else "error", "rank": rank, "message": brief(error)}
    rank, death = decisive(deaths)
    return {"cause": cause(death), "rank": rank, "message": brief(death)}


def decisive(deaths: Mapping[int, Exception]) -> tuple[int, Exception]:
    """Of the ranks that ended, the one that tells the most: a death before what it did to the others, and one that
    knows whom it waited for before one that is silent.
    """
    order = ("killed", "preempted", "hung", "error")
    return min(
        deaths.items(), key=lambda item: (order.index(cause(item[1])), "Timeout" in type(item[1]).__name__, item[0])
    )


def lost_at_start(error: BaseException) -> Exception | None:
    """The death of a worker before its group trained, or what it did to another one, where that ended Ray Train's run;
    None for other errors.
    """
    failure = getattr(error, "controller_failure", None)
    met = isinstance(failure, RayTaskError) and any(trouble in brief(failure) for trouble in PEER_TROUBLE)
    return failure if met or isinstance(failure, GONE) else None


def _look_again() -> None:
    """Has Ray count its nodes now: the view by which an elastic group is sized is else up to 20 seconds old."""
    with contextlib.suppress(Exception):  # without the actor, that view serves
        coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=2)


def cause(error: Exception) -> str:
    """``killed``, ``preempted``, ``hung``, or ``error`` for what the training function itself raised."""
    text = f"{type(error).__name__} {error}"
    if any(name in type(error).__name__ for name in HANGS):
        return "hung"
    if "Preempt" in text or getattr(error, "preempted", False):
        return "preempted"
    if any(word in text for word in DEATHS):
        return "killed"
    return "error"


def brief(error: BaseException) -> str:
    """The last line of an error, without secrets."""
    if type(error).__name__ == "WorkerHealthCheckTimeoutError":  # Ray's last line names a variable of its own
        return "it answers nobody: stopped, or on a machine that is cut off."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ray.exceptions.OutOfMemoryError):  # at length, with the news in the first line
        lines = lines[:1]
    return storage.redact(lines[-1][:500] if lines else type(error).__name__)
