"""A paper's ablations at a small size, on real footage, beside the paper's own tables.

    python -m benchmarks.ablations RECIPE VIDEOS [--seeds 3] [--work ablation_data] [--results FOLDER]

Each variant is a manifest's worth of changes to one small configuration, trained by ``python -m trainer`` in a process
of one thread, once a seed, and measured on held-back clips of videos that it never saw. Finished runs
are kept: the same command goes on where it was stopped. What is compared is the direction and size of a difference,
never its level: size, data and steps are a thousandth of the paper's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from benchmarks import papers
from benchmarks.learning import ROOT, RULES, hardware
from benchmarks.papers import Paper, Row, Variant
from pipelines import index, pack
from pipelines.contracts import ClipRule
from trainer import examine, run
from trainer.codec import Codec
from trainer.evaluate import evaluate
from trainer.losses import Perceptual, PerceptualSpec

CLIPS = 12
"""Held-back clips that are measured, spread over all."""


def trained(paper: Paper, variant: Variant, seed: int, work: Path) -> str:
    """Trains one variant from one seed, unless that is done; the run's URL."""
    plain = paper.manifest(work)
    known = plain["recipe"]
    plain["name"] = f"ablation-{known}-{paper.variants.index(variant)}-{seed}"
    plain["seed"] = seed
    plain["model"] = {**plain["model"], **variant.model}
    steps = variant.steps or paper.steps
    plain["stages"] = {name: {**plain["stages"][name], "steps": count} for name, count in steps.items()}
    for name, changes in variant.stages.items():
        stage = plain["stages"][name]
        plain["stages"][name] = stage | changes | {"losses": stage["losses"] | changes.get("losses", {})}
    url = work / "runs" / plain["name"]
    if not (url / "checkpoints" / f"step-{paper.all_steps:08d}" / "COMMITTED").exists():
        path = work / f"{plain['name']}.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(plain)), sort_keys=False))  # no aliases
        command = [sys.executable, "-m", "trainer", str(path), "--runs", str(work / "runs")]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True, stdout=sys.stderr)
    return str(url)


def measured(run_url: str, row: Row, perceptual: Perceptual) -> dict[str, float]:
    """PSNR and SSIM of a checkpoint on the held-back clips; kept beside the run."""
    kept = Path(run_url) / f"measured-{'-'.join([str(row.step), str(row.frames), *row.sets])}.json"
    if not kept.exists():
        opened = run.open_model(f"{run_url}/checkpoints/step-{row.step:08d}", sets=row.sets)
        stored = opened.manifest
        size = stored.schedule.stages[-1].clip.sizes[0]
        rule = ClipRule(frames=row.frames, sizes=(size,), crop="center", flip=0.0)
        clips = list(examine.FixedClips(index.open_dataset(stored.data.eval), rule, size, CLIPS))
        codec = Codec(opened.recipe, opened.model)
        values = evaluate(codec.round_trip, clips, perceptual=perceptual).values
        kept.write_text(json.dumps({name: values[name] for name in ("psnr_db", "ssim", "clips")}))
    return json.loads(kept.read_text())


def verdict(mine: list[float], papers: float | None) -> str:
    """Whether a difference, seed by seed, has the paper's sign; none where the seeds disagree."""
    if papers is None:
        return "not in the paper"
    signs = {difference > 0 for difference in mine}
    if len(signs) > 1:
        return "seeds disagree"
    return "agrees" if signs == {papers > 0} else "disagrees"


def lines_of(paper: Paper, runs: Mapping[str, list[str]], perceptual: Perceptual) -> list[str]:
    lines = []
    for title, rows in paper.tables.items():
        lines += [f"## {title}", ""]
        lines += ["| | PSNR dB (± over seeds) | SSIM | less the last row, dB | paper | the same in the paper | |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
        reference = rows[-1]
        whole = [measured(url, reference, perceptual) for url in runs[reference.variant]]
        for row in rows:
            found = [measured(url, row, perceptual) for url in runs[row.variant]]
            psnr = [values["psnr_db"] for values in found]
            spread = statistics.stdev(psnr) if len(psnr) > 1 else 0.0
            gains = [a["psnr_db"] - b["psnr_db"] for a, b in zip(found, whole, strict=True)]
            theirs = f"{row.paper[0]:.2f}, {row.paper[1]:.3f}" if row.paper else "-"
            papers = row.paper[0] - reference.paper[0] if row.paper and reference.paper else None
            cells = [
                row.title,
                f"{statistics.mean(psnr):.2f} ± {spread:.2f}",
                f"{statistics.mean(values['ssim'] for values in found):.4f}",
                "" if row is reference else f"{statistics.mean(gains):+.2f}",
                theirs,
                "" if row is reference or papers is None else f"{papers:+.2f}",
                "" if row is reference else verdict(gains, papers),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=papers.NAMES)
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default="ablation_data", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs that train at a time")
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    paper = papers.load(options.recipe)
    work = options.work.resolve() / options.recipe
    print(pack.pack(options.videos, work, pack.load_rules(str(RULES), paper.rules)).text(), file=sys.stderr)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in paper.variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        urls = list(pool.map(lambda job: trained(paper, *job, work), jobs))
    runs: dict[str, list[str]] = {}
    for (variant, _), url in zip(jobs, urls, strict=True):
        runs.setdefault(variant.name, []).append(url)
    torch.set_num_threads(1)  # small models; threads that wait for each other burn what the runs need
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    last = next(iter(paper.tables.values()))[-1]
    clips = measured(runs[last.variant][0], last, perceptual)["clips"]
    stages = ", ".join(f"{name} {steps} steps" for name, steps in paper.steps.items())
    lines = [
        f"# {paper.title}'s ablations at a small size",
        "",
        f"`python -m benchmarks.ablations {options.recipe} VIDEOS --seeds {options.seeds}`: "
        f"{paper.about.format(stages=stages, clips=clips)} Levels can't be compared, signs and sizes of differences "
        "can, with care.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, {options.seeds} seeds. "
        "A verdict is given where all seeds agree on the sign.",
        "",
        *lines_of(paper, runs, perceptual),
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"ablations-{options.recipe}_{hardware()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines))
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
