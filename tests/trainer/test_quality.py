import json
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.losses import Perceptual, PerceptualSpec
from trainer.quality import (
    FvdSpec,
    Row,
    Tally,
    VideoFeatures,
    frechet_by_batch,
    frechet_distance,
    interval,
    margin,
    measure,
    moments,
    psnr_db,
)

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def perceptual() -> Perceptual:
    return Perceptual(PerceptualSpec(backbone="alex", weights="random"))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def row(place: int, *mse: float, motion: float = 0.0, **features) -> Row:
    frames = len(mse)
    return Row(place, f"d/s/{place}", motion, mse, (0.9,) * frames, (0.1,) * frames, (1.0,) * (frames - 1), features)


def test_psnr_by_hand_and_its_ceiling():
    assert psnr_db(0.01) == pytest.approx(20)
    assert psnr_db(1.0) == 0
    assert psnr_db(0.0) == 100 and psnr_db(1e-12) == 100
    assert math.isnan(psnr_db(math.nan))


def test_a_clip_is_measured_as_scikit_image_does(perceptual):
    x, y = pixels(3, 3, 32, 40), pixels(3, 3, 32, 40, seed=1) * 1.2
    found = measure(x, y, perceptual, place=0, source="clip", motion=0.5).by_frame()
    clamped = y.clamp(-1, 1)
    for t in range(3):
        a, b = ((v[:, t].double().numpy() + 1) / 2 for v in (x, clamped))
        assert found["psnr_db"][t] == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
        similarity = structural_similarity(
            a, b, data_range=1, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert found["ssim"][t] == pytest.approx(similarity, abs=1e-9)
        assert found["lpips"][t] == pytest.approx(perceptual(x[None, :, [t]], clamped[None, :, [t]]).item(), rel=1e-4)


def test_pooled_psnr_and_mean_psnr_differ_as_they_should():
    uneven = row(0, 0.01, 0.0001).measures()
    assert uneven["psnr_db"] == pytest.approx(30)
    assert uneven["psnr_clip_db"] == pytest.approx(-10 * math.log10(0.00505))
    with_a_perfect_frame = row(0, 0.0, 0.01).measures()
    assert with_a_perfect_frame["psnr_db"] == pytest.approx(60), "the ceiling stands for infinity"
    assert with_a_perfect_frame["psnr_clip_db"] == pytest.approx(10 * math.log10(200))


def test_flicker_is_blind_to_a_standing_error_and_counts_a_changing_one(perceptual):
    x = pixels(3, 4, 32, 32) * 0.5
    still = measure(x, x + 0.2, perceptual, place=0, source="a", motion=0)
    assert max(still.flicker_T) < 1e-4 and still.measures()["psnr_db"] == pytest.approx(20, abs=1e-4)
    beating = x + 0.2 * torch.tensor([1.0, -1, 1, -1]).view(1, 4, 1, 1)
    assert measure(x, beating, perceptual, place=0, source="a", motion=0).flicker_T == pytest.approx([0.2 * 255] * 3)


def test_an_image_has_no_flicker(perceptual):
    x = pixels(3, 1, 32, 32)
    tally = Tally([measure(x, x * 0.9, perceptual, place=0, source="a", motion=0)])
    assert tally.summary()["flicker"] is None and tally.summary()["by_frame"]["flicker"] == []


def test_a_reconstruction_that_is_not_finite_is_named_and_has_no_figures(perceptual):
    x = pixels(3, 2, 32, 32)
    bad = x.clone()
    bad[0, 1, 5, 5] = math.inf
    tally = Tally(
        measure(x, y, perceptual, place=place, source=f"clip-{place}", motion=0) for place, y in enumerate((x, bad))
    )
    summary = tally.summary()
    assert summary["not_finite"] == ["clip-1"]
    assert summary["psnr_db"] is None and summary["confidence"]["psnr_db"] is None
    assert summary["by_frame"]["psnr_db"] == [100, None]
    json.dumps(summary, allow_nan=False)


def test_unequal_shapes_are_our_fault_and_named(perceptual):
    with pytest.raises(
        ValueError, match=r"d/s/k: the reconstruction is \(3, 1, 32, 32\), the original \(3, 2, 32, 32\)"
    ):
        measure(pixels(3, 2, 32, 32), pixels(3, 1, 32, 32), perceptual, place=0, source="d/s/k", motion=0)


def test_frames_too_small_to_measure_are_a_fault_of_input(perceptual):
    with pytest.raises(InputError, match="at least 31 x 31"):
        measure(pixels(3, 1, 8, 8), pixels(3, 1, 8, 8), perceptual, place=0, source="a", motion=0)


def test_summary_by_frame_by_motion_and_per_clip():
    rows = [row(place, 10.0**-place, 0.1, motion=(place * 3) % 7) for place in range(1, 7)]
    summary = Tally(rows).summary()
    assert summary["clips"] == 6
    assert summary["by_frame"]["psnr_db"] == pytest.approx([35, 10])
    assert summary["psnr_db"] == pytest.approx((35 + 10) / 2)
    assert [line["psnr_db"] for line in summary["per_clip"]] == pytest.approx([10, 15, 20, 25, 30, 35])
    # motion 3 6 2 5 1 4 for places 1 to 6: the least third is places 5 and 3, then 1 and 6, then 4 and 2
    thirds = summary["by_motion"]
    assert [third["motion"] for third in thirds] == [[1, 2], [3, 4], [5, 6]]
    assert [third["psnr_db"] for third in thirds] == pytest.approx([25, 22.5, 20])
    assert [third["clips"] for third in thirds] == [2, 2, 2]


def test_frame_curves_of_clips_of_unequal_length():
    summary = Tally([row(0, 0.1, 0.01), row(1, 0.001)]).summary()
    assert summary["by_frame"]["psnr_db"] == pytest.approx([20, 20])


def test_interval_is_students():
    values = [30.1, 31.7, 29.8, 33.0, 30.4]
    expected = scipy.stats.t.interval(0.95, 4, loc=np.mean(values), scale=scipy.stats.sem(values))
    assert interval(values) == pytest.approx(expected)
    assert interval([1.0]) is None and interval([1.0, math.nan]) is None


def test_margin_is_paired_by_place():
    mine, theirs = [row(2, 0.001), row(1, 0.1)], [row(1, 1.0), row(2, 0.01), row(3, 0.5)]
    assert margin(mine, theirs)["psnr_db"] == pytest.approx(10)
    assert margin(mine, theirs)["confidence"] == pytest.approx([10, 10])


def test_tally_is_the_same_in_any_order_and_counts_a_place_once():
    rows = [row(place, 0.1 / (place + 1), 0.03 * place + 0.001, motion=0.3 * place) for place in range(9)]
    forward, backward = Tally(rows), Tally([*reversed(rows), rows[4]])
    assert len(backward) == 9
    assert json.dumps(forward.summary()) == json.dumps(backward.summary())
    with pytest.raises(ValueError, match="place 3 holds two clips: d/s/3 and other"):
        forward.add(Row(3, "other", 0.0, (), (), (), ()))


def test_rows_survive_json_to_the_last_bit():
    features = {"dataset": (np.float32([0.1, 1 / 3]), np.float32([1e-20, -7]))}
    original = row(5, 0.1, 1 / 3, motion=math.pi, **features)
    (back,) = Tally.from_json(json.loads(json.dumps(Tally([original]).to_json())))
    assert (back.place, back.source, back.motion, back.mse_T) == (5, "d/s/5", math.pi, (0.1, 1 / 3))
    assert back.flicker_T == original.flicker_T
    for mine, theirs in zip(back.features["dataset"], features["dataset"], strict=True):
        assert mine.dtype == np.float32 and np.array_equal(mine, theirs)


# Fréchet distance


def test_frechet_distance_of_one_dimension_by_hand():
    assert frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[25.0]])) == pytest.approx(
        3**2 + (5 - 2) ** 2
    )


