from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor, nn

from pipelines.contracts import Batch, BatchPlan, Source, generator
from pipelines.faults import InputError
from trainer import codec as codecs
from trainer import plan
from trainer.codec import Codec
from trainer.losses import gaussian_kl
from trainer.manifest import load as load_manifest
from trainer.recipe import CodecRecipe, counted, load
from trainer.recipes import videovaeplus
from trainer.recipes.videovaeplus import losses, stages
from trainer.recipes.videovaeplus.config import VideoVaePlusConfig
from trainer.recipes.videovaeplus.layers import TemporalDown
from trainer.recipes.videovaeplus.recipe import UNREACHED, VideoVaePlusRecipe
from trainer.recipes.videovaeplus.text import NullToken, Text, TextAttention
from trainer.stage import Stage

torch.set_num_threads(1)

TEXT = {"width": 6, "heads": 2, "head_width": 4}
SMALL = {
    "latent_channels": 4, "width": 8, "multipliers": (1, 2, 2, 2), "blocks": 1, "groups": 4, "temporal_width": 8,
    "perceptual": None,
}  # fmt: skip
ROOT = Path(__file__).parents[3]


def recipe_of(**changes: Any) -> VideoVaePlusRecipe:
    return VideoVaePlusRecipe(VideoVaePlusConfig.model_validate(SMALL | changes))


def shaken(recipe: VideoVaePlusRecipe, seed: int = 0) -> nn.Module:
    """A model whose every weight counts: what starts at 0 would hide what it depends on."""
    model = recipe.build(seed)
    noise = generator(seed, 0, "test/shake")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.05)
    return model


