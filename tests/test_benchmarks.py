"""What benchmarks reckon with, on models of no size."""

import os

import pytest
import torch

from benchmarks import keyframes, step
from trainer import manifest as manifests


@pytest.fixture(scope="module")
def manifest():
    backbone = {"low": 4, "high": 6, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1}
    weights = {"l1": 1, "lpips": 0, "kl": 0, "dwt_low": 0, "dwt_high": 0}
    adversary = {"start": 1, "network": {"width": 4, "layers": 2}}
    plain = {
        "name": "small",
        "recipe": "decovae",
        "model": {"latent_channels": 2, "backbone": backbone, "motion": {"width": 4, "latent": 4}, "perceptual": None},
        "data": {"train": "nowhere"},
        "batch": 3,
        "precision": "fp32",
        "clip": {"frames": 5, "sizes": [[32, 32]]},
        "stages": {
            "motion": {"steps": 4},
            "static": {"steps": 0},
            "dynamic": {"steps": 10, "batch": 2, "losses": weights, "adversary": adversary},
        },
    }
    return manifests.validate(plain, "m")


def test_a_stage_is_measured_before_its_adversary_starts_and_after(manifest):
    parts = step.parts_of(manifest)
    assert [(p.title, p.steps, p.plan.clips) for p in parts] == [
        ("motion", 4, 3),
        ("dynamic", 1, 2),
        ("dynamic, adversary", 9, 2),
    ]
    found = [step.measure(manifest, part, ["float32"], 1, 0, 2, torch.device("cpu")) for part in parts]
    spent = [min(s["adversary"] for s in f["times"]["float32"]) for f in found]
    assert spent[2] > 10 * spent[1], "without it there is nothing to do"
    assert found[2]["operations"] > found[1]["operations"] > found[0]["operations"] > 0
    shares = found[1]["parts"]
    assert shares["encoder"] > shares["motion"] > 0, "its three encoders lie in a dictionary, which is never called"
    assert sum(shares.values()) == pytest.approx(1)
    assert found[0]["parts"].keys() == {"motion", "the rest"}


def test_images_and_sizes_are_measured_apart_and_captions_are_read():
    small = {"latent_channels": 4, "width": 4, "multipliers": [1, 2], "blocks": 1, "groups": 2, "temporal_width": 4}
    weights = {"l1": 1, "lpips": 0, "kl": 0}
    plain = {
        "name": "joint",
        "recipe": "videovaeplus",
        "model": {**small, "text": {"width": 8, "heads": 1, "head_width": 4}, "perceptual": None},
        "data": {"train": "nowhere"},
        "batch": 2,
        "precision": "fp32",
        "clip": {"frames": 4, "stride": [1, 1], "sizes": [[16, 16], [16, 32]]},
        "stages": {
            "video": {"steps": 0},
            "joint": {"steps": 20, "image_batch": 8, "losses": weights, "adversary": None},
            "cross-modal": {"steps": 0},
        },
    }
    manifest = manifests.validate(plain, "m")
    parts = {part.title: part for part in step.parts_of(manifest)}
    names = {f"joint, {size}{images}" for size in ("16x16", "16x32") for images in ("", ", images")}
    assert parts.keys() == names
    assert sum(part.steps for part in parts.values()) == 20
    assert sum(part.steps for name, part in parts.items() if "images" in name) == 4
    trial = step.Trial(manifest, parts["joint, 16x32, images"], "float32", 2, torch.device("cpu"))
    assert trial.batch.pixels_BCTHW.shape == (8, 3, 1, 16, 32)
    before = {name: weight.detach().clone() for name, weight in trial.engine.module.named_parameters()}
    trial.step()
    moved = {name for name, weight in trial.engine.module.named_parameters() if not torch.equal(weight, before[name])}
    assert "encoder.conv_in.weight" in moved and not any("temporal" in name for name in moved)
    trial.close()
    trial = step.Trial(manifest, parts["joint, 16x16"], "float32", 1, torch.device("cpu"))
    assert trial.batch.pixels_BCTHW.shape == (1, 3, 4, 16, 16)
    assert trial.batch.caption_emb_BLD.shape == (1, 100, 8) and bool(trial.batch.caption_mask_BL.all())
    trial.close()


def test_a_process_that_comes_to_no_end_leaves_a_dash(monkeypatch, capfd):
    monkeypatch.setattr(step, "memory", os.strerror)  # takes one argument, and is told seven
    assert step.peak_memory("m.yaml", [], "motion", "float32", 1, torch.device("cpu")) == "-"
    assert "TypeError" in capfd.readouterr().err


def test_a_gain_is_over_the_line_between_two_fixed_lengths():
    curve = [keyframes.Coded(numbers, psnr_db, 0, 0) for numbers, psnr_db in ((100, 30), (300, 34), (200, 31))]
    assert keyframes.at_budget(curve, 150) == pytest.approx(30.5)
    assert keyframes.at_budget(curve, 250) == pytest.approx(32.5)
    assert keyframes.at_budget(curve, 99) is None


def test_seams_lie_where_windows_meet():
    def window(frames, shared):
        return {"frames": torch.tensor([frames]), "shared": torch.tensor([shared])}

    assert keyframes.seams_of([window(17, 0), window(9, 1), window(4, 0)]) == {16, 17, 25}
