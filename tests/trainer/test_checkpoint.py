from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipelines import storage
from pipelines.faults import InputError
from tests.trainer import processes, toy
from tests.trainer.ranks import on_ranks
from tests.trainer.test_engine import train
from trainer import checkpoint
from trainer import engine as engines
from trainer.checkpoint import Checkpoint, Checkpointer, Damaged, Fenced, Lease, Piece, Snapshot
from trainer.engine import Engine
from trainer.run import _pin_weights
from trainer.signals import Signals

BORDER = 3


def attempt(
    run_url: str, zero_stage: int, until: int, saves: tuple[int, ...], rank: int, world: int, start: int | None = None
) -> dict[str, Any]:
    """One attempt at a run: on from its newest checkpoint (or from ``start`` of another run) to step ``until``."""
    lease = Lease.take(run_url)
    warnings: list[str] = []
    for reader in checkpoint.candidates(run_url, lease, warnings.append):
        first = reader.step if reader else 0
        engine, noise = build(zero_stage, first)
        if reader is None or reader.restore({"model": engine, "noise": noise}, warnings.append):
            break
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    lecam = torch.zeros(2)
    if reader is not None:
        lecam = reader.tensors()["noise/lecam"]
        if (rng := reader.rng(rank)) and reader.world == world:
            checkpoint.set_rng(rng)
    saver = Checkpointer(run_url, lease, rank=rank, world=world, keep=9, timeout=60)
    losses = []
    for step in range(first, until):
        if step != first and toy.stage_of(step) is not toy.stage_of(step - 1):
            engine.next_stage(toy.stage_of(step), toy.SPEC)
        losses.append(train(engine, step)[0])
        draw = torch.randn(2, 4) * random.random() * float(np.random.rand())
        noise.backward(noise.model(draw).square().mean() / world)
        noise.step(0.01)
        lecam += step
        if step + 1 in saves:
            saver.save(step + 1, {"model": engine, "noise": noise}, {"loader": step + 1}, {"noise/lecam": lecam})
    saver.close()
    return {"losses": losses, "weights": engine.weights(), "warnings": warnings, "first": first}


def build(zero_stage: int, step: int) -> tuple[Engine, Engine]:
    engines.PERSISTENT = 14  # ZeRO-3 keeps the biases gathered and lets go of the weights
    engine = Engine(toy.Toy(), toy.stage_of(step), toy.SPEC, zero_stage=zero_stage, ema_decay=toy.DECAY, timeout=60)
    torch.manual_seed(3)
    return engine, Engine(nn.Linear(4, 3), toy.STAGES[-1], toy.SPEC, zero_stage=zero_stage)


def copy_run(source: str, target: str, steps: tuple[int, ...]) -> str:
    """A run that holds some of another's checkpoints, as if it had been killed after the last of them."""
    for step in steps:
        name = f"checkpoints/step-{step:08d}"
        shutil.copytree(Path(source, name), Path(target, name))
    return target


def alone(rank: int, world: int, root: str) -> dict[str, Any]:
    """World 1: a whole run at each ZeRO stage."""
    return {
        f"zero{zero}": attempt(f"{root}/one-zero{zero}", zero, toy.STEPS, (5, 10), rank, world) for zero in range(4)
    }


def pair(rank: int, world: int, root: str) -> dict[str, Any]:
    """World 2: whole runs, resumed ones, conversions from world 1 and from other ZeRO stages."""
    results: dict[str, Any] = {}
    for zero in range(4):
        whole = f"{root}/two-zero{zero}"
        results[f"whole{zero}"] = attempt(whole, zero, toy.STEPS, (BORDER, 5, 10), rank, world)
    for zero in range(4):
        for cut in (BORDER, 5):
            resumed = f"{root}/two-zero{zero}-from{cut}"
            if rank == 0:
                copy_run(f"{root}/two-zero{zero}", resumed, (cut,))
            torch.distributed.barrier()
            results[f"resumed{zero}-{cut}"] = attempt(resumed, zero, toy.STEPS, (10,), rank, world)
    damaged = f"{root}/damaged"
    if rank == 0:
        copy_run(f"{root}/two-zero3", damaged, (BORDER, 5))
        harm(Path(damaged, "checkpoints/step-00000005/rank-00001.a1.safetensors"))
    torch.distributed.barrier()
    results["damaged"] = attempt(damaged, 3, toy.STEPS, (10,), rank, world)
    for zero in range(4):
        for name, source in (("one", f"one-zero{(zero + 1) % 4}"), ("two", f"two-zero{(zero + 1) % 4}")):
            target = f"{root}/from-{name}-to-two-zero{zero}"
            if rank == 0:
                copy_run(f"{root}/{source}", target, (5,))
            torch.distributed.barrier()
            resave(f"{root}/{source}", f"{target}-as-is", zero, rank, world)
            results[f"from-{name}-{zero}"] = attempt(target, zero, toy.STEPS, (), rank, world)
    return results


