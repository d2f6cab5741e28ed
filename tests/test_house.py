"""The rules of the house: which way imports point, one set of pins, no private paths, manifests that parse."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("pipelines", "trainer", "cluster") for path in (ROOT / package).rglob("*.py"))


def imports(source: str, path: str) -> Iterator[str]:
    """Dotted names that a module's source imports anywhere in it, relative ones resolved against its ``path``."""
    package = path.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def broken_rules(path: str, names: list[str]) -> list[str]:
    """What ``path`` imports against the rules."""
    package = path.split("/")[0]
    forbidden = {"pipelines": ("trainer", "cluster"), "trainer": ("cluster",), "cluster": ()}[package]
    if package != "cluster":
        forbidden += ("ray",)
    if path != "trainer/engine.py":
        forbidden += ("deepspeed",)
    if path != "pipelines/storage.py":
        forbidden += ("fsspec", "s3fs", "boto3", "botocore", "aiobotocore")
    broken = [name for name in names if within(name, *forbidden)]
    if path.startswith("trainer/recipes/") and path.count("/") > 2:
        own = ".".join(path.split("/")[:3])
        contracts = ("pipelines.contracts", "pipelines.faults", "trainer.stage", "trainer.recipe")
        allowed = (own, *contracts, "trainer.blocks", "trainer.losses", "trainer.pictures")
        broken += [n for n in names if within(n, "pipelines", "trainer") and not within(n, *allowed)]
    return broken


@pytest.mark.parametrize("path", [str(path.relative_to(ROOT)) for path in SOURCES])
def test_imports_point_one_way(path: str) -> None:
    assert broken_rules(path, list(imports((ROOT / path).read_text(), path))) == []


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("pipelines/order.py", "def f():\n    import trainer.stage", ["trainer.stage"]),
        ("pipelines/order.py", "from trainer import stage", ["trainer.stage"]),
        ("trainer/loop.py", "import ray.train as train", ["ray.train"]),
        ("trainer/loop.py", "if True:\n    from deepspeed import zero", ["deepspeed.zero"]),
        ("trainer/engine.py", "import deepspeed", []),
        ("pipelines/index.py", "import s3fs", ["s3fs"]),
        ("cluster/worker.py", "import ray, rayon\nfrom trainer import loop", []),
        ("trainer/recipes/arvae/model.py", "from ..decovae import model", ["trainer.recipes.decovae.model"]),
        ("trainer/recipes/arvae/model.py", "from trainer import loop", ["trainer.loop"]),
        ("trainer/recipes/arvae/model.py", "from .losses import f\nfrom trainer.blocks.conv import Conv", []),
    ],
)
def test_the_import_rules_catch_what_they_should(path: str, source: str, broken: list[str]) -> None:
    assert broken_rules(path, list(imports(source, path))) == broken


@pytest.mark.parametrize("module", ["pipelines.pack", "pipelines.cutting"])
def test_packing_starts_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, "two seconds a worker"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[\w.-]+==[\w.!+]+", line) for line in lines), lines
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert pins()[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_image_takes_its_pins_from_constraints() -> None:
    text = (ROOT / "Dockerfile").read_text()
    steps = [line for line in text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    installs = [step for step in steps if re.search(r"\bpip3? install\b|\buv\b", step)]
    assert installs
    assert all("-c constraints.txt" in step for step in installs)
    copied = next(i for i, step in enumerate(steps) if step.startswith("COPY") and "constraints.txt" in step.split())
    assert copied < steps.index(installs[0])
    assert not re.search(r"[=~<>]=\s*\d", "".join(steps)), "a version in the Dockerfile beside constraints.txt"
    assert any(step.startswith("USER") and step.split()[1] != "root" for step in steps)


def test_the_image_has_the_cuda_of_the_pinned_torch() -> None:
    text = (ROOT / "Dockerfile").read_text()
    torch, cuda = re.search(r"torch (\d+\.\d+) from PyPI is built against CUDA ([\d.]+\d)", text).groups()
    assert pins()["torch"].startswith(f"{torch}."), "torch's pin moved: look up its CUDA, then change base and comment"
    assert f"FROM nvidia/cuda:{cuda}-" in text


def committed() -> list[Path]:
    listing = subprocess.run(["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


# Home folders and mounts of somebody's machine. /home/ray is where Ray's images live.
PRIVATE = re.compile(r"(?<![\w.$}])/(?:work|root|Users|home/(?!ray\b)\w+)/[\w.]")


def test_no_committed_text_names_a_private_path() -> None:
    found = []
    for path in committed():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{i}: {line}" for i, line in enumerate(lines, 1) if PRIVATE.search(line)]
    assert found == []


def test_private_paths_are_recognised() -> None:
    private = ["cd " + "/".join(("", *parts)) for parts in (("work", "x"), ("root", ".cache"), ("home", "ann", "x"))]
    assert all(map(PRIVATE.search, private))
    harmless = ["/home/ray/moviola", "https://host/teamwork/x"]
    harmless += ["/".join(parts) for parts in (("$HOME", "work", "x"), ("pip", "work", "x"))]
    assert not any(map(PRIVATE.search, harmless))


@pytest.mark.parametrize("path", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "manifests").rglob("*.yaml")))
def test_manifests_are_yaml(path: str) -> None:
    documents = list(yaml.safe_load_all((ROOT / path).read_text()))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def literals(source: str) -> Iterator[str]:
    """Every string of a module as it reads in the docs: values of an f-string are an ellipsis."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_documented_failures_are_messages_of_the_source() -> None:
    python = [text for path in SOURCES for text in literals(path.read_text())]
    shell = [re.sub(r"\$\{[^}]*\}|\$\w+", "…", path.read_text()) for path in (ROOT / "scripts").glob("*.sh")]
    rows = re.findall(r"^\| `(.+)` \| .+ \| .+ \|$", (ROOT / "docs/failures.md").read_text(), re.MULTILINE)
    assert len(rows) > 30
    missing = [row for row in rows if not any(row.strip("…") in text for text in (*python, *shell))]
    assert missing == []


def test_the_stage_lists_of_the_papers_are_valid() -> None:
    from pipelines.contracts import ClipRule
    from trainer.stage import AdversaryStage, Schedule, Stage

    names: dict[str, object] = {"Stage": Stage, "ClipRule": ClipRule, "AdversaryStage": AdversaryStage}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL):
        exec(block, names)
    steps = {paper: Schedule(names[paper], 8, 0).steps for paper in ("arvae", "decovae", "videovaeplus", "onedva")}
    assert steps == {"arvae": 730_000, "decovae": 600_000, "videovaeplus": 655_000, "onedva": 600_000}
    assert Schedule(names["latentdit"], 8, 0).clips == 400_000 * 256
