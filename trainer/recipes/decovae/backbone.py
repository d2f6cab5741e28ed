"""Wavelets, causal blocks, encoder and decoder after LeanVAE (Cheng and Yuan, arXiv 2503.14325), whose sizes give the
paper's 62M parameters: three encoders, one decoder.

    frame 1:       2D Haar -> patches of 1 x 4 x 4 --+   low band:   ``separate`` blocks of width ``low``   --+
    frames 2 to T: 3D Haar -> patches of 2 x 4 x 4 --+-> high bands: ``separate`` blocks of width ``high``  --+-> blocks

A latent step is frame 1, then four frames each; a cell is 8 x 8 pixels. Everything is causal in time.

Legend: B clips, C channels, T frames, H height, W width; L = 1 + (T - 1) / 4 latent steps, h = H / 8, w = W / 8,
D latent channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.blocks.patch import contrast, cosine_basis, spacetime_basis
from trainer.recipes.decovae.config import BackboneSpec

PATCH = 4
FIRST_BANDS, LATER_BANDS = 3, 7
"""High bands of the 2D and of the 3D Haar transform."""
CELL = 8
SPAN = 4


def haar(x_BCTHW: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Orthonormal Haar transform over pairs along ``dims``: (B, bands, C, ...), band 0 the low one, sizes halved."""
    bands = [x_BCTHW]
    for dim in dims:
        pairs = [band.unflatten(dim, (-1, 2)).unbind(dim + 1) for band in bands]
        bands = [v * math.sqrt(0.5) for a, b in pairs for v in (a + b, a - b)]
    return torch.stack(bands, dim=1)


