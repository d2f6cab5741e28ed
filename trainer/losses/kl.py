"""Kullback-Leibler divergence of diagonal Gaussians from the standard one: Kingma and Welling 2014, appendix B."""

from __future__ import annotations

from torch import Tensor


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``-1/2 sum(1 + log σ² - μ² - σ²)`` in nats, summed over a clip's latent numbers: (B, ...) -> (B,), float32."""
    mean, log_variance = mean.float(), log_variance.float()
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).flatten(1).sum(1)
