"""From a SIGKILL to training again, and goodput under a kill every N seconds, against Ray's official DeepSpeed pattern.

    python -m benchmarks.recovery [--window 150] [--every 40] [--epoch 100] [--hardware 2cpu]

Writes ``benchmarks/results/recovery_<hardware>_<date>.md``.

Both train the demo's ARVAE (stage frames-3, 64x64) on the same clips with two workers, ZeRO-1, float32, under Ray
Train with the same settings (a health check every 0.5 s). *Ours* is ``moviola train`` with a checkpoint every 10 steps.
*Ray's pattern* is that of Ray's guide to DeepSpeed: ``deepspeed.initialize`` in the training function, at the end of
each epoch ``save_checkpoint`` into a temporary folder and ``ray.train.report``, after a restart ``get_checkpoint`` and
the next epoch; no state of the loader, no random numbers. An epoch takes seconds here; real ones take hours, which
makes the pattern look better than it would.

From the first trained step on, a worker, now one and now the other, is killed every N seconds; at the end of the window
everything is. Of each kill: seconds until a step is trained again, and until the step at which it struck is reached
again. Goodput: steps that are in a checkpoint at the end of the window, times the system's own median seconds of an
undisturbed step, over the window.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines import pack, storage, synthetic

ROOT = Path(__file__).resolve().parent.parent
FAR = 1_000_000
"""Steps of the run: more than fit into any window."""


def settings(shards: str) -> list[str]:
    stages = ("first-frame", "frames-5", "frames-7")
    sets = [f"data={{train: {shards}/train, eval: null}}", "telemetry.log_every=1", "checkpoint.every_steps=10"]
    sets += [f"stages.{stage}.steps=0" for stage in stages]
    return [*sets, f"stages.frames-3.steps={FAR}", "trace=false", "telemetry.tensorboard=false"]


# -- Ray's pattern ----------------------------------------------------------------------------------------------------


def pattern(config: dict[str, Any]) -> None:
    """The training function of Ray's guide, on our model and clips; a line of log.jsonl for each thing it does."""
    import deepspeed
    import ray.train
    import torch

    from pipelines.faults import FaultBudget
    from trainer import engine, loop
    from trainer.manifest import RunManifest

    manifest = RunManifest.model_validate(config["manifest"])
    torch.set_num_threads(1)
    context = ray.train.get_context()

    def say(event: str, **fields: Any) -> None:
        line = {"time": time.time(), "event": event, "rank": context.get_world_rank(), "pid": os.getpid(), **fields}
        storage.append_text(config["log"], json.dumps(line) + "\n")

    say("enter")
    engine.init_distributed(torch.device("cpu"))
    stage = manifest.schedule.stages[0]
    recipe, spec = manifest.loaded_recipe, manifest.optimizer_for(stage)
    module = recipe.build(manifest.seed)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    model, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": manifest.batch // context.get_world_size(),
            "optimizer": {"type": "AdamW", "params": {"lr": spec.lr, "betas": list(spec.betas), "torch_adam": True}},
            "gradient_clipping": spec.clip,
            "zero_optimization": {"stage": manifest.zero.stage},
        },
    )
    epoch, length = 0, config["epoch"]
    saved = ray.train.get_checkpoint()
    if saved is not None:
        with saved.as_directory() as folder:
            model.load_checkpoint(folder)
            epoch = json.loads(Path(folder, "epoch.json").read_text())["epoch"] + 1
    say("loaded", step=epoch * length)
    teachers = recipe.teachers()
    world = loop.World.current(torch.device("cpu"))
    with contextlib.closing(loop.open_loader(manifest, world, FaultBudget())) as clips:
        batches = clips.iter_from(epoch * length)
        while True:
            for _ in range(length):
                step, micro = next(batches)
                for batch in micro:
                    output = recipe.step(model, batch, stage, teachers)
                    model.backward(output.loss * batch.weight * world.size)
                    model.step()
                say("step", step=step)
            with tempfile.TemporaryDirectory() as folder:
                model.save_checkpoint(folder)
                Path(folder, "epoch.json").write_text(json.dumps({"epoch": epoch}))
                torch.distributed.barrier()
                ray.train.report({"epoch": epoch}, checkpoint=ray.train.Checkpoint.from_directory(folder))
            say("saved", step=(epoch + 1) * length)
            epoch += 1


