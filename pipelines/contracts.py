"""The types that flow from shards to the training step. All are frozen.

Legend: B clips, C channels (3, RGB), T frames, H height, W width, L text tokens, D embedding width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # at run time where it is used: it takes seconds to import, which packing and lists need not wait for
    import torch
    from torch import Tensor

Stream = Literal["video", "image"]
PositiveInt = Annotated[int, Field(gt=0)]
Frames = Annotated[int, Field(gt=0, le=1 << 16)]
Side = Annotated[int, Field(gt=0, le=1 << 14)]


class ClipRule(BaseModel):
    """How a stage cuts a training clip out of a stored one. Data, not code: part of a Stage and of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    frames: Frames = Field(description="Frames T of a clip; 1 for images.")
    stride: tuple[Frames, Frames] = Field(
        (1, 1), description="Least and greatest distance between neighbouring frames, in stored frames, both included."
    )
    stride_per: Literal["clip", "gap"] = Field(
        "clip", description="Draw one stride for the whole clip, or one for each gap between neighbours (ARVAE)."
    )
    sizes: tuple[tuple[Side, Side], ...] = Field(
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


class LatentTensor(BaseModel):
    """One named tensor of a stored latent: C channels over a grid of tokens.

    ``mean`` and ``std`` are those of each channel over all tokens of the dataset. ``parts`` are the steps of the
    codec's stream that hold the name, with their lengths along the first token axis: (step, length). ``lengths`` counts
    clips by the length of the last axis; it is empty where all clips have the whole of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1, description="Greatest length of each token axis.")]
    parts: Annotated[tuple[tuple[Annotated[int, Field(ge=0)], PositiveInt], ...], Field(min_length=1)]
    mean: Annotated[tuple[float, ...], Field(min_length=1)]
    std: tuple[Annotated[float, Field(gt=0)], ...]
    lengths: Mapping[Annotated[int, Field(ge=0)], PositiveInt] = Field(default_factory=dict)

    @property
    def channels(self) -> int:
        """C."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, *tokens)."""
        return (self.channels, *self.tokens)

    @model_validator(mode="after")
    def _fits(self) -> LatentTensor:
        if len(self.std) != len(self.mean):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} standard deviations")
        if self.lengths and (len(self.parts) > 1 or max(self.lengths) > self.tokens[-1]):
            raise ValueError(
                f"lengths up to {max(self.lengths)} in {len(self.parts)} steps of {self.tokens[-1]} tokens"
            )
        return self


class LatentLayout(BaseModel):
    """What a dataset of latents holds of each clip, the same for all: part of its card, and of what trains on it.

    ``codec`` says what encoded them: ``recipe``, ``model`` (its configuration) and ``weights`` (their digest).
    ``frames``, ``height``, ``width`` (pixels) and ``fps`` (frames/s, the mean) are the clips'. ``constants`` are
    tensors of whole numbers, by their name in the file, that decoding needs and that are equal in all clips.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    codec: Mapping[str, Any]
    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    fps: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(gt=0, description="Steps of the codec's stream.")]
    tensors: Annotated[Mapping[str, LatentTensor], Field(min_length=1)]
    constants: Mapping[str, tuple[int, ...]] = Field(default_factory=dict)
    caption_width: Annotated[int, Field(ge=0, description="D of the clips' caption embeddings; 0 without.")] = 0
    text_encoder: str | None = Field(None, description="The T5 encoder that made them.")

    @property
    def numbers(self) -> int:
        """Latent numbers of a clip, at the greatest lengths."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


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
    """One decoded training clip, or the stored latents of one.

    ``pixels_CTHW`` float32 RGB in [-1, 1], of no frames where latents are stored; ``arrays`` these by name, float32
    (C, *tokens) in the codec's units, zero where ``masks`` (*tokens) is False; ``fps`` frames/s after the stride;
    ``motion`` the packer's score (mean absolute difference of neighbouring frames, [0, 1] grey levels; 0 for images);
    ``caption_emb_LD`` stored text embedding or None; ``place`` in the global sequence; ``substitute`` 0, or k when the
    clip of this place was skipped and the k-th substitute draw stands in for it.
    """

    pixels_CTHW: Tensor
    fps: float
    motion: float
    place: int
    source: Source
    caption_emb_LD: Tensor | None = None
    substitute: int = 0
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One global batch, decided by arithmetic before anything is read.

    ``step`` counts optimizer steps of the whole run from 0; ``place`` is the first place of the batch in the global
    sequence and ``stream_place`` the first in its own stream's sequence; ``size`` is the (height, width) of the bucket.
    ``per_clip`` of them count as one clip of a micro-batch: as many images as a clip of the stage has frames.
    """

    step: int
    stage: str
    place: int
    clips: int
    stream: Stream
    stream_place: int
    size: tuple[int, int]
    rule: ClipRule
    per_clip: int = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank.

    ``pixels_BCTHW`` float32 in [-1, 1], of no frames where latents are stored: these are in ``arrays`` by name, float32
    (B, C, *tokens) in the codec's units, as long as the longest that the codec makes, zero where ``masks`` (B, *tokens)
    is False. ``fps_B`` frames/s; ``motion_B`` in [0, 1]; ``weight`` is this micro-batch's share of the global batch
    (all shares of a step add up to 1; 0 for a filler that only keeps ranks in step); ``caption_emb_BLD`` with
    ``caption_mask_BL`` (True where there is a token; all False for a missing caption), or None where the dataset has no
    captions. Randomness of a step comes from ``generator``, never from the global stream.
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
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def generators(self, purpose: str) -> list[torch.Generator]:
        """One CPU generator a clip, a pure function of (seed, place, purpose): the same on any rank and world size."""
        return [generator(self.seed, place, purpose) for place in self.places]

    def randn(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal noise (B, *shape) on the pixels' device, each clip's drawn from its own generator."""
        import torch

        noise = [torch.randn(shape, generator=g) for g in self.generators(purpose)]
        return torch.stack(noise).to(self.pixels_BCTHW.device)

    def rand(self, purpose: str, *shape: int) -> Tensor:
        """Uniform draws in [0, 1), (B, *shape), each clip's from its own generator."""
        import torch

        return torch.stack([torch.rand(shape, generator=g) for g in self.generators(purpose)]).to(
            self.pixels_BCTHW.device
        )

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("pixels_BCTHW", "fps_B", "motion_B", "caption_emb_BLD", "caption_mask_BL")
            if getattr(self, name) is not None
        }
        for name in ("arrays", "masks"):
            moved[name] = {key: value.to(device, non_blocking=True) for key, value in getattr(self, name).items()}
        return dataclasses.replace(self, **moved)


def derive(seed: int, place: int, purpose: str) -> int:
    """A 63-bit integer that is a pure function of its arguments, on every platform."""
    digest = hashlib.blake2b(f"{seed}/{place}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, place: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive`."""
    import torch

    return torch.Generator().manual_seed(derive(seed, place, purpose))
