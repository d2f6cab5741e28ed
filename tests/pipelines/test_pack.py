"""Packing: what is held back, what is skipped, and that a killed packing goes on to the same bytes."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest

from pipelines import index, storage
from pipelines import pack as packing
from pipelines.crew import Crew
from pipelines.faults import InputError
from pipelines.pack import PackRules, Summary, pack
from tests.pipelines.footage import REAL, needs_real, psnr, read, scene, write, write_audio

RULES = PackRules(frames=12, least_frames=6)


@pytest.fixture(autouse=True)
def one_worker(monkeypatch):
    """A second worker costs a second start; tests that are about workers ask for them."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Nine videos of 24 frames in nested folders, in five containers."""
    folder = tmp_path_factory.mktemp("footage")
    names = ["a.mp4", "b.mkv", "c.webm", "sub/d.avi", "sub/deep er/e.mov", "sub/f.mp4", "g.mp4", "h.mp4", "ünï.mp4"]
    codecs = {".webm": "libvpx-vp9", ".avi": "mpeg4"}
    for place, name in enumerate(names):
        write(folder / name, scene(place, 24), codec=codecs.get(Path(name).suffix, "libx264"))
    (folder / ".hidden.mp4").write_bytes(b"x")
    (folder / "notes.pdf").write_bytes(b"x")
    return folder


def clips(url) -> list[tuple[str, dict, bytes]]:
    """(key, sidecar, video) of every clip, as a reader of plain WebDataset sees them."""
    found = {}
    for shard in sorted(Path(url).glob("shard-*.tar")):
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return [
        (key, json.loads(parts["json"]), next(data for suffix, data in parts.items() if suffix != "json"))
        for key, parts in found.items()
    ]


def tree(folder) -> dict[str, bytes]:
    """Every file below a folder; the cards' record of when and where is left to the reader."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_a_folder_becomes_datasets_that_the_index_reads(videos, tmp_path):
    seen = []
    summary = pack(videos, tmp_path / "made", RULES.model_copy(update={"holdout": 0.125}), progress=seen.append)
    assert summary.videos == 9 and not summary.skipped
    assert summary.clips == {"train": 16, "eval": 2}
    assert summary.seconds == pytest.approx({"train": 8.0, "eval": 1.0}, abs=0.01)
    assert [(p.done, p.videos) for p in seen] == [(n, 9) for n in range(1, 10)]
    assert seen[-1].clips == 18
    sources = {}
    for side in ("train", "eval"):
        dataset = index.open_dataset(str(tmp_path / "made" / side))
        assert dataset.clips == summary.clips[side] == len(clips(tmp_path / "made" / side))
        assert dataset.name == ("made" if side == "train" else "made-eval")
        for shard, records in dataset.all_records():
            for record, (key, info, data) in zip(records, clips(tmp_path / "made" / side), strict=True):
                start = int(record["offset"])
                stored = storage.read_bytes(dataset.shard_url(shard), start, start + int(record["bytes"]))
                assert (record["key"].decode(), stored) == (key, data)
                assert (record["frames"], record["height"], record["width"]) == (12, 64, 96)
                assert float(record["fps"]) == info["fps"] == 24
                assert float(record["motion"]) == pytest.approx(info["motion"])
                sources.setdefault(side, set()).add(info["source"])
    assert len(sources["eval"]) == 1 and len(sources["train"]) == 8
    assert not sources["train"] & sources["eval"]
    assert sources["train"] | sources["eval"] == {
        "a.mp4", "b.mkv", "c.webm", "sub/d.avi", "sub/deep er/e.mov", "sub/f.mp4", "g.mp4", "h.mp4", "ünï.mp4",
    }  # fmt: skip
    assert not (tmp_path / "made" / ".pack").exists()


def test_clips_hold_the_frames_of_their_source(videos, tmp_path):
    pack(videos, tmp_path / "made", RULES)
    for key, info, data in clips(tmp_path / "made"):
        first = round(info["start"] * 24)
        expected = read(videos / info["source"])[first : first + 12]
        assert psnr(read(data), expected) > 35, key
        assert info["end"] == pytest.approx(info["start"] + 0.5, abs=0.01)


@pytest.mark.parametrize(
    ("count", "share", "held"), [(2, 0.125, 1), (3, 0.5, 1), (9, 0.125, 1), (17, 0.125, 2), (40, 0.25, 10)]
)
def test_the_share_held_back_is_counted_in_videos(count, share, held):
    from pipelines.pack import _Layout

    layout = _Layout(PackRules(holdout=share))
    sides = [layout.place(f"video {n}", [{"stored": 1}] * (1 + n % 3)) for n in range(count)]
    assert all(len({side for side, _ in places}) == 1 for places in sides)
    assert sum(places[0][0] == "eval" for places in sides) == held


def test_videos_without_clips_do_not_take_the_place_of_one_that_is_held_back(videos, tmp_path):
    """Whichever of many broken videos comes first, a good one is held back."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number in range(8):
        (folder / f"broken-{number}.mp4").write_bytes(b"no video")
    for name in ("a.mp4", "g.mp4"):
        shutil.copy(videos / name, folder / name)
    summary = pack(folder, tmp_path / "made", RULES.model_copy(update={"holdout": 0.125}))
    assert summary.clips == {"train": 2, "eval": 2}
    assert len(summary.skipped["unreadable"]) == 8


