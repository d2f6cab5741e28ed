"""Checkpoints: write behind training, commit, verify, read at any sharding, retain. Nothing in here knows ZeRO.

Training, every rank alike (``engines`` are named: ``model``, ``adversary``):

    lease = Lease.take(run_url)
    for reader in candidates(run_url, lease, warn):        newest first; None once, for a run without checkpoints
        engine = Engine(..., stage of reader.step, ...)
        if reader is None or reader.restore({"model": engine}, warn):
            break                                          False on every rank when it is damaged: take the next
    saver = Checkpointer(run_url, lease, rank=0, world=1, keep=3, timeout=1800, before_commit=telemetry.flush)
    blocked = saver.save(step, {"model": engine}, state, tensors={"adversary/lecam": t})      seconds
    saver.check()                                          raises what went wrong behind training; cheap
    saver.committed()                                      newest step known to be committed, or None
    saver.close()                                          waits for the last commit

Reading, in one process, without torch.distributed or DeepSpeed. URL is a checkpoint or a run; a run's newest one, when
damaged, falls back to the one before it, and ``warn`` is told:

    load_weights(url, ema=True, warn=print) -> {name: tensor}; assign(module, weights)
    fingerprint(url) -> {"weights": digest, "ema": ..., "optimizer": ..., "adversary": ..., "loader": ..., "rng": ...}
    newest(run_url) -> Checkpoint | None; newest_step(run_url) -> int | None; using(url, read, warn)
    Checkpoint(url)  .step  .state  .rng(rank)  .tensors()  .verify()

On storage, ``RUN/checkpoints/step-00000500/``; N is the attempt, so that two attempts never write the same name:

    rank-00000.aN.safetensors   the rank's pieces (``model/weight/NAME@START``, flat) and buffers; rank 0: extra tensors
    rank-00000.aN.json          its file's size and digests, its RNG as plain data: the rank is done
    state.aN.json               what the loop saved, and the engines' meta
    manifest.aN.json            sizes and block digests of all of these
    lease.json                  (in RUN) a swap makes the step count: here the checkpoint is committed, or fenced off
    manifest.json, COMMITTED    what readers look for; COMMITTED holds the digest of manifest.json

Digests are of 4 MiB blocks: a rank that needs a part of a file reads and verifies the blocks that hold it, no more. The
headers, of which every rank reads all, have digests of their own.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from math import prod
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines import storage
from pipelines.faults import InputError
from trainer.lease import Commit, Fenced, Lease

__all__ = [
    "Checkpoint", "Checkpointer", "Damaged", "Fenced", "Lease", "assign", "candidates", "fingerprint", "load_weights",
    "newest", "newest_step",
]  # fmt: skip

FORMAT = 1
BLOCK = 4 << 20
RUN_BLOCKS = 8
BACK = "Going back to the checkpoint before it; the steps since then are trained again."
READERS = 8
MARKS = ("COMMITTED", "manifest.json")
"""What readers look for. Every attempt writes these names, the manifest first; all others bear its number."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Warn = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one flattened tensor: ``values`` is a flat view, ``start`` its place in the whole."""

    kind: str
    name: str
    start: int
    values: Tensor


@dataclass
class Snapshot:
    """One rank's part of a checkpoint, on the host. ``tensors`` may be read after :meth:`wait`.

    Keys are ``weight/NAME@START`` for pieces (flat) and ``buffer/NAME`` for buffers. The next snapshot of the same
    engine reuses the memory.
    """

    meta: dict[str, Any]
    tensors: dict[str, Tensor]
    _done: threading.Event = field(default_factory=threading.Event)
    _error: BaseException | None = None

    def wait(self) -> None:
        """Returns when the copy is complete; raises what went wrong with it."""
        self._done.wait()
        if self._error is not None:
            raise self._error


class Saves(Protocol):
    """What a checkpoint asks of an engine; ``trainer/engine.py`` answers."""

    def snapshot(self) -> Snapshot:
        """Starts copying what this rank owns to the host."""
        ...

    def restore(self, state: EngineState) -> None:
        """Takes over a stored state; the same error, or none, on every rank."""
        ...


class Damaged(InputError):
    """A checkpoint that was committed is not what was written: a file is missing, short, or has other bytes."""


# -- writing ----------------------------------------------------------------------------------------------------------


