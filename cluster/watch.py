"""A run in a terminal, live: progress, curves, where time goes, and what happened last. Read from storage alone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cluster import runs
from cluster.events import Follower
from pipelines import storage
from trainer.manifest import RunManifest
from trainer.run import load

BLOCKS = "▁▂▃▄▅▆▇█"
COLOURS = {
    "productive": "green", "uncommitted": "bright_green", "startup": "bright_black", "data_wait": "yellow",
    "checkpoint": "blue", "evaluation": "magenta", "lost": "red", "recovery": "bright_red", "idle": "white",
}  # fmt: skip
ENDED = ("done", "stopped", "failed")
BEGINNING = {
    "start": "", "launch": "starting", "driver": "starting", "restart": "restarting", "resize": "changing its size",
}  # fmt: skip
"""What a run does between such an event and the start of an attempt."""


def watch(run_url: str, console: Console, every: float = 0.5) -> None:
    """Shows a run until it ends or Ctrl-C; where there is no terminal, or it has ended, once."""
    manifest = load(run_url)
    assert manifest is not None
    every = every if not storage.is_remote(run_url) else 5.0
    page = Page(manifest, run_url)
    if not console.is_terminal or page.status.state in ENDED:
        console.print(page.render(console.width))
        return
    with Live(page.render(console.width), console=console, refresh_per_second=4, screen=False) as live:
        while page.status.state not in ENDED:
            time.sleep(every)
            page.look()
            live.update(page.render(console.width))


class Page:
    """What is known of a run, and how it looks."""

    def __init__(self, manifest: RunManifest, run_url: str) -> None:
        self.manifest, self._url = manifest, run_url
        self._followers = [Follower(storage.join(run_url, f"{log}.jsonl")) for log in ("events", "metrics")]
        self.events = runs.events(run_url)
        self._lines = {line["step"]: line for line in runs.metrics(run_url)}
        self.status = runs.status(run_url, manifest)

    def look(self) -> None:
        """Takes in what is new."""
        events, lines = (follower.new() for follower in self._followers)
        self.events += [event for event in events if event not in self.events[-50:]]
        self._lines |= {line["step"]: line for line in lines}
        self.status = runs.status(self._url, self.manifest)

    def render(self, width: int) -> RenderableType:
        """The page for a terminal of that width."""
        lines = [self._lines[step] for step in sorted(self._lines)]
        room = max(10, min(60, width - 34))
        parts: list[RenderableType] = [self._head(), self._progress(room)]
        curves = self._curves(lines, room)
        if curves.row_count:
            parts.append(curves)
        if self.status.ledger:
            parts.append(self._time(max(10, width - 4)))
        parts.append(self._events())
        return Panel(Group(*parts), title=f"[b]{self.status.name}[/b]", width=width, title_align="left")

    def _head(self) -> Text:
        s = self.status
        style = {"running": "green", "done": "blue", "failed": "red", "silent": "red", "stopped": "yellow"}
        text = Text.assemble((s.state, f"bold {style.get(s.state, '')}"))
        began = next((each for each in reversed(self.events) if each["event"] in BEGINNING), None)
        if s.state == "running" and began and began["event"] != "start":
            text.append(f", {BEGINNING[began['event']]} for {runs.clock(max(0.0, time.time() - began['time']))}")
        text.append(f"  attempt {s.attempt}" if s.attempt else "")
        causes = ", ".join(f"{cause} {count}" for cause, count in s.causes.items())
        text.append(f"  restarts {s.restarts}" + (f" ({causes})" if causes else ""))
        committed = "none yet" if s.last_commit_step is None else f"step {s.last_commit_step}"
        text.append(f"  committed {committed}")
        if s.seconds_left is not None:
            text.append(f"  {runs.clock(s.seconds_left)} left")
        if s.state == "silent":
            heard = max(each["time"] for each in (*self.events, *self._lines.values()))
            text.append(
                f"\nlast heard of {runs.clock(time.time() - heard)} ago; moviola resume {s.name} goes on", "red"
            )
        if s.failure:
            text.append(f"\n{s.failure}", "red")
        return text

    def _progress(self, room: int) -> Table:
        schedule, s = self.manifest.schedule, self.status
        index = schedule.index(min(s.step, schedule.steps - 1))
        stage, first = schedule.stages[index], schedule.first_steps[index]
        table = Table.grid(padding=(0, 1))
        for name, done, steps in (
            (stage.name, min(s.step - first, stage.steps), stage.steps),
            ("run", s.step, s.steps),
        ):
            table.add_row(f"{name:<14}", ProgressBar(total=steps, completed=done, width=room), f"{done}/{steps}")
        return table

    def _curves(self, lines: Sequence[dict[str, Any]], room: int) -> Table:
        evaluated = {event["step"]: event["psnr_db"] for event in self.events if event["event"] == "evaluation"}
        curves = {
            "loss": [line["loss"] for line in lines],
            "gradient norm": [line["grad_norm"] for line in lines],
            "clips/s": [line["clips_per_second"] for line in lines],
            "PSNR dB": [evaluated[step] for step in sorted(evaluated)],
        }
        table = Table.grid(padding=(0, 1))
        for name, values in curves.items():
            shown = [float(value) for value in values if value is not None]
            if shown:
                table.add_row(f"{name:<14}", Text(sparkline(shown, room), "cyan"), f"{shown[-1]:.4g}")
        return table

    def _time(self, width: int) -> RenderableType:
        seconds = by_cause(self.status.ledger)
        total = sum(seconds.values()) or 1.0
        bar, legend = Text(), Text()
        for cause, cells in zip(seconds, portions(list(seconds.values()), width), strict=True):
            bar.append("█" * cells, COLOURS[cause])
            if seconds[cause] / total >= 0.005:
                legend.append("█ ", COLOURS[cause])
                legend.append(f"{cause.replace('_', ' ')} {seconds[cause] / total:.0%}  ")
        share = Text(f"goodput {self.status.goodput or 0:.1%} of {runs.clock(total)}")
        return Group(share, bar, legend)

    def _events(self) -> Table:
        table = Table.grid(padding=(0, 1))
        told = [event for event in self.events if event["event"] not in ("commit", "serving", "launch")][-6:]
        for event in told:
            at = time.strftime("%H:%M:%S", time.localtime(event["time"]))
            said = storage.redact(runs.told(event))
            table.add_row(Text(at, "bright_black"), Text(said, overflow="ellipsis", no_wrap=True))
        return table


def by_cause(ledger: dict[str, float] | Any) -> dict[str, float]:
    """Seconds by what a reader tells apart: the four parts of a recovery are one."""
    found = dict.fromkeys(COLOURS, 0.0)
    for cause, seconds in ledger.items():
        found["recovery" if cause.startswith("recovery") else cause] += seconds
    return found


def portions(values: Sequence[float], cells: int) -> list[int]:
    """Whole cells for each value, in proportion, adding up to ``cells``: the largest remainders are rounded up."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [value / total * cells for value in values]
    whole = [int(share) for share in exact]
    order = sorted(range(len(values)), key=lambda i: exact[i] - whole[i], reverse=True)
    for i in order[: cells - sum(whole)]:
        whole[i] += 1
    return whole


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as blocks, a mean of neighbours each where there are more than ``width``; NaN is a gap."""
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    finite = [value for value in values if value - value == 0]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] if value - value == 0 else " " for value in values)
