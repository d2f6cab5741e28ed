"""Measures a codec on a fixed set of clips, beside two baselines that spend no more numbers than it did.

``bicubic``      every frame down to the largest size that fits the budget of a frame, and back up.
``first_frame``  the first frame repeated: kept as it is where the clip's whole budget allows, else bicubic down to it.

Clips are reconstructed one at a time: no number depends on how clips were batched or shared out.

Legend: B clips (1 here), C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from pipelines.contracts import Batch, Clip, Source
from pipelines.faults import InputError
from pipelines.shots import LONG_SIDE
from trainer.entropy import Entropies
from trainer.losses.perceptual import Perceptual
from trainer.quality import Row, Tally, VideoFeatures, gather_json, margin, measure

TITLES = {"model": "this model", "bicubic": "bicubic down and up", "first_frame": "first frame repeated"}


@dataclass(frozen=True, slots=True)
class Baseline:
    """A reconstruction without a model: what it stores is one picture of ``size`` a frame, or a clip."""

    name: str
    size: tuple[int, int]
    numbers_per_frame: float
    reconstruct: Callable[[Tensor], Tensor]


def baselines(frames: int, height: int, width: int, numbers_per_frame: float) -> list[Baseline]:
    """The baselines for clips of that shape that fit a budget of numbers a frame; those that can't are left out.

    The aspect is kept to the nearest whole pixel. Frames are in [-1, 1], clamped after the bicubic filter's overshoot.
    """
    found = []
    if small := largest_size(height, width, numbers_per_frame):
        found.append(Baseline("bicubic", small, 3.0 * small[0] * small[1], lambda x: _through(x, small)))
    if still := largest_size(height, width, frames * numbers_per_frame):
        found.append(
            Baseline(
                "first_frame",
                still,
                3.0 * still[0] * still[1] / frames,
                lambda x: _through(x[:, :, :1], still).expand_as(x),
            )
        )
    return found


def largest_size(height: int, width: int, numbers: float) -> tuple[int, int] | None:
    """The largest RGB picture (h, w) of about that aspect, no larger than the frame, in at most ``numbers`` numbers."""
    for h in range(height, 0, -1):
        w = max(1, round(h * width / height))
        if 3 * h * w <= numbers:
            return h, w
    return None


def _through(pixels_BCTHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bicubic to ``size``, antialiased, and back, frame by frame; the pixels themselves where that is their size."""
    batch, _, frames, *full = pixels_BCTHW.shape
    if tuple(full) == size:
        return pixels_BCTHW
    stored_NCHW = F.interpolate(pixels_BCTHW.transpose(1, 2).flatten(0, 1), size, mode="bicubic", antialias=True)
    restored_NCHW = F.interpolate(stored_NCHW, tuple(full), mode="bicubic").clamp(-1, 1)
    return restored_NCHW.unflatten(0, (batch, frames)).transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Report:
    """An evaluation as plain data: what ``evaluation.json`` holds, and the table of it.

    ``values`` has ``clips``, ``psnr_db``, ``psnr_clip_db``, ``ssim``, ``lpips``, ``lpips_backbone``, ``flicker``,
    ``numbers_per_frame``, ``confidence``, ``by_frame``, ``by_motion``, ``per_clip``, ``not_finite``, ``rfvd`` where it
    was measured, ``entropy`` where that was, ``captions`` where the model reads text (how many clips were coded with
    theirs), and ``baselines``: by name the same again, with ``size`` and ``margin``, the model's gain over it.
    """

    values: Mapping[str, Any]
    entropies: Entropies | None = None

    def with_entropies(self, entropies: Entropies) -> Report:
        """The same evaluation, and the entropy of what it was made on."""
        return Report({**self.values, "entropy": entropies.plain()}, entropies)

    def json(self) -> str:
        """Strict JSON (no NaN), floats in full precision."""
        return json.dumps(self.values, indent=1, allow_nan=False)

    def methods(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """The model, then each baseline, by name."""
        yield "model", self.values
        yield from self.values["baselines"].items()

    def table(self) -> Table:
        """For a terminal: a row a method, PSNR and SSIM with their 95% intervals."""
        shape = self.values["clip"]
        table = Table(
            title=f"{self.values['clips']} clips of {shape['frames']} frames, {shape['height']} x {shape['width']}",
            caption="\n".join(self._remarks()),
            caption_justify="left",
        )
        with_rfvd = "rfvd" in self.values
        headings = ["numbers a frame", "PSNR dB", "SSIM", "LPIPS", "flicker", *(["rFVD"] if with_rfvd else [])]
        table.add_column("method")
        for heading in headings:
            table.add_column(heading, justify="right")
        for name, line in self.methods():
            cells = [
                f"{line['numbers_per_frame']:,.1f}",
                _with_interval(line, "psnr_db", 2),
                _with_interval(line, "ssim", 4),
                _shown(line["lpips"], 4),
                _shown(line["flicker"], 2),
            ]
            if with_rfvd:
                cells.append(_shown(line["rfvd"]["value"], 1))
            table.add_row(TITLES.get(name, name), *cells, style="bold" if name == "model" else None)
        return table

    def by_motion(self) -> Table:
        """For a terminal: the parts of the clips by motion, a row a method."""
        table = Table(title="by motion", caption="motion: mean absolute difference of neighbouring frames, of 1")
        table.add_column("part")
        for heading in ("motion", "clips"):
            table.add_column(heading, justify="right")
        table.add_column("method")
        for heading in ("PSNR dB", "SSIM", "LPIPS"):
            table.add_column(heading, justify="right")
        count = len(self.values["by_motion"])
        names = {1: ["all"], 2: ["least motion", "most motion"]}.get(count, ["least motion", "middle", "most motion"])
        for at, part in enumerate(names):
            for name, line in self.methods():
                third = line["by_motion"][at]
                told = (part, "{:.4f} to {:.4f}".format(*third["motion"]), str(third["clips"]))
                table.add_row(
                    *(told if name == "model" else ("", "", "")),
                    TITLES.get(name, name),
                    _with_interval(third, "psnr_db", 2),
                    _with_interval(third, "ssim", 4),
                    _shown(third["lpips"], 4),
                    style="bold" if name == "model" else None,
                )
            table.add_section()
        return table

    def _remarks(self) -> Iterator[str]:
        yield f"LPIPS backbone: {self.values['lpips_backbone']}; flicker in grey levels of 255; ± is the 95% interval"
        if (told := self.values.get("captions")) is not None:
            yield f"{told} of {self.values['clips']} clips coded with their caption, the others without"
        for name, line in self.values["baselines"].items():
            gain, interval = line["margin"]["psnr_db"], line["margin"]["confidence"]
            if gain is not None:
                between = f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
                yield f"PSNR over {TITLES[name]}: {gain:+.2f} dB{between}, clip by clip"
        if lost := self.values["not_finite"]:
            yield f"{len(lost)} reconstructions are not finite, so means are missing; the first is {lost[0]}"


def evaluate(
    code: Callable[..., tuple[Tensor, int]],
    clips: Iterable[Batch | Clip],
    *,
    perceptual: Perceptual,
    fvd: VideoFeatures | None = None,
    reads: bool = False,
    device: torch.device | str = "cpu",
    group: dist.ProcessGroup | None = None,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Measures ``code`` on ``clips``, which all have one shape; they are gone through twice.

    ``code`` maps (1, 3, T, H, W) in [-1, 1] on ``device`` to the same and to how many latent numbers were spent on it;
    it is called once a clip, without gradients, with the embedding (1, L, D) of the clip's caption as a second argument
    where it has one; with ``reads`` the report says how many had. The budget is the mean of what was spent, and the
    baselines, which come second, have that. ``perceptual`` and ``fvd`` must be on ``device``. Where torch.distributed
    runs, ``clips`` are this rank's share (possibly none) and the report, the same on every rank, is that of all shares;
    a batch of weight 0 and a place that comes twice keep ranks in step without counting twice. A clip whose dataset has
    no motion score takes that of its pixels, :func:`moved`. ``progress`` hears how many clips this rank has done.

    Raises InputError where there are no clips or their shapes differ.
    """
    mine, shape, spent, told, real = Tally(), [], {}, set(), {}
    with torch.no_grad():
        for done, (pixels_1CTHW, place, source, motion, caption, counts) in enumerate(_one_by_one(clips), 1):
            pixels_1CTHW = pixels_1CTHW.to(device)
            shape = shape or list(pixels_1CTHW.shape[2:])
            _same_shape(shape, list(pixels_1CTHW.shape[2:]), source)
            result_1CTHW, numbers = code(pixels_1CTHW, *caption)
            if counts:
                spent[place] = numbers
                told |= {place} if caption else set()
                real[place] = fvd(pixels_1CTHW[0]) if fvd else {}
                mine.add(_row(pixels_1CTHW, result_1CTHW, place, source, motion, perceptual, fvd, real[place]))
            if progress:
                progress(done)
        answer = {"shape": shape, "tally": mine.to_json(), "spent": list(spent.items()), "told": sorted(told)}
        shares = [share for share in gather_json(answer, group, device) if share["tally"]]
        if not shares:
            raise InputError("There are no clips to evaluate. Is the held-back part of the dataset empty?")
        for share in shares:
            _same_shape(shares[0]["shape"], share["shape"], share["tally"][0]["source"])
        shape = shares[0]["shape"]
        spent = {place: numbers for share in shares for place, numbers in share["spent"]}
        told = {place for share in shares for place in share["told"]}
        model = Tally.from_json(line for share in shares for line in share["tally"])
        rivals = baselines(*shape, numbers_per_frame=math.fsum(spent.values()) / len(spent) / shape[0])
        tallies = {rival.name: Tally() for rival in rivals}
        for pixels_1CTHW, place, source, motion, _, counts in _one_by_one(clips) if rivals else ():
            pixels_1CTHW = pixels_1CTHW.to(device)
            for rival in rivals if counts else ():
                result_1CTHW = rival.reconstruct(pixels_1CTHW)
                row = _row(pixels_1CTHW, result_1CTHW, place, source, motion, perceptual, fvd, real[place])
                tallies[rival.name].add(row)
    gathered = gather_json({name: tally.to_json() for name, tally in tallies.items()}, group, device)
    merged = {rival.name: Tally.from_json(line for share in gathered for line in share[rival.name]) for rival in rivals}
    report = _report(model, rivals, merged, shape, spent, perceptual, fvd)
    return Report({**report.values, "captions": len(told)}) if reads else report


def _row(
    pixels_1CTHW: Tensor,
    result_1CTHW: Tensor,
    place: int,
    source: Source,
    motion: float,
    perceptual: Perceptual,
    fvd: VideoFeatures | None,
    real: Mapping[str, Any],
) -> Row:
    fake = fvd(result_1CTHW[0]) if fvd else {}
    return measure(
        pixels_1CTHW[0],
        result_1CTHW[0],
        perceptual,
        place=place,
        source=str(source),
        motion=motion or moved(pixels_1CTHW),
        features={convention: (real[convention], fake[convention]) for convention in real},
    )


def moved(pixels_1CTHW: Tensor) -> float:
    """The packer's motion score, of a clip's own frames: mean absolute difference of neighbours in luma, in [0, 1], on
    frames whose longer side is at most 160 pixels; 0 for one frame.
    """
    luma_3 = pixels_1CTHW.new_tensor([0.299, 0.587, 0.114])
    luma_T1HW = torch.einsum("bcthw,c->tbhw", pixels_1CTHW[:1], luma_3) / 2
    *_, height, width = luma_T1HW.shape
    shrink = min(1.0, LONG_SIDE / max(height, width))
    small_T1HW = F.interpolate(luma_T1HW, (max(1, round(height * shrink)), max(1, round(width * shrink))), mode="area")
    return float((small_T1HW[1:] - small_T1HW[:-1]).abs().mean()) if len(small_T1HW) > 1 else 0.0


def _report(
    model: Tally,
    rivals: Sequence[Baseline],
    tallies: Mapping[str, Tally],
    shape: list[int],
    spent: Mapping[int, int],
    perceptual: Perceptual,
    fvd: VideoFeatures | None,
) -> Report:
    def summary(tally: Tally, numbers_per_frame: float) -> dict[str, Any]:
        values = {"lpips_backbone": perceptual.name, "numbers_per_frame": numbers_per_frame}
        values |= tally.summary()
        return values | ({"rfvd": fvd.summary(tally)} if fvd else {})

    frames = shape[0]
    values = summary(model, math.fsum(spent.values()) / len(spent) / frames)
    for line in values["per_clip"]:
        line["numbers_per_frame"] = spent[line["place"]] / frames
    values["clip"] = dict(zip(("frames", "height", "width"), shape, strict=True))
    values["baselines"] = {
        rival.name: summary(tallies[rival.name], rival.numbers_per_frame)
        | {"size": list(rival.size), "margin": margin(model, tallies[rival.name])}
        for rival in rivals
    }
    return Report(values)


def _same_shape(expected: list[int], found: list[int], source: Source | str) -> None:
    if found != expected:
        raise InputError(
            f"{source}: {_shape(found)}, but the first clip evaluated has {_shape(expected)}. "
            "Evaluate clips of one shape at a time: give the evaluation one size and frame count."
        )


def _one_by_one(clips: Iterable[Batch | Clip]) -> Iterator[tuple[Tensor, int, Source, float, list[Tensor], bool]]:
    """Pixels (1, C, T, H, W), place, source, motion, the caption's embedding (1, L, D), whether the clip counts."""
    for item in clips:
        if isinstance(item, Clip):
            caption = [] if item.caption_emb_LD is None else [item.caption_emb_LD[None]]
            yield item.pixels_CTHW[None], item.place, item.source, item.motion, caption, True
            continue
        motions = item.motion_B.tolist()
        for b, (place, source) in enumerate(zip(item.places, item.sources, strict=True)):
            tokens_L = None if item.caption_mask_BL is None else item.caption_mask_BL[b]
            caption = []
            if item.caption_emb_BLD is not None and tokens_L is not None and tokens_L.any():
                caption = [item.caption_emb_BLD[b : b + 1, tokens_L]]
            yield item.pixels_BCTHW[b : b + 1], place, source, motions[b], caption, item.weight > 0


def _shape(shape: list[int]) -> str:
    frames, height, width = shape
    return f"{frames} frames of {height} x {width}"


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_interval(line: Mapping[str, Any], name: str, digits: int) -> str:
    interval = line["confidence"][name]
    spread = f" ± {(interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
    return _shown(line[name], digits) + spread
