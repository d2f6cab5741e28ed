"""What the packer's encoding costs and gives: decoding time of random draws, bytes and fidelity of the same clips.

    python -m benchmarks.packing FOOTAGE [--frames 31] [--size 128] [--rounds 3] [--out FILE.md]

Clips of the footage (every second frame, cropped to a square) are encoded as usual (x264's defaults at crf 18), by the
packer's defaults, and by variations of them, one change at a time. From each clip 9 frames are drawn at strides 1 to 3,
decoded by ``pipelines.decode``; time is the process's CPU time, encodings taken in turns; the best round counts. PSNR
is over luma and chroma of all frames, against those before encoding.
"""

from __future__ import annotations

import argparse
import io
import platform
import random
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from pipelines.cutting import VIDEOS, X264
from pipelines.decode import Video
from pipelines.rules import PackRules

DRAWN = 9
DEFAULTS = PackRules()
USUAL = {"crf": "18"}


def packers(
    crf: int = DEFAULTS.crf, keyframes: int = DEFAULTS.keyframes, bf: int = 1, x264: str = X264
) -> dict[str, str]:
    return {"crf": str(crf), "g": str(keyframes), "bf": str(bf), "sc_threshold": "0", "x264-params": x264}


ENCODINGS = {
    "x264 as usual, crf 18": USUAL,
    "the packer's": packers(),
    "... crf 18": packers(crf=18),
    "... crf 22": packers(crf=22),
    "... keyframe every 8": packers(keyframes=8),
    "... keyframe every 32": packers(keyframes=32),
    "... no frames to leave out": packers(bf=0),
    "... CABAC": packers(x264=X264.replace("cabac=0", "cabac=1")),
    "... loop filter": packers(x264=X264.replace("no-deblock=1:", "")),
    "... psychovisual": packers(x264=X264.replace(":no-psy=1:aq-mode=0", "")),
}


def footage(folder: Path, frames: int, size: int) -> list[np.ndarray]:
    """The first ``frames`` of every second frame of each video, as planar yuv420p arrays."""
    clips = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEOS):
        with av.open(str(path)) as container:
            kept = []
            for number, frame in enumerate(container.decode(video=0)):
                if number % 2 == 0:
                    small = frame.reformat(size, size, "yuv420p", interpolation="BICUBIC", threads=1)
                    kept.append(small.to_ndarray())
                if len(kept) == frames:
                    clips.append(np.stack(kept))
                    break
    return clips


def encode(clip: np.ndarray, options: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.codec_context.thread_count = 1
        stream.height, stream.width, stream.pix_fmt = clip.shape[1] * 2 // 3, clip.shape[2], "yuv420p"
        for number, planes in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(planes, "yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def fidelity(data: bytes, clip: np.ndarray) -> float:
    with av.open(io.BytesIO(data)) as container:
        decoded = np.stack([frame.to_ndarray() for frame in container.decode(video=0)])
    return float(10 * np.log10(255**2 / ((decoded.astype(float) - clip) ** 2).mean()))


def decoding(clips: list[bytes], draws: list[list[int]]) -> float:
    """CPU milliseconds a draw."""
    start = time.process_time()
    for data in clips:
        for frames in draws:
            with Video(data, "clip") as video:
                video.read(frames)
    return (time.process_time() - start) / (len(clips) * len(draws)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("footage", type=Path)
    parser.add_argument("--frames", type=int, default=31)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    clips = footage(options.footage, options.frames, options.size)
    rng = random.Random(0)
    draws = []
    for stride in (1, 2, 3) * 3:
        start = rng.randint(0, max(0, options.frames - 1 - (DRAWN - 1) * stride))
        draws.append([start + stride * n for n in range(DRAWN)])
    stored, taken = {}, {}
    for name, how in ENCODINGS.items():
        begin = time.process_time()
        stored[name] = [encode(clip, how) for clip in clips]
        taken[name] = (time.process_time() - begin) / len(clips) * 1e3
    times = {name: [] for name in ENCODINGS}
    for _ in range(options.rounds):
        for name, data in stored.items():
            times[name].append(decoding(data, draws))
    usual = next(iter(ENCODINGS))
    lines = [
        f"# Packing: {len(clips)} clips of {options.frames} frames, {options.size}x{options.size}, {DRAWN} drawn",
        "",
        f"`python -m benchmarks.packing FOOTAGE --frames {options.frames} --size {options.size} --rounds "
        f"{options.rounds}` on {platform.machine()}, Python {platform.python_version()}, PyAV {av.__version__}.",
        "",
        "| encoding | decode, CPU ms | speed | bytes | PSNR, dB | encode, CPU ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, data in stored.items():
        best = min(times[name])
        size = sum(map(len, data)) / len(data)
        base = sum(map(len, stored[usual])) / len(data)
        psnr = np.mean([fidelity(one, clip) for one, clip in zip(data, clips, strict=True)])
        lines.append(
            f"| {name} | {best:.2f} | {min(times[usual]) / best:.2f}x | {size:.0f} ({size / base:.2f}x) | {psnr:.2f} | "
            f"{taken[name]:.0f} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
