"""Rules of packing: what they refuse, and that each published archive's layout packs by its rules file."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines import index
from pipelines.faults import InputError
from pipelines.pack import PackRules, load_rules, pack
from tests.pipelines.footage import read, scene, write
from tests.pipelines.test_pack import clips

FILES = sorted((Path(__file__).parents[2] / "manifests" / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_rules_file_is_valid_and_says_what_it_is_about(file):
    rules = load_rules(str(file))
    assert rules.card.name == file.stem
    assert rules.card.licence
    for said in ("homepage", "citation", "obtain"):
        assert getattr(rules.card, said) or file.stem == "demo", said


def test_all_faults_are_told_at_once(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("frames: 0\nsizes: [1, 2]\ngroup: '('\nmembers: ../list.txt\ncard: {licence: 3}\n")
    with pytest.raises(InputError) as caught:
        load_rules(str(file))
    message = str(caught.value)
    assert message.startswith(f"{file}: 5 faults\n")
    assert "\n  frames: 0: input should be greater than 0" in message
    assert "\n  sizes: is not a field; there are card, frames, least_frames" in message
    assert "\n  group: '(' is not a regular expression: missing )" in message
    assert "\n  members: '../list.txt' must be a path inside the source" in message
    assert "\n  card.licence: 3: input should be a valid string" in message
    for text, expected in {
        "- a": "pack rules are a mapping of fields; this is a list",
        "a: [": "line 1, column 5",
        "a: 2026-99-99": "not readable as YAML",
        "a: &a [1]\nb: *a": "aliases",
        "frames: 1\nframes: 2": "key 'frames' stands here twice",
    }.items():
        file.write_text(text)
        with pytest.raises(InputError, match=expected):
            load_rules(str(file))


def test_settings_change_a_file_or_the_defaults(tmp_path):
    file = tmp_path / "rules.yaml"
    file.write_text("frames: 32\ncard: {licence: MIT}\n")
    rules = load_rules(str(file), ["size=[64, 48]", "card.name=mine", "fps=12.5", "group=(a)=b"])
    assert (rules.frames, rules.size, rules.fps, rules.group) == (32, (64, 48), 12.5, "(a)=b")
    assert (rules.card.name, rules.card.licence) == ("mine", "MIT")
    assert load_rules() == PackRules()
    for setting, message in {
        "frames": "--set frames: write FIELD=VALUE, for example frames=49",
        "frames.most=3": "--set frames.most=3: frames has no fields",
        "frames=no": "--set: 1 fault\n  frames: false: input should be",
        "frames=2026-99-99": '--set: 1 fault\n  frames: "2026-99-99": input should be',
    }.items():
        with pytest.raises(InputError) as caught:
            load_rules(None if "frames=" in setting else str(file), [setting])
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frames": 8}, "least_frames 16 is more than frames 8"),
        ({"size": (64, 64), "short_side": 64}, "size and short_side exclude each other"),
        ({"encode": "copy", "fps": 8, "short_side": 64}, "so fps and short_side can't be set"),
        ({"group": "abc"}, "has no group in parentheses"),
        ({"size": (63, 64)}, "multiple of 2"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PackRules(**fields)


def published(name: str, tmp_path: Path, **changes) -> tuple[Path, PackRules]:
    """A folder to lay a made-up archive out in, and the dataset's rules made small."""
    rules = load_rules(str(FILES[0].with_name(f"{name}.yaml")))
    return tmp_path / "archive", PackRules(**{**rules.model_dump(), **changes})


