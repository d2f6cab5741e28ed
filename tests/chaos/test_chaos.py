"""A short schedule of faults; ``make chaos ROUNDS=50 SEED=1`` runs a long one, under Ray and on a real store too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from pipelines import storage
from tests.chaos import rounds
from tests.chaos.lab import Lab, smoke
from tests.chaos.rounds import KINDS, Blow, Round, Store


def test_a_schedule_is_its_seed_and_leaves_no_kind_out() -> None:
    def drawn(seed: int) -> list[tuple[str, int, tuple[Blow, ...]]]:
        return [(plan.place, plan.zero, plan.blows) for plan in rounds.schedule(seed, 30, list(KINDS))]

    assert drawn(1) == drawn(1) != drawn(2)
    for place, kinds in KINDS.items():
        assert {blow.kind for where, _, blows in drawn(1) if where == place for blow in blows} == set(kinds)


def test_kills_a_stop_and_damage_change_nothing(lab: Lab) -> None:
    blows = (Blow("flip", 7, 0.0), Blow("command", None, 0.5), Blow("worker", 1, 0.1), Blow("half", 2, 0.0))
    plan = Round(0, "disk", 1, blows)
    rounds.run_processes(lab, plan)
    verdict = rounds.judge(lab, plan.name, plan.zero)
    assert verdict.good, (verdict, plan.notes)
    # After step 7 the checkpoints of steps 2 and 4 are committed: a save waits for the one before it.
    (warning,) = {event["message"] for event in lab.events(plan.name, "warning")}
    assert "is damaged" in warning and "Going back to the checkpoint before it" in warning


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecret"}
    for key, value in {**keys, "MOVIOLA_S3_ENDPOINT": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(storage, "_stores", {})
    storage._s3()._run("create", "s3://chaos", lambda s3: s3.create_bucket(Bucket="chaos"))
    store = Store(f"http://{host}:{port}", keys)
    yield store
    store.close()
    server.stop()


def test_slow_and_failing_storage_change_nothing(store: Store, small_dataset: Path, tmp_path: Path, lab: Lab) -> None:
    remote = Lab(tmp_path, smoke(str(small_dataset), steps=4), runs="s3://chaos/runs")
    plan = Round(0, "s3", 1, (Blow("failing", 1, 0.0),))
    rounds.run_processes(remote, plan, store)
    assert remote.fingerprint(plan.name) == lab.fingerprint(lab.whole(1))
    assert remote.history(plan.name).exact and remote.imbalance(plan.name) < 0.01
