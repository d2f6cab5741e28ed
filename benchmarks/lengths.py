"""What a longer prefix of One-DVA's 1D latents is worth on held-back clips, and what decides its length.

    python -m benchmarks.lengths RUN [--clips 60] [--results benchmarks/results]

Measures a run's newest checkpoint on its ``data.eval`` at eleven lengths from none to all, beside bicubic of the same
budget; at all lengths for a few numbers of sampling steps; and as motion, a budget and a quality decide.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.learning import ROOT, hardware
from pipelines import index
from trainer import examine, run
from trainer.codec import Codec
from trainer.evaluate import evaluate
from trainer.losses import Perceptual, PerceptualSpec
from trainer.manifest import changed_model

POINTS = 8
STEPS = (1, 2, 4, 10, 25)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="URL of a run of recipe onedva, or a checkpoint of it")
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    opened = run.open_model(options.run)
    rule, size = examine.fixed_rule(opened.manifest)
    clips = list(examine.FixedClips(index.open_dataset(opened.manifest.data.eval), rule, size, options.clips))
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    config, frames = opened.recipe.config, rule.frames

    def at(*sets: str) -> Mapping[str, Any]:
        recipe = changed_model(opened.recipe, sets)
        values = evaluate(Codec(recipe, opened.model).round_trip, clips, perceptual=perceptual).values
        print(f"{' '.join(sets)}: {values['numbers_per_frame']:.1f} numbers, {values['psnr_db']:.2f} dB", flush=True)
        return values

    structural = opened.recipe.latent(frames, *size).shapes["structural"]
    least = torch.Size(structural).numel()
    curve = []
    for point in range(POINTS + 1):
        count = round(config.queries * point / POINTS)
        budget = (least + count * config.latent_channels) / frames + 1e-6
        curve.append((count, at("model.length.by=budget", f"model.length.numbers_per_frame={budget}",
                                "model.length.every=1")))  # fmt: skip
    steps = [(n, at("model.length.by=all", f"model.sampling.steps={n}", "model.sampling.power=1")) for n in STEPS]
    middle = curve[POINTS // 2][1]
    ways = [
        ("as motion asks", at("model.length.by=motion")),
        (f"a budget of {middle['numbers_per_frame']:.0f} numbers a frame",
         at("model.length.by=budget", f"model.length.numbers_per_frame={middle['numbers_per_frame'] + 1e-6}")),
        (f"{middle['psnr_db']:.1f} dB", at("model.length.by=psnr", f"model.length.psnr_db={middle['psnr_db']:.1f}")),
        ("all", curve[-1][1]),
    ]  # fmt: skip
    stem = f"lengths-onedva_{hardware()}_{datetime.date.today()}"
    options.results.mkdir(parents=True, exist_ok=True)
    draw(curve, options.results / f"{stem}_curve.png")
    (options.results / f"{stem}.md").write_text(text(opened, curve, steps, ways, stem))
    print(options.results / f"{stem}.md")
    return 0


def text(opened: run.Trained, curve: list[Any], steps: list[Any], ways: list[Any], stem: str) -> str:
    last = curve[-1][1]
    shape = last["clip"]
    lines = [
        "# What 1D latents are worth",
        "",
        f"`python -m benchmarks.lengths RUN`: {opened.manifest.name}, {last['clips']} clips of {shape['frames']} "
        f"frames, {shape['height']} x {shape['width']}, from videos that were never trained on. {platform.machine()}, "
        f"{os.cpu_count()} cores, torch {torch.__version__}, float32.",
        "",
        "## The longer the prefix, the better",
        "",
        "| 1D latents kept | numbers a frame | PSNR dB | by motion: least, middle, most | better than above "
        "| bicubic of that budget |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    before: Mapping[str, Any] | None = None
    for count, values in curve:
        thirds = ", ".join(f"{third['psnr_db']:.2f}" for third in values["by_motion"])
        better = ""
        if before is not None:
            pairs = zip(values["per_clip"], before["per_clip"], strict=True)
            better = f"{sum(a['psnr_db'] > b['psnr_db'] for a, b in pairs)} of {values['clips']}"
        lines.append(
            f"| {count} | {values['numbers_per_frame']:.1f} | {values['psnr_db']:.2f} | {thirds} | {better} | "
            f"{values['baselines']['bicubic']['psnr_db']:.2f} |"
        )
        before = values
    lines += [
        "", f"![PSNR over numbers a frame]({stem}_curve.png)", "",
        "## What decides the length", "",
        "| kept | numbers a frame: mean, least, most | PSNR dB: mean, worst clip | over bicubic of that budget, dB |",
        "| --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    for title, values in ways:
        numbers = [clip["numbers_per_frame"] for clip in values["per_clip"]]
        worst = min(clip["psnr_db"] for clip in values["per_clip"])
        lines.append(
            f"| {title} | {values['numbers_per_frame']:.1f}, {min(numbers):.1f}, {max(numbers):.1f} | "
            f"{values['psnr_db']:.2f}, {worst:.2f} | {values['baselines']['bicubic']['margin']['psnr_db']:+.2f} |"
        )
    lines += ["", "## Sampling steps, all 1D latents, evenly spread", "", "| steps | PSNR dB | SSIM | flicker |"]
    lines += ["| ---: | ---: | ---: | ---: |"]
    lines += [f"| {n} | {v['psnr_db']:.2f} | {v['ssim']:.4f} | {v['flicker']:.2f} |" for n, v in steps]
    return "\n".join([*lines, ""])


def draw(curve: list[Any], path: Path) -> None:
    """PSNR over numbers a frame, the model's in blue and that of bicubic of the same budget in red."""
    width, height, left, top = 760, 420, 70, 20
    right, bottom = width - 20, height - 50
    image = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    spent = [values["numbers_per_frame"] for _, values in curve]
    mine = [values["psnr_db"] for _, values in curve]
    theirs = [values["baselines"]["bicubic"]["psnr_db"] for _, values in curve]
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
