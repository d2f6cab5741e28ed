"""What telemetry and scraping cost the training thread, as a share of a step.

    python -m benchmarks.telemetry [--minutes 2.5] [--hardware 2cpu]

Their cost is a time, the same whatever the model; so it is measured on small steps, thousands of them, where a
difference of 0.1 ms shows, and then set beside the steps of the demo's model (stage frames-3, 4 clips of 64x64), timed
in the same process before. The small steps are real ones of the same recipe, narrower, on 4 pictures of 32x32 that were
loaded before.

Steps come in rounds of five in drawn order, in one process and one run:

``off``      the step alone
``counted``  and what every step does: counted, traced, the ledger kept
``logged``   and what one step in ten does besides, the default: figures reduced, a line of metrics.jsonl, gauges,
             TensorBoard
``ledger``   the step alone, while ledger.json is written by a thread beside it, as each other second
``scraped``  the step alone, while another process is served: the rank's and the run's metrics, which a launcher
             otherwise serves from a process of its own

The cost of each is its median difference from ``off`` within rounds, with a 95% interval of 2000 bootstrap samples of
rounds. A step as in a run costs ``counted``, a tenth of ``logged`` less ``counted``, ``ledger`` each other second, and
``scraped`` each 15 seconds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

from pipelines import pack, synthetic
from trainer import loop, run
from trainer import manifest as manifests
from trainer.engine import Engine
from trainer.telemetry import Ledger, Telemetry

ROOT = Path(__file__).resolve().parents[1]
SCRAPER = """
import sys, urllib.request
for line in sys.stdin:
    if line == "scrape\\n":
        urllib.request.urlopen(sys.argv[1]).read()
"""
ARMS = ("off", "counted", "logged", "ledger", "scraped")
LOG_EVERY = 10
LEDGER_EVERY, SCRAPE_EVERY = 2.0, 15.0
DEMO_STEPS, BATCHES, WARM_UP = 24, 8, 10
STAGES = ("first-frame", "frames-3", "frames-5", "frames-7")
SMALL = ["model.widths=[4, 4, 8, 8]", "model.motion_width=4", "model.state_width=4", "clip.sizes=[[32, 32]]",
         "model.spynet={levels: 2, widths: [8, 8, 4, 4], kernel: 3}"]  # fmt: skip


class Training:
    """A run of the demo's recipe in this process, one step at a time."""

    def __init__(self, name: str, stage: str, folder: str, sets: list[str]) -> None:
        sets = [
            f"data.train={folder}/shards/train",
            "data.eval=null",
            "workers.count=1",
            "batch=4",
            "trace=true",
            *sets,
        ]
        sets += [f"stages.{each}={{steps: 0}}" for each in STAGES if each != stage]
        sets += [f"stages.{stage}.steps=1000000", f"stages.{stage}.batch=4", "batch=4", f"name={name}"]
        self.manifest, url = run.claim(manifests.load(ROOT / "manifests/demo.yaml", sets), f"{folder}/runs")
        self.world, self.ledger = loop.World(0, 1, torch.device("cpu")), Ledger()
        self.telemetry = Telemetry(self.manifest, url, alone=True)
        self._stage, self._recipe = self.manifest.schedule.stages[0], self.manifest.loaded_recipe
        self._spec = self.manifest.optimizer_for(self._stage)
        self._engine = Engine(self._recipe.build(0), self._stage, self._spec, zero_stage=0)
        self._clips = loop.open_loader(self.manifest, self.world, self.telemetry.budget)

        self._loaded = [batches for _, (_, batches) in zip(range(BATCHES), self._clips.iter_from(0), strict=False)]

    def step(self, arm: str, step: int) -> None:
        """One step, and what is to be done in it."""
        batches = self._loaded[step % BATCHES]
        began, outputs = time.perf_counter(), []
        for batch in batches:
            output = self._recipe.step(self._engine.model, batch, self._stage, self._recipe.teachers())
            self._engine.backward(output.loss)
            outputs.append((1.0, output))
        norm = self._engine.step(self._spec.lr)
        if arm not in ("counted", "logged"):
            return
        self.telemetry.trained(step, batches, time.perf_counter() - began, 1e9)
        self.telemetry.trace(step, self._stage.name, batches)
        if arm == "logged":
            means, summed = loop._reduced(outputs, self.telemetry.sums(self._clips.metrics), self.world)
            record = {"step": step, "stage": self._stage.name, **means, "lr": self._spec.lr, "grad_norm": norm}
            record |= {"epochs": self._clips.epochs(self.manifest.schedule.plan(step)), "clips_per_second": 1.0}
            self.telemetry.log({**record, "seconds_per_pixel": 1e-9}, summed, self.ledger, self._clips.metrics)
        self.telemetry.alive(step + 1, self.ledger)

    def close(self) -> None:
        """Ends it."""
        self._clips.close()
        self.telemetry.close()


