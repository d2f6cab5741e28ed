"""One-DVA's layers, losses and lengths, by hand and by reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pipelines.contracts import Batch, BatchPlan, Source, generator
from pipelines.faults import InputError, Remark
from trainer import manifest as manifests
from trainer import plan
from trainer.losses import gaussian_kl
from trainer.recipe import Recipe, load
from trainer.recipes import onedva
from trainer.recipes.onedva import length, linear, losses, model, siglip
from trainer.recipes.onedva.config import DropoutSpec, OneDvaConfig, RepaSpec
from trainer.recipes.onedva.recipe import OneDvaRecipe
from trainer.stage import AdversaryStage, Stage

torch.set_num_threads(1)

SMALL = {
    "latent_channels": 4,
    "queries": 6,
    "encoder": {"width": 24, "layers": 2, "heads": 2},
    "decoder": {"width": 24, "layers": 2, "heads": 2, "pixel_channels": 3},
    "window": 9,
    "length": {"every": 2},
    "sampling": {"steps": 2},
    "repa": None,
    "perceptual": None,
}
LINEAR = {"predict": "clean", "linear": "dct", "sampling": {"steps": 1, "guidance": 1}}


def recipe_of(**changes: Any) -> OneDvaRecipe:
    return OneDvaRecipe(OneDvaConfig.model_validate(SMALL | changes))


def shaken(recipe: OneDvaRecipe, seed: int = 0, strength: float = 0.05) -> nn.Module:
    """A model whose every weight counts: what starts at 0 would hide what it depends on."""
    built = recipe.build(seed)
    noise = generator(seed, 0, "test/shake")
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * strength)
    return built


def read(built: nn.Module, recipe: OneDvaRecipe) -> nn.Module:
    """The model as it is after the adaptive stage: it reads its 1D latents."""
    built.readable.fill_(recipe.config.queries)
    return built.eval()


def footage(
    clips: int = 1, frames: int = 5, height: int = 32, width: int = 32, drift: int = 1, seed: int = 0
) -> Tensor:
    """Smooth texture that drifts by ``drift`` pixels a frame, (B, 3, T, H, W) in [-1, 1]."""
    reach = max(height, width) + drift * frames
    noise = torch.randn(clips, 3, reach // 4 + 2, reach // 4 + 2, generator=generator(seed, 0, "test/footage"))
    texture = nn.functional.interpolate(noise * 0.2 + noise[:, :1], scale_factor=6, mode="bicubic").tanh()
    moved = [texture[..., t * drift : t * drift + height, t * drift : t * drift + width] for t in range(frames)]
    return torch.stack(moved, dim=2).contiguous()


def batch_of(pixels: Tensor, stage: Stage, places: tuple[int, ...] | None = None) -> Batch:
    count, _, _, height, width = pixels.shape
    places = places or tuple(range(count))
    plan = BatchPlan(0, stage.name, 0, count, "video", 0, (height, width), stage.clip)
    sources = tuple(Source("d", "s", str(place)) for place in places)
    return Batch(pixels, torch.ones(count), torch.zeros(count), places, sources, plan, 1.0, 0)


def stage_of(recipe: OneDvaRecipe, name: str, **weights: float) -> Stage:
    stage = next(stage for stage in recipe.stages() if stage.name == name)
    return stage.model_copy(update={"losses": weights or {"flow": 1.0}})


# -- the published configuration --------------------------------------------------------------------------------------


def test_the_published_configuration_and_its_schedule() -> None:
    recipe = OneDvaRecipe(OneDvaConfig())
    assert isinstance(recipe, Recipe) and load("onedva") is OneDvaRecipe
    names = {stage.name: stage.steps for stage in recipe.stages()}
    assert names == {"structural": 300_000, "adaptive": 300_000, "post": 0}
    for stage in recipe.stages():
        told = {"teachers": {"predictor": "runs/latentdit"}} if stage.name == "post" else {}
        assert list(recipe.check(stage.model_copy(update=told))) == []
        assert (stage.clip.frames, stage.clip.sizes) == (17, ((256, 256), (256, 456)))
    latent = recipe.latent(17, 256, 256)
    assert latent.shapes == {"structural": (32, 5, 16, 16), "1d": (32, 1280)}
    assert latent.numbers_per_frame * 17 == 16 * 5 * 32 * 32, "as many as 4x8x8 with 16 channels"
    assert recipe.latent(17, 256, 456).shapes["structural"] == (32, 5, 16, 29)
    assert recipe.latent(20, 256, 256).shapes == {"structural": (32, 7, 16, 16), "1d": (32, 2560)}
    with torch.device("meta"):
        parts = recipe.parts(OneDvaRecipe(OneDvaConfig()).build(0))
    text = (Path(onedva.__file__).parent / "README.md").read_text()
    row = f"| {parts['encoder'] / 1e6:.1f}M | {parts['decoder'] / 1e6:.1f}M | {parts['(projector)'] / 1e6:.1f}M |"
    assert row in text


def test_manifests_are_valid() -> None:
    root = Path(__file__).parents[3]
    for name in ("onedva", "onedva_smoke", "onedva_small"):
        loaded = manifests.load(root / "manifests" / f"{name}.yaml")
        assert loaded.recipe == "onedva"
    assert [s.name for s in loaded.schedule.stages] == ["structural", "adaptive"]


def test_stages_train_what_they_say() -> None:
    recipe = recipe_of()
    built = recipe.build(0)
    names = [name for name, _ in built.named_parameters()]
    structural, adaptive, post = recipe.stages()
    still = {name for name in names if not structural.trains(name)}
    assert {name.split(".")[1] for name in still} == {"queries_KC", "to_1d", "from_1d", "mask_C", "places_KC"}
    assert all(adaptive.trains(name) for name in names)
    assert {name.split(".")[0] for name in names if post.trains(name)} == {"decoder"}


def test_each_stage_moves_what_it_trains_and_reads_nothing_else() -> None:
    recipe = recipe_of()
    for name in ("structural", "adaptive"):
        built, stage = shaken(recipe), stage_of(recipe, name)
        recipe.step(built, batch_of(footage(2), stage), stage, nn.ModuleDict()).loss.backward()
        moved = {n for n, p in built.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        for n, _ in built.named_parameters():
            unread = name == "structural" and not stage.trains(n)
            # The queries' own log variance and mask matter only where a clip has them; all else must move.
            assert (n in moved) is not unread, n
        assert int(built.readable) == (recipe.config.queries if name == "adaptive" else 0)


# -- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (5, 16, 48), (9, 32, 16)])
def test_patches_hold_their_own_pixels_and_come_back(frames: int, height: int, width: int) -> None:
    x = torch.randn(2, 3, frames, height, width)
    grid = model.grid_of(frames, height, width)
    first, later = model.patches(x)
    assert first.shape == (2, grid[1] * grid[2], 768) and later.shape == (2, (grid[0] - 1) * grid[1] * grid[2], 3072)
    assert torch.equal(first[:, -1], x[:, :, 0, -16:, -16:].flatten(1))
    if frames > 1:
        assert torch.equal(later[:, -1], x[:, :, -4:, -16:, -16:].flatten(1))
    assert torch.equal(model.pixel_shuffle(first, later, grid, 3), x)


def test_the_first_frame_has_patches_of_its_own() -> None:
    recipe = recipe_of()
    patchify = recipe.build(0).encoder.patchify
    x = torch.randn(1, 3, 5, 32, 32, requires_grad=True)
    (slope,) = torch.autograd.grad(patchify(x)[:, :4].square().sum(), x)
    assert slope[:, :, 0].abs().sum() > 0 and slope[:, :, 1:].abs().sum() == 0


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (4, 20, 40), (9, 33, 17)])
def test_any_size_goes_in_and_comes_out(frames: int, height: int, width: int) -> None:
    recipe = recipe_of()
    built = read(shaken(recipe), recipe)
    x = footage(1, frames, height, width)
    (latent,) = recipe.encode(built, [x])
    assert latent["structural"].shape == (1, 4, *model.grid_of(frames, height, width))
    (made,) = recipe.decode(built, [latent])
    assert made.shape == x.shape and made.abs().max() <= 1
    output = recipe.step(built, batch_of(x, stage := stage_of(recipe, "adaptive")), stage, nn.ModuleDict())
    assert torch.isfinite(output.loss)


def test_resolution_reaches_every_latent() -> None:
    recipe = recipe_of()
    encoder = shaken(recipe).encoder
    x = footage(1, 5, 32, 32)
    a, b = (encoder(x, size, True) for size in ((5, 32, 32), (5, 31, 32)))
    for name in ("structural", "1d"):
        assert (a[name].mean - b[name].mean).abs().amax(1).min() > 0


# -- variable length --------------------------------------------------------------------------------------------------


def test_motion_score_by_hand() -> None:
    x = torch.zeros(2, 3, 3, 4, 4)
    x[1, :, 1] = 0.5
    assert length.motion_score(x).tolist() == [0, 0.25]
    assert length.motion_score(x[:, :, :1]).tolist() == [0, 0]


def test_drawn_lengths_follow_the_motion() -> None:
    still, moving = torch.zeros(1, 3, 5, 4, 4), torch.zeros(1, 3, 5, 4, 4)
    moving[:, :, ::2] = 0.1
    spec = DropoutSpec(full=0.1, least=0.25, spread=2.0)
    draws = torch.linspace(0, 1, 101)[:-1]
    by_clip = {name: length.drawn_lengths(x.expand(100, -1, -1, -1, -1), draws, 64, spec).tolist()
               for name, x in (("still", still), ("moving", moving))}  # fmt: skip
    assert (by_clip["still"][0], by_clip["still"][50], max(by_clip["still"])) == (8, 16, 32)
    assert (by_clip["moving"][0], by_clip["moving"][50], max(by_clip["moving"])) == (16, 32, 63)
    uniform = length.drawn_lengths(moving, torch.tensor([0.0]), 64, DropoutSpec(by="uniform"))
    assert uniform.tolist() == [1]
    assert length.drawn_lengths(moving, torch.tensor([0.2]), 64, DropoutSpec(by="none")).tolist() == [64]


def test_what_is_dropped_reaches_nothing() -> None:
    recipe = recipe_of()
    decoder = shaken(recipe).decoder
    z, t = footage(2), torch.tensor([0.5, 0.9])
    latents = {"structural": torch.randn(2, 4, 2, 2, 2), "1d": torch.randn(2, 4, 6)}
    kept = torch.arange(6) < torch.tensor([[2], [4]])
    v, *_ = decoder(z, t, latents, kept)
    changed = {**latents, "1d": torch.where(kept[:, None], latents["1d"], 7.0)}
    assert torch.equal(decoder(z, t, changed, kept)[0], v)
    for at in (1, 3):
        other = latents["1d"].clone()
        other[1, :, at] += 1
        differs = (decoder(z, t, {**latents, "1d": other}, kept)[0] - v).abs().amax((1, 2, 3, 4))
        assert differs[0] == 0 and differs[1] > 0
    bare, *_ = decoder(z, t, latents, kept, torch.tensor([True, False]))
    others = {name: value * 3 for name, value in latents.items()}
    assert torch.equal(decoder(z, t, others, kept, torch.tensor([True, False]))[0][0], bare[0])
    assert torch.equal(bare[1], v[1])


@pytest.mark.parametrize(("drift", "kept"), [(0, 2), (4, 6)])
def test_motion_decides_the_length(drift: int, kept: int) -> None:
    recipe = recipe_of(dropout={"full": 0.02})
    built = read(shaken(recipe), recipe)
    (latent,) = recipe.encode(built, [footage(1, 9, drift=drift)])
    assert latent["1d"].shape == (1, 4, kept)


@pytest.mark.parametrize(("frames", "numbers", "kept"), [(9, 6.0, 0), (9, 7.2, 4), (9, 1000.0, 6), (5, 9.6, 4)])
def test_a_budget_decides_the_length(frames: int, numbers: float, kept: int) -> None:
    recipe = recipe_of(length={"by": "budget", "numbers_per_frame": numbers, "every": 2})
    built = read(shaken(recipe), recipe)
    (latent,) = recipe.encode(built, [footage(1, frames)])
    assert latent["1d"].shape[-1] == kept
    assert latent["structural"].numel() + latent["1d"].numel() <= numbers * frames


def test_a_budget_below_the_structural_latent_is_refused() -> None:
    recipe = recipe_of(length={"by": "budget", "numbers_per_frame": 5.0})
    with pytest.raises(
        InputError, match=r"numbers_per_frame: 5: the structural latent alone takes 5\.3 numbers a frame"
    ):
        list(recipe.encode(read(shaken(recipe), recipe), [footage(1, 9)]))


@pytest.mark.parametrize(("frames", "kept"), [(18, [6, 6]), (10, [4, 0]), (14, [6, 2]), (28, [6, 6, 4, 0])])
def test_a_budget_holds_for_videos_of_any_length(frames: int, kept: list[int]) -> None:
    budget = 8.2  # a window's structural latent takes 48 / 9 numbers a frame, that of a single frame 16
    recipe = recipe_of(length={"by": "budget", "numbers_per_frame": budget, "every": 2})
    found = list(recipe.encode(read(shaken(recipe), recipe), footage(1, frames).split(1, dim=2)))
    assert [latent["1d"].shape[-1] for latent in found] == kept
    assert sum(latent["structural"].numel() + latent["1d"].numel() for latent in found) <= budget * frames
    assert sum(int(latent["frames"]) for latent in found) == frames


def test_a_budget_that_a_short_last_window_can_not_meet_is_told() -> None:
    recipe = recipe_of(length={"by": "budget", "numbers_per_frame": 6.0, "every": 2})
    with pytest.warns(Remark, match=r"numbers_per_frame: 6: the last two windows, of 9 and 1 frames, take more"):
        found = list(recipe.encode(read(shaken(recipe), recipe), [footage(1, 10)]))
    assert [latent["1d"].shape[-1] for latent in found] == [0, 0]


def test_the_shortest_length_that_reaches_the_psnr_is_kept() -> None:
    settings = LINEAR | {"queries": 24, "latent_channels": 8}
    recipe = recipe_of(**settings)
    built, x = recipe.build(0).eval(), footage(1, 9, 48, 48, drift=2)

    def quality(count: int) -> float:
        whole = recipe_of(**settings, length={"by": "all"})
        (latent,) = whole.encode(built, [x])
        (made,) = whole.decode(built, [{**latent, "1d": latent["1d"][..., :count]}])
        return float((-10 * torch.log10((made - x).square().mean((0, 1, 3, 4)) / 4)).mean())

    by_length = {count: quality(count) for count in range(0, 25, 4)}
    assert by_length[24] > by_length[8] > by_length[0]
    for wanted in (by_length[8] - 1e-3, by_length[16] - 1e-3, by_length[0] - 1, 99.0):
        asked = recipe_of(**settings, length={"by": "psnr", "psnr_db": wanted, "every": 4})
        reach = [count for count, psnr in by_length.items() if psnr >= wanted]
        with contextlib.nullcontext() if reach else pytest.warns(Remark, match="psnr_db: 99: not every window reaches"):
            (latent,) = asked.encode(built, [x])
        assert latent["1d"].shape[-1] == (min(reach) if reach else 24)


def test_a_structural_checkpoint_encodes_as_its_stage_did() -> None:
    recipe = recipe_of()
    built = shaken(recipe)
    stage = stage_of(recipe, "structural")
    recipe.step(built.train(), batch_of(footage(2), stage), stage, nn.ModuleDict())
    (latent,) = recipe.encode(built.eval(), [footage(1)])
    assert set(latent) == {"structural", "frames", "size"}
    assert "readable" in built.state_dict(), "it travels with checkpoints and exports"
    assert list(recipe.pictures(built, footage(1))) == ["reconstruction"]


# -- the decoder ------------------------------------------------------------------------------------------------------


def test_velocity_and_clean_frames_agree_with_the_path() -> None:
    z, latents = footage(2), {"structural": torch.randn(2, 4, 2, 2, 2)}
    t = torch.tensor([0.02, 0.7])
    v, clean, _ = shaken(recipe_of()).decoder(z, t, latents)
    assert torch.allclose(clean, z - t.view(-1, 1, 1, 1, 1) * v)
    v, clean, _ = shaken(recipe_of(predict="clean")).decoder(z, t, latents)
    assert torch.allclose(z - torch.tensor([0.05, 0.7]).view(-1, 1, 1, 1, 1) * v, clean, atol=1e-5)


@pytest.mark.parametrize("predict", ["velocity", "clean"])
def test_the_flow_loss_by_hand(predict: str) -> None:
    recipe = recipe_of(predict=predict)
    built, x, stage = shaken(recipe), footage(2), stage_of(recipe, "structural")
    batch = batch_of(x, stage)
    output = recipe.step(built, batch, stage, nn.ModuleDict())
    e = batch.randn("noise", 3, 5, 32, 32)
    from trainer.losses.flow import TimestepSpec, timesteps

    t = timesteps(batch.rand("t", 2), TimestepSpec()).view(-1, 1, 1, 1, 1)
    p = built.encode(x, False)["structural"]
    z = {"structural": p.mean + (p.log_variance / 2).exp() * batch.randn("z/structural", 4, 2, 2, 2)}
    dropped = batch.rand("condition", 1)[:, 0] < 0.1
    v, clean, _ = built.decoder((1 - t) * x + t * e, t.flatten(), z, None, dropped)
    by_hand = (v - (e - x)).square() if predict == "velocity" else (clean - x).square() / t.clamp_min(0.05) ** 2
    assert output.terms["flow"].item() == pytest.approx(by_hand.mean().item(), rel=1e-4)


def test_one_step_from_full_noise_is_the_prediction_and_more_follow_the_velocity() -> None:
    one, two = (recipe_of(sampling={"steps": n, "power": 1, "guidance": g}) for n, g in ((1, 1.0), (2, 3.0)))
    built = read(shaken(one, strength=0.02), one)
    x = footage(1)
    (latent,) = one.encode(built, [x])
    noise = torch.randn(x.shape, generator=generator(0, 0, "onedva/decode"))
    given = {"structural": latent["structural"], "1d": nn.functional.pad(latent["1d"], (0, 6 - latent["1d"].shape[-1]))}
    kept = torch.arange(6)[None] < latent["1d"].shape[-1]

    def velocity(z: Tensor, t: float, dropped: bool) -> Tensor:
        return built.decoder(z, torch.tensor([t]), given, kept, torch.tensor([dropped]))[0]

    with torch.no_grad():
        (made,) = one.decode(built, [latent])
        assert torch.allclose(made, (noise - velocity(noise, 1.0, False)).clamp(-1, 1), atol=1e-5)
        z = noise
        for t in (1.0, 0.5):
            bare = velocity(z, t, True)
            z = z - 0.5 * (bare + 3.0 * (velocity(z, t, False) - bare))
        (made,) = two.decode(built, [latent])
    assert torch.allclose(made, z.clamp(-1, 1), atol=1e-4)


def test_sampling_is_a_function_of_seed_and_window() -> None:
    recipe, other = recipe_of(), recipe_of(sampling={"steps": 2, "seed": 1})
    built, x = read(shaken(recipe), recipe), footage(1, 18)
    latents = list(recipe.encode(built, x.split(5, dim=2)))
    assert [int(latent["frames"]) for latent in latents] == [9, 9]
    made = list(recipe.decode(built, latents))
    assert all(torch.equal(a, b) for a, b in zip(made, recipe.decode(built, latents), strict=True))
    assert not torch.equal(made[0], next(iter(other.decode(built, latents))))
    again = list(recipe.decode(built, [latents[0], latents[0]]))
    assert torch.equal(again[0], made[0]) and not torch.equal(again[1], made[0]), "each window has noise of its own"


# -- losses -----------------------------------------------------------------------------------------------------------


def test_self_alignment_by_hand() -> None:
    root = math.sqrt(0.5)
    structural = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], requires_grad=True)
    sequence = torch.tensor([[[3.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]], requires_grad=True)
    kept = torch.tensor([[True, True, False]])
    loss = losses.self_alignment(sequence, structural, kept, 0.5)
    assert loss.item() == pytest.approx(((1 - 1) + (1 - root)) / 2 + 0.5 * (1 - root))
    slope, none = torch.autograd.grad(loss, (sequence, structural), allow_unused=True)
    assert none is None, "structural latents are not drawn to 1D ones"
    assert slope[0, 1].abs().sum() > 0 and slope[0, 2].abs().sum() == 0


def test_kl_leaves_dropped_latents_out() -> None:
    recipe = recipe_of(dropout={"by": "uniform"})
    built, stage = shaken(recipe), stage_of(recipe, "adaptive", flow=1.0, kl=0.1)
    batch = batch_of(footage(2), stage)
    output = recipe.step(built, batch, stage, nn.ModuleDict())
    posteriors = built.encode(batch.pixels_BCTHW, True)
    counts = 1 + (batch.rand("length", 1)[:, 0] * 6).long()
    by_hand = [
        gaussian_kl(*(v[b : b + 1] for v in posteriors["structural"]))
        + gaussian_kl(*(v[b : b + 1, :, :count] for v in posteriors["1d"]))
        for b, count in enumerate(counts.tolist())
    ]
    assert output.terms["kl"].item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)
    assert output.loss.item() == pytest.approx((output.terms["flow"] + 0.1 * output.terms["kl"]).item(), rel=1e-5)
    assert output.statistics["length"].item() == counts.float().mean().item()


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SigLIP, saved by the classes that load the published one."""
    pytest.importorskip("transformers", reason="transformers is not installed (pip install 'moviola[models]')")
    from trainer.losses import torchvision_ops  # noqa: F401, I001
    from transformers import SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("siglip")
    config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(3)
    SiglipVisionModel(config).save_pretrained(folder)
    return folder


