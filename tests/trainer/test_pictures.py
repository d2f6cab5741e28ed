import av
import numpy as np
import pytest
import torch
from PIL import Image

from trainer.pictures import ERROR_FULL_SCALE, Views, error_to_rgb, flow_to_rgb, grid, side_by_side

torch.set_num_threads(1)


def smooth(frames: int, height: int, width: int) -> torch.Tensor:
    """A coloured ramp that drifts from frame to frame, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([torch.stack([x * 0.8, y * 0.8, (x + y) / 4 + 0.1 * t]) for t in range(frames)], 1)


def clip(frames: int = 3, height: int = 16, width: int = 24, fps: float = 10.0, **views: torch.Tensor) -> Views:
    original = smooth(frames, height, width)
    return Views("a clip", original, {"reconstruction": (original + 0.1).clamp(-1, 1), **views}, fps=fps)


def colour(u: float, v: float, full_scale: float = 1.0) -> list[int]:
    rgb = flow_to_rgb(torch.tensor([u, v]).view(1, 2, 1, 1, 1), full_scale).flatten()
    return ((rgb + 1) * 127.5).round().int().tolist()


def test_flow_colours_are_the_middlebury_wheel():
    assert colour(0, 0) == [255, 255, 255]
    assert colour(1, 0) == [255, 0, 0], "right is red"
    assert colour(1, -1e-6) == [255, 0, 0], "the wheel closes at red"
    down, left, up = colour(0, 1), colour(-1, 0), colour(0, -1)
    # A quarter of the wheel's 55 steps is 13.75: 13.75/15 of the way from red to yellow.
    assert down == [255, round(255 * 13.75 / 15), 0]
    # A half is 27.5: 15 + 6 + 4 = 25 steps end at cyan, 2.5 of the 11 to blue follow.
    assert left == [0, round(255 * (1 - 2.5 / 11)), 255]
    # Three quarters are 41.25: 36 end at blue, 5.25 of the 13 to magenta follow.
    assert up == [round(255 * 5.25 / 13), 0, 255]


def test_flow_colour_says_speed_by_saturation_and_darkens_beyond_the_scale():
    assert colour(0.5, 0) == [255, 128, 128]
    assert colour(2, 0) == [191, 0, 0]
    assert colour(1, 0, full_scale=4) == [255, 191, 191]


def test_flow_scales_each_clip_by_itself_and_shows_tiny_flow_as_still():
    flow_B2THW = torch.zeros(2, 2, 1, 10, 10)
    flow_B2THW[0, 0], flow_B2THW[1, 0] = 8.0, 0.01
    rgb = flow_to_rgb(flow_B2THW)
    assert rgb.shape == (2, 3, 1, 10, 10)
    assert rgb[0, 1].max() == -1, "8 pixels everywhere is the clip's full scale"
    assert rgb[1].min() > 0.95, "a hundredth of a pixel is no motion"


def test_error_is_dark_without_error_and_saturates():
    x = torch.zeros(3, 1, 1, 4)
    y = x.clone()
    y[:, 0, 0, 1:] = torch.tensor([0.5, 1.0, 4.0]) * ERROR_FULL_SCALE / 127.5
    brightness = error_to_rgb(x, y).sum(0).flatten()
    assert brightness[0] < -2.9
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]
    assert torch.equal(error_to_rgb(x, torch.full_like(x, torch.nan))[..., 0], error_to_rgb(x, y)[..., 3])


def test_grid_holds_every_view_of_every_frame(tmp_path):
    flow = flow_to_rgb(torch.ones(1, 2, 3, 16, 24))[0]
    views = clip(flow=flow)
    path = grid(views, tmp_path / "new" / "grid.png")
    picture = np.asarray(Image.open(path)).astype(int)
    size = (10 * 16, 10 * 24)
    lefts = [picture.shape[1] - 24 - 240 - k * 246 for k in range(3)]
    found = []
    for name, frames_THW3 in views.rows():
        for t in range(3):
            panel = frames_THW3[t].repeat(10, 0).repeat(10, 1).astype(int)
            spots = [
                (y, x)
                for y in range(62, picture.shape[0] - size[0], 2)
                for x in lefts
                if (picture[y : y + size[0] : 10, x : x + size[1] : 10] == panel[::10, ::10]).all()
            ]
            assert spots, f"{name}, frame {t + 1} is not on the grid"
            found.append((name, t, spots[0]))
    rows = [next(spot[0] for name, _, spot in found if name == wanted) for wanted, _ in views.rows()]
    assert rows == sorted(rows) and [name for name, _ in views.rows()] == [
        "original",
        "reconstruction",
        "flow",
        "error",
    ]
    columns = [spot[1] for name, _, spot in found if name == "original"]
    assert columns == sorted(columns) and len(set(columns)) == 3


def test_grid_of_one_frame_and_of_many(tmp_path):
    one = Image.open(grid(clip(frames=1), tmp_path / "one.png"))
    many = Image.open(grid(clip(frames=40), tmp_path / "many.png"))
    assert one.width < many.width < 8 * (10 * 24 + 6) + 300
    wide = Image.open(
        grid(Views("x" * 90, *[smooth(1, 16, 16)], {"reconstruction": smooth(1, 16, 16)}), tmp_path / "w.png")
    )
    assert wide.width > 900, "the title is not cut off"


def test_large_frames_are_not_enlarged(tmp_path):
    picture = Image.open(grid(clip(frames=1, height=200, width=300), tmp_path / "large.png"))
    assert 300 < picture.width < 560 and picture.height > 3 * 200


def decoded(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        frames = list(container.decode(stream))
    return [float(frame.time) for frame in frames], [frame.to_ndarray(format="rgb24").astype(int) for frame in frames]


def test_video_plays_each_clip_at_its_own_rate_for_its_time(tmp_path):
    times, _ = decoded(side_by_side([clip(fps=10), clip(fps=20)], tmp_path / "v.mp4", panel=32, seconds=0.5))
    # 3 frames at 10 frames/s are played twice, at 20 frames/s four times.
    expected = [k / 10 for k in range(6)] + [0.6 + k / 20 for k in range(12)]
    assert times == pytest.approx(expected, abs=1e-3)


def test_video_shows_original_reconstruction_and_error_in_true_colours(tmp_path):
    one = clip(frames=2)
    times, frames = decoded(side_by_side([one], tmp_path / "v.mp4", panel=64, seconds=0))
    assert len(times) == 2
    assert frames[0].shape[0] % 2 == 0 and frames[0].shape[1] % 2 == 0
    rows = dict(one.rows())
    for t, picture in enumerate(frames):
        for k, name in enumerate(("original", "reconstruction", "error")):
            x, y = 16 + k * (4 * 24 + 8), 46
            shown = picture[y : y + 64, x : x + 96].reshape(16, 4, 24, 4, 3).mean((1, 3))
            assert np.abs(shown - rows[name][t]).mean() < 4, f"{name}, frame {t + 1}"


def test_video_refuses_clips_of_unequal_size(tmp_path):
    with pytest.raises(ValueError, match=r"one frame size; these have \[\(16, 24\), \(32, 24\)\]"):
        side_by_side([clip(), clip(height=32)], tmp_path / "v.mp4")
    with pytest.raises(ValueError, match="these have none"):
        side_by_side([], tmp_path / "v.mp4")
