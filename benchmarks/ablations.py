"""A paper's ablations at a small size, on real footage, beside the paper's own tables.

    python -m benchmarks.ablations arvae|decovae VIDEOS [--seeds 3] [--work ablation_data] [--results FOLDER]

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
from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Variant:
    """Changes to the model and to the steps of its stages."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a table: where to measure, and what the paper has there (PSNR, SSIM)."""

    title: str
    variant: str
    step: int
    frames: int
    paper: tuple[float, float] | None


@dataclass(frozen=True)
class Paper:
    """A paper's ablations: variants, the manifest that they change, tables whose last row the others are held against.

    ``steps`` by stage are those of a variant that names none; all variants take as many in all. ``about`` says what was
    trained here, and what by the authors.
    """

    title: str
    frames: int
    variants: tuple[Variant, ...]
    manifest: Callable[[Path], dict[str, Any]]
    steps: Mapping[str, int]
    tables: Mapping[str, tuple[Row, ...]]
    about: str

    @property
    def all_steps(self) -> int:
        """Steps of the whole schedule."""
        return sum(self.steps.values())


# -- ARVAE ------------------------------------------------------------------------------------------------------------

ARVAE_STEPS = {"first-frame": 60, "frames-3": 300, "frames-5": 120, "frames-7": 120}
ONE_STAGE = {"first-frame": 60, "frames-3": 540, "frames-5": 0, "frames-7": 0}
ARVAE_VARIANTS = (
    Variant("whole"),
    Variant("one scale, full resolution", {"propagation": "finest"}),
    Variant("one scale, that of the latent", {"propagation": "coarsest"}),
    Variant("no state features", {"state_features": False}),
    Variant("one stage of 3 frames, as many steps", steps=ONE_STAGE),
    Variant("linear path (ours)", {"transform": "dct"}),
)


