"""Decoded frames -> a training clip: which frames, resized, cropped and flipped as (seed, place) says.

Legend: C channels (3, RGB), T frames, H height, W width, L text tokens, D embedding width.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from pipelines.contracts import Clip, ClipRule, Source
from pipelines.decode import Backend, open_video
from pipelines.faults import InputError, Skip
from pipelines.index import IMAGE
from pipelines.order import Crop, crop, frame_numbers


def make_clip(
    data: bytes,
    record: np.void,
    rule: ClipRule,
    size: tuple[int, int],
    seed: int,
    place: int,
    source: Source,
    *,
    caption: bytes | None = None,
    caption_width: int | None = None,
    substitute: int = 0,
    out_CTHW: Tensor | None = None,
    backend: Backend | None = None,
) -> Clip:
    """The clip at ``place``, cut out of the stored video or image ``data`` that ``record`` of the index describes.

    The same arguments give the same pixels, bit for bit, written to ``out_CTHW`` where it is given. Raises Skip for a
    clip that is corrupt or, where the rule says so, too short; else InputError.
    """
    image = record["kind"] == IMAGE
    stored = 1 if image else int(record["frames"])
    numbers = frame_numbers(rule, stored, seed, place)
    if numbers is None:
        remedy = "pack longer clips" if rule.short == "skip" else "set clip.short: skip"
        message = (
            f"{source}: {stored} frames; a clip of {rule.frames} frames at stride {rule.stride[0]} needs "
            f"{rule.least_frames}. Lower clip.frames or {remedy}"
        )
        raise Skip("short", message) if rule.short == "skip" else InputError(message)
    with open_video(data, str(source), image=image, backend=backend) as video:
        how = crop(rule, (video.height, video.width), size, seed, place)
        frames_TCHW = video.read(numbers, (how.height, how.width))
    stride = (numbers[-1] - numbers[0]) / max(1, len(numbers) - 1) or 1.0
    return Clip(
        pixels_CTHW=cut(frames_TCHW, how, size, out_CTHW),
        fps=float(record["fps"]) / stride,
        motion=float(record["motion"]),
        place=place,
        source=source,
        caption_emb_LD=read_caption(caption, str(source), caption_width) if caption else None,
        substitute=substitute,
    )


def cut(frames_TCHW: Tensor, how: Crop, size: tuple[int, int], out_CTHW: Tensor | None = None) -> Tensor:
    """Resized uint8 ``frames_TCHW`` cropped to ``size`` and flipped, as ``pixels_CTHW`` float32 in [-1, 1]."""
    frames_TCHW = frames_TCHW[:, :, how.top : how.top + size[0], how.left : how.left + size[1]]
    if how.flip:
        frames_TCHW = frames_TCHW.flip(3)
    out_CTHW = torch.empty((3, len(frames_TCHW), *size)) if out_CTHW is None else out_CTHW
    return out_CTHW.copy_(frames_TCHW.permute(1, 0, 2, 3)).mul_(1 / 127.5).sub_(1.0)


def read_caption(data: bytes, name: str, width: int | None = None) -> Tensor:
    """A stored ``.t5.npy`` as ``caption_emb_LD`` float32; raises Skip("caption") for anything but floats (L, width)."""
    try:
        value = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise Skip("caption", f"{name}: {error}") from None
    if value.ndim != 2 or value.dtype.kind != "f" or width not in (None, value.shape[1]):
        wanted = "2-D floats" if width is None else f"floats of (tokens, {width})"
        raise Skip("caption", f"{name}: an array of {value.dtype} {value.shape}, not {wanted}")
    return torch.from_numpy(value.astype(np.float32))
