"""A run is judged as a whole, handed over, followed, taken back; a Ray of several nodes loses one and finishes it."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from cluster import cli, job, kubernetes, runs, submit
from cluster.events import note
from pipelines.faults import InputError
from trainer import manifest as manifests
from trainer import run as folder

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.fixture
def plain(small_dataset):
    return {
        "name": "small",
        "recipe": "arvae",
        "model": yaml.safe_load((ROOT / "manifests/demo.yaml").read_text())["model"],
        "data": {"train": str(small_dataset)},
        "batch": 4,
        "clip": {"sizes": [[32, 32]]},
        "stages": {
            "first-frame": {"steps": 40, "losses": {"mse": 1, "lpips": 0}},
            "frames-3": {"steps": 20, "losses": {"mse": 1, "lpips": 0}},
            "frames-5": {"steps": 0},
            "frames-7": {"steps": 0},
        },
    }


def manifest_of(plain, **changes):
    return manifests.validate({**plain, **changes}, "m")


def judged(plain, target, where="s3://runs", **changes):
    return "\n".join(submit.judge(manifest_of(plain, **changes), str(where), target))


# -- judging ---------------------------------------------------------------------------------------------------------


def test_targets_that_are_none():
    for target in ("local", "kubernetes", "http://127.0.0.1:8265", "https://ray.example:443"):
        submit.known(target)
    for target, told in (
        ("lokal", "did you mean 'local'?"),
        ("http://host", "the address of Ray's dashboard"),
        ("ray://host:10001", "no cluster"),
        ("http://me:hush@host:8265", "set RAY_AUTH_TOKEN"),
        ("http://host:x", "no cluster"),
        ("", "no cluster"),
    ):
        with pytest.raises(InputError, match=r"--cluster") as caught:
            submit.known(target)
        assert told in str(caught.value) and "hush" not in str(caught.value) and caught.value.status == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match=r"no Ray answers at http://127\.0\.0\.1:"):
            submit.connect(f"http://127.0.0.1:{free.getsockname()[1]}", None)
    with pytest.raises(InputError, match="kubernetes: missing: a RayJob needs an image") as caught:
        submit.submit(manifests.load(ROOT / "manifests/demo.yaml"), "runs", "kubernetes")
    assert "--runs: runs: a folder of this machine" in str(caught.value) and str(caught.value).count("missing") == 1


def test_what_only_shows_with_the_target_is_told_at_once(plain, monkeypatch):
    assert judged(plain, "http://127.0.0.1:8265", "runs") == ""
    monkeypatch.setenv("MOVIOLA_S3_ENDPOINT", "http://127.0.0.1:9000")
    told = judged(plain, "http://ray.example:8265", "runs")
    assert "--runs: runs: a folder of this machine" in told
    assert "MOVIOLA_S3_ENDPOINT: http://127.0.0.1:9000: this machine's loopback" in told
    assert "data.train" not in told, "a full path may be a folder that all machines share"
    spec = {"image": "moviola", "memory_gb": 1, "disk_gb": 1}
    told = judged(plain, "kubernetes", "s3://me:hush@bucket/runs", kubernetes=spec, data={"train": ["nowhere", "ds"]})
    assert "--runs: s3://bucket/runs: keys in a URL would stand in the cluster's list of jobs" in told
    assert "hush" not in told
    assert "data.train.0.dataset: nowhere: a folder of this machine, which pods don't have" in told
    assert "data.train.0.dataset: dataset" in told and "data.train.1.dataset: dataset" in told
    assert "kubernetes.memory_gb: 1: 1 workers need about" in told
    assert "kubernetes.disk_gb: 1: Ray's logs, and the weights that a hub gives, take up to 2.0 GiB, and a pod" in told
    assert "MOVIOLA_S3_ENDPOINT" in told
    told = judged(plain, "kubernetes", "gs://runs", kubernetes={"image": "moviola"})
    assert "--runs: gs://runs: only a path, file:// and s3:// are read" in told and "data.train.0.dataset" in told


def test_faults_of_fields_hide_none_of_the_others(plain, tmp_path):
    plain |= {"name": "Small", "zero": {"stage": 7}, "workers": {"count": 5, "gpus": 1}, "checkpoint": {"keep": 10**9}}
    plain["stages"]["frames-7"]["batch"] = "many"
    path, target = tmp_path / "m.yaml", str(tmp_path / "runs")
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(InputError) as caught:
        manifests.load(path, judge=lambda sound: submit.judge(sound, target, "local"))
    told = str(caught.value).splitlines()
    places = [line.strip().partition(": ")[0] for line in told[1:]]
    assert told[0].endswith("6 faults in the manifest:")
    assert places == ["name", "zero.stage", "stages.frames-7.batch", "workers.count", "workers.gpus", "checkpoint.keep"]
    with pytest.raises(InputError, match=r"1 fault in the manifest:\n  data\.eval: "):
        manifests.load(path, ["name=a", "zero=null", "workers=null", "stages.frames-7.batch=4", "data.eval=[1]",
                              "zero={}", "workers={}", "evaluation.every_steps=2"])  # fmt: skip


def test_machine_disk_gpus_and_notice_are_held_against_the_estimate(plain, monkeypatch, tmp_path):
    assert judged(plain, "local", tmp_path) == ""
    told = judged(plain, "local", tmp_path, workers={"count": 4, "gpus": 64}, checkpoint={"keep": 10**9})
    assert "workers.gpus: 64: 4 workers ask for 256 GPUs, this machine has 0" in told
    assert f"checkpoint.keep: {10**9}: that many checkpoints and one in the making take" in told
    assert "workers.count: 4: they need about" in judged(
        plain, "local", tmp_path, workers={"count": 4}, data={"train": plain["data"]["train"], "memory_mb": 10**8}
    )
    (tmp_path / "file").touch()
    (told,) = submit.judge(manifest_of(plain), str(tmp_path / "file/runs"), "local")
    assert re.fullmatch(r"--runs: .*/file/runs: .*/file can't be written by user \d+: not a directory\. Mend .*", told)
    memory = {"model_states": 5 * GIB, "activations": 4 * GIB}
    (told,) = submit.gpu_faults(memory, [16 * GIB, 8 * GIB])
    assert told.startswith("micro_batch: a rank keeps about 9.0 GiB on its GPU, which has 8.0 GiB")
    assert list(submit.gpu_faults(memory, [16 * GIB])) == list(submit.gpu_faults(memory, [])) == []
    monkeypatch.setattr(submit, "FASTEST_BYTES_PER_SECOND", 1)
    assert "failure.grace_seconds: 30: each of 1 workers commits" in judged(plain, "local", tmp_path)


def test_clips_that_are_too_short_for_a_stage(plain):
    stages = {**plain["stages"], "first-frame": {"steps": 0}}
    stages["frames-3"] = {**stages["frames-3"], "clip": {"frames": 3, "stride": [8, 8]}}
    run = manifest_of(plain, stages=stages)
    (told,) = folder.data_faults(run)
    assert "its longest clip has 16 frames; stage 'frames-3' needs 17 (3 at stride 8)" in told
    stages["frames-3"]["clip"] = {"frames": 3, "stride": [7, 7]}
    assert folder.data_faults(manifest_of(plain, stages=stages)) == []


def test_a_store_that_does_not_answer_is_waited_for_once(plain, monkeypatch):
    asked: list[str] = []

    def opened(url, **_):
        asked.append(url)
        raise folder.storage.Unreachable("gave up after 8 attempts")

    run = manifest_of(plain, data={"train": ["s3://b/a", "s3://b/c"], "eval": "s3://b/d"})
    monkeypatch.setattr(folder.index, "open_dataset", opened)
    assert folder.data_faults(run) == [
        "data.train.0.dataset: gave up after 8 attempts",
        "data.train.1.dataset: s3://b/c: not looked at, since the object store does not answer",
        "data.eval: s3://b/d: not looked at, since the object store does not answer",
    ]
    assert asked == ["s3://b/a"]


def test_videos_for_a_recipe_that_trains_on_latents(small_dataset):
    plain = yaml.safe_load((ROOT / "manifests/latentdit_smoke.yaml").read_text())
    (told,) = submit.judge(manifest_of(plain, data={"train": str(small_dataset)}), "runs", "local")
    assert "it holds videos, and recipe latentdit trains on latents" in told


def test_held_back_clips_that_are_too_short_to_be_evaluated(plain, tmp_path, small_dataset):
    held_back = tmp_path / "eval"
    held_back.symlink_to(small_dataset)
    stages = {**plain["stages"], "frames-3": {**plain["stages"]["frames-3"], "clip": {"frames": 17}}}
    changes = {"data": {"train": str(small_dataset), "eval": str(held_back)}, "stages": stages}
    told = folder.data_faults(manifest_of(plain, **changes, evaluation={"every_steps": 2}))
    assert any("its longest clip has 16 frames; the evaluation takes 17, as stage 'frames-3'" in line for line in told)
    assert not any("evaluation" in line for line in folder.data_faults(manifest_of(plain, **changes)))


def test_machines_of_a_cluster_are_counted_in_workers(plain, monkeypatch, tmp_path):
    run = manifest_of(plain, workers={"count": 3, "gpus": 0.5, "cpus": 2}, batch=4)
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 8, "GPU": 8}},
    ]
    assert [job.room(run, node["Resources"]) for node in nodes] == [2, 4]
    (told,) = job._machines(run, nodes, str(tmp_path))
    assert told.startswith("workers.count: 3: the cluster has room for 2 workers of 2 CPUs and 0.5 GPUs (1 machines")
    assert list(job._machines(run, [nodes[0]] * 2, str(tmp_path))) == []
    monkeypatch.setenv("MOVIOLA_CLUSTER_GROWS", "1")
    assert list(job._machines(run, nodes, str(tmp_path))) == []
    assert "waiting for more machines" in runs.events(str(tmp_path))[-1]["message"]


def test_a_machine_sees_whether_storage_can_be_used(plain, tmp_path, small_dataset):
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path))
    before = os.listdir(run_url)
    seen = job._probe(run_url, [str(small_dataset)])
    assert seen["faults"] == [] and seen["memory"] > 0 and seen["gpus"] == [] and seen["disk"] > 0
    assert os.listdir(run_url) == before
    (told,) = submit.disk_faults(manifest_of(plain), 3 * GIB, "/shared/runs", 11 * GIB)
    assert "take 12.0 GiB, and /shared/runs has 11.0 GiB free" in told
    assert not list(submit.disk_faults(manifest_of(plain), 3 * GIB, "s3://runs", None))
    faults = job._probe(str(tmp_path / "other"), [str(tmp_path / "none")])["faults"]
    assert faults[0].startswith("the run's storage can't be read and written: ")
    assert faults[1].startswith("dataset ") and "can't be read" in faults[1]


@pytest.mark.parametrize("first", ["the cluster's", "another", "none"])
def test_the_driver_is_run_by_a_python_that_has_ray(tmp_path, monkeypatch, first):
    """``python`` is the one with Ray, one without, or not there; the submitter's own is the next to be tried."""
    (tmp_path / "bin").mkdir()
    if first != "none":
        does = "exit 1" if first == "another" else f'exec {sys.executable} "$@"'
        (tmp_path / "bin/python").write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / "bin/python").chmod(0o755)
    if first == "the cluster's":
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
    command = submit.entrypoint(str(tmp_path / "a run"), "job").replace("cluster.job", "cluster.nothing")
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, env={"PATH": str(tmp_path / "bin")}
    )
    assert "No module named cluster.nothing" in done.stderr
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    if first != "the cluster's":
        command = submit.entrypoint(str(tmp_path / "a run"), "job")
        done = subprocess.run(command, shell=True, capture_output=True, text=True, env={"PATH": str(tmp_path / "bin")})
        assert done.returncode == 1 and "no python here has ray and torch" in done.stderr


