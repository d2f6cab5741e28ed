"""The index: of shards with members of every kind, of hostile ones, of datasets that change; its cost at 10 million."""

from __future__ import annotations

import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import webdataset

from pipelines import storage
from pipelines.container import probe
from pipelines.cutting import Footage, cut
from pipelines.decode import Video
from pipelines.faults import InputError, Skip
from pipelines.index import (
    HEADER,
    IMAGE,
    MAGIC,
    VIDEO,
    Card,
    Dataset,
    Member,
    Shard,
    _digest,
    index_dataset,
    index_name,
    merge,
    open_dataset,
    record_type,
    summary,
    write_index,
    write_shard_index,
)
from pipelines.rules import PackRules


def video(frames: int = 5, size: tuple[int, int] = (16, 32), suffix: str = "mp4", fps: int = 10) -> bytes:
    """A small video of rising grey levels."""
    buffer = io.BytesIO()
    formats = {"mp4": "mp4", "mkv": "matroska", "avi": "avi", "mov": "mov", "webm": "matroska"}
    with av.open(buffer, "w", format=formats[suffix]) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for level in range(frames):
            picture = np.full((*size, 3), (20 + 10 * level) % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (16, 32), codec: str = "png", half: bool = False) -> bytes:
    """Grey, or its upper half black."""
    context = av.CodecContext.create(codec, "w")
    context.height, context.width, context.pix_fmt, context.time_base = (
        *size,
        {"png": "rgb24"}.get(codec, "yuvj420p"),
        1,
    )
    grey = np.full((*size, 3), 90, np.uint8)
    grey[: size[0] // 2] *= not half
    frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
    return b"".join(bytes(p) for p in [*context.encode(frame.reformat(format=context.pix_fmt)), *context.encode(None)])


def tar(
    members: list[tuple[str, bytes]], kinds: dict[str, bytes] | None = None, format: int = tarfile.DEFAULT_FORMAT
) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if kinds and name in kinds:
                info.type, info.size, info.linkname = kinds[name], 0, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write(url: str, name: str, members: list[tuple[str, bytes]]) -> None:
    storage.write_bytes(storage.join(url, name), tar(members))


def test_members_of_every_kind_are_found(any_url: str) -> None:
    caption = npy(np.ones((3, 4), np.float32))
    clip = video(5)
    write(
        any_url,
        "shard-000000.tar",
        [
            ("a/first.mp4", clip),
            ("a/first.t5.npy", caption),
            ("a/first.json", json.dumps({"motion": 0.25}).encode()),
            ("a/first.txt", b"words"),
            ("second.v2.mkv", video(7, suffix="mkv")),
            ("second.mkv", video(4, suffix="mkv")),
            ("third.avi", video(6, (48, 16), "avi")),
            ("fourth.MOV", video(3, suffix="mov", fps=25)),
            ("fifth.png", picture((20, 30))),
            ("sixth.jpg", picture((20, 30), "mjpeg")),
            ("README", b"no suffix"),
        ],
    )
    report = index_dataset(any_url, name="kinds", licence="CC0")
    dataset = open_dataset(any_url, expect=report.digest)
    rows = {row["key"].decode(): row for row in dataset.records(0)}
    assert list(rows) == ["a/first", "second", "third", "fourth", "fifth", "sixth"]
    first = rows["a/first"]
    tarred = storage.read_bytes(dataset.shard_url(0))
    assert tarred[first["offset"] : first["offset"] + first["bytes"]] == clip
    assert tarred[first["caption_offset"] :][: first["caption_bytes"]] == caption
    assert (first["crc"], first["caption_crc"]) == (zlib.crc32(clip), zlib.crc32(caption))
    assert [int(row["frames"]) for row in rows.values()] == [5, 4, 6, 3, 1, 1]
    assert [float(row["fps"]) for row in rows.values()] == [10, 10, 10, 25, 0, 0]
    assert [(row["height"], row["width"]) for row in rows.values()] == [(16, 32)] * 2 + [(48, 16), (16, 32)] + [
        (20, 30)
    ] * 2
    assert [row["kind"] for row in rows.values()] == [VIDEO] * 4 + [IMAGE] * 2
    assert first["motion"] == 0.25
    assert dataset.card.name == "kinds" and dataset.card.licence == "CC0"
    assert dataset.card.counts["clips"] == 6 and dataset.card.counts["images"] == 2
    assert dataset.card.counts["captions"] == 1
    assert dataset.card.statistics["frames"] == {"least": 1, "mean": pytest.approx(20 / 6, abs=1e-5), "greatest": 6}
    assert dataset.locate(5) == (0, 5)


def test_keys_are_those_of_webdataset(tmp_path: Path) -> None:
    clip = video(3)
    names = ["x.mp4", "x.json", "dir.v1/y.mp4", "dir.v1/y.cls", "z.mp4", "z.extra.txt", "Ünï.mp4"]
    (tmp_path / "shard.tar").write_bytes(tar([(name, clip if name.endswith("mp4") else b"{}") for name in names]))
    index_dataset(str(tmp_path))
    ours = [row["key"].decode() for row in open_dataset(str(tmp_path)).records(0)]
    theirs = [s["__key__"] for s in webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False)]
    assert ours == theirs


