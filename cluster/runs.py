"""Runs on storage: asking for a stop, and what is known of a run, whether its cluster lives or not."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from pipelines import storage
from trainer import checkpoint
from trainer.manifest import RunManifest
from trainer.metrics import seconds_left
from trainer.run import load
from trainer.telemetry import goodput, heard_last, newest_ledger, of_earlier_commands, read_lines

State = Literal["new", "waiting", "running", "stopped", "done", "failed", "silent"]
"""``waiting``: a cluster has it and has not begun; ``silent``: its process is gone, or, where that can't be seen from
here, it was not heard of for a while."""
SILENT_SECONDS = 120.0
CLOCK_SECONDS = 60.0
"""By how much a machine's clock may have been set since a process began."""
BEGINNINGS = ("launch", "driver", "start")
"""Events by which a run begins again: a command was given, its driver runs on a cluster, an attempt trains."""


def ask_to_stop(run_url: str, reason: str) -> None:
    """Asks a run to commit a checkpoint and end; it answers within seconds, wherever it runs."""
    storage.write_json(storage.join(run_url, "stop.json"), {"time": time.time(), "reason": reason})


def metrics(run_url: str, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Logged steps in order, each as the newest attempt left it."""
    return newest(read_lines(storage.join(run_url, "metrics.jsonl"), tail_bytes))


def newest(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of lines of metrics.jsonl that of the newest attempt for each step, in order of steps."""
    found = {line["step"]: line for line in sorted(lines, key=lambda line: line["attempt"])}
    return [found[step] for step in sorted(found)]


def events(run_url: str) -> list[dict[str, Any]]:
    """Everything that happened, oldest first."""
    return read_lines(storage.join(run_url, "events.jsonl"))


@dataclass(frozen=True)
class Status:
    """A run at a glance; ``last_commit_step`` is None before the first commit. Times in seconds."""

    name: str
    state: State
    cluster: str | None
    attempt: int
    stage: str | None
    step: int
    steps: int
    loss: float | None
    clips_per_second: float | None
    seconds_left: float | None
    last_commit_step: int | None
    restarts: int
    causes: Mapping[str, int]
    goodput: float | None
    ledger: Mapping[str, float]
    failure: str | None


def status(run_url: str, run: RunManifest | None = None) -> Status:
    """Read from storage alone, so that it answers when the cluster is gone. Raises InputError when there is no run.

    ``run`` is its manifest, for who has read it already.
    """
    run = run or load(run_url)
    assert run is not None
    happened = events(run_url)
    logged = metrics(run_url, tail_bytes=1 << 16)
    logged.sort(key=lambda line: (line["attempt"], line["time"]))  # not what an attempt lost, or one that was replaced
    last = logged[-1] if logged else None
    starts = [e for e in happened if e["event"] == "start"]
    ends = [e for e in happened if e["event"] in ("done", "stopped", "failed", *BEGINNINGS)]
    alive = heard_last(run_url, happened)
    ledger = newest_ledger((*happened, *logged[-1:], alive or {}))
    heard = max((e["time"] for e in (*happened, *logged[-1:], *([ledger] if ledger else []))), default=0.0)
    state: State = "new"
    if ends:
        state = "running" if ends[-1]["event"] in BEGINNINGS else ends[-1]["event"]
        if ends[-1]["event"] == "launch" and "cluster" in ends[-1]:
            state = "waiting"
        elif state == "running":
            living = lives(happened)
            if living is False or (living is None and time.time() - heard > SILENT_SECONDS):
                state = "silent"
    over = [{"event": "launch", "time": math.inf}] if state in ("stopped", "failed", "silent") else []
    accounted = of_earlier_commands(ledger, [*happened, *over])
    deaths = [e for e in happened if e["event"] == "restart"]
    causes: dict[str, int] = {}
    for death in deaths:
        causes[death["cause"]] = causes.get(death["cause"], 0) + 1
    trained = last["step"] + 1 if last else 0
    if alive and alive["ledger"] is ledger:  # newer than what was logged
        trained = alive["step"]
    step = ends[-1].get("step", 0) if state in ("done", "stopped") else trained
    schedule = run.schedule
    left = None
    if last and state == "running":
        left = seconds_left(schedule, logged)
    return Status(
        name=run.name,
        state=state,
        cluster=(launched(happened) or {}).get("cluster"),
        attempt=max((e["attempt"] for e in starts), default=0),
        stage=schedule.stage(min(step, schedule.steps - 1)).name,
        step=step,
        steps=schedule.steps,
        loss=last["loss"] if last else None,
        clips_per_second=last["clips_per_second"] if last else None,
        seconds_left=left,
        last_commit_step=checkpoint.newest_step(run_url),
        restarts=len(deaths),
        causes=causes,
        goodput=goodput(accounted) if accounted else None,
        ledger={**accounted["seconds"], "uncommitted": accounted["uncommitted"]} if accounted else {},
        failure=ends[-1].get("message") if state == "failed" else None,
    )


def story(happened: list[dict[str, Any]], logged: list[dict[str, Any]]) -> list[str]:
    """Events and logged steps as lines, oldest first, each with its local time."""
    lines = [(e["time"], told(e)) for e in happened]
    for line in logged:
        speed = f"{line['clips_per_second']:.1f} clips/s"
        lines.append(
            (line["time"], f"{line['stage']} step {line['step'] + 1}  loss {float(line['loss']):.4g}  {speed}")
        )
    return [f"{datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S}  {text}" for when, text in sorted(lines)]


def told(event: Mapping[str, Any]) -> str:
    """An event in words."""
    match event["event"]:
        case "launch" if "cluster" in event:
            return f"given to {event['cluster']} as job {event['job']}"
        case "launch":
            return f"launched by process {event['pid']} on {event['host']}"
        case "driver":
            return f"driven by process {event['pid']} on {event['host']}"
        case "start":
            step = event["from_step"]
            where = f"from the checkpoint of step {step}" if step else "from step 0"
            return f"attempt {event['attempt']}: {event['world']} workers, {where}"
        case "stage":
            return f"stage {event['stage']} begins at step {event['step']}"
        case "commit":
            return f"checkpoint of step {event['step']} committed"
        case "restart":
            who = "the controller" if event["rank"] is None else f"worker {event['rank']}"
            if event.get("starting"):
                return f"a worker {event['cause']} as it started; starting the group again"
            if event["cause"] == "hung":  # a worker that waited says for whom
                return f"{who}: {event['message'].rstrip('.')}; restarting from the last commit"
            return f"{who} {event['cause']}; restarting from the last commit"
        case "resize":
            return f"from {event['before']} to {event['after']} workers"
        case "serving":
            return f"metrics and a report at http://{event['address']}/targets, /report"
        case "evaluation":
            psnr = event["psnr_db"]
            return f"evaluated at step {event['step']}: {'not finite' if psnr is None else f'{psnr:.2f} dB PSNR'}"
        case "done" | "stopped":
            return f"{event['event']} at step {event['step']}"
        case kind:
            if "message" in event:
                return f"{kind}: {event['message']}"
            said = {k: v for k, v in event.items() if k not in ("time", "event", "attempt", "ledger")}
            return " ".join([kind, *(f"{key} {value}" for key, value in said.items())])


def clock(seconds: float) -> str:
    """Seconds as 1m05s or 2h03m."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def launched(happened: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The newest launch: by a process of ``host``, or as ``job`` of a ``cluster``."""
    return next((e for e in reversed(happened) if e["event"] == "launch"), None)


def gone(happened: list[dict[str, Any]]) -> bool:
    """Whether the process that drove the run last is known to be no more."""
    return lives(happened) is False


def lives(happened: list[dict[str, Any]]) -> bool | None:
    """Whether the process that drove the run last lives, and is not another of its number; None on other machines."""
    import psutil

    launch = [e for e in happened if e["event"] in ("launch", "driver")][-1:]
    if not launch or launch[0].get("host") != socket.gethostname():
        return None
    try:
        return psutil.Process(launch[0]["pid"]).create_time() < launch[0]["time"] + CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def names(runs: str) -> list[str]:
    """Names of the runs there, in order."""
    return sorted(
        e.name
        for e in storage.list_dir(runs)
        if e.is_dir and storage.exists(storage.join(runs, e.name, "manifest.yaml"))
    )
