"""A dataset through a codec: what is stored decodes as what was encoded; a kill loses no sample and repeats none."""

from __future__ import annotations

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import index, lint, storage
from pipelines.clips import make_clip
from pipelines.contracts import ClipRule, Source
from pipelines.faults import InputError
from pipelines.latents import empty, join, parse, split
from pipelines.loader import Loader
from tests.trainer import processes
from tests.trainer.test_codec import a_codec
from trainer import codec as codecs
from trainer import encoding, latents
from trainer import recipe as recipes
from trainer.codec import Codec
from trainer.encoding import encode_dataset
from trainer.recipes.latentdit.config import LatentDitConfig
from trainer.recipes.latentdit.recipe import LatentDitRecipe
from trainer.stage import Schedule

torch.set_num_threads(1)
FRAMES, SIZE = 7, (32, 32)
WINDOWS = 2
"""In clips of 16 frames."""


def encode(source: str, dest: str, kill_after: int = 0, shard_clips: int = 5) -> encoding.Summary:
    """Encodes; with ``kill_after`` the process dies once that many clips are done."""

    def progress(state: encoding.Progress) -> None:
        if kill_after and state.done == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    return encode_dataset(a_codec(), source, dest, FRAMES, SIZE, shard_clips=shard_clips, progress=progress)


