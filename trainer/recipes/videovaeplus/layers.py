"""Blocks of the temporal-aware spatial autoencoder and of the temporal one.

An inflated convolution of kernel (1, 3, 3) over a clip is a 3 x 3 convolution of each frame, so spatial layers see
frames (N = B T) and temporal ones clips; each is a view of the other's tensor. Spatial layers have the names and shapes
of `diffusers`' AutoencoderKL, so that its weights load by name.

    x -> norm1 -> conv1 -> + temporal1 -> norm2 -> conv2 -> + temporal2 --+-> y      (STBlock3D, figure 3)
    +--> conv_shortcut --> + temporal_shortcut ---------------------------+

Legend: B clips, C channels, T frames, H height, W width, N = B T frames, M = B H W tubes; L text tokens, D their width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.recipes.videovaeplus.config import VideoVaePlusConfig
from trainer.recipes.videovaeplus.text import Text, TextAttention

EPS = 1e-6
REACH = 64
"""Distance in frames beyond which temporal attention sees positions as equally far."""


class Context(NamedTuple):
    """What a layer must know of the clips: their number, whether they are images, and their captions."""

    clips: int
    image: bool
    text: Text | None


def zeroed(module: nn.Module) -> nn.Module:
    """The module with weight and bias 0: the branch that ends in it starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def clips(x_NCHW: Tensor, count: int) -> Tensor:
    """Frames of ``count`` clips as (B, C, T, H, W), a view."""
    return x_NCHW.unflatten(0, (count, -1)).transpose(1, 2)


def frames(x_BCTHW: Tensor) -> Tensor:
    """The inverse of :func:`clips`."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


class Norm(nn.GroupNorm):
    """Group normalisation over a frame, or, with ``clip``, over all frames of a clip."""

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__(config.groups, channels, eps=EPS)
        self.clip = config.norm == "clip"

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if self.clip and not context.image:
            return frames(super().forward(clips(x_NCHW, context.clips)))
        return super().forward(x_NCHW)


class TemporalConv(nn.Module):
    """The residual temporal convolution: normalisation over the clip, SiLU, convolution; starts as nothing."""

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=EPS)
        kernel = config.temporal_kernel
        self.conv = zeroed(nn.Conv3d(channels, channels, kernel, padding=tuple(size // 2 for size in kernel)))

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> the same shape; images pass as they are."""
        if context.image:
            return x_NCHW
        return x_NCHW + frames(self.conv(F.silu(self.norm(clips(x_NCHW, context.clips)))))


class Identity(nn.Module):
    """In the place of a temporal layer that a configuration doesn't have."""

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """The input."""
        return x_NCHW


def temporal_conv(config: VideoVaePlusConfig, channels: int) -> nn.Module:
    """A temporal convolution, or none in an image autoencoder (option 2)."""
    return Identity() if config.modeling == "sequential" else TemporalConv(config, channels)