def footage(clips: int = 1, frames: int = 8, size: int = 16, seed: int = 0) -> Tensor:
    """Smooth texture that drifts by a pixel a frame, (B, 3, T, H, W) in [-1, 1]."""
    reach = size + frames
    noise = torch.randn(clips, 3, reach // 4 + 2, reach // 4 + 2, generator=generator(seed, 0, "test/footage"))
    texture = nn.functional.interpolate(noise, scale_factor=6, mode="bicubic").tanh()
    return torch.stack([texture[:, :, t : t + size, t : t + size] for t in range(frames)], dim=2).contiguous()


def batch_of(pixels: Tensor, stage: Stage, captions: tuple[Tensor, Tensor] | None = None) -> Batch:
    count, _, frames, height, width = pixels.shape
    places = tuple(range(count))
    rule = stage.clip.model_copy(update={"frames": frames})
    made = BatchPlan(0, stage.name, 0, count, "image" if frames == 1 else "video", 0, (height, width), rule)
    sources = tuple(Source("d", "s", str(place)) for place in places)
    emb, mask = captions or (None, None)
    return Batch(
        pixels, torch.ones(count), torch.zeros(count), places, sources, made, 1.0, 0, caption_emb_BLD=emb,
        caption_mask_BL=mask,
    )  # fmt: skip


def stage_of(name: str, recipe: VideoVaePlusRecipe, **weights: float) -> Stage:
    stage = next(stage for stage in recipe.stages() if stage.name == name)
    return stage.model_copy(update={"losses": weights or {"l1": 1.0}})


# -- the published configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "published"), [(4, 485e6), (16, 486e6)])
def test_parameters_are_the_papers_within_three_percent(channels: int, published: float) -> None:
    recipe = VideoVaePlusRecipe(VideoVaePlusConfig(latent_channels=channels, text={}))
    with torch.device("meta"):
        parts = recipe.parts(recipe.build(0))
    assert counted(parts) == pytest.approx(published, rel=0.03)
    assert counted(parts) == pytest.approx(published, rel=0.002)
    text = (Path(videovaeplus.__file__).parent / "README.md").read_text()
    row = [f"{parts[part] / 1e6:.2f}M" for part in ("encoder", "decoder", "temporal_encoder", "temporal_decoder")]
    name = f"{channels} channels"
    assert f"| {name} | {published / 1e6:.0f}M | {counted(parts) / 1e6:.2f}M | {' | '.join(row)} |" in text
    assert f"{parts['(text)'] / 1e6:.2f}M" in text


@pytest.mark.parametrize(
    ("channels", "text", "steps"),
    [
        (4, None, {"video": 230_000, "joint": 100_000}),
        (16, None, {"video": 310_000, "joint": 185_000}),
        (16, {}, {"video": 310_000, "joint": 185_000, "cross-modal": 160_000}),
    ],
)
def test_the_published_schedule(channels: int, text: Any, steps: dict[str, int]) -> None:
    recipe = VideoVaePlusRecipe(VideoVaePlusConfig(latent_channels=channels, text=text))
    listed = recipe.stages()
    assert {stage.name: stage.steps for stage in listed} == steps
    assert [stage.adversary.start for stage in listed] == [50_000, 0, 0][: len(steps)]
    assert [stage.image_share for stage in listed] == [0, 0.2, 0][: len(steps)]
    for stage in listed:
        assert (stage.clip.frames, stage.losses["kl"]) == (16, 1e-6)
        assert (stage.optimizer["name"], stage.optimizer["lr"], stage.optimizer["betas"]) == ("adam", 1e-4, (0.5, 0.9))
        assert stage.adversary.network.kind == "patch-3d"
        assert list(recipe.check(stage)) == []
    latent = recipe.latent(16, 216, 216)
    assert latent.shapes == {"video": (channels, 4, 27, 27)} and latent.channels == channels


def test_gan_is_of_images_or_videos() -> None:
    video, joint = recipe_of(gan="image").stages()
    assert (video.adversary.network.kind, joint.adversary.network.kind) == ("patch-2d", "patch-3d")


@pytest.mark.parametrize("name", ["4z", "4z_text", "16z", "16z_text"])
def test_the_published_manifests_are_the_published_model(name: str) -> None:
    manifest = load_manifest(ROOT / f"manifests/videovaeplus_{name}.yaml")
    config = manifest.loaded_recipe.config
    said = {"latent_channels", "weights", "recompute", "text", "perceptual"}
    assert config.model_fields_set <= said
    assert config.latent_channels == int(name.partition("z")[0]) and (config.text is None) == ("text" not in name)
    assert manifest.loaded_recipe.stages() == tuple(manifest.schedule.stages)
    smoke = load_manifest(ROOT / f"manifests/videovaeplus_{name}_smoke.yaml")
    assert [s.name for s in smoke.schedule.stages] == [s.name for s in manifest.schedule.stages]


def test_the_recipe_keeps_its_contract() -> None:
    assert load("videovaeplus") is VideoVaePlusRecipe
    assert isinstance(recipe_of(), CodecRecipe)


def test_build_is_a_function_of_the_seed_alone() -> None:
    recipe = recipe_of(text=TEXT)
    before = torch.random.get_rng_state()
    first, again, other = recipe.build(1), recipe.build(1), recipe.build(2)
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)


# -- inheriting an image autoencoder ---------------------------------------------------------------------------------


def image_vae(folder: Path, channels: int, quant: bool, **changes: Any) -> Any:
    """A small AutoencoderKL made through the same classes, its weights saved as the hub has them."""
    from trainer.losses import torchvision_ops  # noqa: F401  (before diffusers, which imports torchvision)

    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    net = diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=quant, use_post_quant_conv=quant, **changes,
    )  # fmt: skip
    net.save_pretrained(folder / "vae")
    return net.eval()


