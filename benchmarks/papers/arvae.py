"""ARVAE: tables 2 to 5 of arXiv 2512.11293 at a small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.papers import Paper, Row, Variant

STEPS = {"first-frame": 40, "frames-3": 120, "frames-5": 40, "frames-7": 40}
ONE_STAGE = {"first-frame": 40, "frames-3": 200, "frames-5": 0, "frames-7": 0}
VARIANTS = (
    Variant("whole"),
    Variant("one scale, full resolution", {"propagation": "finest"}),
    Variant("one scale, that of the latent", {"propagation": "coarsest"}),
    Variant("no state features", {"state_features": False}),
    Variant("one stage of 3 frames, as many steps", steps=ONE_STAGE),
)


def manifest(data: Path) -> dict[str, Any]:
    losses = {"mse": 1, "ssim": 0.1, "lpips": 0}
    later = {"losses": losses | {"warp": 0.1}}
    return {
        "recipe": "arvae",
        "model": {
            "down": 8,
            "motion_channels": 2,
            "supplement_channels": 6,
            "widths": [8, 16, 24, 32],
            "motion_width": 8,
            "state_width": 8,
            "spynet": {"levels": 3, "widths": [16, 16, 8, 8], "kernel": 3},
            "first_frame": {"kind": "own", "down": 8, "channels": 48, "widths": [8, 16, 32, 48]},
            "perceptual": None,
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
        "clip": {"sizes": [[32, 32]]},
        "optimizer": {"betas": [0.9, 0.99], "warmup": 10, "decay": "cosine", "floor": 0.1},
        "stages": {
            "first-frame": {"losses": losses, "batch": 8, "optimizer": {"lr": 5e-4}},
            "frames-3": later | {"optimizer": {"lr": 1e-3}},
            "frames-5": later | {"optimizer": {"lr": 5e-4}},
            "frames-7": later | {"optimizer": {"lr": 5e-4}},
        },
        "checkpoint": {"every_steps": 40, "keep": 20},
    }


def tables() -> dict[str, tuple[Row, ...]]:
    """The paper's tables 2 to 5."""
    steps, frames = sum(STEPS.values()), 16
    whole = Row("whole: 3, 5 and 7 frames, 16 at inference", "whole", steps, frames, (30.12, 0.870))
    ends = {3: 160, 5: 200}
    single = (24.41, 0.755)
    return {
        "Table 2, propagated features": (
            Row("one scale, full resolution", "one scale, full resolution", steps, frames, single),
            Row("one scale, that of the latent", "one scale, that of the latent", steps, frames, single),
            whole,
        ),
        "Table 3, state features": (Row("none", "no state features", steps, frames, (25.08, 0.836)), whole),
        "Table 4, stages": (
            Row("after 3 frames", "whole", ends[3], frames, (28.50, 0.845)),
            Row("3 frames only, as many steps as all", "one stage of 3 frames, as many steps", steps, frames, None),
            Row("after 5 frames", "whole", ends[5], frames, (29.76, 0.855)),
            whole,
        ),
        "Table 5, frames at inference": (
            Row("4 frames", "whole", steps, 4, (31.12, 0.890)),
            Row("8 frames", "whole", steps, 8, (30.62, 0.879)),
            whole,
        ),
    }


PAPER = Paper(
    "ARVAE", 16, VARIANTS, manifest, STEPS, tables(),
    "32 x 32 pixels, 8 x 8 downsampling, 2 + 6 channels, {stages}, batch 4, AdamW at 1e-3; {clips} held-back clips "
    "of 16 frames at 12 frames/s. The paper: 256 x 256, 16 x 16 with 2 + 14, 630,000 steps of batch 64, MCL-JCV.",
)  # fmt: skip
