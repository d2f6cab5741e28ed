"""Adversarial losses on the logits of a discriminator. Scalars, averaged over clips and patches, in float32.

Hinge: Lim and Ye, "Geometric GAN", arXiv 1705.02894. Non-saturating: Goodfellow et al., NeurIPS 2014, section 3.
LeCam: Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", CVPR 2021, equation 4.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

GanLoss = Literal["hinge", "non-saturating"]


def generator_loss(fake: Tensor, kind: GanLoss) -> Tensor:
    """What the generator minimises: ``-D(x̂)`` (hinge) or ``-log sigmoid D(x̂)`` (non-saturating)."""
    fake = fake.float()
    return -fake.mean() if kind == "hinge" else F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor, kind: GanLoss) -> Tensor:
    """What the discriminator minimises: the mean of its losses on real and on reconstructed pixels."""
    real, fake = real.float(), fake.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def lecam(real: Tensor, fake: Tensor, anchor_real: Tensor, anchor_fake: Tensor) -> Tensor:
    """Squares of how far logits lie beyond the running mean of the other kind's: ``anchor_real``, ``anchor_fake``."""
    above = F.relu(real.float() - anchor_fake).square().mean()
    return above + F.relu(anchor_real - fake.float()).square().mean()
