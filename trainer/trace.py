"""Proof from the traces: which clips a run was trained on, in the history that survived."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipelines import storage
from trainer.stage import Schedule
from trainer.telemetry import read_lines


@dataclass(frozen=True)
class History:
    """The surviving history of a run.

    ``lost`` and ``repeated`` are places of the global sequence; ``redone`` counts clips that an attempt trained on and
    lost because it died before they were committed; ``keys`` are the clips in the order of their places.
    """

    steps: int
    places: int
    lost: tuple[int, ...]
    repeated: tuple[int, ...]
    redone: int
    keys: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether every place was trained on exactly once."""
        return not self.lost and not self.repeated


def history(run_url: str, schedule: Schedule, steps: int) -> History:
    """Reads ``trace/*.jsonl`` and checks the first ``steps`` steps against the schedule.

    Where several attempts trained a step, the newest one's survived. A place counts as lost when no rank of that
    attempt trained it, and as repeated when two did, or when it lies outside its step's batch.
    """
    by_step: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for entry in storage.list_dir(storage.join(run_url, "trace")):
        for line in read_lines(storage.join(run_url, "trace", entry.name)):
            if line["step"] < steps:
                by_step.setdefault(line["step"], {}).setdefault(line["attempt"], []).append(line)
    seen: Counter[int] = Counter()
    wanted: set[int] = set()
    strays: list[int] = []
    keys: dict[int, str] = {}
    redone = 0
    for step in range(steps):
        plan = schedule.plan(step)
        batch = range(plan.place, plan.place + plan.clips)
        wanted.update(batch)
        attempts = by_step.get(step, {})
        newest = max(attempts, default=0)
        for attempt, lines in attempts.items():
            places = [place for line in lines for place in line["place"]]
            if attempt != newest:
                redone += len(places)
                continue
            seen.update(places)
            strays += [place for place in places if place not in batch]
            keys.update(zip(places, (key for line in lines for key in line["key"]), strict=True))
    return History(
        steps=steps,
        places=len(wanted),
        lost=tuple(sorted(wanted - seen.keys())),
        repeated=tuple(sorted([place for place, count in seen.items() if count > 1] + strays)),
        redone=redone,
        keys=tuple(keys[place] for place in sorted(keys)),
    )
