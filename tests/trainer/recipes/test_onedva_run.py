"""One-DVA in the loop on two ranks: stages, clips of two sizes, the same noise wherever a run resumes, its codec."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from pipelines.faults import InputError
from tests.trainer.recipes.test_onedva import SMALL, footage
from tests.trainer.runs import Runs
from trainer import checkpoint, codec, latents, run
from trainer import footage as videos
from trainer.checkpoint import Checkpoint

STEPS = {"structural": 2, "adaptive": 3}
BORDER, LAST = STEPS["structural"], sum(STEPS.values())
SIZES = ((32, 32), (24, 48))
SEQUENCE = {"encoder.queries_KC", "encoder.to_1d.weight", "encoder.to_1d.bias", "decoder.from_1d.weight",
            "decoder.from_1d.bias", "decoder.mask_C", "decoder.places_KC"}  # fmt: skip


@pytest.fixture(scope="module")
def runs(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("onedva")
    weights = {"flow": 1, "kl": 1e-5, "repa": 0, "lpips": 0}
    plain = {
        "name": "onedva",
        "recipe": "onedva",
        "model": SMALL,
        "data": {"train": str(small_dataset)},
        "batch": 3,
        "micro_batch": 1,
        "precision": "fp32",
        "ema": 0.9,
        "seed": 8,
        "clip": {"frames": 5, "sizes": SIZES},
        "stages": {
            "structural": {"steps": STEPS["structural"], "losses": weights, "optimizer": {"lr": 1e-3}},
            "adaptive": {"steps": STEPS["adaptive"], "losses": weights, "optimizer": {"lr": 1e-3}},
        },
        "checkpoint": {"every_steps": 1, "keep": LAST},
        "failure": {"hang_seconds": 60},
        "telemetry": {"log_every": 1, "tensorboard": False},
    }
    (folder / "onedva.json").write_text(json.dumps(plain))
    return Runs(folder, folder / "onedva.json")


def test_the_first_stage_leaves_1d_latents_alone_and_the_second_reads_them(runs: Runs) -> None:
    name = runs.whole(1)
    built = run.open_model(runs.at(name, BORDER), ema=False)
    fresh = built.recipe.build(8).state_dict()
    middle, end = (checkpoint.load_weights(runs.at(name, step)) for step in (BORDER, LAST))
    assert all(torch.equal(fresh[n], middle[n]) for n in SEQUENCE)
    assert not torch.equal(fresh["encoder.to_structural.weight"], middle["encoder.to_structural.weight"])
    assert all(not torch.equal(middle[n], end[n]) for n in SEQUENCE if n.startswith("encoder."))
    assert (int(middle["readable"]), int(end["readable"])) == (0, SMALL["queries"])
    steps = {n: e["step"] for n, e in Checkpoint(runs.at(name, LAST)).engines["model"]["parameters"].items()}
    assert steps["encoder.to_structural.weight"] == LAST, "goes on over the border with its moments"
    assert steps["encoder.to_1d.weight"] == STEPS["adaptive"]


def test_clips_of_a_step_have_one_size_and_both_sizes_come(runs: Runs) -> None:
    schedule = run.load(runs.url(runs.whole(1))).schedule
    assert {schedule.plan(step).size for step in range(LAST)} == set(SIZES)


@pytest.mark.parametrize(("zero", "step"), [(1, BORDER - 1), (1, BORDER), (3, LAST - 1)])
def test_resuming_sees_the_same_sizes_and_noise(runs: Runs, zero: int, step: int) -> None:
    name = runs.cut(f"cut-zero{zero}-{step}", runs.whole(zero), step)
    runs.train(name, 2, f"zero.stage={zero}")
    assert list(runs.losses(name, attempt=2)) == list(range(step, LAST))
    assert runs.losses(name) == runs.losses(runs.whole(zero))
    assert runs.fingerprint(name) == runs.fingerprint(runs.whole(zero))


def test_another_world_size_sees_the_same_sizes_and_noise(runs: Runs) -> None:
    name = runs.cut("alone", runs.whole(3), BORDER)
    runs.train(name, 1, "zero.stage=3")
    for step in range(BORDER, LAST):
        for found, expected in zip(runs.losses(name)[step], runs.losses(runs.whole(3))[step], strict=True):
            assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)
        time, length = (runs.losses(name)[step][2][key] for key in ("time", "length"))
        assert (time, length) == pytest.approx(
            tuple(runs.losses(runs.whole(3))[step][2][key] for key in ("time", "length")), rel=1e-7
        ), "what is drawn does not depend on how many draw it"


def test_what_was_kept_is_stored_and_comes_back(runs: Runs, tmp_path: Path) -> None:
    source, size = runs.url(runs.whole(1)), (36, 52)
    with videos.writer(str(tmp_path / "in.mp4"), Fraction(12), *size) as made:
        made.add(footage(1, 12, *size, drift=0))
    budget = ["model.length.by=budget", "model.length.numbers_per_frame=34"]
    for name, sets, kept in (
        ("motion", [], [2, 2]),
        ("budget", budget, [6, 0]),
        ("all", ["model.length.by=all"], [6, 6]),
    ):
        file = str(tmp_path / f"{name}.safetensors")
        coded = codec.encode_file(codec.load(source, sets=sets), str(tmp_path / "in.mp4"), file)
        with latents.opened(file) as (_, stream):
            steps = list(stream)
        assert [step["1d"].shape[-1] for step in steps] == kept
        assert coded.numbers == sum(step["structural"].numel() + step["1d"].numel() for step in steps)
        back = codec.decode_file(codec.load(source), file, str(tmp_path / f"{name}.mp4"))
        assert (back.frames, back.numbers, back.height, back.width) == (12, coded.numbers, *size)
    codec.export(codec.load(source), str(tmp_path / "export"))
    exported = codec.load(str(tmp_path / "export"), sets=["model.length.by=all"])
    assert int(exported.model.readable) == SMALL["queries"] and exported.recipe.config.length.by == "all"


def test_only_what_changes_no_weights_may_be_set(runs: Runs) -> None:
    source = runs.url(runs.whole(1))
    with pytest.raises(InputError, match=r"takes only what changes no weights; of recipe onedva that is model\.length, "
                                         r"model\.sampling"):  # fmt: skip
        codec.load(source, sets=["model.queries=7"])
    with pytest.raises(InputError, match=r'model\.length\.by: "size": input should be'):
        codec.load(source, sets=["model.length.by=size"])
