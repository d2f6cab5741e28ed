"""Equation 9: ``L = λ_recon L_recon + λ_kl L_kl + λ_adv L_adv + λ_p L_p``; the adversary adds its own.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pipelines.contracts import Batch
from trainer.losses import gaussian_kl, l1, mse
from trainer.recipe import unknown_names
from trainer.recipes.decovae.backbone import bands
from trainer.recipes.decovae.config import DecoVaeConfig
from trainer.recipes.decovae.model import Reconstruction
from trainer.stage import Stage

PIXEL_TERMS = ("l1", "lpips", "dwt_low", "dwt_high")
"""Terms of the reconstruction alone."""
TERMS = (*PIXEL_TERMS, "kl", "components", "warp")
MOTION_STAGE = "motion"


def check(stage: Stage, config: DecoVaeConfig) -> Iterator[str]:
    """Terms that the configuration doesn't have."""
    yield from unknown_names(stage, losses=TERMS)
    weights = {name: weight for name, weight in stage.losses.items() if weight}
    if stage.name == MOTION_STAGE and set(weights) != {"warp"}:
        yield f"losses: {weights}: stage motion makes a prediction and no reconstruction. Give weight to warp alone"
    if "lpips" in weights and config.perceptual is None:
        yield (
            f"losses.lpips: {weights['lpips']}: model.perceptual is null. Name a backbone in model.perceptual, or set "
            "losses.lpips to 0"
        )
    if config.components == "none":
        for name in sorted({"components", "warp"} & set(weights)):
            yield f"losses.{name}: {weights[name]}: model.components is none, so there are no components. Set it to 0"


def pixel_terms(
    x_B3THW: Tensor, target_B3THW: Tensor, stage: Stage, teachers: nn.ModuleDict, starts_B: Tensor, count: int
) -> dict[str, Tensor]:
    """The unweighted terms of a reconstruction that have a weight in the stage.

    ``l1`` is the mean over pixels. ``dwt_low`` and ``dwt_high`` are that of the orthonormal Haar bands, the first
    frame's and the others' alike (LeanVAE's). ``lpips`` is the mean over the first frame and ``count`` ones
    from ``starts_B``.
    """
    wanted = [name for name in PIXEL_TERMS if stage.losses.get(name)]
    found: dict[str, Tensor] = {}
    if "l1" in wanted:
        found["l1"] = l1(x_B3THW, target_B3THW)
    if "lpips" in wanted:
        x, target = (_some_frames(v, starts_B, count) for v in (x_B3THW, target_B3THW))
        found["lpips"] = teachers["lpips"](x, target).mean()
    if "dwt_low" in wanted or "dwt_high" in wanted:
        pairs = list(zip(bands(x_B3THW), bands(target_B3THW), strict=True))
        for name, part in (("dwt_low", slice(0, 1)), ("dwt_high", slice(1, None))):
            if name in wanted:
                found[name] = torch.stack([l1(a[:, part], b[:, part]) for a, b in pairs]).sum()
    return found


def terms(
    made: Reconstruction, batch: Batch, stage: Stage, teachers: nn.ModuleDict, config: DecoVaeConfig
) -> dict[str, Tensor]:
    """The unweighted terms that have a weight in the stage.

    ``kl`` is summed over a clip's latents; ``components`` is the l1 of keyframe, motion (as coded) and residual against
    what was coded; ``warp`` the MSE of the keyframe moved by m_t, which teaches the motion module.
    """
    pixels_B3THW = batch.pixels_BCTHW
    found: dict[str, Tensor] = {}
    if made.pixels_B3THW is not None:
        starts_B, count = lpips_frames(batch, config)
        found |= pixel_terms(made.pixels_B3THW, pixels_B3THW, stage, teachers, starts_B, count)
    if stage.losses.get("kl"):
        found["kl"] = torch.stack([gaussian_kl(*posterior) for posterior in made.posteriors.values()]).sum(0).mean()
    if stage.losses.get("components") and made.source is not None and made.made is not None:
        gains = {"keyframe_B3HW": 1.0, "motion_B3THW": config.motion.gain, "residual_B3THW": 1.0}
        found["components"] = torch.stack(
            [gain * l1(getattr(made.made, name), getattr(made.source, name).detach()) for name, gain in gains.items()]
        ).sum()
    if stage.losses.get("warp") and made.source is not None:
        found["warp"] = mse(made.source.predicted_B3THW, pixels_B3THW)
    return found


def total(found: Mapping[str, Tensor], stage: Stage) -> Tensor:
    """The weighted sum."""
    return sum((stage.losses[name] * value for name, value in found.items()), start=next(iter(found.values())) * 0)


def lpips_frames(batch: Batch, config: DecoVaeConfig) -> tuple[Tensor, int]:
    """Where the successive frames that LPIPS looks at start in each clip, and how many there are; all frames if 0."""
    frames = batch.pixels_BCTHW.shape[2]
    count = min(config.perceptual_frames, frames - 1)
    starts_B = 1 + (batch.rand("lpips", 1)[:, 0] * (frames - count)).long().clamp(max=max(0, frames - count - 1))
    return starts_B, count


def _some_frames(x_BCTHW: Tensor, starts_B: Tensor, count: int) -> Tensor:
    if not count:
        return x_BCTHW
    at_BT = torch.cat(
        (torch.zeros_like(starts_B)[:, None], starts_B[:, None] + torch.arange(count).to(starts_B)), dim=1
    )
    return x_BCTHW.gather(2, at_BT[:, None, :, None, None].expand(-1, x_BCTHW.shape[1], -1, *x_BCTHW.shape[-2:]))