class Block(nn.Module):
    """A residual block of the image autoencoder, each convolution followed by a temporal one."""

    def __init__(self, config: VideoVaePlusConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(config, inputs), Norm(config, outputs)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.temporal1, self.temporal2 = temporal_conv(config, outputs), temporal_conv(config, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        every = config.temporal_shortcut == "every" or inputs != outputs
        self.temporal_shortcut = temporal_conv(config, outputs) if every else Identity()

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H, W)."""
        h = self.temporal1(self.conv1(F.silu(self.norm1(x_NCHW, context))), context)
        h = self.temporal2(self.conv2(F.silu(self.norm2(h, context))), context)
        return self.temporal_shortcut(self.conv_shortcut(x_NCHW), context) + h


class SpatialAttention(nn.Module):
    """Self-attention of one head over the pixels of each frame, or, with ``whole`` (option 1), of the clip."""

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__()
        self.whole = config.modeling == "simultaneous"
        self.group_norm = Norm(config, channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        count, _, *size = x_NCHW.shape
        tokens = self.group_norm(x_NCHW, context).flatten(2).transpose(1, 2)
        if self.whole:
            tokens = tokens.reshape(context.clips, -1, tokens.shape[2])
        query, key, value = (to(tokens)[:, None] for to in (self.to_q, self.to_k, self.to_v))
        seen = self.to_out[0](F.scaled_dot_product_attention(query, key, value)[:, 0])
        return x_NCHW + seen.reshape(count, -1, seen.shape[2]).transpose(1, 2).unflatten(2, tuple(size))


class TemporalAttention(nn.Module):
    """Self-attention of one head over the frames at each pixel, with relative positions in keys and values (Shaw,
    Uszkoreit and Vaswani 2018, equations 3 and 4); starts as nothing.
    """

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=EPS)
        self.qkv, self.to_out = zeroed(nn.Linear(channels, 3 * channels)), zeroed(nn.Linear(channels, channels))
        self.key_positions = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * REACH + 1, channels)))
        self.value_positions = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * REACH + 1, channels)))

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> the same shape; images pass as they are."""
        if context.image:
            return x_NCHW
        x_BCTHW = clips(x_NCHW, context.clips)
        batch, channels, length, *size = x_BCTHW.shape
        tubes_MCT = x_BCTHW.permute(0, 3, 4, 1, 2).flatten(0, 2)
        query, key, value = self.qkv(self.norm(tubes_MCT).transpose(1, 2)).chunk(3, dim=-1)
        at_T = torch.arange(length, device=x_NCHW.device)
        distance_TT = (at_T - at_T[:, None]).clamp(-REACH, REACH) + REACH
        keys_TTC, values_TTC = (of[distance_TT].to(query) for of in (self.key_positions, self.value_positions))
        scores = query @ key.transpose(1, 2) + torch.einsum("mtc,tsc->mts", query, keys_TTC)
        weights = (scores / math.sqrt(channels)).softmax(-1).to(value.dtype)
        seen = weights @ value + torch.einsum("mts,tsc->mtc", weights, values_TTC)
        y_BHWTC = self.to_out(seen).unflatten(0, (batch, *size))
        return x_NCHW + y_BHWTC.permute(0, 3, 4, 1, 2).flatten(0, 1)


class Down(nn.Module):
    """Halves height and width: a 3 x 3 convolution of stride 2, a row and column of zeros below and to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H / 2, W / 2)."""
        return self.conv(F.pad(x_NCHW, (0, 1, 0, 1)))


class Up(nn.Module):
    """Doubles height and width: nearest neighbours, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x_NCHW, scale_factor=2.0, mode="nearest"))


class TemporalDown(nn.Module):
    """Halves time (option 1): a convolution of three frames and stride 2 that starts as the mean of two."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(
            channels, channels, (3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0), padding_mode="replicate"
        )
        with torch.no_grad():
            self.conv.weight.zero_()
            self.conv.weight[:, :, 1:, 0, 0] = 0.5 * torch.eye(channels)[:, :, None]
            self.conv.bias.zero_()

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> (N / 2, C, H, W); images pass as they are."""
        return x_NCHW if context.image else frames(self.conv(clips(x_NCHW, context.clips)))


class TemporalUp(nn.Module):
    """Doubles time (option 1): each frame twice."""

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> (2 N, C, H, W); images pass as they are."""
        return x_NCHW if context.image else x_NCHW.repeat_interleave(2, dim=0)


# -- the temporal autoencoder -----------------------------------------------------------------------------------------


def conv3d(inputs: int, outputs: int, stride: tuple[int, int, int] = (1, 1, 1)) -> nn.Conv3d:
    """A 3 x 3 x 3 convolution with the border repeated, Xavier weights and no bias at the start."""
    conv = nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="replicate")
    return _xavier(conv)


def _xavier(conv: nn.Conv3d | nn.ConvTranspose3d) -> nn.Conv3d | nn.ConvTranspose3d:
    nn.init.xavier_uniform_(conv.weight)
    nn.init.zeros_(conv.bias)
    return conv


class Block3d(nn.Module):
    """A residual block of two 3 x 3 x 3 convolutions, and the text's part."""

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(config.groups, channels, eps=EPS) for _ in range(2))
        self.conv1, self.conv2 = conv3d(channels, channels), conv3d(channels, channels)
        self.text = TextAttention(config.text, channels, patch=1) if config.text else None

    def forward(self, x_BCTHW: Tensor, context: Context) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        h_BCTHW = self.conv1(F.silu(self.norm1(x_BCTHW)))
        x_BCTHW = x_BCTHW + self.conv2(F.silu(self.norm2(h_BCTHW)))
        return x_BCTHW if self.text is None else self.text(x_BCTHW, context.text)


class Halve(nn.Module):
    """A convolution of stride 2 in time, and a residual block."""

    def __init__(self, config: VideoVaePlusConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv3d(inputs, outputs, (2, 1, 1))
        self.block = Block3d(config, outputs)

    def forward(self, x_BCTHW: Tensor, context: Context) -> Tensor:
        """(B, inputs, T, H, W) -> (B, outputs, T / 2, H, W)."""
        return self.block(self.conv(x_BCTHW), context)


class Double(nn.Module):
    """A transposed convolution of stride 2 in time, and two residual blocks."""

    def __init__(self, config: VideoVaePlusConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = _xavier(
            nn.ConvTranspose3d(inputs, outputs, 3, stride=(2, 1, 1), padding=1, output_padding=(1, 0, 0))
        )
        self.blocks = nn.ModuleList(Block3d(config, outputs) for _ in range(2))

    def forward(self, x_BCTHW: Tensor, context: Context) -> Tensor:
        """(B, inputs, T, H, W) -> (B, outputs, 2 T, H, W)."""
        x_BCTHW = self.conv(x_BCTHW)
        for block in self.blocks:
            x_BCTHW = block(x_BCTHW, context)
        return x_BCTHW
