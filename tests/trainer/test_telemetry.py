"""The goodput ledger adds up, survives deaths, and no counter falls."""

import json
import math
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from pipelines.contracts import Batch, BatchPlan, ClipRule, Source
from pipelines.faults import InputError
from pipelines.loader import LoaderMetrics
from trainer import loop, manifest
from trainer.metrics import Histogram, RunMetrics, seconds_left
from trainer.telemetry import (
    CAUSES,
    Appender,
    Ledger,
    Telemetry,
    goodput,
    heard_last,
    newest_ledger,
    of_earlier_commands,
    read_lines,
    surviving,
)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_every_second_has_one_cause_across_a_death_and_a_stop():
    clock = Clock()
    clock.now += 2  # the command starts Ray
    ledger = Ledger(launched=1000.0, clock=clock)
    clock.now += 3
    for step in range(10):
        ledger.enter("data_wait")
        clock.now += 1
        ledger.enter("productive")
        clock.now += 3
        ledger.trained(step)
    with ledger.span("checkpoint"):
        clock.now += 2
    ledger.commit(6)
    dead = ledger.state()
    assert dead["seconds"]["productive"] == 18
    assert dead["uncommitted"] == 12

    clock.now += 2  # nobody runs
    killed = clock.now
    clock.now += 5
    again = Ledger(dead, launched=1000.0, restarted=killed, clock=clock)
    clock.now += 4
    again.ready()
    clock.now += 6
    again.enter("productive")
    clock.now += 3
    again.trained(6)
    again.commit(7)
    state = again.state(stopped=True)
    assert state["seconds"]["lost"] == 12
    recovery = {cause: seconds for cause, seconds in state["seconds"].items() if cause.startswith("recovery")}
    assert recovery == {
        "recovery_detect": 2, "recovery_schedule": 5, "recovery_load": 4, "recovery_first_step": 6,
    }  # fmt: skip
    assert state["seconds"]["productive"] == 21
    for cause in CAUSES:
        assert state["seconds"][cause] >= dead["seconds"][cause]

    clock.now += 100
    launched = clock.now
    clock.now += 6
    later = Ledger(state, launched=launched, clock=clock).state()
    assert later["seconds"]["idle"] == 100
    assert later["seconds"]["startup"] == 5 + 6
    assert sum(later["seconds"].values()) + later["uncommitted"] == clock.now - 1000
    assert goodput(later) == 21 / (clock.now - 1000)


def test_steps_that_a_checkpoint_holds_are_not_lost_whoever_knew_of_the_commit():
    clock = Clock()
    ledger = Ledger(launched=clock.now, clock=clock)

    def steps(first, last):
        for step in range(first, last):
            ledger.enter("productive")
            clock.now += 3
            ledger.trained(step)

    steps(0, 4)
    saved = ledger.state()
    steps(4, 6)
    dead = ledger.state()
    assert (dead["seconds"]["productive"], dead["uncommitted"]) == (0, 18)
    seconds = Ledger(surviving(dead, saved, 4), clock=clock).state()["seconds"]
    assert (seconds["productive"], seconds["lost"]) == (12, 6)
    ledger.commit(5)
    known = ledger.state()
    assert surviving(known, saved, 4) == known, "of what was known to be committed, nothing counts twice"
    for logs in (None, {**dead, "time": saved["time"] - 1}):
        clock.now += 5
        state = Ledger(surviving(logs, saved, 4), launched=clock.now - 1, clock=clock).state()
        assert state["seconds"]["productive"] == 12 and state["seconds"]["lost"] == 0
        assert sum(state["seconds"].values()) == clock.now - state["start"], "the checkpoint's counters serve"


def test_a_step_that_is_trained_again_because_its_checkpoint_was_damaged_is_no_second_time_productive():
    clock = Clock()
    ledger = Ledger(launched=clock.now, clock=clock)

    def steps(ledger, first, last):
        for step in range(first, last):
            ledger.enter("productive")
            clock.now += 3
            ledger.trained(step)
        return ledger.state()

    saved = steps(ledger, 0, 4)
    steps(ledger, 4, 8)
    ledger.commit(8)
    dead = steps(ledger, 8, 9)
    again = Ledger(surviving(dead, saved, 4), clock=clock)
    steps(again, 4, 10)
    again.commit(10)
    seconds = again.state()["seconds"]
    assert (seconds["productive"], seconds["lost"]) == (30, 3 + 12), "steps 0 to 9 once; step 8, and 4 to 7 again"
    assert sum(seconds.values()) == clock.now - 1000


