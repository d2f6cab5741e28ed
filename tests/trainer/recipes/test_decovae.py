from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import order
from pipelines.contracts import Batch, BatchPlan, Source, generator
from pipelines.faults import InputError
from trainer import manifest as manifests
from trainer import plan
from trainer.blocks import patch
from trainer.losses import gaussian_kl
from trainer.recipe import Recipe, counted, load
from trainer.recipes import decovae
from trainer.recipes.decovae import backbone, losses, motion
from trainer.recipes.decovae.config import DecoVaeConfig, MotionSpec
from trainer.recipes.decovae.motion import MotionModule, gaussian_volume, load_ssf2020, warp
from trainer.recipes.decovae.recipe import DecoVaeRecipe
from trainer.stage import AdversaryStage, Stage

torch.set_num_threads(1)

BACKBONE = {"low": 8, "high": 12, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1}
SMALL = {"latent_channels": 4, "backbone": BACKBONE, "motion": {"width": 6, "latent": 8}, "perceptual": None}


def recipe_of(**changes: Any) -> DecoVaeRecipe:
    return DecoVaeRecipe(DecoVaeConfig.model_validate(SMALL | changes))


def shaken(recipe: DecoVaeRecipe, seed: int = 0) -> nn.Module:
    """A model whose every weight counts: what starts at 0 would hide what it depends on."""
    model = recipe.build(seed)
    noise = generator(seed, 0, "test/shake")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


def footage(clips: int = 1, frames: int = 5, size: int = 32, seed: int = 0, drift: int = 1) -> Tensor:
    """Smooth texture that drifts by ``drift`` pixels a frame, (B, 3, T, H, W) in [-1, 1]."""
    reach = size + drift * frames
    noise = torch.randn(clips, 3, reach // 4 + 2, reach // 4 + 2, generator=generator(seed, 0, "test/footage"))
    texture = nn.functional.interpolate(noise * 0.2 + noise[:, :1], scale_factor=6, mode="bicubic").tanh()
    moved = [texture[:, :, t * drift : t * drift + size, t * drift : t * drift + size] for t in range(frames)]
    return torch.stack(moved, dim=2).contiguous()


def batch_of(pixels: Tensor, stage: Stage) -> Batch:
    count, _, _, height, width = pixels.shape
    places = tuple(range(count))
    plan = BatchPlan(0, stage.name, 0, count, "video", 0, (height, width), stage.clip)
    sources = tuple(Source("d", "s", str(place)) for place in places)
    return Batch(pixels, torch.ones(count), torch.zeros(count), places, sources, plan, 1.0, 0)


def stage_of(name: str, recipe: DecoVaeRecipe, **weights: float) -> Stage:
    stage = next(stage for stage in recipe.stages() if stage.name == name)
    return stage.model_copy(update={"losses": weights or {"l1": 1.0}})


# -- the published configuration -------------------------------------------------------------------------------------


def test_parameters_are_the_papers_within_three_percent() -> None:
    recipe = DecoVaeRecipe(DecoVaeConfig())
    with torch.device("meta"):
        model = recipe.build(0)
    parts = recipe.parts(model)
    assert counted(parts) == pytest.approx(62e6, rel=0.03)
    assert parts["(motion)"] == 2_896_963
    lean = DecoVaeRecipe(DecoVaeConfig(components="none"))
    with torch.device("meta"):
        pixels = lean.parts(lean.build(0))
    assert counted(pixels) == pytest.approx(39.8e6, rel=0.01), "LeanVAE's own"
    text = (Path(decovae.__file__).parent / "README.md").read_text()
    each = f"{parts['encoder'] / 3e6:.2f}M | {parts['decoder'] / 1e6:.2f}M"
    for row in (
        f"| DeCo-VAE | 62M | {counted(parts) / 1e6:.2f}M | {each} |",
        f"| LeanVAE (`components: none`) | 40M | {counted(pixels) / 1e6:.2f}M |",
    ):
        assert row in text


def test_the_published_schedule() -> None:
    recipe = DecoVaeRecipe(DecoVaeConfig())
    warm_up, static, dynamic = recipe.stages()
    assert (warm_up.name, static.steps, dynamic.steps) == ("motion", 400_000, 100_000)
    assert static.adversary is None and dynamic.adversary.weight == 0.2 and dynamic.adversary.start == 0
    for stage in (static, dynamic):
        assert (stage.losses["l1"], stage.losses["lpips"], stage.losses["kl"]) == (4.0, 4.0, 1e-7)
        assert (stage.optimizer["name"], stage.optimizer["lr"], stage.optimizer["betas"]) == ("adam", 5e-5, (0.5, 0.9))
        assert (stage.clip.frames, stage.clip.sizes) == (17, ((256, 256),))
    for stage in recipe.stages():
        assert list(recipe.check(stage)) == []
    latent = recipe.latent(17, 256, 256)
    assert latent.channels == 16
    assert latent.shapes == dict.fromkeys(("keyframe", "motion", "residual"), (16, 5, 32, 32))


def test_fewer_workers_than_the_papers_take_no_more_clips_at_a_time() -> None:
    published = manifests.load(str(Path(__file__).parents[3] / "manifests" / "decovae.yaml"))
    assert published.batch == 8 * 5
    for world in range(published.workers.least, published.workers.greatest + 1):
        spans = [s for rank in range(world) for s in order.share(published.batch, rank, world, published.micro_batch)]
        assert sum(s.count for s in spans if s.weight) == 40 and max(s.count for s in spans) <= 5


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({}, ["motion", "static", "dynamic"]),
        ({"adaptation": False}, ["motion", "joint"]),
        ({"components": "concat"}, ["motion", "joint"]),
        ({"components": "none"}, ["joint"]),
    ],
)
def test_ablations_have_stages_of_as_many_steps(changes: dict[str, Any], names: list[str]) -> None:
    listed = recipe_of(**changes).stages()
    assert [stage.name for stage in listed] == names
    assert sum(stage.steps for stage in listed if stage.name != "motion") == 500_000
    assert listed[-1].adversary.start + sum(s.steps for s in listed[:-1] if s.name != "motion") == 400_000


