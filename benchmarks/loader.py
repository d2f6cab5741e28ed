"""The loader against its peers, and against decoding alone; writes ``benchmarks/results/loader_<hardware>_<date>.md``.

    eval "$(scripts/object_store.sh env)"
    python -m benchmarks.loader s3://BUCKET/PREFIX [--footage DIR] [--rounds 3] [--clips 960]
        [--streaming VENV] [--energon VENV] [--state FILE] [--minutes 9] [--realtime]

Every number comes from a process of its own (``benchmarks/readers.py``), with cold caches, over S3. The rounds of all
loaders are interleaved, and medians are reported. VENV is a virtual environment that holds the peer, torch, PyAV,
s3fs, pydantic and psutil. Clips are 31 frames of 128x128, the footage's middle square (procedural without --footage).
With --state, results are kept in FILE as they come, and the same command goes on from there; --minutes ends it early.
--realtime schedules what is measured, not its imports, ahead of all else (SCHED_RR), on a machine that others use too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipelines import index, storage, synthetic
from pipelines.pack import PackRules, pack

HERE = Path(__file__).parent
SIZE = 128
STORED = 31
A_VIDEO = 4
A_SHARD = 250
CLIPS = 2000
STANDARD = {"crf": "18", "preset": "medium"}


def sources(footage: Path | None, folder: Path) -> None:
    """31-frame clips of the footage's middle square, stored without loss, for both encodings to start from."""
    folder.mkdir(parents=True)
    if footage is None:
        synthetic.write_videos(folder.parent / "synthetic", count=16, seconds=8.0, size=(SIZE, SIZE), seed=1)
        footage = folder.parent / "synthetic"
    videos = [path for path in sorted(footage.iterdir()) if path.suffix in (".mp4", ".mkv", ".avi", ".mov", ".webm")]
    for number, frames in enumerate(frames for path in videos for frames in _pieces(path)):
        (folder / f"clip-{number:05d}.mp4").write_bytes(encode(frames, {"crf": "0"}))


def _pieces(path: Path) -> Iterator[list[av.VideoFrame]]:
    frames: list[av.VideoFrame] = []
    made = 0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            scale = SIZE / min(frame.height, frame.width)
            height, width = (max(SIZE, round(side * scale / 2) * 2) for side in (frame.height, frame.width))
            pixels = frame.reformat(width, height, "rgb24", interpolation="BICUBIC").to_ndarray()
            top, left = (height - SIZE) // 2, (width - SIZE) // 2
            square = np.ascontiguousarray(pixels[top : top + SIZE, left : left + SIZE])
            frames.append(av.VideoFrame.from_ndarray(square, format="rgb24"))
            if len(frames) == STORED:
                yield frames
                frames, made = [], made + 1
                if made == A_VIDEO:
                    return


def encode(frames: list[av.VideoFrame], options: dict[str, str]) -> bytes:
    """H.264 in MP4."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(frames):
            picture = frame.reformat(format="yuv420p")
            picture.pts, picture.time_base = number, Fraction(1, 25)
            picture.pict_type = av.video.frame.PictureType.NONE  # else x264 keeps the source's frame types
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def standard(folder: Path, tars: Path, clips: int) -> None:
    """The clips as x264 encodes them unless told otherwise, in plain tars; repeated up to ``clips``."""
    tars.mkdir(parents=True)
    encoded = []
    for path in sorted(folder.iterdir()):
        with av.open(str(path)) as container:
            encoded.append(encode(list(container.decode(video=0)), STANDARD))
    for first in range(0, clips, A_SHARD):
        with tarfile.open(tars / f"shard-{first // A_SHARD:06d}.tar", "w") as tar:
            for number in range(first, min(clips, first + A_SHARD)):
                data = encoded[number % len(encoded)]
                info = tarfile.TarInfo(f"{number:07d}.mp4")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def psnr(clip: bytes, source: bytes) -> float:
    """Over all frames and colours, against the source's, both as RGB."""
    pictures = []
    for data in (clip, source):
        with av.open(io.BytesIO(data)) as container:
            pictures.append(np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)]).astype(float))
    return float(10 * np.log10(255**2 / ((pictures[0] - pictures[1]) ** 2).mean()))


