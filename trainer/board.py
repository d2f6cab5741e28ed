"""A run's TensorBoard files: scalars, and pictures of clips as grids and as moving ones.

Legend: C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

from pipelines import storage
from pipelines.faults import InputError
from trainer import pictures


class Board:
    """Writes ``RUN/tensorboard``; for an object store the files grow in a local folder and ``flush`` uploads them."""

    def __init__(self, run_url: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._url = storage.join(run_url, "tensorboard")
        self._scratch = tempfile.TemporaryDirectory() if storage.is_remote(run_url) else None
        self._folder = self._scratch.name if self._scratch else self._url.removeprefix("file://")
        self._writer = SummaryWriter(self._folder)

    def scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """One point of each curve; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def pictures(self, step: int, clips: Sequence[pictures.Views]) -> None:
        """Each clip's views (original, reconstruction, flow, ..., error) as a grid and, moving, beside each other."""
        with tempfile.TemporaryDirectory() as scratch:
            for number, clip in enumerate(clips):
                grid = Path(scratch) / "grid.png"
                pictures.grid(clip, grid)
                self._image(f"clip-{number:02d}/grid", step, grid.read_bytes())
                self._image(f"clip-{number:02d}/moving", step, moving(clip))
        self._writer.flush()

    def _image(self, tag: str, step: int, data: bytes) -> None:
        """An encoded picture; TensorBoard plays a GIF, which is all that its writer's ``add_video`` makes."""
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def flush(self) -> None:
        """Brings what was written to storage."""
        self._writer.flush()
        if self._scratch is not None:
            for file in Path(self._folder).iterdir():
                storage.upload(storage.join(self._url, file.name), file)

    def close(self) -> None:
        """Writes everything out."""
        self._writer.close()
        if self._scratch is not None:
            with contextlib.suppress(InputError), self._scratch:
                self.flush()


def moving(clip: pictures.Views) -> bytes:
    """A GIF of a clip's views beside each other, at the clip's frame rate."""
    views_VTHW3 = np.stack([frames_THW3 for _, frames_THW3 in clip.rows()])
    frames = [Image.fromarray(np.concatenate(list(views_VTHW3[:, t]), axis=1)) for t in range(views_VTHW3.shape[1])]
    data = io.BytesIO()
    frames[0].save(
        data, "GIF", save_all=True, append_images=frames[1:], duration=max(20, round(1000 / clip.fps)), loop=0
    )
    return data.getvalue()
