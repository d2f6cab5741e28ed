"""What a longer prefix of One-DVA's 1D latents is worth on held-back clips, and what decides its length.

    python -m benchmarks.lengths RUN [--clips 60] [--results benchmarks/results]

Measures a run's newest checkpoint on its ``data.eval`` at nine lengths from none to all, beside bicubic of the same
budget; at all lengths for a few numbers of sampling steps; and as motion, a budget and a quality decide.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.learning import ROOT, hardware
from pipelines import index
from trainer import examine, run
from trainer.codec import Codec
from trainer.evaluate import baselines
from trainer.manifest import changed_model

POINTS = 8
STEPS = (1, 2, 4, 10, 25)


@dataclass(frozen=True)
class Point:
    """What a setting spends and reaches, by clip; PSNR in dB, the mean over frames."""

    numbers: list[float]
    psnr: list[float]
    bicubic: list[float]


def psnr_db(x_13THW: Tensor, y_13THW: Tensor) -> float:
    error_T = ((x_13THW - y_13THW) / 2).double().square().mean((0, 1, 3, 4)).clamp_min(1e-10)
    return float(-10 * torch.log10(error_T).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="URL of a run of recipe onedva, or a checkpoint of it")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models; threads that wait for each other burn what the runs need
    opened = run.open_model(options.run)
    rule, size = examine.fixed_rule(opened.manifest)
    held_back = examine.FixedClips(index.open_dataset(opened.manifest.data.eval), rule, size, options.clips)
    clips = sorted(held_back, key=lambda clip: clip.motion)
    config, frames = opened.recipe.config, rule.frames

    def at(*sets: str) -> Point:
        codec = Codec(changed_model(opened.recipe, sets), opened.model)
        numbers, reached = [], []
        for clip in clips:
            made_13THW, spent = codec.round_trip(clip.pixels_CTHW[None])
            numbers.append(spent / frames)
            reached.append(psnr_db(made_13THW, clip.pixels_CTHW[None]))
        bicubic = baselines(frames, *size, statistics.mean(numbers))[0]
        theirs = [psnr_db(bicubic.reconstruct(clip.pixels_CTHW[None]), clip.pixels_CTHW[None]) for clip in clips]
        print(
            f"{' '.join(sets)}: {statistics.mean(numbers):.1f} numbers, {statistics.mean(reached):.2f} dB", flush=True
        )
        return Point(numbers, reached, theirs)

    structural = opened.recipe.latent(frames, *size).shapes["structural"]
    least = torch.Size(structural).numel()
    curve = []
    for point in range(POINTS + 1):
        count = round(config.queries * point / POINTS)
        budget = (least + count * config.latent_channels) / frames + 1e-6
        sets = ("model.length.by=budget", f"model.length.numbers_per_frame={budget}", "model.length.every=1")
        curve.append((count, at(*sets)))
    steps = [(n, at("model.length.by=all", f"model.sampling.steps={n}", "model.sampling.power=1")) for n in STEPS]
    middle = curve[POINTS // 2][1]
    budget, quality = statistics.mean(middle.numbers), statistics.mean(middle.psnr)
    ways = [
        ("as motion asks", at("model.length.by=motion")),
        (f"a budget of {budget:.0f} numbers a frame", middle),
        (f"{quality:.1f} dB", at("model.length.by=psnr", f"model.length.psnr_db={quality:.1f}")),
        ("all", curve[-1][1]),
    ]
    stem = f"lengths-onedva_{hardware()}_{datetime.date.today()}"
    options.results.mkdir(parents=True, exist_ok=True)
    draw(curve, options.results / f"{stem}_curve.png")
    (options.results / f"{stem}.md").write_text(text(opened, curve, steps, ways, stem, (frames, *size)))
    print(options.results / f"{stem}.md")
    return 0


def text(
    opened: run.Trained, curve: list[Any], steps: list[Any], ways: list[Any], stem: str, shape: tuple[int, ...]
) -> str:
    frames, height, width = shape
    clips = len(curve[0][1].psnr)
    lines = [
        "# What 1D latents are worth",
        "",
        f"`python -m benchmarks.lengths RUN`: {opened.manifest.name}, step {opened.manifest.schedule.steps}, {clips} "
        f"clips of {frames} frames, {height} x {width}, from videos that were never trained on. {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, float32.",
        "",
        "## The longer the prefix, the better",
        "",
        "| 1D latents kept | numbers a frame | PSNR dB | by motion: least, middle, most | clips better than above "
        "| bicubic of that budget |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before: Point | None = None
    for count, point in curve:
        thirds = [point.psnr[clips * k // 3 : clips * (k + 1) // 3] for k in range(3)]
        better = f"{sum(a > b for a, b in zip(point.psnr, before.psnr, strict=True))} of {clips}" if before else ""
        lines.append(
            f"| {count} | {statistics.mean(point.numbers):.1f} | {statistics.mean(point.psnr):.2f} | "
            f"{', '.join(f'{statistics.mean(third):.2f}' for third in thirds)} | {better} | "
            f"{statistics.mean(point.bicubic):.2f} |"
        )
        before = point
    lines += [
        "", f"![PSNR over numbers a frame]({stem}_curve.png)", "",
        "## What decides the length", "",
        "| kept | numbers a frame: mean, least, most | PSNR dB: mean, least | over bicubic of the mean, dB |",
        "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for title, point in ways:
        lines.append(
            f"| {title} | {statistics.mean(point.numbers):.1f}, {min(point.numbers):.1f}, {max(point.numbers):.1f} | "
            f"{statistics.mean(point.psnr):.2f}, {min(point.psnr):.2f} | "
            f"{statistics.mean(point.psnr) - statistics.mean(point.bicubic):+.2f} |"
        )
    lines += ["", "## Sampling steps, all 1D latents, evenly spread", "", "| steps | PSNR dB |", "| ---: | ---: |"]
    lines += [f"| {n} | {statistics.mean(point.psnr):.2f} |" for n, point in steps]
    return "\n".join([*lines, ""])


def draw(curve: list[Any], path: Path) -> None:
    """PSNR over numbers a frame, the model's in blue and that of bicubic of the same budget in red."""
    width, height, left, top = 760, 420, 70, 20
    right, bottom = width - 20, height - 50
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    spent, mine, theirs = (
        [statistics.mean(getattr(point, name)) for _, point in curve] for name in ("numbers", "psnr", "bicubic")
    )
    low, high = min(mine + theirs) - 0.5, max(mine + theirs) + 0.5

    def at(numbers: float, level: float) -> tuple[float, float]:
        across = (numbers - spent[0]) / max(spent[-1] - spent[0], 1e-9)
        return left + (right - left) * across, bottom - (bottom - top) * (level - low) / (high - low)

    for level in range(int(low) + 1, int(high) + 1):
        pen.line([at(spent[0], level), at(spent[-1], level)], fill="#e8e8e8")
        pen.text((left - 8, at(spent[0], level)[1]), f"{level} dB", "black", font, anchor="rm")
    for (count, _), numbers in zip(curve, spent, strict=True):
        pen.text((at(numbers, low)[0], bottom + 6), str(count), "black", font, anchor="ma")
    pen.text(((left + right) / 2, bottom + 28), "1D latents kept", "black", font, anchor="ma")
    for values, colour, title in ((mine, "#1040a0", "One-DVA"), (theirs, "#c04020", "bicubic")):
        pen.line([at(n, v) for n, v in zip(spent, values, strict=True)], fill=colour, width=3)
        pen.text((right, at(spent[-1], values[-1])[1] - 6), title, colour, font, anchor="rb")
    image.save(path)


if __name__ == "__main__":
    raise SystemExit(main())
