"""The README's prose is executable: its commands run, in their order, and its figures are the code's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from pipelines import synthetic
from tests.trainer.processes import command
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
    ran = 0
    for line in COMMANDS:
        if not line.startswith("moviola "):
            continue
        arguments = shlex.split(line)[1:]
        status, out, err = command([*arguments, *(short if arguments[0] == "train" else [])], tmp_path)
        assert status == 0, f"{line}\n{out}\n{err}"
        ran += 1
    assert ran >= 9
    assert "mine" in err
