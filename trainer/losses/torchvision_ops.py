"""Import this before lpips or diffusers: see :mod:`pipelines.torchvision_ops`."""

from pipelines.torchvision_ops import ensure

__all__ = ["ensure"]
