"""What a training step of a recipe costs on this device, and how long its whole schedule would take.

    python -m benchmarks.step MANIFEST [--set FIELD=VALUE ...] [--stages NAME ...] [--variants float32 ...] [--steps 12]

Trains each stage of the manifest for a few steps through the engine, on one process, from clips that already lie in
memory: reading is not measured here (``benchmarks.loader`` does). Eager and compiled, float32 and bfloat16, channels
first and last, take turns, a step each; the first steps, in which the compiler works, are not counted. What differs
within a stage is measured apart: images and videos, each size, before its adversary starts and after. A recipe that
reads captions gets some of the greatest length. Floating point operations are those of a step's forward and backward
passes; the device's peak is what a large matrix product reaches on it in the same run, in the same precision, or in
float32 where that is faster. Peak memory is taken in a process of its own for each variant.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines import synthetic
from pipelines.captions import MOST_TOKENS
from pipelines.contracts import Batch, BatchPlan, Source, generator
from trainer import manifest as manifests
from trainer.adversary import Adversary
from trainer.blocks import conv
from trainer.blocks.transformer import Attention
from trainer.engine import Engine
from trainer.flops import Count
from trainer.manifest import RunManifest
from trainer.recipe import StepOutput, caption_width
from trainer.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = {
    f"{name}{', channels last' * last}{', compiled' * compiled}": (precision, last, compiled)
    for name, precision in (("float32", "fp32"), ("bfloat16", "bf16"))
    for last in (False, True)
    for compiled in (False, True)
}
"""Precision, channels last, compiled."""
LOOKED_AT = 1000
"""Steps of a stage by which it is known how often each of its kinds comes."""


def sync(device: torch.device) -> float:
    """The time once the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Part:
    """``steps`` of a stage that are like ``plan``, with its adversary (``judged``) or without."""

    stage: Stage
    steps: int
    plan: BatchPlan
    judged: bool

    @property
    def title(self) -> str:
        """How rows of tables name it."""
        size = ["x".join(map(str, self.plan.size))] if len(self.stage.clip.sizes) > 1 else []
        images = ["images"] if self.plan.stream == "image" else []
        return ", ".join([self.stage.name, *size, *images, *(["adversary"] if self.judged else [])])


def parts_of(manifest: RunManifest) -> list[Part]:
    """The schedule, cut by size, into images and videos, and where adversaries start."""
    parts, schedule = [], manifest.schedule
    for stage, first in zip(schedule.stages, schedule.first_steps, strict=True):
        plans = [schedule.plan(first + step) for step in range(min(stage.steps, LOOKED_AT))]
        kinds = {(plan.stream, plan.size): plan for plan in reversed(plans)}
        counts = Counter((plan.stream, plan.size) for plan in plans)
        alone = stage.adversary.start if stage.adversary else stage.steps
        for judged, steps in ((False, alone), (True, stage.steps - alone)):
            for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
                parts.append(Part(stage, round(steps * count / len(plans)), kinds[kind], judged))
    return [part for part in parts if part.steps]


