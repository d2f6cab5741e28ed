"""How good a reconstruction is: PSNR, SSIM, LPIPS, temporal flicker and rFVD, clip by clip, then over all clips.

Every clip is measured by itself and leaves one small ``Row``. Rows are merged over ranks by the clip's place and
reduced in the order of places, so every number is the same, bit for bit, for any world size and order of arrival.

Pixels come in [-1, 1] and are clamped; PSNR, SSIM and flicker are defined on [0, 1], LPIPS on [-1, 1].

Legend: B clips, C channels (3, RGB), T frames, H height, W width, N clips, D features.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pipelines.faults import InputError
from trainer.losses.perceptual import Perceptual
from trainer.losses.ssim import ssim

CEILING_DB = 100.0
CONFIDENCE = 0.95
LPIPS_FRAMES = 16
FVD_LEAST_FRAMES = 10
MEASURES = ("psnr_db", "psnr_clip_db", "ssim", "lpips", "flicker")
Convention = Literal["dataset", "per_batch"]


def psnr_db(mse: float) -> float:
    """Peak signal to noise ratio of a mean squared error on [0, 1], in dB; capped at 100 dB, also for an error of 0."""
    return CEILING_DB if mse <= 10 ** (-CEILING_DB / 10) else -10 * math.log10(mse)


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured on one clip.

    ``mse_T`` on [0, 1]; ``ssim_T``, ``lpips_T`` by frame; ``flicker_T`` by pair of neighbouring frames, in grey levels
    of 255; ``features`` by rFVD convention: the original's and the reconstruction's, float32.
    """

    place: int
    source: str
    motion: float
    mse_T: tuple[float, ...]
    ssim_T: tuple[float, ...]
    lpips_T: tuple[float, ...]
    flicker_T: tuple[float, ...]
    features: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def by_frame(self) -> dict[str, tuple[float, ...]]:
        """The measures that have a value a frame; flicker has one fewer, counted from the second frame."""
        psnr = tuple(psnr_db(mse) for mse in self.mse_T)
        return {"psnr_db": psnr, "ssim": self.ssim_T, "lpips": self.lpips_T, "flicker": self.flicker_T}

    def measures(self) -> dict[str, float]:
        """The clip's own figures: ``psnr_db`` is the mean over frames, ``psnr_clip_db`` that of the pooled error."""
        means = {name: _mean(values) for name, values in self.by_frame().items()}
        return {**means, "psnr_clip_db": psnr_db(_mean(self.mse_T))}

    @property
    def finite(self) -> bool:
        """Whether the reconstruction was finite everywhere."""
        return math.isfinite(sum(self.mse_T))


