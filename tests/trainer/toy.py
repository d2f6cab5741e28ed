"""A model small enough to check, its data, stages that freeze parts of it, and its training in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.stage import OptimizerSpec

DECAY = 0.9
SPEC = OptimizerSpec(clip=0.5, weight_decay=0.01)


class Toy(nn.Module):
    """Sizes that divide evenly by nothing, a part that some batches skip, and a buffer that every forward changes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.enc, self.motion, self.dec = nn.Linear(7, 13), nn.Linear(13, 13), nn.Linear(13, 5)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def forward(self, x_BC: Tensor, still: bool) -> Tensor:
        self.forwards += 1
        h_BC = torch.tanh(self.enc(x_BC))
        return self.dec(h_BC if still else h_BC + self.motion(h_BC)) * self.scale


@dataclass(frozen=True)
class ToyStage:
    name: str
    steps: int
    freeze: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()

    def trains(self, parameter: str) -> bool:
        return not parameter.startswith(self.freeze or ("-",))

    def rests(self, parameter: str) -> bool:
        return bool(self.rest) and parameter.startswith(self.rest)


STAGES = (ToyStage("still", 3, ("motion",)), ToyStage("motion", 4, ("enc", "scale")), ToyStage("all", 3))
STEPS = sum(stage.steps for stage in STAGES)
RESTING = (ToyStage("joint", 7, rest=("motion",)), ToyStage("all", 3))


def stage_of(step: int) -> ToyStage:
    """The stage that holds a step; the last one for the step after the end."""
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


def rate(step: int) -> float:
    return 0.1 / (step + 1)


def still(step: int) -> bool:
    """Every third global batch reaches no parameter of ``motion``, as a batch of images does."""
    return step % 3 == 2


def clips(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: six clips."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 7, generator=generator), torch.randn(6, 5, generator=generator)


def micro_batches(step: int, rank: int, world: int) -> list[tuple[Tensor, Tensor, float]]:
    """A rank's part in micro-batches of unequal size, each with its share of the global batch."""
    x_BC, y_BC = clips(step)
    x_BC, y_BC = x_BC.chunk(world)[rank], y_BC.chunk(world)[rank]
    return [(x_BC[:1], y_BC[:1], 1 / 6), (x_BC[1:], y_BC[1:], (len(x_BC) - 1) / 6)]


def reference() -> tuple[list[float], dict[str, Tensor], dict[str, Tensor], list[float]]:
    """The same training with one process, one batch and torch.optim: losses, weights, average and norms."""
    model, losses, norms = Toy(), [], []
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept: dict[str, dict[str, Tensor]] = {}
    for step in range(STEPS):
        if step == 0 or stage_of(step) is not stage_of(step - 1):
            trained = {n: p for n, p in model.named_parameters() if stage_of(step).trains(n)}
            optimizer = torch.optim.AdamW(trained.values(), weight_decay=SPEC.weight_decay)
            optimizer.state.update({p: kept[name] for name, p in trained.items() if name in kept})
        x_BC, y_BC = clips(step)
        model.zero_grad()
        loss = (model(x_BC, still(step)) - y_BC).square().mean()
        loss.backward()
        losses.append(loss.item())
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norms.append(float(nn.utils.clip_grad_norm_(trained.values(), SPEC.clip)))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        kept = {name: optimizer.state[p] for name, p in trained.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average[name].lerp_(parameter, 1 - DECAY)
    return losses, {n: p.detach() for n, p in model.named_parameters()}, average, norms
