"""What Ray Train's controller writes into a run's events. Imported by the controller, so it imports little itself."""

from __future__ import annotations

import json
import time
from typing import Any

from ray.train import UserCallback

from pipelines import storage
from pipelines.faults import InputError


class Recorder(UserCallback):
    """Ends the launch where a restart won't help; else writes a worker's death and its cause to events.jsonl."""

    def __init__(self, run_url: str) -> None:
        self._url = storage.join(run_url, "events.jsonl")

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Ray Train's hook; called once for each restart. What it raises ends the run, without one."""
        for failed in worker_exceptions.values():
            original = getattr(failed, "_base_exc", failed)
            if isinstance(original, InputError):
                raise original
        rank, error = min(worker_exceptions.items(), key=lambda item: (cause(item[1]) == "error", item[0]))
        record = {"time": time.time(), "event": "restart", "attempt": 0, "cause": cause(error), "rank": rank}
        storage.append_text(self._url, json.dumps({**record, "message": brief(error)}) + "\n")


def cause(error: Exception) -> str:
    """``killed``, ``preempted``, or ``error`` for what the training function itself raised."""
    text = f"{type(error).__name__} {error}"
    if "Preempt" in text:
        return "preempted"
    if any(word in text for word in ("ActorDied", "ActorUnavailable", "died unexpectedly", "WorkerCrashed", "SIGKILL")):
        return "killed"
    return "error"


def brief(error: BaseException) -> str:
    """The last line of an error, without secrets."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return storage.redact(lines[-1][:500] if lines else type(error).__name__)
