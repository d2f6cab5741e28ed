import itertools
import math
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.contracts import Batch, BatchPlan, ClipRule, Source, generator
from pipelines.faults import InputError
from trainer import codec as codecs
from trainer.blocks.conv import channels_last
from trainer.recipe import Recipe, counted, load
from trainer.recipes import arvae
from trainer.recipes.arvae.config import ArvaeConfig, SpynetSpec
from trainer.recipes.arvae.recipe import ArvaeRecipe
from trainer.recipes.arvae.spynet import Spynet
from trainer.stage import AdversaryStage, Stage

torch.set_num_threads(1)

SMALL = {
    "down": 8,
    "motion_channels": 2,
    "supplement_channels": 4,
    "widths": [4, 6, 8, 8],
    "motion_width": 4,
    "state_width": 4,
    "spynet": {"levels": 2, "widths": [8, 8, 4, 4], "kernel": 3},
    "first_frame": {"kind": "own", "down": 8, "channels": 12, "widths": [4, 6, 8, 8]},
    "perceptual": None,
}


def recipe_of(**changes) -> ArvaeRecipe:
    return ArvaeRecipe(ArvaeConfig.model_validate(SMALL | changes))


def shaken(recipe: ArvaeRecipe, seed: int = 0) -> nn.Module:
    """A model whose every weight counts: branches that start at 0 would hide what they depend on."""
    model = recipe.build(seed)
    noise = generator(seed, 0, "test/shake")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


