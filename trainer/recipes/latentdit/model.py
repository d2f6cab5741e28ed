"""A diffusion transformer over the latents of a codec: Peebles and Xie, "Scalable Diffusion Models with Transformers",
ICCV 2023 (adaLN-Zero), with the velocity of a straight path (``trainer/losses/flow.py``) and captions in the sequence.

    z_0 (stored) -- normalise --+
                                +-- z_t = (1 - t) z_0 + t ε --> tokens of each latent --+
    ε --------------------------+                                                       +-> N blocks -> v of each latent
    learned null, caption tokens -------------------------------------------------------+     ^
    t -> sinusoids -> MLP --------------------------------------------------------------------+

Legend: B clips, C channels of a latent, S tokens of the sequence, N of one latent, W width, L caption tokens, D their
width, A axes. ``*tokens`` are a latent's token axes, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.contracts import LatentLayout, LatentTensor
from trainer.blocks.transformer import Block, Time, rotary_angles, zero
from trainer.losses.flow import noised, per_clip
from trainer.recipes.latentdit.config import LatentDitConfig

INIT_STD = 0.02


class Flow(NamedTuple):
    """By name, (B, C, *tokens) in normalised units, float32: z_t, the velocity predicted there, and the true one."""

    noised: dict[str, Tensor]
    velocity: dict[str, Tensor]
    target: dict[str, Tensor]


class LatentDit(nn.Module):
    """Velocities of noised latents. Latents go in and come out in the codec's units; within they have mean 0, std 1."""

    def __init__(self, config: LatentDitConfig, layout: LatentLayout) -> None:
        super().__init__()
        width, axes = config.width, max(len(tensor.tokens) for tensor in layout.tensors.values())
        self.layout = layout
        self.axes = axes
        self.head = width // config.heads
        self.masked = bool(config.caption_width) or any(tensor.lengths for tensor in layout.tensors.values())
        self.latents = nn.ModuleDict(
            {name: Tokens(tensor, config.patch, width, axes) for name, tensor in layout.tensors.items()}
        )
        self.time = Time(width)
        self.caption = nn.Linear(config.caption_width, width) if config.caption_width else None
        self.null_W = nn.Parameter(torch.randn(width) * INIT_STD)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, hidden=config.mlp, conditioned=True) for _ in range(config.depth)
        )
        self.modulation = zero(nn.Linear(width, 2 * width))

    def forward(
        self,
        latents: Mapping[str, Tensor],
        t_B: Tensor,
        noise: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        caption_emb_BLD: Tensor | None = None,
        caption_mask_BL: Tensor | None = None,
    ) -> Flow:
        """Latents (B, C, *tokens) in the codec's units, noised to ``t_B`` in [0, 1]; what is masked plays no part."""
        clean = self.normalised(latents)
        z = {name: noised(x, noise[name], t_B) for name, x in clean.items()}
        velocity = self.velocity(z, t_B, masks, caption_emb_BLD, caption_mask_BL)
        return Flow(z, velocity, {name: noise[name] - x for name, x in clean.items()})

    def velocity(
        self,
        z: Mapping[str, Tensor],
        t_B: Tensor,
        masks: Mapping[str, Tensor],
        caption_emb_BLD: Tensor | None = None,
        caption_mask_BL: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """dz/dt at normalised latents z_t, float32. Without a caption, or one of no token, the learned null is left."""
        time_BW = self.time(t_B.float())
        head_BSW, told_BS = self._told(len(t_B), caption_emb_BLD, caption_mask_BL)
        x_BSW = torch.cat((head_BSW, *(tokens(z[name]) for name, tokens in self.latents.items())), dim=1)
        kept_BS = None
        if self.masked:
            kept = (tokens.kept(masks[name]) for name, tokens in self.latents.items())
            kept_BS = torch.cat((told_BS, *kept), dim=1)
        positions_SA = [head_BSW.new_zeros(head_BSW.shape[1], self.axes, dtype=torch.long)]
        positions_SA += [tokens.positions_NA for tokens in self.latents.values()]
        angles_SP = rotary_angles(torch.cat(positions_SA), self.head)
        for block in self.blocks:
            x_BSW = block(x_BSW, angles_SP, time_BW, kept_BS)
        shift_B1W, scale_B1W = self.modulation(F.silu(time_BW)).float()[:, None].chunk(2, dim=-1)
        x_BSW = F.layer_norm(x_BSW, x_BSW.shape[-1:]) * (1 + scale_B1W) + shift_B1W
        _, *parts = x_BSW.split([head_BSW.shape[1], *(tokens.count for tokens in self.latents.values())], dim=1)
        return {
            name: tokens.grid_of(part_BNW).float()
            for (name, tokens), part_BNW in zip(self.latents.items(), parts, strict=True)
        }

    def _told(self, clips: int, emb_BLD: Tensor | None, mask_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """The learned null and the caption's tokens, (B, 1 + L, W), and which of them count, (B, 1 + L)."""
        null_B1W = self.null_W.expand(clips, 1, -1)
        told_B1 = torch.ones(clips, 1, dtype=torch.bool, device=null_B1W.device)
        if self.caption is None:
            return null_B1W, told_B1
        if emb_BLD is None or mask_BL is None:  # the layer runs all the same: ranks must not differ in what they run
            emb_BLD = null_B1W.new_zeros(clips, 1, self.caption.in_features)
            mask_BL = torch.zeros_like(told_B1)
        return torch.cat((null_B1W, self.caption(emb_BLD)), dim=1), torch.cat((told_B1, mask_BL), dim=1)

    @torch.no_grad()
    def predict(
        self,
        latents: Mapping[str, Tensor],
        t_B: Tensor,
        noise: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        caption_emb_BLD: Tensor | None = None,
        caption_mask_BL: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Clean latents noised to ``t_B`` and predicted from that: see ``trainer.recipe.Predictor``."""
        whole: dict[str, Tensor] = {}
        for name, tensor in self.layout.tensors.items():
            found = list(latents[name].shape[1:]) if name in latents else None
            if found != list(tensor.shape):
                raise ValueError(f"latent {name!r} is {found}; this model was trained on {list(tensor.shape)}")
            given = (masks or {}).get(name)
            everything = torch.ones(len(t_B), *tensor.tokens, dtype=torch.bool, device=t_B.device)
            whole[name] = everything if given is None else given
        made = self(latents, t_B, noise, whole, caption_emb_BLD, caption_mask_BL)
        clean = {name: z - per_clip(t_B, z) * made.velocity[name] for name, z in made.noised.items()}
        return {name: x * whole[name][:, None] for name, x in self.restored(clean).items()}

    def normalised(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the codec's units to mean 0 and standard deviation 1 a channel, float32."""
        return {name: (latents[name].float() - tokens.mean) / tokens.std for name, tokens in self.latents.items()}

    def restored(self, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`normalised`."""
        return {name: latents[name] * tokens.std + tokens.mean for name, tokens in self.latents.items()}


class Tokens(nn.Module):
    """One latent as tokens and back: squares of ``patch`` cells of a grid, single tokens of a row.

    A token's position is its place along each axis, from 1 on; along the first, from 1 plus the codec's step on, so
    that what begins later stands later. The sequence's head stands at 0.
    """

    mean: Tensor
    std: Tensor
    positions_NA: Tensor

    def __init__(self, tensor: LatentTensor, patch: int, width: int, axes: int) -> None:
        super().__init__()
        *before, last = tensor.tokens
        if before:
            *before, rows = before
            self.patch, self.grid = patch, (*before, rows // patch, last // patch)
        else:
            self.patch, self.grid = 1, (last,)
        self.count, self.channels = math.prod(self.grid), tensor.channels
        self.enter = nn.Linear(self.patch**2 * tensor.channels, width)
        self.leave = zero(nn.Linear(width, self.patch**2 * tensor.channels))
        self.kind_W = nn.Parameter(torch.randn(width) * INIT_STD)
        shape = (1, tensor.channels, *(1 for _ in tensor.tokens))
        self.register_buffer("mean", torch.tensor(tensor.mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(tensor.std).view(shape), persistent=False)
        ranges = [torch.arange(1, side + 1) for side in self.grid]
        ranges[0] = ranges[0] + tensor.parts[0][0]
        places_NA = torch.cartesian_prod(*ranges).view(self.count, -1)
        self.register_buffer("positions_NA", F.pad(places_NA, (0, axes - places_NA.shape[1])), persistent=False)

    def forward(self, z_BC: Tensor) -> Tensor:
        """(B, C, *tokens) -> (B, N, W)."""
        return self.enter(self._squares(z_BC)) + self.kind_W

    def grid_of(self, x_BNW: Tensor) -> Tensor:
        """(B, N, W) -> (B, C, *tokens)."""
        y_BNK, p = self.leave(x_BNW), self.patch
        if p == 1:
            return y_BNK.transpose(1, 2).unflatten(2, self.grid)
        *before, h, w = self.grid
        y = y_BNK.view(len(y_BNK), math.prod(before), h, w, self.channels, p, p).permute(0, 4, 1, 2, 5, 3, 6)
        return y.reshape(len(y_BNK), self.channels, *before, h * p, w * p)

    def kept(self, mask_B: Tensor) -> Tensor:
        """Which tokens hold something: (B, *tokens) -> (B, N)."""
        return self._squares(mask_B[:, None]).any(2)

    def _squares(self, z_BC: Tensor) -> Tensor:
        """(B, C, ..., h p, w p) -> (B, N, C p p)."""
        p = self.patch
        if p == 1:
            return z_BC.flatten(2).transpose(1, 2)
        *before, h, w = self.grid
        z = z_BC.reshape(len(z_BC), z_BC.shape[1], math.prod(before), h, p, w, p).permute(0, 2, 3, 5, 1, 4, 6)
        return z.reshape(len(z_BC), self.count, -1)
