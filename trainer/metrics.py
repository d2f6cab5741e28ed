"""The Prometheus metrics of a run, under ``moviola_``, in base units.

``RunMetrics``   the run, label ``run``: made of the lines of metrics.jsonl and events.jsonl, and of nothing else. A
                 counter never shows more than is on storage, so none falls, whatever is killed.
``RankMetrics``  how one rank fares, labels ``run`` and ``rank``: gauges, which start afresh with the process.

Both are collected when they are scraped, in the server's thread: training only leaves its last figures behind.
"""

from __future__ import annotations

import math
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from pipelines.faults import FaultBudget
from trainer.manifest import RunManifest
from trainer.stage import Schedule

STEP_SECONDS = tuple(0.01 * 2**i for i in range(16))
"""Upper bounds of the histogram of step times: 10 ms to 328 s."""
SKIP_REASONS = ("short", "undecodable", "absurd", "digest", "caption", "other")
STATES = ("new", "running", "stopped", "done", "failed")
SUMS = {
    "clips": "Clips trained on.",
    "frames": "Frames trained on.",
    "read_bytes": "Bytes fetched from storage by the loaders of all ranks.",
    "storage_retries": "Storage requests of all ranks that were tried again.",
    "data_wait_seconds": "Seconds that ranks waited for data, summed over ranks.",
    "flops": "Floating-point operations of matrix products, convolutions and attention, over all ranks.",
    **{f"skipped/{reason}": "Clips skipped, by reason." for reason in SKIP_REASONS},
}
"""What every rank counts; the run's counter is the sum over ranks and attempts."""
STATISTICS = {
    "logits_real": ("adversary_logit", "Mean logit of the adversary.", {"side": "real"}),
    "logits_fake": ("adversary_logit", "Mean logit of the adversary.", {"side": "fake"}),
    "adversary_weight": ("adversary_weight", "Weight of the adversarial term, as adapted.", {}),
    "kl": ("latent_kl", "Kullback-Leibler divergence of the latent from its prior.", {}),
    "length": ("latent_length", "Latent tokens of a clip in use.", {}),
}
"""Statistics and terms with a metric of their own; the others are told apart by a label."""
EVALUATED = ("psnr_db", "ssim", "lpips")


PACE_LINES = 100
"""Logged steps that the time left is estimated from."""


def seconds_left(schedule: Schedule, lines: Sequence[Mapping[str, Any]]) -> float:
    """Time to the last step at the pace of the newest ``lines`` of metrics.jsonl, oldest first, at least one.

    Evaluations and checkpoints count. The pace is this attempt's, and this stage's once there are three lines of it.
    """
    last, done = lines[-1], lines[-1]["step"] + 1
    recent = [line for line in lines if line["attempt"] == last["attempt"]][-PACE_LINES:]
    within = [line for line in recent if line["stage"] == last["stage"]]
    first = (within if len(within) > 2 else recent)[0]
    work = schedule.work(done) - schedule.work(first["step"] + 1)
    pace = (last["time"] - first["time"]) / work if work > 0 else last["seconds_per_pixel"]
    return (schedule.work(schedule.steps) - schedule.work(done)) * pace


