"""A video file as its container tells it: header and packets, without decoding, and without torch."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

import av

from pipelines.faults import Skip

PIXELS_A_SIDE = 16384
DECODED_BYTES = 2 << 30
EXIF_WITHIN = 4096
"""Bytes of a picture in which its EXIF begins, if it has any."""


@dataclass(frozen=True, slots=True)
class Info:
    """Header of a clip: stored ``frames``, ``fps`` frames/s (0 for images), pixels as they are shown."""

    frames: int
    fps: float
    height: int
    width: int


def opened(file: IO[bytes], format: str | None = None, **options: str) -> av.container.InputContainer:
    """Opens a video file with FFmpeg's demuxer ``format``, or the one that it finds, under ``options`` of that.

    What the file refers to (another file of a list, an address of a playlist) is not opened; what is not UTF-8 in its
    metadata reads as U+FFFD.
    """
    sealed = {"protocol_whitelist": "none", **options}
    return av.open(file, format=format, container_options=sealed, metadata_errors="replace")


def probe(data: bytes, image: bool, name: str) -> Info:
    """Reads the header and counts the frames, without decoding (but of a picture that may lie on its side); raises
    Skip("undecodable") or Skip("absurd").
    """
    try:
        with opened(io.BytesIO(data)) as container:
            stream = stream_of(container)
            height, width = stream.codec_context.height, stream.codec_context.width
            turned = turns_of(data)
            if image:
                info = Info(1, 0.0, height, width)
                if b"Exif" in data[:EXIF_WITHIN]:
                    turned = turns(next(container.decode(stream)))
            else:
                frames = sum(not packet.is_discard for packet in packets_of(container))
                fps = stream.average_rate or stream.guessed_rate or stream.base_rate
                if not fps and stream.duration and stream.time_base:
                    fps = frames / (stream.duration * stream.time_base)
                info = Info(frames, float(fps or 0), height, width)
    except (av.error.FFmpegError, IndexError, ValueError, StopIteration) as error:
        raise Skip("undecodable", f"{name}: {brief(error)}") from None
    if not info.frames or not info.height or not info.width or not (image or info.fps):
        raise Skip("undecodable", f"{name}: {info.frames} frames of {info.width} x {info.height} at {info.fps} fps")
    sane(info.height, info.width, 1, name)
    if turned % 2:
        info = replace(info, height=info.width, width=info.height)
    return info


def stream_of(container: av.container.InputContainer) -> av.VideoStream:
    """The first video stream; raises IndexError where there is none, ValueError where nothing can decode it."""
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError("its video is of a codec that FFmpeg does not know")
    return stream


def packets_of(container: av.container.InputContainer) -> list[av.Packet]:
    """The packets of the first video stream that carry a frame, in decoding order."""
    return [packet for packet in container.demux(video=0) if packet.pts is not None and packet.size]


def turns(frame: av.VideoFrame) -> int:
    """Quarter turns to the left that show a decoded frame upright."""
    return round((frame.rotation or 0) / 90) % 4


def turns_of(data: bytes) -> int:
    """Quarter turns to the left that show the frames of an mp4 or mov upright (ISO/IEC 14496-12, 8.3.2)."""
    for movie in _boxes(data, b"moov", 0, len(data)):
        for track in _boxes(data, b"trak", *movie):
            for start, end in _boxes(data, b"tkhd", *track):
                matrix = start + (52 if data[start] else 40)
                if matrix + 40 <= end and any(data[matrix + 36 : matrix + 38]):  # a width: it is to be seen
                    cos, sin = struct.unpack_from(">2i", data, matrix)
                    return round(-math.degrees(math.atan2(sin, cos)) / 90) % 4
    return 0


def _boxes(data: bytes, kind: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Start and end of what each box of that kind holds, of the boxes that lie side by side in ``data[start:end]``."""
    while start + 8 <= end:
        size, head = int.from_bytes(data[start : start + 4]), 8
        if size == 1:
            size, head = int.from_bytes(data[start + 8 : start + 16]), 16
        last = end if size == 0 else min(start + size, end)
        if data[start + 4 : start + 8] == kind and start + head < last:
            yield start + head, last
        if last < start + 8:
            return
        start = last


def sane(height: int, width: int, frames: int, name: str) -> None:
    """Raises Skip("absurd") for more pixels than memory should hold."""
    if max(height, width) > PIXELS_A_SIDE or height * width * 3 * frames > DECODED_BYTES:
        raise Skip("absurd", f"{name}: {frames} frames of {width} x {height} pixels")


def brief(error: Exception) -> str:
    """An error's text on one line, of 160 characters at most."""
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:160] or type(error).__name__