class Checkpointer:
    """Saves and commits behind training. At most one checkpoint is under way; a further :meth:`save` waits for it.

    ``timeout`` in seconds bounds every wait: for a slow or stuck upload, for another rank's part, for the commit.
    ``before_commit`` runs behind training on every rank before its part counts. ``keep`` newest checkpoints stay.
    ``committed`` is the step of the checkpoint that the attempt went on from.
    """

    def __init__(
        self,
        run_url: str,
        lease: Lease,
        *,
        rank: int = 0,
        world: int = 1,
        keep: int = 3,
        timeout: float = 1800.0,
        before_commit: Callable[[], None] | None = None,
        committed: int | None = None,
    ) -> None:
        self.run_url, self.lease = run_url, lease
        self.rank, self.world, self.keep, self.timeout = rank, world, keep, timeout
        self._before_commit = before_commit
        self._error: BaseException | None = None
        self._committed = committed
        self._doing = "nothing"
        self.seconds = 0.0
        """What the last checkpoint took, from snapshot to commit."""
        self.phases: dict[str, float] = {}
        """The same by phase: ``copy`` to the host, ``write``, ``wait`` for others, on rank 0 ``commit``."""
        self.bytes: int | None = None
        """Size of the last checkpoint that this rank committed; None on ranks other than 0."""
        self._step = -1
        self._begun = 0.0
        self._thread: threading.Thread | None = None

    def save(
        self,
        step: int,
        engines: Mapping[str, Saves],
        state: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Starts a checkpoint of the run after ``step`` optimizer steps; the seconds that training stood still.

        ``state`` is JSON (rank 0's is kept) and ``tensors`` are small ones outside any engine (rank 0's as well). The
        random number generators of Python, NumPy and torch are taken now. Raises what :meth:`check` raises.
        """
        begin = time.perf_counter()
        self._wait()
        snapshots = {name: engine.snapshot() for name, engine in engines.items()}
        extra = {name: tensor.detach().to("cpu", copy=True) for name, tensor in (tensors or {}).items()}
        saved = json.loads(json.dumps(state))
        rng = _take_rng()
        self._step, self._begun = step, time.monotonic()
        self._thread = threading.Thread(
            target=self._run, args=(step, snapshots, extra, saved, rng), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()
        return time.perf_counter() - begin

    def check(self) -> None:
        """Raises what went wrong behind training: InputError (full disk, no permission, time-out), Fenced."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if self._thread is not None and self._thread.is_alive() and self._left() <= 0:
            raise self._late()

    def committed(self) -> int | None:
        """Step of the newest checkpoint that this process knows to be committed."""
        return self._committed

    def close(self) -> None:
        """Waits for the checkpoint that is under way; raises what :meth:`check` raises."""
        self._wait()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join(max(0.0, self._left()))
            self.check()
            self._thread = None
        self.check()

    def _left(self) -> float:
        return self._begun + self.timeout - time.monotonic()

    def _run(self, *job: Any) -> None:
        begin = time.perf_counter()
        try:
            self._write(*job)
            self.seconds = time.perf_counter() - begin
        except BaseException as error:
            self._error = error

    def _write(
        self,
        step: int,
        snapshots: Mapping[str, Snapshot],
        extra: Mapping[str, Tensor],
        state: Any,
        rng: tuple[Any, ...],
    ) -> None:
        deadline = time.monotonic() + self.timeout
        times = [time.perf_counter()]
        folder = _folder(self.run_url, step)
        stem = f"rank-{self.rank:05d}.a{self.lease.attempt}"
        self._doing = "copying its state to the host"
        for snapshot in snapshots.values():
            snapshot.wait()
        tensors = {f"{engine}/{key}": t for engine, s in snapshots.items() for key, t in s.tensors.items()}
        if self.rank == 0:
            tensors.update({f"tensors/{name}": tensor for name, tensor in extra.items()})
        times.append(time.perf_counter())
        if self._before_commit is not None:
            self._doing = "writing the lines that precede the commit"
            self._before_commit()
        self._doing = f"writing {stem}.safetensors"
        files = {f"{stem}.safetensors": _write_tensors(storage.join(folder, f"{stem}.safetensors"), tensors)}
        if self.rank == 0:
            meta = {name: snapshot.meta for name, snapshot in snapshots.items()}
            head = {"format": FORMAT, "step": step, "world": self.world, "attempt": self.lease.attempt}
            name = f"state.a{self.lease.attempt}.json"
            files[name] = _write_blob(storage.join(folder, name), {**head, "engines": meta, "state": state})
        part = {"rank": self.rank, "files": files, "rng": _plain_rng(*rng)}
        _write_blob(storage.join(folder, f"{stem}.json"), part)
        times.append(time.perf_counter())
        if self.rank == 0:
            parts = self._gather(folder, deadline)
            times.append(time.perf_counter())
            self._commit(step, folder, parts)
        else:
            self._doing = "waiting for rank 0 to commit"
            _poll(lambda: storage.exists(storage.join(folder, "COMMITTED")), deadline, self._late)
        times.append(time.perf_counter())
        phases = zip(("copy", "write", "wait", "commit"), pairwise(times), strict=False)
        self.phases = {phase: end - begin for phase, (begin, end) in phases}
        self._committed = step
        self._doing = "nothing"

    def _gather(self, folder: str, deadline: float) -> Iterable[str]:
        """Waits until every rank's part is there; their names."""
        attempt = self.lease.attempt
        parts = {rank: f"rank-{rank:05d}.a{attempt}.json" for rank in range(self.world)}

        def complete() -> bool:
            there = {entry.name for entry in storage.list_dir(folder)}
            missing = [rank for rank, name in parts.items() if name not in there]
            self._doing = f"waiting for the part of rank {', '.join(map(str, missing[:8]))}"
            return not missing

        _poll(complete, deadline, self._late)
        return parts.values()

    def _commit(self, step: int, folder: str, parts: Iterable[str]) -> None:
        attempt = self.lease.attempt
        self._doing = "committing"
        files: dict[str, Any] = {}
        for name in parts:
            data = storage.read_bytes(storage.join(folder, name))
            files.update(json.loads(data)["files"])
            files[name] = {"bytes": len(data), "blocks": [_digest(data)]}
        self.bytes = sum(file["bytes"] for file in files.values())
        manifest = {"format": FORMAT, "step": step, "attempt": attempt, "world": self.world, "block": BLOCK}
        data = (json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=1) + "\n").encode()
        storage.write_bytes(storage.join(folder, f"manifest.a{attempt}.json"), data)
        dropped = self.lease.register(step, _digest(data), self.keep)
        _mark(self.lease, folder, Commit(step, attempt, _digest(data)), data)
        self._doing = f"deleting the checkpoints of steps {dropped}"
        for old in dropped:
            _remove(self.lease, _folder(self.run_url, old))

    def _late(self) -> InputError:
        return InputError(
            f"the checkpoint of step {self._step} is not committed after {self.timeout:g} s: rank {self.rank} is still "
            f"{self._doing}. The newest committed one is of step {self._committed}. Look at the storage, or raise "
            "checkpoint.timeout_seconds."
        )