def harm(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def resave(source: str, target: str, zero_stage: int, rank: int, world: int) -> None:
    """Reads step 5 of one run and saves it, untouched, as another: under this world size and ZeRO stage."""
    engine, noise = build(zero_stage, 5)
    reader = Checkpoint(f"{source}/checkpoints/step-00000005")
    assert reader.restore({"model": engine, "noise": noise}, print)
    saver = Checkpointer(target, Lease.take(target), rank=rank, world=world, timeout=60)
    saver.save(5, {"model": engine, "noise": noise}, reader.state, reader.tensors())
    saver.close()


def shrink(rank: int, world: int, root: str) -> dict[str, Any]:
    """World 1 again: what world 2 saved."""
    results = {}
    for zero in range(4):
        source, target = f"{root}/two-zero{(zero + 1) % 4}", f"{root}/from-two-to-one-zero{zero}"
        resave(source, f"{target}-as-is", zero, rank, world)
        copy_run(source, target, (5,))
        results[f"from-two-{zero}"] = attempt(target, zero, toy.STEPS, (), rank, world)
    return results


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one(root: str) -> dict[str, Any]:
    return on_ranks(1, alone, root)[0]


@pytest.fixture(scope="module")
def two(root: str, one: Any) -> list[dict[str, Any]]:
    return on_ranks(2, pair, root)


@pytest.fixture(scope="module")
def shrunk(root: str, two: Any) -> dict[str, Any]:
    return on_ranks(1, shrink, root)[0]


@pytest.mark.parametrize("cut", [BORDER, 5])
@pytest.mark.parametrize("zero", range(4))
def test_resumed_run_is_bit_identical(root: str, two: Any, zero: int, cut: int) -> None:
    for rank in two:
        whole, resumed = rank[f"whole{zero}"], rank[f"resumed{zero}-{cut}"]
        assert resumed["first"] == cut
        assert resumed["losses"] == whole["losses"][cut:]
        assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())
    prints = checkpoint.fingerprint(f"{root}/two-zero{zero}")
    assert checkpoint.fingerprint(f"{root}/two-zero{zero}-from{cut}") == prints
    assert None not in prints.values()


@pytest.mark.parametrize("zero", range(4))
def test_state_is_the_same_bits_at_any_sharding(root: str, shrunk: Any, zero: int) -> None:
    for source, target in (
        (f"one-zero{(zero + 1) % 4}", f"from-one-to-two-zero{zero}-as-is"),
        (f"two-zero{(zero + 1) % 4}", f"from-two-to-two-zero{zero}-as-is"),
        (f"two-zero{(zero + 1) % 4}", f"from-two-to-one-zero{zero}-as-is"),
    ):
        stored = checkpoint.fingerprint(f"{root}/{source}/checkpoints/step-00000005")
        converted = checkpoint.fingerprint(f"{root}/{target}")
        assert {**stored, "rng": None} == {**converted, "rng": None}


