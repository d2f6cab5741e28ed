"""A paper's ablations at a small size, on real footage, beside the paper's own tables.

    python -m benchmarks.ablations arvae VIDEOS [--seeds 3] [--work ablation_data] [--results benchmarks/results]

Each variant is a manifest's worth of changes to one small configuration, trained by ``python -m trainer`` in a process
of one thread (two at a time), once a seed, and measured on held-back clips of videos that it never saw. Finished runs
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.learning import ROOT, RULES, hardware
from pipelines import index, pack
from pipelines.contracts import ClipRule
from trainer import examine, run
from trainer.codec import Codec
from trainer.evaluate import evaluate
from trainer.losses import Perceptual, PerceptualSpec

FRAMES = 16
LENGTHS = (4, 8, 16)
STAGES = {"first-frame": 60, "frames-3": 300, "frames-5": 120, "frames-7": 120}
ALL_STEPS = sum(STAGES.values())
ONE_STAGE = {"first-frame": 60, "frames-3": 540, "frames-5": 0, "frames-7": 0}


@dataclass(frozen=True)
class Variant:
    """Changes to the model and to the steps of its stages."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=lambda: STAGES)


ARVAE = (
    Variant("whole"),
    Variant("one scale, full resolution", {"propagation": "finest"}),
    Variant("one scale, that of the latent", {"propagation": "coarsest"}),
    Variant("no state features", {"state_features": False}),
    Variant("one stage of 3 frames, as many steps", steps=ONE_STAGE),
    Variant("linear path (ours)", {"transform": "dct"}),
)


def manifest_of(variant: Variant, seed: int, data: Path) -> dict[str, Any]:
    losses = {"mse": 1, "ssim": 0.1, "lpips": 0}
    later = {"losses": losses | {"warp": 0.1}}
    return {
        "name": f"ablation-{ARVAE.index(variant)}-{seed}",
        "recipe": "arvae",
        "model": {
            "down": 8,
            "motion_channels": 2,
            "supplement_channels": 6,
            "widths": [8, 16, 24, 32],
            "motion_width": 8,
            "state_width": 8,
            "spynet": {"levels": 3, "widths": [16, 16, 8, 8], "kernel": 3},
            "first_frame": {"kind": "own", "down": 8, "channels": 48, "widths": [8, 16, 32, 48]},
            "perceptual": None,
            **variant.model,
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
        "seed": seed,
        "clip": {"sizes": [[64, 64]]},
        "optimizer": {"betas": [0.9, 0.99], "warmup": 10, "decay": "cosine", "floor": 0.1},
        "stages": {
            "first-frame": {"losses": losses, "batch": 8, "optimizer": {"lr": 5e-4}},
            "frames-3": later | {"optimizer": {"lr": 1e-3}},
            "frames-5": later | {"optimizer": {"lr": 5e-4}},
            "frames-7": later | {"optimizer": {"lr": 5e-4}},
        },
        "checkpoint": {"every_steps": 60, "keep": 20},
    }


def trained(variant: Variant, seed: int, work: Path) -> str:
    """Trains one variant from one seed, unless that is done; the run's URL."""
    plain = manifest_of(variant, seed, work)
    for name, steps in variant.steps.items():
        plain["stages"][name] = {**plain["stages"][name], "steps": steps}
    url = work / "runs" / plain["name"]
    if not (url / "checkpoints" / f"step-{ALL_STEPS:08d}" / "COMMITTED").exists():
        path = work / f"{plain['name']}.yaml"
        path.write_text(yaml.safe_dump(plain, sort_keys=False))
        command = [sys.executable, "-m", "trainer", str(path), "--runs", str(work / "runs")]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, check=True, stdout=sys.stderr)
    return str(url)


def measured(run_url: str, step: int, frames: int, perceptual: Perceptual) -> dict[str, float]:
    """PSNR and SSIM of a checkpoint on the held-back clips; kept beside the run."""
    kept = Path(run_url) / f"measured-{step}-{frames}.json"
    if not kept.exists():
        opened = run.open_model(f"{run_url}/checkpoints/step-{step:08d}")
        stored = opened.manifest
        size = stored.schedule.stages[-1].clip.sizes[0]
        rule = ClipRule(frames=frames, sizes=(size,), crop="center", flip=0.0)
        clips = list(examine.fixed_clips(index.open_dataset(stored.data.eval), rule, size, None))
        latent = opened.recipe.latent(frames, *size)
        codec = Codec(opened.recipe, opened.model)
        values = evaluate(codec.reconstruct, clips, latent, perceptual=perceptual).values
        kept.write_text(json.dumps({name: values[name] for name in ("psnr_db", "ssim", "clips")}))
    return json.loads(kept.read_text())


@dataclass(frozen=True)
class Row:
    """One line of a table: where to measure, and what the paper has there (PSNR, SSIM)."""

    title: str
    variant: str
    step: int
    frames: int
    paper: tuple[float, float] | None