# -- a run that is elsewhere -----------------------------------------------------------------------------------------


def test_states_and_story_of_a_run_that_a_cluster_has(plain, tmp_path, monkeypatch):
    launch = {"cluster": "http://127.0.0.1:1", "job": "small-0a1b2c"}
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path), launch)
    monkeypatch.setattr(runs, "SILENT_SECONDS", -1.0)
    state = submit.refresh(run_url)
    assert (state.state, state.cluster) == ("waiting", "http://127.0.0.1:1"), "a queue may be long"
    monkeypatch.setattr(submit.plan, "dry_run", lambda manifest: pytest.fail("it is refused before the dry run"))
    with pytest.raises(InputError, match="run small is waiting already"):
        submit.submit(manifest_of(plain), str(tmp_path), "local")
    with pytest.raises(InputError, match="seed: 0 -> 9"):
        submit.submit(manifest_of(plain, seed=9), str(tmp_path), "local")
    monkeypatch.setattr(submit, "_said", lambda launch: ("failed", "no image"))
    assert submit.refresh(run_url).failure == "http://127.0.0.1:1: job small-0a1b2c: no image"
    note(run_url, "launch", **launch)
    note(run_url, "driver", job="small-0a1b2c", host="elsewhere", pid=1)
    note(run_url, "resize", before=2, after=1)
    note(run_url, "stopped", step=7)
    lines: list[str] = []
    assert submit.follow(run_url, lines.append, forever=True) == "stopped"
    told = [line.split("  ", 1)[1] for line in lines]
    assert told == [
        "given to http://127.0.0.1:1 as job small-0a1b2c",
        "failed: http://127.0.0.1:1: job small-0a1b2c: no image",
        "given to http://127.0.0.1:1 as job small-0a1b2c",
        "driven by process 1 on elsewhere",
        "from 2 to 1 workers",
        "stopped at step 7",
    ]


