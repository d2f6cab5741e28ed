import pytest
import torch

from trainer.blocks.conv import Conv2d, Down, ResidualBlock, Up
from trainer.blocks.patch import PatchAnalysis, PatchSynthesis, contrast, cosine_basis
from trainer.blocks.warp import halve_flow, resize_flow, warp


def test_a_flow_says_where_content_comes_from():
    source = torch.arange(48.0).view(1, 1, 6, 8)
    flow = torch.zeros(1, 2, 6, 8)
    flow[:, 0], flow[:, 1] = 2, -1
    moved = warp(source, flow)
    assert torch.allclose(moved[0, 0, 1:, :6], source[0, 0, :5, 2:], atol=1e-4)


def test_beyond_the_border_lies_the_border():
    source = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 1, 4, 8)
    flow = torch.full((1, 2, 4, 8), 100.0)
    assert torch.allclose(warp(source, flow), torch.full((1, 1, 4, 8), 7.0))


def test_half_pixels_are_bilinear_even_for_bfloat16_features():
    source = torch.arange(256.0).view(1, 1, 1, 256).expand(1, 1, 2, 256)
    flow = torch.full((1, 2, 2, 256), 0.5)
    flow[:, 1] = 0
    assert torch.allclose(warp(source, flow)[..., :255], source[..., :255] + 0.5, atol=1e-3)
    ramp = (source / 256).bfloat16()
    moved = warp(ramp, flow)
    assert moved.dtype == torch.bfloat16
    assert torch.allclose(moved[..., :255].float(), (source / 256)[..., :255] + 0.5 / 256, atol=2**-8)


def test_flows_keep_their_meaning_when_resized():
    flow = torch.ones(1, 2, 8, 8) * torch.tensor([4.0, -2.0]).view(1, 2, 1, 1)
    assert torch.equal(halve_flow(flow), torch.ones(1, 2, 4, 4) * torch.tensor([2.0, -1.0]).view(1, 2, 1, 1))
    enlarged = resize_flow(flow, (16, 24))
    assert torch.allclose(enlarged, torch.ones(1, 2, 16, 24) * torch.tensor([12.0, -4.0]).view(1, 2, 1, 1))


def test_the_basis_is_orthonormal_and_starts_with_mean_luma():
    basis = cosine_basis(8, 3 * 64).flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(192), atol=1e-5)
    assert torch.allclose(cosine_basis(8, 1), torch.full((1, 3, 8, 8), (3 * 64) ** -0.5))


def test_analysis_and_synthesis_lose_only_what_they_leave_out():
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    all_of_it = PatchSynthesis(8, 192)(PatchAnalysis(8, 192)(pixels))
    assert torch.allclose(all_of_it, pixels, atol=1e-5)
    analysis, synthesis = PatchAnalysis(8, 24), PatchSynthesis(8, 24)
    once = synthesis(analysis(pixels))
    assert torch.allclose(synthesis(analysis(once)), once, atol=1e-5)
    assert (once - pixels).square().mean() < pixels.square().mean()


def test_more_coefficients_than_a_patch_has_are_refused():
    with pytest.raises(ValueError, match="193 coefficients of a 8x8 patch: there are 192"):
        cosine_basis(8, 193)


def test_shapes_of_convolutions():
    x = torch.zeros(2, 5, 12, 20)
    assert ResidualBlock(5, 7)(x).shape == (2, 7, 12, 20)
    assert Down(5, 7)(x).shape == (2, 7, 6, 10)
    assert Up(5, 7)(x).shape == (2, 7, 24, 40)


def test_a_convolution_takes_any_floating_type():
    assert Conv2d(5, 3)(torch.zeros(1, 5, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_a_zero_branch_is_nothing_at_the_start():
    assert not Conv2d(5, 3, zero=True)(torch.randn(1, 5, 4, 4)).any()


def test_a_replicated_border_makes_no_edge():
    layer = Conv2d(1, 1, border="replicate")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0, 0, 0], [-1.0, 0, 1], [0, 0, 0]])[None, None])
        layer.bias.zero_()
    assert not layer(torch.full((1, 1, 4, 4), 3.0)).any()


def test_contrast_is_what_a_cell_has_beside_its_mean():
    analysis = PatchAnalysis(4, 48)
    pixels = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    flat = torch.full((2, 3, 12, 16), 0.7)
    strong, weak = (contrast(analysis(flat + gain * pixels), 48) for gain in (1.0, 0.1))
    assert strong.shape == (2, 1, 3, 4)
    assert torch.allclose(strong, 10 * weak, rtol=1e-4) and contrast(analysis(flat), 48).max() < 2e-3
    lonely = torch.zeros(1, 48, 1, 5, 5)
    lonely[:, 3:, :, 2, 2] = 1
    assert torch.equal(
        contrast(lonely)[0, 0, 0] > 2e-3, torch.tensor([0, 1, 1, 1, 0]).outer(torch.tensor([0, 1, 1, 1, 0])) > 0
    )
