"""Procedural footage with known optical flow: textured layers under camera and object motion, with occlusions.

A scene is a textured background and a few textured shapes, stacked. The camera and each shape move by similarities of
the plane (shift, zoom, rotation), written as ``z -> scale * z + shift`` over the complex numbers, so that composition,
inversion and flow are one line each. Textures are the usual models of natural images: 1/f noise, dead leaves, cells and
warped stripes. Everything is a pure function of (seed, place).

Legend: T frames, H height, W width, N pixels of a frame; complex numbers are x + iy, in pixels, y downwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.contracts import derive
from pipelines.faults import InputError

Array = NDArray[np.float32]
Complex = NDArray[np.complex64]


@dataclass(frozen=True, slots=True)
class Footage:
    """Rendered frames and the motion that made them.

    ``frames_THW3`` uint8 RGB. ``flow_T2HW`` float32 (x, y) in pixels: the point seen at pixel p of frame t was at
    ``p + flow[t, :, p]`` in frame t-1, which is the flow that warps frame t-1 to frame t by backward sampling; zero for
    frame 0. ``occluded_THW`` bool: True where that point was hidden or outside the picture in frame t-1.
    """

    frames_THW3: NDArray[np.uint8]
    flow_T2HW: Array
    occluded_THW: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Motion:
    """A similarity that changes smoothly with time: maps local to outer coordinates, in pixels."""

    centre: complex
    velocity: complex
    sway: complex
    sway_rate: float
    angle: float
    spin: float
    zoom_rate: float
    phase: float

    def at(self, seconds: float) -> tuple[complex, complex]:
        """(scale, shift) of ``z -> scale * z + shift``."""
        swing = np.sin(self.sway_rate * seconds + self.phase)
        scale = np.exp(self.zoom_rate * seconds + 1j * (self.angle + self.spin * seconds))
        return complex(scale), complex(self.centre + self.velocity * seconds + self.sway * swing)


@dataclass(frozen=True, slots=True)
class _Layer:
    """A texture, where it moves, and its outline as a radius over the angle (None: it covers the plane)."""

    texture_HW3: Array
    motion: _Motion
    radius: float = 0.0
    waves: tuple[tuple[int, float, float], ...] = ()

    def coverage(self, local_N: Complex, scale: float) -> Array | None:
        """Opacity in [0, 1] with an edge one pixel wide; None where the layer covers everything."""
        if not self.radius:
            return None
        angle = np.angle(local_N)
        outline = self.radius * (1 + sum(a * np.sin(k * angle + p) for k, a, p in self.waves))
        return np.clip((outline - np.abs(local_N)) * scale + 0.5, 0, 1).astype(np.float32)


def footage(seed: int, place: int, frames: int, size: tuple[int, int], fps: float = 24.0) -> Footage:
    """Renders the scene of ``(seed, place)``: ``frames`` frames of ``size`` (height, width), ``fps`` frames/s."""
    height, width = size
    layers, camera = _scene(np.random.default_rng(derive(seed, place, "scene")), size, frames / fps)
    ys, xs = np.mgrid[:height, :width]
    pixels_N = (xs + 1j * ys).astype(np.complex64).ravel()
    middle = complex((width - 1) / 2, (height - 1) / 2)

    def placed(t: int) -> list[tuple[complex, complex]]:
        zoom, shift = camera.at(t / fps)
        motions = [layer.motion.at(t / fps) for layer in layers]
        return [(zoom * scale, zoom * (move - shift) + middle) for scale, move in motions]

    frames_THW3 = np.empty((frames, height, width, 3), np.uint8)
    flow_T2HW = np.zeros((frames, 2, height, width), np.float32)
    occluded_THW = np.zeros((frames, height, width), bool)
    before: list[tuple[complex, complex]] | None = None
    for t in range(frames):
        now = placed(t)
        colour_N3 = np.empty((pixels_N.size, 3), np.float32)
        top_N = np.zeros(pixels_N.size, np.int8)
        for index, (layer, (scale, shift)) in enumerate(zip(layers, now, strict=True)):
            local_N = (pixels_N - shift) / scale
            alpha_N = layer.coverage(local_N.astype(np.complex64), abs(scale))
            if alpha_N is None:
                colour_N3[:] = _sample(layer.texture_HW3, local_N)
                continue
            seen = np.flatnonzero(alpha_N)
            alpha_S1 = alpha_N[seen, None]
            colour_N3[seen] += alpha_S1 * (_sample(layer.texture_HW3, local_N[seen]) - colour_N3[seen])
            top_N[alpha_N >= 0.5] = index
        frames_THW3[t] = (colour_N3 * 255 + 0.5).clip(0, 255).reshape(height, width, 3)
        if before is not None:
            was_N, hidden_N = _origin(layers, pixels_N, top_N, now, before, size)
            flow_N = was_N - pixels_N
            flow_T2HW[t] = np.stack([flow_N.real, flow_N.imag]).reshape(2, height, width)
            occluded_THW[t] = hidden_N.reshape(height, width)
        before = now
    return Footage(frames_THW3, flow_T2HW, occluded_THW)


def write_videos(
    dest: str | Path,
    count: int = 24,
    seconds: float = 2.5,
    size: tuple[int, int] = (128, 128),
    fps: int = 24,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Writes ``count`` scenes as ``dest/scene-0000.mp4`` ... (H.264) and returns their paths.

    ``size`` is (height, width), both even. ``progress`` gets (done, count). Raises InputError where the folder can't be
    written or the size is odd.
    """
    if size[0] % 2 or size[1] % 2:
        raise InputError(f"synthetic footage of {size[0]}x{size[1]}: H.264 needs an even height and width", status=2)
    folder = Path(dest)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: synthetic footage can't be written there: {error.strerror}") from None
    paths = []
    for place in range(count):
        path = folder / f"scene-{place:04d}.mp4"
        _write(path, footage(seed, place, max(round(seconds * fps), 1), size, fps).frames_THW3, fps)
        paths.append(path)
        if progress:
            progress(place + 1, count)
    return paths