def measure(minutes: float, folder: str) -> tuple[np.ndarray, float]:
    """Seconds of steps, (rounds, arms), and the median second of a step of the demo's model."""
    demo, times = Training("demo", "frames-3", folder, []), []
    for step in range(DEMO_STEPS + 1):
        began = time.perf_counter()
        demo.step("off", step)
        times.append(time.perf_counter() - began)
    demo.close()
    small, coin, rounds = Training("small", "first-frame", folder, SMALL), random.Random(0), []
    command = [sys.executable, "-c", SCRAPER, f"http://{small.telemetry.address}/metrics"]
    scraper = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, bufsize=1)
    assert scraper.stdin is not None
    due = threading.Event()

    def write() -> None:
        while due.wait():
            due.clear()
            small.telemetry.flush()

    threading.Thread(target=write, daemon=True).start()
    deadline, order, step = time.perf_counter() + 60 * minutes, list(ARMS), 0
    try:
        while time.perf_counter() < deadline:
            coin.shuffle(order)
            took = {}
            for arm in order:
                began = time.perf_counter()
                scraper.stdin.write("scrape\n" if arm == "scraped" else "rest\n")
                if arm == "ledger":
                    small.telemetry.alive(step, small.ledger)
                    due.set()
                small.step(arm, step)
                took[arm] = time.perf_counter() - began
                step += 1
            rounds.append([took[arm] for arm in ARMS])
    finally:
        scraper.kill()
        scraper.wait()
        small.close()
    return np.array(rounds[WARM_UP:]), statistics.median(times[1:])


def costs(seconds: np.ndarray, step: float) -> dict[str, float]:
    """Seconds that each arm costs, and that a step as in a run costs where it takes ``step`` seconds."""
    found = {arm: float(np.median(seconds[:, i] - seconds[:, 0])) for i, arm in enumerate(ARMS) if i}
    each = found["counted"] + (found["logged"] - found["counted"]) / LOG_EVERY
    return {**found, "all": each + step * (found["ledger"] / LEDGER_EVERY + found["scraped"] / SCRAPE_EVERY)}


def report(seconds: np.ndarray, demo: float) -> str:
    draw = np.random.default_rng(0)
    middle = costs(seconds, demo)
    drawn = [costs(seconds[draw.integers(len(seconds), size=len(seconds))], demo) for _ in range(2000)]
    spread = {name: np.quantile([each[name] for each in drawn], (0.025, 0.975)) for name in middle}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "prometheus-client"))
    low, half, high = (1000 * value for value in np.quantile(seconds[:, 0], (0.25, 0.5, 0.75)))

    def row(title: str, name: str) -> str:
        least, most = 1000 * spread[name]
        return f"| {title} | {1000 * middle[name]:.3f} | {least:.3f} to {most:.3f} |"

    share, (least, most) = middle["all"] / demo, spread["all"] / demo
    lines = [
        "# What telemetry costs the training thread",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}; niceness {os.nice(0)}, load average {os.getloadavg()[1]:.1f} over the last five minutes.",
        f"`python -m benchmarks.telemetry {' '.join(sys.argv[1:])}`",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"{len(seconds)} rounds. A small step takes {half:.1f} ms (quartiles {low:.1f} to {high:.1f}), one of the "
        f"demo's model {1000 * demo:.0f} ms (median of {DEMO_STEPS}).",
        "",
        "| | ms | 95% interval |",
        "| --- | --: | --: |",
        row("counted, each step", "counted"),
        row("counted and logged, one step in ten", "logged"),
        row("ledger.json, each other second", "ledger"),
        row("a scrape, each 15 seconds", "scraped"),
        row("a step of the demo's model in all", "all"),
        "",
        f"Of a step of the demo's model: **{share:.2%}**, 95% interval {least:.2%} to {most:.2%}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.5)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_videos(Path(folder, "videos"), count=16)
        rules = pack.load_rules(str(ROOT / "manifests/datasets/demo.yaml"))
        pack.pack(str(Path(folder, "videos")), str(Path(folder, "shards")), rules)
        seconds, demo = measure(arguments.minutes, folder)
    path = ROOT / "benchmarks/results" / f"telemetry_{arguments.hardware}_{datetime.date.today()}.md"
    path.write_text(report(seconds, demo))
    print(path.read_text())


if __name__ == "__main__":
    main()
