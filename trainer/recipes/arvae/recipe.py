"""ARVAE as the loop sees it: ``trainer/recipe.py`` is the contract, README.md beside this file the account.

Legend: B clips, C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines.contracts import Batch, derive
from pipelines.faults import InputError
from trainer.losses import Perceptual
from trainer.pictures import flow_to_rgb
from trainer.recipe import Latent, LatentSpec, StepOutput, unknown_names
from trainer.recipes.arvae import first_frame, losses, stages
from trainer.recipes.arvae.config import ArvaeConfig, DiffusersFirstFrame
from trainer.recipes.arvae.model import Arvae
from trainer.stage import Stage

FIRST, LATER = "first", ("motion", "supplement")


class ArvaeRecipe:
    """arXiv 2512.11293."""

    name: ClassVar[str] = "arvae"
    Config: ClassVar[type[BaseModel]] = ArvaeConfig

    def __init__(self, config: ArvaeConfig) -> None:
        self.config = config

    @functools.cached_property
    def _first(self) -> tuple[int, int]:
        """Side of a cell in pixels, and channels, of the first frame's latent: `diffusers` may ask the hub for them."""
        return first_frame.layout(self.config.first_frame)

    @property
    def multiple(self) -> int:
        """Pixels that a cell of either latent has at its side."""
        return math.lcm(self._first[0], self.config.down)

    def stages(self) -> tuple[Stage, ...]:
        """The published schedule for this configuration."""
        return stages.stages(self.config)

    def check(self, stage: Stage) -> Iterator[str]:
        """Terms that equation 4 lacks, LPIPS without a backbone, images where no first frame is trained."""
        yield from unknown_names(stage, losses=losses.TERMS)
        weight = stage.losses.get("lpips")
        if weight and self.config.perceptual is None:
            yield (
                f"losses.lpips: {weight}: model.perceptual is null. "
                "Name a backbone in model.perceptual, or set losses.lpips to 0"
            )
        if stage.image_share and not stage.trains("first_frame."):
            yield (
                f"image_share: {stage.image_share}: an image is a first frame, and this stage trains no first_frame. "
                "Set it to 0, or give images to stage first-frame"
            )
        if stage.adversary:
            yield "adversary: arvae's loss, equation 4, has none. Leave it out"

    def build(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU; its initial weights are a pure function of ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0, "arvae/weights"))
            return Arvae(self.config)

    def skeleton(self) -> nn.Module:
        """The model without the weights of an autoencoder of `diffusers`, of which it reads the config.json alone."""
        with torch.random.fork_rng(devices=[]):
            return Arvae(self.config, pretrained=False)

    def portable(self) -> ArvaeConfig:
        """The configuration with the architecture of an autoencoder of `diffusers` in it."""
        spec = self.config.first_frame
        if not isinstance(spec, DiffusersFirstFrame):
            return self.config
        whole = spec.model_copy(update={"architecture": first_frame.architecture(spec)})
        return self.config.model_copy(update={"first_frame": whole})

    def teachers(self) -> nn.ModuleDict:
        """LPIPS, unless ``model.perceptual`` is null."""
        spec = self.config.perceptual
        return nn.ModuleDict({"lpips": Perceptual(spec)} if spec is not None else {})

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass and equation 4 over the supervised frames."""
        pixels_B3THW = batch.pixels_BCTHW
        first, last = losses.supervised(stage, pixels_B3THW.shape[2])
        made = model(pixels_B3THW, learn_from=first if self.config.gradient == "supervised" else min(first, 2))
        found = losses.terms(made, pixels_B3THW, stage, teachers)
        with torch.no_grad():
            error = (made.pixels_B3THW[:, :, first - 1 : last].clamp(-1, 1) - pixels_B3THW[:, :, first - 1 : last]) / 2
            statistics = {"psnr_db": -10 * torch.log10(error.square().mean((1, 3, 4)).clamp_min(1e-10)).mean()}
            if made.flow_B2THW is not None:
                statistics["flow_pixels"] = made.flow_B2THW.norm(dim=1).mean()
        return StepOutput(
            loss=losses.total(found, stage),
            terms={name: value.detach() for name, value in found.items()},
            statistics=statistics,
        )

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part. The first frame's autoencoder is not counted: the paper takes FLUX's, 84M."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        return {f"({name})" if name == "first_frame" else name: count for name, count in counts.items() if count}

    def latent(self, frames: int, height: int, width: int) -> LatentSpec:
        """One latent of the first frame, then T and S of each frame; ``channels`` is C_1 + C_2."""
        down, channels = self._first
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"{height} x {width} pixels: height and width must be multiples of {self.multiple} "
                f"(model.down is {self.config.down}, the first frame's autoencoder has {down})"
            )
        cells = (height // self.config.down, width // self.config.down)
        shapes: dict[str, tuple[int, ...]] = {FIRST: (channels, 1, height // down, width // down)}
        if frames > 1:
            counts = (self.config.motion_channels, self.config.supplement_channels)
            shapes |= {name: (count, frames - 1, *cells) for name, count in zip(LATER, counts, strict=True)}
        return LatentSpec(
            shapes=shapes,
            channels=self.config.motion_channels + self.config.supplement_channels,
            numbers_per_frame=sum(math.prod(shape) for shape in shapes.values()) / frames,
        )

    @torch.no_grad()
    def encode(
        self, model: nn.Module, frames_1CTHW: Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Yields a latent as soon as its frame has come: ``first`` (1, C, 1, H', W'), then ``motion`` and
        ``supplement`` (1, C, 1, H/r, W/r). It decodes what it encodes, and holds one frame and one state.
        """
        previous_B3HW = state_BCHW = None
        for x_B3HW in _frames(frames_1CTHW):
            if previous_B3HW is None:
                latent_BCHW = model.first_frame.encode(x_B3HW)
                previous_B3HW, state_BCHW = _begin(model, latent_BCHW)
                yield {FIRST: latent_BCHW[:, :, None]}
            else:
                frame = model.code_frame(x_B3HW, previous_B3HW, state_BCHW)
                previous_B3HW, state_BCHW = frame.x_B3HW, frame.state_BCHW
                yield dict(zip(LATER, (frame.motion_BCHW[:, :, None], frame.supplement_BCHW[:, :, None]), strict=True))

    @torch.no_grad()
    def decode(
        self, model: nn.Module, latents: Iterable[Latent], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields a frame (1, 3, 1, H, W) in [-1, 1] as soon as its latent has come; holds one frame and one state."""
        previous_B3HW = state_BCHW = None
        for latent in latents:
            if FIRST in latent:
                previous_B3HW, state_BCHW = _begin(model, latent[FIRST][:, :, 0])
            elif previous_B3HW is None:
                raise InputError(
                    f"the latent stream starts with {', '.join(sorted(latent))}; its start must be {FIRST}"
                )
            else:
                motion_BCHW, supplement_BCHW = (latent[name][:, :, 0] for name in LATER)
                previous_B3HW, state_BCHW, _ = model.decode_frame(
                    motion_BCHW, supplement_BCHW, previous_B3HW, state_BCHW
                )
            yield previous_B3HW[:, :, None].clamp(-1, 1)

    @torch.no_grad()
    def residual(self, model: nn.Module, pixels_BCTHW: Tensor) -> Tensor | None:
        """X_t less the warped X̂_{t-1}, of frames 2 to T: what the supplement stands for, in pixels."""
        warped_B3THW = model(pixels_BCTHW).warped_B3THW
        return None if warped_B3THW is None else pixels_BCTHW[:, :, 1:] - warped_B3THW.clamp(-1, 1)

    @torch.no_grad()
    def pictures(self, model: nn.Module, pixels_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """``reconstruction``, ``flow`` (hue is direction, white is none, as in the first frame), ``warped``: the
        prediction from the previous reconstruction alone, the reconstruction itself for the first frame, and
        ``residual``: half of what the prediction leaves of the original, grey where nothing is left.
        """
        made = model(pixels_BCTHW)
        x_B3THW = made.pixels_B3THW.clamp(-1, 1)
        first_B3THW, flow_B3THW = x_B3THW[:, :, :1], x_B3THW.new_ones(x_B3THW[:, :, :1].shape)
        warped_B3THW = first_B3THW
        if made.flow_B2THW is not None and made.warped_B3THW is not None:
            flow_B3THW = torch.cat((flow_B3THW, flow_to_rgb(made.flow_B2THW).to(x_B3THW)), dim=2)
            warped_B3THW = torch.cat((first_B3THW, made.warped_B3THW.clamp(-1, 1)), dim=2)
        residual_B3THW = (pixels_BCTHW - warped_B3THW) / 2
        return {
            "reconstruction": x_B3THW, "flow": flow_B3THW, "warped": warped_B3THW, "residual": residual_B3THW,
        }  # fmt: skip


def _frames(chunks_BCTHW: Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk_BCTHW in chunks_BCTHW:
        yield from chunk_BCTHW.unbind(2)


def _begin(model: nn.Module, latent_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
    """X̂_1 and G_1."""
    first_B3HW = model.first_frame.decode(latent_BCHW).float()
    return first_B3HW, model.start(first_B3HW)


RECIPE = ArvaeRecipe