def _write(path: Path, frames_THW3: NDArray[np.uint8], fps: int) -> None:
    part = path.with_suffix(".part")
    # With its macroblock tree, x264 does not always make the same bytes of the same frames.
    options = {"crf": "12", "preset": "veryfast", "x264-params": "mbtree=0"}
    with av.open(str(part), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = frames_THW3.shape[2], frames_THW3.shape[1], "yuv420p"
        stream.thread_count = 1
        for frame_HW3 in frames_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, "rgb24")))
        container.mux(stream.encode())
    part.replace(path)


def _origin(
    layers: list[_Layer],
    pixels_N: Complex,
    top_N: NDArray[np.int8],
    now: list[tuple[complex, complex]],
    before: list[tuple[complex, complex]],
    size: tuple[int, int],
) -> tuple[Complex, NDArray[np.bool_]]:
    """Where each pixel's surface point was one frame earlier, and whether it could not be seen there."""
    scale_N, shift_N = (np.array([pose[i] for pose in now])[top_N] for i in (0, 1))
    old_scale_N, old_shift_N = (np.array([pose[i] for pose in before])[top_N] for i in (0, 1))
    was_N = old_scale_N * (pixels_N - shift_N) / scale_N + old_shift_N
    height, width = size
    hidden_N = (was_N.real < 0) | (was_N.real > width - 1) | (was_N.imag < 0) | (was_N.imag > height - 1)
    for index, (layer, (scale, shift)) in enumerate(zip(layers, before, strict=True)):
        below = np.flatnonzero(top_N < index)
        if below.size:
            alpha = layer.coverage(((was_N[below] - shift) / scale).astype(np.complex64), abs(scale))
            if alpha is not None:
                hidden_N[below] |= alpha >= 0.5
    return was_N.astype(np.complex64), hidden_N


