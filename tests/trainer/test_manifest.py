"""A manifest is judged as a whole: every fault at once, with its field, value, reason and remedy."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.faults import InputError
from trainer import manifest as manifests

GOOD = {
    "name": "small",
    "recipe": "arvae",
    "model": {"down": 8, "motion_channels": 2, "supplement_channels": 2},
    "data": {"train": "s3://videos/vimeo90k", "eval": "s3://videos/mcl-jcv"},
    "batch": 8,
    "workers": {"count": [1, 4]},
}


def _with(**changes):
    return {**GOOD, **changes}


def _faults(plain):
    with pytest.raises(InputError) as caught:
        manifests.validate(plain, "m.yaml")
    assert caught.value.status == 2
    return str(caught.value)


def test_a_resolved_manifest_is_complete_in_itself():
    run = manifests.validate(_with(stages={"frames-3": {"steps": 7, "clip": {"sizes": [[64, 64]]}}}), "m")
    plain = run.resolved()
    assert plain["stages"]["frames-3"]["steps"] == 7
    assert plain["stages"]["frames-3"]["clip"]["frames"] == 3
    again = manifests.validate(yaml.safe_load(yaml.safe_dump(plain)), "again")
    assert again.resolved() == plain
    assert again.digest() == run.digest()


def test_identity_ignores_hardware_and_cadence_and_nothing_else():
    base = manifests.validate(GOOD, "m")
    other = _with(workers={"count": 2}, checkpoint={"every_steps": 7}, zero={"stage": 3}, trace=True, name="other")
    assert manifests.validate(other, "m").digest() == base.digest()
    for change in ({"seed": 1}, {"batch": 16}, {"optimizer": {"lr": 1e-3}}, {"data": {"train": "elsewhere"}}):
        assert manifests.validate(_with(**change), "m").digest() != base.digest(), change


def test_statistics_of_a_micro_batch_are_of_one_world_size_alone():
    adversary = {"weight": 0.1, "network": {"norm": "batch", "layers": 2}}
    change = {"recipe": "decovae", "model": {}, "stages": {"dynamic": {"adversary": adversary}}}
    text = _faults(_with(**change))
    assert "stages.dynamic.adversary.network.norm: batch" in text and "workers.count [1, 4] would train" in text
    fixed = manifests.validate(_with(**change, workers={"count": 4}), "m")
    other = manifests.validate(_with(**change, workers={"count": 2}, zero={"stage": 3}), "m")
    assert list(manifests.difference(fixed.identity(), other.identity())) == ["workers.count: 4 -> 2"]
    no_steps = {"dynamic": {"adversary": adversary, "steps": 0}}
    manifests.validate(_with(**{**change, "stages": no_steps}), "m")


def test_all_faults_in_one_go_with_the_nearest_name():
    text = _faults(
        _with(
            bacth=4,
            batch=-1,
            model={"down": 9, "motion_chanels": 2},
            data={"train": [{"dataset": "x", "wieght": 2}], "workers": "many"},
            zero={"stage": 7},
            name="Bad Name",
            workers={"count": [3, 1]},
            optimizer=None,
        )
    )
    assert text.startswith("m.yaml: 10 faults in the manifest:")
    for expected in (
        "bacth: no such field; did you mean 'batch'?",
        "batch: -1: input should be greater than 0",
        "data.train.0.wieght: no such field; did you mean 'weight'?",
        'data.workers: "many"',
        "zero.stage: 7",
        "workers.count: [3, 1]: the least number comes first",
        "optimizer: null: a mapping of fields belongs here",
        'name: "Bad Name": use 1 to 40 small letters',
        "model.down: 9",
        "model.motion_chanels: no such field; did you mean 'motion_channels'?",
    ):
        assert expected in text, text


TOGETHER = {"failure": {"grace_seconds": 2}, "data": {"train": "a", "eval": "a/"}, "workers": {"count": [1, 16]}}
TOLD = ("failure.grace_seconds: 2: a run leaves", "data.eval: a/ is also trained on", "workers.count: 16 workers share")


@pytest.mark.parametrize(
    ("change", "fault", "void"),
    [
        ({"batch": -1}, "batch: -1", "workers.count"),
        ({"batch": None}, "batch: null", "workers.count"),
        ({"data": 7}, "data: 7", "data.eval"),
        ({"data": {"train": [], "eval": "a"}}, "data.train: []", "data.eval"),
        ({"data": {"train": [3], "eval": "a"}}, "data.train.0: 3", "data.eval"),
        ({"recipe": "arvea"}, "did you mean 'arvae'", None),
        ({"recipe": "zz"}, "recipe 'zz' is not known", "workers.count"),
        ({"recipe": None}, "recipe: null", "workers.count"),
        ({"model": {"down": 9}, "stages": {"frames-3": {"clip": {"sizes": [[8, 8]]}}}}, "model.down: 9", None),
        ({"a": 1, "gpus": 2, "grace_seconds": 3}, "a: no such field", None),
        ({"seed": True}, "seed: true: a number belongs here", None),
        ({"data.train": "b"}, "data.train: no such field", None),
        ({"seed": True, "a": 1}, "seed: true: a number belongs here", None),
    ],
)
def test_no_fault_hides_another(change, fault, void):
    """Whatever is wrong, also with what a manifest must have, all that does not follow from it is told."""
    plain = _with(**{**TOGETHER, **change})
    text = _faults(plain)
    assert fault in text
    for line in TOLD:
        assert (line in text) == (void is None or not line.startswith(void)), text
    judged = []
    with pytest.raises(InputError):
        manifests.validate(plain, "m", judge=lambda sound: judged.append(sound) or ["the target's: 1"])
    assert len(judged) == 1


def test_what_is_left_out_of_the_judging_is_told_once():
    """A part without what it must have is as good as not there, and so is what its target would say of that."""
    plain = _with(kubernetes={"imag": "moviola"}, failure={"grace_seconds": 2})
    with pytest.raises(InputError) as caught:
        manifests.validate(plain, "m", judge=lambda sound: ["kubernetes: missing"] if sound.kubernetes is None else [])
    assert "3 faults" in str(caught.value) and "kubernetes.image: missing" in str(caught.value)


def test_all_faults_of_a_stage_come_at_once():
    adversary = {"weight": 1, "optimizer": {"lr": -3}}
    text = _faults(_with(stages={"frames-3": {"stepz": 1, "optimizer": {"lr": -2}, "adversary": adversary}}))
    for place in ("stepz: no such field", "optimizer.lr: -2", "adversary.optimizer.lr: -3"):
        assert f"stages.frames-3.{place}" in text


def test_a_fault_is_told_in_the_terms_of_the_file():
    assert "data.train: []: give at least 1" in _faults(_with(data={"train": []}))
    assert "optimizer.betas.0: 2: input should be less than 1" in _faults(_with(optimizer={"betas": [2, 0]}))
    assert "clip: 3: a mapping of fields belongs here" in _faults(_with(clip=3))
    text = _faults(_with(workers={"count": [1, 2, 3]}, str=1, data={"train": "a", "internal": 1}))
    assert "workers.count: [1, 2, 3]: input should be a valid integer, or give at most 2" in text
    assert "\n  str: no such field" in text and "\n  data.internal: no such field" in text


def test_yes_and_no_are_no_numbers():
    text = _faults(_with(failure={"max_preemptions": False}, stages={"frames-3": {"clip": {"stride": [True, 2]}}}))
    assert "failure.max_preemptions: false: a number belongs here; yes, no, on and off are none" in text
    assert "stages.frames-3.clip.stride.0: true: a number" in text and "2 faults" in text


@pytest.mark.parametrize("value", [".inf", ".nan", "1e999"])
def test_numbers_without_end_are_refused(tmp_path, value):
    """They would end in a traceback of a timer, a pod's specification or a loss."""
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(GOOD))
    seconds = ["failure.grace_seconds", "failure.hang_seconds", "data.timeout_seconds", "workers.resize_seconds"]
    fields = [*seconds, "optimizer.eps", "stages.frames-3.losses.mse", "stages.frames-3.optimizer.clip"]
    with pytest.raises(InputError, match="7 faults in the manifest") as caught:
        manifests.load(tmp_path / "m.yaml", [f"{field}={value}" for field in fields])
    assert all(f"{field}: " in str(caught.value) for field in fields)
    with pytest.raises(InputError, match=r"less than or equal to 100000000"):
        manifests.load(tmp_path / "m.yaml", ["failure.hang_seconds=1e15"])
    with pytest.raises(InputError, match=r"data\.train\.0\.weight: 1e\+308"):
        manifests.load(tmp_path / "m.yaml", ["data.train=[{dataset: a, weight: 1.0e+308}]"])