@torch.no_grad()
def measure(
    original_CTHW: Tensor,
    reconstruction_CTHW: Tensor,
    perceptual: Perceptual,
    *,
    place: int,
    source: str,
    motion: float,
    features: dict[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> Row:
    """Measures one clip; both tensors in [-1, 1] and on the device of ``perceptual``.

    Flicker is the mean absolute change of the error from one frame to the next: 0 for a reconstruction whose error
    stands still, however large it is. A reconstruction with NaN or infinite pixels has no figures: its row is NaN, and
    the summary names it. Raises ValueError where the shapes differ.
    """
    if original_CTHW.shape != reconstruction_CTHW.shape:
        raise ValueError(
            f"{source}: the reconstruction is {tuple(reconstruction_CTHW.shape)}, the original "
            f"{tuple(original_CTHW.shape)} (C, T, H, W)"
        )
    reconstruction_CTHW = reconstruction_CTHW.where(reconstruction_CTHW.isfinite(), torch.nan)
    x_1CTHW, y_1CTHW = (v.double().clamp(-1, 1)[None] for v in (original_CTHW, reconstruction_CTHW))
    grey_x_1CTHW, grey_y_1CTHW = (x_1CTHW + 1) / 2, (y_1CTHW + 1) / 2
    error_CTHW = (grey_y_1CTHW - grey_x_1CTHW)[0]
    flicker_T = (error_CTHW[:, 1:] - error_CTHW[:, :-1]).abs().mean(dim=(0, 2, 3)) * 255
    chunks = zip(x_1CTHW.float().split(LPIPS_FRAMES, 2), y_1CTHW.float().split(LPIPS_FRAMES, 2), strict=True)
    distant = [perceptual(x, y) for x, y in chunks]
    similar = [ssim(x, y, 1.0) for x, y in zip(grey_x_1CTHW.split(1, 2), grey_y_1CTHW.split(1, 2), strict=True)]
    return Row(
        place=place,
        source=source,
        motion=float(motion),
        mse_T=tuple(error_CTHW.square().mean(dim=(0, 2, 3)).tolist()),
        ssim_T=tuple(torch.cat(similar, 1)[0].tolist()),
        lpips_T=tuple(torch.cat(distant, 1)[0].double().tolist()),
        flicker_T=tuple(flicker_T.tolist()),
        features=features or {},
    )


class Tally:
    """The rows of one method, by place. A place that two ranks measured counts once."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows: dict[int, Row] = {}
        for row in rows:
            self.add(row)

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        """Rows in the order of their places."""
        return (self._rows[place] for place in sorted(self._rows))

    def add(self, row: Row) -> None:
        """Adds a clip; raises ValueError if its place is already taken by another clip."""
        known = self._rows.setdefault(row.place, row)
        if known.source != row.source:
            raise ValueError(f"place {row.place} holds two clips: {known.source} and {row.source}")

    def to_json(self) -> list[dict[str, Any]]:
        """Plain data that loses nothing: floats by their shortest exact representation, features as bytes in base64."""
        return [_to_json(row) for row in self]

    @classmethod
    def from_json(cls, lines: Iterable[dict[str, Any]]) -> Tally:
        """What ``to_json`` gave."""
        return cls(_from_json(line) for line in lines)

    def summary(self) -> dict[str, Any]:
        """Everything over all clips, as plain data; None stands for what has no value.

        Each measure is the mean over clips of the clip's own figure. ``confidence`` holds its 95% interval (Student's t
        over clips, taken as independent). ``by_frame`` are curves over the frame index, ``by_motion`` thirds of the
        clips by motion score, ``per_clip`` one line a clip; ``not_finite`` names clips whose reconstruction was not.
        """
        rows = list(self)
        own = [row.measures() for row in rows]
        columns = {name: [line[name] for line in own] for name in MEASURES}
        curves: dict[str, list[list[float]]] = {}
        for row in rows:
            for name, values in row.by_frame().items():
                curve = curves.setdefault(name, [])
                curve.extend([] for _ in range(len(values) - len(curve)))
                for at, value in zip(curve, values, strict=False):
                    at.append(value)
        return {
            "clips": len(rows),
            **{name: _known(_mean(column)) for name, column in columns.items()},
            "confidence": {"level": CONFIDENCE, **{name: interval(column) for name, column in columns.items()}},
            "by_frame": {name: [_known(_mean(at)) for at in curve] for name, curve in curves.items()},
            "by_motion": _by_motion(rows, own),
            "per_clip": [
                {"place": row.place, "source": row.source, "motion": row.motion}
                | {name: _known(value) for name, value in line.items()}
                for row, line in zip(rows, own, strict=True)
            ],
            "not_finite": [row.source for row in rows if not row.finite],
        }


def gather_json(value: Any, group: dist.ProcessGroup | None = None, device: torch.device | str = "cpu") -> list[Any]:
    """The plain data of every rank, by rank, on every rank: one collective call where torch.distributed runs.

    ``device`` is where the process group's backend wants its tensors. Nothing is pickled.
    """
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    size = torch.tensor([text.numel()], device=device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    padded = F.pad(text, (0, int(max(sizes)) - text.numel()))
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(text[: int(size)].cpu().numpy().tobytes()) for text, size in zip(texts, sizes, strict=True)]


def interval(values: Sequence[float]) -> list[float] | None:
    """95% confidence interval of a mean by Student's t; None for fewer than two values or any that is not finite."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    from scipy.special import stdtrit  # 0.4 s, which no worker needs to wait for when it starts

    mean, half = _mean(values), float(stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2))
    half *= math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    return [mean - half, mean + half]


