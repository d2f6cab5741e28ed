"""Reconstructions to look at: a PNG grid, a side-by-side mp4, and the colours of flow and error.

A picture shows a clip's original, then named views of it (reconstruction, flow, ...), then the reconstruction's error.

Legend: B clips, C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

ERROR_FULL_SCALE = 64
"""Grey levels of 255 at which the error map reaches its brightest colour."""

PAPER, INK, FAINT, RULE = (250, 250, 248), (28, 28, 30), (110, 110, 116), (222, 222, 220)
SHEET_WIDTH = 8192
"""Widest sheet of frames, in pixels: what every browser and encoder takes."""
VIDEO_CLOCK = 90_000
"""Ticks a second of the mp4's time stamps, so that clips of different frame rates each play at their own."""
CONTACTS = 32
"""Samples that a picture of all shows at most."""
ERROR_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
# Hues of the flow wheel with the number of steps to the next one, from Baker et al., IJCV 2011, section 5.1.
WHEEL = (
    ((255, 0, 0), 15),
    ((255, 255, 0), 6),
    ((0, 255, 0), 4),
    ((0, 255, 255), 11),
    ((0, 0, 255), 13),
    ((255, 0, 255), 6),
)


@dataclass(frozen=True, slots=True)
class Views:
    """One clip to draw. All pixels (3, T, H, W) in [-1, 1]; ``views`` by name, ``reconstruction`` among them."""

    title: str
    original_CTHW: Tensor
    views: Mapping[str, Tensor]
    fps: float = 10.0
    notes: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[tuple[str, np.ndarray]]:
        """Names and 8-bit pictures (T, H, W, 3): original, reconstruction, other views, error."""
        reconstruction = self.views["reconstruction"]
        others = [(name, view) for name, view in self.views.items() if name != "reconstruction"]
        error = error_to_rgb(self.original_CTHW, reconstruction)
        listed = [("original", self.original_CTHW), ("reconstruction", reconstruction), *others, ("error", error)]
        return [(name, _bytes(pixels)) for name, pixels in listed]


def flow_to_rgb(flow_B2THW: Tensor, full_scale: float | None = None) -> Tensor:
    """Optical flow (x right, y down, in pixels) as colour (B, 3, T, H, W) in [-1, 1] by the Middlebury wheel.

    Direction is hue, speed is saturation: white stands still. Colours are full at ``full_scale`` pixels, by default at
    each clip's 99th percentile of speed, and at least at 1 pixel; faster flow is darker.
    """
    flow_B2THW = flow_B2THW.detach().float().cpu()
    speed_B1THW = flow_B2THW.norm(dim=1, keepdim=True)
    if full_scale is None:
        rank = math.ceil(0.99 * speed_B1THW[0].numel())
        scale_B = speed_B1THW.flatten(1).kthvalue(rank, dim=1).values.clamp(min=1.0)
    else:
        scale_B = torch.full((len(flow_B2THW),), float(full_scale))
    speed_B1THW = speed_B1THW / scale_B.view(-1, 1, 1, 1, 1)
    wheel_N3 = _wheel()
    turn_BTHW = torch.atan2(-flow_B2THW[:, 1], -flow_B2THW[:, 0]) / math.pi  # -1..1; the wheel starts at 0 degrees
    at_BTHW = (turn_BTHW + 1) / 2 * len(wheel_N3)
    share_BTHW1 = at_BTHW.frac().unsqueeze(-1)
    below_BTHW = at_BTHW.long() % len(wheel_N3)
    above_BTHW = (below_BTHW + 1) % len(wheel_N3)
    hue_BTHW3 = wheel_N3[below_BTHW] * (1 - share_BTHW1) + wheel_N3[above_BTHW] * share_BTHW1
    hue_B3THW = hue_BTHW3.permute(0, 4, 1, 2, 3)
    colour_B3THW = torch.where(speed_B1THW <= 1, 1 - speed_B1THW * (1 - hue_B3THW), hue_B3THW * 0.75)
    return colour_B3THW * 2 - 1


def _wheel() -> Tensor:
    hues = [hue for hue, _ in WHEEL] + [WHEEL[0][0]]
    steps = []
    for (hue, count), following in zip(WHEEL, hues[1:], strict=True):
        start, end = torch.tensor(hue) / 255, torch.tensor(following) / 255
        steps += [start + (end - start) * k / count for k in range(count)]
    return torch.stack(steps)


def error_to_rgb(original_CTHW: Tensor, reconstruction_CTHW: Tensor) -> Tensor:
    """Mean absolute error over the colour channels, dark to bright, in [-1, 1]; brightest at ``ERROR_FULL_SCALE``."""
    x, y = (v.detach().float().cpu().clamp(-1, 1) for v in (original_CTHW, reconstruction_CTHW))
    share_THW = ((y - x).abs().mean(0) * 127.5 / ERROR_FULL_SCALE).nan_to_num(1.0).clamp(0, 1)
    return _error_colour(share_THW).movedim(-1, 0) * 2 - 1


