"""A run's folder on storage: its name, its manifest, and the promise that one name is one run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
import yaml
from torch import Tensor, nn

from pipelines import index, storage
from pipelines.faults import InputError
from trainer import checkpoint, manifest
from trainer import recipe as recipes
from trainer.manifest import RunManifest
from trainer.recipe import Recipe
from trainer.stage import Stage
from trainer.telemetry import read_lines

Outcome = Literal["done", "stopped"]
"""How an attempt ends that does not fail."""


def url_of(runs: str, name: str) -> str:
    """Where the run of that name lies; local paths are made absolute."""
    return storage.join(storage.absolute(runs), name)


def claim(run: RunManifest, runs: str, launch: Mapping[str, Any] | None = None) -> tuple[RunManifest, str]:
    """Takes the run's name on storage, or finds the same run there.

    Makes local paths absolute, pins every dataset's digest and writes the resolved ``manifest.yaml``. ``launch`` says
    by what the run goes on, where it is not by this process. Raises InputError where :func:`same` does, or storage
    can't be written.
    """
    pinned, run_url = same(run, runs)
    text = yaml.safe_dump(pinned.resolved(), sort_keys=False, width=120)
    storage.write_bytes(storage.join(run_url, "manifest.yaml"), text.encode())
    storage.delete(storage.join(run_url, "stop.json"))
    by = {"host": socket.gethostname(), "pid": os.getpid()} if launch is None else launch
    event = {"time": time.time(), "event": "launch", "attempt": 0, **by}
    storage.append_text(storage.join(run_url, "events.jsonl"), json.dumps(event) + "\n")
    return pinned, run_url


def same(run: RunManifest, runs: str) -> tuple[RunManifest, str]:
    """The manifest with its datasets' digests, and the URL of its run; changes nothing.

    Raises InputError where the name belongs to another manifest (with the difference), or data is missing.
    """
    run_url = url_of(runs, run.name)
    stored = load(run_url, missing_ok=True)
    if faults := data_faults(run):
        raise InputError("\n".join(faults))
    pinned = _pin(run, stored)
    if stored is not None:
        changes = list(manifest.difference(stored.identity(), pinned.identity()))
        if changes:
            listing = "\n  ".join(changes)
            raise InputError(
                f"run {run.name!r} in {storage.redact(runs)} was made by another manifest:\n  {listing}\n"
                f"Give this one another name (--name), or go on with the old one: moviola resume {run.name}",
                status=2,
            )
    return pinned, run_url


def data_faults(run: RunManifest) -> list[str]:
    """Datasets that are not there or damaged, those whose clips are too short for a stage or the evaluation or whose
    captions the model can't read, and teachers that were trained on latents of other clips than their stage's.
    """
    refs = [(f"data.train.{i}.dataset", ref) for i, ref in enumerate(run.data.train)]
    refs += [(f"data.images.{i}.dataset", ref) for i, ref in enumerate(run.data.images)]
    refs += [("data.eval", manifest.DatasetRef(dataset=run.data.eval))] if run.data.eval else []
    faults: list[str] = []
    answers = True
    for field, ref in refs:
        if not answers and storage.is_remote(ref.dataset):  # each would wait as long as the first
            faults.append(f"{field}: {ref.dataset}: not looked at, since the object store does not answer")
            continue
        try:
            dataset = index.open_dataset(storage.absolute(ref.dataset), expect=ref.digest)
        except InputError as error:
            answers = answers and not isinstance(error, storage.Unreachable)
            faults.append(f"{field}: {error}")
            continue
        if not run.holds:
            continue
        if line := _other_kind(run.loaded_recipe, dataset) or _other_captions(run.loaded_recipe, dataset):
            faults.append(f"{field}: {ref.dataset}: {line}")
        elif field.startswith("data.train") and dataset.latents is None:
            stages = run.schedule.stages
            faults += [f"{field}: {ref.dataset}: {line}" for s in stages if (line := _too_short(dataset.card, s))]
        elif field == "data.eval" and run.evaluation.every_steps and dataset.latents is None:
            last, frames = run.schedule.stages[-1], dataset.card.statistics.get("frames")
            if frames and frames["greatest"] < last.clip.frames:
                faults.append(
                    f"{field}: {ref.dataset}: its longest clip has {frames['greatest']:.0f} frames; the evaluation "
                    f"takes {last.clip.frames}, as stage {last.name!r}. Pack longer clips, or set "
                    "evaluation.every_steps: null"
                )
    for stage in run.schedule.stages if run.holds else ():
        for name, url in stage.teachers.items():
            with contextlib.suppress(InputError):  # of a teacher that is not there, claim and models_of speak
                teacher = load(_run_of(storage.absolute(url)))
                if teacher and (line := _other_clips(run.loaded_recipe, stage, teacher.loaded_recipe)):
                    faults.append(f"stages.{stage.name}.teachers.{name}: {line}")
    return faults


def _other_clips(recipe: Recipe, stage: Stage, teacher: Recipe) -> str | None:
    """Why the stage's latents are not those that the teacher, if it is a latent diffusion model, was trained on."""
    if not (recipes.samples(teacher) and recipes.codes(recipe)):
        return None
    layout = teacher.layout
    known = {name: tensor.shape for name, tensor in layout.tensors.items()}
    for height, width in stage.clip.sizes:
        shapes = recipe.latent(stage.clip.frames, height, width).shapes
        for name, shape in known.items():
            if tuple(shapes.get(name, ())) != tuple(shape):
                return (
                    f"its latents are of {layout.frames} frames of {layout.height} x {layout.width} pixels (latent "
                    f"{name!r} {'x'.join(map(str, shape))}), and the stage has clips of {stage.clip.frames} frames of "
                    f"{height} x {width}. Set stages.{stage.name}.clip to {{frames: {layout.frames}, sizes: "
                    f"[[{layout.height}, {layout.width}]]}}, or train a diffusion model on latents of the stage's clips"
                )
    return None


