"""What may be chosen about DeCo-VAE. The paper leaves much open: README.md says why each default is what it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.losses import PerceptualSpec
from trainer.recipe import FREE

Width = Annotated[int, Field(ge=1, le=4096)]
Layers = Annotated[int, Field(ge=0, le=16)]
LATENT_STRIDE = (4, 8, 8)


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BackboneSpec(_Part):
    """Widths and depths of an encoder and of the decoder. The defaults are LeanVAE's."""

    low: Width = Field(128, description="Channels of the branch for the wavelets' low band.")
    high: Width = Field(384, description="Channels of the branch for their high bands.")
    separate: Layers = Field(2, description="Blocks of each branch.")
    fused: Layers = Field(4, description="Blocks after the branches are joined.")
    iterations: Layers = Field(2, description="Unrolled iterations of the decoder's sparse recovery.")
    iteration_layers: Layers = Field(2, description="Blocks of each transform of an iteration.")

    @property
    def width(self) -> int:
        """Channels of the joined branches."""
        return self.low + self.high


class MotionSpec(_Part):
    """The motion module M: the motion encoder and decoder of scale-space flow (Agustsson et al. 2020)."""

    width: Width = Field(128, description="Channels between the convolutions.")
    latent: Width = Field(192, description="Channels between encoder and decoder.")
    weights: str | None = Field(
        None, description="Path of a state dict in CompressAI's `ssf2020` layout; null starts from no motion."
    )
    gain: float = Field(
        8.0, gt=0, description="What the motion is multiplied with before it is coded; 1 codes it as it is."
    )


class DecoVaeConfig(_Part):
    """One DeCo-VAE. The defaults are the published configuration."""

    latent_channels: Annotated[int, Field(ge=1, le=256)] = Field(16, description="D, channels of each latent.")
    components: Literal["dedicated", "concat", "none"] = Field(
        "dedicated",
        description="An encoder for each of keyframe, motion and residual; one for the three as channels (table 4); or "
        "one for plain pixels (the first row of table 5).",
    )
    adaptation: bool = Field(True, description="Phases with frozen parts (section 3.3); false trains all at once.")
    keyframe: Literal["repeated", "single"] = Field(
        "repeated",
        description="`single` codes the keyframe once instead of T times, and motion and residual of the frames after "
        "it (ours): 9 latent steps in place of 15 at 17 frames, 1 in place of 3 at one.",
    )
    backbone: BackboneSpec = BackboneSpec()
    motion: MotionSpec = MotionSpec()
    linear: Literal["none", "dct"] = Field(
        "none",
        description="`dct` adds a linear path to encoders and decoder that starts as the low frequencies of a cosine "
        "transform, and starts the nonlinear path at 0 (ours): a usable codec at step 0.",
    )
    window: Annotated[int, Field(ge=1, le=257)] = Field(
        17, description="Most frames for one keyframe; 1 + 4 k.", json_schema_extra=FREE
    )
    overlap: Annotated[int, Field(ge=0, le=16)] = Field(
        1,
        description="Frames of a long video that two windows share, blended; none are shared across a cut.",
        json_schema_extra=FREE,
    )
    new_keyframe: Annotated[float, Field(gt=0)] | None = Field(
        None,
        json_schema_extra=FREE,
        description="Root mean square of the residual, in pixels of [-1, 1], beyond which a frame becomes a keyframe "
        "(ours); null takes one for each window.",
    )
    perceptual: PerceptualSpec | None = Field(
        PerceptualSpec(backbone="vgg"), description="LPIPS of the loss; null for stages whose losses.lpips is 0."
    )
    perceptual_frames: Annotated[int, Field(ge=0)] = Field(
        4, description="LPIPS is of frame 1 and of so many successive ones, drawn for each clip; 0 takes every frame."
    )

    @model_validator(mode="after")
    def _fits(self) -> DecoVaeConfig:
        if self.window % LATENT_STRIDE[0] != 1:
            raise ValueError(f"window is {self.window}; a window has 1 + 4 k frames, 17 for example")
        if self.overlap > self.window // 2:
            raise ValueError(f"overlap is {self.overlap}; it may be half of window, {self.window // 2}, at most")
        if self.components != "dedicated" and self.keyframe == "single":
            raise ValueError("keyframe: single needs components: dedicated; other latents hold all frames")
        if self.components == "none" and self.new_keyframe is not None:
            raise ValueError("new_keyframe is judged by the residual, and components: none has no residual")
        if self.components == "concat" and self.linear == "dct":
            raise ValueError("linear: dct is a transform of three channels, and components: concat has nine")
        if self.latent_channels > 3 * 64:
            raise ValueError(f"latent_channels is {self.latent_channels}; an 8 x 8 cell of a frame has 192 numbers")
        return self
