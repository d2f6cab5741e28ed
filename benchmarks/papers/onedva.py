"""One-DVA: the ablations that arXiv 2602.04220 is said to have, at a small size. Its figures are not public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.papers import Paper, Row, Variant
from trainer.recipes.onedva.stages import SEQUENCE

STEPS = {"structural": 60, "adaptive": 180}
ALIGNED = {"adaptive": {"losses": {"align": 0.1}}}
FIXED = {"dropout": {"by": "none"}}
VARIANTS = (
    Variant("whole", stages=ALIGNED),
    Variant("no alignment"),
    Variant("fixed length", FIXED, stages=ALIGNED),
    Variant("lengths drawn whatever the motion", {"dropout": {"by": "uniform"}}, stages=ALIGNED),
    Variant("velocity predicted", {"predict": "velocity", "linear": "none"}, stages=ALIGNED),
    Variant("no linear path", {"linear": "none"}, stages=ALIGNED),
)
LINEAR = ["*.analysis.*", "*.synthesis.*"]
FULL, HALF = ("model.length.by=all",), ("model.length.by=budget", "model.length.numbers_per_frame=113")


def manifest(data: Path) -> dict[str, Any]:
    losses = {"flow": 1, "kl": 1e-7, "repa": 0, "lpips": 0}
    adamw = {"lr": 1e-3, "betas": [0.9, 0.99], "warmup": 20, "decay": "cosine", "floor": 0.1}
    return {
        "recipe": "onedva",
        "model": {
            "latent_channels": 16,
            "queries": 80,
            "encoder": {"width": 64, "layers": 2, "heads": 4},
            "decoder": {"width": 64, "layers": 2, "heads": 4, "pixel_channels": 4},
            "dropout": {"full": 0.04, "least": 0.2},
            "length": {"every": 5},
            "predict": "clean",
            "linear": "dct",
            "gate": True,
            "condition_dropout": 0,
            "timesteps": {"tail_share": 0.5},
            "least_time": 0.2,
            "sampling": {"steps": 1, "guidance": 1},
            "repa": None,
            "perceptual": None,
        },
        "data": {"train": f"{data}/train", "eval": f"{data}/eval"},
        "batch": 4,
        "precision": "fp32",
        "clip": {"sizes": [[64, 64]]},
        "stages": {
            "structural": {"losses": losses, "optimizer": adamw, "freeze": [*LINEAR, *SEQUENCE]},
            "adaptive": {"losses": losses | {"align": 0}, "optimizer": adamw, "freeze": LINEAR},
        },
        "checkpoint": {"every_steps": 240, "keep": 2},
    }


def tables() -> dict[str, tuple[Row, ...]]:
    """Alignment, variable length, sampling steps, and our own choices; every row at the same numbers as its last."""
    steps, frames = sum(STEPS.values()), 17

    def row(title: str, variant: str, *sets: str) -> Row:
        return Row(title, variant, steps, frames, None, sets)

    return {
        "Self-alignment, all 1D latents": (
            row("none", "no alignment", *FULL),
            row("weight 0.1", "whole", *FULL),
        ),
        "Fixed against variable length, all 1D latents": (
            row("fixed", "fixed length", *FULL),
            row("drawn whatever the motion", "lengths drawn whatever the motion", *FULL),
            row("drawn around the motion", "whole", *FULL),
        ),
        "The same, half of them": (
            row("fixed", "fixed length", *HALF),
            row("drawn whatever the motion", "lengths drawn whatever the motion", *HALF),
            row("drawn around the motion", "whole", *HALF),
        ),
        "Sampling steps, all 1D latents": (
            row("2", "whole", *FULL, "model.sampling.steps=2"),
            row("4", "whole", *FULL, "model.sampling.steps=4"),
            row("10", "whole", *FULL, "model.sampling.steps=10"),
            row("1", "whole", *FULL),
        ),
        "Ours, what is predicted, all 1D latents, 10 sampling steps": (
            row("velocity", "velocity predicted", *FULL, "model.sampling.steps=10"),
            row("clean frames, no linear path", "no linear path", *FULL, "model.sampling.steps=10"),
            row("clean frames, linear path", "whole", *FULL, "model.sampling.steps=10"),
        ),
    }


PAPER = Paper(
    "One-DVA", 17, VARIANTS, manifest, STEPS, tables(),
    "64 x 64 pixels, 4 x 16 x 16, 16 channels, 80 structural and up to 80 1D latents, {stages}, batch 4, AdamW at "
    "1e-3, clean frames predicted beside a linear path, no LPIPS and no REPA; {clips} held-back clips of 17 frames at "
    "12 frames/s. The paper's own figures are not public.",
)  # fmt: skip
