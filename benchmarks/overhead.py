"""The time of a training step under Ray Train and DeepSpeed against a bare PyTorch loop.

    python -m benchmarks.overhead [--cases MODEL:WORKERS:DATA ...] [--steps 110] [--hardware 2cpu]

Both train the same model on the same clips in the same processes, in turns, a step each. Ours is what a worker does
(``cluster.worker.work``): Ray Train, DeepSpeed, loader, telemetry, ledger, checkpoints. The bare one is
DistributedDataParallel with AdamW and gradient clipping; it reads through a loader of its own (DATA is `read`), or has
all batches decoded in memory before it starts (`memory`), which makes reading and decoding a part of our overhead. A
barrier stands between the two, outside the clock. A step of ours lasts from the end of a bare step to the end of its
own logging: it waits for data, writes traces and metrics, and starts checkpoints in that time.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from cluster import launch
from pipelines import pack, synthetic
from pipelines.contracts import Batch
from pipelines.faults import FaultBudget
from trainer import loop, run
from trainer import manifest as manifests
from trainer.manifest import RunManifest

ROOT = Path(__file__).resolve().parents[1]
WARM = 10
"""Steps at the start that are not counted."""
ON_CPU = ["precision=fp32", "workers.gpus=0", "workers.cpus=1", "clip.sizes=[[64, 64]]", "data.eval=null", "trace=true"]
NO_LPIPS = ["model.perceptual=null", "stages.frames-7.losses={mse: 1.0, ssim: 0.5, lpips: 0.0}"]


class Case(NamedTuple):
    """A model: its manifest, the stage that is timed, the clips of a worker, and changes."""

    manifest: str
    stage: str
    clips: int
    sets: list[str]


CASES = {"demo": Case("demo.yaml", "frames-3", 4, []), "8x8": Case("arvae_8x8.yaml", "frames-7", 1, NO_LPIPS)}

ALL = [f"{name}:{workers}:{data}" for name in CASES for workers in (2, 1) for data in ("read", "memory")]


class Bare:
    """The loop that everyone writes."""

    def __init__(self, manifest: RunManifest, batches: Iterator[list[Batch]]) -> None:
        self.recipe, self.stage = manifest.loaded_recipe, manifest.schedule.stages[0]
        self.spec = manifest.optimizer_for(self.stage)
        self.batches = batches
        model = self.recipe.build(manifest.seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.stage.trains(name))
        self.world = dist.get_world_size()
        self.model = nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.teachers = self.recipe.teachers()
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.spec.lr,
            betas=self.spec.betas,
            eps=self.spec.eps,
            weight_decay=self.spec.weight_decay,
        )

    def step(self) -> None:
        """One global batch."""
        for batch in next(self.batches):
            loss = self.recipe.step(self.model, batch, self.stage, self.teachers).loss
            (loss * batch.weight * self.world).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.spec.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measured(config: dict[str, Any], data: str) -> Any:
    """``cluster.worker.work``, with a bare step after each of its steps."""
    from cluster import worker

    manifest = RunManifest.model_validate(config["manifest"])
    listen = worker._listen

    def listen_and_take_turns(signals: Any, grace: float) -> None:
        listen(signals, grace)
        take_turns(signals, manifest, data, Path(config["run_url"], "overhead.json"))

    worker._listen = listen_and_take_turns
    return worker.work(config)


def take_turns(signals: Any, manifest: RunManifest, data: str, result: Path) -> None:
    """Runs a bare step wherever the loop is about to begin one of its own, and keeps the times of both."""
    world = loop.World.current(torch.device("cpu"))
    batches = (batches for _, batches in loop.open_loader(manifest, world, FaultBudget()).iter_from(0))
    bare = Bare(manifest, batches if data == "read" else iter(list(batches)))
    agreed, ours, theirs = signals.agreed, [], []

    def barrier() -> float:
        dist.barrier()
        return time.perf_counter()

    def agreed_then_bare(margin: float, late: bool = False) -> Any:
        nonlocal mark
        wish = agreed(margin, late)
        if wish.late:
            return wish
        begin = barrier()
        bare.step()
        end = barrier()
        ours.append(begin - mark)
        theirs.append(end - begin)
        if len(ours) == manifest.schedule.steps and world.rank == 0:
            numel = sum(p.numel() for p in bare.parameters)
            result.write_text(json.dumps({"ours": ours[WARM:], "bare": theirs[WARM:], "parameters": numel}))
        mark = time.perf_counter()
        return wish

    signals.agreed = agreed_then_bare
    mark = barrier()


def time_case(name: str, workers: int, data: str, steps: int, shards: str, runs: str) -> dict[str, Any]:
    """Seconds of each step of both, in pairs."""
    case = CASES[name]
    path, train = ROOT / "manifests" / case.manifest, f"data.train={shards}"
    sets = [train, *ON_CPU, *case.sets, f"workers.count={workers}", f"batch={case.clips * workers}"]
    for stage in manifests.load(path, [train]).loaded_recipe.stages():
        sets.append(f"stages.{stage.name}.steps={steps if stage.name == case.stage else 0}")
        sets.append(f"stages.{stage.name}.batch=null")
    claimed, run_url = run.claim(manifests.load(path, sets, name=f"overhead-{name}-{workers}-{data}"), runs)
    with launch.connected_ray(claimed) as scratch:
        from cluster import worker

        worker.work = lambda config: measured(config, data)
        launch.fit(claimed, run_url, uuid.uuid4().hex, scratch)
    times = json.loads(Path(run_url, "overhead.json").read_text())
    return {**times, "name": name, "workers": workers, "data": data, "stage": case.stage, "batch": claimed.batch}


def row(timed: dict[str, Any]) -> str:
    ratios = [ours / bare for ours, bare in zip(timed["ours"], timed["bare"], strict=True)]
    cells = [f"{timed['name']}, {timed['stage']}, {timed['parameters'] / 1e6:.2f}M trained", str(timed["workers"])]
    cells += [timed["data"], str(timed["batch"]), str(len(ratios))]
    for values in (timed["bare"], timed["ours"]):
        low, middle, high = statistics.quantiles([1000 * value for value in values])
        cells.append(f"{middle:.0f} ({low:.0f} to {high:.0f})")
    low, middle, high = statistics.quantiles(ratios)
    cells += [f"**{middle:.3f}** ({low:.3f} to {high:.3f})", f"{sum(timed['ours']) / sum(timed['bare']):.3f}"]
    return f"| {' | '.join(cells)} |"


def report(rows: list[str]) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "ray"))
    method = (__doc__ or "").split("\n\n", 2)[2].strip()
    lines = [
        "# A step under Ray Train and DeepSpeed against a bare PyTorch loop",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}; float32, ZeRO-1, gloo, 64x64 pixels.",
        f"`python -m benchmarks.overhead {' '.join(sys.argv[1:])}`",
        "",
        method,
        "",
        "Milliseconds a step, medians with quartiles. The ratio is the median of the pairs' ratios.",
        "",
        "| model, stage | workers | bare data | batch | pairs | bare | ours | ratio | of the sums |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: |",
        *rows,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=ALL, metavar="MODEL:WORKERS:DATA")
    parser.add_argument("--steps", type=int, default=110)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    arguments = parser.parse_args()
    path = ROOT / "benchmarks/results" / f"overhead_{arguments.hardware}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_videos(Path(folder, "videos"), count=32)
        shards = str(Path(folder, "shards"))
        pack.pack(str(Path(folder, "videos")), shards, pack.load_rules(str(ROOT / "manifests/datasets/demo.yaml")))
        rows = []
        for case in arguments.cases:
            name, workers, data = case.split(":")
            rows.append(row(time_case(name, int(workers), data, arguments.steps, f"{shards}/train", f"{folder}/runs")))
            print(rows[-1], flush=True)
            path.write_text(report(rows))


if __name__ == "__main__":
    main()
