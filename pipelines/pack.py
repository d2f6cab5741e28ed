"""Footage -> a dataset: videos cut to clips, in plain WebDataset shards with an index, an eighth (say) held back.

    list the source -> order by a seeded hash -> cut each video in a worker -> spool -> shards in that order -> index

What lies in which shard is a function of the footage and the rules alone. A packing that was killed goes on where it
was: ``DEST/.pack/journal.jsonl`` knows the finished videos and shards, spools hold clips that are in no shard yet.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import hashlib
import io
import json
import mimetypes
import os
import re
import shutil
import tarfile
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote

from pipelines import index, storage
from pipelines.contracts import derive
from pipelines.crew import PATIENCE, Crew
from pipelines.cutting import IMAGES, VIDEOS, Footage
from pipelines.faults import InputError
from pipelines.rules import CaptionTable, Card, PackRules, load_rules

__all__ = ["CaptionTable", "Card", "PackRules", "Progress", "Summary", "load_rules", "pack"]

VERSION = 1
"""Of what a packing stores: part of its plan, so that an old unfinished packing is not continued by new code."""
AHEAD = 32
"""Videos a worker that may wait in spools for their turn."""
LOOKERS = 16
"""Threads that look for the files of a list, and for copies."""
FINGERPRINT_BYTES = 1 << 16
TABLES = frozenset({".csv", ".tsv", ".jsonl", ".json"})
LISTS = frozenset({".txt", ".lst", *TABLES})
_TYPES = mimetypes.MimeTypes()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a packing is: ``done`` of ``videos``, clips and skips so far, and the video that was finished last."""

    done: int
    videos: int
    clips: int
    skipped: int
    last: str


@dataclass(frozen=True)
class Summary:
    """What a packing made. ``datasets`` maps ``train`` (and ``eval``) to URLs; ``skipped`` maps reasons to details.

    ``clips`` and ``seconds`` of footage by dataset; ``videos`` are those of the source, skipped ones included.
    """

    datasets: dict[str, str]
    videos: int
    clips: dict[str, int]
    seconds: dict[str, float]
    bytes: int
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def text(self) -> str:
        """The summary for people, a few lines."""
        lines = [
            f"{side}: {self.clips[side]} clips, {self.seconds[side] / 60:.1f} min -> {url}"
            for side, url in self.datasets.items()
        ]
        lost = sum(map(len, self.skipped.values()))
        lines.append(f"{self.videos - lost} of {self.videos} videos packed, {self.bytes / 1e6:.1f} MB")
        for reason, details in sorted(self.skipped.items()):
            lines.append(f"skipped, {reason}: {len(details)}")
            lines += [f"  {detail}" for detail in details[:5]]
            if len(details) > 5:
                lines.append(f"  and {len(details) - 5} more")
        return "\n".join(lines)


def pack(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    rules: PackRules | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    patience: float = PATIENCE,
) -> Summary:
    """Packs ``source`` (a folder, a list file, a single video, or an S3 prefix) into the dataset ``dest``.

    With ``rules.holdout`` there are two datasets, ``dest/train`` and ``dest/eval``, that share no source video; else
    ``dest`` is the dataset. A packing that was interrupted goes on; one that is complete is left as it is. ``workers``
    processes, by default one a core; a video in which nothing happens for ``patience`` seconds is skipped.

    Raises InputError when there is nothing to pack, when every video was skipped, when ``dest`` holds something else,
    or when it can't be written.
    """
    source, dest, rules = os.fspath(source), os.fspath(dest), rules or PackRules()
    packing = _Packing(source, dest, rules, *_listed(source, rules))
    if done := packing.finished():
        return done
    with contextlib.closing(packing):
        packing.resume()
        with Crew(max(1, min(workers or os.cpu_count() or 1, len(packing.videos))), rules, patience) as crew:
            packing.run(crew, progress)
        return packing.complete()


@dataclass(frozen=True, slots=True)
class _Video:
    """A source video in the order of the packing; videos of one ``group`` stay on one side."""

    footage: Footage
    group: str
    key: str