def footage(clips: int = 1, frames: int = 4, height: int = 32, width: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth texture of muted colour that drifts by a pixel a frame, (B, 3, T, H, W) in [-1, 1]."""
    noise = torch.randn(clips, 3, (height + 8) // 4, (width + 8) // 4, generator=generator(seed, 0, "test/footage"))
    noise = noise * 0.2 + noise[:, :1]
    texture = nn.functional.interpolate(noise, scale_factor=8, mode="bicubic").tanh()
    return torch.stack([texture[:, :, t : t + height, t : t + width] for t in range(frames)], dim=2).contiguous()


def batch_of(pixels: torch.Tensor, stage: Stage) -> Batch:
    count, _, _, height, width = pixels.shape
    places = tuple(range(count))
    plan = BatchPlan(0, stage.name, 0, count, "video", 0, (height, width), stage.clip)
    sources = tuple(Source("d", "s", str(place)) for place in places)
    return Batch(pixels, torch.ones(count), torch.zeros(count), places, sources, plan, 1.0, 0)


def stage_of(name: str, recipe: ArvaeRecipe, **losses: float) -> Stage:
    stage = next(stage for stage in recipe.stages() if stage.name == name)
    return stage.model_copy(update={"losses": losses or {"mse": 1.0}})


# -- the published configurations ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("down", "supplement", "millions"), [(8, 2, 5.9), (16, 14, 6.2), (32, 14, 6.4)])
def test_parameters_are_the_papers_within_three_percent(down, supplement, millions):
    recipe = ArvaeRecipe(ArvaeConfig(down=down, supplement_channels=supplement, spynet=SpynetSpec(start="still")))
    with torch.device("meta"):
        parts = recipe.parts(recipe.build(0))
    assert counted(parts) == pytest.approx(millions * 1e6, rel=0.03)
    row = f"| {down} x {down}, 2 + {supplement} | {millions}M | {counted(parts) / 1e6:.2f}M | 1.20M |"
    assert row in (Path(arvae.__file__).parent / "README.md").read_text()
    assert "(first_frame)" in parts
    assert parts["motion_estimator"] == 5 * 240_050


@pytest.mark.parametrize(("down", "channels"), [(8, 4), (16, 16), (32, 16)])
def test_latents_are_the_papers(down, channels):
    recipe = ArvaeRecipe(ArvaeConfig(down=down, supplement_channels=channels - 2))
    latent = recipe.latent(7, 256, 256)
    cells = 256 // down
    assert latent.channels == channels
    assert latent.shapes["motion"] == (2, 6, cells, cells)
    assert latent.shapes["supplement"] == (channels - 2, 6, cells, cells)
    assert latent.numbers_per_frame == (16 * 32 * 32 + 6 * channels * cells * cells) / 7


def test_the_published_schedule():
    first, *later = ArvaeRecipe(ArvaeConfig()).stages()
    assert first.name == "first-frame" and first.clip.frames == 1
    assert [(s.clip.frames, s.steps, s.supervise) for s in later] == [
        (3, 300_000, (2, 3)),
        (5, 210_000, (4, 5)),
        (7, 120_000, (6, 7)),
    ]
    assert [s.clip.stride for s in later] == [(1, 6), (1, 1), (1, 1)]
    assert later[0].clip.stride_per == "gap"
    for stage in later:
        assert stage.losses == {"mse": 1.0, "ssim": 0.5, "lpips": 0.5}
        assert (stage.optimizer["name"], stage.optimizer["lr"]) == ("adamw", 1e-5)


def test_only_our_own_first_frame_has_a_stage():
    assert [s.name for s in recipe_of(first_frame={"kind": "frame"}).stages()] == ["frames-3", "frames-5", "frames-7"]


def test_stages_train_their_parts_and_freeze_the_rest():
    recipe = recipe_of()
    names = [name for name, _ in recipe.build(0).named_parameters()]
    first, *later = recipe.stages()
    assert {n for n in names if first.trains(n)} == {n for n in names if n.startswith("first_frame.")}
    for stage in later:
        assert {n for n in names if stage.trains(n)} == {n for n in names if not n.startswith("first_frame.")}


def test_the_recipe_keeps_its_contract():
    assert load("arvae") is ArvaeRecipe
    assert isinstance(recipe_of(), Recipe)


# -- causality and streams -------------------------------------------------------------------------------------------


def test_no_gradient_reaches_a_frame_from_a_later_one():
    model = shaken(recipe_of(transform="dct"))
    pixels = footage(frames=4).requires_grad_()
    frames = pixels.unbind(2)
    previous = model.first_frame.decode(model.first_frame.encode(frames[0]))
    state = model.start(previous)
    for t, x in enumerate(frames[1:], start=1):
        frame = model.code_frame(x, previous, state)
        for made in (frame.motion_BCHW, frame.supplement_BCHW, frame.x_B3HW, frame.state_BCHW):
            (gradient,) = torch.autograd.grad(made.square().sum(), pixels, retain_graph=True)
            touched = gradient.abs().amax(dim=(0, 1, 3, 4))
            assert (touched[: t + 1] > 0).all()
            assert (touched[t + 1 :] == 0).all()
        previous, state = frame.x_B3HW, frame.state_BCHW


def test_nothing_changes_when_a_later_frame_does():
    recipe = recipe_of(transform="dct")
    model = shaken(recipe)
    pixels, other = footage(frames=5), footage(frames=5)
    other[:, :, 3] = -other[:, :, 3]
    latents, others = (list(recipe.encode(model, [x])) for x in (pixels, other))
    made, others_made = (list(recipe.decode(model, found)) for found in (latents, others))
    for t in range(3):
        assert all(torch.equal(latents[t][name], others[t][name]) for name in latents[t])
        assert torch.equal(made[t], others_made[t])
    for t in (3, 4):
        assert not torch.equal(latents[t]["supplement"], others[t]["supplement"])
        assert not torch.equal(made[t], others_made[t])


@pytest.mark.parametrize("transform", ["none", "dct"])
@pytest.mark.parametrize("kind", ["own", "frame"])
def test_training_reconstructs_what_encoding_and_decoding_do(transform, kind):
    recipe = recipe_of(transform=transform, first_frame=SMALL["first_frame"] if kind == "own" else {"kind": kind})
    model = shaken(recipe)
    pixels = footage(frames=5, height=40, width=24)
    trained = model(pixels).pixels_B3THW.clamp(-1, 1)
    coded = torch.cat(list(recipe.decode(model, recipe.encode(model, pixels.split(2, dim=2)))), dim=2)
    assert torch.equal(trained.detach(), coded)


def test_decoding_starts_before_encoding_has_ended_and_memory_stays_constant():
    recipe = recipe_of()
    model = recipe.build(0)
    alive, read = [], []

    def source(count: int):
        for t in range(count):
            frame = footage(frames=1, seed=t)
            alive.append(weakref.ref(frame))
            read.append(t)
            yield frame

    made = recipe.decode(model, recipe.encode(model, source(40)))
    for t, _ in enumerate(made):
        assert len(read) == t + 1
        assert sum(reference() is not None for reference in alive) <= 2


def test_latents_have_the_promised_shapes():
    recipe = recipe_of()
    spec = recipe.latent(3, 32, 48)
    first, *later = recipe.encode(recipe.build(0), [footage(frames=3, width=48)])
    assert first["first"].shape[1:] == spec.shapes["first"]
    for name in ("motion", "supplement"):
        assert torch.cat([latent[name] for latent in later], dim=2).shape[1:] == spec.shapes[name]


def test_a_latent_stream_must_begin_at_its_beginning():
    recipe = recipe_of()
    model = recipe.build(0)
    _, second = recipe.encode(model, [footage(frames=2)])
    with pytest.raises(InputError, match="starts with motion, supplement; its start must be first"):
        next(recipe.decode(model, [second]))


# -- what a step learns from -----------------------------------------------------------------------------------------


def test_only_the_supervised_frames_are_in_the_loss():
    recipe = recipe_of()
    model, pixels = shaken(recipe), footage(clips=2, frames=5)
    output = recipe.step(model, batch_of(pixels, stage := stage_of("frames-5", recipe)), stage, nn.ModuleDict())
    error = model(pixels).pixels_B3THW[:, :, 3:5] - pixels[:, :, 3:5]
    assert output.loss.item() == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_weights_multiply_the_terms():
    recipe = recipe_of()
    stage = stage_of("frames-3", recipe, mse=2.0, ssim=0.5, warp=0.25)
    output = recipe.step(shaken(recipe), batch_of(footage(frames=3), stage), stage, nn.ModuleDict())
    terms = output.terms
    assert set(terms) == {"mse", "ssim", "warp"}
    expected = 2 * terms["mse"] + 0.5 * terms["ssim"] + 0.25 * terms["warp"]
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("gradient", "reached"), [("supervised", [0, 0, 0, 1, 1]), ("all", [0, 1, 1, 1, 1])])
def test_how_far_back_the_loss_is_propagated(gradient, reached):
    recipe = recipe_of(gradient=gradient)
    pixels = footage(frames=5).requires_grad_()
    stage = stage_of("frames-5", recipe)
    loss = recipe.step(shaken(recipe), batch_of(pixels, stage), stage, nn.ModuleDict()).loss
    through_model = torch.autograd.grad(loss, pixels)[0].abs().amax(dim=(0, 1, 3, 4))
    assert (through_model > 0).int().tolist() == reached


def test_the_first_frame_learns_in_its_own_stage_only():
    recipe = recipe_of()
    model = shaken(recipe)
    for name, frames, moves in (("first-frame", 1, True), ("frames-3", 3, False)):
        model.zero_grad()
        stage = stage_of(name, recipe)
        recipe.step(model, batch_of(footage(frames=frames), stage), stage, nn.ModuleDict()).loss.backward()
        assert all((p.grad is not None) == moves for p in model.first_frame.parameters())


ABLATIONS = [
    {"propagation": propagation, "state_features": state, "residual": residual, "transform": transform}
    for propagation, state, residual, transform in itertools.product(
        ("multi", "finest", "coarsest"), (True, False), (True, False), ("none", "dct")
    )
    if transform == "none" or (residual and propagation != "coarsest")
]


@pytest.mark.parametrize("changes", ABLATIONS, ids=lambda c: "-".join(str(v) for v in c.values()))
def test_every_parameter_of_every_variant_learns(changes):
    recipe = recipe_of(**changes)
    model = shaken(recipe)
    stage = stage_of("frames-3", recipe)
    recipe.step(model, batch_of(footage(frames=3), stage), stage, nn.ModuleDict()).loss.backward()
    idle = [
        name
        for name, parameter in model.named_parameters()
        if stage.trains(name) and (parameter.grad is None or not parameter.grad.any())
    ]
    assert idle == []


def test_recomputing_activations_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        recipe = recipe_of(recompute=recompute)
        model = shaken(recipe)
        stage = stage_of("frames-3", recipe)
        recipe.step(model, batch_of(footage(frames=3), stage), stage, nn.ModuleDict()).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


@pytest.mark.nightly
def test_graphs_that_are_compiled_do_not_grow_with_the_clip():
    graphs = []

    def count(graph, _):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    recipe = recipe_of()
    eager, compiled = shaken(recipe), shaken(recipe)
    compiled.compile(backend=count)
    for frames, new in ((3, True), (5, True), (7, False)):
        before, pixels = len(graphs), footage(frames=frames)
        stage = stage_of(f"frames-{frames}", recipe)
        made = recipe.step(compiled, batch_of(pixels, stage), stage, nn.ModuleDict())
        expected = recipe.step(eager, batch_of(pixels, stage), stage, nn.ModuleDict())
        assert made.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert (len(graphs) > before) == new
    torch._dynamo.reset()


def test_with_channels_last_the_loss_and_its_gradients_are_the_same():
    recipe = recipe_of()
    stage = stage_of("frames-5", recipe)
    batch, plain, laid_out = batch_of(footage(frames=5), stage), shaken(recipe), shaken(recipe)
    channels_last(laid_out)
    seen = []

    def see(_, inputs, output):
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for model in (plain, laid_out):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(see)
    losses = [recipe.step(model, batch, stage, nn.ModuleDict()).loss for model in (plain, laid_out)]
    half = len(seen) // 2
    assert not any(seen[:half]) and all(seen[half:])
    torch.testing.assert_close(losses[1], losses[0])
    for loss in losses:
        loss.backward()
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(laid_out.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_the_loss_falls_from_an_uninformed_start():
    recipe = recipe_of(spynet=SMALL["spynet"] | {"start": "still"})
    model, stage = recipe.build(0), stage_of("frames-3", recipe)
    parameters = [p for name, p in model.named_parameters() if stage.trains(name)]
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    found = []
    for step in range(24):
        batch = batch_of(footage(frames=3, seed=step % 4), stage)
        loss = recipe.step(model, batch, stage, nn.ModuleDict()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert sum(found[-4:]) < 0.75 * sum(found[:4])


# -- symbols ---------------------------------------------------------------------------------------------------------


def test_the_state_is_carried_and_can_be_left_out():
    model = shaken(recipe_of())
    frames = footage(frames=2).unbind(2)
    motion, supplement = model.encode_frame(frames[1], frames[0])
    state = model.start(frames[0])
    assert not state.any()
    made, following, _ = model.decode_frame(motion, supplement, frames[0], state)
    other, _, _ = model.decode_frame(motion, supplement, frames[0], following)
    assert not torch.equal(made, other)
    assert recipe_of(state_features=False).build(0).start(frames[0]) is None


@pytest.mark.parametrize("propagation", ["multi", "finest", "coarsest"])
def test_the_scales_that_are_propagated(propagation):
    model = recipe_of(propagation=propagation).build(0)
    field, previous = torch.zeros(1, 2, 32, 32), footage(frames=1)[:, :, 0]
    _, propagated = model.temporal_encoder(field, previous)
    expected = {"multi": {0: 32, 1: 16, 2: 8, 3: 4}, "finest": {0: 32}, "coarsest": {3: 4}}[propagation]
    assert {i: features.shape[-1] for i, features in enumerate(propagated) if features is not None} == expected


def test_the_motion_starts_as_the_downsampled_field_and_moves_the_frame_back():
    model = recipe_of().build(0)
    field = torch.ones(1, 2, 32, 32) * torch.tensor([3.0, -2.0]).view(1, 2, 1, 1)
    previous = footage(frames=1)[:, :, 0]
    motion, _ = model.temporal_encoder(field, previous)
    assert torch.allclose(motion, field[:, :, ::8, ::8] / 8)
    propagated, flow = model.temporal_decoder(motion, previous)
    assert torch.allclose(flow, field)
    assert torch.allclose(propagated[0][:, :3, 4:, :28], previous[:, :, 2:-2, 3:-1], atol=1e-5)


def test_at_the_start_a_frame_is_the_warped_one_plus_the_low_frequencies_of_the_rest():
    recipe = recipe_of(transform="dct", spynet=SMALL["spynet"] | {"start": "still"})
    model = recipe.build(0)
    before, x = footage(frames=1, seed=1)[:, :, 0], footage(frames=1, seed=2)[:, :, 0]
    frame = model.code_frame(x, before, model.start(before))
    decoder = model.spatial_decoder
    assert torch.allclose(frame.supplement_BCHW, model.spatial_encoder.analysis(x - before), atol=1e-5)
    assert torch.allclose(frame.x_B3HW, before + decoder.synthesis(frame.supplement_BCHW), atol=1e-5)
    assert (frame.x_B3HW - x).square().mean() < 0.5 * (before - x).square().mean()


@pytest.mark.parametrize(("dx", "dy"), [(0.5, 0), (-0.5, 0), (0, 0.5), (2, 1), (-3, 2)])
def test_motion_is_found_before_anything_is_learned(dx, dy):
    texture = footage(frames=1, height=64, width=64, seed=3)[:, :, 0]
    ys, xs = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")

    def seen_at(x: float, y: float) -> torch.Tensor:
        grid = torch.stack(((xs + 8 + x + 0.5) / 32 - 1, (ys + 8 + y + 0.5) / 32 - 1), dim=-1)[None]
        return nn.functional.grid_sample(texture, grid, mode="bicubic", align_corners=False)

    before, after = seen_at(0, 0), seen_at(dx, dy)
    spynet = Spynet(SpynetSpec(levels=4, widths=(8, 8, 4, 4), kernel=5))
    flow = spynet(after, before)[:, :, 8:-8, 8:-8]
    error = (flow - torch.tensor([float(dx), float(dy)]).view(1, 2, 1, 1)).norm(dim=1).mean()
    assert error < 0.5 * (dx**2 + dy**2) ** 0.5


def test_without_that_start_nothing_moves():
    spynet = Spynet(SpynetSpec(levels=3, start="still"))
    frames = footage(frames=2, height=37, width=50).unbind(2)
    assert spynet(frames[1], frames[0]).shape == (1, 2, 37, 50)
    assert not spynet(frames[1], frames[0]).any()


# -- the first frame -------------------------------------------------------------------------------------------------


def test_our_own_autoencoder_is_usable_untrained():
    recipe = recipe_of()
    model, x = recipe.build(0), footage(frames=1)[:, :, 0]
    latent = model.first_frame.encode(x)
    side = math.isqrt(latent.numel() // 3)
    small = nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True)
    bicubic = nn.functional.interpolate(small, x.shape[-2:], mode="bicubic")
    assert (model.first_frame.decode(latent) - x).square().mean() < (bicubic - x).square().mean()


def test_the_frame_itself_costs_nothing_but_numbers():
    recipe = recipe_of(first_frame={"kind": "frame"})
    x = footage(frames=3)
    model = recipe.build(0)
    assert torch.equal(model(x).pixels_B3THW[:, :, 0], x[:, :, 0])
    assert recipe.latent(3, 32, 32).shapes["first"] == (3, 1, 32, 32)
    assert "(first_frame)" not in recipe.parts(model)


@pytest.fixture
def flux_like(tmp_path):
    """A small autoencoder in FLUX's layout: 16 latent channels, no quantisation convolutions, a shift."""
    pytest.importorskip("trainer.losses.torchvision_ops")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    net.save_pretrained(tmp_path / "flux" / "vae")
    return tmp_path / "flux", net.eval()


def test_an_image_autoencoder_is_loaded_frozen_and_used_as_it_is(flux_like):
    path, net = flux_like
    recipe = recipe_of(first_frame={"kind": "diffusers", "source": str(path), "subfolder": "vae"})
    assert recipe.latent(2, 32, 32).shapes["first"] == (16, 1, 4, 4)
    assert [s.name for s in recipe.stages()] == ["frames-3", "frames-5", "frames-7"]
    model = recipe.build(0).train()
    x = footage(frames=2)
    with torch.no_grad():
        expected = net.decode(net.encode(x[:, :, 0]).latent_dist.mode()).sample
    assert torch.allclose(model(x).pixels_B3THW[:, :, 0], expected, atol=1e-6)
    assert not any(p.requires_grad for p in model.first_frame.parameters())
    assert not any(stage.trains(f"first_frame.{n}") for n, _ in net.named_parameters() for stage in recipe.stages())
    assert recipe.parts(model)["(first_frame)"] == sum(p.numel() for p in net.parameters())
    coded = torch.cat(list(recipe.decode(model, recipe.encode(model, [x]))), dim=2)
    assert torch.equal(coded, model(x).pixels_B3THW.detach().clamp(-1, 1))


def test_a_trained_model_needs_its_image_autoencoder_no_more(flux_like, tmp_path, monkeypatch):
    from diffusers import AutoencoderKL

    path, _ = flux_like
    recipe = recipe_of(first_frame={"kind": "diffusers", "source": str(path), "subfolder": "vae"})
    codec, x = codecs.Codec(recipe, recipe.build(0)), footage(frames=3)
    rewritten(path, dict.clear)  # weights are read where training starts
    expected, read = codec.model.state_dict(), recipe.skeleton().state_dict()
    assert {name: weight.shape for name, weight in read.items()} == {n: w.shape for n, w in expected.items()}
    asked = []
    load_config = AutoencoderKL.load_config
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda *a, **o: asked.append(a) or load_config(*a, **o))
    made = codec.reconstruct(x)
    assert len(asked) <= 1, "not once a frame: a hub would be asked as often"
    codecs.export(codec, str(tmp_path / "weights"))
    shutil.rmtree(path)
    assert torch.equal(codecs.load(str(tmp_path / "weights")).reconstruct(x), made)