@pytest.mark.parametrize(("channels", "quant"), [(4, True), (16, False)], ids=["SD-1.4", "SD-3.5"])
@pytest.mark.parametrize("text", [None, TEXT], ids=["no text", "text"])
def test_first_stage_is_the_image_vae_on_every_frame(tmp_path: Path, channels: int, quant: bool, text: Any) -> None:
    net = image_vae(tmp_path, channels, quant)
    recipe = recipe_of(latent_channels=channels, weights={"source": str(tmp_path)}, text=text)
    model = recipe.build(0).eval()
    clip = footage(clips=2, frames=4, size=32, seed=5)
    with torch.no_grad():
        context = model.context(2, False, None, None)
        posterior = model.encode_frames(clip, context)
        decoded = model.decode_frames(posterior.mean, context)
        for at in range(4):
            theirs = net.encode(clip[:, :, at]).latent_dist
            torch.testing.assert_close(posterior.mean[:, :, at], theirs.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(posterior.log_variance[:, :, at], theirs.logvar, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(decoded[:, :, at], net.decode(theirs.mean).sample, rtol=1e-5, atol=1e-5)
    moved = {name for name, _ in model.named_parameters() if "temporal" not in name and "text." not in name}
    assert moved == {name for name, _ in net.named_parameters()}


def test_a_trained_model_needs_the_image_vae_no_more(tmp_path: Path) -> None:
    image_vae(tmp_path, 4, True)
    recipe = recipe_of(weights={"source": str(tmp_path)})
    codec = Codec(recipe, shaken(recipe))
    codecs.export(codec, str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "vae")
    before = torch.random.get_rng_state()
    again = codecs.load(str(tmp_path / "export"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert again.digest() == codec.digest()


def test_an_image_vae_of_another_shape_is_refused_by_field(tmp_path: Path) -> None:
    image_vae(tmp_path, 4, True)
    for changes, said in (
        ({"latent_channels": 16}, "its latent_channels is 4, and model.latent_channels makes 16"),
        (
            {"multipliers": (1, 2, 2, 4)},
            r"its block_out_channels is \[8, 16, 16, 16\], and model.width",
        ),
        ({"quant_conv": False}, "its use_quant_conv is True, and model.quant_conv makes False"),
    ):
        with pytest.raises(InputError, match=said):
            recipe_of(weights={"source": str(tmp_path)}, **changes).build(0)
    with pytest.raises(InputError, match=r"model.weights: source .* can't be loaded as an AutoencoderKL"):
        recipe_of(weights={"source": str(tmp_path / "nowhere")}).build(0)
    for subfolder in ({}, {"subfolder": ""}):
        recipe_of(weights={"source": str(tmp_path / "vae"), **subfolder}).build(0)
    image_vae(tmp_path, 4, True, mid_block_add_attention=False)
    with pytest.raises(
        InputError, match=r"another autoencoder: 20 of its weights .* first decoder.mid_block.attentions"
    ):
        recipe_of(weights={"source": str(tmp_path)}).build(0)


# -- the model -------------------------------------------------------------------------------------------------------


def test_temporal_layers_join_frames_and_only_they_do() -> None:
    clip = footage(frames=8, size=16).requires_grad_()
    for name, joins in (("fresh", False), ("shaken", True)):
        model = (recipe_of().build(0) if name == "fresh" else shaken(recipe_of())).eval()
        made = model.decode_frames(model.encode_frames(clip, model.context(1, False, None, None)).mean,
                                   model.context(1, False, None, None))  # fmt: skip
        (slope,) = torch.autograd.grad(made[:, :, 2].sum(), clip)
        seen = {t for t in range(8) if slope[:, :, t].any()}
        assert seen == (set(range(8)) if joins else {2}), name


def test_norm_over_the_clip_joins_frames() -> None:
    clip = footage(frames=4).requires_grad_()
    model = recipe_of(norm="clip").build(0)
    (slope,) = torch.autograd.grad(
        model.encode_frames(clip, model.context(1, False, None, None)).mean[:, :, 0].sum(), clip
    )
    assert slope[:, :, 3].any()


@pytest.mark.parametrize("kernel", [(3, 1, 1), (5, 3, 3)])
def test_temporal_kernel_is_a_field(kernel: tuple[int, int, int]) -> None:
    model = recipe_of(temporal_kernel=kernel).build(0)
    kernels = {tuple(p.shape[2:]) for n, p in model.named_parameters() if ".temporal1.conv.weight" in n}
    assert kernels == {kernel}
    assert model(footage(frames=4)).pixels_B3THW.shape == (1, 3, 4, 16, 16)


@pytest.mark.parametrize("modeling", ["two-stage", "simultaneous", "sequential"])
def test_designs_have_one_latent_shape(modeling: str) -> None:
    recipe = recipe_of(modeling=modeling, text=TEXT)
    model = shaken(recipe)
    made = model(footage(clips=2, frames=8))
    assert made.pixels_B3THW.shape == (2, 3, 8, 16, 16)
    assert made.posterior.mean.shape[1:] == recipe.latent(8, 16, 16).shapes["video"]
    names = [name for name, _ in model.named_parameters()]
    assert any(n.startswith("temporal_encoder") for n in names) == (modeling != "simultaneous")
    assert any(".temporal1." in n for n in names) == (modeling != "sequential")
    image = model(footage(clips=2, frames=1))
    assert image.posterior.mean.shape[1:] == recipe.latent(1, 16, 16).shapes["image"] == (4, 1, 2, 2)


def test_the_temporal_decoder_is_the_larger() -> None:
    model = recipe_of().build(0)
    assert [len(level.blocks) for level in model.temporal_decoder.levels] == [2, 2]
    assert all(hasattr(level, "block") for level in model.temporal_encoder.levels)


def test_time_starts_halved_as_a_mean() -> None:
    recipe = recipe_of(modeling="simultaneous")
    x = torch.randn(6, 5, 3, 3, generator=generator(0, 0, "test/halve"))
    down, context = TemporalDown(5), recipe.build(0).context(1, False, None, None)
    torch.testing.assert_close(down(x, context), x.unflatten(0, (3, 2)).mean(1))


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        recipe = recipe_of(text=TEXT, recompute=recompute)
        model, stage = shaken(recipe), stage_of("cross-modal", recipe, l1=1.0, kl=1e-3)
        recipe.step(model, batch_of(footage(frames=4), stage), stage, nn.ModuleDict()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


def test_a_linear_path_is_a_codec_before_training() -> None:
    recipe = recipe_of(linear="dct", latent_channels=16)
    model = recipe.build(0).eval()
    clip = nn.functional.interpolate(footage(frames=8), scale_factor=(1, 2, 2), mode="trilinear")
    with torch.no_grad():
        made = model(clip).pixels_B3THW
        image = model(clip[:, :, :1]).pixels_B3THW
    for found, wanted in ((made, clip), (image, clip[:, :, :1])):
        assert (found - wanted).square().mean() < 0.5 * wanted.var()
    layers = model.decoder.conv_out, model.encoder.conv_out, model.temporal_encoder.conv_out
    assert not any(layer.weight.any() for layer in layers), "the networks start as nothing"
    still = torch.full_like(clip, 0.3)
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(std=0.1, generator=generator(0, 0, "test/shake"))
        assert (model(still).pixels_B3THW - still).abs().max() < 0.05, "what has no detail is left alone"
        assert (model(clip).pixels_B3THW - made).abs().mean() > 0.05


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_image_takes_the_image_path_alone() -> None:
    """One frame through the whole model is what a model without any temporal part makes of it."""
    recipe, alone = recipe_of(), recipe_of(modeling="sequential")
    model, plain = shaken(recipe).eval(), alone.build(1).eval()
    spatial = {n: p for n, p in model.state_dict().items() if "temporal" not in n}
    left = plain.load_state_dict(spatial, strict=False)
    assert not left.unexpected_keys and all(n.startswith("temporal_") for n in left.missing_keys)
    image = footage(clips=2, frames=1)
    with torch.no_grad():
        made = model(image)
        context = plain.context(2, True, None, None)
        posterior = plain.encode_frames(image, context)
        assert torch.equal(made.posterior.mean, posterior.mean)
        assert torch.equal(made.pixels_B3THW, plain.decode_frames(posterior.mean, context))
        assert not torch.allclose(made.pixels_B3THW, model(image.expand(-1, -1, 4, -1, -1)).pixels_B3THW[:, :, :1])


@pytest.mark.parametrize("modeling", ["two-stage", "simultaneous"])
def test_images_give_no_temporal_parameter_a_gradient(modeling: str) -> None:
    recipe = recipe_of(text=TEXT, modeling=modeling)
    model, stage = shaken(recipe), stage_of("joint", recipe, l1=1.0, kl=1e-3)
    emb, mask = torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool)
    output = recipe.step(model, batch_of(footage(clips=2, frames=1), stage, (emb, mask)), stage, nn.ModuleDict())
    output.loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    resting = {name for name, _ in model.named_parameters() if stage.rests(name)}
    assert not reached & resting
    assert resting == {name for name, _ in model.named_parameters() if "temporal" in name}
    assert reached | resting == {name for name, _ in model.named_parameters()}
    assert set(output.terms) == {"l1", "kl"}


def test_the_parameters_named_as_unreached_are_there() -> None:
    assert set(UNREACHED) <= {name for name, _ in recipe_of().build(0).named_parameters()}


def test_every_parameter_learns_from_videos() -> None:
    recipe = recipe_of(text=TEXT, latent_channels=4)
    model, stage = shaken(recipe), stage_of("cross-modal", recipe, l1=1.0, kl=1e-3)
    captions = torch.randn(2, 3, 6), torch.tensor([[True, True, False], [False, False, False]])
    recipe.step(model, batch_of(footage(clips=2, frames=8), stage, captions), stage, nn.ModuleDict()).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["visual", "text"])
def test_text_does_not_depend_on_padding_or_neighbours(values: str) -> None:
    recipe = recipe_of(text=TEXT | {"values": values})
    model = shaken(recipe).eval()
    clip = footage(clips=2, frames=4)
    emb = torch.randn(2, 3, 6, generator=generator(0, 0, "test/text"))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    padded = torch.cat((emb, torch.full((2, 5, 6), torch.nan)), dim=1)
    longer = torch.cat((mask, torch.zeros(2, 5, dtype=torch.bool)), dim=1)
    with torch.no_grad():
        both = model(clip, None, emb, mask).pixels_B3THW
        torch.testing.assert_close(model(clip, None, padded, longer).pixels_B3THW, both, rtol=0, atol=1e-4)
        alone = model(clip[1:], None, emb[1:, :1], mask[1:, :1]).pixels_B3THW
        torch.testing.assert_close(alone, both[1:], rtol=0, atol=1e-4)
        other = model(clip, None, emb + 1, mask).pixels_B3THW
    assert (other - both).abs().max() > 1e-2, "the caption counts"


def test_a_missing_caption_is_the_null_token() -> None:
    recipe = recipe_of(text=TEXT)
    model = shaken(recipe).eval()
    clip, emb = footage(frames=4), torch.randn(1, 2, 6)
    with torch.no_grad():
        none = model(clip).pixels_B3THW
        silent = model(clip, None, emb, torch.zeros(1, 2, dtype=torch.bool)).pixels_B3THW
        null = model(clip, None, model.text.token_D.expand(1, 1, -1), torch.ones(1, 1, dtype=torch.bool)).pixels_B3THW
        said = model(clip, None, emb, torch.ones(1, 2, dtype=torch.bool)).pixels_B3THW
    torch.testing.assert_close(none, silent, rtol=0, atol=1e-4)
    torch.testing.assert_close(none, null, rtol=0, atol=1e-4)
    assert (none - said).abs().max() > 1e-2


def test_attention_by_hand() -> None:
    """One frame of two pixels, one head: both readings against sums written out."""
    for values in ("visual", "text"):
        spec = VideoVaePlusConfig.model_validate({"text": TEXT | {"values": values, "heads": 1}}).text
        layer = TextAttention(spec, channels=3, patch=1)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator(0, parameter.numel(), "test/hand")))
        x, emb = torch.randn(1, 3, 1, 1, 2), torch.randn(1, 2, 6)
        with torch.no_grad():
            found = layer(x, Text(emb, torch.ones(1, 2, dtype=torch.bool)))[0, :, 0, 0].T
            pixels = x[0, :, 0, 0].T
            tokens = layer.norm(pixels)
            query, key = layer.to_q(tokens), layer.to_k(emb[0])
            scores = query @ key.T / 2
            value = layer.to_v(tokens) if values == "visual" else layer.to_v(emb[0])
            if values == "visual":
                value = scores.T.softmax(1) @ value
            torch.testing.assert_close(found, pixels + layer.to_out(scores.softmax(1) @ value))


def test_patches_are_8_4_2_1_and_single_cells_in_time() -> None:
    with torch.device("meta"):
        model = VideoVaePlusRecipe(VideoVaePlusConfig(text={})).build(0)
    down = [[layer.attention.patch for layer in level.text] for level in model.encoder.down_blocks]
    up = [[layer.attention.patch for layer in level.text] for level in model.decoder.up_blocks]
    assert down == [[8] * 2, [4] * 2, [2] * 2, [1] * 2] and up == [[1] * 3, [2] * 3, [4] * 3, [8] * 3]
    levels = (*model.temporal_encoder.levels, *model.temporal_decoder.levels)
    assert {m.patch for level in levels for m in level.modules() if isinstance(m, TextAttention)} == {1}


def test_a_share_of_captions_is_dropped_by_place() -> None:
    recipe = recipe_of(text=TEXT | {"drop": 0.3})
    stage = stage_of("cross-modal", recipe)
    captions = torch.randn(200, 2, 6), torch.ones(200, 2, dtype=torch.bool)
    batch = batch_of(torch.zeros(200, 3, 1, 8, 8), stage, captions)
    _, mask = recipe._captions(batch)
    assert 40 < int((~mask.any(1)).sum()) < 80
    assert torch.equal(mask, recipe._captions(batch)[1])
    everyone = recipe_of(text=TEXT | {"drop": 0.0})._captions(batch)[1]
    assert everyone.all()


def test_captions_of_another_width_are_refused() -> None:
    recipe = recipe_of(text=TEXT)
    stage = stage_of("cross-modal", recipe)
    captions = torch.randn(1, 2, 5), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(InputError, match=r"embedded in 5 numbers a token, and model.text.width is 6\. Embed them by"):
        recipe.step(recipe.build(0), batch_of(footage(frames=4), stage, captions), stage, nn.ModuleDict())


def test_the_null_token_always_has_a_gradient() -> None:
    spec = VideoVaePlusConfig.model_validate({"text": TEXT}).text
    for captions in ((None, None), (torch.randn(2, 3, 6), torch.ones(2, 3, dtype=torch.bool))):
        null = NullToken(spec)
        text = null(2, *captions)
        text.emb_BLD.sum().backward()
        assert null.token_D.grad is not None
        assert text.mask_BL.any(1).all()


# -- losses ----------------------------------------------------------------------------------------------------------


def test_kl_is_of_the_innermost_latent_over_the_numbers_of_a_frame() -> None:
    recipe = recipe_of()
    model, stage = shaken(recipe), stage_of("video", recipe, l1=1.0, kl=1.0)
    for frames in (4, 1):
        batch = batch_of(footage(clips=2, frames=frames), stage)
        made = model(batch.pixels_BCTHW, recipe._noise(batch))
        found = losses.terms(made, batch.pixels_BCTHW, stage, nn.ModuleDict())
        assert made.posterior.mean.shape[2] == 1
        wanted = gaussian_kl(*made.posterior).mean() / (3 * 16 * 16)
        torch.testing.assert_close(found["kl"], wanted)
        output = recipe.step(model, batch, stage, nn.ModuleDict())
        torch.testing.assert_close(output.loss, found["l1"] + found["kl"])
        torch.testing.assert_close(output.reconstruction_loss(output.reconstruction_BCTHW), found["l1"])


def test_both_latents_are_sampled() -> None:
    recipe = recipe_of()
    model, stage = shaken(recipe), stage_of("video", recipe)
    batch = batch_of(footage(frames=4), stage)
    noise = recipe._noise(batch)
    assert {name: tuple(value.shape[1:]) for name, value in noise.items()} == {"z1": (4, 4, 2, 2), "z2": (4, 1, 2, 2)}
    with torch.no_grad():
        whole = model(batch.pixels_BCTHW, noise).pixels_B3THW
        for name in noise:
            quiet = model(batch.pixels_BCTHW, noise | {name: torch.zeros_like(noise[name])}).pixels_B3THW
            assert not torch.allclose(whole, quiet)


def test_faults_of_a_stage() -> None:
    recipe = recipe_of()
    stage = stage_of("video", recipe)
    said = list(recipe.check(stage.model_copy(update={"losses": {"lpips": 1.0, "dwt": 1.0}, "supervise": (1, 2)})))
    assert said[0].startswith("losses.dwt: 1.0: no such name") and said[1].startswith(
        "losses.lpips: 1.0: model.perceptual"
    )
    assert said[2].startswith("supervise: [1, 2]: every frame is supervised")
    clip = stage.clip.model_copy(update={"frames": 6})
    assert list(recipe.check(stage.model_copy(update={"clip": clip}))) == [
        "clip.frames: 6: a clip has 4 k frames, and an image one. Take 16, for example"
    ]
    images = stage.model_copy(update={"clip": stage.clip.model_copy(update={"frames": 1})})
    assert list(recipe.check(images)) == [
        "clip.frames: 1: an image reaches no temporal parameter. Add '*temporal*' to freeze"
    ]
    assert list(recipe.check(images.model_copy(update={"freeze": ("*temporal*",)}))) == []
    with pytest.raises(InputError, match="20 x 16 pixels: height and width must be multiples of 8"):
        recipe.latent(4, 20, 16)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temporal_kernel": (3, 2, 3)}, r"temporal_kernel is \[3, 2, 3\]; sizes are odd, and 2 is even"),
        ({"window": 6}, "window is 6; a window has 4 k frames"),
        ({"groups": 3}, "groups is 3, and 8 channels are no multiple of it"),
        ({"linear": "dct", "modeling": "simultaneous"}, "modeling: simultaneous does both at once"),
        ({"linear": "dct", "weights": {"source": "x"}}, "Leave out one of them"),
        ({"linear": "dct", "latent_channels": 200}, "a cell has 192 numbers"),
    ],
)
def test_faults_of_a_configuration(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe_of(**changes)


def test_option_2_keeps_an_inherited_autoencoder_as_it_is() -> None:
    recipe = VideoVaePlusRecipe(VideoVaePlusConfig(modeling="sequential", weights={"source": "x"}, text={}))
    video, joint, cross_modal = recipe.stages()
    assert joint.steps == 0
    for stage, name, moves in (
        (video, "encoder.conv_in.weight", False), (video, "temporal_encoder.conv_in.weight", True),
        (video, "encoder.down_blocks.0.text.0.attention.to_q.weight", False),
        (cross_modal, "encoder.down_blocks.0.text.0.attention.to_q.weight", True),
        (cross_modal, "decoder.conv_out.weight", False),
    ):  # fmt: skip
        assert stage.trains(name) == moves
    assert stages.TEMPORAL in recipe_of(modeling="sequential").stages()[1].image_freeze


# -- as a codec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "windows"), [(1, [1]), (8, [8]), (9, [8, 1]), (19, [8, 8, 3])])
@pytest.mark.parametrize("caption", [False, True])
def test_a_video_of_any_length_is_coded_in_windows(frames: int, windows: list[int], caption: bool) -> None:
    recipe = recipe_of(window=8, text=TEXT)
    model, clip = shaken(recipe).eval(), footage(frames=frames)
    emb = torch.randn(1, 2, 6, generator=generator(0, 0, "test/codec")) if caption else None
    coded = list(recipe.encode(model, clip.split(3, dim=2), emb))
    assert [int(latent["frames"]) for latent in coded] == windows
    spec = recipe.latent(frames, 16, 16)
    (name,) = spec.shapes
    numbers = sum(latent[name].numel() for latent in coded)
    assert numbers == spec.numbers_per_frame * frames
    made = torch.cat(list(recipe.decode(model, coded, emb)), dim=2)
    assert made.shape == clip.shape
    mask = None if emb is None else torch.ones(1, 2, dtype=torch.bool)
    with torch.no_grad():
        first = model(clip[:, :, : windows[0]], None, emb, mask).pixels_B3THW.clamp(-1, 1)
    torch.testing.assert_close(made[:, :, : windows[0]], first, rtol=0, atol=1e-5)


def test_the_codec_hands_the_caption_on() -> None:
    recipe = recipe_of(window=8, text=TEXT)
    codec, clip = Codec(recipe, shaken(recipe)), footage(frames=8)
    emb = torch.randn(1, 2, 6, generator=generator(0, 0, "test/codec"))
    with torch.no_grad():
        wanted = codec.model(clip, None, emb, torch.ones(1, 2, dtype=torch.bool)).pixels_B3THW.clamp(-1, 1)
    torch.testing.assert_close(codec.reconstruct(clip, emb), wanted, rtol=0, atol=1e-5)
    assert (codec.reconstruct(clip) - wanted).abs().max() > 1e-2


def test_encoding_holds_one_window_and_yields_early() -> None:
    recipe = recipe_of(window=8)
    model, asked = recipe.build(0).eval(), []

    def stream() -> Any:
        for at in range(40):
            asked.append(at)
            yield footage(frames=1, seed=at)

    for number, _ in enumerate(recipe.encode(model, stream())):
        assert len(asked) <= 8 * (number + 1) + 1


def test_pictures() -> None:
    views = recipe_of().pictures(shaken(recipe_of()).eval(), footage(frames=5))
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "reconstruction": (1, 3, 5, 16, 16), "as images": (1, 3, 5, 16, 16)
    }  # fmt: skip
    assert set(recipe_of().pictures(recipe_of().build(0), footage(frames=1))) == {"reconstruction"}