def _other_kind(recipe: Recipe, dataset: index.Dataset) -> str | None:
    """Why the recipe can't train on what the dataset holds."""
    if recipes.codes(recipe) and dataset.latents is not None:
        return (
            f"it holds latents, and recipe {recipe.name} trains on videos. Name the dataset that they were encoded from"
        )
    if recipes.samples(recipe) and dataset.latents is None:
        return (
            f"it holds videos, and recipe {recipe.name} trains on latents. Encode it first: "
            f"moviola encode CHECKPOINT --dataset {storage.redact(dataset.url)} DEST"
        )
    return None


def _other_captions(recipe: Recipe, dataset: index.Dataset) -> str | None:
    """Why the recipe can't read the dataset's captions; those that it reads none of may be of any width."""
    read, stored = recipes.caption_width(recipe), dataset.caption_width
    if not read or stored in (0, read):
        return None
    encoder = (dataset.card.model_extra or {}).get("text_encoder")
    by = f" by {encoder}" if encoder else ""
    return (
        f"its captions are embedded in {stored} numbers a token{by}, and the model reads {read}. "
        f"Embed them by its text encoder (moviola captions {storage.redact(dataset.url)} --text-encoder ENCODER), or "
        "give the model that width"
    )


def remarks(run: RunManifest) -> list[str]:
    """What may be so, and is hardly meant: a model that reads captions, and data without any."""
    if not recipes.caption_width(run.loaded_recipe):
        return []
    with contextlib.suppress(InputError):  # of datasets that are not there, data_faults speaks
        datasets = [index.open_dataset(storage.absolute(ref.dataset)) for ref in run.data.train]
        if not any(dataset.caption_width for dataset in datasets):
            return [
                "the model reads captions, and data.train has none that are embedded: it learns its null token alone. "
                f"Store them first: moviola captions {storage.redact(datasets[0].url)} --text-encoder ENCODER"
            ]
    return []


def _too_short(card: index.Card, stage: Stage) -> str | None:
    """Why the stage can't train on the dataset, from the lengths on its card."""
    frames, needed = card.statistics.get("frames"), stage.clip.least_frames
    if not frames or needed == 1:
        return None
    which = {"greatest": "longest"} | ({"least": "shortest"} if stage.clip.short == "fail" else {})
    for key, word in which.items():
        if frames[key] < needed:
            return (
                f"its {word} clip has {frames[key]:.0f} frames; stage {stage.name!r} needs {needed} "
                f"({stage.clip.frames} at stride {stage.clip.stride[0]}). Lower stages.{stage.name}.clip.frames, "
                "or pack longer clips"
            )
    return None


def _pin(run: RunManifest, stored: RunManifest | None) -> RunManifest:
    """The resolved manifest with every dataset's digest, held against those that the run began with."""
    refs = (*stored.data.train, *stored.data.images) if stored is not None else ()
    known = {ref.dataset: ref.digest for ref in refs}

    def pin(ref: manifest.DatasetRef) -> dict[str, Any]:
        url = storage.absolute(ref.dataset)
        opened = index.open_dataset(url, expect=ref.digest or known.get(url))
        return {**ref.model_dump(), "dataset": url, "digest": opened.digest}

    plain = run.resolved()
    plain["data"]["train"] = [pin(ref) for ref in run.data.train]
    plain["data"]["images"] = [pin(ref) for ref in run.data.images]
    for name, stage in plain["stages"].items():
        before = stored.resolved()["stages"].get(name, {}) if stored is not None else {}
        if stage["init_from"] and stage["steps"]:
            field = f"stages.{name}.init_from"
            stage["init_from"] = _pin_weights(field, stage["init_from"], before.get("init_from"))
        for teacher, url in stage["teachers"].items() if stage["steps"] else ():
            field = f"stages.{name}.teachers.{teacher}"
            stage["teachers"][teacher] = _pin_weights(field, url, before.get("teachers", {}).get(teacher))
    if run.data.eval:
        plain["data"]["eval"] = storage.absolute(run.data.eval)
        index.open_dataset(plain["data"]["eval"])
    return manifest.validate(plain, f"run {run.name}")