def _mark(lease: Lease, folder: str, commit: Commit, manifest: bytes) -> None:
    """Writes what readers look for. Whoever else does so for this commit writes the same bytes."""
    marker = {"step": commit.step, "attempt": commit.attempt, "manifest": commit.manifest}
    for name, data in zip(reversed(MARKS), (manifest, (json.dumps(marker) + "\n").encode()), strict=True):
        url = storage.join(folder, name)
        found = storage.read_versioned(url)
        if found is None or found[0] != data:
            lease.hold()
            lease.swap(url, data, found[1] if found else None)


def _unmark(lease: Lease, folder: str) -> None:
    """Takes a checkpoint out of sight, the marker first: what is half deleted is not committed."""
    urls = [storage.join(folder, name) for name in MARKS]
    found = [(url, seen[1]) for url in urls if (seen := storage.read_versioned(url))]
    lease.hold()
    for url, version in found:
        storage.delete(url, version=version)


def _remove(lease: Lease, folder: str) -> None:
    """Removes a checkpoint, or what is left of one. However long the process stood still on the way, of what a newer
    attempt has written into the folder nothing goes: its files bear its number, its marks are another version.
    """

    def kept(name: str) -> bool:
        numbered = re.search(r"\.a(\d+)\.", name)
        return name in MARKS or (numbered is not None and int(numbered[1]) > lease.attempt)

    _unmark(lease, folder)
    storage.delete(folder, recursive=True, keep=kept)


def _poll(done: Callable[[], bool], deadline: float, late: Callable[[], Exception]) -> None:
    pause = 0.02
    while not done():
        if time.monotonic() > deadline:
            raise late()
        time.sleep(pause)
        pause = min(1.5 * pause, 2.0)


