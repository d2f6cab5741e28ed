"""Bytes of a clip -> the frames that were asked for.

Packets are demuxed first, which costs little: that numbers the frames exactly, at variable frame rates too. Decoding
starts at the last keyframe before the first wanted frame and stops after the last one.

Legend: T frames, C channels (3, RGB), H height, W width.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor
from torch.nn import functional as F

from pipelines.container import brief, opened, packets_of, sane, stream_of, turns, turns_of
from pipelines.faults import InputError, Skip

Backend = Literal["torchcodec", "pyav"]
BACKEND: Backend = "pyav"
UNORDERED = frozenset({"avi", "mpeg"})
"""Formats whose time stamps do not order B-frames: AVI, and MPEG program streams."""
SKIPPING = frozenset({"h264", "hevc"})
"""Decoders that can be told with each packet to leave it undecoded if no other refers to it; AV1's is told once, for
good.
"""


class Video:
    """An opened clip: its size, and its frames by number, counted from 0, both upright as the display matrix of an mp4
    or mov, or EXIF, says. Close it, or use it in ``with``.

    Raises Skip, here and in :meth:`read`: "undecodable", "corrupt" for frames that the decoder had to make up, "absurd"
    for more pixels than memory should hold, "short" when a frame is asked for that is not there.
    """

    def __init__(self, data: bytes, name: str, *, image: bool = False) -> None:
        self.name = name
        self._image = image
        with self._skips():
            kind = "mov" if data[4:8] == b"ftyp" and not image else None
            self._container = opened(io.BytesIO(data), kind)
            self._stream = stream_of(self._container)
            self._stream.thread_type = "NONE"
            self.height, self.width = self._stream.codec_context.height, self._stream.codec_context.width
        sane(self.height, self.width, 1, name)
        if image:
            with self._skips():
                self._picture = next(self._container.decode(self._stream))
        self._turned = turns(self._picture) if image else turns_of(data) if kind else 0
        if self._turned % 2:
            self.height, self.width = self.width, self.height

    def read(self, frames: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """Frames of those numbers (strictly rising), resized to ``size`` (height, width): ``frames_TCHW`` uint8 RGB."""
        height, width = size or (self.height, self.width)
        sane(max(height, self.height), max(width, self.width), len(frames), self.name)
        whole = (height, width) == (self.height, self.width)
        if self._turned % 2:
            height, width = width, height
        # To planes is faster, and keeps more colour when resizing; without resizing, FFmpeg's vector code spoils the
        # right edge of widths that it does not divide.
        planar = not whole or width % 16 == 0
        frames_TCHW = np.empty((len(frames), 3, height, width), np.uint8)
        with self._skips():
            for place, frame in self._decoded(frames):
                rgb = _scaler().reformat(
                    frame, width, height, "gbrp" if planar else "rgb24", interpolation=Interpolation.BICUBIC, threads=1
                )
                if planar:
                    for channel, plane in zip((1, 2, 0), rgb.planes, strict=True):
                        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                        frames_TCHW[place, channel] = rows[:height, :width]
                else:
                    frames_TCHW[place] = rgb.to_ndarray().transpose(2, 0, 1)
        if self._turned:
            frames_TCHW = np.rot90(frames_TCHW, self._turned, (2, 3)).copy()
        return torch.from_numpy(frames_TCHW)

    def _decoded(self, frames: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index into ``frames``, decoded frame), decoding no more than the frames between keyframes require."""
        if self._image:
            yield 0, self._picture
            return
        packets = packets_of(self._container)
        if self._container.format.name in UNORDERED:
            yield from self._counted(packets, frames)
            return
        times = sorted(packet.pts for packet in packets if not packet.is_discard)
        if frames[-1] >= len(times):
            raise Skip("short", f"{self.name}: frame {frames[-1]} was asked for, it has {len(times)}")
        wanted = {times[number]: i for i, number in enumerate(frames)}
        context = self._stream.codec_context
        first = max((i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= times[frames[0]]), default=0)

        skips = context.codec.name in SKIPPING

        def decoded(start: int) -> Iterator[av.VideoFrame]:
            for number in range(start, len(packets)):
                packet = packets[number]
                if skips:
                    context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
                yield from context.decode(packet)
            yield from context.decode(None)

        for start in dict.fromkeys((first, 0)):  # some keyframes are decodable only after others: intra refresh
            for frame, intact in _judged(decoded(start)):
                place = wanted.pop(frame.pts, None)
                if place is not None:
                    yield place, self._good(frame, intact, frames[place])
                if not wanted:
                    return
            context.flush_buffers()
        raise Skip("undecodable", f"{self.name}: {len(wanted)} of {len(frames)} frames could not be decoded")

    def _counted(self, packets: Sequence[av.Packet], frames: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        context = self._stream.codec_context
        decoded = (frame for packet in [*packets, None] for frame in context.decode(packet))
        wanted = {number: i for i, number in enumerate(frames)}
        number = -1
        for number, (frame, intact) in enumerate(_judged(decoded)):
            if number in wanted:
                yield wanted[number], self._good(frame, intact, number)
            if number == frames[-1]:
                return
        raise Skip("short", f"{self.name}: frame {frames[-1]} was asked for, it has {number + 1}")

    def _good(self, frame: av.VideoFrame, intact: bool, number: int) -> av.VideoFrame:
        if not intact:
            raise Skip("corrupt", f"{self.name}: frame {number} is damaged, or refers to one that is")
        return frame

    @contextlib.contextmanager
    def _skips(self) -> Iterator[None]:
        try:
            yield
        except (av.error.FFmpegError, RuntimeError, StopIteration, IndexError, ValueError) as error:
            raise Skip("undecodable", f"{self.name}: {brief(error)}") from None

    def close(self) -> None:
        """Frees the decoder."""
        self._container.close()

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TorchcodecVideo:
    """The same by torchcodec, which needs FFmpeg's shared libraries on the machine; torch resizes, antialiased.

    It does not say which frames are damaged, so those pass, as FFmpeg patches them up.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.name = name
        try:
            from torchcodec.decoders import VideoDecoder

            self._decoder = VideoDecoder(data, num_ffmpeg_threads=1, seek_mode="exact")
        except (ImportError, RuntimeError, ValueError) as error:
            if isinstance(error, ImportError) or "libtorchcodec" in str(error):
                raise InputError(
                    "torchcodec finds no FFmpeg libraries; install FFmpeg 4 to 8, or take the backend pyav"
                ) from None
            raise Skip("undecodable", f"{name}: {brief(error)}") from None
        self.height, self.width = self._decoder.metadata.height or 0, self._decoder.metadata.width or 0
        sane(self.height, self.width, 1, name)

    def read(self, frames: Sequence[int], size: tuple[int, int] | None = None) -> Tensor:
        """As :meth:`Video.read`."""
        stored = self._decoder.metadata.num_frames or 0
        if frames[-1] >= stored:
            raise Skip("short", f"{self.name}: frame {frames[-1]} was asked for, it has {stored}")
        sane(self.height, self.width, len(frames), self.name)
        try:
            frames_TCHW = self._decoder.get_frames_at(list(frames)).data
        except (RuntimeError, ValueError) as error:
            raise Skip("undecodable", f"{self.name}: {brief(error)}") from None
        if size is None or size == (self.height, self.width):
            return frames_TCHW
        return F.interpolate(
            frames_TCHW.contiguous(memory_format=torch.channels_last), size, mode="bicubic", antialias=True
        )

    def close(self) -> None:
        """Nothing to free by hand."""

    def __enter__(self) -> TorchcodecVideo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_video(
    data: bytes, name: str, *, image: bool = False, backend: Backend | None = None
) -> Video | TorchcodecVideo:
    """Opens a stored clip with ``backend``; pictures always with PyAV."""
    if (backend or BACKEND) == "torchcodec" and not image:
        return TorchcodecVideo(data, name)
    return Video(data, name, image=image)


_thread = threading.local()


def _scaler() -> VideoReformatter:
    """The colour converter of the calling thread: setting one up costs more than converting a frame."""
    if not hasattr(_thread, "scaler"):
        _thread.scaler = VideoReformatter()
    return _thread.scaler


def _judged(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, bool]]:
    """Frames in the order of showing, each with whether it and all since its keyframe came out without patching up."""
    intact = True
    for frame in frames:
        intact = (intact or frame.key_frame) and not frame.is_corrupt
        yield frame, intact