def test_what_ray_can_not_deal_out_and_what_no_machine_can_serve():
    text = _faults(_with(workers={"count": 2, "gpus": 1.5, "cpus": 0.00001}, telemetry={"bind": "my-host"}))
    assert "workers.gpus: 1.5: a worker has a part of one GPU, or whole ones" in text
    assert "workers.cpus: 1e-05: give at most four decimals" in text
    assert 'telemetry.bind: "my-host": an IPv4 address of this machine belongs here' in text
    manifests.validate(_with(workers={"count": 2, "gpus": 0.5, "cpus": 3.7}, telemetry={"bind": "localhost"}), "m")


def test_faults_that_only_show_together():
    text = _faults(
        _with(
            workers={"count": [9, 16]},
            data={"train": "a", "eval": "a/"},
            stages={"frames-5": {"clip": {"sizes": [[60, 64]]}, "optimizer": {"lr": 0}}},
        )
    )
    assert "workers.count: 16 workers share a global batch of 8 clips" in text
    assert "data.eval: a/ is also trained on" in text
    assert "stages.frames-5.clip.sizes" in text and "60" in text
    assert "stages.frames-5.optimizer.lr" in text


def test_frames_that_are_too_small_for_a_loss_or_too_large_for_any_machine():
    stages = {
        "frames-3": {"clip": {"sizes": [[64, 64], [8, 16]]}},
        "frames-5": {"clip": {"sizes": [[8, 8]]}, "steps": 0},
    }
    text = _faults(_with(stages=stages))
    assert "2 faults" in text
    for term, side in (("ssim", 11), ("lpips", 16)):
        assert f"stages.frames-3.clip.sizes: [8, 16]: {term} needs at least {side} x {side} pixels" in text
    stages["frames-3"]["losses"] = {"ssim": 0, "lpips": 0}
    manifests.validate(_with(stages=stages), "m")
    text = _faults(_with(clip={"sizes": [[2**40, 8]], "frames": 2**40, "stride": [1, 2**40]}))
    assert "clip.sizes.0.0" in text and "clip.frames" in text and "clip.stride.1" in text and "3 faults" in text


