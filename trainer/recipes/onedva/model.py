"""One-DVA: Teng, Lin, Liu, Wang, Yang and Liu, "Adaptive 1D Video Diffusion Autoencoder", arXiv 2602.04220.

    x -> patches --+                +-> structural latent s (a cell each) ---+        z_t -> patches -+- long skip --+
       queries q --+-> transformer -+                                        v                        v              |
    T, H, W -------+                +-> 1D latents z_1 ... z_k | mask mask -> condition -> diffusion transformer -> + ->
                                              (tail dropped)                                     ^                   |
                                                                                  time t --------+    projection, pixel
                                                                                                      shuffle, 3 x 3 x 3
                                                                                                              |
                                                                                                   v, or x̂ = z_t - t v

Frame 1 stands alone: a patch is 1 x 16 x 16 there and 4 x 16 x 16 later. Clips of any size are padded to whole patches
by their last frame, row and column.

Legend: B clips, C channels or width, T frames, H height, W width; L = 1 + (T - 1) / 4 latent steps, h = H / 16,
w = W / 16, N = L h w tokens; K 1D latents, D latent channels, P numbers of a patch, S tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.blocks.transformer import Block, Time, rotary_angles, sinusoids, zero
from trainer.losses.flow import noised, per_clip
from trainer.recipes.onedva.config import CELL, SPAN, OneDvaConfig, RepaSpec, TransformerSpec
from trainer.recipes.onedva.linear import LinearPath, from_sequence, to_sequence

STRUCTURAL, SEQUENCE = "structural", "1d"
"""Names of the latents: (B, D, L, h, w), and (B, D, K)."""
Grid = tuple[int, int, int]


class Posterior(NamedTuple):
    """A latent's ``mean`` and ``log_variance``."""

    mean: Tensor
    log_variance: Tensor


class Made(NamedTuple):
    """What a training step asks of the model.

    ``velocity_B3THW`` v and ``clean_B3THW`` the x̂ of it; ``target_B3THW`` what v should be; ``posteriors`` by name;
    ``features_BNE`` the projected decoder features that REPA reads, None where not asked for.
    """

    velocity_B3THW: Tensor
    clean_B3THW: Tensor
    target_B3THW: Tensor
    posteriors: dict[str, Posterior]
    features_BNE: Tensor | None


