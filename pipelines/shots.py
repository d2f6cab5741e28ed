"""Where a shot ends, and how much moves: both from thumbnails of about 160 pixels.

A cut is a frame whose colours and layout differ from the frame before, far more than the frames around it differ from
each other, and which stays different: fast motion changes many frames in a row, and a flash goes back.

Legend: C channels (Y, U, V), H height, W width; grey levels are 0 to 255.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median_high
from typing import TypeVar

import av
import numpy as np
from numpy.typing import NDArray

Frame = TypeVar("Frame")

LONG_SIDE = 160
BLOCK = 10
NEAR = 3
LEAST_LAYOUT = 10.0
LEAST_COLOUR = 0.3
LEAST_RATIO = 3.5


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A frame in small: its grey levels, the mean colours of its blocks, and its colour histogram (adds up to 1)."""

    grey_HW: NDArray[np.int16]
    blocks_C: NDArray[np.float32]
    colours: NDArray[np.float32]


def thumbnail(frame: av.VideoFrame) -> Thumbnail:
    """The thumbnail of a decoded frame of any size and pixel format."""
    shrink = LONG_SIDE / max(frame.width, frame.height)
    width = max(BLOCK, round(frame.width * shrink / BLOCK) * BLOCK)
    height = max(BLOCK, round(frame.height * shrink / BLOCK) * BLOCK)
    small = frame.reformat(width, height, "yuv444p", interpolation="AREA", threads=1)
    planes_CHW = np.stack([np.frombuffer(p, np.uint8).reshape(height, -1)[:, :width] for p in small.planes])
    tiles = planes_CHW.reshape(3, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    luma, chroma_u, chroma_v = planes_CHW >> np.array([5, 3, 3], np.uint8)[:, None, None]
    hue = (np.clip(chroma_u, 12, 19) - 12) * 8 + np.clip(chroma_v, 12, 19) - 12
    bins = luma.astype(np.int64) * 64 + hue
    return Thumbnail(
        planes_CHW[0].astype(np.int16),
        tiles.mean((2, 4), dtype=np.float32).reshape(3, -1),
        (np.bincount(bins.ravel(), minlength=512) / bins.size).astype(np.float32),
    )


def motion(first: Thumbnail, second: Thumbnail) -> float:
    """Mean absolute difference of grey levels, in [0, 1]."""
    if first.grey_HW.shape != second.grey_HW.shape:
        return 1.0
    return float(np.abs(first.grey_HW - second.grey_HW).mean()) / 255


def layout_change(first: Thumbnail, second: Thumbnail) -> float:
    """Mean absolute difference of the block colours, in grey levels; luma counts half."""
    if first.blocks_C.shape != second.blocks_C.shape:
        return 255.0
    return float(np.abs(first.blocks_C - second.blocks_C).mean(1) @ np.array([0.5, 0.25, 0.25], np.float32))


def colour_change(first: Thumbnail, second: Thumbnail) -> float:
    """Share of pixels that changed their bin of the colour histogram, in [0, 1]."""
    return float(np.abs(first.colours - second.colours).sum()) / 2


def shots(frames: Iterable[tuple[Frame, Thumbnail]]) -> Iterator[tuple[Frame, Thumbnail, bool]]:
    """Passes frames on, ``NEAR`` frames late, each with whether it starts a new shot (the first one does)."""
    past: deque[_Change] = deque(maxlen=NEAR)
    coming: deque[tuple[Frame, _Change]] = deque()
    last: Thumbnail | None = None

    def release() -> tuple[Frame, Thumbnail, bool]:
        frame, change = coming.popleft()
        starts = not past or _is_cut(list(past), change, [later for _, later in coming])
        past.append(change)
        return frame, change.to, starts

    for frame, thumb in frames:
        change = (
            _Change(thumb, layout_change(last, thumb), colour_change(last, thumb)) if last else _Change(thumb, 0, 0)
        )
        coming.append((frame, change))
        last = thumb
        if len(coming) > NEAR:
            yield release()
    while coming:
        yield release()


@dataclass(frozen=True, slots=True)
class _Change:
    """A frame, and how it differs from the one before."""

    to: Thumbnail
    layout: float
    colour: float


def _is_cut(past: list[_Change], change: _Change, coming: list[_Change]) -> bool:
    if change.layout < LEAST_LAYOUT or change.colour < LEAST_COLOUR:
        return False
    if change.colour < LEAST_RATIO * (median_high(near.colour for near in [*past, *coming]) + 0.01):
        return False
    lasts = all(colour_change(past[-1].to, later.to) > LEAST_COLOUR / 2 for later in coming)
    return lasts and all(colour_change(earlier.to, change.to) > LEAST_COLOUR / 2 for earlier in past)
