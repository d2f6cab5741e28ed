"""From a codec to a latent diffusion model and back, through the real loop: trained on latents that were encoded from
footage, resumed, sampled; then One-DVA's decoder trained on what it predicts.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from cluster.cli import app
from pipelines.contracts import LatentLayout
from pipelines.faults import InputError
from tests.trainer.runs import Runs
from trainer import checkpoint, examine, plan, run, sampling
from trainer import codec as codecs
from trainer import manifest as manifests
from trainer.encoding import encode_dataset, window
from trainer.trace import history

FRAMES, SIZE = 5, (32, 32)
STEPS = 4
ONEDVA = {
    "latent_channels": 4,
    "queries": 6,
    "encoder": {"width": 24, "layers": 1, "heads": 2},
    "decoder": {"width": 24, "layers": 1, "heads": 2, "pixel_channels": 3},
    "window": FRAMES,
    "length": {"by": "motion", "every": 2},
    "sampling": {"steps": 2},
    "repa": None,
    "perceptual": None,
}
COMMON = {
    "batch": 4,
    "micro_batch": 1,
    "precision": "fp32",
    "optimizer": {"lr": 1e-3},
    "failure": {"hang_seconds": 60},
    "telemetry": {"log_every": 1, "tensorboard": False},
    "trace": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latents")


def runs_of(folder: Path, name: str, **plain: object) -> Runs:
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**COMMON, "name": name, "checkpoint": {"every_steps": 1, "keep": 9}, **plain}))
    return Runs(folder, path)


@pytest.fixture(scope="module")
def codec(folder: Path, small_dataset: Path) -> Runs:
    """One-DVA, both stages of it, a step each."""
    runs = runs_of(
        folder, "onedva", recipe="onedva", model=ONEDVA, data={"train": str(small_dataset)}, ema=0.5,
        clip={"frames": FRAMES, "sizes": [list(SIZE)]},
        stages={"structural": {"steps": 1, "losses": {"flow": 1, "kl": 1e-6, "repa": 0, "lpips": 0}},
                "adaptive": {"steps": 1, "losses": {"flow": 1, "kl": 1e-6, "repa": 0, "lpips": 0, "align": 0.1}}},
    )  # fmt: skip
    runs.train("onedva", 1)
    return runs


@pytest.fixture(scope="module")
def latents(folder: Path, codec: Runs, small_dataset: Path) -> Path:
    """The small dataset in One-DVA's latents."""
    url = codec.url("onedva")
    assert window(url, None, None) == (FRAMES, SIZE)
    encode_dataset(codecs.load(url), str(small_dataset), str(folder / "encoded"), FRAMES, SIZE)
    return folder / "encoded"


@pytest.fixture(scope="module")
def dit(folder: Path, latents: Path) -> Runs:
    """The diffusion model, trained on two ranks."""
    runs = runs_of(
        folder, "dit", recipe="latentdit", model={"width": 24, "depth": 1, "heads": 2, "steps": 3},
        data={"train": str(latents)}, ema=0.5, stages={"flow": {"steps": STEPS, "batch": 4}},
    )  # fmt: skip
    runs.train("dit", 2, "zero.stage=3")
    return runs


def test_the_latents_have_lengths_of_their_own(latents: Path) -> None:
    card = json.loads((latents / "index.json").read_text())["card"]
    assert card["counts"]["clips"] == 12 * 3
    tensors = card["latents"]["tensors"]
    assert set(tensors) == {"structural", "1d"} and tensors["1d"]["tokens"] == [6]
    assert sum(tensors["1d"]["lengths"].values()) == 36 and not tensors["structural"]["lengths"]
    assert card["latents"]["constants"] == {"00000000.frames": [5], "00000000.size": [32, 32]}


def test_the_run_knows_its_latents_by_itself(dit: Runs, latents: Path) -> None:
    stored = yaml.safe_load(Path(dit.url("dit"), "manifest.yaml").read_text())
    layout = json.loads((latents / "index.json").read_text())["card"]["latents"]
    assert LatentLayout.model_validate(stored["model"]["latents"]) == LatentLayout.model_validate(layout)
    facts = plan.dry_run(manifests.load(dit.smoke))
    assert facts["latent"]["shape"] == {"structural": [4, 2, 2, 2], "1d": [4, 6]}
    assert facts["memory"][0]["activations"] > 0 and facts["data"]["clips_stored"] == 36


def test_a_model_that_does_not_fit_its_latents_is_a_fault_of_the_manifest(dit: Runs) -> None:
    with pytest.raises(
        InputError, match=r"model: \{.*\}: patch is 3; it does not divide the 2 x 2 x 2 cells of latent"
    ):
        manifests.load(dit.smoke, ["model.patch=3"])
    with pytest.raises(
        InputError, match=r"2 faults(.|\n)*batch: 0: (.|\n)*model: .* latents of 3 token axes need heads"
    ):
        manifests.load(dit.smoke, ["model.heads=6", "batch=0"])