class _Packing:
    """One packing: its plan, what is done of it, and the shards in the making."""

    def __init__(
        self, source: str, dest: str, rules: PackRules, videos: Sequence[_Video], missing: Sequence[tuple[str, str]]
    ) -> None:
        self.source, self.dest, self.rules = storage.redact(source), dest, rules
        self.videos, self.missing = videos, missing
        self.sides = {"train": dest}
        if rules.holdout:
            self.sides = {side: storage.join(dest, side) for side in ("train", "eval")}
        listing = [(video.footage.name, video.footage.bytes, video.footage.caption) for video in videos]
        self.plan = _digest(json.dumps([VERSION, rules.model_dump(), listing]).encode())
        self.state = storage.join(dest, ".pack")
        self.journal = storage.join(self.state, "journal.jsonl")
        self.work = Path(tempfile.gettempdir(), f"moviola-pack-{_digest(f'{self.plan} {dest}'.encode())}")
        if not storage.is_remote(dest):
            self.work = _path(self.state)
        self.results: dict[int, dict[str, Any]] = {}
        self.stored: dict[str, index.Shard] = {}
        self.open: dict[str, _Shard] = {}
        self.unwritten = ""
        self.clips = self.skips = 0
        self.lock: BinaryIO | None = None

    def finished(self) -> Summary | None:
        """The summary of this very packing if it is complete. Raises InputError when DEST holds something else."""
        cards = {}
        for url in {self.dest, *self.sides.values(), storage.join(self.dest, "train"), storage.join(self.dest, "eval")}:
            if storage.exists(storage.join(url, "index.json")):
                card = index.open_dataset(url).card
                cards[url] = (card.model_extra or {}).get("pack", {})
                if cards[url].get("plan") != self.plan:
                    raise InputError(
                        f"{storage.redact(url)} already holds the dataset {card.name!r}, made from other footage or by "
                        "other rules; pack into another folder, or delete that one first"
                    )
        if set(cards) != set(self.sides.values()):
            return None
        storage.delete(self.state, recursive=True)
        return Summary(datasets=dict(self.sides), **next(iter(cards.values()))["summary"])

    def resume(self) -> None:
        """Takes up what an interrupted packing left. Raises InputError when that was another packing, or still runs."""
        lines = _entries(self.journal)
        if lines and lines[0].get("plan", self.plan) != self.plan:
            raise InputError(
                f"{storage.redact(self.dest)} holds an unfinished packing of other footage or by other rules; "
                f"finish it with the same command as before, pack into another folder, or delete {self.state}"
            )
        for entry in lines:
            if "video" in entry:
                self.results[entry["video"]] = entry["result"]
            elif "shard" in entry:
                self.stored[entry["shard"]] = index.Shard(**entry["line"])
        for url in self.sides.values() if not lines else ():
            shards = [entry.name for entry in storage.list_dir(url) if entry.name.endswith(".tar")]
            if shards:
                raise InputError(
                    f"{storage.redact(url)} already holds {len(shards)} shards ({shards[0]} ...) and no packing to go "
                    "on with; pack into another folder"
                )
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.lock = (self.work / "lock").open("wb")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{storage.redact(self.dest)} is being packed by another process; wait for it") from None
        except OSError as error:
            raise InputError(f"{self.work} can't be made: {error.strerror}; choose another destination") from None
        if not lines:
            self._note({"plan": self.plan, "source": self.source}, flush=True)
        if storage.is_remote(self.dest):
            self._recall()
        for video in self._lost():
            del self.results[video]
        self.clips = sum(len(result["clips"]) for result in self.results.values())
        self.skips = sum(bool(result["skip"]) for result in self.results.values())

    def close(self) -> None:
        """Lets another process go on."""
        if self.lock:
            self.lock.close()

    def run(self, crew: Crew, progress: Callable[[Progress], None] | None) -> None:
        """Cuts what is not cut yet, and puts the clips into shards in order."""
        todo = deque(video for video in range(len(self.videos)) if video not in self.results)
        layout, place = _Layout(self.rules), 0
        while place < len(self.videos):
            while todo and crew.idle and todo[0] < place + AHEAD * len(crew.workers):
                video = todo.popleft()
                crew.submit(video, self._job(video))
            if place in self.results:
                self._store(place, layout)
                place += 1
                continue
            for video, result in crew.results():
                self.results[video] = result
                self.clips += len(result["clips"])
                self.skips += bool(result["skip"])
                self._note({"video": video, "result": result})
                if progress:
                    progress(Progress(len(self.results), len(self.videos), self.clips, self.skips, self._name(video)))
        for shard in self.open.values():
            shard.close()

    def complete(self) -> Summary:
        """Writes the indexes. Raises InputError when there are no clips, or none to hold back."""
        skips = [*self.missing, *(result["skip"] for _, result in sorted(self.results.items()) if result["skip"])]
        skipped: dict[str, list[str]] = {}
        for reason, detail in skips:
            skipped.setdefault(reason, []).append(detail)
        if set(self.open) != set(self.sides):
            for url in self.sides.values():  # they were empty: the shards in them are of this packing
                for entry in storage.list_dir(url):
                    if entry.name.startswith("shard-"):
                        storage.delete(storage.join(url, entry.name))
            self._clear()
            for url in (*self.sides.values(), self.dest):
                if not storage.is_remote(url):
                    with contextlib.suppress(OSError):
                        _path(url).rmdir()  # an empty one
            raise InputError(_nothing(self.source, len(self.videos) + len(self.missing), skipped, bool(self.open)))
        shards = {
            side: [self.stored[f"{side}/{n}"] for n in range(last.number + 1)] for side, last in self.open.items()
        }
        cards = {side: self._card(side, shards[side]) for side in self.sides}
        summary = Summary(
            datasets=dict(self.sides),
            videos=len(self.videos) + len(self.missing),
            clips={side: card.counts["clips"] for side, card in cards.items()},
            seconds={side: _seconds(card) for side, card in cards.items()},
            bytes=sum(shard.bytes for side in self.sides for shard in shards[side]),
            skipped=skipped,
        )
        made = {"plan": self.plan, "source": self.source, "rules": self.rules.model_dump(exclude={"card"})}
        made["summary"] = {name: value for name, value in asdict(summary).items() if name != "datasets"}
        for side, url in reversed(self.sides.items()):
            card = cards[side].model_copy(update={"pack": made})
            index.write_index(url, card, shards[side])
        self._clear()
        return summary

    def spool(self, video: int) -> Path:
        """Where the clips of a video wait until they are in a shard."""
        return self.work / f"{video:08d}.spool"

    def note_shard(self, name: str, shard: index.Shard) -> None:
        """Remembers that a shard is stored."""
        self.stored[name] = shard
        self._note({"shard": name, "line": shard.model_dump()}, flush=True)

    def _job(self, video: int) -> dict[str, Any]:
        item = self.videos[video]
        chance = 0.5
        if self.rules.crop == "random":
            chance = derive(self.rules.seed, 0, f"pack/crop/{item.footage.name}") / 2**63
        return {"footage": asdict(item.footage), "key": item.key, "chance": chance, "spool": str(self.spool(video))}

    def _store(self, video: int, layout: _Layout) -> None:
        """Writes the clips of a video to their shards, except to those that are stored already."""
        clips = self.results[video]["clips"]
        start = 0
        shard: _Shard | None = None
        for clip, (side, number) in zip(clips, layout.place(self.videos[video].group, clips), strict=True):
            shard = self.open.get(side)
            if shard is None or shard.number != number:
                if shard:
                    shard.close()
                shard = self.open[side] = _Shard(self, side, number)
            shard.add(video, clip, start)
            start += clip["stored"]
        if shard:
            shard.ends.append(video)

    def _lost(self) -> list[int]:
        """Videos with clips that are in no stored shard, and no longer in a spool either."""
        lost, layout, placed = [], _Layout(self.rules), True
        for video in range(len(self.videos)):
            placed = placed and video in self.results
            clips = self.results.get(video, {"clips": []})["clips"]
            places = layout.place(self.videos[video].group, clips) if placed else [("", 0)] * len(clips)
            if any(f"{side}/{number}" not in self.stored for side, number in places) and not self.spool(video).exists():
                lost.append(video)
        return lost

    def _recall(self) -> None:
        """Takes up the videos that this machine finished and that no stored shard's note tells of."""
        for entry in _entries(str(self.work / "journal.jsonl")):
            if "video" not in entry:
                continue
            video, result = entry["video"], entry["result"]
            if video not in self.results:
                self.unwritten += json.dumps(entry) + "\n"
            elif self.results[video] != result:  # another machine cut it after this one, and not to the same clips
                self.spool(video).unlink(missing_ok=True)
            self.results.setdefault(video, result)

    def _note(self, entry: Mapping[str, Any], flush: bool = False) -> None:
        """Appends to the journal; to one on S3, where that costs a request, only with every shard, and until then to
        one of this machine.
        """
        line = json.dumps(entry) + "\n"
        self.unwritten += line
        if storage.is_remote(self.dest):
            storage.append_text(str(self.work / "journal.jsonl"), line)
        if flush or not storage.is_remote(self.dest):
            storage.append_text(self.journal, self.unwritten)
            self.unwritten = ""

    def _name(self, video: int) -> str:
        return self.videos[video].footage.name

    def _card(self, side: str, shards: Sequence[index.Shard]) -> index.Card:
        card, url = self.rules.card, self.sides[side]
        name = _slug(card.name or self.dest.rstrip("/").rpartition("/")[2])[:70] or "dataset"
        said = {key: value for key, value in card.model_dump(exclude={"name", "licence"}).items() if value}
        draft = index.Card(name=name + ("-eval" if side == "eval" else ""), licence=card.licence or "unknown", **said)
        records = index.Dataset(url, draft, shards, "", url).all_records()
        totals = index.merge([index.summary(rows) for _, rows in records])
        return index.Card(**{**draft.model_dump(), **totals})

    def _clear(self) -> None:
        storage.delete(self.state, recursive=True)
        shutil.rmtree(self.work, ignore_errors=True)


