"""Datasets and a schedule -> the micro-batches of one rank, step by step.

    order (arithmetic) -> readers (threads, ranged reads of neighbours) -> workers (threads, decoding) -> Batch

Reading and decoding run ahead of training by a bounded number of steps and bytes. Threads only decide when something is
done, never what: batches are the same for any number of workers and any read-ahead. To resume is to call
``iter_from(step)``.

Legend: B clips, C channels, T frames, H height, W width, L text tokens, D embedding width.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import queue
import threading
import time
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines import storage
from pipelines.clips import make_clip
from pipelines.contracts import Batch, BatchPlan, Clip, LatentLayout, Source, Stream, derive
from pipelines.decode import Backend
from pipelines.faults import FaultBudget, InputError, Skip
from pipelines.index import Dataset
from pipelines.latents import common_layout, empty, make_latents
from pipelines.order import Draw, Mixture, Share, share

READERS = 16
WASTE = 0.045
"""Bytes between two wanted clips may be read along, up to this share of the wanted bytes, to save a request."""

REQUEST_BYTES = 16 << 20
BLOCK = 512
"""Bytes of a tar header."""
NAME_BYTES = 100
"""Bytes of the name in a tar header."""
SUBSTITUTES = 100


@dataclass
class LoaderMetrics:
    """What a loader has done so far. Counters only rise; ``read_ahead_*`` are gauges.

    ``bytes_used`` is what was decoded of ``bytes_fetched`` (the index's records included); ``wait_seconds`` the time
    that training waited for data; ``read_ahead_clips`` are asked for or ready but not yet taken, and hold
    ``read_ahead_bytes``, compressed and decoded; ``peak_bytes`` is the most they ever held. ``read_ahead_requests`` are
    under way, at most READERS. ``retries`` counts the storage requests of the whole process that were tried again,
    ``skips`` the clips that were skipped, by reason.
    """

    clips: int = 0
    substitutes: int = 0
    requests: int = 0
    bytes_fetched: int = 0
    bytes_used: int = 0
    retries: int = 0
    wait_seconds: float = 0.0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    read_ahead_clips: int = 0
    read_ahead_bytes: int = 0
    read_ahead_requests: int = 0
    peak_bytes: int = 0
    skips: Mapping[str, int] = field(default_factory=dict)


class Loader:
    """The micro-batches of rank ``rank`` of ``world``.

    ``datasets`` are (dataset, weight) for video batches, ``images`` for image batches (None: one drawn frame of a video
    serves as an image). ``plan(step)`` gives the global batch of each of the ``steps``. ``granularity`` neighbouring
    clips stand and are read together. Reading runs ``read_ahead`` steps ahead, within ``memory_bytes`` (at least one
    step is always held). ``workers`` threads decode, with 0 the caller's thread, and one more the first step, which
    nothing was read ahead for. A clip that can't be used is charged to ``budget`` and replaced by a substitute that its
    place determines. After ``timeout_seconds`` without any progress the run ends with a message.
    """

    def __init__(
        self,
        datasets: Sequence[tuple[Dataset, float]],
        images: Sequence[tuple[Dataset, float]] | None,
        plan: Callable[[int], BatchPlan],
        steps: int,
        *,
        seed: int,
        micro_batch: int,
        granularity: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 1,
        read_ahead: int = 2,
        memory_bytes: int = 2 << 30,
        budget: FaultBudget | None = None,
        captions: bool = True,
        timeout_seconds: float = 300.0,
        backend: Backend | None = None,
    ) -> None:
        self.plan = plan
        self.steps = steps
        self.seed = seed
        self.micro_batch = micro_batch
        self.granularity = granularity
        self.rank, self.world = rank, world
        self.workers = workers
        self.read_ahead = read_ahead
        self.memory_bytes = memory_bytes
        self.budget = budget or FaultBudget()
        self.captions = captions
        self.timeout_seconds = timeout_seconds
        self.backend = backend
        self._datasets: dict[Stream, tuple[Dataset, ...]] = {}
        self._mixtures: dict[Stream, Mixture] = {}
        streams: dict[Stream, Sequence[tuple[Dataset, float]]] = {"video": datasets, "image": images or datasets}
        for stream, weighted in streams.items():
            self._datasets[stream] = tuple(dataset for dataset, _ in weighted)
            self._mixtures[stream] = Mixture(
                derive(seed, 0, f"stream/{stream}"),
                [dataset.clips for dataset, _ in weighted],
                [weight for _, weight in weighted],
                granularity,
            )
        self.layout = common_layout([dataset for opened in self._datasets.values() for dataset in opened])
        for dataset in itertools.chain(*self._datasets.values()):
            dataset.read_by(world)
        self._widths = {stream: _caption_width(opened) if captions else 0 for stream, opened in self._datasets.items()}
        self._metrics = LoaderMetrics()
        self._lock = threading.Lock()
        self._next_step = 0
        self._run: _Run | None = None

    def iter_from(self, step: int) -> Iterator[tuple[int, list[Batch]]]:
        """Yields (step, micro-batches of this rank) from ``step`` to the last. Ends its threads when it is closed.

        Raises InputError for what the operator must mend: a spent fault budget, a missing or changed shard, a store
        that does not answer.
        """
        self.close()
        self._next_step = step
        self._run = _Run(self, step)
        return self._iterate(self._run)

    def _iterate(self, run: _Run) -> Iterator[tuple[int, list[Batch]]]:
        try:
            for current in range(run.first, self.steps):
                batches = run.take(current)
                self._next_step = current + 1
                yield current, batches
                del batches  # its memory can take what is read next
        finally:
            run.close()

    def __iter__(self) -> Iterator[tuple[int, list[Batch]]]:
        return self.iter_from(self._next_step)

    def ready(self, seconds: float) -> bool:
        """Whether what the iteration gives next is there, or comes within ``seconds``; raises what it would raise."""
        return self._run is None or self._next_step >= self.steps or self._run.ready(self._next_step, seconds)

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """All that a resume needs, at any world size: the next step (or ``step``), and what must not change."""
        return {
            "step": self._next_step if step is None else step,
            "seed": self.seed,
            "granularity": self.granularity,
            "datasets": {stream: self._identity(stream) for stream in self._datasets},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up at the state's step; raises InputError if seed, granularity, datasets or weights differ."""
        for name, now in (("seed", self.seed), ("granularity", self.granularity)):
            if state[name] != now:
                raise InputError(f"data.{name} is {now}, but this run started with {state[name]}; set it back")
        for stream in self._datasets:
            old, now = [tuple(line) for line in state["datasets"][stream]], self._identity(stream)
            if old != now:
                raise InputError(
                    f"the {stream} datasets are not those that this run started with: the order of clips would change. "
                    f"Then (name, digest, quota): {old}; now: {now}. Restore them, or start a new run"
                )
        self._next_step = int(state["step"])

    def _identity(self, stream: Stream) -> list[tuple[str, str, int]]:
        quotas = self._mixtures[stream].quotas
        return [(d.name, d.digest, quota) for d, quota in zip(self._datasets[stream], quotas, strict=True)]

    def draw(self, plan: BatchPlan, offset: int, substitute: int = 0) -> tuple[Dataset, Draw]:
        """The clip at ``offset`` of a global batch."""
        draw = self._mixtures[plan.stream].draw(plan.stream_place + offset, substitute)
        return self._datasets[plan.stream][draw.dataset], draw

    def epochs(self, plan: BatchPlan) -> dict[str, float]:
        """Passes over each dataset of the batch's stream, that batch included, by name of the dataset."""
        quotas = self._mixtures[plan.stream].quotas
        share = (plan.stream_place + plan.clips) / sum(quotas)
        datasets = zip(self._datasets[plan.stream], quotas, strict=True)
        return {dataset.name: share * quota / dataset.clips for dataset, quota in datasets}

    @property
    def metrics(self) -> LoaderMetrics:
        """The metrics as they are now."""
        with self._lock:
            now = dataclasses.replace(self._metrics)
        for dataset in {id(d): d for datasets in self._datasets.values() for d in datasets}.values():
            now.requests += dataset.requests
            now.bytes_fetched += dataset.bytes_fetched
        now.skips = dict(self.budget.counts())
        now.retries = sum(storage.counters.snapshot()["retries"].values())
        return now

    def close(self) -> None:
        """Ends all threads; a read that is under way is left to end by itself."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _count(self, **amounts: float) -> None:
        now = self._metrics
        with self._lock:
            for name, amount in amounts.items():
                setattr(now, name, getattr(now, name) + amount)
            now.peak_bytes = max(now.peak_bytes, now.read_ahead_bytes)


@dataclass(slots=True)
class _Micro:
    """A micro-batch that fills up, clip by clip."""

    share: Share
    pixels_BCTHW: Tensor
    rows_CTHW: tuple[Tensor, ...]
    arrays: dict[str, Tensor]
    masks: dict[str, Tensor]
    clips: list[Clip | None]


@dataclass(slots=True)
class _Step:
    """The rank's part of one global batch, on its way."""

    plan: BatchPlan
    micros: list[_Micro]
    clips: int
    left: int
    bytes: int


@dataclass(slots=True)
class _Want:
    """One clip that a step waits for: row ``row`` of its micro-batch, at ``offset`` of the global batch."""

    step: _Step
    micro: _Micro
    row: int
    offset: int
    dataset: Dataset
    draw: Draw
    shard: int
    index: int

    @property
    def place(self) -> int:
        return self.step.plan.place + self.offset

    def source(self, key: str) -> Source:
        return Source(self.dataset.name, self.dataset.files[self.shard], key)


class _Jobs:
    """A queue from which the oldest step's jobs come first: made of C's parts, as each clip passes through two."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, int, Any]] = []
        self.serial = itertools.count()
        self.ready: queue.SimpleQueue[None] = queue.SimpleQueue()

    def put(self, step: int, job: Any) -> None:
        heapq.heappush(self.heap, (step, next(self.serial), job))  # whole under Python's lock: it compares numbers only
        self.ready.put(None)

    def get(self, timeout: float | None = None) -> Any:
        """The next job; raises queue.Empty after ``timeout`` seconds."""
        self.ready.get(timeout=timeout)
        return heapq.heappop(self.heap)[2]


class _Memory:
    """Memory for micro-batches, used again once no tensor is left that shares it: new memory costs page faults, up to a
    tenth of what decoding into it does. What no step has asked for in a while (an earlier stage's) is let go.
    """

    IDLE_STEPS = 16

    def __init__(self) -> None:
        self.free: list[tuple[int, np.ndarray]] = []
        """(the last step that had it, memory)"""

    def empty(self, shape: tuple[int, ...], step: int) -> Tensor:
        """A float32 tensor whose values are whatever was there; one thread asks."""
        size, free = math.prod(shape), self.free
        free[:] = [kept for kept in free if step - kept[0] <= self.IDLE_STEPS]
        at = next((at for at, (_, whole) in enumerate(free) if whole.size == size), None)
        if at is None and free:
            del free[0]
        whole = np.empty(size, np.float32) if at is None else free.pop(at)[1]
        lent = whole[:]  # what the tensor, and all that share its memory, keep alive
        weakref.finalize(lent, free.append, (step, whole)).atexit = False
        return torch.from_numpy(lent).view(shape)


class _Run:
    """Threads and queues of one iteration."""

    def __init__(self, loader: Loader, first: int) -> None:
        self.loader = loader
        self.first = self.next_step = first
        self.steps: dict[int, _Step] = {}
        self.reads = _Jobs()
        self.decodes = _Jobs()
        self.memory = _Memory()
        self.changed = threading.Condition(loader._lock)
        self.progress = 0
        self.awaited = (-1, 0, 0.0)
        """The step that is waited for, the progress last seen, and since when there is no more."""
        self.error: BaseException | None = None
        self.closed = False
        loops: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = [
            *[("read", self._loop, (self.reads, self._read))] * READERS,
            *[("decode", self._loop, (self.decodes, self._decode))] * loader.workers,
            ("first", self._help, ()),
        ]
        self.threads = [
            threading.Thread(target=loop, args=arguments, daemon=True, name=f"loader-{name}-{i}")
            for i, (name, loop, arguments) in enumerate(loops)
        ]
        if first < loader.steps:
            self._start(first)  # while the other threads start, the first ones read
            self.next_step += 1
        for thread in self.threads:
            thread.start()

    def ready(self, number: int, seconds: float) -> bool:
        """Waits for the step, for ``seconds`` at most; starts what may run ahead: of the first steps, fewer, lest the
        first batch wait for those after it.
        """
        ahead = min(self.loader.read_ahead, number - self.first + 1)
        while self.next_step <= min(number + ahead, self.loader.steps - 1):
            if self.next_step > number and not self._fits(self.next_step):
                break
            self._start(self.next_step)
            self.next_step += 1
        began = time.perf_counter()
        try:
            return self._wait(number, self.steps[number], seconds)
        finally:
            self.loader._count(wait_seconds=time.perf_counter() - began)

    def take(self, number: int) -> list[Batch]:
        """The step's batches, as soon as they are there."""
        self.ready(number, math.inf)
        step = self.steps.pop(number)
        self.loader._count(
            read_ahead_bytes=-step.bytes,
            read_ahead_clips=-step.clips,
            clips=sum(micro.share.count for micro in step.micros if micro.share.weight),
        )
        return [self._batch(step, micro) for micro in step.micros]

    def close(self) -> None:
        """Tells the threads to end, and waits for those that are not in the middle of a read."""
        if self.closed:
            return
        self.closed = True
        for jobs in (self.reads, self.decodes):
            for _ in self.threads:
                jobs.put(-1, None)
        deadline = time.monotonic() + 1.0
        for thread in self.threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self.loader._lock:
            self.loader._metrics.read_ahead_bytes = self.loader._metrics.read_ahead_clips = 0

    def _fits(self, number: int) -> bool:
        plan = self.loader.plan(number)
        clips = -(-plan.clips // self.loader.world)
        with self.loader._lock:
            held = self.loader._metrics.read_ahead_bytes
        return held + clips * _clip_bytes(plan, self.loader.layout) <= self.loader.memory_bytes

    def _start(self, number: int) -> None:
        """Allocates the step's batches and asks for its clips."""
        loader, plan = self.loader, self.loader.plan(number)
        shares = share(plan.clips, loader.rank, loader.world, loader.micro_batch * plan.per_clip)
        frames = 0 if loader.layout else plan.rule.frames
        micros = []
        for part in shares:
            pixels_BCTHW = self.memory.empty((part.count, 3, frames, *plan.size), number)
            arrays, masks = empty(loader.layout, part.count)
            micros.append(_Micro(part, pixels_BCTHW, pixels_BCTHW.unbind(), arrays, masks, [None] * part.count))
        clips = sum(part.count for part in shares)
        step = self.steps[number] = _Step(plan, micros, clips, clips, clips * _clip_bytes(plan, loader.layout))
        loader._count(read_ahead_bytes=step.bytes, read_ahead_clips=clips)
        wants = [
            self._want(step, micro, row, micro.share.first + row)
            for micro in micros
            for row in range(micro.share.count)
        ]
        for group in neighbours(wants):
            self.reads.put(number, group)

    def _want(self, step: _Step, micro: _Micro, row: int, offset: int, substitute: int = 0) -> _Want:
        dataset, draw = self.loader.draw(step.plan, offset, substitute)
        return _Want(step, micro, row, offset, dataset, draw, *dataset.locate(draw.clip))

    def _wait(self, number: int, step: _Step, seconds: float) -> bool:
        """Whether the step is whole within ``seconds``; raises where nothing came for ``timeout_seconds``."""
        end, patience = time.monotonic() + seconds, self.loader.timeout_seconds
        while True:
            if self.awaited[:2] != (number, self.progress):
                self.awaited = (number, self.progress, time.monotonic())
            limit = min(end, self.awaited[2] + patience)
            if self.loader.workers == 0:
                while step.left and self.error is None:
                    try:
                        job = self.decodes.get(max(0.0, limit - time.monotonic()))
                    except queue.Empty:
                        break
                    if job is not None:
                        self._guarded(self._decode, job)
                    del job
            else:
                with self.changed:
                    left = max(0.0, limit - time.monotonic())
                    self.changed.wait_for(lambda: not step.left or self.error is not None, left)
            if self.error is not None:
                raise self.error
            if not step.left:
                return True
            now = time.monotonic()
            if self.awaited[1] == self.progress and now >= self.awaited[2] + patience:
                waiting = sorted(f"{dataset.name}/{dataset.files[shard]}" for dataset, shard in self._missing(step))
                raise InputError(
                    f"no clip arrived for {patience:.0f} s; step {number} waits for {len(waiting)} "
                    f"shards: {', '.join(waiting[:5])}. Is the storage up?"
                )
            if now >= end:
                return False

    def _missing(self, step: _Step) -> set[tuple[Dataset, int]]:
        found = set()
        for micro in step.micros:
            for row, clip in enumerate(micro.clips):
                if clip is None:
                    want = self._want(step, micro, row, micro.share.first + row)
                    found.add((want.dataset, want.shard))
        return found

    def _loop(self, jobs: _Jobs, handle: Callable[[Any], None]) -> None:
        while not self.closed:
            job = jobs.get()
            if job is not None:
                self._guarded(handle, job)
            del job  # it holds its step's memory, and the next one may be long in coming

    def _help(self) -> None:
        """Decodes until the first step is whole."""
        while (step := self.steps.get(self.first)) and step.left and not self.closed:
            job = self.decodes.get()
            if job is not None:
                self._guarded(self._decode, job)
            del job
        self.decodes.put(-1, None)  # the training thread may wait for a job that this one did

    def _guarded(self, handle: Callable[[Any], None], job: Any) -> None:
        try:
            if not self.closed:
                handle(job)
        except BaseException as error:
            with self.changed:
                self.error = self.error or error
                self.changed.notify_all()
            self.decodes.put(-1, None)

    def _read(self, group: list[_Want]) -> None:
        """Reads neighbouring clips of one shard and hands each to be decoded."""
        began = time.perf_counter()
        dataset, shard, first = group[0].dataset, group[0].shard, group[0].index
        records = dataset.records(shard, first, group[-1].index + 1)[[want.index - first for want in group]]
        keys, offsets, sizes, digests = (records[name].tolist() for name in ("key", "offset", "bytes", "crc"))
        members = {(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)}
        captions: list[tuple[int, int, int]] = [(0, 0, 0)] * len(group)
        if self.loader.captions and records["caption_bytes"].any():
            captions = records[["caption_offset", "caption_bytes", "caption_crc"]].tolist()
            members |= {(offset, offset + size) for offset, size, _ in captions if size}
        pieces = _Pieces(self, dataset, shard)
        for start, end in coalesce(sorted(members)):
            if self.closed:
                return
            pieces.read(start, end)
        jobs, held = [], 0
        for n, want in enumerate(group):
            key, caption = keys[n].decode(), None
            data = pieces.get(key, offsets[n], sizes[n], digests[n])
            if captions[n][1] and data is not None:
                caption = pieces.get(key, *captions[n])
                data = None if caption is None else data
            held += len(data or b"") + len(caption or b"")
            jobs.append((want, records[n], want.source(key), data, caption))
            if self.closed:
                return
        self.loader._count(read_ahead_bytes=held, bytes_used=held, read_seconds=time.perf_counter() - began)
        for job in jobs:
            self.decodes.put(group[0].step.plan.step, job)

    def _decode(self, job: tuple[_Want, np.void, Source, bytes | None, bytes | None]) -> None:
        want, record, source, data, caption = job
        began, clip = time.perf_counter(), None
        self.loader.budget.used()
        try:
            if data is None:
                raise Skip("digest", f"{source}: its bytes do not have the digest that the index has")
            clip = self._clip(want, record, data, source, caption)
        except Skip as skip:
            self.loader.budget.charge(skip)
            self._substitute(want, skip)
        now, held = self.loader._metrics, len(data or b"") + len(caption or b"")
        with self.loader._lock:
            now.read_ahead_bytes -= held
            now.decode_seconds += time.perf_counter() - began
            if clip is not None:
                want.micro.clips[want.row] = clip
                want.step.left -= 1
                self.progress += 1
                if not want.step.left:
                    self.changed.notify_all()

    def _clip(self, want: _Want, record: np.void, data: bytes, source: Source, caption: bytes | None) -> Clip:
        plan, micro, row = want.step.plan, want.micro, want.row
        width, substitute = self.loader._widths[plan.stream], want.draw.substitute
        if layout := want.dataset.latents:
            arrays, masks = ({name: rows[row] for name, rows in kind.items()} for kind in (micro.arrays, micro.masks))
            return make_latents(
                data,
                record,
                layout,
                want.place,
                source,
                caption=caption,
                caption_width=width,
                substitute=substitute,
                arrays=arrays,
                masks=masks,
            )
        return make_clip(
            data,
            record,
            plan.rule,
            plan.size,
            self.loader.seed,
            want.place,
            source,
            caption=caption,
            caption_width=width,
            substitute=substitute,
            out_CTHW=micro.rows_CTHW[row],
            backend=self.loader.backend,
        )

    def _substitute(self, want: _Want, skip: Skip) -> None:
        number = want.draw.substitute + 1
        if number > SUBSTITUTES:
            raise InputError(
                f"{SUBSTITUTES} substitutes for place {want.place} can't be used either; the last one: {skip}. "
                f"Check dataset {want.dataset.name} with `moviola lint`"
            )
        self.loader._count(substitutes=1)
        again = self._want(want.step, want.micro, want.row, want.offset, number)
        self.reads.put(want.step.plan.step, [again])

    def _batch(self, step: _Step, micro: _Micro) -> Batch:
        clips = [clip for clip in micro.clips if clip is not None]
        emb_BLD, mask_BL = _pad([clip.caption_emb_LD for clip in clips], self.loader._widths[step.plan.stream])
        return Batch(
            pixels_BCTHW=micro.pixels_BCTHW,
            fps_B=torch.tensor([clip.fps for clip in clips]),
            motion_B=torch.tensor([clip.motion for clip in clips]),
            places=tuple(clip.place for clip in clips),
            sources=tuple(clip.source for clip in clips),
            plan=step.plan,
            weight=float(micro.share.weight),
            seed=self.loader.seed,
            caption_emb_BLD=emb_BLD,
            caption_mask_BL=mask_BL,
            substitutes=tuple(clip.substitute for clip in clips),
            arrays=micro.arrays,
            masks=micro.masks,
        )


class _Pieces:
    """Byte ranges of one shard that have been read."""

    def __init__(self, run: _Run, dataset: Dataset, shard: int) -> None:
        self.run, self.dataset, self.shard = run, dataset, shard
        self.pieces: list[tuple[int, bytes]] = []

    def read(self, start: int, end: int) -> bytes:
        url, count = self.dataset.shard_url(self.shard), self.run.loader._count
        count(read_ahead_requests=1)
        try:
            data = storage.read_bytes(url, start, end)
        except storage.Missing:
            raise InputError(
                f"shard {storage.redact(url)} is missing, but the index of dataset {self.dataset.name} names it; "
                "restore it, or run `moviola index` again and start a new run"
            ) from None
        finally:
            count(read_ahead_requests=-1)
        count(requests=1, bytes_fetched=len(data))
        self.pieces.append((start, data))
        return data

    def get(self, key: str, offset: int, count: int, crc: int) -> bytes | None:
        """A member's bytes, read again if their digest is wrong; None if it stays wrong.

        Raises InputError if the shard is no longer the one that was indexed: another size, or another clip there.
        """
        first, piece = next((f, p) for f, p in self.pieces if f <= offset and offset + count <= f + len(p))
        data = piece[offset - first : offset - first + count]
        for attempt in range(storage.REREADS):
            if zlib.crc32(data) == crc:
                return data
            storage.pause("digest", attempt + 1)
            data = self.read(offset, offset + count)
        if zlib.crc32(data) == crc:
            return data
        url, expected = self.dataset.shard_url(self.shard), int(self.dataset.shard_bytes[self.shard])
        if (found := storage.size(url)) != expected:
            what = f"has {found} bytes; its index says {expected}"
        elif (name := _member_name(self.read(offset - BLOCK, offset))) is None:
            what = f"has no member at byte {offset}; its index says {key}"
        elif not _names(name, key.removeprefix("./")):
            what = f"has {name} at byte {offset}; its index says {key}"
        else:
            return None
        raise InputError(
            f"shard {storage.redact(url)} {what}: dataset {self.dataset.name} changed under the run. "
            "Restore it, or index it again and start a new run"
        )


def _member_name(header: bytes) -> str | None:
    """The name in a tar header, cut at 100 bytes where the whole one stands before it; None if it is no header."""
    if len(header) < BLOCK or header[257:262] != b"ustar":
        return None
    name, prefix = (header[a:b].split(b"\0")[0].decode(errors="replace") for a, b in ((0, NAME_BYTES), (345, 500)))
    is_posix = header[262:263] != b" "  # GNU's headers keep times where POSIX has the prefix
    return (f"{prefix}/{name}" if prefix and is_posix else name).removeprefix("./")


def _names(name: str, key: str) -> bool:
    """Whether a member of that name (or of so much of it as a header holds) can belong to the clip ``key``."""
    return name.startswith(key) or (len(name) == NAME_BYTES and key.startswith(name))


def coalesce(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted byte spans as fewer requests: neighbours are joined while the bytes between them stay under WASTE."""
    requests: list[list[int]] = []
    used = waste = 0
    for start, end in spans:
        gap = start - requests[-1][1] if requests else 0
        joins = requests and end - requests[-1][0] <= REQUEST_BYTES and waste + gap <= WASTE * (used + end - start)
        used += end - start
        if joins:
            waste += max(gap, 0)
            requests[-1][1] = max(requests[-1][1], end)
        else:
            requests.append([start, end])
    return [(start, end) for start, end in requests]


def neighbours(wants: Iterable[_Want]) -> list[list[_Want]]:
    """Clips of one shard that lie side by side, in the order in which training needs the first of each group."""
    shards: dict[tuple[int, int], list[_Want]] = defaultdict(list)
    for want in wants:
        shards[id(want.dataset), want.shard].append(want)
    groups = []
    for members in shards.values():
        members.sort(key=lambda want: want.index)
        group = [members[0]]
        for want in members[1:]:
            if want.index - group[-1].index > 1:
                groups.append(group)
                group = []
            group.append(want)
        groups.append(group)
    return sorted(groups, key=lambda group: min(want.offset for want in group))


def _clip_bytes(plan: BatchPlan, layout: LatentLayout | None) -> int:
    if layout:
        return sum((4 * tensor.channels + 1) * math.prod(tensor.tokens) for tensor in layout.tensors.values())
    return 3 * plan.rule.frames * plan.size[0] * plan.size[1] * 4


def _caption_width(datasets: Iterable[Dataset]) -> int:
    """D of the stream's embeddings, 0 where no dataset has any; raises InputError where they differ."""
    widths = {d.name: d.caption_width for d in datasets if d.caption_width}
    if len(set(widths.values())) > 1:
        raise InputError(f"the datasets' captions have embeddings of different widths: {widths}; use one text encoder")
    return next(iter(widths.values()), 0)


def _pad(captions: Sequence[Tensor | None], width: int) -> tuple[Tensor | None, Tensor | None]:
    """Embeddings of several lengths as (B, L, D) zero-padded and their mask (B, L); None where ``width`` is 0.

    Whether there are tensors depends on the datasets and not on the clips, so all ranks take the same path.
    """
    if not width:
        return None, None
    length = max((len(caption) for caption in captions if caption is not None), default=1)
    emb_BLD = torch.zeros(len(captions), length, width)
    mask_BL = torch.zeros(len(captions), length, dtype=torch.bool)
    for b, caption in enumerate(captions):
        if caption is not None:
            emb_BLD[b, : len(caption)] = caption
            mask_BL[b, : len(caption)] = True
    return emb_BLD, mask_BL