def _error_colour(share: Tensor) -> Tensor:
    stops = torch.tensor(ERROR_COLOURS) / 255
    at = share * (len(stops) - 1)
    below = at.floor().long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[below], stops[below + 1], (at - below).unsqueeze(-1))


def _bytes(pixels_CTHW: Tensor) -> np.ndarray:
    """(T, H, W, 3) uint8 of pixels in [-1, 1]; what is not finite is black."""
    pixels = pixels_CTHW.detach().float().cpu().nan_to_num(-1.0).clamp(-1, 1)
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _sized(frame_HW3: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A frame at (height, width); the pixels of small frames stay visible squares when the factor is whole."""
    height, width = frame_HW3.shape[:2]
    whole = size[0] % height == 0 and size[1] % width == 0
    picture = Image.fromarray(frame_HW3)
    return picture.resize((size[1], size[0]), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _panel_size(height: int, width: int, least: int, most: int) -> tuple[int, int]:
    """(height, width) of a panel: whole multiples of a small frame up to ``least`` high, shrunk to ``most`` wide."""
    factor = max(1, math.ceil(least / height))
    while factor > 1 and factor * width > most:
        factor -= 1
    if factor * width <= most:
        return factor * height, factor * width
    return max(1, round(height * most / width)), most


def grid(clip: Views, path: str | Path, *, columns: int = 8, panel: int = 160) -> Path:
    """Writes a PNG: a row a view, a column a frame; at most ``columns`` frames, evenly spread, first and last included.

    Panels are at least ``panel`` pixels high where frames are smaller than that. Returns the path.
    """
    rows = clip.rows()
    frames, height, width = rows[0][1].shape[:3]
    count = min(columns, frames)
    shown = [round(k * (frames - 1) / max(1, count - 1)) for k in range(count)]
    panel_h, panel_w = _panel_size(height, width, panel, 2 * panel)
    gap, margin, title_font, label_font = 6, 24, _font(22), _font(16)
    names = {name: _label(name, clip) for name, _ in rows}
    left = margin + 12 + max(int(label_font.getlength(line)) for label in names.values() for line in label)
    top = margin + 62
    total_w = left + count * (panel_w + gap) - gap + margin
    total_w = max(total_w, 2 * margin + int(title_font.getlength(clip.title)))
    total_h = top + len(rows) * (panel_h + gap) - gap + margin
    canvas = Image.new("RGB", (total_w, total_h), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((margin, margin - 6), clip.title, INK, title_font)
    for k, t in enumerate(shown):
        x = left + k * (panel_w + gap) + panel_w // 2
        draw.text((x, top - 8), f"frame {t + 1}", FAINT, label_font, anchor="ms")
    for r, (name, frames_THW3) in enumerate(rows):
        y = top + r * (panel_h + gap)
        for line, text in enumerate(names[name]):
            colour = INK if line == 0 else FAINT
            at = y + panel_h // 2 + round(20 * (line - (len(names[name]) - 1) / 2))
            draw.text((left - 12, at), text, colour, label_font, anchor="rm")
        for k, t in enumerate(shown):
            x = left + k * (panel_w + gap)
            canvas.paste(_sized(frames_THW3[t], (panel_h, panel_w)), (x, y))
            draw.rectangle((x - 1, y - 1, x + panel_w, y + panel_h), outline=RULE)
        if name in LEGENDS:
            legend = Image.fromarray(LEGENDS[name]())
            canvas.paste(legend, (left - 12 - legend.width, y + panel_h // 2 + 12 * len(names[name]) + 4))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def contact(clips_3THW: Sequence[Tensor], path: str | Path, *, columns: int = 8, panel: int = 128) -> Path:
    """Writes a PNG: a row a clip (3, T, H, W) in [-1, 1], at most ``columns`` frames of it, evenly spread."""
    frames, height, width = clips_3THW[0].shape[1:]
    count, gap = min(columns, frames), 6
    panel_h, panel_w = _panel_size(height, width, panel, 2 * panel)
    canvas = Image.new("RGB", (count * (panel_w + gap) + gap, len(clips_3THW) * (panel_h + gap) + gap), PAPER)
    for row, clip_3THW in enumerate(clips_3THW):
        frames_THW3 = _bytes(clip_3THW)
        for k in range(count):
            frame_HW3 = frames_THW3[round(k * (frames - 1) / max(1, count - 1))]
            canvas.paste(
                _sized(frame_HW3, (panel_h, panel_w)), (gap + k * (panel_w + gap), gap + row * (panel_h + gap))
            )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def sheet(clip: Views, path: str | Path) -> Path:
    """Writes every frame of every view, pixel for pixel, as tiles of one PNG; returns its path.

    Views stand below one another, each in as many rows of ``columns`` frames as it takes. The file says so itself: the
    text ``moviola`` is JSON with title, fps, views, frames, height, width and columns. :func:`read_sheet` reads it.
    """
    rows = clip.rows()
    frames, height, width = rows[0][1].shape[:3]
    columns = max(1, min(frames, SHEET_WIDTH // width))
    lines = math.ceil(frames / columns)
    tiles = np.zeros((len(rows) * lines, columns, height, width, 3), np.uint8)
    for view, (_, frames_THW3) in enumerate(rows):
        for t, frame_HW3 in enumerate(frames_THW3):
            tiles[view * lines + t // columns, t % columns] = frame_HW3
    facts = {"title": clip.title, "fps": clip.fps, "views": [name for name, _ in rows]}
    facts |= {"frames": frames, "height": height, "width": width, "columns": columns}
    text = PngInfo()
    text.add_text("moviola", json.dumps(facts))
    picture = Image.fromarray(tiles.transpose(0, 2, 1, 3, 4).reshape(-1, columns * width, 3))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=text)
    return path


def read_sheet(data: bytes) -> tuple[dict[str, Any], Image.Image]:
    """What a :func:`sheet` says of itself, and its tiles."""
    with Image.open(io.BytesIO(data)) as opened:
        return json.loads(opened.info["moviola"]), opened.convert("RGB")


def _label(name: str, clip: Views) -> list[str]:
    notes = dict(clip.notes)
    if name == "error":
        notes.setdefault("error", f"0 to {ERROR_FULL_SCALE} of 255")
    return [name, *notes[name].split("\n")] if name in notes else [name]


def _error_legend() -> np.ndarray:
    return (_error_colour(torch.linspace(0, 1, 100)) * 255).round().byte().expand(8, -1, -1).numpy()


def _flow_legend() -> np.ndarray:
    """A disc: where a point lies from its middle is where such a colour moves."""
    y_HW, x_HW = torch.meshgrid(torch.linspace(-1, 1, 37), torch.linspace(-1, 1, 37), indexing="ij")
    disc = _bytes(flow_to_rgb(torch.stack([x_HW, y_HW])[None, :, None], full_scale=1)[0])[0].copy()
    disc[(x_HW**2 + y_HW**2 > 1).numpy()] = PAPER
    return disc


LEGENDS = {"error": _error_legend, "flow": _flow_legend}


def side_by_side(
    clips: Sequence[Views], path: str | Path, *, panel: int = 320, seconds: float = 2.0, views: Sequence[str] = ()
) -> Path:
    """Writes an mp4 (H.264, yuv420p): original, reconstruction, further ``views``, error, beside each other.

    Clips are played one after the other at their own frame rates, each over and over until it has lasted ``seconds``,
    so that short ones can be watched. Frames lower than ``panel`` pixels are enlarged. Returns the path. Raises
    ValueError where there are no clips or their frames differ in size.
    """
    wanted = ("original", "reconstruction", *views, "error")
    sizes = {tuple(clip.original_CTHW.shape[-2:]) for clip in clips}
    if len(sizes) != 1:
        raise ValueError(f"a video needs clips of one frame size; these have {sorted(sizes) or 'none'}")
    height, width = sizes.pop()
    panel_h, panel_w = _panel_size(height, width, panel, 4 * panel)
    gap, margin, label_font, title_font = 8, 16, _font(20), _font(18)
    total_w = _even(2 * margin + len(wanted) * (panel_w + gap) - gap)
    top = margin + 30
    total_h = _even(top + panel_h + 34 + margin)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(max(clip.fps for clip in clips)).limit_denominator(1001)
    clock = 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = total_w, total_h, "yuv420p"
        stream.codec_context.time_base = Fraction(1, VIDEO_CLOCK)
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        for clip in clips:
            rows = dict(clip.rows())
            frames = len(rows["original"])
            pictures = []
            for t in range(frames):
                canvas = Image.new("RGB", (total_w, total_h), PAPER)
                draw = ImageDraw.Draw(canvas)
                for k, name in enumerate(wanted):
                    x = margin + k * (panel_w + gap)
                    draw.text((x + panel_w // 2, top - 10), ", ".join(_label(name, clip)), INK, label_font, "ms")
                    canvas.paste(_sized(rows[name][t], (panel_h, panel_w)), (x, top))
                foot = top + panel_h + 24
                count = f"frame {t + 1} of {frames}"
                draw.text((total_w - margin, foot), count, FAINT, title_font, "rs")
                room = total_w - 2 * margin - 20 - title_font.getlength(count)
                draw.text((margin, foot), _shortened(clip.title, title_font, room), FAINT, title_font, "ls")
                pictures.append(np.asarray(canvas))
            for _ in range(max(1, math.ceil(seconds * clip.fps / frames))):
                for picture in pictures:
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                    frame = frame.reformat(
                        format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709", dst_color_range="MPEG"
                    )
                    frame.time_base, frame.pts = Fraction(1, VIDEO_CLOCK), clock
                    frame.duration = round(VIDEO_CLOCK / clip.fps)
                    clock += frame.duration
                    container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _shortened(text: str, font: Any, room: float) -> str:
    """The text, or as much of its end as fits: the end of a clip's name tells it from the next one's."""
    if font.getlength(text) <= room:
        return text
    while text and font.getlength("..." + text) > room:
        text = text[1:]
    return "..." + text


def _even(number: int) -> int:
    return number + number % 2