def arvae_manifest(data: Path) -> dict[str, Any]:
    losses = {"mse": 1, "ssim": 0.1, "lpips": 0}
    later = {"losses": losses | {"warp": 0.1}}
    return {
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
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
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


def arvae_tables() -> dict[str, tuple[Row, ...]]:
    """The paper's tables 2 to 5."""
    steps, frames = sum(ARVAE_STEPS.values()), 16
    whole = Row("whole: 3, 5 and 7 frames, 16 at inference", "whole", steps, frames, (30.12, 0.870))
    ends = {3: 360, 5: 480}
    single = (24.41, 0.755)
    return {
        "Table 2, propagated features": (
            Row("one scale, full resolution", "one scale, full resolution", steps, frames, single),
            Row("one scale, that of the latent", "one scale, that of the latent", steps, frames, single),
            whole,
        ),
        "Table 3, state features": (Row("none", "no state features", steps, frames, (25.08, 0.836)), whole),
        "Table 4, stages": (
            Row("after 3 frames", "whole", ends[3], frames, (28.50, 0.845)),
            Row("3 frames only, as many steps as all", "one stage of 3 frames, as many steps", steps, frames, None),
            Row("after 5 frames", "whole", ends[5], frames, (29.76, 0.855)),
            whole,
        ),
        "Table 5, frames at inference": (
            Row("4 frames", "whole", steps, 4, (31.12, 0.890)),
            Row("8 frames", "whole", steps, 8, (30.62, 0.879)),
            whole,
        ),
        "Ours, the linear path": (Row("transform: dct", "linear path (ours)", steps, frames, None), whole),
    }


# -- DeCo-VAE ---------------------------------------------------------------------------------------------------------

DECOVAE_STEPS = {"motion": 120, "static": 240, "dynamic": 60}
JOINT, PIXELS = {"motion": 120, "joint": 300}, {"joint": 420}
DECOVAE_VARIANTS = (
    Variant("whole"),
    Variant("no strategy", {"adaptation": False}, JOINT),
    Variant("concat, 16 channels", {"components": "concat"}, JOINT),
    Variant("concat, 48 channels", {"components": "concat", "latent_channels": 48}, JOINT),
    Variant("no decoupling, 16 channels", {"components": "none"}, PIXELS),
    Variant("no decoupling, 48 channels", {"components": "none", "latent_channels": 48}, PIXELS),
    Variant("keyframe coded once (ours)", {"keyframe": "single"}),
)


def decovae_manifest(data: Path) -> dict[str, Any]:
    losses = {"l1": 1, "lpips": 0, "kl": 1e-7, "dwt_low": 0.05, "dwt_high": 0.1}
    phase = {"losses": losses, "adversary": None}
    adam = {"name": "adam", "betas": [0.9, 0.99], "warmup": 20, "decay": "cosine", "floor": 0.1}
    return {
        "recipe": "decovae",
        "model": {
            "latent_channels": 16,
            "backbone": {"low": 32, "high": 64, "separate": 1, "fused": 2, "iterations": 1, "iteration_layers": 1},
            "motion": {"width": 32, "latent": 32},
            "perceptual": None,
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
        "clip": {"sizes": [[64, 64]]},
        "stages": {
            "motion": {"optimizer": adam | {"lr": 2e-3}},
            "static": phase | {"optimizer": adam | {"lr": 1e-3}},
            "dynamic": phase | {"optimizer": adam | {"lr": 3e-4}},
            "joint": phase | {"optimizer": adam | {"lr": 1e-3}},
        },
        "checkpoint": {"every_steps": 60, "keep": 20},
    }


def decovae_tables() -> dict[str, tuple[Row, ...]]:
    """The paper's tables 4 and 5, on WebVid, and what they leave open: the same number of channels in all."""
    steps, frames = sum(DECOVAE_STEPS.values()), 17
    whole = Row("whole: 3 x 16 channels", "whole", steps, frames, (32.29, 0.9098))
    dedicated = Row("dedicated encoders, 3 x 16 channels", "no strategy", steps, frames, (31.20, 0.8929))
    return {
        "Table 4, encoders (without the strategy)": (
            Row("one for all components, 16 channels", "concat, 16 channels", steps, frames, (27.15, 0.8081)),
            Row("the same, 48 channels", "concat, 48 channels", steps, frames, None),
            dedicated,
        ),
        "Table 5, decoupling and strategy": (
            Row("no decoupling, 16 channels", "no decoupling, 16 channels", steps, frames, (29.80, 0.8640)),
            Row("no decoupling, 48 channels", "no decoupling, 48 channels", steps, frames, None),
            Row("decoupling without the strategy", "no strategy", steps, frames, (31.20, 0.8929)),
            whole,
        ),
        "Ours, the keyframe coded once": (
            Row("keyframe: single, 0.73 of the numbers", "keyframe coded once (ours)", steps, frames, None),
            whole,
        ),
    }


PAPERS = {
    "arvae": Paper(
        "ARVAE", 16, ARVAE_VARIANTS, arvae_manifest, ARVAE_STEPS, arvae_tables(),
        "64 x 64 pixels, 8 x 8 downsampling, 2 + 6 channels, {stages}, batch 4, AdamW at 1e-3; {clips} held-back clips "
        "of 16 frames at 12 frames/s. The paper: 256 x 256, 16 x 16 with 2 + 14, 630,000 steps of batch 64, MCL-JCV.",
    ),
    "decovae": Paper(
        "DeCo-VAE", 17, DECOVAE_VARIANTS, decovae_manifest, DECOVAE_STEPS, decovae_tables(),
        "64 x 64 pixels, 4 x 8 x 8, {stages}, batch 4, Adam at 1e-3, no LPIPS and no adversary; {clips} held-back "
        "clips of 17 frames at 12 frames/s. The paper: 256 x 256, 500,000 steps of batch 40, WebVid.",
    ),
}  # fmt: skip


# -- running ----------------------------------------------------------------------------------------------------------


def trained(paper: Paper, variant: Variant, seed: int, work: Path) -> str:
    """Trains one variant from one seed, unless that is done; the run's URL."""
    plain = paper.manifest(work)
    known = plain["recipe"]
    plain["name"] = f"ablation-{known}-{paper.variants.index(variant)}-{seed}"
    plain["seed"] = seed
    plain["model"] = {**plain["model"], **variant.model}
    steps = variant.steps or paper.steps
    plain["stages"] = {name: {**plain["stages"][name], "steps": count} for name, count in steps.items()}
    url = work / "runs" / plain["name"]
    if not (url / "checkpoints" / f"step-{paper.all_steps:08d}" / "COMMITTED").exists():
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
        whole = [measured(url, reference.step, reference.frames, perceptual) for url in runs[reference.variant]]
        for row in rows:
            found = [measured(url, row.step, row.frames, perceptual) for url in runs[row.variant]]
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
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", default="ablation_data", type=Path)
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    paper = PAPERS[options.paper]
    sizes = [f"frames={paper.frames}", f"least_frames={paper.frames}", "clips_per_video=30"]
    work = options.work.resolve()
    print(pack.pack(options.videos, work, pack.load_rules(str(RULES), sizes)).text(), file=sys.stderr)
    jobs = [(variant, seed) for seed in range(options.seeds) for variant in paper.variants]
    with ThreadPoolExecutor(2) as pool:
        urls = list(pool.map(lambda job: trained(paper, *job, work), jobs))
    runs: dict[str, list[str]] = {}
    for (variant, _), url in zip(jobs, urls, strict=True):
        runs.setdefault(variant.name, []).append(url)
    torch.set_num_threads(os.cpu_count() or 1)
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    clips = measured(runs["whole"][0], paper.all_steps, paper.frames, perceptual)["clips"]
    stages = ", ".join(f"{name} {steps} steps" for name, steps in paper.steps.items())
    lines = [
        f"# {paper.title}'s ablations at a small size",
        "",
        f"`python -m benchmarks.ablations {options.paper} VIDEOS --seeds {options.seeds}`: "
        f"{paper.about.format(stages=stages, clips=clips)} Levels can't be compared, signs and sizes of differences "
        "can, with care.",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, {options.seeds} seeds. "
        "A verdict is given where all seeds agree on the sign.",
        "",
        *lines_of(paper, runs, perceptual),
    ]
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"ablations-{options.paper}_{hardware()}_{datetime.date.today()}.md"
    path.write_text("\n".join(lines))
    print("\n".join(lines))
    print(path, file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
