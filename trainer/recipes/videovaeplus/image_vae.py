"""The image autoencoder that VideoVAE+ inherits: an `AutoencoderKL` of `diffusers`, in the layout of SD-1.4 (4
channels, quantisation convolutions) or of SD-3.5 (16 channels, none).

Legend: none; shapes are the weights'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipelines.faults import InputError
from trainer.recipes.videovaeplus.config import ImageVaeSpec, VideoVaePlusConfig


def inherit(model: nn.Module, config: VideoVaePlusConfig) -> None:
    """Fills the spatial layers of ``model`` from ``config.weights``; temporal and text layers stay as they are.

    Raises InputError where the weights can't be loaded or are of another shape than the configuration.
    """
    assert config.weights is not None
    net = load(config.weights)
    faults = list(_differences(net.config, config))
    if faults:
        raise InputError(f"model.weights: {config.weights.source} is another autoencoder: {'; '.join(faults)}")
    own = {n: p for n, p in model.named_parameters() if "temporal" not in n and "text." not in n}
    theirs = dict(net.named_parameters())
    if odd := sorted(own.keys() ^ theirs.keys()):
        raise InputError(
            f"model.weights: {config.weights.source} is another autoencoder: {len(odd)} of its weights are not here or "
            f"missing there, first {odd[0]}. Give one with the layers of Stable Diffusion's: DownEncoderBlock2D, "
            "UpDecoderBlock2D, and an attention in the middle"
        )
    with torch.no_grad():
        for name, weight in theirs.items():
            own[name].copy_(weight)


def load(spec: ImageVaeSpec) -> Any:
    """The `AutoencoderKL`, float32 on the CPU; raises InputError where it can't be had. Only safetensors are read."""
    try:
        from trainer.losses import torchvision_ops  # noqa: F401, I001  (before diffusers, which imports torchvision)
        from diffusers import AutoencoderKL
    except ImportError:
        raise InputError(
            "model.weights names an image autoencoder, and the library diffusers is not installed. Install it with "
            "`pip install 'moviola[models]'`, or set model.weights: null."
        ) from None
    try:
        return AutoencoderKL.from_pretrained(
            spec.source, subfolder=spec.subfolder or None, revision=spec.revision, torch_dtype=torch.float32,
            use_safetensors=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"model.weights: source {spec.source!r}, subfolder {spec.subfolder!r} can't be loaded as an AutoencoderKL: "
            f"{reason}. Give a folder that `save_pretrained` wrote or a hub name that you may read, or set "
            "model.weights: null to start afresh."
        ) from None


def _differences(theirs: Any, config: VideoVaePlusConfig) -> Any:
    """What the image autoencoder has otherwise, each with the field that decides it here."""
    widths = [config.width * m for m in config.multipliers]
    for name, found, wanted, field in (
        ("latent_channels", theirs.latent_channels, config.latent_channels, "latent_channels"),
        ("block_out_channels", list(theirs.block_out_channels), widths, "width and multipliers"),
        ("layers_per_block", theirs.layers_per_block, config.blocks, "blocks"),
        ("norm_num_groups", theirs.norm_num_groups, config.groups, "groups"),
        ("use_quant_conv", theirs.use_quant_conv, config.quantized, "quant_conv"),
        ("use_post_quant_conv", theirs.use_post_quant_conv, config.quantized, "quant_conv"),
    ):
        if found != wanted:
            yield f"its {name} is {found}, and model.{field} makes {wanted}"