def members(url: str) -> dict[str, bytes]:
    """Key -> video of a dataset."""
    dataset, found = index.open_dataset(url), {}
    for shard, rows in dataset.all_records():
        data = storage.read_bytes(dataset.shard_url(shard))
        for row in rows:
            found[row["key"].decode()] = data[int(row["offset"]) : int(row["offset"]) + int(row["bytes"])]
    return found


def run(name: str, config: dict[str, Any], python: str = sys.executable) -> dict[str, Any]:
    """One reader in a fresh process. Where it fails, it is tried again, twice; ``failed`` of the result counts that."""
    command = [python, str(HERE / "readers.py"), name, json.dumps(config)]
    for failed in range(3):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())
        except subprocess.TimeoutExpired:
            said = "nothing within 120 s"
            continue
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if not done.returncode and (lines or name == "write_mds"):
            return {**(json.loads(lines[-1]) if lines else {}), "failed": failed}
        said = done.stderr[-1500:]
    raise RuntimeError(f"{name}: {said}")


def _environment() -> dict[str, str]:
    """For all readers: one thread an operation, and the store for clients that don't know MOVIOLA_S3_ENDPOINT."""
    endpoint = os.environ.get("MOVIOLA_S3_ENDPOINT", "")
    region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    options = {"base_path": "", "endpoint_url": endpoint, "region_name": region}
    profiles = {"store": {"storage_provider": {"type": "s3", "options": options}}}
    config = Path(tempfile.gettempdir()) / f"msc-{os.getpid()}.json"
    config.write_text(json.dumps({"profiles": profiles}))
    return os.environ | {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ENDPOINT_URL": endpoint,
        "MSC_CONFIG": str(config),
        "OMP_NUM_THREADS": "1",
        "LD_LIBRARY_PATH": f"{pyavs_ffmpeg()}:{os.environ.get('LD_LIBRARY_PATH', '')}",
    }


@lru_cache
def pyavs_ffmpeg() -> str:
    """A search path on which torchcodec finds the FFmpeg that PyAV brings: both decode with the same library."""
    wheel = Path(av.__file__).parents[1] / "av.libs"
    folder = Path(tempfile.mkdtemp(prefix="ffmpeg-"))
    for path in wheel.glob("lib*.so.*"):
        name, _, rest = path.name.partition("-")
        if name.startswith(("libav", "libsw")):
            (folder / f"{name}.so.{rest.split('.so.')[1].split('.')[0]}").symlink_to(path)
    return f"{folder}:{wheel}"


def prepare(url: str, footage: Path | None, clips: int, work: Path, peers: dict[str, str]) -> dict[str, Any]:
    """Writes the datasets; the packing's price in bytes and quality."""
    sources(footage, work / "sources")
    standard(work / "sources", work / "standard", clips)
    for path in sorted((work / "standard").iterdir()):
        storage.upload(storage.join(url, "standard", path.name), path)
    index.index_dataset(storage.join(url, "standard"), name="standard")
    rules = PackRules(frames=STORED, least_frames=STORED, cuts=False)
    pack(work / "sources", storage.join(url, "packed"), rules, workers=2)
    if "streaming" in peers:
        run("write_mds", {"mds": storage.join(url, "mds"), "tars": str(work / "standard")}, peers["streaming"])
    if "energon" in peers:
        energon_index(work / "standard", storage.join(url, "standard"), peers["energon"])
    packed = members(storage.join(url, "packed"))
    given = members(storage.join(url, "standard"))
    paths = sorted((work / "sources").iterdir())
    found: dict[str, Any] = {"clips": len(paths), "packed": len(packed)}
    stems = {path.stem: (n, path.read_bytes()) for n, path in enumerate(paths)}
    both = [(key, next(s for s in stems if s in key)) for key in packed if any(s in key for s in stems)]
    found["bytes"] = [
        statistics.mean(len(given[f"{stems[s][0]:07d}"]) for _, s in both),
        statistics.mean(len(packed[k]) for k, _ in both),
    ]
    found["psnr"] = [
        statistics.mean(psnr(given[f"{stems[s][0]:07d}"], stems[s][1]) for _, s in both),
        statistics.mean(psnr(packed[k], stems[s][1]) for k, s in both),
    ]
    return found


