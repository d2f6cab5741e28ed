"""VideoVAE+: Xing, Fei, He, Chen, Xie, Chi and Chen, "Large Motion Video Autoencoding with Cross-modal Video VAE",
arXiv 2412.17805, equations 1 to 4 under their own symbols.

    X -> E1 (8 x 8 in space) -> Z1 -> E2 (4 in time) -> Z2 -> D2 -> Z1 -> D1 -> X̂        a clip
    X -> E1, without temporal layers -> Z1 -> D1, without temporal layers -> X̂            an image: a clip of one frame

E1 and D1 are an image autoencoder with temporal convolutions and temporal attention, E2 and D2 the lightweight temporal
autoencoder. Option 1 of table 3 compresses time in E1 and has no E2; option 2 has no temporal layers in E1 and D1.

Legend: B clips, C channels, T frames, H height, W width, N = B T frames; c latent channels, t = T / 4 latent steps,
h = H / 8, w = W / 8; L text tokens, D their width. Pixels lie in [-1, 1].
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.blocks.patch import PatchAnalysis, PatchSynthesis, contrast
from trainer.recipes.videovaeplus.config import SPAN, VideoVaePlusConfig
from trainer.recipes.videovaeplus.image_vae import inherit
from trainer.recipes.videovaeplus.layers import (
    Block,
    Context,
    Double,
    Down,
    Halve,
    Identity,
    Norm,
    SpatialAttention,
    TemporalAttention,
    TemporalDown,
    TemporalUp,
    Up,
    clips,
    conv3d,
    frames,
    zeroed,
)
from trainer.recipes.videovaeplus.text import NullToken, TextAttention

QUIET = -6.0
"""Log variance that a linear path starts with."""


class Posterior(NamedTuple):
    """A latent: ``mean`` and ``log_variance``, (B, c, t, h, w), float32."""

    mean: Tensor
    log_variance: Tensor

    def sample(self, noise: Tensor | None) -> Tensor:
        """``μ + σ ε``, or ``μ`` without noise."""
        return self.mean if noise is None else self.mean + torch.exp(0.5 * self.log_variance) * noise


class Reconstruction(NamedTuple):
    """A clip as the model made it: X̂, and the posterior of its innermost latent (Z2; Z1 for images)."""

    pixels_B3THW: Tensor
    posterior: Posterior


class _Blocks(nn.Module):
    """What runs blocks; with ``recompute`` their activations are computed again in the backward pass."""

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__()
        self.recompute = config.recompute

    def _run(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            # ZeRO-3 lets go of weights between the two passes, so what is compared of them differs.
            return checkpoint(
                block, x, context, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
            )
        return block(x, context)


class _FrameText(nn.Module):
    """Text attention over frames as spatial layers see them."""

    def __init__(self, config: VideoVaePlusConfig, channels: int, patch: int) -> None:
        super().__init__()
        self.attention = TextAttention(config.text, channels, patch)

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        return frames(self.attention(clips(x_NCHW, context.clips), context.text))


def _text(config: VideoVaePlusConfig, channels: int, patch: int, count: int) -> nn.ModuleList:
    return nn.ModuleList(_FrameText(config, channels, patch) for _ in range(count if config.text else 0))


class Level(_Blocks):
    """A level of E1 or D1: residual blocks, each with its text attention, then a change of resolution."""

    def __init__(self, config: VideoVaePlusConfig, inputs: int, outputs: int, count: int, patch: int) -> None:
        super().__init__(config)
        widths = [inputs, *[outputs] * count]
        self.resnets = nn.ModuleList(Block(config, a, b) for a, b in pairwise(widths))
        self.text = _text(config, outputs, patch, count)
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        self.temporal_resampler: nn.Module = Identity()

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H', W')."""
        for i, block in enumerate(self.resnets):
            x_NCHW = self._run(block, x_NCHW, context)
            if self.text:
                x_NCHW = self._run(self.text[i], x_NCHW, context)
        for resample in (*self.downsamplers, *self.upsamplers):
            x_NCHW = resample(self.temporal_resampler(x_NCHW, context))
        return x_NCHW


