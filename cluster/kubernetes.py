"""A run as KubeRay's RayJob (ray.io/v1): rendered from the manifest, applied by the official client.

manifests/kubernetes/rayjob.yaml is a rendered one, with the meaning of each field.
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import math
import shlex
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from pipelines import storage
from pipelines.faults import InputError
from trainer.manifest import KubernetesSpec, RunManifest

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
METRICS_PORT = 9464
RAY_METRICS_PORT = 8080
HEAD_CPUS, HEAD_MEMORY_GB = 2, 8
"""The head trains nothing: Ray's own processes, the run's driver, and Ray Train's controller."""
USER = 10001
"""The user of the Dockerfile."""
KILL_SECONDS = 15
"""From the end of the notice to SIGKILL: Ray leaves in it."""
FINISHED_SECONDS = 600
"""How long a finished RayJob, its cluster and its logs stay."""
SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""What GKE and AKS put on spot nodes by themselves; EKS and Karpenter put nothing unless they are told to."""
SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
STATES = {"SUCCEEDED": "done", "FAILED": "failed", "STOPPED": "stopped"}
OVER = ("Complete", "Failed", "ValidationFailed")
"""A RayJob's deployment states that no other follows."""


def render(manifest: RunManifest, run_url: str, launch: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """The RayJob of a launch, as plain data. ``environment`` holds no secrets; those come from ``kubernetes.secrets``.

    Raises InputError where the manifest has no ``kubernetes`` part.
    """
    spec, workers = manifest.kubernetes, manifest.workers
    if spec is None:
        raise InputError(MISSING, status=2)
    labels = {
        "app.kubernetes.io/name": "moviola",
        "app.kubernetes.io/instance": manifest.name,
        "app.kubernetes.io/part-of": "moviola",
    }
    grows = workers.least != workers.greatest
    grace = math.ceil(manifest.failure.grace_seconds)
    variables = {
        "HOME": "/tmp",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(grace),
        "RAY_USAGE_STATS_ENABLED": "0",
        **({"MOVIOLA_CLUSTER_GROWS": "1"} if grows else {}),
        **environment,
    }
    ports = {"moviola": manifest.telemetry.port or METRICS_PORT, "metrics": RAY_METRICS_PORT}
    queue = {} if spec.queue is None else {"kueue.x-k8s.io/queue-name": spec.queue}
    cluster: dict[str, Any] = {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
            "template": _pod(spec, "ray-head", labels, variables, HEAD_CPUS, HEAD_MEMORY_GB, token=grows, ports=ports),
        },
        "workerGroupSpecs": [_workers(manifest, spec, labels, variables, grace)],
    }
    if grows:
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 60,
            "securityContext": SECURITY,
            "resources": {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"cpu": "500m", "memory": "1Gi"}},
        }
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": launch,
            "namespace": spec.namespace,
            "labels": labels | queue,
            "annotations": {"moviola-run-url": run_url},
        },
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "cluster.job", run_url, "--launch", launch]),
            "submissionMode": "K8sJobMode",
            "backoffLimit": spec.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": FINISHED_SECONDS,
            **({"suspend": True} if queue else {}),
            "submitterPodTemplate": {
                **_pod(spec, "ray-job-submitter", labels, variables, 1, 1),
            },
            "rayClusterSpec": cluster,
        },
    }


MISSING = (
    "kubernetes: missing: a RayJob needs an image at least. Build it with `docker build`, push it where the cluster's "
    "nodes can pull it, and add kubernetes: {image: REGISTRY/moviola:TAG}"
)


def loopback(host: str) -> bool:
    """Whether nobody but this machine, or this pod, is behind the name or address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def scraped(manifest: RunManifest) -> RunManifest:
    """With metrics on the pod's network, at a known port, where they would be on loopback: a PodMonitor reads them."""
    telemetry = manifest.telemetry
    bind = "0.0.0.0" if loopback(telemetry.bind) else telemetry.bind
    pod = telemetry.model_copy(update={"bind": bind, "port": telemetry.port or METRICS_PORT})
    return manifest.model_copy(update={"telemetry": pod})


