"""The command as a tired operator meets it: every fault of input is one message, an exit status, and no traceback."""

import errno
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import yaml

from cluster import cli, demo, events, launch, runs
from pipelines import storage, synthetic
from pipelines.faults import InputError, Remark
from trainer import manifest as manifests
from trainer import run as folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def moviola(monkeypatch, tmp_path, capsys):
    """Runs the command in an empty folder; gives (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOVIOLA_RUNS", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["moviola", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, " ".join(shown.err.split())

    return call


@pytest.fixture
def plain(small_dataset):
    return {
        "name": "small",
        "recipe": "arvae",
        "model": {"down": 8},
        "data": {"train": str(small_dataset)},
        "batch": 4,
        "clip": {"sizes": [[32, 32]]},
    }


@pytest.fixture
def run_url(plain, tmp_path):
    """A run that was launched in ./runs and has no worker yet."""
    return folder.claim(manifests.validate(plain, "m"), str(tmp_path / "runs"))[1]


def _event(run_url, event, **fields):
    record = {"time": time.time(), "event": event, "attempt": 1, **fields}
    storage.append_text(storage.join(run_url, "events.jsonl"), json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.yaml", None, "absent.yaml: there is no such file"),
        ("folder.yaml", ..., "folder.yaml: is a directory"),
        ("binary.yaml", b"\x93\xff\x00", "binary.yaml: not UTF-8 text at byte 0"),
        ("empty.yaml", b"", "empty.yaml: a manifest is a mapping of fields; this is empty"),
        ("list.yaml", b"- 1", "list.yaml: a manifest is a mapping of fields; this is a list"),
        ("[red]m[bold] .yaml", b"x: [", "[red]m[bold] .yaml: line 1"),
    ],
)
def test_a_manifest_that_can_not_be_read(moviola, tmp_path, name, content, message):
    path = tmp_path / name
    if content is ...:
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    status, out, err = moviola("train", name)
    assert (status, out) == (2, "")
    assert err.startswith("moviola: ") and message in err


def test_faults_of_fields_model_stages_and_clips_come_in_one_go(moviola, tmp_path, plain):
    plain |= {"zero": {"stage": 7}, "model": {"down": 7}, "workers": {"cout": 2}}
    plain["stages"] = {
        "frame-3": {"steps": 1},
        "frames-3": {"steps": -4},
        "frames-5": {"stepps": 4},
        "frames-7": {"optimizer": {"lr": "fast"}},
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    status, _, err = moviola("train", "m.yaml", "--set", "clip.framez=2", "--set", "optimizer.lr=0")
    assert status == 2 and "m.yaml: 9 faults in the manifest:" in err
    for fault in (
        "zero.stage: 7",
        "model.down: 7",
        "workers.cout: no such field; did you mean 'count'?",
        "optimizer.lr: 0",
        "clip.framez: no such field; did you mean 'frames'?",
        "stages.frame-3: no such field; did you mean 'frames-3'?",
        "stages.frames-3.steps: -4",
        "stages.frames-5.stepps: no such field; did you mean 'steps'?",
        'stages.frames-7.optimizer.lr: "fast"',
    ):
        assert fault in err


def test_lint_ends_as_train_would(moviola, tmp_path, plain, small_dataset):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    assert moviola("lint", "m.yaml")[:2] == (0, "m.yaml: nothing wrong\n")
    assert moviola("lint", str(small_dataset), "--json")[:2] == (0, '{\n  "findings": []\n}\n')
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain | {"batch": 0}))
    status, out, _ = moviola("lint", "m.yaml")
    assert status == 2 and "batch: 0: input should be greater than 0" in out and "index" not in out
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain | {"batch": 0, "data": {"train": ["gone"], "eval": 7}}))
    status, out, _ = moviola("lint", "m.yaml")
    assert status == 2 and "batch: 0: input" in out and "data.eval: 7" in out and "gone is not there" in out
    status, out, _ = moviola("lint", "nowhere", "--json")
    assert status == 1 and "nowhere is not there" in json.loads(out)["findings"][0]


def test_a_dataset_that_can_not_be_trained_on(moviola, tmp_path, plain, small_dataset):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    shutil.copytree(small_dataset, tmp_path / "packed" / "train")
    hollow = json.loads((small_dataset / "index.json").read_text()) | {"shards": []}
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "index.json").write_text(json.dumps(hollow))
    (tmp_path / "bare").mkdir()
    for dataset, message in (
        ("nowhere", "nowhere is not there; check the URL"),
        ("hollow", "hollow holds no clips"),
        ("bare", "bare/index.json is not there; run `moviola index"),
        ("packed", "packed/index.json is not there; did you mean"),
    ):
        status, _, err = moviola("train", "m.yaml", "--set", f"data.train={dataset}")
        assert status == 1 and message in err, err
        status, out, err = moviola("train", "m.yaml", "--dry-run", "--json", "--set", f"data.train={dataset}")
        assert status == 0 and json.loads(out)["data"]["bytes"] is None
        assert "train would refuse this: data.train.0.dataset: " in err and message in err
        assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken_is_refused_and_the_run_stays(moviola, tmp_path, plain, run_url):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    before = (tmp_path / "runs/small/manifest.yaml").read_bytes()
    status, _, err = moviola("train", "m.yaml", "--set", "batch=8")
    assert status == 2 and "batch: 4 -> 8" in err and "--name" in err
    assert (tmp_path / "runs/small/manifest.yaml").read_bytes() == before


@pytest.mark.parametrize("verb", ["status", "stop", "resume", "evaluate", "fingerprint"])
@pytest.mark.parametrize("name", ["", "a b", "[red]x", "-x", "../x", "nowhere", "x/checkpoints/step-00000001"])
def test_names_that_are_no_run(moviola, verb, name):
    status, out, err = moviola(verb, "--", name)
    assert (status, out) == (2, "")
    assert err.startswith("moviola: ") and (name in err or name in ("../x", "x/checkpoints/step-00000001"))


def test_a_run_is_found_by_its_name_and_by_its_path(moviola, run_url):
    shown = [
        json.loads(moviola("status", name, "--json")[1]) for name in ("small", "runs/small", "runs/small/", run_url)
    ]
    assert [state["name"] for state in shown] == ["small"] * 4
    status, out, _ = moviola("list", "--json")
    assert status == 0 and [state["name"] for state in json.loads(out)["runs"]] == ["small"]
    os.symlink("nowhere", Path(run_url).parent / "dangling")
    torn = Path(run_url).parent / "torn"
    torn.mkdir()
    (torn / "manifest.yaml").write_text("name: torn\nrecipe: [")
    status, out, err = moviola("list")
    assert status == 0 and "small" in out and "warning: torn is left out:" in err


def test_the_state_follows_the_newest_event(moviola, run_url, monkeypatch):
    def state():
        return json.loads(moviola("status", "small", "--json")[1])

    assert state()["state"] == "running"
    _event(run_url, "failed", message="the disk is full")
    assert (state()["state"], state()["failure"]) == ("failed", "the disk is full")
    status, _, err = moviola("stop", "small")
    assert status == 1 and "already failed" in err
    gone = subprocess.Popen(["true"])
    gone.wait()
    _event(run_url, "launch", host=socket.gethostname(), pid=gone.pid)
    assert (state()["state"], state()["failure"]) == ("silent", None)
    status, out, _ = moviola("logs", "small", "-f")
    assert status == 1 and "the process of small is gone; `moviola resume small` goes on" in out
    status, _, err = moviola("stop", "small")
    assert status == 0 and "small is stopped: its process was gone, and no checkpoint is committed" in err
    assert state()["state"] == "stopped" and (Path(run_url) / "stop.json").exists()
    _event(run_url, "launch", host="elsewhere", pid=gone.pid)
    assert (state()["state"], state()["failure"]) == ("running", None)
    _event(run_url, "start", from_step=0, world=1, workers=[])
    assert moviola("stop", "small")[0] == 0 and (Path(run_url) / "stop.json").exists()
    seconds = {"start": 0.0, "time": time.time(), "seconds": {"productive": 3.0}, "uncommitted": 1.0, "stopped": False}
    storage.write_json(storage.join(run_url, "ledger.json"), {"attempt": 1, "step": 4, "ledger": seconds})
    assert (state()["step"], state()["ledger"]["uncommitted"]) == (4, 1.0), "steps that are not logged yet are known"
    monkeypatch.setattr(runs, "SILENT_SECONDS", -1.0)
    assert state()["state"] == "silent"
    assert "nothing is heard of small" in moviola("stop", "small")[2]
    _event(run_url, "stopped", step=7)
    assert (state()["state"], state()["step"]) == ("stopped", 7)
    keys = {"state", "attempt", "stage", "step", "loss", "last_commit_step", "restarts", "goodput"}
    assert keys <= state().keys()


def test_an_exported_folder_is_named_as_a_run_is(run_url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("small", "exported"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    assert cli._checkpoint("exported", "runs") == ("exported", "exported")
    assert cli._checkpoint("small", "runs") == (run_url, run_url), "a run goes before a folder of its name"
    with pytest.raises(InputError, match="is no run's name"):
        cli._checkpoint("", "runs")


def test_versions_and_help_without_a_command(moviola):
    status, out, _ = moviola("--version")
    assert status == 0 and out.startswith("moviola 0") and "torch 2" in out and "ray 2" in out
    status, out, err = moviola()
    assert status in (0, 2) and "Trains video autoencoders at scale" in out + err and "fingerprint" in out + err


def test_a_dry_run_is_one_object_and_leaves_nothing(moviola, tmp_path, plain):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    status, out, _ = moviola("train", "m.yaml", "--dry-run", "--json")
    facts = json.loads(out)
    assert status == 0 and {"manifest", "parameters", "latent", "batch", "memory"} <= facts.keys()
    assert {"counted", "total"} <= facts["parameters"].keys() and {"shape", "channels"} <= facts["latent"].keys()
    assert manifests.validate(facts["manifest"], "again").resolved() == facts["manifest"]
    assert not (tmp_path / "runs").exists()


def test_pack_skips_by_reason_and_name_also_names_that_look_like_markup(moviola, tmp_path):
    synthetic.write_videos("videos", count=2, seconds=1, size=(32, 32))
    for name, content in (("[red]none[bold] .mp4", b""), ("[/] text.mp4", b"no video")):
        (tmp_path / "videos" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "videos" / name).write_bytes(content)
    chosen = ["--set", "holdout=0.5", "--set", "size=[32, 32]", "--workers", "1"]
    status, out, err = moviola("pack", "videos", "shards", *chosen)
    assert (status, err) == (0, "")
    assert "skipped, empty: 1\n  [red]none[bold] .mp4 has no bytes" in out
    assert "2 of 4 videos packed" in out and "[/] text.mp4: " in out
    status, out, _ = moviola("pack", "videos", "shards", *chosen, "--json")
    assert json.loads(out)["clips"] == {"train": 1, "eval": 1}


def test_without_a_terminal_lines_say_how_far_a_command_is(monkeypatch, capsys):
    for seconds, shown in ((0.0, "packing videos: 1 of 3, 5 clips\npacking videos: 2 of 3\n"), (60.0, "")):
        monkeypatch.setattr(cli, "LINE_SECONDS", seconds)
        with cli._bar("packing videos") as move:
            move(1, 3, "5 clips")
            move(2, 3)
        assert capsys.readouterr().err == shown


def test_a_packing_that_fails_leaves_room_for_the_next(moviola, tmp_path):
    synthetic.write_videos("two", count=2, seconds=1, size=(32, 32))
    (tmp_path / "videos").mkdir()
    for refused in (("videos", "shards"), ("absent", "shards")):
        status, out, err = moviola("pack", *refused)
        assert status in (1, 2) and out == "" and err.startswith("moviola: ")
    shutil.copy("two/scene-0000.mp4", "videos")
    (tmp_path / "videos/broken.mp4").write_bytes(b"no video")
    chosen = ["--set", "holdout=0.5", "--set", "size=[32, 32]", "--workers", "1"]
    status, _, err = moviola("pack", "videos", "shards", *chosen)
    assert status == 1 and "all clips come from one source video" in err
    shutil.copy("two/scene-0001.mp4", "videos")
    status, _, err = moviola("pack", "videos", "shards", *chosen)
    assert status == 0, err


def test_the_demo_packs_anew_when_the_folder_changes(monkeypatch, tmp_path):
    synthetic.write_videos(tmp_path / "v", count=3, seconds=2, size=(64, 64))
    (tmp_path / "v/scene-0002.mp4").rename(tmp_path / "third.mp4")
    first = demo.shards_of(str(tmp_path / "v"), str(tmp_path / "data"), lambda text: None)
    assert demo.shards_of(str(tmp_path / "v"), str(tmp_path / "data"), lambda text: None) == first
    shutil.copy(tmp_path / "third.mp4", tmp_path / "v")
    second = demo.shards_of(str(tmp_path / "v"), str(tmp_path / "data"), lambda text: None)
    assert second != first and (tmp_path / "data/shards").samefile(second)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").rename("demo_data")
    twins = [path for path in demo.MANIFESTS.glob("*.yaml") if path.stem == "demo" or path.stem.endswith("_smoke")]
    assert len(twins) > 10
    for path in twins:
        wanted = manifests.load(path)
        missing = [fault for fault in folder.data_faults(wanted) if "is not there" in fault]
        assert not missing or wanted.recipe == "latentdit", (path, missing)


def test_the_demo_says_what_is_wrong_with_the_folder_and_spares_other_runs(tmp_path, plain, capsys):
    (tmp_path / "none").mkdir()
    places = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    assert demo.main(["--videos", str(tmp_path / "none"), *places]) == 1
    assert "holds no videos" in capsys.readouterr().err
    _, kept = folder.claim(manifests.validate({**plain, "name": "demo"}, "m"), str(tmp_path / "runs"))
    with pytest.raises(InputError, match="was not made by the demo"):
        demo.make_way(kept, str(tmp_path / "data"), lambda text: None)
    assert (Path(kept) / "manifest.yaml").exists()


def test_a_demo_that_still_trains_is_spared_and_one_that_was_ended_is_made_anew(tmp_path, plain, small_dataset):
    shards = tmp_path / "data" / "shards-0"
    shutil.copytree(small_dataset, shards)
    made = manifests.validate({**plain, "name": "demo", "data": {"train": str(shards)}}, "m")
    _, run_url = folder.claim(made, str(tmp_path / "runs"))
    with pytest.raises(InputError, match=r"still trains; wait for it, or end it: \.venv/bin/moviola stop "):
        demo.make_way(run_url, str(tmp_path / "data"), lambda text: None)
    assert (Path(run_url) / "manifest.yaml").exists()
    _event(run_url, "stopped", step=7)
    demo.make_way(run_url, str(tmp_path / "data"), lambda text: None)
    assert not Path(run_url).exists()


def test_a_ray_that_does_not_start_is_one_message(monkeypatch, run_url):
    def busy(**options):
        raise Exception("The current node timed out during startup. This could happen because of anything.")

    monkeypatch.setattr("ray.init", busy)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    manifest, before = folder.load(run_url), dict(os.environ)
    message = r"Ray did not start: The current node timed out during startup\. Its processes"
    with pytest.raises(InputError, match=message), launch.connected_ray(manifest):
        pytest.fail("there is no Ray")
    assert os.environ == before


def test_the_command_to_go_on_is_the_one_that_was_typed_without_secrets(monkeypatch, tmp_path):
    installed = tmp_path / "an environment" / "moviola"
    installed.parent.mkdir()
    installed.touch(0o755)
    typed = ["train", "my file.yaml", "--set", "clip.sizes=[[64, 64]]", "--runs", "s3://me:hush-hush@bucket/runs"]
    monkeypatch.setattr(sys, "argv", [str(installed), *typed])
    said = shlex.split(cli._again())
    assert said[:5] == [str(installed), *typed[:4]] and "hush" not in said[-1]
    monkeypatch.setenv("PATH", str(installed.parent))
    assert shlex.split(cli._again())[0] == "moviola"


def test_signals_and_full_disks_end_in_a_line(capsys):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/x")

    assert cli.guarded(lambda: signal.raise_signal(signal.SIGTERM)) == cli.INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"
    assert cli.guarded(full) == 1
    assert "/somewhere/x: no space left on device; make room" in capsys.readouterr().err
    assert cli.guarded(lambda: open("n" * 300, "w").close()) == 1
    assert "n: file name too long; name another path" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: 1 / 0)


@pytest.mark.parametrize(
    "command",
    [
        ("reconstruct", "weights", "in.mp4", "out.mp4"),
        ("encode", "weights", "in.mp4", "out.safetensors"),
        ("decode", "weights", "in.safetensors", "out.mp4"),
        ("evaluate", "./weights", "shards"),
    ],
)
def test_coding_takes_the_gpu_where_there_is_one(moviola, monkeypatch, tmp_path, command):
    def reached(*_, device, **options):
        raise InputError(f"on {device}")

    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").write_text("{}")
    monkeypatch.setattr("trainer.codec.load", reached)
    monkeypatch.setattr("trainer.examine.evaluate_checkpoint", reached)
    assert moviola(*command)[::2] == (1, "moviola: on cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert moviola(*command)[::2] == (1, "moviola: on cuda")


def test_an_empty_caption_is_none():
    assert cli._text(None, "runs/r", " ", None) is None


def test_remarks_are_warnings_of_the_command(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.guarded(lambda: warnings.warn("it is not quite so", Remark, stacklevel=1)) == 0
    assert capsys.readouterr().err == "warning: it is not quite so\n"


def test_a_signal_while_a_run_is_made_ready_leaves_it_as_it_was(moviola, monkeypatch, tmp_path, plain):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(plain))
    load = manifests.load

    def slow(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return load(*arguments, **options)

    monkeypatch.setattr(manifests, "load", slow)
    status, _, err = moviola("train", "m.yaml")
    assert (status, err) == (cli.INTERRUPTED, "SIGTERM: stopping before it begins … interrupted")
    assert not (tmp_path / "runs").exists()
    url = folder.claim(manifests.validate(plain, "m"), str(tmp_path / "runs"))[1]
    before = runs.events(url)
    for arguments in (["train", "m.yaml"], ["resume", "small"]):
        status, _, err = moviola(*arguments)
        assert status == cli.STOPPED and err.endswith(f"To go on: moviola {' '.join(arguments)}"), err
    assert runs.events(url) == before


def test_a_closed_pipe_is_no_fault(run_url):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "cluster.cli", "status", run_url]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert "Traceback" not in done.stderr


def test_what_another_launch_writes_is_read_whole_or_not_at_all(tmp_path):
    url = str(tmp_path / "events.jsonl")
    follower = events.Follower(url)
    assert follower.new() == []
    storage.append_text(url, '{"a": 1}\n{"b": ')
    assert follower.new() == [{"a": 1}]
    storage.append_text(url, '2}\n{"cut short\n{"c": 3}\n')
    assert follower.new() == [{"b": 2}, {"c": 3}]


def test_folders_of_dead_commands_go_and_those_of_living_ones_stay(tmp_path):
    dead = tmp_path / "moviola-dead"
    dead.mkdir()
    (dead / "alive").touch()
    with launch._folder(str(tmp_path)) as first, launch._folder(str(tmp_path)) as second:
        assert not dead.exists()
        assert Path(first).exists() and Path(second).exists()
    assert list(tmp_path.iterdir()) == []