@pytest.mark.parametrize("zero", range(4))
def test_training_goes_on_at_another_world_size(one: Any, two: Any, shrunk: Any, zero: int) -> None:
    fixed = two[0]["whole0"]
    for run in (two[0][f"from-one-{zero}"], two[0][f"from-two-{zero}"], shrunk[f"from-two-{zero}"]):
        for name, value in fixed["weights"].items():
            if name != "forwards":
                torch.testing.assert_close(run["weights"][name], value, rtol=0, atol=2e-6)
    summed = [sum(parts) for parts in zip(*(rank["whole0"]["losses"] for rank in two), strict=True)]
    assert shrunk[f"from-two-{zero}"]["losses"] == pytest.approx(summed[5:], abs=1e-6)


def test_what_one_rank_finds_damaged_all_leave(root: str, two: Any) -> None:
    for rank in two:
        assert rank["damaged"]["first"] == BORDER
        assert len(rank["damaged"]["warnings"]) == 1
        assert "rank-00001.a1.safetensors is not what was written" in rank["damaged"]["warnings"][0]
        assert rank["damaged"]["losses"] == rank["whole3"]["losses"][BORDER:]
    assert checkpoint.fingerprint(f"{root}/damaged") == checkpoint.fingerprint(f"{root}/two-zero3")


def test_weights_load_without_a_process_group(root: str, two: Any) -> None:
    url = f"{root}/two-zero3"
    weights = checkpoint.load_weights(url)
    assert all(torch.equal(weights[name], value) for name, value in two[0]["whole3"]["weights"].items())
    model = toy.Toy(seed=7)
    checkpoint.assign(model, checkpoint.load_weights(url, ema=True))
    assert not torch.equal(model.enc.weight, weights["enc.weight"])
    with pytest.raises(InputError, match=r"2 names or shapes differ, first other\.weight, weight"):
        checkpoint.assign(nn.Linear(2, 2, bias=False), {"other.weight": torch.zeros(1)})
    with pytest.raises(InputError, match="keeps no average"):
        checkpoint.load_weights(url, ema=True, engine="noise")
    for engine, ema in (("model", True), ("noise", False)):
        given = checkpoint.load_weights(url, ema=None, engine=engine)
        assert all(map(torch.equal, given.values(), checkpoint.load_weights(url, ema=ema, engine=engine).values()))


def test_files_are_safetensors(root: str, one: Any) -> None:
    file = Path(root, "one-zero0/checkpoints/step-00000010/rank-00000.a1.safetensors")
    tensors = safetensors.torch.load_file(file)
    assert torch.equal(tensors["model/weight/enc.weight@0"], one["zero0"]["weights"]["enc.weight"].reshape(-1))
    assert tensors["model/buffer/forwards"].item() == 20


def test_rank_reads_its_own_part_and_little_more(root: str, two: Any) -> None:
    reader = Checkpoint(f"{root}/two-zero1/checkpoints/step-00000010")
    other, mine = (reader.manifest["files"][f"rank-0000{rank}.a1.safetensors"] for rank in (0, 1))
    before = storage.counters.snapshot()["bytes_read"]
    own = [
        Piece("weight", key.removeprefix("model/weight/"), start, torch.empty(numel))
        for key, pieces in reader._index.items()
        for start, numel, file, _ in pieces
        if key.startswith("model/weight/") and file.startswith("rank-00001")
    ]
    reader["model"].fill(own)
    headers = mine["header"]["bytes"] + other["header"]["bytes"]
    assert storage.counters.snapshot()["bytes_read"] - before == mine["bytes"] + headers
    assert other["header"]["bytes"] < other["bytes"] / 2


# -- one process, an engine of plain tensors ----------------------------------------------------------------------


class Plain:
    """Stands for an engine of one rank: ``numbers`` are all it has."""

    def __init__(self, value: float, numel: int = 10) -> None:
        self.numbers = torch.full((numel,), float(value))

    def snapshot(self) -> Snapshot:
        meta = {"world": 1, "ema_decay": None, "parameters": {"x": {"shape": [len(self.numbers)], "step": None}}}
        snapshot = Snapshot(meta, {"weight/x@0": self.numbers.clone()})
        snapshot._done.set()
        return snapshot

    def restore(self, state: checkpoint.EngineState) -> None:
        state.fill([Piece("weight", "x", 0, self.numbers)])


