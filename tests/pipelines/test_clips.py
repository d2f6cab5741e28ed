"""Clips: the same place gives the same pixels, bit for bit; resized, cropped and flipped as drawn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_decode import all_frames, moving
from test_index import npy, picture

from pipelines.clips import cut, make_clip, read_caption
from pipelines.contracts import ClipRule, Source
from pipelines.faults import InputError, Skip
from pipelines.index import record_type
from pipelines.order import Crop, crop, frame_numbers

SOURCE = Source("data", "shard-000000.tar", "key")


def record(frames: int = 40, fps: float = 24, motion: float = 0.25, image: bool = False) -> np.void:
    row = np.zeros(1, record_type(3))[0]
    row["frames"], row["fps"], row["motion"], row["kind"] = frames, fps, motion, image
    return row


def test_a_clip_is_made_of_the_drawn_frames() -> None:
    data = moving(size=(48, 64))
    whole = all_frames(data)
    rule = ClipRule(frames=5, stride=(1, 3), sizes=((48, 64),), flip=0.5)
    flips = set()
    for place in range(12):
        clip = make_clip(data, record(), rule, (48, 64), 7, place, SOURCE)
        numbers = frame_numbers(rule, 40, 7, place)
        assert numbers is not None
        pixels = torch.from_numpy(whole[list(numbers)]).permute(1, 0, 2, 3).float() / 127.5 - 1
        flip = crop(rule, (48, 64), (48, 64), 7, place).flip
        assert torch.allclose(clip.pixels_CTHW, pixels.flip(3) if flip else pixels, atol=1e-6)
        assert clip.fps == pytest.approx(24 / (numbers[1] - numbers[0]))
        assert (clip.motion, clip.place, clip.source) == (0.25, place, SOURCE)
        flips.add(flip)
    assert flips == {True, False}


def test_the_same_place_gives_the_same_bits_and_another_one_others() -> None:
    data = moving(size=(48, 64))
    rule = ClipRule(frames=3, stride=(1, 4), stride_per="gap", sizes=((32, 32),))
    clips = [make_clip(data, record(), rule, (32, 32), 7, place, SOURCE).pixels_CTHW for place in range(8)]
    out_CTHW = torch.full((3, 3, 32, 32), float("nan"))
    again = make_clip(data, record(), rule, (32, 32), 7, 3, SOURCE, out_CTHW=out_CTHW)
    assert again.pixels_CTHW.data_ptr() == out_CTHW.data_ptr()
    assert torch.equal(out_CTHW, clips[3])
    assert len({clip.numpy().tobytes() for clip in clips}) == len(clips)
    assert not torch.equal(make_clip(data, record(), rule, (32, 32), 8, 3, SOURCE).pixels_CTHW, clips[3])


def test_pixels_span_minus_one_to_one() -> None:
    frames_TCHW = torch.tensor([0, 255, 128, 127], dtype=torch.uint8).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    pixels_CTHW = cut(frames_TCHW, Crop(2, 2, 0, 0, False), (2, 2))
    assert pixels_CTHW.shape == (3, 1, 2, 2) and pixels_CTHW.dtype == torch.float32
    assert pixels_CTHW[0, 0].flatten().tolist() == pytest.approx([-1, 1, 1 / 255, -1 / 255], abs=1e-6)
    assert pixels_CTHW.min() >= -1 and pixels_CTHW.max() <= 1
    flipped = cut(frames_TCHW, Crop(2, 2, 0, 0, True), (2, 2))
    assert torch.equal(flipped, pixels_CTHW.flip(3))
    assert cut(
        torch.arange(24, dtype=torch.uint8).reshape(1, 1, 4, 6).expand(1, 3, 4, 6), Crop(4, 6, 1, 2, False), (2, 3)
    )[0, 0].add(1).mul(127.5).round().tolist() == [[8, 9, 10], [14, 15, 16]]


def test_an_image_is_a_one_frame_clip_and_a_video_serves_by_one_frame() -> None:
    rule = ClipRule(frames=1, sizes=((16, 16),), flip=0)
    clip = make_clip(picture((16, 32)), record(1, 0, 0, image=True), rule, (16, 16), 1, 5, SOURCE)
    assert clip.pixels_CTHW.shape == (3, 1, 16, 16) and clip.fps == 0
    data, drawn = moving(size=(16, 32)), set()
    for place in range(200):
        numbers = frame_numbers(rule, 40, 1, place)
        assert numbers is not None
        drawn.add(numbers[0])
    assert drawn == set(range(40))
    assert make_clip(data, record(), rule, (16, 16), 1, 5, SOURCE).pixels_CTHW.shape == (3, 1, 16, 16)


def test_too_few_frames_are_skipped_or_end_the_run() -> None:
    text = r"data/shard-000000\.tar/key: 14 frames; a clip of 9 frames at stride 2 needs 17\. Lower clip\.frames"
    for short, error, remedy in (("skip", Skip, "pack longer clips"), ("fail", InputError, "set clip.short: skip")):
        rule = ClipRule(frames=9, stride=(2, 3), sizes=((16, 16),), short=short)
        with pytest.raises(error, match=f"{text} or {remedy}"):
            make_clip(b"", record(14), rule, (16, 16), 1, 1, SOURCE)
    with pytest.raises(Skip, match="short"):
        make_clip(moving(10), record(40), ClipRule(frames=9, stride=(4, 4), sizes=((16, 16),)), (16, 16), 1, 1, SOURCE)


def test_captions_are_arrays_of_floats_and_never_pickles() -> None:
    caption = read_caption(npy(np.arange(6, dtype=np.float16).reshape(2, 3)), "x")
    assert caption.dtype == torch.float32 and caption.tolist() == [[0, 1, 2], [3, 4, 5]]
    for wrong in (np.ones(3, np.float32), np.ones((2, 3), np.int64), np.array([[{}]], dtype=object)):
        with pytest.raises(Skip, match="caption: x"):
            read_caption(npy(wrong), "x")
    with pytest.raises(Skip, match="caption: x"):
        read_caption(b"junk", "x")
    with pytest.raises(Skip, match=r"caption: x: an array of float32 \(2, 3\), not floats of \(tokens, 4\)"):
        read_caption(npy(np.ones((2, 3), np.float32)), "x", 4)