def test_repa_reads_a_frozen_siglip(siglip_folder: Path) -> None:
    spec = {"encoder": str(siglip_folder), "width": 16, "depth": 1, "projector": 12, "frames": 2}
    recipe = recipe_of(repa=spec)
    teachers = recipe.teachers()
    assert not any(p.requires_grad for p in teachers.parameters()) and not teachers.train()["siglip"].net.training
    x = footage(2, 9, 32, 48)
    features = teachers["siglip"](x)
    assert features.shape == (2, 3 * 2 * 3, 16)
    net = teachers["siglip"].net
    with torch.no_grad():
        seen = [nn.functional.interpolate(x[:, :, t], (32, 32), mode="bicubic", antialias=True).clamp(-1, 1)
                for t in (0, 6, 8)]  # fmt: skip
        tokens = [net(pixel_values=frame).last_hidden_state.transpose(1, 2).unflatten(2, (4, 4)) for frame in seen]
        cells = [nn.functional.interpolate(token, (2, 3), mode="bilinear", antialias=True) for token in tokens]
    assert torch.allclose(features[:, :6], cells[0].flatten(2).transpose(1, 2), atol=1e-5)
    last = (cells[1] + cells[2]) / 2
    assert torch.allclose(features[:, 12:], last.flatten(2).transpose(1, 2), atol=1e-5)

    built, stage = shaken(recipe), stage_of(recipe, "structural", flow=1.0, repa=0.5)
    output = recipe.step(built, batch_of(x, stage), stage, teachers)
    output.loss.backward()
    assert 0 < output.terms["repa"] < 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in built.projector.parameters())
    assert recipe.parts(built)["(projector)"] == sum(p.numel() for p in built.projector.parameters())
    perfect = losses.representation_alignment(features * 3, features)
    assert perfect.item() == pytest.approx(0, abs=1e-6)


