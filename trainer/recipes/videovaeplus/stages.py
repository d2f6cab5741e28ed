"""The published schedule as data: section 4.1; what it leaves out is the released code's, as README.md says."""

from __future__ import annotations

from pipelines.contracts import ClipRule
from trainer.recipes.videovaeplus.config import SD14_CHANNELS, VideoVaePlusConfig
from trainer.stage import AdversaryStage, DiscriminatorSpec, Stage

CLIP = ClipRule(frames=16, stride=(4, 4), sizes=((216, 216),))
LOSSES = {"l1": 1.0, "lpips": 1.0, "kl": 1e-6}
ADAM = {"name": "adam", "lr": 1e-4, "betas": (0.5, 0.9)}
VIDEO_STEPS = {4: 230_000, 16: 310_000}
JOINT_STEPS = {4: 100_000, 16: 185_000}
TEXT_STEPS = 160_000
GAN_START = 50_000
IMAGES = 128
"""Images of a batch: the 16 frames of as many clips as a batch of 8 has."""
TEXT, TEMPORAL = "*text.*", "*temporal*"
"""Parameters of the text guidance, and those that an image doesn't reach."""


def adversary(kind: str, start: int = 0) -> AdversaryStage:
    """Hinge losses, weight 0.5 times the adaptive ratio."""
    network = DiscriminatorSpec(kind="patch-3d" if kind == "video" else "patch-2d")
    return AdversaryStage(weight=0.5, start=start, network=network, generator="hinge", adaptive=1e4)


def stages(config: VideoVaePlusConfig) -> tuple[Stage, ...]:
    """Video; images and videos; videos with text, where there is text.

    Option 2 keeps an inherited image autoencoder as it is, so that images have nothing to teach: no joint training.
    """
    published = 4 if config.latent_channels <= SD14_CHANNELS else 16
    kept = config.modeling == "sequential" and config.weights is not None
    train = (TEXT, TEMPORAL) if kept else ("*",)
    video = Stage(
        name="video",
        steps=VIDEO_STEPS[published],
        clip=CLIP,
        train=train,
        freeze=(TEXT,),
        image_freeze=(TEMPORAL,),
        losses=LOSSES,
        adversary=adversary(config.gan, GAN_START),
        optimizer=ADAM,
    )
    joint = Stage(
        name="joint",
        steps=0 if kept else JOINT_STEPS[published],
        clip=CLIP,
        freeze=(TEXT,),
        image_share=0.2,
        image_batch=IMAGES,
        image_freeze=(TEMPORAL,),
        losses=LOSSES,
        adversary=adversary(config.joint_gan),
        optimizer=ADAM,
    )
    cross_modal = Stage(
        name="cross-modal",
        steps=TEXT_STEPS,
        clip=CLIP,
        train=train,
        image_freeze=(TEMPORAL,),
        losses=LOSSES,
        adversary=adversary(config.gan),
        optimizer=ADAM,
    )
    return (video, joint, cross_modal) if config.text else (video, joint)
