"""The schedule as data: two stages and post-training. Steps and weights are ours, as README.md says."""

from __future__ import annotations

from pipelines.contracts import ClipRule
from trainer.recipes.onedva.config import OneDvaConfig
from trainer.stage import Stage

STRUCTURAL, ADAPTIVE, POST = "structural", "adaptive", "post"
CLIP = ClipRule(frames=17, sizes=((256, 256), (256, 456)))
ADAMW = {"name": "adamw", "lr": 1e-4, "betas": (0.9, 0.95)}
LOSSES = {"flow": 1.0, "kl": 1e-6, "repa": 0.5, "lpips": 0.1}
SEQUENCE = ("encoder.queries*", "encoder.to_1d.*", "decoder.from_1d.*", "decoder.mask*", "decoder.places*")
"""Parameters of the 1D latents."""


def stages(config: OneDvaConfig) -> tuple[Stage, ...]:
    """Stage 1 without 1D latents, stage 2 with them; post-training, which needs a predictor, has no steps by itself."""
    losses = {
        name: weight
        for name, weight in LOSSES.items()
        if not (name == "repa" and config.repa is None) and not (name == "lpips" and config.perceptual is None)
    }
    return (
        Stage(
            name=STRUCTURAL, steps=300_000, clip=CLIP, freeze=SEQUENCE, losses=losses, optimizer=ADAMW,
            knobs={"latents": "structural"},
        ),
        Stage(
            name=ADAPTIVE, steps=300_000, clip=CLIP, losses=losses | {"align": 0.1}, optimizer=ADAMW,
            knobs={"latents": "both"},
        ),
        Stage(
            name=POST, steps=0, clip=CLIP, train=("decoder.*",), optimizer=ADAMW, init_average=True,
            losses={name: weight for name, weight in losses.items() if name in ("flow", "lpips")},
            knobs={"latents": "predicted"},
        ),
    )  # fmt: skip