class Histogram:
    """Counts of step times by upper bound, as plain data that a line can carry."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        counts = list(state["counts"]) if state else []
        self.counts = counts if len(counts) == len(STEP_SECONDS) + 1 else [0] * (len(STEP_SECONDS) + 1)
        self.sum = float(state["sum"]) if state else 0.0

    def add(self, seconds: float) -> None:
        """One observation."""
        self.counts[bisect_left(STEP_SECONDS, seconds)] += 1
        self.sum += seconds

    def state(self) -> dict[str, Any]:
        """What the constructor takes."""
        return {"counts": list(self.counts), "sum": self.sum}


class Counts:
    """A rank's counts of this attempt, and, on rank 0, what the attempts before it have left."""

    def __init__(self, before: Mapping[str, Any] | None = None) -> None:
        before = before or {}
        self._before = {name: float(before.get(name, 0.0)) for name in (*SUMS, "rank_seconds", "held_seconds")}
        self.steps = int(before.get("steps", 0))
        self.step_seconds = Histogram(before.get("step_seconds"))
        self.own = dict.fromkeys(SUMS, 0.0)

    def loader(self, state: Any) -> None:
        """Takes over what the rank's loader counts."""
        self.own["read_bytes"] = float(state.bytes_fetched)
        self.own["storage_retries"] = float(state.retries)
        self.own["data_wait_seconds"] = state.wait_seconds
        skips = dict.fromkeys(SKIP_REASONS, 0)
        for reason, count in state.skips.items():
            skips[reason if reason in skips else "other"] += count
        self.own.update({f"skipped/{reason}": float(count) for reason, count in skips.items()})

    def total(self, summed: Mapping[str, float], world: int, ledger: Mapping[str, Any]) -> dict[str, Any]:
        """The run's counters, given the sums of :attr:`own` over ranks and the ledger's state.

        Ranks are held from start to end, through start-ups and restarts: all the time that the run was not idle.
        """
        held = math.fsum(ledger["seconds"].values()) + ledger["uncommitted"] - ledger["seconds"]["idle"]
        before = self._before
        return {
            "steps": self.steps,
            "held_seconds": held,
            "rank_seconds": before["rank_seconds"] + world * (held - before["held_seconds"]),
            "step_seconds": self.step_seconds.state(),
            **{name: before[name] + value for name, value in summed.items()},
        }


class _Families:
    """Metrics being put together; every sample carries the labels that all share."""

    def __init__(self, **labels: str) -> None:
        self._labels = labels
        self._made: dict[str, Metric] = {}

    def gauge(self, name: str, text: str, value: Any, **labels: str) -> None:
        """One sample; None and what is not a number are left out."""
        self._add(GaugeMetricFamily, name, text, value, labels)

    def counter(self, name: str, text: str, value: Any, **labels: str) -> None:
        """One sample; the name without ``_total``."""
        self._add(CounterMetricFamily, name, text, value, labels)

    def _add(self, kind: Any, name: str, text: str, value: Any, labels: Mapping[str, str]) -> None:
        if value is None:
            return
        labels = self._labels | labels
        family = self._made.setdefault(name, kind(f"moviola_{name}", text, labels=list(labels)))
        family.add_metric(list(labels.values()), float(value))  # type: ignore[attr-defined]

    def add(self, family: Metric) -> None:
        """A family that is made elsewhere."""
        self._made[family.name] = family

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._made.values())


