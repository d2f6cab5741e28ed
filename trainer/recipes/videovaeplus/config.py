"""What may be chosen about VideoVAE+. Where the paper is silent or its released code differs, README.md says so."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.losses import PerceptualSpec

Width = Annotated[int, Field(ge=1, le=4096)]
Kernel = Annotated[int, Field(ge=1, le=15)]
SPAN = 4
"""Frames of a latent step."""
SD14_CHANNELS, SD35_CHANNELS = 4, 16


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ImageVaeSpec(_Part):
    """An `AutoencoderKL` of `diffusers` whose weights fill the inflated convolutions."""

    source: Annotated[str, Field(min_length=1)] = Field(
        description="A folder that `save_pretrained` wrote, or a hub name: CompVis/stable-diffusion-v1-4, "
        "stabilityai/stable-diffusion-3.5-large."
    )
    subfolder: str = Field("vae", description="Where the autoencoder lies in it; empty for the folder itself.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; name a commit to pin the bytes.")


class TextSpec(_Part):
    """Cross-attention to the embeddings of a caption (section 3.3)."""

    width: Width = Field(1024, description="Numbers of a token's embedding; Flan-T5-large has 1024.")
    heads: Annotated[int, Field(ge=1, le=64)] = 8
    head_width: Width = Field(64, description="Numbers of a head.")
    values: Literal["visual", "text"] = Field(
        "visual",
        description="Where values come from: the visual tokens, as the paper says (keys alone are text), or the text, "
        "as in the released code.",
    )
    drop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="Share of clips that train without their caption (ours), so that the null token is learned."
    )


class VideoVaePlusConfig(_Part):
    """One VideoVAE+. The defaults are the published 16-channel model without text."""

    latent_channels: Annotated[int, Field(ge=1, le=256)] = Field(16, description="c = c', channels of both latents.")
    modeling: Literal["two-stage", "simultaneous", "sequential"] = Field(
        "two-stage",
        description="The paper's: a temporal-aware spatial autoencoder, then a temporal one. Option 1: one autoencoder "
        "that compresses both. Option 2: an image autoencoder, then a temporal one (table 3).",
    )
    width: Width = Field(128, description="Channels at full resolution.")
    multipliers: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=2, max_length=6)] = Field(
        (1, 2, 4, 4), description="Channels of each level, in widths; each level but the last halves height and width."
    )
    blocks: Annotated[int, Field(ge=1, le=8)] = Field(2, description="Residual blocks of a level; one more in D1.")
    groups: Width = Field(32, description="Groups of the normalisations.")
    norm: Literal["frame", "clip"] = Field(
        "frame",
        description="What the inflated layers normalise over: each frame, as the image autoencoder does, or all frames "
        "of a clip, as the released code does.",
    )
    temporal_kernel: tuple[Kernel, Kernel, Kernel] = Field(
        (3, 3, 3), description="Of the temporal convolutions, (time, height, width), odd (table 4)."
    )
    temporal_shortcut: Literal["every", "changed"] = Field(
        "every",
        description="Which shortcuts have a temporal convolution: all, or those that change the number of channels. "
        "The released code makes all (485M) and uses the latter (386M).",
    )
    temporal_width: Width = Field(128, description="Channels of the temporal autoencoder's first layer.")
    quant_conv: bool | None = Field(
        None, description="1 x 1 convolutions around the spatial latent; null: SD-1.4's 4 channels have them, 16 don't."
    )
    weights: ImageVaeSpec | None = Field(None, description="The image autoencoder to start from; null starts afresh.")
    text: TextSpec | None = Field(None, description="Text guidance; null has none, and no cross-modal stage.")
    gan: Literal["video", "image"] = Field("video", description="3D or 2D PatchGAN (table 4).")
    joint_gan: Literal["video", "image"] = Field(
        "video", description="That of joint training; the released code takes the 2D one there."
    )
    linear: Literal["none", "dct"] = Field(
        "none",
        description="`dct` adds a linear path beside each of the four networks that starts as the low frequencies of a "
        "cosine transform, and starts the networks at 0 (ours): a usable codec at step 0.",
    )
    recompute: bool = Field(
        False, description="Activation checkpointing: a block's activations are computed again in the backward pass."
    )
    window: Annotated[int, Field(ge=SPAN, le=256)] = Field(16, description="Frames of a long video coded at once; 4 k.")
    perceptual: PerceptualSpec | None = Field(
        PerceptualSpec(backbone="vgg"), description="LPIPS of the loss; null for stages whose losses.lpips is 0."
    )

    @property
    def cell(self) -> int:
        """Pixels of a latent cell's side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def quantized(self) -> bool:
        """Whether there are convolutions around the spatial latent."""
        return self.latent_channels <= SD14_CHANNELS if self.quant_conv is None else self.quant_conv

    @property
    def temporal(self) -> bool:
        """Whether there is a temporal autoencoder."""
        return self.modeling != "simultaneous"

    @model_validator(mode="after")
    def _fits(self) -> VideoVaePlusConfig:
        if even := [size for size in self.temporal_kernel if size % 2 == 0]:
            raise ValueError(f"temporal_kernel is {list(self.temporal_kernel)}; sizes are odd, and {even[0]} is even")
        if self.window % SPAN:
            raise ValueError(f"window is {self.window}; a window has 4 k frames, 16 for example")
        widths = {self.width * m for m in self.multipliers}
        if self.temporal:
            widths |= {self.temporal_width * m for m in (1, 2, 4)}
        if odd := sorted(width for width in widths if width % self.groups):
            raise ValueError(f"groups is {self.groups}, and {odd[0]} channels are no multiple of it")
        if self.modeling == "simultaneous" and len(self.multipliers) < 3:
            raise ValueError("modeling: simultaneous halves time in two levels, so multipliers has at least three")
        if self.linear == "dct":
            if self.modeling == "simultaneous":
                raise ValueError("linear: dct codes frames and then time, and modeling: simultaneous does both at once")
            if self.weights is not None:
                raise ValueError("linear: dct starts the networks at 0, and weights fills them. Leave out one of them")
            if self.latent_channels > 3 * self.cell**2:
                raise ValueError(f"latent_channels is {self.latent_channels}; a cell has {3 * self.cell**2} numbers")
        return self