def tables() -> dict[str, list[Row]]:
    """The paper's tables 2 to 5; the last row of a table is what the others are held against."""
    whole = Row("whole: 3, 5 and 7 frames, 16 at inference", "whole", ALL_STEPS, FRAMES, (30.12, 0.870))
    ends = {3: 360, 5: 480, 7: 600}
    single = (24.41, 0.755)
    return {
        "Table 2, propagated features": [
            Row("one scale, full resolution", "one scale, full resolution", ALL_STEPS, FRAMES, single),
            Row("one scale, that of the latent", "one scale, that of the latent", ALL_STEPS, FRAMES, single),
            whole,
        ],
        "Table 3, state features": [Row("none", "no state features", ALL_STEPS, FRAMES, (25.08, 0.836)), whole],
        "Table 4, stages": [
            Row("after 3 frames", "whole", ends[3], FRAMES, (28.50, 0.845)),
            Row("3 frames only, as many steps as all", "one stage of 3 frames, as many steps", ALL_STEPS, FRAMES, None),
            Row("after 5 frames", "whole", ends[5], FRAMES, (29.76, 0.855)),
            whole,
        ],
        "Table 5, frames at inference": [
            Row("4 frames", "whole", ALL_STEPS, 4, (31.12, 0.890)),
            Row("8 frames", "whole", ALL_STEPS, 8, (30.62, 0.879)),
            whole,
        ],
        "Ours, the linear path": [Row("transform: dct", "linear path (ours)", ALL_STEPS, FRAMES, None), whole],
    }


def verdict(mine: list[float], papers: float | None) -> str:
    """Whether a difference, seed by seed, has the paper's sign; none where the seeds disagree."""
    if papers is None:
        return "not in the paper"
    signs = {difference > 0 for difference in mine}
    if len(signs) > 1:
        return "seeds disagree"
    return "agrees" if signs == {papers > 0} else "disagrees"


def lines_of(runs: Mapping[str, list[str]], perceptual: Perceptual) -> list[str]:
    lines = []
    for title, rows in tables().items():
        lines += [f"## {title}", ""]
        lines += ["| | PSNR dB (± over seeds) | SSIM | less whole, dB | paper | paper less whole | |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | --- |"]
        reference = rows[-1]
        whole = [measured(url, reference.step, reference.frames, perceptual) for url in runs[reference.variant]]
        for row in rows:
            found = [measured(url, row.step, row.frames, perceptual) for url in runs[row.variant]]
            psnr = [values["psnr_db"] for values in found]
            spread = statistics.stdev(psnr) if len(psnr) > 1 else 0.0
            gains = [a["psnr_db"] - b["psnr_db"] for a, b in zip(found, whole, strict=True)]
            paper = f"{row.paper[0]:.2f}, {row.paper[1]:.3f}" if row.paper else "-"
            papers = row.paper[0] - reference.paper[0] if row.paper else None
            cells = [
                row.title,
                f"{statistics.mean(psnr):.2f} ± {spread:.2f}",
                f"{statistics.mean(values['ssim'] for values in found):.4f}",
                "" if row is reference else f"{statistics.mean(gains):+.2f}",
                paper,
                "" if row is reference or papers is None else f"{papers:+.2f}",
                "" if row is reference else verdict(gains, papers),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paper", choices=["arvae"])
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default="ablation_data", type=Path)
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    rules = pack.load_rules(str(RULES), [f"frames={FRAMES}", f"least_frames={FRAMES}", "clips_per_video=30"])
    work = options.work.resolve()
    print(pack.pack(options.videos, work, rules).text(), file=sys.stderr)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in ARVAE]
    with ThreadPoolExecutor(2) as pool:
        urls = list(pool.map(lambda job: trained(*job, work), jobs))
    runs: dict[str, list[str]] = {}
    for (variant, _), url in zip(jobs, urls, strict=True):
        runs.setdefault(variant.name, []).append(url)
    torch.set_num_threads(os.cpu_count() or 1)
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    clips = measured(runs["whole"][0], ALL_STEPS, FRAMES, perceptual)["clips"]
    lines = [
        "# ARVAE's ablations at a small size",
        "",
        f"`python -m benchmarks.ablations arvae VIDEOS --seeds {options.seeds}`: 64 x 64 pixels, 8 x 8 downsampling, "
        f"2 + 6 channels, {', '.join(f'{name} {steps} steps' for name, steps in STAGES.items())}, batch 4, AdamW at "
        f"1e-3; {clips} held-back clips of {FRAMES} frames at 12 frames/s. The paper: 256 x 256, 16 x 16 with 2 + 14, "
        "630,000 steps of batch 64, MCL-JCV. Levels can't be compared, signs and sizes of differences can, with care.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, {options.seeds} seeds. "
        "A verdict is given where all seeds agree on the sign.",
        "",
        *lines_of(runs, perceptual),
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"ablations-arvae_{hardware()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines))
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
