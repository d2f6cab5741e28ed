"""DeCo-VAE: Yin, Yuan, Hu, Sun, Chen, Qiao, Li and Sun, "Learning Compact Latents for Video Reconstruction via
Decoupled Representation", arXiv 2511.14530, equations 1 to 8 under their own symbols.

    x_0 (keyframe) -- T ⊗ x_0 ----------> E_k -> z_k --+        +-> x̂_0 --+
     |                                                 |        |         W -> + -> x̂_t
    x_t -> M -> m_t ------ gain --------> E_m -> z_m --+-> D ->-+-> m̂_t --+    |
     |      x̂^m_t = W(x_0, m_t)                        |        |              |
     +----> r_t = x_t - x̂^m_t ----------> E_r -> z_r --+        +-> r̂_t -------+

Legend: B clips, C channels, T frames, H height, W width, K components; L latent steps, h = H / 8, w = W / 8, D latent
channels. Pixels lie in [-1, 1]; motions are in the units of motion.py, float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.recipes.decovae.backbone import Decoder, Encoder
from trainer.recipes.decovae.config import DecoVaeConfig
from trainer.recipes.decovae.motion import MotionModule, load_ssf2020, warp

KEYFRAME, MOTION, RESIDUAL = COMPONENTS = ("keyframe", "motion", "residual")
CONCAT, PIXELS = "components", "pixels"


class Decoupled(NamedTuple):
    """Equations 4 to 7: x_0, m_t, x̂^m_t and r_t."""

    keyframe_B3HW: Tensor
    motion_B3THW: Tensor
    predicted_B3THW: Tensor
    residual_B3THW: Tensor


class Posterior(NamedTuple):
    """A component's latent: ``mean`` and ``log_variance``, (B, D, L, h, w)."""

    mean: Tensor
    log_variance: Tensor


class Reconstruction(NamedTuple):
    """A clip as the model made it.

    ``pixels_B3THW`` x̂, None where only the prediction was asked for; ``source`` and ``made`` are the components before
    and after coding, None without decoupling; ``posteriors`` by name.
    """

    pixels_B3THW: Tensor | None
    source: Decoupled | None
    made: Decoupled | None
    posteriors: dict[str, Posterior]


def latents(config: DecoVaeConfig) -> tuple[str, ...]:
    """Names of the latents."""
    return {"dedicated": COMPONENTS, "concat": (CONCAT,), "none": (PIXELS,)}[config.components]


