"""One video -> its clips: decoded once, cut at scene changes, resampled, resized and encoded on the way.

``python -m pipelines.cutting`` is the packer's worker: a JSON job a line on standard input, a JSON report a line on
standard output. It is a process of its own, so that a decoder that crashes or hangs costs one video.

Legend: H height, W width of one plane of a frame.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from math import ceil
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from pipelines import storage
from pipelines.container import brief, opened, turns
from pipelines.faults import InputError, Skip
from pipelines.rules import PackRules
from pipelines.shots import Thumbnail, motion, shots, thumbnail

VIDEOS = frozenset(
    {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".wmv", ".flv", ".3gp", ".ogv", ".gif", ".yuv", ".y4m"}
)
IMAGES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
COPYABLE = frozenset({"h264", "hevc", "av1", "vp9", "mpeg4"})
LEAST_SIDE = 16
PIXELS_A_SIDE = 16384
PIXELS = 1 << 27
LONGEST_GAP = 1.0
"""Seconds without a frame, or backwards in time, after which a new shot begins."""
COPY_BYTES = 16 << 20
TICKS = 90_000
"""Units of a stored clip's timestamps in a second."""
X264 = (
    "cabac=0:no-deblock=1:weightp=0:weightb=0:b-pyramid=none:b-adapt=0"  # half the time to decode, a third more bytes
    ":no-psy=1:aq-mode=0:pbratio=1.1:ipratio=1.2"  # bits go where errors are, alike in all frames
    ":mbtree=0"  # with it, one clip in a few hundred comes out differently the next time
)
SEEK_FROM = 2.0
"""Seconds of footage to pass over from which seeking is tried instead of decoding on."""
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_RAW = re.compile(r"_(\d+)x(\d+)_(\d+(?:\.\d+)?)")

Beat = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Footage:
    """A source video: a file, or a folder of images that are its frames. ``name`` is its path in the source."""

    name: str
    urls: tuple[str, ...]
    bytes: int
    caption: str | None = None
    sidecars: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """Lower-case suffix of the (first) file, with its dot."""
        return os.path.splitext(self.urls[0])[1].lower()


@dataclass(frozen=True, slots=True)
class Piece:
    """A clip ready to be stored: its bytes, their suffix, and its sidecar fields.

    ``info`` has ``start`` and ``end`` in seconds of the source, ``fps``, ``width``, ``height``, ``frames`` and
    ``motion``, the mean absolute difference of neighbouring frames in [0, 1].
    """

    data: bytes
    suffix: str
    info: dict[str, Any]


def cut(
    footage: Footage, paths: Sequence[Path], rules: PackRules, chance: float = 0.5, beat: Beat = lambda: None
) -> Iterator[Piece]:
    """The clips of one video or image, whose files lie at ``paths``, one after another: those of a film would not fit
    in memory. ``chance`` in [0, 1) places a random crop.

    Calls ``beat`` with every frame. Raises Skip: empty, missing, unreadable, no_video, corrupt, truncated, short,
    small, absurd, sizes (of a folder of images), codec, rotated (of what is to be copied).
    """
    try:
        if not all(path.stat().st_size for path in paths):
            raise Skip("empty", f"{footage.name} has no bytes")
        if footage.suffix in IMAGES and len(paths) == 1 and not rules.image_folders:
            yield _image(footage, paths[0], rules, chance)
            return
        if footage.suffix in IMAGES:
            source: _Images | _Stream = _Images(footage, paths, rules.image_folders or 1.0, beat)
        else:
            source = _Stream(footage, paths[0], beat)
        found = False
        with contextlib.closing(source):
            copies = rules.encode == "copy" and isinstance(source, _Stream)
            for piece in _copied(source, rules) if copies else _encoded(source, rules, chance):
                found = True
                yield piece
    except FileNotFoundError:
        raise _gone(footage) from None
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise Skip("unreadable", f"{footage.name}: {brief(error)}") from None
    if not found:
        raise Skip("short", f"{footage.name}: no shot of {rules.least_frames} frames; lower least_frames to keep it")