class Trial:
    """One engine on a part of a stage, with the adversary's where it plays, and its next step."""

    def __init__(self, manifest: RunManifest, part: Part, variant: str, clips: int, device: torch.device) -> None:
        precision, channels_last, compile = VARIANTS[variant]
        stage = part.stage
        self.recipe, self.stage, self.device = manifest.loaded_recipe, stage, device
        self.spec = manifest.optimizer_for(stage)
        self.engine = Engine(
            self.recipe.build(manifest.seed), stage, self.spec, zero_stage=0, precision=precision,
            channels_last=channels_last, compile=compile, device=device, ema_decay=manifest.ema or None,
        )  # fmt: skip
        self.rival = None
        if part.judged:
            assert stage.adversary
            self.rival = Adversary(
                stage.adversary, stage.steps, manifest.adversary_optimizer_for(stage), seed=manifest.seed,
                zero_stage=0, precision=precision, device=device,
            )  # fmt: skip
        self.teachers = self.recipe.teachers().to(device).requires_grad_(False).eval()
        if channels_last:
            conv.channels_last(self.teachers)
        plan, tokens = part.plan, caption_width(self.recipe)
        height, width = plan.size
        count = clips * plan.per_clip
        frames = [synthetic.footage(0, i, plan.rule.frames, (height, width)).frames_THW3 for i in range(count)]
        pixels_BCTHW = torch.from_numpy(np.stack(frames)).permute(0, 4, 1, 2, 3).float().contiguous() / 127.5 - 1
        noise = generator(0, 0, "step/captions")
        self.batch = Batch(
            pixels_BCTHW=pixels_BCTHW, fps_B=torch.full((count,), 24.0), motion_B=torch.full((count,), 0.1),
            places=tuple(range(count)), sources=(Source("made", "here", "scene"),) * count, plan=plan, weight=1.0,
            seed=manifest.seed,
            caption_emb_BLD=torch.randn(count, MOST_TOKENS, tokens, generator=noise) if tokens else None,
            caption_mask_BL=torch.ones(count, MOST_TOKENS, dtype=torch.bool) if tokens else None,
        ).to(device)  # fmt: skip

    def forward(self) -> StepOutput:
        """The recipe's part of a step."""
        return self.recipe.step(self.engine.model, self.batch, self.stage, self.teachers)

    def step(self) -> dict[str, float]:
        """Seconds of a step by part."""
        times = [sync(self.device)]

        def lap() -> float:
            times.append(sync(self.device))
            return times[-1] - times[-2]

        output = self.forward()
        spent = {"forward": lap()}
        if self.rival:
            output = self.rival.judge(output, 1.0)
        spent["adversary"] = lap()
        self.engine.backward(output.loss, last=True)
        spent["backward"] = lap()
        if self.rival:
            self.rival.learn(output, 1.0, last=True)
        spent["adversary"] += lap()
        self.engine.step(self.spec.lr, image=self.batch.plan.stream == "image")
        spent["optimizer"] = lap()
        if self.rival:
            self.rival.step(self.rival.spec.start)
        spent["adversary"] += lap()
        return spent

    def operations(self) -> int:
        """Floating point operations of a step's forward and backward passes."""
        with Count() as count:
            self.step()
        return count.total

    def close(self) -> None:
        """Lets go of both engines."""
        self.engine.close()
        if self.rival:
            self.rival.engine.close()

    def parts(self) -> dict[str, float]:
        """Share of the forward pass by the model's parts and the frozen networks, the rest (warps, losses), and of
        attention within them. A part's share is what its modules take, whichever of them is called from outside.
        """
        spent: dict[str, float] = defaultdict(float)
        whole_parts = [*self.engine.module.named_children(), *self.teachers.named_children()]
        attentive = [module for module in self.engine.module.modules() if isinstance(module, Attention)]
        with contextlib.ExitStack() as hooks:
            for name, part in whole_parts:
                hooks.enter_context(timed(list(part.modules()), name, spent, self.device))
            hooks.enter_context(timed(attentive, "of these, attention", spent, self.device))
            start = sync(self.device)
            self.forward()
            whole = sync(self.device) - start
        spent["the rest"] = whole - sum(spent.get(name, 0.0) for name, _ in whole_parts)
        return {name: seconds / whole for name, seconds in spent.items()}


@contextlib.contextmanager
def timed(modules: Sequence[nn.Module], name: str, spent: dict[str, float], device: torch.device) -> Iterator[None]:
    """Adds up the time in calls of the modules; a call within another one counts as part of that."""
    began: list[float] = []

    def before(*_: Any) -> None:
        began.append(began[0] if began else sync(device))

    def after(*_: Any) -> None:
        start = began.pop()
        if not began:
            spent[name] += sync(device) - start

    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a matrix product that takes a twentieth of a second or has 16,384 rows, at its best."""
    size, took = 128, 0.0
    while took < 0.05 and size < 16384:
        size *= 2
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(10 if took > 0.01 else 2):
            start = sync(device)
            a @ b
            times.append(sync(device) - start)
        took = min(times)
    return 2 * size**3 / took


def length(days: float) -> str:
    """A time in days, or in hours where it is less than one."""
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:.2f} hours"


def memory(source: str, sets: list[str], title: str, variant: str, clips: int, device: str, answers: Any) -> None:
    """Peak bytes of a process that does two eager or compiled steps and nothing else."""
    manifest = manifests.load(source, sets)
    part = next(part for part in parts_of(manifest) if part.title == title)
    trial = Trial(manifest, part, variant, clips, torch.device(device))
    for _ in range(2):
        trial.step()
    if device == "cuda":
        answers.put(torch.cuda.max_memory_allocated())
    else:
        answers.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_memory(source: str, sets: list[str], title: str, variant: str, clips: int, device: torch.device) -> str:
    """MiB of :func:`memory` in a process of its own; a dash, and what the process said, where it came to no end."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    process = context.Process(target=memory, args=(source, sets, title, variant, clips, device.type, answers))
    process.start()
    process.join()
    return "-" if process.exitcode else f"{answers.get() / 2**20:,.0f}"


