"""Shannon entropy of frames, of what they are taken apart into, and of latents: how much there is to say, number by
number (ARVAE's figure 1, which compares frames, low and high frequencies, and motion and supplement).

The entropy of a kind of number is that of the histogram of its levels over all clips. Pixels, and differences of
pixels, have the grey levels of 8 bits; latents have 256 levels between their least and greatest value. Position and
neighbours don't enter, so this is an upper bound on what a code without context spends; it is not the size of anything
stored. The paper gives no definition of its own, and none of its frequencies: here they are one step of a Haar
transform in time, the mean of two neighbouring frames and their difference.

Legend: C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.recipe import CodecRecipe, Predicts

LEVELS = 256
GREY = 2 / (LEVELS - 1)
"""A grey level of 8 bits, in pixels of [-1, 1]."""
FINE = 2.0**-12
"""Width of the bins that are kept until the range is known."""
WIDEST = 2.0**10
"""Values beyond this are counted at it: a bound on memory."""


@dataclass(frozen=True, slots=True)
class Entropy:
    """Of one kind of number: ``bits`` each, and how many there are of it for a frame, over all frames."""

    bits: float
    numbers_per_frame: float
    least: float
    greatest: float

    @property
    def bits_per_frame(self) -> float:
        """``bits`` times ``numbers_per_frame``."""
        return self.bits * self.numbers_per_frame


@dataclass(frozen=True, slots=True)
class Entropies:
    """``kinds``: ``frames``, ``low`` and ``high`` frequencies, ``residual`` where the recipe predicts frames, and each
    latent as ``latent NAME``. ``bits_per_frame``: of whole representations, each over the frames that it holds.
    """

    kinds: Mapping[str, Entropy]
    bits_per_frame: Mapping[str, float]

    def plain(self) -> dict[str, Any]:
        """Plain data."""
        keys = ("bits", "numbers_per_frame", "bits_per_frame", "least", "greatest")
        kinds = {name: {key: getattr(entropy, key) for key in keys} for name, entropy in self.kinds.items()}
        return {"kinds": kinds, "bits_per_frame": dict(self.bits_per_frame)}

    def tables(self) -> tuple[Table, Table]:
        """For a terminal: number by number, and whole representations beside the frames."""
        kinds = Table(title="Shannon entropy, number by number")
        kinds.add_column("")
        for heading in ("bits a number", "numbers a frame", "bits a frame"):
            kinds.add_column(heading, justify="right")
        for name, entropy in self.kinds.items():
            kinds.add_row(
                name, f"{entropy.bits:.2f}", f"{entropy.numbers_per_frame:,.1f}", f"{entropy.bits_per_frame:,.0f}"
            )
        whole = Table(title="Whole representations")
        whole.add_column("")
        for heading in ("bits a frame", "of the frames'"):
            whole.add_column(heading, justify="right")
        for name, bits in self.bits_per_frame.items():
            share = bits / self.bits_per_frame["frames"] if self.bits_per_frame["frames"] else 0.0
            whole.add_row(name, f"{bits:,.0f}", f"{share:.2f}")
        return kinds, whole


class Histogram:
    """Counts values in fine bins as they come, and gives the entropy at 256 levels of their range at the end."""

    def __init__(self) -> None:
        self._first = 0
        self._counts = torch.zeros(0, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Counts every value of a tensor; raises ValueError for one that is not a number."""
        places = (values.detach().cpu().double().flatten().clamp(-WIDEST, WIDEST) / FINE).round()
        if not places.isfinite().all():
            raise ValueError("a value that is not a number has no place in a histogram")
        first, last = int(places.min()), int(places.max())
        if self._counts.numel():
            first, last = min(first, self._first), max(last, self._first + len(self._counts) - 1)
        grown = torch.bincount((places - first).long(), minlength=last - first + 1)
        if self._counts.numel():
            at = self._first - first
            grown[at : at + len(self._counts)] += self._counts
        self._first, self._counts = first, grown

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest value, to the nearest fine bin."""
        return self._first * FINE, (self._first + len(self._counts) - 1) * FINE

    @property
    def count(self) -> int:
        """Values counted."""
        return int(self._counts.sum())

    def bits(self, step: float | None = None, origin: float = 0.0) -> float:
        """Entropy in bits of the level: ``origin`` and whole ``step``s from there, or 256 levels of the range."""
        if step is None:
            origin, greatest = self.range
            step = (greatest - origin) / (LEVELS - 1)
        if not step:
            return 0.0
        values = (torch.arange(len(self._counts), dtype=torch.float64) + self._first) * FINE
        _, levels = ((values - origin) / step).round().unique(return_inverse=True)
        share = torch.zeros(len(levels), dtype=torch.float64).index_add(0, levels, self._counts.double()) / self.count
        return float(-(share * share.clamp_min(1e-300).log2()).sum())


@torch.no_grad()
def measure(recipe: CodecRecipe, model: nn.Module, clips_1CTHW: Iterable[Tensor]) -> Entropies:
    """Entropies over clips in [-1, 1] on the model's device. Raises InputError where there are no clips."""
    histograms: dict[str, Histogram] = {"frames": Histogram(), "low": Histogram(), "high": Histogram()}
    frames = paired = predicted = 0
    for pixels_1CTHW in clips_1CTHW:
        frames += pixels_1CTHW.shape[2]
        histograms["frames"].add(pixels_1CTHW)
        pairs = pixels_1CTHW.shape[2] // 2
        if pairs:
            paired += 2 * pairs
            one, two = pixels_1CTHW[:, :, : 2 * pairs].unflatten(2, (pairs, 2)).unbind(3)
            histograms["low"].add((one + two) / 2)
            histograms["high"].add(one - two)
        if isinstance(recipe, Predicts) and (residual := recipe.residual(model, pixels_1CTHW)) is not None:
            predicted += residual.shape[2]
            histograms.setdefault("residual", Histogram()).add(residual)
        for latent in recipe.encode(model, [pixels_1CTHW]):
            for name, values in latent.items():
                if values.is_floating_point():
                    histograms.setdefault(f"latent {name}", Histogram()).add(values)
    if not frames:
        raise InputError("There are no clips to measure. Is the held-back part of the dataset empty?")
    levels = {"frames": (GREY, -1.0), "low": (GREY, -1.0), "high": (GREY, 0.0), "residual": (GREY, 0.0)}
    kinds = {
        name: Entropy(histogram.bits(*levels.get(name, ())), histogram.count / frames, *histogram.range)
        for name, histogram in histograms.items()
        if histogram.count
    }
    bits = {name: entropy.bits_per_frame for name, entropy in kinds.items()}
    whole = {"frames": bits["frames"]}
    if paired:
        whole["low and high frequencies"] = (bits["low"] + bits["high"]) * frames / paired
    if predicted and "latent motion" in bits:
        whole["motion and residual"] = (bits["latent motion"] + bits["residual"]) * frames / predicted
    whole["latents"] = sum(value for name, value in bits.items() if name.startswith("latent "))
    return Entropies(kinds, whole)