@pytest.fixture(scope="module")
def whole(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of the small dataset, encoded in one go."""
    dest = tmp_path_factory.mktemp("encoded") / "latents"
    summary = encode(str(small_dataset), str(dest))
    assert (summary.clips, summary.samples, summary.skipped) == (12, 12 * WINDOWS, {})
    return dest


def stored(dataset: index.Dataset) -> dict[str, tuple[bytes, dict]]:
    """The file and the sidecar of each sample, by key."""
    found = {}
    for file in dataset.files:
        with tarfile.open(Path(dataset.base, file)) as tar:
            parts = {member.name: tar.extractfile(member).read() for member in tar}
        for name in (name for name in parts if name.endswith(".safetensors")):
            key = name.removesuffix(".safetensors")
            assert key not in found
            found[key] = parts[name], json.loads(parts[f"{key}.json"])
    return found


def test_each_window_of_each_clip_is_stored_once(whole: Path, small_dataset: Path) -> None:
    source, dataset = index.open_dataset(str(small_dataset)), index.open_dataset(str(whole))
    names = [row["key"].decode() for _, rows in source.all_records() for row in rows]
    made = [row["key"].decode() for _, rows in dataset.all_records() for row in rows]
    assert made == [f"{name}-{window:03d}" for name in names for window in range(WINDOWS)]
    assert len(dataset.files) == 3
    assert lint.lint_dataset(str(whole), every_clip=True) == []
    sidecar = stored(dataset)[made[1]][1]
    assert sidecar["encoded"].endswith(names[0]) and sidecar["first_frame"] == FRAMES and sidecar["source"]


def test_what_is_stored_is_what_the_codec_makes_of_the_pixels(whole: Path, small_dataset: Path, tmp_path: Path) -> None:
    source, dataset, codec = index.open_dataset(str(small_dataset)), index.open_dataset(str(whole)), a_codec()
    record = source.records(0)[2]
    data = storage.read_bytes(source.shard_url(0), int(record["offset"]), int(record["offset"]) + int(record["bytes"]))
    rule = ClipRule(frames=2 * FRAMES, sizes=(SIZE,), crop="center", flip=0.0)
    place = next(p for p in range(99) if make_start(rule, p) == 0)
    clip = make_clip(data, record, rule, SIZE, 0, place, Source("", "", ""))
    pixels_1CTHW = clip.pixels_CTHW[None, :, FRAMES:]
    file, _ = stored(dataset)[f"{record['key'].decode()}-001"]
    expected = {f"{n:08d}.{k}": v for n, step in enumerate(codec.encode(pixels_1CTHW)) for k, v in step.items()}
    found = parse(file, "")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())

    layout = dataset.latents
    assert layout is not None and layout.codec["weights"] == codec.digest()
    assert {name: t.shape for name, t in layout.tensors.items()} == dict(codec.recipe.latent(FRAMES, *SIZE).shapes)
    arrays, masks = empty(layout)
    join(found, layout, "", arrays, masks)
    stream = split({name: array[None] for name, array in arrays.items()}, layout)
    decoded = torch.cat(list(codec.decode(stream, SIZE)), dim=2)
    assert torch.equal(decoded, codec.reconstruct(pixels_1CTHW))

    (tmp_path / "sample.safetensors").write_bytes(file)
    coded = codecs.decode_file(codec, str(tmp_path / "sample.safetensors"), str(tmp_path / "sample.mp4"))
    assert coded.frames == FRAMES
    with latents.opened(str(tmp_path / "sample.safetensors")) as (metadata, _):
        assert metadata["recipe"] == "arvae"


def make_start(rule: ClipRule, place: int) -> int:
    from pipelines.order import frame_numbers

    numbers = frame_numbers(rule, 16, 0, place)
    assert numbers is not None
    return numbers[0]


def takes_a_step(dataset: index.Dataset) -> None:
    """A diffusion model trains on the latents: a loss near 2 (noise and latents of variance 1), a gradient everywhere
    where it starts, and samples that are of the codec.
    """
    assert dataset.latents is not None
    recipe = LatentDitRecipe(LatentDitConfig(latents=dataset.latents, width=24, depth=1, heads=2, steps=1))
    model, stage = recipe.build(0), recipe.stages()[0]
    plan = Schedule([stage.model_copy(update={"steps": 1, "batch": 8})], 8, 0).plan
    loader = Loader([(dataset, 1.0)], None, plan, 1, seed=0, micro_batch=8)
    ((_, (batch,)),) = loader.iter_from(0)
    assert (batch.caption_emb_BLD is None) == (dataset.caption_width == 0)
    loss = recipe.step(model, batch, stage, recipe.teachers()).loss
    loss.backward()
    assert 1.2 < float(loss.detach()) < 2.8
    assert all(bool(tokens.leave.weight.grad.any()) for tokens in model.latents.values())
    sample = recipe.sample(model, 0, 0)
    assert {name: value.shape[1:] for name, value in sample.items()} == {
        name: tensor.shape for name, tensor in dataset.latents.tensors.items()
    }


def test_a_diffusion_model_trains_on_the_latents_of_a_first_frame_and_of_motion(whole: Path) -> None:
    takes_a_step(index.open_dataset(str(whole)))


def test_the_card_has_the_statistics_of_each_channel(whole: Path) -> None:
    dataset = index.open_dataset(str(whole))
    layout = dataset.latents
    assert layout is not None
    arrays, masks = empty(layout, 12 * WINDOWS)
    for n, (file, _) in enumerate(stored(dataset).values()):
        join(parse(file, ""), layout, "", {k: v[n] for k, v in arrays.items()}, {k: v[n] for k, v in masks.items()})
    for name, tensor in layout.tensors.items():
        assert not tensor.lengths and masks[name].all()
        x_CN = arrays[name].transpose(0, 1).flatten(1).double()
        torch.testing.assert_close(torch.tensor(tensor.mean), x_CN.mean(1).float(), rtol=1e-5, atol=1e-6)
        std_C = x_CN.std(1, correction=0).float()
        torch.testing.assert_close(
            torch.tensor(tensor.std), torch.where(std_C > 1e-6, std_C, 1.0), rtol=1e-4, atol=1e-6
        )
    assert layout.fps == pytest.approx(dataset.card.statistics["fps"]["mean"], rel=1e-5)


def test_killed_it_goes_on_at_the_clip_where_it_was(whole: Path, small_dataset: Path, tmp_path: Path) -> None:
    dest, kill_after = tmp_path / "latents", 7
    process = processes.CONTEXT.Process(target=encode, args=(str(small_dataset), str(dest), kill_after))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL and not (dest / "index.json").exists()
    done: list[int] = []
    (journal,) = (dest / ".encode").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == kill_after - 5
    for path, half in ((journal, b'{"clip": "half'), (journal.with_suffix(".tar"), b"half a member")):
        with path.open("ab") as file:  # as if it had been killed while it wrote them
            file.write(half)
    encode_dataset(
        a_codec(), str(small_dataset), str(dest), FRAMES, SIZE, shard_clips=5, progress=lambda p: done.append(p.done)
    )
    assert done == [5, 7, 8, 9, 10, 10, 11, 12, 12], "nothing is encoded twice"
    for file in ("index.json", *(f"shard-{n:06d}.{kind}" for n in range(3) for kind in ("tar", "idx"))):
        assert (dest / file).read_bytes() == (whole / file).read_bytes(), file
    assert not (dest / ".encode").exists()


def test_what_is_complete_is_left_and_what_is_other_refused(whole: Path, small_dataset: Path, tmp_path: Path) -> None:
    before = (whole / "index.json").stat().st_mtime_ns
    assert encode(str(small_dataset), str(whole)).samples == 12 * WINDOWS
    assert (whole / "index.json").stat().st_mtime_ns == before
    for change, said in (
        (lambda: encode_dataset(a_codec(1), str(small_dataset), str(whole), FRAMES, SIZE), "already holds the dataset"),
        (lambda: encode(str(whole), str(tmp_path / "twice")), "holds latents already; name a dataset of videos"),
        (lambda: encode(str(small_dataset), str(small_dataset)), "is the dataset to read; name another folder"),
        (lambda: encode_dataset(a_codec(), str(small_dataset), str(tmp_path / "long"), 17, SIZE),
         r"none of 12 clips could be encoded in windows of 17 frames; lower --frames[^\n]*\n  short: 12, for example "),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            change()
    assert not (tmp_path / "long" / ".encode").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tar").touch()
    with pytest.raises(InputError, match=r"already holds 1 shards \(a.tar ...\) and no encoding to go on with"):
        encode(str(small_dataset), str(tmp_path / "other"))


def captioned(source: Path, dest: Path) -> None:
    """The dataset with an embedding of its own beside every second clip."""
    dest.mkdir()
    for shard in sorted(source.glob("*.tar")):
        with tarfile.open(shard) as old, tarfile.open(dest / shard.name, "w") as new:
            for n, member in enumerate(old):
                new.addfile(member, old.extractfile(member))
                if member.name.endswith(".json") and n % 4 == 1:
                    told = io.BytesIO()
                    np.save(told, np.full((2, 3), n, np.float16))
                    info = tarfile.TarInfo(member.name.replace(".json", ".t5.npy"))
                    info.size = told.tell()
                    told.seek(0)
                    new.addfile(info, told)
    index.index_dataset(str(dest), extra={"text_encoder": "tiny-t5"})


def test_captions_come_along(small_dataset: Path, tmp_path: Path) -> None:
    captioned(small_dataset, tmp_path / "clips")
    encode(str(tmp_path / "clips"), str(tmp_path / "latents"))
    source, dataset = (index.open_dataset(str(tmp_path / name)) for name in ("clips", "latents"))
    layout = dataset.latents
    assert layout is not None and (layout.caption_width, layout.text_encoder) == (3, "tiny-t5")
    told = {row["key"].decode(): row["caption_crc"] for _, rows in source.all_records() for row in rows}
    kept = {row["key"].decode(): row["caption_crc"] for _, rows in dataset.all_records() for row in rows}
    assert len(kept) == 12 * WINDOWS and len(set(told.values())) > 3
    assert all(crc == told[key[:-4]] for key, crc in kept.items())
    assert dataset.card.counts["captions"] == source.card.counts["captions"] * WINDOWS == 12
    takes_a_step(dataset)


BACKBONE = {"low": 4, "high": 6, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1}
CODECS = {
    "decovae": {
        "latent_channels": 2, "backbone": BACKBONE, "motion": {"width": 4, "latent": 4}, "perceptual": None,
        "window": 5,
    },
    "videovaeplus": {
        "latent_channels": 4, "width": 8, "multipliers": [1, 2, 2, 2], "blocks": 1, "groups": 4, "temporal_width": 8,
        "perceptual": None,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "frames", "parts", "constants"),
    [
        ("decovae", 9, ((0, 2), (1, 2)), {"frames": [5, 5], "shared": [0, 1]}),
        ("videovaeplus", 16, ((0, 4),), {"frames": [16]}),
    ],
)
def test_windows_of_a_codec_are_joined(
    small_dataset: Path, tmp_path: Path, name: str, frames: int, parts: object, constants: dict[str, list[int]]
) -> None:
    """DeCo-VAE at 9 frames has two windows of 5 that share a frame, in one sample."""
    kind = recipes.load(name)
    recipe = kind(kind.Config.model_validate(CODECS[name]))
    codec = Codec(recipe, recipe.build(0))
    encode_dataset(codec, str(small_dataset), str(tmp_path), frames, SIZE)
    dataset = index.open_dataset(str(tmp_path))
    layout = dataset.latents
    assert layout is not None and layout.steps == len(parts)
    assert {name: t.shape for name, t in layout.tensors.items()} == dict(recipe.latent(frames, *SIZE).shapes)
    assert {t.parts for t in layout.tensors.values()} == {parts}
    told = {f"{n:08d}.{key}": (value,) for key, values in constants.items() for n, value in enumerate(values)}
    assert dict(layout.constants) == told
    steps = parse(next(iter(stored(dataset).values()))[0], "")
    arrays, masks = empty(layout)
    join(steps, layout, "", arrays, masks)
    back = split({name: array[None] for name, array in arrays.items()}, layout)
    found = {f"{n:08d}.{name}": value for n, latent in enumerate(back) for name, value in latent.items()}
    assert found.keys() == steps.keys() and all(torch.equal(found[key], value) for key, value in steps.items())
    assert torch.cat(list(codec.decode(back, SIZE)), dim=2).shape[2] == frames
    takes_a_step(dataset)


def test_latents_of_several_layouts_are_refused() -> None:
    one = encoding._Tally.of([{"z": torch.zeros(1, 2, 3), "frames": torch.tensor([4])}], 8.0, "a")
    longer = encoding._Tally.of([{"z": torch.zeros(1, 2, 5), "frames": torch.tensor([4])}], 8.0, "b")
    both = encoding._Tally()
    both.add(one, "a")
    both.add(longer, "b")
    assert both.lengths == {"z": {"3": 1, "5": 1}} and both.steps == [{"z": [1, 2, 5]}]
    nothing = encoding._Tally.of([{"z": torch.zeros(1, 2, 0), "frames": torch.tensor([4])}], 8.0, "b")
    both.add(nothing, "b")
    assert both.lengths == {"z": {"0": 1, "3": 1, "5": 1}} and both.tokens == {"z": 8}
    for stream, said in (
        (
            [{"z": torch.zeros(1, 2, 3), "frames": torch.tensor([9])}],
            r"frames is \[9\], and \[4\] in the samples before",
        ),
        ([{"z": torch.zeros(1, 3, 3), "frames": torch.tensor([4])}], r"z of step 0 is \[1, 3, 3\], and \[1, 2, 5\]"),
        ([{"y": torch.zeros(1, 2, 3), "frames": torch.tensor([4])}], r"step 0 has y, and z"),
        ([{"z": torch.zeros(1, 2, 3)}] * 2, "the codec made 2 steps, and 1"),
    ):
        with pytest.raises(InputError, match=f"^c: .*{said}"):
            both.add(encoding._Tally.of(stream, 8.0, "c"), "c")


def test_window_sizes_are_asked_for_or_known(tmp_path: Path) -> None:
    codecs.export(a_codec(), str(tmp_path))
    assert encoding.window(str(tmp_path), 7, "32x48") == (7, (32, 48))
    with pytest.raises(
        InputError, match="is an export, which does not say how it was trained; give --frames and --size"
    ):
        encoding.window(str(tmp_path), 7, None)
    with pytest.raises(InputError, match="--size 32: write height and width in pixels, 256x256 for example"):
        encoding.window(str(tmp_path), 7, "32")
