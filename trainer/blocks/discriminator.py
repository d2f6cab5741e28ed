"""PatchGAN discriminators: Isola, Zhu, Zhou and Efros, "Image-to-Image Translation with Conditional Adversarial
Networks", CVPR 2017, section 3.2 and appendix 6.1.2; over frames one by one, or over a clip.

Legend: B clips, C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["patch-2d", "patch-3d"]
Norm = Literal["group", "batch", "none"]
GROUPS = 32
SLOPE = 0.2


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: ``layers`` convolutions of stride 2, then two of stride 1.

    ``patch-2d`` looks at each frame by itself (4 x 4 kernels, the paper's; 3 layers see 70 x 70 pixels), ``patch-3d``
    at the clip (3 x 3 x 3 kernels; the first two strides are in time too). ``norm`` ``group`` normalises each frame or
    clip by itself, so that a logit is a function of its own pixels; ``batch`` takes the statistics of the batch at hand
    and keeps no running ones.
    """

    def __init__(self, kind: Kind, width: int = 64, layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        self.by_frame = kind == "patch-2d"
        convolution: type[nn.Conv2d | nn.Conv3d] = nn.Conv2d if self.by_frame else nn.Conv3d
        kernel = 4 if self.by_frame else 3
        net: list[nn.Module] = []
        inputs = 3
        for layer in range(layers + 1):
            outputs = width * min(2**layer, 8)
            stride: int | tuple[int, ...] = 2 if layer < layers else 1
            if not self.by_frame and 1 < layer < layers:
                stride = (1, 2, 2)
            normed = layer > 0 and norm != "none"
            net.append(convolution(inputs, outputs, kernel, stride, 1, bias=not normed))
            if normed:
                net.append(_norm(norm, outputs, self.by_frame))
            net.append(nn.LeakyReLU(SLOPE))
            inputs = outputs
        net.append(convolution(inputs, 1, kernel, 1, 1))
        self.net = nn.Sequential(*net)
        for module in self.modules():
            if isinstance(module, convolution):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels_BCTHW: Tensor, exact: bool = False) -> Tensor:
        """Pixels in [-1, 1] -> logits (B, patches), float32. ``exact`` computes in float32 under autocast too."""
        device = pixels_BCTHW.device.type
        with torch.autocast(device, enabled=False) if exact else contextlib.nullcontext():
            logits = self.net(pixels_BCTHW.transpose(1, 2).flatten(0, 1) if self.by_frame else pixels_BCTHW)
        return logits.float().reshape(len(pixels_BCTHW), -1)


def least_side(kind: Kind, layers: int) -> int:
    """Fewest pixels of a frame's side for one patch."""
    return 3 * 2**layers if kind == "patch-2d" else 1


def _norm(norm: Norm, channels: int, by_frame: bool) -> nn.Module:
    if norm == "group":
        return nn.GroupNorm(math.gcd(min(GROUPS, max(1, channels // 4)), channels), channels)
    return (nn.BatchNorm2d if by_frame else nn.BatchNorm3d)(channels, track_running_stats=False)
