"""Fixtures of the chaos tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.lab import Lab, smoke


@pytest.fixture(scope="session")
def lab(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Runs of 16 steps on the local disk."""
    return Lab(tmp_path_factory.mktemp("chaos"), smoke(str(small_dataset), steps=4))