def _pin_weights(field: str, url: str, before: str | None) -> str:
    """The checkpoint that a stage's field names: of a run the newest one, or the one that was pinned ``before``."""
    url = storage.absolute(url)
    if before is not None and storage.join(before, "").startswith(storage.join(url, "")):
        return before
    try:
        return checkpoint.using(url, lambda found: found.url, lambda text: print(f"warning: {text}", file=sys.stderr))
    except InputError as error:
        raise InputError(f"{field}: {error}", status=error.status) from None


def load(run_url: str, *, missing_ok: bool = False) -> RunManifest | None:
    """The manifest that a run was started with; raises InputError when there is no such run."""
    try:
        text = storage.read_bytes(storage.join(run_url, "manifest.yaml")).decode(errors="replace")
    except storage.Missing:
        if missing_ok:
            return None
        raise InputError(f"no run at {storage.redact(run_url)}; `moviola list` shows what there is", status=2) from None
    return manifest.validate(manifest.parse(text, run_url), run_url)


def text_encoder(url: str) -> str | None:
    """What embedded the captions that the run, or a checkpoint of it, was trained on; None where that is not known."""
    with contextlib.suppress(InputError):
        trained = load(_run_of(url))
        for ref in trained.data.train if trained else ():
            card = index.open_dataset(ref.dataset).card.model_extra or {}
            if card.get("embeddings"):
                return card.get("text_encoder")
    return None


def _run_of(url: str) -> str:
    """The folder of the run that a checkpoint lies in, or that ``url`` is."""
    return re.sub(r"/checkpoints/step-\d{8,}/?$", "", url)


def is_done(run: RunManifest, run_url: str) -> bool:
    """Whether the last step is committed, and evaluated where the manifest asks for it."""
    steps = run.schedule.steps
    if checkpoint.newest_step(run_url) != steps:
        return False
    events = read_lines(storage.join(run_url, "events.jsonl")) if run.evaluation.every_steps else []
    return not run.evaluation.every_steps or any(e["event"] == "evaluation" and e["step"] == steps for e in events)


@dataclass(frozen=True)
class Trained:
    """A model out of a run: whole weights on the CPU, in evaluation mode, and where they come from."""

    manifest: RunManifest
    recipe: Recipe
    model: nn.Module
    url: str


def open_model(
    url: str,
    *,
    ema: bool | None = None,
    sets: Sequence[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Trained:
    """Opens a checkpoint, or a run's newest one. ``ema`` None takes the averaged weights where the run keeps them.

    ``sets`` change fields of the model that change no weights. Raises InputError when there is no such run or
    checkpoint, when it is damaged, and for a field that can't be set.
    """
    stored = load(_run_of(url))
    assert stored is not None
    recipe = manifest.changed_model(stored.loaded_recipe, sets)
    model = recipes.skeleton(recipe)
    checkpoint.assign(model, checkpoint.load_weights(url, ema=ema, warn=warn))
    return Trained(stored, recipe, model.eval().requires_grad_(False), url)


def models_of(recipe: Recipe, stage: Stage) -> dict[str, nn.Module]:
    """The models of the runs that the recipe's stage names as teachers, each built by the recipe of its own manifest.

    Raises InputError where one is not there, or was trained on latents of other clips than the stage's.
    """
    models = {}
    for name, url in stage.teachers.items():
        try:
            teacher = open_model(url)
            if line := _other_clips(recipe, stage, teacher.recipe):
                raise InputError(line)
            models[name] = teacher.model
        except InputError as error:
            raise InputError(f"stages.{stage.name}.teachers.{name}: {error}", status=error.status) from None
    return models


def strangers(stage: Stage, weights: Mapping[str, Tensor]) -> list[str]:
    """Latent diffusion models among the stage's teachers whose latents other weights encoded than those it starts from:
    their shapes fit, and what they predict says nothing to this decoder.
    """
    found = []
    for name, url in stage.teachers.items():
        teacher = load(_run_of(url))
        if teacher and recipes.samples(teacher.loaded_recipe):
            told, mine = teacher.loaded_recipe.layout.codec["weights"], checkpoint.weights_digest(weights)
            if told != mine:
                found.append(
                    f"stages.{stage.name}.teachers.{name}: its latents were encoded by other weights ({told[:12]}) "
                    f"than those of init_from ({mine[:12]}). That is right where only the decoder was trained since"
                )
    return found


def claim_together(run: RunManifest, runs: str, rank: int) -> tuple[RunManifest, str]:
    """:func:`claim` by rank 0, for a group that has no controller; every rank gets the answer or the fault."""
    answer: list[Any] = [None]
    if rank == 0:
        try:
            answer = [claim(run, runs)[0].resolved()]
        except InputError as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], InputError):
        raise answer[0]
    return manifest.validate(answer[0], f"run {run.name}"), url_of(runs, run.name)
