"""What a manifest will do before it does it: batch arithmetic, parameters, memory of a rank, bytes to stream."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipelines import index, order
from pipelines.captions import MOST_TOKENS
from pipelines.contracts import Batch, ClipRule, Source
from pipelines.faults import InputError
from trainer import recipe as recipes
from trainer.blocks.discriminator import PatchDiscriminator
from trainer.manifest import RunManifest
from trainer.recipe import LatentSpec
from trainer.run import models_of

MEMORY = ("weights", "gradients", "optimizer", "partition", "ema", "adversary", "model_states", "activations")
"""What a rank's memory is told by; ``model_states`` is the sum of those before it."""


def dry_run(manifest: RunManifest) -> dict[str, Any]:
    """One object with ``manifest`` (resolved), ``parameters``, ``latent``, ``batch``, ``memory`` and ``data``.

    Memory is in bytes for one rank by part, at the fewest and the most workers: model states follow from ZeRO's
    partitioning, activations are what the graph of the largest stage keeps for a micro-batch (None, with the reason
    in ``why``, where a frozen network's weights are out of reach from here). Buffers of libraries come on top.
    """
    recipe, schedule = manifest.loaded_recipe, manifest.schedule
    model = recipes.skeleton(recipe)
    parts = recipe.parts(model)
    last = schedule.stages[-1]
    rule = last.clip
    latent = _latent(recipe, rule)
    worlds = sorted({manifest.workers.least, manifest.workers.greatest})
    total = sum(p.numel() for p in model.parameters())
    trained = max(
        sum(p.numel() for name, p in model.named_parameters() if stage.trains(name)) for stage in schedule.stages
    )
    discriminator = _discriminator(manifest)
    shares = [_shares(manifest, world) for world in worlds]
    places = [*schedule.first_places, schedule.clips]
    kept, why = _activations(manifest, model)
    return {
        "manifest": manifest.resolved(),
        "parameters": {
            "counted": recipes.counted(parts),
            "total": total,
            "by_part": dict(parts),
            "adversary": discriminator,
        },
        "latent": latent,
        "batch": {
            "global": manifest.batch,
            "steps": schedule.steps,
            "clips": schedule.clips,
            "stages": [
                {"name": s.name, "steps": s.steps, "batch": b, "clips": end - first}
                for s, b, first, end in zip(schedule.stages, schedule.batches, places, places[1:], strict=False)
            ],
            "workers": shares,
        },
        "checkpoint_bytes": 4 * total + 8 * trained + (4 * total if manifest.ema else 0) + 12 * discriminator,
        "memory": [
            {
                **_memory(manifest, share["workers"], total, trained, discriminator),
                "activations": kept and round(kept * share["micro_batch"]),
                **({"why": why} if why else {}),
            }
            for share in shares
        ],
        "data": _stream(manifest),
    }


def _latent(recipe: recipes.Recipe, rule: ClipRule) -> dict[str, Any]:
    """The latent of a codec's clip, or what a latent diffusion model makes."""
    if recipes.samples(recipe):
        layout = recipe.layout
        shapes = {name: tensor.shape for name, tensor in layout.tensors.items()}
        clip = (layout.frames, layout.height, layout.width)
        spec = LatentSpec(shapes, max(t.channels for t in layout.tensors.values()), layout.numbers / layout.frames)
    else:
        clip = (rule.frames, *rule.sizes[0])
        spec = recipes.codec_of(recipe, recipe.name).latent(*clip)
    return {
        "shape": {name: list(shape) for name, shape in spec.shapes.items()},
        "channels": spec.channels,
        "numbers_per_frame": spec.numbers_per_frame,
        "clip": [3, *clip],
    }


def _shares(manifest: RunManifest, world: int) -> dict[str, Any]:
    spans = [order.share(manifest.batch, rank, world, manifest.micro_batch or manifest.batch) for rank in range(world)]
    return {
        "workers": world,
        "clips_per_rank": [sum(span.count for span in rank if span.weight) for rank in spans],
        "micro_batches": len(spans[0]),
        "micro_batch": max(span.count for rank in spans for span in rank),
    }


def _discriminator(manifest: RunManifest) -> int:
    """Parameters of the greatest discriminator among the stages; 0 where there is none."""
    specs = [stage.adversary.network for stage in manifest.schedule.stages if stage.adversary]
    with torch.device("meta"):
        nets = [PatchDiscriminator(spec.kind, spec.width, spec.layers, spec.norm) for spec in specs]
    return max((sum(p.numel() for p in net.parameters()) for net in nets), default=0)


def _memory(manifest: RunManifest, world: int, total: int, trained: int, discriminator: int) -> dict[str, Any]:
    zero = manifest.zero.stage
    shard = world if zero >= 1 else 1
    states = {
        "weights": total * 4 // (world if zero >= 3 else 1),
        "gradients": trained * 4 // (world if zero >= 2 else 1),
        "optimizer": trained * 8 // shard,
    }
    if zero >= 1:
        states["partition"] = trained * 4 // shard
    if manifest.ema:
        states["ema"] = trained * 4 // shard
    if discriminator:
        parts = _memory(manifest.model_copy(update={"ema": 0.0}), world, discriminator, discriminator, 0)
        states["adversary"] = parts["model_states"]
    return {"workers": world, **states, "model_states": sum(states.values())}


