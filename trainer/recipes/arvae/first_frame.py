"""The first frame, which has no predecessor: our own image autoencoder, one from `diffusers`, or the frame itself.

Each has ``encode`` (B, 3, H, W) -> latent (B, C, H/down, W/down), ``decode`` back, ``down`` and ``channels``.

Legend: B clips, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.blocks.conv import Conv2d, Down, ResidualBlock, Up, activation
from trainer.blocks.patch import PatchAnalysis, PatchSynthesis
from trainer.recipes.arvae.config import DiffusersFirstFrame, FirstFrameSpec, OwnFirstFrame


class OwnAutoencoder(nn.Module):
    """A linear patch transform beside a convolutional path that starts at 0: usable before it is trained.

    ``z = analysis(x) + encoder(x)`` and ``x = y + decoder(z, y)`` with ``y = synthesis(z)``.
    """

    trained = True

    def __init__(self, spec: OwnFirstFrame) -> None:
        super().__init__()
        self.down, self.channels = spec.down, spec.channels
        widths = spec.widths
        self.analysis = PatchAnalysis(spec.down, spec.channels)
        self.synthesis = PatchSynthesis(spec.down, spec.channels)
        self.encoder = nn.Sequential(
            Conv2d(3, widths[0]),
            *(nn.Sequential(activation(), Down(a, b), ResidualBlock(b, b)) for a, b in pairwise(widths)),
            activation(),
            Conv2d(widths[-1], spec.channels, zero=True),
        )
        self.expand = nn.Sequential(
            Conv2d(spec.channels, widths[-1]),
            *(nn.Sequential(ResidualBlock(a, a), activation(), Up(a, b)) for a, b in pairwise(reversed(widths))),
        )
        self.refine = nn.Sequential(
            ResidualBlock(widths[0] + 3, widths[0]), activation(), Conv2d(widths[0], 3, zero=True)
        )

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels to latent."""
        return self.analysis(x_BCHW) + self.encoder(x_BCHW)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Latent to pixels."""
        linear_BCHW = self.synthesis(z_BCHW)
        return linear_BCHW + self.refine(torch.cat((self.expand(z_BCHW), linear_BCHW), dim=1))


class PlainFrame(nn.Module):
    """The frame is its own latent."""

    trained = False
    down, channels = 1, 3

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """The pixels."""
        return x_BCHW

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """The pixels."""
        return z_BCHW


class DiffusersAutoencoder(nn.Module):
    """A frozen `AutoencoderKL`; the latent is the posterior's mean, so that encoding is deterministic.

    Its ``scaling_factor`` and ``shift_factor`` are for a diffusion model's sake and cancel in reconstruction: unused.
    """

    trained = False

    def __init__(self, spec: DiffusersFirstFrame, pretrained: bool) -> None:
        super().__init__()
        self.down, self.channels = layout(spec)
        if not pretrained:
            self.net = _ask(spec, "from_config", architecture(spec))
        else:
            options = {"torch_dtype": torch.float32, "use_safetensors": True, "low_cpu_mem_usage": False}
            self.net, found = _ask(spec, "from_pretrained", output_loading_info=True, **_source(spec), **options)
            for fault, names in (("lack", found["missing_keys"]), ("do not belong to it:", found["unexpected_keys"])):
                if names:
                    raise _unusable(spec, f"its weights {fault} {', '.join(sorted(names)[:3])} ({len(names)} in all)")
        self.net.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> DiffusersAutoencoder:
        """Stays in evaluation mode."""
        return super().train(False)

    def encode(self, x_BCHW: Tensor) -> Tensor:
        """Pixels to the posterior's mean."""
        return self.net.encode(x_BCHW.to(self.net.dtype)).latent_dist.mode()

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Latent to pixels."""
        return self.net.decode(z_BCHW.to(self.net.dtype)).sample


def build(spec: FirstFrameSpec, *, pretrained: bool = True) -> nn.Module:
    """The autoencoder that the configuration names, without its weights where not ``pretrained``; raises InputError
    where they can't be loaded.
    """
    if isinstance(spec, OwnFirstFrame):
        return OwnAutoencoder(spec)
    return DiffusersAutoencoder(spec, pretrained) if isinstance(spec, DiffusersFirstFrame) else PlainFrame()


def layout(spec: FirstFrameSpec) -> tuple[int, int]:
    """(down, channels) of the latent, without building anything; raises InputError as :func:`build`."""
    if isinstance(spec, OwnFirstFrame):
        return spec.down, spec.channels
    if isinstance(spec, DiffusersFirstFrame):
        config = architecture(spec)
        return 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    return PlainFrame.down, PlainFrame.channels


def architecture(spec: DiffusersFirstFrame) -> dict[str, Any]:
    """The autoencoder's config.json, from the configuration or the source; raises InputError as :func:`build`."""
    config = spec.architecture or dict(_ask(spec, "load_config", **_source(spec)))
    if not {"block_out_channels", "latent_channels"} <= config.keys():
        raise _unusable(spec, f"its config.json is of {config.get('_class_name', 'something else')}")
    return config


def _source(spec: DiffusersFirstFrame) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": spec.source, "subfolder": spec.subfolder or None, "revision": spec.revision,
    }  # fmt: skip


def _ask(spec: DiffusersFirstFrame, method: str, *arguments: Any, **options: Any) -> Any:
    """``AutoencoderKL.method``, with every way to fail turned into one message."""
    try:
        from trainer.losses import torchvision_ops  # noqa: F401, I001  (before diffusers, which imports torchvision)
        from diffusers import AutoencoderKL
    except ImportError:
        raise InputError(
            "model.first_frame.kind is diffusers, and the library is not installed. "
            "Install it with `pip install 'moviola[models]'`, or choose kind: own or kind: frame."
        ) from None
    try:
        return getattr(AutoencoderKL, method)(*arguments, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        lines = str(error).strip().split("\n")
        raise _unusable(spec, " ".join(line.strip() for line in lines[:2]).rstrip(".")) from None


def _unusable(spec: DiffusersFirstFrame, reason: str) -> InputError:
    return InputError(
        f"model.first_frame: source {spec.source!r}, subfolder {spec.subfolder!r} can't be loaded as an "
        f"AutoencoderKL: {reason}. Give a folder that `save_pretrained` wrote or a hub name that you may read, or "
        "choose kind: own."
    )