def test_keys_in_a_url_are_refused_and_not_shown():
    """They would otherwise stand in the copy of the manifest that every run keeps."""
    text = _faults(
        _with(data={"train": "s3://AKIAABCDEFGHIJKLMNOP:pass/word@videos/a", "eval": "s3://me:hush@videos/b"})
    )
    assert "data.train.0.dataset" in text and "data.eval" in text and text.count("keys in a URL are not read") == 2
    assert not any(secret in text for secret in ("AKIA", "pass", "hush"))
    assert "pipe:cat x: only a path, file:// and s3:// are read" in _faults(_with(data={"train": "pipe:cat x"}))
    signed = "https://store.example/vgg.pth?X-Amz-Credential=hush&X-Amz-Signature=hush"
    text = _faults(
        _with(
            evaluation={"lpips": {"weights": signed}},
            stages={"frames-3": {"init_from": "s3://me:hush@videos/run"}},
            teachers={"a": "s3://AKIAABCDEFGHIJKLMNOP:pass/word@videos/run"},
            bacth=1,
        )
    )
    for place in ("evaluation.lpips.weights", "stages.frames-3.init_from", "teachers.a"):
        assert f"  {place}: " in text
    assert text.count("keys would stand in the copies of the manifest") == 3 and "bacth: no such field" in text
    assert not any(secret in text for secret in ("AKIA", "pass", "hush"))


