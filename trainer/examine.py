"""A checkpoint looked at: measured on a dataset's clips beside the baselines, and drawn.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines import clips as cutting
from pipelines import index, storage
from pipelines.contracts import Clip, ClipRule, Source
from pipelines.faults import InputError, Skip
from trainer import pictures
from trainer.codec import Codec
from trainer.evaluate import Report, evaluate
from trainer.losses.perceptual import Perceptual, PerceptualSpec
from trainer.run import Trained, open_model

DRAWN = 4


def fixed_clips(dataset: index.Dataset, rule: ClipRule, size: tuple[int, int], count: int | None) -> Iterator[Clip]:
    """The same clips every time: ``count`` spread evenly over the dataset (None: all), central crops, no flip.

    A clip that is too short for the rule is left out; one that can't be read raises InputError: a fixed set must not
    shrink silently.
    """
    total = dataset.clips
    chosen = range(total) if count is None or count >= total else [i * total // count for i in range(count)]
    for clip in chosen:
        shard, row = dataset.locate(clip)
        record = dataset.records(shard, row, row + 1)[0]
        source = Source(dataset.name, dataset.files[shard], record["key"].decode())
        begin = int(record["offset"])
        data = storage.read_bytes(dataset.shard_url(shard), begin, begin + int(record["bytes"]))
        try:
            yield cutting.make_clip(data, record, rule, size, 0, clip, source)
        except Skip as skip:
            if skip.reason != "short":
                raise InputError(f"{skip.detail}. An evaluation does not skip: repack or lint the dataset.") from None


def evaluate_checkpoint(
    url: str,
    dataset_url: str,
    *,
    run_url: str | None = None,
    frames: int | None = None,
    count: int | None = None,
    ema: bool | None = None,
    lpips: Mapping[str, Any] | None = None,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Report:
    """Measures a checkpoint (or a run's newest) on a dataset; the clip is the last stage's, or ``frames`` long.

    With ``run_url`` the report becomes the run's ``evaluation.json`` and a few clips are drawn into ``samples/``.
    ``lpips`` are fields of PerceptualSpec; without them AlexNet with random weights, which needs no download and is
    named in the report. Raises InputError where nothing can be measured.
    """
    trained = open_model(url, ema=ema, warn=warn)
    last = trained.manifest.schedule.stages[-1].clip
    length, size = frames or last.frames, last.sizes[0]
    rule = ClipRule(frames=length, sizes=(size,), crop="center", flip=0.0)
    latent = trained.recipe.latent(length, *size)
    dataset = index.open_dataset(dataset_url)
    spec = PerceptualSpec.model_validate(lpips or {"backbone": "alex", "weights": "random"})
    report = evaluate(
        Codec(trained.recipe, trained.model, device=device).reconstruct,
        fixed_clips(dataset, rule, size, count),
        latent,
        perceptual=Perceptual(spec).to(device),
        device=device,
        progress=progress,
    )
    if run_url is not None:
        try:
            storage.write_bytes(storage.join(run_url, "evaluation.json"), report.json().encode())
            draw(trained, list(fixed_clips(dataset, rule, size, DRAWN)), storage.join(run_url, "samples"), device)
        except InputError as error:
            warn(f"what was measured is not kept: {error}")
    return report


def draw(trained: Trained, shown: list[Clip], folder: str, device: str = "cpu") -> list[str]:
    """Draws clips: a PNG grid each and one side-by-side mp4, into ``folder``; their URLs."""
    import tempfile

    views = []
    for clip in shown:
        pixels_1CTHW = clip.pixels_CTHW[None].to(device)
        made = {name: view[0].cpu() for name, view in trained.recipe.pictures(trained.model, pixels_1CTHW).items()}
        views.append(pictures.Views(str(clip.source), clip.pixels_CTHW, made, fps=clip.fps))
    with tempfile.TemporaryDirectory() as scratch:
        made_files = [pictures.grid(view, Path(scratch) / f"clip-{i:02d}.png") for i, view in enumerate(views)]
        if views:
            made_files.append(pictures.side_by_side(views, Path(scratch) / "side-by-side.mp4"))
        urls = []
        for file in made_files:
            urls.append(storage.join(folder, file.name))
            storage.upload(urls[-1], file)
    return urls
