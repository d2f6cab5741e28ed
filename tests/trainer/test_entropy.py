import math

import pytest
import torch

from pipelines.faults import InputError
from trainer.entropy import GREY, Histogram, measure
from trainer.recipes.arvae.config import ArvaeConfig
from trainer.recipes.arvae.recipe import ArvaeRecipe
from trainer.recipes.decovae.config import DecoVaeConfig
from trainer.recipes.decovae.recipe import DecoVaeRecipe

torch.set_num_threads(1)


def bits(*tensors, step=GREY, origin=-1.0):
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    return histogram.bits(step, origin)


def test_entropies_that_are_known():
    assert bits(torch.full((100,), 0.3)) == 0
    assert bits(torch.full((100,), 0.3), step=None) == 0
    assert bits(torch.tensor([-1.0, 1.0])) == pytest.approx(1)
    assert bits(torch.tensor([-1.0, -1.0, -1.0, 1.0])) == pytest.approx(2 - 0.75 * math.log2(3))
    levels = torch.arange(256) / 127.5 - 1
    for step in (GREY, None):
        assert bits(levels, step=step) == pytest.approx(8)
        assert bits(levels.repeat(3), levels, step=step) == pytest.approx(8)
    differences = torch.arange(-255, 256) * GREY
    assert bits(differences, origin=0.0) == pytest.approx(math.log2(511)), "a difference of pixels has 511 levels"
    assert bits(differences, step=None) < 8, "256 levels of their range"


def test_it_does_not_matter_in_which_pieces_values_come():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    together, apart = Histogram(), Histogram()
    together.add(values)
    for piece in values.sort().values.split(171):
        apart.add(piece)
    assert together.range == apart.range
    assert together.bits() == pytest.approx(apart.bits(), abs=1e-12)
    assert together.range == pytest.approx((values.min().item(), values.max().item()), abs=2**-12)


def test_scale_does_not_matter_when_the_range_is_the_values_own():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert bits(values, step=None) == pytest.approx(bits(values * 8, step=None), abs=0.01)


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        Histogram().add(torch.tensor([0.0, math.nan]))


SMALL = {"down": 8, "widths": [4, 4, 4, 4], "motion_width": 4, "state_width": 4, "transform": "dct",
         "spynet": {"levels": 2, "widths": [8, 8, 4, 4], "kernel": 3}, "first_frame": {"kind": "frame"},
         "supplement_channels": 6, "perceptual": None}  # fmt: skip


def test_frames_and_latents_of_a_model():
    recipe = ArvaeRecipe(ArvaeConfig.model_validate(SMALL))
    model = recipe.build(0)
    still = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measure(recipe, model, [still.expand(-1, -1, 3, -1, -1)])
    kinds = found.kinds
    assert list(kinds) == ["frames", "low", "high", "residual", "latent first", "latent motion", "latent supplement"]
    assert kinds["frames"].bits == pytest.approx(bits(still))
    for name in ("high", "residual", "latent motion", "latent supplement"):
        assert kinds[name].bits == 0, "nothing new happens in a still clip"
    assert kinds["latent supplement"].numbers_per_frame == 6 * 16 * 2 / 3
    pixels = 3 * 32 * 32
    assert found.bits_per_frame == pytest.approx({
        "frames": bits(still) * pixels,
        "low and high frequencies": bits(still) * pixels / 2,
        "motion and residual": 0,
        "latents": kinds["latent first"].bits * pixels / 3,
    })  # fmt: skip
    assert found.plain()["kinds"]["frames"]["bits_per_frame"] == pytest.approx(bits(still) * pixels)
    with pytest.raises(InputError, match="no clips to measure"):
        measure(recipe, model, [])


def test_a_residual_is_counted_over_the_frames_that_are_predicted():
    recipe = ArvaeRecipe(ArvaeConfig.model_validate(SMALL | {"spynet": SMALL["spynet"] | {"start": "still"}}))
    model = recipe.build(0)
    step = torch.zeros(1, 3, 4, 32, 32)
    step[:, :, 1::2, :, :16] = 10 * GREY
    model.spatial_encoder.analysis = None
    found = measure(recipe, model, [step.clone()[:, :, :2]])
    assert found.kinds["residual"].bits == pytest.approx(1)
    assert found.bits_per_frame["motion and residual"] == pytest.approx(3 * 32 * 32), "a bit for each pixel of frame 2"
    assert recipe.residual(model, step[:, :, :1]) is None


@pytest.mark.parametrize("frames", [1, 5, 6])
def test_window_counts_of_decovae_are_no_latents(frames):
    config = {"latent_channels": 4, "motion": {"width": 6, "latent": 8}, "perceptual": None,
              "backbone": {"low": 8, "high": 12, "separate": 1, "fused": 1, "iterations": 1}}  # fmt: skip
    for components in ("dedicated", "none"):
        recipe = DecoVaeRecipe(DecoVaeConfig.model_validate(config | {"components": components}))
        found = measure(recipe, recipe.build(0), [torch.rand(1, 3, frames, 32, 32) * 2 - 1])
        latents = {name.removeprefix("latent ") for name in found.kinds if name.startswith("latent ")}
        assert latents == set(recipe.latent(frames, 32, 32).shapes)
        assert ("residual" in found.kinds) == (components == "dedicated" and frames > 1)
        assert ("motion and residual" in found.bits_per_frame) == ("residual" in found.kinds)
