"""Lets ``import torchvision`` work where its compiled kernels don't fit the installed torch.

There is no CPU build of torchvision: beside a CPU torch its kernels fail to load, and its import then fails because two
operators were never declared. Nothing here calls them, so declaring their schemas is enough. Import this module before
torchvision; where the kernels load, it does nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from torch import library

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
OPERATORS = ("torchvision::nms", "torchvision::qnms")
_declared: list[str] = []


def ensure() -> bool:
    """Declares ``torchvision::nms`` and ``qnms`` if they have no kernels; True if it had to. Safe to call again."""
    if _declared:
        return True
    if "torchvision" in sys.modules or _kernels_load():
        return False
    for operator in OPERATORS:
        library.define(operator, SCHEMA)
        _declared.append(operator)
    return True


def _kernels_load() -> bool:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return True  # not installed: let its own import say so
    for kernels in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(str(kernels))
            return True
        except (ImportError, OSError):
            continue
    return False


ensure()