class Middle(_Blocks):
    """The lowest resolution: attention between two residual blocks."""

    def __init__(self, config: VideoVaePlusConfig, channels: int) -> None:
        super().__init__(config)
        self.resnets = nn.ModuleList(Block(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialAttention(config, channels)])
        sequential = config.modeling == "sequential"
        self.temporal_attention = Identity() if sequential else TemporalAttention(config, channels)

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        for block in (self.resnets[0], self.attentions[0], self.temporal_attention, self.resnets[1]):
            x_NCHW = self._run(block, x_NCHW, context)
        return x_NCHW


class Encoder(nn.Module):
    """E1 of equation 2, to mean and log variance of Z1 (before a quantisation convolution, where there is one)."""

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.multipliers]
        levels = len(widths)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(config, inputs, outputs, config.blocks, patch=2 ** (levels - 1 - i))
            if i < levels - 1:
                level.downsamplers.append(Down(outputs))
                if config.modeling == "simultaneous" and i < int(math.log2(SPAN)):
                    level.temporal_resampler = TemporalDown(outputs)
            self.down_blocks.append(level)
        self.mid_block = Middle(config, widths[-1])
        self.conv_norm_out = Norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_NCHW: Tensor, context: Context) -> Tensor:
        """(N, 3, H, W) -> (N', 2 c, h, w)."""
        x_NCHW = self.conv_in(x_NCHW)
        for level in self.down_blocks:
            x_NCHW = level(x_NCHW, context)
        x_NCHW = self.mid_block(x_NCHW, context)
        return self.conv_out(F.silu(self.conv_norm_out(x_NCHW, context)))


class Decoder(nn.Module):
    """D1 of equation 4, from Z1 to pixels."""

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in reversed(config.multipliers)]
        levels = len(widths)
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(config, widths[0])
        self.up_blocks = nn.ModuleList()
        for i, (inputs, outputs) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(config, inputs, outputs, config.blocks + 1, patch=2**i)
            if i < levels - 1:
                level.upsamplers.append(Up(outputs))
                if config.modeling == "simultaneous" and i >= levels - 1 - int(math.log2(SPAN)):
                    level.temporal_resampler = TemporalUp()
            self.up_blocks.append(level)
        self.conv_norm_out = Norm(config, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z_NCHW: Tensor, context: Context) -> Tensor:
        """(N', c, h, w) -> (N, 3, H, W)."""
        x_NCHW = self.mid_block(self.conv_in(z_NCHW), context)
        for level in self.up_blocks:
            x_NCHW = level(x_NCHW, context)
        return self.conv_out(F.silu(self.conv_norm_out(x_NCHW, context)))


class TemporalEncoder(_Blocks):
    """E2 of equation 3: a convolution, then twice half the frames and twice the channels."""

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__(config)
        width, latent = config.temporal_width, config.latent_channels
        self.conv_in = conv3d(latent, width)
        self.levels = nn.ModuleList(Halve(config, width * 2**i, width * 2 ** (i + 1)) for i in range(2))
        self.norm = nn.GroupNorm(config.groups, 4 * width, eps=1e-6)
        self.conv_out = conv3d(4 * width, 2 * latent)
        self.analysis = TemporalAnalysis(latent) if config.linear == "dct" else None

    def forward(self, z_BcThw: Tensor, context: Context) -> Tensor:
        """Z1 (B, c, T, h, w) -> mean and log variance of Z2, (B, 2 c, t, h, w)."""
        x = self.conv_in(z_BcThw)
        for level in self.levels:
            x = self._run(level, x, context)
        return self.conv_out(F.silu(self.norm(x)))