# -- the dry run -----------------------------------------------------------------------------------------------------


def test_dry_run_states_memory_by_part_and_what_recomputing_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {}
    for recompute, tokens in (("false", 1), ("false", plan.MOST_TOKENS), ("true", plan.MOST_TOKENS)):
        monkeypatch.setattr(plan, "MOST_TOKENS", tokens)
        sets = [f"model.recompute={recompute}", "model.weights.source=nowhere"]
        sets += ["model.width=8", "model.groups=8", "model.temporal_width=8", "model.text.width=16", "model.blocks=1"]
        sets += ["model.perceptual=null"]
        sets += [f"stages.{name}.losses.lpips=0" for name in ("video", "joint", "cross-modal")]
        facts = plan.dry_run(load_manifest(ROOT / "manifests/videovaeplus_16z_text_smoke.yaml", sets))
        (memory,) = facts["memory"]
        assert {"weights", "gradients", "optimizer", "partition", "adversary", "activations"} <= memory.keys()
        assert set(facts["parameters"]["by_part"]) == {
            "encoder", "decoder", "temporal_encoder", "temporal_decoder", "(text)"
        }  # fmt: skip
        kept[recompute, tokens] = memory["activations"]
    assert [row["clips"] for row in facts["batch"]["stages"]] == [3 * 2, 2 * 2 + 2 * 8, 2 * 2]
    console = Console(width=120, file=io.StringIO())
    plan.show(facts, console)
    for part in ("weights", "gradients", "optimizer", "partition", "adversary", "model states", "activations"):
        size = f"{memory[part.replace(' ', '_')] / 2**20:,.1f}"
        assert any(part in line and size in line for line in console.file.getvalue().splitlines()), part
    assert kept["true", 100] < 0.6 * kept["false", 100]
    # Two softmaxes over scores of 8 heads, 4 frames, 16 patches and 100 tokens, in each of at least 8 attentions.
    assert kept["false", 100] > kept["false", 1] + 2 * 8 * (8 * 4 * 16 * 99) * 4