def _gone(footage: Footage) -> Skip:
    return Skip("missing", f"{footage.name} was there when the source was listed, and is not now")


class _Stream:
    """The frames of a video file with their times in seconds, and seeking."""

    def __init__(self, footage: Footage, path: Path, beat: Beat) -> None:
        self.name = footage.name
        self.path = path
        self.beat = beat
        raw = {}
        if footage.suffix == ".yuv":
            shape = _RAW.search(Path(footage.name).stem)
            if not shape:
                raise Skip(
                    "unreadable", f"{self.name}: raw video must carry its shape in its name, as in x_1920x1080_30.yuv"
                )
            raw = {"video_size": f"{shape[1]}x{shape[2]}", "framerate": shape[3], "pixel_format": "yuv420p"}
        self.file = path.open("rb")  # FFmpeg itself would read "%d" and "a:" in a name as a pattern and a protocol
        self.container = opened(self.file, "rawvideo" if raw else None, **raw)
        pictures = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not pictures:
            kinds = sorted({stream.type for stream in self.container.streams}) or ["nothing"]
            self.container.close()
            raise Skip("no_video", f"{self.name} has no video stream, only {', '.join(kinds)}")
        self.stream = pictures[0]
        _sane(self.stream, self.name)
        self.stream.codec_context.thread_count = 1
        rates = [rate for rate in (self.stream.average_rate, self.stream.guessed_rate) if rate and 0 < rate <= 240]
        self.rate = Fraction(max(rates, default=25))
        self.counts = self.container.format.name == "avi"  # constant rate by design, and often in decoding order
        aspect = float(self.stream.sample_aspect_ratio or 1)
        self.aspect = aspect if 0.1 < aspect < 0.98 or 1.02 < aspect < 10 else 1.0
        base = self.stream.time_base
        self.origin = float(self.stream.start_time * base) if self.stream.start_time and base else 0.0
        self.last = self.place = 0.0
        self._decoded: Iterator[av.VideoFrame] = self.container.decode(self.stream)

    @property
    def duration(self) -> float | None:
        """Seconds of video that the container promises, None where it promises nothing about this stream."""
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        if tag := _CLOCK.fullmatch(self.stream.metadata.get("DURATION", "")):
            return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
        if self.container.duration and len(self.container.streams) == 1:
            return self.container.duration / av.time_base
        return None

    def frames(self, start: float = 0.0, end: float = float("inf")) -> Iterator[tuple[float, av.VideoFrame]]:
        """(seconds, frame) from ``start`` to ``end``; times rise, whatever the container says."""
        if start - self.place > SEEK_FROM:
            self._seek(start)
        for frame in self._decoded:
            self.beat()
            if frame.is_corrupt:
                raise Skip("corrupt", f"{self.name}: a frame near {self.place:.2f} s is damaged")
            seconds = self.place if self.counts or frame.time is None else frame.time - self.origin
            if self.last - LONGEST_GAP < seconds <= self.last < self.place:
                seconds = self.last + 1e-3
            self.last, self.place = seconds, seconds + float(1 / self.rate)
            if seconds >= end:
                return
            if seconds >= start - 1e-6:
                yield seconds, frame
        if self.duration and self.place < 0.9 * self.duration - 0.5:
            raise Skip("truncated", f"{self.name} ends at {self.place:.2f} s of {self.duration:.2f} s")

    def _seek(self, start: float) -> None:
        base = self.stream.time_base
        if self.counts or not base:
            return
        with contextlib.suppress(av.error.FFmpegError):
            self.container.seek(int((start + self.origin) / base), stream=self.stream)
            self._decoded = self.container.decode(self.stream)
            self.last, self.place = float("-inf"), start

    def close(self) -> None:
        self.container.close()
        self.file.close()