class TemporalDecoder(_Blocks):
    """D2 of equation 4: two residual blocks after each doubling of the frames, against the encoder's one."""

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__(config)
        width, latent = config.temporal_width, config.latent_channels
        self.conv_in = conv3d(latent, 4 * width)
        self.levels = nn.ModuleList([Double(config, 4 * width, 4 * width), Double(config, 4 * width, 2 * width)])
        self.conv_out = conv3d(2 * width, latent)
        self.synthesis = TemporalSynthesis(latent) if config.linear == "dct" else None

    def forward(self, z_Bcthw: Tensor, context: Context) -> Tensor:
        """Z2 (B, c, t, h, w) -> Z1 (B, c, T, h, w)."""
        x = self.conv_in(z_Bcthw)
        for level in self.levels:
            x = self._run(level, x, context)
        x = self.conv_out(x)
        if self.synthesis is None:
            return x
        return x.float() * contrast(z_Bcthw).repeat_interleave(SPAN, dim=2) + self.synthesis(z_Bcthw)


class VideoVaePlus(nn.Module):
    """The whole autoencoder: ``encode`` and ``decode`` are equation 1, ``forward`` trains all of it.

    A clip of one frame is an image: it passes no temporal convolution, no temporal attention and no temporal
    autoencoder.
    """

    def __init__(self, config: VideoVaePlusConfig) -> None:
        super().__init__()
        latent = config.latent_channels
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.quantized else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.quantized else None
        self.temporal_encoder = TemporalEncoder(config) if config.temporal else None
        self.temporal_decoder = TemporalDecoder(config) if config.temporal else None
        self.text = NullToken(config.text) if config.text else None
        linear = config.linear == "dct"
        self.analysis = PatchAnalysis(config.cell, latent) if linear else None
        self.synthesis = PatchSynthesis(config.cell, latent) if linear else None
        if linear:
            for layer in (self.decoder.conv_out, self.temporal_decoder.conv_out):
                zeroed(layer)
            for layer in (self.quant_conv or self.encoder.conv_out, self.temporal_encoder.conv_out):
                zeroed(layer)
                nn.init.constant_(layer.bias[latent:], QUIET)
        if config.weights is not None:
            inherit(self, config)

    def context(self, count: int, image: bool, emb_BLD: Tensor | None, mask_BL: Tensor | None) -> Context:
        """What the layers must know of ``count`` clips; captions are None where no clip has one."""
        return Context(count, image, None if self.text is None else self.text(count, emb_BLD, mask_BL))

    def encode_frames(self, x_B3THW: Tensor, context: Context) -> Posterior:
        """Equation 2, E1: pixels -> Z1 (B, c, T, h, w); t steps where E1 compresses time (option 1)."""
        x_N3HW = frames(x_B3THW)
        moments = self.encoder(x_N3HW, context)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = moments.float().chunk(2, dim=1)
        if self.analysis is not None:
            coefficients = self.analysis(x_N3HW)
            mean = mean * contrast(coefficients) + coefficients
        return Posterior(clips(mean, context.clips), clips(log_variance.clamp(-30, 20), context.clips))

    def decode_frames(self, z1_BcThw: Tensor, context: Context) -> Tensor:
        """D1: Z1 -> pixels (B, 3, T, H, W), float32."""
        z_Nchw = frames(z1_BcThw)
        x_N3HW = self.decoder(z_Nchw if self.post_quant_conv is None else self.post_quant_conv(z_Nchw), context).float()
        if self.synthesis is not None:
            scale = F.interpolate(contrast(z_Nchw, 3 * self.synthesis.side**2), scale_factor=self.synthesis.side)
            x_N3HW = x_N3HW * scale + self.synthesis(z_Nchw)
        return clips(x_N3HW, context.clips)

    def encode_time(self, z1_BcThw: Tensor, context: Context) -> Posterior:
        """Equation 3, E2: Z1 -> Z2 (B, c, t, h, w)."""
        mean, log_variance = self.temporal_encoder(z1_BcThw, context).float().chunk(2, dim=1)
        if self.temporal_encoder.analysis is not None:
            coefficients = self.temporal_encoder.analysis(z1_BcThw)
            mean = mean * contrast(coefficients) + coefficients
        return Posterior(mean, log_variance.clamp(-30, 20))

    def encode(self, x_B3THW: Tensor, context: Context, noise: dict[str, Tensor] | None = None) -> Posterior:
        """Pixels of 4 k frames, or of one, -> the innermost latent; Z1 is sampled where ``noise`` has a ``z1``."""
        first = self.encode_frames(x_B3THW, context)
        if context.image or self.temporal_encoder is None:
            return first
        return self.encode_time(first.sample(None if noise is None else noise["z1"]), context)

    def decode(self, z_Bcthw: Tensor, context: Context) -> Tensor:
        """The innermost latent -> pixels (B, 3, T, H, W)."""
        if not context.image and self.temporal_decoder is not None:
            z_Bcthw = self.temporal_decoder(z_Bcthw, context)
        return self.decode_frames(z_Bcthw, context)

    def forward(
        self,
        x_B3THW: Tensor,
        noise: dict[str, Tensor] | None = None,
        emb_BLD: Tensor | None = None,
        mask_BL: Tensor | None = None,
    ) -> Reconstruction:
        """Codes clips; latents are sampled with the ε of ``noise`` (``z1``, ``z2``), or their means without.

        ``emb_BLD`` and ``mask_BL`` are the captions' tokens; None, or a row of False, takes the null token.
        """
        image = x_B3THW.shape[2] == 1
        context = self.context(len(x_B3THW), image, emb_BLD, mask_BL)
        posterior = self.encode(x_B3THW, context, noise)
        inner = "z1" if image or self.temporal_encoder is None else "z2"
        z_Bcthw = posterior.sample(None if noise is None else noise[inner])
        return Reconstruction(self.decode(z_Bcthw, context), posterior)


