"""The types that flow from shards to the training step. All are frozen.

Legend: B clips, C channels (3, RGB), T frames, H height, W width, L text tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Stream = Literal["video", "image"]
PositiveInt = Annotated[int, Field(gt=0)]


class ClipRule(BaseModel):
    """How a stage cuts a training clip out of a stored one. Data, not code: part of a Stage and of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frames: PositiveInt = Field(description="Frames T of a clip; 1 for images.")
    stride: tuple[PositiveInt, PositiveInt] = Field(
        (1, 1), description="Least and greatest distance between neighbouring frames, in stored frames, both included."
    )
    stride_per: Literal["clip", "gap"] = Field(
        "clip", description="Draw one stride for the whole clip, or one for each gap between neighbours (ARVAE)."
    )
    sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        min_length=1, description="(height, width) buckets in pixels; one is drawn for each global batch."
    )
    crop: Literal["center", "random"] = Field("random", description="Where the crop lies after resizing to cover.")
    flip: float = Field(0.5, ge=0, le=1, description="Probability of a horizontal flip.")
    short: Literal["skip", "fail"] = Field("skip", description="What a stored clip with too few frames does.")

    @model_validator(mode="after")
    def _ordered(self) -> ClipRule:
        if self.stride[0] > self.stride[1]:
            raise ValueError(f"stride {list(self.stride)}: the least stride comes first")
        return self

    @property
    def least_frames(self) -> int:
        """Stored frames that the shortest draw needs."""
        return (self.frames - 1) * self.stride[0] + 1


@dataclass(frozen=True, slots=True)
class Source:
    """Where a clip came from. ``str()`` is ``dataset/shard/key``, as in traces and error messages."""

    dataset: str
    shard: str
    key: str

    def __str__(self) -> str:
        return f"{self.dataset}/{self.shard}/{self.key}"


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded training clip.

    ``pixels_CTHW`` float32 RGB in [-1, 1]; ``fps`` frames/s after the stride; ``motion`` the packer's score (mean
    absolute difference of neighbouring frames, [0, 1] grey levels; 0 for images); ``caption_emb_LD`` stored text
    embedding or None; ``place`` in the global sequence; ``substitute`` 0, or k when the clip of this place was skipped
    and the k-th substitute draw stands in for it.
    """

    pixels_CTHW: Tensor
    fps: float
    motion: float
    place: int
    source: Source
    caption_emb_LD: Tensor | None = None
    substitute: int = 0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One global batch, decided by arithmetic before anything is read.

    ``step`` counts optimizer steps of the whole run from 0; ``place`` is the first place of the batch in the global
    sequence and ``stream_place`` the first in its own stream's sequence; ``size`` is the (height, width) of the bucket.
    """

    step: int
    stage: str
    place: int
    clips: int
    stream: Stream
    stream_place: int
    size: tuple[int, int]
    rule: ClipRule


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank.

    ``pixels_BCTHW`` float32 in [-1, 1]; ``fps_B`` frames/s; ``motion_B`` in [0, 1]; ``weight`` is this micro-batch's
    share of the global batch (all shares of a step add up to 1; 0 for a filler that only keeps ranks in step);
    ``caption_emb_BLD`` with ``caption_mask_BL`` (True where there is a token; all False for a missing caption), or None
    where the dataset has no captions. Randomness of a step comes from ``generator``, never from the global stream.
    """

    pixels_BCTHW: Tensor
    fps_B: Tensor
    motion_B: Tensor
    places: tuple[int, ...]
    sources: tuple[Source, ...]
    plan: BatchPlan
    weight: float
    seed: int
    caption_emb_BLD: Tensor | None = None
    caption_mask_BL: Tensor | None = None
    substitutes: tuple[int, ...] = field(default=())

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One CPU generator a clip, a pure function of (seed, place, purpose): the same on any rank and world size."""
        return [generator(self.seed, place, purpose) for place in self.places]

    def randn(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal noise (B, *shape) on the pixels' device, each clip's drawn from its own generator."""
        noise = [torch.randn(shape, generator=g) for g in self.generators(purpose)]
        return torch.stack(noise).to(self.pixels_BCTHW.device)

    def rand(self, purpose: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape), each clip's from its own generator."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators(purpose)]).to(
            self.pixels_BCTHW.device
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        import dataclasses

        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("pixels_BCTHW", "fps_B", "motion_B", "caption_emb_BLD", "caption_mask_BL")
            if getattr(self, name) is not None
        }
        return dataclasses.replace(self, **moved)


def derive(seed: int, place: int, purpose: str) -> int:
    """A 63-bit integer that is a pure function of its arguments, on every platform."""
    digest = hashlib.blake2b(f"{seed}/{place}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, place: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, place, purpose))
