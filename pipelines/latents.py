"""A stored latent of one clip, ``KEY.safetensors`` as ``moviola encode`` writes it -> arrays by name, with masks.

The file holds the codec's stream: tensor ``00000012.motion`` is the tensor ``motion`` of step 12, (1, C, *tokens). Here
the steps of a name are joined along the first token axis: ``motion_C*``, as the dataset's :class:`LatentLayout` says.

Legend: C channels; the other axes are tokens, as many as the codec has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from pipelines.clips import read_caption
from pipelines.contracts import Clip, LatentLayout, LatentTensor, Source
from pipelines.faults import InputError, Skip
from pipelines.index import Dataset

Arrays = dict[str, Tensor]


def parse(data: bytes, name: str) -> Arrays:
    """The tensors of a file by ``STEP.NAME``; raises Skip("corrupt") for what is not safetensors."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise Skip("corrupt", f"{name}: not a safetensors file: {error}") from None


def join(steps: Mapping[str, Tensor], layout: LatentLayout, name: str, arrays: Arrays, masks: Arrays) -> None:
    """Writes a file's tensors to ``arrays`` (C, *tokens) and ``masks`` (*tokens), zero and False where there are none.

    Raises Skip("layout") for a file that is not of the layout.
    """
    for title, tensor in layout.tensors.items():
        array, mask = arrays[title].zero_(), masks[title].fill_(False)
        first = 0
        for step, length in tensor.parts:
            part = steps.get(f"{step:08d}.{title}")
            if part is None or not part.is_floating_point() or not _is_of(part, tensor, length):
                found = "missing" if part is None else f"{part.dtype} {list(part.shape)}".removeprefix("torch.")
                expected = [1, tensor.channels, length, *tensor.tokens[1:]]
                raise Skip("layout", f"{name}: {title} of step {step} is {found}; the dataset's card says {expected}")
            where = (slice(first, first + part.shape[2]), *(slice(0, size) for size in part.shape[3:]))
            array[:, *where] = part[0]
            mask[where] = True
            first += length


def _is_of(part: Tensor, tensor: LatentTensor, length: int) -> bool:
    expected, found = (1, tensor.channels, length, *tensor.tokens[1:]), tuple(part.shape)
    shorter = tensor.lengths and len(found) == len(expected) and found[-1] <= expected[-1]
    return found == expected or bool(shorter and found[:-1] == expected[:-1])


def split(arrays: Mapping[str, Tensor], layout: LatentLayout) -> list[Arrays]:
    """The stream that a codec decodes, from arrays (1, C, *tokens): the inverse of :func:`join`."""
    stream: list[Arrays] = [{} for _ in range(layout.steps)]
    for title, tensor in layout.tensors.items():
        first = 0
        for step, length in tensor.parts:
            stream[step][title] = arrays[title][:, :, first : first + length]
            first += length
    for key, values in layout.constants.items():
        step, _, title = key.partition(".")
        stream[int(step)][title] = torch.tensor(values)
    return stream


def empty(layout: LatentLayout | None, *batch: int) -> tuple[Arrays, Arrays]:
    """Arrays (*batch, C, *tokens) and masks (*batch, *tokens) for a layout; none without one."""
    tensors = layout.tensors if layout else {}
    arrays = {title: torch.zeros(*batch, *tensor.shape) for title, tensor in tensors.items()}
    return arrays, {title: torch.zeros(*batch, *t.tokens, dtype=torch.bool) for title, t in tensors.items()}


def make_latents(
    data: bytes,
    record: np.void,
    layout: LatentLayout,
    place: int,
    source: Source,
    *,
    caption: bytes | None = None,
    caption_width: int | None = None,
    substitute: int = 0,
    arrays: Arrays,
    masks: Arrays,
) -> Clip:
    """The clip at ``place``, stored as latents: written to ``arrays`` and ``masks``, which it then refers to.

    Raises Skip for what is corrupt or of another layout.
    """
    join(parse(data, str(source)), layout, str(source), arrays, masks)
    return Clip(
        pixels_CTHW=torch.empty(3, 0, int(record["height"]), int(record["width"])),
        fps=float(record["fps"]),
        motion=float(record["motion"]),
        place=place,
        source=source,
        caption_emb_LD=read_caption(caption, str(source), caption_width) if caption else None,
        substitute=substitute,
        arrays=arrays,
        masks=masks,
    )


def common_layout(datasets: Sequence[Dataset]) -> LatentLayout | None:
    """What the datasets of a mixture hold of each clip, None for pixels; raises InputError where that differs."""
    first = datasets[0]
    for other in datasets[1:]:
        if (first.latents is None) != (other.latents is None):
            raise InputError(f"{first.name} and {other.name} are datasets of pixels and of latents; train on one kind")
        if first.latents and other.latents and _kind(first.latents) != _kind(other.latents):
            raise InputError(
                f"{first.name} and {other.name} hold latents of different layouts or codecs "
                f"({first.latents.codec['weights'][:12]} and {other.latents.codec['weights'][:12]}); encode both with "
                "one checkpoint, at one size and number of frames"
            )
    return first.latents


def _kind(layout: LatentLayout) -> tuple[object, ...]:
    shapes = {title: (tensor.shape, tensor.parts) for title, tensor in layout.tensors.items()}
    return layout.codec["weights"], layout.steps, shapes, dict(layout.constants)
