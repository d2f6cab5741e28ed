"""The loader on a production S3 implementation: the same batches through a kill of the store and socket faults."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import storage, synthetic
from pipelines.contracts import BatchPlan, ClipRule
from pipelines.index import open_dataset
from pipelines.loader import Loader
from pipelines.pack import PackRules, pack

sys.path.append(str(Path(__file__).parents[1] / "pipelines"))
from faulty import Fault, FaultyProxy

pytestmark = pytest.mark.real
RULE = ClipRule(frames=5, sizes=((32, 32),))


@pytest.fixture
def dataset_url(folder_url: str, tmp_path: Path) -> str:
    synthetic.write_videos(tmp_path / "videos", count=6, seconds=2.0, size=(64, 64), seed=1)
    rules = PackRules(frames=16, least_frames=16, cuts=False, preset="ultrafast", shard_clips=8)
    pack(tmp_path / "videos", f"{folder_url}/data", rules, workers=2)
    return f"{folder_url}/data"


def _plan(step: int) -> BatchPlan:
    return BatchPlan(step, "stage", step * 8, 8, "video", step * 8, (32, 32), RULE)


def _loader(url: str, steps: int, **changes: int) -> Loader:
    return Loader([(open_dataset(url), 1.0)], None, _plan, steps, seed=2, micro_batch=4, granularity=2, **changes)


def _pixels(loader: Loader) -> dict[int, bytes]:
    return {
        place: pixels.tobytes()
        for _, batches in loader.iter_from(0)
        for batch in batches
        for place, pixels in zip(batch.places, np.asarray(batch.pixels_BCTHW), strict=True)
    }


def test_a_store_that_is_killed_and_restarted_changes_nothing(object_store, dataset_url: str) -> None:
    reference = _pixels(_loader(dataset_url, 6))
    loader = _loader(dataset_url, 6, read_ahead=1)
    found: dict[int, bytes] = {}
    for step, batches in loader.iter_from(0):
        for batch in batches:
            found |= {
                place: pixels.tobytes()
                for place, pixels in zip(batch.places, np.asarray(batch.pixels_BCTHW), strict=True)
            }
        if step == 1:
            object_store.kill9()
            object_store.restart()
    assert found == reference
    assert not loader.metrics.skips


def test_faults_at_the_socket_change_nothing(object_store, dataset_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = _pixels(_loader(dataset_url, 4))
    proxy = FaultyProxy(object_store.env["MOVIOLA_S3_ENDPOINT"])
    monkeypatch.setenv("MOVIOLA_S3_ENDPOINT", proxy.url)
    monkeypatch.setattr(storage, "_stores", {})
    monkeypatch.setattr(storage, "policy", storage.RetryPolicy(first_wait=0.01, idle_timeout=0.5))
    kinds = ("reset", "stall", "status", "truncate", "corrupt", "lose")
    try:
        loader = _loader(dataset_url, 4)
        proxy.faults.extend(Fault(kind, 503, "Retry-After: 0\r\n", bytes=20, on=".tar") for kind in kinds)
        assert _pixels(loader) == reference
        assert not proxy.faults
        assert loader.metrics.retries >= len(kinds)
        assert not loader.metrics.skips
    finally:
        proxy.close()
