"""Whatever hangs, the attempt ends in the time that the manifest sets, and says who waited for whom."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from pipelines import storage
from tests.chaos.lab import Lab, reached, smoke
from tests.pipelines.faulty import FaultyProxy
from trainer import checkpoint

HANG = 6.0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_by_the_one_that_waited_and_ends_when_it_wakes(lab: Lab, victim: int) -> None:
    name = f"stopped-{victim}"
    with lab.start(name, f"failure.hang_seconds={HANG}", "checkpoint.every_steps=1") as group:
        assert reached(lab, name, group, lambda lines: len(lines) > 2), group.said
        os.kill(group.ranks[victim].pid, signal.SIGSTOP)
        began = time.monotonic()
        group.ranks[1 - victim].join(60)
        took = time.monotonic() - began
        assert group.ranks[1 - victim].exitcode == 1, group.said
        assert HANG * 0.5 < took < 2.5 * HANG
        said = group.said
        os.kill(group.ranks[victim].pid, signal.SIGCONT)
        group.ranks[victim].join(60)
        assert group.ranks[victim].exitcode == 1, "it was left behind, and ends by itself"
        assert f"rank {victim} itself stood still" in group.said.removeprefix(said)
    assert f"moviola: rank {1 - victim} waited" in said and f"for rank {victim}" in said
    silent = re.search(r"without a sign of life for (\d+) s", said)
    assert silent and int(silent[1]) < 2.5 * HANG if victim else "keeps the heartbeats and does not answer" in said
    assert "Traceback" not in said
    lab.train(name)
    assert lab.fingerprint(name) == lab.fingerprint(lab.whole(1))
    assert lab.history(name).exact


@pytest.fixture
def silent_shard(small_dataset: Path, tmp_path: Path) -> Path:
    """The dataset with a shard that opens and never answers."""
    copy = tmp_path / "dataset"
    shutil.copytree(small_dataset, copy)
    shard = copy / "shard-000001.tar"
    shard.unlink()
    os.mkfifo(shard)
    return copy


def test_a_stuck_loader_ends_with_the_shard_that_it_waits_for(silent_shard: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path, smoke(str(silent_shard), steps=4))
    with lab.start("stuck", "data.timeout_seconds=2", "failure.hang_seconds=60") as group:
        began = time.monotonic()
        assert None not in group.wait(60)
        assert time.monotonic() - began < 25, "who is left does not wait for the dead"
        assert "no clip arrived for 2 s" in group.said and "shard-000001.tar" in group.said
        assert "Traceback" not in group.said


def test_a_rank_whose_data_does_not_come_is_named_by_the_other(silent_shard: Path, tmp_path: Path) -> None:
    lab = Lab(tmp_path, smoke(str(silent_shard), steps=4, seed=4))
    with lab.start("late", f"failure.hang_seconds={HANG}") as group:
        group.ranks[0].join(60)
        assert group.ranks[0].exitcode == 1, group.said
        where = "in step 1 (waiting for the data of others) for rank 1, alive but elsewhere. "
        where += "rank 1: step 1, waiting for data"
        assert where in group.said, "with this seed the first clip of that shard is rank 1's, in step 1"


@pytest.mark.parametrize("asked", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_stop_is_heard_while_data_does_not_come(
    silent_shard: Path, small_dataset: Path, tmp_path: Path, asked: int
) -> None:
    lab = Lab(tmp_path, smoke(str(silent_shard), steps=2, seed=4))
    with lab.start("late", "checkpoint.every_steps=100") as group:
        assert reached(lab, "late", group, lambda lines: len(lines) == 1), group.said
        began = time.monotonic()
        os.kill(group.ranks[asked].pid, signal.SIGTERM)
        assert group.wait(30) == [75, 75], group.said
        assert time.monotonic() - began < 10
    assert checkpoint.newest_step(lab.url("late")) == 1, "what was trained is kept"
    (silent_shard / "shard-000001.tar").unlink()
    shutil.copy(small_dataset / "shard-000001.tar", silent_shard)
    assert lab.history(lab.train("late")).exact and lab.history("late").redone == 0
    assert lab.imbalance("late") < 0.01


class StuckUploads(FaultyProxy):
    """Forwards everything but the parts of a checkpoint: those are taken and never acknowledged."""

    def _forward(self, request: bytes) -> bytes:
        if request.startswith(b"PUT") and b".safetensors" in request.split(b"\r\n", 1)[0]:
            self.closed.wait()
        return super()._forward(request)


@pytest.fixture
def stuck_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of clients of an S3 server on which uploads hang; the bucket is ``chaos``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = StuckUploads(f"http://{host}:{port}")
    env = {
        "AWS_ACCESS_KEY_ID": "testkey",
        "AWS_SECRET_ACCESS_KEY": "testsecret",
        "MOVIOLA_S3_ENDPOINT": proxy.url,
    }
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(storage, "_stores", {})
    storage._s3()._run("create", "s3://chaos", lambda s3: s3.create_bucket(Bucket="chaos"))
    yield env
    proxy.close()
    server.stop()


def test_a_stuck_upload_ends_the_run_with_what_it_was_doing(
    stuck_store: dict[str, str], small_dataset: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path, smoke(str(small_dataset), steps=500), runs="s3://chaos/runs")
    sets = ("checkpoint.timeout_seconds=3", "checkpoint.every_steps=100000", "failure.hang_seconds=60")
    with lab.start("stuck", *sets, env=stuck_store) as group:
        assert reached(lab, "stuck", group, lambda lines: len(lines) > 2), group.said
        began = time.monotonic()
        os.kill(group.ranks[0].pid, signal.SIGTERM)
        assert group.wait(60) == [1, 1], group.said
        assert time.monotonic() - began < 20
        assert "the checkpoint of step" in group.said and "is not committed after 3 s: rank" in group.said
        assert "still writing rank-0000" in group.said and "Traceback" not in group.said
