"""Decoding: the very frames that were asked for, no more work than they need, and a Skip for what can't be decoded."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from test_index import picture, video
from torch.nn import functional as F

from pipelines import decode
from pipelines.container import probe, turns_of
from pipelines.decode import Video, open_video
from pipelines.faults import Skip
from tests.pipelines.footage import AV1

FORMATS = {"mp4": "mp4", "mkv": "matroska", "avi": "avi", "mpg": "mpeg", "flv": "flv"}


def moving(
    frames: int = 40,
    size: tuple[int, int] = (48, 64),
    suffix: str = "mp4",
    codec: str = "libx264",
    times: list[int] | None = None,
    turned: int = 0,
    **options: str,
) -> bytes:
    """A video in which every frame differs from every other one."""
    rng = np.random.default_rng(3)
    texture = rng.integers(0, 256, (size[0], size[1] + 8 * frames, 3), dtype=np.uint8)
    texture = (texture // 4 + np.linspace(0, 180, texture.shape[1])[None, :, None]).astype(np.uint8)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=FORMATS[suffix]) as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        if suffix in ("avi", "mpg"):
            stream.codec_context.qmax = 4
        if turned:
            stream.set_display_rotation(turned)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(texture[:, 8 * number : 8 * number + size[1]]), format="rgb24"
            )
            if times:
                picture.pts, picture.time_base = times[number], Fraction(1, 1000)
            for packet in stream.encode(picture):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def all_frames(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).transpose(0, 3, 1, 2)


VIDEOS = {
    "keyframes every 250": moving(g="250", bf="3"),
    "keyframes every 8": moving(g="8", bf="0"),
    "open groups of pictures": moving(g="10", bf="3", **{"x264-params": "open-gop=1"}),
    "intra refresh": moving(**{"x264-params": "intra-refresh=1:keyint=10"}),
    "b-frame pyramid": moving(g="40", bf="4", **{"x264-params": "b-pyramid=normal"}),
    "variable frame rate": moving(times=[40 * i + (i % 3) * 11 for i in range(40)], g="12"),
    "matroska": moving(suffix="mkv", g="12"),
    "mpeg-4 in avi": moving(suffix="avi", codec="mpeg4", g="12", bf="2"),
    "mpeg-2 program stream": moving(suffix="mpg", codec="mpeg2video", g="12", bf="2"),
    "flash": moving(suffix="flv", g="12", bf="2"),
    "av1": AV1.read_bytes(),
    "vp8 with hidden frames": moving(suffix="mkv", codec="libvpx", **{"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "a width that vectors don't divide": moving(size=(50, 70)),
    "odd planes": moving(size=(48, 84)),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_plain_decoding(name: str) -> None:
    data, whole = VIDEOS[name], all_frames(VIDEOS[name])
    info = probe(data, False, name)
    assert (info.frames, info.height, info.width) == (len(whole), *whole.shape[2:])
    assert len(np.unique(whole.reshape(len(whole), -1), axis=0)) == len(whole) == 40
    for numbers in ([0], [39], range(9), [5, 6, 7], [3, 11, 12, 30], range(31, 40), range(40), [17, 38]):
        with Video(data, name) as opened:
            frames_TCHW = opened.read(list(numbers))
        assert frames_TCHW.dtype == torch.uint8
        assert np.array_equal(frames_TCHW.numpy(), whole[list(numbers)])


@pytest.mark.parametrize("turned", [90, 180, 270])
def test_frames_are_upright(turned: int) -> None:
    data = moving(8, (48, 80), turned=turned)
    whole = np.rot90(all_frames(data), turned // 90, (2, 3))
    info = probe(data, False, "x")
    with Video(data, "x") as opened:
        assert (opened.height, opened.width) == (info.height, info.width) == whole.shape[2:]
        assert np.array_equal(opened.read([2, 5]).numpy(), whole[[2, 5]])
    with Video(moving(8, (48, 80)), "x") as plain, Video(data, "x") as opened:
        size = (24, 40) if turned == 180 else (40, 24)
        small = np.rot90(plain.read([3], (24, 40)).numpy(), turned // 90, (2, 3))
        assert np.array_equal(opened.read([3], size).numpy(), small)
    for place in range(len(data) - 1200, len(data)):  # boxes of any size and kind
        turns_of(data[:place] + b"\xff\x00\x00\x01" + data[place + 4 :])
        turns_of(data[:place] + bytes(4) + data[place + 4 :])


def test_decoding_starts_at_a_keyframe_and_stops_after_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    data, given = moving(g="8", bf="0"), []
    packets = decode.packets_of
    monkeypatch.setattr(decode, "packets_of", lambda container: _Watched(packets(container), given))
    with Video(data, "x") as opened:
        opened.read([18, 20])
    assert given == [16, 17, 18, 19, 20]
    with Video(data, "x") as opened:
        opened.read([0, 1])
    assert given[5:] == [0, 1]


class _Watched(list):
    """Packets that note the index of each that is taken by it."""

    def __init__(self, packets: list, given: list[int]) -> None:
        super().__init__(packets)
        self.given = given

    def __getitem__(self, index: int) -> object:  # type: ignore[override]
        self.given.append(index)
        return super().__getitem__(index)


def test_resizing_is_antialiased() -> None:
    checker = np.indices((128, 128)).sum(0) % 2 * 255
    data = io.BytesIO()
    with av.open(data, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = 128, 128, "yuv420p"
        pixels = np.repeat(checker[:, :, None], 3, 2).astype(np.uint8)
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")), *stream.encode(None)]:
            container.mux(packet)
    with Video(data.getvalue(), "x") as opened:
        small = opened.read([0], (32, 32)).float()
    assert small.shape == (1, 3, 32, 32)
    assert (small - 127.5).abs().mean() < 8

    data, (height, width) = moving(size=(96, 128)), (40, 56)
    reference = F.interpolate(
        torch.from_numpy(all_frames(data)[[4]]).float(), (height, width), mode="bicubic", antialias=True
    )
    with Video(data, "x") as opened:
        error = (opened.read([4], (height, width)) - reference).abs()
    assert error.mean() < 3 and error[..., -8:].mean() < 1.5 * error.mean()


def test_pictures_are_upright() -> None:
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # 6: to be turned to the right
    plain = picture((20, 30), "mjpeg", half=True)
    data = plain[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif + plain[2:]
    with Video(plain, "x", image=True) as lying, Video(data, "x", image=True) as opened:
        assert (opened.height, opened.width) == (30, 20)
        assert np.array_equal(opened.read([0]).numpy(), np.rot90(lying.read([0]).numpy(), 3, (2, 3)))
    info = probe(data, True, "x")
    assert (info.height, info.width) == (30, 20)


@pytest.mark.parametrize("codec", ["png", "mjpeg"])
def test_images_are_one_frame(codec: str) -> None:
    data = picture((20, 30), codec)
    assert probe(data, True, "x").frames == 1
    with open_video(data, "x", image=True) as opened:
        assert (opened.height, opened.width) == (20, 30)
        frames_TCHW = opened.read([0])
    assert frames_TCHW.shape == (1, 3, 20, 30)
    assert (frames_TCHW.float() - 90).abs().max() <= 2


def test_corrupt_short_and_absurd_clips_are_skipped() -> None:
    data = moving()
    for broken in (b"", b"no video", data[: len(data) // 3], b"\0" * 5000):
        with pytest.raises(Skip) as caught, Video(broken, "shard.tar/key") as opened:
            opened.read(range(40))
        assert caught.value.reason in ("undecodable", "short") and "shard.tar/key" in caught.value.detail
    with pytest.raises(Skip, match="short: a/b: frame 40 was asked for, it has 40"), Video(data, "a/b") as opened:
        opened.read([3, 40])
    with pytest.raises(Skip, match="absurd: a/b: 40 frames of 64 x 20000"), Video(data, "a/b") as opened:
        opened.read(range(40), (20000, 64))
    with pytest.raises(Skip, match="undecodable: a/b"):
        probe(b"junk", False, "a/b")
    with pytest.raises(Skip, match="undecodable: a/b"):
        probe(video(1)[:300], False, "a/b")


def damage(data: bytes) -> tuple[bytes, int]:
    """The video with a few wrong bytes in its middle, and the frame that FFmpeg then says it patched up."""
    for at in range(len(data) // 2, len(data)):
        damaged = data[:at] + b"\xff" * 8 + data[at + 8 :]
        with av.open(io.BytesIO(damaged)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if frame.is_corrupt:
                    return damaged, number
    raise AssertionError("no byte matters")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_frames_that_the_decoder_makes_up_are_never_given_out(suffix: str) -> None:
    data = moving(g="8", bf="0", suffix=suffix, codec="mpeg4" if suffix == "avi" else "libx264")
    damaged, number = damage(data)
    after = number + (suffix != "avi")  # refers to the damaged one; in AVI every frame is a keyframe here
    for frames in (range(40), [number], [after]):
        with pytest.raises(Skip, match=r"corrupt: a/b: frame \d+ is damaged, or ref"), Video(damaged, "a/b") as opened:
            opened.read(frames)
    for frames in (range(number), [number // 8 * 8 + 8]):
        with Video(damaged, "a/b") as opened:
            assert np.array_equal(opened.read(frames).numpy(), all_frames(data)[list(frames)])


def test_torchcodec_gives_the_same_frames(tmp_path: Path) -> None:
    data = moving(g="12")
    (tmp_path / "clip.mp4").write_bytes(data)
    program = (
        "import sys, numpy; from pathlib import Path; from pipelines.decode import open_video\n"
        "folder = Path(sys.argv[1])\n"
        "with open_video((folder / 'clip.mp4').read_bytes(), 'x', backend='torchcodec') as opened:\n"
        "    numpy.save(folder / 'frames.npy', opened.read([3, 4, 20]).numpy())\n"
    )
    libraries = Path(av.__file__).parents[1] / "av.libs"
    for path in [*libraries.glob("libav*"), *libraries.glob("libsw*")]:  # named with a digest, as wheels have it
        (tmp_path / (path.name.split("-")[0] + re.search(r"\.so\.\d+", path.name)[0])).symlink_to(path)
    environment = os.environ | {"LD_LIBRARY_PATH": f"{tmp_path}:{libraries}"}  # read when a process starts
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    assert np.array_equal(np.load(tmp_path / "frames.npy"), all_frames(data)[[3, 4, 20]])


@pytest.mark.footage
def test_real_footage_of_every_container_decodes_as_plainly(footage: Path) -> None:
    checked = 0
    for path in sorted(footage.iterdir()):
        if path.suffix not in (".mp4", ".mkv", ".avi", ".mov", ".webm") or (
            path.stat().st_size > 600_000 and "fire2" not in path.name
        ):
            continue  # that one is stored upside down
        data = path.read_bytes()
        info = probe(data, False, path.name)
        numbers = [info.frames // 4, info.frames // 4 + 1, info.frames // 4 + 4]
        with av.open(io.BytesIO(data)) as container:
            plain = []
            for number, frame in enumerate(container.decode(video=0)):
                if number in numbers:
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    plain.append(upright.transpose(2, 0, 1))
                if number >= numbers[-1]:
                    break
        with Video(data, path.name) as opened:
            assert np.array_equal(opened.read(numbers).numpy(), np.stack(plain)), path.name
        checked += 1
    assert checked >= 5