def energon_index(tars: Path, url: str, python: str) -> None:
    """Energon's own index of the tars, beside them."""
    how = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1"]
    subprocess.run([str(Path(python).parent / "energon"), "prepare", *how, str(tars)], check=True, capture_output=True)
    for path in sorted(tars.rglob("*")):
        if path.is_file() and path.suffix != ".tar":
            storage.upload(storage.join(url, str(path.relative_to(tars))), path)


Rounds = dict[tuple[str, int], list[dict[str, Any]]]
"""Results by (reader, workers), one a round."""

Job = tuple[str, dict[str, Any], str]
"""Name of a reader, its configuration, and the Python that runs it."""


def jobs(url: str, clips: int, peers: dict[str, str], realtime: bool) -> dict[tuple[str, int], Job]:
    """What one round runs, by (label, workers)."""
    batch = {
        "batch": 16,
        "size": [SIZE, SIZE],
        "stored": STORED,
        "clips": clips,
        "granularity": 8,
        "realtime": realtime,
    }
    given = {**batch, "url": storage.join(url, "standard"), "mds": storage.join(url, "mds"), "decoder": "ours"}
    packed = {**given, "url": storage.join(url, "packed")}
    store = storage._s3()
    names = [entry.name for entry in storage.list_dir(given["url"]) if entry.name.endswith(".tar")]
    given["energon"] = given["url"].replace("s3://", "msc://store/")
    given["state"] = f"{tempfile.gettempdir()}/energon-{url.rpartition('-')[2]}.pt"
    given["signed"] = [store.reads._sign(storage.join(given["url"], name))[0] for name in names]
    here = sys.executable
    made: dict[tuple[str, int], Job] = {}
    for workers in (0, 1, 2):
        made["decoding alone", workers] = ("memory", given, here)
        made["moviola", workers] = ("ours", given, here)
        made["webdataset", workers] = ("webdataset", given, here)
        for peer, python in peers.items():
            made[peer, workers] = (peer, given, python)
    made["moviola, a clip a read", 1] = ("ours", {**given, "granularity": 1}, here)
    half = {**given, "resume": CLIPS // 2}
    for label, python in {"moviola": here, "webdataset": here, **peers}.items():
        made[f"{label}, resumed", 1] = ({"moviola": "ours"}.get(label, label), half, python)
    made["moviola, packed", 1] = ("ours", packed, here)
    for peer, python in {"webdataset": here, **peers}.items():
        made[f"{peer}, plain PyAV", 1] = (peer, {**given, "decoder": "plain"}, python)
    for label, decoder in (("PyAV, plain", "plain"), ("torchcodec", "torchcodec"), ("ours", "ours")):
        for kind, config in (("standard", given), ("packed", packed)):
            made[f"decoder: {label}, {kind}", 1] = ("memory", {**config, "decoder": decoder}, here)
    return made


POSITIONS = ("start", "middle", "end")


def ten_million(url: str) -> str:
    """Writes an index of 10 million clips in 40,000 shards, which all lie in the same few tars; its URL."""
    small = index.open_dataset(storage.join(url, "standard"))
    lines = storage.read_json(storage.join(small.url, "index.json"))["shards"]
    whole = [index.Shard(**line) for line in lines if line["clips"] == A_SHARD]
    shards = [whole[n % len(whole)] for n in range(10_000_000 // A_SHARD)]
    large = storage.join(url, "large")
    index.write_index(large, small.card, shards, base=small.url)
    for shard in whole:
        name = index.index_name(shard.file)
        storage.write_bytes(storage.join(large, name), storage.read_bytes(storage.join(small.url, name)))
    return large


def plan_peer(url: str, python: str) -> list[float]:
    """[seconds to the first sample's bytes, megabytes], medians of three, of mosaicml-streaming at 10 million clips."""
    given, large = storage.join(url, "mds"), storage.join(url, "mds-large")
    index = storage.read_json(storage.join(given, "index.json"))
    whole = index["shards"][:-1]
    for shard in whole:
        name = shard["raw_data"]["basename"]
        storage.write_bytes(storage.join(large, name), storage.read_bytes(storage.join(given, name)))
    index["shards"] = [whole[n % len(whole)] for n in range(10_000_000 // whole[0]["samples"])]
    storage.write_json(storage.join(large, "index.json"), index)
    found = [run("plan_streaming", {"mds": large, "batch": 16}, python) for _ in range(3)]
    return [statistics.median(one[name] for one in found) for name in ("seconds", "megabytes")]


def resume(url: str, position: str, realtime: bool) -> list[float]:
    """[seconds from opening the dataset to the first batch, megabytes of the index in memory], medians of five."""
    steps = 10_000_000 // 16
    step = {"start": 0, "middle": steps // 2, "end": steps - 1}[position]
    found = [_first_batch(url, step, realtime) for _ in range(5)]
    return [statistics.median(values) for values in zip(*found, strict=True)]


def _first_batch(url: str, step: int, realtime: bool) -> tuple[float, float]:
    program = (
        "import os, time, torch, botocore.auth, botocore.session; torch.set_num_threads(1)\n"
        "from pipelines import index, loader\n"
        "from pipelines.contracts import BatchPlan, ClipRule\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6\n"
        "rule = ClipRule(frames=9, sizes=((128, 128),))\n"
        "plan = lambda s: BatchPlan(s, 's', s * 16, 16, 'video', s * 16, (128, 128), rule)\n"
        f"if {realtime}: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))\n"
        "began, before = time.perf_counter(), rss()\n"
        f"dataset = index.open_dataset({url!r}); held = rss() - before\n"
        "made = loader.Loader([(dataset, 1.0)], None, plan, 1 << 40, seed=1, micro_batch=16, granularity=8)\n"
        f"next(made.iter_from({step}))\n"
        "print(time.perf_counter() - began, held, flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, megabytes


def shared(url: str) -> list[list[float]]:
    """[world size, bytes fetched over bytes used, requests a clip] of one pass by all ranks."""
    from pipelines.contracts import BatchPlan, ClipRule
    from pipelines.loader import Loader

    rule, batch = ClipRule(frames=1, sizes=((32, 32),)), 128
    found = []
    for world in (1, 4, 16):
        fetched = used = requests = clips = 0
        for rank in range(world):
            dataset = index.open_dataset(storage.join(url, "standard"))

            def plan(step: int) -> BatchPlan:
                return BatchPlan(step, "s", step * batch, batch, "video", step * batch, (32, 32), rule)

            loader = Loader(
                [(dataset, 1.0)], None, plan, 6, seed=1, micro_batch=8, granularity=8, rank=rank, world=world
            )
            for _ in loader.iter_from(0):
                pass
            metrics = loader.metrics
            fetched += metrics.bytes_fetched
            used += metrics.bytes_used
            requests += metrics.requests
            clips += metrics.clips
        found.append([world, fetched / used, requests / clips])
    return found


def spread(values: list[float], digits: int = 2) -> str:
    """Median (least to greatest)."""
    least, middle, greatest = (f"{f(values):.{digits}f}" for f in (min, statistics.median, max))
    return middle if least == greatest else f"{middle} ({least} to {greatest})"


def report(
    packing: dict[str, Any],
    rounds: Rounds,
    positions: dict[str, list[float]],
    worlds: list[list[float]],
    arguments: argparse.Namespace,
    peers: dict[str, str],
) -> str:
    """The results as Markdown."""

    def rates(label: str, workers: int) -> list[float]:
        return [one["clips"] / one["seconds"] for one in rounds[label, workers]]

    def cpu(label: str, workers: int) -> list[float]:
        return [1e3 * one["cpu_s"] / one["clips"] for one in rounds[label, workers]]

    def beyond(label: str, workers: int) -> list[float]:
        return [1e3 * (one["cpu_s"] - one["decoding_s"]) / one["clips"] for one in rounds[label, workers]]

    def over(label: str, workers: int, measure: Callable[[str, int], list[float]]) -> list[float]:
        return [a / b for a, b in zip(measure(label, workers), measure("decoding alone", workers), strict=True)]

    options = [f"--rounds {arguments.rounds} --clips {arguments.clips}"]
    options += [option for option in ("--realtime", "--footage DIR") if getattr(arguments, option[2:].split()[0])]
    options += [f"--{name} VENV" for name in peers]
    lines = [
        f"# Loader, {arguments.hardware}, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.loader S3_URL {' '.join(options)}`. "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load at the end "
        f"{os.getloadavg()[1]:.1f}; Python {platform.python_version()}, "
        + ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "av", "torchcodec", "webdataset")
        )
        + "".join(f", {name} {_version(python, name)}" for name, python in peers.items())
        + ".",
        "",
        f"9 neighbouring frames of {STORED} at {SIZE}x{SIZE}, batches of 16, over S3 on loopback, fresh processes; "
        f"medians (least to greatest) of {arguments.rounds} interleaved rounds. All decode with our decoder unless "
        "they say `plain PyAV`, which is what their users write. `of bound` is the rate over that of decoding alone, "
        "from memory, in as many threads, in the same round, and `in CPU` the same of clips a CPU second; `beyond` is "
        "CPU time a clip of all processes less what decoding took of it, both counted in the same processes; `first` "
        "is from constructing the loader to the first batch, imports done; `resumed` goes on at half an epoch. Ours "
        "reads runs of 8 neighbours, or a clip a read."
        + (
            " What is measured ran ahead of all else on the machine, which others used too; of a busy core, the "
            "kernel then leaves 5% to them."
            if arguments.realtime
            else ""
        ),
        "",
        "| loader | workers | first (s) | clips/s | of bound | in CPU | CPU ms a clip | beyond (ms) |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    decoders = [key for key in rounds if key[0].startswith("decoder")]
    loaders = sorted((key for key in rounds if key not in decoders), key=lambda key: (key[1], key[0]))
    for key in loaders:
        same = key[0] != "decoding alone" and "packed" not in key[0] and "plain" not in key[0]
        bound = spread(over(*key, rates)) if same else ""
        busy = spread([1 / ratio for ratio in over(*key, cpu)]) if same else ""
        lines.append(
            f"| {key[0]} | {key[1]} | {spread([one['first_batch_s'] for one in rounds[key]])} | "
            f"{spread(rates(*key), 0)} | {bound} | {busy} | {spread(cpu(*key))} | {spread(beyond(*key))} |"
        )
    for (label, workers), found in rounds.items():
        if failures := sum(one.get("failed", 0) for one in found):
            lines += ["", f"{label} with {workers} workers failed {failures} times, and was run again."]
    lines += [
        "",
        "## What packing buys",
        "",
        f"{packing['clips']} clips. Given to the peers: x264, CRF {STANDARD['crf']}, {STANDARD['preset']}, its own "
        f"keyframes: {packing['bytes'][0]:,.0f} bytes a clip, {packing['psnr'][0]:.2f} dB (RGB) against the source. "
        f"Packed by `moviola pack` with its defaults: {packing['bytes'][1]:,.0f} bytes "
        f"({packing['bytes'][1] / packing['bytes'][0]:.2f} times), {packing['psnr'][1]:.2f} dB "
        f"({packing['psnr'][1] - packing['psnr'][0]:+.2f} dB).",
        "",
        "CPU time a clip of each peer over ours with packed clips, in the same round, one worker: clips a second and "
        "core.",
        "",
        "| peer | as its users decode | with our decoder |",
        "| --- | --: | --: |",
    ]
    mine = cpu("moviola, packed", 1)
    for peer in ("webdataset", *peers):
        plain, ours = (
            spread([a / b for a, b in zip(cpu(label, 1), mine, strict=True)]) for label in (f"{peer}, plain PyAV", peer)
        )
        lines.append(f"| {peer} | {plain} | {ours} |")
    lines += [
        "",
        "## Decoders",
        "",
        "Decoding alone from memory, one thread, both with the FFmpeg that PyAV brings.",
        "",
        "| decoder | CPU ms a clip | over ours, in the same round |",
        "| --- | --: | --: |",
    ]
    for label, workers in sorted(decoders):
        base = cpu(f"decoder: ours, {label.rpartition(', ')[2]}", workers)
        ratios = [a / b for a, b in zip(cpu(label, workers), base, strict=True)]
        lines.append(f"| {label.removeprefix('decoder: ')} | {spread(cpu(label, workers))} | {spread(ratios)} |")
    lines += [
        "",
        "## Resume at 10 million clips",
        "",
        f"40,000 shards of {A_SHARD} clips. From opening the dataset to the first batch, in a fresh process, imports "
        "done"
        + (
            "; mosaicml-streaming, with an index of its own of as many samples, to the first sample's bytes."
            if "streaming" in peers
            else "."
        ),
        "",
        "| position | seconds | index in memory (MB) |",
        "| --- | --: | --: |",
        *(f"| {label} | {seconds:.2f} | {held:.0f} |" for label, (seconds, held) in positions.items()),
        "",
        "## Bytes",
        "",
        "Over all ranks, granularity 8, batches of 128.",
        "",
        "| world size | bytes fetched over bytes used | requests a clip |",
        "| --: | --: | --: |",
        *(f"| {world:.0f} | {ratio:.3f} | {requests:.2f} |" for world, ratio, requests in worlds),
        "",
    ]
    return "\n".join(lines)


def _version(python: str, name: str) -> str:
    package = {"streaming": "mosaicml-streaming", "energon": "megatron-energon"}[name]
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--footage", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=960)
    parser.add_argument("--streaming", type=Path)
    parser.add_argument("--energon", type=Path)
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    parser.add_argument("--state", type=Path)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    peers = {
        name: str(getattr(arguments, name) / "bin" / "python")
        for name in ("streaming", "energon")
        if getattr(arguments, name)
    }
    state: dict[str, Any] = {"url": storage.join(arguments.url, f"loader-{int(time.time())}"), "done": {}}
    if arguments.state and arguments.state.exists():
        state = json.loads(arguments.state.read_text())
    url, done, ends = state["url"], state["done"], time.monotonic() + 60 * arguments.minutes

    def once(name: str, measure: Callable[[], Any]) -> Any:
        if name not in done:
            if time.monotonic() > ends:
                print(f"{len(done)} measurements are in {arguments.state}; the same command goes on from there")
                sys.exit()
            done[name] = measure()
            if arguments.state:
                arguments.state.write_text(json.dumps(state))
        return done[name]

    with tempfile.TemporaryDirectory() as work:
        packing = once("packing", lambda: prepare(url, arguments.footage, CLIPS, Path(work), peers))
    rounds: Rounds = defaultdict(list)
    todo = jobs(url, arguments.clips, peers, arguments.realtime)
    if "energon" in peers:
        name, config, python = todo["energon", 1]
        config = {**config, "workers": 1, "clips": CLIPS // 2, "save": CLIPS // 2}
        once("energon's state", partial(run, name, config, python))
    for number in range(arguments.rounds):
        for (label, workers), (name, config, python) in todo.items():
            config = {**config, "workers": workers}
            rounds[label, workers].append(once(f"{number}/{label}/{workers}", partial(run, name, config, python)))
    large = once("large", lambda: ten_million(url))
    positions = {
        position: once(position, partial(resume, large, position, arguments.realtime)) for position in POSITIONS
    }
    if "streaming" in peers:
        positions["streaming, start"] = once("plan", partial(plan_peer, url, peers["streaming"]))
    text = report(packing, rounds, positions, once("worlds", lambda: shared(url)), arguments, peers)
    storage.delete(url, recursive=True)
    path = HERE / "results" / f"loader_{arguments.hardware}_{datetime.date.today()}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
