"""The index of a dataset: where in which shard each clip lies, so that a rank reads only what it trains on.

``index.json`` holds the card and a line a shard; ``SHARD.idx`` a fixed-width record a clip, in the order of the tar.
A rank loads ``index.json`` and then, by ranged reads, the records of the clips it draws: ten million clips cost a rank
a few megabytes. Digests form a chain: index.json covers each .idx, each record is checked under its .idx's digest
(so a single one can be read and trusted), and covers its clip's bytes.

Any WebDataset of plain tars gets an index with :func:`index_dataset`, without being rewritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import struct
import tarfile
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines import storage
from pipelines.container import PIXELS_A_SIDE, Info, probe
from pipelines.contracts import LatentLayout
from pipelines.faults import InputError, Skip

FORMAT = 2
READABLE = (1, 2)
"""Records of format 1 have no check: of a large dataset, nobody notices an .idx that was written anew under a run."""

MAGIC = b"MOVIOIX1"
HEADER = struct.Struct("<8sII")  # magic, records, bytes of the longest key
INDEX_MEMORY = 24 << 20
"""Bytes of records that one dataset may keep in memory; above it, records are read as they are needed."""

INDEX_SHARE = 0.002
"""Records are kept only where reading them in every rank costs no more than this share of the clips' bytes."""

MEMBER_BYTES = 2 << 30
VIDEO_SUFFIXES = frozenset(
    {"mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "m2ts", "mts", "wmv", "flv", "3gp", "ogv"}
)
IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp"})
LATENT_SUFFIX = "safetensors"
VIDEO, IMAGE, LATENTS = range(3)
"""Kinds of samples."""
SUFFIXES = {VIDEO: VIDEO_SUFFIXES, IMAGE: IMAGE_SUFFIXES, LATENTS: frozenset({LATENT_SUFFIX})}
CAPTION_SUFFIX = "t5.npy"
_PICKLES = frozenset({"pkl", "pickle", "pyd", "pth", "pt", "joblib"})
_KEY = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]+)$", re.DOTALL)
KEY_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Member:
    """One clip of a shard, as indexed. Offsets count bytes from the start of the tar to the member's data.

    ``fps`` frames/s; ``motion`` in [0, 1]; ``crc`` is CRC-32 of the bytes; ``caption_bytes`` 0 where there is no
    ``.t5.npy``; ``kind`` is VIDEO, IMAGE (one-frame clips stored as pictures) or LATENTS, whose ``frames``, ``fps`` and
    size are those of the clip that was encoded.
    """

    key: str
    offset: int
    bytes: int
    crc: int
    frames: int
    fps: float
    height: int
    width: int
    motion: float = 0.0
    kind: int = VIDEO
    caption_offset: int = 0
    caption_bytes: int = 0
    caption_crc: int = 0


_FIELDS: list[tuple[str, str]] = [
    ("offset", "<u8"),
    ("caption_offset", "<u8"),
    ("bytes", "<u4"),
    ("crc", "<u4"),
    ("caption_bytes", "<u4"),
    ("caption_crc", "<u4"),
    ("frames", "<u4"),
    ("fps", "<f4"),
    ("motion", "<f4"),
    ("height", "<u2"),
    ("width", "<u2"),
    ("kind", "<u2"),
]


def record_type(key_bytes: int, format: int = FORMAT) -> np.dtype:
    """The numpy type of a record whose keys take up to ``key_bytes`` bytes of UTF-8."""
    check = [("check", "<u4")] if format > 1 else []
    return np.dtype([*_FIELDS, *check, ("key", f"S{key_bytes}")])


def _checks(records: np.ndarray, digest: str, first: int = 0) -> np.ndarray:
    """What ``check`` is for records where it is 0 yet: a digest of each and its row (from ``first``), keyed with that
    of its .idx.
    """
    key, rows = bytes.fromhex(digest), memoryview(records.tobytes())
    found = bytearray()
    for row in range(len(records)):
        data = rows[row * records.itemsize : (row + 1) * records.itemsize]
        found += hashlib.blake2b(data, digest_size=4, key=key, salt=(first + row).to_bytes(16, "little")).digest()
    return np.frombuffer(found, "<u4")


