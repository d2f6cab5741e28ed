"""``make demo``: the main job on this machine in a few minutes, a killed worker included."""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cluster import launch, runs
from cluster.cli import guarded
from cluster.runs import clock
from pipelines import pack, storage, synthetic
from pipelines.faults import InputError
from trainer import examine, run, trace
from trainer import manifest as manifests

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"


class Killer:
    """Kills one worker with SIGKILL once half of the steps are trained, and notes when the run came back."""

    def __init__(self, steps: int, console: Console) -> None:
        self._half = steps // 2
        self._console = console
        self._workers: list[dict[str, Any]] = []
        self.killed_at: float | None = None
        self.step: int | None = None
        self.victim: dict[str, Any] | None = None
        self.back_from: int | None = None
        self.back_after: float | None = None

    def __call__(self, events: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
        """Looks at what is new, and acts once."""
        for event in events:
            if event["event"] == "start":
                self._workers = event["workers"]
                if self.killed_at is not None and self.back_from is None:
                    self.back_from = event["from_step"]
        if self.killed_at is None and metrics and metrics[-1]["step"] >= self._half and self._workers:
            self.victim = self._workers[-1]
            self.step = metrics[-1]["step"]
            self.killed_at = time.time()
            os.kill(self.victim["pid"], signal.SIGKILL)
            text = f"SIGKILL to worker {self.victim['rank']} (pid {self.victim['pid']}) after step {self.step}"
            self._console.print(text, style="red")
        elif self.back_from is not None and self.back_after is None and metrics:
            self.back_after = metrics[0]["time"] - self.killed_at

    def line(self, history: trace.History) -> str:
        """What happened, in one line."""
        if self.victim is None or self.killed_at is None or self.back_from is None:
            return "no worker was killed: the run was over too soon"
        at = time.strftime("%H:%M:%S", time.localtime(self.killed_at))
        again = f" ({history.redone} clips were trained again)" if history.redone else ""
        verdict = (
            f"{history.places} places of the clip sequence, each in the final weights exactly once: "
            f"none lost, none repeated"
            if history.exact
            else f"{len(history.lost)} clips LOST and {len(history.repeated)} REPEATED"
        )
        return (
            f"worker {self.victim['rank']} was killed at {at} after step {self.step}; it was training again "
            f"{self.back_after or 0:.1f} s later, from the checkpoint of step {self.back_from}{again}; {verdict}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Packs, trains through a kill, evaluates, draws; the exit status is the command's."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--videos", help="folder of videos; without it, procedural footage")
    parser.add_argument("--data", default="demo_data", help="where footage and shards go")
    parser.add_argument("--runs", default=os.environ.get("MOVIOLA_RUNS", "runs"), help="where the run goes")
    options = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 120)
    return guarded(lambda: demo(options.videos, options.data, options.runs, console))


def demo(videos: str | None, data: str, runs: str, console: Console) -> int:
    """The main job; returns the exit status. Raises InputError for faults of input."""
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(Text(f"{clock(time.monotonic() - began):>6}", "bold"), "", text)

    shards = shards_of(videos, data, say)
    wanted = manifests.load(MANIFESTS / "demo.yaml", [f"data.train={shards}/train", f"data.eval={shards}/eval"])
    run_url = run.url_of(runs, wanted.name)
    make_way(run_url, data, say)
    claimed, run_url = run.claim(wanted, runs)
    stages = ", ".join(f"{stage.name} ({stage.steps} steps)" for stage in claimed.schedule.stages)
    say(f"training {claimed.recipe} on {claimed.workers.greatest} workers, ZeRO-{claimed.zero.stage}: {stages}")
    killer = Killer(claimed.schedule.steps, console)
    if launch.foreground(claimed, run_url, console, killer) == "stopped":
        console.print("stopped, with a committed checkpoint; to go on without the kill:")
        console.print(f"  .venv/bin/moviola resume {shlex.quote(run_url)}")
        return 75
    history = trace.history(run_url, claimed.schedule, claimed.schedule.steps)
    say(killer.line(history))
    say(f"evaluating on the clips held back (to do it again: .venv/bin/moviola evaluate {shlex.quote(run_url)})")
    report = examine.evaluate_checkpoint(run_url, shards + "/eval", run_url=run_url)
    console.print(report.table())
    samples = storage.join(run_url, "samples")
    for title, path in (
        ("table", storage.join(run_url, "evaluation.json")),
        ("pictures", samples),
        ("checkpoints", storage.join(run_url, "checkpoints")),
        ("log", storage.join(run_url, "metrics.jsonl")),
    ):
        console.print(f"{title:>12}  {path}")
    say("done")
    return 0 if history.exact else 1


def make_way(run_url: str, data: str, say: Callable[[str], None]) -> None:
    """Removes the run of an earlier demo; raises InputError where another manifest has made it."""
    old = run.load(run_url, missing_ok=True)
    if old is None:
        return
    if not old.data.train[0].dataset.startswith(storage.join(storage.absolute(data), "shards-")):
        raise InputError(f"{run_url} was not made by the demo and would be lost; rename it, or give --runs", status=2)
    if runs.status(run_url).state == "running":
        raise InputError(
            f"{run_url} is an earlier demo that still trains; wait for it, or end it: "
            f".venv/bin/moviola stop {shlex.quote(run_url)}"
        )
    say(f"{run_url} is from an earlier demo and is made anew")
    storage.delete(run_url, recursive=True)


def shards_of(videos: str | None, data: str, say: Callable[[str], None]) -> str:
    """Packs the footage, or finds it packed; the folder with ``train`` and ``eval``.

    ``shards`` in ``data`` is a link to it: where the smoke manifests look.
    """
    source = Path(videos) if videos else Path(data) / "procedural"
    if not videos and not source.exists():
        say("making procedural footage with known flow")
        draft = source.with_name("procedural.part")
        synthetic.write_videos(draft, count=40)
        draft.rename(source)
    rules = pack.load_rules(str(MANIFESTS / "datasets" / "demo.yaml"))
    found = sorted((str(path), path.stat().st_size) for path in source.rglob("*") if path.is_file())
    name = hashlib.sha256(f"{str(source.resolve())!r} {found} {rules}".encode()).hexdigest()[:8]
    shards = str(Path(data) / f"shards-{name}")
    say(f"packing clips of {source} into WebDataset shards in {shards}")
    say(pack.pack(str(source), shards, rules).text())
    link = Path(data) / "shards.new"
    link.unlink(missing_ok=True)
    link.symlink_to(f"shards-{name}")
    link.replace(Path(data) / "shards")
    return shards


if __name__ == "__main__":
    sys.exit(main())
