"""Structural similarity of frames: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment", TIP 2004, eq. 13.

Gaussian window of 11 taps with sigma 1.5, population covariance, K1 = 0.01, K2 = 0.03, each colour channel by itself,
averaged over the windows that lie wholly inside the frame. That is what scikit-image's ``structural_similarity`` gives
with ``gaussian_weights=True, sigma=1.5, use_sample_covariance=False``: it filters with mirrored borders and then cuts
those five pixels off again.

Legend: B clips, C channels, T frames, H height, W width, N = B * C * T planes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipelines.faults import InputError

TAPS = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03
_WEIGHTS = [math.exp(-0.5 * ((k - TAPS // 2) / SIGMA) ** 2) for k in range(TAPS)]
WINDOW = tuple(weight / sum(_WEIGHTS) for weight in _WEIGHTS)


def ssim(x_BCTHW: Tensor, y_BCTHW: Tensor, data_range: float) -> Tensor:
    """SSIM of each frame, (B, T), at most 1; differentiable in both arguments.

    Black must be 0 and white ``data_range``: SSIM compares means as ratios, so pixels in [-1, 1] would give other
    values. float64 inputs are computed in float64, all others in float32. Raises ValueError for unequal shapes, and
    InputError for frames under 11 x 11 pixels.
    """
    if x_BCTHW.shape != y_BCTHW.shape:
        raise ValueError(f"shapes differ: {tuple(x_BCTHW.shape)} and {tuple(y_BCTHW.shape)}")
    height, width = x_BCTHW.shape[-2:]
    if min(height, width) < TAPS:
        raise InputError(f"SSIM's window has {TAPS} x {TAPS} pixels; the frames have {height} x {width}. Use larger")
    dtype = torch.float64 if x_BCTHW.dtype == torch.float64 else torch.float32
    x, y = x_BCTHW.to(dtype), y_BCTHW.to(dtype)
    mean_x, mean_y, mean_xx, mean_yy, mean_xy = (_blur(plane) for plane in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variance = (mean_xx - mean_x**2) + (mean_yy - mean_y**2)
    structure = (2 * (mean_xy - mean_x * mean_y) + c2) / (variance + c2)
    return (luminance * structure).mean(dim=(1, 3, 4))


def ssim_loss(x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
    """1 - SSIM on [0, 1], averaged over clips and frames; the arguments are pixels in [-1, 1]."""
    return 1 - ssim((x_BCTHW.float() + 1) / 2, (y_BCTHW.float() + 1) / 2, data_range=1.0).mean()


def _blur(x: Tensor) -> Tensor:
    """The Gaussian window over the last two dimensions, inside only: a sum of shifted planes.

    Not a convolution: those drop to TF32 on CUDA, where the differences of nearly equal means that follow lose every
    digit, and their order of summation depends on the batch.
    """
    for dim in (-1, -2):
        inside = x.shape[dim] - TAPS + 1
        total = x.narrow(dim, 0, inside) * WINDOW[0]
        for k in range(1, TAPS):
            total = torch.add(total, x.narrow(dim, k, inside), alpha=WINDOW[k])
        x = total
    return x
