"""The published schedule as data: section 3.4 and the implementation details of section 4.1."""

from __future__ import annotations

from pipelines.contracts import ClipRule
from trainer.recipes.arvae.config import ArvaeConfig, OwnFirstFrame
from trainer.stage import Stage

SIZE = (256, 256)
LOSSES = {"mse": 1.0, "ssim": 0.5, "lpips": 0.5}
FRAMES_AND_STEPS = ((3, 300_000), (5, 210_000), (7, 120_000))
FIRST_FRAME_STEPS = 100_000
# "randomly skip 0-5 frames between adjacent input frames" in the first stage
SKIPPED = 5


def stages(config: ArvaeConfig) -> tuple[Stage, ...]:
    """Stages of 3, 5 and 7 frames, after one for the image autoencoder where that is ours to train.

    Stage s supervises frames L_{s-1} + 1 to L_s only; L_0 is 1, because frame 1 belongs to the image autoencoder.
    """
    first = Stage(
        name="first-frame",
        steps=FIRST_FRAME_STEPS,
        clip=ClipRule(frames=1, sizes=(SIZE,)),
        train=("first_frame.*",),
        losses=LOSSES,
        optimizer={"lr": 1e-4},
    )
    later = []
    seen = 1
    for number, (frames, steps) in enumerate(FRAMES_AND_STEPS):
        skipped = {"stride": (1, SKIPPED + 1), "stride_per": "gap"} if number == 0 else {}
        later.append(
            Stage(
                name=f"frames-{frames}",
                steps=steps,
                clip=ClipRule(frames=frames, sizes=(SIZE,), **skipped),
                freeze=("first_frame.*",),
                losses=LOSSES,
                supervise=(seen + 1, frames),
                optimizer={"name": "adamw", "lr": 1e-5},
            )
        )
        seen = frames
    return (first, *later) if isinstance(config.first_frame, OwnFirstFrame) else tuple(later)
