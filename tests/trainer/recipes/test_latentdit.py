"""The latent diffusion model: what it is told plays a part and nothing else does, it learns, and its samples repeat."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.contracts import Batch, BatchPlan, LatentLayout, LatentTensor, Source
from pipelines.faults import InputError
from tests.trainer.test_codec import a_codec
from trainer import footage, sampling
from trainer.codec import Codec
from trainer.recipe import LatentRecipe, LatentSpec, codes, samples
from trainer.recipes.latentdit.config import LatentDitConfig
from trainer.recipes.latentdit.model import LatentDit, Tokens
from trainer.recipes.latentdit.recipe import LatentDitRecipe, _length
from trainer.recipes.latentdit.stages import NO_PIXELS
from trainer.run import Trained
from trainer.stage import Stage

torch.set_num_threads(1)
GRID = LatentTensor(tokens=(2, 4, 4), parts=((0, 1), (1, 1)), mean=(3.0, -1.0), std=(2.0, 0.5))
ROW = LatentTensor(tokens=(6,), parts=((0, 6),), mean=(0.5,), std=(4.0,), lengths={2: 1, 6: 3})
LAYOUT = LatentLayout(
    codec={"recipe": "toy", "weights": "0" * 32}, frames=5, height=32, width=32, fps=8.0, steps=2,
    tensors={"grid": GRID, "row": ROW}, caption_width=5,
)  # fmt: skip
STAGE = Stage(name="flow", steps=10, clip=NO_PIXELS, losses={"flow": 1.0})


def a_recipe(**fields) -> LatentDitRecipe:
    small = {"width": 24, "depth": 2, "heads": 2, "steps": 8, "latents": LAYOUT, "patch": 2}
    return LatentDitRecipe(LatentDitConfig.model_validate(small | fields))


def a_model(recipe: LatentDitRecipe, seed: int = 0) -> LatentDit:
    """Not as it starts, when all velocities are 0."""
    model = recipe.build(seed)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=g)
    return model.eval()


def a_batch(clips: int = 3, first: int = 0, captions: bool = True) -> Batch:
    g = torch.Generator().manual_seed(first)
    arrays = {name: torch.randn(clips, *t.shape, generator=g) for name, t in LAYOUT.tensors.items()}
    masks = {name: torch.ones(clips, *t.tokens, dtype=torch.bool) for name, t in LAYOUT.tensors.items()}
    masks["row"][0, 2:] = False
    plan = BatchPlan(0, "flow", first, clips, "video", first, (1, 1), NO_PIXELS)
    return Batch(
        pixels_BCTHW=torch.empty(clips, 3, 0, 1, 1), fps_B=torch.ones(clips), motion_B=torch.zeros(clips),
        places=tuple(range(first, first + clips)), sources=(Source("d", "s", "k"),) * clips, plan=plan, weight=1.0,
        seed=7, arrays=arrays, masks=masks,
        caption_emb_BLD=torch.randn(clips, 4, 5, generator=g) if captions else None,
        caption_mask_BL=torch.arange(4)[None] < torch.tensor([[4], [2], [0]])[:clips] if captions else None,
    )  # fmt: skip


def test_it_is_a_recipe_of_latents_and_no_codec():
    recipe = a_recipe()
    assert isinstance(recipe, LatentRecipe) and samples(recipe) and not codes(recipe)


def test_untrained_it_predicts_no_velocity_and_the_loss_is_that_of_the_flow():
    recipe, batch = a_recipe(), a_batch()
    model = recipe.build(0)
    made = recipe.step(model, batch, STAGE, recipe.teachers())
    errors = []
    for b in range(3):
        squares = []
        for name, t in LAYOUT.tensors.items():
            shape = (-1, *(1 for _ in t.tokens))
            z = (batch.arrays[name][b] - torch.tensor(t.mean).view(shape)) / torch.tensor(t.std).view(shape)
            v = batch.randn(f"noise/{name}", *t.shape)[b] - z
            squares.append(v.square()[:, batch.masks[name][b]].flatten())
        errors.append(torch.cat(squares).mean())
    torch.testing.assert_close(made.loss, torch.stack(errors).mean())
    assert made.reconstruction_BCTHW is None and set(made.terms) == {"flow"}
    assert set(made.statistics) == {"flow/grid", "flow/row"}


def test_what_is_masked_plays_no_part():
    recipe, batch = a_recipe(), a_batch()
    model = a_model(recipe)
    other = {name: z.clone() for name, z in batch.arrays.items()}
    other["row"][0, :, 2:] = 1e3
    first, second = (
        recipe.step(model, dataclasses.replace(batch, arrays=arrays), STAGE, recipe.teachers()).loss
        for arrays in (batch.arrays, other)
    )
    assert torch.equal(first, second)
    shown = dataclasses.replace(batch, masks={**batch.masks, "row": torch.ones_like(batch.masks["row"])})
    assert recipe.step(model, shown, STAGE, recipe.teachers()).loss != first


def test_a_loss_does_not_depend_on_who_shares_the_micro_batch():
    recipe, batch = a_recipe(), a_batch()
    model = a_model(recipe)
    whole = recipe.step(model, batch, STAGE, recipe.teachers()).loss
    alone = []
    for b in range(3):
        rows = {name: z[b : b + 1] for name, z in batch.arrays.items()}
        part = dataclasses.replace(
            batch, arrays=rows, masks={name: m[b : b + 1] for name, m in batch.masks.items()}, places=(b,),
            caption_emb_BLD=batch.caption_emb_BLD[b : b + 1, :3 + (b == 0)],
            caption_mask_BL=batch.caption_mask_BL[b : b + 1, :3 + (b == 0)],
        )  # fmt: skip
        alone.append(recipe.step(model, part, STAGE, recipe.teachers()).loss)
    torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


def test_a_missing_caption_is_the_learned_null():
    recipe, batch = a_recipe(), a_batch()
    model = a_model(recipe)
    arguments = (batch.arrays, torch.full((3,), 0.4), batch.arrays, batch.masks)
    none = model(*arguments).velocity["grid"]
    masked = model(*arguments, batch.caption_emb_BLD, torch.zeros_like(batch.caption_mask_BL)).velocity["grid"]
    told = model(*arguments, batch.caption_emb_BLD, batch.caption_mask_BL).velocity["grid"]
    torch.testing.assert_close(none, masked)
    torch.testing.assert_close(none[2], told[2])
    assert (none[:2] - told[:2]).abs().mean() > 1e-3


def test_captions_are_dropped_by_place():
    batch = a_batch()
    draws_B = batch.rand("drop", 1)[:, 0]
    recipe = a_recipe(drop=float(draws_B[:2].mean()))
    dropped = draws_B < recipe.config.drop
    seen = {}

    def model(latents, t_B, noise, masks, emb_BLD, mask_BL):
        seen["mask"] = mask_BL
        return a_model(recipe)(latents, t_B, noise, masks, emb_BLD, mask_BL)

    recipe.step(model, batch, STAGE, recipe.teachers())
    assert seen["mask"].any(1).tolist() == (batch.caption_mask_BL.any(1) & ~dropped).tolist()
    assert dropped[:2].sum() == 1


def test_squares_of_cells_come_back_in_place():
    tokens = Tokens(GRID, 2, 8, 3)
    for layer in (tokens.enter, tokens.leave):
        layer.weight.data.copy_(torch.eye(8))
        layer.bias.data.zero_()
    tokens.kind_W.data.zero_()
    z = torch.randn(2, *GRID.shape)
    x_BNW = tokens(z)
    torch.testing.assert_close(x_BNW[:, 1], z[:, :, 0, :2, 2:].flatten(1))
    torch.testing.assert_close(tokens.grid_of(x_BNW), z)
    assert tokens.positions_NA.tolist()[:3] == [[1, 1, 1], [1, 1, 2], [1, 2, 1]]
    assert Tokens(ROW.model_copy(update={"parts": ((4, 6),)}), 2, 8, 3).positions_NA.tolist()[1] == [6, 0, 0]
    mask = torch.zeros(1, *GRID.tokens, dtype=torch.bool)
    mask[0, 1, 3, 3] = True
    assert tokens.kept(mask)[0].tolist() == [False] * 7 + [True]


def test_the_statistics_are_undone():
    model, batch = a_model(a_recipe()), a_batch()
    normal = model.normalised(batch.arrays)
    torch.testing.assert_close(normal["grid"][:, 0], (batch.arrays["grid"][:, 0] - 3) / 2)
    for name, z in model.restored(normal).items():
        torch.testing.assert_close(z, batch.arrays[name])


def test_a_prediction_is_the_noised_latent_less_its_velocity():
    recipe, batch = a_recipe(), a_batch()
    noise = {name: batch.randn(name, *z.shape[1:]) for name, z in batch.arrays.items()}
    t_B = torch.tensor([0.0, 0.3, 1.0])
    masks = {"row": batch.masks["row"]}
    untrained = recipe.build(0).predict(batch.arrays, t_B, noise, masks=masks)
    for name, t in LAYOUT.tensors.items():
        mean, std = (torch.tensor(v).view(-1, *(1 for _ in t.tokens)) for v in (t.mean, t.std))
        share = t_B.view(-1, *(1 for _ in t.shape))
        expected = (1 - share) * (batch.arrays[name] - mean) / std + share * noise[name]
        expected = (expected * std + mean) * batch.masks[name][:, None]
        torch.testing.assert_close(untrained[name], expected, msg=name)
    model = a_model(recipe)
    made = model.predict(batch.arrays, t_B, noise, masks=masks)
    assert not made["row"].requires_grad and (made["row"][0, :, 2:] == 0).all()
    torch.testing.assert_close(made["grid"][0], batch.arrays["grid"][0]), "without noise nothing is to be predicted"
    assert (made["grid"][2] - untrained["grid"][2]).abs().mean() > 1e-3
    with pytest.raises(ValueError, match=r"latent 'row' is \[1, 4\]; this model was trained on \[1, 6\]"):
        model.predict({**batch.arrays, "row": batch.arrays["row"][..., :4]}, t_B, noise)


def test_it_learns_a_distribution_and_samples_it():
    recipe = a_recipe(depth=1, steps=12)
    model = recipe.build(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        batch = a_batch(16, first=16 * step, captions=False)
        sign = torch.where(batch.rand("sign", 1) < 0.5, -1.0, 1.0)
        side = {"grid": sign.view(-1, 1, 1, 1, 1), "row": -sign.view(-1, 1, 1)}
        arrays = model.restored({name: 0.1 * z + side[name] for name, z in batch.arrays.items()})
        made = recipe.step(model, dataclasses.replace(batch, arrays=arrays), STAGE, None)
        optimizer.zero_grad()
        made.loss.backward()
        optimizer.step()
        losses.append(float(made.terms["flow"]))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:5]), losses[::20]
    drawn = [recipe.sample(model.eval(), 1, place) for place in range(12)]
    signs = [float((sample["grid"][:, 0].mean() - 3) / 2) for sample in drawn]
    assert all(0.4 < abs(sign) < 1.4 for sign in signs) and {sign > 0 for sign in signs} == {True, False}, signs
    for sign, sample in zip(signs, drawn, strict=True):
        assert float(sample["row"].mean() - 0.5) * sign < 0, "grid and row are of one sample"


def test_samples_are_a_function_of_weights_seed_and_place():
    recipe = a_recipe()
    model = a_model(recipe)
    torch.manual_seed(1)
    first = recipe.sample(model, 5, 3)
    torch.manual_seed(2)
    assert all(torch.equal(value, recipe.sample(model, 5, 3)[name]) for name, value in first.items())
    assert not torch.equal(first["grid"], recipe.sample(model, 5, 4)["grid"])
    assert not torch.equal(first["grid"], recipe.sample(model, 6, 3)["grid"])
    assert {recipe.sample(model, 5, place, steps=1)["row"].shape for place in range(12)} == {(1, 1, 2), (1, 1, 6)}


def test_lengths_are_drawn_as_often_as_they_were_stored():
    draws = [_length({2: 1, 6: 3}, 6, (2 * k + 1) << 59) for k in range(8)]
    assert draws == [2] * 2 + [6] * 6
    assert _length({}, 6, 123) == 6


def test_guidance_weighs_the_caption():
    recipe = a_recipe()
    model, caption = a_model(recipe), torch.randn(1, 3, 5)
    plain = recipe.sample(model, 0, 0, steps=1)["grid"]
    told = recipe.sample(model, 0, 0, steps=1, guidance=1, caption_emb_1LD=caption)["grid"]
    twice = recipe.sample(model, 0, 0, steps=1, guidance=2, caption_emb_1LD=caption)["grid"]
    torch.testing.assert_close(twice, plain + 2 * (told - plain), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="the caption has 7 numbers a token, and this model reads 5"):
        recipe.sample(model, 0, 0, caption_emb_1LD=torch.zeros(1, 3, 7))
    deaf = a_recipe(captions=False)
    with pytest.raises(
        InputError, match="the caption has 5 numbers a token, and this model was trained without captions"
    ):
        deaf.sample(a_model(deaf), 0, 0, caption_emb_1LD=caption)


def test_weights_are_a_function_of_the_seed():
    recipe = a_recipe()
    first, again, other = (recipe.build(seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert sum(recipe.parts(recipe.build(0)).values()) == sum(p.numel() for p in recipe.build(0).parameters())


def test_what_cannot_be_trained_is_said():
    recipe = a_recipe()
    assert list(recipe.check(STAGE)) == []
    stage = STAGE.model_copy(
        update={"losses": {"mse": 1.0}, "image_share": 0.5, "supervise": (1, 1), "teachers": {"predictor": "run"}}
    )
    said = "\n".join(recipe.check(stage))
    for part in ("losses.mse: 1.0: no such name", "teachers.predictor: 'run': no such name (this recipe has none)",
                 "losses.flow: without it", "image_share: 0.5", "supervise: [1, 1]"):  # fmt: skip
        assert part in said
    with pytest.raises(ValueError, match="patch is 3; it does not divide the 2 x 4 x 4 cells of latent 'grid'"):
        a_recipe(patch=3)
    with pytest.raises(InputError, match=r"takes its latents' layout from the first dataset of data.train"):
        LatentDitRecipe(LatentDitConfig()).build(0)


class Blocks:
    """A codec whose pixels are the cells of its latent, 8 times as large."""

    name = "toy"
    multiple = 8

    def latent(self, frames, height, width):
        shapes = {"grid": (2, 2, height // 8, width // 8), "row": (1, 6), "not stored": (1, 3)}
        return LatentSpec(shapes, 2, 1.0)

    def decode(self, model, latents, caption_emb_1LD=None):
        for latent in latents:
            grid = latent["grid"][:, :1].tanh().repeat_interleave(8, 3).repeat_interleave(8, 4)
            yield grid.expand(-1, 3, -1, -1, -1)


def test_samples_are_drawn_decoded_and_shown(tmp_path):
    recipe, said = a_recipe(), []
    trained = Trained(None, recipe, a_model(recipe), "runs/dit")
    codec = Codec(Blocks(), torch.nn.Linear(1, 1))
    made = sampling.draw(trained, codec, str(tmp_path / "several"), count=3, seed=4, warn=said.append)
    assert [url.rpartition("/")[2] for url in made] == [*(f"sample-0000{n}.mp4" for n in range(3)), "samples.png"]
    assert len(said) == 1 and "encoded by other weights (000000000000)" in said[0]
    with footage.reader(made[1]) as video:
        assert (video.height, video.width, float(video.fps)) == (32, 32, 8.0)
        second = torch.cat(list(video), dim=2)
    expected = recipe.sample(trained.model, 4, 1)["grid"][:, :1].tanh()
    assert (second.mean(1, keepdim=True)[..., 4::8, 4::8] - expected).abs().mean() < 0.05
    with Image.open(made[-1]) as picture:
        assert picture.size[1] > 3 * 32
    alone = sampling.draw(trained, codec, str(tmp_path / "one.mp4"), seed=4)
    assert (tmp_path / "one.mp4").read_bytes() == (tmp_path / "several" / "sample-00000.mp4").read_bytes(), alone
    with pytest.raises(InputError, match=r"one.mp4 is one file, and there are 2 samples; name a folder"):
        sampling.draw(trained, codec, str(tmp_path / "one.mp4"), count=2)


def test_a_codec_of_other_latents_is_refused(tmp_path):
    recipe = a_recipe()
    trained = Trained(None, recipe, a_model(recipe), "runs/dit")
    other, coarse = Blocks(), Blocks()
    other.name = "arvae"
    coarse.latent = lambda frames, height, width: Blocks.latent(coarse, frames, height // 2, width // 2)
    for codec, said in (
        (other, "latents are of recipe toy, and --codec is of arvae"),
        (coarse, "Give the codec that encod"),
    ):
        with pytest.raises(InputError, match=said):
            sampling.draw(trained, Codec(codec, torch.nn.Linear(1, 1)), str(tmp_path / "x.mp4"))
    codec = a_codec()
    with pytest.raises(
        InputError, match=r"runs/codec is a codec \(recipe arvae\), and samples are drawn from a latent"
    ):
        sampling.draw(Trained(None, codec.recipe, codec.model, "runs/codec"), codec, str(tmp_path / "x.mp4"))


def test_a_caption_is_read_from_a_file(tmp_path):
    recipe = a_recipe()
    trained = Trained(None, recipe, a_model(recipe), "runs/dit")
    np.save(tmp_path / "caption.npy", np.ones((3, 5), np.float16))
    assert sampling.caption(trained, str(tmp_path / "caption.npy")).shape == (1, 3, 5)
    np.save(tmp_path / "flat.npy", np.ones(5))
    with pytest.raises(InputError, match=r"flat.npy: an array of float64 \(5,\), not 2-D floats"):
        sampling.caption(trained, str(tmp_path / "flat.npy"))
    with pytest.raises(InputError, match=r"absent.npy: there is no such file"):
        sampling.caption(trained, str(tmp_path / "absent.npy"))
    with pytest.raises(InputError, match="do not say which text encoder made their captions' embeddings"):
        sampling.caption(trained, "a dog runs")
