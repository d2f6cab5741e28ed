"""Everything that is wrong with a dataset, at once, before a GPU is rented for it.

The index is checked whole: it is arithmetic over records. Of the clips a sample is read and decoded, or every one.
"""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines import index, storage
from pipelines.clips import read_caption
from pipelines.container import probe
from pipelines.contracts import ClipRule
from pipelines.decode import open_video
from pipelines.faults import InputError, Skip
from pipelines.latents import empty, join, parse

SAMPLE = 64
"""Clips that are read and decoded when not every one is, spread evenly over the dataset."""
EXAMPLES = 3
SPAN = 32
"""Frames that are decoded at a time."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: where, what, and what to do. ``count`` clips or shards have it."""

    where: str
    fault: str
    remedy: str
    count: int = 1

    def __str__(self) -> str:
        return f"{self.where}: {self.fault}; {self.remedy}"


def lint_dataset(
    url: str, *, rules: Sequence[ClipRule] = (), every_clip: bool = False, sample: int = SAMPLE
) -> list[Finding]:
    """Checks index against shards, records against one another, and clips against records; never raises for a fault.

    ``rules`` are the clip rules of the stages that will train on the dataset. ``every_clip`` decodes all frames of all
    clips and walks all members of the tars; else the first and last frame of ``sample`` clips are decoded.
    """
    try:
        dataset = index.open_dataset(url)
    except InputError as error:
        return [Finding(storage.redact(url), str(error), "nothing else can be checked without an index")]
    try:
        layout = dataset.latents
    except InputError as error:
        return [Finding(dataset.name, str(error), "nothing of its latents can be read without their layout")]
    report = _Report(dataset)
    report.folder()
    chosen = range(dataset.clips) if every_clip else np.linspace(0, dataset.clips - 1, min(sample, dataset.clips))
    places = np.asarray(chosen, np.int64)
    keys = np.zeros(dataset.clips, np.uint64)
    for shard in range(len(dataset.files)):
        first, last = dataset.first_clips[shard : shard + 2]
        rows = report.records(shard)
        if rows is None:
            continue
        keys[first:last] = _hashed(rows["key"])
        report.sense(shard, rows)
        report.kinds(shard, rows)
        for rule in dict.fromkeys(rules) if layout is None else ():
            report.rule(rule, shard, rows)
        report.told(shard, rows)
        if report.intact(shard):
            inside = places[(places >= first) & (places < last)] - first
            report.clips(shard, rows[inside], every_clip)
            if every_clip:
                report.members(shard)
    report.copies(keys)
    report.captions()
    return report.findings()


