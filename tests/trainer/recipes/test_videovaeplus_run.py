"""VideoVAE+ in the loop, on two ranks: image batches between videos, what rests in them, resuming around them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import index
from pipelines.faults import FaultBudget
from tests.trainer.runs import Runs
from trainer import checkpoint, loop, run
from trainer import manifest as manifests
from trainer.checkpoint import Checkpoint

STEPS = {"video": 2, "joint": 4, "cross-modal": 2}
JOINT, CROSS, LAST = 2, 6, 8
IMAGES = (3, 5)
"""Steps of image batches."""


def captioned(source: Path, target: Path) -> Path:
    """The dataset with an embedding of a length of its own beside all clips but every third."""
    target.mkdir()
    for number, shard in enumerate(sorted(source.glob("*.tar"))):
        with tarfile.open(shard) as old, tarfile.open(target / shard.name, "w", format=tarfile.USTAR_FORMAT) as new:
            for at, member in enumerate(old):
                if (data := old.extractfile(member)) is None:
                    continue
                new.addfile(member, data)
                key, _, suffix = member.name.partition(".")
                if suffix == "mp4" and at % 3:
                    emb_LD = np.random.default_rng([number, at]).standard_normal((1 + at % 4, 6)).astype(np.float16)
                    buffer = io.BytesIO()
                    np.save(buffer, emb_LD)
                    info = tarfile.TarInfo(f"{key}.t5.npy")
                    info.size = len(buffer.getvalue())
                    new.addfile(info, io.BytesIO(buffer.getvalue()))
    index.index_dataset(str(target), name="captioned")
    return target


@pytest.fixture(scope="module")
def runs(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("videovaeplus")
    dataset = captioned(small_dataset, folder / "data")
    assert index.open_dataset(str(dataset)).caption_width == 6
    losses = {"l1": 1, "lpips": 0, "kl": 1e-6}
    adversary = {"network": {"width": 4, "layers": 2}}
    plain = {
        "name": "videovaeplus",
        "recipe": "videovaeplus",
        "model": {
            "latent_channels": 4, "width": 4, "multipliers": [1, 2, 2], "blocks": 1, "groups": 2, "temporal_width": 4,
            "text": {"width": 6, "heads": 1, "head_width": 4}, "recompute": True, "perceptual": None,
        },
        "data": {"train": str(dataset)},
        "batch": 3,
        "micro_batch": 1,
        "precision": "fp32",
        "ema": 0.9,
        "optimizer": {"lr": 1e-3, "warmup": 0},
        "clip": {"frames": 4, "stride": [1, 1], "sizes": [[16, 16]]},
        "stages": {
            "video": {"steps": STEPS["video"], "losses": losses, "adversary": adversary | {"start": 1}},
            "joint": {"steps": STEPS["joint"], "losses": losses, "adversary": adversary, "image_share": 0.5,
                      "image_batch": 4},
            "cross-modal": {"steps": STEPS["cross-modal"], "losses": losses, "adversary": adversary},
        },
        "checkpoint": {"every_steps": 1, "keep": LAST},
        "failure": {"hang_seconds": 60},
        "telemetry": {"log_every": 1, "tensorboard": False},
        "trace": True,
    }  # fmt: skip
    (folder / "videovaeplus.json").write_text(json.dumps(plain))
    return Runs(folder, folder / "videovaeplus.json")


def test_captions_that_the_model_cannot_read_or_that_are_not_there(runs: Runs, small_dataset: Path) -> None:
    dataset = str(runs.folder / "data")
    fits = manifests.load(runs.smoke)
    assert run.data_faults(fits) == [] and run.remarks(fits) == []
    (fault,) = run.data_faults(manifests.load(runs.smoke, ["model.text.width=8"]))
    assert fault.startswith(f"data.train.0.dataset: {dataset}: its captions are embedded in 6 numbers a token, and the "
                            "model reads 8. Embed them by its text encoder (moviola captions")  # fmt: skip
    (fault,) = run.data_faults(manifests.load(runs.smoke, ["model.text.width=8", f"data.train={small_dataset}",
                                                           f"data.eval={dataset}"]))  # fmt: skip
    assert fault.startswith("data.eval: ")
    silent = manifests.load(runs.smoke, [f"data.train={small_dataset}"])
    (remark,) = run.remarks(silent)
    assert "it learns its null token alone" in remark and run.data_faults(silent) == []


def test_captions_are_fetched_where_a_model_reads_them(runs: Runs) -> None:
    plain = json.loads(runs.smoke.read_text())
    plain["stages"].pop("cross-modal")
    deaf = manifests.validate({**plain, "model": {**plain["model"], "text": None}}, "m")
    for manifest in (manifests.load(runs.smoke), deaf):
        clips = loop.open_loader(manifest, loop.World(0, 1, torch.device("cpu")), FaultBudget())
        _, (batch, *_) = next(clips.iter_from(0))
        assert (batch.caption_emb_BLD is not None) == clips.captions == (manifest is not deaf)
        clips.close()
    assert run.data_faults(deaf) == [] and run.remarks(deaf) == []


@pytest.mark.parametrize("zero", [2, *(pytest.param(zero, marks=pytest.mark.nightly) for zero in (1, 3))])
def test_image_batches_leave_the_temporal_parts_alone(runs: Runs, zero: int) -> None:
    name = runs.whole(zero)
    weights = [checkpoint.load_weights(runs.at(name, step)) for step in range(1, LAST + 1)]
    names = set(weights[0])
    temporal, text = {n for n in names if "temporal" in n}, {n for n in names if "text." in n}
    for step in range(1, LAST):
        still = {n for n in names if torch.equal(weights[step - 1][n], weights[step][n])}
        assert (still & text == text) == (step < CROSS)
        assert (still >= temporal) == (step in IMAGES), step
        assert "encoder.conv_in.weight" not in still
    counts = {n: entry["step"] for n, entry in Checkpoint(runs.at(name, CROSS)).engines["model"]["parameters"].items()}
    assert counts["encoder.conv_in.weight"] == CROSS and counts["temporal_encoder.conv_in.weight"] == CROSS - 2
    assert counts["text.token_D"] is None


@pytest.mark.parametrize(
    ("zero", "step"),
    [
        (2, 3),
        pytest.param(3, 4, marks=pytest.mark.nightly),
        pytest.param(1, 4, marks=pytest.mark.nightly),
        pytest.param(3, CROSS, marks=pytest.mark.nightly),
    ],
)
def test_resuming_around_image_batches_is_bit_identical(runs: Runs, zero: int, step: int) -> None:
    name = runs.cut(f"cut-zero{zero}-{step}", runs.whole(zero), step)
    runs.train(name, 2, f"zero.stage={zero}")
    assert list(runs.losses(name, attempt=2)) == list(range(step, LAST))
    assert runs.losses(name) == runs.losses(runs.whole(zero))
    assert runs.fingerprint(name) == runs.fingerprint(runs.whole(zero))


@pytest.mark.nightly
def test_one_rank_without_recomputing_trains_the_same(runs: Runs) -> None:
    runs.train("alone", 1, "zero.stage=0", "model.recompute=false")
    for step, line in runs.losses(runs.whole(3)).items():
        for found, expected in zip(runs.losses("alone")[step], line, strict=True):
            assert found == pytest.approx(expected, rel=2e-3, abs=1e-5), step
