"""What one Ray Train worker does: a device, threads, and the one loop.

Ray's controller reads this module too, to hand :func:`work` over, so that torch and DeepSpeed, which take seconds to
import, are imported where they are used.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from cluster import spare
from pipelines import storage
from pipelines.faults import InputError

if TYPE_CHECKING:
    from trainer.signals import Signals

PEER_TROUBLE = (
    "Connection closed by peer",
    "Connection reset",
    "Timed out",
    "timed out",
    "NCCL",
    "gloo",
    "Broken pipe",
)


def work(config: dict[str, Any]) -> str:
    """Ray Train's ``train_loop_per_worker``; ``config`` holds the manifest as plain data and the run's URL.

    Returns how the run ended. An InputError ends the launch (see :class:`cluster.recorder.Recorder`): a fault of input,
    an error of ours that comes back, or the news that another launch has taken the run over. Anything else is raised,
    and Ray Train restarts the group within the manifest's budget.
    """
    import torch

    from trainer import loop
    from trainer.manifest import RunManifest

    run_url = config["run_url"]
    manifest = RunManifest.model_validate(config["manifest"])
    device = torch.device("cuda", 0) if manifest.workers.gpus and torch.cuda.is_available() else torch.device("cpu")
    torch.set_num_threads(max(1, int(manifest.workers.cpus)))

    def begun(signals: Signals) -> None:
        _listen(signals, manifest.failure.grace_seconds)
        spare.ask_later()

    try:
        return loop.train(manifest, run_url, loop.World.current(device), launch=config["launch"], on_start=begun)
    except InputError:
        raise
    except Exception as error:
        if _again(run_url, error):
            story = "".join(traceback.format_exception(error))
            raise InputError(f"the same error twice, so a restart won't help:\n{story}") from None
        raise


def _listen(signals: Signals, grace: float) -> None:
    """Passes on the notice that Ray Train gives a worker group when one of its nodes drains.

    ``grace`` in seconds stands in for a deadline that the notice does not name.
    """
    context = get_internal_train_context().preemption_context

    def watch() -> None:
        # What ray.train.get_preemption_info() broadcasts, read where it lies: that call is a barrier in the
        # training thread, and ranks agree on the notice by themselves.
        while signals.open:
            info = context.preemption_info
            if info is not None:
                signals.notice(info.deadline_ms / 1000 if info.deadline_ms else time.time() + grace)
            time.sleep(0.5)

    threading.Thread(target=watch, name="preemption-watch", daemon=True).start()


def _again(run_url: str, error: Exception) -> bool:
    """Files the error as an event; True where the attempt before ended with the same one. A lost peer doesn't count."""
    from trainer.heartbeat import PeerLost
    from trainer.telemetry import read_lines

    message = storage.redact(f"{type(error).__name__}: {error}")[:2000]
    if any(trouble in message for trouble in PEER_TROUBLE):
        return False
    url = storage.join(run_url, "events.jsonl")
    before = [e for e in read_lines(url, tail_bytes=1 << 16) if e["event"] == "error"]
    attempt = max((e["attempt"] for e in read_lines(url) if e["event"] == "start"), default=0)
    hung = isinstance(error, PeerLost)
    record = {"time": time.time(), "event": "hang" if hung else "error", "attempt": attempt, "message": message}
    storage.append_text(url, json.dumps(record) + "\n")
    return not hung and any(e["message"] == message and e["attempt"] == attempt - 1 for e in before)
