import math
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from pipelines.faults import InputError
from trainer.losses import Perceptual, PerceptualSpec, charbonnier, l1, mse, ssim, ssim_loss, torchvision_ops
from trainer.losses.flow import TimestepSpec, noised, schedule, timesteps
from trainer.losses.perceptual import LEAST_SIZE

torch.set_num_threads(1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def randomly(backbone: str) -> Perceptual:
    return Perceptual(PerceptualSpec(backbone=backbone, weights="random"))


def test_pixel_losses_by_hand():
    x, y = torch.zeros(1, 3, 1, 1, 2), torch.tensor([0.5, -1.0]).expand(1, 3, 1, 1, 2)
    assert mse(x, y).item() == pytest.approx((0.25 + 1) / 2)
    assert l1(x, y).item() == pytest.approx(0.75)
    assert charbonnier(x, y, eps=0.75).item() == pytest.approx((math.hypot(0.5, 0.75) + 1.25) / 2)


def test_pixel_losses_are_float32_for_half_inputs():
    x = torch.full((1, 3, 1, 1, 1), 1e-3, dtype=torch.bfloat16)
    assert mse(x, torch.zeros_like(x)).dtype == torch.float32
    assert mse(x, torch.zeros_like(x)).item() == pytest.approx(1e-6, rel=0.01)


@pytest.mark.parametrize("data_range", [1.0, 255.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_ssim_agrees_with_scikit_image(data_range, dtype, tolerance):
    x = (noise(2, 3, 2, 24, 37).to(dtype) + 1) / 2 * data_range
    smooth = torch.linspace(0, 1, 37).expand_as(x).to(dtype) * data_range
    for y in (x + 0.1 * data_range * noise(2, 3, 2, 24, 37, seed=1).to(dtype), smooth, data_range - x):
        ours = ssim(x, y, data_range)
        for b in range(2):
            for t in range(2):
                theirs = structural_similarity(
                    x[b, :, t].numpy(),
                    y[b, :, t].numpy(),
                    data_range=data_range,
                    channel_axis=0,
                    gaussian_weights=True,
                    sigma=1.5,
                    use_sample_covariance=False,
                )
                assert ours[b, t].item() == pytest.approx(theirs, abs=tolerance)


def test_ssim_of_flat_frames_by_hand():
    x, y = torch.full((1, 1, 1, 11, 11), 0.25).double(), torch.full((1, 1, 1, 11, 11), 0.75).double()
    c1 = 0.01**2
    assert ssim(x, y, 1.0).item() == pytest.approx((2 * 0.25 * 0.75 + c1) / (0.25**2 + 0.75**2 + c1))
    assert ssim(x, x, 1.0).item() == 1


def test_ssim_gradient_is_right_and_descends():
    x = noise(1, 1, 1, 12, 11).double().requires_grad_()
    y = noise(1, 1, 1, 12, 11, seed=1).double()
    assert torch.autograd.gradcheck(lambda x: ssim(x, y, 1.0), x)
    before = ssim_loss(x, y)
    assert before.item() == pytest.approx(1 - ssim((x + 1) / 2, (y + 1) / 2, 1.0).item(), abs=1e-6)
    (slope,) = torch.autograd.grad(before, x)
    assert ssim_loss(x - 0.1 * slope / slope.norm(), y) < before


def test_ssim_says_what_is_wrong():
    with pytest.raises(InputError, match="11 x 11 pixels; the frames have 10 x 40"):
        ssim(noise(1, 3, 1, 10, 40), noise(1, 3, 1, 10, 40), 1.0)
    with pytest.raises(ValueError, match="shapes differ"):
        ssim(noise(1, 3, 1, 12, 12), noise(1, 1, 1, 12, 12), 1.0)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_random_lpips_is_a_named_distance(backbone):
    metric, size = randomly(backbone), LEAST_SIZE[backbone]
    assert metric.name == f"{backbone} (random weights)"
    x = noise(2, 3, 2, size, size + 3)
    assert metric(x, x).shape == (2, 2)
    assert metric(x, x).abs().max() == 0
    near, far = (metric(x, x + scale * noise(*x.shape, seed=1)) for scale in (0.05, 0.5))
    assert (near > 0).all() and (far > near).all()
    torch.testing.assert_close(metric(x, -x)[1:, :1], metric(x[1:, :, :1], -x[1:, :, :1]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_random_lpips_is_deterministic_and_leaves_the_global_stream_alone(backbone):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = randomly(backbone).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = randomly(backbone).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())


def test_random_backbone_keeps_the_scale_of_activations():
    x = noise(1, 3, 64, 64)
    for depth in randomly("vgg").net.net(x):
        assert 0.1 < depth.square().mean().sqrt() < 10


def test_lpips_has_gradients_for_pixels_only_and_no_training_mode():
    metric = randomly("alex").train()
    assert not any(module.training for module in metric.modules())
    assert not any(parameter.requires_grad for parameter in metric.parameters())
    x = noise(1, 3, 1, 32, 32).requires_grad_()
    metric(x, noise(1, 3, 1, 32, 32, seed=1)).sum().backward()
    assert x.grad.abs().max() > 0


def test_lpips_refuses_frames_too_small_for_the_backbone():
    with pytest.raises(InputError, match="alex backbone needs frames of at least 31 x 31 pixels; these have 30 x 64"):
        randomly("alex")(noise(1, 3, 1, 30, 64), noise(1, 3, 1, 30, 64))


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
def test_lpips_loads_a_torchvision_state_dict_from_a_path(tmp_path):
    import lpips
    import torchvision

    reference = torchvision.models.alexnet(weights=None)
    path = tmp_path / "alexnet.pth"
    torch.save(reference.state_dict(), path)
    metric = Perceptual(PerceptualSpec(backbone="alex", weights=str(path)))
    assert metric.name.startswith("alex (weights alexnet.pth ")

    stock = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, weight in stock.net.named_parameters():
        weight.data.copy_(reference.state_dict()["features." + name.split(".", 1)[1]])
    x, y = noise(1, 3, 2, 40, 33), noise(1, 3, 2, 40, 33, seed=1)
    expected = [stock(x[:, :, t], y[:, :, t]).item() for t in range(2)]
    np.testing.assert_allclose(metric(x, y)[0].numpy(), expected, rtol=1e-5)

    other = torchvision.models.alexnet(weights=None)
    torch.save(other.state_dict(), path)
    assert Perceptual(PerceptualSpec(weights=str(path))).name != metric.name, "the name tells weights apart"


def test_lpips_weights_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "backbone.pth"
    state = {f"features.{i}.{part}": torch.zeros(1) for i in (0, 3) for part in ("weight", "bias")}
    torch.save(state, path)
    with pytest.raises(InputError) as fault:
        Perceptual(PerceptualSpec(backbone="alex", weights=str(path)))
    assert str(fault.value) == (
        f"LPIPS backbone weights {str(path)!r} are not those of torchvision's alex: features.0.weight is (1,), not "
        "(64, 3, 11, 11); features.0.bias is (1,), not (64,); features.3.weight is (1,), not (192, 64, 5, 5) and 7 "
        "more."
    )


@pytest.mark.parametrize("content", [None, b"not a checkpoint", "pickle", "list"])
def test_lpips_weights_that_cannot_be_read_are_a_fault_of_input(tmp_path, content):
    path = tmp_path / "backbone.pth"
    if content == "pickle":
        torch.save({"features.0.weight": subprocess.Popen}, path)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"LPIPS backbone weights '.*backbone.pth' (can't be read|hold a list)"):
        Perceptual(PerceptualSpec(weights=str(path)))


def test_a_failing_download_says_what_to_set(monkeypatch, tmp_path, capsys):
    def offline(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("torch.hub.urlopen", offline)
    with pytest.raises(InputError, match=r"vgg backbone can't be downloaded .*no route.*weights to the path.*`random`"):
        Perceptual(PerceptualSpec(backbone="vgg"))
    with pytest.raises(InputError, match=r"'https://weights\.invalid/vgg\.pth' can't be read: URLError"):
        Perceptual(PerceptualSpec(backbone="vgg", weights="https://weights.invalid/vgg.pth"))
    assert capsys.readouterr().out == "", "what --json prints is one object"


def test_torchvision_imports_in_a_fresh_process_and_keeps_its_own_kernels():
    code = (
        "from trainer.losses import torchvision_ops as ops; import torchvision, torch;"
        "assert ops.ensure() == (not torchvision.extension._has_ops());"
        "assert torch.ops.torchvision.nms"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torchvision_ops.ensure() == torchvision_ops.ensure()


def test_times_are_logit_normal_with_a_tail_of_full_noise():
    draws = torch.rand((40_000, 2), generator=torch.Generator().manual_seed(1))
    t = timesteps(draws, TimestepSpec(mean=0.5, std=0.8))
    full = t == 1
    assert full.double().mean().item() == pytest.approx(0.1, abs=0.005)
    logits = torch.logit(t[~full].double())
    assert logits.mean().item() == pytest.approx(0.5, abs=0.02) and logits.std().item() == pytest.approx(0.8, abs=0.02)
    spread = timesteps(draws, TimestepSpec(tail="uniform", tail_share=1.0))
    assert [spread.quantile(q).item() for q in (0.1, 0.5, 0.9)] == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    first, second = timesteps(torch.tensor([[0.5, 0.5], [0.5, 0.05]]), TimestepSpec())
    assert (first.item(), second.item()) == (0.5, 1.0)


def test_straight_paths_by_hand():
    x, e = torch.full((2, 1, 2), 4.0), torch.full((2, 1, 2), -2.0)
    assert noised(x, e, torch.tensor([0.25, 1.0]))[:, 0, 0].tolist() == [2.5, -2.0]
    assert schedule(2, 1.0) == [1.0, 0.5, 0.0]
    assert schedule(2, 4.0) == [1.0, 0.0625, 0.0]
