"""DeCo-VAE as the loop sees it: ``trainer/recipe.py`` is the contract, README.md beside this file the account.

Legend: B clips, C channels (3, RGB), T frames, H height, W width; L latent steps, h = H / 8, w = W / 8, D latent
channels.
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
from trainer.pictures import flow_to_rgb
from trainer.recipe import Latent, LatentSpec, StepOutput
from trainer.recipes.decovae import losses, stages
from trainer.recipes.decovae.config import LATENT_STRIDE, DecoVaeConfig
from trainer.recipes.decovae.model import KEYFRAME, DecoVae, latents
from trainer.recipes.decovae.motion import MULTIPLE, flow_in_pixels
from trainer.stage import Stage

SPAN, CELL, _ = LATENT_STRIDE
FRAMES, SHARED = "frames", "shared"


class DecoVaeRecipe:
    """arXiv 2511.14530."""

    name: ClassVar[str] = "decovae"
    Config: ClassVar[type[BaseModel]] = DecoVaeConfig

    def __init__(self, config: DecoVaeConfig) -> None:
        self.config = config

    @property
    def multiple(self) -> int:
        """What the motion module halves four times, or a cell's side."""
        return CELL if self.config.components == "none" else MULTIPLE

    def stages(self) -> tuple[Stage, ...]:
        """The published schedule for this configuration."""
        return stages.stages(self.config)

    def check(self, stage: Stage) -> Iterator[str]:
        """Losses and clips that can't be, images, and an adversary of the motion stage."""
        yield from losses.check(stage, self.config)
        if stage.adversary and stage.name == losses.MOTION_STAGE:
            yield "adversary: stage motion makes no reconstruction. Leave it out"
        if stage.clip.frames % SPAN != 1:
            yield f"clip.frames: {stage.clip.frames}: a clip has 1 + 4 k frames. Take 17, for example"
        if stage.image_share and self.config.components != "none":
            yield f"image_share: {stage.image_share}: an image has no motion and no residual. Set it to 0"
        if stage.supervise:
            yield f"supervise: {list(stage.supervise)}: every frame is supervised. Leave it out"

    def build(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU; its initial weights are a function of ``seed`` and of ``motion.weights``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0, "decovae/weights"))
            return DecoVae(self.config)

    def skeleton(self) -> nn.Module:
        """The model without the motion module's file."""
        motion = self.config.motion.model_copy(update={"weights": None})
        return DecoVaeRecipe(self.config.model_copy(update={"motion": motion})).build(0)

    def teachers(self) -> nn.ModuleDict:
        """LPIPS, unless ``model.perceptual`` is null."""
        spec = self.config.perceptual
        return nn.ModuleDict({"lpips": Perceptual(spec)} if spec is not None else {})

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass and equation 9 without the adversary's term; in stage ``motion`` the prediction alone."""
        pixels_B3THW = batch.pixels_BCTHW
        code = stage.name != losses.MOTION_STAGE
        made = model(pixels_B3THW, self._noise(batch) if code else None, code=code)
        found = losses.terms(made, batch, stage, teachers, self.config)
        statistics: dict[str, Tensor] = {}
        with torch.no_grad():
            if made.pixels_B3THW is not None:
                statistics["psnr_db"] = _psnr(made.pixels_B3THW.clamp(-1, 1), pixels_B3THW)
            if made.source is not None:
                statistics["predicted_psnr_db"] = _psnr(made.source.predicted_B3THW, pixels_B3THW)
                statistics["flow_pixels"] = flow_in_pixels(made.source.motion_B3THW).norm(dim=1).mean()
        starts_B, count = losses.lpips_frames(batch, self.config)

        def reconstruction_loss(x_B3THW: Tensor) -> Tensor:
            return losses.total(losses.pixel_terms(x_B3THW, pixels_B3THW, stage, teachers, starts_B, count), stage)

        return StepOutput(
            loss=losses.total(found, stage),
            terms={name: value.detach() for name, value in found.items()},
            statistics=statistics,
            reconstruction_BCTHW=made.pixels_B3THW,
            target_BCTHW=pixels_B3THW if made.pixels_B3THW is not None else None,
            reconstruction_loss=reconstruction_loss if made.pixels_B3THW is not None else None,
        )

    def _noise(self, batch: Batch) -> dict[str, Tensor]:
        _, _, frames, height, width = batch.pixels_BCTHW.shape
        shapes = self._shapes(frames, height, width)
        return {name: batch.randn(f"z/{name}", *shape) for name, shape in shapes.items()}

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part. The motion module is not counted: 62M are LeanVAE's, with three encoders for one."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        return {f"({name})" if name == "motion" else name: count for name, count in counts.items() if count}

    def _shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of one window's latents, by name."""
        later = -(-(frames - 1) // SPAN)
        steps = dict.fromkeys(latents(self.config), 1 + later)
        if self.config.keyframe == "single":
            steps = {name: 1 if name == KEYFRAME else later for name in steps}
        depth, cells = self.config.latent_channels, (height // CELL, width // CELL)
        return {name: (depth, count, *cells) for name, count in steps.items() if count}

    def latent(self, frames: int, height: int, width: int) -> LatentSpec:
        """D channels for each component; of all windows together, where the clip has more frames than one.

        With ``new_keyframe`` the number of windows follows from what is seen; this is without further keyframes.
        """
        if height % self.multiple or width % self.multiple:
            raise InputError(f"{height} x {width} pixels: height and width must be multiples of {self.multiple}")
        shapes: dict[str, tuple[int, ...]] = {}
        for count in _windows(frames, self.config.window, self.config.overlap):
            for name, (depth, steps, *cells) in self._shapes(count, height, width).items():
                before = shapes[name][1] if name in shapes else 0
                shapes[name] = (depth, before + steps, *cells)
        numbers = sum(math.prod(shape) for shape in shapes.values())
        return LatentSpec(shapes=shapes, channels=self.config.latent_channels, numbers_per_frame=numbers / frames)

    @torch.no_grad()
    def encode(
        self, model: nn.Module, frames_1CTHW: Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Yields a window's latents (1, D, L, h, w) as soon as its frames have come; holds one window.

        ``frames`` (1,) counts the window's frames, ``shared`` (1,) those that it has in common with the window before.
        """
        window, overlap = self.config.window, self.config.overlap
        held: list[Tensor] = []
        shared = 0
        for chunk_1CTHW in frames_1CTHW:
            for x_1CHW in chunk_1CTHW.unbind(2):
                if held and self._ends(model, held, x_1CHW):
                    again = self._shared(model, held, shared, x_1CHW)
                    if len(held) > shared:
                        yield self._coded(model, held, shared)
                    held, shared = held[len(held) - again :], again
                elif len(held) == window:
                    yield self._coded(model, held, shared)
                    held, shared = held[window - overlap :], overlap
                held.append(x_1CHW)
        if len(held) > shared:
            yield self._coded(model, held, shared)

    def _ends(self, model: nn.Module, held: list[Tensor], x_1CHW: Tensor) -> bool:
        """Whether a frame that its keyframe no longer serves shall have another: at a cut at once, within a scene when
        the latents' step of four frames is full, whose numbers would be wasted otherwise.
        """
        if not self._leaves(model, held[0], x_1CHW):
            return False
        return len(held) % SPAN == 1 or self._leaves(model, held[-1], x_1CHW)

    def _leaves(self, model: nn.Module, keyframe_1CHW: Tensor, x_1CHW: Tensor) -> bool:
        """Whether the residual of a frame says that its keyframe no longer serves."""
        if self.config.new_keyframe is None:
            return False
        residual = model.decouple(x_1CHW[:, :, None], keyframe_1CHW).residual_B3THW
        return float(residual.square().mean().sqrt()) > self.config.new_keyframe

    def _shared(self, model: nn.Module, held: list[Tensor], shared: int, x_1CHW: Tensor) -> int:
        """Frames that a new window shares with the one before, so that the scene goes on without a jump; 0 at a cut,
        where none of these would serve ``x`` as a keyframe.
        """
        fresh = len(held) - shared or shared
        candidates = range(min(self.config.overlap, fresh), 0, -1)
        return next((count for count in candidates if not self._leaves(model, held[-count], x_1CHW)), 0)

    def _coded(self, model: nn.Module, held: list[Tensor], shared: int) -> Latent:
        x_1CTHW = _filled(torch.stack(held, dim=2))
        posteriors, _ = model.encode(x_1CTHW)
        return {
            **{name: posterior.mean for name, posterior in posteriors.items()},
            FRAMES: torch.tensor([len(held)]),
            SHARED: torch.tensor([shared]),
        }

    @torch.no_grad()
    def decode(
        self, model: nn.Module, latents: Iterable[Latent], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields frames (1, 3, t, H, W) in [-1, 1] of a window as soon as it has come, but for those that the next may
        share: these are blended, from the one window to the other.
        """
        tail_1CTHW: Tensor | None = None
        for latent in latents:
            frames, shared = int(latent[FRAMES]), int(latent[SHARED])
            x_1CTHW, _ = model.decode({n: value for n, value in latent.items() if n not in (FRAMES, SHARED)})
            x_1CTHW = x_1CTHW[:, :, :frames].clamp(-1, 1)
            if tail_1CTHW is not None and shared:
                alone = tail_1CTHW.shape[2] - shared
                if alone:
                    yield tail_1CTHW[:, :, :alone]
                share_T11 = (torch.arange(1, shared + 1, device=x_1CTHW.device) / (shared + 1)).view(-1, 1, 1)
                yield torch.lerp(tail_1CTHW[:, :, alone:], x_1CTHW[:, :, :shared], share_T11)
                x_1CTHW = x_1CTHW[:, :, shared:]
            elif tail_1CTHW is not None:
                yield tail_1CTHW
            ready = max(0, x_1CTHW.shape[2] - self.config.overlap)
            if ready:
                yield x_1CTHW[:, :, :ready]
            tail_1CTHW = x_1CTHW[:, :, ready:] if ready < x_1CTHW.shape[2] else None
        if tail_1CTHW is not None:
            yield tail_1CTHW

    @torch.no_grad()
    def residual(self, model: nn.Module, pixels_BCTHW: Tensor) -> Tensor | None:
        """r_t of all frames but the keyframes, window by window as they are coded without further keyframes; None where
        nothing is decoupled.
        """
        if self.config.components == "none":
            return None
        found, first = [], 0
        for count in _windows(pixels_BCTHW.shape[2], self.config.window, self.config.overlap):
            found.append(model.decouple(pixels_BCTHW[:, :, first : first + count]).residual_B3THW[:, :, 1:])
            first += count - self.config.overlap
        residual_B3THW = torch.cat(found, dim=2)
        return residual_B3THW if residual_B3THW.shape[2] else None

    @torch.no_grad()
    def pictures(self, model: nn.Module, pixels_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """``reconstruction``; ``flow`` and ``decoded flow`` (hue is direction, white is none); ``predicted``, the
        keyframe moved; ``residual`` and ``decoded residual``, at half their strength.
        """
        frames = pixels_BCTHW.shape[2]
        made = model(_filled(pixels_BCTHW))
        views = {"reconstruction": made.pixels_B3THW.clamp(-1, 1)}
        if made.source is not None and made.made is not None:
            for title, part in (("", made.source), ("decoded ", made.made)):
                views[f"{title}flow"] = flow_to_rgb(flow_in_pixels(part.motion_B3THW)).to(pixels_BCTHW)
                views[f"{title}residual"] = (part.residual_B3THW / 2).clamp(-1, 1)
            views["predicted"] = made.source.predicted_B3THW.clamp(-1, 1)
        return {name: view[:, :, :frames] for name, view in views.items()}


def _filled(x_BCTHW: Tensor) -> Tensor:
    """The clip with its last frame repeated until it has 1 + 4 k frames."""
    missing = -(x_BCTHW.shape[2] - 1) % SPAN
    return torch.cat((x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)), dim=2) if missing else x_BCTHW


def _windows(frames: int, window: int, overlap: int) -> Iterator[int]:
    """Frames of each window of a video."""
    at = 0
    while True:
        yield min(window, frames - at)
        if at + window >= frames:
            return
        at += window - overlap


def _psnr(x_B3THW: Tensor, y_B3THW: Tensor) -> Tensor:
    """Mean over frames, in dB."""
    return -10 * torch.log10((x_B3THW - y_B3THW).square().mean((1, 3, 4)).clamp_min(1e-10) / 4).mean()


RECIPE = DecoVaeRecipe