def unhaar(bands_BKCTHW: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The inverse of :func:`haar`."""
    bands = list(bands_BKCTHW.unbind(1))
    for dim in reversed(dims):
        bands = [
            torch.stack((low + high, low - high), dim=dim + 1).flatten(dim, dim + 1) * math.sqrt(0.5)
            for low, high in zip(bands[::2], bands[1::2], strict=True)
        ]
    return bands[0]


SPACE, SPACETIME = (3, 4), (2, 3, 4)


def bands(x_BCTHW: Tensor) -> list[Tensor]:
    """Haar bands of frame 1, (B, 4, C, 1, H/2, W/2), and, if any, of later frames, (B, 8, C, (T-1)/2, H/2, W/2)."""
    first = haar(x_BCTHW[:, :, :1], SPACE)
    return [first] if x_BCTHW.shape[2] == 1 else [first, haar(x_BCTHW[:, :, 1:], SPACETIME)]


def _patches(bands_BKCTHW: Tensor, span: int) -> Tensor:
    """Patches of ``span`` x 4 x 4 as tokens (B, T', h, w, numbers)."""
    x = bands_BKCTHW.flatten(1, 2)
    x = x.unflatten(4, (-1, PATCH)).unflatten(3, (-1, PATCH)).unflatten(2, (-1, span))
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def _unpatches(tokens_BThwN: Tensor, span: int, kept: int) -> Tensor:
    """The inverse of :func:`_patches`: (B, kept, C, T, H, W)."""
    x = tokens_BThwN.unflatten(4, (kept, -1, span, PATCH, PATCH))
    return x.permute(0, 4, 5, 1, 6, 2, 7, 3, 8).flatten(7, 8).flatten(5, 6).flatten(3, 4)


class CausalDepthwise(nn.Module):
    """A depthwise 3 x 3 x 3 convolution that sees a step and the two before it; the first step is repeated."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_3C133 = nn.Parameter(torch.empty(3, width, 1, 3, 3).uniform_(-1, 1) / math.sqrt(27))
        self.bias_C = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLhwC: Tensor) -> Tensor:
        """(B, L, h, w, C) -> the same shape. A sum of 2D convolutions: CPUs have fast ones."""
        batch, steps = x_BLhwC.shape[:2]
        x_NChw = x_BLhwC.flatten(0, 1).permute(0, 3, 1, 2)
        total_BLChw = None
        for back, weight_C133 in enumerate(self.weight_3C133.unbind(0)):
            bias_C = None if back else self.bias_C
            y_BLChw = F.conv2d(x_NChw, weight_C133, bias_C, padding=1, groups=len(weight_C133)).unflatten(
                0, (batch, -1)
            )
            if back:
                first_BLChw = y_BLChw[:, :1].expand(-1, min(back, steps), -1, -1, -1)
                y_BLChw = torch.cat((first_BLChw, y_BLChw[:, : max(0, steps - back)]), dim=1)
            total_BLChw = y_BLChw if total_BLChw is None else total_BLChw + y_BLChw
        return total_BLChw.permute(0, 1, 3, 4, 2)


class Norm(nn.RMSNorm):
    """Root-mean-square normalisation in float32."""

    def forward(self, x_BLhwC: Tensor) -> Tensor:
        """(B, L, h, w, C) of any floating type -> float32."""
        return super().forward(x_BLhwC.float())


class Block(nn.Module):
    """A causal depthwise convolution and a gated feed-forward layer (GEGLU, 8/3 as wide), each beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.norm, self.gate_norm = Norm(width), Norm(width)
        self.depthwise = CausalDepthwise(width)
        self.gate, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x_BLhwC: Tensor) -> Tensor:
        """(B, L, h, w, C) -> the same shape."""
        x_BLhwC = x_BLhwC + self.depthwise(self.norm(x_BLhwC))
        value, gate = self.gate(self.gate_norm(x_BLhwC)).chunk(2, dim=-1)
        return x_BLhwC + self.out(value * F.gelu(gate))


def _blocks(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(Block(width) for _ in range(count)))


class Encoder(nn.Module):
    """E_i of equation 1: a component of C channels -> mean and log variance of its latent.

    With ``linear`` the mean starts as the low frequencies of a cosine transform of the pixels.
    """

    def __init__(self, spec: BackboneSpec, channels: int, latent: int, linear: bool) -> None:
        super().__init__()
        cell = channels * PATCH * PATCH
        self.low_first, self.low_later = nn.Linear(cell, spec.low), nn.Linear(2 * cell, spec.low)
        self.high_first = nn.Linear(FIRST_BANDS * cell, spec.high)
        self.high_later = nn.Linear(2 * LATER_BANDS * cell, spec.high)
        self.low, self.high = _blocks(spec.low, spec.separate), _blocks(spec.high, spec.separate)
        self.fused = _blocks(spec.width, spec.fused)
        self.mean, self.log_variance = nn.Linear(spec.width, latent), nn.Linear(spec.width, latent)
        self.analysis = Analysis(latent) if linear else None
        if linear:
            nn.init.zeros_(self.mean.weight)
            nn.init.zeros_(self.mean.bias)
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, -6.0)

    def forward(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T, H, W) -> mean and log variance, (B, D, L, h, w), float32."""
        pieces = list(enumerate(bands(x_BCTHW), start=1))
        low_in, high_in = (self.low_first, self.low_later), (self.high_first, self.high_later)
        low = [low_in[span - 1](_patches(part[:, :1], span)) for span, part in pieces]
        high = [high_in[span - 1](_patches(part[:, 1:], span)) for span, part in pieces]
        branches = self.low(torch.cat(low, dim=1)), self.high(torch.cat(high, dim=1))
        features = self.fused(torch.cat(branches, dim=-1))
        mean, log_variance = (head(features).float().movedim(-1, 1) for head in (self.mean, self.log_variance))
        if self.analysis is not None:
            coefficients = self.analysis(x_BCTHW)
            mean = mean * contrast(coefficients) + coefficients
        return mean, log_variance.clamp(-30, 20)


class Recovery(nn.Module):
    """Features from the fewer numbers of a latent: sparse recovery by unrolled iterative shrinkage, as in ISTA-Net
    (Zhang and Ghanem, CVPR 2018, section 3): a step towards ``Φ p = z``, then shrinkage in a learned domain.
    """

    def __init__(self, spec: BackboneSpec, latent: int) -> None:
        super().__init__()
        self.measure_DC = nn.Parameter(nn.init.orthogonal_(torch.empty(latent, spec.width)))
        layers = spec.iteration_layers
        self.into = nn.ModuleList(_blocks(spec.width, layers) for _ in range(spec.iterations))
        self.back = nn.ModuleList(_blocks(spec.width, layers) for _ in range(spec.iterations))
        self.rate = nn.Parameter(torch.full((max(1, spec.iterations),), 0.5))
        self.threshold = nn.Parameter(torch.full((max(1, spec.iterations),), 0.01))

    def forward(self, z_BLhwD: Tensor) -> Tensor:
        """(B, L, h, w, D) -> (B, L, h, w, low + high)."""
        p_BLhwC = F.linear(z_BLhwD, self.measure_DC.T)
        for i, (into, back) in enumerate(zip(self.into, self.back, strict=True)):
            error_BLhwD = F.linear(p_BLhwC, self.measure_DC) - z_BLhwD
            p_BLhwC = p_BLhwC - self.rate[i] * F.linear(error_BLhwD, self.measure_DC.T)
            sparse = into(p_BLhwC)
            p_BLhwC = back(torch.sign(sparse) * F.relu(sparse.abs() - self.threshold[i]))
        return p_BLhwC


class Decoder(nn.Module):
    """D of equation 3, shared by the components: a latent -> C channels at full resolution.

    ``linear`` names the components that have a linear path of their own, the transpose of their encoder's at the start.
    """

    def __init__(self, spec: BackboneSpec, channels: int, latent: int, linear: tuple[str, ...]) -> None:
        super().__init__()
        cell = channels * PATCH * PATCH
        self.split = (spec.low, spec.high)
        self.recovery = Recovery(spec, latent)
        self.fused = _blocks(spec.width, spec.fused)
        self.low, self.high = _blocks(spec.low, spec.separate), _blocks(spec.high, spec.separate)
        self.low_first, self.low_later = nn.Linear(spec.low, cell), nn.Linear(spec.low, 2 * cell)
        self.high_first = nn.Linear(spec.high, FIRST_BANDS * cell)
        self.high_later = nn.Linear(spec.high, 2 * LATER_BANDS * cell)
        self.synthesis = nn.ModuleDict({name: Synthesis(latent) for name in linear})
        if linear:
            for layer in (self.low_first, self.low_later, self.high_first, self.high_later):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, z_BDLhw: Tensor) -> Tensor:
        """(B, D, L, h, w) -> (B, C, T, H, W), float32, without the linear path."""
        features = self.fused(self.recovery(z_BDLhw.movedim(1, -1)))
        low, high = (branch(x) for branch, x in zip((self.low, self.high), features.split(self.split, -1), strict=True))
        parts = []
        for span, steps, to_low, to_high, highs, dims in (
            (1, slice(0, 1), self.low_first, self.high_first, FIRST_BANDS, SPACE),
            (2, slice(1, None), self.low_later, self.high_later, LATER_BANDS, SPACETIME),
        ):
            if low[:, steps].shape[1]:
                whole = _unpatches(to_low(low[:, steps]), span, 1), _unpatches(to_high(high[:, steps]), span, highs)
                parts.append(unhaar(torch.cat(whole, dim=1).float(), dims))
        return torch.cat(parts, dim=2)

    def beside(self, name: str, x_BCTHW: Tensor, z_BDLhw: Tensor) -> Tensor:
        """What ``forward`` made of a component's latent, times its contrast, and the component's linear path."""
        first = contrast(z_BDLhw[:, :, :1], 3 * CELL**2)
        later = contrast(z_BDLhw[:, :, 1:], 3 * SPAN * CELL**2).repeat_interleave(SPAN, dim=2)
        scale_B1THW = F.interpolate(torch.cat((first, later), dim=2), scale_factor=(1.0, CELL, CELL), mode="nearest")
        return x_BCTHW * scale_B1THW + self.synthesis[name](z_BDLhw)


class Analysis(nn.Module):
    """Pixels of three channels to coefficients: (B, 3, T, H, W) -> (B, D, L, h, w)."""

    def __init__(self, coefficients: int) -> None:
        super().__init__()
        self.first_D3188 = nn.Parameter(cosine_basis(CELL, coefficients)[:, :, None])
        self.later_D3488 = nn.Parameter(spacetime_basis(SPAN, CELL, coefficients))

    def forward(self, x_B3THW: Tensor) -> Tensor:
        """Inner products of each cell with the basis."""
        x_B3THW = x_B3THW.to(self.first_D3188.dtype)
        first = F.conv3d(x_B3THW[:, :, :1], self.first_D3188, stride=(1, CELL, CELL))
        if x_B3THW.shape[2] == 1:
            return first
        later = F.conv3d(x_B3THW[:, :, 1:], self.later_D3488, stride=(SPAN, CELL, CELL))
        return torch.cat((first, later), dim=2)


class Synthesis(nn.Module):
    """Coefficients to pixels: (B, D, L, h, w) -> (B, 3, T, H, W). Starts as the transpose of the analysis."""

    def __init__(self, coefficients: int) -> None:
        super().__init__()
        self.first_D3188 = nn.Parameter(cosine_basis(CELL, coefficients)[:, :, None])
        self.later_D3488 = nn.Parameter(spacetime_basis(SPAN, CELL, coefficients))

    def forward(self, z_BDLhw: Tensor) -> Tensor:
        """Sums of basis cells."""
        z_BDLhw = z_BDLhw.to(self.first_D3188.dtype)
        first = F.conv_transpose3d(z_BDLhw[:, :, :1], self.first_D3188, stride=(1, CELL, CELL))
        if z_BDLhw.shape[2] == 1:
            return first
        later = F.conv_transpose3d(z_BDLhw[:, :, 1:], self.later_D3488, stride=(SPAN, CELL, CELL))
        return torch.cat((first, later), dim=2)