def _workers(
    manifest: RunManifest, spec: KubernetesSpec, labels: Mapping[str, str], variables: Mapping[str, str], grace: int
) -> dict[str, Any]:
    workers, each = manifest.workers, spec.workers_per_pod
    cpus, gpus = workers.cpus * each, round(workers.gpus * each)
    first = (manifest.telemetry.port or METRICS_PORT) + 1
    ports = {f"moviola-{rank}": first + rank for rank in range(each)} | {"metrics": RAY_METRICS_PORT}
    pod = _pod(spec, "ray-worker", labels, variables, cpus, spec.memory_gb, gpus=gpus, ports=ports)
    taints = [{"key": key, "operator": "Equal", "value": value} for key, value in SPOT_TAINTS if spec.spot]
    taints += [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}] if gpus else []
    taints += [taint.model_dump(exclude_none=True) for taint in spec.tolerations]
    pod["spec"] |= {
        "terminationGracePeriodSeconds": grace + KILL_SECONDS,
        "tolerations": taints,
        **({"nodeSelector": dict(spec.node_selector)} if spec.node_selector else {}),
    }
    return {
        "groupName": "workers",
        "replicas": workers.least // each,
        "minReplicas": workers.least // each,
        "maxReplicas": workers.greatest // each,
        "rayStartParams": {"num-cpus": str(math.ceil(cpus)), "num-gpus": str(gpus)},
        "template": pod,
    }