def test_frechet_distance_in_two_dimensions_by_closed_form():
    a, b = np.array([[2.0, 0.6], [0.6, 1.0]]), np.array([[1.0, -0.4], [-0.4, 3.0]])
    # The eigenvalues p, q of AB have p + q = tr(AB) and pq = det(AB), so sqrt(p) + sqrt(q) = sqrt(tr + 2 sqrt(det)).
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    expected = 1 + 4 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(np.zeros(2), a, np.array([1.0, 2.0]), b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_agrees_with_the_matrix_root_and_is_zero_on_itself():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(200, 8)), random.normal(size=(200, 8)) @ random.normal(size=(8, 8)) + 0.5
    (mean_x, a), (mean_y, b) = moments(x), moments(y)
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(mean_x - mean_y).sum() + np.trace(a + b - 2 * root)
    assert frechet_distance(mean_x, a, mean_y, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_x, a, mean_x, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_clips_than_features():
    x = np.random.default_rng(0).normal(size=(3, 40))
    assert frechet_distance(*moments(x), *moments(x + 0.5)) == pytest.approx(40 * 0.25)


def test_moments_divide_as_the_two_conventions_do():
    x = np.array([[0.0, 1.0], [2.0, 5.0], [4.0, 3.0]])
    mean, covariance = moments(x)
    assert mean == pytest.approx([2, 3]) and covariance == pytest.approx(np.cov(x, rowvar=False, bias=True))
    assert moments(x, ddof=1)[1] == pytest.approx(np.cov(x, rowvar=False))


def test_frechet_by_batch_is_the_mean_of_batches_and_has_no_covariance_for_single_clips():
    random = np.random.default_rng(0)
    pairs = [(random.normal(size=4), random.normal(size=4)) for _ in range(5)]
    singles = np.mean([np.square(real - fake).sum() for real, fake in pairs])
    assert frechet_by_batch(pairs, 1) == pytest.approx(singles)
    batches = [
        frechet_distance(*(m for side in (0, 1) for m in moments(np.array([p[side] for p in part]), ddof=1)))
        for part in (pairs[:2], pairs[2:4])
    ]
    last = np.square(pairs[4][0] - pairs[4][1]).sum()
    assert frechet_by_batch(pairs, 2) == pytest.approx(np.mean([*batches, last]))


class TinyI3D(nn.Module):
    """The signature of StyleGAN-V's network: means by channel and time half, and what it was called with."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert return_features
        flags = torch.tensor([float(rescale), float(resize), float(x.dtype == torch.uint8), float(x.shape[-1])])
        v = x.float() / 127.5 - 1 if rescale else x.float()
        half = v.shape[2] // 2
        means = torch.cat([v[:, :, :half].mean([2, 3, 4]), v[:, :, half:].mean([2, 3, 4])], 1)
        return torch.cat([means, flags.expand(len(x), 4)], 1)


@pytest.fixture
def i3d(tmp_path) -> str:
    path = tmp_path / "i3d.pt"
    torch.jit.script(TinyI3D()).save(str(path))
    return str(path)


def test_features_follow_the_two_conventions(i3d):
    features = VideoFeatures(FvdSpec(i3d=i3d, per_batch=2))
    assert features.name.startswith("i3d.pt ")
    x = torch.full((3, 10, 20, 30), 0.5)
    x[:, 5:] = -3.0
    found = features(x)
    assert found["dataset"][6:].tolist() == [1, 1, 1, 30], "8-bit pixels, rescaled and resized inside"
    assert found["dataset"][:6] == pytest.approx([191 / 127.5 - 1] * 3 + [-1] * 3), "0.5 is grey level 191"
    assert found["per_batch"][6:].tolist() == [0, 0, 0, 224]
    assert found["per_batch"][:6] == pytest.approx([0.5] * 3 + [-1] * 3)
    assert list(VideoFeatures(FvdSpec(i3d=i3d))(x)) == ["dataset"]


def test_short_side_goes_to_224_and_the_middle_is_kept(i3d):
    class Columns(nn.Module):
        def forward(
            self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
        ) -> Tensor:
            return x.float().mean([1, 2, 3])

    torch.jit.script(Columns()).save(i3d)
    ramp = torch.linspace(-1, 1, 448).expand(3, 10, 224, 448)
    kept = VideoFeatures(FvdSpec(i3d=i3d, per_batch=1))(ramp)["per_batch"]
    assert kept == pytest.approx(ramp[0, 0, 0, 112:336].numpy(), abs=1e-5)


def test_rfvd_report(i3d):
    features = VideoFeatures(FvdSpec(i3d=i3d, per_batch=1))
    tally = Tally()
    originals = [pixels(3, 10, 12, 12, seed=place) * 0.5 for place in range(4)]
    for place, x in enumerate(originals):
        real, fake = features(x), features(x + 0.1)
        tally.add(row(place, 0.1, **{name: (real[name], fake[name]) for name in real}))
    report = features.summary(tally)
    # A constant shift of all six means: |Δμ|² = 6 * 0.1², equal covariances.
    assert report["value"] == pytest.approx(0.06, rel=0.05) and report["clips"] == 4
    assert report["per_batch"] == {"value": pytest.approx(0.06, rel=1e-3), "batch": 1}
    assert report["convention"] == "dataset level" and report["i3d"] == features.name
    assert features.summary(Tally([next(iter(tally))]))["value"] is None, "one clip has no covariance"


def test_rfvd_says_what_it_needs(i3d, tmp_path):
    with pytest.raises(InputError, match=r"at least 10 frames \(16 are usual\); these have 9"):
        VideoFeatures(FvdSpec(i3d=i3d))(pixels(3, 9, 12, 12))
    with pytest.raises(InputError, match=r"network '.*none.pt' can't be read: .*leave rFVD out"):
        VideoFeatures(FvdSpec(i3d=str(tmp_path / "none.pt")))
    (tmp_path / "torn.pt").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"torn.pt' can't be read"):
        VideoFeatures(FvdSpec(i3d=str(tmp_path / "torn.pt")))
