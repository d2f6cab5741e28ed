"""The terminal page: bars that add up, sparklines that show what there is, a run from its storage alone."""

import io
import json
import re
import socket
import subprocess
import sys
import time

import pytest
from rich.console import Console

from cluster import cli, runs, watch
from pipelines import storage
from trainer import manifest as manifests
from trainer import run as folder
from trainer.telemetry import CAUSES


@pytest.fixture
def run_url(small_dataset, tmp_path):
    """A run that logged ten steps, lost a worker, was evaluated, and is done."""
    plain = {
        "name": "seen", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4, "model": {"down": 8},
        "clip": {"sizes": [[32, 32]]},
        "stages": {f"frames-{n}": {"steps": count} for n, count in ((3, 6), (5, 0), (7, 0))},
    }  # fmt: skip
    plain["stages"]["first-frame"] = {"steps": 4}
    _, url = folder.claim(manifests.validate(plain, "m"), str(tmp_path))
    now = time.time()

    def write(log, **record):
        storage.append_text(storage.join(url, f"{log}.jsonl"), json.dumps({"attempt": 1, **record}) + "\n")

    ledger = {"start": now - 20, "time": now, "seconds": dict.fromkeys(CAUSES, 0.0), "uncommitted": 0.0}
    ledger["seconds"] |= {"productive": 15.0, "recovery_load": 3.0, "recovery_detect": 2.0}
    write("events", event="start", time=now - 19, world=2, from_step=0, workers=[])
    for step in range(10):
        line = {"step": step, "loss": "nan" if step == 3 else 1.0 / (step + 1), "terms": {"mse": 0.1}, "statistics": {}}
        line |= {"grad_norm": 1.0, "lr": 1e-4, "clips_per_second": 8.0, "seconds_per_pixel": 1e-9, "time": now}
        write("metrics", stage="frames-3", ledger=ledger, **line)
    write("events", event="restart", time=now - 9, cause="killed", rank=1, message="</script><b>gone")
    quality = {"psnr_db": 21.5, "ssim": 0.5, "lpips": 0.1}
    evaluation = {**quality, "lpips_backbone": "alex (random weights)", "baselines": {"bicubic": quality}}
    write("events", event="evaluation", time=now, step=10, **evaluation)
    write("events", event="done", time=now, step=10, ledger=ledger)
    return url


def test_the_page_says_how_it_stands(run_url):
    console = Console(width=80, record=True, force_terminal=False)
    watch.watch(run_url, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("seen", "done", "restarts 1 (killed 1)", "10/10", "frames-3", "6/6", "goodput 75.0% of 0m20s",
                 "recovery 25%", "PSNR dB", "21.5", "worker 1 killed"):  # fmt: skip
        assert part in text, text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_narrow_terminal_loses_no_word(run_url, monkeypatch):
    monkeypatch.setattr("sys.stdout", Terminal())
    monkeypatch.setenv("COLUMNS", "44")
    monkeypatch.setenv("TERM", "xterm")
    cli.watch(run_url)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stdout.getvalue()).splitlines()
    assert max(map(len, lines)) <= 44
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    assert "restarts 1 (killed 1) committed none yet" in text and "█ recovery 25%" in text, text


def beginning(run_url, kind, **fields):
    """Appends an event of 50 seconds ago."""
    record = {"time": time.time() - 50, "event": kind, "attempt": 0, **fields}
    storage.append_text(storage.join(run_url, "events.jsonl"), json.dumps(record) + "\n")


def test_a_run_whose_process_lives_is_starting_however_long_that_takes(run_url, monkeypatch):
    monkeypatch.setattr(runs, "SILENT_SECONDS", -1.0)

    def head():
        return watch.Page(folder.load(run_url), run_url)._head().plain

    child = subprocess.Popen(["sleep", "60"])
    try:
        beginning(run_url, "launch", host=socket.gethostname(), pid=child.pid)
        assert head().startswith("running, starting for 0m50s")
        beginning(run_url, "start", from_step=0, world=2, workers=[])
        assert head().startswith("running  attempt 1")
        beginning(run_url, "restart", cause="killed", rank=1)
        assert head().startswith("running, restarting for 0m50s")
        beginning(run_url, "launch", host="elsewhere", pid=child.pid)
        assert head().startswith("silent")
        monkeypatch.setattr(runs, "CLOCK_SECONDS", -3600.0)
        beginning(run_url, "launch", host=socket.gethostname(), pid=child.pid)
        assert head().startswith("silent"), "a process of that number, begun after the launch, is another one"
    finally:
        child.kill()
        child.wait()


def test_a_run_that_fell_silent_says_since_when(run_url):
    gone = subprocess.Popen(["true"])
    gone.wait()
    beginning(run_url, "launch", host=socket.gethostname(), pid=gone.pid)
    console = Console(width=80, record=True)
    console.print(watch.Page(folder.load(run_url), run_url).render(80))
    text = console.export_text()
    assert "silent" in text and "last heard of 0m0" in text and "moviola resume seen goes on" in text


def test_portions_add_up_and_sparklines_keep_what_stands_out():
    assert watch.portions([1, 1, 1], 10) == [4, 3, 3]
    assert watch.portions([0, 0], 5) == [0, 0]
    assert sum(watch.portions([0.1, 3.3, 7.7], 61)) == 61
    assert watch.sparkline([0, 7, float("nan"), 3.5], 10) == "▁█ ▅"
    assert watch.sparkline([5, 5], 10) == "▁▁"
    assert len(watch.sparkline(list(range(1000)), 30)) == 30
    assert watch.sparkline([], 10) == ""
