"""The published 16-channel VideoVAE+ at full width: steps on two ranks, and its checkpoint on one and on two again.

Minutes of CPU, 20 GB of free memory and 20 GB of disk.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.contracts import Batch, BatchPlan, Source
from tests.trainer.ranks import on_ranks
from trainer import checkpoint
from trainer.checkpoint import Checkpoint, Checkpointer, Lease
from trainer.engine import Engine
from trainer.recipe import counted
from trainer.recipes.videovaeplus.config import VideoVaePlusConfig
from trainer.recipes.videovaeplus.recipe import VideoVaePlusRecipe
from trainer.stage import OptimizerSpec, Stage

FRAMES, SIDE = 4, 16
SPEC = OptimizerSpec(name="adam", lr=1e-4, betas=(0.5, 0.9))


def published() -> tuple[VideoVaePlusRecipe, Stage]:
    recipe = VideoVaePlusRecipe(VideoVaePlusConfig(recompute=True, perceptual=None))
    stage = next(stage for stage in recipe.stages() if stage.name == "joint")
    return recipe, stage.model_copy(update={"losses": {"l1": 1.0, "kl": 1e-6}})


def batch_of(place: int, frames: int, stage: Stage) -> Batch:
    rule = stage.clip.model_copy(update={"frames": frames})
    plan = BatchPlan(0, stage.name, 0, 2, "video" if frames > 1 else "image", 0, (SIDE, SIDE), rule)
    ramp = torch.linspace(-1, 1, SIDE) * torch.linspace(-1, 1, SIDE)[:, None]
    pixels = torch.stack([ramp.roll(at + place, 1) for at in range(frames)]).expand(1, 3, -1, -1, -1).contiguous()
    return Batch(pixels, torch.ones(1), torch.zeros(1), (place,), (Source("d", "s", "k"),), plan, 0.5, 0)


def trained(rank: int, world: int, root: str) -> dict[str, Any]:
    """A step on a clip and one on an image, under ZeRO-3; then a checkpoint."""
    torch.set_num_threads(1)
    recipe, stage = published()
    model = recipe.build(0)
    parameters = counted(recipe.parts(model))
    engine = Engine(model, stage, SPEC, zero_stage=3, timeout=600)
    norms, losses, seconds = [], [], []
    for frames in (FRAMES, 1):
        began = time.perf_counter()
        output = recipe.step(engine.model, batch_of(rank, frames, stage), stage, torch.nn.ModuleDict())
        engine.backward(output.loss * 0.5)
        norms.append(engine.step(SPEC.lr, image=frames == 1))
        losses.append(float(output.loss.detach()))
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    saver = Checkpointer(f"{root}/two", Lease.take(f"{root}/two"), rank=rank, world=world, timeout=600)
    saver.save(2, {"model": engine}, {"step": 2})
    saver.close()
    seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"parameters": parameters, "norms": norms, "losses": losses, "seconds": seconds, "peak": peak}


def resharded(rank: int, world: int, root: str, source: str, to: str, zero_stage: int) -> dict[str, Any]:
    """A checkpoint, read on this world and saved again, untouched."""
    torch.set_num_threads(1)
    recipe, stage = published()
    engine = Engine(recipe.build(1), stage, SPEC, zero_stage=zero_stage, timeout=600)
    began = time.perf_counter()
    reader = Checkpoint(f"{root}/{source}/checkpoints/step-00000002")
    assert reader.restore({"model": engine}, print)
    seconds = [time.perf_counter() - began]
    target = f"{root}/{to}"
    saver = Checkpointer(target, Lease.take(target), rank=rank, world=world, timeout=600)
    saver.save(2, {"model": engine}, reader.state)
    saver.close()
    seconds.append(time.perf_counter() - began - seconds[0])
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_full_width_trains_saves_loads_and_reshards(tmp_path: Path) -> None:
    root = str(tmp_path)
    first, second = on_ranks(2, trained, root)
    assert first["parameters"] == pytest.approx(486e6, rel=0.03)
    assert first["norms"] == second["norms"] and all(0 < norm < 1e4 for norm in first["norms"])
    print(f"two ranks, ZeRO-3: {first} {second}")
    wanted = checkpoint.fingerprint(f"{root}/two")
    assert wanted["weights"] and wanted["optimizer"]
    counts = Checkpoint(f"{root}/two/checkpoints/step-00000002").engines["model"]["parameters"]
    assert counts["encoder.conv_in.weight"]["step"] == 2 and counts["temporal_encoder.conv_in.weight"]["step"] == 1
    (alone,) = on_ranks(1, resharded, root, "two", "one", 2)
    print(f"one rank, ZeRO-2: {alone}")
    again = on_ranks(2, resharded, root, "one", "again", 3)
    print(f"two ranks, ZeRO-3, again: {again}")
    for target in ("one", "again"):
        found = checkpoint.fingerprint(f"{root}/{target}")
        assert (found["weights"], found["optimizer"]) == (wanted["weights"], wanted["optimizer"]), target
