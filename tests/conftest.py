"""What all tests share: a small packed dataset, and where real footage is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines import synthetic
from pipelines.pack import pack
from pipelines.rules import Card, PackRules

ROOT = Path(__file__).parents[1]
FIRST = ("tests/chaos", "tests/trainer", "tests/cluster", "tests/real")
"""Folders whose tests take longest, in the order in which they begin."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who starts a Ray begins first, one at a time; files whose tests take long come before the rest.

    Tests of one file run in one process, and so do those that share a real service.
    """
    for item in items:
        path = item.path.relative_to(ROOT)
        group = "ray" if item.get_closest_marker("ray") else "real" if path.parent.name == "real" else str(path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    if item.get_closest_marker("ray"):
        return 0
    path = str(item.path.relative_to(ROOT))
    return 1 + next((turn for turn, folder in enumerate(FIRST) if path.startswith(folder)), len(FIRST))


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of procedural footage: 12 clips of 16 frames, 32x32, in two shards. Read it only."""
    folder = tmp_path_factory.mktemp("dataset")
    synthetic.write_videos(folder / "videos", count=6, seconds=4 / 3, size=(32, 32), seed=1)
    rules = PackRules(
        card=Card(name="small"),
        frames=16,
        least_frames=16,
        cuts=False,
        size=(32, 32),
        preset="ultrafast",
        shard_clips=8,
    )
    pack(folder / "videos", folder / "shards", rules, workers=2)
    return folder / "shards"


@pytest.fixture(scope="session")
def footage() -> Path:
    """The folder of real videos that MOVIOLA_FOOTAGE names; without one the test is skipped."""
    folder = Path(os.environ.get("MOVIOLA_FOOTAGE", ROOT / "../shared/data/videos"))
    if not folder.is_dir():
        pytest.skip(f"no real footage at {folder}; MOVIOLA_FOOTAGE names a folder of videos")
    return folder