def serve_pattern(folder: str, shards: str, epoch: int) -> None:
    """The driver of Ray's pattern, until it is killed."""
    from cluster import launch
    from trainer import manifest as manifests

    wanted = manifests.load(ROOT / "manifests/demo.yaml", settings(shards))
    with launch.connected_ray(wanted):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        plain = {"manifest": wanted.resolved(), "log": f"{folder}/log.jsonl", "epoch": epoch}
        TorchTrainer(
            pattern,
            train_loop_config=plain,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name="pattern", storage_path=f"{folder}/ray", failure_config=FailureConfig(max_failures=-1)
            ),
        ).fit()


# -- what both did ----------------------------------------------------------------------------------------------------


class Pattern:
    """Ray's pattern in a process, and what its log says."""

    def __init__(self, folder: Path, shards: str, epoch: int) -> None:
        self.log = folder / "log.jsonl"
        self.log.touch()
        command = [sys.executable, "-m", "benchmarks.recovery", "--serve", str(folder), shards, "--epoch", str(epoch)]
        self.process = _start(command, folder)

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of its log."""
        return [json.loads(line) for line in self.log.read_text().split("\n")[:-1]]

    def steps(self) -> list[tuple[float, int]]:
        """(time, step) of rank 0, in order."""
        return [(line["time"], line["step"]) for line in self.lines() if line["event"] == "step" and not line["rank"]]

    def kept(self, at: float) -> int:
        """Steps that a checkpoint held at that time."""
        return max((x["step"] for x in self.lines() if x["event"] == "saved" and x["time"] <= at), default=0)

    def workers(self) -> dict[int, int]:
        """Process by rank."""
        return {line["rank"]: line["pid"] for line in self.lines() if line["event"] == "enter"}

    def causes(self, killed: float, again: float) -> dict[str, float]:
        """Seconds from a kill to the next step, by what they went into."""
        between = [line for line in self.lines() if killed < line["time"] <= again]
        entered = max((x["time"] for x in between if x["event"] == "enter"), default=again)
        loaded = max((x["time"] for x in between if x["event"] == "loaded"), default=again)
        return {"detect and schedule": entered - killed, "load": loaded - entered, "first step": again - loaded}


class Ours:
    """``moviola train`` in a process, and what the run's logs say."""

    def __init__(self, folder: Path, shards: str) -> None:
        self.run = folder / "runs" / "ours"
        command = [sys.executable, "-m", "cluster.cli", "train", str(ROOT / "manifests/demo.yaml")]
        command += ["--runs", str(folder / "runs"), "--name", "ours", "--set", "failure.max_failures=1000"]
        self.process = _start(command + [part for change in settings(shards) for part in ("--set", change)], folder)

    def lines(self, log: str) -> list[dict[str, Any]]:
        """Whole lines of one of the run's logs."""
        path = self.run / f"{log}.jsonl"
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []

    def steps(self) -> list[tuple[float, int]]:
        """(time, step), in order."""
        return [(line["time"], line["step"]) for line in self.lines("metrics")]

    def kept(self, at: float) -> int:
        """Steps that a checkpoint held at that time."""
        return max((e["step"] for e in self.lines("events") if e["event"] == "commit" and e["time"] <= at), default=0)

    def workers(self) -> dict[int, int]:
        """Process by rank."""
        starts = [event for event in self.lines("events") if event["event"] == "start"]
        return {worker["rank"]: worker["pid"] for worker in starts[-1]["workers"]} if starts else {}

    def causes(self, killed: float, again: float) -> dict[str, float]:
        """Seconds from a kill to the next step, by what they went into: the ledger's, with the kill as its begin."""
        before = [line["ledger"] for line in self.lines("metrics") if line["time"] <= killed][-1]["seconds"]
        after = next(line["ledger"] for line in self.lines("metrics") if line["time"] >= again)["seconds"]
        spent = {cause: after[cause] - before[cause] for cause in after if cause.startswith("recovery")}
        restarts = [e["time"] for e in self.lines("events") if e["event"] == "restart" and killed < e["time"] <= again]
        detect = restarts[0] - killed if restarts else spent["recovery_detect"]
        return {
            "detect": detect,
            "schedule": spent["recovery_schedule"],
            "load": spent["recovery_load"],
            "first step": spent["recovery_first_step"],
        }


def _start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"TMPDIR": tempfile.mkdtemp(prefix="m-", dir="/tmp"), "OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=said, stderr=said, start_new_session=True)


