"""VideoVAE+: tables 2 to 4 of arXiv 2412.17805 at a small size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.papers import Paper, Row, Variant

STEPS = {"video": 60, "joint": 40}
ADAM = {"name": "adam", "betas": [0.9, 0.99], "warmup": 10, "decay": "cosine", "floor": 0.1}
VARIANTS = (
    Variant("whole"),
    Variant("no joint training", steps={"video": 100, "joint": 0}),
    Variant("simultaneous", {"modeling": "simultaneous", "linear": "none"}),
    Variant("sequential", {"modeling": "sequential", "linear": "none"}),
    Variant("two-stage, no linear path", {"linear": "none"}),
    Variant("kernel (5, 1, 1)", {"temporal_kernel": (5, 1, 1)}),
    Variant("kernel (3, 3, 3)", {"temporal_kernel": (3, 3, 3)}),
)


def manifest(data: Path) -> dict[str, Any]:
    linear = ["*analysis.*", "*synthesis.*"]
    phase = {"losses": {"l1": 1, "lpips": 0, "kl": 1e-7}, "adversary": None, "freeze": linear}
    return {
        "recipe": "videovaeplus",
        "model": {
            "latent_channels": 16,
            "width": 8,
            "multipliers": [1, 2, 4, 4],
            "blocks": 1,
            "groups": 4,
            "temporal_kernel": [3, 1, 1],
            "temporal_width": 8,
            "linear": "dct",
            "perceptual": None,
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
        "clip": {"stride": [1, 1], "sizes": [[32, 32]]},
        "stages": {
            "video": phase | {"optimizer": ADAM | {"lr": 1e-3}},
            "joint": phase | {"optimizer": ADAM | {"lr": 5e-4}, "image_batch": 64},
        },
        "checkpoint": {"every_steps": 40, "keep": 20},
    }


def tables() -> dict[str, tuple[Row, ...]]:
    """Joint training on videos (table 1, WebVid) and on images (not in the paper), designs, kernels."""
    steps, frames = sum(STEPS.values()), 16
    joint = Row("joint training", "whole", steps, frames, (34.16, 0.936))
    plain = Row("two-stage", "two-stage, no linear path", steps, frames, (24.67, 0.7234))
    return {
        "Table 1, joint training, videos": (
            Row("videos alone, as many steps", "no joint training", steps, frames, (33.88, 0.933)),
            joint,
        ),
        "As in table 2, joint training, single images": (
            Row("videos alone, as many steps", "no joint training", steps, 1, None),
            Row("joint training", "whole", steps, 1, None),
        ),
        "Table 3, designs (without the linear path)": (
            Row("simultaneous", "simultaneous", steps, frames, (24.06, 0.7315)),
            Row("sequential, trained throughout", "sequential", steps, frames, (23.37, 0.6917)),
            plain,
        ),
        "Table 4, temporal kernels": (
            Row("(5, 1, 1)", "kernel (5, 1, 1)", steps, frames, (30.87, 0.9004)),
            Row("(3, 3, 3)", "kernel (3, 3, 3)", steps, frames, None),
            Row("(3, 1, 1)", "whole", steps, frames, (30.33, 0.8898)),
        ),
        "Ours, the linear path": (plain, Row("linear: dct", "whole", steps, frames, None)),
    }


PAPER = Paper(
    "VideoVAE+", 16, VARIANTS, manifest, STEPS, tables(),
    "32 x 32 pixels, 4 x 8 x 8 with 16 channels, 8 wide, no image autoencoder to start from, {stages}, batch 4 or 64 "
    "images, Adam at 1e-3, the linear path at rest, no LPIPS and no adversary; {clips} held-back clips of 16 "
    "frames at 12 frames/s. The paper: 128 wide, from SD's weights, 495,000 steps; WebVid, the large-motion set and "
    "MMTrailer.",
)  # fmt: skip
