"""LPIPS: Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep Features", CVPR 2018, eq. 1.

The distance is the ``lpips`` package's, with its linear weights of version 0.1. The backbone's weights are ImageNet's,
which torchvision downloads; where they can't be had, a seeded random backbone still measures *a* distance, but another
one. So a distance never travels without ``Perceptual.name``, and values under different names must not be compared.

Legend: B clips, C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pipelines.contracts import generator
from pipelines.faults import InputError

LEAST_SIZE = {"alex": 31, "vgg": 16}
PUBLISHED = {"alex": "AlexNet_Weights.IMAGENET1K_V1", "vgg": "VGG16_Weights.IMAGENET1K_V1"}
RANDOM_SEED = 20180618


class PerceptualSpec(BaseModel):
    """Which LPIPS: the backbone and where its weights come from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    backbone: Literal["alex", "vgg"] = Field("alex", description="AlexNet, usual for measuring; VGG16, for training.")
    weights: str = Field(
        "torchvision",
        min_length=1,
        description="`torchvision` downloads the published ImageNet weights; `random` is a seeded random backbone; "
        "else a path or http(s) URL of a torchvision state dict.",
    )


class Perceptual(nn.Module):
    """Frozen LPIPS; ``name`` says which. Always in evaluation mode and without trainable parameters."""

    def __init__(self, spec: PerceptualSpec) -> None:
        """Raises InputError where the weights can't be had or don't fit the backbone."""
        super().__init__()
        self.spec = spec
        self.net = _skeleton(spec.backbone)
        trunk: nn.Module = self.net.get_submodule("net")
        if spec.weights == "random":
            _fill_at_random(trunk, spec.backbone)
            self.name = f"{spec.backbone} (random weights)"
        else:
            state, origin = _published(spec) if spec.weights == "torchvision" else _stored(spec)
            _fill(trunk, state, spec)
            self.name = f"{spec.backbone} ({origin})"
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Perceptual:
        """Stays in evaluation mode: LPIPS's dropout belongs to the fitting of its linear weights."""
        return super().train(False)

    def forward(self, x_BCTHW: Tensor, y_BCTHW: Tensor) -> Tensor:
        """Distance of each frame, (B, T), 0 for equal frames; pixels in [-1, 1]; differentiable in both arguments.

        Raises InputError for frames that are too small for the backbone.
        """
        batch, _, frames, height, width = x_BCTHW.shape
        least = LEAST_SIZE[self.spec.backbone]
        if min(height, width) < least:
            raise InputError(
                f"LPIPS with the {self.spec.backbone} backbone needs frames of at least {least} x {least} pixels; "
                f"these have {height} x {width}. Use larger clips, or another backbone."
            )
        x_NCHW, y_NCHW = (v.float().transpose(1, 2).flatten(0, 1) for v in (x_BCTHW, y_BCTHW))
        with torch.autocast(x_NCHW.device.type, enabled=False):
            return self.net(x_NCHW, y_NCHW).view(batch, frames)


def _skeleton(backbone: str) -> nn.Module:
    """LPIPS with its own linear weights and an unset backbone. Never touches the global random stream."""
    from trainer.losses import torchvision_ops  # noqa: F401, I001  (before lpips, which imports torchvision)
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # lpips passes torchvision an argument that torchvision renamed
        metric = lpips.LPIPS(net=backbone, pretrained=False, pnet_rand=True, verbose=False)
    metric.to_empty(device="cpu")
    with torch.device("cpu"):
        metric.scaling_layer = lpips.ScalingLayer()
    path = Path(lpips.__file__).parent / "weights" / "v0.1" / f"{backbone}.pth"
    linear = torch.load(path, map_location="cpu", weights_only=True)
    for name, weight in linear.items():
        metric.get_parameter(name).data.copy_(weight)
    return metric


def _fill_at_random(trunk: nn.Module, backbone: str) -> None:
    """He initialisation, a pure function of the backbone's name: activations keep their scale with depth."""
    for place, (name, weight) in enumerate(sorted(trunk.named_parameters())):
        noise = generator(RANDOM_SEED, place, f"lpips/{backbone}/{name}")
        if weight.ndim == 1:
            weight.data.zero_()
        else:
            weight.data.normal_(0, math.sqrt(2 / weight[0].numel()), generator=noise)


def _published(spec: PerceptualSpec) -> tuple[dict[str, Tensor], str]:
    from trainer.losses import torchvision_ops  # noqa: F401, I001
    import torchvision

    weights = torchvision.models.get_weight(PUBLISHED[spec.backbone])
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub tells of a download where results go
            return weights.get_state_dict(progress=False, check_hash=True), "torchvision ImageNet weights"
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"The ImageNet weights of LPIPS's {spec.backbone} backbone can't be downloaded from {weights.url}: "
            f"{error}. Set the perceptual metric's weights to the path or URL of a copy, or to `random` (its distances "
            "can't be compared with published ones)."
        ) from None


def _stored(spec: PerceptualSpec) -> tuple[dict[str, Tensor], str]:
    try:
        if spec.weights.startswith(("http://", "https://")):
            with contextlib.redirect_stdout(sys.stderr):
                state = torch.hub.load_state_dict_from_url(
                    spec.weights, map_location="cpu", progress=False, weights_only=True
                )
        else:
            state = torch.load(spec.weights, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a file that is missing, torn or not weights
        reason = str(error).split("\n")[0]
        raise InputError(
            f"LPIPS backbone weights {spec.weights!r} can't be read: {type(error).__name__}: {reason}. Give the path "
            f"or URL of torchvision's {spec.backbone} state dict (tensors only), or set the weights to `random`."
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"LPIPS backbone weights {spec.weights!r} hold a {type(state).__name__}, not a state dict.")
    return state, f"weights {Path(spec.weights).name} {_digest(state)}"


def _fill(trunk: nn.Module, state: dict[str, Any], spec: PerceptualSpec) -> None:
    """Copies torchvision's ``features.N.weight`` into lpips' slices, which keep N as the name of each layer."""
    faults = []
    for name, weight in trunk.named_parameters():
        key = "features." + name.split(".", 1)[1]
        found = state.get(key)
        if not isinstance(found, Tensor):
            faults.append(f"{key} is missing")
        elif found.shape != weight.shape:
            faults.append(f"{key} is {tuple(found.shape)}, not {tuple(weight.shape)}")
        else:
            weight.data.copy_(found)
    if faults:
        raise InputError(
            f"LPIPS backbone weights {spec.weights!r} are not those of torchvision's {spec.backbone}: "
            f"{'; '.join(faults[:3])}{f' and {len(faults) - 3} more' if len(faults) > 3 else ''}."
        )


def _digest(state: dict[str, Any]) -> str:
    """Eight hexadecimal digits that tell two backbones of one file name apart."""
    digest = hashlib.blake2b(digest_size=4)
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor) and name.startswith("features."):
            digest.update(name.encode())
            digest.update(value.float().contiguous().numpy().tobytes())
    return digest.hexdigest()
