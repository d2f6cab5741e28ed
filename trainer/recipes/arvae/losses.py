"""Equation 4: ``L = L_MSE + λ1 L_SSIM + λ2 L_LPIPS``, over the frames that a stage supervises.

Legend: B clips, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from trainer.losses import mse, ssim_loss
from trainer.recipes.arvae.model import Reconstruction
from trainer.stage import Stage

TERMS = ("mse", "ssim", "lpips", "warp")


def supervised(stage: Stage, frames: int) -> tuple[int, int]:
    """First and last supervised frame, counted from 1, of a clip of that many."""
    first, last = stage.supervise or (1, frames)
    return min(first, frames), min(last, frames)


def terms(made: Reconstruction, pixels_B3THW: Tensor, stage: Stage, teachers: nn.ModuleDict) -> dict[str, Tensor]:
    """The unweighted terms that have a weight in the stage, each the mean over the supervised frames.

    ``warp`` is the MSE of the predecessor moved by the decoder's flow: it teaches the flow alone, and the paper's loss
    has none of it.
    """
    first, last = supervised(stage, pixels_B3THW.shape[2])
    target_B3THW, x_B3THW = pixels_B3THW[:, :, first - 1 : last], made.pixels_B3THW[:, :, first - 1 : last]
    weights = {name: weight for name, weight in stage.losses.items() if weight}
    found: dict[str, Tensor] = {}
    if "mse" in weights:
        found["mse"] = mse(x_B3THW, target_B3THW)
    if "ssim" in weights:
        found["ssim"] = ssim_loss(x_B3THW, target_B3THW)
    if "lpips" in weights:
        found["lpips"] = teachers["lpips"](x_B3THW, target_B3THW).mean()
    if "warp" in weights and made.warped_B3THW is not None:
        begin = max(first, 2)
        found["warp"] = mse(made.warped_B3THW[:, :, begin - 2 : last - 1], pixels_B3THW[:, :, begin - 1 : last])
    return found


def total(found: Mapping[str, Tensor], stage: Stage) -> Tensor:
    """The weighted sum."""
    return sum((stage.losses[name] * value for name, value in found.items()), start=next(iter(found.values())) * 0)
