"""What may be chosen about ARVAE. The paper leaves most of it open: README.md says why each default is what it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from trainer.losses import PerceptualSpec

# Channels that start: gradient takes of the first four convolutions of a SpyNet level.
GRADIENT_WIDTHS = (8, 8, 4, 4)
Width = Annotated[int, Field(ge=1, le=1024)]

PUBLISHED_WIDTHS: dict[int, tuple[int, ...]] = {
    8: (32, 48, 96, 96),
    16: (32, 48, 64, 80, 96),
    32: (32, 48, 64, 72, 72, 72),
}


def _one_width_per_scale(widths: tuple[int, ...], down: int, field: str) -> None:
    scales = down.bit_length()
    if len(widths) != scales:
        raise ValueError(f"{field} has {len(widths)} entries; down: {down} has {scales} scales (1 to 1/{down})")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SpynetSpec(_Part):
    """The motion estimator f_ME (Ranjan and Black 2017)."""

    levels: Annotated[int, Field(ge=1, le=8)] = Field(5, description="Levels of the pyramid, 5 as in SpyNet's paper.")
    widths: tuple[Width, Width, Width, Width] = Field(
        (32, 64, 32, 16), description="Channels between the five convolutions of a level."
    )
    kernel: Literal[3, 5, 7] = Field(7, description="Side of the kernels.")
    finest: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="The field is estimated at 1 / 2**finest of the resolution and enlarged."
    )
    start: Literal["gradient", "still"] = Field(
        "gradient", description="Initial weights: a gradient method built from ReLUs, or nothing moves."
    )

    @model_validator(mode="after")
    def _wide_enough(self) -> SpynetSpec:
        if self.start == "gradient" and any(w < least for w, least in zip(self.widths, GRADIENT_WIDTHS, strict=True)):
            raise ValueError(f"widths {list(self.widths)}: start: gradient takes at least {list(GRADIENT_WIDTHS)}")
        return self


class OwnFirstFrame(_Part):
    """A small image autoencoder that the stage `first-frame` trains."""

    kind: Literal["own"]
    down: Literal[4, 8, 16, 32] = Field(8, description="Pixels of a latent cell's side.")
    channels: Annotated[int, Field(ge=1, le=3072)] = Field(16, description="Latent channels; 16 is FLUX's.")
    widths: tuple[Width, ...] = Field(
        (32, 64, 96, 128), min_length=3, max_length=6, description="Channels at each scale, full resolution first."
    )

    @model_validator(mode="after")
    def _fits(self) -> OwnFirstFrame:
        _one_width_per_scale(self.widths, self.down, "first_frame.widths")
        if self.channels > 3 * self.down**2:
            raise ValueError(f"{self.channels} channels: a {self.down}x{self.down} cell has {3 * self.down**2} numbers")
        return self


class DiffusersFirstFrame(_Part):
    """A frozen `AutoencoderKL` of the `diffusers` library, FLUX's for example."""

    kind: Literal["diffusers"]
    source: str = Field(min_length=1, description="Folder or hub name that `from_pretrained` takes.")
    subfolder: str = Field("", description="Folder of the autoencoder inside the source; FLUX's is `vae`.")
    revision: str | None = Field(None, description="Commit of the hub repository; name one for a run to be repeatable.")
    architecture: dict[str, Any] | None = Field(
        None, description="Its config.json, so that an export needs no source; null reads the source's."
    )


class PlainFirstFrame(_Part):
    """The first frame itself: all of its numbers count in the latent budget."""

    kind: Literal["frame"]


FirstFrameSpec = Annotated[OwnFirstFrame | DiffusersFirstFrame | PlainFirstFrame, Field(discriminator="kind")]


class ArvaeConfig(_Part):
    """One ARVAE. The defaults are the published 16x16 configuration."""

    down: Literal[4, 8, 16, 32] = Field(16, description="r = 2**N: pixels of a latent cell's side.")
    motion_channels: Annotated[int, Field(ge=2, le=64)] = Field(2, description="C_1, channels of the motion T.")
    supplement_channels: Annotated[int, Field(ge=1, le=1024)] = Field(14, description="C_2, of the supplement S.")
    widths: tuple[Width, ...] | None = Field(
        None, description="Feature channels of the N + 1 scales, full resolution first; null takes the published ones."
    )
    motion_width: Width = Field(32, description="Hidden channels of the motion features at each scale.")
    state_width: Width = Field(32, description="Channels of the state G_t, and of the last convolutions.")
    spynet: SpynetSpec = SpynetSpec()
    propagation: Literal["multi", "finest", "coarsest"] = Field(
        "multi", description="Scales whose features are propagated: all (table 2's tick), or one only (its cross)."
    )
    state_features: bool = Field(True, description="Carry G_t from frame to frame (table 3).")
    residual: bool = Field(True, description="The decoder's output is added to the warped previous reconstruction.")
    transform: Literal["none", "dct"] = Field(
        "none",
        description="`dct` adds a linear path through the supplement that starts as the low frequencies of a cosine "
        "transform of the residual, and starts the nonlinear path at 0: a usable codec at step 0.",
    )
    gradient: Literal["supervised", "all"] = Field(
        "supervised",
        description="Where the loss is propagated back to: the frames that the stage supervises, or all but the first.",
    )
    recompute: bool = Field(False, description="Activation checkpointing, a frame at a time: memory for time.")
    first_frame: FirstFrameSpec = Field(OwnFirstFrame(kind="own"), description="How the first frame is coded.")
    perceptual: PerceptualSpec | None = Field(
        PerceptualSpec(backbone="vgg"), description="LPIPS of the loss; null for stages whose losses.lpips is 0."
    )

    @field_validator("widths")
    @classmethod
    def _some(cls, widths: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if widths is not None and not widths:
            raise ValueError("widths is empty; leave it out to take the published ones")
        return widths

    @model_validator(mode="after")
    def _fits(self) -> ArvaeConfig:
        if self.widths is None and self.down not in PUBLISHED_WIDTHS:
            raise ValueError(f"widths must be given for down: {self.down}; the paper has {list(PUBLISHED_WIDTHS)}")
        _one_width_per_scale(self.scale_widths, self.down, "widths")
        if self.transform == "dct" and self.propagation == "coarsest":
            raise ValueError("transform: dct codes the residual over the warped frame; propagation: coarsest has none")
        if self.transform == "dct" and not self.residual:
            raise ValueError("transform: dct needs residual: true")
        if self.supplement_channels > 3 * self.down**2:
            raise ValueError(
                f"supplement_channels is {self.supplement_channels}; a cell has {3 * self.down**2} numbers"
            )
        return self

    @property
    def scales(self) -> int:
        """N: halvings of the resolution."""
        return self.down.bit_length() - 1

    @property
    def scale_widths(self) -> tuple[int, ...]:
        """Feature channels of the N + 1 scales, full resolution first."""
        return self.widths if self.widths is not None else PUBLISHED_WIDTHS[self.down]

    @property
    def propagated(self) -> tuple[int, ...]:
        """Scales whose features are propagated, 0 being full resolution."""
        return {"multi": tuple(range(self.scales + 1)), "finest": (0,), "coarsest": (self.scales,)}[self.propagation]
