"""How many 1D latents a clip keeps: drawn in training, decided where a video is encoded.

Legend: B clips, T frames, H height, W width, K 1D latents.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trainer.recipes.onedva.config import DropoutSpec


def motion_score(x_B3THW: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring frames, (B,), in grey levels of [0, 1]; 0 for a single frame."""
    if x_B3THW.shape[2] == 1:
        return x_B3THW.new_zeros(len(x_B3THW))
    return x_B3THW.float().diff(dim=2).abs().flatten(1).mean(1) / 2


def motion_share(motion_B: Tensor, spec: DropoutSpec) -> Tensor:
    """The share of all 1D latents that clips of such motion ask for, (B,)."""
    return (motion_B / spec.full).clamp(spec.least, 1.0)


def drawn_lengths(x_B3THW: Tensor, uniform_B: Tensor, longest: int, spec: DropoutSpec) -> Tensor:
    """Kept lengths (B,), 1 to ``longest``, from a uniform draw a clip."""
    if spec.by == "none":
        return torch.full_like(uniform_B, longest).long()
    if spec.by == "uniform":
        return 1 + (uniform_B * longest).long().clamp(max=longest - 1)
    share_B = motion_share(motion_score(x_B3THW), spec) * spec.spread ** (2 * uniform_B - 1)
    return (share_B * longest).round().long().clamp(1, longest)


def candidates(longest: int, every: int) -> list[int]:
    """Lengths that encoding may keep: multiples of ``every`` up to all, 0 included."""
    return sorted({*range(0, longest + 1, every), longest})


def at_least(wanted: float, lengths: list[int]) -> int:
    """The shortest of ``lengths`` that is ``wanted`` or more, else the longest."""
    return next((length for length in lengths if length >= math.ceil(wanted)), lengths[-1])


def at_most(wanted: float, lengths: list[int]) -> int:
    """The longest of ``lengths`` that is ``wanted`` or less."""
    return max(length for length in lengths if length <= max(wanted, 0))
