"""How long training stands still for a checkpoint: ours against DeepSpeed's synchronous ``save_checkpoint``.

    python -m benchmarks.checkpoint [--sizes 6 486] [--places PATH s3://BUCKET/PREFIX] [--rounds 9 2] [--hardware 2cpu]

Writes ``benchmarks/results/checkpoint_<hardware>_<date>.md``; each size and place runs in a process of its own. The
486M case holds 14 GB of memory, and 18 GB of storage at a place. For S3: ``scripts/object_store.sh up``. Cases that are
in the file of the day already, and not measured now, stay in it.

Both save the same engine, in turns, in one process. Ours is blocked for ``save()``, which waits for a commit that is
under way, and for the next step's wait for the copy. ``behind`` is what goes on meanwhile, in CPU seconds: those of the
process from the save to the commit, less those of as many undisturbed steps. DeepSpeed writes to a local folder; to S3
its files are then uploaded (in parallel parts), as its users do. Ratios are of the pairs: each of our saves by the
DeepSpeed save just before it. The first save of a process, which also allocates the host memory that later ones reuse,
stands apart.

The model is a stack of linear layers, trained by Adam. What is saved is weights and both moments, 12 bytes a parameter;
at ZeRO 1 to 3 DeepSpeed saves the weights twice.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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

    def rests(self, parameter: str) -> bool:
        """No."""
        return False


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
    storage.delete(storage.join(place, "deepspeed"), recursive=True)
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


def measure(millions: float, place: str, rounds: int, zero: int, batch: int) -> dict[str, Any]:
    """One size at one place: every pair's seconds, and what goes with them."""
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
    return {
        "place": "S3" if storage.is_remote(place) else "local disk",
        "parameters": sum(p.numel() for p in engine.module.parameters()),
        "step_cpu": statistics.median(usual),
        "deepspeed": theirs,
        "first": first,
        "ours": [save["blocked"] for save in ours],
        **{key: statistics.median(save[key] for save in ours) for key in ("behind", "commit")},
    }


def spread(values: list[float], digits: int) -> str:
    """Median, and least and greatest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| model | place | pairs | DeepSpeed blocked | ours blocked | ratio | ours, first | commit | behind | step |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for row in rows:
        ratios = [mine / other for mine, other in zip(row["ours"], row["deepspeed"], strict=True)]
        cells = [f"{row['parameters'] / 1e6:.0f}M", row["place"], str(len(ratios)), spread(row["deepspeed"], 3)]
        cells += [spread(row["ours"], 4), spread(ratios, 4), f"{row['first']:.3f}", f"{row['commit']:.2f}"]
        lines.append(f"| {' | '.join(cells)} | {row['behind']:.2f} | {row['step_cpu']:.2f} |")
    return lines


def _case(row: str) -> tuple[float, str]:
    """Millions of parameters and place of a row."""
    model, place = row.split("|")[1:3]
    return float(model.strip().rstrip("M")), place


def _others(before: list[str], rows: list[str]) -> list[str]:
    """Rows of the file that hold other cases."""
    measured = {_case(row) for row in rows}
    old = [line for line in before if line.startswith("| ") and line[2].isdigit()]
    return [line for line in old if _case(line) not in measured]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[6, 486], help="millions of parameters")
    parser.add_argument("--places", nargs="+", default=[tempfile.gettempdir()], help="folders and s3:// prefixes")
    parser.add_argument("--rounds", type=int, nargs="+", default=[9, 2], help="pairs, for each of the sizes")
    parser.add_argument("--zero", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step, which set its length")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    parser.add_argument("--json", action="store_true", help="one case, in this process; its line goes to stdout")
    args = parser.parse_args()
    if args.json:
        print(json.dumps(measure(args.sizes[0], args.places[0], args.rounds[0], args.zero, args.batch)))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "s3fs"))
    path = Path(__file__).parent / "results" / f"checkpoint_{args.hardware}_{datetime.date.today()}.md"
    rows: list[dict[str, Any]] = []
    before = path.read_text().splitlines() if path.exists() else []
    commands = [line for line in before if line.startswith("`python -m")]
    given = ["FOLDER" if word in args.places and not storage.is_remote(word) else word for word in sys.argv[1:]]
    commands.append(f"`python -m benchmarks.checkpoint {' '.join(given)}`")
    for millions, rounds in zip(args.sizes, args.rounds, strict=True):
        for place in args.places:
            case = ["--sizes", str(millions), "--places", place, "--rounds", str(rounds), "--json"]
            case += ["--zero", str(args.zero), "--batch", str(args.batch)]
            command = [sys.executable, "-m", "benchmarks.checkpoint", *case]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(said.splitlines()[-1]))
            print("\n".join(table(rows[-1:])[2:]), flush=True)
            lines = [
                "# How long training stands still for a checkpoint",
                "",
                f"{datetime.date.today()}, {os.cpu_count()} CPUs ({platform.machine()}), Python "
                f"{platform.python_version()}, {versions}; float32, ZeRO-{args.zero}, one process.",
                *commands,
                "",
                (__doc__ or "").split("\n\n", 3)[3].strip(),
                "",
                "Seconds (of CPU: behind, step), medians with least and greatest.",
                "",
                *table(rows)[:2],
                *sorted([*_others(before, table(rows)[2:]), *table(rows)[2:]], key=_case),
            ]
            path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
