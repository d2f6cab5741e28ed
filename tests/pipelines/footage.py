"""Small videos for tests of the packer, each in memory's reach and a few milliseconds of work."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.synthetic import footage

REAL = Path(os.environ.get("MOVIOLA_FOOTAGE", "../shared/data/videos"))
AV1 = Path(__file__).with_name("av1.mp4")
"""40 frames of 64 x 48 by SVT-AV1, a keyframe every 12. Kept, as two of its encoders at a time may spin for ever."""
needs_real = pytest.mark.skipif(not (REAL / "MANIFEST.tsv").exists(), reason=f"no real footage at {REAL}")


def scene(place: int, frames: int, size: tuple[int, int] = (64, 96), fps: float = 24) -> np.ndarray:
    """``frames_THW3`` of one procedural scene."""
    return footage(7, place, frames, size, fps).frames_THW3


def write(
    path: Path, frames_THW3, fps=24, codec="libx264", times=None, rotate=0, options=None, faststart=False, aspect=None
):
    """Writes frames as a video; ``times`` in milliseconds makes the frame rate variable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    muxing = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=muxing) as container:
        stream = container.add_stream(
            codec, rate=Fraction(fps), options=options or ({"crf": "8"} if "264" in codec else {})
        )
        _, stream.height, stream.width, _ = frames_THW3.shape
        stream.pix_fmt = "yuv420p" if not (stream.height % 2 or stream.width % 2) else "yuv444p"
        stream.thread_count = 1
        if "264" not in codec:
            stream.bit_rate = 2_000_000
        if rotate:
            stream.set_display_rotation(rotate)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, frame_HW3 in enumerate(frames_THW3):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HW3), "rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[number]), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio(path: Path, seconds: float = 1.0):
    """A file with sound and no picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for start in range(0, int(16000 * seconds), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path_or_bytes) -> np.ndarray:
    """``frames_THW3`` of a whole video."""
    import io

    source = io.BytesIO(path_or_bytes) if isinstance(path_or_bytes, bytes) else str(path_or_bytes)
    with av.open(source) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(first, second) -> float:
    """In dB, for 8-bit pixels."""
    mse = ((first.astype(np.float64) - second) ** 2).mean()
    return float(10 * np.log10(255**2 / max(mse, 1e-9)))
