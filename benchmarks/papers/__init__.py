"""What ``benchmarks.learning`` and ``benchmarks.ablations`` run of each paper: a module a recipe, each with a PAPER."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Variant:
    """Changes to the model, to the steps of its stages, and to their other fields."""

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    stages: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of a table: where to measure, what the paper has there (PSNR, SSIM), and what is set to measure it."""

    title: str
    variant: str
    step: int
    frames: int
    paper: tuple[float, float] | None
    sets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paper:
    """A paper's ablations: variants, the manifest that they change, tables whose last row the others are held against.

    ``frames`` are those of a packed clip. ``steps`` by stage are those of a variant that names none; all variants take
    as many in all. ``about`` says what was trained here, and what by the authors.
    """

    title: str
    frames: int
    variants: tuple[Variant, ...]
    manifest: Callable[[Path], dict[str, Any]]
    steps: Mapping[str, int]
    tables: Mapping[str, tuple[Row, ...]]
    about: str

    @property
    def all_steps(self) -> int:
        """Steps of the whole schedule."""
        return sum(self.steps.values())

    @property
    def rules(self) -> list[str]:
        """How the footage is packed, as changes to ``manifests/datasets/demo.yaml``."""
        return [f"frames={self.frames}", f"least_frames={self.frames}", "clips_per_video=30"]


NAMES = sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Paper:
    """The paper of a recipe, one of NAMES."""
    return importlib.import_module(f"benchmarks.papers.{name}").PAPER
