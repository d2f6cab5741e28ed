"""Convolutions that accept any floating type, residual blocks, and changes of resolution by 2.

Legend: B clips, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Literal

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