def test_a_state_in_the_middle_of_a_step_adds_up():
    clock = Clock()
    ledger = Ledger(launched=clock.now, clock=clock)
    clock.now += 2
    ledger.enter("productive")
    clock.now += 3
    ledger.trained(0)
    clock.now += 4
    state = ledger.state()
    assert sum(state["seconds"].values()) + state["uncommitted"] == state["time"] - state["start"] == 9


def test_what_died_before_its_first_step_is_accounted_for_too(tmp_path):
    def note(event, ago):
        line = {"time": time.time() - ago, "event": event, "attempt": 0}
        with (tmp_path / "events.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    note("launch", 100)
    ledger = loop._Past.read(str(tmp_path)).go_on(None).state()
    assert ledger["seconds"]["startup"] == pytest.approx(100, abs=1)
    note("restart", 80)
    assert loop._Past.read(str(tmp_path)).go_on(None).state()["seconds"]["startup"] == pytest.approx(100, abs=1)
    note("launch", 30)
    note("failed", 22)
    note("launch", 10)
    seconds = loop._Past.read(str(tmp_path)).go_on(None).state()["seconds"]
    assert (seconds["idle"], seconds["startup"]) == (pytest.approx(50 + 12, abs=1), pytest.approx(20 + 8 + 10, abs=1))


def test_a_command_that_gave_up_between_two_attempts_was_recovering_and_not_idle(tmp_path):
    began = time.time() - 100
    ledger = {"start": began, "time": began + 20, "seconds": {"productive": 15.0}, "uncommitted": 5.0, "stopped": False}
    events = [
        {"time": began, "event": "launch", "attempt": 0},
        {"time": began + 20, "event": "commit", "attempt": 1, "ledger": ledger},
        {"time": began + 22, "event": "restart", "attempt": 0},
        {"time": began + 30, "event": "failed", "attempt": 0},
        {"time": began + 90, "event": "launch", "attempt": 0},
    ]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    state = loop._Past.read(str(tmp_path)).go_on(None).state()
    seconds = state["seconds"]
    assert (seconds["recovery_detect"], seconds["recovery_schedule"], seconds["idle"]) == (2, 8, 60)
    assert seconds["startup"] == pytest.approx(10, abs=1) and seconds["lost"] == 5
    assert sum(seconds.values()) == pytest.approx(state["time"] - began, abs=1e-6)


def test_a_state_of_a_run_that_ended_in_order_is_left_as_it_is():
    done = {"start": 0.0, "time": 50.0, "seconds": {"productive": 50.0}, "uncommitted": 0.0, "stopped": True}
    events = [{"time": then, "event": kind} for then, kind in ((0, "launch"), (55, "serving"), (90, "launch"))]
    assert of_earlier_commands(done, events) == done


def test_steps_after_the_last_logged_one_are_lost_with_the_attempt_and_no_time_of_detecting_its_death(run):
    made, url = run
    clock = Clock()
    began = clock.now = time.time() - 100
    telemetry = Telemetry(made, url, attempt=2)
    telemetry.event("start", from_step=0, world=1, workers=[], launch=None)
    ledger = Ledger(launched=began, clock=clock)
    for step in range(3):
        ledger.enter("productive")
        clock.now += 10
        ledger.trained(step)
        telemetry.alive(step + 1, ledger)
    telemetry.close()
    with open(f"{url}/events.jsonl", "a") as log:
        log.write(json.dumps({"time": clock.now + 5, "event": "restart", "attempt": 0}) + "\n")
    seconds = loop._Past.read(url).go_on(None).state()["seconds"]
    assert (seconds["lost"], seconds["recovery_detect"]) == (pytest.approx(30), pytest.approx(5))
    with open(f"{url}/events.jsonl", "a") as log:
        log.write(json.dumps({"time": clock.now + 6, "event": "start", "attempt": 3}) + "\n")
    assert heard_last(url, read_lines(f"{url}/events.jsonl")) is None, "it is of an attempt that is over"


def test_an_attempt_that_was_replaced_leaves_the_newer_ones_record_and_counts_no_more(run):
    made, url = run
    old, new = Telemetry(made, url, attempt=1), Telemetry(made, url, attempt=2)
    for telemetry, step in ((old, 3), (new, 2), (old, 4)):
        telemetry.alive(step, Ledger())
        telemetry.flush()
        logged(telemetry, step, LoaderMetrics())
    assert json.loads((Path(url) / "ledger.json").read_text())["step"] == 2
    old.close()
    new.close()
    lines = read_lines(f"{url}/metrics.jsonl")
    assert newest_ledger(lines) == lines[1]["ledger"]
    shown = RunMetrics(made)
    shown.take((), lines)
    values = {sample.name: sample.value for family in shown.collect() for sample in family.samples}
    assert values["moviola_step"] == 3


def test_log_lines_keep_full_precision_and_survive_nan(tmp_path):
    url = str(tmp_path / "log.jsonl")
    log = Appender()
    value = 0.1 + 0.2
    log.line(url, {"loss": value, "bad": math.nan})
    assert read_lines(url) == [{"loss": value, "bad": "nan"}], "local lines are written at once"
    log.close()


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(str(path)) == [{"step": 1}, {"step": 2}]
    assert read_lines(str(path), tail_bytes=18) == [{"step": 2}]
    assert read_lines(str(tmp_path / "absent.jsonl")) == []


@pytest.fixture
def run(small_dataset, tmp_path):
    plain = {"name": "r", "recipe": "arvae", "data": {"train": str(small_dataset)}, "batch": 4}
    plain["telemetry"] = {"tensorboard": False}
    return manifest.validate(plain, "m"), str(tmp_path)


def page(telemetry):
    return urllib.request.urlopen(f"http://{telemetry.address}/metrics").read().decode()


def batch(frames):
    plan = BatchPlan(0, "first-frame", 0, 2, "video", 0, (4, 4), ClipRule(frames=frames, sizes=((4, 4),)))
    sources = (Source("d", "s", "k"),) * 2
    return Batch(torch.zeros(2, 3, frames, 4, 4), torch.ones(2), torch.zeros(2), (0, 1), sources, plan, 1.0, 0)


def logged(telemetry, step, loader, ledger=None):
    means = {"loss": 0.5, "terms": {"mse": 0.25, "kl": 3.0}, "statistics": {"logits_real": 1.5, "flow_pixels": 2.0}}
    record = {"step": step, "stage": "first-frame", **means, "lr": 0.1, "grad_norm": 1.0, "epochs": {"small": 0.5}}
    record |= {"clips_per_second": 8.0, "seconds_per_pixel": 1e-9}
    telemetry.log(record, telemetry.sums(loader), ledger or Ledger(), loader)


def samples(text):
    """Sample -> value."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line.startswith("moviola_"))
    return {name: float(value) for name, _, value in lines}


def test_counters_go_on_where_the_attempt_before_left_them(run):
    made, url = run
    loader = LoaderMetrics(bytes_fetched=100, retries=2, wait_seconds=0.5, skips={"short": 3, "odd": 1})
    first = Telemetry(made, url, attempt=1, alone=True)
    try:
        first.trained(0, [batch(3)], 0.015, 1e6)
        logged(first, 0, loader)
        before = samples(page(first))
        assert before['moviola_clips_total{run="r"}'] == 2
        assert before['moviola_frames_total{run="r"}'] == 6
        first.trained(1, [batch(3)], 0.015, 1e6)
        assert samples(page(first))['moviola_clips_total{run="r"}'] == 2, "what no line holds yet is not shown"
    finally:
        first.close()

    left = read_lines(url + "/metrics.jsonl")[-1]["counters"]
    again = Telemetry(made, url, attempt=2, before=left, alone=True)
    try:
        shown = samples(page(again))
        fallen = [name for name in before if "_total" in name and shown[name] < before[name]]
        assert not fallen
        again.trained(1, [batch(3)], 1.0, 1e6)
        logged(again, 1, LoaderMetrics(bytes_fetched=10, skips={"short": 1}))
        shown = samples(page(again))
    finally:
        again.close()
    label = '{run="r"}'
    assert shown["moviola_steps_total" + label] == 2
    assert shown["moviola_read_bytes_total" + label] == 110
    assert shown["moviola_storage_retries_total" + label] == 2
    assert shown["moviola_data_wait_seconds_total" + label] == 0.5
    assert shown["moviola_flops_total" + label] == 2e6
    assert shown['moviola_skipped_clips_total{reason="short",run="r"}'] == 4
    assert shown['moviola_skipped_clips_total{reason="other",run="r"}'] == 1
    assert shown['moviola_step_seconds_bucket{le="0.02",run="r"}'] == 1
    assert shown['moviola_step_seconds_bucket{le="+Inf",run="r"}'] == 2
    assert shown['moviola_loss{run="r",term="mse"}'] == 0.25
    assert shown['moviola_latent_kl{run="r"}'] == 3
    assert shown['moviola_adversary_logit{run="r",side="real"}'] == 1.5
    assert shown['moviola_statistic{run="r",statistic="flow_pixels"}'] == 2
    assert shown['moviola_stage{run="r",stage="first-frame"}'] == 1
    assert shown['moviola_memory_bytes{kind="resident",rank="0",run="r"}'] > 1e7


def test_ranks_are_held_through_restarts_and_not_while_the_run_was_stopped(run):
    made, url = run
    now = [1000.0]

    def clock():
        return now[0]

    def held(attempt, world, ledger):
        """Rank-seconds that an attempt of 40 seconds leaves behind it."""
        lines = read_lines(url + "/metrics.jsonl")
        telemetry = Telemetry(made, url, attempt=attempt, world=world, before=lines[-1]["counters"] if lines else None)
        now[0] += 40
        logged(telemetry, attempt, LoaderMetrics(), ledger)
        telemetry.close()
        return read_lines(url + "/metrics.jsonl")[-1]["counters"]["rank_seconds"]

    first = Ledger(launched=990.0, clock=clock)
    assert held(1, 2, first) == 2 * 50
    dead = first.state()
    now[0] += 100
    second = Ledger(dead, clock=clock)
    assert held(2, 3, second) == 2 * 50 + 3 * 140, "a dead attempt's machines wait for the next one"
    stopped = second.state(stopped=True)
    now[0] += 5000
    assert held(3, 1, Ledger(stopped, launched=now[0], clock=clock)) == 2 * 50 + 3 * 140 + 40


def test_time_left_counts_evaluations_and_not_another_attempt(run):
    schedule = run[0].schedule
    pixels = schedule.work(1)

    def line(step, time, attempt=2, stage="first-frame"):
        return {"step": step, "time": time, "attempt": attempt, "stage": stage, "seconds_per_pixel": 1 / pixels}

    def left(*lines):
        return seconds_left(schedule, lines) / (schedule.work(schedule.steps) - schedule.work(lines[-1]["step"] + 1))

    assert left(line(0, 7.0)) == 1 / pixels, "one line has only its own pace"
    assert left(line(0, 0.0), line(1, 2.0), line(2, 14.0)) == pytest.approx(7 / pixels)
    assert left(line(0, 0.0, 1), line(0, 100.0), line(2, 104.0)) == pytest.approx(2 / pixels)
    early = [line(0, 0.0, stage="before"), line(1, 50.0, stage="before")]
    assert left(*early, line(2, 51.0), line(3, 52.0), line(4, 53.0)) == pytest.approx(1 / pixels)


def test_a_rank_under_a_launcher_serves_its_own_gauges_alone(run):
    made, url = run
    telemetry = Telemetry(made, url, rank=1, world=2)
    try:
        names = {name.partition("{")[0] for name in samples(page(telemetry))}
    finally:
        telemetry.close()
    assert names == {"moviola_rank_step", "moviola_skip_budget_ratio", "moviola_memory_bytes"}
    assert telemetry.address.startswith("127.0.0.1:")


def test_an_address_of_another_machine_is_told(run):
    made, url = run
    made = made.model_copy(update={"telemetry": made.telemetry.model_copy(update={"bind": "192.0.2.7", "port": 9464})})
    with pytest.raises(InputError, match=r"telemetry\.bind: 192\.0\.2\.7: \S+ can't serve there: cannot assign"):
        Telemetry(made, url)


def test_a_port_that_is_taken_is_said_and_another_one_found(run):
    made, url = run
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made = made.model_copy(update={"telemetry": made.telemetry.model_copy(update={"port": port})})
        telemetry = Telemetry(made, url, alone=True)
        try:
            assert page(telemetry) and not telemetry.address.endswith(f":{port}")
        finally:
            telemetry.close()
    (event,) = read_lines(url + "/events.jsonl")
    assert f"can't serve its metrics on port {port}" in event["message"]


def test_counts_and_names_follow_prometheus_rules(run):
    made, _ = run
    histogram = Histogram()
    for seconds in (0.001, 0.01, 0.011, 1e9):
        histogram.add(seconds)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1]) == (2, 1, 1)
    start = {"event": "start", "time": 1.0, "attempt": 1, "world": 2, "workers": [{"rank": 0}]}
    metrics = RunMetrics(made)
    metrics.take([start], [])
    assert metrics.workers == [{"rank": 0}]
    metrics.take([{"event": "restart", "time": 2.0, "cause": "killed", "attempt": 0}], [])
    assert metrics.workers == [], "who was taken down is no target"
    metrics.take([start], [])
    assert metrics.workers == [{"rank": 0}]
    text = {}
    for family in metrics.collect():
        assert re.fullmatch(r"moviola_[a-z_]+", family.name) and family.documentation.endswith(".")
        text |= {(s.name, *sorted(s.labels.items())): s.value for s in family.samples}
    assert text["moviola_restarts_total", ("cause", "killed"), ("run", "r")] == 1
    assert text["moviola_run_state", ("run", "r"), ("state", "running")] == 1
    metrics.take([{"event": "done", "time": 3.0, "attempt": 1}], [])
    assert metrics.workers == [], "a run that is over has nothing to scrape"