def rewritten(path: Path, change) -> None:
    weights = load_file(path / "vae" / "diffusion_pytorch_model.safetensors")
    change(weights)
    save_file(weights, path / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("decoder.conv_in.weight"), r"weights lack decoder\.conv_in\.weight \(1 in all\)"),
        (lambda w: w.update(stray=torch.zeros(1)), r"weights do not belong to it: stray \(1 in all\)"),
        (
            lambda w: w.update({"decoder.conv_in.weight": torch.zeros(16, 4, 3, 3)}),
            r"size mismatch for decoder\.conv_in",
        ),
    ],
)
def test_weights_of_another_autoencoder_are_refused(flux_like, change, message):
    path, _ = flux_like
    rewritten(path, change)
    recipe = recipe_of(first_frame={"kind": "diffusers", "source": str(path), "subfolder": "vae"})
    with pytest.raises(InputError, match=f"can't be loaded as an AutoencoderKL: .*{message}"):
        recipe.build(0)


def test_a_model_that_is_no_autoencoder_is_refused(flux_like):
    path, _ = flux_like
    (path / "vae" / "config.json").write_text('{"_class_name": "UNet2DConditionModel", "block_out_channels": [8]}')
    recipe = recipe_of(first_frame={"kind": "diffusers", "source": str(path), "subfolder": "vae"})
    with pytest.raises(InputError, match=r"its config\.json is of UNet2DConditionModel"):
        recipe.latent(2, 32, 32)


