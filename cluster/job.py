"""The driver of a submitted run, where the cluster is: ``python -m cluster.job RUN_URL --launch JOB``.

On a Ray cluster it first looks at the run with the workers' eyes: storage, machines, memory. It ends with 0 when the
run is done, or stopped because it was asked to; what is on storage says which.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from cluster import kubernetes, launch, runs, submit
from cluster.cli import guarded
from cluster.events import note
from pipelines import storage
from pipelines.faults import InputError
from trainer import checkpoint, plan
from trainer import run as folder
from trainer.manifest import RunManifest

PROBES = 64
"""Machines that are looked at from inside."""
PROBE_SECONDS = 120.0


def drive(run_url: str, job: str) -> int:
    """Trains the run that lies at ``run_url``; the exit status."""
    try:
        manifest = folder.load(run_url)
    except InputError as error:
        raise InputError(
            f"{error}. Does {socket.gethostname()} see the storage that the run was submitted to?"
        ) from None
    assert manifest is not None
    happened = runs.events(run_url)
    launched = runs.launched(happened) or {}
    if launched.get("job", job) != job:  # it has waited while the run was given to another
        print(f"job {job}: the run was given to {launched['cluster']} as job {launched['job']} since")
        return 0
    if launched.get("cluster") == "kubernetes":
        manifest = kubernetes.scraped(manifest)
    if (message := _failed_before(happened, job)) is not None:
        raise InputError(f"a new cluster won't help: {message}")
    on_cluster = bool(os.environ.get("RAY_ADDRESS"))
    if on_cluster:
        note(run_url, "driver", job=job, host=socket.gethostname(), pid=os.getpid())
    if _asked_to_stop(run_url):
        note(run_url, "stopped", step=checkpoint.newest_step(run_url) or 0)
        return 0
    if on_cluster:
        try:
            inspect(manifest, run_url)
        except InputError as error:
            note(run_url, "failed", job=job, message=storage.redact(str(error)), fault="input")
            raise
    console = Console(width=160, soft_wrap=True, markup=False)
    outcome = launch.foreground(manifest, run_url, console, watch=_until_asked(run_url))
    console.print(f"run {manifest.name}: {outcome}")
    return 0


def _failed_before(happened: list[dict[str, Any]], job: str) -> str | None:
    """Why this same job ended before, where another cluster changes nothing."""
    failed = [e for e in happened if e["event"] == "failed" and e.get("job") == job and e.get("fault") == "input"]
    return failed[-1]["message"] if failed else None


def _asked_to_stop(run_url: str) -> bool:
    return storage.exists(storage.join(run_url, "stop.json"))


def _until_asked(run_url: str) -> launch.Watcher:
    """Ends a launch that still waits for machines when it is asked to stop; once it trains, the loop itself hears."""
    trains, asked = False, time.monotonic()

    def watch(happened: list[dict[str, Any]], logged: list[dict[str, Any]]) -> None:
        nonlocal trains, asked
        trains = trains or any(event["event"] == "start" for event in happened)
        if not trains and time.monotonic() - asked > 2:
            asked = time.monotonic()
            if _asked_to_stop(run_url):
                raise SystemExit

    return watch


def inspect(manifest: RunManifest, run_url: str) -> None:
    """Raises InputError with all that the cluster lacks; what an autoscaler may still bring is only a warning."""
    import ray

    facts = plan.dry_run(manifest)  # before Ray unpacks the working directory anew: torch's compiler asks for it
    ray.init(log_to_driver=False, logging_level="ERROR")
    try:
        faults = list(_machines(manifest, ray.nodes(), run_url)) + list(_probed(manifest, facts, run_url))
    finally:
        ray.shutdown()
    if faults:
        listing = "\n  ".join(dict.fromkeys(faults))
        raise InputError(f"{manifest.name} can't run on this cluster:\n  {listing}")


def room(manifest: RunManifest, resources: dict[str, float]) -> int:
    """Workers that a machine of these resources holds."""
    workers = manifest.workers
    places = [resources.get("CPU", 0) / workers.cpus]
    places += [resources.get("GPU", 0) / workers.gpus] if workers.gpus else []
    return math.floor(min(places) + 1e-9)


def _machines(manifest: RunManifest, nodes: list[dict[str, Any]], run_url: str) -> Iterator[str]:
    """Whether the machines that are there hold the fewest workers."""
    workers, alive = manifest.workers, [node["Resources"] for node in nodes if node["Alive"]]
    places = sum(room(manifest, resources) for resources in alive)
    if places >= workers.least:
        return
    have = ", ".join(f"{sum(r.get(kind, 0) for r in alive):g} {kind}s" for kind in ("CPU", "GPU"))
    fault = (
        f"workers.count: {workers.least}: the cluster has room for {places} workers of {workers.cpus:g} CPUs and "
        f"{workers.gpus:g} GPUs ({len(alive)} machines, {have} in all)"
    )
    if os.environ.get("MOVIOLA_CLUSTER_GROWS") == "1":
        note(run_url, "warning", message=f"{fault}; waiting for more machines")
    else:
        yield f"{fault}. Lower workers.count, cpus or gpus, or add machines"


def _probed(manifest: RunManifest, facts: dict[str, Any], run_url: str) -> Iterator[str]:
    """Storage, disk and memory, seen from each machine that can hold a worker."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    data = manifest.data
    datasets = [ref.dataset for ref in (*data.train, *data.images)] + ([data.eval] if data.eval else [])
    memory = facts["memory"][0]
    needed = submit.host_bytes(manifest, memory)
    waiting = {}
    for node in [n for n in ray.nodes() if n["Alive"] and room(manifest, n["Resources"])][:PROBES]:
        probe = ray.remote(_probe).options(
            num_cpus=0, num_gpus=manifest.workers.gpus, max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        )  # fmt: skip
        waiting[probe.remote(run_url, datasets)] = node
    ready, late = ray.wait(list(waiting), num_returns=len(waiting), timeout=PROBE_SECONDS) if waiting else ([], [])
    why = "Is it overloaded, or do other jobs have its GPUs?" if manifest.workers.gpus else "Is it overloaded?"
    for answer in late:
        yield f"machine {waiting[answer]['NodeManagerAddress']}: no answer after {PROBE_SECONDS:g} s. {why}"
    for answer in ready:
        where = waiting[answer]["NodeManagerAddress"]
        try:
            seen = ray.get(answer)
        except ray.exceptions.RayError as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            yield f"machine {where}: {storage.redact(last[:300])}. Are moviola's dependencies installed there?"
            continue
        for fault in seen["faults"]:
            yield f"machine {where}: {fault}"
        held = min(room(manifest, waiting[answer]["Resources"]), manifest.workers.greatest)
        if needed * held > seen["memory"]:
            yield (
                f"machine {where}: {held} workers need about {needed * held / 2**30:.1f} GiB of memory, it has "
                f"{seen['memory'] / 2**30:.1f}. Lower batch, micro_batch or data.memory_mb, or raise workers.cpus"
            )
        yield from submit.gpu_faults(memory, seen["gpus"])
        for fault in submit.disk_faults(manifest, facts["checkpoint_bytes"], run_url, seen["disk"]):
            yield f"machine {where}: {fault}"


def _probe(run_url: str, datasets: list[str]) -> dict[str, Any]:
    """What a worker on this machine would meet."""
    import psutil

    faults = []
    try:
        storage.read_bytes(storage.join(run_url, "manifest.yaml"))
        fault = submit.unwritable(run_url)
    except InputError as error:
        fault = str(error)
    if fault:
        faults.append(f"the run's storage can't be read and written: {fault}")
    for url in datasets:
        try:
            storage.size(storage.join(url, "index.json"))
        except InputError as error:
            faults.append(f"dataset {storage.redact(url)} can't be read: {error}")
    gpus: list[int] = []
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        import torch

        gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory().total
    return {"faults": faults, "memory": memory, "gpus": gpus, "disk": submit.free_bytes(run_url)}


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m cluster.job", description=__doc__)
    parser.add_argument("run_url", help="the run's folder on storage")
    parser.add_argument("--launch", required=True, help="name of this job")
    options = parser.parse_args()
    sys.exit(guarded(lambda: drive(options.run_url, options.launch)))


if __name__ == "__main__":
    main()
