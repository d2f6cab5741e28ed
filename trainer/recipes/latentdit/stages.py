"""One stage: the velocity of a flow from latents to noise."""

from __future__ import annotations

from pipelines.contracts import ClipRule
from trainer.stage import Stage

FLOW = "flow"
NO_PIXELS = ClipRule(frames=1, sizes=((1, 1),), flip=0.0)
STEPS, BATCH = 400_000, 256


def stages() -> tuple[Stage, ...]:
    """DiT's steps, batch and learning rate (Peebles and Xie, section 4): constant, without decay or warm-up."""
    return (
        Stage(
            name=FLOW,
            steps=STEPS,
            batch=BATCH,
            clip=NO_PIXELS,
            losses={FLOW: 1.0},
            optimizer={"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.999)},
        ),
    )
