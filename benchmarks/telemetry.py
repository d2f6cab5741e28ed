"""What telemetry and scraping cost the training thread, as a share of a step.

    python -m benchmarks.telemetry [--blocks 40] [--minutes 8] [--hardware 2cpu]

One process trains the demo's model (stage frames-3, 4 clips of 64x64). Steps come in pairs: one with telemetry as in a
run (counted, traced, its ledger kept, one step in ten logged, the default; metrics served to a scraper in another
process), one without any; which comes first is drawn. Ten pairs make a block, with one logged step in it. The cost is
the median over blocks of the difference of their halves, over the median half without, and its 95% interval from the
order statistics of the differences. Beside it, what the training thread spends in the calls themselves, with no
difference of noisy numbers, and the same difference in the thread's CPU time, which neighbours on the machine disturb
less. Scrapes come each second, fifteen times as often as usual, and only in steps with telemetry.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import math
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipelines import pack, synthetic
from trainer import loop, run
from trainer import manifest as manifests
from trainer.engine import Engine
from trainer.telemetry import Ledger, Telemetry

ROOT = Path(__file__).resolve().parents[1]
SCRAPER = """
import sys, time, urllib.request
while True:
    urllib.request.urlopen(sys.argv[1]).read()
    time.sleep(float(sys.argv[2]))
"""
EVERY = 1.0
BLOCK = 10
"""Pairs in a block, and steps between logged ones: `telemetry.log_every`."""


def measure(blocks: int, minutes: float, folder: str) -> dict[str, list[float]]:
    """Seconds of each block's steps with and without telemetry, and of the calls alone. One block more goes before.

    As many blocks as were asked for, or as ``minutes`` allow.
    """
    sets = [f"data.train={folder}/shards/train", "data.eval=null", "workers.count=1", "batch=4", "trace=true"]
    sets += [f"stages.{name}={{steps: 0}}" for name in ("first-frame", "frames-5", "frames-7")]
    sets += [f"stages.frames-3.steps={2 * BLOCK * (blocks + 1)}", "stages.frames-3.batch=4", "name=cost"]
    manifest, run_url = run.claim(manifests.load(ROOT / "manifests/demo.yaml", sets), f"{folder}/runs")
    world, ledger, coin = loop.World(0, 1, torch.device("cpu")), Ledger(), random.Random(0)
    telemetry = Telemetry(manifest, run_url, alone=True)
    scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, f"http://{telemetry.address}/metrics", str(EVERY)])
    found: dict[str, list[float]] = {"with": [], "without": [], "calls": [], "cpu with": [], "cpu without": []}
    stage, recipe = manifest.schedule.stages[0], manifest.loaded_recipe
    spec = manifest.optimizer_for(stage)
    engine = Engine(recipe.build(0), stage, spec, zero_stage=0)
    clips, told, told_steps = loop.open_loader(manifest, world, telemetry.budget), False, 0
    block, deadline = dict.fromkeys(found, 0.0), time.perf_counter() + 60 * minutes
    try:
        for step, batches in clips.iter_from(0):
            told = coin.random() < 0.5 if step % 2 == 0 else not told
            scraper.send_signal(signal.SIGCONT if told else signal.SIGSTOP)
            began, cpu, spent = time.perf_counter(), time.thread_time(), 0.0
            outputs = []
            for batch in batches:
                output = recipe.step(engine.model, batch, stage, recipe.teachers())
                engine.backward(output.loss)
                outputs.append((1.0, output))
            norm = engine.step(spec.lr)
            if told:
                before = time.perf_counter()
                telemetry.trained(step, batches, before - began, 1e9)
                telemetry.trace(step, stage.name, batches)
                told_steps += 1
                if told_steps % BLOCK == 0:
                    means, summed = loop._reduced(outputs, telemetry.sums(clips.metrics), world)
                    record = {"step": step, "stage": stage.name, **means, "lr": spec.lr, "grad_norm": norm}
                    record |= {"epochs": clips.epochs(manifest.schedule.plan(step)), "clips_per_second": 1.0}
                    telemetry.log({**record, "seconds_per_pixel": 1e-9}, summed, ledger, clips.metrics)
                telemetry.alive(step + 1, ledger)
                spent = time.perf_counter() - before
            half = "with" if told else "without"
            block[half] += time.perf_counter() - began
            block[f"cpu {half}"] += time.thread_time() - cpu
            block["calls"] += spent
            if (step + 1) % (2 * BLOCK) == 0:
                if step + 1 > 2 * BLOCK:
                    for name, seconds in block.items():
                        found[name].append(seconds)
                block = dict.fromkeys(found, 0.0)
                if time.perf_counter() > deadline:
                    break
    finally:
        scraper.kill()
        scraper.wait()
        clips.close()
        telemetry.close()
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95% interval by order statistics (the binomial's normal approximation)."""
    ordered, n = sorted(values), len(values)
    half = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - half)), min(n - 1, math.ceil(n / 2 + half))
    return statistics.median(ordered), ordered[low], ordered[high]


def report(found: dict[str, list[float]]) -> str:
    def gain(kind: str) -> tuple[float, float, float]:
        return interval([a - b for a, b in zip(found[f"{kind}with"], found[f"{kind}without"], strict=True)])

    low, middle, high = statistics.quantiles([1000 * value / BLOCK for value in found["without"]])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "prometheus-client"))

    def row(name: str, values: tuple[float, float, float], of: str = "without") -> str:
        middle, low, high = (f"{value / statistics.median(found[of]):.2%}" for value in values)
        return f"| {name} | {1000 * values[0] / BLOCK:.3f} | **{middle}** | {low} to {high} |"

    blocks = len(found["with"])
    lines = [
        "# What telemetry costs the training thread",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}; load average {os.getloadavg()[1]:.1f} over the last five minutes.",
        f"`python -m benchmarks.telemetry {' '.join(sys.argv[1:])}`",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"{blocks} blocks; a step without telemetry takes {middle:.0f} ms (quartiles {low:.0f} to {high:.0f}).",
        "",
        "| | ms a step | share of a step | 95% interval |",
        "| --- | --: | --: | --: |",
        row("in the calls", interval(found["calls"])),
        row("with less without", gain("")),
        row("with less without, CPU time of the training thread", gain("cpu "), "cpu without"),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_videos(Path(folder, "videos"), count=16)
        rules = pack.load_rules(str(ROOT / "manifests/datasets/demo.yaml"))
        pack.pack(str(Path(folder, "videos")), str(Path(folder, "shards")), rules)
        found = measure(arguments.blocks, arguments.minutes, folder)
    path = ROOT / "benchmarks/results" / f"telemetry_{arguments.hardware}_{datetime.date.today()}.md"
    path.write_text(report(found))
    print(path.read_text())


if __name__ == "__main__":
    main()