def test_vimeo90k(tmp_path):
    archive, rules = published("vimeo90k", tmp_path, holdout=0.5)
    for number, folder in enumerate(("00001/0001", "00001/0002", "00002/0001", "00003/0009")):
        (archive / "sequences" / folder).mkdir(parents=True)
        for t, frame in enumerate(scene(number, 7)):
            path = archive / "sequences" / folder / f"im{t + 1}.png"
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").save(str(path))
    assert sum(pack(archive, tmp_path / "whole", rules).clips.values()) == 4
    (archive / "sep_trainlist.txt").write_text("00001/0001\n00001/0002\n00002/0001\n00009/0001\n\n")
    rules = rules.model_copy(update={"members": "sep_trainlist.txt"})
    summary = pack(archive, tmp_path / "made", rules)
    assert summary.clips["train"] + summary.clips["eval"] == 3
    assert summary.skipped == {"missing": ["00009/0001 is in sep_trainlist.txt, but not in the source"]}
    stored = [info for side in summary.datasets.values() for _, info, _ in clips(side)]
    assert sorted(info["source"] for info in stored) == ["00001/0001", "00001/0002", "00002/0001"]
    assert all((info["frames"], info["fps"], info["height"], info["width"]) == (7, 30, 64, 96) for info in stored)
    card = index.open_dataset(summary.datasets["train"]).card
    assert (card.name, card.homepage) == ("vimeo90k", "http://toflow.csail.mit.edu")


def test_inter4k(tmp_path):
    archive, rules = published("inter4k", tmp_path, size=(32, 32))
    for number in (1, 2):
        write(archive / "60fps" / "UHD" / f"{number}.mp4", scene(number, 260, (48, 64), 60), fps=60)
        write(archive / "24fps" / "UHD" / f"{number}.mp4", scene(number, 24))
    summary = pack(archive, tmp_path / "made", rules)
    assert summary.clips == {"train": 20}
    assert {(info["frames"], info["width"]) for _, info, _ in clips(tmp_path / "made")} == {(24, 32)}


def test_kinetics400(tmp_path):
    archive, rules = published("kinetics400", tmp_path, short_side=32, holdout=0.25)
    for number, name in enumerate(
        (
            "abseiling/-3B32lodo2M_000059_000069.mp4",
            "abseiling/-3B32lodo2M_000100_000110.mp4",
            "zumba/abcdefghijk_000000_000010.mp4",
        )
    ):
        write(archive / "train" / name, scene(number, 20))
    summary = pack(archive, tmp_path / "made", rules)
    sources = [{info["source"].split("/")[1][:11] for _, info, _ in clips(url)} for url in summary.datasets.values()]
    assert sorted(map(len, sources)) == [1, 1] and not sources[0] & sources[1]


def test_webvid(tmp_path):
    archive, rules = published("webvid", tmp_path, short_side=32)
    write(archive / "videos" / "031851_031900" / "1039694498.mp4", scene(0, 20))
    (archive / "results_10M_train.csv").write_text(
        "videoid,contentUrl,duration,page_dir,name\n"
        '1039694498,https://x/y.mp4,PT00H00M10S,031851_031900,"Slow pan, over ""leaves"""\n'
    )
    pack(archive, tmp_path / "made", rules)
    assert [info["caption"] for _, info, _ in clips(tmp_path / "made")] == ['Slow pan, over "leaves"']


def test_panda70m(tmp_path):
    archive, rules = published("panda70m", tmp_path, short_side=32, holdout=0.125)
    for number, name in enumerate(("00000_00000", "00000_00001", "00001_00000")):
        write(archive / "00000" / f"{name}.mp4", scene(number, 20))
        (archive / "00000" / f"{name}.txt").write_text(f"clip {name}")
        (archive / "00000" / f"{name}.json").write_text(json.dumps({"caption": "other", "matching_score": 0.4}))
    summary = pack(archive, tmp_path / "made", rules)
    told = [{info["caption"] for _, info, _ in clips(url)} for url in summary.datasets.values()]
    assert {"clip 00001_00000"} in told and {"clip 00000_00000", "clip 00000_00001"} in told


