"""The adversary: a discriminator with an engine, optimizer, schedule, clipping and state of its own.

In a step of the loop, for each micro-batch and then once:

    output = adversary.judge(output, share)     the generator's loss, with the adversarial term added
    engine.backward(output.loss * share, last)
    output = adversary.learn(output, share, last)
    engine.step(rate); adversary.step(within)

No graph ever holds both engines. The generator's term is linear in its reconstruction, ``sum(x̂ * g)`` with ``g`` the
gradient of the adversarial loss at ``x̂``, taken with the discriminator frozen and its engine out of the way; the
discriminator learns from detached pixels. What depends on a whole global batch (LeCam's means, the adaptive weight) is
summed over ranks and micro-batches and used from the next step on: none of it changes with the number of workers.

Legend: B clips, C channels (3, RGB), T frames, H height, W width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.contracts import derive
from pipelines.faults import InputError
from trainer.blocks.discriminator import PatchDiscriminator
from trainer.engine import Engine
from trainer.losses.gan import discriminator_loss, generator_loss, lecam
from trainer.manifest import RunManifest
from trainer.recipe import StepOutput
from trainer.stage import AdversaryStage, DiscriminatorSpec, OptimizerSpec

SMALL = 1e-4
"""Added to the denominator of the adaptive weight, as in VQGAN's."""


class Discriminator(nn.Module):
    """The network, and as buffers what it remembers of past steps; so a checkpoint of its engine is complete.

    ``means_2`` are running means of real and fake logits, ``ratio`` is the adaptive weight that the next step takes,
    ``steps`` counts what it has learned.
    """

    def __init__(self, spec: DiscriminatorSpec) -> None:
        super().__init__()
        self.net = PatchDiscriminator(spec.kind, spec.width, spec.layers, spec.norm)
        self.register_buffer("means_2", torch.zeros(2))
        self.register_buffer("ratio", torch.zeros(1))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))

    def forward(self, pixels_BCTHW: Tensor, exact: bool = False) -> Tensor:
        """Pixels -> logits (B, patches)."""
        return self.net(pixels_BCTHW, exact)


class _All:
    """A stage of the adversary's engine: everything trains."""

    name = "adversary"

    def trains(self, parameter: str) -> bool:
        return True

    def rests(self, parameter: str) -> bool:
        return False


