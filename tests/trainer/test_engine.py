from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.faults import InputError
from tests.trainer import toy
from tests.trainer.ranks import on_ranks
from trainer import engine as engines
from trainer.engine import Engine

SHARDINGS = ("zero0", "zero1", "zero2", "zero3", "zero3-released")
"""The last one lets go of the weights between a forward and a backward pass, and keeps the biases."""


def train(engine: Engine, step: int, image: bool = False) -> tuple[float, float]:
    """One global batch; this rank's part of the loss and the gradient norm."""
    total = 0.0
    batches = toy.micro_batches(step, engine.rank, engine.world)
    for i, (x_BC, y_BC, share) in enumerate(batches):
        loss = (engine.model(x_BC, toy.still(step)) - y_BC).square().mean() * share
        engine.backward(loss, last=i == len(batches) - 1)
        total += loss.item()
    return total, engine.step(toy.rate(step), image=image)


def stages(rank: int, world: int, zero_stage: int) -> dict[str, Any]:
    engine = Engine(toy.Toy(), toy.STAGES[0], toy.SPEC, zero_stage=zero_stage, ema_decay=toy.DECAY, timeout=60)
    losses, norms, moved, states, freed = [], [], [], [], []
    for step in range(toy.STEPS):
        stage = toy.stage_of(step)
        if step and stage is not toy.stage_of(step - 1):
            old = weakref.ref(engine.model)
            engine.next_stage(stage, toy.SPEC)
            gc.collect()
            freed.append(old() is None)
        before = engine.weights()
        loss, norm = train(engine, step)
        after = engine.weights()
        losses.append(loss)
        norms.append(norm)
        moved.append([name for name in engine.shapes if not torch.equal(before[name], after[name])])
        states.append(sorted({piece.name for piece in engine.pieces() if piece.kind == "exp_avg"}))
    held = sum(p.values.numel() for p in engine.pieces() if p.kind == "ema")
    before = engine.weights()
    x_BC, y_BC, share = toy.micro_batches(0, rank, world)[0]
    engine.backward((engine.model(x_BC, False) - y_BC).square().mean() * share * float("inf"))
    bad = engine.step(0.1)
    kept = all(torch.equal(before[name], value) for name, value in engine.weights().items() if name != "forwards")
    old = weakref.ref(engine.model)
    average = engine.weights(ema=True)
    engine.close()
    del engine
    gc.collect()
    return {
        "freed": [*freed, old() is None],
        "losses": losses,
        "norms": norms,
        "moved": moved,
        "states": states,
        "weights": before,
        "average": average,
        "held": held,
        "bad": bad,
        "kept": kept,
    }