def test_phases_train_their_parts_and_freeze_the_rest() -> None:
    recipe = recipe_of()
    names = [name for name, _ in recipe.build(0).named_parameters()]
    frozen = [{n for n in names if not stage.trains(n)} for stage in recipe.stages()]
    assert frozen[0] == {n for n in names if not n.startswith("motion.")}
    assert frozen[1] == {n for n in names if n.startswith("motion.")}
    assert frozen[2] == {n for n in names if n.startswith("encoder.keyframe.")}
    assert all(frozen)


def test_loaded_motion_needs_no_warm_up() -> None:
    listed = DecoVaeRecipe(DecoVaeConfig(motion=MotionSpec(weights="ssf.pth"))).stages()
    assert (listed[0].name, listed[0].steps) == ("motion", 0)


def test_the_recipe_keeps_its_contract() -> None:
    assert load("decovae") is DecoVaeRecipe
    assert isinstance(recipe_of(), Recipe)


# -- decoupling ------------------------------------------------------------------------------------------------------


def test_recoupling_undoes_decoupling() -> None:
    model, x = shaken(recipe_of()), footage(clips=2, frames=5)
    parts = model.decouple(x)
    assert parts.motion_B3THW.shape == x.shape and parts.motion_B3THW.abs().max() > 1e-3
    assert parts.residual_B3THW.abs().max() > 0.1, "the prediction is not the frame"
    again, predicted = model.recouple(parts.keyframe_B3HW, parts.motion_B3THW, parts.residual_B3THW)
    assert torch.equal(predicted, parts.predicted_B3THW)
    assert (again - x).abs().max() < 1e-6


def test_the_warp_moves_by_pixels_and_blurs_by_scale() -> None:
    frame = footage(frames=1, size=32)[:, :, 0]
    still = torch.zeros(1, 3, 2, 32, 32)
    still[:, 2] = -1
    assert torch.allclose(warp(frame, still)[:, :, 1], frame, atol=1e-6)
    moved = still.clone()
    moved[:, 0] += 3 * 2 / 32
    moved[:, 1] -= 2 * 2 / 32
    assert torch.allclose(warp(frame, moved)[:, :, 0, 4:, :28], frame[:, :, 2:-2, 3:-1], atol=1e-5)
    assert torch.allclose(motion.flow_in_pixels(moved)[0, :, 0, 0, 0], torch.tensor([3.0, -2.0]))
    volume = gaussian_volume(frame)
    for index in range(motion.SLICES):
        still[:, 2] = (2 * index + 1) / motion.SLICES - 1
        assert torch.allclose(warp(frame, still)[:, :, 0], volume[:, :, index], atol=1e-5)
    assert volume.shape == (1, 3, 6, 32, 32)
    steep = (volume[..., 1:] - volume[..., :-1]).square().mean(dim=(0, 1, 3, 4))
    assert all(a > b for a, b in itertools.pairwise(steep)), "each slice is smoother than the one before"