class RunMetrics(Collector):
    """The run as its storage has it. ``take`` is given the lines, oldest first, each once; threads may differ."""

    def __init__(self, manifest: RunManifest, address: str = "") -> None:
        """``address`` is where the run answers, a label of ``moviola_run_info`` that dashboards link to."""
        self._manifest, self._address = manifest, address
        self._lock = threading.Lock()
        self._lines: deque[Mapping[str, Any]] = deque(maxlen=PACE_LINES)
        self._ledger: Mapping[str, Any] | None = None
        self._age = (0, 0.0)
        self._evaluation: Mapping[str, Any] | None = None
        self._commit: Mapping[str, Any] | None = None
        self._commits = 0
        self._start: Mapping[str, Any] | None = None
        self._workers: list[dict[str, Any]] = []
        self._launched: float | None = None
        self._state = "new"
        self._diverged = False
        self._restarts: dict[str, int] = {"killed": 0, "preempted": 0, "hung": 0, "error": 0}

    def take(self, events: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]]) -> None:
        """Adds what has come to events.jsonl and metrics.jsonl."""
        with self._lock:
            for event in events:
                kind = event["event"]
                if kind == "launch":
                    self._launched = event["time"]
                if kind in ("launch", "start"):
                    self._state, self._diverged = "running", False
                self._diverged = self._diverged or kind == "diverged"
                if kind in STATES:
                    self._state = kind
                if kind == "restart":
                    self._restarts[event["cause"]] = self._restarts.get(event["cause"], 0) + 1
                self._start = event if kind == "start" else self._start
                if kind in ("start", "restart", "resize"):
                    self._workers = list(event.get("workers", ()))
                self._commit = event if kind == "commit" else self._commit
                self._commits += kind == "commit"
                self._evaluation = event if kind == "evaluation" else self._evaluation
                self._newest(event)
            for line in lines:
                if not self._lines or line["attempt"] >= self._lines[-1]["attempt"]:
                    self._lines.append(line)
                self._newest(line)

    def _newest(self, said: Mapping[str, Any]) -> None:
        """What an attempt says that was replaced, but lives, is left out."""
        if "ledger" in said and (age := (said["attempt"], said["ledger"]["time"])) >= self._age:
            self._ledger, self._age = said["ledger"], age

    @property
    def workers(self) -> list[dict[str, Any]]:
        """The ranks that train, as the newest start event has them; none once they have ended or are taken down."""
        with self._lock:
            return list(self._workers) if self._state == "running" else []

    def collect(self) -> Iterator[Metric]:
        """Prometheus's hook."""
        run = self._manifest
        made = _Families(run=run.name)
        with self._lock:
            lines, ledger, evaluation, commit, start = (
                [*self._lines], self._ledger, self._evaluation, self._commit, self._start,
            )  # fmt: skip
            state, diverged, restarts = self._state, self._diverged, dict(self._restarts)
        info = InfoMetricFamily("moviola_run", "What runs.", labels=["run"])
        info.add_metric([run.name], {"recipe": run.recipe, "digest": run.digest(), "address": self._address})
        made.add(info)
        for name in STATES:
            made.gauge("run_state", "1 for the state that the run is in.", name == state, state=name)
        made.gauge("diverged", "1 where a loss or gradient was not finite; the run ended with it.", diverged)
        for cause, count in restarts.items():
            made.counter("restarts", "Restarts of the worker group, by cause.", count, cause=cause)
        made.counter("commits", "Checkpoints committed.", self._commits)
        text = "When the command was given that runs it."
        made.gauge("launch_timestamp_seconds", text, self._launched)
        made.gauge("planned_steps", "Optimizer steps that the manifest asks for.", run.schedule.steps)
        if start is not None:
            made.gauge("attempt", "Number of this attempt; 1 is the first.", start["attempt"])
            made.gauge("workers", "Ranks of this attempt.", start["world"])
        if ledger is not None:
            for cause, seconds in ledger["seconds"].items():
                made.counter("goodput_seconds", "Seconds of the run, by cause.", seconds, cause=cause)
            text = "Seconds of training that no checkpoint holds yet."
            made.gauge("uncommitted_seconds", text, ledger["uncommitted"])
        if commit is not None:
            made.gauge("last_commit_step", "Step of the newest committed checkpoint.", commit["step"])
            made.gauge("last_commit_timestamp_seconds", "When it was committed.", commit["time"])
            made.gauge("last_commit_bytes", "Its size.", commit.get("bytes"))
            for phase, seconds in commit.get("seconds", {}).items():
                made.gauge("checkpoint_phase_seconds", "What the newest checkpoint took.", seconds, phase=phase)
        if evaluation is not None:
            _evaluated(made, evaluation)
        if lines:
            self._logged(made, lines)
        yield from made

    def _logged(self, made: _Families, lines: Sequence[Mapping[str, Any]]) -> None:
        schedule, line = self._manifest.schedule, lines[-1]
        done = line["step"] + 1
        made.gauge("step", "Optimizer steps that the weights have had.", done)
        made.gauge("last_log_timestamp_seconds", "When a step was last logged.", line["time"])
        for stage in schedule.stages:
            text = "1 for the stage that is being trained."
            made.gauge("stage", text, stage.name == line["stage"], stage=stage.name)
        made.gauge("remaining_seconds", "Time left at the pace of late.", seconds_left(schedule, lines))
        made.gauge("clips_per_second", "Clips of the whole run trained on a second.", line["clips_per_second"])
        made.gauge("learning_rate", "Learning rate of the last step.", line["lr"])
        made.gauge("gradient_norm", "Global gradient norm before clipping.", line["grad_norm"])
        for dataset, passes in line.get("epochs", {}).items():
            made.gauge("epoch", "Passes over a dataset so far.", passes, dataset=dataset)
        made.gauge("loss", "The loss and its terms, unweighted.", line["loss"], term="loss")
        for term, value in line["terms"].items():
            made.gauge("loss", "The loss and its terms, unweighted.", value, term=term)
        for name, value in {**line["terms"], **line["statistics"]}.items():
            if name in STATISTICS:
                metric, text, labels = STATISTICS[name]
                made.gauge(metric, text, value, **labels)
            elif name in line["statistics"]:
                made.gauge("statistic", "What else the recipe says of a step.", value, statistic=name)
        counters = line.get("counters")
        if counters is None:
            return
        made.counter("steps", "Optimizer steps, those that were lost and trained again included.", counters["steps"])
        text = "Seconds that ranks were held, trained or not; times a price, the run's cost."
        made.counter("rank_seconds", text, counters["rank_seconds"])
        for name, text in SUMS.items():
            metric, _, reason = name.partition("/")
            labels = {"reason": reason} if reason else {}
            made.counter("skipped_clips" if reason else metric, text, counters.get(name, 0.0), **labels)
        times = counters["step_seconds"]
        total, buckets = 0, []
        for bound, count in zip((*map(str, STEP_SECONDS), "+Inf"), times["counts"], strict=True):
            total += count
            buckets.append((bound, total))
        steps = HistogramMetricFamily(
            "moviola_step_seconds", "Time of an optimizer step, data wait not included.", labels=["run"]
        )
        steps.add_metric([self._manifest.name], buckets, times["sum"])
        made.add(steps)