def everything(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {"errors": errors()}
    for sharding in SHARDINGS:
        engines.PERSISTENT = 14 if sharding.endswith("released") else 100_000
        zero_stage = int(sharding[4])
        results[sharding] = stages(rank, world, zero_stage)
        results[sharding]["two"] = two_engines(rank, world, zero_stage)
        results[sharding]["bf16"] = autocast(zero_stage)
        results[sharding]["resting"] = resting(zero_stage)
    return results


def resting(zero_stage: int) -> dict[str, Any]:
    """A stage in which ``motion`` rests in every third batch, which doesn't reach it, and then one without rest."""
    engine = Engine(toy.Toy(), toy.RESTING[0], toy.SPEC, zero_stage=zero_stage, ema_decay=toy.DECAY)
    kept = []
    for step in range(toy.STEPS):
        if step == toy.RESTING[0].steps:
            engine.next_stage(toy.RESTING[1], toy.SPEC)
        before = {(p.kind, p.name, p.start): p.values.clone() for p in engine.pieces() if p.kind != "ema"}
        train(engine, step, image=toy.still(step))
        after = {(p.kind, p.name, p.start): p.values for p in engine.pieces() if p.kind != "ema"}
        kept.append(
            sorted({name for key, value in before.items() if torch.equal(value, after[key]) for name in key[1:2]})
        )
    counts = {name: entry["step"] for name, entry in engine.meta()["parameters"].items()}
    weights = engine.weights()
    engine.close()
    return {"kept": kept, "counts": counts, "weights": weights}


def two_engines(rank: int, world: int, zero_stage: int) -> dict[str, Tensor]:
    """A generator and a discriminator in turns: neither leaks into the other's gradient."""
    gen = Engine(nn.Linear(7, 5), toy.STAGES[-1], toy.SPEC, zero_stage=zero_stage)
    disc = Engine(nn.Linear(5, 3), toy.STAGES[-1], toy.SPEC, zero_stage=zero_stage)
    torch.manual_seed(1)
    gen.load({"weight": torch.randn(5, 7), "bias": torch.randn(5)})
    disc.load({"weight": torch.randn(3, 5), "bias": torch.randn(3)})
    for step in range(3):
        x_BC, y_BC = (part.chunk(world)[rank] for part in toy.clips(step))
        out_BC = gen.model(x_BC)
        leaf_BC = out_BC.detach().requires_grad_()
        for p in disc.module.parameters():
            p.requires_grad_(False)
        (grad_BC,) = torch.autograd.grad(disc.module(leaf_BC).square().mean() / world, leaf_BC)
        for p in disc.module.parameters():
            p.requires_grad_(True)
        gen.backward((out_BC * grad_BC).sum())
        gen.step(0.01)
        disc.backward((disc.model(y_BC).mean() - disc.model(out_BC.detach()).square().mean()) / world)
        disc.step(0.02)
    return {**gen.weights(), **{f"disc.{name}": value for name, value in disc.weights().items()}}


def autocast(zero_stage: int) -> list[str]:
    engine = Engine(toy.Toy(), toy.STAGES[-1], toy.SPEC, zero_stage=zero_stage, precision="bf16")
    x_BC, _ = toy.clips(0)
    with engine.autocast():
        inner = engine.module.dec(torch.zeros(1, 13)) if zero_stage < 3 else torch.zeros(1, dtype=torch.bfloat16)
    out_BC = engine.model(x_BC, False)
    engine.backward(out_BC.float().mean())
    engine.step(0.1)
    weights = {str(value.dtype) for name, value in engine.weights().items() if name != "forwards"}
    return [str(engine.module.motion(x_BC @ torch.zeros(7, 13)).dtype) if zero_stage < 3 else "torch.float32",
            str(inner.dtype), *weights]  # fmt: skip


def errors() -> list[str]:
    texts = []
    frozen = toy.ToyStage("none", 1, ("enc", "motion", "dec", "scale"))
    for make in (
        lambda: Engine(toy.Toy(), frozen, toy.SPEC),
        lambda: Engine(toy.Toy(), toy.STAGES[-1], toy.SPEC).load({"enc.weight": torch.zeros(2, 2)}),
    ):
        try:
            make()
        except InputError as error:
            texts.append(str(error))
    return texts


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(2, everything)


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], list[float]]:
    return toy.reference()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_train_like_one_process(results: Any, reference: Any, sharding: str) -> None:
    losses, weights, average, norms = reference
    for rank in results:
        run = rank[sharding]
        assert run["norms"] == pytest.approx(norms, abs=1e-6)
        for name, value in weights.items():
            torch.testing.assert_close(run["weights"][name], value, rtol=0, atol=1e-6)
            torch.testing.assert_close(run["average"][name], average[name], rtol=0, atol=1e-6)
    summed = [sum(parts) for parts in zip(*(rank[sharding]["losses"] for rank in results), strict=True)]
    assert summed == pytest.approx(losses, abs=1e-6)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_frozen_parameters_keep_every_bit_and_no_state(results: Any, sharding: str) -> None:
    names = [name for name, _ in toy.Toy().named_parameters()]
    for step in range(toy.STEPS):
        trained = {name for name in names if toy.stage_of(step).trains(name)}
        assert set(results[0][sharding]["moved"][step]) == trained
        owned = {name for rank in results for name in rank[sharding]["states"][step]}
        assert owned == trained


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_what_rests_in_image_batches_keeps_weights_moments_and_count(results: Any, sharding: str) -> None:
    model = toy.Toy()
    groups = [{"params": [p], "name": name} for name, p in model.named_parameters()]
    optimizer = torch.optim.AdamW(groups, weight_decay=toy.SPEC.weight_decay)
    rest = [toy.RESTING[step >= toy.RESTING[0].steps].rest and toy.still(step) for step in range(toy.STEPS)]
    for step in range(toy.STEPS):
        x_BC, y_BC = toy.clips(step)
        optimizer.zero_grad()
        (model(x_BC, toy.still(step)) - y_BC).square().mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is None and not (rest[step] and name.startswith("motion")):
                parameter.grad = torch.zeros_like(parameter)
        nn.utils.clip_grad_norm_(model.parameters(), toy.SPEC.clip)
        for group in optimizer.param_groups:
            group["lr"] = toy.rate(step)
        optimizer.step()
    assert sum(map(bool, rest)) == 2 and toy.still(8), "one batch of images also comes where nothing rests"
    for rank in results:
        run = rank[sharding]["resting"]
        for name, value in model.named_parameters():
            torch.testing.assert_close(run["weights"][name], value.detach(), rtol=0, atol=1e-6)
            assert run["counts"][name] == toy.STEPS - 2 * name.startswith("motion")
        for step, names in enumerate(run["kept"]):
            assert all(name.startswith("motion") for name in names) and bool(names) <= bool(rest[step])
    for step in range(toy.STEPS):
        kept = {name for rank in results for name in rank[sharding]["resting"]["kept"][step]}
        assert kept == ({"motion.weight", "motion.bias"} if rest[step] else set())


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_average_is_sharded(results: Any, sharding: str) -> None:
    held = [rank[sharding]["held"] for rank in results]
    whole = sum(p.numel() for p in toy.Toy().parameters())
    assert sum(held) == whole
    assert max(held) <= 0.6 * whole


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_engine_that_is_rebuilt_or_closed_frees_its_memory(results: Any, sharding: str) -> None:
    assert [rank[sharding]["freed"] for rank in results] == [[True, True, True]] * 2


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_gradient_that_is_not_finite_changes_nothing(results: Any, sharding: str) -> None:
    for rank in results:
        assert not torch.isfinite(torch.tensor(rank[sharding]["bad"]))
        assert rank[sharding]["kept"]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_engines_do_not_leak_into_each_other(results: Any, sharding: str) -> None:
    torch.manual_seed(1)
    gen, disc = nn.Linear(7, 5), nn.Linear(5, 3)
    torch.manual_seed(1)
    for parameter, shape in ((gen.weight, (5, 7)), (gen.bias, 5), (disc.weight, (3, 5)), (disc.bias, 3)):
        parameter.data.copy_(torch.randn(shape))
    gen_adam = torch.optim.AdamW(gen.parameters(), weight_decay=toy.SPEC.weight_decay, lr=0.01)
    disc_adam = torch.optim.AdamW(disc.parameters(), weight_decay=toy.SPEC.weight_decay, lr=0.02)
    for step in range(3):
        x_BC, y_BC = toy.clips(step)
        gen_adam.zero_grad()
        disc(gen(x_BC)).square().mean().backward()
        nn.utils.clip_grad_norm_(gen.parameters(), toy.SPEC.clip)
        out_BC = gen(x_BC).detach()
        gen_adam.step()
        disc_adam.zero_grad()
        (disc(y_BC).mean() - disc(out_BC).square().mean()).backward()
        nn.utils.clip_grad_norm_(disc.parameters(), toy.SPEC.clip)
        disc_adam.step()
    wanted = {**gen.state_dict(), **{f"disc.{name}": value for name, value in disc.state_dict().items()}}
    for rank in results:
        for name, value in wanted.items():
            torch.testing.assert_close(rank[sharding]["two"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_bf16_computes_in_bfloat16_and_keeps_float32(results: Any, sharding: str) -> None:
    assert results[0][sharding]["bf16"] == ["torch.float32", "torch.bfloat16", "torch.float32"]


def test_errors_name_the_cause(results: Any) -> None:
    nothing, other = results[0]["errors"]
    assert nothing.startswith('stage "none" trains no parameter of Toy')
    assert "enc.weight: [2, 2] in the checkpoint, [13, 7] in the model" in other
    assert "dec.bias: not in the checkpoint" in other


def test_parameter_without_dimensions_is_refused() -> None:
    model = nn.Module()
    model.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=r"\['temperature'\] shape \(1,\)"):
        Engine(model, toy.STAGES[-1], toy.SPEC)


def compiled_and_eager(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for compile in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        engine = Engine(toy.Toy(), toy.STAGES[0], toy.SPEC, zero_stage=1, compile=compile, timeout=120)
        losses = [train(engine, step)[0] for step in range(2)]
        engine.next_stage(toy.STAGES[1], toy.SPEC)
        losses += [train(engine, step)[0] for step in (3, 4)]
        results[f"{compile}"] = (
            losses,
            sorted(engine.weights()),
            torch._dynamo.utils.counters["stats"]["calls_captured"],
        )
        engine.close()
    return results


@pytest.mark.nightly
def test_a_compiled_model_trains_the_same_through_a_stage_border() -> None:
    result = on_ranks(1, compiled_and_eager)[0]
    (eager, names, none), (compiled, same_names, captured) = result["False"], result["True"]
    assert none == 0 and captured > 0
    assert names == same_names
    assert compiled == pytest.approx(eager, rel=1e-5)