class _Images:
    """Image files as the frames of a video of a constant rate."""

    aspect = 1.0

    def __init__(self, footage: Footage, paths: Sequence[Path], rate: float, beat: Beat) -> None:
        self.name = footage.name
        self.paths = paths
        self.beat = beat
        self.rate = Fraction(rate).limit_denominator(1001)
        self.duration = len(paths) / float(self.rate)
        self.next = 0

    def frames(self, start: float = 0.0, end: float = float("inf")) -> Iterator[tuple[float, av.VideoFrame]]:
        """(seconds, frame) from ``start`` to ``end``."""
        shape = None
        for index in range(self.next, len(self.paths)):
            seconds = index / float(self.rate)
            if seconds >= end:
                return
            self.next = index + 1
            self.beat()
            if seconds >= start - 1e-6:
                frame = _picture(self.paths[index], self.name)
                if shape and shape != (frame.width, frame.height):
                    raise Skip("sizes", f"{self.name}: {self.paths[index].name} differs in size from the image before")
                shape = frame.width, frame.height
                yield seconds, frame

    def close(self) -> None:
        pass


def _sane(stream: av.VideoStream, name: str) -> None:
    """Raises Skip before any is decoded: "absurd" for more pixels than memory should hold, "unreadable" where nobody
    knows the codec.
    """
    if stream.codec_context is None:
        raise Skip("unreadable", f"{name}: its video is of a codec that FFmpeg does not know")
    height, width = stream.codec_context.height, stream.codec_context.width
    if max(height, width) > PIXELS_A_SIDE or height * width > PIXELS:
        raise Skip("absurd", f"{name}: {height} x {width} pixels; at most {PIXELS_A_SIDE} a side and {PIXELS} in all")


def _picture(path: Path, name: str) -> av.VideoFrame:
    with opened(io.BytesIO(path.read_bytes())) as container:
        if not container.streams.video:
            raise Skip("no_video", f"{name} is not a picture")
        _sane(container.streams.video[0], name)
        for frame in container.decode(video=0):
            return frame
    raise Skip("unreadable", f"{name}: no picture in it")


def _encoded(source: _Stream | _Images, rules: PackRules, chance: float) -> Iterator[Piece]:
    """Clips of the whole video, or of as many equal parts of it as there may be clips."""
    rate = source.rate
    if rules.fps and rules.fps < float(rate) * 0.99:
        rate = Fraction(rules.fps).limit_denominator(1001)

    def clips(start: float, end: float) -> Iterator[Piece]:
        return _clips(source, source.frames(start, end), rate, rules, chance)

    if not rules.clips_per_video or not source.duration:
        yield from islice(clips(0.0, float("inf")), rules.clips_per_video)
        return
    parts = max(1, min(rules.clips_per_video, int(source.duration * rate / rules.frames)))
    edges = [source.duration * i / parts for i in range(parts)] + [float("inf")]
    chosen = (_longest(clips(start, end), rules.frames) for start, end in pairwise(edges))
    yield from (piece for piece in chosen if piece)


def _longest(clips: Iterator[Piece], frames: int) -> Piece | None:
    """The first clip of full length, else the longest."""
    best: Piece | None = None
    for clip in clips:
        if best is None or clip.info["frames"] > best.info["frames"]:
            best = clip
        if clip.info["frames"] >= frames:
            break
    return best


def _clips(
    source: _Stream | _Images,
    frames: Iterable[tuple[float, av.VideoFrame]],
    rate: Fraction,
    rules: PackRules,
    chance: float,
) -> Iterator[Piece]:
    """Encoded clips of a run of frames, each within one shot."""
    clip: _Encoder | None = None

    def finished() -> Iterator[Piece]:
        nonlocal clip
        if clip and clip.frames >= rules.least_frames:
            yield clip.finish()
        clip = None

    seen = ((at, thumbnail(at[1])) for at in frames)
    for seconds, frame, thumb, starts in _resampled(shots(seen), source.rate, rate, rules.cuts):
        if starts or (clip and clip.frames == rules.frames):
            yield from finished()
        if clip is None:
            clip = _Encoder(source, frame, rate, rules, chance)
        clip.add(seconds, frame, thumb)
    yield from finished()