def _pod(
    spec: KubernetesSpec,
    container: str,
    labels: Mapping[str, str],
    variables: Mapping[str, str],
    cpus: float,
    memory_gb: int,
    *,
    gpus: int = 0,
    token: bool = False,
    ports: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A pod of one container, which may write to /tmp and /dev/shm alone. ``token`` is what the autoscaler needs."""
    amounts = {"cpu": f"{max(1, round(cpus * 1000))}m", "memory": f"{memory_gb}Gi"}
    amounts |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
    return {
        "metadata": {"labels": dict(labels)},
        "spec": {
            **({"serviceAccountName": spec.service_account} if spec.service_account else {}),
            "automountServiceAccountToken": token or spec.service_account is not None,
            **({} if ports else {"restartPolicy": "Never"}),
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": container,
                    "image": spec.image,
                    "securityContext": SECURITY,
                    "resources": {"requests": amounts, "limits": amounts},
                    "env": [{"name": name, "value": value} for name, value in variables.items()],
                    "envFrom": [{"secretRef": {"name": name}} for name in spec.secrets],
                    **({"ports": [{"name": n, "containerPort": p} for n, p in ports.items()]} if ports else {}),
                    "volumeMounts": [
                        {"name": "scratch", "mountPath": "/tmp"},
                        {"name": "shared-memory", "mountPath": "/dev/shm"},
                    ],
                }
            ],
            "volumes": [
                {"name": "scratch", "emptyDir": {"sizeLimit": f"{spec.disk_gb}Gi"}},
                {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{memory_gb}Gi"}},
            ],
        },
    }


def text(job: Mapping[str, Any]) -> str:
    """The RayJob as YAML, every field written out."""
    return yaml.safe_dump(json.loads(json.dumps(job)), sort_keys=False, width=120)


def connect() -> Any:
    """The API for custom resources, of the cluster that KUBECONFIG or a pod's service account names.

    Raises InputError where the client is not installed or no cluster is named.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise InputError("the kubernetes client is missing: pip install 'moviola[kubernetes]'", status=2) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints of a file that is not there
            config.load_config()
    except (config.ConfigException, OSError, yaml.YAMLError, ValueError, TypeError, LookupError) as error:
        message = storage.redact(str(error).splitlines()[0]).rstrip(".")
        if isinstance(error, yaml.YAMLError | ValueError | TypeError | LookupError):
            message = f"its file can't be read ({message})"
        raise InputError(f"no Kubernetes cluster is named: {message}. Set KUBECONFIG", status=2) from None
    return client.CustomObjectsApi()


def shortage(api: Any, manifest: RunManifest) -> str | None:
    """What is said where the nodes that are there can't hold the fewest workers' pods, whatever else runs on them.

    No fault: an autoscaler may bring nodes. None where they can, or where the nodes may not be listed.
    """
    from kubernetes.client import CoreV1Api
    from kubernetes.utils import parse_quantity

    spec, workers = manifest.kubernetes, manifest.workers
    assert spec is not None
    try:
        nodes = _call(CoreV1Api(api.api_client).list_node).items
    except InputError:
        return None
    each = spec.workers_per_pod
    needs = {"nvidia.com/gpu": workers.gpus * each, "cpu": workers.cpus * each, "memory": spec.memory_gb << 30}
    room = 0
    for node in nodes:
        labels, has = node.metadata.labels or {}, node.status.allocatable or {}
        if not node.spec.unschedulable and spec.node_selector.items() <= labels.items():
            room += min(int(float(parse_quantity(has.get(kind, 0))) / need) for kind, need in needs.items() if need)
    wanted = workers.least // each
    if room >= wanted:
        return None
    gpus = f"{needs['nvidia.com/gpu']:g} GPUs, " if workers.gpus else ""
    return (
        f"the cluster's {len(nodes)} nodes hold {room} of {wanted} worker pods of {gpus}{needs['cpu']:g} CPUs and "
        f"{spec.memory_gb} GiB; the run waits until an autoscaler brings more, or for ever. Look at workers, and at "
        "kubernetes.workers_per_pod, memory_gb and node_selector"
    )


def create(api: Any, job: Mapping[str, Any]) -> None:
    """Creates the RayJob; raises InputError with the API server's reason where it refuses."""
    _call(api.create_namespaced_custom_object, GROUP, VERSION, job["metadata"]["namespace"], PLURAL, job)


def check(api: Any, namespace: str) -> None:
    """Raises InputError where RayJobs can't be handled there: no KubeRay, no permission, no answer."""
    _call(api.list_namespaced_custom_object, GROUP, VERSION, namespace, PLURAL, limit=1)


def delete(api: Any, namespace: str, name: str) -> None:
    """Deletes the RayJob and, with it, its cluster."""
    _call(api.delete_namespaced_custom_object, GROUP, VERSION, namespace, PLURAL, name)


def outcome(api: Any, namespace: str, name: str) -> tuple[str, str] | None:
    """How the RayJob ended (``done``, ``failed``, ``stopped``) and why; None while it has not."""
    try:
        job = _call(api.get_namespaced_custom_object, GROUP, VERSION, namespace, PLURAL, name)
    except Gone:
        return "failed", f"RayJob {namespace}/{name} is gone"
    state = job.get("status", {})
    if state.get("jobDeploymentStatus") not in OVER:
        return None
    why = state.get("message") or state.get("reason") or "no reason given"
    return STATES.get(state.get("jobStatus", ""), "failed"), storage.redact(str(why))


class Gone(InputError):
    """The API server does not know the object, or the kind."""


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return function(*arguments, _request_timeout=(5, 30), **options)
    except ApiException as error:
        reason = storage.redact(_message(error))
        if error.status == 404:
            raise Gone(f"Kubernetes: {reason}. Is KubeRay installed there, and the namespace right?") from None
        if error.status in (401, 403):
            raise InputError(f"Kubernetes refused: {reason}. RayJobs need get, list, create and delete") from None
        raise InputError(f"Kubernetes refused ({error.status}): {reason}") from None
    except (HTTPError, OSError) as error:
        cause = getattr(error, "reason", error)
        raise InputError(f"the Kubernetes API server does not answer: {storage.redact(str(cause))}") from None


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