def _write_tensors(url: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file; its size and the digests of its blocks and of its header."""
    ordered = sorted(tensors, key=lambda key: -tensors[key].element_size())
    header, at = {}, 0
    for key in ordered:
        tensor = tensors[key]
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + _size(tensor)],
        }
        at += _size(tensor)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    with storage.writer(url) as stream:
        blocks = _Blocks(stream)
        blocks.write(memoryview(head))
        for key in ordered:
            if tensors[key].numel():
                blocks.write(memoryview(tensors[key].contiguous().reshape(-1).view(torch.uint8).numpy()))
        return {**blocks.finish(), "header": {"bytes": len(head), "digest": _digest(head)}}


def _write_blob(url: str, value: Any) -> dict[str, Any]:
    data = (json.dumps(value) + "\n").encode()
    storage.write_bytes(url, data)
    return {"bytes": len(data), "blocks": [_digest(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]}


class _Blocks:
    """Writes on, and digests every BLOCK bytes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._hash, self._room, self._bytes = stream, hashlib.blake2b(digest_size=16), BLOCK, 0
        self._digests: list[str] = []

    def write(self, view: memoryview) -> None:
        while view:
            part, view = view[: self._room], view[self._room :]
            self._stream.write(part)
            self._hash.update(part)
            self._room -= len(part)
            self._bytes += len(part)
            if self._room == 0:
                self._digests.append(self._hash.hexdigest())
                self._hash, self._room = hashlib.blake2b(digest_size=16), BLOCK

    def finish(self) -> dict[str, Any]:
        if self._room < BLOCK:
            self._digests.append(self._hash.hexdigest())
        return {"bytes": self._bytes, "blocks": self._digests}


# -- reading ----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A committed checkpoint, opened: its manifest and state are verified, what else is read is verified then.

    Raises Damaged, or InputError where there is none. ``checkpoint["model"]`` is what ``Engine.restore`` takes.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            marker = _marker(url)
        except storage.Missing:
            raise InputError(
                f"{storage.redact(url)} is not a committed checkpoint: there is no COMMITTED in it", status=2
            ) from None
        data = self._bytes("manifest.json")
        if _digest(data) != marker.manifest:
            raise Damaged(f"{storage.redact(url)} is damaged: manifest.json is not what was written")
        self.manifest = json.loads(data)
        if self.manifest["format"] != FORMAT:
            raise InputError(
                f"{storage.redact(url)} has format {self.manifest['format']}; this version reads format {FORMAT}"
            )
        self.step: int = self.manifest["step"]
        self.attempt: int = self.manifest["attempt"]
        self.world: int = self.manifest["world"]
        saved = json.loads(self.read(f"state.a{self.attempt}.json"))
        self.engines: dict[str, Any] = saved["engines"]
        self.state: dict[str, Any] = saved["state"]

    def __getitem__(self, engine: str) -> EngineState:
        if engine not in self.engines:
            raise InputError(f"{storage.redact(self.url)} holds no {engine}; it holds {', '.join(self.engines)}")
        return EngineState(self, engine)

    def restore(self, engines: Mapping[str, Saves], warn: Warn) -> bool:
        """Restores every engine, and the rank's generators where the checkpoint has some for it; a collective.

        False, on every rank and with a warning, when it is damaged.
        """
        try:
            with together():
                rng = self.rng(dist.get_rank() if dist.is_initialized() else 0)
            for name, engine in engines.items():
                engine.restore(self[name])
        except Damaged as error:
            warn(f"{error}. {BACK}")
            return False
        if rng is not None:
            set_rng(rng)
        return True

    def rng(self, rank: int) -> dict[str, Any] | None:
        """State of a rank's random number generators, for :func:`set_rng`; None where there was no such rank."""
        if rank >= self.world:
            return None
        return json.loads(self.read(f"rank-{rank:05d}.a{self.attempt}.json"))["rng"]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that were saved outside any engine."""
        return self._named("tensors/", 0)

    def verify(self, rank: int = 0, world: int = 1) -> None:
        """Reads everything, of several ranks each its share; raises Damaged."""
        blocks = [
            (name, block) for name, file in self.manifest["files"].items() for block in range(len(file["blocks"]))
        ]
        share = blocks[rank::world]
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(lambda part: len(self._blocks(part[0], range(part[1], part[1] + 1))), share):
                pass

    def read(self, name: str) -> bytes:
        """A whole file, verified."""
        return self._blocks(name, range(len(self._listed(name)["blocks"])))

    def fill(self, wanted: Iterable[tuple[str, str, int, memoryview]]) -> None:
        """Reads (file, tensor key, byte offset in the tensor, destination), as few bytes as the blocks allow."""
        by_file: dict[str, list[tuple[int, memoryview]]] = {}
        for file, key, offset, out in wanted:
            by_file.setdefault(file, []).append((self._places[file][key][0] + offset, out))
        jobs = [(file, run, cuts) for file, parts in by_file.items() for run, cuts in _runs(parts)]
        with ThreadPoolExecutor(READERS) as pool:
            for result in [pool.submit(self._fetch, *job) for job in jobs]:
                result.result()

    def _fetch(self, file: str, run: range, cuts: Sequence[tuple[int, memoryview]]) -> None:
        data = self._blocks(file, run)
        first = run.start * BLOCK
        for begin, out in cuts:
            low, high = max(begin, first), min(begin + len(out), first + len(data))
            out[low - begin : high - begin] = data[low - first : high - first]

    def _blocks(self, file: str, run: range) -> bytes:
        listed = self._listed(file)
        data = self._bytes(file, run.start * BLOCK, min(run.stop * BLOCK, listed["bytes"]))
        for index in run:
            at = (index - run.start) * BLOCK
            if _digest(memoryview(data)[at : at + BLOCK]) != listed["blocks"][index]:
                raise Damaged(f"{storage.redact(self.url)} is damaged: {file} is not what was written (block {index})")
        return data

    def _bytes(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        url = storage.join(self.url, name)
        try:
            return storage.read_bytes(url, start, end)
        except storage.Missing:
            raise Damaged(f"{storage.redact(self.url)} is damaged: {name} is missing") from None
        except storage.Unreachable:
            raise
        except InputError:
            if end is not None and storage.size(url) < end:
                raise Damaged(f"{storage.redact(self.url)} is damaged: {name} is cut short") from None
            raise

    def _listed(self, name: str) -> Mapping[str, Any]:
        if name not in self.manifest["files"]:
            raise Damaged(f"{storage.redact(self.url)} is damaged: its manifest lists no {name}")
        return self.manifest["files"][name]

    @cached_property
    def _files(self) -> list[str]:
        return [f"rank-{rank:05d}.a{self.attempt}.safetensors" for rank in range(self.world)]

    @cached_property
    def _places(self) -> dict[str, dict[str, tuple[int, int, str, list[int]]]]:
        """By file and tensor key: first byte, bytes, dtype and shape, from the files' headers."""

        def header(file: str) -> dict[str, tuple[int, int, str, list[int]]]:
            listed = self._listed(file)
            if "header" in listed:
                head = self._bytes(file, 0, listed["header"]["bytes"])
                if _digest(head) != listed["header"]["digest"]:
                    raise Damaged(f"{storage.redact(self.url)} is damaged: {file} is not what was written (header)")
            else:  # written before headers had digests of their own
                head = self._blocks(file, range(1))
                length = 8 + struct.unpack("<Q", head[:8])[0]
                if length > len(head):
                    head += self._blocks(file, range(1, -(-length // BLOCK)))
                head = head[:length]
            entries = json.loads(head[8:])
            return {
                key: (
                    len(head) + e["data_offsets"][0],
                    e["data_offsets"][1] - e["data_offsets"][0],
                    e["dtype"],
                    e["shape"],
                )
                for key, e in entries.items()
            }

        with ThreadPoolExecutor(READERS) as pool:
            return dict(zip(self._files, pool.map(header, self._files), strict=True))

    @cached_property
    def _index(self) -> dict[str, list[tuple[int, int, str, str]]]:
        """By ``ENGINE/KIND/NAME``: the stored pieces as (start, numel, file, tensor key)."""
        index: dict[str, list[tuple[int, int, str, str]]] = {}
        for file, places in self._places.items():
            for key, (_, _, _, shape) in places.items():
                whole, at, start = key.rpartition("@")
                if at:
                    index.setdefault(whole, []).append((int(start), prod(shape), file, key))
        return {whole: sorted(pieces) for whole, pieces in index.items()}

    def _named(self, prefix: str, rank: int) -> dict[str, Tensor]:
        """Whole tensors of one rank's file, by what follows the prefix."""
        file = self._files[rank]
        found, wanted = {}, []
        for key, (_, _, dtype, shape) in self._places[file].items():
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = tensor = torch.empty(shape, dtype=DTYPES[dtype])
                wanted.append((file, key, 0, _bytes_of(tensor)))
        self.fill(wanted)
        return found


class EngineState:
    """One engine's state in a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, engine: str) -> None:
        self.meta: dict[str, Any] = checkpoint.engines[engine]
        self._checkpoint, self._engine = checkpoint, engine

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Reads what the pieces cover; raises Damaged where nothing covers them."""
        landing = [
            (piece, piece.values if piece.values.is_cpu else torch.empty_like(piece.values, device="cpu"))
            for piece in pieces
        ]
        where = storage.redact(self._checkpoint.url)
        wanted = []
        for piece, values in landing:
            out, width = _bytes_of(values), values.element_size()
            at, end = piece.start, piece.start + values.numel()
            for start, numel, file, key in self._checkpoint._index.get(f"{self._engine}/{piece.kind}/{piece.name}", []):
                if start <= at < min(end, start + numel):
                    stored = self._checkpoint._places[file][key][2]
                    if DTYPES[stored] != values.dtype:
                        raise InputError(f"{where}: {piece.kind} of {piece.name} is {stored}, not {values.dtype}")
                    to = min(end, start + numel)
                    part = out[(at - piece.start) * width : (to - piece.start) * width]
                    wanted.append((file, key, (at - start) * width, part))
                    at = to
            if at != end:
                raise Damaged(f"{where} is damaged: {piece.kind} of {piece.name} ends at {at}, not {end}")
        self._checkpoint.fill(wanted)
        for piece, values in landing:
            if values is not piece.values:
                piece.values.copy_(values)

    def buffers(self, rank: int) -> dict[str, Tensor]:
        """A rank's buffers; rank 0's at another world size."""
        same = self.meta["world"] == (dist.get_world_size() if dist.is_initialized() else 1)
        return self._checkpoint._named(f"{self._engine}/buffer/", rank if same else 0)

    def whole(self, kind: str, batch: int = 64 << 20) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's whole tensor of a kind, in name order, ``batch`` numbers read at a time."""
        names = [
            n for n, p in sorted(self.meta["parameters"].items()) if kind in ("weight", "ema") or p["step"] is not None
        ]
        shapes = {name: self.meta["parameters"][name]["shape"] for name in names}
        while names:
            taken, size = [], 0
            while names and (not taken or size + prod(shapes[names[0]]) <= batch):
                taken.append(names.pop(0))
                size += prod(shapes[taken[-1]])
            pieces = [Piece(kind, name, 0, torch.empty(prod(shapes[name]))) for name in taken]
            self.fill(pieces)
            for piece in pieces:
                yield piece.name, piece.values.view(shapes[piece.name])


def candidates(run_url: str, lease: Lease, warn: Warn) -> Iterator[Checkpoint | None]:
    """What a new attempt may go on from, newest first; None, alone, for a run that has committed nothing.

    A collective. Rank 0 first finishes commits that an older attempt registered but did not mark, counts what is whole,
    warns of what was committed and is gone, and of a fence that the storage can't hold, and removes what dead attempts
    left half-written. Taking the next one
    strikes out the one before it, as damaged. Raises InputError when all are damaged: a run never starts again from
    step 0 by itself.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    steps = _agree(lambda: _take_stock(run_url, lease, warn) if rank == 0 else None)
    if not steps:
        yield None
        return
    for step in sorted(steps, reverse=True):
        folder = _folder(run_url, step)
        try:
            yield _agree(lambda folder=folder: Checkpoint(folder) if rank == 0 else None)
        except Damaged as error:
            warn(f"{error}. {BACK}")
        if rank == 0:
            lease.forget(step)
            _unmark(lease, folder)
    raise InputError(_all_damaged(run_url, steps))


def _agree(do: Callable[[], T]) -> T:
    """Rank 0's answer, or its InputError, on every rank."""
    answer: list[Any] = [None, None]
    try:
        answer[0] = do()
    except InputError as error:
        answer[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises the lowest rank's InputError on every rank, so that none waits for another in a collective."""
    fault: InputError | None = None
    try:
        yield
    except InputError as error:
        fault = error
    faults = [fault]
    if dist.is_initialized():
        faults = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
    for first in faults:
        if first is not None:
            raise first


def _take_stock(run_url: str, lease: Lease, warn: Warn) -> list[int]:
    if lease.weakness:
        warn(lease.weakness)
    storage.drop_uploads(storage.join(run_url, "checkpoints"))
    whole = []
    registered = {commit.step: commit for commit in lease.commits()}
    for step in _steps(run_url):
        folder = _folder(run_url, step)
        if not storage.exists(storage.join(folder, "COMMITTED")) and (commit := registered.get(step)):
            found = storage.read_versioned(storage.join(folder, f"manifest.a{commit.attempt}.json"))
            if found and _digest(found[0]) == commit.manifest:
                _mark(lease, folder, commit, found[0])
        try:
            whole.append(_marker(folder))
        except storage.Missing:
            if step not in registered:
                _remove(lease, folder)
        except Damaged:
            whole.append(Commit(step, 0, ""))
    lost = sorted(registered.keys() - {commit.step for commit in whole})
    for step in lost:
        warn(f"{storage.redact(_folder(run_url, step))} is damaged: it was committed, and COMMITTED is gone. {BACK}")
    if lost and not whole:
        raise InputError(_all_damaged(run_url, lost))
    lease.adopt(whole)
    return [commit.step for commit in whole]


def _all_damaged(run_url: str, steps: Iterable[int]) -> str:
    return (
        f"every committed checkpoint of {storage.redact(run_url)} is damaged (steps {sorted(steps)}). Restore one from "
        "a backup, or start again under another name."
    )


def _marker(folder: str) -> Commit:
    """What COMMITTED says; raises storage.Missing, Damaged."""
    data = storage.read_bytes(storage.join(folder, "COMMITTED"))
    with contextlib.suppress(ValueError, TypeError):
        commit = Commit(**json.loads(data))
        if _name(commit.step) == folder.rstrip("/").rpartition("/")[2]:
            return commit
    raise Damaged(f"{storage.redact(folder)} is damaged: COMMITTED is not what was written")


def newest(url: str, warn: Warn = lambda text: None) -> Checkpoint | None:
    """The newest committed checkpoint of a run whose manifest and state are whole; None where nothing is committed."""
    for step in sorted(_steps(url), reverse=True):
        folder = _folder(url, step)
        if storage.exists(storage.join(folder, "COMMITTED")):
            try:
                return Checkpoint(folder)
            except Damaged as error:
                warn(f"{error}. Taking the checkpoint before it.")
    return None


def newest_step(run_url: str) -> int | None:
    """Step of the newest committed checkpoint of a run."""
    for step in sorted(_steps(run_url), reverse=True):
        if storage.exists(storage.join(_folder(run_url, step), "COMMITTED")):
            return step
    return None


def using(url: str, use: Callable[[Checkpoint], T], warn: Warn = lambda text: None) -> T:
    """What ``use`` makes of a checkpoint, or of a run's newest one that turns out whole.

    Raises InputError where there is none, and Damaged when the one that was named, or every one of the run, is damaged.
    """
    if re.fullmatch(r"step-\d{8,}", url.rstrip("/").rpartition("/")[2]):
        return use(Checkpoint(url))
    steps = [s for s in _steps(url) if storage.exists(storage.join(_folder(url, s), "COMMITTED"))]
    if not steps:
        raise InputError(f"{storage.redact(url)} holds no committed checkpoint and is none itself", status=2)
    for step in sorted(steps, reverse=True):
        try:
            return use(Checkpoint(_folder(url, step)))
        except Damaged as error:
            last = error
            warn(f"{error}. Taking the checkpoint before it.")
    raise last


def load_weights(
    url: str, ema: bool | None = False, engine: str = "model", warn: Warn = lambda text: None
) -> dict[str, Tensor]:
    """Whole weights and persistent buffers, by name; with ``ema`` their average, with None that where one was kept.

    Raises InputError where ``ema`` is True and no average was kept.
    """

    def read(checkpoint: Checkpoint) -> dict[str, Tensor]:
        view = checkpoint[engine]
        kept = view.meta["ema_decay"] is not None
        if ema and not kept:
            raise InputError(f"{storage.redact(checkpoint.url)} keeps no average of the weights: the run has ema: 0")
        averaged = kept if ema is None else ema
        return {**dict(view.whole("ema" if averaged else "weight")), **checkpoint._named(f"{engine}/buffer/", 0)}

    return using(url, read, warn)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A digest of a model's whole weights and buffers: latents know by it which weights encoded them."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(weights.items()):
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Writes whole weights and buffers into a module; raises InputError naming what does not fit."""
    targets = {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in weights}}
    wrong = sorted(
        name
        for name in targets.keys() | weights.keys()
        if name not in targets or name not in weights or targets[name].shape != weights[name].shape
    )
    if wrong:
        raise InputError(
            f"these weights are another model's: {len(wrong)} names or shapes differ, first {', '.join(wrong[:5])}. "
            "Take the recipe and model fields of the manifest that made them."
        )
    for name, target in targets.items():
        target.copy_(weights[name])


def fingerprint(url: str, warn: Warn = lambda text: None) -> dict[str, str | None]:
    """One digest each for weights (with buffers), ema, optimizer, adversary, loader and rng; None where a run has none.

    All but ``rng``, which lists every rank's generators, are independent of world size and ZeRO stage.
    """

    def read(checkpoint: Checkpoint) -> dict[str, str | None]:
        def weights(engine: str) -> str:
            buffers = checkpoint._named(f"{engine}/buffer/", 0)
            return _digest_all(chain(checkpoint[engine].whole("weight"), _sorted(buffers)))

        def average(engine: str) -> str | None:
            view = checkpoint[engine]
            return None if view.meta["ema_decay"] is None else _digest_all(view.whole("ema"))

        def optimizer(engine: str) -> str:
            view = checkpoint[engine]
            steps = json.dumps(sorted((name, p["step"]) for name, p in view.meta["parameters"].items()))
            return _digest_all(chain(view.whole("exp_avg"), view.whole("exp_avg_sq")), steps)

        others = sorted(checkpoint.engines.keys() - {"model"})
        extra = checkpoint.tensors()
        adversary = [digest for name in others for digest in (weights(name), average(name), optimizer(name))]
        loader = checkpoint.state.get("loader")
        return {
            "weights": weights("model"),
            "ema": average("model"),
            "optimizer": optimizer("model"),
            "adversary": _digest_all(_sorted(extra), json.dumps(adversary)) if others or extra else None,
            "loader": None if loader is None else _digest(json.dumps(loader, sort_keys=True).encode()),
            "rng": _digest(json.dumps([checkpoint.rng(rank) for rank in range(checkpoint.world)]).encode()),
        }

    return using(url, read, warn)


# -- random numbers ---------------------------------------------------------------------------------------------------


def _take_rng() -> tuple[Any, ...]:
    """The state of Python's, NumPy's, torch's and the CUDA device's generator; quickly, for training stands still."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state(), cuda


def _plain_rng(python: Any, numpy_state: Any, cpu: Tensor, cuda: Tensor | None) -> dict[str, Any]:
    """The same as plain data."""
    kind, words, gauss = python
    return {
        "python": [kind, list(words), gauss],
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}},
        "torch": base64.b64encode(cpu.numpy().tobytes()).decode(),
        "cuda": None if cuda is None else base64.b64encode(cuda.numpy().tobytes()).decode(),
    }


def set_rng(state: Mapping[str, Any]) -> None:
    """Puts every generator where :meth:`Checkpoint.rng` found it."""
    kind, words, gauss = state["python"]
    random.setstate((kind, tuple(words), gauss))
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["torch"])), dtype=torch.uint8))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(state["cuda"])), dtype=torch.uint8))