def test_copies_and_groups_are_never_on_both_sides(videos, tmp_path):
    folder = tmp_path / "copies"
    folder.mkdir()
    for number in range(12):
        shutil.copy(videos / ("a.mp4" if number % 2 else "g.mp4"), folder / f"v_{number}.mp4")
    for seed in range(2):
        dest = tmp_path / f"made-{seed}"
        pack(folder, dest, RULES.model_copy(update={"holdout": 0.125, "seed": seed}))
        sides = [{int(info["source"][2:-4]) % 2 for _, info, _ in clips(dest / side)} for side in ("train", "eval")]
        assert sides in ([{0}, {1}], [{1}, {0}])
    for name in ("x_g01_c01", "x_g01_c02", "x_g02_c01", "x_g02_c02"):
        write(folder / "grouped" / f"{name}.mp4", scene(len(name) + int(name[-1]) + 4 * int(name[3:5]), 12))
    rules = RULES.model_copy(update={"holdout": 0.125, "group": r"_g(\d+)_", "root": "grouped"})
    pack(folder, tmp_path / "groups", rules)
    held = [info["source"] for _, info, _ in clips(tmp_path / "groups" / "eval")]
    assert sorted(held) in (["x_g01_c01.mp4", "x_g01_c02.mp4"], ["x_g02_c01.mp4", "x_g02_c02.mp4"])


