"""A frozen SigLIP (Zhai et al., ICCV 2023) whose features REPA aligns the decoder with.

Legend: B clips, T frames, H height, W width, N tokens of the latent grid (L, h, w), E width of SigLIP.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.recipes.onedva.config import SPAN, RepaSpec
from trainer.recipes.onedva.model import grid_of


class SigLip(nn.Module):
    """The vision model of that folder or hub name; frozen."""

    def __init__(self, spec: RepaSpec) -> None:
        """Raises InputError where transformers or the weights can't be had, or their width is not ``spec.width``."""
        super().__init__()
        self.frames = spec.frames
        try:
            from trainer.losses import torchvision_ops  # noqa: F401, I001  (before transformers, which imports torchvision)
            from transformers import SiglipVisionModel
        except ImportError as error:
            raise InputError(f"REPA needs transformers ({error}); pip install 'moviola[models]'") from None
        local = Path(spec.encoder).expanduser()
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.net = SiglipVisionModel.from_pretrained(
                    str(local) if local.is_dir() else spec.encoder,
                    dtype=torch.float32, use_safetensors=True, local_files_only=local.is_dir(),
                )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"model.repa.encoder: {spec.encoder!r} can't be loaded: {' '.join(str(error).split())[:300]}. Give a "
                "folder with a SiglipVisionModel's config.json and model.safetensors, or a name on the Hugging Face "
                "hub; or set model.repa to null and losses.repa to 0"
            ) from None
        if self.net.config.hidden_size != spec.width:
            raise InputError(
                f"model.repa.encoder: {spec.encoder!r} has tokens of {self.net.config.hidden_size} numbers. Set "
                "model.repa.width to that"
            )
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> SigLip:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x_B3THW: Tensor) -> Tensor:
        """Features (B, N, E) of a padded clip in [-1, 1], which is SigLIP's own range: frames resized to its square,
        features to the latent grid; a step's are the mean over ``frames`` of its frames.
        """
        batch, _, frames, height, width = x_B3THW.shape
        steps, *cells = grid_of(frames, height, width)
        chosen = [(2 * j + 1) * SPAN // (2 * self.frames) for j in range(self.frames)]
        at = [0, *(1 + SPAN * step + j for step in range(steps - 1) for j in chosen)]
        side = self.net.config.image_size
        seen_NCHW = x_B3THW[:, :, at].transpose(1, 2).flatten(0, 1).float()
        seen_NCHW = F.interpolate(seen_NCHW, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        tokens_NSE = self.net(pixel_values=seen_NCHW).last_hidden_state.float()
        grid = side // self.net.config.patch_size
        features = F.interpolate(tokens_NSE.transpose(1, 2).unflatten(2, (grid, grid)), tuple(cells), mode="bilinear",
                                 antialias=True)  # fmt: skip
        features_BTEhw = features.unflatten(0, (batch, -1))
        later_BLEhw = features_BTEhw[:, 1:].unflatten(1, (steps - 1, self.frames)).mean(2) if steps > 1 else None
        whole = features_BTEhw[:, :1] if later_BLEhw is None else torch.cat((features_BTEhw[:, :1], later_BLEhw), dim=1)
        return whole.permute(0, 1, 3, 4, 2).flatten(1, 3)