@pytest.mark.parametrize(("world", "zero"), [(2, 3), (1, 1)])
def test_it_goes_on_from_a_checkpoint_at_any_world_size(dit: Runs, world: int, zero: int) -> None:
    name = dit.cut(f"again-{world}", "dit", 2)
    dit.train(name, world, f"zero.stage={zero}")
    whole, again = dit.losses("dit"), dit.losses(name)
    assert set(whole) == set(again) == set(range(STEPS))
    if world == 2:
        assert again == whole and dit.fingerprint(name) == dit.fingerprint("dit")
    for step in range(STEPS):
        assert again[step][0] == pytest.approx(whole[step][0], rel=1e-4)
    schedule = manifests.load(dit.smoke).schedule
    first, second = (history(dit.url(n), schedule, STEPS) for n in ("dit", name))
    assert first.exact and second.exact and first.keys == second.keys


def test_samples_need_the_checkpoint_and_the_codec_alone(dit: Runs, codec: Runs, latents: Path, tmp_path: Path) -> None:
    away = latents.rename(latents.with_name("away"))
    try:
        model, decoder = sampling.load(dit.url("dit")), codecs.load(codec.url("onedva"))
        made = sampling.draw(model, decoder, str(tmp_path / "a"), count=2, seed=1)
        sampling.draw(model, decoder, str(tmp_path / "b.mp4"), seed=1)
    finally:
        away.rename(latents)
    assert len(made) == 3
    assert (tmp_path / "a" / "sample-00000.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a" / "sample-00001.mp4").read_bytes() != (tmp_path / "b.mp4").read_bytes()


def test_the_commands(dit: Runs, latents: Path, small_dataset: Path, tmp_path: Path) -> None:
    def moviola(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--runs", str(dit.folder)])

    before = (latents / "index.json").stat().st_mtime_ns
    again = moviola("encode", "onedva", "--dataset", str(small_dataset), str(latents), "--json")
    assert json.loads(again.stdout)["samples"] == 36 and (latents / "index.json").stat().st_mtime_ns == before
    made = moviola("sample", "dit", str(tmp_path / "s"), "--codec", "onedva", "--count", "2", "--steps", "1", "--json")
    assert len(json.loads(made.stdout)["videos"]) == 3
    for arguments, said in (
        (("encode", "onedva", "in.mp4"), "encode CHECKPOINT VIDEO OUT.safetensors takes two paths; here are 1"),
        (("encode", "onedva", "in.mp4", "out", "--dataset", "d"), "encode CHECKPOINT --dataset DATASET DEST takes one"),
        (("encode", "onedva", "in.mp4", "out", "--frames", "5"), "--frames and --size belong to --dataset"),
        (("encode", "dit", "--dataset", str(small_dataset), str(tmp_path / "x")), "dit is a latent diffusion model"),
        (("export", "dit", str(tmp_path / "x")), "dit is a latent diffusion model"),
        (("sample", "onedva", str(tmp_path / "x"), "--codec", "onedva"), "samples are drawn from a latent"),
    ):
        found = moviola(*arguments)
        assert isinstance(found.exception, InputError) and said in str(found.exception), found.output


def test_what_needs_a_codec_refuses_it(dit: Runs, codec: Runs, latents: Path, small_dataset: Path) -> None:
    url, said = dit.url("dit"), r"dit is a latent diffusion model \(recipe latentdit\): it makes latents, and neither"
    with pytest.raises(InputError, match=said):
        codecs.load(url)
    with pytest.raises(InputError, match=said):
        examine.evaluate_checkpoint(url, str(small_dataset))
    with pytest.raises(InputError, match="holds latents, and a codec is measured on videos"):
        examine.evaluate_checkpoint(codec.url("onedva"), str(latents))
    with pytest.raises(InputError, match=r"onedva is a codec \(recipe onedva\), and samples are drawn from a latent"):
        sampling.load(codec.url("onedva"))
    wrong = dit.train("evaluated", 1, f"data.eval={small_dataset}", status=2)
    assert "recipe latentdit decodes no videos, so nothing can be evaluated" in wrong
    wrong = dit.train("pixels", 1, f"data.train={small_dataset}", status=1)
    assert "it holds videos, and recipe latentdit trains on latents. Encode it first: moviola encode" in wrong
    wrong = codec.train("blurred", 1, f"data.train={latents}", status=1)
    assert "it holds latents, and recipe onedva trains on videos" in wrong
    wrong = dit.train("absent", 1, "data.train=nowhere", status=1)
    assert "nowhere is not there; check the URL" in wrong and "Traceback" not in wrong


@pytest.fixture(scope="module")
def post(folder: Path, codec: Runs, dit: Runs, small_dataset: Path) -> Runs:
    """Post-training: another run, from One-DVA's weights, on latents that the diffusion model predicts."""
    plain = json.loads(codec.smoke.read_text())
    stages = {
        "structural": {"steps": 0},
        "adaptive": {"steps": 0},
        "post": {"steps": 3, "init_from": codec.url("onedva"), "losses": {"flow": 1, "lpips": 0}},
    }
    plain |= {"stages": stages, "teachers": {"predictor": dit.url("dit")}}
    runs = runs_of(folder, "post", **{key: value for key, value in plain.items() if key != "name"})
    runs.train("post", 2, "zero.stage=2")
    return runs


def test_post_training_moves_the_decoder_alone(post: Runs, codec: Runs) -> None:
    before = checkpoint.load_weights(codec.url("onedva"), ema=True)
    after = checkpoint.load_weights(post.url("post"))
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"decoder"}
    stored = yaml.safe_load(Path(post.url("post"), "manifest.yaml").read_text())
    assert stored["teachers"] == {}
    assert re.fullmatch(r".*/dit/checkpoints/step-0000000\d", stored["stages"]["post"]["teachers"]["predictor"])
    assert codecs.load(post.url("post")).digest() != codecs.load(codec.url("onedva")).digest()


