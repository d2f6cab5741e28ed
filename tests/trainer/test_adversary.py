"""The adversary on two ranks under ZeRO against plain PyTorch in one process, and its losses by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from pipelines.faults import InputError
from tests.trainer.ranks import on_ranks
from trainer import adversary as adversaries
from trainer import engine as engines
from trainer.adversary import Adversary
from trainer.blocks.discriminator import PatchDiscriminator, least_side
from trainer.engine import Engine
from trainer.losses import gan
from trainer.recipe import StepOutput
from trainer.stage import AdversaryStage, DiscriminatorSpec, OptimizerSpec, Stage

SHARDINGS = ("zero0", "zero1", "zero2", "zero3", "zero3-released")
STEPS, START = 4, 1
SPEC = OptimizerSpec(name="adam", lr=1e-3, betas=(0.5, 0.9), clip=0.5)
RIVAL = OptimizerSpec(name="adam", lr=2e-3, betas=(0.5, 0.9), clip=0.2, warmup=2)
CASES = {
    "frames": AdversaryStage(
        weight=0.5, start=START, network=DiscriminatorSpec(width=4, layers=2), adaptive=50.0, lecam=0.5, lecam_decay=0.6
    ),
    "clips": AdversaryStage(
        weight=0.3,
        start=START,
        network=DiscriminatorSpec(kind="patch-3d", width=4, layers=2),
        generator="hinge",
        discriminator="non-saturating",
        r1=0.5,
    ),
}


class Generator(nn.Module):
    """Three small convolutions beside a shortcut; the first has a part that one step in two doesn't use."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body, self.tail = nn.Conv3d(3, 5, 3, 1, 1), nn.Conv3d(5, 5, 3, 1, 1), nn.Conv3d(5, 3, 3, 1, 1)
        noise = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=noise) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tail(torch.tanh(self.body(torch.tanh(self.head(x))))))


class All:
    name = "all"

    def trains(self, parameter: str) -> bool:
        return True

    def rests(self, parameter: str) -> bool:
        return False


def clips(step: int) -> Tensor:
    """The global batch of a step: six clips of 3 frames, 16 x 16, smooth in space."""
    noise = torch.randn(6, 3, 3, 5, 5, generator=torch.Generator().manual_seed(step))
    return F.interpolate(noise, (3, 16, 16), mode="trilinear").tanh()


def output_of(model: Any, target: Tensor) -> StepOutput:
    made = model(target)
    loss = (made - target).abs().mean()
    return StepOutput(loss, {"l1": loss.detach()}, made, target, lambda other: (other - target).abs().mean())


