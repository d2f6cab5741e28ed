"""A Ray cluster of several nodes on this machine, of real raylets that can be killed, drained and brought back."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

ROOT = Path(__file__).parents[2]
QUICK = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
    "RAY_worker_niceness": "0",
    "DS_ACCELERATOR": "cpu",
}
"""Ray's times to notice and to wait, for a test; production's are looser."""


class Nodes:
    """A head without CPUs, where controllers live, and ``count`` nodes of one CPU each. A context manager.

    With ``dashboard`` the head serves Ray's job API at the address of that name.
    """

    def __init__(self, count: int, *, dashboard: bool = False) -> None:
        self._folder = tempfile.mkdtemp(prefix="mv-", dir="/tmp")  # sockets with longer paths are refused
        Path(self._folder, "ray").mkdir()
        env = {**QUICK, "RAY_TMPDIR": self._folder}
        self._before = {key: os.environ.get(key) for key in env}
        os.environ.update(env)
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0,
                "include_dashboard": dashboard,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": None,  # a free one: where the default is taken, no job is accepted
            },
        )
        self.address = self._cluster.address
        self.dashboard = f"http://{self._cluster.webui_url}"
        self.nodes: list[Any] = []
        for _ in range(count):
            self.add()

    def add(self) -> None:
        """One node more."""
        self.nodes.append(self._cluster.add_node(num_cpus=1, include_dashboard=False, wait=False))

    def kill(self, node: Any) -> None:
        """Ends a machine at once: its raylet and every process below it, by SIGKILL."""
        self.nodes.remove(node)
        victims = [pid for raylet in node.all_processes["raylet"] for pid in family(raylet.process.pid)]
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def drain(self, node: Any, seconds: float) -> None:
        """Gives notice that a machine goes, as ``ray drain-node`` does, and forgets it."""
        self.nodes.remove(node)
        command = ["drain-node", "--address", self.address, "--node-id", node.node_id]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "chaos"]
        command += ["--deadline-remaining-seconds", str(round(seconds))]
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr

    def holding(self, pid: int) -> Any:
        """The node that a process runs on."""
        for node in self.nodes:
            if any(pid in family(raylet.process.pid) for raylet in node.all_processes["raylet"]):
                return node
        raise LookupError(f"process {pid} is on no node")

    def processes(self, title: str) -> list[int]:
        """Processes of the cluster whose title begins so."""
        everyone = [self._cluster.head_node, *self.nodes]
        raylets = [raylet.process.pid for node in everyone for raylet in node.all_processes["raylet"]]
        found = []
        for pid in (pid for raylet in raylets for pid in family(raylet)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(title.encode()):
                    found.append(pid)
        return found

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        for key, value in self._before.items():
            os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            child = int(stat.parent.name)
            children.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(child)
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


class Command:
    """``moviola`` in a process of its own; ``log`` takes what it says. A context manager that ends it."""

    def __init__(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *arguments],
                cwd=ROOT, env=os.environ | dict(env or {}), stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def said(self) -> str:
        """What it wrote."""
        return self.log.read_text()

    def until(self, ready: Callable[[], Any], seconds: float = 240.0) -> Any:
        """Waits until ``ready`` gives something, and gives it back; fails where the command ends before."""
        deadline = time.monotonic() + seconds
        while not (found := ready()):
            assert self.alive, f"ended with {self.process.returncode} too soon:\n{self.said}"
            assert time.monotonic() < deadline, f"waited {seconds:g} s:\n{self.said}"
            time.sleep(0.05)
        return found

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit status."""
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL to it and to all that it started."""
        for pid in family(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.alive:
            self.kill()