@pytest.mark.nightly
def test_the_predictor_counts(post: Runs, dit: Runs) -> None:
    """The same run with another predictor, that of step 1, has other weights at the end."""
    other = f"{dit.url('dit')}/checkpoints/step-00000001"
    post.train("other", 2, f"teachers.predictor={other}", "zero.stage=2")
    assert set(post.losses("other")) == set(post.losses("post"))
    assert post.fingerprint("other")["weights"] != post.fingerprint("post")["weights"]
    wanted = manifests.load(post.smoke)
    same = run.models_of(wanted.loaded_recipe, wanted.schedule.stages[0])["predictor"]
    assert not same.training and not any(p.requires_grad for p in same.parameters())


def test_a_predictor_of_other_weights_latents_is_said(post: Runs, codec: Runs) -> None:
    stage = run.load(post.url("post")).schedule.stages[0]
    assert run.strangers(stage, checkpoint.load_weights(codec.url("onedva"), ema=True)) == []
    assert not [line for line in post.lines("post", "events") if line["event"] == "warning"]
    said = (
        r"stages.post.teachers.predictor: its latents were encoded by other weights \(\w{12}\) than those of init_from"
    )
    (told,) = run.strangers(stage, checkpoint.load_weights(codec.url("onedva"), ema=False))
    assert re.match(said, told)


@pytest.mark.nightly
def test_a_run_says_so_when_it_starts_from_other_weights(post: Runs, codec: Runs) -> None:
    post.train("strange", 1, f"stages.post.init_from={codec.url('onedva')}/checkpoints/step-00000001")
    (told,) = (line["message"] for line in post.lines("strange", "events") if line["event"] == "warning")
    assert told.startswith("stages.post.teachers.predictor: its latents were encoded by other weights")


def test_post_training_goes_on_bit_identical(post: Runs) -> None:
    name = post.cut("post-again", "post", 1)
    post.train(name, 2, "zero.stage=2")
    assert post.losses(name) == post.losses("post") and post.fingerprint(name) == post.fingerprint("post")


def test_teachers_that_are_missing_or_of_no_use_are_said(post: Runs, codec: Runs, tmp_path: Path) -> None:
    said = post.train("lost", 1, f"teachers.predictor={tmp_path}/absent", status=2)
    assert f"stages.post.teachers.predictor: {tmp_path}/absent holds no committed checkpoint" in said
    assert "Traceback" not in said
    said = post.train("none", 1, "teachers={}", status=2)
    assert "stages.post.teachers.predictor: missing, and this stage trains on predicted latents" in said
    said = codec.train("odd", 1, f"stages.adaptive.teachers.predictor={tmp_path}", status=2)
    assert "stages.adaptive.teachers.predictor:" in said and "no such name (this recipe has none)" in said
    shutil.copytree(post.folder / "post", post.folder / "orphan")
    plain = yaml.safe_load(Path(post.url("orphan"), "manifest.yaml").read_text())
    plain["stages"]["post"]["teachers"]["predictor"] = f"{tmp_path}/gone/checkpoints/step-00000001"
    gone = manifests.validate(plain, "m")
    with pytest.raises(InputError, match=r"stages.post.teachers.predictor: no run at .*gone"):
        run.models_of(gone.loaded_recipe, gone.schedule.stages[0])


def test_a_predictor_of_other_clips_is_refused_before_a_step(post: Runs) -> None:
    wide = manifests.load(post.smoke, ["clip.sizes=[[32, 32], [32, 56]]"])
    said = (
        r"stages.post.teachers.predictor: its latents are of 5 frames of 32 x 32 pixels \(latent 'structural' "
        r"4x2x2x2\), and the stage has clips of 5 frames of 32 x 56. Set stages.post.clip to \{frames: 5, "
    )
    (fault,) = run.data_faults(wide)
    assert re.match(said, fault)
    with pytest.raises(InputError, match=said):
        run.models_of(wide.loaded_recipe, wide.schedule.stages[0])
    facts = plan.dry_run(wide)
    assert facts["memory"][0]["activations"] is None and re.match(said, facts["memory"][0]["why"])
    assert run.data_faults(manifests.load(post.smoke)) == []
