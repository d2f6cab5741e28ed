"""The one loop in real processes: stopped, killed, moved to another world size, it ends where it would have ended."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from tests.trainer.runs import Runs, until
from trainer import checkpoint, examine, pictures
from trainer.checkpoint import Checkpoint

STEPS = {"first-frame": 2, "frames-3": 3, "frames-5": 2, "frames-7": 3}
LAST = sum(STEPS.values())
BORDER = LAST - STEPS["frames-7"]
LOSSES = {"mse": 1, "ssim": 0.1, "lpips": 0}
ALL = ("weights", "ema", "optimizer", "loader", "rng")


@pytest.fixture(scope="module")
def smoke(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest: ARVAE with a few channels through all of its stages."""
    path = tmp_path_factory.mktemp("manifest") / "smoke.yaml"
    spynet = {"levels": 1, "widths": [8, 8, 4, 4], "kernel": 3}
    first_frame = {"kind": "own", "down": 4, "channels": 4, "widths": [4, 4, 4]}
    small = {"motion_channels": 2, "supplement_channels": 2, "widths": [4, 4, 4], "motion_width": 4, "state_width": 4}
    plain = {
        "name": "smoke",
        "recipe": "arvae",
        "model": {"down": 4, **small, "spynet": spynet, "first_frame": first_frame, "perceptual": None},
        "data": {"train": str(small_dataset)},
        "batch": 4,
        "precision": "fp32",
        "ema": 0.9,
        "optimizer": {"lr": 1e-3, "warmup": 2},
        "clip": {"sizes": [[32, 32]]},
        "stages": {name: {"steps": steps, "losses": LOSSES} for name, steps in STEPS.items()},
        "workers": {"count": [1, 2]},
        "checkpoint": {"every_steps": 1, "keep": LAST},
        "failure": {"hang_seconds": 60},
        "telemetry": {"log_every": 1, "tensorboard": False},
        "trace": True,
    }
    path.write_text(json.dumps(plain))
    return path


@pytest.fixture(scope="module")
def runs(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), smoke)


def same(runs: Runs, name: str, other: str) -> None:
    """Both runs have the same losses to the last bit, the same final state, and an exact history of the same clips."""
    assert runs.losses(name) == runs.losses(other)
    assert list(runs.losses(name)) and set(runs.losses(name)) == set(range(LAST))
    assert runs.fingerprint(name) == runs.fingerprint(other)
    assert runs.history(name).exact
    assert runs.history(name).keys == runs.history(other).keys


def adds_up(runs: Runs, name: str) -> None:
    """Every second from the first launch to the last event has a cause."""
    events = runs.lines(name, "events")
    ledger = events[-1]["ledger"]
    wall = events[-1]["time"] - events[0]["time"]
    assert sum(ledger["seconds"].values()) + ledger["uncommitted"] == pytest.approx(wall, rel=0.01)


@pytest.mark.parametrize("zero", [1, *(pytest.param(zero, marks=pytest.mark.nightly) for zero in (2, 3))])
def test_killed_then_stopped_a_run_ends_bit_identical(runs: Runs, zero: int) -> None:
    name = f"rough-zero{zero}"
    sets = (f"zero.stage={zero}", "checkpoint.every_steps=2")
    with runs.start(name, 2, *sets) as group:
        until(lambda: len(runs.lines(name)) > 4, group)
        os.kill(group.ranks[zero % 2].pid, signal.SIGKILL)
        statuses = group.wait()
    assert statuses[zero % 2] == -signal.SIGKILL
    assert statuses[1 - zero % 2] == 1, "the other rank ends by itself"
    reached = runs.lines(name)[-1]["step"]

    with runs.start(name, 2, *sets) as group:
        until(lambda: runs.lines(name)[-1]["attempt"] == 2, group)
        os.kill(group.ranks[zero % 2].pid, signal.SIGTERM)
        assert group.wait() == [75, 75], group.said
    events = runs.lines(name, "events")
    resumed = [event["from_step"] for event in events if event["event"] == "start"][1]
    told = max(event["step"] for event in events if event["event"] == "commit" and event["attempt"] == 1)
    assert resumed >= told, "the event comes a step after the commit"
    assert reached - resumed < 4, "no more is lost than since the last commit but one"
    assert events[-1]["event"] == "stopped" and events[-1]["step"] < LAST
    assert checkpoint.newest_step(runs.url(name)) == events[-1]["step"] == runs.lines(name)[-1]["step"] + 1

    runs.train(name, 2, *sets)
    same(runs, name, runs.whole(zero))
    assert runs.history(name).redone > 0
    assert runs.history(runs.whole(zero)).redone == 0
    adds_up(runs, name)
    seconds = runs.lines(name, "events")[-1]["ledger"]["seconds"]
    assert seconds["lost"] > 0 and seconds["idle"] > 0 and seconds["productive"] > 0