def trained(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for sharding in SHARDINGS:
        engines.PERSISTENT = 14 if sharding.endswith("released") else 100_000
        for case, spec in CASES.items():
            results[f"{sharding}/{case}"] = train(rank, world, int(sharding[4]), spec)
    return results


def train(rank: int, world: int, zero_stage: int, spec: AdversaryStage) -> dict[str, Any]:
    model = Engine(Generator(), All(), SPEC, zero_stage=zero_stage)
    rival = Adversary(spec, STEPS, RIVAL, seed=3, zero_stage=zero_stage, precision="fp32")
    untouched, norms, terms = True, [], []
    for step in range(STEPS):
        if step == 2:  # over a border: both engines are built anew
            model.next_stage(All(), SPEC)
            rival.next_stage(spec, STEPS, RIVAL)
        mine = clips(step).chunk(world)[rank]
        for i, target in enumerate((mine[:1], mine[1:])):
            share, last = len(target) / 6, i == 1
            output = output_of(model.model, target)
            if rival.plays(step):
                before = model.weights()
                output = rival.judge(output, share)
                terms.append(float(output.terms["adversary"]))
            model.backward(output.loss * share, last=last)
            if rival.plays(step):
                output = rival.learn(output, share, last)
                assert output.reconstruction_BCTHW is None
        norms.append(model.step(SPEC.lr))
        if rival.plays(step):
            moved = model.weights()
            norms.append(rival.step(step))
            after = model.weights()
            untouched &= all(torch.equal(moved[name], after[name]) for name in moved)
            untouched &= any(not torch.equal(before[name], moved[name]) for name in moved)
    result = {"generator": model.weights(), "discriminator": rival.engine.weights(), "norms": norms}
    model.close()
    rival.engine.close()
    return {**result, "untouched": untouched, "terms": terms}


def reference(spec: AdversaryStage) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same with torch alone: whole batches, losses written out, exact second derivatives for R1."""
    gen, rival = Generator(), adversaries.build(spec.network, 3)
    adam = torch.optim.Adam(gen.parameters(), betas=SPEC.betas)
    other = torch.optim.Adam(rival.parameters(), betas=RIVAL.betas)
    means, ratio, seen, norms = [0.0, 0.0], 0.0, 0, []
    for step in range(STEPS):
        x = clips(step)
        made = gen(x)
        loss = (made - x).abs().mean()
        playing = step >= START
        if playing:
            fake = rival(made)
            value = -fake.mean() if spec.generator == "hinge" else F.softplus(-fake).mean()
            slope, other_slope = (torch.autograd.grad(v, made, retain_graph=True)[0] for v in (value, loss))
            weight = spec.weight * (ratio if spec.adaptive else 1)
            loss = loss + weight * value
        gen.zero_grad()
        gradients = torch.autograd.grad(loss, list(gen.parameters()))
        for p, gradient in zip(gen.parameters(), gradients, strict=True):
            p.grad = gradient
        norms.append(float(nn.utils.clip_grad_norm_(gen.parameters(), SPEC.clip)))
        adam.param_groups[0]["lr"] = SPEC.lr
        adam.step()
        if not playing:
            continue
        real_x = x.clone().requires_grad_()
        real, fake = rival(real_x), rival(made.detach())
        if spec.discriminator == "hinge":
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        else:
            loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
        if spec.lecam and seen:
            above, below = F.relu(real - means[1]).square().mean(), F.relu(means[0] - fake).square().mean()
            loss = loss + spec.lecam * (above + below)
        if spec.r1:
            (steep,) = torch.autograd.grad(real.sum(), real_x, create_graph=True)
            loss = loss + spec.r1 * 0.5 * steep.square().sum((1, 2, 3, 4)).mean()
        rival.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(rival.parameters(), RIVAL.clip)))
        other.param_groups[0]["lr"] = RIVAL.rate(step - START, STEPS - START)
        other.step()
        decay = spec.lecam_decay if seen else 0.0
        means = [decay * m + (1 - decay) * float(v.detach().mean()) for m, v in zip(means, (real, fake), strict=True)]
        if spec.adaptive:
            ratio = min(spec.adaptive, float(other_slope.norm() / (slope.norm() + 1e-4)))
        seen += 1
    state = {**dict(rival.named_parameters()), "means_2": torch.tensor(means), "ratio": torch.tensor([ratio])}
    return dict(gen.named_parameters()), state, norms


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return on_ranks(2, trained)


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {case: reference(spec) for case, spec in CASES.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_play_like_one_process(results: Any, references: Any, sharding: str, case: str) -> None:
    generator, discriminator, norms = references[case]
    for rank in results:
        run = rank[f"{sharding}/{case}"]
        assert run["norms"] == pytest.approx(norms, rel=1e-4, abs=1e-5)
        for name, value in generator.items():
            torch.testing.assert_close(run["generator"][name], value.detach(), rtol=0, atol=1e-5)
        for name, value in discriminator.items():
            torch.testing.assert_close(run["discriminator"][name], value.detach(), rtol=0, atol=1e-5)
        assert run["untouched"], "a step of one moves the other"
        assert run["discriminator"]["steps"] == STEPS - START


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-3.0, 0.0]])
    assert gan.discriminator_loss(real, fake, "hinge").item() == pytest.approx(0.5 * (0.25 + 0.5))
    assert gan.generator_loss(fake, "hinge").item() == pytest.approx(1.5)
    soft = [math.log1p(math.exp(v)) for v in (-2.0, -0.5, -3.0, 0.0, 3.0)]
    expected = 0.5 * ((soft[0] + soft[1]) / 2 + (soft[2] + soft[3]) / 2)
    assert gan.discriminator_loss(real, fake, "non-saturating").item() == pytest.approx(expected)
    assert gan.generator_loss(fake, "non-saturating").item() == pytest.approx((soft[4] + soft[3]) / 2)
    anchors = torch.tensor(1.0), torch.tensor(-1.0)
    assert gan.lecam(real, fake, *anchors).item() == pytest.approx((9 + 2.25) / 2 + (16 + 1) / 2)


@pytest.mark.parametrize("kind", ["patch-2d", "patch-3d"])
def test_a_logit_is_of_its_own_pixels(kind: Any) -> None:
    """With group normalisation no clip changes another's logits; with 2D kernels no frame another frame's."""
    net = PatchDiscriminator(kind, width=4, layers=2)
    x = clips(0).requires_grad_()
    logits = net(x)
    (slope,) = torch.autograd.grad(logits[1].sum(), x, retain_graph=True)
    assert slope[1].any() and not slope[[0, 2, 3, 4, 5]].any()
    first = logits[1][: logits.shape[1] // 3].sum() if kind == "patch-2d" else logits[1, 0]
    (slope,) = torch.autograd.grad(first, x)
    assert slope[1, :, 1:].any() == (kind == "patch-3d")


def test_the_published_discriminator() -> None:
    net = PatchDiscriminator("patch-2d", norm="batch")
    assert [c.out_channels for c in net.modules() if isinstance(c, nn.Conv2d)] == [64, 128, 256, 512, 1]
    assert sum(p.numel() for p in net.parameters()) == 2_765_633
    assert not list(net.buffers()), "no running statistics: a checkpoint does not depend on them"
    x = torch.zeros(1, 3, 1, 160, 160, requires_grad=True)
    grid = PatchDiscriminator("patch-2d", norm="none")(x).unflatten(1, (18, 18))
    seen = torch.autograd.grad(grid[0, 9, 9], x)[0].abs().sum((0, 1, 2)) > 0
    assert (seen.any(0).sum(), seen.any(1).sum()) == (70, 70)
    for layers in (2, 3):
        least = least_side("patch-2d", layers)
        assert PatchDiscriminator("patch-2d", 4, layers)(torch.zeros(1, 3, 1, least, least)).shape == (1, 1)
        with pytest.raises((RuntimeError, ValueError)):
            PatchDiscriminator("patch-2d", 4, layers)(torch.zeros(1, 3, 1, least - 1, least - 1))


def test_a_stage_with_an_adversary_that_can_not_be_is_refused() -> None:
    clip = {"frames": 3, "sizes": [[16, 16]]}
    with pytest.raises(ValidationError, match=r"adversary.start is 4 and the stage has 4 steps"):
        Stage.model_validate({"name": "a", "steps": 4, "clip": clip, "adversary": {"weight": 1, "start": 4}})
    with pytest.raises(ValidationError, match=r"patch-2d discriminator of so many needs frames of at least 24 x 24"):
        Stage.model_validate({"name": "a", "steps": 4, "clip": clip, "adversary": {"weight": 1}})
    Stage.model_validate({"name": "a", "steps": 0, "clip": clip, "adversary": {"weight": 1, "start": 4}})


def test_without_a_reconstruction_there_is_nothing_to_judge() -> None:
    rival = Adversary(CASES["clips"], STEPS, RIVAL, seed=0, zero_stage=0, precision="fp32")
    with pytest.raises(InputError, match="gives no reconstruction in this stage; set adversary: null"):
        rival.judge(StepOutput(torch.zeros(()), {}), 1.0)
    rival.engine.close()