def _resampled(
    frames: Iterable[tuple[tuple[float, av.VideoFrame], Thumbnail, bool]],
    source_rate: Fraction,
    rate: Fraction,
    cuts: bool,
) -> Iterator[tuple[float, av.VideoFrame, Thumbnail, bool]]:
    """(seconds, frame, thumbnail, starts a shot) at ``rate``: of a faster source, the frame nearest to each tick.

    Frames are held over short pauses of the source; a long pause or a jump back in time starts a new shot.
    """
    thins = rate != source_rate
    longest = LONGEST_GAP + 2 / float(source_rate)
    first = last = away = 0.0
    tick = 0
    held: tuple[float, av.VideoFrame, Thumbnail] | None = None
    for (seconds, frame), thumb, starts in frames:
        if held is None or (starts and cuts) or not 0 <= seconds - last <= longest:
            if held:
                yield *held, tick == 0
            first, tick, away, held = seconds, 0, 0.0, (seconds, frame, thumb)
        else:
            due = ceil((seconds - first) * rate - 0.5 - 1e-6) if thins else tick + 1
            for passed in range(tick, due):
                yield first + passed / float(rate) if thins else held[0], *held[1:], passed == 0
            off = abs((seconds - first) * rate - due)
            if due > tick or (due == tick and off < away):
                tick, away, held = due, off, (first + due / float(rate) if thins else seconds, frame, thumb)
        last = seconds
    if held:
        yield *held, tick == 0


class _Encoder:
    """One H.264 clip in the making: keyframes at a fixed distance, and every other frame can be left undecoded."""

    def __init__(
        self, source: _Stream | _Images, frame: av.VideoFrame, rate: Fraction, rules: PackRules, chance: float
    ) -> None:
        self.fit = _fit(source.name, frame, source.aspect, rules)
        self.chance = chance
        self.rate = rate
        self.frames = 0
        self.moved = 0.0
        self.first = self.last = 0.0
        self.pts = 0
        self.before: Thumbnail | None = None
        self.buffer = io.BytesIO()
        self.container = av.open(self.buffer, "w", format="mp4")
        options = {"crf": str(rules.crf), "preset": rules.preset, "g": str(rules.keyframes), "bf": "1"}
        options |= {"sc_threshold": "0", "x264-params": X264}
        self.stream = self.container.add_stream("libx264", rate=rate, options=options)
        context = self.stream.codec_context
        context.thread_count = 1
        context.time_base = Fraction(1, TICKS)
        context.height, context.width, context.pix_fmt = *self.fit.size, "yuv420p"
        if frame.colorspace not in (0, 3):  # RGB and reserved: nothing that a decoder needs to know of YUV
            context.colorspace = frame.colorspace
        context.color_range = ColorRange.MPEG

    def add(self, seconds: float, frame: av.VideoFrame, thumb: Thumbnail) -> None:
        if not self.frames:
            self.first = seconds
        picture = self.fit(frame, "yuv420p", self.chance)
        step = TICKS / float(self.rate)
        due = self.pts + round(step)
        now = round((seconds - self.first) * TICKS)
        self.pts = 0 if not self.frames else due if abs(now - due) < 0.1 * step else max(now, self.pts + 1)
        picture.pts, picture.time_base = self.pts, Fraction(1, TICKS)
        picture.pict_type = av.video.frame.PictureType.NONE  # else x264 keeps the source's frame types
        self.container.mux(self.stream.encode(picture))
        if self.before:
            self.moved += motion(self.before, thumb)
        self.before, self.last = thumb, seconds
        self.frames += 1

    def finish(self) -> Piece:
        self.container.mux(self.stream.encode())
        self.container.close()
        fps = float(self.rate)
        spanned = self.last - self.first
        if spanned > 0 and abs((self.frames - 1) / spanned / fps - 1) > 0.02:
            fps = (self.frames - 1) / spanned
        height, width = self.fit.size
        return Piece(
            self.buffer.getvalue(),
            "mp4",
            {
                "start": round(self.first, 4),
                "end": round(self.last + 1 / fps, 4),
                "fps": round(fps, 4),
                "width": width,
                "height": height,
                "frames": self.frames,
                "motion": round(self.moved / max(self.frames - 1, 1), 6),
            },
        )


