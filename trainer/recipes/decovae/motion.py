"""Scale-space flow: Agustsson, Minnen, Johnston, Balle, Hwang and Toderici, "Scale-space flow for end-to-end optimized
video compression", CVPR 2020; the motion module M (equation 4) and the warp W (equation 5) of DeCo-VAE.

A motion is three fields: a flow (x, y) and a scale. It moves every pixel and blurs it: the frame becomes a volume of
ever stronger Gaussian blurs, and W looks it up at (x + flow_x, y + flow_y, scale).

Units are those of CompressAI's `ssf2020`, so that its weights fit: all three in [-1, 1] across the frame or the volume.
A flow of 2 / W is a pixel; scale -1 is unblurred, 0 the middle of the volume.

Legend: B clips, C channels (3, RGB), T frames, H height, W width, S slices of the volume, N = B * T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.recipes.decovae.config import MotionSpec

LEVELS = 5
SLICES = LEVELS + 1
SIGMA = 1.5
SHARP = 1.2 / SLICES - 1
"""The scale just behind the unblurred slice, where the border of the volume does not yet stop the gradient."""
MULTIPLE = 16
"""Of height and width: four convolutions halve them."""
PREFIX = {"motion_encoder.": "encoder.", "motion_decoder.": "decoder."}


class MotionModule(nn.Module):
    """M: (x_t, x_0) -> m_t. Convolutions and names are those of CompressAI's `ssf2020`, without its entropy model.

    Starts from next to no motion and no blur. Hidden layers keep the strength of what passes (He et al., ICCV 2015):
    PyTorch's own start leaves a thousandth of it before the last layer, and the first hundred steps then learn one blur
    for all frames (docs/lab_log.md). The first layer sees contrasts, not brightness.
    """

    def __init__(self, spec: MotionSpec) -> None:
        super().__init__()
        widths = (6, spec.width, spec.width, spec.width, spec.latent)
        back = (spec.latent, spec.width, spec.width, spec.width, 3)
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        for a, b in pairwise(widths):
            self.encoder.extend((nn.Conv2d(a, b, 5, 2, 2), nn.ReLU()))
        for a, b in pairwise(back):
            self.decoder.extend((nn.ConvTranspose2d(a, b, 5, 2, 2, output_padding=1), nn.ReLU()))
        del self.encoder[-1], self.decoder[-1]
        for layer in (*self.encoder[::2], *self.decoder[:-1:2]):
            met = layer.in_channels * (25 if isinstance(layer, nn.Conv2d) else 25 / 4)  # weights that meet in an output
            nn.init.normal_(layer.weight, std=math.sqrt(2 / met))
            nn.init.zeros_(layer.bias)
        last: nn.ConvTranspose2d = self.decoder[-1]
        nn.init.normal_(last.weight, std=1e-3 / math.sqrt(spec.width))
        with torch.no_grad():
            self.encoder[0].weight -= self.encoder[0].weight.mean((1, 2, 3), keepdim=True)
            last.bias.copy_(torch.tensor([0.0, 0.0, SHARP]))

    def forward(self, x_B3THW: Tensor, keyframe_B3HW: Tensor) -> Tensor:
        """Equation 4 for every frame: pixels in [-1, 1] -> motion (B, 3, T, H, W), float32."""
        frames = x_B3THW.shape[2]
        x_N3HW = x_B3THW.transpose(1, 2).flatten(0, 1)
        pairs_N6HW = torch.cat((x_N3HW, keyframe_B3HW.repeat_interleave(frames, dim=0)), dim=1)
        motion_N3HW = self.decoder(self.encoder((pairs_N6HW + 1) / 2)).float()
        return motion_N3HW.unflatten(0, (-1, frames)).transpose(1, 2)


def gaussian_volume(x_BCHW: Tensor) -> Tensor:
    """(B, C, S, H, W): the frame, its blur, and four more, each blurred again at half the resolution of the one before.

    Height and width are multiples of 16.
    """
    volume = [x_BCHW, _blur(x_BCHW)]
    coarse = volume[-1]
    for halvings in range(1, LEVELS):
        fine = coarse = _blur(F.avg_pool2d(coarse, 2))
        for _ in range(halvings):
            fine = F.interpolate(fine, scale_factor=2, mode="bilinear", align_corners=False)
        volume.append(fine)
    return torch.stack(volume, dim=2)


def _blur(x_BCHW: Tensor) -> Tensor:
    reach = math.ceil(3 * SIGMA)
    taps = [math.exp(-0.5 * (k / SIGMA) ** 2) for k in range(-reach, reach + 1)]
    for dim in (-1, -2):
        pad = (reach, reach, 0, 0) if dim == -1 else (0, 0, reach, reach)
        padded = F.pad(x_BCHW, pad, mode="replicate")
        size = x_BCHW.shape[dim]
        x_BCHW = sum(padded.narrow(dim, k, size) * (tap / sum(taps)) for k, tap in enumerate(taps))
    return x_BCHW


def warp(keyframe_BCHW: Tensor, motion_B3THW: Tensor) -> Tensor:
    """W of equations 5 and 8: the keyframe looked up by each frame's motion, (B, C, T, H, W), in float32.

    Trilinear in x, y and scale; the border is repeated.
    """
    with torch.autocast(keyframe_BCHW.device.type, enabled=False):
        volume_BCSHW = gaussian_volume(keyframe_BCHW.float())
        height, width = keyframe_BCHW.shape[-2:]
        x_W = (torch.arange(width, device=keyframe_BCHW.device) + 0.5) * (2 / width) - 1
        y_H1 = ((torch.arange(height, device=keyframe_BCHW.device) + 0.5) * (2 / height) - 1)[:, None]
        motion_B3THW = motion_B3THW.float()
        at_BTHW3 = torch.stack((motion_B3THW[:, 0] + x_W, motion_B3THW[:, 1] + y_H1, motion_B3THW[:, 2]), dim=-1)
        return F.grid_sample(volume_BCSHW, at_BTHW3, padding_mode="border", align_corners=False)


def flow_in_pixels(motion_B3THW: Tensor) -> Tensor:
    """The flow (B, 2, T, H, W) of a motion, in pixels."""
    height, width = motion_B3THW.shape[-2:]
    return motion_B3THW[:, :2] * motion_B3THW.new_tensor([width / 2, height / 2]).view(2, 1, 1, 1)


@torch.no_grad()
def load_ssf2020(module: MotionModule, path: str) -> None:
    """Reads the motion encoder and decoder of a state dict in CompressAI's `ssf2020` layout; the rest is left unread.

    A ``.safetensors`` file, or one of ``torch.save`` (tensors only). Raises InputError naming what does not fit.
    """
    found = {}
    for name, tensor in _read(path).items():
        for theirs, ours in PREFIX.items():
            if name.startswith(theirs):
                found[ours + name.removeprefix(theirs)] = tensor
    wanted = dict(module.named_parameters())
    wrong = [f"{_theirs(name)} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{_theirs(name)} is not known" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{_theirs(name)} is {list(found[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted.keys() & found.keys()
        if found[name].shape != wanted[name].shape
    ]
    if wrong:
        raise InputError(
            f"model.motion.weights {path!r} are not the motion module's of ssf2020: {'; '.join(sorted(wrong)[:3])}"
            f"{f' and {len(wrong) - 3} more' if len(wrong) > 3 else ''}. Take a checkpoint of CompressAI's ssf2020 and "
            "leave model.motion.width and latent at their defaults."
        )
    for name, parameter in wanted.items():
        parameter.copy_(found[name])


def _theirs(name: str) -> str:
    return next(theirs + name.removeprefix(ours) for theirs, ours in PREFIX.items() if name.startswith(ours))


def _read(path: str) -> Mapping[str, Tensor]:
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"model.motion.weights {path!r} can't be read: {reason}. Give a state dict's path.") from None
    except Exception as error:  # the unpickler refuses what is not tensors with errors of its own
        raise InputError(
            f"model.motion.weights {path!r} can't be read: {type(error).__name__}: it holds more than tensors, or is "
            "no state dict."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"model.motion.weights {path!r} hold no state dict of tensors.")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
