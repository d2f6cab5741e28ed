import math

import pytest
import torch

from trainer.entropy import Histogram, json_of, measure
from trainer.recipes.arvae.config import ArvaeConfig
from trainer.recipes.arvae.recipe import ArvaeRecipe

torch.set_num_threads(1)


def bits(*tensors, least=-1.0, greatest=1.0):
    histogram = Histogram()
    for tensor in tensors:
        histogram.add(tensor)
    return histogram.bits(least, greatest)


def test_entropies_that_are_known():
    assert bits(torch.full((100,), 0.3)) == 0
    assert bits(torch.tensor([-1.0, 1.0])) == pytest.approx(1)
    assert bits(torch.tensor([-1.0, -1.0, -1.0, 1.0])) == pytest.approx(2 - 0.75 * math.log2(3))
    levels = torch.arange(256) / 127.5 - 1
    assert bits(levels) == pytest.approx(8)
    assert bits(levels.repeat(3), levels) == pytest.approx(8)


def test_it_does_not_matter_in_which_pieces_values_come():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    together, apart = Histogram(), Histogram()
    together.add(values)
    for piece in values.sort().values.split(171):
        apart.add(piece)
    assert together.range == apart.range
    assert together.bits(*together.range) == pytest.approx(apart.bits(*apart.range), abs=1e-12)
    assert together.range == pytest.approx((values.min().item(), values.max().item()), abs=2**-12)


def test_scale_does_not_matter_when_the_range_is_the_values_own():
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    small, large = Histogram(), Histogram()
    small.add(values)
    large.add(values * 8)
    assert small.bits(*small.range) == pytest.approx(large.bits(*large.range), abs=0.01)


def test_what_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="not a number"):
        Histogram().add(torch.tensor([0.0, math.nan]))


def test_frames_and_latents_of_a_model():
    config = {"down": 8, "widths": [4, 4, 4, 4], "motion_width": 4, "state_width": 4, "transform": "dct",
              "spynet": {"levels": 2, "widths": [8, 8, 4, 4], "kernel": 3}, "first_frame": {"kind": "frame"},
              "supplement_channels": 6, "perceptual": None}  # fmt: skip
    recipe = ArvaeRecipe(ArvaeConfig.model_validate(config))
    model = recipe.build(0)
    still = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = measure(recipe, model, [still.expand(-1, -1, 3, -1, -1)])
    assert set(found) == {"frames", "first", "motion", "supplement"}
    assert found["frames"].bits == pytest.approx(bits(still))
    assert found["motion"].bits == found["supplement"].bits == 0, "nothing new happens in a still clip"
    assert found["supplement"].numbers_per_frame == 6 * 16 * 2 / 3
    assert json_of(found)["frames"]["bits_per_frame"] == pytest.approx(bits(still) * 3 * 32 * 32)
    with pytest.raises(ValueError, match="no clips"):
        measure(recipe, model, [])