LONG = ((3, BORDER), *product((2, 3), (BORDER - 1, BORDER + 1)))
NIGHTLY = [pytest.param(*case, marks=pytest.mark.nightly) for case in LONG]


@pytest.mark.parametrize(("zero", "step"), [(1, BORDER - 1), (1, BORDER), (1, BORDER + 1), (2, BORDER), *NIGHTLY])
def test_a_run_that_dies_at_a_stage_border_ends_bit_identical(runs: Runs, zero: int, step: int) -> None:
    name = runs.cut(f"border-zero{zero}-{step}", runs.whole(zero), step)
    runs.train(name, 2, f"zero.stage={zero}")
    assert list(runs.losses(name, attempt=2)) == list(range(step, LAST))
    same(runs, name, runs.whole(zero))


@pytest.mark.parametrize("zero", [1, 3])
def test_two_processes_then_one_then_two(runs: Runs, zero: int) -> None:
    fixed, shrunk, grown = runs.losses(runs.whole(zero)), f"shrunk-zero{zero}", f"grown-zero{zero}"
    runs.cut(shrunk, runs.whole(zero), 3)
    with runs.start(shrunk, 1, f"zero.stage={zero}") as group:
        until(lambda: checkpoint.newest_step(runs.url(shrunk)) >= 6, group)
    runs.cut(grown, shrunk, 6)
    runs.train(grown, 2, f"zero.stage={zero}")
    worlds = {line["step"]: line["world"] for line in runs.lines(grown)}
    assert [worlds[step] for step in range(LAST)] == [2] * 3 + [1] * 3 + [2] * 4
    assert runs.history(grown).exact
    assert runs.history(grown).keys == runs.history(runs.whole(zero)).keys
    elastic = runs.losses(grown)
    assert [elastic[step][0] for step in range(3)] == [fixed[step][0] for step in range(3)]
    for step in range(LAST):
        assert elastic[step][0] == pytest.approx(fixed[step][0], rel=1e-4), f"step {step}"


def test_a_stage_starts_from_another_runs_weights(runs: Runs) -> None:
    source = f"{runs.url(runs.whole(1))}/checkpoints/step-{LAST:08d}"
    sets = (f"stages.frames-7.init_from={runs.url(runs.whole(1))}", "zero.stage=2")
    runs.train("from-run", 2, *sets)
    started = checkpoint.load_weights(source)
    after = Checkpoint(f"{runs.url('from-run')}/checkpoints/step-{BORDER + 1:08d}")
    weights = checkpoint.load_weights(after.url)
    average = checkpoint.load_weights(after.url, ema=True)
    for name, start in started.items():
        if name.startswith("first_frame."):
            assert torch.equal(weights[name], start), name
        else:
            torch.testing.assert_close(average[name], 0.9 * start + 0.1 * weights[name], rtol=1e-5, atol=1e-6)
    counts = {name: entry["step"] for name, entry in after.engines["model"]["parameters"].items()}
    assert {counts[name] for name in counts if not name.startswith("first_frame.")} == {1}, "a fresh optimizer"

    pinned = yaml.safe_load(Path(runs.url("from-run"), "manifest.yaml").read_text())["stages"]["frames-7"]["init_from"]
    assert pinned == source, "what the other run commits later changes nothing"
    for step in (BORDER, BORDER + 1):
        name = runs.cut(f"from-run-{step}", "from-run", step)
        text = Path(runs.url(name), "manifest.yaml").read_text()
        Path(runs.url(name), "manifest.yaml").write_text(text.replace("name: from-run\n", f"name: {name}\n"))
        runs.train(name, 2, *sets)
        same(runs, name, "from-run")


