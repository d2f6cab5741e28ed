"""A run as one HTML file to send to a colleague: it asks the network for nothing and runs no code but its own.

Curves by stage with restarts marked, where time went, quality beside baselines, reconstructions that play and can be
looked at frame by frame, the ladder of checkpoints, the manifest. Several runs stand beside each other.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster import runs
from pipelines import storage
from pipelines.faults import InputError
from trainer import checkpoint, pictures
from trainer.manifest import difference
from trainer.run import load
from trainer.telemetry import read_lines

PAGE = Path(__file__).with_name("report.html")
POINTS = 600
"""Most points of a curve; a longer one is thinned, its extremes kept."""
QUALITY = 90
"""Of the WebP that clips are sent as; the error is computed before."""


def render(run_urls: Sequence[str]) -> str:
    """The page; raises InputError where there is no such run."""
    data = {"written": time.time(), "runs": [facts(url) for url in run_urls]}
    first = load(run_urls[0])
    for url, each in zip(run_urls[1:], data["runs"][1:], strict=True):
        each["differences"] = list(difference(first.resolved(), load(url).resolved()))
    text = json.dumps(_plain(data), allow_nan=False).replace("<", "\\u003c")  # ends no script
    return PAGE.read_text().replace("/*DATA*/null", text)


def facts(run_url: str) -> dict[str, Any]:
    """All that the page shows of a run, as plain data; what a run has not, is empty."""
    status, manifest = runs.status(run_url), load(run_url)
    assert manifest is not None
    events, logged = runs.events(run_url), read_lines(storage.join(run_url, "metrics.jsonl"))
    lines = runs.newest(logged)
    schedule = manifest.schedule
    stages = [
        {"name": stage.name, "first": first, "steps": stage.steps}
        for stage, first in zip(schedule.stages, schedule.first_steps, strict=True)
    ]
    return {
        "name": status.name,
        "url": storage.redact(run_url),
        "recipe": manifest.recipe,
        "manifest": storage.redact(yaml.safe_dump(manifest.resolved(), sort_keys=False, width=100)),
        "status": {key: getattr(status, key) for key in (
            "state", "attempt", "stage", "step", "steps", "loss", "clips_per_second", "restarts", "goodput",
            "last_commit_step", "failure",
        )},
        "ledger": dict(status.ledger),
        "wall": sum(status.ledger.values()),
        "stages": stages,
        "restarts": [
            {"time": e["time"], "cause": e["cause"], "step": _step_at(logged, e["time"])}
            for e in events if e["event"] == "restart"
        ],
        "curves": curves(lines),
        "evaluations": [_evaluation(event) for event in events if event["event"] == "evaluation"],
        "quality": _quality(run_url),
        "clips": _clips(run_url),
        "commits": _commits(run_url, events),
        "events": [_event(event) for event in events if event["event"] not in ("commit", "serving")][-200:],
    }  # fmt: skip


def _step_at(lines: Sequence[dict[str, Any]], moment: float) -> int:
    """The step that was logged last before a moment; ``lines`` are all that were logged, oldest first."""
    return next((line["step"] for line in reversed(lines) if line["time"] <= moment), 0)


def curves(lines: Sequence[dict[str, Any]]) -> dict[str, list[list[float | None]]]:
    """Points (step, value) by name: the loss, its terms, the statistics, gradient norm, learning rate, speed."""
    found: dict[str, list[list[Any]]] = {}
    for line in lines:
        values = {"loss": line["loss"], **{f"loss: {k}": v for k, v in line["terms"].items()}, **line["statistics"]}
        values |= {"gradient norm": line["grad_norm"], "learning rate": line["lr"]}
        values["clips a second"] = line["clips_per_second"]
        for name, value in values.items():
            found.setdefault(name, []).append([line["step"], float(value)])
    return {name: thin(points) for name, points in found.items()}


def thin(points: list[list[float]], most: int = POINTS) -> list[list[float]]:
    """At most about ``most`` points: of each stretch the least and the greatest, in their order."""
    if len(points) <= most:
        return points
    kept = []
    stretch = -(-2 * len(points) // most)
    for first in range(0, len(points), stretch):
        part = points[first : first + stretch]
        ends = {min(range(len(part)), key=lambda i: part[i][1]), max(range(len(part)), key=lambda i: part[i][1])}
        kept += [part[i] for i in sorted(ends)]
    return kept


def _evaluation(event: dict[str, Any]) -> dict[str, Any]:
    return {key: event[key] for key in ("step", "psnr_db", "ssim", "lpips", "lpips_backbone", "baselines")}


def _quality(run_url: str) -> dict[str, Any] | None:
    """``evaluation.json`` without its lines by clip."""
    try:
        values = storage.read_json(storage.join(run_url, "evaluation.json"))
    except storage.Missing:
        return None
    kept = ("clips", "clip", "psnr_db", "ssim", "lpips", "flicker", "rfvd", "numbers_per_frame", "confidence")
    table = {"model": values, **values["baselines"]}
    methods = {name: {key: line[key] for key in kept if key in line} for name, line in table.items()}
    return {"lpips_backbone": values["lpips_backbone"], "methods": methods}


def _clips(run_url: str) -> list[dict[str, Any]]:
    """The sheets in ``samples/``, each with its tiles as a data URL."""
    found = []
    folder = storage.join(run_url, "samples")
    for entry in sorted(storage.list_dir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("frames-") and entry.name.endswith(".png"):
            told, tiles = pictures.read_sheet(storage.read_bytes(storage.join(folder, entry.name)))
            data = io.BytesIO()
            tiles.save(data, "WEBP", quality=QUALITY)
            found.append({**told, "image": "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()})
    return found


def _commits(run_url: str, events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every commit, oldest first; ``kept`` says which checkpoints are still there."""
    try:
        kept = {int(entry.name[5:]) for entry in storage.list_dir(storage.join(run_url, "checkpoints")) if entry.is_dir}
    except (InputError, ValueError):
        kept = set()
    newest = checkpoint.newest_step(run_url)
    return [
        {"step": e["step"], "time": e["time"], "attempt": e["attempt"], "bytes": e.get("bytes"),
         "seconds": sum(e.get("seconds", {}).values()), "kept": e["step"] in kept, "newest": e["step"] == newest}
        for e in events if e["event"] == "commit"
    ]  # fmt: skip


def _event(event: dict[str, Any]) -> dict[str, Any]:
    """Time, kind, and the rest in one line, without what only programs read."""
    hidden = ("time", "event", "attempt", "ledger", "workers", "launch", "baselines")
    rest = {key: value for key, value in event.items() if key not in hidden}
    text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return {"time": event["time"], "kind": event["event"], "text": storage.redact(text)[:300]}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
