"""Real services for the tests: started by the scripts that a user has too, stopped when the session ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines import storage

SCRIPTS = Path(__file__).parents[2] / "scripts"


def _fetched(script: str) -> None:
    """Unpacks what ``script`` needs; where that can't be had the test is skipped, on CI it fails."""
    fetch = subprocess.run([SCRIPTS / script, "fetch"], capture_output=True, text=True, timeout=240)
    if fetch.returncode:
        reason = f"scripts/{script} fetch: {fetch.stderr.strip()}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="session")
def chromium() -> None:
    """Debian's Chromium is there; ``tests.real.browser`` drives it."""
    _fetched("chromium.sh")


@pytest.fixture(scope="session")
def prometheus_programs() -> Path:
    """The folder of Debian's prometheus and promtool."""
    _fetched("prometheus.sh")
    found = subprocess.run([SCRIPTS / "prometheus.sh", "path"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


@dataclass(frozen=True)
class ObjectStore:
    """A running object store; ``env`` is what a client process needs to find it."""

    script_env: dict[str, str]
    env: dict[str, str]

    def kill9(self) -> None:
        """SIGKILL to all of its processes."""
        self._script("kill9")

    def restart(self) -> None:
        """Starts it again on the same data."""
        self._script("restart")

    def _script(self, command: str) -> None:
        subprocess.run([SCRIPTS / "object_store.sh", command], env=self.script_env, check=True, timeout=120)


def _two_free_ports() -> int:
    """A port that is free together with the one after it."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two neighbouring ports are free")


@pytest.fixture(scope="session")
def running_object_store() -> Iterator[ObjectStore]:
    """Ceph's gateway on free ports of loopback, with a data folder of its own."""
    _fetched("object_store.sh")
    folder = tempfile.mkdtemp(prefix="moviola-store-", dir="/tmp")
    script_env = os.environ | {"MOVIOLA_STORE_DIR": f"{folder}/data", "MOVIOLA_STORE_PORT": str(_two_free_ports())}
    script = SCRIPTS / "object_store.sh"
    try:
        up = subprocess.run([script, "up"], env=script_env, capture_output=True, text=True, timeout=120)
        assert up.returncode == 0, up.stderr
        exports = subprocess.run([script, "env"], env=script_env, capture_output=True, text=True, check=True).stdout
        variables = dict(line.removeprefix("export ").split("=", 1) for line in exports.splitlines())
        yield ObjectStore(script_env, variables)
    finally:
        subprocess.run([script, "down"], env=script_env, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def object_store(running_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The same store, with this process's environment pointing to it and a client that is new."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in running_object_store.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "_stores", {})
    return running_object_store


@pytest.fixture
def folder_url(object_store: ObjectStore, request: pytest.FixtureRequest) -> str:
    """A prefix of the store that no other test uses."""
    return f"s3://moviola/{request.node.name}"
