"""What is rendered for KubeRay is what KubeRay takes: its published schema, its own rules, and ours."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster import kubernetes
from pipelines.faults import InputError
from tests.cluster.conftest import faults
from trainer import manifest as manifests

ROOT = Path(__file__).parents[2]
PLAIN = {
    "name": "small",
    "recipe": "arvae",
    "model": {"down": 8},
    "data": {"train": "s3://videos/vimeo90k"},
    "batch": 64,
    "kubernetes": {"image": "registry.example/moviola:0.1"},
}
RUN = "s3://runs/small"
ENVIRONMENT = {"MOVIOLA_S3_ENDPOINT": "https://store.example"}


def rendered(**changes):
    plain = {**PLAIN, **changes}
    manifest = manifests.validate(plain, "m")
    return manifest, kubernetes.render(manifest, RUN, f"{manifest.name}-0a1b2c", ENVIRONMENT)


def pods(job):
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        "worker": workers["template"],
        "submitter": job["spec"]["submitterPodTemplate"],
    }


def container(pod):
    (only,) = pod["spec"]["containers"]
    return only


label = st.from_regex(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,10}[A-Za-z0-9])?", fullmatch=True)
dns = st.from_regex(r"[a-z]([-a-z0-9]{0,20}[a-z0-9])?", fullmatch=True)
taints = st.one_of(
    st.builds(lambda key: {"key": key}, label),
    st.builds(
        lambda key, value: {"key": key, "operator": "Equal", "value": value, "effect": "NoExecute"}, label, label
    ),
)


@st.composite
def runs(draw):
    """Manifests whose pods can be made."""
    each = draw(st.sampled_from([1, 2, 4, 8]))
    least, more = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    spec = {
        "image": draw(st.sampled_from(["moviola", "ghcr.io/a/b@sha256:0f", "registry:5000/moviola:0.1-rc_1"])),
        "namespace": draw(dns),
        "spot": draw(st.booleans()),
        "tolerations": draw(st.lists(taints, max_size=3)),
        "node_selector": draw(st.dictionaries(label, label, max_size=2)),
        "service_account": draw(st.none() | dns),
        "secrets": draw(st.lists(dns, max_size=2)),
        "workers_per_pod": each,
        "memory_gb": draw(st.integers(1, 2000)),
        "disk_gb": draw(st.integers(1, 2000)),
        "retries": draw(st.integers(0, 5)),
        "queue": draw(st.none() | dns) if not more else None,
    }
    count = [least * each, (least + more) * each] if more else least * each
    return {
        "name": draw(st.from_regex(manifests.NAME, fullmatch=True)),
        "workers": {"count": count, "gpus": draw(st.integers(0, 2)), "cpus": draw(st.sampled_from([0.5, 1, 3.7, 96]))},
        "failure": {"grace_seconds": draw(st.floats(3.5, 7200))},
        "kubernetes": spec,
    }


@settings(max_examples=40, deadline=None)
@given(plain=runs())
def test_every_rayjob_obeys_kuberays_schema_and_rules(crds, plain):
    manifest, job = rendered(**plain)
    assert faults(crds["RayJob"], job) == []
    spec, cluster, made = job["spec"], job["spec"]["rayClusterSpec"], pods(job)
    (workers,) = cluster["workerGroupSpecs"]

    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"]) and len(job["metadata"]["name"]) <= 47
    assert spec["shutdownAfterJobFinishes"] and "clusterSelector" not in spec and spec["backoffLimit"] >= 0
    queued = "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    assert queued == spec.get("suspend", False) and not (queued and cluster["enableInTreeAutoscaling"])
    assert all("restartPolicy" not in made[kind]["spec"] for kind in ("head", "worker"))

    each = manifest.kubernetes.workers_per_pod
    bounds = workers["minReplicas"] * each, workers["maxReplicas"] * each
    assert bounds == (manifest.workers.least, manifest.workers.greatest)
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert cluster["enableInTreeAutoscaling"] == (bounds[0] < bounds[1])
    assert ("MOVIOLA_CLUSTER_GROWS" in str(made["head"])) == cluster["enableInTreeAutoscaling"]

    worker = container(made["worker"])
    limits = worker["resources"]["limits"]
    assert limits == worker["resources"]["requests"]
    assert int(limits["cpu"].removesuffix("m")) == round(1000 * manifest.workers.cpus * each)
    assert int(limits.get("nvidia.com/gpu", 0)) == manifest.workers.gpus * each
    assert int(workers["rayStartParams"]["num-cpus"]) >= manifest.workers.cpus * each

    variables = {variable["name"]: variable.get("value") for variable in worker["env"]}
    drain = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert manifest.failure.grace_seconds <= drain < made["worker"]["spec"]["terminationGracePeriodSeconds"]

    for pod in made.values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        secured = container(pod)["securityContext"]
        assert secured["readOnlyRootFilesystem"] and secured["capabilities"] == {"drop": ["ALL"]}
        writable = {mount["mountPath"] for mount in container(pod)["volumeMounts"]}
        assert writable == {"/tmp", "/dev/shm"} and {"name": "HOME", "value": "/tmp"} in container(pod)["env"]
        assert [s["secretRef"]["name"] for s in container(pod)["envFrom"]] == list(manifest.kubernetes.secrets)
        named = [port["name"] for port in container(pod).get("ports", [])]
        assert all(len(name) <= 15 for name in named)
    assert "tolerations" not in made["head"]["spec"]
    tolerated = {taint.get("key") for taint in made["worker"]["spec"]["tolerations"]}
    assert ("cloud.google.com/gke-spot" in tolerated) >= manifest.kubernetes.spot


@pytest.mark.parametrize("path", sorted((ROOT / "manifests").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_manifest_can_be_a_rayjob(crds, path):
    manifest = manifests.load(path, ["kubernetes.image=registry.example/moviola:0.1"])
    job = kubernetes.render(manifest, f"s3://runs/{manifest.name}", f"{manifest.name}-0a1b2c", ENVIRONMENT)
    assert faults(crds["RayJob"], json.loads(json.dumps(job))) == []


def test_metrics_are_where_the_manifest_says(crds):
    _, job = rendered(telemetry={"port": 9000})
    named = {
        port["name"]: port["containerPort"] for pod in pods(job).values() for port in container(pod).get("ports", [])
    }
    assert (named["moviola"], named["moviola-0"]) == (9000, 9001)


def test_no_key_of_this_machine_is_in_a_rayjob(monkeypatch):
    from cluster import submit

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("MOVIOLA_S3_ENDPOINT", "https://me:hush@store.example")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example/?X-Amz-Signature=hush")
    manifest = manifests.validate(PLAIN, "m")
    text = kubernetes.text(kubernetes.render(manifest, RUN, "small-0a1b2c", submit.environment()))
    assert "eu-central-1" in text and "hush" not in text and "AKIA" not in text
    told = "\n".join(submit._places(manifest, "s3://runs", "kubernetes"))
    for name in ("MOVIOLA_S3_ENDPOINT", "AWS_ENDPOINT_URL"):
        assert re.search(rf"^{name}: https://store\.example\S*: keys in an endpoint would stand in", told, re.M)
    assert "hush" not in told


def test_the_commented_rayjob_is_what_is_rendered(crds):
    shown = yaml.safe_load((ROOT / "manifests/kubernetes/rayjob.yaml").read_text())
    plain = {
        **yaml.safe_load((ROOT / "manifests/arvae_16x16.yaml").read_text()),
        "kubernetes": {
            "image": "registry.example/moviola:0.1.0",
            "namespace": "video",
            "secrets": ["moviola-storage"],
            "memory_gb": 32,
        },
    }
    manifest = manifests.validate(plain, "m")
    job = kubernetes.render(manifest, "s3://videos/runs/arvae-16x16", "arvae-16x16-0a1b2c", {"AWS_REGION": "eu-west-1"})
    assert shown == job == yaml.safe_load(kubernetes.text(job))


@pytest.mark.parametrize("path", sorted((ROOT / "manifests/kubernetes").glob("*.yaml")), ids=lambda path: path.name)
def test_the_manifests_for_kubernetes_keep_the_rules(crds, path):
    for resource in yaml.safe_load_all(path.read_text()):
        if resource["kind"] in crds:
            assert faults(crds[resource["kind"]], resource) == []
        assert not re.search(r"(?i)(password|secret|token)\w*:\s*\S*[0-9a-z]{16,}", json.dumps(resource))
        spec = json.dumps(resource)
        if "containers" in spec:
            assert spec.count('"runAsNonRoot": true') == spec.count('"containers"')
            assert "hostPath" not in spec and '"privileged"' not in spec


# -- the API server --------------------------------------------------------------------------------------------------


class ApiServer(BaseHTTPRequestHandler):
    """As much of an API server as the client asks of one: it keeps RayJobs that obey their schema."""

    jobs: dict[str, dict]
    nodes: tuple[dict, ...] = ()
    judge = None
    refused = 0

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status, message):
        self._answer(status, {"kind": "Status", "code": status, "message": message})

    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if found := faults(self.judge, job):
            self._fail(422, found[0])
        else:
            self.jobs[job["metadata"]["name"]] = job
            self._answer(201, job)

    def _one(self):
        return self.jobs.get(self.path.partition("?")[0].rpartition("/")[2])

    def do_GET(self):
        if self.refused:
            return self._fail(self.refused, "no such thing for you")
        if self.path.partition("?")[0] == "/api/v1/nodes":
            return self._answer(200, {"items": self.nodes})
        if self.path.partition("?")[0].endswith("/rayjobs"):
            return self._answer(200, {"items": list(self.jobs.values())})
        job = self._one()
        return self._answer(200, job) if job else self._fail(404, "not found")

    def do_DELETE(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        self._answer(200, self.jobs.pop(name, {}))

    def log_message(self, *_):
        pass


@pytest.fixture
def api(crds, monkeypatch, tmp_path):
    """The client, connected to a server that a kubeconfig names; and the server."""
    handler = type("Handler", (ApiServer,), {"jobs": {}, "judge": crds["RayJob"]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = {"name": "c", "context": {"cluster": "c", "user": "u"}}
    cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
    config = {
        "current-context": "c",
        "contexts": [context],
        "clusters": [cluster],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    yield kubernetes.connect(), handler
    server.shutdown()
    server.server_close()


def test_a_rayjob_is_created_asked_for_and_deleted(api):
    client, server = api
    _, job = rendered()
    name = job["metadata"]["name"]
    kubernetes.check(client, "default")
    kubernetes.create(client, job)
    assert server.jobs[name] == job
    assert kubernetes.outcome(client, "default", name) is None
    server.jobs[name]["status"] = {"jobDeploymentStatus": "Failed", "jobStatus": "", "message": "image can't be pulled"}
    assert kubernetes.outcome(client, "default", name) == ("failed", "image can't be pulled")
    server.jobs[name]["status"] = {"jobDeploymentStatus": "ValidationFailed", "message": "no such field"}
    assert kubernetes.outcome(client, "default", name) == ("failed", "no such field")
    server.jobs[name]["status"] = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
    assert kubernetes.outcome(client, "default", name)[0] == "done"
    kubernetes.delete(client, "default", name)
    assert kubernetes.outcome(client, "default", name) == ("failed", f"RayJob default/{name} is gone")


def test_nodes_that_hold_no_pod_are_told(api):
    client, server = api

    def node(gpus, memory="64Gi", **spec):
        amounts = {"cpu": "7910m", "memory": memory} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        return {"metadata": {"labels": {"zone": "a"}}, "spec": spec, "status": {"allocatable": amounts}}

    def told(**changes):
        spec = {"image": "moviola", "workers_per_pod": 2, "memory_gb": 32, **changes}
        return kubernetes.shortage(client, rendered(workers={"count": 4, "gpus": 1, "cpus": 2}, kubernetes=spec)[0])

    server.nodes = (node(2), node(2, unschedulable=True), node(0), node(1), node(8, "16Gi"))
    assert told().startswith(
        "the cluster's 5 nodes hold 1 of 2 worker pods of 2 GPUs, 4 CPUs and 32 GiB; the run waits"
    )
    server.nodes = (node(2), node(2))
    assert told() is None and told(node_selector={"zone": "a"}) is None
    assert "2 nodes hold 0 of 2" in told(node_selector={"zone": "b"})
    server.refused = 403
    assert told() is None, "who may not list nodes may submit all the same"


def test_what_the_api_server_refuses_is_told(api, monkeypatch, tmp_path):
    client, server = api
    _, job = rendered()
    job["spec"]["backofLimit"] = 1
    with pytest.raises(InputError, match=r"Kubernetes refused \(422\): spec: .*backofLimit"):
        kubernetes.create(client, job)
    for status, message in ((403, "RayJobs need get, list"), (404, "Is KubeRay installed there"), (500, r"\(500\)")):
        server.refused = status
        with pytest.raises(InputError, match=message):
            kubernetes.check(client, "default")
    for text in ("{{", "- 1", "7"):
        (tmp_path / "kubeconfig").write_text(text)
        with pytest.raises(InputError, match=r"its file can't be read \(.*Set KUBECONFIG"):
            kubernetes.connect()
    monkeypatch.setenv("KUBECONFIG", "/nowhere")
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/nowhere")
    with pytest.raises(InputError, match=r"no Kubernetes cluster is named: .* Set KUBECONFIG"):
        kubernetes.connect()