def test_the_volumes_blur_is_a_gaussian_of_sigma_1_5() -> None:
    point = torch.zeros(1, 1, 32, 32)
    point[..., 16, 16] = 1
    blurred = gaussian_volume(point)[0, 0, 1]
    away = torch.arange(32) - 16.0
    assert blurred.sum() == pytest.approx(1, abs=1e-6)
    assert (blurred.sum(0) * away.square()).sum() == pytest.approx(1.5**2, rel=0.03)
    assert int((blurred > 0).sum()) == 11 * 11


def test_motion_starts_from_none() -> None:
    x = footage(frames=5)
    field = MotionModule(MotionSpec(width=32, latent=32))(x, x[:, :, 0])
    assert motion.flow_in_pixels(field).abs().max() < 0.1
    assert (field[:, 2] - motion.SHARP).abs().max() < 0.02


def test_the_motion_module_learns_to_predict() -> None:
    recipe = recipe_of(motion={"width": 24, "latent": 24})
    model, stage = recipe.build(0), stage_of("motion", recipe, warp=1.0)
    optimizer = torch.optim.Adam(model.motion.parameters(), lr=3e-3)
    found = []
    for step in range(40):
        output = recipe.step(model, batch_of(footage(clips=2, drift=1, seed=step % 3), stage), stage, nn.ModuleDict())
        assert output.reconstruction_BCTHW is None
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        found.append(output.loss.item())
    assert sum(found[-3:]) < 0.6 * sum(found[:3])
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("motion."))


# -- motion weights --------------------------------------------------------------------------------------------------


def ssf2020(width: int = 6, latent: int = 8) -> dict[str, Tensor]:
    """A state dict of CompressAI's layout: image, residual and motion coders, each with an entropy model.

    The residual's decoder takes the motion's latent besides its own.
    """
    state = {}
    for part, (inputs, outputs) in {"img": (3, 3), "res": (3, 3), "motion": (6, 3)}.items():
        for side, widths in (
            ("encoder", (inputs, width, width, width, latent)),
            ("decoder", (2 * latent if part == "res" else latent, *[width] * 3, outputs)),
        ):
            for layer in range(4):
                a, b = widths[layer : layer + 2]
                shape = (b, a, 5, 5) if side == "encoder" else (a, b, 5, 5)
                state[f"{part}_{side}.{2 * layer}.weight"] = torch.randn(shape)
                state[f"{part}_{side}.{2 * layer}.bias"] = torch.randn(b)
        state[f"{part}_hyperprior.entropy_bottleneck.quantiles"] = torch.randn(latent, 1, 3)
    return state


@pytest.mark.parametrize("kind", ["safetensors", "pth", "checkpoint"])
def test_motion_weights_are_read_from_ssf2020s_layout(tmp_path: Path, kind: str) -> None:
    state, path = ssf2020(), tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{n}": t for n, t in state.items()}} if kind == "checkpoint" else state, path
        )
    recipe = recipe_of(motion={"width": 6, "latent": 8, "weights": str(path)})
    model = recipe.build(0)
    for name, parameter in model.motion.named_parameters():
        side, rest = name.split(".", 1)
        assert torch.equal(parameter, state[f"motion_{side}.{rest}"]), name
    x = footage(frames=2)
    net = [nn.functional.conv2d, nn.functional.conv_transpose2d]
    h = (torch.cat((x[:, :, 1], x[:, :, 0]), dim=1) + 1) / 2
    for side, layer in ((s, i) for s in (0, 1) for i in range(0, 8, 2)):
        name = f"motion_{('encoder', 'decoder')[side]}.{layer}"
        more = {"output_padding": 1} if side else {}
        h = net[side](h, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=2, **more)
        h = h.relu() if layer < 6 else h
    assert torch.allclose(model.motion(x, x[:, :, 0])[:, :, 1], h, rtol=1e-4, atol=1e-3)