class DecoVae(nn.Module):
    """The whole autoencoder. ``encode`` and ``decode`` are equations 1 and 3, ``forward`` trains all of it."""

    def __init__(self, config: DecoVaeConfig) -> None:
        super().__init__()
        self.gain, self.single = config.motion.gain, config.keyframe == "single"
        names, spec, latent = latents(config), config.backbone, config.latent_channels
        channels = 9 if config.components == "concat" else 3
        linear = config.linear == "dct"
        self.motion = MotionModule(config.motion) if config.components != "none" else None
        self.encoder = nn.ModuleDict({name: Encoder(spec, channels, latent, linear) for name in names})
        self.decoder = Decoder(spec, channels, latent, names if linear else ())
        if self.motion is not None and config.motion.weights is not None:
            load_ssf2020(self.motion, config.motion.weights)

    def decouple(self, x_B3THW: Tensor, keyframe_B3HW: Tensor | None = None) -> Decoupled:
        """Equations 4 to 6; the keyframe is the first frame if none is given."""
        x_B3THW = x_B3THW.float()
        keyframe_B3HW = x_B3THW[:, :, 0] if keyframe_B3HW is None else keyframe_B3HW.float()
        motion_B3THW = self.motion(x_B3THW, keyframe_B3HW)
        predicted_B3THW = warp(keyframe_B3HW, motion_B3THW)
        return Decoupled(keyframe_B3HW, motion_B3THW, predicted_B3THW, x_B3THW - predicted_B3THW)

    @staticmethod
    def recouple(keyframe_B3HW: Tensor, motion_B3THW: Tensor, residual_B3THW: Tensor) -> tuple[Tensor, Tensor]:
        """Equation 8: x̂ and the keyframe as it was moved."""
        predicted_B3THW = warp(keyframe_B3HW, motion_B3THW)
        return predicted_B3THW + residual_B3THW.float(), predicted_B3THW

    def encode(self, x_B3THW: Tensor) -> tuple[dict[str, Posterior], Decoupled | None]:
        """Equations 1 and 4 to 7: pixels of 1 + 4 k frames -> latents by name, and what they are latents of.

        Where the keyframe is coded once, motion and residual are of the frames after it: their first step is left out.
        """
        if self.motion is None:
            return {PIXELS: Posterior(*self.encoder[PIXELS](x_B3THW))}, None
        source = self.decouple(x_B3THW)
        frames = x_B3THW.shape[2]
        inputs = {
            KEYFRAME: source.keyframe_B3HW[:, :, None].expand(-1, -1, 1 if self.single else frames, -1, -1),
            MOTION: self._to_code(source.motion_B3THW),
            RESIDUAL: source.residual_B3THW,
        }
        if CONCAT in self.encoder:
            inputs = {CONCAT: torch.cat(list(inputs.values()), dim=1)}
        found = {name: Posterior(*self.encoder[name](value)) for name, value in inputs.items()}
        if self.single:
            later = {name: Posterior(*(part[:, :, 1:] for part in found[name])) for name in (MOTION, RESIDUAL)}
            found = {KEYFRAME: found[KEYFRAME], **(later if frames > 1 else {})}
        return found, source

    def decode(self, z: dict[str, Tensor]) -> tuple[Tensor, Decoupled | None]:
        """Equations 3 and 8: latents by name -> pixels, and the components that they are made of."""
        if self.single:
            first = torch.zeros_like(z[KEYFRAME])
            z = z | {n: torch.cat((first, z[n]), dim=2) if n in z else first for n in (MOTION, RESIDUAL)}
        parts = self._decoded(z)
        if PIXELS in parts:
            return parts[PIXELS], None
        if CONCAT in parts:
            parts = dict(zip(COMPONENTS, parts[CONCAT].chunk(3, dim=1), strict=True))
        keyframe_B3HW, motion_B3THW = parts[KEYFRAME].mean(2), self._from_code(parts[MOTION])
        x_B3THW, predicted_B3THW = self.recouple(keyframe_B3HW, motion_B3THW, parts[RESIDUAL])
        return x_B3THW, Decoupled(keyframe_B3HW, motion_B3THW, predicted_B3THW, parts[RESIDUAL])

    def _decoded(self, z: dict[str, Tensor]) -> dict[str, Tensor]:
        """D of each latent, those of one length in one call."""
        made: dict[str, Tensor] = {}
        for steps in {value.shape[2] for value in z.values()}:
            names = [name for name, value in z.items() if value.shape[2] == steps]
            whole = self.decoder(torch.cat([z[name] for name in names]))
            made |= dict(zip(names, whole.chunk(len(names)), strict=True))
        return {
            name: self.decoder.beside(name, value, z[name]) if name in self.decoder.synthesis else value
            for name, value in made.items()
        }

    def _to_code(self, motion_B3THW: Tensor) -> Tensor:
        """The motion as it is coded: its scale counted from the unblurred end, all of it times the gain."""
        return torch.cat((motion_B3THW[:, :2], motion_B3THW[:, 2:] + 1), dim=1) * self.gain

    def _from_code(self, coded_B3THW: Tensor) -> Tensor:
        motion_B3THW = coded_B3THW.float() / self.gain
        return torch.cat((motion_B3THW[:, :2], motion_B3THW[:, 2:] - 1), dim=1)

    def forward(self, x_B3THW: Tensor, noise: dict[str, Tensor] | None = None, *, code: bool = True) -> Reconstruction:
        """Codes a clip, with z = μ + σ ε (equation 2) where ``noise`` has an ε, z = μ where not.

        ``code`` False stops at the prediction x̂^m of equation 5, which trains the motion module alone.
        """
        if not code:
            return Reconstruction(None, self.decouple(x_B3THW), None, {})
        posteriors, source = self.encode(x_B3THW)
        z = {
            name: p.mean if noise is None else p.mean + torch.exp(0.5 * p.log_variance) * noise[name]
            for name, p in posteriors.items()
        }
        pixels_B3THW, made = self.decode(z)
        return Reconstruction(pixels_B3THW, source, made, posteriors)
