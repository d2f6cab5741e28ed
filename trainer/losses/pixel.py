"""Pixel losses. Scalars, averaged over everything, in float32 whatever the inputs are.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """Mean squared error; 4 times that of [0, 1] pixels when the inputs lie in [-1, 1]."""
    return F.mse_loss(x_BCTHW.float(), y_BCTHW.float())


def l1(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """Mean absolute error."""
    return F.l1_loss(x_BCTHW.float(), y_BCTHW.float())


def charbonnier(x_BCTHW: Tensor, y_BCTHW: Tensor, eps: float = 1e-3) -> Tensor:
    """Mean of sqrt(d^2 + eps^2): l1 with a gradient that is smooth at d = 0 (Charbonnier et al. 1994)."""
    return torch.sqrt((x_BCTHW.float() - y_BCTHW.float()).square() + eps * eps).mean()