def test_unknown_stage_and_recipe_name_what_there_is():
    assert "stages.frame-3: no such field; did you mean 'frames-3'?" in _faults(_with(stages={"frame-3": {"steps": 1}}))
    assert "recipe: recipe 'arvea' is not known; there are" in _faults(_with(recipe="arvea"))
    assert "did you mean 'arvae'?" in _faults(_with(recipe="arvea"))
    assert "every stage has 0 steps" in _faults(
        _with(stages={name: {"steps": 0} for name in ("first-frame", "frames-3", "frames-5", "frames-7")})
    )


def test_faults_of_a_stage_that_its_recipe_can_not_train():
    text = _faults(
        _with(stages={"frames-3": {"losses": {"sim": 1}, "knobs": {"x": 1}}, "frames-5": {"image_share": 0.5}})
    )
    assert "stages.frames-3.losses.sim: 1.0: no such name; did you mean 'ssim'?" in text
    assert "stages.frames-3.knobs.x: 1: no such name (this recipe has none)" in text
    assert "stages.frames-5.image_share: 0.5: an image is a first frame" in text


def test_pods_that_can_not_be_made():
    kubernetes = {"image": "registry/moviola:1", "workers_per_pod": 2, "queue": "video"}
    text = _faults(_with(workers={"count": [1, 4], "gpus": 0.25}, kubernetes=kubernetes, failure={"grace_seconds": 2}))
    assert "kubernetes.workers_per_pod: 2: workers.count 1 is no multiple of it" in text
    assert "workers.gpus: 0.25: a pod of 2 would have 0.5 GPUs" in text
    assert "kubernetes.queue: 'video': Kueue admits a fixed number of pods, and workers.count is [1, 4]" in text
    assert "failure.grace_seconds: 2: a run leaves 3 s before the end of the notice" in text
    assert "4 faults" in text
    manifests.validate(_with(workers={"count": 4, "gpus": 0.5}, kubernetes=kubernetes), "m")
    text = _faults(_with(kubernetes={"image": "a b", "secrets": ["A_B"], "tolerations": [{"operator": "Equal"}]}))
    assert "kubernetes.image" in text and "kubernetes.secrets.0" in text and "operator: Equal needs a key" in text
    odd = {"namespace": "a.b", "queue": "a" * 64, "service_account": "a..b", "secrets": ["a.-b", "a-.b"]}
    odd["node_selector"] = {"a..b/c": "d", "a.b/c": "-d", "/c": "d", "b/": "d"}
    text = _faults(_with(kubernetes={"image": "moviola", **odd}))
    assert "9 faults" in text and text.count("string should match pattern") == 9
    fine = {"namespace": "3d-team", "service_account": "a.b-c.d", "secrets": ["a.b"], "queue": "7"}
    spec = {"image": "moviola", **fine, "node_selector": {"a.b/c_d": ""}}
    manifests.validate(_with(kubernetes=spec, workers={"count": 2}), "m")


@settings(deadline=None)
@given(st.from_regex(manifests.NAME, fullmatch=True))
def test_a_name_is_valid_for_kubernetes_ray_prometheus_and_s3(name):
    """RFC 1035 labels of KubeRay's RayJob with the launch's suffix, RFC 1123 labels, S3's safe characters."""
    assert manifests.validate(_with(name=name), "m").name == name
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", f"{name}-0a1b2c") and len(f"{name}-0a1b2c") <= 47
    assert re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?", name)
    assert re.fullmatch(r"[\w!.*'()-]+", name, re.ASCII)


@pytest.mark.parametrize("name", ["", "A", "1a", "a-", "-a", "a_b", "a.b", "a/b", "..", "a\n", "ä", "a" * 41])
def test_names_that_are_refused(name):
    assert "use 1 to 40 small letters" in _faults(_with(name=name))