def _sample(texture_HW3: Array, local_N: Complex) -> Array:
    """Bilinear samples of a periodic texture whose side is a power of two; the origin is its corner."""
    side = texture_HW3.shape[0]
    x, y = local_N.real.astype(np.float32), local_N.imag.astype(np.float32)
    left, upper = np.floor(x), np.floor(y)
    right_share, lower_share = (x - left)[:, None], (y - upper)[:, None]
    x0, y0 = left.astype(np.int64) & (side - 1), upper.astype(np.int64) & (side - 1)
    x1, y1 = (x0 + 1) & (side - 1), (y0 + 1) & (side - 1)
    flat = texture_HW3.reshape(-1, 3)
    above = flat[y0 * side + x0] * (1 - right_share) + flat[y0 * side + x1] * right_share
    under = flat[y1 * side + x0] * (1 - right_share) + flat[y1 * side + x1] * right_share
    return above + (under - above) * lower_share


def _scene(rng: np.random.Generator, size: tuple[int, int], seconds: float) -> tuple[list[_Layer], _Motion]:
    """The background, up to five shapes, and the camera. Speeds are log-uniform, so that slow scenes are common."""
    reach = float(min(size))
    side = 1 << int(np.ceil(np.log2(2 * max(size))))
    still = _Motion(0j, 0j, 0j, 0.0, 0.0, 0.0, 0.0, 0.0)
    layers = [_Layer(_texture(rng, side), still)]
    for _ in range(rng.integers(1, 6)):
        speed = reach * np.exp(rng.uniform(np.log(0.05), np.log(1.5)))
        velocity = speed * np.exp(2j * np.pi * rng.uniform())
        meeting = complex(rng.uniform(-0.4, 0.4) * size[1], rng.uniform(-0.4, 0.4) * size[0])
        motion = _Motion(
            centre=meeting - velocity * seconds * rng.uniform(0.3, 0.7),
            velocity=velocity,
            sway=reach * rng.uniform(0, 0.08) * np.exp(2j * np.pi * rng.uniform()),
            sway_rate=rng.uniform(1, 6),
            angle=rng.uniform(0, 2 * np.pi),
            spin=rng.normal(0, 0.6),
            zoom_rate=rng.normal(0, 0.06),
            phase=rng.uniform(0, 2 * np.pi),
        )
        waves = tuple((k, rng.uniform(0, 0.35 / k), rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
        layers.append(_Layer(_texture(rng, side // 2), motion, reach * rng.uniform(0.08, 0.28), waves))
    pan = reach * np.exp(rng.uniform(np.log(0.02), np.log(0.8))) * np.exp(2j * np.pi * rng.uniform())
    camera = _Motion(
        centre=-pan * seconds / 2,
        velocity=pan,
        sway=reach * rng.uniform(0, 0.03) * np.exp(2j * np.pi * rng.uniform()),
        sway_rate=rng.uniform(2, 9),
        angle=0.0,
        spin=rng.normal(0, 0.08),
        zoom_rate=rng.normal(0, 0.08),
        phase=rng.uniform(0, 2 * np.pi),
    )
    return layers, camera


def _texture(rng: np.random.Generator, side: int) -> Array:
    """A periodic RGB texture in [0, 1], smooth enough to be moved by fractions of a pixel without aliasing."""
    make = (_noise, _leaves, _cells, _stripes)[rng.integers(4)]
    image_HW3 = make(rng, side)
    shade_HW1 = _spectrum(rng, side, 1.4)[..., None]
    image_HW3 = image_HW3 + rng.uniform(0.02, 0.12) * shade_HW1
    soft = np.exp(-2 * (np.pi * rng.uniform(0.6, 1.1) * _frequencies(side)) ** 2)
    image_HW3 = np.fft.irfft2(np.fft.rfft2(image_HW3, axes=(0, 1)) * soft[..., None], (side, side), axes=(0, 1))
    return np.ascontiguousarray(np.clip(image_HW3, 0, 1), np.float32)


def _frequencies(side: int) -> Array:
    """Radial frequency of each bin of ``rfft2``, in cycles per pixel."""
    return np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]).astype(np.float32)


def _spectrum(rng: np.random.Generator, side: int, slope: float) -> Array:
    """Gaussian noise whose amplitude falls as 1/f**slope, mean 0 and standard deviation 1."""
    frequency = _frequencies(side)
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((side, side))) * frequency**-slope
    field_HW = np.fft.irfft2(noise, (side, side))
    return (field_HW / field_HW.std()).astype(np.float32)


def _palette(rng: np.random.Generator, colours: int) -> Array:
    """Colours (colours, 3) in [0, 1] around one hue, as surfaces have."""
    base = rng.uniform(0.2, 0.8) + rng.normal(0, 0.12, 3)
    return np.clip(base + rng.normal(0, 0.2, (colours, 1)) + rng.normal(0, 0.1, (colours, 3)), 0.02, 0.98)


def _noise(rng: np.random.Generator, side: int) -> Array:
    """1/f noise, its channels correlated as those of natural images are."""
    slope = rng.uniform(0.9, 1.5)
    grey_HW1 = _spectrum(rng, side, slope)[..., None]
    tint_HW3 = np.stack([_spectrum(rng, side, slope + 0.3) for _ in range(3)], -1)
    return _palette(rng, 1)[0] + rng.uniform(0.1, 0.25) * grey_HW1 + rng.uniform(0.02, 0.08) * tint_HW3


def _leaves(rng: np.random.Generator, side: int) -> Array:
    """Dead leaves: discs that cover one another, their radii following a power law (Lee, Mumford & Huang 2001)."""
    colours = _palette(rng, 160)
    image_HW3 = np.broadcast_to(colours[0], (side, side, 3)).copy()
    radii = np.sort(side * (0.015 + 0.2 * rng.power(0.35, colours.shape[0])))[::-1]
    for colour, radius in zip(colours, radii, strict=True):
        reach = int(radius) + 1
        span = np.arange(-reach, reach + 1)
        disc = span[:, None] ** 2 + span[None, :] ** 2 <= radius**2
        y, x = rng.integers(side, size=2)
        rows, columns = np.nonzero(disc)
        image_HW3[(y + rows - reach) % side, (x + columns - reach) % side] = colour
    return image_HW3


def _cells(rng: np.random.Generator, side: int) -> Array:
    """Flat patches with wandering borders: the level sets of smooth noise, each with a colour."""
    levels = int(rng.integers(4, 9))
    field_HW = _spectrum(rng, side, rng.uniform(1.4, 2.2))
    edges = np.quantile(field_HW, np.linspace(0, 1, levels + 1)[1:-1])
    return _palette(rng, levels)[np.digitize(field_HW, edges)]


def _stripes(rng: np.random.Generator, side: int) -> Array:
    """Stripes or checks of a few pixels to a tenth of the side, bent by smooth noise."""
    ys, xs = np.mgrid[:side, :side] / side
    turns_x, turns_y = rng.integers(-side // 16, side // 16 + 1, 2)
    bend_HW = rng.uniform(0, 1.5) * _spectrum(rng, side, 2.0)
    wave_HW = np.sin(2 * np.pi * (turns_x * xs + turns_y * ys) + bend_HW)
    if rng.uniform() < 0.4:
        wave_HW = wave_HW * np.sin(2 * np.pi * (turns_y * xs - turns_x * ys) + bend_HW)
    mix_HW1 = 1 / (1 + np.exp(-rng.uniform(1, 8) * wave_HW))[..., None]
    first, second = _palette(rng, 2)
    return first + (second - first) * mix_HW1
