"""A run handed to something that outlives the command: a Ray of its own on this machine, a Ray cluster, or KubeRay.

What is to be run lies on the run's storage before anything is asked to run it; ``cluster/job.py`` reads it there.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster import kubernetes, runs
from cluster.events import Follower, note
from pipelines import storage
from pipelines.faults import InputError, near
from trainer import plan
from trainer import run as folder
from trainer.manifest import LEAVE_SECONDS, RunManifest

PACKAGES = ("pipelines", "trainer", "cluster")
PASSED_ON = ("MOVIOLA_S3_ENDPOINT", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
"""Variables that a cluster's workers get from here. Keys are none of them: a cluster has its own, or roles."""
PROCESS_BYTES = 3 << 30
"""Python, torch and DeepSpeed of one rank and of its spare, beside data and state."""
SCRATCH_BYTES = 2 << 30
"""A pod's scratch, beside the model's weights from a hub: Ray's logs, TensorBoard's files, the networks of losses."""
FASTEST_BYTES_PER_SECOND = 1 << 30
"""More than one worker uploads; a checkpoint that takes too long at this rate takes too long at any."""
ENDED = {"SUCCEEDED": "done", "STOPPED": "stopped", "FAILED": "failed"}


@dataclass(frozen=True)
class Submitted:
    """A run that goes on by itself; ``job`` is its name where it runs, None where there was nothing left to do.

    ``warning`` is what may keep it from beginning.
    """

    name: str
    url: str
    cluster: str
    job: str | None
    warning: str | None = None


def submit(manifest: RunManifest, runs_url: str, target: str) -> Submitted:
    """Judges the manifest for ``target`` (``local``, ``http://HOST:8265`` or ``kubernetes``) and hands the run over.

    A run of the same manifest goes on from its last commit. Raises InputError with all faults at once, or where the run
    is running, the name is taken by another manifest, or the target refuses.
    """
    known(target)
    if not [*_places(manifest, runs_url, target), *folder.data_faults(manifest)] and unwritable(runs_url) is None:
        _refuse_taken(manifest, runs_url)  # before the seconds of a dry run
    faults = list(judge(manifest, runs_url, target))
    try:
        client = connect(target, manifest)
    except InputError as error:
        if not faults:
            raise
        faults.append(str(error))
    if faults:
        listing = "\n  ".join(dict.fromkeys(faults))
        raise InputError(f"{manifest.name} can't run on {target}:\n  {listing}", status=2)
    _refuse_taken(manifest, runs_url)
    job = f"{manifest.name}-{secrets.token_hex(3)}"
    launch = {"cluster": target, "job": job}
    if target == "kubernetes":
        launch["namespace"] = _required(manifest.kubernetes).namespace
    claimed, run_url = folder.claim(manifest, runs_url, launch)
    if folder.is_done(claimed, run_url):
        note(run_url, "done", step=claimed.schedule.steps)
        return Submitted(claimed.name, run_url, target, None)
    warning = None
    try:
        if target == "local":
            _start_here(run_url, job)
        elif target == "kubernetes":
            if (warning := kubernetes.shortage(client, claimed)) is not None:
                note(run_url, "warning", message=warning)
            kubernetes.create(client, kubernetes.render(claimed, run_url, job, environment()))
        else:
            _start_there(client, run_url, job)
    except InputError as error:
        note(run_url, "failed", message=str(error))
        raise
    return Submitted(claimed.name, run_url, target, job, warning)


def _refuse_taken(manifest: RunManifest, runs_url: str) -> None:
    """Raises InputError where the name is another manifest's, or its run is under way."""
    if folder.load(folder.url_of(runs_url, manifest.name), missing_ok=True) is None:
        return
    _, run_url = folder.same(manifest, runs_url)
    state = refresh(run_url)
    if state.state in ("running", "waiting") or (state.state == "silent" and _held(run_url)):
        raise InputError(
            f"run {manifest.name} is {state.state} already (attempt {state.attempt}). "
            f"`moviola logs {manifest.name} -f` follows it; to move it, `moviola stop {manifest.name}` first"
        )


def connect(target: str, manifest: RunManifest) -> Any:
    """The client of a target; raises InputError where it is none, or does not answer."""
    if target == "local":
        return None
    if target == "kubernetes":
        if manifest.kubernetes is None:
            raise InputError(kubernetes.MISSING, status=2)
        api = kubernetes.connect()
        kubernetes.check(api, manifest.kubernetes.namespace)
        return api
    known(target)
    return _ray(target)


