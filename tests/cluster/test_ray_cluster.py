"""Submitted over HTTP to a Ray cluster of several nodes on this machine, from a manifest to the last step."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.lab import Lab, smoke
from tests.chaos.nodes import ROOT, Command, Nodes

pytestmark = pytest.mark.ray


def moviola(*arguments: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of the command."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.mark.timeout(900)
def test_a_manifest_is_handed_over_and_followed_to_its_end(small_dataset: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path, smoke(str(small_dataset), steps=1, workers={"count": 1}))
    with Nodes(1, dashboard=True) as nodes:
        status, out, err = moviola("submit", *lab.arguments("small"), "--cluster", nodes.dashboard, "-f")
    assert status == 0, err
    name, *told = out.splitlines()
    assert name == "small" and "job small-" in err
    said = [line.split("  ", 1)[1] for line in told]
    assert said[0].startswith(f"given to {nodes.dashboard} as job small-")
    assert said[-1] == f"done at step {lab.steps}" and any("loss" in line for line in said)
    assert lab.history("small").exact


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_run_outlives_the_terminal_that_it_was_submitted_from(small_dataset: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path, smoke(str(small_dataset), steps=5, workers={"count": 1}))
    command = [sys.executable, "-m", "cluster.cli", "submit", *lab.arguments("small"), "--cluster", "local"]
    terminal = subprocess.Popen(
        ["bash", "-c", f"{shlex.join(command)}; exec sleep 600"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert terminal.stdout is not None and terminal.stdout.readline() == "small\n"
    os.killpg(terminal.pid, signal.SIGHUP)
    assert terminal.wait(20) == -signal.SIGHUP
    status, out, err = moviola("logs", "small", "-f", "--runs", lab.runs)
    assert status == 0 and out.splitlines()[-1].endswith(f"done at step {lab.steps}"), out + err
    assert lab.history("small").exact
    log, deadline = tmp_path / "runs/small/driver.log", time.monotonic() + 60
    while "run small: done" not in log.read_text():  # said once its Ray is gone too
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_node_is_lost_and_a_run_is_stopped_and_moved(small_dataset: Path, tmp_path: Path) -> None:
    steps = 120
    plain = smoke(str(small_dataset), steps=steps // 4, checkpoint={"every_steps": 10, "keep": 3})
    plain["workers"] = {"count": [1, 2], "resize_seconds": 60}
    lab = Lab(tmp_path, plain)
    folder = ["--runs", lab.runs]

    def status(name: str) -> Any:
        code, out, err = moviola("status", name, *folder, "--json")
        assert code == 0, err
        return json.loads(out)

    with Nodes(2, dashboard=True) as nodes:
        there = ["--cluster", nodes.dashboard]
        code, out, err = moviola("submit", *lab.arguments("lossy"), *there)
        assert (code, out) == (0, "lossy\n"), err
        code, _, err = moviola("submit", *lab.arguments("lossy"), *there)
        assert code == 1 and "already" in err, "one run is not driven twice"
        with Command(["logs", "lossy", "-f", *folder], tmp_path / "lossy.log") as log:
            log.until(lambda: len(lab.lines("lossy")) > steps // 4, 600)
            (start,) = lab.events("lossy", "start")
            nodes.kill(nodes.holding(start["workers"][1]["pid"]))
            assert log.wait(600) == 0, log.said
        assert start["world"] == 2 and "restarting from the last commit" in log.said
        assert log.said.splitlines()[-1].endswith(f"done at step {steps}")
        state = status("lossy")
        assert (state["state"], state["cluster"], state["step"]) == ("done", nodes.dashboard, steps)
        assert state["restarts"] == 1 and state["last_commit_step"] == steps, state
        worlds = [event["world"] for event in lab.events("lossy", "start")]
        assert worlds == [2, 1], "it goes on with the machine that is left"
        assert lab.history("lossy").exact and lab.imbalance("lossy") < 0.01
        code, out, err = moviola("submit", *lab.arguments("lossy"), *there)
        assert code == 0 and "is done already" in err

        nodes.add()
        assert moviola("submit", *lab.arguments("moved"), *there)[0] == 0
        with Command(["logs", "moved", "-f", *folder], tmp_path / "moved.log") as log:
            log.until(lambda: len(lab.lines("moved")) > steps // 4, 600)
            code, _, err = moviola("stop", "moved", *folder)
            assert code == 0, err
            assert log.wait(600) == 75, log.said
        state = status("moved")
        assert state["state"] == "stopped" and 0 < state["last_commit_step"] == state["step"] < steps
        code, _, err = moviola("stop", "moved", *folder)
        assert code == 1 and "already stopped" in err
        code, _, err = moviola("submit", *lab.arguments("moved", "seed=7"), *there)
        assert code == 2 and "seed: 0 -> 7" in err, "another manifest is another run"
        code, _, err = moviola("resume", "moved", *folder, *there, "--set", "workers.count=1", "-f")
        assert code == 0, err
        assert [event["world"] for event in lab.events("moved", "start")] == [2, 1]
        assert lab.history("moved").exact and lab.history("moved").redone == 0
        listed = json.loads(moviola("list", *folder, "--json")[1])["runs"]
        assert {run["name"]: run["state"] for run in listed} == {"lossy": "done", "moved": "done"}
