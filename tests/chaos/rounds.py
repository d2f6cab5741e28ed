"""Chaos: a seeded schedule of faults over smoke runs, and what must hold after each.

    python -m tests.chaos.rounds --rounds 50 --seed 1 [--places disk s3 ray]

A round is one run of 16 steps, on two ranks at a ZeRO stage, with two faults drawn from (seed, round): through all of
ARVAE's stages, or through DeCo-VAE's, with other parts frozen in each and an adversary that starts late. *disk* and
*s3* are groups of processes as torchrun starts them, started again by this script; *s3* keeps the run on a real object
store, behind a proxy that can fail; *ray* is the command under a Ray cluster of three nodes. A fault comes a drawn
moment after the attempt began, which may be its start-up, or after a drawn step of it.

After each: the traces show every place of the clip sequence exactly once in the history that survived, the fingerprint
is that of an uninterrupted run, and the ledger's seconds add up to the wall time within 1%.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pipelines import storage, synthetic
from pipelines.pack import pack
from pipelines.rules import Card, PackRules
from tests.chaos.lab import Lab, rivals, smoke
from tests.chaos.nodes import Command, Nodes
from tests.pipelines.faulty import Fault, FaultyProxy
from tests.trainer.processes import Group
from trainer import checkpoint

ROOT = Path(__file__).parents[2]
KINDS = {
    "disk": ("worker", "command", "stop", "zombie", "flip", "cut", "half"),
    "s3": ("store", "failing", "slow", "worker", "command", "zombie", "flip", "half"),
    "ray": ("worker", "controller", "node", "drain", "command", "stop"),
}
"""worker: one rank; command: all of it; stop: SIGTERM; zombie: an attempt stands still, and goes on when another one
trains; flip, cut: the newest checkpoint is damaged after a kill; half: a kill leaves a half-written one; store: the
object store, in the middle of an upload; controller, node, drain: Ray's."""
MODELS = {"arvae": smoke, "decovae": rivals}


class Blow(NamedTuple):
    """One fault: ``kind``, after ``step`` steps of the attempt (None: as it starts) and ``seconds`` more."""

    kind: str
    step: int | None
    seconds: float

    def __str__(self) -> str:
        when = "start" if self.step is None else f"step {self.step}"
        return f"{self.kind} at {when} + {self.seconds:.1f} s"


@dataclass
class Round:
    """A run and what befalls it."""

    number: int
    place: str
    zero: int
    blows: tuple[Blow, ...]
    model: str = "arvae"
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"round-{self.number:03d}"