def test_a_run_that_is_not_heard_of_is_not_driven_twice_where_its_cluster_has_it(plain, tmp_path, monkeypatch):
    launch = {"cluster": "http://127.0.0.1:1", "job": "small-0a1b2c"}
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path), launch)
    note(run_url, "driver", job=launch["job"], host="elsewhere", pid=1)
    monkeypatch.setattr(runs, "SILENT_SECONDS", -1.0)
    monkeypatch.setattr(submit, "judge", lambda *of: [])
    assert runs.status(run_url).state == "silent" and not submit._held(run_url), "it can't be asked"
    monkeypatch.setattr(submit, "_said", lambda launch: None)
    with pytest.raises(InputError, match="run small is silent already") as caught:
        submit.submit(manifest_of(plain), str(tmp_path), "local")
    assert "moviola stop small" in str(caught.value)
    with pytest.raises(InputError, match="seed: 0 -> 9"):
        submit.submit(manifest_of(plain, seed=9), str(tmp_path), "local")
    monkeypatch.setattr(submit, "_said", lambda launch: ("stopped", "asked"))
    assert not submit._held(run_url)


def test_a_job_that_ended_by_a_fault_of_input_is_not_tried_again(plain, tmp_path, monkeypatch):
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path))
    note(run_url, "failed", job="small-0a1b2c", message="no room", fault="input")
    with pytest.raises(InputError, match=r"a new cluster won't help: no room"):
        job.drive(run_url, "small-0a1b2c")
    with pytest.raises(InputError, match=r"Does .* see the storage that the run was submitted to"):
        job.drive(str(tmp_path / "none"), "small-0a1b2c")
    runs.ask_to_stop(run_url, "test")
    assert job.drive(run_url, "small-111111") == 0
    assert runs.status(run_url).state == "stopped"