def test_each_of_several_videos_of_a_sample_is_a_clip(tmp_path: Path) -> None:
    """webdataset's suffix starts at the first dot: these are the members left.mp4 and right.MP4 of the sample 0001."""
    names = ["./0001.Left.mp4", "./0001.json", "./0001.right.MP4", "./0002.v1.frame.png", "./0003.x.mp4", "./0003.mp4"]
    data = {"mp4": video(3), "MP4": video(4), "png": picture(), "json": b"{}"}
    (tmp_path / "shard.tar").write_bytes(tar([(name, data[name.rpartition(".")[2]]) for name in names]))
    assert index_dataset(str(tmp_path)).skipped == {}
    rows = open_dataset(str(tmp_path)).records(0)
    assert [row["key"].decode() for row in rows] == ["./0001.Left", "./0001.right", "./0002.v1.frame", "./0003"]
    assert rows["frames"].tolist() == [3, 4, 1, 3] and rows["kind"].tolist() == [0, 0, 1, 0]


def test_an_index_may_lie_elsewhere_and_cover_subfolders(tmp_path: Path) -> None:
    write(str(tmp_path / "data"), "b.tar", [("x.mp4", video(3))])
    write(str(tmp_path / "data"), "sub/a.tar", [("y.mp4", video(4)), ("z.mp4", video(5))])
    index_dataset(str(tmp_path / "data"), str(tmp_path / "index"))
    assert not list((tmp_path / "data").rglob("*.idx"))
    dataset = open_dataset(str(tmp_path / "index"))
    assert dataset.files == ["b.tar", "sub/a.tar"]
    assert [dataset.locate(clip) for clip in range(3)] == [(0, 0), (1, 0), (1, 1)]
    row = dataset.records(1)[1]
    data = storage.read_bytes(dataset.shard_url(1), int(row["offset"]), int(row["offset"] + row["bytes"]))
    assert data == video(5)
    single = index_dataset(str(tmp_path / "data" / "b.tar"), str(tmp_path / "single"))
    assert (single.clips, single.shards) == (1, 1)