def _entries(journal: str) -> list[dict[str, Any]]:
    """The lines of a journal, less the one that was being written when the packing was killed."""
    entries = []
    with contextlib.suppress(storage.Missing):
        for line in storage.read_bytes(journal).decode("utf-8", "replace").splitlines():
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
    return entries


class _Layout:
    """Which clip goes to which side and shard: a function of the clips in their order, and of the rules."""

    def __init__(self, rules: PackRules) -> None:
        self.rules = rules
        self.groups = 0
        self.group: str | None = None
        self.side = "train"
        self.filled: dict[str, tuple[int, int, int]] = {"train": (0, 0, 0), "eval": (0, 0, 0)}

    def place(self, group: str, clips: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
        """(side, shard) of each clip of the next video. Videos without clips count for nothing."""
        if clips and group != self.group:
            share = self.rules.holdout
            before, after = (int(share * (count - 2) + 1 + 1e-9) for count in (self.groups, self.groups + 1))
            self.side = "eval" if share and after > before else "train"
            self.group, self.groups = group, self.groups + 1
        places = []
        for clip in clips:
            shard, held, size = self.filled[self.side]
            if held and (held >= self.rules.shard_clips or size + clip["stored"] > self.rules.shard_bytes):
                shard, held, size = shard + 1, 0, 0
            self.filled[self.side] = shard, held + 1, size + clip["stored"]
            places.append((self.side, shard))
        return places


class _Shard:
    """A shard in the making, or one that an earlier run stored, to which nothing needs to be written."""

    def __init__(self, packing: _Packing, side: str, number: int) -> None:
        self.packing, self.side, self.number = packing, side, number
        self.url = packing.sides[side]
        self.name = f"{side}/{number}"
        self.file = f"shard-{number:06d}.tar"
        self.draft = packing.work / f"{side}-{self.file}"
        self.members: list[index.Member] = []
        self.bytes = 0
        self.ends: list[int] = []
        self.done = self.name in packing.stored

    def add(self, video: int, clip: Mapping[str, Any], start: int) -> None:
        """Appends the members of a clip, which lie at ``start`` in the spool of its video."""
        if self.done:
            return
        with self.packing.spool(video).open("rb") as spool:
            spool.seek(start)
            self._write(spool.read(clip["stored"]))
        fields = {name: clip[name] for name in ("key", "bytes", "crc", "frames", "fps", "height", "width", "motion")}
        kind = index.IMAGE if clip["suffix"] in index.IMAGE_SUFFIXES else index.VIDEO
        self.members.append(index.Member(offset=self.bytes + tarfile.BLOCKSIZE, kind=kind, **fields))
        self.bytes += clip["stored"]

    def close(self) -> None:
        """Stores the shard and its index, and drops the spools of the videos that end in it."""
        if not self.done:
            self._write(bytes(2 * tarfile.BLOCKSIZE))
            storage.upload(storage.join(self.url, self.file), self.draft)
            length = self.bytes + 2 * tarfile.BLOCKSIZE
            self.packing.note_shard(self.name, index.write_shard_index(self.url, self.file, self.members, length))
            self.draft.unlink()
        for video in self.ends:
            self.packing.spool(video).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        try:
            with self.draft.open("ab" if self.members else "wb") as file:
                file.write(data)
        except OSError as error:
            raise InputError(
                f"{self.draft} can't be written: {error.strerror}; free space, then give the same command again"
            ) from None


def _nothing(source: str, videos: int, skipped: Mapping[str, Sequence[str]], some: bool) -> str:
    reasons = "".join(
        f"\n  {reason}: {len(details)}, for example {details[0]}" for reason, details in sorted(skipped.items())
    )
    if some:
        return (
            f"{source}: all clips come from one source video (or copies of it), so none can be held back; add videos, "
            f"or set holdout: 0{reasons}"
        )
    return f"{source}: none of {videos} videos could be packed; mend them, or relax the rules{reasons}"


def _seconds(card: index.Card) -> float:
    spread = card.statistics.get("seconds", {"mean": 0.0})
    return round(spread["mean"] * card.counts["videos"], 3)


def _listed(source: str, rules: PackRules) -> tuple[list[_Video], list[tuple[str, str]]]:
    """The source's videos in the order of the packing, and skips of videos that are named but not there."""
    missing: list[tuple[str, str]] = []
    suffix = PurePosixPath(source).suffix.lower()
    if not storage.is_remote(source) and not _path(source).exists():
        raise InputError(f"{source} is not there; give a folder of videos, a list file, or an s3:// prefix", status=2)
    if suffix in LISTS and storage.exists(source) and (storage.is_remote(source) or _path(source).is_file()):
        footage = _from_list(source, rules, missing)
    elif suffix in VIDEOS | IMAGES and (storage.is_remote(source) or _path(source).is_file()):
        footage = [Footage(_name(PurePosixPath(source).name), (_plain(source),), storage.size(source))]
    else:
        footage = _from_folder(source, rules, missing)
    if rules.captions and footage and not any(item.caption for item in footage):
        raise InputError(
            f"{storage.redact(source)}: no key in {rules.captions.table} names a video that is there, such as "
            f"{footage[0].name}; set captions.key to the column with their paths or file names"
        )
    if not footage and not missing:
        wanted = ", ".join(sorted(suffix[1:] for suffix in VIDEOS | IMAGES))
        where = storage.redact(storage.join(source, rules.root) if rules.root else source)
        raise InputError(
            f"{where} holds no videos or images that the rules take; looked for {wanted}, in subfolders too"
        )
    groups = _groups(footage, rules)
    if rules.holdout and len(set(groups.values())) == 1 and not missing:
        copies = ", and copies of it" if len(footage) > 1 else ""
        raise InputError(
            f"{storage.redact(source)} holds one source video ({footage[0].name}{copies}); holding back needs two. "
            "Add videos, or set holdout: 0"
        )
    videos = [_Video(item, groups[item.name], _key(item.name)) for item in footage]
    videos.sort(key=lambda v: (_rank(rules, v.group), v.group, _rank(rules, v.footage.name), v.footage.name))
    return videos, sorted(missing)


def _from_folder(source: str, rules: PackRules, missing: list[tuple[str, str]]) -> list[Footage]:
    base = storage.join(source, rules.root) if rules.root else source
    files = {name: (url, size) for name, url, size in _walk(base, missing)}
    wanted = None
    if rules.members:
        text = storage.read_bytes(storage.join(source, rules.members)).decode("utf-8-sig", "replace")
        wanted = {line.strip().strip("/") for line in text.splitlines() if line.strip() and not line.startswith("#")}
    captions = _captions(storage.join(source, rules.captions.table), rules.captions) if rules.captions else {}
    beside: dict[str, list[str]] = {}
    for name in sorted(files, reverse=True):  # .txt before .json
        if name.lower().endswith((".txt", ".json")):
            beside.setdefault(os.path.splitext(name)[0], []).append(files[name][0])
    units: dict[str, list[str]] = {}
    for name in files:
        if wanted is None and _is_other_footage(name) and any(fnmatchcase(name, p) for p in rules.include):
            missing.append(("format", f"{name}: such files are not taken; convert it to mp4, or to png or jpg"))
        kind = os.path.splitext(name)[1].lower()
        if kind in IMAGES and rules.image_folders:
            units.setdefault(os.path.dirname(name) or ".", []).append(name)
        elif kind in VIDEOS | IMAGES:
            units.setdefault(name, []).append(name)
    footage = []
    for name, parts in units.items():
        if (wanted is not None and name not in wanted) or not any(fnmatchcase(name, p) for p in rules.include):
            continue
        parts.sort(key=_natural)
        urls, sizes = zip(*(files[part] for part in parts), strict=True)
        stem = name if len(parts) > 1 else os.path.splitext(name)[0]
        footage.append(Footage(_name(name), urls, sum(sizes), _caption(captions, name), tuple(beside.get(stem, ()))))
    for name in sorted((wanted or set()) - set(units)):
        missing.append(("missing", f"{name} is in {rules.members}, but not in the source"))
    return footage


def _is_other_footage(name: str) -> bool:
    """Whether a file is a video or image of a kind that is not taken."""
    kind = (_TYPES.guess_type(name)[0] or "").partition("/")[0]
    return kind in ("video", "image") and os.path.splitext(name)[1].lower() not in VIDEOS | IMAGES


def _from_list(source: str, rules: PackRules, missing: list[tuple[str, str]]) -> list[Footage]:
    """Videos named by a text file, one path or URL a line, or by a table with the columns ``path`` and ``caption``."""
    if PurePosixPath(source).suffix.lower() in TABLES:
        rows = [(row.get("path"), row.get("caption")) for row in _table(source)]
        if not all(path for path, _ in rows):
            raise InputError(f"{source}: every row needs a column 'path'; 'caption' is optional")
    else:
        lines = storage.read_bytes(source).decode("utf-8-sig", "replace").splitlines()
        rows = [(line.strip(), None) for line in lines if line.strip() and not line.startswith("#")]
    folder = source.rpartition("/")[0] or "."
    captions = _captions(storage.join(folder, rules.captions.table), rules.captions) if rules.captions else {}
    paths = [str(path) for path, _ in rows]
    urls = [path if "://" in path or path.startswith(("/", "~")) else storage.join(folder, path) for path in paths]
    with ThreadPoolExecutor(LOOKERS) as pool:
        sizes = list(pool.map(_size, urls))
    footage: dict[str, Footage] = {}
    for path, url, size, (_, caption) in zip(paths, urls, sizes, rows, strict=True):
        if size is None:
            missing.append(("missing", f"{storage.redact(path)} is in {PurePosixPath(source).name}, but not there"))
            continue
        name, stem = _name(path), os.path.splitext(_plain(url))[0]
        text = str(caption) if caption else _caption(captions, path)
        footage[name] = Footage(name, (_plain(url),), size, text, (f"{stem}.txt", f"{stem}.json"))
    return list(footage.values())


def _size(url: str) -> int | None:
    """Bytes of a file, None where there is none."""
    with contextlib.suppress(storage.Missing):
        if storage.is_remote(url) or _path(url).exists():
            return storage.size(url)
    return None


def _walk(
    url: str, missing: list[tuple[str, str]], prefix: str = "", above: frozenset[str] = frozenset()
) -> Iterator[tuple[str, str, int]]:
    """(path below ``url``, URL or local path, bytes) of every file; hidden ones and circles of links are left out."""
    if storage.is_remote(url):
        for entry in storage.list_below(url):
            yield entry.name, f"{url.rstrip('/')}/{entry.name}", entry.bytes  # not joined: S3 knows names with //
        return
    folder = storage.join(url, prefix) if prefix else url
    real = os.path.realpath(_path(folder))
    if real in above:
        return
    above = above | {real}
    for entry in _scan(folder, prefix, missing):
        if entry.name.startswith("."):
            continue
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir:
            yield from _walk(url, missing, name, above)
        else:
            yield name, _plain(storage.join(url, name)), entry.bytes


def _scan(folder: str, prefix: str, missing: list[tuple[str, str]]) -> list[storage.Entry]:
    """A local folder; what looks like footage but is no file goes to ``missing``."""
    entries = []
    try:
        found = sorted(os.scandir(_path(folder)), key=lambda item: item.name)
    except OSError as error:
        raise InputError(f"{folder} can't be read: {error.strerror}") from None
    for item in found:
        if item.is_dir() or item.is_file():
            entries.append(storage.Entry(item.name, 0 if item.is_dir() else item.stat().st_size, item.is_dir()))
        elif os.path.splitext(item.name)[1].lower() in VIDEOS | IMAGES:
            what = "a link to nowhere" if item.is_symlink() else "not a file"
            missing.append(("missing", f"{_name(os.path.join(prefix, item.name))} is {what}"))
    return entries


def _groups(footage: Sequence[Footage], rules: PackRules) -> dict[str, str]:
    """The source of each video: what ``rules.group`` finds in its path. Copies of a file are one source."""
    groups = {}
    for item in footage:
        found = re.search(rules.group, item.name) if rules.group else None
        groups[item.name] = (found and found[1]) or item.name
    if not rules.holdout:
        return groups
    sizes = Counter(item.bytes for item in footage)
    same: dict[str, str] = {}
    alias: dict[str, str] = {}

    def root(group: str) -> str:
        while group in alias:
            group = alias[group]
        return group

    alike = [item for item in footage if item.bytes and sizes[item.bytes] > 1]
    with ThreadPoolExecutor(LOOKERS) as pool:
        for item, fingerprint in zip(alike, pool.map(_fingerprint, alike), strict=True):
            if fingerprint:
                mine, first = root(groups[item.name]), root(same.setdefault(fingerprint, groups[item.name]))
                if mine != first:
                    alias[mine] = first
    return {name: root(group) for name, group in groups.items()}


def _fingerprint(item: Footage) -> str:
    """Digest of both ends: enough to know copies among files of the same size. Empty for what can't be read: cutting
    skips that, and says why.
    """
    try:
        first, last = (item.bytes if len(item.urls) == 1 else storage.size(item.urls[end]) for end in (0, -1))
        head = storage.read_bytes(item.urls[0], 0, min(FINGERPRINT_BYTES, first))
        return _digest(head + storage.read_bytes(item.urls[-1], max(0, last - FINGERPRINT_BYTES), last))
    except InputError:
        return ""


def _captions(url: str, rule: CaptionTable) -> dict[str, str]:
    captions = {}
    for row in _table(url):
        key, text = _column(row, rule.key), _column(row, rule.text)
        if key is None or text is None:
            raise InputError(
                f"{storage.redact(url)}: captions need the columns {rule.key!r} and {rule.text!r}; there are "
                f"{', '.join(map(str, row))}"
            )
        captions[str(key)] = str(text).strip()
    return captions


def _column(row: Mapping[str, Any], name: str) -> Any:
    """A column; dots lead into nested objects."""
    if name in row:
        return row[name] or ""
    head, _, rest = name.partition(".")
    return _column(row[head], rest) if rest and isinstance(row.get(head), Mapping) else None


def _caption(captions: Mapping[str, str], name: str) -> str | None:
    stem, base = os.path.splitext(name)[0], os.path.basename(name)
    for key in (name, stem, base, os.path.splitext(base)[0]):
        if captions.get(key):
            return captions[key]
    return None


def _table(url: str) -> Iterator[dict[str, Any]]:
    """Rows of a .csv, .tsv, .jsonl, or .json (a list of objects) as mappings."""
    text = storage.read_bytes(url).decode("utf-8-sig", "replace")
    if url.lower().endswith(".json"):
        rows = storage.read_json(url)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{storage.redact(url)}: a table in JSON is a list of objects")
        yield from rows
        return
    if url.lower().endswith(".jsonl"):
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as error:
                raise InputError(f"{storage.redact(url)}, line {number}: not JSON: {error}") from None
            if isinstance(row, dict):
                yield row
    else:
        rows = csv.DictReader(io.StringIO(text), delimiter="\t" if url.lower().endswith(".tsv") else ",")
        try:
            yield from rows
        except csv.Error as error:
            hint = "a field that opens with a quotation mark, and is not closed, goes on over the lines that follow"
            raise InputError(f"{storage.redact(url)}, up to line {rows.line_num}: {error}; {hint}") from None


def _rank(rules: PackRules, name: str) -> int:
    return derive(rules.seed, 0, f"pack/{name}")


def _key(name: str) -> str:
    """Key of a video's clips: readable, unique, and safe in any file name."""
    return f"{_slug(os.path.splitext(name)[0])[-48:].strip('-')}-{_digest(name.encode())[:8]}"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-_")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts im2 before im10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _name(path: str) -> str:
    """A path as it stands in messages and sidecars; of what is not UTF-8 the bytes' numbers, so that no two are one."""
    return storage.redact(os.fsencode(path).decode("utf-8", "backslashreplace"))


def _path(url: str) -> Path:
    return Path(_plain(url))


def _plain(url: str) -> str:
    """A local URL as a path; S3 URLs as they are."""
    if storage.is_remote(url):
        return url
    return os.path.expanduser(unquote(url.removeprefix("file://")) if url.startswith("file://") else url)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