def test_a_job_that_waits_for_machines_is_taken_back(plain, tmp_path, monkeypatch):
    launch = {"cluster": "kubernetes", "job": "small-0a1b2c", "namespace": "video"}
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path), launch)
    taken: list[tuple] = []
    monkeypatch.setattr(kubernetes, "connect", lambda: "api")
    monkeypatch.setattr(kubernetes, "delete", lambda *job: taken.append(job))
    submit.stop(run_url)
    assert taken == [("api", "video", "small-0a1b2c")] and runs.status(run_url).state == "stopped"


def test_a_job_that_waits_on_a_cluster_which_is_gone_does_not_hold_its_run(plain, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
        launch = {"cluster": gone, "job": "small-0a1b2c"}
        _, run_url = folder.claim(manifest_of(plain), str(tmp_path), launch)
        told: list[str] = []
        assert submit.stop(run_url, told.append) == "stopped" == runs.status(run_url).state
    assert told[0].startswith(
        "job small-0a1b2c could not be taken back; if it ever begins, it ends at once: no Ray answer"
    )
    assert job.drive(run_url, "small-0a1b2c") == 0, "it was asked to stop"
    folder.claim(manifest_of(plain), str(tmp_path), {"cluster": "http://other:1", "job": "small-111111"})
    before = runs.events(run_url)
    monkeypatch.setattr(job.launch, "foreground", lambda *of, **options: pytest.fail("it takes the run over"))
    assert job.drive(run_url, "small-0a1b2c") == 0 and runs.events(run_url) == before


def test_what_a_ray_refuses_is_a_message():
    """A token that is wanted, an answer that is none, a job that is not known, and a moment's trouble."""
    answers = {"/api/version": (401, "no token")}

    class Ray(BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = answers[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Ray)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(InputError, match=r"Authentication required: no token\. Set RAY_AUTH_MODE=token, and RAY_AUTH"):
        submit.connect(address, None)
    answers["/api/version"] = (200, "<html>")
    with pytest.raises(InputError, match=r"no Ray answers at .*\. It is the dashboard's address"):
        submit.connect(address, None)
    answers["/api/version"] = (200, '{"version": "4", "ray_version": "2.60.0", "ray_commit": "a"}')
    launch = {"cluster": address, "job": "small-0a1b2c"}
    answers["/api/jobs/small-0a1b2c"] = (503, "a moment")
    with pytest.raises(InputError, match=r"can't tell of job small-0a1b2c: .*503"):
        submit._said(launch)
    answers["/api/jobs/small-0a1b2c"] = (404, "Job small-0a1b2c does not exist")
    assert submit._said(launch)[0] == "failed"
    server.shutdown()
    server.server_close()


def test_metrics_of_a_pod_are_where_prometheus_reads_them(plain, tmp_path, monkeypatch):
    """The manifest that is kept stays as it was said: on this machine the same run serves on loopback."""
    launch = {"cluster": "kubernetes", "job": "small-0a1b2c", "namespace": "video"}
    _, run_url = folder.claim(manifest_of(plain), str(tmp_path), launch)
    assert folder.load(run_url).telemetry.bind == "127.0.0.1"
    served: list[tuple[str, int]] = []

    def foreground(manifest, *of, **options):
        served.append((manifest.telemetry.bind, manifest.telemetry.port))
        return "done"

    monkeypatch.setattr(job.launch, "foreground", foreground)
    assert job.drive(run_url, "small-0a1b2c") == 0
    folder.claim(manifest_of(plain), str(tmp_path), {"cluster": "local", "job": "small-111111"})
    assert job.drive(run_url, "small-111111") == 0
    assert served == [("0.0.0.0", kubernetes.METRICS_PORT), ("127.0.0.1", 0)]


def test_a_dry_run_prints_the_rayjob_and_what_is_wrong(plain, tmp_path, monkeypatch, capsys):
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({**plain, "kubernetes": {"image": "moviola"}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moviola", "submit", "m.yaml", "--cluster", "kubernetes", "--dry-run"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    shown = capsys.readouterr()
    assert ended.value.code == 2 and "--runs: ./runs: a folder of this machine, which pods don't have" in shown.err
    assert yaml.safe_load(shown.out)["kind"] == "RayJob" and not (tmp_path / "runs").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert facts["rayjob"] == yaml.safe_load(shown.out)
    assert {"manifest", "parameters", "latent", "batch", "memory"} <= facts.keys()


def test_a_cluster_that_does_not_answer_is_one_fault_among_others(plain, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match="can't run on") as caught:
            submit.submit(manifest_of(plain, data={"train": "nowhere"}), str(tmp_path / "runs"), target)
    assert "data.train.0.dataset: dataset" in str(caught.value) and "no Ray answers at" in str(caught.value)
    assert caught.value.status == 2 and not (tmp_path / "runs").exists()


def test_a_ray_that_has_only_just_started_is_asked_again(monkeypatch):
    class Client:
        asked = 0

        def submit_job(self, **job: object) -> None:
            self.asked += 1
            if self.asked < 3:
                raise RuntimeError("Request failed with status code 500: No available agent to submit job, please try")

    monkeypatch.setattr(submit.time, "sleep", lambda seconds: None)
    client = Client()
    submit._start_there(client, "s3://runs/small", "small-0a1b2c")
    assert client.asked == 3
    monkeypatch.setattr(submit, "AGENT_SECONDS", 0.0)
    with pytest.raises(InputError, match=r"refused the job: .*No available agent.*--dashboard-agent-listen-port"):
        submit._start_there(Client(), "s3://runs/small", "small-0a1b2c")