def test_motion_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    module = MotionModule(MotionSpec(width=6, latent=8))
    state = ssf2020()
    state["motion_encoder.0.stray"] = state.pop("motion_encoder.0.bias")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"motion_encoder.0.bias is missing; motion_encoder.0.stray is not known"):
        load_ssf2020(module, str(tmp_path / "other.safetensors"))
    save_file(ssf2020(width=7), tmp_path / "wide.safetensors")
    with pytest.raises(InputError, match=r"motion_decoder.0.bias is \[7\], not \[6\].*and 11 more"):
        load_ssf2020(module, str(tmp_path / "wide.safetensors"))
    with pytest.raises(InputError, match=r"nowhere.pth' can't be read"):
        load_ssf2020(module, str(tmp_path / "nowhere.pth"))
    torch.save({"a": Path("code")}, tmp_path / "code.pth")
    with pytest.raises(InputError, match="can't be read: UnpicklingError: it holds more than tensors"):
        load_ssf2020(module, str(tmp_path / "code.pth"))
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(InputError, match="hold no state dict of tensors"):
        load_ssf2020(module, str(tmp_path / "list.pth"))


# -- the autoencoder -------------------------------------------------------------------------------------------------


def test_wavelets_are_orthonormal_and_undone() -> None:
    x = torch.randn(2, 3, 4, 8, 8)
    bands = backbone.haar(x, backbone.SPACETIME)
    assert bands.shape == (2, 8, 3, 2, 4, 4)
    assert bands.square().sum() == pytest.approx(x.square().sum().item(), rel=1e-5)
    assert torch.allclose(backbone.unhaar(bands, backbone.SPACETIME), x, atol=1e-6)
    flat = backbone.haar(torch.ones(1, 1, 2, 2, 2), backbone.SPACETIME)
    assert torch.allclose(flat[:, 0], torch.tensor(math.sqrt(8))) and not flat[:, 1:].any()
    tokens = backbone._patches(bands, 2)
    assert tokens.shape == (2, 1, 1, 1, 8 * 3 * 2 * 16)
    assert torch.equal(backbone._unpatches(tokens, 2, 8), bands)


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoder_and_decoder_are_causal(frames: int) -> None:
    model = shaken(recipe_of())
    x = footage(frames=frames).requires_grad_()
    mean, log_variance = model.encoder["residual"](x)
    steps = 1 + (frames - 1) // 4
    assert mean.shape == log_variance.shape == (1, 4, steps, 4, 4)
    for step in range(steps):
        (slope,) = torch.autograd.grad(mean[:, :, step].sum() + log_variance[:, :, step].sum(), x, retain_graph=True)
        reached = slope.abs().amax(dim=(0, 1, 3, 4)) > 0
        assert reached[: 1 + 4 * step].any() and not reached[1 + 4 * step :].any()
    z = torch.randn(1, 4, steps, 4, 4, requires_grad=True)
    made = model.decoder(z)
    assert made.shape == x.shape
    for t in range(frames):
        (slope,) = torch.autograd.grad(made[:, :, t].sum(), z, retain_graph=True)
        reached = slope.abs().amax(dim=(0, 1, 3, 4)) > 0
        assert not reached[2 + (t - 1) // 4 :].any() and reached[1 + (t - 1) // 4]


def test_the_linear_path_is_a_codec_before_training() -> None:
    basis = patch.spacetime_basis(4, 8, 40).flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(40), atol=1e-5)
    recipe = recipe_of(linear="dct", latent_channels=16)
    model, x = recipe.build(0), footage(frames=5, drift=0)
    made = model(x)
    level = x.mean((2, 3, 4), keepdim=True)
    assert (made.pixels_B3THW - x).square().mean() < 0.2 * (level - x).square().mean()


@pytest.mark.parametrize("changes", [{}, {"components": "concat"}, {"components": "none"}, {"keyframe": "single"},
                                     {"linear": "dct"}, {"adaptation": False}], ids=str)  # fmt: skip
