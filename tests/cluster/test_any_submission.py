"""Hostile and clumsy submissions, through the command itself: each ends with a message, or with what a cluster gets.

MOVIOLA_FUZZ multiplies the number of cases: the nightly run takes thousands.
"""

import contextlib
import io
import os
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import cli, kubernetes, submit
from pipelines.faults import InputError
from tests.cluster.conftest import faults
from trainer import manifest as manifests
from trainer import run as folder

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "manifests" / f"{name}.yaml" for name in ("demo", "decovae_smoke", "onedva_smoke", "latentdit_smoke")]
cases = settings(
    max_examples=100 * int(os.environ.get("MOVIOLA_FUZZ", "1")), deadline=None, suppress_health_check=list(HealthCheck)
)

WORDS = st.sampled_from(
    ["a", "A", "a-b", "a_b", "-a", "a" * 41, "a/b", "..", "", " ", "ä", "a\nb", "\x1b[31m", "[red]", "%s", "{0}",
     "$(ls)", "https://me:hush@host/x", "gpu.example/kind", "7", "true", "null", "~", "1e3", "[1]", "{}"]
)  # fmt: skip
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 8, 0.25, 0.5, 1.5, 1000, 10**6, 10**18, "1e400", ".nan", ".inf"])
COUNTS = st.integers(-1, 9) | st.lists(st.integers(0, 9), max_size=3)
SPEC = manifests.KubernetesSpec.model_fields
SETS = st.one_of(
    st.builds("kubernetes.{}={}".format, st.sampled_from(sorted(SPEC)), WORDS | NUMBERS),
    st.builds("kubernetes.{}=[{}]".format, st.sampled_from(["secrets", "tolerations"]), WORDS),
    st.builds("kubernetes.tolerations=[{{key: '{}', operator: Exists}}]".format, WORDS),
    st.builds("kubernetes.node_selector={{'{}': '{}'}}".format, WORDS, WORDS),
    st.builds("workers.count={}".format, COUNTS),
    st.builds("workers.{}={}".format, st.sampled_from(["gpus", "cpus", "resize_seconds"]), NUMBERS),
    st.builds("failure.{}={}".format, st.sampled_from(sorted(manifests.FailureSpec.model_fields)), NUMBERS),
    st.builds("telemetry.{}={}".format, st.sampled_from(["bind", "port"]), WORDS | NUMBERS),
    st.builds("{}={}".format, st.sampled_from(["batch", "micro_batch", "zero.stage", "checkpoint.keep"]), NUMBERS),
    st.builds("{}={}".format, st.text(max_size=8), WORDS),
)  # fmt: skip
SANE = ["kubernetes.image=registry.example/moviola:0.1", "kubernetes.queue=video", "workers.count=2"]


def moviola(monkeypatch, *arguments):
    """(exit status, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["moviola", *arguments])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main()
    assert "Traceback" not in err.getvalue() and "hush" not in out.getvalue() + err.getvalue()
    return ended.value.code or 0, out.getvalue(), err.getvalue()


GIVEN = {
    "file": st.sampled_from(FILES),
    "sets": st.lists(SETS, max_size=2),
    "sane": st.sampled_from([SANE, SANE[:1], SANE[::2], []]),
    "name": st.sampled_from([None, "run"]) | st.none() | WORDS,
    "runs": st.none() | WORDS | st.sampled_from(["s3://runs", "s3://", "s3://me:hush@b/x", "gs://b", "/", "\ud800"]),
    "cluster": st.sampled_from(["kubernetes", "local", "http://127.0.0.1:9", "http://h", "ray://h:1"]) | WORDS,
}


@cases
@given(**GIVEN)
def test_any_rayjob_is_what_kuberay_takes(crds, file, sets, sane, name, runs, cluster):
    with contextlib.suppress(InputError):
        submit.known(cluster)
    try:
        manifest = manifests.load(file, [*sane, *sets], name=name)
        run_url = folder.url_of(runs or "s3://runs", manifest.name)
        job = kubernetes.render(manifest, run_url, f"{manifest.name}-0a1b2c", {})
    except InputError as error:
        assert error.status == 2 and str(error).strip()
        return
    assert faults(crds["RayJob"], yaml.safe_load(kubernetes.text(job))) == []


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@settings(cases, max_examples=40)
@given(**GIVEN)
def test_any_submission_is_refused_with_a_message_or_shown(
    crds, monkeypatch, small_dataset, tmp_path, file, sets, sane, name, runs, cluster
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = [f"--set={change}" for change in (*sane, *sets, f"data.train={small_dataset}", "data.eval=null")]
    arguments += [f"--name={name}"] * (name is not None) + [f"--runs={runs}"] * (runs is not None)
    status, out, err = moviola(monkeypatch, "submit", str(file), f"--cluster={cluster}", "--dry-run", *arguments)
    assert status in (0, 2) and (err.strip() or not status), (status, out, err)
    assert list(tmp_path.iterdir()) == [], "a dry run leaves nothing"
    if cluster == "kubernetes" and out:
        assert faults(crds["RayJob"], yaml.safe_load(out)) == []