def known(target: str) -> None:
    """Raises InputError where ``target`` is no cluster."""
    if target in ("local", "kubernetes"):
        return
    with contextlib.suppress(ValueError):
        parts = urlsplit(target)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port is not None:
            if parts.username or parts.password:
                raise InputError("--cluster: keys don't belong in the address; set RAY_AUTH_TOKEN", status=2)
            return
    raise InputError(
        f"--cluster {storage.redact(target)!r}: no cluster{near(target, ('local', 'kubernetes'))} Use local, "
        "http://HOST:8265 (the address of Ray's dashboard) or kubernetes",
        status=2,
    )


def _ray(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    parts = urlsplit(address)
    with _asking(f"no Ray answers at {address}", AT_ITS_DASHBOARD):
        socket.create_connection((parts.hostname, parts.port or 80), 5).close()
        return JobSubmissionClient(address)


AT_ITS_DASHBOARD = "It is the dashboard's address, port 8265 unless it was moved"
TOKEN = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token"


@contextlib.contextmanager
def _asking(what: str, remedy: str = "") -> Iterator[None]:
    """Whatever a Ray cluster answers in place of what it was asked for, as an InputError that begins with ``what``."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except (OSError, RuntimeError, ValueError, LookupError, AuthenticationError) as error:
        said = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = storage.redact(said[0][:300]).rstrip(".: ")
        remedy = TOKEN if isinstance(error, AuthenticationError) else remedy
        raise InputError(f"{what}: {reason}" + (f". {remedy}" if remedy else "")) from None


def environment() -> dict[str, str]:
    """What a cluster's processes need to find storage. An endpoint with keys is left out: :func:`judge` tells of it."""
    given = {name: os.environ.get(name, "") for name in PASSED_ON}
    return {name: value for name, value in given.items() if value and not storage.holds_keys(value)}


def judge(manifest: RunManifest, runs_url: str, target: str) -> Iterator[str]:
    """What only shows of the manifest and the target together: field, value, reason, remedy."""
    if target == "kubernetes" and manifest.kubernetes is None:
        yield kubernetes.MISSING
    places = list(_places(manifest, runs_url, target))
    yield from places
    fault = None if places else unwritable(runs_url)
    if fault:
        yield f"--runs: {fault}"
    data = folder.data_faults(manifest)
    yield from data
    if target == "local":
        yield from _too_few_gpus(manifest)
    if not manifest.holds:
        return
    try:
        facts = plan.dry_run(manifest)
    except InputError as error:  # latents that can't be opened, whose layout decides the model
        if not data:
            yield str(error)
        return
    fewest = facts["memory"][0]
    share, seconds = facts["checkpoint_bytes"] / fewest["workers"], manifest.failure.grace_seconds
    if seconds > LEAVE_SECONDS and LEAVE_SECONDS + 2 * share / FASTEST_BYTES_PER_SECOND > seconds:
        yield (
            f"failure.grace_seconds: {seconds:g}: each of {fewest['workers']} workers commits {_size(share)} twice "
            "in the notice, too much even at 1 GiB/s. Raise workers.count, or this where the notice is longer"
        )
    spec = manifest.kubernetes
    if target == "kubernetes" and spec is not None:
        needed, has = host_bytes(manifest, fewest) * spec.workers_per_pod, spec.memory_gb << 30
        if needed > has:
            yield (
                f"kubernetes.memory_gb: {spec.memory_gb}: {spec.workers_per_pod} workers need about {_size(needed)} "
                "for data, model states and Python itself. Raise it, or lower batch, micro_batch or data.memory_mb"
            )
        needed, has = SCRATCH_BYTES + 4 * facts["parameters"]["total"], spec.disk_gb << 30
        if needed > has:
            yield (
                f"kubernetes.disk_gb: {spec.disk_gb}: Ray's logs, and the weights that a hub gives, take up to "
                f"{_size(needed)}, and a pod that writes more is evicted. Raise it"
            )
    if target == "local":
        yield from _here(manifest, fewest)
    if target == "local" and not fault:
        yield from disk_faults(manifest, facts["checkpoint_bytes"], runs_url, free_bytes(runs_url))


def _places(manifest: RunManifest, runs_url: str, target: str) -> Iterator[str]:
    """Storage that the cluster can't reach, and keys that it would show to everyone."""
    if target == "local":
        return
    stages = manifest.schedule.stages if manifest.holds else ()
    places = [("--runs", runs_url)]
    places += [(f"data.train.{i}.dataset", ref.dataset) for i, ref in enumerate(manifest.data.train)]
    places += [(f"data.images.{i}.dataset", ref.dataset) for i, ref in enumerate(manifest.data.images)]
    places += [("data.eval", manifest.data.eval)] if manifest.data.eval else []
    places += [(f"stages.{stage.name}.init_from", stage.init_from) for stage in stages if stage.init_from]
    places += [
        (f"stages.{stage.name}.teachers.{name}", url) for stage in stages for name, url in stage.teachers.items()
    ]
    near_by = target != "kubernetes" and kubernetes.loopback(urlsplit(target).hostname or "")
    for field, url in places:
        if re.search(r"://[^/\s]*@", url):
            yield (
                f"{field}: {storage.redact(url)}: keys in a URL would stand in the cluster's list of jobs. Give the "
                "cluster's machines keys or a role of their own"
            )
            continue
        try:
            remote = storage.is_remote(url)
        except InputError as error:
            yield f"{field}: {error}"
            continue
        if not remote and target == "kubernetes":
            yield f"{field}: {url}: a folder of this machine, which pods don't have. Use s3://BUCKET/PREFIX"
        elif not remote and not near_by and not url.startswith(("/", "file:")):
            yield (
                f"{field}: {url}: a folder of this machine. Use s3://BUCKET/PREFIX, or the full path of a folder that "
                "all machines of the cluster share"
            )
    for name in ("MOVIOLA_S3_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        endpoint = os.environ.get(name, "")
        if storage.holds_keys(endpoint):
            yield (
                f"{name}: {storage.redact(endpoint)}: keys in an endpoint would stand in the cluster's list of jobs. "
                "Give the cluster's machines keys or a role of their own"
            )
        if near_by or not kubernetes.loopback(urlsplit(endpoint).hostname or ""):
            continue
        yield (
            f"{name}: {storage.redact(endpoint)}: this machine's loopback, where the cluster's machines "
            "find nothing. Name the store as they see it"
        )


def unwritable(url: str) -> str | None:
    """Why nothing can be written to a folder or prefix, or to where it would be made; None where it can.

    Leaves nothing there.
    """
    try:
        if storage.is_remote(url):
            mark = storage.join(url, f".probe-{secrets.token_hex(4)}")
            storage.write_bytes(mark, b"")
            storage.delete(mark)
        else:
            here = _existing(url)
            tempfile.TemporaryFile(dir=here).close()
    except InputError as error:
        return str(error)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        return f"{url}: {here} can't be written by user {os.getuid()}: {why}. Mend that, or name another folder"
    return None


def free_bytes(url: str) -> int | None:
    """What is free on the disk of a folder; None of a store, which has no end."""
    return None if storage.is_remote(url) else shutil.disk_usage(_existing(url)).free


def disk_faults(manifest: RunManifest, checkpoint_bytes: int, url: str, free: int | None) -> Iterator[str]:
    """Whether ``free`` bytes hold the checkpoints that are kept."""
    keep = manifest.checkpoint.keep
    kept = checkpoint_bytes * (keep + 1)
    if free is not None and kept > free:
        yield (
            f"checkpoint.keep: {keep}: that many checkpoints and one in the making take {_size(kept)}, and {url} has "
            f"{_size(free)} free. Lower it, or name another folder (--runs)"
        )


def host_bytes(manifest: RunManifest, memory: Mapping[str, Any]) -> int:
    """Main memory of one worker: data, and the model's states once on a GPU's host (a checkpoint's snapshot), else with
    activations and the snapshot.
    """
    states = memory["model_states"]
    own = states if manifest.workers.gpus else 2 * states + (memory["activations"] or 0)
    return PROCESS_BYTES + (manifest.data.memory_mb << 20) + own


def _here(manifest: RunManifest, memory: Mapping[str, Any]) -> Iterator[str]:
    """What this machine lacks for the fewest workers."""
    import psutil
    import torch

    workers = manifest.workers
    needed, has = host_bytes(manifest, memory) * workers.least, psutil.virtual_memory().total
    if needed > has:
        yield (
            f"workers.count: {workers.least}: they need about {_size(needed)} of memory, this machine has "
            f"{_size(has)}. Lower it, batch, micro_batch or data.memory_mb"
        )
    if workers.gpus:
        devices = range(torch.cuda.device_count())
        yield from gpu_faults(memory, [torch.cuda.get_device_properties(i).total_memory for i in devices][:1])


def _too_few_gpus(manifest: RunManifest) -> Iterator[str]:
    import torch

    workers, devices = manifest.workers, torch.cuda.device_count()
    if workers.gpus * workers.least > devices:
        yield (
            f"workers.gpus: {workers.gpus:g}: {workers.least} workers ask for {workers.gpus * workers.least:g} GPUs, "
            f"this machine has {devices}. Lower workers.count or workers.gpus (0 trains on CPU), or use another cluster"
        )


def gpu_faults(memory: Mapping[str, Any], sizes: list[int]) -> Iterator[str]:
    """Whether what a rank keeps on its GPU fits the smallest of ``sizes`` (bytes)."""
    needed = memory["model_states"] + (memory["activations"] or 0)
    if sizes and needed > min(sizes):
        yield (
            f"micro_batch: a rank keeps about {_size(needed)} on its GPU, which has {_size(min(sizes))}. Lower it, "
            "raise zero.stage or workers.count, or set the model's recomputation"
        )


def _size(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:,.1f} MiB"


def _existing(path: str) -> Path:
    here = Path(storage.absolute(path).removeprefix("file://"))
    return next(parent for parent in (here, *here.parents) if parent.exists())


def _start_here(run_url: str, job: str) -> None:
    """A process of its own session, which goes on when the terminal closes."""
    local = not storage.is_remote(run_url)
    log = Path(run_url.removeprefix("file://") if local else tempfile.gettempdir()) / ("driver.log" if local else job)
    surroundings = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.job", run_url, "--launch", job],
            stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=surroundings, start_new_session=True,
        )  # fmt: skip
    note(run_url, "driver", job=job, host=socket.gethostname(), pid=process.pid, log=str(log))


AGENT_SECONDS = 60.0
NO_AGENT = "No available agent to submit job"
"""What a Ray answers whose head has only just started, or whose agent finds its port taken."""
UNKNOWN_JOB = "status code 404"
"""In what a Ray answers that has been started anew."""


def _start_there(client: Any, run_url: str, job: str) -> None:
    """A job of a Ray cluster, with this code as its working directory."""
    with tempfile.TemporaryDirectory(prefix="moviola-code-") as staged:
        for package in PACKAGES:
            source = Path(__file__).parents[1] / package
            shutil.copytree(source, Path(staged) / package, ignore=shutil.ignore_patterns("__pycache__"))
        deadline = time.monotonic() + AGENT_SECONDS
        while True:
            try:
                with _asking("the cluster refused the job"):
                    client.submit_job(
                        entrypoint=entrypoint(run_url, job),
                        submission_id=job,
                        runtime_env={"working_dir": staged, "env_vars": environment()},
                        metadata={"moviola-run-url": run_url},
                    )
                return
            except InputError as error:
                if NO_AGENT not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise InputError(
                        f"{error}: none came up on the head in {AGENT_SECONDS:.0f} s. Another Ray there may hold its "
                        "port: start the head with --dashboard-agent-listen-port of a free one (52365 is the default)"
                    ) from None
                time.sleep(1)


def entrypoint(run_url: str, job: str) -> str:
    """The shell command that drives a run on a Ray cluster: with the cluster's python, or the one of this path.

    A cluster that was started as ``.venv/bin/ray start`` has another python in its PATH, or none.
    """
    has_all = shlex.quote("from importlib.util import find_spec as f; exit(not all(map(f, ('ray', 'torch'))))")
    drive = shlex.join(["-m", "cluster.job", run_url, "--launch", job])
    return (
        f'for python in python {shlex.quote(sys.executable)}; do "$python" -c {has_all} 2>&- && exec "$python" {drive}'
        "; done; echo 'no python here has ray and torch: install what moviola needs, and start Ray with it' >&2; exit 1"
    )


def refresh(run_url: str) -> runs.Status:
    """A run's status from storage. Where a cluster has it and nothing was heard, the cluster is asked how it ended."""
    state = runs.status(run_url)
    if state.state not in ("waiting", "silent"):
        return state
    launch = runs.launched(runs.events(run_url)) or {}
    with contextlib.suppress(InputError):  # a cluster that is gone can't be asked
        if said := _said(launch):
            outcome, why = said
            if outcome == "stopped":
                note(run_url, "stopped", step=state.last_commit_step or 0)
            elif outcome == "failed" or state.state == "waiting":
                note(run_url, "failed", message=f"{launch['cluster']}: job {launch['job']}: {why}")
            return runs.status(run_url)
    return state


def _said(launch: Mapping[str, Any]) -> tuple[str, str] | None:
    cluster = launch.get("cluster", "local")
    if cluster == "local":
        return None
    if cluster == "kubernetes":
        return kubernetes.outcome(kubernetes.connect(), launch["namespace"], launch["job"])
    job, client = launch["job"], _ray(cluster)
    try:
        with _asking(f"{cluster} can't tell of job {job}"):
            info = client.get_job_info(job)
    except InputError as error:
        if UNKNOWN_JOB not in str(error):
            raise
        return "failed", str(error)
    ended = ENDED.get(str(getattr(info.status, "value", info.status)))
    return (ended, storage.redact((info.message or "no reason given").strip())) if ended else None


def _held(run_url: str) -> bool:
    """Whether the cluster of a run that is not heard of still has its job; False where it can't be asked."""
    launch = runs.launched(runs.events(run_url)) or {}
    with contextlib.suppress(InputError):
        return launch.get("cluster", "local") != "local" and _said(launch) is None
    return False


def stop(run_url: str, warn: Callable[[str], None] = lambda text: None) -> runs.State:
    """Asks for a committed checkpoint and the end; gives the run's state.

    A job that no machine has begun with is taken back, and a run whose process is gone is over: both are ``stopped``.
    So is a job that waits on a cluster which does not answer; ``warn`` is told.
    """
    runs.ask_to_stop(run_url, "moviola stop")
    happened = runs.events(run_url)
    state, launch = runs.status(run_url), runs.launched(happened) or {}
    if state.state == "silent" and runs.gone(happened):
        note(run_url, "stopped", step=state.last_commit_step or 0)
        return "stopped"
    if state.state != "waiting":
        return state.state
    try:
        if launch["cluster"] == "kubernetes":
            kubernetes.delete(kubernetes.connect(), launch["namespace"], launch["job"])
        else:
            with _asking("the cluster refused"):
                _ray(launch["cluster"]).stop_job(launch["job"])
    except InputError as error:
        warn(f"job {launch['job']} could not be taken back; if it ever begins, it ends at once: {error}")
    note(run_url, "stopped", step=state.last_commit_step or 0)
    return "stopped"


def follow(run_url: str, show: Callable[[str], None], *, forever: bool) -> runs.State:
    """Shows what a run says, all of it so far and, with ``forever``, what comes until it ends; gives its last state.

    It is ``silent`` where the run can't go on by itself: its process is gone.
    """
    logs = [Follower(storage.join(run_url, f"{name}.jsonl")) for name in ("events", "metrics")]
    seen = [runs.events(run_url), runs.metrics(run_url)]
    for line in runs.story(*seen):
        show(line)
    state = refresh(run_url)
    pause, asked, silent = 2.0 if storage.is_remote(run_url) else 0.5, time.monotonic(), False
    while forever and state.state not in ("done", "stopped", "failed"):
        if state.state == "silent" and runs.gone(happened := runs.events(run_url)):
            log = next((f" (it wrote {event['log']})" for event in reversed(happened) if "log" in event), "")
            show(
                f"the process of {state.name} is gone{log}; `moviola resume {state.name}` goes on from its last commit"
            )
            break
        if state.state == "silent" and not silent:
            show(f"nothing was heard of {state.name} for a while; `moviola status {state.name}` says what is known")
        silent = state.state == "silent"
        time.sleep(pause)
        fresh = [[r for r in log.new() if r not in old] for log, old in zip(logs, seen, strict=True)]
        seen = [[], []]
        for line in runs.story(*fresh):
            show(line)
        if any(event["event"] in ("done", "stopped", "failed") for event in fresh[0]) or time.monotonic() - asked > 10:
            state, asked = refresh(run_url), time.monotonic()
    return state.state


def _required(value: Any) -> Any:
    assert value is not None
    return value