def test_every_parameter_of_every_variant_learns(changes: dict[str, Any]) -> None:
    recipe = recipe_of(**changes)
    model = shaken(recipe)
    stage = recipe.stages()[-1].model_copy(update={"losses": {"l1": 1.0, "kl": 1e-6, "dwt_low": 0.1, "dwt_high": 0.1}})
    assert list(recipe.check(stage)) == []
    output = recipe.step(model, batch_of(footage(clips=2), stage), stage, nn.ModuleDict())
    output.loss.backward()
    idle = [n for n, p in model.named_parameters() if stage.trains(n) and (p.grad is None or not p.grad.any())]
    assert idle == []
    assert output.reconstruction_BCTHW.shape == output.target_BCTHW.shape == (2, 3, 5, 32, 32)
    with torch.no_grad():
        x = footage(clips=1, frames=5)
        latent = recipe.latent(5, 32, 32)
        (coded,) = recipe.encode(model, [x])
        assert {n: tuple(v.shape[1:]) for n, v in coded.items() if v.is_floating_point()} == latent.shapes
        made = torch.cat(list(recipe.decode(model, [coded])), dim=2)
        assert torch.allclose(made, model(x).pixels_B3THW.clamp(-1, 1), atol=1e-5)


def test_latents_are_sampled_with_the_clips_own_noise() -> None:
    recipe = recipe_of()
    model, x = shaken(recipe), footage(clips=2)
    stage = stage_of("static", recipe)
    noise = recipe._noise(batch_of(x, stage))
    assert set(noise) == {"keyframe", "motion", "residual"} and not torch.equal(noise["motion"], noise["residual"])
    quiet = {name: torch.zeros_like(value) for name, value in noise.items()}
    assert torch.equal(model(x, quiet).pixels_B3THW, model(x).pixels_B3THW)
    assert not torch.equal(model(x, noise).pixels_B3THW, model(x).pixels_B3THW)
    first = recipe.step(model, batch_of(x, stage), stage, nn.ModuleDict()).loss
    assert torch.equal(first, recipe.step(model, batch_of(x, stage), stage, nn.ModuleDict()).loss)


def test_the_keyframe_is_the_mean_over_time_of_what_is_decoded() -> None:
    model, x = shaken(recipe_of()), footage(frames=5)
    posteriors, source = model.encode(x)
    repeated = source.keyframe_B3HW[:, :, None].expand(-1, -1, 5, -1, -1)
    assert torch.equal(posteriors["keyframe"].mean, model.encoder["keyframe"](repeated)[0])
    z = {name: p.mean for name, p in posteriors.items()}
    _, made = model.decode(z)
    assert torch.allclose(made.keyframe_B3HW, model.decoder(z["keyframe"]).mean(2), atol=1e-5)


# -- losses ----------------------------------------------------------------------------------------------------------


def test_the_terms_by_hand() -> None:
    recipe = recipe_of()
    model, x = shaken(recipe), footage(clips=2)
    weights = {"l1": 4.0, "kl": 1e-3, "components": 0.5, "warp": 0.25, "dwt_low": 0.2, "dwt_high": 0.4}
    stage = stage_of("static", recipe, **weights)
    batch = batch_of(x, stage)
    output = recipe.step(model, batch, stage, nn.ModuleDict())
    assert set(output.terms) == set(weights)
    assert output.loss.item() == pytest.approx(sum(weights[n] * t.item() for n, t in output.terms.items()), rel=1e-5)
    made = model(x, recipe._noise(batch))
    assert output.terms["l1"].item() == pytest.approx((made.pixels_B3THW - x).abs().mean().item(), rel=1e-5)
    assert output.terms["warp"].item() == pytest.approx(
        (made.source.predicted_B3THW - x).square().mean().item(), rel=1e-5
    )
    assert output.reconstruction_loss(output.reconstruction_BCTHW).item() == pytest.approx(
        sum(weights[n] * output.terms[n].item() for n in ("l1", "dwt_low", "dwt_high")), rel=1e-5
    )
    mean, log_variance = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(4.0)]])
    assert gaussian_kl(mean, log_variance).item() == pytest.approx(0.5 * 1 + 0.5 * (4 + 4 - 1 - math.log(4)))
    assert output.terms["kl"].item() == pytest.approx(
        sum(gaussian_kl(*p).mean().item() for p in made.posteriors.values()), rel=1e-5
    )


