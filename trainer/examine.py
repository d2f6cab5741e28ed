"""A checkpoint looked at: measured on a dataset's clips beside the baselines, and drawn.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pipelines import clips as cutting
from pipelines import index, storage
from pipelines.contracts import Clip, ClipRule, Source
from pipelines.faults import InputError, Skip
from trainer import checkpoint, entropy, pictures
from trainer import recipe as recipes
from trainer.codec import Codec
from trainer.evaluate import Report, evaluate
from trainer.losses.perceptual import Perceptual, PerceptualSpec
from trainer.manifest import RunManifest
from trainer.quality import FvdSpec, VideoFeatures
from trainer.recipe import CodecRecipe, codec_of
from trainer.run import open_model

DRAWN = 4


class Group(Protocol):
    """Where a process stands among the ranks."""

    rank: int
    size: int


@dataclass(frozen=True)
class FixedClips:
    """The same clips each time that they are gone through: ``count`` spread evenly over the dataset (None: all),
    central crops, no flip; with the embeddings of their captions, unless ``captions`` says not.

    Of several ranks each takes its share of them, and calls ``pace`` equally often. A clip that is too short for the
    rule is left out; InputError where all of them are, and for one that can't be read: a fixed set must not shrink
    silently.
    """

    dataset: index.Dataset
    rule: ClipRule
    size: tuple[int, int]
    count: int | None
    rank: int = 0
    world: int = 1
    captions: bool = True
    pace: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Clip]:
        """Reads and decodes them, one after another."""
        dataset, total, count = self.dataset, self.dataset.clips, self.count
        chosen = range(total) if count is None or count >= total else [i * total // count for i in range(count)]
        short = 0
        for first in range(0, len(chosen), self.world):
            self.pace()
            if first + self.rank >= len(chosen):
                break
            clip = chosen[first + self.rank]
            shard, row = dataset.locate(clip)
            record = dataset.records(shard, row, row + 1)[0]
            source = Source(dataset.name, dataset.files[shard], record["key"].decode())
            begin = int(record["offset"])
            data = storage.read_bytes(dataset.shard_url(shard), begin, begin + int(record["bytes"]))
            caption = None
            if self.captions and record["caption_bytes"]:
                begin = int(record["caption_offset"])
                caption = storage.read_bytes(dataset.shard_url(shard), begin, begin + int(record["caption_bytes"]))
            try:
                yield cutting.make_clip(data, record, self.rule, self.size, 0, clip, source, caption=caption)
            except Skip as skip:
                if skip.reason != "short":
                    raise InputError(
                        f"{skip.detail}. An evaluation does not skip: repack or lint the dataset."
                    ) from None
                short += 1
        if self.world == 1 and short == len(chosen) > 0:
            raise InputError(
                f"{dataset.name}: of {short} clips none has the {self.rule.least_frames} frames that are measured. Ask "
                "for fewer (--frames), or name a dataset of longer clips"
            )


def evaluate_checkpoint(
    url: str,
    dataset_url: str,
    *,
    run_url: str | None = None,
    frames: int | None = None,
    count: int | None = None,
    ema: bool | None = None,
    sets: Sequence[str] = (),
    lpips: Mapping[str, Any] | None = None,
    fvd: Mapping[str, Any] | None = None,
    captions: bool = True,
    device: str = "cpu",
    entropies: bool = False,
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measures a checkpoint (or a run's newest) on a dataset; the clip is the last stage's, or ``frames`` long.

    With ``run_url`` the report becomes the run's ``evaluation.json`` and a few clips are drawn into ``samples/``.
    ``sets`` change what changes no weights, and stand in the report as ``set``. ``lpips`` are fields of PerceptualSpec;
    without them AlexNet with random weights, which needs no download and is named in the report. ``fvd`` are fields of
    FvdSpec; without them there is no rFVD. With ``entropies`` the report has what :func:`trainer.entropy.measure`
    finds. A recipe that reads text gets the clips' captions, unless ``captions`` says not. Raises InputError where
    nothing can be measured.
    """
    trained = open_model(url, ema=ema, sets=sets, warn=warn)
    recipe = codec_of(trained.recipe, storage.redact(url))
    rule, size = fixed_rule(trained.manifest, frames)
    dataset = index.open_dataset(dataset_url)
    if dataset.latents is not None:
        raise InputError(
            f"{storage.redact(dataset_url)} holds latents, and a codec is measured on videos. Name the dataset that "
            "they were encoded from",
            status=2,
        )
    spec = PerceptualSpec.model_validate(lpips or {"backbone": "alex", "weights": "random"})
    codec = Codec(recipe, trained.model, device=device)
    report = evaluate(
        codec.round_trip,
        FixedClips(dataset, rule, size, count, captions=captions),
        perceptual=Perceptual(spec).to(device),
        fvd=VideoFeatures(FvdSpec.model_validate(fvd), device) if fvd else None,
        reads=bool(recipes.caption_width(recipe)),
        device=device,
        progress=progress,
    )
    if entropies:
        seen = (clip.pixels_CTHW[None].to(device) for clip in FixedClips(dataset, rule, size, count))
        report = report.with_entropies(entropy.measure(codec.recipe, codec.model, seen))
    if sets:
        report = Report({**report.values, "set": list(sets)}, report.entropies)
    if run_url is not None:
        try:
            storage.write_bytes(storage.join(run_url, "evaluation.json"), report.json().encode())
            shown = list(FixedClips(dataset, rule, size, DRAWN))
            write(look(recipe, trained.model, shown, device), storage.join(run_url, "samples"))
        except InputError as error:
            warn(f"what was measured is not kept: {error}")
    return report


