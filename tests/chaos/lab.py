"""What every test of this folder starts from: a small model through all stages of its recipe, and what must hold.

A *lab* is a folder with a manifest, its runs, and the uninterrupted runs that others are held against.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines import storage
from tests.trainer import processes
from trainer import checkpoint, manifest, trace
from trainer.telemetry import read_lines

STAGES = ("first-frame", "frames-3", "frames-5", "frames-7")
LOSSES = {"mse": 1, "ssim": 0.1, "lpips": 0}


def smoke(dataset: str, steps: int, **changes: Any) -> dict[str, Any]:
    """A manifest as plain data: ``steps`` in each stage, two workers, everything of a run written down."""
    spynet = {"levels": 1, "widths": [8, 8, 4, 4], "kernel": 3}
    first_frame = {"kind": "own", "down": 4, "channels": 4, "widths": [4, 4, 4]}
    small = {"motion_channels": 2, "supplement_channels": 2, "widths": [4, 4, 4], "motion_width": 4, "state_width": 4}
    return {
        "name": "smoke",
        "recipe": "arvae",
        "model": {"down": 4, **small, "spynet": spynet, "first_frame": first_frame, "perceptual": None},
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "clip": {"sizes": [[32, 32]]},
        "stages": {name: {"steps": steps, "losses": dict(LOSSES)} for name in STAGES},
        **_run(dataset),
        **changes,
    }


def rivals(dataset: str, steps: int, **changes: Any) -> dict[str, Any]:
    """The same of DeCo-VAE: 4 times ``steps`` in all, of which the last ``steps`` against an adversary."""
    backbone = {"low": 4, "high": 6, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1}
    losses = {"l1": 1, "lpips": 0, "kl": 1e-6, "dwt_low": 0.1, "dwt_high": 0.1}
    adversary = {"start": steps, "network": {"width": 4, "layers": 2}, "adaptive": 10.0, "lecam": 0.1}
    return {
        "name": "rivals",
        "recipe": "decovae",
        "model": {"latent_channels": 2, "backbone": backbone, "motion": {"width": 4, "latent": 4}, "perceptual": None},
        "optimizer": {"lr": 1e-3, "warmup": 0},
        "clip": {"frames": 5, "sizes": [[32, 32]]},
        "stages": {
            "motion": {"steps": steps},
            "static": {"steps": steps, "losses": dict(losses)},
            "dynamic": {"steps": 2 * steps, "losses": losses, "adversary": adversary},
        },
        **_run(dataset),
        **changes,
    }


def _run(dataset: str) -> dict[str, Any]:
    """What is no model's own: two workers, everything of a run written down."""
    return {
        "data": {"train": dataset},
        "batch": 4,
        "precision": "fp32",
        "ema": 0.9,
        "workers": {"count": 2},
        "checkpoint": {"every_steps": 2, "keep": 3},
        "failure": {"hang_seconds": 60},
        "telemetry": {"log_every": 1, "tensorboard": False},
        "trace": True,
    }


class Lab:
    """A folder or URL of runs of one manifest."""

    def __init__(self, folder: Path, plain: Mapping[str, Any], runs: str | None = None) -> None:
        self.folder = folder
        self.runs = runs or str(folder / "runs")
        folder.mkdir(exist_ok=True)
        self.path = folder / "smoke.yaml"
        self.path.write_text(yaml.safe_dump(dict(plain)))
        self.manifest = manifest.load(self.path)
        self.steps = self.manifest.schedule.steps
        self._logs = 0

    def start(self, name: str, *sets: str, world: int = 2, env: Mapping[str, str] | None = None) -> processes.Group:
        """The ranks of an attempt, meeting as torchrun's do."""
        self._logs += 1
        log = self.folder / f"{name}-{self._logs}.log"
        log.touch()
        return processes.Group(world, self.arguments(name, *sets), log, env)

    def arguments(self, name: str, *sets: str) -> list[str]:
        """What the trainer and the command take."""
        changes = [part for change in sets for part in ("--set", change)]
        return [str(self.path), "--runs", self.runs, "--name", name, *changes]

    def train(self, name: str, *sets: str, world: int = 2) -> str:
        """Trains to the end."""
        with self.start(name, *sets, world=world) as group:
            assert group.wait(240) == [0] * world, group.said
        return name

    def whole(self, zero: int) -> str:
        """The uninterrupted run of a ZeRO stage, by name."""
        name = f"whole-{zero}"
        if not storage.exists(f"{self.url(name)}/lease.json"):
            self.train(name, f"zero.stage={zero}")
        return name

    def url(self, name: str) -> str:
        """The run of that name."""
        return storage.join(self.runs, name)

    def lines(self, name: str, log: str = "metrics") -> list[dict[str, Any]]:
        """Lines of one of its logs."""
        return read_lines(storage.join(self.url(name), f"{log}.jsonl"))

    def events(self, name: str, *kinds: str) -> list[dict[str, Any]]:
        """Its events of those kinds, in order."""
        return [event for event in self.lines(name, "events") if event["event"] in kinds]

    def losses(self, name: str) -> dict[int, float]:
        """Loss of each step, as the newest attempt left it."""
        return {line["step"]: line["loss"] for line in self.lines(name)}

    def history(self, name: str, steps: int | None = None) -> trace.History:
        """Which clips it was trained on."""
        return trace.history(self.url(name), self.manifest.schedule, steps or self.steps)

    def fingerprint(self, name: str) -> dict[str, str | None]:
        """Digests of its newest checkpoint."""
        return checkpoint.fingerprint(self.url(name))

    def imbalance(self, name: str) -> float:
        """Share of the wall time, from the first launch to the last event, that its ledger has no cause for."""
        happened = self.lines(name, "events")
        last = max((e for e in happened if "ledger" in e), key=lambda event: event["ledger"]["time"])
        wall = last["ledger"]["time"] - happened[0]["time"]
        return abs(sum(last["ledger"]["seconds"].values()) + last["ledger"]["uncommitted"] - wall) / wall


def until(ready: Callable[[], bool], wait: Callable[[], Any], alive: Callable[[], bool], seconds: float) -> bool:
    """Waits until something is so, as long as what should bring it about lives; whether it came."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline or not alive():
            return ready()
        wait()
    return True


def reached(lab: Lab, name: str, group: processes.Group, ready: Callable[[Sequence[dict[str, Any]]], bool]) -> bool:
    """Waits until the run's metrics are so; False where the group ended before."""
    return until(
        lambda: ready(lab.lines(name)),
        lambda: group.ranks[0].join(0.005),
        lambda: all(process.exitcode is None for process in group.ranks),
        120,
    )
