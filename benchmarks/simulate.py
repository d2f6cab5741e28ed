"""What 100 million clips on 1,024 ranks ask of index, memory and store, from the real order and fetch plan.

    python -m benchmarks.simulate [--clips 100_000_000] [--ranks 1024] [--hardware 2cpu] [--write]

The order, each rank's share and the ranged reads are the loader's own; only the store is simulated: clips of one size
that lie one after the other in shards, an answer after ``LATENCY`` and at ``BANDWIDTH``. The second part measures how
well each granularity shuffles, against a full permutation. ``--write`` writes a file to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines import index, storage
from pipelines.contracts import BatchPlan, ClipRule
from pipelines.loader import Loader, coalesce, neighbours
from pipelines.order import Mixture, share

CLIP_BYTES = 100_000
GAP_BYTES = 2_048
A_SHARD = 10_000
FRAMES, SIZE = 17, (256, 256)
BATCH_A_RANK = 8
STEP_SECONDS = 1.0
LATENCY = 0.030
BANDWIDTH = 50e6
DOLLARS_A_MILLION_GETS = 0.40


@dataclass(frozen=True)
class Want:
    """What the fetch plan knows of a clip."""

    dataset: index.Dataset
    shard: int
    index: int
    offset: int


def large_index(url: str, clips: int, a_shard: int) -> index.Dataset:
    """An index of that many clips, written and opened; all shards share one .idx, which only its size matters of."""
    members = [
        index.Member(f"{n:012d}", 512 + n * (CLIP_BYTES + GAP_BYTES), CLIP_BYTES, n, 64, 24.0, *SIZE)
        for n in range(a_shard)
    ]
    length = a_shard * (CLIP_BYTES + GAP_BYTES)
    line = index.write_shard_index(url, "shard-000000.tar", members, length)
    lines = [line.model_copy(update={"file": f"shard-{n:06d}.tar"}) for n in range(clips // a_shard)]
    index.write_index(url, index.Card(name="large"), lines)
    return index.open_dataset(url)


def cost_of_index(clips: int, a_shard: int) -> tuple[float, float, float, float]:
    """(megabytes of index.json, of all .idx, CPU seconds to open, megabytes held) of a rank, in a fresh process."""
    program = (
        "import sys, time\n"
        "from pipelines import index\n"
        "def held(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        "before, began = held(), time.process_time()\n"
        "dataset = index.open_dataset(sys.argv[1])\n"
        "print(time.process_time() - began, held() - before)\n"
    )
    with tempfile.TemporaryDirectory() as url:
        large_index(url, clips, a_shard)
        size = storage.size(storage.join(url, "index.json")) / 1e6
        done = subprocess.run([sys.executable, "-c", program, url], capture_output=True, text=True, check=True)
    seconds, held = map(float, done.stdout.split())
    return size, clips * index.record_type(12).itemsize / 1e6, seconds, held


def traffic(clips: int, ranks: int, a_shard: int, granularity: int, steps: int = 3) -> dict[str, float]:
    """Requests, bytes and the busiest shard of a few global batches, of all ranks."""
    record = index.record_type(12).itemsize
    batch = ranks * BATCH_A_RANK
    rule = ClipRule(frames=FRAMES, sizes=(SIZE,))

    def plan(step: int) -> BatchPlan:
        return BatchPlan(step, "s", step * batch, batch, "video", step * batch, SIZE, rule)

    with tempfile.TemporaryDirectory() as url:
        dataset = large_index(url, clips, a_shard)
        loader = Loader([(dataset, 1.0)], None, plan, steps, seed=1, micro_batch=BATCH_A_RANK, granularity=granularity)
    requests = fetched = used = 0
    shards: Counter[int] = Counter()
    slowest = 0.0
    for step in range(steps):
        for rank in range(ranks):
            wants = []
            for part in share(batch, rank, ranks, BATCH_A_RANK):
                for offset in range(part.first, part.first + part.count):
                    _, draw = loader.draw(plan(step), offset)
                    wants.append(Want(dataset, *dataset.locate(draw.clip), offset))
            seconds = []
            for group in neighbours(wants):
                first = group[0].index
                starts = [512 + want.index * (CLIP_BYTES + GAP_BYTES) for want in group]
                reads = coalesce((start, start + CLIP_BYTES) for start in starts)
                rows = (group[-1].index - first + 1) * record
                requests += 1 + len(reads)
                fetched += rows + sum(end - start for start, end in reads)
                used += len(group) * CLIP_BYTES
                shards[group[0].shard] += len(reads)
                seconds.append(LATENCY + sum(LATENCY + (end - start) / BANDWIDTH for start, end in reads))
            slowest = max(slowest, max(seconds))
    epoch_steps = clips / batch
    return {
        "requests_a_second": requests / steps / STEP_SECONDS,
        "gigabytes_a_second": fetched / steps / STEP_SECONDS / 1e9,
        "overhead": fetched / used,
        "dollars_an_epoch": requests / steps * epoch_steps / 1e6 * DOLLARS_A_MILLION_GETS,
        "busiest_shard": max(shards.values()) / steps / STEP_SECONDS,
        "first_batch_seconds": slowest,
    }


def read_ahead(steps: int) -> float:
    """Megabytes that a rank holds, compressed and decoded, with that read-ahead."""
    decoded = 3 * FRAMES * SIZE[0] * SIZE[1] * 4
    return (steps + 1) * BATCH_A_RANK * (decoded + CLIP_BYTES) / 1e6


def shuffle(granularity: int, size: int = 200_000, batch: int = 256, a_video: int = 8) -> dict[str, float]:
    """Quality of an epoch's order. ``a_video`` neighbouring clips come from one video, as the packer stores them."""
    mixture = Mixture(5, [size], None, granularity)
    first, second = mixture.epoch_order(0, 0), mixture.epoch_order(0, 1)
    whole = size // batch * batch
    videos = (first[:whole] // a_video).reshape(-1, batch)
    distinct = np.array([len(np.unique(row)) for row in videos]).mean()
    place = np.empty(size, np.int64)
    place[second] = np.arange(size)
    pairs = first[:whole].reshape(-1, batch)
    again = (place[pairs[:, :-1]] // batch == place[pairs[:, 1:]] // batch).mean()
    return {
        "videos_a_batch": distinct / batch,
        "displacement": np.abs(first - np.arange(size)).mean() / size * 3,
        "neighbours": (np.diff(first) % size == 1).mean(),
        "met_again": again,
    }


def full_permutation(size: int = 200_000, batch: int = 256, a_video: int = 8) -> float:
    """Distinct videos a clip of a batch in a full permutation."""
    order = np.random.default_rng(1).permutation(size)[: size // batch * batch]
    return float(np.mean([len(np.unique(row)) for row in (order // a_video).reshape(-1, batch)]) / batch)


def report(clips: int, ranks: int, hardware: str) -> str:
    """Everything as Markdown."""
    lines = [
        f"# {clips:,} clips, {ranks:,} ranks, {hardware}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.simulate --clips {clips} --ranks {ranks} --write`. Clips of {CLIP_BYTES / 1e3:.0f} kB, "
        f"{BATCH_A_RANK} a rank and step, a step a second; an answer after {LATENCY * 1e3:.0f} ms at "
        f"{BANDWIDTH / 1e6:.0f} MB/s; ${DOLLARS_A_MILLION_GETS:.2f} a million GETs; Python "
        f"{platform.python_version()}.",
        "",
        "| clips a shard | shards | index.json (MB) | all .idx (MB) | read (s) | open (CPU s) | held by a rank (MB) |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    opening = 0.0
    for a_shard in (1_000, A_SHARD):
        size, records, seconds, held = cost_of_index(clips, a_shard)
        reading = LATENCY + size * 1e6 / BANDWIDTH
        opening = reading + seconds
        lines.append(
            f"| {a_shard:,} | {clips // a_shard:,} | {size:.1f} | {records:,.0f} | {reading:.2f} | {seconds:.2f} | "
            f"{held:.0f} |"
        )
    lines += [
        "",
        "| granularity | requests/s | GB/s | fetched / used | $ an epoch | busiest shard (GET/s) | resume (s) |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for granularity in (1, 4, 8, 16, 64):
        found = traffic(clips, ranks, A_SHARD, granularity)
        lines.append(
            f"| {granularity} | {found['requests_a_second']:,.0f} | {found['gigabytes_a_second']:.2f} | "
            f"{found['overhead']:.3f} | {found['dollars_an_epoch']:,.0f} | {found['busiest_shard']:.1f} | "
            f"{opening + found['first_batch_seconds']:.2f} |"
        )
    lines += [
        "",
        "Resume: the index read and opened, then the reads of the slowest rank's first batch; decoding comes on top.",
        "",
        f"Read-ahead of 2 steps, {FRAMES} frames at {SIZE[0]}x{SIZE[1]}: {read_ahead(2):.0f} MB a rank.",
        "",
        "## Shuffle quality",
        "",
        "200,000 clips, 8 neighbours from one video, batches of 256. A full permutation has "
        f"{full_permutation():.3f} videos a clip of a batch; displacement is in units of what it has.",
        "",
        "| granularity | videos a clip of a batch | displacement | places followed by their neighbour "
        "| batch mates that meet again |",
        "| --: | --: | --: | --: | --: |",
    ]
    for granularity in (1, 2, 4, 8, 16, 32, 64):
        found = shuffle(granularity)
        lines.append(
            f"| {granularity} | {found['videos_a_batch']:.3f} | {found['displacement']:.3f} | "
            f"{found['neighbours']:.3f} | {found['met_again']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=lambda text: int(text.replace("_", "")), default=100_000_000)
    parser.add_argument("--ranks", type=int, default=1024)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    text = report(arguments.clips, arguments.ranks, arguments.hardware)
    print(text)
    if arguments.write:
        path = Path(__file__).parent / "results" / f"simulate_{arguments.hardware}_{datetime.date.today()}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