def test_a_killed_indexing_goes_on_and_a_changed_shard_is_read_again(tmp_path: Path) -> None:
    url = str(tmp_path)
    for n in range(3):
        write(url, f"shard-{n}.tar", [(f"{n}-{i}.mp4", video(3 + i)) for i in range(4)])

    def die(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_dataset(url, name="x", progress=die)
    assert not (tmp_path / "index.json").exists()
    seen: list[tuple[int, int]] = []
    report = index_dataset(url, name="x", progress=lambda *counts: seen.append(counts))
    assert (report.kept, report.clips, seen) == (2, 12, [(3, 3)])
    assert {path.suffix for path in tmp_path.iterdir()} == {".tar", ".idx", ".json"}
    assert [path.name for path in tmp_path.glob("*.json")] == ["index.json"]
    fresh = [line for line in (tmp_path / "index.json").read_text().splitlines() if "shard-1" in line]

    data = bytearray((tmp_path / "shard-1.tar").read_bytes())
    at = int(open_dataset(url).records(1)[3]["offset"]) + 40
    data[at] ^= 1
    (tmp_path / "shard-1.tar").write_bytes(data)
    report = index_dataset(url, name="x")
    assert report.kept == 2
    assert [line for line in (tmp_path / "index.json").read_text().splitlines() if "shard-1" in line] != fresh


def test_a_killed_indexing_goes_on_in_subfolders_and_remembers_what_it_skipped(tmp_path: Path) -> None:
    url = str(tmp_path)
    for n in range(3):
        write(url, f"part/{n}/shard.tar", [("x.mp4", video()), ("y.txt", b""), ("z.mp4", b"no video")])

    def die(done: int, _: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_dataset(url, progress=die)
    (tmp_path / "part" / "odd.idx.json").write_text('{"somebody": "else\'s"}')
    report = index_dataset(url)
    assert (report.kept, report.clips, report.skipped) == (2, 3, {"no_video": 3, "undecodable": 3})


def test_an_index_that_is_made_again_keeps_what_its_card_said(tmp_path: Path) -> None:
    url = str(tmp_path)
    members = [("0.mp4", video()), ("0.t5.npy", npy(np.ones((3, 4), np.float16)))]
    write(url, "shard.tar", members)
    said = {"text_encoder": "t5", "embeddings": {"encoder": "t5", "most_tokens": 100, "clips": 1, "width": 4}}
    index_dataset(url, name="mine", licence="CC0", extra=said | {"pack": {"plan": "x"}})
    before = (tmp_path / "index.json").read_bytes()
    index_dataset(url)
    assert (tmp_path / "index.json").read_bytes() == before
    write(url, "shard.tar", [*members, ("1.mp4", video(3)), ("1.wav", bytes(10240))])
    index_dataset(url)
    card = open_dataset(url).card
    assert (card.name, card.licence, card.counts["clips"]) == ("mine", "CC0", 2)
    assert card.model_extra == said, "other shards are not what was packed"


def test_an_index_that_can_not_be_read_is_made_anew(tmp_path: Path) -> None:
    write(str(tmp_path), "shard.tar", [("0.mp4", video())])
    index_dataset(str(tmp_path))
    whole = (tmp_path / "index.json").read_text()
    for broken in (
        whole[:100],
        whole.replace('"format": 2', '"format": 99'),
        whole.replace('"clips": 1', '"clips": -1'),
    ):
        (tmp_path / "index.json").write_text(broken)
        with pytest.raises(InputError, match="index it again"):
            open_dataset(str(tmp_path))
        assert index_dataset(str(tmp_path)).clips == 1


def test_what_other_programs_wrote_is_left(tmp_path: Path) -> None:
    write(str(tmp_path), "shard.tar", [("0.mp4", video())])
    for name, text in (("index.json", '{"shards": [], "version": 2}'), ("shard.idx", "v1.2 1\nmp4 512 1000 0.mp4\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(
            InputError, match=rf"{name} is there, and is not (an index )?of this program's; .* with --to"
        ):
            index_dataset(str(tmp_path))
        assert (tmp_path / name).read_text() == text
        assert index_dataset(str(tmp_path), str(tmp_path / "elsewhere")).clips == 1
        (tmp_path / name).unlink()
    (tmp_path / "more.tar.gz").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"holds 1 compressed shards \(more.tar.gz ...\), of which no part can be read"
    ):
        index_dataset(str(tmp_path))


def test_shards_are_indexed_in_processes_to_the_same_index(tmp_path: Path) -> None:
    digests = []
    for workers in (1, 3):
        url = str(tmp_path / str(workers))
        for n in range(3):
            write(url, f"shard-{n}.tar", [(f"{n}-{i}.mp4", video(3 + i)) for i in range(2)])
        digests.append(index_dataset(url, name="x", workers=workers).digest)
    assert digests[0] == digests[1]


def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    for n in range(8):
        write(str(tmp_path), f"{n}.tar", [(f"{n}.mp4", video())])
    program = (
        "import os, signal, sys\n"
        "from multiprocessing import active_children\n"
        "from pipelines import index\n"
        "def killed(done, all):\n"
        "    print(*(child.pid for child in active_children()), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "index.index_dataset(sys.argv[1], workers=2, progress=killed)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and len(done.stdout.split()) == 2
    assert index_dataset(str(tmp_path)).clips == 8


def test_sidecars_that_contradict_the_videos_are_not_believed(tmp_path: Path) -> None:
    def shard(frames: int) -> list[tuple[str, bytes]]:
        sidecar = json.dumps({"frames": frames, "fps": 10, "height": 16, "width": 32}).encode()
        return [part for i in range(6) for part in ((f"{i}.mp4", video(5)), (f"{i}.json", sidecar))]

    for frames in (5, 500):
        url = str(tmp_path / str(frames))
        write(url, "shard.tar", shard(frames))
        index_dataset(url)
        assert set(open_dataset(url).records(0)["frames"]) == {5}


def test_what_is_no_clip_is_skipped_and_named(tmp_path: Path) -> None:
    members = [
        ("good.mp4", video(3)),
        ("bad.mp4", b"not a video" * 50),
        ("text.json", b"{}"),
        ("cut.mp4", video(3)[:200]),
    ]
    write(str(tmp_path), "shard.tar", members)
    report = index_dataset(str(tmp_path))
    assert report.clips == 1
    assert dict(report.skipped) == {"undecodable": 2, "no_video": 1}
    assert any("shard.tar/bad: " in line for line in report.named)


HOSTILE = {
    "../x.mp4": "leaves its folder",
    "a/../../x.mp4": "leaves its folder",
    "/etc/x.mp4": "leaves its folder",
    "a\\..\\x.mp4": "leaves its folder",
    "x.pkl": "may be a pickle",
    "x.label.pyd": "may be a pickle",
    "x.pth": "may be a pickle",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_are_refused(tmp_path: Path, name: str) -> None:
    write(str(tmp_path), "shard.tar", [("good.mp4", video(2)), (name, pickle.dumps(1))])
    with pytest.raises(InputError, match=f"shard.tar: member .*{HOSTILE[name]}.*refused"):
        index_dataset(str(tmp_path))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "shard.tar").write_bytes(tar([("x.mp4", b"")], {"x.mp4": kind}))
    with pytest.raises(InputError, match="is a link or device; refused"):
        index_dataset(str(tmp_path))


def test_odd_names_and_members_that_come_twice(tmp_path: Path) -> None:
    """Names that are not UTF-8, lines in a folder's name, one name twice in a sample, and again later."""
    grey = [video(frames) for frames in (3, 4, 5, 6, 7)]
    names = ["caf\udce9.mp4", "a\nb/c.mp4", "0.mp4", "0.mp4", "1.mp4", "0.mp4"]
    (tmp_path / "s.tar").write_bytes(tar([*zip(names, [*grey, grey[0]], strict=True)], format=tarfile.GNU_FORMAT))
    report = index_dataset(str(tmp_path))
    rows = open_dataset(str(tmp_path)).records(0)
    assert [row["key"].decode() for row in rows] == ["caf\ufffd", "a\nb/c", "0", "1", "0"]
    assert [int(row["frames"]) for row in rows] == [3, 4, 5, 7, 3]
    assert report.skipped == {"duplicate": 1} and "0.mp4" in report.named[0]


def test_what_a_clip_refers_to_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of files, a description of a stream."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.mp4").write_bytes(video())
    stream = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
    for number, data in enumerate((b"ffconcat version 1.0\nfile other.mp4\n", stream)):
        with pytest.raises(Skip, match="undecodable"):
            probe(data, False, "clip")
        (tmp_path / f"{number}.tar").write_bytes(tar([("0.mkv", data), ("1.mp4", video())]))
    assert index_dataset(str(tmp_path)).skipped == {"undecodable": 2}


def test_a_codec_that_nobody_knows_is_skipped(tmp_path: Path) -> None:
    strange = video().replace(b"avc1", b"zzzz")
    (tmp_path / "s.tar").write_bytes(tar([("0.mp4", strange), ("1.mp4", video())]))
    report = index_dataset(str(tmp_path))
    assert report.skipped == {"undecodable": 1} and "codec that FFmpeg does not know" in report.named[0]
    (tmp_path / "0.mp4").write_bytes(strange)
    with pytest.raises(Skip, match="codec that FFmpeg does not know"):
        next(cut(Footage("0.mp4", ("0.mp4",), len(strange)), [tmp_path / "0.mp4"], PackRules()))


def test_a_title_that_is_not_utf_8_costs_no_clip(tmp_path: Path) -> None:
    data = video().replace(b"Lavf", b"L\xe9\xe9f")
    (tmp_path / "s.tar").write_bytes(tar([("0.mp4", data)]))
    assert index_dataset(str(tmp_path)).clips == 1
    with Video(data, "0.mp4") as opened:
        assert opened.read([0, 4]).shape == (2, 3, 16, 32)


def test_a_circle_of_links_is_walked_once(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar([("0.mp4", video())]))
    (tmp_path / "again").symlink_to(tmp_path)
    assert index_dataset(str(tmp_path)).shards == 1


def test_headers_that_lead_back_or_in_are_refused(tmp_path: Path) -> None:
    """A negative size, a name of 70,000 bytes, thousands of headers in one another."""
    negative = bytearray(tar([("0.mp4", video())]))
    negative[124:136] = (-512).to_bytes(12, "big", signed=True)
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative[:512])
    nested = tar([("k" * 200 + ".mp4", b"")], format=tarfile.PAX_FORMAT)[:1024] * 3000
    for data, words in (
        (bytes(negative), "-512 bytes"),
        (tar([("k" * 70000 + ".mp4", b"")]), "over 4096 bytes"),
        (nested, "not a plain tar"),
    ):
        (tmp_path / "s.tar").write_bytes(data)
        with pytest.raises(InputError, match=words):
            index_dataset(str(tmp_path))


def test_absurd_sizes_and_torn_tars_are_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x.mp4")
    info.size = 1 << 40
    (tmp_path / "shard.tar").write_bytes(info.tobuf() + bytes(10240))
    with pytest.raises(InputError, match=r"member 'x.mp4' has 1099511627776 bytes; the limit is"):
        index_dataset(str(tmp_path))
    whole = tar([("x.mp4", video(3)), ("y.mp4", video(40, (64, 64)))])
    (tmp_path / "shard.tar").write_bytes(whole[: len(whole) - 10240])
    with pytest.raises(InputError, match=r"shard\.tar is (cut off|not a plain tar)"):
        index_dataset(str(tmp_path))
    (tmp_path / "shard.tar").write_bytes(b"\x1f\x8b" + bytes(5000))
    with pytest.raises(InputError, match=r"shard\.tar is not a plain tar"):
        index_dataset(str(tmp_path))


def test_what_can_not_be_opened_says_why(any_url: str) -> None:
    with pytest.raises(InputError, match="is not there; check the URL"):
        open_dataset(any_url)
    storage.write_bytes(storage.join(any_url, "x"), b"")
    with pytest.raises(InputError, match=r"index\.json is not there; run `moviola index"):
        open_dataset(any_url)
    for text in (b"{", b"[]", b'{"format": 1}', b'{"format": 1, "card": {"name": "/"}, "shards": []}'):
        storage.write_bytes(storage.join(any_url, "index.json"), text)
        with pytest.raises(InputError, match=r"index\.json is not an index: .+; index it again$"):
            open_dataset(any_url)
    write_index(any_url, Card(name="empty"), [])
    with pytest.raises(InputError, match="holds no clips"):
        open_dataset(any_url)
    with pytest.raises(InputError, match=r"no \.tar shards"):
        index_dataset(any_url)


def test_another_format_and_names_that_climb_are_refused(tmp_path: Path) -> None:
    shard = {"file": "../x.tar", "bytes": 1, "clips": 1, "key_bytes": 1, "digest": "0" * 32}
    for content, message in (
        ({"format": 3, "card": {"name": "x"}, "shards": []}, "has format 3; this version reads 2"),
        ({"format": 1, "card": {"name": "x"}, "shards": [shard]}, "names '../x.tar', which leaves the dataset"),
    ):
        storage.write_json(str(tmp_path / "index.json"), content)
        with pytest.raises(InputError, match=message):
            open_dataset(str(tmp_path))


def test_a_dataset_must_not_change_under_a_run(tmp_path: Path) -> None:
    url = str(tmp_path)
    write(url, "shard.tar", [("x.mp4", video(3))])
    first = index_dataset(url).digest
    opened = open_dataset(url, expect=first)
    write(url, "shard.tar", [("x.mp4", video(4))])
    index_dataset(url)
    with pytest.raises(InputError, match=f"changed since this run started .*the run has {first}"):
        open_dataset(url, expect=first)
    with pytest.raises(InputError, match=r"shard\.idx does not belong to .*the dataset changed"):
        opened.records(0)
    (tmp_path / "shard.idx").unlink()
    with pytest.raises(InputError, match=r"shard\.idx is missing, but index\.json names its shard"):
        open_dataset(url).records(0)


def _large(url: str, shards: int, clips: int) -> Dataset:
    """An index of ``shards`` shards of ``clips`` clips that all share one real .idx on storage."""
    members = [Member(f"{i:012d}", 512 + 65536 * i, 60_000, i, 64, 24.0, 128, 128) for i in range(clips)]
    line = write_shard_index(url, "one.tar", members, 1 << 26)
    write_index(url, Card(name="large"), [line] * shards)
    return open_dataset(url)


def test_a_single_record_is_trusted_only_under_the_index_that_the_run_read(tmp_path: Path) -> None:
    url = str(tmp_path)
    dataset = _large(url, 2_000, 1_000)
    assert not dataset.keeps_records
    assert dataset.records(3, 10, 12)["crc"].tolist() == [10, 11]
    idx = tmp_path / "one.idx"
    sound = idx.read_bytes()
    size = record_type(12).itemsize
    swapped = bytearray(sound)
    swapped[16 + 10 * size : 16 + 12 * size] = (
        sound[16 + 11 * size : 16 + 12 * size] + sound[16 + 10 * size : 16 + 11 * size]
    )
    flipped = bytearray(sound)
    flipped[16 + 10 * size] ^= 1
    members = [Member(f"{i:012d}", 512 + 65536 * i, 60_000, i, 64, 25.0, 128, 128) for i in range(1_000)]
    write_shard_index(url, "other.tar", members, 1 << 26)  # as packed again: all of it agrees, with itself
    for data in (bytes(swapped), bytes(flipped), (tmp_path / "other.idx").read_bytes()):
        idx.write_bytes(data)
        with pytest.raises(InputError, match=r"one\.idx does not belong to the index\.json that this"):
            dataset.records(3, 10, 12)
        with pytest.raises(InputError, match="the dataset changed"):
            dataset.records(3)
    idx.write_bytes(sound)
    assert len(dataset.records(3, 10, 12)) == 2


def test_an_index_of_format_1_is_still_read(tmp_path: Path) -> None:
    records = np.zeros(2, record_type(1, format=1))
    records["key"], records["frames"] = [b"a", b"b"], [7, 8]
    data = HEADER.pack(MAGIC, 2, 1) + records.tobytes()
    (tmp_path / "s.idx").write_bytes(data)
    line = Shard(file="s.tar", bytes=512, clips=2, key_bytes=1, digest=_digest(data)).model_dump()
    index = {"format": 1, "card": {"name": "old"}, "shards": [line]}
    storage.write_json(storage.join(str(tmp_path), "index.json"), index)
    dataset = open_dataset(str(tmp_path))
    assert dataset.records(0)["frames"].tolist() == [7, 8]
    dataset.keeps_records, dataset._kept = False, {}
    assert dataset.records(0, 1, 2)["key"].tolist() == [b"b"]


def test_ten_million_clips_cost_little(tmp_path: Path) -> None:
    dataset = _large(str(tmp_path), 10_000, 1_000)
    assert dataset.clips == 10_000_000 and not dataset.keeps_records
    before = dataset.bytes_fetched
    for clip in (0, 4_999_999, 9_999_999):
        shard, row = dataset.locate(clip)
        record = dataset.records(shard, row, row + 1)[0]
        assert record["key"] == b"%012d" % (clip % 1000)
    assert dataset.bytes_fetched - before == 3 * record_type(12).itemsize
    assert not dataset._kept
    assert len(pickle.dumps(dataset)) < 4 << 20


def test_an_index_costs_160_bytes_a_shard_and_little_more_to_open(tmp_path: Path) -> None:
    line = Shard(file="0.tar", bytes=1 << 26, clips=1000, key_bytes=12, digest=_digest(b""))
    write_index(
        str(tmp_path), Card(name="large"), [line.model_copy(update={"file": f"{n}.tar"}) for n in range(10_000)]
    )
    tracemalloc.start()
    dataset = open_dataset(str(tmp_path))
    held, greatest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.clips == 10_000_000 and dataset.shard_url(9_999).endswith("/9999.tar")
    assert held < 10_000 * 160 and greatest < 10_000 * 500


def test_a_line_that_is_no_shard_is_named(tmp_path: Path) -> None:
    line = Shard(file="a.tar", bytes=512, clips=1, key_bytes=1, digest=_digest(b"")).model_dump()
    for name, value in (("bytes", 0), ("clips", -1), ("clips", 1 << 70), ("digest", "xyz"), ("file", None), ("new", 1)):
        index = {"format": 1, "card": {"name": "x"}, "shards": [line, {**line, name: value}]}
        storage.write_json(storage.join(str(tmp_path), "index.json"), index)
        with pytest.raises(InputError, match=rf"is not an index: shards\.1\.{name}: .*; index it again"):
            open_dataset(str(tmp_path))


def test_records_of_small_datasets_are_read_once(tmp_path: Path) -> None:
    dataset = _large(str(tmp_path), 3, 50)
    assert dataset.keeps_records
    for _ in range(3):
        assert len(dataset.records(2, 10, 20)) == 10
    assert dataset.requests == 1
    assert sum(len(rows) for _, rows in dataset.all_records()) == 150


def test_the_idx_format_is_what_the_docs_say(tmp_path: Path) -> None:
    members = [Member("a", 512, 10, 1, 2, 24.0, 8, 8), Member("bcd", 2048, 20, 3, 4, 25.0, 8, 8, 0.5, True, 9, 9, 9)]
    line = write_shard_index(str(tmp_path), "shard-000000.tar", members, 10240)
    assert line == Shard(file="shard-000000.tar", bytes=10240, clips=2, key_bytes=3, digest=line.digest)
    data = (tmp_path / index_name("shard-000000.tar")).read_bytes()
    assert HEADER.unpack_from(data) == (MAGIC, 2, 3)
    assert len(data) == 16 + 2 * (16 + 4 * 7 + 2 * 3 + 4 + 3)
    rows = np.frombuffer(data, record_type(3), offset=16)
    assert rows["key"].tolist() == [b"a", b"bcd"] and rows["motion"].tolist() == [0.0, 0.5]
    totals = merge([summary(rows[:1]), summary(rows[1:])])
    assert totals["counts"] == {"clips": 2, "videos": 1, "images": 1, "captions": 1, "bytes": 30}
    assert totals["statistics"]["frames"] == {"least": 2, "mean": 3, "greatest": 4}
