"""ARVAE: Shen, Xu, Zhu and Liu, "Autoregressive Video Autoencoder with Decoupled Temporal and Spatial Context",
arXiv 2512.11293, equations 1 to 3 under their own symbols.

    X_t --------+--------------------+
                |                    |                          previous G --+
    X̂_t-1 -> f_ME -> M -> f_TE -> P_e -> f_SE -> S ----------------------- f_SD -> X̂_t, G_t
       |                   +----> T -------------------> f_TD -> P_d -------+
       +-------------------------------------------------+

Legend: B clips, C channels, T frames, H height, W width; r = 2**N = ``down``. Scale i has 1 / 2**i of the resolution.
Pixels lie in [-1, 1]; flows are in pixels of their own scale, float32, and point from frame t into frame t - 1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.blocks.conv import Conv2d, Down, ResidualBlock, Up, activation
from trainer.blocks.patch import PatchAnalysis, PatchSynthesis
from trainer.blocks.warp import halve_flow, resize_flow, warp
from trainer.recipes.arvae import first_frame
from trainer.recipes.arvae.config import ArvaeConfig
from trainer.recipes.arvae.spynet import Spynet


class FlowHead(Conv2d):
    """A scale's correction to the flow, read off its motion features; 0 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 2, zero=True)

    def forward(self, motion_BCHW: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, 2, H, W) float32."""
        return super().forward(motion_BCHW).float()


class MotionEncoder(nn.Module):
    """Temporal motion extractor of f_TE: the field M through N blocks, each of which halves the resolution.

    Every scale has motion features and a flow: the finer scale's, halved, plus a correction read off the features. The
    motion T is the coarsest flow in its first two channels, plus what the coarsest features add.
    """

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        width = config.motion_width
        self.stem = nn.Sequential(Conv2d(2, width), activation())
        self.blocks = nn.ModuleList(nn.Sequential(Down(width, width), activation()) for _ in range(config.scales))
        self.heads = nn.ModuleDict({str(i): FlowHead(width) for i in config.propagated})
        self.to_motion = Conv2d(width, config.motion_channels, zero=True)

    def forward(self, field_B2HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """M (B, 2, H, W) -> T (B, C_1, H/r, W/r) and the flows of scales 0 to N."""
        features_BCHW, flow_B2HW = self.stem(field_B2HW), field_B2HW
        flows = []
        for i in range(len(self.blocks) + 1):
            if i:
                features_BCHW, flow_B2HW = self.blocks[i - 1](features_BCHW), halve_flow(flow_B2HW)
            head = str(i)
            flows.append(flow_B2HW + self.heads[head](features_BCHW) if head in self.heads else flow_B2HW)
        extra_BCHW = self.to_motion(features_BCHW)
        motion_BCHW = F.pad(flow_B2HW, (0, 0, 0, 0, 0, extra_BCHW.shape[1] - 2)) + extra_BCHW.float()
        return motion_BCHW, flows


class MotionDecoder(nn.Module):
    """Temporal motion extractor of f_TD: the motion T through N blocks, each of which doubles the resolution."""

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        width = config.motion_width
        self.scales = config.scales
        self.stem = nn.Sequential(Conv2d(config.motion_channels, width), activation())
        ups = config.scales - min(config.propagated)
        self.blocks = nn.ModuleList(nn.Sequential(Up(width, width), activation()) for _ in range(ups))
        self.heads = nn.ModuleDict({str(i): FlowHead(width) for i in config.propagated})

    def forward(self, motion_BCHW: Tensor) -> list[Tensor]:
        """T (B, C_1, H/r, W/r) -> the flows of scales 0 to N."""
        features_BCHW, flow_B2HW = self.stem(motion_BCHW), motion_BCHW[:, :2].float()
        height, width = motion_BCHW.shape[-2:]
        flows = []
        for ups in range(self.scales + 1):
            if ups:
                flow_B2HW = resize_flow(flow_B2HW, (height << ups, width << ups))
                if ups <= len(self.blocks):
                    features_BCHW = self.blocks[ups - 1](features_BCHW)
            head = str(self.scales - ups)
            if head in self.heads:
                flow_B2HW = flow_B2HW + self.heads[head](features_BCHW)
            flows.append(flow_B2HW)
        return flows[::-1]


class Propagation(nn.Module):
    """Image feature extractor and feature propagation, which f_TE and f_TD share in design (each has its own).

    Features of the previous reconstruction at each scale are warped by that scale's flow; then, from fine to coarse,
    each scale's result is downsampled and joined to the next. Scale 0 also carries the warped frame itself.
    """

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        widths = config.scale_widths
        self.scales = config.propagated
        depth = max(self.scales)
        self.stem = Conv2d(3, widths[0])
        self.extract = nn.ModuleList(
            nn.Sequential(activation(), Down(a, b), ResidualBlock(b, b)) for a, b in pairwise(widths[: depth + 1])
        )
        joined = [i for i in self.scales if i - 1 in self.scales]
        self.down = nn.ModuleDict({str(i): Down(self.width(config, i - 1), widths[i]) for i in joined})
        self.fuse = nn.ModuleDict({str(i): ResidualBlock(2 * widths[i], widths[i]) for i in joined})

    @staticmethod
    def width(config: ArvaeConfig, scale: int) -> int:
        """Channels of the propagated features at a scale; 0 where it propagates none."""
        if scale not in config.propagated:
            return 0
        return config.scale_widths[scale] + (3 if scale == 0 else 0)

    def forward(self, previous_B3HW: Tensor, flows: list[Tensor]) -> list[Tensor | None]:
        """X̂_{t-1} and the flows of scales 0 to N -> the propagated features P by scale, None where there are none."""
        features = [self.stem(previous_B3HW)]
        for block in self.extract:
            features.append(block(features[-1]))
        propagated: list[Tensor | None] = [None] * len(flows)
        for i in self.scales:
            moved_BCHW = warp(features[i], flows[i])
            if str(i) in self.fuse:
                finer_BCHW = self.down[str(i)](propagated[i - 1])
                moved_BCHW = self.fuse[str(i)](torch.cat((finer_BCHW, moved_BCHW), dim=1))
            if i == 0:
                moved_BCHW = torch.cat((warp(previous_B3HW, flows[0]), moved_BCHW), dim=1)
            propagated[i] = moved_BCHW
        return propagated


class TemporalEncoder(nn.Module):
    """f_TE: ``T, P_e = f_TE(M, X̂_{t-1})`` (equation 1)."""

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        self.motion_extractor = MotionEncoder(config)
        self.propagation = Propagation(config)

    def forward(self, field_B2HW: Tensor, previous_B3HW: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The temporal motion and the propagated features by scale."""
        motion_BCHW, flows = self.motion_extractor(field_B2HW)
        return motion_BCHW, self.propagation(previous_B3HW, flows)


