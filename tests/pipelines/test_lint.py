"""Lint: a sound dataset has no findings, and of a broken one every fault is told at once, by name."""

import dataclasses
import io
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from pipelines import index, storage
from pipelines.contracts import ClipRule
from pipelines.cutting import tar_member
from pipelines.lint import lint_dataset
from pipelines.pack import PackRules, pack
from tests.pipelines.footage import scene, write


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Eight clips of 12 frames in four shards."""
    folder = tmp_path_factory.mktemp("sound")
    for place in range(4):
        write(folder / "videos" / f"{place}.mp4", scene(place, 24))
    pack(folder / "videos", folder / "made", PackRules(frames=12, least_frames=6, shard_clips=2))
    return folder / "made"


@pytest.fixture
def dataset(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "made")


def lines(url, **options):
    return [str(finding) for finding in lint_dataset(str(url), **options)]


def rewritten(url, shard, change):
    """The dataset with the records of one shard changed."""
    opened = index.open_dataset(str(url))
    names = [field.name for field in dataclasses.fields(index.Member)]
    shards = []
    for number, file in enumerate(opened.files):
        members = []
        for row in opened.records(number):
            values = {name: row[name].item() for name in names}
            members.append(index.Member(**{**values, "key": values["key"].decode(), "kind": int(values["kind"])}))
        if number == shard:
            members = change(members)
        shards.append(index.write_shard_index(str(url), file, members, int(opened.shard_bytes[number])))
    index.write_index(str(url), opened.card, shards)


def test_nothing_is_wrong_with_what_pack_makes(dataset):
    rule = ClipRule(frames=3, stride=(1, 5), sizes=((64, 96),))
    assert lines(dataset) == lines(dataset, every_clip=True, rules=[rule]) == []


def test_a_dataset_that_is_not_there_is_one_finding(tmp_path, dataset):
    (only,) = lines(tmp_path / "nowhere")
    assert only.endswith("nowhere is not there; check the URL; nothing else can be checked without an index")
    (dataset / "index.json").write_text("{")
    (only,) = lines(dataset)
    assert "is not an index" in only


def test_everything_is_told_at_once(dataset):
    def shard(number):
        return dataset / f"shard-{number:06d}.tar"

    shard(0).unlink()
    shard(1).write_bytes(shard(1).read_bytes()[:-512])
    length = shard(1).stat().st_size
    damaged = bytearray(shard(2).read_bytes())
    damaged[2000] ^= 255
    shard(2).write_bytes(damaged)
    (dataset / "shard-000003.idx").write_bytes(b"nothing")
    shutil.copy(shard(2), dataset / "stray.tar")
    (dataset / ".pack").mkdir()
    found = lines(dataset)
    key = index.open_dataset(str(dataset)).records(2)[0]["key"].decode()
    assert found[0].startswith("made/.pack: a packing into this dataset was not finished; give its")
    assert found[1].startswith("made/stray.tar: the shard is not in the index, so nothing of it is used; run")
    assert found[2].startswith("made/shard-000000.tar: the shard can't be read: ")
    expected = f"made/shard-000001.tar: it has {length} bytes, the index says {length + 512}; copy it again, or run"
    assert found[3].startswith(expected)
    damage = "damaged: its bytes are not those that were indexed; pack it again, or leave it out"
    assert found[4] == f"made/shard-000002.tar/{key}: {damage}"
    assert found[5].startswith("made/shard-000003.tar: its .idx can't be used: ")
    assert len(found) == 6


def test_records_that_can_not_be_true_and_keys_that_stand_twice(dataset):
    first = index.open_dataset(str(dataset)).records(0)[0]["key"].decode()

    def change(members):
        members[0] = dataclasses.replace(members[0], fps=0.0, motion=1.5, width=20000)
        return [members[0], dataclasses.replace(members[1], key=first, frames=13)]

    rewritten(dataset, 1, change)
    found = lines(dataset)
    names = [row["key"].decode() for row in index.open_dataset(str(dataset)).records(1)]
    assert f"made/shard-000001.tar/{names[0]}: it has no frame rate; run `moviola index`, or pack again" in found
    assert (
        f"made/shard-000001.tar/{names[0]}: its motion score is not in [0, 1]; run `moviola index`, or pack again"
        in found
    )
    assert any("it has no pixels, or more than 16384 a side" in line for line in found)
    assert any(
        line.startswith(f"made/shard-000001.tar/{first}: the key stands for another clip as well") for line in found
    )
    assert any("mislabelled: its frames is 12, the index says 13" in line for line in found)
    assert any("mislabelled: its width is 96, the index says 20000" in line for line in found)


def test_clips_that_a_stage_can_not_use(dataset):
    rules = [
        ClipRule(frames=7, stride=(2, 3), sizes=((32, 32), (64, 64))),
        ClipRule(frames=3, sizes=((128, 64),)),
    ]
    names = [row["key"].decode() for _, rows in index.open_dataset(str(dataset)).all_records() for row in rows]
    listed = ", ".join(f"shard-{n // 2:06d}.tar/{names[n]}" for n in range(3))
    assert lines(dataset, rules=rules) == [
        f"made/{listed} and 5 more: fewer than the 13 frames that 7 at stride 2 need; pack with least_frames: 13, or "
        "lower clip.frames or clip.stride",
        f"made/{listed} and 5 more: smaller than the 128 x 64 that a stage cuts, so that it would be enlarged; pack it "
        "larger, or lower clip.sizes",
    ]


def test_undecodable_clips_are_found_by_sample_or_all(dataset):
    """Damage that was indexed as it is, so that only decoding finds it."""
    path = dataset / "shard-000002.tar"
    data = bytearray(path.read_bytes())
    record = index.open_dataset(str(dataset)).records(2)[1]
    start, end = int(record["offset"]), int(record["offset"] + record["bytes"])
    data[start + 100 : end] = bytes(end - start - 100)
    path.write_bytes(data)
    rewritten(dataset, 2, lambda m: [m[0], dataclasses.replace(m[1], crc=zlib.crc32(data[start:end]))])
    key = record["key"].decode()
    (line,) = lines(dataset)
    assert line.startswith(f"made/shard-000002.tar/{key}: undecodable: ")
    assert lines(dataset, every_clip=True) == [line]
    assert lines(dataset, sample=2) == []


def test_absurd_members_of_a_foreign_tar(tmp_path, dataset):
    opened = index.open_dataset(str(dataset))
    shard = dataset / opened.files[0]
    body = shard.read_bytes()[:-1024]
    link = tarfile.TarInfo("clip.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    extra = tar_member("../../up.mp4", b"x") + tar_member("model.pkl", b"x") + link.tobuf(tarfile.USTAR_FORMAT)
    shard.write_bytes(body + extra + bytes(1024))
    lines_of = [index.Shard(**line) for line in storage.read_json(str(dataset / "index.json"))["shards"]]
    lines_of[0] = lines_of[0].model_copy(update={"bytes": shard.stat().st_size})
    index.write_index(str(dataset), opened.card, lines_of)
    assert lines(dataset) == []
    assert lines(dataset, every_clip=True) == [
        "made/shard-000000.tar:../../up.mp4: the member leaves its folder; pack again without it",
        "made/shard-000000.tar:model.pkl: the member may be a pickle; pack again without it",
        "made/shard-000000.tar:clip.mp4: the member is a link or a device; pack again without it",
    ]


def test_missing_and_mixed_captions(tmp_path, dataset):
    assert lines(dataset) == []
    opened = index.open_dataset(str(dataset))
    card = opened.card.model_copy(update={"text_encoder": "some/t5"})
    shards = [index.Shard(**line) for line in storage.read_json(str(dataset / "index.json"))["shards"]]
    index.write_index(str(dataset), card, shards)
    (line,) = lines(dataset)
    assert "and 5 more: no caption embedding; give every clip a caption, then embed them" in line

    def embed(place, width):
        def change(members):
            path = dataset / "shard-000000.tar"
            buffer, data = io.BytesIO(), path.read_bytes()
            np.save(buffer, np.zeros((3, width), np.float16))
            path.write_bytes(data + buffer.getvalue())
            told = {"caption_offset": len(data), "caption_bytes": len(buffer.getvalue())}
            told["caption_crc"] = zlib.crc32(buffer.getvalue())
            return [dataclasses.replace(m, **told) if n == place else m for n, m in enumerate(members)]

        return change

    for place, width in enumerate((8, 16)):
        rewritten(dataset, 0, embed(place, width))
    shards = [index.Shard(**line) for line in storage.read_json(str(dataset / "index.json"))["shards"]]
    shards[0] = shards[0].model_copy(update={"bytes": (dataset / "shard-000000.tar").stat().st_size})
    index.write_index(str(dataset), opened.card, shards)
    found = lines(dataset)
    assert any("and 3 more: no caption embedding" in line for line in found)
    assert any(
        "caption embeddings of different widths: 8 and 16; embed all with one text encoder" in line for line in found
    )
