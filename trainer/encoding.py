"""A dataset of videos through a codec -> a dataset of latents, to train a diffusion model on.

    clips, in the order of the source -> windows of ``frames`` -> codec -> KEY.safetensors, KEY.json, KEY.t5.npy
      -> shards, each of a span of the source's clips -> index, with the latents' layout and statistics on the card

A sample is a file that ``moviola decode`` takes. An encoding that was killed goes on at the clip where it was: the
shard in the making grows in ``DEST/.encode`` (of a remote DEST, in a local temporary folder) beside a journal, a line a
clip, and what lies beyond the last whole line is cut off.

Legend: C channels (3, RGB), T frames, H height, W width; latents are (1, C, *tokens), whatever their codec calls them.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import re
import shutil
import tarfile
import tempfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pipelines import index, storage
from pipelines.clips import cut, read_caption
from pipelines.contracts import ClipRule, LatentLayout, LatentTensor
from pipelines.cutting import tar_member
from pipelines.decode import open_video
from pipelines.faults import InputError, Skip
from pipelines.order import crop
from trainer import latents, run
from trainer.codec import CONFIG, Codec, made_by

VERSION = 1
"""Of what an encoding stores: part of its plan, so that an old unfinished one is not continued by new code."""
SHARD_CLIPS = 256
AHEAD = 3
"""Clips of the source that are decoded while one is encoded."""
SIDECAR_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an encoding is: ``done`` of the source's ``clips``, samples and skipped clips so far."""

    done: int
    clips: int
    samples: int
    skipped: int


@dataclass(frozen=True)
class Summary:
    """What an encoding made. ``clips`` are the source's, ``numbers`` the latent numbers of a sample at most."""

    dataset: str
    clips: int
    samples: int
    bytes: int
    numbers: int
    layout: Mapping[str, Sequence[int]]
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def text(self) -> str:
        """The summary for people, a few lines."""
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in self.layout.items())
        lost = sum(map(len, self.skipped.values()))
        lines = [
            f"{self.samples} samples of {self.clips - lost} of {self.clips} clips -> {self.dataset}",
            f"{shapes}: up to {self.numbers:,} numbers a sample, {self.bytes / 1e6:.1f} MB in all",
        ]
        for reason, details in sorted(self.skipped.items()):
            lines.append(f"skipped, {reason}: {len(details)}")
            lines += [f"  {detail}" for detail in details[:5]]
            if len(details) > 5:
                lines.append(f"  and {len(details) - 5} more")
        return "\n".join(lines)