@dataclass(frozen=True, slots=True)
class _Fit:
    """How frames of one shape become pictures of ``size``: scaled to ``scaled``, turned, then cropped. (H, W) each."""

    scaled: tuple[int, int]
    turns: int
    size: tuple[int, int]
    source: tuple[int, int]

    def __call__(self, frame: av.VideoFrame, pixels: str, chance: float) -> av.VideoFrame:
        """The picture in the pixel format ``pixels``, yuv420p or yuvj444p; ``chance`` in [0, 1) places the crop."""
        levels = ColorRange.JPEG if pixels == "yuvj444p" else ColorRange.MPEG
        height, width = self.scaled
        small = frame.reformat(width, height, pixels, interpolation="BICUBIC", dst_color_range=levels, threads=1)
        if not self.turns and self.size == self.scaled:
            return small
        planes = [np.rot90(_plane(plane), self.turns) for plane in small.planes]
        top, left = (
            int((whole - part) * chance / 2) * 2 for whole, part in zip(planes[0].shape, self.size, strict=True)
        )
        step = 1 if pixels == "yuvj444p" else 2
        cropped = av.VideoFrame(self.size[1], self.size[0], pixels)
        for plane, whole_HW, shrink in zip(cropped.planes, planes, (1, step, step), strict=True):
            part_HW = whole_HW[top // shrink :, left // shrink :][: self.size[0] // shrink, : self.size[1] // shrink]
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : plane.width] = part_HW
            plane.update(padded.tobytes())
        cropped.colorspace, cropped.color_range = small.colorspace, small.color_range
        return cropped


def _fit(name: str, frame: av.VideoFrame, aspect: float, rules: PackRules) -> _Fit:
    """``aspect`` is width over height of a pixel. Raises Skip("small") where the rules would have to enlarge."""
    turned = turns(frame)
    height, width = frame.height, max(1, round(frame.width * aspect))
    if turned % 2:
        height, width = width, height
    size = (height // 2 * 2, width // 2 * 2)
    scale = 1.0
    if rules.size:
        size = rules.size
        scale = max(size[0] / height, size[1] / width)
    elif rules.short_side:
        scale = rules.short_side / min(height, width)
        size = (max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2))
    if min(height, width) < LEAST_SIDE or (scale > 1 and not rules.upscale):
        wanted = f"{size[0]} x {size[1]}" if scale > 1 else f"{LEAST_SIDE} pixels a side"
        hint = "; set upscale: true to enlarge it" if scale > 1 else ""
        raise Skip("small", f"{name}: {height} x {width} (height x width) is less than {wanted}{hint}")
    scaled = size if rules.short_side else (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if turned % 2:
        scaled = scaled[1], scaled[0]
    return _Fit(scaled, turned, size, (frame.height, frame.width))


def _plane(plane: av.video.plane.VideoPlane) -> NDArray[np.uint8]:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def _image(footage: Footage, path: Path, rules: PackRules, chance: float) -> Piece:
    """The image as it is where it fits the rules, else as a JPEG of high quality."""
    frame = _picture(path, footage.name)
    fit = _fit(footage.name, frame, 1.0, rules)
    data, suffix = path.read_bytes(), footage.suffix[1:]
    if fit.turns or fit.size != fit.source:
        picture = fit(frame, "yuvj444p", chance)
        encoder = av.CodecContext.create("mjpeg", "w")
        encoder.height, encoder.width, encoder.pix_fmt, encoder.time_base = *fit.size, "yuvj444p", Fraction(1)
        encoder.qmin = encoder.qmax = 2
        picture.pts, picture.pict_type = 0, av.video.frame.PictureType.NONE
        data, suffix = b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode()]), "jpg"
    height, width = fit.size
    info = {"start": 0.0, "end": 0.0, "fps": 0.0, "width": width, "height": height, "frames": 1, "motion": 0.0}
    return Piece(data, suffix, info)