def grid_of(frames: int, height: int, width: int) -> Grid:
    """L, h, w of a clip."""
    return 1 + -(-(frames - 1) // SPAN), -(-height // CELL), -(-width // CELL)


def padded(x_BCTHW: Tensor) -> Tensor:
    """The clip with last frame, row and column repeated to whole patches."""
    frames, height, width = x_BCTHW.shape[2:]
    missing = (0, -width % CELL, 0, -height % CELL, 0, -(frames - 1) % SPAN)
    return F.pad(x_BCTHW, missing, mode="replicate") if any(missing) else x_BCTHW


def patches(x_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of frame 1 (B, h w, 256 C) and of later ones (B, (L - 1) h w, 1024 C) of a padded clip."""
    x_BCThyz = x_BCTHW.unflatten(4, (-1, CELL)).unflatten(3, (-1, CELL))
    first = x_BCThyz[:, :, 0].permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    later = x_BCThyz[:, :, 1:].unflatten(2, (-1, SPAN)).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
    return first, later


def pixel_shuffle(first_BSP: Tensor, later_BSP: Tensor, grid: Grid, channels: int) -> Tensor:
    """The inverse of :func:`patches`."""
    steps, h, w = grid
    first = first_BSP.unflatten(2, (channels, CELL, CELL)).unflatten(1, (h, w)).permute(0, 3, 1, 4, 2, 5)
    first = first.flatten(4, 5).flatten(2, 3)[:, :, None]
    if steps == 1:
        return first
    later = later_BSP.unflatten(2, (channels, SPAN, CELL, CELL)).unflatten(1, (steps - 1, h, w))
    later = later.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return torch.cat((first, later), dim=2)


class Patchifier(nn.Module):
    """Linear: pixels to tokens (B, N, C), frame 1 by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.later = nn.Linear(3 * CELL**2, width), nn.Linear(3 * SPAN * CELL**2, width)

    def forward(self, x_B3THW: Tensor) -> Tensor:
        """Of a padded clip."""
        first, later = patches(x_B3THW)
        return torch.cat((self.first(first), self.later(later)), dim=1)


def angles_of(grid: Grid, others: int, head: int, device: torch.device) -> Tensor:
    """Rotary angles of the grid's tokens, and of ``others`` after them, which don't turn."""
    axes = [torch.arange(size, device=device, dtype=torch.float32) for size in grid]
    positions_N3 = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    return rotary_angles(torch.cat((positions_N3, positions_N3.new_zeros(others, 3))), head)


def _blocks(spec: TransformerSpec, conditioned: bool) -> nn.ModuleList:
    return nn.ModuleList(Block(spec.width, spec.heads, conditioned=conditioned) for _ in range(spec.layers))


class Encoder(nn.Module):
    """Pixels to the posteriors of both latents."""

    def __init__(self, config: OneDvaConfig) -> None:
        super().__init__()
        spec, latent, linear = config.encoder, config.latent_channels, config.linear == "dct"
        self.head = spec.width // spec.heads
        self.patchify = Patchifier(spec.width)
        self.queries_KC = nn.Parameter(torch.randn(config.queries, spec.width) * 0.02)
        self.register_buffer("positions_KC", sinusoids(torch.arange(config.queries), spec.width), persistent=False)
        self.resolution = nn.Sequential(
            nn.Linear(Time.FEATURES, spec.width), nn.SiLU(), nn.Linear(spec.width, spec.width)
        )
        self.axes_3C = nn.Parameter(torch.randn(3, spec.width) * 0.02)
        self.blocks = _blocks(spec, conditioned=False)
        self.norm = nn.LayerNorm(spec.width)
        self.to_structural, self.to_1d = (nn.Linear(spec.width, 2 * latent) for _ in range(2))
        self.analysis = LinearPath(latent, inverse=False) if linear else None
        if linear:
            for layer in (self.to_structural, self.to_1d):
                zero(layer)
                nn.init.constant_(layer.bias[latent:], -8.0)

    def forward(self, x_B3THW: Tensor, size: Grid, sequence: bool) -> dict[str, Posterior]:
        """Of a padded clip that was (T, H, W) ``size`` before; without the 1D latents where ``sequence`` is False."""
        batch, grid = len(x_B3THW), grid_of(*size)
        sizes_3 = torch.tensor(size, device=x_B3THW.device, dtype=torch.float32)
        resolution_3C = self.resolution(sinusoids(100 * sizes_3.log2(), Time.FEATURES)) + self.axes_3C
        parts = [self.patchify(x_B3THW), resolution_3C.expand(batch, -1, -1)]
        if sequence:
            parts.append((self.queries_KC + self.positions_KC).expand(batch, -1, -1))
        x_BSC = torch.cat(parts, dim=1)
        tokens = parts[0].shape[1]
        angles_SP = angles_of(grid, x_BSC.shape[1] - tokens, self.head, x_BSC.device)
        for block in self.blocks:
            x_BSC = block(x_BSC, angles_SP)
        x_BSC = self.norm(x_BSC)
        mean_BND, log_variance_BND = self.to_structural(x_BSC[:, :tokens]).float().chunk(2, dim=-1)
        analysed = patches(x_B3THW) if self.analysis is not None else None
        if self.analysis is not None and analysed is not None:
            mean_BND = mean_BND + torch.cat(self.analysis(*analysed, fine=False), dim=1)
        found = {STRUCTURAL: tuple(v.unflatten(1, grid).movedim(-1, 1) for v in (mean_BND, log_variance_BND))}
        if sequence:
            mean_BKD, log_variance_BKD = self.to_1d(x_BSC[:, tokens + 3 :]).float().chunk(2, dim=-1)
            if self.analysis is not None and analysed is not None:
                fine_BND = torch.cat(self.analysis(*analysed, fine=True), dim=1)
                mean_BKD = mean_BKD + to_sequence(fine_BND.unflatten(1, grid), mean_BKD.shape[1])
            found[SEQUENCE] = (mean_BKD.transpose(1, 2), log_variance_BKD.transpose(1, 2))
        return {name: Posterior(mean, log_variance.clamp(-30, 20)) for name, (mean, log_variance) in found.items()}


class Decoder(nn.Module):
    """The diffusion transformer: noised pixels, time and latents to a velocity.

    A cell's structural latent is added to its token; 1D latents join the sequence as tokens of their own, a mask token
    for each that was dropped. The unpatchifier joins the tokens that came in to those that come out (long skip).
    """

    def __init__(self, config: OneDvaConfig) -> None:
        super().__init__()
        width, latent, channels = config.decoder.width, config.latent_channels, config.decoder.pixel_channels
        self.head, self.channels = width // config.decoder.heads, channels
        self.clean, self.least_time, self.gate = config.predict == "clean", config.least_time, config.gate
        self.patchify, self.time = Patchifier(width), Time(width)
        self.from_structural, self.from_1d = nn.Linear(latent, width), nn.Linear(latent, width)
        self.null_C, self.mask_C = nn.Parameter(torch.randn(width) * 0.02), nn.Parameter(torch.randn(width) * 0.02)
        self.places_KC = nn.Parameter(torch.randn(config.queries, width) * 0.02)
        self.blocks = _blocks(config.decoder, conditioned=True)
        self.norm, self.modulation = nn.LayerNorm(width, elementwise_affine=False), zero(nn.Linear(width, 2 * width))
        self.skip = nn.Linear(2 * width, width)
        self.to_first = nn.Linear(width, channels * CELL**2)
        self.to_later = nn.Linear(width, channels * SPAN * CELL**2)
        self.smooth = nn.Conv3d(channels, 3, 3, padding=1)
        nn.init.zeros_(self.smooth.weight)
        nn.init.zeros_(self.smooth.bias)
        self.synthesis = LinearPath(latent, inverse=True) if config.linear == "dct" else None
        if config.linear == "dct":
            zero(self.patchify.first)
            zero(self.patchify.later)

    def forward(
        self,
        z_B3THW: Tensor,
        t_B: Tensor,
        latents: Mapping[str, Tensor],
        kept_BK: Tensor | None = None,
        dropped_B: Tensor | None = None,
        tap: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(v, x̂) like ``z_B3THW`` (z_t, of any size), float32, and the video's tokens after block ``tap``.

        ``kept_BK`` is True where a 1D latent is known, ``dropped_B`` where a clip's latents are not; by default all are
        known.
        """
        frames, height, width = z_B3THW.shape[2:]
        grid = grid_of(frames, height, width)
        structural_BND = latents[STRUCTURAL].flatten(2).transpose(1, 2)
        sequence_BKD = latents[SEQUENCE].transpose(1, 2) if SEQUENCE in latents else None
        if dropped_B is None:
            dropped_B = torch.zeros(len(z_B3THW), dtype=torch.bool, device=z_B3THW.device)
        dropped_B11 = dropped_B[:, None, None]
        whole_B3THW = padded(z_B3THW)
        if self.gate:
            whole_B3THW = whole_B3THW * (1 - per_clip(t_B, whole_B3THW))
        entered_BNC = self.patchify(whole_B3THW)
        tokens = entered_BNC.shape[1]
        x_BSC = entered_BNC + torch.where(dropped_B11, self.null_C, self.from_structural(structural_BND))
        known_BK1 = None
        if sequence_BKD is not None:
            known_BK1 = ~dropped_B11.expand(-1, sequence_BKD.shape[1], -1)
            if kept_BK is not None:
                known_BK1 = known_BK1 & kept_BK[..., None]
            sequence_BKC = torch.where(known_BK1, self.from_1d(sequence_BKD), self.mask_C) + self.places_KC
            x_BSC = torch.cat((x_BSC, sequence_BKC), dim=1)
        angles_SP = angles_of(grid, x_BSC.shape[1] - tokens, self.head, x_BSC.device)
        time_BC = self.time(t_B)
        tapped_BNC = None
        for number, block in enumerate(self.blocks, start=1):
            x_BSC = block(x_BSC, angles_SP, time_BC)
            if number == tap:
                tapped_BNC = x_BSC[:, :tokens]
        shift, scale = self.modulation(F.silu(time_BC)).float()[:, None].chunk(2, dim=-1)
        left_BNC = self.norm(x_BSC[:, :tokens]) * (1 + scale) + shift
        x_BNC = self.skip(torch.cat((entered_BNC.to(left_BNC.dtype), left_BNC), dim=-1))
        at = grid[1] * grid[2]
        shuffled = pixel_shuffle(self.to_first(x_BNC[:, :at]), self.to_later(x_BNC[:, at:]), grid, self.channels)
        out_B3THW = self.smooth(shuffled).float()[:, :, :frames, :height, :width]
        if not self.clean:
            return out_B3THW, z_B3THW - per_clip(t_B, z_B3THW) * out_B3THW, tapped_BNC
        if self.synthesis is not None:
            linear_B3THW, scale_B1THW = self._linear(structural_BND, sequence_BKD, known_BK1, grid)
            beside_B3THW = out_B3THW * scale_B1THW[:, :, :frames, :height, :width]
            beside_B3THW = beside_B3THW + linear_B3THW[:, :, :frames, :height, :width]
            out_B3THW = torch.where(per_clip(dropped_B, out_B3THW), out_B3THW, beside_B3THW)
        divisor = per_clip(t_B.clamp_min(self.least_time), z_B3THW)
        return (z_B3THW - out_B3THW) / divisor, out_B3THW, tapped_BNC

    def _linear(
        self, structural_BND: Tensor, sequence_BKD: Tensor | None, known_BK1: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, T, H, W) of the padded clip by the linear path alone, and their contrast (B, 1, T, H, W)."""
        assert self.synthesis is not None
        at = grid[1] * grid[2]
        first, later = structural_BND[:, :at], structural_BND[:, at:]
        made = self.synthesis(first, later, fine=False)
        if sequence_BKD is not None and known_BK1 is not None:
            fine_BND = from_sequence(torch.where(known_BK1, sequence_BKD, 0.0), grid).flatten(1, 3)
            fine = self.synthesis(fine_BND[:, :at], fine_BND[:, at:], fine=True)
            made = (made[0] + fine[0], made[1] + fine[1])
        scale_B1LHW = F.interpolate(self.synthesis.contrast(first, later, grid), scale_factor=(1, CELL, CELL))
        scale_B1THW = torch.cat((scale_B1LHW[:, :, :1], scale_B1LHW[:, :, 1:].repeat_interleave(SPAN, dim=2)), dim=2)
        return pixel_shuffle(*made, grid, 3), scale_B1THW


class Projector(nn.Sequential):
    """Decoder features to those of SigLIP, for REPA (Yu et al., arXiv 2410.06940): three layers with SiLU."""

    def __init__(self, width: int, spec: RepaSpec) -> None:
        super().__init__(
            nn.Linear(width, spec.projector), nn.SiLU(), nn.Linear(spec.projector, spec.projector), nn.SiLU(),
            nn.Linear(spec.projector, spec.width),
        )  # fmt: skip


class OneDva(nn.Module):
    """The whole autoencoder. ``readable``, a buffer, counts the 1D latents that the weights have learned to read."""

    def __init__(self, config: OneDvaConfig) -> None:
        super().__init__()
        self.queries = config.queries
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.projector = Projector(config.decoder.width, config.repa) if config.repa is not None else None
        self.tap = config.repa.depth if config.repa is not None else 0
        learned = config.queries if config.linear == "dct" else 0
        self.register_buffer("readable", torch.tensor([learned]))

    def encode(self, x_B3THW: Tensor, sequence: bool) -> dict[str, Posterior]:
        """Posteriors by name of a clip of any size; without the 1D latents where ``sequence`` is False."""
        return self.encoder(padded(x_B3THW), tuple(x_B3THW.shape[2:]), sequence)

    def forward(
        self,
        x_B3THW: Tensor,
        noise_B3THW: Tensor,
        t_B: Tensor,
        latent_noise: Mapping[str, Tensor],
        *,
        kept_BK: Tensor | None = None,
        dropped_B: Tensor | None = None,
        predict: Callable[..., Mapping[str, Tensor]] | None = None,
        predict_t_B: Tensor | None = None,
        features: bool = False,
    ) -> Made:
        """Encodes x, noises it, and predicts the velocity: z = μ + σ ε with ``latent_noise`` by latent.

        ``kept_BK`` None leaves the 1D latents out. With ``predict`` the decoder reads what that makes of the means,
        noised to ``predict_t_B``; nothing flows back into the encoder then.
        """
        sequence = kept_BK is not None
        if self.training and predict is None:
            self.readable.fill_(self.queries if sequence else 0)
        if predict is None:
            posteriors = self.encode(x_B3THW, sequence)
            latents = {n: p.mean + torch.exp(0.5 * p.log_variance) * latent_noise[n] for n, p in posteriors.items()}
        else:
            with torch.no_grad():
                posteriors = self.encode(x_B3THW, sequence)
                means = {name: posterior.mean for name, posterior in posteriors.items()}
                masks = {SEQUENCE: kept_BK} if kept_BK is not None else {}
                latents = predict(means, predict_t_B, latent_noise, masks)
        z_B3THW = noised(x_B3THW, noise_B3THW, t_B)
        velocity, clean, tapped = self.decoder(z_B3THW, t_B, latents, kept_BK, dropped_B, self.tap if features else 0)
        if self.decoder.clean:
            target = (z_B3THW - x_B3THW) / per_clip(t_B.clamp_min(self.decoder.least_time), x_B3THW)
        else:
            target = noise_B3THW - x_B3THW
        projected = self.projector(tapped) if tapped is not None and self.projector is not None else None
        return Made(velocity, clean, target, posteriors, projected)
