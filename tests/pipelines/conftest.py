"""Storage for the tests of this folder: a local folder and an S3 server in memory, with a proxy that injects faults."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import FaultyProxy, point_at
from moto.server import ThreadedMotoServer

from pipelines import storage

BUCKET = "moviola-tests"


@pytest.fixture(scope="session")
def moto_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def moto_client(moto_endpoint: str) -> storage._S3:
    """One client for all tests that inject no faults, and the bucket."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        point_at(moto_endpoint, monkeypatch)
        client = storage._s3()

        async def create(s3: Any) -> None:
            await s3.create_bucket(Bucket=BUCKET)

        client._run("create", f"s3://{BUCKET}", create)
        return client


@pytest.fixture
def s3_url(
    moto_endpoint: str, moto_client: storage._S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> str:
    """A prefix on the S3 server that no other test uses."""
    point_at(moto_endpoint, monkeypatch)
    storage._stores[os.getpid()] = moto_client
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(params=["local", "s3"])
def any_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on the local disk, then one on S3."""
    return str(tmp_path / "folder") if request.param == "local" else request.getfixturevalue("s3_url")


@pytest.fixture
def proxy(s3_url: str, moto_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The S3 server behind a proxy that injects faults; storage waits little, so that tests are quick."""
    made = FaultyProxy(moto_endpoint)
    point_at(made.url, monkeypatch)
    monkeypatch.setattr(
        storage,
        "policy",
        storage.RetryPolicy(attempts=4, first_wait=0.01, longest_wait=0.05, idle_timeout=0.3, request_timeout=0.6),
    )
    yield made
    made.close()
