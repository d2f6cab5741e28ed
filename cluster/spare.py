"""Processes that are ready to take a worker's place: they have imported everything and wait in Ray's pool.

A restarted worker group takes new processes. On a busy machine an interpreter that imports Ray, torch and DeepSpeed
takes ten times as long as all else that a recovery does, so it is done before it is needed.
"""

from __future__ import annotations

import contextlib
import os
import threading

import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc, runtime_environment_pb2

HOOK = {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: "cluster.spare.imports"}
"""Environment of the workers: each calls :func:`imports` before it waits for what to do."""
SETTLED = 20.0
"""Seconds after which a rank asks for a spare of itself: a run that is shorter would not earn its start."""
KEPT = 10 * 365 * 24 * 3600
"""Seconds for which an idle spare is kept."""


def imports() -> None:
    """Imports what :func:`cluster.worker.work` will need, which is also who tells of an import that fails."""
    with contextlib.suppress(Exception):
        import torch  # noqa: F401

        if os.environ.get("DS_ACCELERATOR") == "cpu":  # else DeepSpeed looks for GPUs, and Ray has not dealt them yet
            from trainer import loop  # noqa: F401


def ask_later() -> None:
    """Has :func:`ask` called once the rank has trained for a while."""
    timer = threading.Timer(SETTLED, ask)
    timer.daemon = True
    timer.start()


def ask() -> None:
    """Asks this machine's raylet for one more process like this one. Without it a restart is slower, and no worse."""
    if not ray.is_initialized():  # the run is over
        return
    with contextlib.suppress(Exception):
        context = ray.get_runtime_context()
        here = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
        environment = runtime_environment_pb2.RuntimeEnvInfo(serialized_runtime_env=context.get_runtime_env_string())
        request = node_manager_pb2.PrestartWorkersRequest(
            language=common_pb2.Language.PYTHON,
            job_id=bytes.fromhex(context.get_job_id()),
            runtime_env_info=environment,
            keep_alive_duration_secs=KEPT,
            num_workers=1,
        )
        with init_grpc_channel(f"{here['NodeManagerAddress']}:{here['NodeManagerPort']}") as channel:
            node_manager_pb2_grpc.NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=30)
