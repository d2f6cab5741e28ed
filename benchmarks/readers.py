"""One loader, timed in a process of its own: ours, its peers', or decoding alone. ``benchmarks.loader`` runs this file.

    python benchmarks/readers.py NAME '{"url": ..., "workers": 1, "clips": 960, ...}'

It prints one line of JSON: seconds to import, seconds from constructing the loader to the first batch, and over the
batches after the first: clips, seconds, CPU seconds of this process and its workers, and those of them that decoding
took. Every loader gives the same
bytes to the same decoder and gets the same kind of pixels: 9 neighbouring frames, (3, 9, H, W) in [-1, 1]. With
"resume", a number of clips, each goes on after so many in the way that it offers. Imports stand where they are used:
each loader runs in an environment that need not hold the others.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

FRAMES = 9


def decode(data: bytes, key: str, stored: int) -> Any:
    """9 neighbouring frames from a start that the key decides."""
    import torch

    from pipelines.decode import Video

    start = zlib.crc32(key.encode()) % (stored - FRAMES + 1)
    with Video(data, key) as video:
        frames_TCHW = video.read(range(start, start + FRAMES))
    pixels_CTHW = torch.empty((3, *frames_TCHW.shape[:1], *frames_TCHW.shape[2:]))
    return pixels_CTHW.copy_(frames_TCHW.permute(1, 0, 2, 3)).mul_(1 / 127.5).sub_(1.0)


def plainly(data: bytes, key: str, stored: int) -> Any:
    """The same frames as PyAV's documentation decodes them: from the start, each converted by ``to_ndarray``."""
    import io

    import av
    import numpy as np
    import torch

    start, frames = zlib.crc32(key.encode()) % (stored - FRAMES + 1), []
    with av.open(io.BytesIO(data)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number >= start:
                frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == FRAMES:
                break
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def by_torchcodec(data: bytes, key: str, stored: int) -> Any:
    """The same frames by torchcodec."""
    from pipelines.decode import open_video

    start = zlib.crc32(key.encode()) % (stored - FRAMES + 1)
    with open_video(data, key, backend="torchcodec") as video:
        return video.read(range(start, start + FRAMES)).permute(1, 0, 2, 3).float() / 127.5 - 1


def timed(read: Callable[..., Any]) -> Callable[..., Any]:
    """``read``, with the CPU time of its calls kept in a file a thread: workers may be processes of their own."""
    mine = threading.local()
    put, clock = struct.Struct("d").pack_into, time.thread_time

    def start() -> None:
        with open(f"{os.environ['DECODING']}/{os.getpid()}-{threading.get_ident()}", "wb+") as file:
            file.write(bytes(8))
            file.flush()
            mine.process, mine.total, mine.kept = os.getpid(), 0.0, mmap.mmap(file.fileno(), 8)

    def reading(*arguments: Any, **options: Any) -> Any:
        began = clock()
        made = read(*arguments, **options)
        if getattr(mine, "process", None) != os.getpid():
            start()
        mine.total += clock() - began
        put(mine.kept, 0, mine.total)
        return made

    return reading


def decoding_seconds() -> float:
    """CPU seconds in functions that are :func:`timed`, of all threads and processes."""
    files = Path(os.environ["DECODING"]).iterdir()
    return sum(struct.unpack("d", data)[0] for file in files if len(data := file.read_bytes()) == 8)


DECODERS = {name: timed(read) for name, read in (("ours", decode), ("plain", plainly), ("torchcodec", by_torchcodec))}


def ours(config: dict[str, Any]) -> Iterator[int]:
    """Our loader, whole: order, index, ranged reads, its own clip rules."""
    from pipelines import index, loader
    from pipelines.contracts import BatchPlan, ClipRule

    loader.make_clip = timed(loader.make_clip)
    batch = config["batch"]
    rule = ClipRule(frames=FRAMES, sizes=(tuple(config["size"]),), flip=0)

    def plan(step: int) -> BatchPlan:
        return BatchPlan(step, "bench", step * batch, batch, "video", step * batch, rule.sizes[0], rule)

    yield 0
    made = loader.Loader(
        [(index.open_dataset(config["url"]), 1.0)],
        None,
        plan,
        1 << 40,
        seed=1,
        micro_batch=batch,
        granularity=config["granularity"],
        workers=config["workers"],
        read_ahead=4,
    )
    for _, batches in made.iter_from(config.get("resume", 0) // batch):
        yield sum(len(part.places) for part in batches)


def memory(config: dict[str, Any]) -> Iterator[int]:
    """Decoding alone: clips in memory, no loader, in as many threads as there are workers (0 is one)."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from pipelines import index, storage

    read, clips = DECODERS[config["decoder"]], []
    dataset = index.open_dataset(config["url"])
    for shard, rows in dataset.all_records():
        data = storage.read_bytes(dataset.shard_url(shard))
        for row in rows:
            start = int(row["offset"])
            clips.append((data[start : start + int(row["bytes"])], row["key"].decode(), int(row["frames"])))
    yield 0

    def made(first: int) -> int:
        torch.stack([read(*clips[(first + i) % len(clips)]) for i in range(config["batch"])])
        return config["batch"]

    firsts = (n * config["batch"] for n in range(1 << 30))
    if config["workers"] < 2:
        yield from map(made, firsts)
    else:
        pool = ThreadPoolExecutor(config["workers"])
        ahead = [pool.submit(made, next(firsts)) for _ in range(2 * config["workers"])]
        while True:
            ahead.append(pool.submit(made, next(firsts)))
            yield ahead.pop(0).result()


def webdataset(config: dict[str, Any]) -> Iterator[int]:
    """webdataset: shards by curl over signed URLs, a shuffle buffer of 1,000, ``batched``, WebLoader.

    It has no position to go on from: what was seen is drawn again, undecoded, and dropped.
    """
    import torch
    import webdataset as wds

    read = DECODERS[config["decoder"]]

    def make(sample: dict[str, Any]) -> Any:
        return read(sample["mp4"], sample["__key__"], config["stored"])

    yield 0
    pipeline = wds.WebDataset([f"pipe:curl -s '{url}'" for url in config["signed"]], shardshuffle=100, resampled=True)
    pipeline = (
        pipeline.shuffle(1000)
        .slice(config.get("resume", 0), sys.maxsize)
        .map(make)
        .batched(config["batch"], collation_fn=torch.stack)
    )
    for batch in wds.WebLoader(pipeline, batch_size=None, num_workers=config["workers"]):
        yield len(batch)


def streaming(config: dict[str, Any]) -> Iterator[int]:
    """mosaicml-streaming: MDS shards of the same bytes, downloaded to a cold folder, its default shuffle."""
    import torch

    from pipelines import torchvision_ops

    torchvision_ops.ensure()
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    read = DECODERS[config["decoder"]]

    class Clips(StreamingDataset):
        def __getitem__(self, at: int) -> Any:
            sample = super().__getitem__(at)
            return read(sample["mp4"], sample["key"], config["stored"])

    yield 0
    dataset = Clips(remote=config["mds"], local=tempfile.mkdtemp(), shuffle=True, batch_size=config["batch"])
    if config.get("resume"):
        dataset.load_state_dict({**dataset.state_dict(config["resume"], from_beginning=True), "epoch": 0})
    loader = DataLoader(
        dataset, batch_size=config["batch"], num_workers=config["workers"], collate_fn=torch.stack, drop_last=True
    )
    while True:
        for batch in loader:
            yield len(batch)


def energon(config: dict[str, Any]) -> Iterator[int]:
    """Megatron-Energon: the same tars, its own index beside them, default shuffle buffer of 100."""
    import torch
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_savable_loader,
        get_train_dataset,
        stateless,
    )

    read = DECODERS[config["decoder"]]

    @stateless
    def cook(sample: dict[str, Any]) -> dict[str, Any]:
        return {**basic_sample_keys(sample), "pixels": read(sample["mp4"], sample["__key__"], config["stored"])}

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]  # noqa: RUF012
        decoder = None  # bytes, as they are

        def batch(self, samples: list[dict[str, Any]]) -> Any:
            return torch.stack([sample["pixels"] for sample in samples])

    yield 0
    dataset = get_train_dataset(
        config["energon"],
        batch_size=config["batch"],
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=config["workers"]),
        task_encoder=Encoder(),
    )
    loader = get_savable_loader(dataset)
    if config.get("resume"):
        loader.restore_state_rank(torch.load(config["state"], weights_only=False))  # its own, of a moment ago
    done = 0
    for batch in loader:
        done += len(batch)
        if done >= config.get("save", sys.maxsize):
            torch.save(loader.save_state_rank(), config["state"])
        yield len(batch)


def write_mds(config: dict[str, Any]) -> None:
    """The clips of the tars as MDS shards of the same bytes."""
    import tarfile

    from pipelines import torchvision_ops

    torchvision_ops.ensure()
    from streaming import MDSWriter

    with MDSWriter(out=config["mds"], columns={"mp4": "bytes", "key": "str"}, size_limit=1 << 24) as writer:
        for path in sorted(Path(config["tars"]).glob("*.tar")):
            with tarfile.open(path) as tar:
                for info in tar:
                    if info.name.endswith(".mp4"):
                        file = tar.extractfile(info)
                        assert file
                        writer.write({"mp4": file.read(), "key": info.name[:-4]})


def plan_streaming(config: dict[str, Any]) -> dict[str, float]:
    """Seconds and megabytes that mosaicml-streaming takes from its index to the first sample's bytes."""
    import psutil

    from pipelines import torchvision_ops

    torchvision_ops.ensure()
    from streaming import StreamingDataset

    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    dataset = StreamingDataset(remote=config["mds"], local=tempfile.mkdtemp(), shuffle=True, batch_size=config["batch"])
    next(iter(dataset))
    return {"seconds": time.perf_counter() - began, "megabytes": (psutil.Process().memory_info().rss - before) / 1e6}


def cpu_seconds() -> float:
    """CPU seconds of this process and its living children."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def main() -> None:
    name, config = sys.argv[1], json.loads(sys.argv[2])
    if name == "write_mds":
        write_mds(config)
        return
    if name == "plan_streaming":
        print(json.dumps(plan_streaming(config)), flush=True)
        os._exit(0)
    os.environ["DECODING"] = tempfile.mkdtemp()
    began = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    import pipelines.decode

    if name in ("ours", "memory"):
        import botocore.auth
        import botocore.session  # noqa: F401

        import pipelines.loader  # noqa: F401
    batches = globals()[name](config)
    next(batches)
    if config["realtime"]:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    imported = time.perf_counter()
    next(batches)
    first = time.perf_counter()
    done, used, decoding = 0, cpu_seconds(), decoding_seconds()
    while done < config["clips"]:
        done += next(batches)
    last, used, decoding = time.perf_counter(), cpu_seconds() - used, decoding_seconds() - decoding
    result = {
        "import_s": imported - began,
        "first_batch_s": first - imported,
        "clips": done,
        "seconds": last - first,
        "cpu_s": used,
        "decoding_s": decoding,
    }
    print(json.dumps(result), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
