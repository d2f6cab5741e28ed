"""What may be chosen about the latent diffusion model. The papers leave all of it open: README.md has the sources."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.contracts import LatentLayout
from trainer.losses.flow import Share, TimestepSpec
from trainer.recipe import FREE


class LatentDitConfig(BaseModel):
    """A diffusion transformer over stored latents. The default is DiT-B's size."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    latents: LatentLayout | None = Field(
        None, description="Layout and statistics of the latents; left out, those of the first dataset of data.train."
    )
    width: Annotated[int, Field(ge=8, le=8192)] = Field(768, description="Channels of a token in the transformer.")
    depth: Annotated[int, Field(ge=1, le=128)] = Field(12, description="Blocks.")
    heads: Annotated[int, Field(ge=1, le=128)] = Field(12, description="Heads of each attention.")
    mlp: Annotated[int, Field(ge=1, le=16)] = Field(4, description="Width of a block's MLP, in widths.")
    patch: Annotated[int, Field(ge=1, le=16)] = Field(
        1, description="Side of the squares of latent cells that become one token, over the last two axes of grids."
    )
    captions: bool = Field(True, description="Condition on the clips' caption embeddings, where the latents have them.")
    drop: Share = Field(0.1, description="Share of clips whose caption is the learned null, for guidance.")
    timesteps: TimestepSpec = Field(TimestepSpec(tail_share=0.0), description="Noise levels in training.")
    steps: Annotated[int, Field(ge=1, le=1000)] = Field(
        50, description="Euler steps of a sample.", json_schema_extra=FREE
    )
    guidance: Annotated[float, Field(ge=0, le=100)] = Field(
        3.0, description="Weight of the captioned velocity over the null one; 1 is none.", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _fits(self) -> LatentDitConfig:
        if self.width % (2 * self.heads):
            raise ValueError(f"width is {self.width}; it must be a multiple of twice the heads, {2 * self.heads}")
        if self.latents:
            axes = max(len(tensor.tokens) for tensor in self.latents.tensors.values())
            if self.width // self.heads < 2 * axes:
                raise ValueError(
                    f"width {self.width} over {self.heads} heads: latents of {axes} token axes need heads of at least "
                    f"{2 * axes} numbers"
                )
            for name, tensor in self.latents.tensors.items():
                if len(tensor.tokens) > 1 and any(side % self.patch for side in tensor.tokens[-2:]):
                    grid = " x ".join(map(str, tensor.tokens))
                    raise ValueError(f"patch is {self.patch}; it does not divide the {grid} cells of latent {name!r}")
        return self

    @property
    def caption_width(self) -> int:
        """D of the captions that the model reads; 0 where it reads none."""
        return self.latents.caption_width if self.captions and self.latents else 0
