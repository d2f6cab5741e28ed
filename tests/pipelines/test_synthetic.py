"""Procedural footage: its flow is the motion of its pixels, and it is a function of (seed, place)."""

import av
import numpy as np
import pytest

from pipelines.faults import InputError
from pipelines.synthetic import footage, write_videos


def warped(frame_HW3, flow_2HW):
    """``frame`` sampled at ``p + flow(p)``, bilinear, worked out pixel by pixel apart from the renderer."""
    height, width, _ = frame_HW3.shape
    ys, xs = np.mgrid[:height, :width]
    x = np.clip(xs + flow_2HW[0], 0, width - 1.001)
    y = np.clip(ys + flow_2HW[1], 0, height - 1.001)
    x0, y0 = x.astype(int), y.astype(int)
    wx, wy = (x - x0)[..., None], (y - y0)[..., None]
    frame = frame_HW3.astype(np.float64)
    top = frame[y0, x0] * (1 - wx) + frame[y0, x0 + 1] * wx
    bottom = frame[y0 + 1, x0] * (1 - wx) + frame[y0 + 1, x0 + 1] * wx
    return top * (1 - wy) + bottom * wy


@pytest.mark.parametrize("place", range(6))
def test_flow_explains_the_visible_pixels(place):
    clip = footage(seed=3, place=place, frames=8, size=(96, 128), fps=24)
    still, moved, hidden = [], [], []
    for t in range(1, 8):
        error_HW = np.abs(warped(clip.frames_THW3[t - 1], clip.flow_T2HW[t]) - clip.frames_THW3[t]).mean(-1)
        seen_HW = ~clip.occluded_THW[t]
        moved.append(error_HW[seen_HW].mean())
        hidden.append(error_HW[~seen_HW].mean() if (~seen_HW).any() else np.nan)
        plain_HW = np.abs(clip.frames_THW3[t - 1].astype(float) - clip.frames_THW3[t]).mean(-1)
        still.append(plain_HW[seen_HW].mean())
    assert np.mean(moved) < 2.0, "grey levels of 255, after warping"
    assert np.mean(moved) < 0.6 * np.mean(still)
    assert np.nanmean(hidden) > 2 * np.mean(moved), "what the mask calls occluded can't be explained by the flow"


def test_the_first_frame_has_no_flow():
    clip = footage(0, 0, 2, (32, 32))
    assert not clip.flow_T2HW[0].any() and not clip.occluded_THW[0].any()
    assert clip.flow_T2HW[1].any()


def test_a_scene_is_a_function_of_seed_and_place():
    first, again = footage(5, 2, 3, (48, 64)), footage(5, 2, 3, (48, 64))
    assert np.array_equal(first.frames_THW3, again.frames_THW3)
    assert not np.array_equal(first.frames_THW3, footage(5, 3, 3, (48, 64)).frames_THW3)
    assert not np.array_equal(first.frames_THW3, footage(6, 2, 3, (48, 64)).frames_THW3)


def test_scenes_differ_in_speed_and_texture():
    clips = [footage(0, place, 4, (64, 64)) for place in range(16)]
    speeds = [np.hypot(*clip.flow_T2HW[1:].transpose(1, 0, 2, 3)).mean() for clip in clips]
    assert min(speeds) < 0.5 < 1.0 < max(speeds)
    contrasts = [np.abs(np.diff(clip.frames_THW3[0].astype(float), axis=1)).mean() for clip in clips]
    assert max(contrasts) > 2 * min(contrasts)
    assert sum(clip.occluded_THW.any() for clip in clips) >= 12


def test_videos_hold_the_rendered_frames(tmp_path):
    counts = []
    paths = write_videos(
        tmp_path / "new" / "folder", 2, 0.5, (64, 80), 20, seed=1, progress=lambda *c: counts.append(c)
    )
    assert [p.name for p in paths] == ["scene-0000.mp4", "scene-0001.mp4"]
    assert counts == [(1, 2), (2, 2)]
    again = write_videos(tmp_path / "again", 2, 0.5, (64, 80), 20, seed=1)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]
    with av.open(str(paths[1])) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 20)
        frames_THW3 = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    expected_THW3 = footage(1, 1, 10, (64, 80), 20).frames_THW3
    assert frames_THW3.shape == expected_THW3.shape
    mse = ((frames_THW3.astype(float) - expected_THW3) ** 2).mean()
    assert 10 * np.log10(255**2 / mse) > 30


def test_odd_sizes_and_unwritable_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="needs an even height and width"):
        write_videos(tmp_path, 1, 0.1, (33, 32))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written there"):
        write_videos(tmp_path / "file" / "sub", 1, 0.1)