class _Report:
    """Collects faults shard by shard: how often each was found, and the first few names."""

    def __init__(self, dataset: index.Dataset) -> None:
        self.dataset = dataset
        self.counts: Counter[tuple[str, str]] = Counter()
        self.names: dict[tuple[str, str], list[str]] = {}
        self.untold: Counter[str] = Counter()
        self.told_clips = 0
        self.widths: Counter[int] = Counter()

    def add(self, fault: str, remedy: str, *names: str, count: int = 1) -> None:
        self.counts[fault, remedy] += count
        kept = self.names.setdefault((fault, remedy), [])
        kept += names[: EXAMPLES - len(kept)]

    def add_rows(self, fault: str, remedy: str, shard: int, rows: np.ndarray, bad: np.ndarray) -> None:
        if bad.any():
            names = [self._name(shard, row) for row in rows[bad][:EXAMPLES]]
            self.add(fault, remedy, *names, count=int(bad.sum()))

    def findings(self) -> list[Finding]:
        findings = []
        for (fault, remedy), count in self.counts.items():
            names = self.names[fault, remedy]
            more = f" and {count - len(names)} more" if count > len(names) else ""
            findings.append(Finding(f"{self.dataset.name}/{', '.join(names)}{more}", fault, remedy, count))
        return findings

    def folder(self) -> None:
        """What lies beside the shards of the index."""
        for entry in storage.list_dir(self.dataset.base):
            if entry.name.endswith(".tar") and entry.name not in self.dataset.files:
                self.add("the shard is not in the index, so nothing of it is used", "run `moviola index`", entry.name)
            if entry.name == ".pack":
                self.add("a packing into this dataset was not finished", "give its `moviola pack` again", ".pack")

    def intact(self, shard: int) -> bool:
        """Whether the shard is there in full."""
        file = self.dataset.files[shard]
        try:
            found = storage.size(self.dataset.shard_url(shard))
        except InputError as error:
            self.add(f"the shard can't be read: {error}", "copy it again, or index the dataset without it", file)
            return False
        expected = int(self.dataset.shard_bytes[shard])
        if found != expected:
            self.add(f"it has {found} bytes, the index says {expected}", "copy it again, or run `moviola index`", file)
        return found == expected

    def records(self, shard: int) -> np.ndarray | None:
        """The shard's records, or None where its .idx can't be used."""
        try:
            return self.dataset.records(shard)
        except InputError as error:
            self.add(f"its .idx can't be used: {error}", "run `moviola index`", self.dataset.files[shard])
            return None

    def sense(self, shard: int, rows: np.ndarray) -> None:
        """Records that can't be true."""
        length = int(self.dataset.shard_bytes[shard])
        video = rows["kind"] != index.IMAGE
        least, most = np.minimum(rows["height"], rows["width"]), np.maximum(rows["height"], rows["width"])
        checks = {
            "its bytes lie outside of the shard": (rows["offset"] + rows["bytes"] > length)
            | (rows["caption_offset"] + rows["caption_bytes"] > length),
            "it has no bytes": rows["bytes"] == 0,
            "it has no frames": rows["frames"] == 0,
            "it has no frame rate": video & ~((rows["fps"] > 0) & np.isfinite(rows["fps"])),
            f"it has no pixels, or more than {index.PIXELS_A_SIDE} a side": (least == 0) | (most > index.PIXELS_A_SIDE),
            "its motion score is not in [0, 1]": ~((rows["motion"] >= 0) & (rows["motion"] <= 1)),
        }
        for fault, bad in checks.items():
            self.add_rows(fault, "run `moviola index`, or pack again", shard, rows, bad)

    def kinds(self, shard: int, rows: np.ndarray) -> None:
        """Samples of another kind than the card says."""
        stored = rows["kind"] == index.LATENTS
        if self.dataset.latents is None:
            self.add_rows("latents, but the card has no layout of any", "encode it again", shard, rows, stored)
        else:
            self.add_rows("a clip among latents", "encode it again", shard, rows, ~stored)

    def rule(self, rule: ClipRule, shard: int, rows: np.ndarray) -> None:
        """Clips that a stage can't use, or only enlarged."""
        height, width = (max(size[side] for size in rule.sizes) for side in (0, 1))
        self.add_rows(
            f"fewer than the {rule.least_frames} frames that {rule.frames} at stride {rule.stride[0]} need",
            f"pack with least_frames: {rule.least_frames}, or lower clip.frames or clip.stride",
            shard,
            rows,
            rows["frames"] < rule.least_frames,
        )
        self.add_rows(
            f"smaller than the {height} x {width} that a stage cuts, so that it would be enlarged",
            "pack it larger, or lower clip.sizes",
            shard,
            rows,
            (rows["height"] < height) | (rows["width"] < width),
        )

    def told(self, shard: int, rows: np.ndarray) -> None:
        """Counts clips with and without a caption embedding."""
        silent = rows["caption_bytes"] == 0
        self.told_clips += int((~silent).sum())
        if silent.any():
            self.untold[self._name(shard, rows[silent][0])] += int(silent.sum())

    def captions(self) -> None:
        """Missing embeddings, where other clips have one or the card names an encoder, and mixed ones."""
        encoder = (self.dataset.card.model_extra or {}).get("text_encoder")
        if self.untold and (self.told_clips or encoder):
            names = list(self.untold)[:EXAMPLES]
            self.add(
                "no caption embedding", "give every clip a caption, then embed them", *names, count=self.untold.total()
            )
        if len(self.widths) > 1:
            widths = " and ".join(map(str, sorted(self.widths)))
            self.add(f"caption embeddings of different widths: {widths}", "embed all with one text encoder", "*")

    def copies(self, keys: np.ndarray) -> None:
        """Keys that stand for more than one clip."""
        order = np.argsort(keys, kind="stable")
        again = order[1:][(keys[order][1:] == keys[order][:-1]) & (keys[order][1:] > 0)]
        if len(again):
            places = [self.dataset.locate(int(clip)) for clip in again[:EXAMPLES]]
            names = [self._name(shard, self.dataset.records(shard)[row]) for shard, row in places]
            self.add(
                "the key stands for another clip as well", "pack again, or rename members", *names, count=len(again)
            )

    def clips(self, shard: int, rows: np.ndarray, whole: bool) -> None:
        """Reads and decodes clips, and compares them with their records."""
        for record in rows:
            try:
                self._decode(shard, record, whole)
                if record["caption_bytes"]:
                    self.widths[read_caption(self._read(shard, record, "caption_"), "").shape[1]] += 1
            except Skip as skip:
                fault = f"{skip.reason}: {skip.detail.removeprefix(': ')}"
                self.add(fault, "pack it again, or leave it out", self._name(shard, record))

    def _decode(self, shard: int, record: np.void, whole: bool) -> None:
        if record["kind"] == index.LATENTS:
            if layout := self.dataset.latents:
                arrays, masks = empty(layout)
                join(parse(self._read(shard, record), ""), layout, "", arrays, masks)
                for title, array in arrays.items():
                    if not bool(array.isfinite().all()):
                        raise Skip("not_finite", f"{title} has numbers that are not finite")
            return
        data, image = self._read(shard, record), record["kind"] == index.IMAGE
        info = probe(data, image, "")
        for side in ("height", "width", "frames"):
            if getattr(info, side) != record[side]:
                raise Skip("mislabelled", f"its {side} is {getattr(info, side)}, the index says {record[side]}")
        spans = [sorted({0, info.frames - 1})]
        if whole:
            spans = [range(first, min(first + SPAN, info.frames)) for first in range(0, info.frames, SPAN)]
        for frames in spans:
            with open_video(data, "", image=image) as video:
                video.read(frames)

    def _read(self, shard: int, record: np.void, part: str = "") -> bytes:
        start = int(record[f"{part}offset"])
        try:
            data = storage.read_bytes(self.dataset.shard_url(shard), start, start + int(record[f"{part}bytes"]))
        except InputError as error:
            raise Skip("unreadable", str(error)) from None
        if zlib.crc32(data) != record[f"{part}crc"]:
            raise Skip("damaged", "its bytes are not those that were indexed")
        return data

    def members(self, shard: int) -> None:
        """Walks the tar, header by header."""
        file, remedy = self.dataset.files[shard], "pack again without it"
        try:
            for member in _headers(self.dataset.shard_url(shard), int(self.dataset.shard_bytes[shard])):
                name = f"{file}:{member.name}"
                if index._climbs(member.name):
                    self.add("the member leaves its folder", remedy, name)
                elif not (member.isreg() or member.isdir()):
                    self.add("the member is a link or a device", remedy, name)
                elif member.name.rpartition(".")[2].lower() in index._PICKLES:
                    self.add("the member may be a pickle", remedy, name)
                elif member.size > index.MEMBER_BYTES:
                    self.add(f"the member has over {index.MEMBER_BYTES} bytes", remedy, name)
        except (tarfile.TarError, InputError) as error:
            self.add(f"not a plain tar: {error}", "copy the shard again", file)

    def _name(self, shard: int, record: np.void) -> str:
        return f"{self.dataset.files[shard]}/{record['key'].decode()}"


def _hashed(keys: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each key that does not depend on the width of the column."""
    bytes_NK = np.frombuffer(keys.tobytes(), np.uint8).reshape(len(keys), -1).astype(np.uint64)
    factors_K = np.random.default_rng(0).integers(1 << 63, size=1024, dtype=np.uint64)[: bytes_NK.shape[1]] | 1
    return (bytes_NK * factors_K).sum(1, dtype=np.uint64)


def _headers(url: str, length: int) -> Iterator[tarfile.TarInfo]:
    place = 0
    while place + tarfile.BLOCKSIZE <= length:
        block = storage.read_bytes(url, place, place + tarfile.BLOCKSIZE)
        if not any(block):
            return
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        place += tarfile.BLOCKSIZE + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if place > length:
            raise tarfile.ReadError(f"it ends within {member.name}")
        if member.type not in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            yield member
    raise tarfile.ReadError("it has no end mark")
