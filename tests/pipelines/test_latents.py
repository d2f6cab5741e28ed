"""Stored latents: what a file holds comes back as arrays with masks, in the order and with the resume of pixels."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save

from pipelines import index, latents, lint, storage
from pipelines.contracts import BatchPlan, ClipRule, LatentLayout, LatentTensor
from pipelines.cutting import tar_member
from pipelines.faults import FaultBudget, InputError, Skip
from pipelines.loader import Loader

GRID = LatentTensor(tokens=(3, 2, 2), parts=((0, 1), (2, 2)), mean=(0.0, 1.0), std=(1.0, 2.0))
ROW = LatentTensor(tokens=(5,), parts=((1, 5),), mean=(0.5,), std=(1.5,), lengths={2: 6, 3: 6, 5: 8})
LAYOUT = LatentLayout(
    codec={"recipe": "toy", "weights": "0" * 32},
    frames=9,
    height=16,
    width=16,
    fps=8.0,
    steps=3,
    tensors={"grid": GRID, "row": ROW},
    constants={"00000001.frames": (9,)},
)
RULE = ClipRule(frames=1, sizes=((1, 1),), flip=0.0)
CLIPS, BATCH, STEPS = 20, 6, 7


def stream(clip: int) -> dict[str, torch.Tensor]:
    """The file of a clip: every number says whose it is."""
    length = sorted(LAYOUT.tensors["row"].lengths)[clip % 3]
    return {
        "00000000.grid": torch.full((1, 2, 1, 2, 2), float(clip)),
        "00000002.grid": torch.full((1, 2, 2, 2, 2), clip + 0.5),
        "00000001.row": torch.arange(length, dtype=torch.float32)[None, None] + clip,
        "00000001.frames": torch.tensor([9]),
    }


def write(url: str, *, name: str = "latents", layout: LatentLayout = LAYOUT, damaged: int | None = None) -> None:
    """A dataset of 20 samples in two shards, with captions of one or two tokens for the even ones."""
    shards = []
    for number, span in enumerate((range(0, 12), range(12, CLIPS))):
        tar, members = b"", []
        for clip in span:
            tensors = stream(clip)
            if clip == damaged:
                del tensors["00000002.grid"]
            data, places = save(tensors), {}
            caption = _npy(np.full((1 + clip % 4 // 2, 4), clip, np.float16)) if clip % 2 == 0 else b""
            for suffix, content in (("safetensors", data), ("json", b"{}"), ("t5.npy", caption)):
                if content:
                    whole = tar_member(f"clip-{clip:02d}.{suffix}", content)
                    places[suffix] = len(tar) + 512
                    tar += whole
            told = {"caption_offset": places.get("t5.npy", 0), "caption_bytes": len(caption)}
            told["caption_crc"] = zlib.crc32(caption)
            members.append(
                index.Member(key=f"clip-{clip:02d}", offset=places["safetensors"], bytes=len(data),
                             crc=zlib.crc32(data), frames=9, fps=8.0, height=16, width=16, motion=clip / 100,
                             kind=index.LATENTS, **told)
            )  # fmt: skip
        tar += bytes(1024)
        file = f"shard-{number:06d}.tar"
        storage.write_bytes(storage.join(url, file), tar)
        shards.append(index.write_shard_index(url, file, members, len(tar)))
    totals = index.merge(
        [index.summary(rows) for _, rows in index.Dataset(url, index.Card(name="x"), shards, "", url).all_records()]
    )
    told = {"latents": layout.model_dump(mode="json", exclude={"caption_width", "text_encoder"})}
    index.write_index(url, index.Card(name=name, embeddings={"width": 4}, **told, **totals), shards)


def _npy(value: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, value, allow_pickle=False)
    return file.getvalue()


def plan(step: int) -> BatchPlan:
    return BatchPlan(step, "flow", step * BATCH, BATCH, "video", step * BATCH, (1, 1), RULE)


def loader(url: str, rank: int = 0, world: int = 1, **settings) -> Loader:
    dataset = index.open_dataset(url)
    return Loader(
        [(dataset, 1.0)], None, plan, STEPS, seed=3, micro_batch=settings.pop("micro_batch", 2), rank=rank, world=world,
        **settings,
    )  # fmt: skip


def rows(made, first: int = 0) -> dict[int, tuple]:
    """What each place got, as bytes."""
    found = {}
    for _, batches in made.iter_from(first):
        for batch in batches:
            for b, place in enumerate(batch.places):
                tensors = (batch.arrays["grid"], batch.masks["grid"], batch.arrays["row"], batch.masks["row"])
                emb_BLD, mask_BL = batch.caption_emb_BLD, batch.caption_mask_BL
                told = emb_BLD[b][mask_BL[b]].tolist()
                found[place] = (batch.sources[b].key, *(tensor[b].numpy().tobytes() for tensor in tensors), told)
    made.close()
    return found


def test_a_sample_comes_back_as_it_was_stored(tmp_path):
    url = str(tmp_path)
    write(url)
    dataset = index.open_dataset(url)
    assert dataset.latents == LAYOUT.model_copy(update={"caption_width": 4})
    assert dataset.card.counts["captions"] == 10 and dataset.card.statistics["frames"]["greatest"] == 9
    for _, batches in loader(url).iter_from(0):
        for batch in batches:
            assert batch.pixels_BCTHW.shape == (2, 3, 0, 1, 1) and batch.fps_B.tolist() == [8.0, 8.0]
            assert batch.arrays["grid"].shape == (2, 2, 3, 2, 2) and batch.arrays["row"].shape == (2, 1, 5)
            assert batch.masks["grid"].all()
            for b, source in enumerate(batch.sources):
                clip = int(source.key[-2:])
                length = (2, 3, 5)[clip % 3]
                assert (batch.arrays["grid"][b, :, 0] == clip).all() and (
                    batch.arrays["grid"][b, :, 1:] == clip + 0.5
                ).all()
                assert batch.masks["row"][b].tolist() == [k < length for k in range(5)]
                assert batch.arrays["row"][b, 0].tolist() == [clip + k if k < length else 0 for k in range(5)]
                assert bool(batch.caption_mask_BL[b].any()) == (clip % 2 == 0)


def test_order_does_not_depend_on_ranks_workers_or_where_it_resumes(tmp_path):
    url = str(tmp_path / "latents")
    write(url)
    whole = rows(loader(url))
    assert sorted(whole) == list(range(STEPS * BATCH))
    split = {}
    for rank in range(3):
        split |= rows(loader(url, rank, 3, micro_batch=1, workers=2, read_ahead=4))
    assert split == whole
    late = rows(loader(url, workers=0), first=4)
    assert late == {place: row for place, row in whole.items() if place >= 4 * BATCH}
    assert len({whole[place][0] for place in range(CLIPS)}) == CLIPS, "an epoch has every sample once"


def test_a_sample_of_another_layout_is_skipped_named_and_substituted(tmp_path):
    write(str(tmp_path), damaged=5)
    budget = FaultBudget()
    made = loader(str(tmp_path), budget=budget)
    found = rows(made)
    assert "clip-05" not in {row[0] for row in found.values()} and len(found) == STEPS * BATCH
    assert budget.reasons == {"layout": made.metrics.substitutes} and budget.reasons["layout"] >= 2
    assert budget.named[0].endswith("clip-05: grid of step 2 is missing; the dataset's card says [1, 2, 2, 2, 2]")
    findings = [str(finding) for finding in lint.lint_dataset(str(tmp_path), every_clip=True)]
    assert len(findings) == 2  # and the clips without captions
    assert "clip-05: layout: grid of step 2 is missing; the dataset's card says [1, 2, 2, 2, 2]; pack it" in findings[0]


def test_lint_knows_latents(tmp_path):
    write(str(tmp_path))
    said = [
        str(finding) for finding in lint.lint_dataset(str(tmp_path), rules=[ClipRule(frames=99, sizes=((512, 512),))])
    ]
    assert len(said) == 1 and "no caption embedding" in said[0], "clip rules are of pixels"
    wrong = LAYOUT.model_dump(mode="json") | {"steps": 0}
    text = (tmp_path / "index.json").read_text()
    card = index.open_dataset(str(tmp_path)).card
    index.write_index(
        str(tmp_path), card.model_copy(update={"latents": wrong}), [index.Shard(**line) for line in _lines(text)]
    )
    said = [str(finding) for finding in lint.lint_dataset(str(tmp_path))]
    assert len(said) == 1 and "card.latents.steps: Input should be greater than 0; encode it again" in said[0]


def _lines(text: str) -> list[dict]:
    return json.loads(text)["shards"]


def test_files_that_are_not_safetensors_are_refused():
    for data in (b"", b"junk", b"\xff" * 64, (1 << 60).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"[]"):
        with pytest.raises(Skip, match="corrupt: here: not a safetensors file"):
            latents.parse(data, "here")


def test_shapes_are_those_of_the_card():
    arrays, masks = latents.empty(LAYOUT)
    for key, value, said in (
        (
            "00000000.grid",
            torch.zeros(1, 2, 1, 2, 3),
            r"grid of step 0 is float32 \[1, 2, 1, 2, 3\]; .* \[1, 2, 1, 2, 2\]",
        ),
        ("00000000.grid", torch.zeros(1, 2, 1, 2, 2, dtype=torch.int32), r"grid of step 0 is int32"),
        ("00000001.row", torch.zeros(1, 1, 6), r"row of step 1 is float32 \[1, 1, 6\]; .* \[1, 1, 5\]"),
        ("00000001.row", torch.zeros(1, 5), r"row of step 1 is float32 \[1, 5\]"),
    ):
        with pytest.raises(Skip, match=said):
            latents.join(stream(0) | {key: value}, LAYOUT, "here", arrays, masks)


def test_what_is_joined_splits_into_the_stream_again():
    arrays, masks = latents.empty(LAYOUT)
    latents.join(stream(7), LAYOUT, "here", arrays, masks)
    kept = {name: array[None][..., : int(masks[name].sum(-1).max())] for name, array in arrays.items()}
    back = {
        f"{n:08d}.{name}": value for n, step in enumerate(latents.split(kept, LAYOUT)) for name, value in step.items()
    }
    assert back.keys() == stream(7).keys()
    assert all(torch.equal(back[key], value) for key, value in stream(7).items())


def test_an_index_is_not_made_from_shards_of_latents(tmp_path):
    write(str(tmp_path))
    before = (tmp_path / "index.json").read_bytes()
    with pytest.raises(InputError, match="holds latents and their index; an index made from the shards would lose"):
        index.index_dataset(str(tmp_path))
    assert (tmp_path / "index.json").read_bytes() == before
    for path in (*tmp_path.glob("*.idx"), tmp_path / "index.json"):
        path.unlink()
    with pytest.raises(InputError, match=r"2 shards at .* hold no usable clip; skipped: \{'latents': 20\}"):
        index.index_dataset(str(tmp_path))


def test_a_clip_may_have_kept_nothing():
    arrays, masks = latents.empty(LAYOUT)
    latents.join(stream(0) | {"00000001.row": torch.zeros(1, 1, 0)}, LAYOUT, "here", arrays, masks)
    assert not masks["row"].any() and masks["grid"].all()


def test_mixtures_are_of_one_codec(tmp_path, small_dataset):
    first, second, other = (str(tmp_path / name) for name in ("first", "second", "other"))
    write(first)
    write(second, name="second")
    write(other, name="other", layout=LAYOUT.model_copy(update={"codec": {"recipe": "toy", "weights": "1" * 32}}))
    opened = [index.open_dataset(url) for url in (first, second, other, str(small_dataset))]
    assert latents.common_layout(opened[:2]) == opened[0].latents
    assert latents.common_layout(opened[3:]) is None
    with pytest.raises(
        InputError, match=r"latents and other hold latents of different layouts or codecs \(0{12} and 1{12}"
    ):
        latents.common_layout([opened[0], opened[2]])
    with pytest.raises(InputError, match="latents and small are datasets of pixels and of latents; train on one kind"):
        latents.common_layout([opened[0], opened[3]])
