"""Hostile and clumsy manifests and --set: accepted or refused with a message, soon, and never with a traceback.

MOVIOLA_FUZZ multiplies the number of cases: the nightly run takes thousands.
"""

import copy
import json
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines import rules
from pipelines.faults import InputError
from trainer import manifest as manifests

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "manifests").glob("*.yaml"))
TEXTS = [path.read_text() for path in FILES]
RULES = sorted((ROOT / "manifests/datasets").glob("*.yaml"))
PLAIN = yaml.safe_load((ROOT / "manifests/demo.yaml").read_text())
BY_RECIPE = {manifest.recipe: (path, manifest.resolved()) for path in FILES if (manifest := manifests.load(path))}
"""One manifest of each recipe, and every field that it could have said."""
SECONDS = 5.0
"""Of CPU, for one case."""
cases = settings(
    max_examples=100 * int(os.environ.get("MOVIOLA_FUZZ", "1")), deadline=None, suppress_health_check=list(HealthCheck)
)


def judged(call):
    """The manifest that ``call`` gives, or None where it is refused with one message."""
    began = time.process_time()
    try:
        return call()
    except InputError as error:
        assert error.status == 2 and str(error).strip() and "Traceback" not in str(error)
        return None
    finally:
        assert time.process_time() - began < SECONDS


def accepted(run):
    """What is accepted is complete: it resolves, has an identity, and its schedule answers at both ends."""
    if run is None:
        return
    again = manifests.validate(run.resolved(), "again")
    assert again.resolved() == run.resolved() and again.digest() == run.digest()
    json.dumps(run.resolved(), allow_nan=False)
    schedule = run.schedule
    for step in (0, schedule.steps - 1):
        assert schedule.plan(step).clips > 0
    with pytest.raises(IndexError):
        schedule.plan(schedule.steps)


def leaves(value, path=()):
    """Every place of a plain manifest, branches too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def at(value, path):
    """What stands at a place of a plain manifest."""
    for key in path:
        value = value[key]
    return value


def paths(resolved):
    """Fields as --set writes them: those that a manifest may have, and what is no field."""
    known = [".".join(map(str, path)) for path in leaves(resolved) if path]
    of_a_stage = "clip.frames clip.stride supervise adversary.weight adversary.network.kind knobs.x batch image_share"
    known += [f"stages.{name}.{field}" for name in resolved["stages"] for field in of_a_stage.split()]
    known += [f"kubernetes.{field}" for field in manifests.KubernetesSpec.model_fields]
    known += ["kubernetes.tolerations.0.key", "data.train.0.weight", "workers.count.1", "name.x", "a..b", "", "."]
    return st.sampled_from(known) | st.text(max_size=12)


NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, float("inf"), float("-inf"), float("nan")]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | NUMBERS | st.text(max_size=20)
ODD = st.sampled_from(
    ["s3://", "s3://b/../x", "pipe:ls", "file:///etc/passwd", "\x00", "\ud800", "a" * 5000, "${HOME}", "{{x}}", "../..",
     "1e999", "0x10", "1:1:1", "2001-01-01", "=", "~", "!!python/object:os.system", "*a", "&a", "<<", "\u202e", "NaN"]
)  # fmt: skip
FAMILIAR = [value for _, plain in BY_RECIPE.values() for path in leaves(plain) if (value := at(plain, path)) != plain]
"""What stands somewhere in a manifest: the right kind of value, at the wrong place."""
VALUES = st.recursive(
    SCALARS | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=4),
    max_leaves=8,
) | st.sampled_from(FAMILIAR)


@st.composite
def changed(draw):
    """A recipe's manifest, short or with every field, with up to four places of it changed."""
    path, resolved = BY_RECIPE[draw(st.sampled_from(sorted(BY_RECIPE)))]
    plain = copy.deepcopy(draw(st.sampled_from([resolved, yaml.safe_load(path.read_text())])))
    for _ in range(draw(st.integers(1, 4))):
        (*parents, leaf) = draw(st.sampled_from([place for place in leaves(plain) if place]))
        node = at(plain, parents)
        if draw(st.integers(0, 9)):
            node[leaf] = copy.deepcopy(draw(VALUES))
        else:
            del node[leaf]
    return plain