class Examination:
    """The evaluation of a run while it trains: ``evaluation.clips`` clips of ``data.eval``, shared out over the ranks.

    The clip is the last stage's, also in stages before it. Raises InputError at once for what it will not find later.
    """

    def __init__(self, manifest: RunManifest, device: torch.device) -> None:
        assert manifest.evaluation.every_steps is not None and manifest.data.eval is not None
        self.every_steps = manifest.evaluation.every_steps
        self._manifest, self._device = manifest, device
        self._dataset = index.open_dataset(manifest.data.eval)
        self._perceptual = Perceptual(manifest.evaluation.lpips).to(device)
        self._rule, self._size = fixed_rule(manifest)

    def sit(
        self,
        run_url: str,
        weights: Mapping[str, Tensor],
        world: Group,
        pace: Callable[[], None] = lambda: None,
        hold: Callable[[], None] = lambda: None,
    ) -> tuple[Mapping[str, Any], list[pictures.Views]]:
        """Measures whole ``weights``, on all ranks together: the figures, and on rank 0 some clips to look at.

        Rank 0 also writes the run's ``evaluation.json`` and ``samples/``. Weights and random state of training are left
        alone; the model is built anew, and gone afterwards. What ``pace`` raises before a clip, on all ranks at the
        same one, ends it; so does ``hold``, called before rank 0 writes.
        """
        recipe = codec_of(self._manifest.loaded_recipe, self._manifest.name)
        count = self._manifest.evaluation.clips
        model = recipes.skeleton(recipe)
        checkpoint.assign(model, weights)
        codec = Codec(recipe, model, device=self._device)
        report = evaluate(
            codec.round_trip,
            FixedClips(self._dataset, self._rule, self._size, count, world.rank, world.size, pace=pace),
            perceptual=self._perceptual,
            reads=bool(recipes.caption_width(recipe)),
            device=self._device,
        )
        if world.rank != 0:
            return report.values, []
        shown = list(FixedClips(self._dataset, self._rule, self._size, DRAWN))
        views = look(recipe, codec.model, shown, self._device)
        hold()
        storage.write_bytes(storage.join(run_url, "evaluation.json"), report.json().encode())
        write(views, storage.join(run_url, "samples"), video=False)
        return report.values, views


def fixed_rule(manifest: RunManifest, frames: int | None = None) -> tuple[ClipRule, tuple[int, int]]:
    """How clips are cut for an evaluation, and their size: the last stage's, or ``frames`` long."""
    last = manifest.schedule.stages[-1].clip
    size = last.sizes[0]
    return ClipRule(frames=frames or last.frames, sizes=(size,), crop="center", flip=0.0), size


@torch.no_grad()
def look(
    recipe: CodecRecipe, model: nn.Module, shown: Sequence[Clip], device: torch.device | str = "cpu"
) -> list[pictures.Views]:
    """What the recipe has to show of each clip."""
    views = []
    for clip in shown:
        made = recipe.pictures(model, clip.pixels_CTHW[None].to(device))
        views.append(
            pictures.Views(str(clip.source), clip.pixels_CTHW, {n: v[0].cpu() for n, v in made.items()}, fps=clip.fps)
        )
    return views


def write(views: Sequence[pictures.Views], folder: str, video: bool = True) -> list[str]:
    """Writes a PNG grid and a sheet of frames for each clip to ``folder``, and one side-by-side mp4; their URLs."""
    with tempfile.TemporaryDirectory() as scratch:
        files = [pictures.grid(view, Path(scratch) / f"clip-{i:02d}.png") for i, view in enumerate(views)]
        files += [pictures.sheet(view, Path(scratch) / f"frames-{i:02d}.png") for i, view in enumerate(views)]
        if views and video:
            files.append(pictures.side_by_side(views, Path(scratch) / "side-by-side.mp4"))
        urls = []
        for file in files:
            urls.append(storage.join(folder, file.name))
            storage.upload(urls[-1], file)
    return urls
