"""f_ME, the motion estimator: Ranjan and Black, "Optical Flow Estimation using a Spatial Pyramid Network", CVPR 2017.

Legend: B clips, C channels, H height, W width, K kernel side. Flows (x, y) are in pixels of their own resolution.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.blocks.conv import Conv2d
from trainer.blocks.warp import resize_flow, warp
from trainer.recipes.arvae.config import GRADIENT_WIDTHS, SpynetSpec


class Spynet(nn.Module):
    """A residual flow at each level of a pyramid, coarse to fine.

    A level sees the current frame, the previous one warped by the flow so far, and that flow: 3 + 3 + 2 channels. Its
    convolutions repeat the border: zeros there would be edges, and edges move.
    """

    def __init__(self, spec: SpynetSpec) -> None:
        super().__init__()
        self.finest = spec.finest
        self.levels = nn.ModuleList(self._level(spec) for _ in range(spec.levels))
        if spec.start == "gradient":
            for level in self.levels:
                start_from_gradients(level)

    @staticmethod
    def _level(spec: SpynetSpec) -> nn.Sequential:
        level = nn.Sequential()
        for inputs, outputs in pairwise((8, *spec.widths)):
            level.extend((Conv2d(inputs, outputs, spec.kernel, border="replicate"), nn.ReLU()))
        level.append(Conv2d(spec.widths[-1], 2, spec.kernel, border="replicate", zero=True))
        return level

    def forward(self, x_B3HW: Tensor, previous_B3HW: Tensor) -> Tensor:
        """The motion field M (B, 2, H, W), float32, in pixels: ``x(p)`` is found at ``previous(p + M(p))``."""
        size = x_B3HW.shape[-2:]
        pyramid = [(x_B3HW, previous_B3HW)]
        for _ in range(self.finest + len(self.levels) - 1):
            pyramid.append(tuple(_half(frame) for frame in pyramid[-1]))
        flow_B2HW = x_B3HW.new_zeros(len(x_B3HW), 2, *pyramid[-1][0].shape[-2:], dtype=torch.float32)
        for level, (current, reference) in zip(self.levels, reversed(pyramid[self.finest :]), strict=True):
            flow_B2HW = resize_flow(flow_B2HW, current.shape[-2:])
            seen = torch.cat((current.float(), warp(reference, flow_B2HW).float(), flow_B2HW), dim=1)
            flow_B2HW = flow_B2HW + level(seen).float()
        return resize_flow(flow_B2HW, size)


def _half(x_BCHW: Tensor) -> Tensor:
    """Means of 2x2 blocks; the last row and column of odd sizes by themselves."""
    return F.avg_pool2d(x_BCHW, 2, ceil_mode=True, count_include_pad=False)


THRESHOLDS = (-0.2, 0.2)
"""Displacements, in pixels, that a level tells apart at the start."""
GAIN, CLAMP, STEP = 10.0, 0.1, 0.6
"""Of the comparison, its saturation, and the pixels that a level moves at most."""


@torch.no_grad()
def start_from_gradients(level: nn.Sequential) -> None:
    """Makes a level a crude gradient method, so that motion is found before anything is learned.

    Small displacements u obey I_t = u I_x, with I_t = current - previous and I_x their mean's derivative (Lucas and
    Kanade 1981). ReLUs make absolute values, so the first layer has |I_x + I_t| and |I_x - I_t| (halves of each by
    sign); half their sum is d = max(|I_x|, |I_t|), half their difference n = sign(I_x I_t) min(|I_x|, |I_t|), and
    n = u d while |u| < 1. The second layer compares, over a neighbourhood, u with thresholds s, as n - s d clamped
    (two ReLUs): certain where there is texture, near 0 where there is none. The rest adds up and smooths. Flow points
    into the previous frame, current(p) = previous(p + u).
    """
    first, second, third, fourth, last = (layer for layer in level if isinstance(layer, Conv2d))
    side = first.kernel_size[0]
    smooth_KK, soft_KK = _bell(side, 1.0), _bell(side, 1.2)
    x_KK, mean_KK = _sobel(side)
    for layer, channels in zip((first, second, third, fourth), GRADIENT_WIDTHS, strict=True):
        layer.weight[:channels] = 0
        layer.bias[:channels] = 0
    last.weight.zero_()
    last.bias.zero_()
    for axis, slope_KK in enumerate((x_KK, x_KK.T)):
        for row, (toward, sign) in enumerate(((1, 1), (1, -1), (-1, 1), (-1, -1)), start=4 * axis):
            first.weight[row, 0:3] = sign * (slope_KK / 2 + toward * mean_KK) / 3
            first.weight[row, 3:6] = sign * (slope_KK / 2 - toward * mean_KK) / 3
        positive, negative = 2 * axis, 2 * axis + 1
        for row, (threshold, offset) in enumerate(
            ((s, o) for s in THRESHOLDS for o in (CLAMP, -CLAMP)), start=2 * len(THRESHOLDS) * axis
        ):
            second.weight[row, 4 * axis : 4 * axis + 2] = GAIN * (1 - threshold) / 2 * smooth_KK
            second.weight[row, 4 * axis + 2 : 4 * axis + 4] = GAIN * (-1 - threshold) / 2 * smooth_KK
            second.bias[row] = offset
            third.weight[positive, row] = soft_KK if offset > 0 else -soft_KK
            third.weight[negative, row] = -third.weight[positive, row]
        third.bias[positive], third.bias[negative] = -CLAMP * len(THRESHOLDS), CLAMP * len(THRESHOLDS)
        for channel, sign in ((positive, 1), (negative, -1)):
            fourth.weight[channel, channel] = smooth_KK
            last.weight[axis, channel] = sign * STEP / (CLAMP * len(THRESHOLDS)) * smooth_KK


def _bell(side: int, sigma: float) -> Tensor:
    """A Gaussian of unit sum, (K, K)."""
    at_K = torch.arange(side) - side // 2
    bell_K = torch.exp(-0.5 * (at_K / sigma) ** 2)
    return torch.outer(bell_K, bell_K) / bell_K.sum() ** 2


def _sobel(side: int) -> tuple[Tensor, Tensor]:
    """The derivative along x in grey levels a pixel, smoothed along y, and a 3x3 mean of like weights, both (K, K)."""
    weights_3, slope_3 = torch.tensor([0.25, 0.5, 0.25]), torch.tensor([-0.5, 0.0, 0.5])
    margin = (side - 3) // 2
    return tuple(F.pad(torch.outer(weights_3, along_3), (margin,) * 4) for along_3 in (slope_3, weights_3))