# -- small things -----------------------------------------------------------------------------------------------------


def _folder(run_url: str, step: int) -> str:
    return storage.join(run_url, "checkpoints", _name(step))


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _steps(run_url: str) -> list[int]:
    names = (entry.name for entry in storage.list_dir(storage.join(run_url, "checkpoints")))
    return [int(name[5:]) for name in names if re.fullmatch(r"step-\d{8,}", name)]


def _runs(parts: Sequence[tuple[int, memoryview]]) -> Iterator[tuple[range, list[tuple[int, memoryview]]]]:
    """Neighbouring blocks that the (first byte, destination) parts of one file need, RUN_BLOCKS at most at a time."""
    parts = sorted(parts, key=lambda part: part[0])
    needed = sorted({b for at, out in parts if out for b in range(at // BLOCK, (at + len(out) - 1) // BLOCK + 1)})
    first = 0
    for i, block in enumerate(needed):
        last = i + 1 == len(needed) or needed[i + 1] != block + 1 or block + 1 - needed[first] == RUN_BLOCKS
        if last:
            run = range(needed[first], block + 1)
            low, high = run.start * BLOCK, run.stop * BLOCK
            yield run, [(at, out) for at, out in parts if at < high and at + len(out) > low]
            first = i + 1


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _sorted(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    return sorted(tensors.items())


def _digest_all(tensors: Iterable[tuple[str, Tensor]], head: str = "") -> str:
    total = hashlib.blake2b(head.encode(), digest_size=16)
    for name, tensor in tensors:
        total.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(_bytes_of(tensor.contiguous()))
    return total.hexdigest()