def test_the_dry_run_counts_activations_with_every_teacher(siglip_folder: Path) -> None:
    spec = {"encoder": str(siglip_folder), "width": 16, "depth": 1, "projector": 12}
    plain = {
        "name": "planned",
        "recipe": "onedva",
        "model": SMALL | {"repa": spec, "perceptual": {"backbone": "vgg", "weights": "random"}},
        "data": {"train": "nowhere"},
        "batch": 4,
        "clip": {"frames": 5, "sizes": [[32, 32], [32, 48]]},
        "stages": {"structural": {"steps": 1}, "adaptive": {"steps": 1}},
    }
    facts = plan.dry_run(manifests.validate(plain, "here"))
    assert facts["memory"][0]["activations"] > 1e6
    assert facts["parameters"]["by_part"]["(projector)"] > 0
    assert facts["latent"]["shape"] == {"structural": [4, 2, 2, 2], "1d": [4, 6]}


def test_a_siglip_that_cannot_be_had_is_named(siglip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has tokens of 16 numbers\. Set model\.repa\.width to that"):
        siglip.SigLip(RepaSpec(encoder=str(siglip_folder)))
    with pytest.raises(InputError, match=r"model\.repa\.encoder: .* can't be loaded: .* or set model\.repa to null"):
        siglip.SigLip(RepaSpec(encoder=str(tmp_path)))


def test_lpips_looks_at_successive_drawn_frames() -> None:
    recipe = recipe_of(perceptual={"backbone": "vgg", "weights": "random"}, perceptual_frames=2)
    stage = stage_of(recipe, "structural", flow=1.0, lpips=0.1)
    batch = batch_of(footage(1, 9), stage)
    teachers = recipe.teachers()
    seen: list[Tensor] = []
    teachers["lpips"].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    output = recipe.step(shaken(recipe), batch, stage, teachers)
    start = int(batch.rand("lpips", 1)[0, 0] * 8)
    assert torch.equal(seen[0], batch.pixels_BCTHW[:, :, start : start + 2])
    assert output.loss.item() == pytest.approx((output.terms["flow"] + 0.1 * output.terms["lpips"]).item(), rel=1e-5)


# -- exactness --------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_seed_and_place() -> None:
    recipe = recipe_of()
    built, stage = shaken(recipe), stage_of(recipe, "adaptive", flow=1.0, kl=1e-3, align=0.1)
    x = footage(3)
    whole = recipe.step(built, batch_of(x, stage, (7, 8, 9)), stage, nn.ModuleDict())
    torch.manual_seed(5)
    parts = [
        recipe.step(built, batch_of(x[at : at + 1], stage, (7 + at,)), stage, nn.ModuleDict()).loss for at in range(3)
    ]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.loss.item(), rel=1e-5)
    other = recipe.step(built, batch_of(x, stage, (8, 9, 10)), stage, nn.ModuleDict())
    assert other.loss.item() != pytest.approx(whole.loss.item(), rel=1e-4)