def _copied(source: _Stream, rules: PackRules) -> Iterator[Piece]:
    """Clips of whole groups of pictures, their packets untouched; a group with a cut inside is left out."""
    codec = source.stream.codec_context.name.removeprefix("lib").replace("dav1d", "av1")
    if codec not in COPYABLE:
        raise Skip("codec", f"{source.name}: {codec} can't be copied into mp4; pack with encode: h264")
    moved: dict[float, float] = {}
    cuts: list[float] = []
    before: Thumbnail | None = None
    for (seconds, frame), thumb, starts in shots((at, thumbnail(at[1])) for at in source.frames()):
        if before is None and frame.rotation:
            raise Skip("rotated", f"{source.name} is stored turned by {frame.rotation} degrees; pack with encode: h264")
        if before and starts and rules.cuts:
            cuts.append(seconds)
        moved[seconds] = motion(before, thumb) if before else 0.0
        before = thumb
    run: list[av.Packet] = []
    made = 0

    with source.path.open("rb") as file, opened(file) as container:
        stream = container.streams[source.stream.index]

        def finished() -> Iterator[Piece]:
            nonlocal made
            packets = [packet for packet in run if packet.pts >= run[0].pts]
            if len(packets) >= rules.least_frames and made < (rules.clips_per_video or len(moved)):
                made += 1
                yield _remuxed(stream, packets, source.origin, moved)
            run.clear()

        for group, end in _groups(container, stream, source.origin):
            start = float(group[0].pts * stream.time_base) - source.origin
            inside = [cut for cut in cuts if start - 1e-3 < cut < end - 1e-3]
            if inside or (run and len(run) + len(group) > rules.frames):
                yield from finished()
            if not inside or inside[-1] < start + 1e-3:
                run += group
        yield from finished()


def _groups(
    container: av.container.InputContainer, stream: av.VideoStream, origin: float
) -> Iterator[tuple[list[av.Packet], float]]:
    """Packets from one keyframe up to the next, with the seconds at which the next one starts."""
    group: list[av.Packet] = []
    for packet in container.demux(stream):
        if packet.pts is None or not packet.size:
            continue
        if packet.is_keyframe and group:
            yield group, float(packet.pts * stream.time_base) - origin
            group = []
        if group or packet.is_keyframe:
            group.append(packet)
    if group:
        yield group, float("inf")


def _remuxed(stream: av.VideoStream, packets: list[av.Packet], origin: float, moved: dict[float, float]) -> Piece:
    buffer = io.BytesIO()
    base, shown = float(stream.time_base), sorted(packet.pts for packet in packets)
    times = [at * base - origin for at in shown]
    # When to decode each, counted from the first: Matroska does not say.
    late = max(at - packet.pts for at, packet in zip(shown, packets, strict=True))
    decoded = [at - shown[0] for at in shown]
    with av.open(buffer, "w", format="mp4") as container:
        copy = container.add_stream_from_template(stream, opaque=True)  # else it asks for an encoder of that name
        for packet, at in zip(packets, decoded, strict=True):
            packet.stream = copy
            packet.pts, packet.dts = packet.pts - shown[0] + late, at
            container.mux(packet)
    fps = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else float(stream.average_rate or 25)
    within = [change for at, change in moved.items() if times[0] + base < at <= times[-1] + base]
    return Piece(
        buffer.getvalue(),
        "mp4",
        {
            "start": round(times[0], 4),
            "end": round(times[-1] + 1 / fps, 4),
            "fps": round(fps, 4),
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
            "frames": len(times),
            "motion": round(sum(within) / max(len(within), 1), 6),
        },
    )


def caption_of(footage: Footage) -> str | None:
    """The caption from the table, else from a ``.txt`` or ``.json`` beside the video ("caption" or "text"), where there
    is one.
    """
    if footage.caption is not None:
        return footage.caption
    for url in footage.sidecars:
        try:
            text = storage.read_bytes(url).decode("utf-8-sig", "replace").strip()
        except storage.Missing:
            continue
        if url.lower().endswith(".json"):
            try:
                text = told(json.loads(text))
            except (ValueError, RecursionError):
                continue
        if text:
            return text
    return None


