"""The one training loop: init, restore, step, log, commit. The step is the recipe's, what runs it the engine's.

It runs under any launcher that has set up ``torch.distributed`` (Ray Train through ``cluster/worker.py``, torchrun
through ``trainer/__main__.py``), or alone in one process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipelines import index, loader, storage
from pipelines.contracts import derive
from pipelines.faults import FaultBudget, InputError
from trainer import adversary as adversaries
from trainer import checkpoint
from trainer import recipe as recipes
from trainer.blocks.conv import channels_last
from trainer.engine import Engine
from trainer.examine import Examination
from trainer.flops import FlopMeter
from trainer.heartbeat import STEP, Heartbeat
from trainer.manifest import LEAVE_SECONDS, RunManifest
from trainer.run import Outcome, is_done, models_of, remarks, strangers
from trainer.signals import Signals, Wish
from trainer.telemetry import Ledger, Telemetry, heard_last, newest_ledger, of_earlier_commands, read_lines, surviving

LATE_SECONDS = 0.5
"""How long a rank waits for its data before it asks the others what is wished."""


class _Interrupted(Exception):
    """An evaluation was given up, on all ranks before the same clip."""


@dataclass(frozen=True)
class World:
    """Where a process stands in the group."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls, device: torch.device) -> World:
        """The group that torch.distributed knows, or a group of one."""
        if dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seeds Python, NumPy and torch from (seed, step, rank): nothing at a step depends on the steps before it."""
    value = derive(seed, step, f"global/{rank}")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def open_loader(manifest: RunManifest, world: World, budget: FaultBudget) -> loader.Loader:
    """The run's data, refused by name where a dataset is missing, empty, or not the one that the run began with.

    Captions are read for a recipe, or a teacher, that may make something of them.
    """
    data, stages = manifest.data, manifest.schedule.stages
    reads = bool(recipes.caption_width(manifest.loaded_recipe)) or any(stage.teachers for stage in stages)
    opened = {ref.dataset: index.open_dataset(ref.dataset, expect=ref.digest) for ref in (*data.train, *data.images)}
    return loader.Loader(
        datasets=[(opened[ref.dataset], ref.weight) for ref in data.train],
        images=[(opened[ref.dataset], ref.weight) for ref in data.images] or None,
        plan=manifest.schedule.plan,
        steps=manifest.schedule.steps,
        seed=manifest.seed,
        granularity=data.granularity,
        rank=world.rank,
        world=world.size,
        micro_batch=manifest.micro_batch or manifest.batch,
        workers=data.workers,
        read_ahead=data.read_ahead,
        memory_bytes=data.memory_mb << 20,
        timeout_seconds=data.timeout_seconds,
        budget=budget,
        captions=reads,
    )


def train(
    manifest: RunManifest,
    run_url: str,
    world: World,
    *,
    launch: str | None = None,
    on_start: Callable[[Signals], None] | None = None,
) -> Outcome:
    """Trains from the newest committed checkpoint to the end, or to an agreed stop.

    ``launch`` is written into the start event, so that a launcher knows its own attempts. ``on_start`` is given the
    run's ear, to connect signals and notices to it. Returns ``done``, or ``stopped`` with
    a checkpoint after the last trained step committed. Raises InputError for faults of input. The end is idempotent:
    a run that is already whole returns at once.
    """
    events = storage.join(run_url, "events.jsonl")

    def hung(message: str) -> None:
        print(f"moviola: {message}", file=sys.stderr, flush=True)
        record = {"time": time.time(), "event": "hang", "attempt": 0, "rank": world.rank, "message": message}
        storage.append_text(events, json.dumps(record) + "\n")

    heartbeat = Heartbeat(world, manifest.failure.hang_seconds, hung)
    try:
        return _train(manifest, run_url, world, heartbeat, launch, on_start)
    except RuntimeError as error:
        if lost := heartbeat.blame(error):
            raise lost from error
        raise
    finally:
        heartbeat.close()


def _train(
    manifest: RunManifest,
    run_url: str,
    world: World,
    heartbeat: Heartbeat,
    launch: str | None,
    on_start: Callable[[Signals], None] | None,
) -> Outcome:
    torch.set_deterministic_debug_mode("warn")
    schedule, recipe = manifest.schedule, manifest.loaded_recipe
    lease = checkpoint.Lease.take(run_url)
    past = _Past.read(run_url)
    telemetry = Telemetry(
        manifest, run_url, rank=world.rank, world=world.size, attempt=lease.attempt, before=past.counters,
        alone=launch is None,
    )  # fmt: skip

    def warn(text: str) -> None:
        telemetry.event("warning", message=text)
        if world.rank == 0:
            print(f"moviola: warning: {text}", file=sys.stderr, flush=True)

    for saved in checkpoint.candidates(run_url, lease, warn):
        first = saved.step if saved else 0
        if saved and first >= schedule.steps:
            try:
                return _whole(saved, manifest, run_url, world, lease, telemetry, past.go_on(saved))
            except checkpoint.Damaged as error:
                warn(f"{error}. {checkpoint.BACK}")
                continue
        stage = schedule.stage(first)
        engine = Engine(
            recipe.build(manifest.seed), stage, manifest.optimizer_for(stage), zero_stage=manifest.zero.stage,
            precision=manifest.precision, device=world.device, ema_decay=manifest.ema or None,
            channels_last=manifest.channels_last, compile=manifest.compile, timeout=manifest.failure.hang_seconds,
        )  # fmt: skip
        adversary = adversaries.enter(None, manifest, first, world.device)
        kept = adversaries.engines(engine, adversary if adversaries.goes_on(manifest, first) else None)
        if saved is None or saved.restore(kept, warn):
            break
    digest = manifest.digest()
    if saved and saved.state["manifest"] != digest:
        warn(
            f"{storage.redact(saved.url)} was written under another manifest (digest {saved.state['manifest']}, now "
            f"{digest}): manifest.yaml in {storage.redact(run_url)} was changed by hand, or a default is another one "
            "in this version. What comes now is not what the run would have trained."
        )
    ledger = past.go_on(saved)
    everyone = _everyone(world, telemetry.address)
    telemetry.event("start", from_step=first, world=world.size, workers=everyone, launch=launch)
    own = recipe.teachers()
    teachers = _frozen({**own, **models_of(recipe, stage)}, manifest, world)
    saver = checkpoint.Checkpointer(
        run_url, lease, rank=world.rank, world=world.size, keep=manifest.checkpoint.keep,
        timeout=manifest.checkpoint.timeout_seconds, before_commit=telemetry.flush, committed=first or None,
    )  # fmt: skip
    clips = open_loader(manifest, world, telemetry.budget)
    for remark in remarks(manifest) if world.rank == 0 else ():
        warn(remark)
    if saved:
        clips.load_state_dict(saved.state["loader"])
    flops = FlopMeter()
    exam = Examination(manifest, world.device) if manifest.evaluation.every_steps else None
    signals = Signals(run_url, world, lease.hold)
    if on_start is not None:
        on_start(signals)
    outcome: Outcome = "done"
    noticed, owed, seconds = False, False, 0.0
    done = kept_step = first
    since, since_place, since_step = time.monotonic(), schedule.plan(first).place, first

    def margin() -> float:
        """Seconds that leaving takes: a step, a checkpoint, and as much again."""
        return LEAVE_SECONDS + 2 * (seconds + saver.seconds)

    def pace() -> None:
        """Ends an evaluation where the run shall end, or a machine goes."""
        telemetry.alive(done, ledger)
        now = signals.agreed(margin())
        if now.stop or now.leave:
            raise _Interrupted

    def called() -> Wish:
        """What all ranks know before a step: that each has its data, or, while one waits for them, what is wished."""
        heartbeat.at(done, "waiting for data")
        ready: float | None = None
        while True:
            if ready is None and clips.ready(LATE_SECONDS):
                heartbeat.at(done, "waiting for the data of others")
                ready = time.monotonic()
            wish = signals.agreed(margin(), late=ready is None)
            if not wish.late or wish.stop or wish.leave or wish.notice > noticed:
                return wish
            telemetry.alive(done, ledger)
            saver.check()
            _note_commit(saver, ledger, telemetry)
            if ready is not None and time.monotonic() - ready > manifest.failure.hang_seconds:
                raise heartbeat.lost()

    def keep() -> None:
        """Hands over a checkpoint of what is trained, once."""
        nonlocal kept_step
        if kept_step < done:
            heartbeat.at(done, "handing over a checkpoint")
            with ledger.span("checkpoint"):
                state = {"step": done, "stage": stage.name, "loader": clips.state_dict(done)}
                engines = adversaries.engines(engine, adversary)
                saver.save(done, engines, {**state, "ledger": ledger.state(), "manifest": digest})
            kept_step = done

    ledger.ready()
    with telemetry, contextlib.closing(clips), signals:
        places = iter(clips)
        while done < schedule.steps:
            wish = called()
            if wish.stop or wish.leave or wish.notice > noticed:
                keep()
            if wish.stop:
                outcome = "stopped"
                break
            if wish.notice > noticed:
                telemetry.event("notice", step=done, deadline=signals.deadline)
            noticed = wish.notice
            if wish.leave:
                with ledger.span("recovery_schedule"):
                    saver.close()
                    _note_commit(saver, ledger, telemetry)
                    telemetry.event("leave", step=done, ledger=ledger.state())
                    heartbeat.at(done, "waiting to be taken away")
                    signals.hold(manifest.failure.grace_seconds)
                noticed = False
            if wish.leave or wish.late:
                continue

            step, batches = next(places)
            stage = schedule.stage(step)
            spec = manifest.optimizer_for(stage)
            within = step - schedule.first_steps[schedule.index(step)]
            if within == 0:
                heartbeat.at(step, "changing the stage")
                with ledger.span("startup" if step > first else ledger.cause):
                    if step > first:
                        if stage.teachers != schedule.stage(step - 1).teachers:
                            teachers = _frozen({**own, **models_of(recipe, stage)}, manifest, world)
                        engine.next_stage(stage, spec)
                        adversary = adversaries.enter(adversary, manifest, step, world.device)
                    if stage.init_from is not None:
                        weights = checkpoint.load_weights(stage.init_from, ema=None if stage.init_average else False)
                        engine.load(weights)
                        for remark in strangers(stage, weights) if world.rank == 0 else ():
                            warn(remark)
                        del weights
                telemetry.event("stage", step=step, stage=stage.name)
            rate = spec.rate(within, stage.steps)
            seed_everything(manifest.seed, step, world.rank)

            heartbeat.at(step, STEP)
            began = time.monotonic()
            ledger.enter("productive" if step > first else ledger.cause)
            outputs = []
            rival = adversary if adversary and adversary.plays(within) else None
            with flops.step((stage.name, bool(rival), *(tuple(batch.pixels_BCTHW.shape) for batch in batches))):
                for i, batch in enumerate(batches):
                    batch, last = batch.to(world.device), i == len(batches) - 1
                    output = recipe.step(engine.model, batch, stage, teachers)
                    if rival:
                        output = rival.judge(output, batch.weight)
                    engine.backward(output.loss * batch.weight, last=last)
                    if rival:
                        output = rival.learn(output, batch.weight, last)
                    outputs.append((batch.weight, output))
            norm = engine.step(rate, image=schedule.plan(step).stream == "image")
            if rival and math.isfinite(norm) and not math.isfinite(rivals := rival.step(within)):
                norm = rivals
            if not math.isfinite(norm):
                telemetry.event("diverged", step=step, stage=stage.name)
                raise InputError(_diverged(step, stage.name, norm, outputs, batches, saver.committed()))
            telemetry.trained(step, batches, time.monotonic() - began, flops.total)
            telemetry.trace(step, stage.name, batches)
            if step > first:
                ledger.trained(step)

            done = step + 1
            if done % manifest.telemetry.log_every == 0 or done == schedule.steps or done == first + 1:
                means, summed = _reduced(outputs, telemetry.sums(clips.metrics), world)
                record = {"step": step, "stage": stage.name, **means, "lr": rate, "grad_norm": norm}
                plan = schedule.plan(step)
                record["epochs"] = clips.epochs(plan)
                place = plan.place + plan.clips
                now = time.monotonic()
                record["clips_per_second"] = (place - since_place) / max(now - since, 1e-9)
                record["seconds_per_pixel"] = (now - since) / (schedule.work(done) - schedule.work(since_step))
                since, since_place, since_step = now, place, done
                telemetry.log(record, summed, ledger, clips.metrics)
            telemetry.alive(done, ledger)
            seconds = max(seconds, time.monotonic() - began)
            owed = exam is not None and (done % exam.every_steps == 0 or done == schedule.steps)
            if owed or done % manifest.checkpoint.every_steps == 0 or done == schedule.steps:
                keep()
            if exam and owed:
                heartbeat.at(done, "evaluating")
                paused = time.monotonic()
                with ledger.span("evaluation"), contextlib.suppress(_Interrupted):
                    pace()
                    weights = engine.weights(ema=bool(manifest.ema))
                    found = exam.sit(run_url, weights, world, pace, lease.hold)
                    telemetry.evaluated(done, *found)
                    owed = False
                since += time.monotonic() - paused
            saver.check()
            _note_commit(saver, ledger, telemetry)
            ledger.enter("data_wait")
        heartbeat.at(done, "waiting for the last commit")
        with ledger.span("checkpoint"):
            saver.close()
        _note_commit(saver, ledger, telemetry)
    if owed:  # the last evaluation; the next attempt makes up for it
        outcome = "stopped"
    return _finish(outcome, done, telemetry, ledger)


def _frozen(networks: Mapping[str, nn.Module], manifest: RunManifest, world: World) -> nn.ModuleDict:
    frozen = nn.ModuleDict(networks).to(world.device).requires_grad_(False).eval()
    if manifest.channels_last:
        channels_last(frozen)
    return frozen


def _whole(
    saved: checkpoint.Checkpoint,
    manifest: RunManifest,
    run_url: str,
    world: World,
    lease: checkpoint.Lease,
    telemetry: Telemetry,
    ledger: Ledger,
) -> Outcome:
    """Nothing is left to train; the last evaluation may be missing. Raises Damaged where the checkpoint is."""
    with checkpoint.together():
        saved.verify(world.rank, world.size)
    if not is_done(manifest, run_url):
        weights = checkpoint.load_weights(saved.url, ema=bool(manifest.ema))
        exam = Examination(manifest, world.device)
        with ledger.span("evaluation"):
            telemetry.evaluated(saved.step, *exam.sit(run_url, weights, world, hold=lease.hold))
    return _finish("done", saved.step, telemetry, ledger)


def _finish(outcome: Outcome, step: int, telemetry: Telemetry, ledger: Ledger) -> Outcome:
    telemetry.event(outcome, step=step, ledger=ledger.state(stopped=True))
    telemetry.close()
    return outcome


def _note_commit(saver: checkpoint.Checkpointer, ledger: Ledger, telemetry: Telemetry) -> None:
    step = saver.committed()
    if step is not None and step > telemetry.last_commit:
        ledger.commit(step)
        telemetry.committed(step, ledger, saver.bytes, saver.phases)


@dataclass(frozen=True)
class _Past:
    """What the logs of a run say of its time: as the last attempt, or the last command, left it."""

    ledger: dict[str, Any] | None
    launched: float | None
    restarts: list[float]
    counters: dict[str, Any]
    met: float
    """When this attempt's processes had met."""

    @classmethod
    def read(cls, run_url: str) -> _Past:
        met = time.time()
        lines = read_lines(storage.join(run_url, "metrics.jsonl"), tail_bytes=1 << 16)
        events = read_lines(storage.join(run_url, "events.jsonl"))
        launches = [event["time"] for event in events if event["event"] == "launch"]
        last = newest_ledger((*lines, *events, heard_last(run_url, events) or {}))
        last = of_earlier_commands(last, events)
        restarts = [event["time"] for event in events if event["event"] in ("restart", "resize")]
        newest = max(lines, key=lambda line: (line["attempt"], line["time"]), default={})
        return cls(last, max(launches, default=None), restarts, newest.get("counters", {}), met)

    def go_on(self, saved: checkpoint.Checkpoint | None) -> Ledger:
        """The run's ledger, for an attempt that goes on from the checkpoint."""
        last = surviving(self.ledger, saved.state["ledger"], saved.step) if saved else self.ledger
        since = [then for then in self.restarts if last and then > last["time"]]
        return Ledger(last, launched=self.launched, restarted=min(since, default=None), met=self.met)


