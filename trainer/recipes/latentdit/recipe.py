"""The latent diffusion model as the loop sees it: ``trainer/recipe.py`` is the contract, README.md the account.

Legend: B clips, C channels of a latent; *tokens its token axes; L caption tokens, D their width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines.contracts import Batch, LatentLayout, derive, generator
from pipelines.faults import InputError
from trainer.losses.flow import schedule, timesteps
from trainer.recipe import StepOutput, unknown_names
from trainer.recipes.latentdit import stages
from trainer.recipes.latentdit.config import LatentDitConfig
from trainer.recipes.latentdit.model import LatentDit
from trainer.stage import Stage


class LatentDitRecipe:
    """A diffusion transformer over stored latents, with the velocity of a rectified flow."""

    name: ClassVar[str] = "latentdit"
    Config: ClassVar[type[BaseModel]] = LatentDitConfig

    def __init__(self, config: LatentDitConfig) -> None:
        self.config = config

    @property
    def layout(self) -> LatentLayout:
        """What is stored of a clip; raises InputError where that is not known."""
        if self.config.latents is None:
            raise InputError(
                "recipe latentdit takes its latents' layout from the first dataset of data.train, and that can't be "
                "opened from here or holds no latents; make one with `moviola encode CHECKPOINT --dataset DATASET DEST`"
            )
        return self.config.latents

    @property
    def caption_width(self) -> int:
        """Numbers a token of the captions; 0 where the model reads none."""
        return self.config.caption_width

    def stages(self) -> tuple[Stage, ...]:
        """One stage, ``flow``."""
        return stages.stages()

    def check(self, stage: Stage) -> Iterator[str]:
        """What only pixels have."""
        yield from unknown_names(stage, losses=(stages.FLOW,))
        if not stage.losses.get(stages.FLOW):
            yield "losses.flow: without it there is nothing to learn. Give it a weight, 1 for example"
        if stage.adversary:
            yield "adversary: latentdit makes no reconstruction. Leave it out"
        if stage.image_share:
            yield f"image_share: {stage.image_share}: latents are of one kind. Set it to 0"
        if stage.supervise:
            yield f"supervise: {list(stage.supervise)}: latents have no frames of their own. Leave it out"

    def build(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU; its initial weights are a pure function of ``seed`` and the layout."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0, "latentdit/weights"))
            return LatentDit(self.config, self.layout)

    def teachers(self) -> nn.ModuleDict:
        """None."""
        return nn.ModuleDict()

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass: mean squared error of the velocity over each clip's numbers, then over clips."""
        noise = {name: batch.randn(f"noise/{name}", *z.shape[1:]) for name, z in batch.arrays.items()}
        t_B = timesteps(batch.rand("t", 2), self.config.timesteps)
        caption_mask_BL = batch.caption_mask_BL
        if caption_mask_BL is not None:
            told_B1 = batch.rand("drop", 1) >= self.config.drop
            caption_mask_BL = caption_mask_BL & told_B1
        made = model(batch.arrays, t_B, noise, batch.masks, batch.caption_emb_BLD, caption_mask_BL)
        error_B, by_name = _errors(made.velocity, made.target, batch.masks)
        flow = error_B.mean()
        statistics = {f"flow/{name}": value_B.detach().mean() for name, value_B in by_name.items()}
        weighted = stage.losses[stages.FLOW] * flow
        return StepOutput(loss=weighted, terms={stages.FLOW: flow.detach()}, statistics=statistics)

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        return counts | {"null": sum(p.numel() for p in model.parameters(recurse=False))}

    @torch.no_grad()
    def sample(
        self,
        model: nn.Module,
        seed: int,
        place: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        caption_emb_1LD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Euler's method from noise at t = 1 to latents at t = 0, in equal steps; the null goes along with the caption.

        Where lengths follow from the content, the sample's is drawn as often as the stored ones have it.
        """
        assert isinstance(model, LatentDit)
        steps, guidance = steps or self.config.steps, self.config.guidance if guidance is None else guidance
        device = next(model.parameters()).device
        if caption_emb_1LD is not None and caption_emb_1LD.shape[-1] != self.config.caption_width:
            raise InputError(
                f"the caption has {caption_emb_1LD.shape[-1]} numbers a token, and this model "
                + (
                    f"reads {self.config.caption_width}"
                    if self.config.caption_width
                    else "was trained without captions"
                ),
                status=2,
            )
        kept, z, masks = {}, {}, {}
        for name, tensor in self.layout.tensors.items():
            kept[name] = _length(tensor.lengths, tensor.tokens[-1], derive(seed, place, f"sample/length/{name}"))
            z[name] = torch.randn(1, *tensor.shape, generator=generator(seed, place, f"sample/noise/{name}")).to(device)
            masks[name] = torch.zeros(1, *tensor.tokens, dtype=torch.bool, device=device)
            masks[name][..., : kept[name]] = True
        guided = caption_emb_1LD is not None and guidance != 1
        emb_BLD = mask_BL = None
        if caption_emb_1LD is not None:
            emb_BLD = caption_emb_1LD.to(device).expand(1 + guided, -1, -1)
            mask_BL = torch.ones(emb_BLD.shape[:2], dtype=torch.bool, device=device)
            mask_BL[1:] = False
        clips = 1 + guided
        masks = {name: mask.expand(clips, *mask.shape[1:]) for name, mask in masks.items()}
        for t, after in itertools.pairwise(schedule(steps, 1.0)):
            t_B = torch.full((clips,), t, device=device)
            both = {name: value.expand(clips, *value.shape[1:]) for name, value in z.items()}
            v = model.velocity(both, t_B, masks, emb_BLD, mask_BL)
            if guided:
                v = {name: torch.lerp(value[1:], value[:1], guidance) for name, value in v.items()}
            z = {name: value - (t - after) * v[name] for name, value in z.items()}
        return {name: value[..., : kept[name]].contiguous() for name, value in model.restored(z).items()}


def _errors(
    velocity: Mapping[str, Tensor], target: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of each clip over the numbers that are there, of all latents together and of each."""
    sums, counts = {}, {}
    for name, v in velocity.items():
        square = (v - target[name]).square() * masks[name][:, None]
        sums[name] = square.flatten(1).sum(1)
        counts[name] = masks[name].flatten(1).sum(1) * v.shape[1]
    total_B = torch.stack([*sums.values()]).sum(0) / torch.stack([*counts.values()]).sum(0)
    return total_B, {name: sums[name] / counts[name].clamp(min=1) for name in sums}


def _length(lengths: Mapping[int, int], whole: int, draw: int) -> int:
    """A length of those that were stored, each as likely as it was frequent; ``draw`` is uniform below 2^63."""
    at = math.floor(draw / 2**63 * sum(lengths.values()))
    for length, clips in sorted(lengths.items()):
        if at < clips:
            return length
        at -= clips
    return whole


RECIPE = LatentDitRecipe
