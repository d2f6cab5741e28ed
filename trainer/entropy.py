"""Shannon entropy of frames and of their latents: how much there is to say, number by number (ARVAE's figure 1).

A number is one of 256 levels between the least and the greatest value of its kind (for frames: black and white), and
its entropy is that of the histogram of levels over all clips. Position and neighbours don't enter, so this is an upper
bound on what a code without context spends; it is not the size of anything stored. The paper gives no definition of its
own.

Legend: C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.recipe import CodecRecipe

LEVELS = 256
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

    def bits(self, least: float, greatest: float) -> float:
        """Entropy in bits of the level, one of 256 between ``least`` and ``greatest``."""
        if greatest <= least:
            return 0.0
        values = (torch.arange(len(self._counts), dtype=torch.float64) + self._first) * FINE
        levels = ((values - least) / (greatest - least) * (LEVELS - 1)).round().long().clamp(0, LEVELS - 1)
        share = torch.zeros(LEVELS, dtype=torch.float64).index_add(0, levels, self._counts.double()) / self.count
        return float(-(share * share.clamp_min(1e-300).log2()).sum())


@torch.no_grad()
def measure(recipe: CodecRecipe, model: nn.Module, clips_1CTHW: Iterable[Tensor]) -> dict[str, Entropy]:
    """Entropy of ``frames`` and of each latent by its name, over clips in [-1, 1] on the model's device.

    Raises ValueError where there are no clips.
    """
    histograms: dict[str, Histogram] = {"frames": Histogram()}
    frames = 0
    for pixels_1CTHW in clips_1CTHW:
        frames += pixels_1CTHW.shape[2]
        histograms["frames"].add(pixels_1CTHW)
        for latent in recipe.encode(model, [pixels_1CTHW]):
            for name, values in latent.items():
                if name != "frames":
                    histograms.setdefault(name, Histogram()).add(values)
    if not frames:
        raise ValueError("there are no clips to measure")
    found = {}
    for name, histogram in histograms.items():
        least, greatest = (-1.0, 1.0) if name == "frames" else histogram.range
        found[name] = Entropy(histogram.bits(least, greatest), histogram.count / frames, least, greatest)
    return found


def json_of(entropies: dict[str, Entropy]) -> dict[str, dict[str, float]]:
    """Plain data."""
    keys = ("bits", "numbers_per_frame", "bits_per_frame", "least", "greatest")
    return {name: {key: getattr(entropy, key) for key in keys} for name, entropy in entropies.items()}