def told(sidecar: Any) -> str:
    """The caption that a parsed .json sidecar holds: its "caption", else its "text"; empty where it has none."""
    found = [sidecar.get(name) for name in ("caption", "text")] if isinstance(sidecar, dict) else []
    return next((text.strip() for text in found if isinstance(text, str) and text.strip()), "")


def main() -> None:
    """Serves cutting jobs until standard input ends. The first line is the rules."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    av.logging.set_level(None)
    reports, sys.stdout = sys.stdout, sys.stderr
    rules = PackRules.model_validate_json(sys.stdin.readline())
    said = 0.0

    def say(**report: Any) -> None:
        nonlocal said
        said = time.monotonic()
        reports.write(json.dumps(report) + "\n")
        reports.flush()

    def beat() -> None:
        if time.monotonic() - said > 1:
            say(kind="beat")

    for line in sys.stdin:
        job = json.loads(line)
        try:
            say(kind="done", result=_work(job, rules, beat))
        except InputError as error:
            say(kind="input_error", message=str(error), status=error.status)


def _work(job: dict[str, Any], rules: PackRules, beat: Beat) -> dict[str, Any]:
    """Cuts one video into the spool file of the job; what the packer has to know of it."""
    footage = Footage(**job["footage"])
    try:
        with _local(footage, beat) as paths, atomic(Path(job["spool"])) as spool:
            pieces = cut(footage, paths, rules, job["chance"], beat)
            return {"skip": None, "clips": _stored(pieces, spool, footage, job["key"])}
    except Skip as skip:
        return {"skip": [skip.reason, skip.detail], "clips": []}


def _stored(pieces: Iterable[Piece], spool: BinaryIO, footage: Footage, name: str) -> list[dict[str, Any]]:
    """Writes clips as members of a tar; what the packer has to know of each."""
    caption = caption_of(footage)
    clips = []
    for number, piece in enumerate(pieces):
        key = f"{name}-{number:04d}"
        info = {"source": footage.name, **piece.info, **({"caption": caption} if caption else {})}
        start = spool.tell()
        spool.write(tar_member(f"{key}.{piece.suffix}", piece.data))
        spool.write(tar_member(f"{key}.json", (json.dumps(info) + "\n").encode()))
        clips.append(
            {
                "key": key,
                "suffix": piece.suffix,
                "bytes": len(piece.data),
                "crc": zlib.crc32(piece.data),
                "stored": spool.tell() - start,
                **{name: piece.info[name] for name in ("frames", "fps", "height", "width", "motion")},
            }
        )
    return clips


@contextlib.contextmanager
def _local(footage: Footage, beat: Beat) -> Iterator[list[Path]]:
    """The footage's files on this machine; remote ones are copied for the while."""
    if not any(storage.is_remote(url) for url in footage.urls):
        yield [Path(url) for url in footage.urls]
        return
    with tempfile.TemporaryDirectory(prefix="moviola-cut-") as folder:
        paths = []
        for index, url in enumerate(footage.urls):
            path = Path(folder) / f"{index:06d}{os.path.splitext(url)[1].lower()}"
            try:
                length = storage.size(url)
                with atomic(path) as file:
                    for start in range(0, length, COPY_BYTES):
                        file.write(storage.read_bytes(url, start, min(start + COPY_BYTES, length)))
                        beat()
            except storage.Missing:
                raise _gone(footage) from None
            paths.append(path)
        yield paths


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``path`` whole or not at all. Raises InputError where the disk is full or read-only."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a killed packer's worker may not have ended yet
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise InputError(
            f"{path.parent} can't be written: {error.strerror}; free space or choose another place"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def tar_member(name: str, data: bytes) -> bytes:
    """A file of a plain tar, header and padding included; nothing in it depends on when or by whom it is written."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), 0o644
    return header.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


if __name__ == "__main__":
    main()