def _evaluated(made: _Families, evaluation: Mapping[str, Any]) -> None:
    made.gauge("evaluation_step", "Steps of the weights that were evaluated last.", evaluation["step"])
    texts = {
        "psnr_db": "Peak signal to noise ratio on the evaluation's clips, in dB.",
        "ssim": "Structural similarity on the evaluation's clips.",
        "lpips": "LPIPS on the evaluation's clips; compare only with the same backbone.",
    }
    for method, values in {"model": evaluation, **evaluation["baselines"]}.items():
        for name in EVALUATED:
            backbone = {"backbone": evaluation["lpips_backbone"]} if name == "lpips" else {}
            made.gauge(f"evaluation_{name}", texts[name], values[name], method=method, **backbone)


class RankMetrics(Collector):
    """One rank, as it is now. Training sets ``step``, ``waited`` and ``loader``; memory is read at the scrape."""

    def __init__(self, run: str, rank: int, budget: FaultBudget | None = None) -> None:
        self._labels = {"run": run, "rank": str(rank)}
        self.budget = budget
        self.step = 0
        self.waited: float | None = None
        self.computed: float | None = None
        self.loader: Any = None

    def collect(self) -> Iterator[Metric]:
        """Prometheus's hook."""
        made = _Families(**self._labels)
        made.gauge("rank_step", "Optimizer steps that this rank's weights have had.", self.step)
        text = "Seconds a step that this rank waited for data, lately."
        made.gauge("rank_data_wait_seconds", text, self.waited)
        made.gauge(
            "rank_step_seconds", "Seconds a step that this rank computed or waited for peers, lately.", self.computed
        )
        if self.loader is not None:
            made.gauge("read_ahead_clips", "Clips read or being read ahead of training.", self.loader.read_ahead_clips)
            made.gauge("read_ahead_bytes", "Memory that the read-ahead holds.", self.loader.read_ahead_bytes)
            made.gauge("read_ahead_requests", "Requests for clips under way.", self.loader.read_ahead_requests)
        if self.budget is not None:
            made.gauge("skip_budget_ratio", "Skipped clips over those that end the run.", self.budget.spent())
        for kind, size in memory().items():
            made.gauge("memory_bytes", "Memory of the process and its accelerator.", size, kind=kind)
        yield from made


def memory() -> dict[str, float]:
    """Bytes by kind: what the process holds, and, with an accelerator in use, what torch holds of its memory."""
    found = {}
    try:
        with open("/proc/self/statm") as file:
            found["resident"] = float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux
        pass
    if torch.cuda.is_initialized():
        found["accelerator_allocated"] = float(torch.cuda.memory_allocated())
        found["accelerator_reserved"] = float(torch.cuda.memory_reserved())
        found["accelerator_peak"] = float(torch.cuda.max_memory_allocated())
    return found