class SpatialEncoder(nn.Module):
    """f_SE: ``S = f_SE(P_e, X_t)`` (equation 2)."""

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        widths = config.scale_widths
        self.blocks = nn.ModuleList(
            ResidualBlock((widths[i] if i else 3) + Propagation.width(config, i), widths[i]) for i in range(len(widths))
        )
        self.down = nn.ModuleList(nn.Sequential(activation(), Down(a, b)) for a, b in pairwise(widths))
        linear = config.transform == "dct"
        self.to_supplement = nn.Sequential(activation(), Conv2d(widths[-1], config.supplement_channels, zero=linear))
        self.analysis = PatchAnalysis(config.down, config.supplement_channels) if linear else None

    def forward(self, propagated: list[Tensor | None], x_B3HW: Tensor) -> Tensor:
        """P_e by scale and X_t (B, 3, H, W) -> S (B, C_2, H/r, W/r)."""
        features_BCHW = x_B3HW
        for i, block in enumerate(self.blocks):
            if i:
                features_BCHW = self.down[i - 1](features_BCHW)
            features_BCHW = block(_join(features_BCHW, propagated[i]))
        supplement_BCHW = self.to_supplement(features_BCHW)
        if self.analysis is not None:
            supplement_BCHW = supplement_BCHW + self.analysis(x_B3HW - propagated[0][:, :3])
        return supplement_BCHW


