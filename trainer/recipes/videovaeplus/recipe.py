"""VideoVAE+ as the loop sees it: ``trainer/recipe.py`` is the contract, README.md beside this file the account.

Legend: B clips, C channels (3, RGB), T frames, H height, W width; c latent channels, t = T / 4 latent steps, h = H / 8,
w = W / 8; L text tokens, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines.contracts import Batch, derive
from pipelines.faults import InputError
from trainer.losses import Perceptual
from trainer.recipe import Latent, LatentSpec, StepOutput
from trainer.recipes.videovaeplus import losses, stages
from trainer.recipes.videovaeplus.config import SPAN, VideoVaePlusConfig
from trainer.recipes.videovaeplus.model import VideoVaePlus
from trainer.stage import Stage

VIDEO, IMAGE, FRAMES = "video", "image", "frames"
"""Names of a window's latent, of a single image's, and of the count of a window's frames."""
UNREACHED = ("temporal_encoder.conv_in.weight", "encoder.mid_block.temporal_attention.qkv.weight")
"""Two parameters that an image doesn't reach."""


class VideoVaePlusRecipe:
    """arXiv 2412.17805."""

    name: ClassVar[str] = "videovaeplus"
    Config: ClassVar[type[BaseModel]] = VideoVaePlusConfig

    def __init__(self, config: VideoVaePlusConfig) -> None:
        self.config = config

    @property
    def multiple(self) -> int:
        """A cell's side."""
        return self.config.cell

    @property
    def caption_width(self) -> int:
        """Numbers a token of the captions; 0 without text guidance."""
        return self.config.text.width if self.config.text else 0

    def stages(self) -> tuple[Stage, ...]:
        """The published schedule for this configuration."""
        return stages.stages(self.config)

    def check(self, stage: Stage) -> Iterator[str]:
        """Losses and clips that can't be."""
        yield from losses.check(stage, self.config)
        if stage.clip.frames % SPAN and stage.clip.frames != 1:
            yield f"clip.frames: {stage.clip.frames}: a clip has 4 k frames, and an image one. Take 16, for example"
        if stage.clip.frames == 1 and any(map(stage.trains, UNREACHED)):
            yield f"clip.frames: 1: an image reaches no temporal parameter. Add '{stages.TEMPORAL}' to freeze"
        if stage.supervise:
            yield f"supervise: {list(stage.supervise)}: every frame is supervised. Leave it out"

    def build(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU; its initial weights are a function of ``seed`` and of ``weights``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0, "videovaeplus/weights"))
            return VideoVaePlus(self.config)

    def skeleton(self) -> nn.Module:
        """The model without the image autoencoder's weights."""
        return VideoVaePlusRecipe(self.config.model_copy(update={"weights": None})).build(0)

    def teachers(self) -> nn.ModuleDict:
        """LPIPS, unless ``model.perceptual`` is null."""
        spec = self.config.perceptual
        return nn.ModuleDict({"lpips": Perceptual(spec)} if spec is not None else {})

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass and equation 5 without the adversary's term; single frames take the image path."""
        pixels_B3THW = batch.pixels_BCTHW
        made = model(pixels_B3THW, self._noise(batch), *self._captions(batch))
        found = losses.terms(made, pixels_B3THW, stage, teachers)
        with torch.no_grad():
            statistics = {"psnr_db": _psnr(made.pixels_B3THW.clamp(-1, 1), pixels_B3THW)}

        def reconstruction_loss(x_B3THW: Tensor) -> Tensor:
            return losses.total(losses.pixel_terms(x_B3THW, pixels_B3THW, stage, teachers), stage)

        return StepOutput(
            loss=losses.total(found, stage),
            terms={name: value.detach() for name, value in found.items()},
            statistics=statistics,
            reconstruction_BCTHW=made.pixels_B3THW,
            target_BCTHW=pixels_B3THW,
            reconstruction_loss=reconstruction_loss,
        )

    def _noise(self, batch: Batch) -> dict[str, Tensor]:
        _, _, count, height, width = batch.pixels_BCTHW.shape
        cells = height // self.config.cell, width // self.config.cell
        depth, image = self.config.latent_channels, count == 1
        if image or not self.config.temporal:
            return {"z1": batch.randn("z1", depth, 1 if image else count // SPAN, *cells)}
        return {"z1": batch.randn("z1", depth, count, *cells), "z2": batch.randn("z2", depth, count // SPAN, *cells)}

    def _captions(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Tokens and their mask; a share ``text.drop`` of the clips goes without."""
        spec = self.config.text
        if spec is None or batch.caption_emb_BLD is None or batch.caption_mask_BL is None:
            return None, None
        self._check_width(batch.caption_emb_BLD)
        kept_B1 = batch.rand("caption", 1) >= spec.drop
        return batch.caption_emb_BLD, batch.caption_mask_BL & kept_B1

    def _check_width(self, emb_BLD: Tensor) -> None:
        assert self.config.text is not None
        if emb_BLD.shape[2] != self.config.text.width:
            raise InputError(
                f"captions are embedded in {emb_BLD.shape[2]} numbers a token, and model.text.width is "
                f"{self.config.text.width}. Embed them by the text encoder that the model is trained with, or train a "
                "model of their width"
            )

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part. Text guidance is not counted: 485M and 486M are the models' without it."""
        counts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            part = "(text)" if ".text." in f".{name}" else name.partition(".")[0]
            counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    def latent(self, frames: int, height: int, width: int) -> LatentSpec:
        """That of each four frames, rounded up; of one frame alone that of an image."""
        cell, depth = self.config.cell, self.config.latent_channels
        if height % cell or width % cell:
            raise InputError(f"{height} x {width} pixels: height and width must be multiples of {cell}")
        whole, rest = divmod(frames, self.config.window)
        steps = 1 if frames == 1 else whole * (self.config.window // SPAN) + -(-rest // SPAN)
        shape = (depth, steps, height // cell, width // cell)
        name = IMAGE if frames == 1 else VIDEO
        return LatentSpec(shapes={name: shape}, channels=depth, numbers_per_frame=math.prod(shape) / frames)

    @torch.no_grad()
    def encode(
        self, model: nn.Module, frames_1CTHW: Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Yields a window's latent ``video`` (1, c, t, h, w) as soon as its frames have come; holds one window.

        ``frames`` (1,) counts the window's frames: the last one's are filled up to four by its last frame. A video of
        one frame is an image, and yields ``image`` (1, c, 1, h, w).
        """
        held: list[Tensor] = []
        several = False
        for chunk_1CTHW in frames_1CTHW:
            for x_1CHW in chunk_1CTHW.unbind(2):
                if len(held) == self.config.window:
                    yield self._coded(model, held, caption_emb_1LD, image=False)
                    held = []
                several = several or bool(held)
                held.append(x_1CHW)
        if held:
            yield self._coded(model, held, caption_emb_1LD, image=not several)

    def _coded(self, model: nn.Module, held: list[Tensor], caption_emb_1LD: Tensor | None, *, image: bool) -> Latent:
        x_13THW = torch.stack(held, dim=2)
        if not image:
            x_13THW = _filled(x_13THW)
        posterior = model.encode(x_13THW, self._context(model, image, caption_emb_1LD))
        return {IMAGE if image else VIDEO: posterior.mean, FRAMES: torch.tensor([len(held)])}

    def _context(self, model: nn.Module, image: bool, caption_emb_1LD: Tensor | None) -> object:
        if caption_emb_1LD is None or self.config.text is None:
            return model.context(1, image, None, None)
        self._check_width(caption_emb_1LD)
        return model.context(1, image, caption_emb_1LD, torch.ones_like(caption_emb_1LD[..., 0], dtype=torch.bool))

    @torch.no_grad()
    def decode(
        self, model: nn.Module, latents: Iterable[Latent], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields frames (1, 3, T, H, W) in [-1, 1] of a window as soon as its latent has come."""
        for latent in latents:
            image = IMAGE in latent
            x_13THW = model.decode(latent[IMAGE if image else VIDEO], self._context(model, image, caption_emb_1LD))
            yield x_13THW[:, :, : int(latent[FRAMES])].clamp(-1, 1)

    @torch.no_grad()
    def pictures(self, model: nn.Module, pixels_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """``reconstruction``, and ``as images``: each frame by itself through the image path."""
        count = pixels_BCTHW.shape[2]
        if count == 1:
            return {"reconstruction": model(pixels_BCTHW).pixels_B3THW.clamp(-1, 1)}
        made_B3THW = model(_filled(pixels_BCTHW)).pixels_B3THW[:, :, :count]
        single = [model(pixels_BCTHW[:, :, at : at + 1]).pixels_B3THW for at in range(count)]
        views = {"reconstruction": made_B3THW, "as images": torch.cat(single, dim=2)}
        return {name: view.clamp(-1, 1) for name, view in views.items()}


def _filled(x_BCTHW: Tensor) -> Tensor:
    """The clip with its last frame repeated until it has 4 k frames."""
    missing = -x_BCTHW.shape[2] % SPAN
    return torch.cat((x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else x_BCTHW


def _psnr(x_B3THW: Tensor, y_B3THW: Tensor) -> Tensor:
    """Mean over frames, in dB."""
    return -10 * torch.log10((x_B3THW - y_B3THW).square().mean((1, 3, 4)).clamp_min(1e-10) / 4).mean()


RECIPE = VideoVaePlusRecipe
