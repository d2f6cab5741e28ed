"""The linear path (ours): a cosine transform of patches that starts encoder and decoder as a sound codec.

The structural latent gets each patch's first D functions of space and time. The 1D latents get the next D functions of
space, of which a cosine transform over the grid of patches is taken: 1D latent i is frequency i of the grid, those that
don't change over time first. So a longer prefix reconstructs more, and what stands still needs few.

Every coefficient is divided by the deviation that it has in an AR(1) model of video, so that latents start near unit
variance.

Legend: B clips, T frames, L latent steps, h, w patches of a frame, N = L h w, D latent channels, K 1D latents, P pixels
of a patch times 3.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from trainer.blocks.patch import COLOUR_VARIANCE, contrast, cosine_basis, spacetime_basis
from trainer.recipes.onedva.config import CELL, SPAN

CORRELATION = {"time": 0.98, "space": 0.95}
"""Of neighbouring pixels, in the AR(1) model."""
PIXEL_VARIANCE = 0.25
"""Of luma in [-1, 1]."""


def expected_deviation(basis_D3THW: Tensor) -> Tensor:
    """Standard deviation (D,) of the coefficients of orthonormal patches in a separable AR(1) model of video."""
    smooth = basis_D3THW.double()
    for dim, rho in ((2, "time"), (3, "space"), (4, "space")):
        steps = torch.arange(smooth.shape[dim], dtype=torch.float64)
        covariance = CORRELATION[rho] ** (steps[:, None] - steps).abs()
        smooth = (smooth.movedim(dim, -1) @ covariance).movedim(-1, dim)
    axes_33 = torch.tensor([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=torch.float64)
    axes_33 /= axes_33.norm(dim=1, keepdim=True)
    colours_33 = axes_33.T @ (torch.tensor(COLOUR_VARIANCE, dtype=torch.float64)[:, None] * axes_33)
    smooth = torch.einsum("kcthw,ce->kethw", smooth, colours_33)
    return (PIXEL_VARIANCE * (smooth * basis_D3THW).flatten(1).sum(1)).sqrt().float()


def bases(latent: int) -> dict[str, Tensor]:
    """Patches (D, 3, t, 16, 16) by name: ``first`` and ``later`` of the structural latent, and the ``fine`` ones."""
    fine = cosine_basis(CELL, 2 * latent)[latent:, :, None]
    return {
        "first": cosine_basis(CELL, latent)[:, :, None],
        "later": spacetime_basis(SPAN, CELL, latent),
        "fine_first": fine,
        "fine_later": fine.expand(-1, -1, SPAN, -1, -1) / math.sqrt(SPAN),
    }


@functools.lru_cache(maxsize=64)
def grid_order(steps: int, height: int, width: int) -> list[int]:
    """Flat places of the grid's frequencies (L, h, w): slow ones first, then smooth ones."""
    places = [(a, b, c) for a in range(steps) for b in range(height) for c in range(width)]
    order = sorted(range(len(places)), key=lambda n: (places[n][0], places[n][1] ** 2 + places[n][2] ** 2, places[n]))
    return order


def cosines(size: int, like: Tensor) -> Tensor:
    """Orthonormal DCT-II (frequency, place), float32."""
    at = torch.arange(size, device=like.device, dtype=torch.float32)
    wave = torch.cos(math.pi / size * (at + 0.5) * at[:, None]) * math.sqrt(2 / size)
    return torch.cat((wave[:1] / math.sqrt(2), wave[1:]))


def to_sequence(grid_BLhwD: Tensor, length: int) -> Tensor:
    """The first ``length`` frequencies of the grid, (B, K, D); 0 beyond the grid's own."""
    steps, height, width = grid_BLhwD.shape[1:4]
    waves = [cosines(size, grid_BLhwD) for size in (steps, height, width)]
    frequencies_BND = torch.einsum("al,bh,cw,nlhwd->nabcd", *waves, grid_BLhwD.float()).flatten(1, 3)
    order = torch.tensor(grid_order(steps, height, width)[:length], device=grid_BLhwD.device)
    found_BSD = frequencies_BND.index_select(1, order)
    return nn.functional.pad(found_BSD, (0, 0, 0, length - len(order)))


def from_sequence(sequence_BKD: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`to_sequence`: (B, L, h, w, D), with frequencies that the sequence lacks at 0."""
    steps, height, width = grid
    order = torch.tensor(grid_order(*grid)[: sequence_BKD.shape[1]], device=sequence_BKD.device)
    batch, _, depth = sequence_BKD.shape
    empty_BND = sequence_BKD.new_zeros(batch, math.prod(grid), depth, dtype=torch.float32)
    frequencies_BND = empty_BND.index_add(1, order, sequence_BKD[:, : len(order)].float())
    waves = [cosines(size, sequence_BKD) for size in grid]
    return torch.einsum("al,bh,cw,nabcd->nlhwd", *waves, frequencies_BND.unflatten(1, (steps, height, width)))


class LinearPath(nn.Module):
    """Patches to coefficients, or back (``inverse``). Weights are (D, P) by the names of :func:`bases`; deviations stay
    apart from them, so that one learning rate suits all.
    """

    def __init__(self, latent: int, *, inverse: bool) -> None:
        super().__init__()
        self.inverse = inverse
        for name, basis in bases(latent).items():
            self.register_parameter(name, nn.Parameter(basis.flatten(1).contiguous()))
            self.register_buffer(f"deviation_{name}", expected_deviation(basis), persistent=False)

    def forward(self, first_BSX: Tensor, later_BSX: Tensor, fine: bool) -> tuple[Tensor, Tensor]:
        """Patches (B, S, P) or coefficients (B, S, D) of first and of later frames, from one to the other."""
        if fine:
            return self._one(first_BSX, self.fine_first, self.deviation_fine_first), self._one(
                later_BSX, self.fine_later, self.deviation_fine_later
            )
        return self._one(first_BSX, self.first, self.deviation_first), self._one(
            later_BSX, self.later, self.deviation_later
        )

    def contrast(self, first_BSD: Tensor, later_BSD: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """That of the pixels of cells with such structural coefficients, (B, 1, L, h, w)."""
        steps, height, width = grid
        parts = []
        for value_BSD, deviation_D, count, span in (
            (first_BSD, self.deviation_first, 1, 1), (later_BSD, self.deviation_later, steps - 1, SPAN)
        ):  # fmt: skip
            if count:
                grid_BDLhw = (value_BSD * deviation_D).unflatten(1, (count, height, width)).movedim(-1, 1)
                parts.append(contrast(grid_BDLhw, 3 * span * CELL**2))
        return torch.cat(parts, dim=2)

    def _one(self, x_BSX: Tensor, weight_DP: Tensor, deviation_D: Tensor) -> Tensor:
        x_BSX = x_BSX.to(weight_DP.dtype)
        return (x_BSX * deviation_D) @ weight_DP if self.inverse else (x_BSX @ weight_DP.T) / deviation_D
