"""Storage's promises against a production S3 implementation."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest

from pipelines import storage
from pipelines.faults import InputError

pytestmark = pytest.mark.real
WRITERS = 8


def test_objects_come_back_whole_and_in_ranges(folder_url: str) -> None:
    small, large = os.urandom(100_000), os.urandom(storage.SINGLE_PUT_BYTES + 1)  # one PUT; a multipart upload
    for name, data in {"small": small, "large": large}.items():
        url = f"{folder_url}/{name}"
        storage.write_bytes(url, data)
        assert storage.read_bytes(url) == data
        assert storage.size(url) == len(data)
        assert storage.read_bytes(url, 5_000, 9_000) == data[5_000:9_000]
        assert storage.read_bytes(url, len(data) - 7, len(data)) == data[-7:]
        with pytest.raises(InputError, match="moviola index"):
            storage.read_bytes(url, len(data) - 7, len(data) + 1)
    assert [(entry.name, entry.bytes) for entry in storage.list_dir(folder_url)] == [
        ("large", len(large)),
        ("small", len(small)),
    ]
    storage.delete(folder_url, recursive=True)
    assert storage.list_dir(folder_url) == []
    with pytest.raises(storage.Missing, match=f"{folder_url}/small is not there"):
        storage.read_bytes(f"{folder_url}/small")


def test_one_of_eight_writers_creates_an_object(folder_url: str) -> None:
    with ThreadPoolExecutor(WRITERS) as pool:
        for round_ in range(10):
            url, gate = f"{folder_url}/{round_}", threading.Barrier(WRITERS)

            def attempt(writer: int, url: str = url, gate: threading.Barrier = gate) -> bool:
                gate.wait()
                return storage.put_if_absent(url, b"writer %d" % writer)

            won = list(pool.map(attempt, range(WRITERS)))
            assert won.count(True) == 1
            assert storage.read_bytes(url) == b"writer %d" % won.index(True)


def test_no_increment_by_compare_and_swap_is_lost(folder_url: str) -> None:
    url, each = f"{folder_url}/counter", 6
    storage.write_bytes(url, b"0 by nobody")

    def increment(writer: int) -> None:
        done = 0
        while done < each:
            data, version = storage.read_versioned(url)
            raised = b"%d by %d" % (int(data.split()[0]) + 1, writer)
            done += storage.swap(url, raised, version) is not None

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(increment, range(WRITERS)))
    assert int(storage.read_bytes(url).split()[0]) == WRITERS * each


def test_a_stale_version_is_refused(folder_url: str) -> None:
    url = f"{folder_url}/lease"
    first = storage.swap(url, b"attempt 1", None)
    second = storage.swap(url, b"attempt 2", first)
    assert second not in (None, first)
    assert storage.swap(url, b"attempt 1 again", first) is None
    assert storage.swap(url, b"attempt 3", None) is None
    assert storage.read_versioned(url) == (b"attempt 2", second)


def test_kill_9_loses_no_acknowledged_write_and_writers_ride_through_it(object_store, folder_url: str) -> None:
    writers, each = 4, 40
    acknowledged: Queue[tuple[str, bytes]] = Queue()

    def write(writer: int) -> None:
        for i in range(each):
            url, data = f"{folder_url}/{writer}/{i}", os.urandom(20_000)
            storage.write_bytes(url, data)
            acknowledged.put((url, data))

    before = sum(storage.counters.snapshot()["retries"].values())
    with ThreadPoolExecutor(writers) as pool:
        jobs = [pool.submit(write, writer) for writer in range(writers)]
        kept = [acknowledged.get(timeout=60) for _ in range(writers * each // 4)]
        object_store.kill9()
        object_store.restart()
        for job in jobs:
            job.result()
    kept += [acknowledged.get_nowait() for _ in range(acknowledged.qsize())]
    assert len(kept) == writers * each
    assert sum(storage.counters.snapshot()["retries"].values()) > before  # the kill came while they wrote
    for url, data in kept:
        assert storage.read_bytes(url) == data


def test_wrong_keys_are_explained_without_showing_them(object_store, folder_url: str) -> None:
    secret = "not-the-secret-of-this-store"
    read = "import sys\nfrom pipelines import storage\nstorage.read_bytes(sys.argv[1])"
    env = os.environ | {"AWS_SECRET_ACCESS_KEY": secret}
    failed = subprocess.run(
        [sys.executable, "-c", read, f"{folder_url}/x"], env=env, capture_output=True, text=True, timeout=60
    )
    assert "refused the credentials" in failed.stderr
    assert object_store.env["MOVIOLA_S3_ENDPOINT"] in failed.stderr
    assert secret not in failed.stderr
