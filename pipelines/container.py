"""A video file as its container tells it: header and packets, without decoding, and without torch."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO

import av

from pipelines.faults import Skip

PIXELS_A_SIDE = 16384
DECODED_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class Info:
    """Header of a clip: stored ``frames``, ``fps`` frames/s (0 for images), pixels."""

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
    """Reads the header and counts the frames, without decoding; raises Skip("undecodable") or Skip("absurd")."""
    try:
        with opened(io.BytesIO(data)) as container:
            stream = stream_of(container)
            height, width = stream.codec_context.height, stream.codec_context.width
            if image:
                info = Info(1, 0.0, height, width)
            else:
                frames = sum(not packet.is_discard for packet in packets_of(container))
                fps = stream.average_rate or stream.guessed_rate or stream.base_rate
                if not fps and stream.duration and stream.time_base:
                    fps = frames / (stream.duration * stream.time_base)
                info = Info(frames, float(fps or 0), height, width)
    except (av.error.FFmpegError, IndexError, ValueError) as error:
        raise Skip("undecodable", f"{name}: {brief(error)}") from None
    if not info.frames or not info.height or not info.width or not (image or info.fps):
        raise Skip("undecodable", f"{name}: {info.frames} frames of {info.width} x {info.height} at {info.fps} fps")
    sane(info.height, info.width, 1, name)
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


def sane(height: int, width: int, frames: int, name: str) -> None:
    """Raises Skip("absurd") for more pixels than memory should hold."""
    if max(height, width) > PIXELS_A_SIDE or height * width * 3 * frames > DECODED_BYTES:
        raise Skip("absurd", f"{name}: {frames} frames of {width} x {height} pixels")


def brief(error: Exception) -> str:
    """An error's text on one line, of 160 characters at most."""
    return " ".join(str(error).split())[:160] or type(error).__name__