def _everyone(world: World, address: str) -> list[dict[str, Any]]:
    me = {"rank": world.rank, "host": socket.gethostname(), "pid": os.getpid(), "metrics": address}
    if world.size == 1:
        return [me]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, me)
    return everyone


def _reduced(
    outputs: list[tuple[float, Any]], sums: Mapping[str, float], world: World
) -> tuple[dict[str, Any], dict[str, float]]:
    """Loss, terms and statistics of the global batch, weighted by shares of it; and ``sums``, summed over ranks."""
    names = [("loss", "loss")]
    for kind in ("terms", "statistics"):
        names += [(kind, name) for name in sorted({n for _, output in outputs for n in getattr(output, kind)})]
    total = torch.zeros(len(names) + len(sums), dtype=torch.float64)
    for weight, output in outputs:
        for i, (kind, name) in enumerate(names):
            value = output.loss if kind == "loss" else getattr(output, kind).get(name)
            if value is not None and weight:
                total[i] += weight * float(value.detach())
    total[len(names) :] = torch.tensor([*sums.values()], dtype=torch.float64)
    if world.size > 1:
        total = total.to(world.device)
        dist.all_reduce(total)
    record: dict[str, Any] = {"loss": 0.0, "terms": {}, "statistics": {}}
    values = total.tolist()
    for (kind, name), value in zip(names, values, strict=False):
        if kind == "loss":
            record["loss"] = value
        else:
            record[kind][name] = value
    return record, dict(zip(sums, values[len(names) :], strict=True))


def _diverged(step: int, stage: str, norm: float, outputs: list[Any], batches: list[Any], committed: int | None) -> str:
    terms = {name: float(value) for _, output in outputs for name, value in output.terms.items()}
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    clips = ", ".join(str(source) for batch in batches for source in batch.sources)
    return (
        f"step {step}, stage {stage!r}: the gradient norm is {norm}. Loss terms on this rank: {terms}"
        f"{'; not finite: ' + ', '.join(bad) if bad else ' (all finite here: another rank, or the backward pass)'}. "
        f"Clips: {clips}. The newest committed checkpoint is of step {committed}. Lower optimizer.lr, set "
        "optimizer.clip, train in fp32, or look at these clips; then start again under another name."
    )