class Shard(BaseModel):
    """A line of index.json: a tar, the clips in it, and the digest of its .idx."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Path of the tar, relative to the dataset.")
    bytes: int = Field(gt=0, lt=1 << 62)
    clips: int = Field(ge=0, lt=1 << 62)
    key_bytes: int = Field(gt=0, le=65535, description="Width of a key in the records of the .idx.")
    digest: str = Field(
        pattern="^[0-9a-f]{32}$",
        description="BLAKE2b-128 of the .idx file with all checks 0; it holds the CRC-32 of every clip.",
    )


class Card(BaseModel):
    """What a dataset says about itself. Fields of one's own are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
    licence: str = "unknown"
    counts: dict[str, int] = Field(default_factory=dict)
    statistics: dict[str, Any] = Field(default_factory=dict)


def write_shard_index(url: str, file: str, members: Sequence[Member], bytes: int) -> Shard:
    """Writes the .idx of the shard ``file`` (of ``bytes`` bytes) into the dataset ``url``; its line of index.json."""
    keys = [member.key.encode() for member in members]
    key_bytes = max(map(len, keys), default=1)
    records = np.zeros(len(members), record_type(key_bytes))
    for name, _ in _FIELDS:
        records[name] = [getattr(member, name) for member in members]
    records["key"] = keys
    header = HEADER.pack(MAGIC, len(members), key_bytes)
    digest = _digest(header + records.tobytes())
    records["check"] = _checks(records, digest)
    storage.write_bytes(storage.join(url, index_name(file)), header + records.tobytes())
    return Shard(file=file, bytes=bytes, clips=len(members), key_bytes=key_bytes, digest=digest)


def write_index(url: str, card: Card, shards: Sequence[Shard], base: str | None = None) -> str:
    """Writes index.json into ``url``; returns its digest. ``base`` says where the tars lie if not there."""
    head = {"format": FORMAT, "card": card.model_dump(), **({"base": base} if base else {})}
    lines = ",\n  ".join(json.dumps(shard.model_dump()) for shard in shards)
    text = json.dumps(head, indent=1, allow_nan=False)[:-2] + f',\n "shards": [\n  {lines}\n ]\n}}\n'
    data = text.encode()
    storage.write_bytes(storage.join(url, "index.json"), data)
    return _digest(data)


def index_name(file: str) -> str:
    """Name of the .idx of the shard ``file``."""
    return file.removesuffix(".tar") + ".idx"


def summary(records: np.ndarray) -> dict[str, Any]:
    """Counts and statistics of records, as they stand on a card: see :func:`merge`."""
    videos = records[records["kind"] != IMAGE]
    seconds = videos["frames"] / np.maximum(videos["fps"], 1e-6)

    def spread(values: np.ndarray) -> dict[str, float]:
        if not len(values):
            return {"n": 0, "least": 0.0, "sum": 0.0, "greatest": 0.0}
        return {
            "n": len(values),
            "least": float(values.min()),
            "sum": float(values.sum(dtype=np.float64)),
            "greatest": float(values.max()),
        }

    return {
        "counts": {
            "clips": len(records),
            "videos": len(videos),
            "images": len(records) - len(videos),
            "captions": int((records["caption_bytes"] > 0).sum()),
            "bytes": int(records["bytes"].sum(dtype=np.int64)),
        },
        "statistics": {
            "frames": spread(records["frames"]),
            "seconds": spread(seconds),
            "fps": spread(videos["fps"]),
            "height": spread(records["height"]),
            "width": spread(records["width"]),
            "motion": spread(videos["motion"]),
        },
    }


