"""Flow matching on straight paths: ``z_t = (1 - t) x + t ε``, whose velocity is ``ε - x`` (Liu et al., "Flow Straight
and Fast", ICLR 2023; Esser et al., "Scaling Rectified Flow Transformers", ICML 2024, section 3.1).

Times are drawn from uniform numbers that the caller gives, so that they are functions of (seed, place).

Legend: B clips.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]


class TimestepSpec(BaseModel):
    """Logit-normal times with a thick tail."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float = Field(0.0, description="Of the normal variable whose sigmoid is t.")
    std: float = Field(1.0, gt=0)
    tail: Literal["full", "uniform"] = Field(
        "full", description="What the tail draws: full noise, t = 1, or t uniform in [0, 1] (FlowMo)."
    )
    tail_share: Share = Field(0.1, description="Share of clips whose time is the tail's.")


def timesteps(uniform_B2: Tensor, spec: TimestepSpec) -> Tensor:
    """Times (B,) in [0, 1] from two uniform numbers a clip in [0, 1)."""
    body_B = torch.sigmoid(spec.mean + spec.std * torch.special.ndtri(uniform_B2[:, 0].double())).float()
    in_tail_B = uniform_B2[:, 1] < spec.tail_share
    tail_B = torch.ones_like(body_B) if spec.tail == "full" else uniform_B2[:, 1] / max(spec.tail_share, 1e-9)
    return torch.where(in_tail_B, tail_B, body_B)


def per_clip(t_B: Tensor, like: Tensor) -> Tensor:
    """``t_B`` as (B, 1, ...) that broadcasts against ``like``."""
    return t_B.view(-1, *[1] * (like.ndim - 1))


def noised(x: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """``z_t``, (B, ...), float32."""
    t = per_clip(t_B, x)
    return (1 - t) * x.float() + t * noise.float()


def schedule(steps: int, power: float) -> list[float]:
    """Times from 1 down to 0 at which ``steps`` Euler steps begin, and 0: ``(1 - i / steps) ^ power``."""
    return [(1 - i / steps) ** power for i in range(steps + 1)]
