"""Checkpoints on a real object store: commit, fence, and the store's death in the middle of an upload."""

from __future__ import annotations

import threading

import pytest
import torch

from pipelines import storage
from tests.real.conftest import ObjectStore
from tests.trainer.test_checkpoint import Plain, commit, resume
from trainer import checkpoint
from trainer.checkpoint import Checkpointer, Fenced, Lease

pytestmark = pytest.mark.real


def test_commits_fence_and_fallback_on_s3(folder_url: str) -> None:
    old = commit(folder_url, (1, 2, 3), keep=2)
    assert old.weakness is None
    names = [entry.name for entry in storage.list_dir(storage.join(folder_url, "checkpoints"))]
    assert names == ["step-00000002", "step-00000003"]
    stale = Checkpointer(folder_url, old, timeout=60)
    commit(folder_url, (4,), keep=2)
    stale.save(5, {"model": Plain(-1)}, {})
    with pytest.raises(Fenced, match="replaced by attempt 2"):
        stale.close()
    assert checkpoint.newest_step(folder_url) == 4
    newest = storage.join(folder_url, "checkpoints/step-00000004")
    file = storage.join(newest, "rank-00000.a2.safetensors")
    storage.write_bytes(file, storage.read_bytes(file)[:-4] + b"oops")
    step, value, warnings = resume(folder_url)
    assert (step, value) == (3, 3.0)
    assert "rank-00000.a2.safetensors is not what was written" in warnings[0]
    commit(folder_url, (4,))
    assert resume(folder_url) == (4, 4.0, [])


def test_store_that_dies_in_an_upload_delays_the_commit(folder_url: str, object_store: ObjectStore) -> None:
    big = Plain(2.0, numel=20_000_000)
    saver = Checkpointer(folder_url, Lease.take(folder_url), timeout=200)
    saver.save(1, {"model": Plain(1.0)}, {})
    saver.close()
    began = threading.Event()
    write = storage.writer

    def watched(url: str) -> object:
        began.set()
        return write(url)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "writer", watched)
        saver.save(2, {"model": big}, {})
        assert began.wait(30)
        object_store.kill9()
    object_store.restart()
    assert checkpoint.newest_step(folder_url) in (1, 2)
    saver.close()
    found = checkpoint.newest(folder_url)
    assert found is not None and found.step == 2
    found.verify()
    assert torch.equal(checkpoint.load_weights(folder_url)["x"], big.numbers)