def test_lpips_is_of_the_first_frame_and_four_drawn_ones() -> None:
    recipe = recipe_of(perceptual={"backbone": "vgg", "weights": "random"}, perceptual_frames=2)
    stage = stage_of("static", recipe, lpips=1.0)
    batch = batch_of(footage(clips=12, frames=9), stage)
    starts, count = losses.lpips_frames(batch, recipe.config)
    assert count == 2 and starts.min() >= 1 and starts.max() <= 7 and len(set(starts.tolist())) > 3
    chosen = losses._some_frames(batch.pixels_BCTHW, starts, count)
    assert torch.equal(chosen[3, :, 1:], batch.pixels_BCTHW[3, :, starts[3] : starts[3] + 2])
    assert torch.equal(chosen[:, :, 0], batch.pixels_BCTHW[:, :, 0])
    small = batch_of(footage(frames=5), stage)
    teachers = recipe.teachers()
    assert recipe.step(recipe.build(0), small, stage, teachers).terms["lpips"] > 0


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("static", {"losses": {"mse": 1.0}}, "losses.mse: 1.0: no such name"),
        ("static", {"losses": {"lpips": 1.0}}, "losses.lpips: 1.0: model.perceptual is null"),
        ("motion", {"losses": {"l1": 1.0}}, "stage motion makes a prediction and no reconstruction"),
        (
            "motion",
            {"losses": {"warp": 1.0}, "adversary": AdversaryStage(weight=1)},
            "adversary: stage motion makes no",
        ),
        ("static", {"image_share": 0.5}, "image_share: 0.5: an image has no motion"),
        ("static", {"supervise": (1, 2)}, "supervise: [1, 2]: every frame is supervised"),
    ],
)
def test_what_a_stage_asks_for_in_vain_is_named(name: str, change: dict[str, Any], message: str) -> None:
    recipe = recipe_of()
    faults = list(
        recipe.check(stage_of(name, recipe, **({"warp": 1.0} if name == "motion" else {})).model_copy(update=change))
    )
    assert len(faults) == 1 and message in faults[0], faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 16}, "window is 16; a window has 1 + 4 k frames"),
        ({"window": 5, "overlap": 3}, "overlap is 3; it may be half of window, 2, at most"),
        ({"components": "concat", "keyframe": "single"}, "keyframe: single needs components: dedicated"),
        ({"components": "concat", "linear": "dct"}, "linear: dct is a transform of three channels"),
        ({"components": "none", "new_keyframe": 0.1}, "components: none has no residual"),
        ({"latent_channels": 200}, "latent_channels is 200; an 8 x 8 cell of a frame has 192 numbers"),
        ({"depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe_of(**changes)
    assert message in str(caught.value)


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 12, 17, 23])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_videos_of_any_length(frames: int, overlap: int) -> None:
    recipe = recipe_of(window=9, overlap=overlap)
    model, x = shaken(recipe), footage(frames=frames)
    coded = list(recipe.encode(model, x.split(2, dim=2)))
    made = torch.cat(list(recipe.decode(model, coded)), dim=2)
    assert made.shape == x.shape and made.abs().max() <= 1
    spec = recipe.latent(frames, 32, 32)
    numbers = sum(t.numel() for latent in coded for t in latent.values() if t.is_floating_point())
    assert numbers == round(spec.numbers_per_frame * frames)
    assert all(sum(latent[name].shape[2] for latent in coded) == shape[1] for name, shape in spec.shapes.items())
    assert torch.allclose(
        made[:, :, : min(frames, 9) - overlap], window_of(model, x[:, :, :9])[:, :, : min(frames, 9) - overlap]
    )