def test_an_image_autoencoder_that_is_not_there_is_named(tmp_path):
    recipe = recipe_of(first_frame={"kind": "diffusers", "source": str(tmp_path / "nowhere"), "subfolder": "vae"})
    with pytest.raises(InputError, match=r"nowhere', subfolder 'vae' can't be loaded as an AutoencoderKL: .*kind: own"):
        recipe.build(0)


# -- seeds, precision, errors ----------------------------------------------------------------------------------------


def test_weights_are_a_function_of_the_seed_alone():
    recipe = recipe_of()
    torch.manual_seed(1)
    one = recipe.build(3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    two = recipe.build(3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), recipe.build(4).parameters(), strict=True))


def test_under_autocast_flows_and_pixels_stay_float32():
    recipe = recipe_of(transform="dct")
    model, pixels = shaken(recipe), footage(frames=3)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(pixels)
    assert made.flow_B2THW.dtype == made.pixels_B3THW.dtype == torch.float32
    assert (made.pixels_B3THW - model(pixels).pixels_B3THW).abs().mean() < 0.02


def test_sizes_that_do_not_divide_are_refused_with_the_multiple():
    recipe = ArvaeRecipe(ArvaeConfig(down=16))
    with pytest.raises(InputError, match=r"72 x 128 pixels: height and width must be multiples of 16"):
        recipe.latent(3, 72, 128)