# -- post-training ----------------------------------------------------------------------------------------------------


class Halfway(nn.Module):
    """A predictor as ``docs/recipes.md`` describes it: what it predicts is what it was given, noised, and told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def predict(
        self,
        latents: Mapping[str, Tensor],
        t_B: Tensor,
        noise: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        *,
        caption_emb_BLD: Tensor | None,
        caption_mask_BL: Tensor | None,
    ) -> dict[str, Tensor]:
        self.told.append((t_B, masks))
        assert {n: v.shape for n, v in latents.items()} == {n: v.shape for n, v in noise.items()}
        return {n: v + t_B.view(-1, *[1] * (v.ndim - 1)) * noise[n] for n, v in latents.items()}


def test_post_training_reads_predicted_latents_and_trains_the_decoder_alone() -> None:
    recipe = recipe_of(post_noise=(0.2, 0.4))
    built, stage = shaken(recipe), stage_of(recipe, "post")
    for name, parameter in built.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    batch, teachers = batch_of(footage(2), stage), nn.ModuleDict({"predictor": Halfway()})
    output = recipe.step(built, batch, stage, teachers)
    output.loss.backward()
    assert all(p.grad is None for p in built.encoder.parameters())
    assert built.decoder.from_structural.weight.grad.abs().sum() > 0
    ((t, masks),) = teachers["predictor"].told
    assert torch.allclose(t, 0.2 + 0.2 * batch.rand("post/t", 1)[:, 0])
    assert masks["1d"].sum(1).float().mean() == output.statistics["length"]
    means = {name: p.mean for name, p in built.encode(batch.pixels_BCTHW, True).items()}
    noise = {name: batch.randn(f"post/{name}", *value.shape[1:]) for name, value in means.items()}
    predicted = {n: v + t.view(-1, *[1] * (v.ndim - 1)) * noise[n] for n, v in means.items()}
    seen: list[Any] = []
    built.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    recipe.step(built, batch, stage, teachers)
    for name, value in predicted.items():
        assert torch.allclose(seen[0][name], value, atol=1e-6)


def test_post_training_without_a_predictor_is_refused() -> None:
    recipe = recipe_of()
    stage = stage_of(recipe, "post")
    with pytest.raises(InputError, match=r"stage 'post' trains on predicted latents.*teachers: \{predictor: RUN\}"):
        recipe.step(recipe.build(0), batch_of(footage(1), stage), stage, nn.ModuleDict())


# -- the linear path --------------------------------------------------------------------------------------------------


def test_the_grid_transform_is_orthonormal_and_puts_what_stands_still_first() -> None:
    grid = torch.randn(2, 3, 2, 4, 5)
    sequence = linear.to_sequence(grid, 24)
    assert torch.allclose(linear.from_sequence(sequence, (3, 2, 4)), grid, atol=1e-5)
    assert sequence.square().sum().item() == pytest.approx(grid.square().sum().item(), rel=1e-5)
    still = grid[:, :1].expand(-1, 3, -1, -1, -1)
    assert linear.to_sequence(still, 24)[:, 8:].abs().max() < 1e-5
    assert (
        torch.equal(linear.to_sequence(grid, 30)[:, :24], sequence) and not linear.to_sequence(grid, 30)[:, 24:].any()
    )


def test_expected_deviations_are_those_of_smooth_noise() -> None:
    basis = linear.bases(6)["first"]
    deviation = linear.expected_deviation(basis)
    assert deviation.argmax() == 0 and torch.all(deviation > 0)
    flat = torch.zeros(1, 3, 1, 16, 16)
    flat[:, :, :, 0, 0] = 1 / math.sqrt(3)
    assert linear.expected_deviation(flat).item() == pytest.approx(0.5), "luma's, of a single pixel"


def test_the_untrained_linear_path_is_a_codec_that_gains_from_every_latent() -> None:
    recipe = recipe_of(**LINEAR, latent_channels=12, queries=24, length={"by": "all"})
    built = recipe.build(0).eval()
    x = footage(2, 9, 48, 48, drift=2)
    level = (x - x.mean((2, 3, 4), keepdim=True)).square().mean()
    errors = []
    for kept in (0, 8, 16, 24):
        made = []
        for clip in x.split(1):
            (latent,) = recipe.encode(built, [clip])
            made += recipe.decode(built, [{**latent, "1d": latent["1d"][..., :kept]}])
        errors.append(float((torch.cat(made) - x).square().mean()))
    assert errors[0] < 0.5 * level and sorted(errors, reverse=True) == errors and errors[-1] < 0.9 * errors[0]


def test_behind_the_gate_full_noise_says_nothing_and_less_noise_does() -> None:
    recipe = recipe_of(**LINEAR, gate=True)
    built = read(shaken(recipe), recipe)
    x = footage(1, 9)
    with torch.no_grad():
        latents = {name: posterior.mean for name, posterior in built.encode(x, sequence=True).items()}
        for time, same in ((1.0, True), (0.5, False)):
            noise = (torch.randn(x.shape, generator=generator(seed, 0, "test/noise")) for seed in (0, 1))
            one, other = (built.decoder(z, torch.tensor([time]), latents)[1] for z in noise)
            assert torch.equal(one, other) == same


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"width": 20, "heads": 3}},
            "width 20 over 3 heads: a head needs a whole, even number of at least 6",
        ),
        ({"window": 16}, "window is 16; a window has 1 \\+ 4 k frames, 17 for example"),
        (
            {"condition_dropout": 0},
            "sampling.guidance is 1.5, and with condition_dropout: 0 the decoder never learned to",
        ),
        ({"linear": "dct"}, "linear: dct adds to the predicted frames; it needs predict: clean"),
        ({"repa": {"depth": 3}}, "repa.depth is 3, and the decoder has 2 layers"),
        ({"post_noise": (0.5, 0.2)}, "post_noise \\[0.5, 0.2\\]: the least time comes first"),
        ({"lenght": {}}, "Extra inputs are not permitted"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"flow": 1, "l1": 1}}, "losses.l1: 1.0: no such name"),
        ({"losses": {"kl": 1}}, "losses.flow: it has no weight"),
        ({"losses": {"flow": 1, "repa": 1}}, "losses.repa: 1.0: model.repa is null"),
        ({"losses": {"flow": 1, "lpips": 1}}, "losses.lpips: 1.0: model.perceptual is null"),
        ({"losses": {"flow": 1, "align": 1}}, "losses.align: 1.0: this stage has no 1D latents. Set it to 0"),
        ({"knobs": {"latents": "all"}}, "knobs.latents: 'all': take structural, both, predicted"),
        ({"knobs": {"latents": "predicted"}, "losses": {"flow": 1, "kl": 1}}, "losses.kl: 1.0: the encoder rests"),
        (
            {"knobs": {"latents": "predicted"}},
            "teachers.predictor: missing, and this stage trains on predicted latents",
        ),
        ({"teachers": {"predictor": "a"}}, "teachers.predictor: 'a': no such name"),
        ({"supervise": (1, 2)}, "supervise: \\[1, 2\\]: every frame is supervised"),
        ({"adversary": AdversaryStage(weight=1)}, "adversary: a diffusion decoder makes no reconstruction"),
        ({}, "clip.frames: 17: a window has 9 frames"),
    ],
)
def test_stages_that_cannot_be_trained_are_refused(changes: dict[str, Any], message: str) -> None:
    recipe = recipe_of()
    plain = {"losses": {"flow": 1.0}} | changes
    stage = Stage.model_validate(recipe.stages()[0].model_dump() | plain)
    found = list(recipe.check(stage))
    assert any(nn_match(message, line) for line in found), found


def nn_match(pattern: str, text: str) -> bool:
    import re

    return re.search(pattern, text) is not None