def test_mmtrail(tmp_path):
    archive, rules = published("mmtrail", tmp_path, short_side=32)
    write(archive / "video_dataset_33" / "-3r7ptfObEs_0000000.mp4", scene(0, 20))
    row = {
        "basic": {"clip_path": "video_dataset_33/-3r7ptfObEs_0000000.mp4", "clip_id": "-3r7ptfObEs_0000000"},
        "scene": {"polish_caption": "Leaves drift by."},
    }
    (archive / "MMTrail2M.json").write_text(json.dumps([row]))
    pack(archive, tmp_path / "made", rules)
    assert [info["caption"] for _, info, _ in clips(tmp_path / "made")] == ["Leaves drift by."]


def test_mcl_jcv(tmp_path):
    """Raw video, read by the shape in its name; scaled down here from 1920x1080 to stay quick."""
    archive, rules = published("mcl-jcv", tmp_path, include=["*.yuv"], size=(32, 32))
    archive.mkdir()
    frames = scene(0, 40)
    planes = [av.VideoFrame.from_ndarray(np.ascontiguousarray(f), "rgb24").to_ndarray(format="yuv420p") for f in frames]
    (archive / "videoSRC01_96x64_30.yuv").write_bytes(np.stack(planes).tobytes())
    (archive / "videoSRC02.yuv").write_bytes(np.stack(planes).tobytes())
    summary = pack(archive, tmp_path / "made", rules)
    ((_, info, data),) = clips(tmp_path / "made")
    assert (info["frames"], info["fps"]) == (33, 30)
    assert read(data).shape == (33, 32, 32, 3)
    assert summary.skipped == {
        "unreadable": ["videoSRC02.yuv: raw video must carry its shape in its name, as in x_1920x1080_30.yuv"]
    }


def test_ucf101(tmp_path):
    archive, rules = published("ucf101", tmp_path, holdout=0.25)
    for number, name in enumerate(("v_Archery_g01_c01", "v_Archery_g01_c02", "v_Bowling_g01_c01")):
        write(archive / name.split("_")[1] / f"{name}.avi", scene(number, 20), codec="mpeg4")
    summary = pack(archive, tmp_path / "made", rules)
    sides = [{info["source"].split("/")[0] for _, info, _ in clips(url)} for url in summary.datasets.values()]
    assert sorted(map(sorted, sides)) == [["Archery"], ["Bowling"]]


def test_sky_timelapse(tmp_path):
    archive, rules = published("sky-timelapse", tmp_path, size=(32, 32), holdout=0.5)
    for number, folder in enumerate(
        ("0nBhmQSzkTc/0nBhmQSzkTc_1", "0nBhmQSzkTc/0nBhmQSzkTc_2", "-3B32lodo2M/-3B32lodo2M_1")
    ):
        (archive / "sky_train" / folder).mkdir(parents=True)
        for t, frame in enumerate(scene(number, 40 if number else 10)):
            path = archive / "sky_train" / folder / f"{folder[:11]}_frames_{t + 1:08d}.jpg"
            av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24").save(str(path))
    summary = pack(archive, tmp_path / "made", rules)
    assert [len(reasons) for reasons in summary.skipped.values()] == [1], "one has 10 frames"
    sides = [[info["source"][:11] for _, info, _ in clips(url)] for url in summary.datasets.values()]
    assert sorted(map(set, sides), key=str) == [{"-3B32lodo2M"}, {"0nBhmQSzkTc"}]


def test_taichi_hd(tmp_path):
    archive, rules = published("taichi-hd", tmp_path, size=(32, 32), holdout=0.5)
    for number, name in enumerate(
        ("aDyyTMUBoLE#000164#000351", "aDyyTMUBoLE#000400#000600", "-3B32lodo2M#000000#000100")
    ):
        write(archive / "train" / f"{name}.mp4", scene(number, 20))
        write(archive / "test" / f"{name}.mp4", scene(number, 20))
    summary = pack(archive, tmp_path / "made", rules)
    sides = [[info["source"][:11] for _, info, _ in clips(url)] for url in summary.datasets.values()]
    assert sorted(map(set, sides), key=str) == [{"-3B32lodo2M"}, {"aDyyTMUBoLE"}] and sum(map(len, sides)) == 3