@cases
@given(changed())
def test_any_value_at_any_place(plain):
    accepted(judged(lambda: manifests.validate(plain, "m.yaml")))


@st.composite
def settings_of(draw):
    """A recipe's manifest, and --set of anything."""
    path, resolved = BY_RECIPE[draw(st.sampled_from(sorted(BY_RECIPE)))]
    fields = paths(resolved)
    return path, draw(
        st.lists(fields | st.builds("{}={}".format, fields, VALUES.map(str) | ODD), min_size=1, max_size=3)
    )


@cases
@given(settings_of())
def test_any_set(given_):
    path, sets = given_
    accepted(judged(lambda: manifests.load(path, sets)))


@st.composite
def mangled(draw, texts):
    """A real file with lines that are cut, doubled, moved, indented, or pieces of YAML in between."""
    lines = draw(st.sampled_from(texts)).splitlines()
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        match draw(st.integers(0, 6)):
            case 0:
                del lines[i]
                lines = lines or [""]
            case 1:
                lines.insert(i, lines[i])
            case 2:
                lines[i] = " " * draw(st.integers(1, 4)) + lines[i]
            case 3:
                lines[i] = lines[i][: draw(st.integers(0, len(lines[i])))]
            case 4:
                lines.insert(i, draw(ODD))
            case 5:
                at = draw(st.integers(0, len(lines[i])))
                lines[i] = lines[i][:at] + draw(st.sampled_from("{}[]:,&*!|>%@`'\"#\t-?\x07é\u2028")) + lines[i][at:]
            case 6:
                j = draw(st.integers(0, len(lines) - 1))
                lines[i], lines[j] = lines[j], lines[i]
    return "\n".join(lines)


@cases
@given(mangled(TEXTS) | st.text(max_size=200))
def test_any_text(text):
    accepted(judged(lambda: manifests.validate(manifests.parse(text, "m.yaml"), "m.yaml")))


@cases
@given(
    text=mangled([path.read_text() for path in RULES]) | st.text(max_size=200),
    sets=st.lists(st.text(max_size=30), max_size=2),
)
def test_any_rules(tmp_path, text, sets):
    file = tmp_path / "rules.yaml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    judged(lambda: rules.load_rules(str(file), sets))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "a: &a {b: *a}",
        "<<: [{name: a}, {name: b}]",
        "a: {b: 1, b: 2}",
        "1: a\n1: b",
        "true: 1",
        "null: 1",
        "? {a: 1}\n: 2",
        "[" * 50_000,
        "{a: " * 50_000,
        "- " * 50_000,
        "a: " + "9" * 5000,
        "a: !!binary x",
        "a: !!set {x, y}",
        "a: !!omap [x: 1, x: 2]",
        "a: !!timestamp 2001-99-99",
        "a: 2001-02-31",
        "a: 1:99999999999999999999:1",
        "a: !!int x",
        "a: !!float x",
        "%YAML 9.9\n---\na: 1",
        "a: 1\n---\nb: 2",
        "\ufeffa: 1",
        "a: \x00",
        '"\\ud800": 1',
        "recipe: [arvae]",
        "recipe: {a: 1}",
        "recipe: ../arvae\nname: a",
        "recipe: arvae\nmodel: 1\nstages: 2\nclip: 3",
        "recipe: arvae\nstages: {frames-3: {clip: {sizes: 1}}, 7: {}}\nclip: {sizes: [[1]]}",
        "recipe: arvae\nmodel: {first_frame: {kind: [own]}}",
    ],
    ids=range(31),
)
def test_hostile_text_is_refused_soon(text):
    assert judged(lambda: manifests.validate(manifests.parse(text, "m.yaml"), "m.yaml")) is None


def test_what_would_cost_too_much_to_work_out_is_refused():
    for change in ({"batch": 10**12}, {"workers": {"count": 10**9}}, {"workers": {"count": [1, 10**9]}}):
        assert judged(lambda change=change: manifests.validate({**PLAIN, **change}, "m")) is None