def test_the_schema_takes_every_manifest_and_refuses_what_no_manifest_has():
    schema = manifests.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    judge = jsonschema.Draft202012Validator(schema)
    found = sorted((Path(__file__).parents[2] / "manifests").glob("*.yaml"))
    assert len(found) > 5
    for path in found:
        run = manifests.load(path)
        for plain in (yaml.safe_load(path.read_text()), json.loads(json.dumps(run.resolved()))):
            assert [error.message for error in judge.iter_errors(plain)] == [], path
    wrong = _with(
        bacth=1, model={"dwn": 8}, stages={"frames-3": {"stepps": 1, "clip": {"frame": 3}}}, zero={"stage": 7}
    )
    told = " ".join(error.message for error in judge.iter_errors(wrong))
    assert all(word in told for word in ("bacth", "dwn", "stepps", "frame", "7"))
    assert {error.message for error in judge.iter_errors(_with(name="A"))}
    negative = _with(stages={"frames-3": {"losses": {"mse": -1}}})
    assert not judge.is_valid(negative) and "stages.frames-3.losses.mse: -1: input should be" in _faults(negative)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: a\nname: b\n", "line 2, column 1: key 'name' stands here twice"),
        ("a: &x [1]\nb: *x\n", "aliases (*name) are not allowed"),
        ("a: [1, 2\n", "line 2"),
        ("", "this is empty"),
        ("- 1\n", "this is a list"),
        ("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("? [a]\n: 1\n", "a key must be plain text"),
        ("a: " + "[" * 3000, "line 1, column 53: nested more than 50 deep"),
        ("a: 0x" + "f" * 6000, "line 1, column 4: a number of more than 300 digits"),
        ("a: " + "9" * 6000, "line 1, column 4: a number of more than 300 digits"),
        ("x" * (2 << 20), "the limit is 1048576"),
    ],
)
def test_hostile_yaml_is_refused_with_a_place(text, expected):
    with pytest.raises(InputError, match=r"m\.yaml") as caught:
        manifests.parse(text, "m.yaml")
    assert expected in str(caught.value)


def test_files_that_can_not_be_read(tmp_path):
    with pytest.raises(InputError, match="there is no such file"):
        manifests.load(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="directory"):
        manifests.load(tmp_path)
    with pytest.raises(InputError, match="/dev/zero: more than 1048576 bytes"):
        manifests.load("/dev/zero")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text at byte 0"):
        manifests.load(tmp_path / "binary.yaml")


def test_set_changes_any_field(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    sets = ["optimizer.lr=1e-3", "stages.frames-3.steps=5", "workers.count=[1, 2]", "trace=true"]
    run = manifests.load(path, sets, name="renamed")
    assert run.optimizer.lr == 1e-3 and run.workers.count == (1, 2) and run.trace and run.name == "renamed"
    for wrong, expected in {
        "optimizer.lr": "write it as field=value",
        "name.x=1": "name has no fields",
        "a=[": "not a YAML value",
        "seed=0x" + "f" * 6000: "not a YAML value: a number of more than 300 digits",
        ".".join("a" * 5000) + "=1": "5000 levels of fields; no manifest has so many",
        "..=1": "write it as field=value",
    }.items():
        with pytest.raises(InputError, match=expected.replace("[", r"\[")):
            manifests.load(path, [wrong])


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [*manifests.RunManifest.model_fields, "data.train", "data.images", "stages.frames-3", "stages.frames-3.clip",
     "model.down", "optimizer.betas", "workers.count", "clip.sizes", "stages.frames-7.losses", "model.first_frame"]
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(FIELDS, PLAIN), min_size=1, max_size=3))
def test_any_manifest_is_accepted_or_refused_with_a_message(changes):
    plain = yaml.safe_load(yaml.safe_dump(GOOD))
    for path, value in changes:
        node = plain
        *parents, leaf = path.split(".")
        for key in parents:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        node[leaf] = value
    try:
        run = manifests.validate(plain, "m.yaml")
    except InputError as error:
        assert "fault" in str(error)
    else:
        assert manifests.validate(run.resolved(), "again").resolved() == run.resolved()
