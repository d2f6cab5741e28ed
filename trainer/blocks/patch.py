"""A linear transform of whole patches that starts as the low frequencies of a luma-chroma cosine transform.

Legend: B clips, C channels, T frames, H height, W width, K coefficients kept, R patch side.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Variance of luma and the two chroma differences in natural video, relative to luma: it orders the coefficients only.
COLOUR_VARIANCE = (1.0, 0.25, 0.12)


def cosine_basis(side: int, coefficients: int) -> Tensor:
    """The ``coefficients`` basis patches of greatest expected variance, orthonormal, (K, 3, R, R).

    A basis patch is a colour axis (luma, red-blue, green-magenta, each of unit length) times a two-dimensional DCT-II
    function. Expected variance falls with 1 / (1 + u^2 + v^2), the spectrum of natural images, and with the colour's
    share.
    """
    if not 1 <= coefficients <= 3 * side * side:
        raise ValueError(f"{coefficients} coefficients of a {side}x{side} patch: there are {3 * side * side}")
    u_R1 = torch.arange(side, dtype=torch.float64)[:, None]
    wave_RR = torch.cos(math.pi / side * (torch.arange(side, dtype=torch.float64) + 0.5) * u_R1) * math.sqrt(2 / side)
    wave_RR[0] /= math.sqrt(2)
    colour_33 = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    colour_33 /= colour_33.norm(dim=1, keepdim=True)
    order = sorted(
        ((c, u, v) for c in range(3) for u in range(side) for v in range(side)),
        key=lambda cuv: (-COLOUR_VARIANCE[cuv[0]] / (1 + cuv[1] ** 2 + cuv[2] ** 2), cuv),
    )
    patches = [torch.einsum("c,h,w->chw", colour_33[c], wave_RR[u], wave_RR[v]) for c, u, v in order[:coefficients]]
    return torch.stack(patches).float()


def contrast(coefficients: Tensor, numbers: int | None = None) -> Tensor:
    """How strong cells of (B, K, ..., h, w) orthonormal coefficients are without the first one, their mean, over 3 x 3
    cells: (B, 1, ..., h, w). Their root mean square, or that of the cell's pixels if it has ``numbers``.

    A network behind normalisations can't see how strong its input is, while what it adds to a linear path must go with
    that: its output is multiplied with this.
    """
    detail = coefficients.float()[:, 1:]
    power = detail.square().sum(1, keepdim=True) / (numbers or max(1, detail.shape[1]))
    pooled = F.avg_pool2d(power.flatten(0, -3)[:, None], 3, stride=1, padding=1, count_include_pad=False)
    return pooled.reshape(power.shape).clamp_min(1e-6).sqrt()


def spacetime_basis(span: int, side: int, coefficients: int) -> Tensor:
    """Orthonormal basis of colour cells, (K, 3, ``span``, R, R): :func:`cosine_basis` times cosines in time.

    Function k at temporal frequency t is placed as if it were k (1 + 6 t^2) at rest.
    """
    candidates = [(k, t) for k in range(min(coefficients, 3 * side * side)) for t in range(span)]
    order = sorted(candidates, key=lambda kt: ((kt[0] + 1) * (1 + 6 * kt[1] ** 2), kt))[:coefficients]
    spatial = cosine_basis(side, max(k for k, _ in order) + 1)
    steps = torch.arange(span, dtype=torch.float64)
    wave = torch.cos(math.pi / span * (steps + 0.5) * steps[:, None]) * math.sqrt(2 / span)
    wave[0] /= math.sqrt(2)
    return torch.stack([torch.einsum("t,chw->cthw", wave[t], spatial[k].double()) for k, t in order]).float()


class PatchAnalysis(nn.Module):
    """Pixels to coefficients: (B, 3, H, W) -> (B, K, H/R, W/R)."""

    def __init__(self, side: int, coefficients: int) -> None:
        super().__init__()
        self.side = side
        self.weight_K3RR = nn.Parameter(cosine_basis(side, coefficients))

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Inner products of each patch with the basis."""
        return F.conv2d(pixels_B3HW.to(self.weight_K3RR.dtype), self.weight_K3RR, stride=self.side)


class PatchSynthesis(nn.Module):
    """Coefficients to pixels: (B, K, H/R, W/R) -> (B, 3, H, W). Starts as the transpose of the analysis."""

    def __init__(self, side: int, coefficients: int) -> None:
        super().__init__()
        self.side = side
        self.weight_K3RR = nn.Parameter(cosine_basis(side, coefficients))

    def forward(self, coefficients_BKHW: Tensor) -> Tensor:
        """Sums of basis patches."""
        return F.conv_transpose2d(coefficients_BKHW.to(self.weight_K3RR.dtype), self.weight_K3RR, stride=self.side)
