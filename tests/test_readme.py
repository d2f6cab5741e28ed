"""The README's prose is executable: its commands run, in their order, and its figures are the code's."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines import synthetic
from trainer import recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)]
COMMANDS = [line for block in BLOCKS for line in block]


def test_every_make_target_named_is_there():
    targets = [line.split()[1] for line in COMMANDS if line.startswith("make ")]
    assert targets == ["demo", "test"]
    promised = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for target in {*targets, *promised, *re.findall(r"`make (\w+)", README)} - {"setup"}:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0 and "Nothing to be done" not in dry.stdout, (target, dry.stdout, dry.stderr)


def test_links_and_pictures_are_there():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_every_recipe_that_trains_is_there_and_no_other_is_promised():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\w ]+) \|$", README, re.MULTILINE)
    assert {name for name, state in rows if state == "trains"} == set(recipe.names())


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_commands_run_in_their_order(tmp_path):
    synthetic.write_videos(tmp_path / "videos", count=4, seconds=2.0, size=(64, 64))
    (tmp_path / "manifests").symlink_to(ROOT / "manifests")
    short = [
        part
        for stage, steps in (("first-frame", 2), ("frames-3", 1), ("frames-5", 1), ("frames-7", 1))
        for part in ("--set", f"stages.{stage}.steps={steps}")
    ]
    moviola = [sys.executable, "-m", "cluster.cli"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = 0
    for line in COMMANDS:
        if not line.startswith("moviola "):
            continue
        arguments = line.split()[1:]
        done = subprocess.run(
            [*moviola, *arguments, *(short if arguments[0] == "train" else [])],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 9
    assert "mine" in done.stderr