def test_pictures_are_views_of_the_clip():
    recipe = recipe_of()
    pixels = footage(clips=2, frames=3)
    views = recipe.pictures(recipe.build(0), pixels)
    assert set(views) == {"reconstruction", "flow", "warped", "residual"}
    torch.testing.assert_close(views["warped"] + 2 * views["residual"], pixels)
    for view in views.values():
        assert view.shape == pixels.shape
        assert view.abs().max() <= 1
    assert (views["flow"][:, :, 0] == 1).all()


def test_what_a_stage_asks_in_vain_is_refused_before_training():
    recipe = recipe_of()
    first, later = recipe.stages()[:2]
    assert list(recipe_of(perceptual={"backbone": "vgg"}).check(later)) == []
    changed = later.model_copy(
        update={
            "losses": {"mse": 1.0, "sssim": 1.0, "lpips": 0.5},
            "knobs": {"latents": "both"},
            "image_share": 0.2,
            "adversary": AdversaryStage(weight=0.5),
        }
    )
    told = list(recipe.check(changed))
    assert [line.partition(": ")[0] for line in told] == [
        "losses.sssim", "knobs.latents", "losses.lpips", "image_share", "adversary",
    ]  # fmt: skip
    assert "did you mean 'ssim'?" in told[0] and "this recipe has none" in told[1]
    assert "model.perceptual is null" in told[2] and "give images to stage first-frame" in told[3]
    assert list(recipe.check(first.model_copy(update={"image_share": 0.5, "losses": {"mse": 1.0}}))) == []