def merge(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summaries of shards as one: counts added, and least, mean and greatest of each statistic."""
    counts: Counter[str] = Counter()
    statistics: dict[str, dict[str, float]] = {}
    for item in summaries:
        counts.update(item["counts"])
        for name, spread in item["statistics"].items():
            if not spread["n"]:
                continue
            old = statistics.setdefault(name, {"n": 0, "least": math.inf, "sum": 0.0, "greatest": -math.inf})
            old["n"] += spread["n"]
            old["sum"] += spread["sum"]
            old["least"] = min(old["least"], spread["least"])
            old["greatest"] = max(old["greatest"], spread["greatest"])
    return {
        "counts": dict(counts),
        "statistics": {
            name: {
                "least": round(item["least"], 6),
                "mean": round(item["sum"] / item["n"], 6),
                "greatest": round(item["greatest"], 6),
            }
            for name, item in statistics.items()
        },
    }


class _Index(BaseModel):
    format: int
    card: Card
    base: str | None = None
    shards: list[Shard | None]


class _Columns:
    """The lines of index.json, column by column: 100,000 shards take megabytes and a fraction of a second, where an
    object each would take 160 MB and a second.
    """

    def __init__(self, shards: Sequence[Shard] = ()) -> None:
        self.files: list[str] = []
        self.bytes, self.clips, self.key_bytes = array("q"), array("q"), array("q")
        self.digests = bytearray()
        for shard in shards:
            self.take(shard.model_dump())

    def take(self, line: dict[str, Any]) -> dict[str, Any] | None:
        """Keeps what is a sound line of a shard, as the JSON parser meets it; hands back all else."""
        if len(line) != 5 or not line.keys() >= _LINE:
            return line
        file, digest = line["file"], line["digest"]
        numbers = line["bytes"], line["clips"], line["key_bytes"]
        sound = type(file) is type(digest) is str and all(type(n) is int and n < 1 << 62 for n in numbers)
        if not sound or numbers[0] < 1 or numbers[1] < 0 or not 1 <= numbers[2] <= 65535 or not _DIGEST(digest):
            return line
        self.files.append(file)
        self.bytes.append(numbers[0])
        self.clips.append(numbers[1])
        self.key_bytes.append(numbers[2])
        self.digests += bytes.fromhex(digest)
        return None


_LINE = frozenset(Shard.model_fields)
_DIGEST = re.compile("[0-9a-f]{32}").fullmatch


def _parse(data: bytes) -> tuple[_Index, _Columns]:
    """index.json; raises ValidationError, or ValueError for what is not JSON."""
    columns = _Columns()
    index = _Index.model_validate(json.loads(data, object_hook=columns.take))
    if len(index.shards) != len(columns.files) or any(index.shards):
        raise ValueError("shards: not a list of shards")
    return index, columns


class Dataset:
    """An opened index. Cheap: records are read when they are asked for. Thread-safe, and usable after a fork.

    ``digest`` identifies the index: a run records it and a resumed run passes it as ``expect``.
    """

    def __init__(
        self,
        url: str,
        card: Card,
        shards: Sequence[Shard] | _Columns,
        digest: str,
        base: str,
        format: int = FORMAT,
    ) -> None:
        shards = shards if isinstance(shards, _Columns) else _Columns(shards)
        self.url = url
        self.base = base
        self.card = card
        self.digest = digest
        self.format = format
        self.files = shards.files
        self.shard_bytes = np.array(shards.bytes, np.int64)
        self.shard_digests = bytes(shards.digests)
        self.key_bytes = np.array(shards.key_bytes, np.int32)
        clips = np.array(shards.clips, np.int64)
        self.first_clips = np.concatenate([[0], np.cumsum(clips)]).astype(np.int64)
        self.clips = int(self.first_clips[-1])
        self.record_bytes = int(clips @ (record_type(1, format).itemsize - 1 + self.key_bytes))
        self.keeps_records = self.record_bytes <= INDEX_MEMORY
        self._kept: dict[int, np.ndarray] = {}
        self._reading: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes_fetched = 0

    @property
    def name(self) -> str:
        """The card's name."""
        return self.card.name

    @property
    def caption_width(self) -> int:
        """Numbers a token of the stored text embeddings; 0 where there are none."""
        return int((getattr(self.card, "embeddings", None) or {}).get("width", 0))

    @cached_property
    def latents(self) -> LatentLayout | None:
        """What is stored of each clip where the dataset holds latents, else None; raises InputError where it says so
        wrongly.
        """
        card = self.card.model_extra or {}
        if card.get("latents") is None:
            return None
        try:
            told = {"caption_width": self.caption_width, "text_encoder": card.get("text_encoder")}
            return LatentLayout.model_validate({**card["latents"], **told})
        except (ValidationError, TypeError) as error:
            fault = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "not a mapping"}
            where = ".".join(("card.latents", *map(str, fault["loc"])))
            raise InputError(
                f"{storage.redact(storage.join(self.url, 'index.json'))}: {where}: {fault['msg']}; encode it again"
            ) from None

    def locate(self, clip: int) -> tuple[int, int]:
        """(shard, row in the shard) of a clip."""
        shard = bisect_right(self.first_clips.data, clip) - 1  # numpy's search costs ten times as much for one number
        return shard, clip - int(self.first_clips[shard])

    def shard_url(self, shard: int) -> str:
        """URL of a shard's tar."""
        return storage.join(self.base, self.files[shard])

    def read_by(self, ranks: int) -> None:
        """Says how many ranks share the clips: each that keeps records reads all of them, its own clips or not."""
        others = (ranks - 1) * self.record_bytes
        self.keeps_records = self.keeps_records and others <= INDEX_SHARE * int(self.shard_bytes.sum())

    def records(self, shard: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Records of rows ``first`` to ``last`` (exclusive) of a shard.

        Small indexes are kept in memory, a shard at a time; of large ones exactly these rows are read. Raises
        InputError for an .idx that is missing, or rows that do not belong to index.json.
        """
        rows = int(self.first_clips[shard + 1] - self.first_clips[shard])
        last = rows if last is None else last
        if self.keeps_records or (first == 0 and last == rows):
            with self._lock:
                reading = self._reading.setdefault(shard, threading.Lock())
            with reading:  # threads that want the same records wait for one read
                kept = self._kept.get(shard)
                if kept is None:
                    kept = self._sound(shard, 0, None, None)
                    if self.keeps_records:
                        self._kept[shard] = kept
            return kept[first:last]
        record = self._record(shard)
        start = HEADER.size + first * record.itemsize
        return self._sound(shard, first, start, start + (last - first) * record.itemsize)

    def _sound(self, shard: int, first: int, start: int | None, end: int | None) -> np.ndarray:
        """Records of those bytes of the .idx (or of all), read again where they are not what index.json vouches for."""
        record, digest = self._record(shard), self.shard_digests[16 * shard : 16 * shard + 16].hex()
        for attempt in range(storage.REREADS + 1):
            if attempt:
                storage.pause("digest", attempt)
            data = self._read(shard, start, end)
            header = data[: HEADER.size] if start is None else b""
            if (len(data) - len(header)) % record.itemsize:
                continue
            records = np.frombuffer(data, record, offset=len(header))
            blank = records.copy()
            if self.format > 1:
                blank["check"] = 0
            if start is None:
                sound = _digest(header + blank.tobytes()) == digest
            else:
                sound = self.format == 1 or bool((records["check"] == _checks(blank, digest, first)).all())
            if sound:
                return records
        raise InputError(
            f"{storage.redact(self._index_url(shard))} does not belong to the index.json that this process read: the "
            "dataset changed. Restore it, or run `moviola index` on it again and start a new run"
        )

    def _record(self, shard: int) -> np.dtype:
        return record_type(int(self.key_bytes[shard]), self.format)

    def _index_url(self, shard: int) -> str:
        return storage.join(self.url, index_name(self.files[shard]))

    def _read(self, shard: int, start: int | None, end: int | None) -> bytes:
        try:
            data = storage.read_bytes(self._index_url(shard), start, end)
        except storage.Missing:
            raise InputError(
                f"{storage.redact(self._index_url(shard))} is missing, but index.json names its shard; run "
                "`moviola index` on the dataset again"
            ) from None
        with self._lock:
            self.requests += 1
            self.bytes_fetched += len(data)
        return data

    def all_records(self) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, its records), shard by shard: for lint and statistics, not for training."""
        for shard in range(len(self.files)):
            yield shard, self.records(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_reading": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def open_dataset(url: str, expect: str | None = None) -> Dataset:
    """Opens the dataset at ``url`` by reading its index.json.

    Raises InputError when there is no index, when it holds no clips, when it is of another format, when a name in it
    leaves the dataset, or when its digest is not ``expect``: a dataset must not change under a run.
    """
    where = storage.redact(storage.join(url, "index.json"))
    try:
        data = storage.read_bytes(storage.join(url, "index.json"))
    except storage.Missing:
        if not storage.exists(url):
            raise InputError(f"dataset {storage.redact(url)} is not there; check the URL") from None
        below = storage.join(url, "train")
        if storage.exists(storage.join(below, "index.json")):
            raise InputError(f"{where} is not there; did you mean {storage.redact(below)}?") from None
        raise InputError(f"{where} is not there; run `moviola index {storage.redact(url)}` first") from None
    digest = _digest(data)
    for attempt in range(storage.REREADS if expect is not None else 0):
        if digest == expect:
            break
        storage.pause("digest", attempt + 1)
        data = storage.read_bytes(storage.join(url, "index.json"))
        digest = _digest(data)
    if expect is not None and digest != expect:
        raise InputError(
            f"{where} changed since this run started (digest {digest}, the run has {expect}): the order of clips would "
            "not be the same. Restore the dataset, or start a new run"
        )
    try:
        index, columns = _parse(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{where} is not an index: {place and place + ': '}{first['msg']}; index it again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not an index: {error}; index it again") from None
    if index.format not in READABLE:
        raise InputError(f"{where} has format {index.format}; this version reads {READABLE[-1]}; index it again")
    for file in columns.files:
        if _climbs(file):
            raise InputError(f"{where} names {file!r}, which leaves the dataset; refused")
    dataset = Dataset(url, index.card, columns, digest, index.base or url, index.format)
    if not dataset.clips:
        raise InputError(f"dataset {storage.redact(url)} holds no clips; pack or index it again")
    return dataset


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What :func:`index_dataset` did: clips indexed, shards (of which ``kept`` had an index), skips by reason."""

    digest: str
    clips: int
    shards: int
    kept: int
    skipped: Mapping[str, int]
    named: Sequence[str]


def index_dataset(
    url: str,
    destination: str | None = None,
    *,
    name: str | None = None,
    licence: str | None = None,
    extra: Mapping[str, Any] | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Indexes every ``.tar`` below ``url`` (or that one tar), beside the shards or in ``destination``.

    Each shard is read once, ``workers`` shards at a time in processes. An .idx that is there and still tells the truth
    about its tar's size and some of its clips is kept, so a killed run goes on, and so is what an index's card said.
    ``extra`` are further fields of the card. ``progress(done, all)`` counts shards. Raises InputError for no shards,
    compressed or truncated tars, members that leave their folder, absurd sizes and pickles, and rather than replace an
    index of another program's.
    """
    single = url.endswith(".tar")
    base = url.rpartition("/")[0] or "." if single else url
    destination = destination or base
    found = [(url.rpartition("/")[2], storage.size(url))] if single else _tars(url)
    if not found:
        raise InputError(f"no .tar shards at {storage.redact(url)}; `moviola pack` makes some from videos")
    told, old = _before(destination)
    made = [shard for shard, *_ in old.values()]
    old |= _drafts(destination)
    done: dict[str, tuple[Shard, dict[str, Any], Counter[str], list[str]]] = {}
    todo = []
    for file, length in found:
        shard, skips, names = old.get(file, (None, Counter(), []))
        records = _still_true(base, destination, shard) if shard and shard.bytes == length else None
        if shard and records is not None:
            done[file] = (shard, summary(records), skips, names)
        else:
            todo.append((file, length))
    kept = len(done)
    for file, result in _in_processes(workers, [(base, destination, file, length) for file, length in todo]):
        done[file] = result
        if progress:
            progress(len(done), len(found))
    shards = [done[file][0] for file, _ in found]
    skipped: Counter[str] = sum((done[file][2] for file, _ in found), Counter())
    totals = merge([done[file][1] for file, _ in found])
    if shards != made:
        told.pop("pack", None)  # they are not what that packing made
    if embeddings := _embeddings(base, destination, shards, totals["counts"]):
        told["embeddings"] = {**told.get("embeddings", {}), **embeddings}
    elif not totals["counts"].get("captions"):
        told.pop("embeddings", None)
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", base.rstrip("/").rpartition("/")[2]).strip("-.")
    told = {"name": folder or "dataset", "licence": "unknown", **told, **(extra or {}), **totals}
    told |= {key: value for key, value in (("name", name), ("licence", licence)) if value}
    card = Card(**told)
    if not sum(shard.clips for shard in shards):
        raise InputError(f"{len(found)} shards at {storage.redact(url)} hold no usable clip; skipped: {dict(skipped)}")
    digest = write_index(destination, card, shards, None if destination == base else base)
    for shard in shards:
        storage.delete(storage.join(destination, _draft_name(shard.file)))
    named = [line for file, _ in found for line in done[file][3]]
    return IndexReport(digest, sum(s.clips for s in shards), len(shards), kept, dict(skipped), named[:50])


_Known = tuple[Shard, Counter[str], list[str]]
"""A shard that has an .idx, and what was skipped of it, as far as that is known."""


def _before(destination: str) -> tuple[dict[str, Any], dict[str, _Known]]:
    """What the card of the index there says, and its shards; nothing where there is none, or one that can't be read.

    Raises InputError for an index of latents (what they are can't be told from the shards), or of another program's.
    """
    where = storage.join(destination, "index.json")
    try:
        data = storage.read_bytes(where)
        old = json.loads(data)
    except (storage.Missing, ValueError, RecursionError):
        return {}, {}
    if not isinstance(old, dict) or not isinstance(old.get("format"), int):
        raise InputError(
            f"{storage.redact(where)} is there, and is not an index of this program's; let the index go to another "
            "place with --to"
        )
    if old["format"] not in READABLE:
        return {}, {}
    try:
        index = _parse(data)[0]
        lines = [Shard(**line) for line in old["shards"]] if old["format"] == FORMAT else []
    except (ValueError, TypeError):
        return {}, {}
    told = index.card.model_dump(exclude={"counts", "statistics"})
    if "latents" in told:
        raise InputError(
            f"{storage.redact(destination)} holds latents and their index; an index made from the shards would "
            "lose their layout. `moviola encode --dataset` writes it"
        )
    return told, {line.file: (line, Counter(), []) for line in lines}


def _embeddings(base: str, destination: str, shards: Sequence[Shard], counts: Mapping[str, int]) -> dict[str, Any]:
    """What a card says of stored text embeddings, from the first one."""
    if not counts.get("captions"):
        return {}
    dataset = Dataset(destination, Card(name="new"), shards, "", base)
    shard, row = next((s, row) for s, rows in dataset.all_records() for row in rows if row["caption_bytes"])
    start = int(row["caption_offset"])
    data = io.BytesIO(storage.read_bytes(dataset.shard_url(shard), start, start + int(row["caption_bytes"])))
    try:
        np.lib.format.read_magic(data)
        shape, _, _ = np.lib.format.read_array_header_1_0(data)
    except ValueError:
        return {}
    return {"clips": counts["captions"], "width": shape[-1]} if len(shape) == 2 else {}


def index_shard(
    base: str, destination: str, file: str, length: int
) -> tuple[Shard, dict[str, Any], Counter[str], list]:
    """Indexes one tar; also leaves a ``.idx.json`` draft of its index.json line, from which a killed run goes on."""
    members, skipped, named = [], Counter[str](), []
    where = storage.redact(storage.join(base, file))
    _no_other(storage.join(destination, index_name(file)))
    sidecars = _Sidecars()
    for sample, parts, again in _samples(storage.join(base, file), length):
        skipped["duplicate"] += len(again)
        named += [f"duplicate: {where}: a second member {name!r} of one sample; the first is taken" for name in again]
        for key, suffix in clips_of(sample, parts):
            try:
                members.append(_member(key, suffix, parts, where, sidecars))
            except Skip as skip:
                skipped[skip.reason] += 1
                named.append(str(skip))
    shard = write_shard_index(destination, file, members, length)
    records = np.frombuffer(
        storage.read_bytes(storage.join(destination, index_name(file))),
        record_type(shard.key_bytes),
        offset=HEADER.size,
    )
    draft = {"line": shard.model_dump(), "skipped": skipped, "named": named[:50]}
    storage.write_json(storage.join(destination, _draft_name(file)), draft)
    return shard, summary(records), skipped, named[:50]


def _no_other(url: str) -> None:
    """Raises InputError where there is an .idx that another program wrote, such as DALI's."""
    try:
        size = storage.size(url)
        begins = storage.read_bytes(url, 0, min(len(MAGIC), size)) if size else MAGIC
    except storage.Missing:
        return
    if begins != MAGIC:
        raise InputError(
            f"{storage.redact(url)} is there, and is not of this program's; let the index go to another place with --to"
        )


def _draft_name(file: str) -> str:
    return index_name(file) + ".json"


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone: a pool's processes would wait for ever for what a killed one has to
    say.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_processes(workers: int, jobs: Sequence[tuple[str, str, str, int]]) -> Iterator[tuple[str, Any]]:
    if workers <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield job[2], index_shard(*job)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with, initargs=(os.getpid(),)) as pool:
        futures: dict[Future, str] = {pool.submit(index_shard, *job): job[2] for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_COMPRESSED = (".tgz", ".tbz2", ".txz", ".tzst", *(f".tar.{kind}" for kind in ("gz", "bz2", "xz", "zst", "lz4")))


def _tars(url: str) -> list[tuple[str, int]]:
    """(path below ``url``, bytes) of its shards. Raises InputError for shards that can't be read in parts."""
    files = storage.list_below(url)
    if packed := [entry.name for entry in files if entry.name.lower().endswith(_COMPRESSED)]:
        raise InputError(
            f"{storage.redact(url)} holds {len(packed)} compressed shards ({packed[0]} ...), of which no part can be "
            "read by itself; decompress them (videos gain nothing from it)"
        )
    return [(entry.name, entry.bytes) for entry in files if entry.name.endswith(".tar")]


def _drafts(destination: str) -> dict[str, _Known]:
    """Shards whose .idx a killed run wrote."""
    shards: dict[str, _Known] = {}
    for entry in storage.list_below(destination):
        if entry.name.endswith(".idx.json"):
            with contextlib.suppress(InputError, ValueError, TypeError, KeyError):
                draft = storage.read_json(storage.join(destination, entry.name))
                shard = Shard(**draft["line"])
                shards[shard.file] = shard, Counter(draft["skipped"]), list(draft["named"])
    return shards


def _still_true(base: str, destination: str, shard: Shard) -> np.ndarray | None:
    """The shard's records if its .idx is whole and the tar holds three of its clips where they should be."""
    dataset = Dataset(destination, Card(name="old"), [shard], "", base)
    try:
        records = dataset.records(0)
        for row in {0, len(records) // 2, len(records) - 1} if len(records) else ():
            start, end = int(records[row]["offset"]), int(records[row]["offset"]) + int(records[row]["bytes"])
            if zlib.crc32(storage.read_bytes(dataset.shard_url(0), start, end)) != records[row]["crc"]:
                return None
    except InputError:
        return None
    return records


class _Reader(io.RawIOBase):
    """A seekable view of an object that reads ahead by ``chunk`` bytes: tarfile hops over it from header to header."""

    def __init__(self, url: str, length: int, chunk: int = 8 << 20) -> None:
        super().__init__()
        self.url, self.length, self.chunk = url, length, chunk
        self.place = self.first = 0
        self.buffer = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.length)[whence]
        return self.place

    def read(self, count: int = -1) -> bytes:
        end = self.length if count is None or count < 0 else min(self.place + count, self.length)
        if not self.first <= self.place <= end <= self.first + len(self.buffer):
            self.first = self.place
            last = min(max(end, self.place + self.chunk), self.length)
            self.buffer = storage.read_bytes(self.url, self.place, last) if last > self.place else b""
        data = self.buffer[self.place - self.first : end - self.first]
        self.place = max(self.place, end)
        return data


def open_tar(url: str, length: int) -> tarfile.TarFile:
    """A plain tar to walk through. What is not UTF-8 in a name reads as U+FFFD."""
    return tarfile.open(fileobj=_Reader(url, length), mode="r:", errors="replace")  # type: ignore[call-overload]


def _samples(url: str, length: int) -> Iterator[tuple[str, dict[str, tuple[int, bytes]], list[str]]]:
    """(key, {suffix: (offset, bytes)}, names that came again) of each sample of a tar: neighbours of one key, as
    webdataset groups them. Members of which an index needs nothing are not read: no bytes.
    """
    where = storage.redact(url)
    current, parts, again = "", {}, []
    try:
        with open_tar(url, length) as tar:
            for info in tar:
                if _climbs(info.name):
                    raise InputError(f"{where}: member {info.name!r} leaves its folder; refused")
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    raise InputError(f"{where}: member {info.name!r} is a link or device; refused")
                match = _KEY.match(info.name)
                if not match:
                    continue
                key, (before, dot, kind) = match[1], match[2].rpartition(".")
                kind = kind.lower()
                suffix = f"{before}{dot}{kind}"
                if kind in _PICKLES:
                    raise InputError(f"{where}: member {info.name!r} may be a pickle; refused. Repack without it")
                if not 0 <= info.size <= MEMBER_BYTES:
                    raise InputError(
                        f"{where}: member {info.name!r} has {info.size} bytes; the limit is {MEMBER_BYTES}"
                    )
                if info.offset_data + info.size > length:
                    raise InputError(f"{where} is cut off within {info.name!r}; copy the shard again")
                if key != current:
                    if parts:
                        yield current, parts, again
                    current, parts, again = key, {}, []
                    if len(key.encode()) > KEY_BYTES:
                        raise InputError(f"{where}: a member's name has over {KEY_BYTES} bytes: {key[:80]}...; refused")
                wanted = kind in VIDEO_SUFFIXES | IMAGE_SUFFIXES or suffix in ("json", CAPTION_SUFFIX, LATENT_SUFFIX)
                if wanted and suffix in parts:
                    again.append(info.name)
                elif wanted:
                    file = tar.extractfile(info)
                    parts[suffix] = (info.offset_data, file.read() if file else b"")
                else:
                    parts.setdefault(suffix, (info.offset_data, b""))
    except (tarfile.TarError, RecursionError) as error:
        raise InputError(f"{where} is not a plain tar: {error}") from None
    if parts:
        yield current, parts, again


class _Sidecars:
    """Whether a shard's .json sidecars describe its videos: the first ones are compared with the videos' headers.

    Many datasets keep the numbers of the video that a clip was cut from.
    """

    CHECKED = 3

    def __init__(self) -> None:
        self.compared = 0
        self.trusted = True

    def describe(self, sidecar: Mapping[str, Any], data: bytes, image: bool, name: str) -> Info:
        """Frames, fps and size of a clip: the sidecar's if it says them all and can be trusted, else the header's."""
        values = [sidecar.get(field) for field in ("frames", "fps", "height", "width")]
        complete = not image and all(isinstance(value, int | float) and 0 < value < 1 << 31 for value in values)
        if complete and self.trusted and self.compared >= self.CHECKED:
            return Info(int(values[0]), float(values[1]), int(values[2]), int(values[3]))
        found = probe(data, image, name)
        if complete:
            self.compared += 1
            self.trusted &= [found.frames, found.height, found.width] == [values[0], values[2], values[3]]
        return found


def _kind(suffix: str) -> str:
    """What a member is: the last part of its suffix (webdataset's starts at the first dot of the name)."""
    return suffix.rpartition(".")[2].lower()


def clips_of(sample: str, parts: Collection[str]) -> list[tuple[str, str | None]]:
    """(key, suffix) of the clips of a sample, whose members have the suffixes ``parts``; suffix None where it has none.

    That is its video, else its picture, else its latents. Where there are several, told apart by what stands before
    the last dot (``0001.left.mp4``, ``0001.right.mp4``), each is a clip, and that part belongs to its key.
    """
    for kinds in SUFFIXES.values():
        plain = [suffix for suffix in parts if suffix.lower() in kinds]
        named = [suffix for suffix in parts if _kind(suffix) in kinds]
        if plain:
            return [(sample, plain[0])]
        if named:
            return [(f"{sample}.{suffix.rpartition('.')[0]}", suffix) for suffix in named]
    return [(sample, None)]


def _member(
    key: str, suffix: str | None, parts: Mapping[str, tuple[int, bytes]], where: str, sidecars: _Sidecars
) -> Member:
    """The record of a clip; raises Skip for a sample without a picture, or one that can't be opened."""
    if suffix is None:
        raise Skip("no_video", f"{where}/{key}: no video or image, only {', '.join(sorted(parts))}")
    if suffix == LATENT_SUFFIX:
        raise Skip("latents", f"{where}/{key}: latents; `moviola encode --dataset` writes their index")
    offset, data = parts[suffix]
    image = _kind(suffix) in IMAGE_SUFFIXES
    sidecar = _sidecar(parts["json"][1]) if "json" in parts else {}
    info = sidecars.describe(sidecar, data, image, f"{where}/{key}")
    if max(info.height, info.width) > PIXELS_A_SIDE or info.frames >= 1 << 31:
        raise Skip("absurd", f"{where}/{key}: {info.width} x {info.height} pixels, {info.frames} frames")
    motion = sidecar.get("motion")
    caption_offset, caption = parts.get(CAPTION_SUFFIX, (0, b""))
    return Member(
        key=key,
        offset=offset,
        bytes=len(data),
        crc=zlib.crc32(data),
        frames=info.frames,
        fps=info.fps,
        height=info.height,
        width=info.width,
        motion=float(motion) if isinstance(motion, int | float) and 0 <= motion <= 1 else 0.0,
        kind=IMAGE if image else VIDEO,
        caption_offset=caption_offset,
        caption_bytes=len(caption),
        caption_crc=zlib.crc32(caption),
    )


def _sidecar(data: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _climbs(name: str) -> bool:
    return name.startswith(("/", "~")) or "\\" in name or ".." in name.split("/")


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
