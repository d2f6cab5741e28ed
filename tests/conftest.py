"""What all tests share: a small packed dataset, and where real footage is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from pipelines import synthetic
from pipelines.pack import pack
from pipelines.rules import Card, PackRules

ROOT = Path(__file__).parents[1]
RAY = {
    "tests/chaos/test_elastic.py",
    "tests/cluster/test_foreground.py",
    "tests/cluster/test_ray_cluster.py",
    "tests/real/test_prometheus.py",
    "tests/test_readme.py",
}
"""Files that start a Ray."""
FIRST = ("tests/chaos", "tests/trainer", "tests/cluster", "tests/real")
"""Folders whose tests take longest, in the order in which they begin."""


class _ByFile(LoadScopeScheduling):
    """Tests of one file run in one process, and so do all that start a Ray, one at a time, and all of real services.

    (pytest-xdist's ``loadgroup`` names groups in the tests' ids, which pytest 9.2 no longer takes.)
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        if path in RAY:
            return "ray"
        return "real" if path.startswith("tests/real/") else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Processes are given whole files."""
    return _ByFile(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who starts a Ray begins first; files whose tests take long come before the rest."""
    items.sort(key=_turn)


def _turn(item: pytest.Item) -> int:
    path = str(item.path.relative_to(ROOT))
    if path in RAY:
        return 0
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