def test_lpips_is_part_of_the_loss():
    recipe = recipe_of(perceptual={"backbone": "alex", "weights": "random"})
    stage = stage_of("frames-3", recipe, mse=1.0, lpips=0.5)
    output = recipe.step(shaken(recipe), batch_of(footage(frames=3), stage), stage, recipe.teachers())
    assert output.terms["lpips"] > 0
    assert output.loss.item() == pytest.approx((output.terms["mse"] + 0.5 * output.terms["lpips"]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": [8, 8]}, "widths has 2 entries; down: 8 has 4 scales"),
        ({"down": 4, "widths": None}, "widths must be given for down: 4"),
        ({"first_frame": {"kind": "own", "channels": 500}}, "500 channels: a 8x8 cell has 192 numbers"),
        ({"supplement_channels": 200}, "supplement_channels is 200; a cell has 192 numbers"),
        ({"transform": "dct", "propagation": "coarsest"}, "transform: dct codes the residual over the warped frame"),
        ({"transform": "dct", "residual": False}, "transform: dct needs residual: true"),
        ({"spynet": {"widths": [4, 8, 4, 4]}}, "start: gradient takes at least"),
        ({"motion_channels": 1}, "greater than or equal to 2"),
        ({"first_frame": {"kind": "jpeg"}}, "'own', 'diffusers', 'frame'"),
        ({"depth": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValidationError) as caught:
        recipe_of(**changes)
    assert message in str(caught.value)


def test_clip_rules_of_the_stages_are_rules():
    for stage in recipe_of().stages():
        assert isinstance(stage.clip, ClipRule)
        assert stage.clip.sizes == ((256, 256),)
