"""What further keyframes gain on footage with cuts and camera pans, at the same latent budget.

    python -m benchmarks.keyframes RUN VIDEOS [--results benchmarks/results]

RUN is a trained DeCo-VAE, ``benchmarks.learning``'s for example, and VIDEOS the folder that it was packed from. From
the videos that the run held back it makes streams of 72 frames at 12 frames/s: as they are; with cuts (every 6 to 20
frames another video begins); and panned (a window that slides over the frame, two pixels a frame). Each is coded with
windows of a fixed length, and with a new keyframe where the residual asks for one; no weights differ. A gain is what
the second has over the first at its own number of latent numbers, on the line that joins two fixed lengths.

Seams are looked for in the change of the error from a frame to the next, which a reconstruction that jumps where its
footage does not has at the borders of its windows: there beside everywhere else.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.learning import ROOT, hardware
from pipelines import index
from trainer import footage, run
from trainer.codec import Codec
from trainer.recipe import Latent

FRAMES, FPS, PAN = 72, 12, 2
FIXED = (1, 5, 9, 17, 33)
LONGEST, THRESHOLDS = 33, (0.15, 0.25, 0.4)
SEGMENT = (6, 20)
OVERLAPS = (0, 1, 4)


def held_back(dataset: index.Dataset, videos: Path) -> list[Path]:
    """Files of the videos whose clips the dataset holds."""
    keys = (r["key"].decode() for shard in range(len(dataset.files)) for r in dataset.records(shard))
    stems = {key.rsplit("-", 2)[0] for key in keys}
    return sorted(path for path in videos.rglob("*") if path.stem in stems)


def frames_of(path: Path, side: int) -> Tensor:
    """Up to FRAMES frames of a video, (1, 3, T, side, wide), at FPS frames/s."""
    with footage.reader(str(path)) as source:
        every = max(1.0, float(source.fps) / FPS)
        wide = max(side, round(side * source.width / source.height))
        taken: list[Tensor] = []
        for number, frame in enumerate(source):
            if number >= len(taken) * every:
                small = F.interpolate(frame[:, :, 0], (side, wide), mode="bilinear", antialias=True)
                taken.append(small)
            if len(taken) == FRAMES:
                break
    return torch.stack(taken, dim=2)


def central(x_1CTHW: Tensor, side: int) -> Tensor:
    left = (x_1CTHW.shape[-1] - side) // 2
    return x_1CTHW[..., left : left + side]


def panned(x_1CTHW: Tensor, side: int) -> Tensor:
    """A window that slides to the right by PAN pixels a frame, and back at the end of its way."""
    way = x_1CTHW.shape[-1] - side
    lefts = [way - abs((PAN * t) % (2 * way) - way) if way else 0 for t in range(x_1CTHW.shape[2])]
    return torch.stack([x_1CTHW[:, :, t, :, left : left + side] for t, left in enumerate(lefts)], dim=2)


def with_cuts(sources: list[Tensor], seed: int) -> Tensor:
    """FRAMES frames in segments out of one source after another."""
    draw = random.Random(seed)
    at = [0] * len(sources)
    parts: list[Tensor] = []
    which = seed
    while sum(part.shape[2] for part in parts) < FRAMES:
        which += 1
        source, length = sources[which % len(sources)], draw.randint(*SEGMENT)
        begin = at[which % len(sources)] % max(1, source.shape[2] - length)
        parts.append(source[:, :, begin : begin + length])
        at[which % len(sources)] += length
    return torch.cat(parts, dim=2)[:, :, :FRAMES]


def streams(videos: list[Path], side: int) -> dict[str, list[Tensor]]:
    tall = [frames_of(path, side) for path in videos]
    wide = [x for x in tall if x.shape[-1] >= side + 16]
    still = [central(x, side) for x in tall]
    cuts = [with_cuts(still, seed) for seed in range(len(still))]
    return {"as they are": still, "cuts": cuts, "pans": [panned(x, side) for x in wide]}


@dataclass(frozen=True)
class Coded:
    """Latent numbers a frame, PSNR (mean over frames), and the change of the error from a frame to the next, in grey
    levels of 255 (root mean square over a frame, mean over frames): ``within`` windows, and at their ``borders``.
    """

    numbers: float
    psnr_db: float
    within: float
    borders: float


def coded(codec: Codec, clips: list[Tensor]) -> Coded:
    numbers, errors = 0, []
    within: list[float] = []
    borders: list[float] = []
    for x_1CTHW in clips:
        latents = list(codec.encode(x_1CTHW))
        numbers += sum(t.numel() for latent in latents for t in latent.values() if t.is_floating_point())
        error_1CTHW = torch.cat(list(codec.decode(latents, x_1CTHW.shape[-2:])), dim=2) - x_1CTHW
        errors.append((error_1CTHW / 2).square().mean((0, 1, 3, 4)))
        jumps = 127.5 * error_1CTHW.diff(dim=2).square().mean((0, 1, 3, 4)).sqrt()
        seams = seams_of(latents)
        for t, jump in enumerate(jumps.tolist(), start=1):
            (borders if t in seams else within).append(jump)
    frames = torch.cat(errors)
    psnr_db = float((-10 * frames.clamp_min(1e-10).log10()).mean())
    return Coded(numbers / len(frames), psnr_db, mean(within), mean(borders))


@dataclass(frozen=True)
class Panel:
    """Of one kind of footage: fixed windows by FIXED, new keyframes by THRESHOLDS."""

    title: str
    fixed: list[Coded]
    adaptive: list[Coded]


def draw(panels: list[Panel], path: Path) -> None:
    """PSNR over latent numbers a frame: fixed windows in grey, new keyframes where the residual asks in blue."""
    width, height, left, top, gap = 360, 340, 56, 30, 20
    image = Image.new("RGB", (left + (width + gap) * len(panels), height + top + 50), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    every = [point for panel in panels for point in (*panel.fixed, *panel.adaptive)]
    # One frame a window lies far to the right of all others, and would leave these no room.
    most = max(p.numbers for panel in panels for p in (*panel.adaptive, *panel.fixed[FIXED.index(5) :])) * 1.05
    least = min(point.numbers for point in every) * 0.9
    low = min(point.psnr_db for point in every) - 0.5
    high = max(point.psnr_db for point in every if point.numbers <= most) + 0.5
    for number, panel in enumerate(panels):
        begin = left + number * (width + gap)

        def at(point: Coded, begin: int = begin) -> tuple[float, float]:
            across = (point.numbers - least) / (most - least)
            return begin + width * across, top + height * (high - point.psnr_db) / (high - low)

        pen.rectangle((begin, top, begin + width, top + height), outline="#c0c0c0")
        for level in range(int(low) + 1, int(high) + 1, 2):
            y = top + height * (high - level) / (high - low)
            pen.line((begin, y, begin + width, y), fill="#e8e8e8")
            if number == 0:
                pen.text((begin - 6, y), f"{level} dB", "black", font, anchor="rm")
        for numbers in range(math.ceil(least / 200) * 200, int(most), 200):
            x = begin + width * (numbers - least) / (most - least)
            pen.text((x, top + height + 6), f"{numbers}", "black", font, anchor="ma")
        pen.text((begin + width / 2, 8), panel.title, "black", font, anchor="ma")
        for points, colour in ((panel.fixed, "#909090"), (panel.adaptive, "#1040a0")):
            seen = sorted((p for p in points if p.numbers <= most), key=lambda p: p.numbers)
            pen.line([at(p) for p in seen], fill=colour, width=3)
            for x, y in map(at, seen):
                pen.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
    pen.text((left, top + height + 28), "latent numbers a frame", "black", font)
    pen.text((left + 200, top + height + 28), "windows of a fixed length", "#707070", font)
    pen.text((left + 400, top + height + 28), "a new keyframe where the residual asks for one", "#1040a0", font)
    image.save(path)


def mean(values: list[float]) -> float:
    return statistics.mean(values) if values else float("nan")


def seams_of(latents: list[Latent]) -> set[int]:
    """Frames t before which another window's share begins, grows or ends."""
    found: set[int] = set()
    end = 0
    for latent in latents:
        begin, shared = end - int(latent["shared"]), int(latent["shared"])
        found |= set(range(begin, begin + shared + 1)) - {0}
        end = begin + int(latent["frames"])
    return found


