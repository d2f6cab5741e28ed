"""What a small model of a paper learns in a quarter of an hour on CPU, on clips from videos that it never saw.

    python -m benchmarks.learning VIDEOS [--recipe RECIPE] [--work learning_data] [--results benchmarks/results]

Packs the folder of videos (an eighth held back, by source video), trains ``manifests/RECIPE_small.yaml`` on two
processes of one thread each (``--processes``), measures some checkpoints and the untrained model on the held-back clips
beside baselines of the same latent budget, and writes a table, a curve and pictures. A run that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks import papers
from pipelines import index, pack
from pipelines.contracts import ClipRule
from trainer import checkpoint, examine, manifest, pictures, run
from trainer.codec import Codec
from trainer.evaluate import evaluate
from trainer.losses import Perceptual, PerceptualSpec
from trainer.run import Trained
from trainer.telemetry import read_lines

ROOT = Path(__file__).resolve().parents[1]
RULES = ROOT / "manifests" / "datasets" / "demo.yaml"
STOPPED = 75
POINTS = 4
"""Checkpoints that are measured, spread over the run; the last is one of them."""
CPU_SECONDS = "cpu_seconds.txt"
"""In a run's folder: what each attempt took, a line each."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("--recipe", choices=papers.NAMES, default="arvae")
    parser.add_argument("--work", default="learning_data", type=Path, help="where shards and the run go")
    parser.add_argument("--results", default=ROOT / "benchmarks" / "results", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--processes", default=2, type=int, help="that train, of one thread each")
    parser.add_argument("--name", help="of the run; RECIPE-small by default")
    options = parser.parse_args()
    work = options.work / options.recipe
    rules = pack.load_rules(str(RULES), papers.load(options.recipe).rules)
    print(pack.pack(options.videos, work, rules).text(), flush=True)
    sets = [f"data.train={work}/train", f"data.eval={work}/eval", *options.sets]
    name = options.name or f"{options.recipe}-small"
    status = train(ROOT / "manifests" / f"{options.recipe}_small.yaml", sets, work / "runs", name, options.processes)
    if status:
        print("stopped, with a checkpoint: the same command goes on" if status == STOPPED else "training failed")
        return status
    report(str(work / "runs" / name), options.results)
    return 0


def train(source: Path, sets: list[str], runs: Path, name: str, processes: int) -> int:
    arguments = [str(source), "--runs", str(runs), "--name", name]
    for change in sets:
        arguments += ["--set", change]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    before = children_cpu_seconds()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*launcher, "-m", "trainer", *arguments], env=environment, cwd=ROOT)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    status = process.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if (runs / name).is_dir():
        with (runs / name / CPU_SECONDS).open("a") as file:
            file.write(f"{children_cpu_seconds() - before:.1f}\n")
    return status


def children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(trained: Trained, step: int, clips: list[Any], perceptual: Perceptual) -> Mapping[str, Any]:
    """The evaluation of a step; kept in the run's folder, so that a report that was stopped goes on."""
    kept = Path(trained.url) / f"measured-{step}.json"
    if not kept.exists():
        codec = Codec(trained.recipe, trained.model)
        kept.write_text(evaluate(codec.round_trip, clips, perceptual=perceptual).json())
    return json.loads(kept.read_text())