def build(spec: DiscriminatorSpec, seed: int) -> Discriminator:
    """The untrained discriminator, a pure function of ``seed``, float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, 0, "adversary/weights"))
        return Discriminator(spec)


class Adversary:
    """The adversary of one stage after another. Every rank makes the same calls in the same order."""

    def __init__(
        self,
        spec: AdversaryStage,
        steps: int,
        optimizer: OptimizerSpec,
        *,
        seed: int,
        zero_stage: int,
        precision: str,
        device: torch.device | str = "cpu",
        timeout: float = 1800.0,
    ) -> None:
        self.spec, self.steps, self.optimizer = spec, steps, optimizer
        # Under ZeRO-3 weights are let go of after a backward pass, and R1 goes through two.
        sharded = min(zero_stage, 2) if spec.r1 else zero_stage
        self.engine = Engine(
            build(spec.network, seed), _All(), optimizer, zero_stage=sharded, precision=precision, device=device,
            timeout=timeout,
        )  # fmt: skip
        self._sums = torch.zeros(4, dtype=torch.float64, device=self.engine.device)

    def next_stage(self, spec: AdversaryStage, steps: int, optimizer: OptimizerSpec) -> None:
        """Goes on over a stage border, with weights, moments and means."""
        self.spec, self.steps, self.optimizer = spec, steps, optimizer
        self.engine.next_stage(_All(), optimizer)

    def plays(self, within: int) -> bool:
        """Whether it has started by that step of its stage."""
        return within >= self.spec.start

    def judge(self, output: StepOutput, share: float) -> StepOutput:
        """Adds the weighted adversarial term to a micro-batch's loss; ``share`` is its part of the global batch."""
        x_BCTHW, _ = self._pixels(output)
        leaf_BCTHW = x_BCTHW.detach().requires_grad_()
        with self._frozen():
            with self.engine.autocast():
                value = generator_loss(self.engine.module(leaf_BCTHW), self.spec.generator)
            (slope_BCTHW,) = torch.autograd.grad(value, leaf_BCTHW)
        weight = self.spec.weight * (1.0 if self.spec.adaptive is None else float(self._module.ratio))
        if self.spec.adaptive is not None:
            if output.reconstruction_loss is None:
                raise InputError("adversary.adaptive: the recipe gives no reconstruction loss to weigh against")
            again_BCTHW = x_BCTHW.detach().requires_grad_()
            (other_BCTHW,) = torch.autograd.grad(output.reconstruction_loss(again_BCTHW), again_BCTHW)
            for i, gradient in enumerate((other_BCTHW, slope_BCTHW)):
                self._sums[2 + i] += (gradient.double() * share).square().sum()
        term = weight * (x_BCTHW * slope_BCTHW).sum()
        return dataclasses.replace(
            output,
            loss=output.loss + term + (weight * value - term).detach(),
            terms={**output.terms, "adversary": value.detach()},
            statistics={**output.statistics, "adversary_weight": value.new_tensor(weight).detach()},
        )

    def learn(self, output: StepOutput, share: float, last: bool) -> StepOutput:
        """Adds a micro-batch to the discriminator's gradient; ``last`` says that :meth:`step` follows."""
        x_BCTHW, target_BCTHW = self._pixels(output)
        real = self.engine.model(target_BCTHW)
        fake = self.engine.model(x_BCTHW.detach())
        loss = discriminator_loss(real, fake, self.spec.discriminator)
        terms = {"discriminator": loss.detach()}
        if self.spec.lecam and self._module.steps > 0:
            terms["lecam"] = lecam(real, fake, *self._module.means_2)
            loss = loss + self.spec.lecam * terms["lecam"]
        if self.spec.r1:
            terms["r1"] = self._r1(target_BCTHW)
            loss = loss + self.spec.r1 * terms["r1"]
        self.engine.backward(loss * share, last=last)
        logits = {"logits_real": real.detach().mean(), "logits_fake": fake.detach().mean()}
        for i, value in enumerate(logits.values()):
            self._sums[i] += share * value.double()
        return dataclasses.replace(
            output,
            terms={**output.terms, **{name: term.detach() for name, term in terms.items()}},
            statistics={**output.statistics, **logits},
            reconstruction_BCTHW=None,
            target_BCTHW=None,
            reconstruction_loss=None,
        )

    def step(self, within: int) -> float:
        """Updates the discriminator at the rate of that step of its stage; the gradient norm before clipping."""
        rate = self.optimizer.rate(within - self.spec.start, self.steps - self.spec.start)
        norm = self.engine.step(rate)
        if not math.isfinite(norm):
            return norm
        if self.engine.world > 1:
            dist.all_reduce(self._sums)
        module, sums = self._module, self._sums
        decay = self.spec.lecam_decay if int(module.steps) else 0.0
        module.means_2.lerp_(sums[:2].to(module.means_2), 1 - decay)
        if self.spec.adaptive is not None:
            module.ratio.copy_((sums[2].sqrt() / (sums[3].sqrt() + SMALL)).clamp(max=self.spec.adaptive))
        module.steps += 1
        self._sums = torch.zeros_like(sums)
        return norm

    @property
    def _module(self) -> Discriminator:
        return self.engine.module

    def _r1(self, target_BCTHW: Tensor) -> Tensor:
        """Half the mean squared norm of the gradient of a clip's summed logits at real pixels (Mescheder, Geiger and
        Nowozin 2018, equation 9), in float32.
        """
        leaf_BCTHW = target_BCTHW.detach().requires_grad_()
        logits = self.engine.module(leaf_BCTHW, exact=True)
        (slope_BCTHW,) = torch.autograd.grad(logits.sum(), leaf_BCTHW, create_graph=True)
        return 0.5 * slope_BCTHW.square().sum((1, 2, 3, 4)).mean()

    def _pixels(self, output: StepOutput) -> tuple[Tensor, Tensor]:
        if output.reconstruction_BCTHW is None or output.target_BCTHW is None:
            raise InputError("the recipe gives no reconstruction in this stage; set adversary: null")
        return output.reconstruction_BCTHW, output.target_BCTHW

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        for parameter in self.engine.module.parameters():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.engine.module.parameters():
                parameter.requires_grad_(True)


def enter(adversary: Adversary | None, manifest: RunManifest, step: int, device: torch.device) -> Adversary | None:
    """The adversary of the stage that holds ``step``: the one given where it goes on, else a fresh one, or none."""
    schedule = manifest.schedule
    stage = schedule.stage(step)
    if adversary is not None and not (goes_on(manifest, step) and stage.adversary):
        adversary.engine.close()
        adversary = None
    if stage.adversary is None:
        return None
    optimizer = manifest.adversary_optimizer_for(stage)
    if adversary is not None:
        adversary.next_stage(stage.adversary, stage.steps, optimizer)
        return adversary
    return Adversary(
        stage.adversary, stage.steps, optimizer, seed=derive(manifest.seed, schedule.index(step), "adversary"),
        zero_stage=manifest.zero.stage, precision=manifest.precision, device=device,
        timeout=manifest.failure.hang_seconds,
    )  # fmt: skip


def engines(model: Engine, adversary: Adversary | None) -> dict[str, Engine]:
    """What a checkpoint holds, by name."""
    return {"model": model} if adversary is None else {"model": model, "adversary": adversary.engine}


def goes_on(manifest: RunManifest, step: int) -> bool:
    """Whether the adversary of the stage that holds ``step`` was there before that step: what a checkpoint holds."""
    schedule = manifest.schedule
    index = schedule.index(step)
    stage = schedule.stages[index]
    if stage.adversary is None:
        return False
    if step > schedule.first_steps[index]:
        return True
    before = schedule.stages[index - 1].adversary if index else None
    return before is not None and before.network == stage.adversary.network
