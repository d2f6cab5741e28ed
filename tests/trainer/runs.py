"""A manifest's runs in one folder, trained by real processes, cut off, and compared."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.trainer import processes
from trainer import checkpoint, manifest, trace
from trainer.telemetry import read_lines


class Runs:
    """A folder of runs, and the command that trains them."""

    def __init__(self, folder: Path, smoke: Path) -> None:
        self.folder, self.smoke = folder, smoke

    def start(self, name: str, world: int = 2, *sets: str) -> processes.Group:
        log = self.folder / f"{name}-{len(list(self.folder.glob(f'{name}-*.log')))}.log"
        log.touch()
        return processes.Group(world, self.arguments(name, *sets), log)

    def arguments(self, name: str, *sets: str) -> list[str]:
        changes = [part for change in sets for part in ("--set", change)]
        return [str(self.smoke), "--runs", str(self.folder), "--name", name, *changes]

    def train(self, name: str, world: int = 2, *sets: str, status: int = 0) -> str:
        """Trains in the foreground; what was written."""
        with self.start(name, world, *sets) as group:
            assert group.wait() == [status] * world, group.said
            return group.said

    def whole(self, zero: int) -> str:
        """The uninterrupted run of two ranks at a ZeRO stage, by name; trained when it is first asked for."""
        name = f"whole-zero{zero}"
        if not Path(self.url(name)).exists():
            self.train(name, 2, f"zero.stage={zero}")
        return name

    def cut(self, name: str, source: str, step: int) -> str:
        """A run as it is when all processes of another are killed at once, ``step`` being its newest commit."""
        shutil.copytree(self.folder / source, self.folder / name)
        for path in (self.folder / name / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        return name

    def url(self, name: str) -> str:
        return str(self.folder / name)

    def at(self, name: str, step: int) -> str:
        """The checkpoint of a step."""
        return f"{self.url(name)}/checkpoints/step-{step:08d}"

    def lines(self, name: str, log: str = "metrics") -> list[dict[str, Any]]:
        return read_lines(str(self.folder / name / f"{log}.jsonl"))

    def losses(self, name: str, attempt: int = 0) -> dict[int, Any]:
        """Loss, terms and gradient norm of each step, as the newest attempt left them (or one attempt)."""
        lines = [line for line in self.lines(name) if not attempt or line["attempt"] == attempt]
        return {line["step"]: [line[key] for key in ("loss", "terms", "statistics", "grad_norm")] for line in lines}

    def history(self, name: str) -> trace.History:
        schedule = manifest.load(self.smoke).schedule
        return trace.history(self.url(name), schedule, schedule.steps)

    def fingerprint(self, name: str) -> dict[str, str | None]:
        return checkpoint.fingerprint(self.url(name))


def until(ready: Callable[[], bool], group: processes.Group, seconds: float = 60.0) -> None:
    """Waits for a file to say something, as long as the group lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, group.said
        group.ranks[0].join(0.002)
        assert all(process.exitcode is None for process in group.ranks), group.said