def test_a_keyframe_coded_once_leaves_motion_and_residual_to_the_frames_after_it() -> None:
    recipe = recipe_of(keyframe="single", linear="dct", window=9)
    assert [shape[1] for shape in recipe.latent(9, 32, 32).shapes.values()] == [1, 2, 2]
    assert recipe.latent(1, 32, 32).shapes == {"keyframe": (4, 1, 4, 4)}
    model = recipe.build(0)
    for frames in (1, 2, 9, 10, 18):
        x = footage(frames=frames)
        coded = list(recipe.encode(model, [x]))
        assert recipe.latent(frames, 32, 32).numbers_per_frame * frames == sum(
            t.numel() for latent in coded for t in latent.values() if t.is_floating_point()
        )
        made = torch.cat(list(recipe.decode(model, coded)), dim=2)
        assert made.shape == x.shape
    alone = torch.cat(list(recipe.decode(model, recipe.encode(model, [x[:, :, :1]]))), dim=2)
    assert torch.allclose(made[:, :, :1], alone, atol=1e-5), "it is neither moved nor mended"


def test_the_residual_of_a_long_clip_is_that_of_its_windows() -> None:
    recipe, x = recipe_of(window=9), footage(frames=14)
    model = shaken(recipe)
    residual = recipe.residual(model, x)
    assert residual.shape[2] == 13
    assert torch.allclose(residual[:, :, :8], model.decouple(x[:, :, :9]).residual_B3THW[:, :, 1:], atol=1e-5)
    assert torch.allclose(residual[:, :, 8:], model.decouple(x[:, :, 8:]).residual_B3THW[:, :, 1:], atol=1e-5)
    assert not torch.allclose(residual, model.decouple(x).residual_B3THW[:, :, 1:], atol=1e-2), "one keyframe for all"
    assert recipe_of(window=1, overlap=0).residual(model, x) is None, "every frame is a keyframe"


def window_of(model: nn.Module, x: Tensor) -> Tensor:
    frames = x.shape[2]
    filled = torch.cat((x, x[:, :, -1:].expand(-1, -1, -(frames - 1) % 4, -1, -1)), dim=2)
    return model(filled).pixels_B3THW[:, :, :frames].detach().clamp(-1, 1)


def test_windows_are_blended_where_they_overlap() -> None:
    recipe = recipe_of(window=9, overlap=3)
    model, x = shaken(recipe), footage(frames=15)
    with torch.no_grad():
        made = torch.cat(list(recipe.decode(model, recipe.encode(model, [x]))), dim=2)
        one, two = window_of(model, x[:, :, :9]), window_of(model, x[:, :, 6:15])
    for i in range(3):
        share = (i + 1) / 4
        assert torch.allclose(made[:, :, 6 + i], (1 - share) * one[:, :, 6 + i] + share * two[:, :, i], atol=1e-5)
    assert torch.allclose(made[:, :, 9:], two[:, :, 3:], atol=1e-5)


def test_decoding_starts_before_encoding_has_ended() -> None:
    recipe = recipe_of(window=5)
    model = shaken(recipe)
    seen = []

    def frames() -> Any:
        for t in range(40):
            seen.append(t)
            yield footage(frames=1, seed=t)

    made = 0
    for chunk in recipe.decode(model, recipe.encode(model, frames())):
        made += chunk.shape[2]
        assert len(seen) - made <= 6, "a window and a frame are all that is ever held"
    assert made == len(seen) == 40


def test_a_new_keyframe_where_the_old_one_no_longer_serves() -> None:
    scenes = [footage(frames=7, seed=s, drift=0) * 0.6 for s in (1, 2)]
    x = torch.cat(scenes, dim=2)
    recipe = recipe_of(window=9, new_keyframe=0.2)
    model = recipe.build(0)
    coded = list(recipe.encode(model, [x]))
    assert [(int(c["frames"]), int(c["shared"])) for c in coded] == [(7, 0), (7, 0)]
    made = torch.cat(list(recipe.decode(model, coded)), dim=2)
    assert made.shape == x.shape
    still = list(recipe_of(window=9).encode(model, [x]))
    assert [int(c["frames"]) for c in still] == [9, 6]


