"""The goodput ledger adds up, survives deaths, and no counter falls."""

import json
import math
import urllib.request

from trainer.telemetry import CAUSES, Appender, Ledger, Telemetry, goodput, read_lines


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


def test_metrics_are_served_on_loopback_and_counters_only_rise(tmp_path):
    telemetry = Telemetry(
        name="r", run_url=str(tmp_path), rank=0, world=1, attempt=2, trace=False, bind="127.0.0.1", port=0
    )
    try:
        ledger = {"seconds": dict.fromkeys(CAUSES, 3.0), "uncommitted": 1.0}
        telemetry.metrics.ledger(ledger)
        telemetry.metrics.ledger({"seconds": dict.fromkeys(CAUSES, 2.0), "uncommitted": 0.0})
        telemetry.event("start", from_step=7)
        page = urllib.request.urlopen(f"http://127.0.0.1:{telemetry.port}/metrics").read().decode()
    finally:
        telemetry.close()
    assert 'moviola_goodput_seconds_total{cause="productive",run="r"} 3.0' in page
    assert 'moviola_attempt{rank="0",run="r"} 2.0' in page
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event["event"] == "start" and event["from_step"] == 7 and event["attempt"] == 2
