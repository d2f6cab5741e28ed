"""What may be chosen about One-DVA. The paper's body is not public: README.md says where each default comes from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.losses import PerceptualSpec
from trainer.losses.flow import Share, TimestepSpec
from trainer.recipe import FREE

SPAN, CELL = 4, 16
"""Frames and side of a patch."""
Width = Annotated[int, Field(ge=8, le=8192)]
Count = Annotated[int, Field(ge=1, le=256)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TransformerSpec(_Part):
    """A stack of transformer blocks."""

    width: Width = Field(768, description="Numbers a token.")
    layers: Count = 12
    heads: Count = Field(12, description="Of attention; each has width / heads numbers, an even number of 6 or more.")

    @model_validator(mode="after")
    def _fits(self) -> TransformerSpec:
        each, left = divmod(self.width, self.heads)
        if left or each % 2 or each < 6:
            raise ValueError(
                f"width {self.width} over {self.heads} heads: a head needs a whole, even number of at least 6 numbers"
            )
        return self


class DecoderSpec(TransformerSpec):
    """The diffusion transformer and its unpatchifier."""

    pixel_channels: Count = Field(8, description="Channels a pixel between pixel shuffle and final convolution.")


class DropoutSpec(_Part):
    """How many 1D latents a clip keeps in training: its motion's share of them, times a draw around 1.

    The share is the motion score (mean absolute difference of neighbouring frames, in grey levels of [0, 1]) over
    ``full``, within ``least`` and 1; the draw lies between 1 / ``spread`` and ``spread``, uniform in its logarithm.
    """

    by: Literal["motion", "uniform", "none"] = Field(
        "motion", description="`uniform` draws from 1 to all, whatever the motion; `none` keeps all (fixed length)."
    )
    full: float = Field(0.1, gt=0, le=1, description="Motion score from which on a clip's share is all.")
    least: Share = Field(0.25, description="Share of a clip without motion.")
    spread: float = Field(4.0, ge=1, description="Greatest factor between a drawn length and the motion's.")


class LengthSpec(_Part):
    """How many 1D latents are kept where a video is encoded: what of them the clip's motion, a budget or a quality asks
    for, in multiples of ``every``. Changes no weights.
    """

    by: Literal["motion", "budget", "psnr", "all"] = Field(
        "motion", description="What decides; `all` keeps every 1D latent (fixed length)."
    )
    numbers_per_frame: float = Field(
        4096.0, gt=0, description="For `budget`: most latent numbers a frame, the structural latent's included."
    )
    psnr_db: float = Field(32.0, gt=0, le=100, description="For `psnr`: the shortest length that reaches it is kept.")
    every: Annotated[int, Field(ge=1)] = Field(80, description="Lengths are multiples of this, or all.")


class SamplingSpec(_Part):
    """How the decoder samples. Changes no weights."""

    steps: Annotated[int, Field(ge=1, le=1000)] = Field(25, description="Euler steps from noise to pixels.")
    power: float = Field(4.0, gt=0, description="Step i of n starts at time (1 - i / n) ^ power.")
    guidance: float = Field(1.5, ge=0, description="Classifier-free guidance; 1 is none, and half the work.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Of the noise that decoding starts from.")


class RepaSpec(_Part):
    """Alignment of the decoder's features with those of a frozen SigLIP."""

    encoder: str = Field(
        "google/siglip-base-patch16-256", min_length=1, description="Folder or hub name of a SiglipVisionModel."
    )
    width: Width = Field(768, description="Numbers a token of that encoder.")
    depth: Count = Field(8, description="Decoder block whose features are aligned, from 1.")
    projector: Width = Field(2048, description="Width of the projector's hidden layers.")
    frames: Annotated[int, Field(ge=1, le=SPAN)] = Field(
        1, description="Frames of each latent step that SigLIP looks at; their features are averaged."
    )


class OneDvaConfig(_Part):
    """One One-DVA. The defaults are what stands for the published configuration."""

    latent_channels: Annotated[int, Field(ge=1, le=768)] = Field(
        32, description="D, channels of both latents: those of a structural cell, and of a 1D latent."
    )
    queries: Annotated[int, Field(ge=1, le=16384)] = Field(1280, description="K, 1D latents of a window at most.")
    encoder: TransformerSpec = TransformerSpec()
    decoder: DecoderSpec = DecoderSpec()
    window: Annotated[int, Field(ge=1, le=257)] = Field(17, description="Frames coded together; 1 + 4 k.")
    dropout: DropoutSpec = DropoutSpec()
    length: LengthSpec = Field(LengthSpec(), json_schema_extra=FREE)
    condition_dropout: Share = Field(0.1, description="Share of clips that train the decoder without latents.")
    timesteps: TimestepSpec = TimestepSpec()
    predict: Literal["velocity", "clean"] = Field(
        "velocity",
        description="What the network's output is: v, or x̂ of which v = (z_t - x̂) / t (Li and He, arXiv 2511.13720). "
        "The loss is the velocity's either way.",
    )
    least_time: float = Field(0.05, gt=0, le=1, description="For `clean`: the divisor t is never less.")
    gate: bool = Field(
        False,
        description="Whether the noised pixels enter the decoder times 1 - t (ours): at full noise they say nothing, "
        "and a decoder that starts at 0 would first have to learn that.",
    )
    linear: Literal["none", "dct"] = Field(
        "none",
        description="`dct` adds a linear path to encoder and decoder that starts as a cosine transform, and starts the "
        "transformers at 0 (ours): one sampling step of the untrained model is a codec. Needs predict: clean.",
    )
    sampling: SamplingSpec = Field(SamplingSpec(), json_schema_extra=FREE)
    continuity: float = Field(1.0, ge=0, description="Of self-alignment: weight of neighbours' likeness.")
    repa: RepaSpec | None = Field(RepaSpec(), description="SigLIP of the loss; null for stages whose losses.repa is 0.")
    perceptual: PerceptualSpec | None = Field(
        PerceptualSpec(backbone="vgg"), description="LPIPS of the loss; null for stages whose losses.lpips is 0."
    )
    perceptual_frames: Annotated[int, Field(ge=0)] = Field(
        4, description="LPIPS is of so many successive frames, drawn for each clip; 0 takes every frame."
    )
    post_noise: tuple[Share, Share] = Field(
        (0.0, 0.5), description="In post-training: least and greatest time of the noised latents, drawn between."
    )

    @model_validator(mode="after")
    def _fits(self) -> OneDvaConfig:
        if self.window % SPAN != 1:
            raise ValueError(f"window is {self.window}; a window has 1 + 4 k frames, 17 for example")
        if self.sampling.guidance != 1 and not self.condition_dropout:
            raise ValueError(
                f"sampling.guidance is {self.sampling.guidance:g}, and with condition_dropout: 0 the decoder never "
                "learned to do without latents; set it to 1"
            )
        if self.linear == "dct" and self.predict != "clean":
            raise ValueError("linear: dct adds to the predicted frames; it needs predict: clean")
        if self.repa is not None and self.repa.depth > self.decoder.layers:
            raise ValueError(f"repa.depth is {self.repa.depth}, and the decoder has {self.decoder.layers} layers")
        if self.post_noise[0] > self.post_noise[1]:
            raise ValueError(f"post_noise {list(self.post_noise)}: the least time comes first")
        return self