def measure(make: Callable[[Path], Any], window: float, every: float) -> dict[str, Any]:
    """One system through its window."""
    with tempfile.TemporaryDirectory(prefix="moviola-recovery-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        system = make(folder)
        try:
            _until(lambda: system.steps(), system, folder, 240)
            begin = system.steps()[0][0]
            kills: list[float] = []
            while time.time() < begin + window:
                due = begin + every * (len(kills) + 1)
                if time.time() >= due and due < begin + window - every / 2:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(system.workers()[len(kills) % 2], signal.SIGKILL)
                    kills.append(time.time())
                time.sleep(0.05)
            steps, end = system.steps(), begin + window
            recovered = []
            for killed in kills:
                reached = max((step for at, step in steps if at <= killed), default=0)
                again = next((at for at, _ in steps if at > killed + 1), None)
                caught = next((at for at, step in steps if at > killed + 1 and step >= reached), None)
                if again is not None:
                    row = {"again": again - killed, "caught": (caught or float("inf")) - killed}
                    recovered.append({**row, "causes": system.causes(killed, again)})
            first = [at for at, _ in steps if at < begin + every]
            seconds = statistics.median(b - a for a, b in pairwise(first))
            kept = system.kept(end)
            return {
                "step_seconds": seconds, "kept": kept, "reached": max((s for _, s in steps), default=-1) + 1,
                "trained": len(steps), "goodput": kept * seconds / window, "kills": recovered,
            }  # fmt: skip
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(system.process.pid, signal.SIGKILL)
            system.process.wait()


def _until(ready: Callable[[], Any], system: Any, folder: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if system.process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"it did not train:\n{(folder / 'said').read_text()}")
        time.sleep(0.1)


def report(found: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "ray"))
    lines = [
        "# From a SIGKILL to training again",
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPUs ({platform.machine()}), Python {platform.python_version()}, "
        f"{versions}.",
        f"`python -m benchmarks.recovery {' '.join(sys.argv[1:])}`",
        "",
        (__doc__ or "").split("\n\n", 3)[3].strip(),
        "",
        f"A window of {args.window:g} s, a kill every {args.every:g} s, an epoch of {args.epoch} steps.",
        "",
        "| system | s a step | steps trained | reached | in a checkpoint | goodput |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for name, one in found.items():
        cells = [name, f"{one['step_seconds']:.3f}", one["trained"], one["reached"], one["kept"]]
        lines.append(f"| {' | '.join(map(str, cells))} | {one['goodput']:.1%} |")
    lines += ["", "Seconds from the SIGKILL, medians with least and greatest (`never`: not within the window):", ""]
    lines += [
        "| system | kills | to the next step | to where it struck | of the first: |",
        "| --- | --: | --: | --: | --- |",
    ]
    for name, one in found.items():
        kills = one["kills"]
        if not kills:
            lines.append(f"| {name} | 0 | never | never | |")
            continue
        causes = {key: statistics.median(kill["causes"][key] for kill in kills) for key in kills[0]["causes"]}
        parts = ", ".join(f"{key} {value:.1f}" for key, value in causes.items())
        cells = [name, str(len(kills)), *(_spread([kill[key] for kill in kills]) for key in ("again", "caught")), parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    def text(value: float) -> str:
        return f"{value:.1f}" if value < float("inf") else "never"

    return f"{text(statistics.median(values))} ({text(min(values))} to {text(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=float, default=150, help="seconds from the first trained step")
    parser.add_argument("--every", type=float, default=40, help="seconds between kills")
    parser.add_argument("--epoch", type=int, default=100, help="steps of an epoch of Ray's pattern")
    parser.add_argument("--hardware", default=f"{os.cpu_count()}cpu")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "SHARDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve_pattern(*args.serve, args.epoch)
        return
    with tempfile.TemporaryDirectory() as folder:
        synthetic.write_videos(Path(folder, "videos"), count=32)
        shards = str(Path(folder, "shards"))
        pack.pack(str(Path(folder, "videos")), shards, pack.load_rules(str(ROOT / "manifests/datasets/demo.yaml")))
        found = {"ours": measure(lambda place: Ours(place, shards), args.window, args.every)}
        print(json.dumps(found["ours"]), flush=True)
        found["Ray's pattern"] = measure(lambda place: Pattern(place, shards, args.epoch), args.window, args.every)
        print(json.dumps(found["Ray's pattern"]), flush=True)
    path = ROOT / "benchmarks/results" / f"recovery_{args.hardware}_{datetime.date.today()}.md"
    path.write_text(report(found, args))
    print(path.read_text())


if __name__ == "__main__":
    main()