class TemporalDecoder(nn.Module):
    """f_TD: ``P_d = f_TD(T, X̂_{t-1})`` (equation 3)."""

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        self.motion_extractor = MotionDecoder(config)
        self.propagation = Propagation(config)

    def forward(self, motion_BCHW: Tensor, previous_B3HW: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """The propagated features by scale, and the full-resolution flow (B, 2, H, W) that moved them."""
        flows = self.motion_extractor(motion_BCHW)
        return self.propagation(previous_B3HW, flows), flows[0]


class SpatialDecoder(nn.Module):
    """f_SD: ``X̂_t, G_t = f_SD(S, P_d, G_{t-1})`` (equation 3)."""

    def __init__(self, config: ArvaeConfig) -> None:
        super().__init__()
        widths, state = config.scale_widths, config.state_width
        linear = config.transform == "dct"
        self.state_width = state if config.state_features else 0
        self.residual = config.residual and 0 in config.propagated
        self.stem = Conv2d(config.supplement_channels, widths[-1])
        self.blocks = nn.ModuleList(
            ResidualBlock(widths[i] + Propagation.width(config, i), widths[i]) for i in range(1, len(widths))
        )
        self.up = nn.ModuleList(nn.Sequential(activation(), Up(b, a)) for a, b in pairwise(widths))
        self.synthesis = PatchSynthesis(config.down, config.supplement_channels) if linear else None
        inputs = widths[0] + Propagation.width(config, 0) + self.state_width + (3 if linear else 0)
        self.to_state = ResidualBlock(inputs, state)
        self.to_pixels = nn.Sequential(
            activation(), Conv2d(state, state), activation(), Conv2d(state, 3, zero=self.residual)
        )

    def start(self, x_B3HW: Tensor) -> Tensor | None:
        """G_1: zeros, (B, state_width, H, W); None without state features."""
        if not self.state_width:
            return None
        return x_B3HW.new_zeros(len(x_B3HW), self.state_width, *x_B3HW.shape[-2:])

    def forward(
        self, supplement_BCHW: Tensor, propagated: list[Tensor | None], state_BCHW: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """S, P_d by scale and G_{t-1} -> X̂_t (B, 3, H, W) float32 and G_t."""
        features_BCHW = self.stem(supplement_BCHW)
        for i in range(len(self.blocks), 0, -1):
            features_BCHW = self.blocks[i - 1](_join(features_BCHW, propagated[i]))
            features_BCHW = self.up[i - 1](features_BCHW)
        linear_B3HW = self.synthesis(supplement_BCHW) if self.synthesis is not None else None
        state_BCHW = self.to_state(_join(features_BCHW, propagated[0], linear_B3HW, state_BCHW))
        x_B3HW = self.to_pixels(state_BCHW).float()
        if self.residual:
            x_B3HW = x_B3HW + propagated[0][:, :3]
        if linear_B3HW is not None:
            x_B3HW = x_B3HW + linear_B3HW
        return x_B3HW, state_BCHW if self.state_width else None


def _join(*parts_BCHW: Tensor | None) -> Tensor:
    """The parts that there are, one after another along the channels."""
    return torch.cat([part for part in parts_BCHW if part is not None], dim=1)


class Frame(NamedTuple):
    """Frame t as the model made it: X̂_t, G_t, T, S and the full-resolution flow of the decoder."""

    x_B3HW: Tensor
    state_BCHW: Tensor | None
    motion_BCHW: Tensor
    supplement_BCHW: Tensor
    flow_B2HW: Tensor


class Reconstruction(NamedTuple):
    """A clip as the model made it.

    ``pixels_B3THW`` X̂ of frames 1 to T; ``warped_B3THW`` the predecessor moved by the decoder's flow, and
    ``flow_B2THW`` that flow, for frames 2 to T; None for a clip of one frame.
    """

    pixels_B3THW: Tensor
    warped_B3THW: Tensor | None
    flow_B2THW: Tensor | None


class Arvae(nn.Module):
    """The whole autoencoder. ``encode_frame`` and ``decode_frame`` are equations 1 to 3, ``forward`` trains them."""

    def __init__(self, config: ArvaeConfig, *, pretrained: bool = True) -> None:
        super().__init__()
        self.recompute = config.recompute
        self.first_frame = first_frame.build(config.first_frame, pretrained=pretrained)
        self.motion_estimator = Spynet(config.spynet)
        self.temporal_encoder = TemporalEncoder(config)
        self.spatial_encoder = SpatialEncoder(config)
        self.temporal_decoder = TemporalDecoder(config)
        self.spatial_decoder = SpatialDecoder(config)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles what every frame goes through, not the loop over them: seven frames would be a graph seven times as
        long, and stages of 3, 5 and 7 frames one each.
        """
        self.code_frame = torch.compile(self.code_frame, *args, **kwargs)
        coder = self.first_frame
        coder.encode, coder.decode = (torch.compile(f, *args, **kwargs) for f in (coder.encode, coder.decode))

    def encode_frame(self, x_B3HW: Tensor, previous_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Equations 1 and 2: X_t and X̂_{t-1} -> T (B, C_1, H/r, W/r) and S (B, C_2, H/r, W/r)."""
        field_B2HW = self.motion_estimator(x_B3HW, previous_B3HW)
        motion_BCHW, propagated = self.temporal_encoder(field_B2HW, previous_B3HW)
        return motion_BCHW, self.spatial_encoder(propagated, x_B3HW)

    def decode_frame(
        self, motion_BCHW: Tensor, supplement_BCHW: Tensor, previous_B3HW: Tensor, state_BCHW: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Equation 3: T, S, X̂_{t-1} and G_{t-1} -> X̂_t, G_t and the flow (B, 2, H, W) that moved X̂_{t-1}."""
        propagated, flow_B2HW = self.temporal_decoder(motion_BCHW, previous_B3HW)
        x_B3HW, state_BCHW = self.spatial_decoder(supplement_BCHW, propagated, state_BCHW)
        return x_B3HW, state_BCHW, flow_B2HW

    def code_frame(self, x_B3HW: Tensor, previous_B3HW: Tensor, state_BCHW: Tensor | None) -> Frame:
        """Encodes and decodes frame t after X̂_{t-1} and G_{t-1}."""
        motion_BCHW, supplement_BCHW = self.encode_frame(x_B3HW, previous_B3HW)
        decoded_B3HW, state_BCHW, flow_B2HW = self.decode_frame(motion_BCHW, supplement_BCHW, previous_B3HW, state_BCHW)
        return Frame(decoded_B3HW, state_BCHW, motion_BCHW, supplement_BCHW, flow_B2HW)

    def start(self, first_B3HW: Tensor) -> Tensor | None:
        """G_1."""
        return self.spatial_decoder.start(first_B3HW)

    def forward(self, pixels_B3THW: Tensor, *, learn_from: int = 1) -> Reconstruction:
        """Reconstructs a clip from its own reconstructions.

        Frames before ``learn_from`` (counted from 1) are made without a graph, so that the loss of later ones ends
        there. The first frame is never moved by the loss of later ones: it belongs to its own autoencoder.
        """
        frames = pixels_B3THW.unbind(2)
        grad = torch.is_grad_enabled()
        with torch.set_grad_enabled(grad and learn_from <= 1 and self.first_frame.trained):
            first_B3HW = self.first_frame.decode(self.first_frame.encode(frames[0])).float()
        made, warped, flows = [first_B3HW], [], []
        previous_B3HW = first_B3HW.detach()
        state_BCHW = self.start(previous_B3HW)
        for t, x_B3HW in enumerate(frames[1:], start=2):
            with torch.set_grad_enabled(grad and t >= learn_from):
                if self.recompute and torch.is_grad_enabled():
                    frame = Frame(*checkpoint(self.code_frame, x_B3HW, previous_B3HW, state_BCHW, use_reentrant=False))
                else:
                    frame = self.code_frame(x_B3HW, previous_B3HW, state_BCHW)
                warped.append(warp(previous_B3HW, frame.flow_B2HW))
            made.append(frame.x_B3HW)
            flows.append(frame.flow_B2HW)
            previous_B3HW, state_BCHW = frame.x_B3HW, frame.state_BCHW
        return Reconstruction(
            torch.stack(made, dim=2),
            torch.stack(warped, dim=2) if warped else None,
            torch.stack(flows, dim=2) if flows else None,
        )