def schedule(seed: int, rounds: int, places: Sequence[str], blows: int = 2) -> list[Round]:
    """What befalls each round, from the seed alone; every kind of fault of a place comes before one comes again."""
    draw = random.Random(seed)
    decks: dict[str, list[str]] = {place: [] for place in places}
    planned = []
    for number in range(rounds):
        place = places[number % len(places)]
        drawn = []
        for _ in range(blows):
            if not decks[place]:
                decks[place] = draw.sample(KINDS[place], len(KINDS[place]))
            early = draw.random() < 0.25
            step = None if early else draw.randint(1, 5)
            drawn.append(Blow(decks[place].pop(), step, draw.uniform(0, 3.0 if early else 0.5)))
        model = list(MODELS)[number // len(places) % len(MODELS)]
        planned.append(Round(number, place, draw.choice((1, 2, 3)), tuple(drawn), model))
    return planned


class Verdict(NamedTuple):
    """What held. ``imbalance`` is a share of the wall time; ``redone`` clips were trained on again."""

    trace: bool
    fingerprint: bool
    imbalance: float
    attempts: int
    redone: int

    @property
    def good(self) -> bool:
        return self.trace and self.fingerprint and self.imbalance < 0.01


def judge(lab: Lab, name: str, zero: int) -> Verdict:
    history = lab.history(name)
    same = lab.fingerprint(name) == lab.fingerprint(lab.whole(zero))
    attempts = len(lab.events(name, "start"))
    return Verdict(history.exact, same, lab.imbalance(name), attempts, history.redone)


# -- processes, as torchrun starts them -------------------------------------------------------------------------------


def run_processes(lab: Lab, plan: Round, store: Store | None = None) -> None:
    """One attempt for each fault, and one to the end."""
    env = store.env if store else None
    sets = (f"zero.stage={plan.zero}", "checkpoint.timeout_seconds=120", "failure.hang_seconds=20")
    for blow in plan.blows:
        with lab.start(plan.name, *sets, env=env) as group:
            before = len(lab.lines(plan.name))

            def alive(group: Any = group) -> bool:
                return all(process.exitcode is None for process in group.ranks)

            def there(blow: Blow = blow, before: int = before) -> bool:
                return blow.step is None or len(lab.lines(plan.name)) >= before + blow.step

            _await(there, alive)
            time.sleep(blow.seconds)
            late = "" if alive() else " (it had ended)"
            plan.notes.append(f"{blow}{late}")
            if blow.kind in ("store", "failing", "slow"):
                assert store is not None
                store.strike(blow.kind, alive)
            elif blow.kind == "zombie":
                _outlive(lab, plan, group, sets, env)
            elif blow.kind == "stop":
                for process in group.ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGTERM)
                    if blow.step is not None:  # a launcher's signal reaches one rank, and the others learn of it
                        break
                codes = group.wait(120)
                assert codes in ([75, 75], [0, 0]) or blow.step is None, group.said
            else:
                victims = group.ranks[-1:] if blow.kind == "worker" else group.ranks
                for process in victims:
                    process.kill()
            ended = [process.join(180) or process.exitcode for process in group.ranks]
            assert None not in ended, f"a rank outlived its peer:\n{group.said}"
        if not damage(lab.url(plan.name), blow.kind):
            plan.notes[-1] += " (nothing to damage)"
    for _ in range(4):  # an attempt that the storage failed is started again, as any launcher does
        with lab.start(plan.name, *sets, env=env) as group:
            codes = group.wait(240)
            if codes == [0, 0]:
                return
    raise AssertionError(f"{plan.name} ended with {codes}:\n{group.said}")


def _outlive(lab: Lab, plan: Round, old: Group, sets: Sequence[str], env: Mapping[str, str] | None) -> None:
    """Another attempt trains while the old one, believed dead, goes on. The old one ends by itself; both are over."""

    def signalled(number: int) -> None:
        for process in old.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    signalled(signal.SIGSTOP)
    before = len(lab.lines(plan.name))
    with lab.start(plan.name, *sets, env=env) as heir:
        alive = lambda: all(process.exitcode is None for process in heir.ranks)  # noqa: E731
        _await(lambda: len(lab.lines(plan.name)) >= before + 2, alive)
        signalled(signal.SIGCONT)
        codes = old.wait(120)
        assert set(codes) <= {0, 1}, f"{codes}:\n{old.said}"