def report(run_url: str, results: Path) -> None:
    torch.set_num_threads(1)  # small models; threads that wait for each other burn what the runs need
    stored = run.load(run_url)
    last = stored.schedule.stages[-1].clip
    rule = ClipRule(frames=last.frames, sizes=last.sizes, crop="center", flip=0.0)
    clips = list(examine.FixedClips(index.open_dataset(stored.data.eval), rule, last.sizes[0], None))
    perceptual = Perceptual(PerceptualSpec(backbone="alex", weights="random"))
    model = stored.loaded_recipe.build(stored.seed).eval()
    trained = Trained(stored, stored.loaded_recipe, model, run_url)
    curve = [(0, measured(trained, 0, clips, perceptual))]
    folders = sorted(Path(run_url, "checkpoints").glob("step-*"))
    count = min(POINTS, len(folders))
    for folder in (folders[len(folders) * (i + 1) // count - 1] for i in range(count)):
        checkpoint.assign(model, checkpoint.load_weights(str(folder), ema=bool(stored.ema)))
        step = int(folder.name.removeprefix("step-"))
        curve.append((step, measured(trained, step, clips, perceptual)))
        print(f"step {curve[-1][0]}: {curve[-1][1]['psnr_db']:.2f} dB", flush=True)
    stem = f"learning-{stored.recipe}_{hardware()}_{datetime.date.today()}"
    results.mkdir(parents=True, exist_ok=True)
    borders = [*stored.schedule.first_steps, stored.schedule.steps]
    draw_curve(curve, borders, [s.name for s in stored.schedule.stages], results / f"{stem}_curve.png")
    draw_clips(trained, clips, results / stem)
    (results / f"{stem}.md").write_text(text(stored, curve, seconds(run_url), stem, clips))
    print(results / f"{stem}.md")


def draw_clips(trained: Trained, clips: list[Any], stem: Path) -> None:
    """Grids of the clips of greatest and of middling motion, to ``STEM_clip0.png`` and ``STEM_clip1.png``."""
    order = sorted(clips, key=lambda clip: clip.motion)
    shown = [order[-1], order[len(order) // 2]]
    for number, view in enumerate(examine.look(trained.recipe, trained.model, shown)):
        pictures.grid(view, Path(f"{stem}_clip{number}.png"))


def seconds(run_url: str) -> tuple[float, float]:
    """Time spent training, checkpoints and waits for data included, and CPU time of its processes; of all attempts."""
    lines = [line for line in read_lines(f"{run_url}/metrics.jsonl") if "ledger" in line]
    ledger = lines[-1]["ledger"]["seconds"]
    spent = sum(ledger.get(cause, 0.0) for cause in ("productive", "data_wait", "checkpoint", "lost"))
    kept = Path(run_url, CPU_SECONDS)
    return spent, sum(float(line) for line in kept.read_text().split()) if kept.exists() else 0.0


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"{os.cpu_count()}cpu"


def text(
    stored: manifest.RunManifest, curve: list[Any], spent: tuple[float, float], stem: str, clips: list[Any]
) -> str:
    (_, start), (steps, end) = curve[0], curve[-1]
    parts = stored.loaded_recipe.parts(stored.loaded_recipe.build(stored.seed))
    planned = stored.schedule.steps
    rows = [("untrained", start), (f"trained, {steps} steps" + f" of {planned}" * (steps < planned), end)]
    rows += [("bicubic down and up", end["baselines"]["bicubic"])]
    rows += [("first frame repeated", end["baselines"]["first_frame"])]
    lines = [
        f"# What a small {papers.load(stored.recipe).title} learns on two CPU cores",
        "",
        f"`python -m benchmarks.learning VIDEOS --recipe {stored.recipe}`: "
        f"`manifests/{stored.recipe}_small.yaml`, {sum(parts.values()):,} parameters, "
        f"{end['clips']} clips of {end['clip']['frames']} frames, {end['clip']['height']} x {end['clip']['width']}, "
        f"from {len({clip.source.key.rsplit('-', 1)[0] for clip in clips})} videos that were never trained on.",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, float32, "
        f"processes of one thread, {spent[0] / 60:.0f} minutes of training by the run's ledger"
        + (f", {spent[1] / 60:.0f} CPU minutes: half of that is what two idle cores take." if spent[1] else "."),
        "",
        "| | numbers a frame | PSNR dB | SSIM | PSNR dB by motion: least, middle, most |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, values in rows:
        thirds = ", ".join(f"{third['psnr_db']:.2f}" for third in values["by_motion"])
        budget, psnr, similarity = (values[key] for key in ("numbers_per_frame", "psnr_db", "ssim"))
        lines.append(f"| {name} | {budget:.0f} | {psnr:.2f} | {similarity:.4f} | {thirds} |")
    lines += ["", "| over | dB | 95% interval |", "| --- | ---: | ---: |"]
    for name, title in (("bicubic", "bicubic down and up"), ("first_frame", "first frame repeated")):
        margin = end["baselines"][name]["margin"]
        low, high = margin["confidence"]
        lines.append(f"| {title} | {margin['psnr_db']:+.2f} | {low:+.2f} to {high:+.2f} |")
    frames = ", ".join(f"{value:.2f}" for value in end["by_frame"]["psnr_db"])
    lines += ["", f"PSNR of frames 1 to {end['clip']['frames']}, trained: {frames} dB.", ""]
    lines += [f"![PSNR over steps]({stem}_curve.png)", ""]
    lines += [f"![clip]({stem}_clip{number}.png)\n" for number in range(2)]
    return "\n".join(lines)


def draw_curve(curve: list[Any], borders: list[int], names: list[str], path: Path) -> None:
    """PSNR of the held-back clips over steps, with the stages' borders and the baselines."""
    width, height, left, top = 960, 420, 70, 30
    right, bottom = width - 20, height - 50
    image = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    rivals = {name: values["psnr_db"] for name, values in curve[-1][1]["baselines"].items()}
    levels = [values["psnr_db"] for _, values in curve] + list(rivals.values())
    low, high = min(levels) - 0.5, max(levels) + 0.5

    def at(step: float, level: float) -> tuple[float, float]:
        return left + (right - left) * step / borders[-1], bottom - (bottom - top) * (level - low) / (high - low)

    for level in range(int(low) + 1, int(high) + 1):
        draw.line([at(0, level), at(borders[-1], level)], fill="#e8e8e8")
        draw.text((left - 8, at(0, level)[1]), f"{level} dB", "black", font, anchor="rm")
    for border, name in zip(borders, [*names, ""], strict=True):
        x = at(border, low)[0]
        draw.line([(x, top), (x, bottom)], fill="#b0b0b0")
        draw.text((x + 4, bottom + 6), name, "black", font)
        draw.text((x, bottom + 24), str(border), "#606060", font, anchor="ma")
    for name, level in rivals.items():
        draw.line([at(0, level), at(borders[-1], level)], fill="#c04020", width=2)
        draw.text((right, at(0, level)[1] - 4), name.replace("_", " "), "#c04020", font, anchor="rb")
    draw.line([at(step, values["psnr_db"]) for step, values in curve], fill="#1040a0", width=3)
    image.save(path)


if __name__ == "__main__":
    raise SystemExit(main())