def encode_dataset(
    codec: Codec,
    source: str,
    dest: str,
    frames: int,
    size: tuple[int, int],
    *,
    shard_clips: int = SHARD_CLIPS,
    progress: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Encodes every whole window of ``frames`` of every clip of ``source``, resized and cropped (in the middle) to
    ``size``, into the dataset ``dest``.

    One that was interrupted goes on, one that is complete is left as it is. A shard holds the windows of
    ``shard_clips`` clips. Clips that are too short or damaged are skipped and named. Raises InputError where nothing
    can be encoded, ``dest`` holds something else, or the codec's latents are not all of one layout.
    """
    encoding = _Encoding(codec, index.open_dataset(source), dest, frames, size, shard_clips)
    if done := encoding.finished():
        return done
    with contextlib.closing(encoding):
        encoding.resume()
        encoding.run(progress)
        return encoding.complete()


def window(url: str, frames: int | None, size: str | None) -> tuple[int, tuple[int, int]]:
    """Frames and (height, width) of a sample: those that were asked for (``HxW``), else those of the last stage of the
    codec's run. Raises InputError where neither is known.
    """
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if size is not None else None
    if size is not None and not match:
        raise InputError(f"--size {size}: write height and width in pixels, 256x256 for example", status=2)
    asked = (int(match[1]), int(match[2])) if match else None
    if frames and asked:
        return frames, asked
    if storage.exists(storage.join(url, CONFIG)):
        raise InputError(
            f"{storage.redact(url)} is an export, which does not say how it was trained; give --frames and --size",
            status=2,
        )
    manifest = run.load(re.sub(r"/checkpoints/step-\d{8,}/?$", "", url.rstrip("/")))
    assert manifest is not None
    clip = manifest.schedule.stages[-1].clip
    return frames or clip.frames, asked or clip.sizes[0]


@dataclass
class _Tally:
    """What is known of the latents so far: their structure, and sums over the tokens of each channel."""

    steps: list[dict[str, list[int]]] = field(default_factory=list)
    constants: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sums: dict[str, list[float]] = field(default_factory=dict)
    squares: dict[str, list[float]] = field(default_factory=dict)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    fps: float = 0.0
    samples: int = 0

    @classmethod
    def of(cls, stream: Sequence[Mapping[str, Tensor]], fps: float, name: str) -> _Tally:
        """Of one sample."""
        made = cls(fps=fps, samples=1)
        for number, latent in enumerate(stream):
            made.steps.append({})
            for title, value in sorted(latent.items()):
                if not value.is_floating_point():
                    made.constants[f"{number:08d}.{title}"] = value.flatten().tolist()
                    continue
                made.steps[-1][title] = list(value.shape)
                x_CN = value.detach()[0].double().flatten(1).cpu()
                if not bool(x_CN.isfinite().all()):
                    raise Skip("not_finite", f"{name}: {title} of step {number} has numbers that are not finite")
                sums, squares = x_CN.sum(1).tolist(), x_CN.square().sum(1).tolist()
                made.tokens[title] = made.tokens.get(title, 0) + x_CN.shape[1]
                made.sums[title] = _plus(made.sums.get(title), sums)
                made.squares[title] = _plus(made.squares.get(title), squares)
                made.lengths[title] = {str(value.shape[-1]): 1}
        return made

    def add(self, other: _Tally, name: str) -> None:
        """Adds a sample's, or a shard's; raises InputError where its structure is another."""
        if not other.samples:
            return
        if not self.samples:
            self.steps, self.constants = [dict(step) for step in other.steps], dict(other.constants)
        if fault := self._differs(other):
            raise InputError(
                f"{name}: {fault} in the samples before it; a dataset of latents has one layout. Take fewer frames "
                "(--frames), so that each window is coded alike, or set what makes the codec choose"
            )
        for mine, others in zip(self.steps, other.steps, strict=True):
            for title, shape in others.items():
                mine[title] = [max(a, b) for a, b in zip(mine[title], shape, strict=True)]
        self.samples += other.samples
        self.fps += other.fps
        for title, count in other.tokens.items():
            self.tokens[title] = self.tokens.get(title, 0) + count
            self.sums[title] = _plus(self.sums.get(title), other.sums[title])
            self.squares[title] = _plus(self.squares.get(title), other.squares[title])
            lengths = Counter(self.lengths.get(title, {})) + Counter(other.lengths[title])
            self.lengths[title] = dict(sorted(lengths.items(), key=lambda item: int(item[0])))

    def _differs(self, other: _Tally) -> str | None:
        if len(self.steps) != len(other.steps):
            return f"the codec made {len(other.steps)} steps, and {len(self.steps)}"
        for number, (mine, others) in enumerate(zip(self.steps, other.steps, strict=True)):
            if mine.keys() != others.keys():
                return f"step {number} has {', '.join(others)}, and {', '.join(mine)}"
            for title in mine:
                free = sum(title in step for step in self.steps) == 1
                a, b = (shape[:-1] if free else shape for shape in (mine[title], others[title]))
                if a != b:
                    return f"{title} of step {number} is {others[title]}, and {mine[title]}"
        for key in {**self.constants, **other.constants}:
            if self.constants.get(key) != other.constants.get(key):
                return f"{key} is {other.constants.get(key)}, and {self.constants.get(key)}"
        return None

    def layout(self, codec: Codec, frames: int, size: tuple[int, int]) -> LatentLayout:
        """What all samples have in common. Lengths that follow from the content go up to what the codec may take."""
        greatest = codec.recipe.latent(frames, *codec.padded(*size)).shapes
        tensors = {}
        for title, count in self.tokens.items():
            shapes = [(number, step[title]) for number, step in enumerate(self.steps) if title in step]
            first = shapes[0][1]
            tokens = [sum(shape[2] for _, shape in shapes), *first[3:]]
            lengths = {int(length): clips for length, clips in self.lengths[title].items()}
            if len(shapes) == 1 and len(greatest.get(title, ())) == 1 + len(tokens):
                tokens[-1] = max(tokens[-1], greatest[title][-1])
            parts = [(number, shape[2]) for number, shape in shapes]
            if len(tokens) == len(parts) == 1:
                parts = [(parts[0][0], tokens[0])]
            variable = len(shapes) == 1 and set(lengths) != {tokens[-1]}
            mean = np.array(self.sums[title]) / max(1, count)
            variance = np.maximum(np.array(self.squares[title]) / max(1, count) - mean**2, 0.0)
            std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
            tensors[title] = LatentTensor(
                tokens=tuple(tokens), parts=tuple(parts), mean=tuple(mean.tolist()), std=tuple(std.tolist()),
                lengths=lengths if variable else {},
            )  # fmt: skip
        return LatentLayout(
            codec=made_by(codec), frames=frames, height=size[0], width=size[1], fps=self.fps / self.samples,
            steps=len(self.steps), tensors=tensors,
            constants={key: tuple(values) for key, values in self.constants.items()},
        )  # fmt: skip


def _plus(a: Sequence[float] | None, b: Sequence[float]) -> list[float]:
    return [x + y for x, y in zip(a, b, strict=True)] if a else list(b)


class _Encoding:
    """One encoding: its plan, what is done of it, and the shard in the making."""

    def __init__(
        self, codec: Codec, source: index.Dataset, dest: str, frames: int, size: tuple[int, int], shard_clips: int
    ) -> None:
        self.codec, self.source, self.dest = codec, source, storage.absolute(dest)
        self.frames, self.size, self.shard_clips = frames, size, shard_clips
        if source.latents is not None:
            raise InputError(f"{storage.redact(source.url)} holds latents already; name a dataset of videos", status=2)
        if self.dest.rstrip("/") == storage.absolute(source.url).rstrip("/"):
            raise InputError(f"{storage.redact(dest)} is the dataset to read; name another folder to write", status=2)
        codec.recipe.latent(frames, *codec.padded(*size))  # refuses what the codec can't take
        self.made_by = made_by(codec)
        plan = [VERSION, self.made_by, source.digest, frames, size, shard_clips]
        self.plan = hashlib.blake2b(json.dumps(plan, sort_keys=True).encode(), digest_size=16).hexdigest()
        self.state = storage.join(self.dest, ".encode")
        self.work = Path(tempfile.gettempdir(), f"moviola-encode-{self.plan}")
        if not storage.is_remote(self.dest):
            self.work = Path(self.state.removeprefix("file://"))
        self.shards = -(-source.clips // shard_clips)
        self.stored: dict[int, dict[str, Any]] = {}
        self.lock: Any = None

    def finished(self) -> Summary | None:
        """The summary of this very encoding if it is complete. Raises InputError when DEST holds something else."""
        if not storage.exists(storage.join(self.dest, "index.json")):
            return None
        card = index.open_dataset(self.dest).card
        made = (card.model_extra or {}).get("encode", {})
        if made.get("plan") != self.plan:
            raise InputError(
                f"{storage.redact(self.dest)} already holds the dataset {card.name!r}, of other footage, weights or "
                "settings; encode into another folder, or delete that one first"
            )
        storage.delete(self.state, recursive=True)
        return Summary(dataset=self.dest, **made["summary"])

    def resume(self) -> None:
        """Takes up what an interrupted encoding left. Raises InputError when that was another one, or still runs."""
        where, plan_url = storage.redact(self.dest), storage.join(self.state, "plan.json")
        if storage.exists(plan_url):
            if storage.read_json(plan_url).get("plan") != self.plan:
                raise InputError(
                    f"{where} holds an unfinished encoding of other footage, weights or settings; finish it with the "
                    f"same command as before, encode into another folder, or delete {storage.redact(self.state)}"
                )
        elif tars := [entry.name for entry in storage.list_dir(self.dest) if entry.name.endswith(".tar")]:
            raise InputError(
                f"{where} already holds {len(tars)} shards ({tars[0]} ...) and no encoding to go on with; encode into "
                "another folder"
            )
        self.work.mkdir(parents=True, exist_ok=True)
        self.lock = (self.work / "lock").open("wb")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{where} is being encoded by another process; wait for it") from None
        storage.write_json(plan_url, {"plan": self.plan, "source": storage.redact(self.source.url)})
        for entry in storage.list_dir(self.state):
            if match := re.fullmatch(r"shard-(\d{6})\.json", entry.name):
                self.stored[int(match[1])] = storage.read_json(storage.join(self.state, entry.name))

    def close(self) -> None:
        """Lets another process go on."""
        if self.lock:
            self.lock.close()

    def run(self, progress: Callable[[Progress], None]) -> None:
        """Encodes what is not encoded yet, clip by clip, shard by shard."""
        total = self.source.clips
        samples = skips = 0
        with ThreadPoolExecutor(AHEAD) as pool:
            for number in range(self.shards):
                first = number * self.shard_clips
                last = min(first + self.shard_clips, total)
                if number not in self.stored:
                    with _Draft(self.work, number) as draft:
                        if draft.clips:
                            progress(Progress(first + draft.clips, total, samples + draft.tally.samples, skips))
                        for read in _ahead(pool, self._read, range(first + draft.clips, last)):
                            self._encode(read, draft)
                            skipped = skips + len(draft.skips)
                            progress(Progress(first + draft.clips, total, samples + draft.tally.samples, skipped))
                        self._store(draft)
                samples += self.stored[number]["tally"]["samples"]
                skips += len(self.stored[number]["skips"])
                progress(Progress(last, total, samples, skips))

    def _encode(self, read: _Read | Skip, draft: _Draft) -> None:
        """Appends the samples of a clip to the shard, or notes what it is skipped for."""
        tally, samples = _Tally(), []
        try:
            if isinstance(read, Skip):
                raise read
            caption_1LD = None if read.caption_LD is None else read.caption_LD[None].to(self.codec.device)
            for window, pixels_1CTHW in enumerate(read.windows_1CTHW):
                stream = [
                    {name: value.detach().cpu().contiguous() for name, value in latent.items()}
                    for latent in self.codec.encode(pixels_1CTHW, caption_1LD)
                ]
                tally.add(_Tally.of(stream, read.fps, read.name), read.name)
                key = f"{read.key}-{window:03d}" if len(read.windows_1CTHW) > 1 else read.key
                samples.append((key, self._parts(read, stream, window)))
        except Skip as skip:
            draft.note(str(read), [], _Tally(), [skip.reason, skip.detail])
        else:
            assert isinstance(read, _Read)
            members = [self._member(draft, key, parts, read) for key, parts in samples]
            draft.note(read.name, members, tally, None)

    def _read(self, clip: int) -> _Read | Skip:
        """A clip's whole windows, resized and cropped in the middle; a Skip for one that can't be used."""
        dataset = self.source
        shard, row = dataset.locate(clip)
        record = dataset.records(shard, row, row + 1)[0]
        name = f"{dataset.name}/{dataset.files[shard]}/{record['key'].decode()}"
        try:
            data = _bytes(dataset, shard, record, name)
            caption = _bytes(dataset, shard, record, name, "caption_") if record["caption_bytes"] else b""
            image = record["kind"] == index.IMAGE
            count = (1 if image else int(record["frames"])) // self.frames
            if not count:
                raise Skip("short", f"{name}: {record['frames']} frames; a window has {self.frames}")
            rule = ClipRule(frames=self.frames, sizes=(self.size,), crop="center", flip=0.0)
            with open_video(data, name, image=image) as video:
                how = crop(rule, (video.height, video.width), self.size, 0, 0)
                frames_TCHW = video.read(range(count * self.frames), (how.height, how.width))
            windows = [cut(part, how, self.size)[None] for part in frames_TCHW.split(self.frames)]
            return _Read(
                name=name, key=record["key"].decode(), windows_1CTHW=windows, fps=float(record["fps"]) or 1.0,
                motion=float(record["motion"]), caption=caption,
                caption_LD=read_caption(caption, name, dataset.caption_width or None) if caption else None,
                sidecar=_sidecar(dataset, shard, record),
            )  # fmt: skip
        except Skip as skip:
            return skip

    def _parts(self, read: _Read, stream: Sequence[Mapping[str, Tensor]], window: int) -> dict[str, bytes]:
        """The files of a sample by suffix."""
        height, width = self.size
        shape = {"frames": self.frames, "height": height, "width": width, "fps": read.fps}
        made = {name: str(self.made_by[name]) for name in ("recipe", "weights")}
        told = {
            **read.sidecar,
            "encoded": read.name,
            "first_frame": window * self.frames,
            **shape,
            "motion": read.motion,
        }
        parts = {
            index.LATENT_SUFFIX: latents.packed(stream, made | {name: str(value) for name, value in shape.items()}),
            "json": (json.dumps(told) + "\n").encode(),
        }
        return parts | ({index.CAPTION_SUFFIX: read.caption} if read.caption else {})

    def _member(self, draft: _Draft, key: str, parts: Mapping[str, bytes], read: _Read) -> dict[str, Any]:
        places = {suffix: draft.add(f"{key}.{suffix}", data) for suffix, data in parts.items()}
        data, caption = parts[index.LATENT_SUFFIX], parts.get(index.CAPTION_SUFFIX, b"")
        return {
            "key": key, "offset": places[index.LATENT_SUFFIX], "bytes": len(data), "crc": zlib.crc32(data),
            "frames": self.frames, "fps": read.fps, "height": self.size[0], "width": self.size[1],
            "motion": read.motion, "kind": index.LATENTS, "caption_offset": places.get(index.CAPTION_SUFFIX, 0),
            "caption_bytes": len(caption), "caption_crc": zlib.crc32(caption) if caption else 0,
        }  # fmt: skip

    def _store(self, draft: _Draft) -> None:
        """Uploads a whole shard with its index, and notes it."""
        line: dict[str, Any] = {"shard": None, "tally": asdict(draft.tally), "skips": draft.skips}
        if draft.members:
            file, length = f"shard-{draft.number:06d}.tar", draft.end()
            storage.upload(storage.join(self.dest, file), draft.tar)
            members = [index.Member(**member) for member in draft.members]
            line["shard"] = index.write_shard_index(self.dest, file, members, length).model_dump()
        storage.write_json(storage.join(self.state, f"shard-{draft.number:06d}.json"), line)
        self.stored[draft.number] = line
        draft.drop()

    def complete(self) -> Summary:
        """Writes the index. Raises InputError where every clip was skipped."""
        skipped: dict[str, list[str]] = {}
        tally = _Tally()
        for number in range(self.shards):
            tally.add(_Tally(**self.stored[number]["tally"]), f"shard {number}")
            for reason, detail in self.stored[number]["skips"]:
                skipped.setdefault(reason, []).append(detail)
        if not tally.samples:
            reasons = "".join(f"\n  {reason}: {len(d)}, for example {d[0]}" for reason, d in sorted(skipped.items()))
            self._clear()
            raise InputError(
                f"{storage.redact(self.source.url)}: none of {self.source.clips} clips could be encoded in windows of "
                f"{self.frames} frames; lower --frames, or lint the dataset{reasons}"
            )
        lines = [self.stored[number]["shard"] for number in range(self.shards)]
        shards = [index.Shard(**line) for line in lines if line]
        layout = tally.layout(self.codec, self.frames, self.size)
        draft = index.Dataset(self.dest, index.Card(name="new"), shards, "", self.dest)
        totals = index.merge([index.summary(rows) for _, rows in draft.all_records()])
        summary = Summary(
            dataset=self.dest, clips=self.source.clips, samples=tally.samples,
            bytes=sum(shard.bytes for shard in shards), numbers=layout.numbers,
            layout={name: tensor.shape for name, tensor in layout.tensors.items()}, skipped=skipped,
        )  # fmt: skip
        told: dict[str, Any] = {"latents": layout.model_dump(mode="json", exclude={"caption_width", "text_encoder"})}
        if self.source.caption_width:
            told["text_encoder"] = (self.source.card.model_extra or {}).get("text_encoder")
            told["embeddings"] = {"clips": totals["counts"]["captions"], "width": self.source.caption_width}
        kept = {name: value for name, value in asdict(summary).items() if name != "dataset"}
        told["encode"] = {"plan": self.plan, "source": storage.redact(self.source.url), "summary": kept}
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.dest.rstrip("/").rpartition("/")[2]).strip("-.")[:80]
        card = index.Card(name=name or "latents", licence=self.source.card.licence, **told, **totals)
        index.write_index(self.dest, card, shards)
        self._clear()
        return summary

    def _clear(self) -> None:
        storage.delete(self.state, recursive=True)
        shutil.rmtree(self.work, ignore_errors=True)


class _Draft:
    """A shard in the making: a tar that grows, and a journal of the clips whose samples are whole in it."""

    def __init__(self, work: Path, number: int) -> None:
        self.number = number
        self.tar, self.journal = (work / f"shard-{number:06d}.{kind}" for kind in ("tar", "jsonl"))
        self.members: list[dict[str, Any]] = []
        self.skips: list[list[str]] = []
        self.tally = _Tally()
        self.clips = self.place = 0

    def __enter__(self) -> _Draft:
        whole = 0
        for line in self.journal.read_bytes().splitlines(keepends=True) if self.journal.exists() else ():
            if not line.endswith(b"\n"):
                break  # the line that was being written when the encoding was killed
            whole += len(line)
            self._take(json.loads(line))
        self._tar, self._lines = self.tar.open("ab"), self.journal.open("ab")
        self._tar.truncate(self.place)
        self._lines.truncate(whole)
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()
        self._lines.close()

    def add(self, name: str, data: bytes) -> int:
        """Appends a member; where its bytes start."""
        whole = tar_member(name, data)
        start = self.place + len(whole) - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._tar.write(whole)
        self.place += len(whole)
        return start

    def note(self, name: str, members: Sequence[Mapping[str, Any]], tally: _Tally, skip: Sequence[str] | None) -> None:
        """Makes a clip's samples count: from here on they are not encoded again."""
        line = {"clip": name, "end": self.place, "members": members, "tally": asdict(tally), "skip": skip}
        self._take(line)
        self._tar.flush()
        self._lines.write(json.dumps(line).encode() + b"\n")
        self._lines.flush()

    def _take(self, line: Mapping[str, Any]) -> None:
        self.tally.add(_Tally(**line["tally"]), line["clip"])
        self.clips += 1
        self.place = line["end"]
        self.members += line["members"]
        if line["skip"]:
            self.skips.append(line["skip"])

    def end(self) -> int:
        """Ends the tar; its length."""
        self._tar.write(bytes(2 * tarfile.BLOCKSIZE))
        self._tar.flush()
        return self.place + 2 * tarfile.BLOCKSIZE

    def drop(self) -> None:
        """Deletes the shard's files here: it is stored."""
        self.tar.unlink()
        self.journal.unlink()


@dataclass(frozen=True, slots=True)
class _Read:
    """A clip of the source: its windows (1, 3, T, H, W) in [-1, 1], and what is said of it."""

    name: str
    key: str
    windows_1CTHW: Sequence[Tensor]
    fps: float
    motion: float
    caption: bytes
    caption_LD: Tensor | None
    sidecar: Mapping[str, Any]


def _ahead(pool: ThreadPoolExecutor, read: Callable[[int], Any], clips: Sequence[int]) -> Iterator[Any]:
    """``read`` of each clip in order, a few of them ahead."""
    waiting: deque[Future[Any]] = deque()
    for clip in clips:
        waiting.append(pool.submit(read, clip))
        if len(waiting) > AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _bytes(dataset: index.Dataset, shard: int, record: np.void, name: str, part: str = "") -> bytes:
    start = int(record[f"{part}offset"])
    data = storage.read_bytes(dataset.shard_url(shard), start, start + int(record[f"{part}bytes"]))
    if zlib.crc32(data) != record[f"{part}crc"]:
        raise Skip("digest", f"{name}: its bytes do not have the digest that the index has")
    return data


def _sidecar(dataset: index.Dataset, shard: int, record: np.void) -> Mapping[str, Any]:
    """The clip's ``.json``, where it stands among the members after the clip's; else nothing."""
    start = int(record["offset"]) + -(-int(record["bytes"]) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    end = min(start + SIDECAR_BYTES, int(dataset.shard_bytes[shard]))
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read_bytes(dataset.shard_url(shard), start, end))) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if key != record["key"].decode():
                    break
                file = tar.extractfile(member) if suffix == "json" else None
                told = json.load(file) if file else None
                if isinstance(told, dict):
                    return told
    except (tarfile.TarError, ValueError):
        pass
    return {}
