"""The loss: flow matching, KL, self-alignment, REPA and LPIPS.

Legend: B clips, T frames, H height, W width; N structural tokens, K 1D latents, D latent channels, E width of SigLIP.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.contracts import Batch
from trainer.losses import gaussian_kl, mse
from trainer.recipe import unknown_names
from trainer.recipes.onedva.config import OneDvaConfig
from trainer.recipes.onedva.model import SEQUENCE, STRUCTURAL, Made, padded
from trainer.stage import Stage

PREDICTOR = "predictor"
"""The teacher that predicts latents, in post-training."""
TERMS = ("flow", "kl", "align", "repa", "lpips")
LATENTS = ("structural", "both", "predicted")
"""What the knob ``latents`` of a stage may be: what the decoder is given."""


def check(stage: Stage, config: OneDvaConfig) -> Iterator[str]:
    """Terms and knobs that the configuration or the stage doesn't have."""
    given = stage.knobs.get("latents", "both")
    teachers = (PREDICTOR,) if given == "predicted" else ()
    yield from unknown_names(stage, losses=TERMS, knobs=("latents",), teachers=teachers)
    if given == "predicted" and PREDICTOR not in stage.teachers:
        yield (
            "teachers.predictor: missing, and this stage trains on predicted latents. Name a run of recipe latentdit "
            "that was trained on this codec's latents"
        )
    if given not in LATENTS:
        yield f"knobs.latents: {given!r}: take {', '.join(LATENTS)}"
    weights = {name: weight for name, weight in stage.losses.items() if weight and name in TERMS}
    if not weights.get("flow"):
        yield "losses.flow: it has no weight, and nothing else teaches the decoder. Give it one"
    if "lpips" in weights and config.perceptual is None:
        yield (
            f"losses.lpips: {weights['lpips']}: model.perceptual is null. Name a backbone in model.perceptual, or set "
            "losses.lpips to 0"
        )
    if "repa" in weights and config.repa is None:
        yield (
            f"losses.repa: {weights['repa']}: model.repa is null. Name an encoder in model.repa, or set losses.repa "
            "to 0"
        )
    if "align" in weights and given == "structural":
        yield f"losses.align: {weights['align']}: this stage has no 1D latents. Set it to 0"
    if given == "predicted":
        for name in sorted({"kl", "align", "repa"} & set(weights)):
            yield f"losses.{name}: {weights[name]}: the encoder rests in post-training. Set it to 0"


def self_alignment(sequence_BKD: Tensor, structural_BND: Tensor, kept_BK: Tensor, continuity: float) -> Tensor:
    """``mean_i (1 - max_j cos(z_i, sg s_j)) + continuity mean_i (1 - cos(z_i, z_i+1))`` over kept 1D latents; a scalar.

    Each 1D latent is drawn to the structural latent that it is most like, and to its neighbour.
    """
    z_BKD = F.normalize(sequence_BKD.float(), dim=-1)
    s_BND = F.normalize(structural_BND.detach().float(), dim=-1)
    best_BK = (z_BKD @ s_BND.transpose(1, 2)).amax(dim=2)
    next_BK = (z_BKD[:, :-1] * z_BKD[:, 1:]).sum(-1)
    pairs_BK = kept_BK[:, :-1] & kept_BK[:, 1:]
    return _mean(1 - best_BK, kept_BK) + continuity * _mean(1 - next_BK, pairs_BK)


def _mean(values_BK: Tensor, where_BK: Tensor) -> Tensor:
    """The mean over clips of the mean over a clip's places."""
    return ((values_BK * where_BK).sum(1) / where_BK.sum(1).clamp_min(1)).mean()


def representation_alignment(features_BNE: Tensor, siglip_BNE: Tensor) -> Tensor:
    """``mean_n (1 - cos(f_n, y_n))``: REPA, equation 8, but for a constant."""
    return 1 - F.cosine_similarity(features_BNE.float(), siglip_BNE.float(), dim=-1).mean()


def terms(
    made: Made, batch: Batch, stage: Stage, teachers: nn.ModuleDict, config: OneDvaConfig, kept_BK: Tensor | None
) -> dict[str, Tensor]:
    """The unweighted terms that have a weight in the stage.

    ``flow`` is the mean squared error of the velocity; ``kl`` is summed over a clip's latents, dropped ones left out.
    """
    wanted = {name for name, weight in stage.losses.items() if weight}
    x_B3THW = batch.pixels_BCTHW
    found = {"flow": mse(made.velocity_B3THW, made.target_B3THW)}
    if "kl" in wanted:
        divergence_B = gaussian_kl(*made.posteriors[STRUCTURAL])
        if kept_BK is not None:
            kept = [torch.where(kept_BK[:, None], value_BDK, 0.0) for value_BDK in made.posteriors[SEQUENCE]]
            divergence_B = divergence_B + gaussian_kl(*kept)
        found["kl"] = divergence_B.mean()
    if "align" in wanted and kept_BK is not None:
        sequence_BKD = made.posteriors[SEQUENCE].mean.transpose(1, 2)
        structural_BND = made.posteriors[STRUCTURAL].mean.flatten(2).transpose(1, 2)
        found["align"] = self_alignment(sequence_BKD, structural_BND, kept_BK, config.continuity)
    if "repa" in wanted and made.features_BNE is not None:
        found["repa"] = representation_alignment(made.features_BNE, teachers["siglip"](padded(x_B3THW)))
    if "lpips" in wanted:
        pairs = (_some_frames(v, batch, config.perceptual_frames) for v in (made.clean_B3THW, x_B3THW))
        found["lpips"] = teachers["lpips"](*pairs).mean()
    return found


def _some_frames(x_B3THW: Tensor, batch: Batch, count: int) -> Tensor:
    """``count`` successive frames from a drawn one on; all of them where that is 0 or more than there are."""
    frames = x_B3THW.shape[2]
    if not 0 < count < frames:
        return x_B3THW
    starts_B = (batch.rand("lpips", 1)[:, 0] * (frames - count + 1)).long()
    at_BT = starts_B[:, None] + torch.arange(count, device=x_B3THW.device)
    return x_B3THW.gather(2, at_BT[:, None, :, None, None].expand(-1, 3, -1, *x_B3THW.shape[-2:]))
