"""Backward warping by a flow in pixels, and resampling of flows.

Legend: B clips, C channels, H height, W width. A flow holds (x, y) in pixels of its own resolution: the value at p says
where in the source the content of p comes from, ``target(p) = source(p + flow(p))``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def warp(source_BCHW: Tensor, flow_B2HW: Tensor) -> Tensor:
    """Samples ``source(p + flow(p))`` bilinearly; coordinates beyond the border take the border's value.

    Coordinates are float32 whatever the features' type: half a mantissa of bfloat16 is a whole pixel at 256. The result
    has the type of ``source_BCHW``.
    """
    height, width = source_BCHW.shape[-2:]
    flow_B2HW = flow_B2HW.float()
    x_W = torch.arange(width, device=flow_B2HW.device, dtype=torch.float32)
    y_H1 = torch.arange(height, device=flow_B2HW.device, dtype=torch.float32)[:, None]
    x_BHW = (flow_B2HW[:, 0] + x_W) * (2 / width) + (1 / width - 1)
    y_BHW = (flow_B2HW[:, 1] + y_H1) * (2 / height) + (1 / height - 1)
    warped_BCHW = F.grid_sample(
        source_BCHW.float(),
        torch.stack((x_BHW, y_BHW), dim=-1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return warped_BCHW.to(source_BCHW.dtype)


def halve_flow(flow_B2HW: Tensor) -> Tensor:
    """The flow at half the resolution, in its pixels: the mean of each 2x2 block, halved."""
    return F.avg_pool2d(flow_B2HW, 2) * 0.5


def resize_flow(flow_B2HW: Tensor, size: tuple[int, int]) -> Tensor:
    """The flow at (height, width) ``size``, bilinear, in pixels of that size."""
    height, width = flow_B2HW.shape[-2:]
    if size == (height, width):
        return flow_B2HW
    scale_2 = flow_B2HW.new_tensor([size[1] / width, size[0] / height])
    resized_B2HW = F.interpolate(flow_B2HW, size=size, mode="bilinear", align_corners=False)
    return resized_B2HW * scale_2[:, None, None]
