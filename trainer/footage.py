"""Videos of any length, read and written a frame at a time.

Legend: C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from pipelines import storage
from pipelines.container import opened
from pipelines.faults import InputError
from trainer.latents import local

CRF = 16


class Reader:
    """A video file: ``fps`` frames/s, upright ``height`` and ``width``, and its frames in order.

    Raises InputError, here and while reading, for what is not a video or breaks off.
    """

    def __init__(self, path: str, name: str) -> None:
        self.name = name
        self._file = open(path, "rb")  # noqa: SIM115 - FFmpeg would read "%d" and "a:" in a name as more than a name
        with self._explained():
            self._container = opened(self._file)
            if not self._container.streams.video:
                raise InputError(f"{name} has no video stream; it has {_streams(self._container)}")
            stream = self._container.streams.video[0]
            if stream.codec_context is None:
                raise InputError(f"{name} can't be decoded: its video is of a codec that FFmpeg does not know")
            stream.thread_type = "AUTO"
            self.fps = Fraction(stream.average_rate or stream.guessed_rate or 25)
            self._decoded = self._container.decode(stream)
            first = next(self._decoded, None)
        if first is None:
            raise InputError(f"{name} has a video stream without a frame that can be decoded")
        self._first_3HW = _pixels(first)
        self.height, self.width = self._first_3HW.shape[-2:]

    def __iter__(self) -> Iterator[Tensor]:
        """Frames (1, 3, 1, H, W) float32 in [-1, 1], upright; to be read once."""
        yield _normal(self._first_3HW)
        count = 1
        with self._explained(lambda: f" after {count} frames"):
            for frame in self._decoded:
                pixels_3HW = _pixels(frame)
                if pixels_3HW.shape[-2:] != (self.height, self.width):
                    found = " x ".join(map(str, pixels_3HW.shape[-2:]))
                    raise InputError(
                        f"{self.name} changes its size at frame {count}: from {self.height} x {self.width} to {found} "
                        "(height x width). Cut it there, or encode it anew at one size."
                    )
                yield _normal(pixels_3HW)
                count += 1

    @contextlib.contextmanager
    def _explained(self, where: Callable[[], str] = lambda: "") -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, ValueError) as error:
            raise InputError(f"{self.name} can't be decoded{where()}: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._container.close()
        self._file.close()


@contextlib.contextmanager
def reader(url: str) -> Iterator[Reader]:
    """Opens the video at a path or URL."""
    with local(url) as path, contextlib.closing(Reader(path, storage.redact(url))) as found:
        yield found


class Writer:
    """An mp4 (H.264) being written; ``frames`` so far."""

    def __init__(self, path: Path, fps: Fraction, height: int, width: int) -> None:
        self.frames = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        self._stream = self._container.add_stream(
            "libx264", rate=fps.limit_denominator(1001), options={"crf": f"{CRF}"}
        )
        self._stream.height, self._stream.width = height, width
        # 4:2:0 halves the chroma's size, which odd sizes don't allow.
        self._stream.pix_fmt = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        self._stream.codec_context.color_range = ColorRange.MPEG
        self._stream.codec_context.colorspace = Colorspace.ITU709

    def add(self, pixels_1CTHW: Tensor) -> None:
        """Appends frames in [-1, 1]."""
        bytes_TCHW = ((pixels_1CTHW[0].float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).transpose(0, 1)
        for frame_HWC in bytes_TCHW.permute(0, 2, 3, 1).cpu().numpy():
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            self._container.mux(
                self._stream.encode(
                    frame.reformat(
                        format=self._stream.pix_fmt,
                        src_colorspace="ITU709",
                        dst_colorspace="ITU709",
                        dst_color_range="MPEG",
                    )
                )
            )
            self.frames += 1

    def close(self) -> None:
        """Writes what the encoder still holds, and the index."""
        self._container.mux(self._stream.encode())
        self._container.close()


@contextlib.contextmanager
def writer(url: str, fps: Fraction, height: int, width: int) -> Iterator[Writer]:
    """Writes an mp4 to a path or URL; it appears when the block ends, and not at all after an exception."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "video.mp4"
        made = Writer(path, fps, height, width)
        yield made
        made.close()
        storage.upload(url, path)


def _pixels(frame: av.VideoFrame) -> Tensor:
    """Upright RGB, (3, H, W) uint8."""
    turns = round((frame.rotation or 0) / 90) % 4
    return torch.from_numpy(np.rot90(frame.to_ndarray(format="rgb24"), turns).copy()).permute(2, 0, 1)


def _normal(pixels_3HW: Tensor) -> Tensor:
    return (pixels_3HW.float() / 127.5 - 1)[None, :, None]


def _streams(container: av.container.InputContainer) -> str:
    return ", ".join(stream.type for stream in container.streams) or "none at all"