def _activations(manifest: RunManifest, model: nn.Module) -> tuple[float | None, str | None]:
    """Bytes that autograd keeps for one clip in the stage that keeps most, and why that can't be told.

    Counted on a forward pass of tensors without data (torch's FakeTensorMode), so that it takes no memory; recipes that
    read captions get one of the greatest length.
    """
    recipe, schedule = manifest.loaded_recipe, manifest.schedule
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch says there what it downloads
            teachers = recipe.teachers()
            for stage in schedule.stages:
                teachers.update(models_of(recipe, stage))
    except InputError as error:
        return None, str(error)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    for module in (*model.modules(), *teachers.modules()):
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(weight.detach()), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    state = {weight.untyped_storage()._cdata for net in (model, teachers) for weight in net.state_dict().values()}
    most, width = 0.0, recipes.caption_width(recipe)
    for stage, step in zip(schedule.stages, schedule.first_steps, strict=True):
        for name, weight in model.named_parameters():
            weight.requires_grad_(stage.trains(name))
        plan = schedule.plan(step)
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            if tensor.untyped_storage()._cdata not in state:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with mode, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            batch = Batch(
                pixels_BCTHW=torch.zeros(1, 3, plan.rule.frames, *max(stage.clip.sizes, key=math.prod)),
                fps_B=torch.ones(1), motion_B=torch.zeros(1), places=(0,), sources=(Source("", "", ""),),
                plan=plan, weight=1.0, seed=manifest.seed, arrays=_arrays(recipe), masks=_arrays(recipe, mask=True),
                caption_emb_BLD=torch.zeros(1, MOST_TOKENS, width) if width else None,
                caption_mask_BL=torch.ones(1, MOST_TOKENS, dtype=torch.bool) if width else None,
            )  # fmt: skip
            with torch.autocast("cpu", torch.bfloat16, enabled=manifest.precision == "bf16"):
                recipe.step(model, batch, stage, teachers)
        most = max(most, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    return most, None


def _arrays(recipe: recipes.Recipe, *, mask: bool = False) -> dict[str, Tensor]:
    """Stored latents of one clip, or their masks, for a recipe that trains on them."""
    tensors = recipe.layout.tensors if recipes.samples(recipe) else {}
    if mask:
        return {name: torch.ones(1, *tensor.tokens, dtype=torch.bool) for name, tensor in tensors.items()}
    return {name: torch.zeros(1, *tensor.shape) for name, tensor in tensors.items()}


def _stream(manifest: RunManifest) -> dict[str, Any]:
    """Bytes that the whole run fetches, where the datasets can be opened from here."""
    try:
        refs = [(index.open_dataset(ref.dataset, expect=ref.digest), ref.weight) for ref in manifest.data.train]
    except InputError as error:
        return {"bytes": None, "why": str(error)}
    weight = sum(w for _, w in refs)
    per_clip = sum(w / weight * int(dataset.shard_bytes.sum()) / dataset.clips for dataset, w in refs)
    clips = manifest.schedule.clips
    epochs = sum(w / weight * clips / dataset.clips for dataset, w in refs)
    return {"bytes": round(per_clip * clips), "clips_stored": sum(d.clips for d, _ in refs), "epochs": epochs}


def show(facts: dict[str, Any], console: Console) -> None:
    """The same as tables for a person."""
    parameters, batch, latent = facts["parameters"], facts["batch"], facts["latent"]
    table = Table("part", "parameters", title=f"{facts['manifest']['name']}: recipe {facts['manifest']['recipe']}")
    for part, count in parameters["by_part"].items():
        table.add_row(part, f"{count:,}")
    table.add_row("counted by the paper", f"{parameters['counted']:,}")
    table.add_row("total", f"{parameters['total']:,}")
    if parameters["adversary"]:
        table.add_row("discriminator, besides", f"{parameters['adversary']:,}")
    console.print(table)
    table = Table("stage", "steps", "batch", "clips", "frames", "size")
    for row in batch["stages"]:
        rule = facts["manifest"]["stages"][row["name"]]["clip"]
        sizes = ", ".join(f"{h}x{w}" for h, w in rule["sizes"])
        table.add_row(
            row["name"], f"{row['steps']:,}", str(row["batch"]), f"{row['clips']:,}", str(rule["frames"]), sizes
        )
    console.print(table)
    table = Table("workers", "clips a rank", "micro-batches", "clips of a micro-batch")
    for share in batch["workers"]:
        clips = sorted(set(share["clips_per_rank"]))
        counts = (" or ".join(map(str, clips)), share["micro_batches"], share["micro_batch"])
        table.add_row(str(share["workers"]), *map(str, counts))
    console.print(table)
    table = Table("memory of a rank, MiB")
    for memory in facts["memory"]:
        workers = memory["workers"]
        table.add_column(f"{workers} worker{'s' if workers > 1 else ''}", justify="right")
    for part in MEMORY:
        if any(part in memory for memory in facts["memory"]):
            sizes = [memory.get(part) for memory in facts["memory"]]
            told = ["not known" if size is None else f"{size / 2**20:,.1f}" for size in sizes]
            table.add_row(part.replace("_", " "), *told, style="bold" if part == "model_states" else None)
    console.print(table)
    if why := facts["memory"][0].get("why"):
        console.print(f"activations are not known from here: {why}")
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in latent["shape"].items())
    console.print(f"latent of a {'x'.join(map(str, latent['clip']))} clip: {shapes}; "
                  f"{latent['numbers_per_frame']:,.0f} numbers a frame")  # fmt: skip
    data = facts["data"]
    console.print(
        f"to stream: {data['bytes'] / 2**30:,.2f} GiB, {data['epochs']:.1f} epochs of {data['clips_stored']:,} clips"
        if data["bytes"] is not None
        else f"to stream: not known from here ({data['why']})"
    )
