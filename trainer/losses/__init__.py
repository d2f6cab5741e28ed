"""Losses that several recipes share: pixels, SSIM and LPIPS here, others beside them."""

from trainer.losses.kl import gaussian_kl
from trainer.losses.perceptual import Perceptual, PerceptualSpec
from trainer.losses.pixel import charbonnier, l1, mse
from trainer.losses.ssim import ssim, ssim_loss

__all__ = ["Perceptual", "PerceptualSpec", "charbonnier", "gaussian_kl", "l1", "mse", "ssim", "ssim_loss"]