@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_a_new_keyframe_within_a_scene_is_blended_with_the_old_one(overlap: int) -> None:
    x = footage(frames=24, drift=1, seed=3)
    steps = [(x[:, :, t] - x[:, :, 0]).square().mean().sqrt() for t in range(24)]
    recipe = recipe_of(window=17, overlap=overlap, new_keyframe=float(steps[4] + steps[5]) / 2)
    model = recipe.build(0)
    coded = list(recipe.encode(model, x.split(1, dim=2)))
    assert len(coded) > 3 and all(int(c["frames"]) < 17 for c in coded)
    assert all(int(c["frames"]) % 4 == 1 for c in coded[:-1]), "no window ends within a latent's step of four frames"
    shared = [int(c["shared"]) for c in coded]
    assert shared[0] == 0 and all(min(1, overlap) <= count <= overlap for count in shared[1:])
    assert sum(int(c["frames"]) - int(c["shared"]) for c in coded) == 24
    chunks = list(recipe.decode(model, coded))
    made = torch.cat(chunks, dim=2)
    assert made.shape == x.shape
    first, second = (model.decode({n: v for n, v in c.items() if n not in ("frames", "shared")})[0] for c in coded[:2])
    border = int(coded[0]["frames"])
    for i in range(shared[1]):
        share, t = (i + 1) / (shared[1] + 1), border - shared[1] + i
        expected = (1 - share) * first[:, :, t].clamp(-1, 1) + share * second[:, :, i].clamp(-1, 1)
        assert torch.allclose(made[:, :, t], expected, atol=1e-6)


def test_windows_of_few_new_frames_share_no_more_than_these() -> None:
    torch.manual_seed(0)
    x = footage(frames=22, drift=1, seed=3)
    x[:, :, 11:] = -x[:, :, 11:]
    for window, overlap, threshold in ((5, 2, 0.02), (9, 3, 0.05), (5, 2, 0.1), (9, 3, 0.4), (5, 2, 0.8), (1, 0, 0.1)):
        recipe = recipe_of(window=window, overlap=overlap, new_keyframe=threshold)
        model = recipe.build(0)
        coded = list(recipe.encode(model, x.split(3, dim=2)))
        assert all(int(c["shared"]) < int(c["frames"]) <= window for c in coded)
        made = torch.cat(list(recipe.decode(model, coded)), dim=2)
        assert made.shape == x.shape and made.isfinite().all()


def test_sizes_that_do_not_divide_are_refused_with_the_multiple() -> None:
    with pytest.raises(InputError, match=r"72 x 128 pixels: height and width must be multiples of 16"):
        recipe_of().latent(17, 72, 128)
    assert recipe_of(components="none").latent(17, 72, 128).shapes["pixels"] == (4, 5, 9, 16)


def test_pictures_are_views_of_the_clip() -> None:
    recipe, pixels = recipe_of(), footage(clips=2, frames=6)
    views = recipe.pictures(recipe.build(0), pixels)
    assert set(views) == {"reconstruction", "predicted", "flow", "decoded flow", "residual", "decoded residual"}
    for view in views.values():
        assert view.shape == pixels.shape and view.abs().max() <= 1
    assert set(recipe_of(components="none").pictures(recipe_of(components="none").build(0), pixels)) == {
        "reconstruction"
    }


def test_under_autocast_motion_and_pixels_stay_float32() -> None:
    model, pixels = shaken(recipe_of()), footage()
    with torch.autocast("cpu", torch.bfloat16):
        made = model(pixels)
    assert (
        made.source.motion_B3THW.dtype
        == made.pixels_B3THW.dtype
        == made.posteriors["motion"].mean.dtype
        == torch.float32
    )
    assert (made.pixels_B3THW - model(pixels).pixels_B3THW).abs().mean() < 0.05


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = recipe_of().build(3)
    torch.manual_seed(2)
    two = recipe_of().build(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), recipe_of().build(4).parameters(), strict=True))


def test_a_dry_run_counts_the_discriminator(small_dataset: Path) -> None:
    plain = {
        "name": "a",
        "recipe": "decovae",
        "model": SMALL | {"perceptual": {"backbone": "vgg", "weights": "random"}},
        "data": {"train": str(small_dataset)},
        "batch": 2,
        "clip": {"frames": 5, "sizes": [[32, 32]]},
    }
    facts = plan.dry_run(manifests.validate(plain, "m"))
    assert facts["parameters"]["adversary"] == 2_765_633
    assert facts["parameters"]["counted"] < facts["parameters"]["total"] < 2_000_000, "it is counted by itself"
    memory = facts["memory"][0]
    assert memory["adversary"] == 20 * 2_765_633, "weights, gradients, two moments and ZeRO's copy"
    assert memory["activations"] > 0
