"""One-DVA's chain on footage at a small size: codec, latents, diffusion model, post-training on what that predicts.

    python -m benchmarks.post_training DATA [--work FOLDER] [--results benchmarks/results]

DATA holds ``train`` and ``eval``, as ``moviola pack --rules manifests/datasets/demo.yaml`` makes them of videos. The
codec and the diffusion model are trained on the one side; on the other, each clip is encoded, its latents are noised to
a level t, the diffusion model predicts them, and the decoder of before and of after post-training makes frames of what
was predicted. A third run goes on as long as post-training does, on the encoder's own latents: what more steps alone
are worth. Every part is a run that goes on where it was; SIZES says how small they are.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.learning import ROOT, hardware
from pipelines import index
from pipelines.contracts import generator
from trainer import examine, run
from trainer.recipe import Latent

FRAMES, SIZE = 9, 64
SIZES = {"structural": 60, "adaptive": 120, "flow": 300, "post": 80}
"""Steps of each stage."""
LEVELS = (0.1, 0.3, 0.5)
CODEC = [
    f"clip={{frames: {FRAMES}, sizes: [[{SIZE}, {SIZE}]]}}", "model.window=9", "model.queries=24",
    "batch=4", "stages.structural.batch=4", "stages.adaptive.batch=4", "checkpoint.every_steps=40", "workers.count=1",
    "telemetry.tensorboard=false",
]  # fmt: skip
FLOW = [
    "model={width: 96, depth: 4, heads: 4}", "batch=16", "precision=fp32", "ema=0.99", "workers={count: 1, gpus: 0}",
    f"stages.flow={{steps: {SIZES['flow']}, batch: 16, optimizer: {{lr: 1.0e-3, warmup: 20, decay: cosine}}}}",
    "checkpoint.every_steps=100", "telemetry.tensorboard=false",
]  # fmt: skip
GOES_ON = (
    "optimizer: {lr: 4.0e-4, betas: [0.9, 0.99], warmup: 20}, losses: {flow: 1, kl: 0, align: 0, repa: 0, lpips: 0}"
)


def main() -> int:
    """Runs the chain and writes what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, default=ROOT / "post_training")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args()
    runs = given.work / "runs"
    codec, dit, latents = f"{runs}/codec", f"{runs}/dit", given.work / "latents"
    data = f"data={{train: {given.data}/train, eval: {given.data}/eval}}"
    stages = [f"stages.{name}.steps={SIZES[name]}" for name in ("structural", "adaptive")]
    train("onedva_small", runs, "codec", [data, *CODEC, *stages])
    moviola("encode", codec, "--dataset", f"{given.data}/train", str(latents))
    train("latentdit", runs, "dit", [f"data.train={latents}", *FLOW])
    none = ["stages.structural.steps=0", "stages.adaptive.steps=0"]
    post = f"steps: {SIZES['post']}, batch: 4, init_from: {codec}, init_average: true, {GOES_ON}"
    train(
        "onedva_small", runs, "post", [data, *CODEC, *none, f"stages.post={{{post}, teachers: {{predictor: {dit}}}}}"]
    )
    alone = ["stages.structural.steps=0", f"stages.adaptive={{{post}, train: ['decoder.*']}}"]
    train("onedva_small", runs, "longer", [data, *CODEC, *alone])
    moviola("sample", dit, f"{given.work}/samples", "--codec", f"{runs}/post", "--count", "8")
    found = measured({name: f"{runs}/{name}" for name in ("codec", "longer", "post")}, dit, f"{given.data}/eval")
    given.results.mkdir(parents=True, exist_ok=True)
    path = given.results / f"post-training_{hardware()}_{datetime.date.today()}.md"
    path.write_text(text(found))
    print(path.read_text())
    return 0


def train(manifest: str, runs: Path, name: str, sets: list[str]) -> None:
    """Trains in one process, or goes on, or finds it done."""
    changes = [part for change in sets for part in ("--set", change)]
    arguments = [f"{ROOT}/manifests/{manifest}.yaml", "--runs", str(runs), "--name", name, *changes]
    subprocess.run([sys.executable, "-m", "trainer", *arguments], check=True)