def measure(
    manifest: RunManifest, part: Part, variants: list[str], clips: int, warm: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Times by variant, in turns; operations and the parts' shares, eager in float32."""
    trials = {name: Trial(manifest, part, name, clips, device) for name in variants}
    operations, parts = trials["float32"].operations(), trials["float32"].parts()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(warm + steps):
        for name, trial in trials.items():
            times[name].append(trial.step())
    for trial in trials.values():
        trial.close()
    return {"times": {name: spent[warm:] for name, spent in times.items()}, "operations": operations, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", dest="sets")
    parser.add_argument("--clips", type=int, default=1, help="clips of a micro-batch")
    parser.add_argument("--stages", nargs="+", help="stages of the manifest; all by default")
    parser.add_argument("--warm", type=int, default=3, help="steps of each variant at the start that are not counted")
    parser.add_argument("--steps", type=int, default=12, help="steps of each variant that are counted, 2 at least")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="`float32` is in any case"
    )
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    manifest = manifests.load(options.manifest, options.sets)
    peaks = {"fp32": peak_flops(device, torch.float32), "bf16": peak_flops(device, torch.bfloat16)}
    variants = list(dict.fromkeys(["float32", *options.variants]))
    rows, shares, days = [], [], dict.fromkeys(variants, 0.0)
    chosen = [part for part in parts_of(manifest) if options.stages is None or part.stage.name in options.stages]
    if not chosen:
        parser.error(f"--stages: {manifest.name} has {', '.join(s.name for s in manifest.schedule.stages)}")
    for part in chosen:
        found = measure(manifest, part, variants, options.clips, options.warm, options.steps, device)
        eager = [sum(step.values()) for step in found["times"]["float32"]]
        for name, spent in found["times"].items():
            peak = peak_memory(options.manifest, options.sets, part.title, name, options.clips, device)
            whole = [sum(step.values()) for step in spent]
            low, middle, high = statistics.quantiles([1000 * seconds for seconds in whole])
            ratio = statistics.median(a / b for a, b in zip(eager, whole, strict=True))
            achieved = found["operations"] / (middle / 1000)
            clips = options.clips * part.plan.per_clip
            days[name] += part.steps * part.plan.clips * middle / 1000 / clips / 86400
            rows.append(
                f"| {part.title} | {name} | {middle:.0f} ({low:.0f} to {high:.0f}) | {ratio:.2f} | "
                f"{1000 * clips / middle:.2f} | {achieved / 1e9:.1f} | "
                f"{achieved / max(peaks['fp32'], peaks[VARIANTS[name][0]]):.1%} | {peak} |"
            )
            print(rows[-1], flush=True)
        middle = {part: statistics.median(step[part] for step in found["times"]["float32"]) for part in
                  ("forward", "backward", "optimizer", "adversary")}  # fmt: skip
        total = sum(middle.values())
        within = sorted(found["parts"].items(), key=lambda item: -item[1])
        shares.append(
            f"| {part.title} | {' | '.join(f'{value / total:.0%}' for value in middle.values())} | "
            f"{', '.join(f'{name} {share:.0%}' for name, share in within if share >= 0.01)} |"
        )
    path = ROOT / "benchmarks/results" / f"step-{manifest.name}_{options.hardware}_{datetime.date.today()}.md"
    path.write_text(report(manifest, chosen, rows, shares, days, peaks, options.clips))
    print(path)


def report(
    manifest: RunManifest,
    parts: list[Part],
    rows: list[str],
    shares: list[str],
    days: dict[str, float],
    peaks: dict[str, float],
    clips: int,
) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPUs"
    sizes = {"x".join(map(str, part.plan.size)) for part in parts}
    clips_in_all = sum(part.steps * part.plan.clips for part in parts)
    pictures = [part.plan.per_clip for part in parts if part.plan.stream == "image"]
    images = f" (images: {clips * max(pictures)})" if pictures else ""
    which = "The whole schedule" if parts == parts_of(manifest) else "These stages of the schedule"
    return "\n".join([
        f"# A training step of {manifest.name} (recipe {manifest.recipe})",
        "",
        f"{datetime.date.today()}, {device} ({platform.machine()}), Python {platform.python_version()}, {versions}; "
        f"micro-batch {clips}{images}, {', '.join(sorted(sizes))} pixels.",
        f"`python -m benchmarks.step {' '.join(sys.argv[1:])}`",
        "",
        (__doc__ or "").split("\n\n", 2)[2].strip(),
        "",
        f"Peak of a matrix product here: {peaks['fp32'] / 1e9:.3g} GFLOP/s in float32, "
        f"{peaks['bf16'] / 1e9:.2g} in bfloat16. Milliseconds are medians with quartiles; the speed-up is the median "
        "of the pairs' ratios to eager float32. Memory is the peak of the process: resident on a CPU, "
        "allocated by torch on a GPU.",
        "",
        "| stage | variant | ms a step | speed-up | clips/s | GFLOP/s | of the peak | MiB |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
        *rows,
        "",
        "Where an eager float32 step's time goes, and the parts of its forward pass:",
        "",
        "| stage | forward | backward | optimizer | adversary | parts of the forward pass |",
        "| --- | --: | --: | --: | --: | --- |",
        *shares,
        "",
        f"{which}, {clips_in_all:,} clips{' and images' if pictures else ''}, on one device like this one: "
        + ", ".join(f"{length(spent)} {name}" for name, spent in days.items()) + ".",
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