def test_torchrun_restarts_the_group(runs: Runs) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with subprocess.Popen(
        [*command, "--max-restarts", "1", "-m", "trainer", *runs.arguments("torchrun", "zero.stage=1")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as agent:  # fmt: skip
        deadline = time.monotonic() + 60
        while len(runs.lines("torchrun")) < 5:
            assert agent.poll() is None and time.monotonic() < deadline
            try:
                agent.wait(0.005)
            except subprocess.TimeoutExpired:
                continue
        start = next(event for event in runs.lines("torchrun", "events") if event["event"] == "start")
        os.kill(start["workers"][1]["pid"], signal.SIGKILL)
        said = agent.communicate(timeout=240)[0]
    assert agent.returncode == 0, said
    same(runs, "torchrun", runs.whole(1))
    assert {line["attempt"] for line in runs.lines("torchrun")} == {1, 2}
    adds_up(runs, "torchrun")


def test_a_run_that_is_done_returns_at_once(runs: Runs) -> None:
    name = runs.cut("done", runs.whole(1), LAST)
    runs.train(name, 1)
    assert runs.lines(name) == runs.lines(runs.whole(1)), "no step is trained again"
    assert [event["event"] for event in runs.lines(name, "events")][-2:] == ["launch", "done"]
    assert runs.fingerprint(name) == runs.fingerprint(runs.whole(1))
    adds_up(runs, name)


def test_a_run_that_is_done_and_whose_last_checkpoint_is_damaged_goes_back_and_says_so(runs: Runs) -> None:
    name = runs.cut("done-damaged", runs.whole(1), LAST)
    file = Path(runs.at(name, LAST), "rank-00001.a1.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    said = runs.train(name, 2)
    assert f"moviola: warning: {runs.at(name, LAST)} is damaged: rank-00001" in said
    assert "Going back to the checkpoint before it" in said
    assert [line["step"] for line in runs.lines(name) if line["attempt"] == 2] == [LAST - 1]
    same(runs, name, runs.whole(1))


def test_a_checkpoint_of_another_manifest_is_told(runs: Runs) -> None:
    name = runs.cut("edited", runs.whole(1), LAST - 1)
    assert "another manifest" not in runs.train(runs.cut("unedited", runs.whole(1), LAST - 1), 1)
    stored = Path(runs.url(name), "manifest.yaml")
    plain = yaml.safe_load(stored.read_text())
    plain["seed"] += 1
    stored.write_text(yaml.safe_dump(plain))
    said = runs.train(name, 1, f"seed={plain['seed']}", status=1)
    assert f"{runs.at(name, LAST - 1)} was written under another manifest (digest " in said


def test_a_name_that_is_taken_is_refused(runs: Runs) -> None:
    said = runs.train(runs.whole(1), 1, "batch=8", status=2)
    assert "was made by another manifest" in said and "batch: 4 -> 8" in said and "Traceback" not in said


def test_what_is_missing_is_named_before_training(runs: Runs) -> None:
    said = runs.train("no-data", 2, "data.train=/nowhere/shards", status=1)
    assert "dataset /nowhere/shards is not there" in said and "Traceback" not in said
    said = runs.train("no-weights", 1, f"stages.frames-5.init_from={runs.url('absent')}", status=2)
    assert "absent holds no committed checkpoint" in said and "Traceback" not in said
    assert not Path(runs.url("no-weights")).exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_provenance(runs: Runs) -> None:
    said = runs.train("diverged", 2, "optimizer.lr=1", "optimizer.weight_decay=1e30", status=1)
    step, stage, terms, clips = re.search(
        r"step (\d+), stage '([\w-]+)': the gradient norm is (?:nan|inf). Loss terms on this rank: (\{.*?\}).* "
        r"Clips: (.*?)\. The newest",
        said,
    ).groups()
    assert (step, stage) == ("1", "first-frame")
    assert "'mse': nan" in terms and "; not finite: mse" in said
    assert re.fullmatch(r"small/shard-\d{6}\.tar/\S+(, small/shard-\d{6}\.tar/\S+)*", clips)
    assert "Lower optimizer.lr" in said and "Traceback" not in said
    assert [line["step"] for line in runs.lines("diverged")] == [0], "a step that was not made is not logged"


@pytest.mark.parametrize("zero", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_evaluating_on_the_way_changes_no_bit(runs: Runs, small_dataset: Path, zero: int) -> None:
    name, held_back = f"evaluated-zero{zero}", runs.folder / f"held-back-{zero}"
    shutil.copytree(small_dataset, held_back)
    runs.train(name, 2, f"data.eval={held_back}", "evaluation={every_steps: 6, clips: 3}", f"zero.stage={zero}")
    same(runs, name, runs.whole(zero))
    events = runs.lines(name, "events")
    found = [event for event in events if event["event"] == "evaluation"]
    assert [event["step"] for event in found] == [6, LAST]
    assert all(event["clips"] == 3 and event["psnr_db"] > 5 for event in found)
    assert found[0]["psnr_db"] != found[1]["psnr_db"] and found[0]["baselines"] == found[1]["baselines"]
    assert events[-1]["ledger"]["seconds"]["evaluation"] > 0
    adds_up(runs, name)
    url = runs.url(name)
    assert json.loads(Path(url, "evaluation.json").read_text())["psnr_db"] == found[1]["psnr_db"]
    report = examine.evaluate_checkpoint(url, str(held_back), count=3, run_url=url, entropies=True)
    again = report.values
    assert again["psnr_db"] == found[1]["psnr_db"], "the averaged weights, shared out over two ranks, by one process"
    kept = json.loads(Path(url, "evaluation.json").read_text())["entropy"]
    assert kept == again["entropy"] and 0 < kept["kinds"]["frames"]["bits"] < 8
    assert [table.row_count for table in report.entropies.tables()] == [len(kept["kinds"]), 4]
    facts, tiles = pictures.read_sheet(Path(url, "samples/frames-00.png").read_bytes())
    assert facts["views"][:2] == ["original", "reconstruction"] and facts["views"][-1] == "error"
    assert tiles.size == (facts["columns"] * 32, len(facts["views"]) * 32)


@pytest.mark.nightly
def test_an_evaluation_gives_way_to_a_stop_and_the_last_one_is_made_up_for(runs: Runs, small_dataset: Path) -> None:
    name, held_back = "interrupted", runs.folder / "held-back-too"
    shutil.copytree(small_dataset, held_back)
    slow = "evaluation={every_steps: 6, clips: 12, lpips: {backbone: vgg, weights: random}}"
    sets = (f"data.eval={held_back}", slow, "zero.stage=3", "checkpoint.every_steps=4")
    with runs.start(name, 2, *sets) as group:
        until(lambda: len(runs.lines(name)) == 6, group, 240)
        os.kill(group.ranks[1].pid, signal.SIGTERM)
        assert group.wait() == [75, 75], group.said
    events = runs.lines(name, "events")
    assert events[-1]["event"] == "stopped" and events[-1]["step"] in (6, 7)
    assert 6 in [event["step"] for event in events if event["event"] == "commit"], "what is evaluated is committed"

    with runs.start(name, 2, *sets) as group:
        until(lambda: checkpoint.newest_step(runs.url(name)) == LAST, group, 240)
        for process in group.ranks:
            process.kill()
        group.wait()
    assert not [event for event in runs.lines(name, "events") if event["event"] == "evaluation"]

    trained = runs.lines(name)
    runs.train(name, 2, *sets)
    assert runs.lines(name) == trained, "no step is trained again"
    events = runs.lines(name, "events")
    assert [event["step"] for event in events if event["event"] == "evaluation"] == [LAST]
    assert events[-1]["event"] == "done" and Path(runs.url(name), "evaluation.json").exists()
    same(runs, name, runs.whole(3))
    adds_up(runs, name)
    runs.train(name, 2, *sets)
    assert [event["event"] for event in runs.lines(name, "events")[len(events) :]] == ["launch", "done"]
