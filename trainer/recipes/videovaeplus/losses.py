"""Equation 5: ``L_total = L_recon + λ_KL L_KL + λ_GAN L_GAN``; the adversary adds its own.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from trainer.losses import gaussian_kl, l1
from trainer.recipe import unknown_names
from trainer.recipes.videovaeplus.config import VideoVaePlusConfig
from trainer.recipes.videovaeplus.model import Reconstruction
from trainer.stage import Stage

PIXEL_TERMS = ("l1", "lpips")
"""Terms of the reconstruction alone."""
TERMS = (*PIXEL_TERMS, "kl")


def check(stage: Stage, config: VideoVaePlusConfig) -> Iterator[str]:
    """Terms that the configuration doesn't have."""
    yield from unknown_names(stage, losses=TERMS)
    if stage.losses.get("lpips") and config.perceptual is None:
        yield (
            f"losses.lpips: {stage.losses['lpips']}: model.perceptual is null. Name a backbone in model.perceptual, or "
            "set losses.lpips to 0"
        )


def pixel_terms(x_B3THW: Tensor, target_B3THW: Tensor, stage: Stage, teachers: nn.ModuleDict) -> dict[str, Tensor]:
    """The unweighted terms of a reconstruction that have a weight in the stage: means over pixels and over frames."""
    found: dict[str, Tensor] = {}
    if stage.losses.get("l1"):
        found["l1"] = l1(x_B3THW, target_B3THW)
    if stage.losses.get("lpips"):
        found["lpips"] = teachers["lpips"](x_B3THW, target_B3THW).mean()
    return found


def terms(made: Reconstruction, target_B3THW: Tensor, stage: Stage, teachers: nn.ModuleDict) -> dict[str, Tensor]:
    """The unweighted terms that have a weight in the stage.

    ``kl`` is that of the innermost latent, summed over a clip and divided by the 3 H W numbers of a frame: the released
    code sums the reconstruction's terms over a frame and weighs 1e-6 against that.
    """
    found = pixel_terms(made.pixels_B3THW, target_B3THW, stage, teachers)
    if stage.losses.get("kl"):
        numbers = target_B3THW[0, :, 0].numel()
        found["kl"] = gaussian_kl(*made.posterior).mean() / numbers
    return found


def total(found: Mapping[str, Tensor], stage: Stage) -> Tensor:
    """The weighted sum."""
    return sum((stage.losses[name] * value for name, value in found.items()), start=next(iter(found.values())) * 0)
