"""The loader: the same batches whoever reads them, only what is used is read, and every fault has an end."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
import threading
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from faulty import Fault, FaultyProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import moving
from test_index import npy, picture, tar

from pipelines import order, storage
from pipelines.clips import make_clip
from pipelines.contracts import Batch, BatchPlan, ClipRule, Source, derive
from pipelines.faults import FaultBudget, InputError
from pipelines.index import Card, Dataset, Member, Shard, index_dataset, open_dataset, write_index, write_shard_index
from pipelines.loader import Loader, _Memory, coalesce
from pipelines.order import Mixture

torch.set_num_threads(1)
RULE = ClipRule(frames=3, stride=(1, 2), sizes=((16, 16),))
BATCH = 8


def plan(step: int, clips: int = BATCH, rule: ClipRule = RULE) -> BatchPlan:
    return BatchPlan(step, "stage", step * clips, clips, "video", step * clips, rule.sizes[0], rule)


@pytest.fixture(scope="module")
def clips() -> list[bytes]:
    return [moving(6 + i % 5, (20, 24), g="4", crf=str(20 + i)) for i in range(10)]


def fill(url: str, clips: list[bytes], shards: int = 3, each: int = 7, caption: bool = False) -> Dataset:
    for shard in range(shards):
        members = []
        for i in range(each):
            members.append((f"{shard}-{i}.mp4", clips[(shard * each + i) % len(clips)]))
            if caption and i % 2:
                members.append((f"{shard}-{i}.t5.npy", npy(np.full((i, 4), i, np.float16))))
        storage.write_bytes(storage.join(url, f"shard-{shard:06d}.tar"), tar(members))
    index_dataset(url, name="small")
    return open_dataset(url)


@pytest.fixture
def dataset(tmp_path: Path, clips: list[bytes]) -> Dataset:
    return fill(str(tmp_path / "data"), clips)


def make(dataset: Dataset, steps: int = 6, **changes: object) -> Loader:
    settings: dict = {
        "seed": 5,
        "granularity": 2,
        "micro_batch": 3,
        "workers": 1,
        "budget": FaultBudget(0.5),
        "plan": plan,
    } | changes
    return Loader([(dataset, 1.0)], None, steps=steps, **settings)


Trained = dict[int, tuple[str, int, bytes, float]]


def trained(loaders: list[Loader], first: int = 0, last: int | None = None) -> Trained:
    """place -> (source, substitute, pixels, fps) of what the ranks train on; checks the weights of each step."""
    found: Trained = {}
    weights: Counter[int] = Counter()
    for loader in loaders:
        for step, batches in loader.iter_from(first):
            for batch in batches:
                weights[step] += batch.weight
                if batch.weight:
                    _add(found, batch)
            if step + 1 == last:
                break
        loader.close()
    assert all(weight == pytest.approx(1, abs=1e-12) for weight in weights.values())
    return found


def _add(found: Trained, batch: Batch) -> None:
    for b, place in enumerate(batch.places):
        assert place not in found
        pixels = batch.pixels_BCTHW[b].numpy().tobytes()
        found[place] = (str(batch.sources[b]), batch.substitutes[b], pixels, float(batch.fps_B[b]))


@pytest.fixture
def reference(dataset: Dataset) -> Trained:
    return trained([make(dataset, workers=0, read_ahead=1)])


def test_memory_is_used_again_but_never_while_someone_holds_a_view_of_it(dataset: Dataset) -> None:
    places, held = [], []
    for step, batches in make(dataset, steps=24, micro_batch=BATCH).iter_from(0):
        pixels_BCTHW = batches[0].pixels_BCTHW
        places.append(pixels_BCTHW.data_ptr())
        if step == 3:
            held = [pixels_BCTHW[1, 2], pixels_BCTHW.view(-1).numpy()]
            kept = [held[0].clone(), held[1].copy()]
        if step == 12:
            assert places[3] not in places[4:], "held"
            assert torch.equal(held[0], kept[0]) and (held[1] == kept[1]).all()
            held.clear()
        del batches, pixels_BCTHW
    assert len(set(places)) <= 6, "as many as are under way, and the one that was held"
    assert places[3] in places[13:]


def test_memory_of_an_earlier_stage_is_let_go() -> None:
    memory, window = _Memory(), []
    for step in range(60):
        shapes = [(64, 64)] * 12 if step < 20 else [(8,), (4, 4)]
        window.append([memory.empty(shape, step) for shape in shapes])
        del window[:-3]
        del shapes
    assert sum(whole.nbytes for _, whole in memory.free) < 64 * 64 * 4


def test_clips_stand_where_the_order_says(dataset: Dataset, reference: Trained) -> None:
    mixture = Mixture(make(dataset)._mixtures["video"].seed, [dataset.clips], None, 2)
    assert sorted(reference) == list(range(6 * BATCH))
    for place, (source, substitute, *_) in reference.items():
        shard, row = dataset.locate(mixture.draw(place).clip)
        key = dataset.records(shard)[row]["key"].decode()
        assert (source, substitute) == (str(Source("small", f"shard-{shard:06d}.tar", key)), 0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_workers_and_read_ahead_change_nothing(dataset: Dataset, reference: Trained, workers: int) -> None:
    for read_ahead, memory_bytes in ((1, 1), (4, 1 << 30)):
        loader = make(dataset, workers=workers, read_ahead=read_ahead, memory_bytes=memory_bytes)
        assert trained([loader]) == reference


@pytest.mark.parametrize("world", [2, 3, 5, 8, 11])
def test_world_size_and_micro_batch_change_nothing(dataset: Dataset, reference: Trained, world: int) -> None:
    for micro_batch in (1, 4):
        ranks = [make(dataset, rank=rank, world=world, micro_batch=micro_batch) for rank in range(world)]
        assert trained(ranks) == reference


def test_a_run_stopped_and_resumed_at_other_sizes_trains_on_the_same(dataset: Dataset, reference: Trained) -> None:
    rng = random.Random(3)
    for _ in range(3):
        found: Trained = {}
        step, state = 0, None
        while step < 6:
            world, last = rng.randint(1, 4), min(6, step + rng.randint(1, 3))
            ranks = [make(dataset, rank=r, world=world, workers=rng.randint(0, 2)) for r in range(world)]
            if state:
                for loader in ranks:
                    loader.load_state_dict(state)
            found |= trained(ranks, step, last)
            states = [loader.state_dict() for loader in ranks]
            assert all(other == states[0] for other in states)
            step, state = states[0]["step"], states[0]
        assert found == reference


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, clips: list[bytes]) -> tuple[str, dict[int, Shard]]:
    """A folder with shards of 1 to 9 clips, and their lines of an index by size."""
    url = str(tmp_path_factory.mktemp("shards"))
    for size in range(1, 10):
        members = [(f"{size}-{i}.mp4", clips[(size * i + i) % 10]) for i in range(size)]
        storage.write_bytes(storage.join(url, f"{size}.tar"), tar(members))
    index_dataset(url, name="small")
    lines = storage.read_json(storage.join(url, "index.json"))["shards"]
    return url, {line["clips"]: Shard(**line) for line in lines}


@given(
    seed=st.integers(0, 2**63 - 1),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    granularity=st.integers(1, 5),
    batch=st.integers(1, 12),
    parts=st.lists(
        st.tuples(st.integers(1, 2), st.integers(1, 64), st.integers(0, 3), st.integers(1, 4), st.integers(1, 3)),
        min_size=1,
        max_size=3,
    ),
)
@settings(max_examples=12, deadline=None)
def test_however_a_run_is_split_its_pixels_are_those_of_brute_force(
    shards: tuple[str, dict[int, Shard]],
    seed: int,
    sizes: list[int],
    granularity: int,
    batch: int,
    parts: list[tuple[int, int, int, int, int]],
) -> None:
    """``parts`` are (steps, world, workers, read-ahead, micro-batch), one resumed after the other."""
    url, lines = shards
    dataset = Dataset(url, Card(name="small"), [lines[size] for size in sizes], "", url)
    steps = sum(part[0] for part in parts)
    mixture = Mixture(derive(seed, 0, "stream/video"), [dataset.clips], None, granularity)
    wanted: Trained = {}
    for place in range(steps * batch):
        epoch, position = divmod(place, dataset.clips)
        shard, row = dataset.locate(int(mixture.epoch_order(0, epoch)[position]))
        record, source = dataset.records(shard)[row], Source("small", dataset.files[shard], "")
        first, last = int(record["offset"]), int(record["offset"]) + int(record["bytes"])
        data = storage.read_bytes(dataset.shard_url(shard), first, last)
        clip = make_clip(data, record, RULE, (16, 16), seed, place, source)
        name = str(Source("small", dataset.files[shard], record["key"].decode()))
        wanted[place] = name, 0, clip.pixels_CTHW.numpy().tobytes(), float(torch.tensor(clip.fps))
    found: Trained = {}
    step = 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pipelines.loader.READERS", 1)
        for some, world, workers, read_ahead, micro_batch in parts:
            made = {"seed": seed, "granularity": granularity, "plan": lambda step: plan(step, batch), "world": world}
            made |= {"workers": workers, "read_ahead": read_ahead, "micro_batch": micro_batch}
            ranks = [make(dataset, steps, rank=rank, **made) for rank in range(world)]
            found |= trained(ranks, step, step + some)
            step += some
    assert found == wanted


def test_a_state_of_another_run_is_refused(dataset: Dataset, tmp_path: Path, clips: list[bytes]) -> None:
    state = make(dataset).state_dict()
    assert len(str(state)) < 500
    with pytest.raises(InputError, match=r"data\.granularity is 4, but this run started with 2; set it back"):
        make(dataset, granularity=4).load_state_dict(state)
    other = fill(str(tmp_path / "other"), clips[::-1])
    with pytest.raises(InputError, match="datasets are not those that this run started with"):
        make(other).load_state_dict(state)


def test_a_world_larger_than_the_batch_gets_fillers_of_weight_zero(dataset: Dataset) -> None:
    ranks = [make(dataset, steps=2, rank=rank, world=11) for rank in range(11)]
    weights = [[batch.weight for _, batches in loader.iter_from(0) for batch in batches] for loader in ranks]
    assert all(len(rank) == 2 for rank in weights)
    assert sum(weight == 0 for rank in weights for weight in rank) == 2 * (11 - BATCH)
    assert sum(loader.metrics.clips for loader in ranks) == 2 * BATCH


def test_image_batches_come_from_images_or_from_frames_of_videos(
    dataset: Dataset, tmp_path: Path, reference: Trained
) -> None:
    storage.write_bytes(str(tmp_path / "i" / "x.tar"), tar([(f"{i}.png", picture((20, 20 + i))) for i in range(9)]))
    index_dataset(str(tmp_path / "i"), name="pictures")
    pictures = open_dataset(str(tmp_path / "i"))
    image_rule = RULE.model_copy(update={"frames": 1})

    def mixed(step: int) -> BatchPlan:
        if step % 3 == 2:
            first = step // 3 * BATCH
            return BatchPlan(step, "s", step * BATCH, BATCH, "image", first, (16, 16), image_rule)
        return BatchPlan(step, "s", step * BATCH, BATCH, "video", (step - step // 3) * BATCH, (16, 16), RULE)

    for images, names in (([(pictures, 1.0)], {"pictures"}), (None, {"small"})):
        loader = Loader(
            [(dataset, 1.0)], images, mixed, 6, seed=5, granularity=2, micro_batch=8, budget=FaultBudget(0.5)
        )
        videos: list[str] = []
        for step, (batch,) in loader.iter_from(0):
            assert batch.pixels_BCTHW.shape == (8, 3, 1 if step % 3 == 2 else 3, 16, 16)
            if step % 3 == 2:
                assert {source.dataset for source in batch.sources} == names
            else:
                videos += [str(source) for source in batch.sources]
        assert videos == [reference[place][0] for place in range(4 * BATCH)]


def test_a_micro_batch_takes_as_many_images_as_a_clip_has_frames(dataset: Dataset) -> None:
    image_rule = RULE.model_copy(update={"frames": 1})

    def mixed(step: int) -> BatchPlan:
        if step:
            return BatchPlan(step, "s", BATCH, 14, "image", 0, (16, 16), image_rule, per_clip=RULE.frames)
        return BatchPlan(step, "s", 0, BATCH, "video", 0, (16, 16), RULE)

    sizes, places = [], []
    for rank in range(2):
        loader = Loader([(dataset, 1.0)], None, mixed, 2, seed=5, rank=rank, world=2, micro_batch=2)
        for step, batches in loader.iter_from(0):
            sizes.append([len(batch.pixels_BCTHW) for batch in batches])
            places += [place for batch in batches for place in batch.places] if step else []
    assert sizes == [[2, 2], [3, 4], [2, 2], [3, 4]]
    assert sorted(places) == list(range(BATCH, BATCH + 14))


def test_captions_are_padded_and_masked(tmp_path: Path, clips: list[bytes]) -> None:
    dataset = fill(str(tmp_path), clips, caption=True)
    assert dataset.caption_width == 4 and dataset.card.counts["captions"] == 9
    for _, batches in make(dataset, steps=4, micro_batch=1).iter_from(0):  # some of them without any caption
        for batch in batches:
            assert batch.caption_emb_BLD is not None and batch.caption_mask_BL is not None
            assert (
                batch.caption_emb_BLD.shape[2] == 4 and batch.caption_mask_BL.shape == batch.caption_emb_BLD.shape[:2]
            )
            for b, source in enumerate(batch.sources):
                number = int(source.key.split("-")[1])
                length = number if number % 2 else 0
                assert batch.caption_mask_BL[b].sum() == length
                assert (batch.caption_emb_BLD[b, :length] == number).all()
                assert (batch.caption_emb_BLD[b, length:] == 0).all()
    for _, (batch, *_) in make(dataset, steps=1, captions=False).iter_from(0):
        assert batch.caption_emb_BLD is None
    other = Dataset(dataset.url, Card(name="other", embeddings={"width": 5}), [], "", dataset.base)
    other.clips = 1
    with pytest.raises(InputError, match=r"embeddings of different widths: {'small': 4, 'other': 5}; use one"):
        Loader([(dataset, 1.0), (other, 1.0)], None, plan, 1, seed=1, micro_batch=1)


def _break(dataset: Dataset, shard: int, row: int) -> str:
    """Changes one byte of a clip on storage; returns its source."""
    record = dataset.records(shard)[row]
    path = Path(dataset.shard_url(shard))
    data = bytearray(path.read_bytes())
    data[int(record["offset"]) + int(record["bytes"]) // 2] ^= 0xFF
    path.write_bytes(data)
    return str(Source("small", dataset.files[shard], record["key"].decode()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_clip_is_skipped_and_shifts_no_one(dataset: Dataset, reference: Trained, workers: int) -> None:
    broken = _break(dataset, 1, 3)
    hit = {place for place, (source, *_) in reference.items() if source == broken}
    assert len(hit) >= 2
    budget = FaultBudget(0.5)
    found = trained([make(open_dataset(dataset.url), workers=workers, budget=budget)])
    assert {place for place in found if found[place] != reference[place]} == hit
    for place in hit:
        assert found[place][0] != broken and found[place][1] >= 1
    assert set(budget.counts()) == {"digest"} and budget.counts()["digest"] >= len(hit)
    assert any(broken in line for line in budget.named)
    two = trained([make(open_dataset(dataset.url), rank=rank, world=2, workers=workers) for rank in range(2)])
    assert two == found


def test_a_spent_budget_ends_the_run_and_names_the_clips(dataset: Dataset) -> None:
    broken = {_break(dataset, shard, row) for shard in range(3) for row in range(0, 7, 2)}
    loader = make(open_dataset(dataset.url), steps=50, budget=FaultBudget(0.1, grace=3))
    with pytest.raises(InputError, match=r"of \d+ clips were skipped; data\.skip_budget allows 10") as caught:
        for _ in loader.iter_from(0):
            pass
    assert any(source in str(caught.value) for source in broken)


def test_clips_that_can_not_be_decoded_are_skipped(tmp_path: Path, clips: list[bytes]) -> None:
    """Their digests are right: they were broken before they were indexed."""
    data = tar([(f"{i}.mp4", clips[i] if i != 2 else b"junk" * 100) for i in range(4)])
    storage.write_bytes(str(tmp_path / "x.tar"), data)
    members = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        infos = archive.getmembers()
    for info in infos:
        body = data[info.offset_data : info.offset_data + info.size]
        members.append(Member(info.name[:-4], info.offset_data, info.size, zlib.crc32(body), 6, 24.0, 20, 24))
    write_index(str(tmp_path), Card(name="small"), [write_shard_index(str(tmp_path), "x.tar", members, len(data))])
    loader = make(open_dataset(str(tmp_path)), budget=FaultBudget(0.9))
    sources = {source for source, *_ in trained([loader]).values()}
    assert sources == {f"small/x.tar/{i}" for i in (0, 1, 3)}
    assert set(loader.metrics.skips) == {"undecodable"}


def test_clips_that_are_too_short_are_skipped_or_end_the_run(dataset: Dataset) -> None:
    rule = RULE.model_copy(update={"frames": 8, "stride": (1, 1)})
    loader = make(dataset, plan=lambda step: plan(step, rule=rule), budget=FaultBudget(0.95))
    trained([loader])
    assert set(loader.metrics.skips) == {"short"}
    strict = rule.model_copy(update={"short": "fail"})
    with pytest.raises(InputError, match=r"small/shard-.*: \d frames; a clip of 8 frames at stride 1 needs 8"):
        trained([make(dataset, plan=lambda step: plan(step, rule=strict))])


def test_a_dataset_without_a_usable_clip_ends_in_a_message(dataset: Dataset) -> None:
    rule = RULE.model_copy(update={"frames": 100})
    with pytest.raises(InputError, match=r"100 substitutes for place .* can't be used either"):
        trained([make(dataset, plan=lambda step: plan(step, rule=rule), budget=FaultBudget(1.0))])


def test_a_missing_or_changed_shard_is_refused_by_name(dataset: Dataset, clips: list[bytes]) -> None:
    path = Path(dataset.shard_url(1))
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(
        InputError, match=r"shard .*shard-000001\.tar is missing, but the index of dataset small names it"
    ):
        trained([make(dataset)])
    path.write_bytes(whole[:3000])
    with pytest.raises(InputError, match=r"shard-000001\.tar (has 3000 bytes|.*changed)"):
        trained([make(dataset)])
    path.write_bytes(whole + bytes(10240))
    broken = bytearray(whole)
    for member in range(512, len(whole) - 512, 1024):
        broken[member] ^= 1
    path.write_bytes(broken + bytes(10240))
    with pytest.raises(InputError, match=r"shard-000001\.tar has \d+ bytes; .*small changed under the run"):
        trained([make(dataset)])


@pytest.mark.parametrize("names", [[f"other-{i}.mp4" for i in range(7)], [f"1-{i}.mp4" for i in reversed(range(7))]])
def test_another_shard_of_the_same_size_is_refused_by_name(dataset: Dataset, clips: list[bytes], names: list) -> None:
    path = Path(dataset.shard_url(1))
    length = path.stat().st_size
    path.write_bytes(tar([(name, clips[(7 + i) % 10][::-1]) for i, name in enumerate(names)]).ljust(length, b"\0"))
    assert path.stat().st_size == length
    message = r"shard-000001\.tar has (other|1)-\d\.mp4 at byte \d+; its index says 1-\d: dataset small changed under"
    with pytest.raises(InputError, match=message):
        trained([make(dataset)])
    path.write_bytes(bytes(length))
    with pytest.raises(InputError, match=r"has no member at byte \d+; its index says 1-\d: dataset small changed"):
        trained([make(dataset)])


FAULTS: dict[str, list[Fault]] = {
    "resets": [Fault("reset", on="GET")] * 3,
    "503": [Fault("status", 503, "Retry-After: 0\r\n", on="GET")] * 3,
    "truncated": [Fault("truncate", bytes=100, on="GET")] * 2,
    "wrong digests": [Fault("corrupt", on="shard-000002.tar")] * 2,
    "stalls": [Fault("stall", on="GET")],
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_store_change_nothing(
    proxy: FaultyProxy, s3_url: str, clips: list[bytes], reference: Trained, name: str
) -> None:
    dataset = fill(s3_url, clips)
    loader = make(dataset, workers=2)
    before = sum(storage.counters.snapshot()["retries"].values())
    proxy.faults.extend(FAULTS[name])
    assert trained([loader]) == reference
    assert not proxy.faults
    assert loader.metrics.retries - before >= len(FAULTS[name])
    assert not loader.metrics.skips


def test_a_store_that_hangs_ends_the_run_in_a_bounded_time(
    proxy: FaultyProxy, s3_url: str, clips: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = fill(s3_url, clips)
    monkeypatch.setattr(storage.policy, "attempts", 2)
    proxy.faults.extend([Fault("stall")] * 500)
    began = time.monotonic()
    with pytest.raises(storage.Unreachable, match=r"gave up after 2 attempts .*timed out"):
        trained([make(dataset)])
    monkeypatch.setattr(storage.policy, "idle_timeout", 60.0)
    for workers in (0, 1):
        with pytest.raises(InputError, match=r"no clip arrived for 0 s; step 0 waits for \d shards: small/shard-"):
            trained([make(dataset, timeout_seconds=0.3, workers=workers)])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_for_data_can_be_left_and_taken_up_and_still_ends(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    read, gate = storage.read_bytes, threading.Event()

    def held(url: str, *place: int) -> bytes:
        if url.endswith(".tar"):
            gate.wait()
        return read(url, *place)

    monkeypatch.setattr(storage, "read_bytes", held)
    loader = make(dataset, steps=2, workers=workers)
    iterator = iter(loader)
    assert not loader.ready(0.1) and not loader.ready(0.0)
    gate.set()
    assert loader.ready(10.0)
    assert next(iterator)[0] == 0 and loader.ready(10.0) and next(iterator)[0] == 1
    assert loader.ready(0.0), "nothing is left to wait for"
    loader.close()
    gate.clear()
    loader = make(dataset, steps=2, workers=workers, timeout_seconds=1.0)
    _ = iter(loader)
    with pytest.raises(InputError, match=r"no clip arrived for 1 s; step 0 waits for"):
        for _ in range(20):
            assert not loader.ready(0.2), "waits that were left add up"
    gate.set()
    loader.close()


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("loader-")}


@pytest.mark.parametrize("end", ["finished", "left", "error", "closed"])
def test_threads_end_with_the_iteration(dataset: Dataset, end: str) -> None:
    before = _threads()
    loader = make(dataset, steps=50 if end != "finished" else 2, workers=2, read_ahead=4)
    iterator = loader.iter_from(0)
    next(iterator)
    assert _threads() - before
    if end == "finished":
        assert len(list(iterator)) == 1
    elif end == "left":
        iterator.close()
    elif end == "closed":
        loader.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            iterator.throw(KeyboardInterrupt)
    assert _threads() <= before
    assert (loader.metrics.read_ahead_clips, loader.metrics.read_ahead_bytes) == (0, 0)


def test_memory_stays_within_its_bound(dataset: Dataset) -> None:
    one_step = BATCH * 3 * 3 * 16 * 16 * 4
    compressed = max(int(rows["bytes"].max()) for _, rows in dataset.all_records()) * BATCH
    for memory_bytes, most in ((1, 1), (3 * one_step + compressed, 3), (1 << 30, 9)):
        loader = make(dataset, steps=12, read_ahead=8, memory_bytes=memory_bytes, workers=2)
        for _ in loader.iter_from(0):
            assert loader.metrics.read_ahead_clips <= most * BATCH
        assert loader.metrics.peak_bytes <= max(memory_bytes, one_step) + compressed * (most + 1)
        assert loader.metrics.read_ahead_bytes == 0


@pytest.fixture(scope="module")
def heavy() -> list[bytes]:
    return [moving(24, (128, 160), crf="12", g="8") for _ in range(1)]


@pytest.mark.parametrize("granularity", [1, 4, 16])
def test_only_what_is_used_is_read_and_by_one_rank(
    tmp_path: Path, heavy: list[bytes], granularity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(heavy[0]) > 50_000
    monkeypatch.setattr(order, "LEAST_RUNS", 4)
    url, batch, steps = str(tmp_path), 32, 2
    fill(url, heavy, shards=2, each=32)
    read: list[tuple[str, int, int]] = []
    read_bytes = storage.read_bytes

    def watched(url: str, start: int | None = None, end: int | None = None) -> bytes:
        if url.endswith(".tar") and start is not None and end is not None:
            read.append((url, start, end))
        return read_bytes(url, start, end)

    monkeypatch.setattr(storage, "read_bytes", watched)
    for world in (1, 4, 16):
        read.clear()
        datasets = [open_dataset(url) for _ in range(world)]
        settings = {
            "plan": lambda step: plan(step, batch),
            "granularity": granularity,
            "world": world,
            "micro_batch": 8,
        }
        loaders = [make(datasets[rank], steps=steps, rank=rank, **settings) for rank in range(world)]
        assert len(trained(loaders)) == 64
        used = sum(loader.metrics.bytes_used for loader in loaders)
        fetched = sum(end - start for _, start, end in read)
        assert used == 64 * len(heavy[0])
        index_bytes = sum(dataset.bytes_fetched for dataset in datasets)
        assert fetched + index_bytes < 1.05 * used
        assert fetched + index_bytes == sum(loader.metrics.bytes_fetched for loader in loaders)
        read.sort()
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(read)), "two ranks read the same bytes"
        assert len(read) <= 2 * 64 / min(granularity, batch // world)
        assert sum(loader.metrics.requests for loader in loaders) == len(read) + sum(
            dataset.requests for dataset in datasets
        )


def test_neighbouring_spans_become_one_request() -> None:
    assert coalesce([]) == []
    assert coalesce([(0, 1000), (1010, 2000), (2010, 3000)]) == [(0, 3000)]
    assert coalesce([(0, 1000), (5000, 6000)]) == [(0, 1000), (5000, 6000)]
    assert coalesce([(0, 10 << 20), (10 << 20, 20 << 20)]) == [(0, 10 << 20), (10 << 20, 20 << 20)]
    rng = random.Random(1)
    for _ in range(200):
        spans, at = [], 0
        for _ in range(rng.randint(1, 30)):
            at += rng.randint(0, 3000)
            spans.append((at, at + rng.randint(1, 50_000)))
            at = spans[-1][1]
        requests = coalesce(spans)
        assert all(any(a <= s and e <= b for a, b in requests) for s, e in spans)
        assert sum(b - a for a, b in requests) <= 1.05 * sum(e - s for s, e in spans)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(requests))


def test_the_first_batch_comes_fast_at_ten_million_clips(tmp_path: Path, clips: list[bytes]) -> None:
    data = tar([(f"{i:07d}.mp4", clips[i % 10]) for i in range(1000)])
    storage.write_bytes(str(tmp_path / "one.tar"), data)
    index_dataset(str(tmp_path), name="large")
    lines = storage.read_json(str(tmp_path / "index.json"))
    shard = open_dataset(str(tmp_path))
    write_index(str(tmp_path), shard.card, [Shard(**lines["shards"][0])] * 10_000)
    steps = 10_000_000 // BATCH
    for step in (0, steps // 2, steps - 1):
        began = time.perf_counter()
        dataset = open_dataset(str(tmp_path))
        loader = make(dataset, steps=steps)
        iterator = loader.iter_from(step)
        number, batches = next(iterator)
        elapsed = time.perf_counter() - began
        iterator.close()
        assert number == step and sum(len(batch.places) for batch in batches) == BATCH
        assert elapsed < 2.0  # 0.1 to 0.2 s on a quiet machine
        assert dataset.bytes_fetched < 64 * 1024
