"""What ``moviola pack`` does to footage, as data: the rules files in ``manifests/datasets``."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines import strict_yaml
from pipelines.faults import InputError

Positive = Annotated[int, Field(gt=0)]
EvenSize = Annotated[int, Field(ge=16, multiple_of=2)]


class Card(BaseModel):
    """What a dataset is, for the people who use it. Copied into ``index.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field("", description="The dataset's name; empty takes the last part of the destination.")
    licence: str = Field("", description="Licence of the footage, in words or as an SPDX identifier.")
    homepage: str = Field("", description="Where the dataset is published.")
    citation: str = Field("", description="The paper to cite.")
    obtain: str = Field("", description="How to get the footage and lay it out, so that these rules find it.")
    text_encoder: str | None = Field(
        None, description="Weights path or hub name of the T5 encoder whose embeddings the clips carry."
    )


class CaptionTable(BaseModel):
    """A table of captions in the source: ``.csv``, ``.tsv``, ``.jsonl``, or ``.json`` (a list of objects).

    A column name with dots leads into nested objects.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: str = Field(description="Path of the table, relative to the source.")
    key: str = Field("key", description="Column with the video: its path, its file name, or either without suffix.")
    text: str = Field("caption", description="Column with the caption.")


class PackRules(BaseModel):
    """How videos become clips. Every field changes what is stored, so a packing resumes only under equal rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    card: Card = Card()

    # What is taken.
    frames: Positive = Field(64, description="Greatest length of a clip, in stored frames.")
    least_frames: Positive = Field(16, description="Shorter pieces are dropped; images are exempt.")
    fps: float | None = Field(
        None, gt=0, le=1000, description="Greatest frame rate: faster footage is thinned out, slower is kept as it is."
    )
    cuts: bool = Field(True, description="End clips at scene changes.")
    clips_per_video: Positive | None = Field(
        None, description="At most so many clips of a video, spread evenly over its length."
    )
    members: str | None = Field(None, description="A text file in the source, one path a line: nothing else is packed.")
    root: str = Field("", description="Folder of the source that holds the footage; paths in `members` start there.")
    include: tuple[str, ...] = Field(("*",), description="Patterns of paths below `root`; one must match.")
    image_folders: float | None = Field(
        None, gt=0, description="Frames/s of folders of images that are videos; unset, an image is a one-frame clip."
    )
    captions: CaptionTable | None = Field(None, description="Table of captions; sidecar files need no rule.")

    # What is held back.
    holdout: float = Field(0.0, ge=0, le=0.5, description="Share of the source videos that goes to DEST/eval.")
    group: str | None = Field(
        None, description="Pattern whose first group in a path names its source: one source is never on both sides."
    )
    seed: int = Field(0, ge=0, description="Of the order of the videos, which also decides what is held back.")

    # How it is stored.
    size: tuple[EvenSize, EvenSize] | None = Field(
        None, description="(height, width) in pixels: resized to cover it, then cropped."
    )
    short_side: EvenSize | None = Field(None, description="Length of the shorter side in pixels.")
    crop: Literal["center", "random"] = Field("center", description="Where the crop of `size` lies.")
    upscale: bool = Field(False, description="Whether footage smaller than `size` or `short_side` is enlarged.")
    encode: Literal["h264", "copy"] = Field("h264", description="Re-encode, or copy the stream between keyframes.")
    crf: int = Field(20, ge=0, le=51, description="x264's constant rate factor: lower is better and larger.")
    keyframes: Positive = Field(
        16, description="Frames between keyframes: fewer decode faster at random, and weigh more."
    )
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow"] = "medium"
    shard_clips: Positive = Field(10_000, description="At most so many clips in a shard.")
    shard_bytes: Positive = Field(1 << 30, description="At most so many bytes in a shard, but always one clip.")

    @field_validator("group")
    @classmethod
    def _pattern(cls, group: str | None) -> str | None:
        if group is not None:
            try:
                groups = re.compile(group).groups
            except re.error as error:
                raise ValueError(f"{group!r} is not a regular expression: {error}") from None
            if groups < 1:
                raise ValueError(f"{group!r} has no group in parentheses to name the source video")
        return group

    @field_validator("members", "root")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        if path and (PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts):
            raise ValueError(f"{path!r} must be a path inside the source")
        return path

    @model_validator(mode="after")
    def _consistent(self) -> PackRules:
        if self.least_frames > self.frames:
            raise ValueError(f"least_frames {self.least_frames} is more than frames {self.frames}")
        if self.size and self.short_side:
            raise ValueError("size and short_side exclude each other; leave one out")
        if self.encode == "copy":
            changed = [name for name in ("fps", "size", "short_side", "image_folders") if getattr(self, name)]
            if changed:
                raise ValueError(f"encode: copy keeps the stream as it is, so {' and '.join(changed)} can't be set")
        return self


def load_rules(url: str | None = None, sets: Sequence[str] = ()) -> PackRules:
    """Reads a rules file (YAML), or takes the defaults; then applies settings such as ``card.name=mine``.

    Raises InputError with every fault in one message.
    """
    values: Any = {}
    if url:
        values = strict_yaml.mapping(strict_yaml.read(url, "rules"), url, "pack rules are")
    for setting in sets:
        field, equals, value = setting.partition("=")
        if not equals or not field:
            raise InputError(f"--set {setting}: write FIELD=VALUE, for example frames=49", status=2)
        *outer, last = field.split(".")
        inner = values
        for name in outer:
            inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
        if not isinstance(inner, dict):
            raise InputError(f"--set {setting}: {'.'.join(outer)} has no fields", status=2)
        try:
            inner[last] = strict_yaml.value(value)
        except strict_yaml.UNREADABLE:
            inner[last] = value
    try:
        return PackRules.model_validate(values)
    except ValidationError as error:
        count = error.error_count()
        head = f"{url or '--set'}: {count} fault{'s' * (count > 1)}\n"
        raise InputError(head + _listed(error), status=2) from None


def _listed(error: ValidationError) -> str:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "rules"
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] not in ("value_error", "missing"):
            message = f"{json.dumps(fault['input'], default=str)[:80]}: {message[0].lower()}{message[1:]}"
        if fault["type"] == "extra_forbidden":
            message = f"is not a field; there are {', '.join(PackRules.model_fields)}"
            if near := difflib.get_close_matches(str(fault["loc"][-1]), PackRules.model_fields, n=1):
                message += f". Did you mean {near[0]!r}?"
        lines.append(f"  {where}: {message}")
    return "\n".join(lines)