def at_budget(curve: list[Coded], numbers: float) -> float | None:
    """PSNR of the fixed lengths at a budget, on the line between two of them; None beyond them."""
    for a, b in pairwise(sorted(curve, key=lambda point: point.numbers)):
        if a.numbers <= numbers <= b.numbers:
            return a.psnr_db + (b.psnr_db - a.psnr_db) * (numbers - a.numbers) / (b.numbers - a.numbers)
    return None


def rows(opened: run.Trained, footage_of: dict[str, list[Tensor]], panels: list[Panel]) -> Iterator[str]:
    """Lines of the tables; what the figure shows is added to ``panels``."""
    kind, config = type(opened.recipe), opened.recipe.config

    def codec(window: int, threshold: float | None, most: int = config.overlap) -> Codec:
        overlap = min(most, window // 2)
        changed = config.model_copy(update={"window": window, "overlap": overlap, "new_keyframe": threshold})
        return Codec(kind(changed), opened.model)

    for name, clips in footage_of.items():
        count = sum(clip.shape[2] for clip in clips)
        yield from ("", f"## Footage {name}: {len(clips)} streams, {count} frames", "")
        yield from ("| windows | numbers a frame | PSNR dB | fixed at that budget | gain dB |",
                    "| --- | ---: | ---: | ---: | ---: |")  # fmt: skip
        curve = [coded(codec(window, None), clips) for window in FIXED]
        for window, point in zip(FIXED, curve, strict=True):
            yield f"| fixed, {window} | {point.numbers:.0f} | {point.psnr_db:.2f} | | |"
        points = [coded(codec(LONGEST, threshold), clips) for threshold in THRESHOLDS]
        panels.append(Panel(name, curve, points))
        for threshold, point in zip(THRESHOLDS, points, strict=True):
            same = at_budget(curve, point.numbers)
            gain = ("-", "-") if same is None else (f"{same:.2f}", f"{point.psnr_db - same:+.2f}")
            title = f"new keyframe beyond {threshold}, {LONGEST} at most"
            yield f"| {title} | {point.numbers:.0f} | {point.psnr_db:.2f} | {' | '.join(gain)} |"
    yield from ("", "## Seams", "")
    yield from ("| footage, windows | frames shared | numbers a frame | PSNR dB | change of the error within windows | "
                "at their borders |", "| --- | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for name, window, threshold in (("pans", 17, None), ("pans", LONGEST, THRESHOLDS[1])):
        title = f"{name}, {window}" + (f" at most, new keyframe beyond {threshold}" if threshold else "")
        for overlap in OVERLAPS:
            point = coded(codec(window, threshold, overlap), footage_of[name])
            yield (
                f"| {title} | {overlap} | {point.numbers:.0f} | {point.psnr_db:.2f} | {point.within:.2f} | "
                f"{point.borders:.2f} |"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a trained DeCo-VAE")
    parser.add_argument("videos", type=Path, help="folder of the videos that it was packed from")
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # small models; threads that wait for each other burn what the runs need
    opened = run.open_model(options.run)
    side = opened.manifest.schedule.stages[-1].clip.sizes[0][0]
    panels: list[Panel] = []
    videos = held_back(index.open_dataset(opened.manifest.data.eval), options.videos)
    lines = [
        "# Several keyframes on footage with cuts and pans",
        "",
        f"`python -m benchmarks.keyframes RUN VIDEOS`, RUN of manifest `{opened.manifest.name}`: "
        f"{len(videos)} videos that were never trained on, {side} x {side}, {FPS} frames/s.",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32.",
    ]
    for line in (*lines, ""):
        print(line)
    for line in rows(opened, streams(videos, side), panels):
        print(line, flush=True)
        lines.append(line)
    lines.append("")
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"keyframes_{hardware()}_{datetime.date.today()}.md"
    draw(panels, path.with_suffix(".png"))
    lines += [f"![PSNR over latent numbers a frame]({path.stem}.png)", ""]
    path.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