def moviola(*arguments: str) -> None:
    """The command."""
    subprocess.run([sys.executable, "-m", "cluster.cli", *arguments], check=True)


@torch.no_grad()
def measured(codecs: Mapping[str, str], dit: str, eval_url: str) -> dict[str, dict[str, list[float]]]:
    """PSNR in dB of each clip held back, by what the decoder is given and by codec."""
    opened = {name: run.open_model(url) for name, url in codecs.items()}
    predictor = run.open_model(dit).model
    first = next(iter(opened.values()))
    rule, size = examine.fixed_rule(first.manifest)
    found: dict[str, dict[str, list[float]]] = {}
    for number, clip in enumerate(examine.FixedClips(index.open_dataset(eval_url), rule, size, None)):
        x_1CTHW = clip.pixels_CTHW[None]
        (latent,) = first.recipe.encode(first.model, [x_1CTHW])
        for level in (0.0, *LEVELS):
            given = latent if not level else {**latent, **predicted(predictor, latent, level, number)}
            title = f"predicted from t = {level}" if level else "the encoder's own"
            for name, trained in opened.items():
                made_1CTHW = torch.cat(list(trained.recipe.decode(trained.model, [given])), dim=2)
                error = ((made_1CTHW - x_1CTHW) / 2).square().mean((1, 3, 4))
                value = float(-10 * error.clamp_min(1e-10).log10().mean())
                found.setdefault(title, {}).setdefault(name, []).append(value)
    return found


def predicted(predictor: nn.Module, latent: Latent, level: float, number: int) -> dict[str, Tensor]:
    """What the diffusion model makes of a clip's latents, each as long as it was."""
    shapes = {name: tensor.shape for name, tensor in predictor.layout.tensors.items()}
    whole, masks, noise = {}, {}, {}
    for name, shape in shapes.items():
        kept = latent[name].shape[-1]
        whole[name] = nn.functional.pad(latent[name], (0, shape[-1] - kept))
        masks[name] = (torch.arange(shape[-1]) < kept).expand(1, *shape[1:])
        noise[name] = torch.randn(1, *shape, generator=generator(0, number, f"benchmark/{name}"))
    made = predictor.predict(whole, torch.tensor([level]), noise, masks)
    return {name: value[..., : latent[name].shape[-1]] for name, value in made.items()}


def text(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """The result file."""
    clips = len(next(iter(found.values()))["codec"])
    lines = [
        "# One-DVA before and after post-training, at a small size",
        "",
        f"`python -m benchmarks.post_training DATA`: `manifests/onedva_small.yaml` at {FRAMES} frames of {SIZE} x "
        f"{SIZE}, {SIZES['structural']} + {SIZES['adaptive']} steps of 4 clips; `latentdit` (width 96, 4 blocks) for "
        f"{SIZES['flow']} steps of 16 on its latents; {SIZES['post']} steps of 4 of post-training (`post`), and as "
        "many more of the decoder alone on the encoder's own latents (`longer`). PSNR in dB over "
        f"{clips} clips of videos that were never trained on; gains are clip by clip, mean ± 95% interval.",
        "",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores (shared), torch {torch.__version__}, "
        "float32.",
        "",
        "| latents given to the decoder | before | longer | post-trained | gain | gain over longer | clips better |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for title, by in found.items():
        means = [f"{statistics.fmean(by[name]):.2f}" for name in ("codec", "longer", "post")]
        gains = [[b - a for a, b in zip(by[name], by["post"], strict=True)] for name in ("codec", "longer")]
        told = [f"{statistics.fmean(g):+.2f} ± {1.96 * statistics.stdev(g) / len(g) ** 0.5:.2f}" for g in gains]
        lines.append(f"| {title} | {' | '.join([*means, *told])} | {sum(g > 0 for g in gains[0])} of {clips} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
