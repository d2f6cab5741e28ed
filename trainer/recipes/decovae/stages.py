"""The published schedule as data: section 3.3 and the implementation details of section 4.1; what they leave out is
LeanVAE's, as README.md says.
"""

from __future__ import annotations

from pipelines.contracts import ClipRule
from trainer.recipes.decovae.config import DecoVaeConfig
from trainer.recipes.decovae.losses import MOTION_STAGE
from trainer.stage import AdversaryStage, Stage

CLIP = ClipRule(frames=17, sizes=((256, 256),))
LOSSES = {"l1": 4.0, "lpips": 4.0, "kl": 1e-7, "dwt_low": 0.2, "dwt_high": 0.4}
ADAM = {"name": "adam", "lr": 5e-5, "betas": (0.5, 0.9), "clip": 1.0}
MOTION_STEPS, STATIC_STEPS, DYNAMIC_STEPS = 100_000, 400_000, 100_000
WARM_UP = 5_000
FADE = {"decay": "cosine", "floor": 0.2}


def _adversary(start: int = 0) -> AdversaryStage:
    return AdversaryStage(
        weight=0.2, start=start, lecam=0.005, optimizer={"lr": 1e-5, "decay": "constant", "warmup": 0}
    )


def stages(config: DecoVaeConfig) -> tuple[Stage, ...]:
    """A warm-up of the motion module, left out where its weights are loaded; then phases 1 and 2, or one for all.

    The adversary starts after 400,000 steps either way.
    """
    motion = Stage(
        name=MOTION_STAGE,
        steps=0 if config.motion.weights is not None else MOTION_STEPS,
        clip=CLIP,
        train=("motion.*",),
        losses={"warp": 1.0},
        optimizer={"name": "adam", "lr": 1e-4},
    )
    static = Stage(
        name="static",
        steps=STATIC_STEPS,
        clip=CLIP,
        freeze=("motion.*",),
        losses=LOSSES,
        optimizer=ADAM | {"warmup": WARM_UP},
    )
    dynamic = Stage(
        name="dynamic",
        steps=DYNAMIC_STEPS,
        clip=CLIP,
        freeze=("encoder.keyframe.*",),
        losses=LOSSES,
        adversary=_adversary(),
        optimizer=ADAM | FADE,
    )
    joint = Stage(
        name="joint",
        steps=STATIC_STEPS + DYNAMIC_STEPS,
        clip=CLIP,
        losses=LOSSES,
        adversary=_adversary(start=STATIC_STEPS),
        optimizer=ADAM | {"warmup": WARM_UP},
    )
    if config.components == "none":
        return (joint,)
    return (motion, static, dynamic) if config.components == "dedicated" and config.adaptation else (motion, joint)