def commit(run_url: str, steps: tuple[int, ...], keep: int = 3, lease: Lease | None = None) -> Lease:
    lease = lease or Lease.take(run_url)
    saver = Checkpointer(run_url, lease, keep=keep, timeout=10)
    for step in steps:
        saver.save(step, {"model": Plain(step)}, {"at": step})
    saver.close()
    assert saver.committed() == steps[-1]
    return lease


def resume(run_url: str) -> tuple[int, float, list[str]]:
    warnings: list[str] = []
    engine = Plain(0)
    for reader in checkpoint.candidates(run_url, Lease.take(run_url), warnings.append):
        if reader is None or reader.restore({"model": engine}, warnings.append):
            break
    return reader.step if reader else 0, float(engine.numbers[0]), warnings


def folder(run_url: str, step: int) -> Path:
    return Path(run_url, f"checkpoints/step-{step:08d}")


@pytest.fixture
def run_url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_newest_are_kept_and_the_rest_removed(run_url: str) -> None:
    commit(run_url, (1, 2, 3, 4, 5), keep=2)
    assert [path.name for path in sorted(Path(run_url, "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]
    assert checkpoint.newest_step(run_url) == 5
    newest = checkpoint.newest(run_url)
    assert newest is not None and newest.state == {"at": 5}
    newest.verify()


def test_empty_run_has_nothing(run_url: str) -> None:
    assert checkpoint.newest(run_url) is None
    assert checkpoint.newest_step(run_url) is None
    assert resume(run_url) == (0, 0.0, [])
    with pytest.raises(InputError, match="holds no committed checkpoint") as error:
        checkpoint.load_weights(run_url)
    assert error.value.status == 2


def test_old_checkpoint_stays_until_a_newer_one_is_committed(run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = commit(run_url, (1,), keep=1)
    seen = []
    delete = storage.delete

    def watched(url: str, *rest: Any, **options: Any) -> None:
        seen.append(Path(folder(run_url, 2), "COMMITTED").exists())
        delete(url, *rest, **options)

    monkeypatch.setattr(storage, "delete", watched)
    commit(run_url, (2,), keep=1, lease=lease)
    assert seen and all(seen)


def test_older_attempt_is_fenced(run_url: str) -> None:
    old = commit(run_url, (1,))
    stale = Checkpointer(run_url, old, timeout=10)
    new = commit(run_url, (2,), keep=1)
    before = {path: path.stat().st_mtime_ns for path in Path(run_url).rglob("*") if path.is_file()}
    stale.save(2, {"model": Plain(-1)}, {})
    with pytest.raises(
        Fenced, match=r"attempt 1 at .*run \(this process\) was replaced by attempt 2 on .*can't commit"
    ):
        stale.close()
    stale.save(9, {"model": Plain(-1)}, {})
    with pytest.raises(Fenced):
        stale.close()
    with pytest.raises(Fenced):
        old.forget(2)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert checkpoint.newest_step(run_url) == 2
    assert resume(run_url) == (2, 2.0, [])
    assert not folder(run_url, 9).exists()
    assert new.attempt == 2


def test_an_attempt_that_is_replaced_while_it_takes_stock_removes_nothing(
    run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(run_url, (1,))
    old, begun = Lease.take(run_url), folder(run_url, 2) / "rank-00000.a3.safetensors"
    look = storage.list_dir

    def late(url: str) -> list[storage.Entry]:
        if not begun.exists():
            assert Lease.take(run_url).attempt == 3
            storage.write_bytes(str(begun), b"of the new attempt, which has not committed it yet")
        return look(url)

    monkeypatch.setattr(storage, "list_dir", late)
    with pytest.raises(Fenced, match="replaced by attempt 3"):
        list(checkpoint.candidates(run_url, old, lambda text: None))
    assert begun.exists()


def test_an_attempt_that_is_replaced_just_after_its_commit_marks_and_deletes_nothing(
    run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = commit(run_url, (1,), keep=1)
    register = Lease.register

    def late(lease: Lease, *args: Any) -> list[int]:
        dropped = register(lease, *args)
        assert Lease.take(run_url).attempt == 2
        return dropped

    saver = Checkpointer(run_url, old, keep=1, timeout=10)
    with monkeypatch.context() as patch:
        patch.setattr(Lease, "register", late)
        saver.save(2, {"model": Plain(2)}, {})
        with pytest.raises(Fenced, match="replaced by attempt 2"):
            saver.close()
    assert (folder(run_url, 1) / "COMMITTED").exists() and not (folder(run_url, 2) / "COMMITTED").exists()
    assert resume(run_url) == (2, 2.0, []), "it counts, so the new attempt marks it"


def test_an_attempt_that_stands_still_within_a_deletion_deletes_nothing_of_a_newer_one(
    run_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = commit(run_url, (1, 2))
    saver, delete, newer = Checkpointer(run_url, lease, keep=1, timeout=10), storage.delete, []

    def late(url: str, *rest: Any, **options: Any) -> None:
        if not newer:  # the old attempt holds the lease no longer, and is about to delete step 1
            newer.append(Lease.take(run_url))
            shutil.rmtree(folder(run_url, 1))
            commit(run_url, (1,), keep=9, lease=newer[0])
        delete(url, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", late)
        saver.save(3, {"model": Plain(3)}, {})
        with pytest.raises(Fenced, match="replaced by attempt 2"):
            saver.close()
    Checkpoint(str(folder(run_url, 1))).verify()


def test_an_attempt_that_was_replaced_ends_between_commits_too(run_url: str) -> None:
    old, until = Lease.take(run_url), time.monotonic() + 10
    with Signals(run_url, SimpleNamespace(rank=0, size=1), old.hold) as signals:
        assert not any(signals.agreed(0.0))
        Lease.take(run_url)
        with pytest.raises(Fenced, match="replaced by attempt 2"):
            while time.monotonic() < until:
                signals.agreed(0.0)
                time.sleep(0.02)


@pytest.mark.parametrize("answer", ["ignored", "refused"])
def test_storage_without_conditional_writes_fences_less_and_says_so(
    run_url: str, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    class Weak:
        def __getattr__(self, name: str) -> Any:
            return getattr(storage, name)

        def is_remote(self, url: str) -> bool:
            return True

        def swap(self, url: str, data: bytes, expected: str | None) -> str | None:
            if answer == "refused":
                raise InputError(f"can't write {url}: a header implies functionality that is not implemented")
            storage.write_bytes(url, data)
            return "1"

        def put_if_absent(self, url: str, data: bytes) -> bool:
            return self.swap(url, data, None) is not None

    assert Lease.take(f"{run_url}-sound").weakness is None
    monkeypatch.setattr("trainer.lease.storage", Weak())
    old = Lease.take(run_url)
    assert "without conditional writes" in str(old.weakness)
    old.register(1, "a", keep=3)
    new = Lease.take(run_url)
    assert (new.attempt, [commit.step for commit in new.commits()]) == (2, [1])
    with pytest.raises(Fenced):
        old.register(2, "b", keep=3)
    assert [path.name for path in Path(run_url).iterdir()] == ["lease.json"]
    (told,) = resume(f"{run_url}-fresh")[2]
    assert told.startswith(f"{run_url}-fresh is on storage without conditional writes"), "the run's log says it"


def test_racing_attempts_get_different_numbers(run_url: str) -> None:
    taken: list[int] = []
    threads = [threading.Thread(target=lambda: taken.append(Lease.take(run_url).attempt)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))


def test_file_that_is_no_lease_is_named(run_url: str) -> None:
    Lease.take(run_url)
    Path(run_url, "lease.json").write_text("{}")
    with pytest.raises(InputError, match=r"lease\.json is not a lease .*remove it"):
        Lease.take(run_url)


@pytest.mark.parametrize("how", ["flip", "cut", "lose", "state", "rng", "manifest", "marker", "step"])
def test_damaged_newest_falls_back_with_a_warning(run_url: str, how: str) -> None:
    commit(run_url, (1, 2))
    here = folder(run_url, 2)
    file = here / "rank-00000.a1.safetensors"
    if how == "flip":
        harm(file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "lose":
        file.unlink()
    elif how == "step":
        (here / "COMMITTED").write_text((here / "COMMITTED").read_text().replace('"step": 2', '"step": 1'))
    elif how == "rng":
        harm(here / "rank-00000.a1.json")
    else:
        name = {"state": "state.a1.json", "manifest": "manifest.json", "marker": "COMMITTED"}[how]
        (here / name).write_text((here / name).read_text()[:-5])
    warnings: list[str] = []
    if how != "rng":
        assert checkpoint.load_weights(run_url, warn=warnings.append)["x"][0] == 1
        assert len(warnings) == 1 and "step-00000002 is damaged" in warnings[0]
    step, value, told = resume(run_url)
    assert (step, value) == (1, 1.0)
    assert len(told) == 1
    assert told[0].endswith("Going back to the checkpoint before it; the steps since then are trained again.")
    with pytest.raises(InputError):
        checkpoint.load_weights(str(here))
    commit(run_url, (2,))
    assert resume(run_url) == (2, 2.0, [])


def test_a_stage_that_takes_an_older_checkpoint_of_another_run_says_so(
    run_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(run_url, (1, 2))
    assert _pin_weights("init_from", run_url, None) == str(folder(run_url, 2)) and capsys.readouterr().err == ""
    Path(folder(run_url, 2), "manifest.json").write_text("{}")
    assert _pin_weights("init_from", run_url, None) == str(folder(run_url, 1))
    said = capsys.readouterr().err
    assert f"warning: {folder(run_url, 2)} is damaged" in said and "Taking the checkpoint before it" in said


def test_run_whose_every_checkpoint_is_damaged_does_not_start_again(run_url: str) -> None:
    commit(run_url, (1, 2))
    for step in (1, 2):
        (folder(run_url, step) / "rank-00000.a1.safetensors").unlink()
    with pytest.raises(InputError, match=r"every committed checkpoint of .* is damaged \(steps \[1, 2\]\)"):
        resume(run_url)


@pytest.mark.parametrize("missing", [("COMMITTED",), ("COMMITTED", "manifest.json")])
def test_registered_commit_is_completed_by_the_next_attempt(run_url: str, missing: tuple[str, ...]) -> None:
    commit(run_url, (1, 2))
    for name in missing:
        (folder(run_url, 2) / name).unlink()
    assert checkpoint.newest_step(run_url) == 1
    assert resume(run_url) == (2, 2.0, [])
    assert checkpoint.newest_step(run_url) == 2


@pytest.mark.parametrize("missing", [("COMMITTED", "manifest.json", "manifest.a1.json"), None])
def test_committed_checkpoint_that_is_gone_is_not_passed_over_in_silence(
    run_url: str, missing: tuple[str, ...] | None
) -> None:
    def lose(step: int) -> None:
        for name in missing or ():
            (folder(run_url, step) / name).unlink()
        if missing is None:
            shutil.rmtree(folder(run_url, step))

    commit(run_url, (1, 2))
    lose(2)
    step, value, warnings = resume(run_url)
    assert (step, value) == (1, 1.0)
    assert len(warnings) == 1 and "step-00000002 is damaged: it was committed, and COMMITTED is gone" in warnings[0]
    assert resume(run_url) == (1, 1.0, []), "it is said once"
    lose(1)
    with pytest.raises(InputError, match=r"every committed checkpoint of .* is damaged \(steps \[1\]\)"):
        resume(run_url)


def test_lost_lease_counts_what_is_on_storage(run_url: str) -> None:
    commit(run_url, (1, 2))
    Path(run_url, "lease.json").unlink()
    assert resume(run_url) == (2, 2.0, [])
    assert [entry["step"] for entry in json.loads(Path(run_url, "lease.json").read_text())["commits"]] == [1, 2]


def commit_and_die(run_url: str, stop: str) -> None:
    """Commits step 2, up to the write of an object with ``stop`` in its name: there SIGKILL comes."""

    def fatal(name: str) -> None:
        original = getattr(storage, name)

        def write(url: str, *rest: Any) -> Any:
            if stop in url.rpartition("/")[2] and not (stop == "lease" and b'"step": 2' not in rest[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(url, *rest)

        setattr(storage, name, write)

    for name in ("writer", "write_bytes", "swap", "put_if_absent"):
        fatal(name)
    commit(run_url, (2,), keep=1)


@pytest.mark.parametrize(
    "stop", ["safetensors", "rank-00000.a2.json", "state", "manifest.a2", "lease", "manifest.json"]
)
def test_kill_at_any_write_loses_no_commit_and_shows_no_half(run_url: str, stop: str) -> None:
    commit(run_url, (1,), keep=1)
    process = processes.CONTEXT.Process(target=commit_and_die, args=(run_url, stop))
    process.start()
    process.join(240)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoint.newest_step(run_url) == 1
    registered = stop == "manifest.json"
    assert resume(run_url) == ((2, 2.0, []) if registered else (1, 1.0, []))
    assert folder(run_url, 2).exists() == registered
    commit(run_url, (3,), keep=1)
    assert [path.name for path in Path(run_url, "checkpoints").iterdir()] == ["step-00000003"]


def test_full_disk_surfaces_at_the_next_call(run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = commit(run_url, (1,))
    saver = Checkpointer(run_url, lease, timeout=10)

    def full(url: str) -> Iterator[Any]:
        raise InputError(f"can't write {url}: the disk is full (No space left on device); free some space")

    monkeypatch.setattr(storage, "writer", full)
    saver.save(2, {"model": Plain(2)}, {})
    with pytest.raises(InputError, match="the disk is full"):
        saver.save(3, {"model": Plain(3)}, {})
    assert checkpoint.newest_step(run_url) == 1


def test_second_save_waits_for_the_first(run_url: str) -> None:
    gate = threading.Event()
    saver = Checkpointer(run_url, Lease.take(run_url), timeout=10, before_commit=gate.wait)
    saver.save(1, {"model": Plain(1)}, {})
    assert saver.committed() is None
    threading.Timer(0.3, gate.set).start()
    assert saver.save(2, {"model": Plain(2)}, {}) >= 0.25
    assert saver.committed() == 1
    saver.close()
    assert saver.committed() == 2


def test_missing_rank_ends_the_wait_by_name(run_url: str) -> None:
    saver = Checkpointer(run_url, Lease.take(run_url), rank=0, world=3, timeout=0.3)
    saver.save(4, {"model": Plain(4)}, {})
    with pytest.raises(InputError, match=r"step 4 is not committed after 0\.3 s.*waiting for the part of rank 1, 2"):
        saver.close()


def test_every_generator_comes_back() -> None:
    def draw() -> list[Any]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()]

    draw()
    state = json.loads(json.dumps(checkpoint._plain_rng(*checkpoint._take_rng())))
    first = draw()
    checkpoint.set_rng(state)
    assert draw() == first


def test_pieces_land_where_they_belong(run_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 64)
    numbers = torch.arange(1000, dtype=torch.float32)

    class Split(Plain):
        def snapshot(self) -> Snapshot:
            meta = {"world": 1, "ema_decay": None, "parameters": {"x": {"shape": [1000], "step": None}}}
            cuts = [0, 1, 17, 400, 1000]
            tensors: Mapping[str, Tensor] = {f"weight/x@{a}": numbers[a:b] for a, b in itertools.pairwise(cuts)}
            snapshot = Snapshot(meta, dict(tensors))
            snapshot._done.set()
            return snapshot

    saver = Checkpointer(run_url, Lease.take(run_url), timeout=10)
    saver.save(1, {"model": Split(0)}, {})
    saver.close()
    reader = Checkpoint(str(folder(run_url, 1)))
    for start, end in ((0, 1000), (16, 18), (399, 999), (0, 1), (5, 5)):
        out = torch.empty(end - start)
        reader["model"].fill([Piece("weight", "x", start, out)])
        assert torch.equal(out, numbers[start:end])
    with pytest.raises(Damaged, match="weight of x ends at 1000, not 1001"):
        reader["model"].fill([Piece("weight", "x", 990, torch.empty(11))])
    with pytest.raises(InputError, match="holds no adversary; it holds model"):
        reader["adversary"]
