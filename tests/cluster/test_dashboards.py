"""Dashboards are what their code builds, pass Grafana's schema, and ask, as alerts do, for metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml

from cluster.dashboards import __main__ as dashboards
from pipelines.faults import FaultBudget
from pipelines.loader import LoaderMetrics
from trainer import manifest
from trainer.metrics import STATISTICS, Counts, RankMetrics, RunMetrics
from trainer.telemetry import CAUSES

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "../shared/grafana-schema/dashboard.jsonschema.json"
ALERTS = ROOT / "cluster/alerts/moviola.yaml"
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels(page):
    return json.loads((dashboards.FOLDER / f"{page}.json").read_text())["panels"]


@pytest.mark.parametrize("page", dashboards.PAGES)
def test_the_written_file_is_the_codes(page):
    assert (dashboards.FOLDER / f"{page}.json").read_text() == dashboards.render(page), "python -m cluster.dashboards"


@pytest.mark.parametrize("page", dashboards.PAGES)
def test_it_passes_grafanas_schema(page):
    if not SCHEMA.exists():
        pytest.skip(f"no {SCHEMA}")
    from jsonschema import Draft7Validator

    schema = json.loads(SCHEMA.read_text())
    # What Grafana types as `any`, a matcher's option and an override's value, the schema has as an object.
    for definition, field in (("MatcherConfig", "options"), ("DynamicConfigValue", "value")):
        schema["definitions"][definition]["properties"][field] = {}
    written = json.loads((dashboards.FOLDER / f"{page}.json").read_text())
    assert [error.message for error in Draft7Validator(schema).iter_errors(written)] == []


@pytest.mark.parametrize("page", dashboards.PAGES)
def test_every_panel_has_a_unit_a_title_of_its_own_and_room(page):
    drawn = [panel for panel in panels(page) if panel["type"] != "row"]
    assert len({panel["title"] for panel in drawn}) == len(drawn) == len({panel["id"] for panel in drawn})
    taken = set()
    for panel in drawn:
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, f"{panel['title']} overlaps"
        taken |= cells


def test_a_name_that_is_shown_is_the_last_one_and_a_mark_says_what_it_marks():
    named = [panel for panel in panels("run") if panel.get("options", {}).get("textMode") == "name"]
    assert [panel["title"] for panel in named] == ["State", "Stage"]
    for (target,) in (panel["targets"] for panel in named):
        assert target["instant"] and not target["range"] and target["expr"].startswith("last_over_time(")
    for page in ("run", "data"):
        notes = json.loads((dashboards.FOLDER / f"{page}.json").read_text())["annotations"]["list"]
        assert [note["titleFormat"] for note in notes] == ["restart: {{cause}}", "stage {{stage}}"]


def test_runs_that_are_over_stay_in_the_fleet():
    told = [panel for panel in panels("fleet") if panel["type"] in ("stat", "table") and panel["title"] != "Workers"]
    for expression in (target["expr"] for panel in told for target in panel["targets"]):
        assert "[$__range]" in expression, expression


@pytest.fixture(scope="module")
def exported(small_dataset):
    """Names of every sample that a run of any recipe can show."""
    plain = {"name": "r", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    ledger = {"time": 1.0, "seconds": dict.fromkeys(CAUSES, 1.0), "uncommitted": 0.0}
    quality = {"psnr_db": 1.0, "ssim": 1.0, "lpips": 1.0}
    events = [
        {"event": "launch", "attempt": 0, "time": 0.0},
        {"event": "start", "attempt": 1, "world": 1, "workers": [], "time": 0.0},
        {"event": "commit", "step": 1, "time": 1.0, "bytes": 1, "seconds": {"write": 1.0}},
        {"event": "evaluation", "step": 1, **quality, "lpips_backbone": "x", "baselines": {"bicubic": quality}},
    ]
    line = {
        "step": 0,
        "attempt": 1,
        "stage": "frames-3",
        "time": 1.0,
        "loss": 1.0,
        "terms": {},
        "lr": 1.0,
        "grad_norm": 1.0,
    }
    line |= {"statistics": dict.fromkeys([*STATISTICS, "other"], 1.0), "clips_per_second": 1.0, "ledger": ledger}
    line |= {"seconds_per_pixel": 1.0, "epochs": {"d": 1.0}, "counters": Counts().total({}, 1, ledger)}
    of_run = RunMetrics(manifest.validate(plain, "m"))
    of_run.take(events, [line])
    of_rank = RankMetrics("r", 0, FaultBudget())
    of_rank.loader, of_rank.waited, of_rank.computed = LoaderMetrics(), 1.0, 1.0
    return {sample.name for metrics in (of_run, of_rank) for family in metrics.collect() for sample in family.samples}


def test_dashboards_and_alerts_ask_for_metrics_that_there_are_and_leave_none_out(exported):
    text = [(dashboards.FOLDER / f"{page}.json").read_text() for page in dashboards.PAGES]
    asked = {name for each in (*text, ALERTS.read_text()) for name in re.findall(r"\bmoviola_\w+", each)}
    assert asked - exported == set()
    shown = {name.removesuffix("_bucket") for name in asked}
    left_out = {name for name in exported if re.sub("_(bucket|count|sum)$", "", name) not in shown}
    assert left_out == {
        "moviola_attempt", "moviola_steps_total", "moviola_commits_total", "moviola_last_commit_step",
        "moviola_evaluation_step",
    }  # fmt: skip


def test_every_alert_says_where_to_read_on():
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs/failures.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["annotations"]["runbook"] == f"docs/failures.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical") and "{{" in rule["annotations"]["summary"]
