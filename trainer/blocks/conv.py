"""Convolutions that accept any floating type, residual blocks, and changes of resolution by 2.

Legend: B clips, C channels, H height, W width.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

SLOPE = 0.01


class Conv2d(nn.Conv2d):
    """A same-padded convolution that takes input of any floating type and computes in its weight's.

    ``zero`` starts weight and bias at 0, so that the branch which ends here starts as nothing. ``border`` says what
    lies outside: ``zeros`` or ``replicate``.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        zero: bool = False,
        border: Literal["zeros", "replicate"] = "zeros",
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, padding=kernel // 2, padding_mode=border)
        if zero:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride))."""
        return super().forward(x_BCHW.to(self.weight.dtype))


def channels_last(model: nn.Module) -> None:
    """From now on each convolution of the model takes its input with a pixel's channels as neighbours in memory, and so
    gives its output, as a GPU's tensor cores read them. Weights stay as they are: ZeRO keeps them in one flat buffer.
    """
    formats = {nn.Conv2d: torch.channels_last, nn.Conv3d: torch.channels_last_3d}
    for module in model.modules():
        for kind, memory_format in formats.items():
            if isinstance(module, kind):
                module.register_forward_pre_hook(partial(_laid_out, memory_format))


def _laid_out(memory_format: torch.memory_format, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(memory_format=memory_format),)


def activation() -> nn.LeakyReLU:
    """The one nonlinearity of the convolutional blocks."""
    return nn.LeakyReLU(SLOPE)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each behind an activation, beside a shortcut (1x1 where the widths differ)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(activation(), Conv2d(inputs, outputs), activation(), Conv2d(outputs, outputs))
        self.shortcut = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        return self.shortcut(x_BCHW) + self.body(x_BCHW)


class Down(Conv2d):
    """Halves the resolution: a 3x3 convolution of stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, 2)


class Up(nn.Sequential):
    """Doubles the resolution: a 3x3 convolution to four phases, shuffled into place (sub-pixel convolution)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(Conv2d(inputs, 4 * outputs), nn.PixelShuffle(2))
