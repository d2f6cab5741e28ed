"""How long training stands still for a checkpoint: ours against DeepSpeed's synchronous ``save_checkpoint``.

    python -m benchmarks.checkpoint [--sizes 6 486] [--places PATH s3://BUCKET/PREFIX] [--rounds 3] [--zero 0]

Both save the same engine, in turns, in one process. Ours is blocked for ``save()``, which waits for a commit that is
under way, and for the next step's wait for the copy. ``behind`` is what goes on meanwhile, in CPU seconds: those of the
process from the save to the commit, less those of as many undisturbed steps. DeepSpeed writes to a local folder; to S3
its files are then uploaded (in parallel parts), as its users do.

The model is a stack of linear layers, trained by Adam. What is saved is weights and both moments, 12 bytes a parameter;
at ZeRO 1 to 3 DeepSpeed saves the weights twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from pipelines import storage
from trainer.checkpoint import Checkpointer, Lease
from trainer.engine import Engine
from trainer.stage import OptimizerSpec

WIDTH = 2048


class Everything:
    """A stage that trains all of a model."""

    name = "all"

    def trains(self, parameter: str) -> bool:
        """Yes."""
        return True


def stack(millions: float) -> nn.Module:
    width = WIDTH if millions > 50 else 512
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(round(millions * 1e6 / (width * (width + 1))))))


def step(engine: Engine, batch: int) -> float:
    """One optimizer step; its CPU seconds."""
    begin = time.process_time()
    width = engine.shapes["0.weight"][0]
    engine.backward(engine.model(torch.randn(batch, width)).square().mean())
    engine.step(1e-4)
    return time.process_time() - begin


def deepspeed_save(engine: Engine, place: str, scratch: str) -> float:
    """Seconds of ``save_checkpoint``, with the upload where ``place`` is remote."""
    folder = tempfile.mkdtemp(dir=scratch)
    begin = time.perf_counter()
    engine.model.save_checkpoint(folder, tag="step")
    if storage.is_remote(place):
        for path in Path(folder).rglob("*"):
            if path.is_file():
                storage.upload(storage.join(place, "deepspeed", str(path.relative_to(folder))), path)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def our_save(engine: Engine, saver: Checkpointer, number: int, batch: int, usual: float) -> dict[str, float]:
    begin, cpu, waited = time.perf_counter(), time.process_time(), engine.waited
    blocked = saver.save(number, {"model": engine}, {})
    steps = 0
    while saver.committed() != number:
        step(engine, batch)
        saver.check()
        steps += 1
    return {
        "blocked": blocked + engine.waited - waited,
        "behind": time.process_time() - cpu - steps * usual,
        "commit": time.perf_counter() - begin,
        "steps": steps,
    }


def measure(millions: float, place: str, rounds: int, zero: int, batch: int) -> dict[str, float]:
    scratch = tempfile.mkdtemp(dir=None if storage.is_remote(place) else place)
    run_url = storage.join(place, "ours")
    storage.delete(run_url, recursive=True)
    engine = Engine(stack(millions), Everything(), OptimizerSpec(), zero_stage=zero)
    saver = Checkpointer(run_url, Lease.take(run_url), keep=1)
    for _ in range(2):
        step(engine, batch)
    first = our_save(engine, saver, 0, batch, 0.0)["blocked"]
    theirs, ours, usual = [], [], []
    for number in range(1, rounds + 1):
        usual += [step(engine, batch) for _ in range(3)]
        theirs.append(deepspeed_save(engine, place, scratch))
        ours.append(our_save(engine, saver, number, batch, statistics.median(usual)))
    saver.close()
    storage.delete(run_url, recursive=True)
    shutil.rmtree(scratch)
    middle = {key: statistics.median(one[key] for one in ours) for key in ours[0]}
    return {
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "step_cpu": statistics.median(usual),
        "deepspeed": statistics.median(theirs),
        "first": first,
        **middle,
        "ratio": middle["blocked"] / statistics.median(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[6, 486], help="millions of parameters")
    parser.add_argument("--places", nargs="+", default=[tempfile.gettempdir()], help="folders and s3:// prefixes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256, help="rows of a step, which set its length")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for millions in args.sizes:
        for place in args.places:
            result = measure(millions, place, args.rounds, args.zero, args.batch)
            rows.append({"millions": millions, "place": "S3" if storage.is_remote(place) else "local disk", **result})
            print(json.dumps(rows[-1]) if args.json else f"... {millions:g}M, {rows[-1]['place']}", flush=True)
    if args.json:
        return
    cpus = f"{os.cpu_count()} CPUs ({platform.machine()})"
    print(f"\n{cpus}, ZeRO {args.zero}, one process, float32; seconds (of CPU: behind, step)\n")
    print("| model | place | DeepSpeed blocked | ours blocked | ratio | ours, first save | commit | behind | step |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['parameters'] / 1e6:.0f}M | {row['place']} | {row['deepspeed']:.3f} | {row['blocked']:.4f} | "
            f"{row['ratio']:.4f} | {row['first']:.4f} | {row['commit']:.2f} | {row['behind']:.2f} | "
            f"{row['step_cpu']:.2f} |"
        )


if __name__ == "__main__":
    main()
