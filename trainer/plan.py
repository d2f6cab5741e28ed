"""What a manifest will do before it does it: batch arithmetic, parameters, memory of a rank, bytes to stream."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipelines import index, order
from pipelines.faults import InputError
from trainer import recipe as recipes
from trainer.blocks.discriminator import PatchDiscriminator
from trainer.manifest import RunManifest


def dry_run(manifest: RunManifest) -> dict[str, Any]:
    """One object with ``manifest`` (resolved), ``parameters``, ``latent``, ``batch``, ``memory`` and ``data``.

    Memory is in bytes for one rank by part, at the fewest and the most workers: model states follow from ZeRO's
    partitioning; activations of the largest stage are those that one clip's graph keeps, counted on this machine.
    """
    recipe, schedule = manifest.loaded_recipe, manifest.schedule
    model = recipe.build(manifest.seed)
    parts = recipe.parts(model)
    last = schedule.stages[-1]
    rule = last.clip
    latent = recipe.latent(rule.frames, *rule.sizes[0])
    worlds = sorted({manifest.workers.least, manifest.workers.greatest})
    total = sum(p.numel() for p in model.parameters())
    trained = max(
        sum(p.numel() for name, p in model.named_parameters() if stage.trains(name)) for stage in schedule.stages
    )
    discriminator = _discriminator(manifest)
    return {
        "manifest": manifest.resolved(),
        "parameters": {
            "counted": recipes.counted(parts),
            "total": total,
            "by_part": dict(parts),
            "adversary": discriminator,
        },
        "latent": {
            "shape": {name: list(shape) for name, shape in latent.shapes.items()},
            "channels": latent.channels,
            "numbers_per_frame": latent.numbers_per_frame,
            "clip": [3, rule.frames, *rule.sizes[0]],
        },
        "batch": {
            "global": manifest.batch,
            "steps": schedule.steps,
            "clips": schedule.clips,
            "stages": [
                {"name": s.name, "steps": s.steps, "batch": b, "clips": s.steps * b}
                for s, b in zip(schedule.stages, schedule.batches, strict=True)
            ],
            "workers": [_shares(manifest, world) for world in worlds],
        },
        "memory": [_memory(manifest, world, total, trained, discriminator) for world in worlds],
        "data": _stream(manifest),
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
    zero, low = manifest.zero.stage, 2 if manifest.precision == "bf16" else 4
    weights = total * low // (world if zero >= 3 else 1)
    gradients = trained * low // (world if zero >= 2 else 1)
    shard = world if zero >= 1 else 1
    states = {"weights": weights, "gradients": gradients, "optimizer": trained * 8 // shard}
    if zero >= 1 or low == 2:
        states["master_weights"] = trained * 4 // shard
    if manifest.ema:
        states["ema"] = trained * 4 // shard
    if discriminator:
        parts = _memory(manifest.model_copy(update={"ema": 0.0}), world, discriminator, discriminator, 0)
        states["adversary"] = parts["model_states"]
    return {"workers": world, **states, "model_states": sum(states.values())}


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
    table = Table("workers", "clips a rank", "micro-batches", "model states a rank")
    for share, memory in zip(batch["workers"], facts["memory"], strict=True):
        clips = sorted(set(share["clips_per_rank"]))
        states = f"{memory['model_states'] / 2**20:,.1f} MiB"
        table.add_row(str(share["workers"]), " or ".join(map(str, clips)), str(share["micro_batches"]), states)
    console.print(table)
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in latent["shape"].items())
    console.print(f"latent of a {'x'.join(map(str, latent['clip']))} clip: {shapes}; "
                  f"{latent['numbers_per_frame']:,.0f} numbers a frame")  # fmt: skip
    data = facts["data"]
    console.print(
        f"to stream: {data['bytes'] / 2**30:,.2f} GiB, {data['epochs']:.1f} epochs of {data['clips_stored']:,} clips"
        if data["bytes"] is not None
        else f"to stream: not known from here ({data['why']})"
    )
