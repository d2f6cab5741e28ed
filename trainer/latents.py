"""Latents of a video in one safetensors file, written and read a step at a time.

Tensor ``00000012.motion`` is the tensor ``motion`` of step 12 of the stream, in the shape that the recipe gave it. The
metadata (all strings) says which recipe, configuration and weights made them, and what the video was.

Legend: none; shapes are the recipes'.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError, safe_open

from pipelines import storage
from pipelines.faults import InputError
from trainer.recipe import Latent

FORMAT = "moviola-latents-1"
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
COPY_BYTES = 8 << 20


def save(url: str, latents: Iterable[Latent], metadata: Callable[[], Mapping[str, str]]) -> int:
    """Writes a stream of latents; how many steps it had. Memory holds one step; the rest waits on local disk.

    ``metadata`` is asked once the stream has ended. Raises InputError where the file can't be written.
    """
    with tempfile.TemporaryFile() as spool:
        steps, head = _spooled(latents, metadata, spool)
        with storage.writer(url) as file:
            file.write(head)
            shutil.copyfileobj(spool, file, COPY_BYTES)
    return steps


def packed(latents: Iterable[Latent], metadata: Mapping[str, str]) -> bytes:
    """The same file as bytes, which are the same for the same latents."""
    spool = io.BytesIO()
    _, head = _spooled(latents, lambda: metadata, spool)
    return head + spool.read()


def _spooled(
    latents: Iterable[Latent], metadata: Callable[[], Mapping[str, str]], spool: IO[bytes]
) -> tuple[int, bytes]:
    """Steps and header of the file whose tensors it writes to ``spool``, which is left at its start."""
    header: dict[str, object] = {}
    steps = end = 0
    for steps, latent in enumerate(latents, start=1):
        for name, tensor in sorted(latent.items()):
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            begin, end = end, end + len(data)
            header[f"{steps - 1:08d}.{name}"] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            spool.write(data)
    text = json.dumps({"__metadata__": {"format": FORMAT, **metadata()}, **header}).encode()
    text += b" " * (-len(text) % 8)
    spool.seek(0)
    return steps, len(text).to_bytes(8, "little") + text


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[dict[str, str], Iterator[Latent]]]:
    """The metadata, and the steps one after another; raises InputError for a file that is not of latents."""
    with local(url) as path:
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{storage.redact(url)} is not a safetensors file: {error}") from None
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{storage.redact(url)} is a safetensors file, but not of latents that `moviola encode` wrote "
                f"(its format is {metadata.get('format')!r}, not {FORMAT!r})"
            )
        names: dict[str, list[str]] = {}
        for key in sorted(file.keys()):
            names.setdefault(key.partition(".")[0], []).append(key)
        yield metadata, ({key.partition(".")[2]: file.get_tensor(key) for key in keys} for keys in names.values())


@contextlib.contextmanager
def local(url: str) -> Iterator[str]:
    """A path of the file at ``url``: its own, or a temporary copy of a remote one."""
    if not storage.is_remote(url):
        path = storage.absolute(url)
        if not Path(path).is_file():
            raise InputError(f"{url}: there is no such file", status=2)
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=Path(url).suffix) as copy:
        size = storage.size(url)
        for begin in range(0, size, COPY_BYTES):
            copy.write(storage.read_bytes(url, begin, min(size, begin + COPY_BYTES)))
        copy.flush()
        yield copy.name