# -- the linear path (ours) -------------------------------------------------------------------------------------------


def temporal_basis(channels: int) -> Tensor:
    """Orthonormal functions of four steps of Z1, (c, c, 4): cosines in time, those of greatest expected variance.

    Channel k of Z1 is the k-th frequency in space (``trainer.blocks.patch``); k at temporal frequency f is placed as if
    it were k (1 + 6 f²) at rest.
    """
    steps = torch.arange(SPAN, dtype=torch.float64)
    wave = torch.cos(math.pi / SPAN * (steps + 0.5) * steps[:, None]) * math.sqrt(2 / SPAN)
    wave[0] /= math.sqrt(2)
    order = sorted(
        ((k, f) for k in range(channels) for f in range(SPAN)), key=lambda kf: ((kf[0] + 1) * (1 + 6 * kf[1] ** 2), kf)
    )
    basis = torch.zeros(channels, channels, SPAN, dtype=torch.float64)
    for at, (k, f) in enumerate(order[:channels]):
        basis[at, k] = wave[f]
    return basis.float()


class TemporalAnalysis(nn.Module):
    """Z1 to coefficients of four steps: (B, c, T, h, w) -> (B, c, t, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight_dc4 = nn.Parameter(temporal_basis(channels))

    def forward(self, z_BcThw: Tensor) -> Tensor:
        """Inner products with the basis."""
        return torch.einsum("dck,bctkhw->bdthw", self.weight_dc4, z_BcThw.unflatten(2, (-1, SPAN)))


class TemporalSynthesis(nn.Module):
    """Coefficients to Z1: (B, c, t, h, w) -> (B, c, T, h, w). Starts as the transpose of the analysis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight_dc4 = nn.Parameter(temporal_basis(channels))

    def forward(self, z_Bcthw: Tensor) -> Tensor:
        """Sums of basis functions."""
        return torch.einsum("dck,bdthw->bctkhw", self.weight_dc4, z_Bcthw).flatten(2, 3)