def _await(ready: Callable[[], bool], alive: Callable[[], bool], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while alive() and time.monotonic() < deadline and not ready():
        time.sleep(0.1)


def damage(run_url: str, kind: str) -> bool:
    """What a bad disk leaves of the newest checkpoint, or a death of one being written; False if there was none yet."""
    if kind not in ("flip", "cut", "half"):
        return True
    step = checkpoint.newest_step(run_url)
    if step is None or (kind != "half" and not _older(run_url, step)):
        return False
    newest = storage.join(run_url, f"checkpoints/step-{step:08d}")
    files = sorted(entry.name for entry in storage.list_dir(newest) if entry.name.endswith(".safetensors"))
    victim = storage.join(newest, files[step % len(files)])
    if kind in ("flip", "cut"):
        data = bytearray(storage.read_bytes(victim))
        data[len(data) // 2] ^= 1
        storage.write_bytes(victim, bytes(data if kind == "flip" else data[: len(data) // 2]))
    else:
        later = storage.join(run_url, f"checkpoints/step-{step + 1:08d}")
        for name in [*files, "manifest.json"]:
            data = storage.read_bytes(storage.join(newest, name))
            storage.write_bytes(storage.join(later, name), data[: len(data) // 2])
    return True


def _older(run_url: str, step: int) -> bool:
    """Whether an older checkpoint is whole: a run whose only one is damaged stops, and says so."""
    entries = storage.list_dir(storage.join(run_url, "checkpoints"))
    older = [entry.name for entry in entries if entry.name < f"step-{step:08d}"]
    return any(storage.exists(storage.join(run_url, "checkpoints", name, "COMMITTED")) for name in older)


# -- the object store -------------------------------------------------------------------------------------------------


class SlowProxy(FaultyProxy):
    """Can also answer late."""

    late = 0.0

    def _forward(self, request: bytes) -> bytes:
        self.closed.wait(self.late)
        return super()._forward(request)


class Store:
    """An object store behind a proxy; ``kill`` ends it with SIGKILL and ``restart`` brings it back."""

    def __init__(
        self,
        endpoint: str,
        keys: Mapping[str, str],
        kill: Callable[[], None] = lambda: None,
        restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._proxy = SlowProxy(endpoint)
        self._kill, self._restart = kill, restart
        self.env = {**keys, "MOVIOLA_S3_ENDPOINT": self._proxy.url}

    def strike(self, kind: str, alive: Callable[[], bool]) -> None:
        """One of the faults of storage; returns when it is over."""
        if kind == "slow":
            self._proxy.late = 0.3
            _await(lambda: False, alive, 6)
            self._proxy.late = 0.0
        elif kind == "failing":
            for _ in range(4):
                self._proxy.faults += [Fault("status", 503), Fault("reset"), Fault("lose", on="PUT"), Fault("reset")]
            _await(lambda: not self._proxy.faults, alive, 30)
            self._proxy.faults.clear()
        else:
            seen = len(self._proxy.requests)
            _await(lambda: any("safetensors" in r and "PUT" in r for r in self._proxy.requests[seen:]), alive, 30)
            self._kill()
            self._restart()

    def close(self) -> None:
        self._proxy.close()


@contextlib.contextmanager
def ceph() -> Iterator[Store]:
    """``scripts/object_store.sh`` with a folder and ports of its own; this process's clients reach it too."""
    folder = tempfile.mkdtemp(prefix="moviola-chaos-", dir="/tmp")
    script = ROOT / "scripts" / "object_store.sh"
    port = 20000 + os.getpid() % 20000
    env = os.environ | {"MOVIOLA_STORE_DIR": f"{folder}/data", "MOVIOLA_STORE_PORT": str(port)}

    def call(verb: str) -> str:
        return subprocess.run([script, verb], env=env, capture_output=True, text=True, check=True, timeout=300).stdout

    call("fetch")
    try:
        call("up")
        keys = dict(line.removeprefix("export ").split("=", 1) for line in call("env").splitlines())
        store = Store(keys["MOVIOLA_S3_ENDPOINT"], keys, lambda: call("kill9"), lambda: call("restart"))
        before = {key: os.environ.get(key) for key in keys}
        os.environ.update(keys)
        storage._stores.clear()
        try:
            yield store
        finally:
            store.close()
            for key, value in before.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)
    finally:
        subprocess.run([script, "down"], env=env, timeout=120)
        shutil.rmtree(folder, ignore_errors=True)


# -- Ray --------------------------------------------------------------------------------------------------------------


def run_ray(lab: Lab, plan: Round, nodes: Nodes) -> None:
    """The command on a cluster; it is started again where it was killed or stopped."""
    sets = (f"zero.stage={plan.zero}", "failure.grace_seconds=10")
    command = _command(lab, plan, sets, nodes)
    try:
        for blow in plan.blows:
            before = len(lab.lines(plan.name))

            def there(blow: Blow = blow, before: int = before) -> bool:
                return blow.step is None or len(lab.lines(plan.name)) >= before + blow.step

            _await(there, lambda command=command: command.alive)
            time.sleep(blow.seconds)
            plan.notes.append(f"{blow}{'' if command.alive else ' (it had ended)'}")
            if blow.kind == "command":
                command.kill()
            elif blow.kind == "stop":
                command.process.send_signal(signal.SIGTERM)
                assert command.wait() in (0, 75), command.said
            elif command.alive:
                _strike(lab, plan, blow.kind, nodes)
            if not command.alive:
                command = _command(lab, plan, sets, nodes)
        assert command.wait(300) == 0, command.said
    finally:
        if command.alive:
            command.kill()


def _command(lab: Lab, plan: Round, sets: Sequence[str], nodes: Nodes) -> Command:
    arguments = ["train", *lab.arguments(plan.name, *sets)]
    return Command(arguments, lab.folder / f"{plan.name}.log", {"RAY_ADDRESS": nodes.address})


def _strike(lab: Lab, plan: Round, kind: str, nodes: Nodes) -> None:
    starts = lab.events(plan.name, "start")
    workers = [worker["pid"] for worker in starts[-1]["workers"]] if starts else []
    if kind == "worker":
        for pid in workers[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    elif kind == "controller":
        for pid in nodes.processes("ray::TrainController"):
            os.kill(pid, signal.SIGKILL)
    else:
        node = nodes.nodes[0]
        (nodes.kill if kind == "node" else lambda node: nodes.drain(node, 6))(node)
        nodes.add()


# -- the whole --------------------------------------------------------------------------------------------------------


def dataset(folder: Path) -> Path:
    """12 clips of 16 procedural frames, 32x32, in two shards."""
    synthetic.write_videos(folder / "videos", count=6, seconds=4 / 3, size=(32, 32), seed=1)
    rules = PackRules(
        card=Card(name="chaos"), frames=16, least_frames=16, cuts=False, size=(32, 32), preset="ultrafast",
        shard_clips=8,
    )  # fmt: skip
    pack(folder / "videos", folder / "shards", rules, workers=2)
    return folder / "shards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--places", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="moviola-chaos-", dir="/tmp"))
    good = 0
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(ceph()) if "s3" in args.places else None
        data = str(dataset(folder))
        labs: dict[tuple[str, str], Lab] = {}
        for place, (model, plain) in product(args.places, MODELS.items()):
            runs = f"s3://moviola/chaos/{model}" if place == "s3" else None
            labs[place, model] = Lab(folder / f"{place}-{model}", plain(data, steps=4), runs)
        nodes = stack.enter_context(Nodes(2)) if "ray" in args.places else None
        print(
            "| round | place | model | ZeRO | faults | attempts | clips again | trace | fingerprint | ledger off | s |"
        )
        print("|--:|---|---|--:|---|--:|--:|---|---|--:|--:|", flush=True)
        planned = schedule(args.seed, args.rounds, args.places)
        for plan in planned:
            lab = labs[plan.place, plan.model]
            began = time.monotonic()
            lab.whole(plan.zero)
            whole = time.monotonic() - began
            try:
                if plan.place == "ray":
                    assert nodes is not None
                    run_ray(lab, plan, nodes)
                else:
                    run_processes(lab, plan, store if plan.place == "s3" else None)
                verdict = judge(lab, plan.name, plan.zero)
            except Exception as error:
                head = f"{plan.number} | {plan.place} | {plan.model} | {plan.zero} | {'; '.join(plan.notes)}"
                print(f"| {head} | FAILED: {error!r} |", flush=True)
                continue
            good += verdict.good
            said = ["exact" if verdict.trace else "NOT EXACT", "same" if verdict.fingerprint else "DIFFERS"]
            cells = [plan.number, plan.place, plan.model, plan.zero, "; ".join(plan.notes)]
            cells += [verdict.attempts, verdict.redone, *said]
            seconds = time.monotonic() - began - whole
            print(f"| {' | '.join(map(str, cells))} | {verdict.imbalance:.2%} | {seconds:.0f} |", flush=True)
    print(f"\n{good} of {args.rounds} rounds hold (seed {args.seed})")
    if good == args.rounds:
        shutil.rmtree(folder, ignore_errors=True)
        return 0
    print(f"the runs are in {folder}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
