"""Against a real Prometheus: a run of two workers through a SIGKILL, every panel's query and every alert's expression.

One run serves all: Prometheus finds it by its address alone, and scrapes each second.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cluster import runs

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
RULES = ROOT / "cluster/alerts/moviola.yaml"
STEPS = {"motion": 5, "static": 15, "dynamic": 100}
LOSSES = {"l1": 1, "lpips": 0, "kl": 1e-6, "dwt_low": 0.1, "dwt_high": 0.1}
RUN = {
    "name": "watched",
    "recipe": "decovae",
    "model": {
        "latent_channels": 2,
        "backbone": {"low": 4, "high": 6, "separate": 1, "fused": 1, "iterations": 1, "iteration_layers": 1},
        "motion": {"width": 4, "latent": 4},
        "perceptual": None,
    },
    "batch": 4,
    "precision": "fp32",
    "clip": {"frames": 5, "sizes": [[32, 32]]},
    "stages": {
        "motion": {"steps": STEPS["motion"]},
        "static": {"steps": STEPS["static"], "losses": LOSSES},
        "dynamic": {
            "steps": STEPS["dynamic"],
            "losses": LOSSES,
            "adversary": {"start": 1, "network": {"width": 4, "layers": 2}, "adaptive": 10.0},
        },
    },
    "workers": {"count": 2},
    "checkpoint": {"every_steps": 10},
    "evaluation": {"every_steps": 40, "clips": 2},
}
"""A recipe whose latent has a prior, and an adversary that plays: all that a run can say of itself is said."""

NOTHING = {"moviola_latent_length": "a latent whose length follows from the clip is One-DVA's alone"}
"""What a query may return nothing for, by a part of it."""


def test_alerts_fire_where_they_should(prometheus_programs: Path) -> None:
    tested = subprocess.run(
        [prometheus_programs / "promtool", "test", "rules", "alerts.yaml"],
        cwd=Path(__file__).parent, capture_output=True, text=True,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout + tested.stderr
    cases = yaml.safe_load((Path(__file__).parent / "alerts.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in cases for case in test["alert_rule_test"] if case.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}, "each alert is seen to fire"


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus(NamedTuple):
    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        with urllib.request.urlopen(
            f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=20
        ) as page:
            return json.load(page)["data"]

    def values(self, expression: str) -> list[dict[str, Any]]:
        """Series over all that was scraped; raises for an expression that Prometheus refuses."""
        now = time.time()
        answer = self.ask("query_range", query=expression, start=str(now - 900), end=str(now), step="1")
        return answer["result"]


@contextmanager
def prometheus(programs: Path, folder: Path, address: str) -> Iterator[Prometheus]:
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "moviola",
                "http_sd_configs": [{"url": f"http://{address}/targets", "refresh_interval": "1s"}],
            }
        ],
    }
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [programs / "prometheus", f"--config.file={file}", f"--storage.tsdb.path={folder}/tsdb",
             f"--web.listen-address={url}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield Prometheus(f"http://{url}")
    finally:
        process.terminate()
        process.wait(20)


class Watched(NamedTuple):
    """What is left of the run when it is over: Prometheus with all of it."""

    prometheus: Prometheus
    run_url: str
    restarts: int
    targets: list[str]


@pytest.fixture(scope="module")
def watched(
    prometheus_programs: Path, small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    held_back = folder / "eval"
    held_back.symlink_to(small_dataset)
    port = free_port()
    telemetry = {"log_every": 1, "port": port, "tensorboard": False}
    data = {"train": str(small_dataset), "eval": str(held_back)}
    (folder / "watched.yaml").write_text(json.dumps({**RUN, "data": data, "telemetry": telemetry}))
    run_url = str(folder / "runs/watched")

    def reached(attempt: int, step: int) -> bool:
        return any(line["attempt"] == attempt and line["step"] >= step for line in runs.metrics(run_url))

    with (folder / "err").open("w") as err, prometheus(prometheus_programs, folder, f"127.0.0.1:{port}") as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", f"{folder}/watched.yaml", "--runs", f"{folder}/runs"],
            cwd=ROOT, stdout=err, stderr=err, start_new_session=True,
        )  # fmt: skip

        def until(ready: Callable[[], bool]) -> None:
            deadline = time.monotonic() + 600
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, (folder / "err").read_text()
                time.sleep(0.2)

        try:
            until(lambda: Path(run_url, "manifest.yaml").exists() and reached(1, 25))
            until(lambda: [target["health"] for target in server.ask("targets")["activeTargets"]] == ["up"] * 3)
            found = server.ask("targets")["activeTargets"]
            (start,) = (event for event in runs.events(run_url) if event["event"] == "start")
            os.kill(start["workers"][1]["pid"], signal.SIGKILL)
            assert process.wait(900) == 0, (folder / "err").read_text()
            instances = [target["labels"]["instance"] for target in found]
            yield Watched(server, run_url, runs.status(run_url).restarts, sorted(instances))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.ray
@pytest.mark.nightly
def test_the_address_of_the_run_is_all_that_prometheus_is_told(watched: Watched) -> None:
    assert watched.targets == ["watched", "watched/rank-0", "watched/rank-1"]
    assert watched.restarts == 1
    for instance in watched.targets:
        (series,) = watched.prometheus.values(f'up{{instance="{instance}"}}')
        assert any(float(value) == 1 for _, value in series["values"])
    (ended,) = watched.prometheus.values('moviola_run_state{state="done"}')
    assert ended["values"][-1][1] == "1", "Prometheus has seen the end"
    (last,) = watched.prometheus.ask("query", query="last_over_time(moviola_run_state[15m]) == 1")["result"]
    assert last["metric"]["state"] == "done", "a run is in one state, and stays there when it is scraped no more"
    (restarts,) = watched.prometheus.values('moviola_restarts_total{cause="killed"}')
    assert {value for _, value in restarts["values"]} == {"0", "1"}


@pytest.mark.ray
@pytest.mark.nightly
def test_no_counter_ever_falls_or_starts_anew(watched: Watched) -> None:
    names = [name for name in watched.prometheus.ask("label/__name__/values") if name.startswith("moviola_")]
    counters = [name for name in names if name.endswith(("_total", "_bucket", "_count", "_sum"))]
    assert len(counters) >= 12
    attempts = watched.prometheus.values("moviola_attempt")
    assert len(attempts) == 1 and {value for _, value in attempts[0]["values"]} == {"1", "2"}
    for name in counters:
        for series in watched.prometheus.values(name):
            values = [float(value) for _, value in series["values"]]
            assert values == sorted(values), (name, series["metric"], values)
    (steps,) = watched.prometheus.values("moviola_steps_total")
    assert float(steps["values"][-1][1]) >= sum(STEPS.values()), "steps that were lost and trained again count again"
    causes = watched.prometheus.values("moviola_goodput_seconds_total")
    assert {series["metric"]["cause"] for series in causes} >= {"productive", "evaluation", "lost", "recovery_load"}


def expressions() -> list[tuple[str, str]]:
    """(where, query) of every panel and annotation."""
    found = []
    for file in sorted((ROOT / "cluster/dashboards").glob("*.json")):
        page = json.loads(file.read_text())
        for panel in page["panels"]:
            found += [(f"{file.stem}: {panel['title']}", target["expr"]) for target in panel.get("targets", ())]
        notes = page["annotations"].get("list", ())
        found += [(f"{file.stem}: {note['name']}", note["expr"]) for note in notes]
    return found


VARIABLES = {"$__rate_interval": "20s", "$__range": "15m", "$__interval": "5s", "$run": "watched", "$rank": ".*"}


@pytest.mark.ray
@pytest.mark.nightly
def test_every_panel_shows_something_or_has_a_reason_not_to(watched: Watched) -> None:
    asked = expressions()
    assert len(asked) > 50
    empty = []
    for where, expression in asked:
        for name, value in {**VARIABLES, "$price": "2"}.items():
            expression = expression.replace(name, value)
        assert "$" not in expression, where
        excused = any(part in expression for part in NOTHING)
        if not watched.prometheus.values(expression) and not excused:
            empty.append(f"{where}: {expression}")
    assert empty == []


@pytest.mark.ray
@pytest.mark.nightly
def test_every_alert_is_judged_and_a_run_that_is_well_fires_none(watched: Watched) -> None:
    groups = watched.prometheus.ask("rules")["groups"]
    judged = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert set(judged) == {rule["alert"] for rule in rules()}
    for name, rule in judged.items():
        assert rule["health"] == "ok" and rule["state"] != "firing", (name, rule)
    # An alert that has nothing to say returns nothing; what it looks at is there.
    for rule in rules():
        for metric in set(re.findall(r"\bmoviola_\w+", rule["expr"])):
            assert watched.prometheus.values(metric), f"{rule['alert']} asks for {metric}"