def margin(rows: Iterable[Row], others: Iterable[Row]) -> dict[str, Any]:
    """By how much ``rows`` beat ``others`` in PSNR, clip by clip: mean in dB and its 95% interval (paired t)."""
    mine, theirs = ({row.place: row.measures()["psnr_db"] for row in side} for side in (rows, others))
    gains = [mine[place] - theirs[place] for place in sorted(mine.keys() & theirs.keys())]
    return {"psnr_db": _known(_mean(gains)), "confidence": interval(gains)}


def _by_motion(rows: Sequence[Row], own: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """Thirds of the clips from least to most motion, each with the 95% intervals of its means; fewer where there are
    fewer than three clips.
    """
    order = sorted(range(len(rows)), key=lambda i: (rows[i].motion, rows[i].place))
    parts = min(3, len(rows))
    thirds = [order[len(order) * k // parts : len(order) * (k + 1) // parts] for k in range(parts)]
    return [
        {"motion": [rows[third[0]].motion, rows[third[-1]].motion], "clips": len(third)}
        | {name: _known(_mean([own[i][name] for i in third])) for name in MEASURES}
        | {"confidence": {name: interval([own[i][name] for i in third]) for name in MEASURES}}
        for third in thirds
    ]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _to_json(row: Row) -> dict[str, Any]:
    pairs = {
        name: [base64.b64encode(features.astype("<f4").tobytes()).decode() for features in pair]
        for name, pair in row.features.items()
    }
    return {name: getattr(row, name) for name in Row.__slots__} | {"features": pairs}


def _from_json(line: dict[str, Any]) -> Row:
    columns = {name: tuple(value) for name, value in line.items() if name.endswith("_T")}
    features = {
        name: (np.frombuffer(base64.b64decode(real), "<f4"), np.frombuffer(base64.b64decode(fake), "<f4"))
        for name, (real, fake) in line["features"].items()
    }
    return Row(line["place"], line["source"], line["motion"], **columns, features=features)


class FvdSpec(BaseModel):
    """Reconstruction FVD: where the I3D network lies, and whether the per-batch convention is wanted beside it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    i3d: str = Field(min_length=1, description="Path of StyleGAN-V's i3d_torchscript.pt.")
    per_batch: int | None = Field(
        None, gt=0, description="Also report LeanVAE's and WF-VAE's figure, for evaluation batches of this many clips."
    )


class VideoFeatures:
    """I3D features of clips, by the two conventions that published rFVDs follow.

    ``dataset`` is StyleGAN-V's (``src/metrics/frechet_video_distance.py``): 8-bit pixels, rescaled and resized inside
    the network, one Fréchet distance over all clips. ``per_batch`` is LeanVAE's and WF-VAE's: short side to 224,
    bilinear, centre crop, [-1, 1]; the mean of the distances of single batches. The two can't be compared.
    """

    def __init__(self, spec: FvdSpec, device: torch.device | str = "cpu") -> None:
        """Loads the network; raises InputError where that fails."""
        self.spec = spec
        self.conventions: tuple[Convention, ...] = ("dataset", "per_batch") if spec.per_batch else ("dataset",)
        try:
            self.net = torch.jit.load(spec.i3d, map_location=device).eval()
            digest = hashlib.blake2b(Path(spec.i3d).read_bytes(), digest_size=4).hexdigest()
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise InputError(
                f"The I3D network {spec.i3d!r} can't be read: {reason}. Give the path of StyleGAN-V's "
                "i3d_torchscript.pt, or leave rFVD out."
            ) from None
        self.name = f"{Path(spec.i3d).name} {digest}"

    @torch.no_grad()
    def __call__(self, pixels_CTHW: Tensor) -> dict[Convention, np.ndarray]:
        """Features (D,) of one clip in [-1, 1], by convention; raises InputError for fewer than 10 frames."""
        frames = pixels_CTHW.shape[1]
        if frames < FVD_LEAST_FRAMES:
            raise InputError(
                f"rFVD needs clips of at least {FVD_LEAST_FRAMES} frames (16 are usual); these have {frames}. "
                "Evaluate longer clips, or leave rFVD out."
            )
        pixels_CTHW = pixels_CTHW.float().clamp(-1, 1)
        inputs: dict[Convention, Tensor] = {"dataset": (pixels_CTHW * 127.5 + 128).clamp(0, 255).to(torch.uint8)}
        if "per_batch" in self.conventions:
            inputs["per_batch"] = _short_side_224(pixels_CTHW)
        found = {}
        for convention, video_CTHW in inputs.items():
            inside = convention == "dataset"
            features_1D = self.net(video_CTHW[None], rescale=inside, resize=inside, return_features=True)
            found[convention] = features_1D.flatten().float().cpu().numpy()
        return found

    def summary(self, tally: Tally) -> dict[str, Any]:
        """``value`` (dataset level; None under two clips), what it rests on, and ``per_batch`` where asked for."""
        pairs = [row.features for row in tally if row.finite]
        real_ND, fake_ND = (np.array([pair["dataset"][side] for pair in pairs], np.float64) for side in (0, 1))
        value = frechet_distance(*moments(real_ND), *moments(fake_ND)) if len(pairs) > 1 else None
        report: dict[str, Any] = {"value": value, "clips": len(pairs), "convention": "dataset level", "i3d": self.name}
        if self.spec.per_batch:
            batched = [pair["per_batch"] for pair in pairs]
            report["per_batch"] = {
                "value": frechet_by_batch(batched, self.spec.per_batch),
                "batch": self.spec.per_batch,
            }
        return report


def _short_side_224(pixels_CTHW: Tensor) -> Tensor:
    height, width = pixels_CTHW.shape[2:]
    scale = 224 / min(height, width)
    size = (224, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), 224)
    resized_CTHW = F.interpolate(pixels_CTHW.transpose(0, 1), size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
    return resized_CTHW[..., top : top + 224, left : left + 224].transpose(0, 1).contiguous()


def moments(features_ND: np.ndarray, ddof: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and covariance (D, D); StyleGAN-V divides by N (``ddof`` 0), LeanVAE by N - 1 (``ddof`` 1)."""
    mean_D = features_ND.mean(0)
    centred_ND = features_ND - mean_D
    return mean_D, centred_ND.T @ centred_ND / (len(features_ND) - ddof)


def frechet_distance(
    mean_a_D: np.ndarray, covariance_a_DD: np.ndarray, mean_b_D: np.ndarray, covariance_b_DD: np.ndarray
) -> float:
    """Squared Fréchet distance of two Gaussians: |Δμ|² + tr(A + B - 2 (AB)^½) (Dowson and Landau 1982, eq. 4).

    The trace of (AB)^½ is that of (A^½ B A^½)^½, which is symmetric: no complex root, and singular covariances (fewer
    clips than features) are no trouble.
    """
    values, vectors = np.linalg.eigh(covariance_a_DD)
    root_a_DD = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    shared = np.linalg.eigvalsh(root_a_DD @ covariance_b_DD @ root_a_DD).clip(0)
    apart = np.square(mean_a_D - mean_b_D).sum() + np.trace(covariance_a_DD) + np.trace(covariance_b_DD)
    return max(0.0, float(apart - 2 * np.sqrt(shared).sum()))


def frechet_by_batch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], batch: int) -> float | None:
    """Mean over batches of consecutive clips of each batch's own distance (LeanVAE and WF-VAE ``eval/``).

    A batch of one clip has no covariance: its distance is |Δμ|² alone, as there. The last batch may be smaller.
    """
    distances = []
    for first in range(0, len(pairs), batch):
        real_ND, fake_ND = (np.array([p[side] for p in pairs[first : first + batch]], np.float64) for side in (0, 1))
        if len(real_ND) == 1:
            distances.append(float(np.square(real_ND - fake_ND).sum()))
        else:
            distances.append(frechet_distance(*moments(real_ND, ddof=1), *moments(fake_ND, ddof=1)))
    return _known(_mean(distances))
