"""Transformer blocks over tokens of any grid: scaled-dot-product attention, axial rotary positions, and the adaptive
normalisation of diffusion transformers.

Attention runs in ``torch.nn.functional.scaled_dot_product_attention``. Rotary positions: Su et al., arXiv 2104.09864,
an axis of the grid for each share of a head's pairs. Adaptive normalisation that starts as nothing (adaLN-Zero):
Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, section 3.2.

Legend: B clips, S tokens, C width, A axes, E width of a head, P = E / 2 pairs of it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROTARY_BASE = 10_000.0


def rotary_angles(positions_SA: Tensor, head: int) -> Tensor:
    """Angles (S, P) by which the pairs of a head of ``head`` numbers turn at each position.

    The pairs are shared out evenly among the axes, what is left goes to the first; at position 0 nothing turns. Raises
    ValueError for a head that is odd or has fewer pairs than there are axes.
    """
    axes, pairs = positions_SA.shape[1], head // 2
    if head % 2 or pairs < axes:
        raise ValueError(
            f"a head of {head} numbers has no pair for each of {axes} axes; take an even {2 * axes} or more"
        )
    counts = [pairs // axes + (pairs % axes if axis == 0 else 0) for axis in range(axes)]
    angles = [
        positions_SA[:, axis : axis + 1].float()
        * ROTARY_BASE ** (-torch.arange(count, device=positions_SA.device, dtype=torch.float32) / count)
        for axis, count in enumerate(counts)
    ]
    return torch.cat(angles, dim=1)


def rotated(x_BHSE: Tensor, angles_SP: Tensor) -> Tensor:
    """Pairs of neighbouring numbers of each head turned by their angles; the type of ``x_BHSE``."""
    a, b = x_BHSE.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles_SP.cos(), angles_SP.sin()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x_BHSE.dtype)


def sinusoids(values_B: Tensor, width: int, period: float = ROTARY_BASE) -> Tensor:
    """Sine and cosine features (B, width) of numbers of about 0 to 1000; ``width`` is even."""
    half = width // 2
    rates = torch.exp(-math.log(period) * torch.arange(half, device=values_B.device, dtype=torch.float32) / half)
    angles = values_B.float()[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x_BSC: Tensor, angles_SP: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        """(B, S, C) -> the same shape; nobody attends to tokens where ``mask_BS`` is False."""
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = rotated(self.query_norm(q.float()), angles_SP).to(v.dtype)
        k = rotated(self.key_norm(k.float()), angles_SP).to(v.dtype)
        mask = None if mask_BS is None else mask_BS[:, None, None, :]
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer (GELU, ``hidden`` times as wide), each normalised before, beside a shortcut.

    ``conditioned`` takes shift, scale and gate of both from a vector a clip; all three start at 0, so that the block
    starts as nothing.
    """

    def __init__(self, width: int, heads: int, *, hidden: int = 4, conditioned: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.mlp_norm = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden * width), nn.GELU(approximate="tanh"), nn.Linear(hidden * width, width)
        )
        self.modulation = zero(nn.Linear(width, 6 * width)) if conditioned else None

    def forward(
        self,
        x_BSC: Tensor,
        angles_SP: Tensor,
        condition_BC: Tensor | None = None,
        mask_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, S, C) -> the same shape, float32; ``condition_BC`` where the block is conditioned."""
        if self.modulation is None or condition_BC is None:
            x_BSC = x_BSC + self.attention(self.attention_norm(x_BSC), angles_SP, mask_BS)
            return x_BSC + self.mlp(self.mlp_norm(x_BSC))
        parts = self.modulation(F.silu(condition_BC)).float()[:, None].chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        x_BSC = x_BSC + gate * self.attention(self.attention_norm(x_BSC) * (1 + scale) + shift, angles_SP, mask_BS)
        shift, scale, gate = parts[3:]
        return x_BSC + gate * self.mlp(self.mlp_norm(x_BSC) * (1 + scale) + shift)


class Time(nn.Module):
    """A vector a clip from its time in [0, 1]: sinusoids of 1000 t, then two layers."""

    FEATURES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(self.FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        """(B,) -> (B, C)."""
        return self.layers(sinusoids(1000 * t_B, self.FEATURES))


def zero(layer: nn.Linear) -> nn.Linear:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