def test_nothing_to_hold_back_is_refused(videos, tmp_path):
    rules = RULES.model_copy(update={"holdout": 0.125})
    with pytest.raises(InputError, match=r"holds one source video \(a\.mp4\); holding back needs two"):
        pack(videos / "a.mp4", tmp_path / "made", rules)
    folder = tmp_path / "one good"
    folder.mkdir()
    shutil.copy(videos / "a.mp4", folder)
    (folder / "b.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="all clips come from one source video") as caught:
        pack(folder, tmp_path / "made", rules)
    assert "unreadable: 1, for example b.mp4" in str(caught.value)


def test_broken_videos_are_counted_and_named(videos, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    shutil.copy(videos / "a.mp4", folder / "good.mp4")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((videos / "a.mp4").read_bytes()[:3000])
    write_audio(folder / "song.mkv")
    write(folder / "short.mp4", scene(0, 3))
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "circle").symlink_to(folder)
    for name in ("film.qt", "scan.TIFF", "notes.pdf"):
        (folder / name).write_bytes(b"whatever")
    summary = pack(folder, tmp_path / "made", RULES)
    assert summary.clips == {"train": 2}
    assert summary.skipped == {
        "empty": ["empty.mp4 has no bytes"],
        "format": [
            "film.qt: such files are not taken; convert it to mp4, or to png or jpg",
            "scan.TIFF: such files are not taken; convert it to mp4, or to png or jpg",
        ],
        "no_video": ["song.mkv has no video stream, only audio"],
        "missing": ["gone.mp4 is a link to nowhere", "pipe.mp4 is not a file"],
        "short": ["short.mp4: no shot of 6 frames; lower least_frames to keep it"],
        "unreadable": ["cut.mp4: Invalid data found when processing input"],
    }
    assert summary.text() == (
        f"train: 2 clips, 0.0 min -> {tmp_path / 'made'}\n"
        f"1 of 9 videos packed, {summary.bytes / 1e6:.1f} MB\n"
        "skipped, empty: 1\n  empty.mp4 has no bytes\n"
        "skipped, format: 2\n  film.qt: such files are not taken; convert it to mp4, or to png or jpg\n"
        "  scan.TIFF: such files are not taken; convert it to mp4, or to png or jpg\n"
        "skipped, missing: 2\n  gone.mp4 is a link to nowhere\n  pipe.mp4 is not a file\n"
        "skipped, no_video: 1\n  song.mkv has no video stream, only audio\n"
        "skipped, short: 1\n  short.mp4: no shot of 6 frames; lower least_frames to keep it\n"
        "skipped, unreadable: 1\n  cut.mp4: Invalid data found when processing input"
    )


def test_nothing_to_pack_is_explained(tmp_path):
    with pytest.raises(
        InputError, match=r"nowhere is not there; give a folder of videos, a list file, or an s3:// prefix"
    ):
        pack(tmp_path / "nowhere", tmp_path / "made")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no videos or images that the rules take; looked for 3gp, avi, "):
        pack(tmp_path / "empty", tmp_path / "made")
    (tmp_path / "empty" / "a.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="none of 1 videos could be packed; mend them, or relax the rules") as caught:
        pack(tmp_path / "empty", tmp_path / "made")
    assert "unreadable: 1, for example a.mp4: Invalid data" in str(caught.value)
    assert not (tmp_path / "made").exists()
    with pytest.raises(InputError, match="not a directory"):
        (tmp_path / "file").write_text("")
        write(tmp_path / "good" / "a.mp4", scene(0, 24))
        pack(tmp_path / "good", tmp_path / "file" / "made", RULES)


def test_shards_are_bounded_and_the_same_at_any_number_of_workers(videos, tmp_path):
    rules = RULES.model_copy(update={"shard_clips": 3, "holdout": 0.25})
    pack(videos, tmp_path / "one" / "made", rules, workers=1)
    pack(videos, tmp_path / "four" / "made", rules, workers=4)
    first = tree(tmp_path / "one" / "made")
    assert first == tree(tmp_path / "four" / "made")
    assert sum(name.startswith("train/") and name.endswith(".tar") for name in first) == 5
    dataset = index.open_dataset(str(tmp_path / "one" / "made" / "train"))
    assert np.diff(dataset.first_clips).tolist() == [3, 3, 3, 3, 2]
    small = rules.model_copy(update={"shard_clips": 1000, "shard_bytes": 20_000})
    pack(videos, tmp_path / "small", small)
    dataset = index.open_dataset(str(tmp_path / "small" / "train"))
    assert all(
        size <= 20_000 + 1024 or count == 1
        for size, count in zip(dataset.shard_bytes, np.diff(dataset.first_clips), strict=True)
    )


KILLED = """
import os, signal, sys
from pipelines import pack
stored = pack._Packing.note_shard
def note_shard(self, name, shard):
    stored(self, name, shard)
    if len(self.stored) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack._Packing.note_shard = note_shard
pack.pack(sys.argv[1], sys.argv[2], pack.PackRules.model_validate_json(sys.argv[4]), workers=2)
"""


@pytest.mark.parametrize("after", [2])
def test_a_killed_packing_goes_on_to_the_same_bytes(videos, tmp_path, after):
    rules = RULES.model_copy(update={"shard_clips": 4, "holdout": 0.25})
    pack(videos, tmp_path / "whole" / "made", rules)
    dest = tmp_path / "killed" / "made"
    command = [sys.executable, "-c", KILLED, videos, dest, str(after), rules.model_dump_json()]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in dest.rglob("shard-*.tar")}
    assert len(before) == after and not (dest / "train" / "index.json").exists()
    with (dest / ".pack" / "journal.jsonl").open("a") as journal:
        journal.write('{"video": 3, "resu')  # the line that was being written
    for spool in list((dest / ".pack").glob("*.spool"))[:1]:
        spool.unlink()
    seen = []
    summary = pack(videos, dest, rules, progress=seen.append)
    assert tree(dest) == tree(tmp_path / "whole" / "made")
    assert {path: path.stat().st_mtime_ns for path in before} == before, "stored shards are not written again"
    assert len(seen) < 9, "finished videos are not cut again"
    keys = [key for side in ("train", "eval") for key, *_ in clips(dest / side)]
    assert len(keys) == len(set(keys)) == sum(summary.clips.values()) == 18


def test_a_finished_packing_is_left_as_it_is_and_others_are_kept_apart(videos, tmp_path):
    dest = tmp_path / "made"
    first = pack(videos, dest, RULES)
    before = tree(dest)
    seen = []
    assert pack(videos, dest, RULES, progress=seen.append) == first
    assert tree(dest) == before and not seen
    with pytest.raises(InputError, match="already holds the dataset 'made', made from other footage or by other rules"):
        pack(videos, dest, RULES.model_copy(update={"crf": 30}))
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shard-000000.tar").write_bytes(b"precious")
    with pytest.raises(
        InputError, match=r"already holds 1 shards \(shard-000000\.tar \.\.\.\) and no packing to go on with"
    ):
        pack(videos, tmp_path / "shards", RULES)
    command = [sys.executable, "-c", KILLED, videos, tmp_path / "half", "1"]
    subprocess.run([*command, RULES.model_copy(update={"shard_clips": 4}).model_dump_json()], check=False)
    with pytest.raises(InputError, match="holds an unfinished packing of other footage or by other rules"):
        pack(videos, tmp_path / "half", RULES)


def test_two_packings_into_one_place_are_refused(videos, tmp_path):
    def again(_):
        with pytest.raises(InputError, match="made is being packed by another process; wait for it"):
            pack(videos, tmp_path / "made", RULES)
        seen.append(True)

    seen = []
    pack(videos, tmp_path / "made", RULES, progress=lambda state: again(state) if not seen else None)
    assert seen


def test_captions_from_files_beside_and_from_tables(videos, tmp_path):
    folder = tmp_path / "told"
    for name in ("a.mp4", "g.mp4", "h.mp4"):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        shutil.copy(videos / name, folder / "sub" / name)
    (folder / "sub" / "a.txt").write_text("  a pan over leaves \n")
    (folder / "sub" / "g.json").write_text('{"caption": "stripes", "id": 3}')
    (folder / "sub" / "h.json").write_text("not json")

    def captions(dest):
        return {info["source"]: info.get("caption") for _, info, _ in clips(dest)}

    pack(folder, tmp_path / "beside", RULES)
    assert captions(tmp_path / "beside") == {
        "sub/a.mp4": "a pan over leaves",
        "sub/g.mp4": "stripes",
        "sub/h.mp4": None,
    }
    (folder / "table.csv").write_text("videoid,name\na,from the table\nsub/h,also told\n")
    rules = PackRules(
        **RULES.model_dump(exclude={"captions"}), captions={"table": "table.csv", "key": "videoid", "text": "name"}
    )
    pack(folder, tmp_path / "table", rules)
    assert captions(tmp_path / "table") == {
        "sub/a.mp4": "from the table",
        "sub/g.mp4": "stripes",
        "sub/h.mp4": "also told",
    }
    wrong = PackRules(**RULES.model_dump(exclude={"captions"}), captions={"table": "table.csv"})
    with pytest.raises(InputError, match="captions need the columns 'key' and 'caption'; there are videoid, name"):
        pack(folder, tmp_path / "wrong", wrong)
    (folder / "table.csv").write_text("key,caption\nid_1,leaves\n")
    with pytest.raises(InputError, match=r"no key in table.csv names a video that is there, such as sub/a.mp4; set"):
        pack(folder, tmp_path / "wrong", wrong)
    (folder / "table.csv").write_text('key,caption\na,"leaves' + "\ng,stripes" * 20_000)
    with pytest.raises(InputError, match=r"table.csv, up to line \d+: field larger than field limit .* quotation mark"):
        pack(folder, tmp_path / "wrong", wrong)


def test_captions_of_every_make(videos, tmp_path):
    """With a byte order mark, in another field, in several; of nesting that no parser follows."""
    folder = tmp_path / "told"
    folder.mkdir()
    sidecars = {
        "0.txt": b"\xef\xbb\xbfleaves\r\n",
        "1.json": b'\xef\xbb\xbf{"text": "leaves"}',
        "2.json": b'{"caption": ["one", "two"], "text": "leaves"}',
        "3.json": b'{"caption": 7}',
        "4.json": b"[" * 100_000,
    }
    for name, data in sidecars.items():
        shutil.copy(videos / "a.mp4", (folder / name).with_suffix(".mp4"))
        (folder / name).write_bytes(data)
    pack(folder, tmp_path / "made", RULES)
    told = {info["source"]: info.get("caption") for _, info, _ in clips(tmp_path / "made")}
    assert told == {f"{n}.mp4": "leaves" if n < 3 else None for n in range(5)}


def test_footage_that_vanishes_costs_itself_alone(videos, tmp_path):
    folder = tmp_path / "source"
    for name in ("a.mp4", "g.mp4", "h.mp4"):
        folder.mkdir(exist_ok=True)
        shutil.copy(videos / name, folder / name)

    def vanish(state):
        for name in {"a.mp4", "g.mp4", "h.mp4"} - {state.last}:
            (folder / name).unlink(missing_ok=True)

    summary = pack(folder, tmp_path / "made", RULES, progress=vanish)
    assert summary.clips == {"train": 2} and len(summary.skipped["missing"]) == 2
    assert "was there when the source was listed, and is not now" in summary.skipped["missing"][0]


def test_odd_names_are_names_and_nothing_else(tmp_path):
    """Patterns, protocols and lists of FFmpeg's; names that are not UTF-8 and differ in that alone."""
    source = tmp_path / "source"
    video = write(source / "scene:1.mp4", scene(0, 12)).read_bytes()
    for name in ("a%d.mp4", "a%00b.mp4", "new\nline.mp4", "caf\udce9.mp4", "caf\udcea.mp4"):
        (source / name).write_bytes(video)
    (source / "list.mp4").write_text("ffconcat version 1.0\nfile a%d.mp4\n")
    summary = pack(source, tmp_path / "made", RULES)
    keys = [key for key, *_ in clips(tmp_path / "made")]
    assert len(set(keys)) == 6 and {kind: len(named) for kind, named in summary.skipped.items()} == {"unreadable": 1}
    with contextlib.chdir(source):
        assert pack("scene:1.mp4", tmp_path / "one", RULES).clips == {"train": 1}


def test_lists_name_the_videos(videos, tmp_path):
    (videos / "list.txt").write_text(f"a.mp4\n# not this one\n\n{videos / 'sub' / 'f.mp4'}\nlost.mp4\n")
    try:
        summary = pack(videos / "list.txt", tmp_path / "list", RULES)
    finally:
        (videos / "list.txt").unlink()
    assert {info["source"] for _, info, _ in clips(tmp_path / "list")} == {"a.mp4", str(videos / "sub" / "f.mp4")}
    assert summary.skipped == {"missing": ["lost.mp4 is in list.txt, but not there"]}
    rows = [{"path": str(videos / "a.mp4"), "caption": "leaves"}, {"path": str(videos / "g.mp4")}]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(tmp_path / "table.jsonl", tmp_path / "jsonl", RULES)
    assert {info.get("caption") for _, info, _ in clips(tmp_path / "jsonl")} == {"leaves", None}


def test_images_are_clips_of_one_frame(tmp_path):
    import av

    for number in range(3):
        av.VideoFrame.from_ndarray(scene(number, 1)[0], "rgb24").save(str(tmp_path / f"{number}.png"))
    summary = pack(tmp_path, tmp_path / "made", RULES)
    assert summary.clips == {"train": 3}
    dataset = index.open_dataset(str(tmp_path / "made"))
    assert dataset.card.counts["images"] == 3
    records = dataset.records(0)
    assert (records["kind"] == index.IMAGE).all() and (records["frames"] == 1).all()


def test_a_worker_that_dies_or_falls_silent_costs_one_video(videos, tmp_path):
    def job(name):
        footage = {"name": name, "urls": [str(videos / name)], "bytes": 1, "caption": None, "sidecars": []}
        return {"footage": footage, "key": "key", "chance": 0.5, "spool": str(tmp_path / f"{name}.spool")}

    with Crew(1, RULES) as crew:

        def result(number, name, sent=None):
            if sent is not None:
                os.kill(crew.workers[0].process.pid, sent)
            crew.submit(number, job(name))
            while True:
                for done, found in crew.results():
                    assert done == number
                    return found

        assert len(result(0, "a.mp4")["clips"]) == 2
        assert result(1, "g.mp4", signal.SIGKILL)["skip"] == ["crashed", "g.mp4: its decoder ended with signal 9"]
        assert len(result(2, "h.mp4")["clips"]) == 2
        crew.patience = 0.5
        assert result(3, "a.mp4", signal.SIGSTOP)["skip"] == ["timeout", "a.mp4: no frame for 0 s"]
        crew.patience = 60
        assert len(result(4, "a.mp4")["clips"]) == 2


def test_a_full_disk_is_an_error_of_input_and_the_packing_goes_on_after_it(videos, tmp_path):
    import resource

    script = (
        "import resource, sys, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "from pipelines.pack import *; from pipelines.faults import InputError\n"
        "try: pack(sys.argv[1], sys.argv[2], PackRules(frames=12, least_frames=6))\n"
        "except InputError as error: print(error)\n"
    )
    assert resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", script, videos, tmp_path / "made"], capture_output=True, text=True)
    assert "can't be written: File too large; free space" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert pack(videos, tmp_path / "made", RULES).clips == {"train": 18}


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("MOVIOLA_S3_ENDPOINT", f"http://{host}:{port}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
    name = f"videos-{tmp_path.name[-20:].strip('_').replace('_', '-')}"
    client.create_bucket(Bucket=name)
    monkeypatch.setattr(storage, "_stores", {})
    yield f"s3://{name}"
    server.stop()


def test_from_and_to_an_object_store(videos, tmp_path, bucket):
    for name in ("a.mp4", "g.mp4", "sub/f.mp4"):
        storage.upload(f"{bucket}/raw/{name}", videos / name)
    storage.write_bytes(f"{bucket}/raw/sub/f.txt", b"told")
    summary = pack(f"{bucket}/raw", f"{bucket}/made", RULES.model_copy(update={"holdout": 0.4}))
    assert summary.clips == {"train": 4, "eval": 2}
    dataset = index.open_dataset(f"{bucket}/made/train")
    record = dataset.records(0)[0]
    start = int(record["offset"])
    data = storage.read_bytes(dataset.shard_url(0), start, start + int(record["bytes"]))
    assert read(data).shape == (12, 64, 96, 3)
    assert pack(f"{bucket}/raw", f"{bucket}/made", RULES.model_copy(update={"holdout": 0.4})) == summary
    assert {entry.name for entry in storage.list_dir(f"{bucket}/made")} == {"train", "eval"}
    pack(f"{bucket}/raw", tmp_path / "local", RULES)
    assert {info.get("caption") for _, info, _ in clips(tmp_path / "local")} == {None, "told"}
    (tmp_path / "list.txt").write_text(f"{bucket}/raw/sub/f.mp4\n{bucket}/raw/g.mp4\n{bucket}/raw/gone.mp4\n")
    summary = pack(tmp_path / "list.txt", tmp_path / "listed", RULES)
    assert {info.get("caption") for _, info, _ in clips(tmp_path / "listed")} == {None, "told"}
    assert [reason for reason in summary.skipped] == ["missing"]


def test_an_object_store_is_packed_into_from_where_it_was_left(videos, tmp_path, bucket, monkeypatch):
    rules = RULES.model_copy(update={"shard_clips": 4})
    pack(videos, tmp_path / "made", rules)
    stored = packing._Packing.note_shard

    def killed(self, name, shard):
        stored(self, name, shard)
        if len(self.stored) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packing._Packing, "note_shard", killed)
        pack(videos, f"{bucket}/made", rules)
    for work in Path(tempfile.gettempdir()).glob("moviola-pack-*"):
        shutil.rmtree(work)  # as on another machine
    seen = []
    pack(videos, f"{bucket}/made", rules, progress=seen.append)
    assert len(seen) < 9
    for entry in storage.list_dir(f"{bucket}/made"):
        local, remote = (tmp_path / "made" / entry.name).read_bytes(), storage.read_bytes(f"{bucket}/made/{entry.name}")
        assert entry.name == "index.json" or local == remote
    assert len(storage.list_dir(f"{bucket}/made")) == 11
    assert not list(Path(tempfile.gettempdir()).glob("moviola-pack-*"))


def test_what_this_machine_cut_for_an_object_store_is_not_cut_again(videos, tmp_path, bucket):
    pack(videos, tmp_path / "made", RULES)
    seen = []

    def killed(state):
        seen.append(state.last)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(videos, f"{bucket}/made", RULES, progress=killed)
    storage.write_bytes(f"{bucket}/made/shard-000000.tar", b"uploaded when it was killed, but not noted yet")
    pack(videos, f"{bucket}/made", RULES, progress=lambda state: seen.append(state.last))
    assert len(seen) == len(set(seen)) == 9
    shard = storage.read_bytes(f"{bucket}/made/shard-000000.tar")
    assert shard == (tmp_path / "made" / "shard-000000.tar").read_bytes()
    assert not list(Path(tempfile.gettempdir()).glob("moviola-pack-*"))


@needs_real
@pytest.mark.footage
def test_real_footage_is_packed_whole(tmp_path):
    rules = PackRules(short_side=64, frames=16, least_frames=8, clips_per_video=1, holdout=0.125, preset="veryfast")
    summary: Summary = pack(REAL, tmp_path / "made", rules)
    assert not summary.skipped, summary.text()
    assert summary.clips["train"] + summary.clips["eval"] == summary.videos >= 30
    assert summary.clips["eval"] == round(summary.videos / 8)
    with contextlib.closing(tarfile.open(tmp_path / "made" / "eval" / "shard-000000.tar")) as tar:
        assert all(tar.extractfile(member).read() for member in tar)
