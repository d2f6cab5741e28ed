"""DeCo-VAE's phases and its late adversary in the loop, on two ranks: what is frozen, and resuming at the borders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.trainer.runs import Runs, until
from trainer import checkpoint
from trainer.checkpoint import Checkpoint

STEPS = {"motion": 1, "static": 2, "dynamic": 3}
STATIC, DYNAMIC, LAST = 1, 3, 6
START = 1
"""Step of stage dynamic at which the adversary starts."""


@pytest.fixture(scope="module")
def runs(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("decovae")
    backbone = {"low": 4, "high": 6, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1}
    weights = {"l1": 1, "lpips": 0, "kl": 1e-6, "dwt_low": 0.1, "dwt_high": 0.1}
    adversary = {"start": START, "network": {"width": 4, "layers": 2}, "adaptive": 10.0, "lecam": 0.1}
    plain = {
        "name": "decovae",
        "recipe": "decovae",
        "model": {"latent_channels": 2, "backbone": backbone, "motion": {"width": 4, "latent": 4}, "perceptual": None},
        "data": {"train": str(small_dataset)},
        "batch": 3,
        "micro_batch": 1,
        "precision": "fp32",
        "ema": 0.9,
        "optimizer": {"lr": 1e-3, "warmup": 0},
        "clip": {"frames": 5, "sizes": [[32, 32]]},
        "stages": {
            "motion": {"steps": STEPS["motion"]},
            "static": {"steps": STEPS["static"], "losses": weights},
            "dynamic": {"steps": STEPS["dynamic"], "losses": weights, "adversary": adversary},
        },
        "checkpoint": {"every_steps": 1, "keep": LAST},
        "failure": {"hang_seconds": 60},
        "telemetry": {"log_every": 1, "tensorboard": False},
    }
    (folder / "decovae.json").write_text(json.dumps(plain))
    return Runs(folder, folder / "decovae.json")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_frozen_parts_keep_every_bit_and_have_no_state(runs: Runs, zero: int) -> None:
    name = runs.whole(zero)
    frozen = {STATIC: "motion.", DYNAMIC: "encoder.keyframe."}
    for first, last in ((STATIC, DYNAMIC), (DYNAMIC, LAST)):
        before, after = (checkpoint.load_weights(runs.at(name, step)) for step in (first, last))
        still = {n for n in before if n.startswith(frozen[first])}
        assert still and {n for n in before if torch.equal(before[n], after[n])} == still
        parameters = Checkpoint(runs.at(name, last)).engines["model"]["parameters"]
        assert {n for n, entry in parameters.items() if entry["step"] is None} == still
    steps = {n: entry["step"] for n, entry in parameters.items()}
    assert steps["encoder.motion.mean.weight"] == 5 and steps["motion.encoder.0.weight"] == 3, "carried on, and afresh"


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_adversary_is_late_and_in_the_checkpoint(runs: Runs, zero: int) -> None:
    name = runs.whole(zero)
    assert runs.fingerprint(name)["adversary"] is not None
    assert "adversary" not in Checkpoint(runs.at(name, DYNAMIC)).engines
    waiting, playing = DYNAMIC + START, DYNAMIC + START + 1
    fresh, moved, last = (
        checkpoint.load_weights(runs.at(name, s), engine="adversary") for s in (waiting, playing, LAST)
    )
    assert fresh["steps"] == 0 and moved["steps"] == 1 and last["steps"] == 2
    assert all(not torch.equal(fresh[n], moved[n]) for n in fresh if n.endswith("weight"))
    terms = {step: set(line[1]) for step, line in runs.losses(name).items()}
    assert "adversary" not in terms[DYNAMIC] and {"adversary", "discriminator"} <= terms[LAST - 1]
    assert "lecam" in terms[LAST - 1] and "lecam" not in terms[LAST - 2], "its means are known from the second step on"
    weight = [runs.losses(name)[step][2]["adversary_weight"] for step in (LAST - 2, LAST - 1)]
    assert weight[0] == 0 and weight[1] == pytest.approx(0.2 * float(moved["ratio"]), rel=1e-6)
    assert weight[1] > 0


@pytest.mark.parametrize(
    ("zero", "step"),
    [
        *((1, step) for step in (DYNAMIC - 1, DYNAMIC, LAST - 1)),
        (2, DYNAMIC),
        *((3, step) for step in (DYNAMIC - 1, LAST - 1)),
        *(pytest.param(*case, marks=pytest.mark.nightly) for case in ((2, DYNAMIC - 1), (2, LAST - 1), (3, DYNAMIC))),
    ],
)
def test_resuming_around_the_border_and_the_adversarys_start_is_bit_identical(runs: Runs, zero: int, step: int) -> None:
    name = runs.cut(f"cut-zero{zero}-{step}", runs.whole(zero), step)
    runs.train(name, 2, f"zero.stage={zero}")
    assert list(runs.losses(name, attempt=2)) == list(range(step, LAST))
    assert runs.losses(name) == runs.losses(runs.whole(zero))
    assert runs.fingerprint(name) == runs.fingerprint(runs.whole(zero))


@pytest.mark.nightly
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_processes_then_one_then_two_with_an_adversary(runs: Runs, zero: int) -> None:
    fixed, shrunk, grown = runs.whole(zero), f"shrunk-zero{zero}", f"grown-zero{zero}"
    runs.cut(shrunk, fixed, DYNAMIC)
    with runs.start(shrunk, 1, f"zero.stage={zero}") as group:
        until(lambda: (checkpoint.newest_step(runs.url(shrunk)) or 0) >= LAST - 1, group)
    runs.cut(grown, shrunk, LAST - 1)
    runs.train(grown, 2, f"zero.stage={zero}")
    worlds = {line["step"]: line["world"] for line in runs.lines(grown)}
    assert [worlds[step] for step in range(LAST)] == [2] * DYNAMIC + [1] * (LAST - 1 - DYNAMIC) + [2]
    for step, line in runs.losses(grown).items():
        for found, expected in zip(line, runs.losses(fixed)[step], strict=True):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6), f"step {step}"
    for engine, average in (("model", True), ("adversary", False)):
        found, expected = (checkpoint.load_weights(runs.url(n), average, engine) for n in (grown, fixed))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)


def test_at_another_world_size_the_adversary_goes_on(runs: Runs) -> None:
    name = runs.cut("alone", runs.whole(3), LAST - 1)
    runs.train(name, 1, "zero.stage=3")
    for found, expected in zip(runs.losses(name)[LAST - 1], runs.losses(runs.whole(3))[LAST - 1], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    found, expected = (checkpoint.load_weights(runs.url(n), engine="adversary") for n in (name, runs.whole(3)))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-5)
