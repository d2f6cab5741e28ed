"""One-DVA as the loop sees it: ``trainer/recipe.py`` is the contract, README.md beside this file the account.

Legend: B clips, C channels (3, RGB), T frames, H height, W width; L latent steps, h = H / 16, w = W / 16, D latent
channels, K 1D latents.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipelines.contracts import Batch, derive, generator
from pipelines.faults import InputError, Remark
from trainer.losses import Perceptual
from trainer.losses.flow import schedule, timesteps
from trainer.recipe import Latent, LatentSpec, StepOutput
from trainer.recipes.onedva import length, losses, stages
from trainer.recipes.onedva.config import OneDvaConfig
from trainer.recipes.onedva.model import SEQUENCE, STRUCTURAL, OneDva, grid_of
from trainer.recipes.onedva.siglip import SigLip
from trainer.stage import Stage

FRAMES, SIZE = "frames", "size"


class OneDvaRecipe:
    """arXiv 2602.04220."""

    name: ClassVar[str] = "onedva"
    Config: ClassVar[type[BaseModel]] = OneDvaConfig
    multiple = 1

    def __init__(self, config: OneDvaConfig) -> None:
        self.config = config

    def stages(self) -> tuple[Stage, ...]:
        """The schedule for this configuration."""
        return stages.stages(self.config)

    def check(self, stage: Stage) -> Iterator[str]:
        """Losses and knobs that can't be, an adversary, supervised frames, clips longer than a window."""
        yield from losses.check(stage, self.config)
        if stage.adversary:
            yield "adversary: a diffusion decoder makes no reconstruction in a step. Leave it out"
        if stage.supervise:
            yield f"supervise: {list(stage.supervise)}: every frame is supervised. Leave it out"
        if stage.clip.frames > self.config.window:
            yield (
                f"clip.frames: {stage.clip.frames}: a window has {self.config.window} frames. Lower it, or raise "
                "model.window"
            )

    def build(self, seed: int) -> nn.Module:
        """The model, float32 on the CPU; its initial weights are a function of ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, 0, "onedva/weights"))
            return OneDva(self.config)

    def teachers(self) -> nn.ModuleDict:
        """LPIPS and SigLIP, unless ``model.perceptual`` and ``model.repa`` are null."""
        found: dict[str, nn.Module] = {}
        if self.config.perceptual is not None:
            found["lpips"] = Perceptual(self.config.perceptual)
        if self.config.repa is not None:
            found["siglip"] = SigLip(self.config.repa)
        return nn.ModuleDict(found)

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass at a drawn time; ``loss`` from the velocity.

        Times, noise, kept lengths and dropped conditions are functions of (seed, place). ``teachers["predictor"]``
        stands between encoder and decoder in a stage whose knob ``latents`` is ``predicted``.
        """
        config, x_B3THW = self.config, batch.pixels_BCTHW
        given = stage.knobs.get("latents", "both")
        frames, height, width = x_B3THW.shape[2:]
        shapes = self._shapes(frames, height, width)
        t_B = timesteps(batch.rand("t", 2), config.timesteps)
        kept_BK = lengths_B = None
        if given != "structural":
            lengths_B = length.drawn_lengths(x_B3THW, batch.rand("length", 1)[:, 0], config.queries, config.dropout)
            kept_BK = torch.arange(config.queries, device=x_B3THW.device) < lengths_B[:, None]
        else:
            shapes.pop(SEQUENCE)
        predict, predict_t_B = None, None
        if given == "predicted":
            if losses.PREDICTOR not in teachers:
                raise InputError(
                    f"stage {stage.name!r} trains on predicted latents, and there is no predictor. Name a run of the "
                    "latent diffusion model in the manifest: teachers: {predictor: RUN}"
                )
            captions = {"caption_emb_BLD": batch.caption_emb_BLD, "caption_mask_BL": batch.caption_mask_BL}
            predict = functools.partial(teachers[losses.PREDICTOR].predict, **captions)
            low, high = config.post_noise
            predict_t_B = low + (high - low) * batch.rand("post/t", 1)[:, 0]
        purpose = "post" if predict is not None else "z"
        made = model(
            x_B3THW,
            batch.randn("noise", 3, frames, height, width),
            t_B,
            {name: batch.randn(f"{purpose}/{name}", *shape) for name, shape in shapes.items()},
            kept_BK=kept_BK,
            dropped_B=batch.rand("condition", 1)[:, 0] < config.condition_dropout,
            predict=predict,
            predict_t_B=predict_t_B,
            features=bool(stage.losses.get("repa")),
        )
        found = losses.terms(made, batch, stage, teachers, config, kept_BK)
        with torch.no_grad():
            statistics = {"psnr_db": _psnr(made.clean_B3THW.clamp(-1, 1), x_B3THW).mean(), "time": t_B.mean()}
            if lengths_B is not None:
                statistics["length"] = lengths_B.float().mean()
                statistics["motion"] = length.motion_score(x_B3THW).mean()
        return StepOutput(
            loss=torch.stack([stage.losses[name] * value for name, value in found.items()]).sum(),
            terms={name: value.detach() for name, value in found.items()},
            statistics=statistics,
        )

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part; REPA's projector is not counted: it serves training alone."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        return {f"({name})" if name == "projector" else name: count for name, count in counts.items()}

    def _shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of one window's latents, by name."""
        depth = self.config.latent_channels
        return {STRUCTURAL: (depth, *grid_of(frames, height, width)), SEQUENCE: (depth, self.config.queries)}

    def latent(self, frames: int, height: int, width: int) -> LatentSpec:
        """Of all windows of a clip together, with every 1D latent; ``encode`` may keep fewer."""
        window, depth = self.config.window, self.config.latent_channels
        counts = [min(window, frames - at) for at in range(0, frames, window)]
        grids = [grid_of(count, height, width) for count in counts]
        shapes = {
            STRUCTURAL: (depth, sum(steps for steps, *_ in grids), *grids[0][1:]),
            SEQUENCE: (depth, len(counts) * self.config.queries),
        }
        numbers = sum(math.prod(shape) for shape in shapes.values())
        return LatentSpec(shapes=shapes, channels=depth, numbers_per_frame=numbers / frames)

    @torch.no_grad()
    def encode(
        self, model: nn.Module, frames_1CTHW: Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Yields a window's latents as soon as its frames have come: ``structural`` (1, D, L, h, w), ``1d`` (1, D, k)
        with as many 1D latents as were kept, ``frames`` (1,), and ``size`` (2,), the height and width in pixels.

        With a budget it is a window behind: the last window may be short, with a structural latent of more numbers a
        frame than the budget, and the one before it leaves room for that. Raises InputError where a budget is smaller
        than the structural latent of a first window; warns with a Remark where a quality or a budget is not met.
        """
        window = self.config.window
        most = 2 * window if self.config.length.by == "budget" else window
        held: list[Tensor] = []
        number = 0
        for chunk_1CTHW in frames_1CTHW:
            for x_1CHW in chunk_1CTHW.unbind(2):
                held.append(x_1CHW)
                if len(held) == most:
                    yield self._coded(model, torch.stack(held[:window], dim=2), number)
                    held, number = held[window:], number + 1
        if len(held) > window:
            yield self._coded(model, torch.stack(held[:window], dim=2), number, last=len(held) - window)
            held, number = held[window:], number + 1
        if held:
            yield self._coded(model, torch.stack(held, dim=2), number)

    def _coded(self, model: nn.Module, x_13THW: Tensor, number: int, last: int = 0) -> Latent:
        """A window's latents, cut to the length that the configuration asks for; after it come ``last`` frames, where
        that is known.
        """
        longest = int(model.readable)
        latent = {name: posterior.mean for name, posterior in model.encode(x_13THW, longest > 0).items()}
        latent[FRAMES] = torch.tensor([x_13THW.shape[2]])
        latent[SIZE] = torch.tensor(x_13THW.shape[3:])
        if not longest:
            return latent
        whole_1DK = latent[SEQUENCE]

        def cut(count: int) -> Latent:
            return {**latent, SEQUENCE: whole_1DK[..., :count].contiguous()}

        spec, lengths = self.config.length, length.candidates(longest, self.config.length.every)
        if spec.by == "all":
            return latent
        if spec.by == "motion":
            share = length.motion_share(length.motion_score(x_13THW), self.config.dropout)
            return cut(length.at_least(float(share) * longest, lengths))
        if spec.by == "budget":
            return cut(length.at_most(self._affordable(x_13THW.shape, number, last), lengths))
        for count in lengths:
            made_13THW = self._sampled(model, cut(count), number).clamp(-1, 1)
            if float(_psnr(made_13THW, x_13THW).mean()) >= spec.psnr_db:
                return cut(count)
        warnings.warn(
            f"model.length.psnr_db: {spec.psnr_db:g}: not every window reaches it, even with all its 1D latents; such "
            "a window keeps them all",
            Remark,
            stacklevel=2,
        )
        return latent

    def _affordable(self, shape: torch.Size, number: int, last: int) -> float:
        """How many 1D latents a window's budget has room for; less than 0 where it has not even for the structural
        latents, its own and that of ``last`` frames after it.
        """
        depth, budget = self.config.latent_channels, self.config.length.numbers_per_frame
        frames, height, width = shape[2:]

        def structural(count: int) -> int:
            return depth * math.prod(grid_of(count, height, width))

        left = budget * frames - structural(frames)
        short = number > 0 and frames < self.config.window
        if left < 0 and not short:
            raise InputError(
                f"model.length.numbers_per_frame: {budget:g}: the structural latent alone takes "
                f"{structural(frames) / frames:,.1f} numbers a frame here. Raise it to that, or more"
            )
        if last:
            left -= max(0.0, structural(last) - budget * last)
            if left < 0:
                warnings.warn(
                    f"model.length.numbers_per_frame: {budget:g}: the last two windows, of {frames} and {last} frames, "
                    "take more with their structural latents alone; they keep no 1D latent",
                    Remark,
                    stacklevel=2,
                )
        return left / depth

    @torch.no_grad()
    def decode(
        self, model: nn.Module, latents: Iterable[Latent], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields a window (1, 3, t, H, W) in [-1, 1] for each latent; its noise is a function of the configuration's
        seed and the window's number.
        """
        for number, latent in enumerate(latents):
            yield self._sampled(model, latent, number).clamp(-1, 1)

    def _sampled(self, model: nn.Module, latent: Latent, number: int) -> Tensor:
        """Euler steps from noise to a window's frames, with classifier-free guidance."""
        config, spec = self.config, self.config.sampling
        structural_1DLhw = latent[STRUCTURAL]
        given, kept_1K = {STRUCTURAL: structural_1DLhw}, None
        if SEQUENCE in latent:
            count = latent[SEQUENCE].shape[-1]
            given[SEQUENCE] = nn.functional.pad(latent[SEQUENCE], (0, config.queries - count))
            kept_1K = torch.arange(config.queries, device=structural_1DLhw.device)[None] < count
        shape = (1, 3, int(latent[FRAMES]), *latent[SIZE].tolist())
        noise = generator(spec.seed, number, "onedva/decode")
        z_13THW = torch.randn(shape, generator=noise).to(structural_1DLhw.device)
        guided = spec.guidance != 1
        if guided:
            given = {name: torch.cat((value, value)) for name, value in given.items()}
            kept_1K = None if kept_1K is None else kept_1K.expand(2, -1)
        dropped_B = torch.tensor([False, True] if guided else [False], device=z_13THW.device)
        times = schedule(spec.steps, spec.power)
        for t, after in itertools.pairwise(times):
            t_B = torch.full((len(dropped_B),), t, device=z_13THW.device)
            v_B3THW, *_ = model.decoder(z_13THW.expand(len(dropped_B), -1, -1, -1, -1), t_B, given, kept_1K, dropped_B)
            v_13THW = v_B3THW[1:] + spec.guidance * (v_B3THW[:1] - v_B3THW[1:]) if guided else v_B3THW
            z_13THW = z_13THW - (t - after) * v_13THW
        return z_13THW

    @torch.no_grad()
    def pictures(self, model: nn.Module, pixels_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """``reconstruction`` as encoding would keep it; ``structural alone`` without any 1D latent."""
        kept: list[Tensor] = []
        alone: list[Tensor] = []
        for x_13THW in pixels_BCTHW.split(1):
            latents = list(self.encode(model, [x_13THW]))
            bare = [{**latent, SEQUENCE: latent[SEQUENCE][..., :0]} for latent in latents if SEQUENCE in latent]
            kept.append(torch.cat(list(self.decode(model, latents)), dim=2))
            if bare:
                alone.append(torch.cat(list(self.decode(model, bare)), dim=2))
        views = {"reconstruction": torch.cat(kept)}
        return views | ({"structural alone": torch.cat(alone)} if alone else {})


def _psnr(x_B3THW: Tensor, y_B3THW: Tensor) -> Tensor:
    """Of each clip, (B,): mean over frames, in dB."""
    return -10 * torch.log10((x_B3THW - y_B3THW).square().mean((1, 3, 4)).clamp_min(1e-10) / 4).mean(1)


RECIPE = OneDvaRecipe
