"""Which clip stands at which place, and which rank reads it: arithmetic, with no state and nothing to read.

A mixture is dealt in slots of ``granularity`` places. Weights become whole quotas of a cycle of slots; each cycle deals
its slots in its own seeded order. The n-th place of a dataset is position n % clips of its epoch n // clips. An epoch
is a seeded rotation of the dataset, cut into runs of neighbours whose order a Feistel network permutes (cycle walking
keeps it within the number of runs; Black & Rogaway 2002), so every clip comes once an epoch and any place costs O(1).

Ranks, workers, read-ahead and restarts take spans of this sequence and never change it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from pipelines.contracts import ClipRule, derive

LEAST_RUNS = 64
"""A dataset with fewer than this many runs is cut into shorter ones: otherwise it would hardly be shuffled."""

LONGEST_CYCLE = 1000
_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """The clip at a place: ``dataset`` of the mixture, its ``epoch``, ``clip`` in it, and the ``substitute`` number."""

    dataset: int
    epoch: int
    clip: int
    substitute: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """One micro-batch of a rank: ``count`` clips from ``first`` (in the global batch), and its weight in the batch.

    A filler has weight 0 and repeats a clip, so that every rank runs as many micro-batches as the others.
    """

    first: int
    count: int
    weight: Fraction


class Permutation:
    """A seeded permutation of range(size), in constant memory; scalar and vectorised forms agree."""

    def __init__(self, size: int, key: int) -> None:
        self.size = size
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)
        self.mask = (1 << self.half) - 1
        self.keys = [_mix((key + 0x9E3779B97F4A7C15 * (i + 1)) & _MASK) for i in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Image of ``index``."""
        while True:
            left, right = index >> self.half, index & self.mask
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & self.mask)
            index = left << self.half | right
            if index < self.size:
                return index

    def array(self, indices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Images of ``indices`` (int64)."""
        out = np.array(indices, np.uint64)
        half, mask = np.uint64(self.half), np.uint64(self.mask)
        todo = np.arange(len(out))
        while len(todo):
            left, right = out[todo] >> half, out[todo] & mask
            for key in self.keys:
                left, right = right, left ^ (_mix_array(right ^ np.uint64(key)) & mask)
            out[todo] = left << half | right
            todo = todo[out[todo] >= self.size]
        return out.astype(np.int64)


class Mixture:
    """The endless global sequence over datasets of ``sizes`` clips, drawn in proportion to ``weights``.

    ``granularity`` is the number of neighbouring clips that stand together, and are read together.
    """

    def __init__(
        self, seed: int, sizes: Sequence[int], weights: Sequence[float] | None = None, granularity: int = 1
    ) -> None:
        weights = [1.0] * len(sizes) if weights is None else weights
        if not sizes or len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} datasets and {len(weights)} weights")
        if min(sizes) < 1 or min(weights) <= 0 or granularity < 1:
            raise ValueError("sizes and granularity must be at least 1, and weights above 0")
        self.seed = seed
        self.sizes = tuple(int(size) for size in sizes)
        self.weights = tuple(weights)
        self.granularity = granularity
        self.runs = tuple(max(1, min(granularity, size // LEAST_RUNS)) for size in self.sizes)
        self.quotas = quotas(weights)
        self.cycle = sum(self.quotas)
        self.before = [sum(self.quotas[:d]) for d in range(len(sizes) + 1)]
        self._cycle_order = lru_cache(64)(lambda c: Permutation(self.cycle, derive(seed, c, "order/cycle")))
        self._epoch = lru_cache(64)(self._make_epoch)
        self._run = lru_cache(64)(lambda dataset, epoch, nth: self._epoch(dataset, epoch)[0](nth))

    def __getstate__(self) -> dict[str, Any]:
        return {"args": (self.seed, self.sizes, self.weights, self.granularity)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(*state["args"])  # type: ignore[misc]

    def _make_epoch(self, dataset: int, epoch: int) -> tuple[Permutation, int]:
        size, run = self.sizes[dataset], self.runs[dataset]
        runs = Permutation(size // run, derive(self.seed, epoch, f"order/runs/{dataset}"))
        return runs, derive(self.seed, epoch, f"order/rotation/{dataset}") % size

    def locate(self, place: int) -> tuple[int, int]:
        """(dataset, n): the place is the n-th of that dataset."""
        slot, offset = divmod(place, self.granularity)
        cycle, turn = divmod(slot, self.cycle)
        if len(self.sizes) == 1:
            return 0, place
        dealt = self._cycle_order(cycle)(turn)
        dataset = max(d for d in range(len(self.sizes)) if self.before[d] <= dealt)
        nth_slot = cycle * self.quotas[dataset] + dealt - self.before[dataset]
        return dataset, nth_slot * self.granularity + offset

    def clip(self, dataset: int, n: int) -> tuple[int, int]:
        """(epoch, clip) at the n-th place of a dataset."""
        size, run = self.sizes[dataset], self.runs[dataset]
        epoch, position = divmod(n, size)
        runs, rotation = self._epoch(dataset, epoch)
        nth, within = divmod(position, run)
        if nth < runs.size:  # the clips left over when runs don't divide the dataset stand last
            position = self._run(dataset, epoch, nth) * run + within
        return epoch, (position + rotation) % size

    def draw(self, place: int, substitute: int = 0) -> Draw:
        """The clip at ``place`` (from 0), or the k-th substitute for it: same dataset, and no one else is shifted."""
        dataset, n = self.locate(place)
        epoch, clip = self.clip(dataset, n)
        if substitute:
            clip = derive(self.seed, place, f"order/substitute/{substitute}") % self.sizes[dataset]
        return Draw(dataset, epoch, clip, substitute)

    def epoch_order(self, dataset: int, epoch: int) -> np.ndarray[Any, Any]:
        """A dataset's whole epoch as an array of clips: for tests, measurements and simulation."""
        size, run = self.sizes[dataset], self.runs[dataset]
        runs, rotation = self._epoch(dataset, epoch)
        positions = np.arange(size, dtype=np.int64)
        whole = runs.size * run
        positions[:whole] = np.repeat(runs.array(np.arange(runs.size)), run) * run + positions[:whole] % run
        return (positions + rotation) % size


def quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole quotas in proportion to the weights, each at least 1, for a cycle of up to about 1,000 slots."""
    total = math.fsum(weights)
    shares = [Fraction(weight / total).limit_denominator(LONGEST_CYCLE) for weight in weights]
    length = math.lcm(*(share.denominator for share in shares))
    if length > LONGEST_CYCLE or sum(shares) != 1 or 0 in shares:
        length = LONGEST_CYCLE
    dealt = [max(1, round(weight / total * length)) for weight in weights]
    divisor = math.gcd(*dealt)
    return tuple(quota // divisor for quota in dealt)


def share(clips: int, rank: int, world: int, micro_batch: int) -> list[Share]:
    """A rank's micro-batches of a global batch of ``clips``: contiguous spans of at most ``micro_batch`` clips.

    Every rank gets equally many. Over all ranks the spans cover the batch once, in order, and the weights add up to 1;
    micro-batches without a clip of their own (a world larger than the batch) become fillers of weight 0.
    """
    if not 0 <= rank < world or clips < 1 or micro_batch < 1:
        raise ValueError(f"rank {rank} of {world}, {clips} clips, micro-batch {micro_batch}")
    each = -(-clips // (world * micro_batch))
    spans = each * world
    shares = []
    for span in range(rank * each, (rank + 1) * each):
        first, last = span * clips // spans, (span + 1) * clips // spans
        if first < last:
            shares.append(Share(first, last - first, Fraction(last - first, clips)))
        else:
            shares.append(Share(min(first, clips - 1), 1, Fraction(0)))
    return shares


def frame_numbers(rule: ClipRule, stored: int, seed: int, place: int) -> tuple[int, ...] | None:
    """The frames that the clip at ``place`` takes of ``stored`` ones, rising from 0; None when there are too few.

    Start and strides are drawn from (seed, place). Strides are drawn anew from a narrower range where the clip is too
    short for the widest one.
    """
    gaps = rule.frames - 1
    least, greatest = rule.stride
    if stored < rule.least_frames:
        return None
    if rule.stride_per == "clip":
        widest = min(greatest, (stored - 1) // gaps) if gaps else least
        strides = [least + derive(seed, place, "stride") % (widest - least + 1)] * gaps
    else:
        draws = [derive(seed, place, f"stride/{gap}") for gap in range(gaps)]
        while True:
            strides = [least + draw % (greatest - least + 1) for draw in draws]
            if sum(strides) < stored:
                break
            greatest -= 1
    start = derive(seed, place, "start") % (stored - sum(strides))
    numbers = [start]
    for stride in strides:
        numbers.append(numbers[-1] + stride)
    return tuple(numbers)


@dataclass(frozen=True, slots=True)
class Crop:
    """Resize to (``height``, ``width``), cut the wanted size at (``top``, ``left``), then ``flip`` left to right."""

    height: int
    width: int
    top: int
    left: int
    flip: bool


def crop(rule: ClipRule, stored: tuple[int, int], size: tuple[int, int], seed: int, place: int) -> Crop:
    """How a frame of ``stored`` (height, width) becomes ``size``: resized to cover it, cropped and flipped."""
    scale = max(Fraction(size[0], stored[0]), Fraction(size[1], stored[1]))
    height, width = (max(want, round(have * scale)) for have, want in zip(stored, size, strict=True))
    top, left = height - size[0], width - size[1]
    if rule.crop == "center":
        top, left = top // 2, left // 2
    else:
        top, left = derive(seed, place, "top") % (top + 1), derive(seed, place, "left") % (left + 1)
    flip = derive(seed, place, "flip") < rule.flip * 2**63
    return Crop(height, width, top, left, flip)


def _mix(value: int) -> int:
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31


def _mix_array(value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    value = (value ^ value >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ value >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return value ^ value >> np.uint64(31)
