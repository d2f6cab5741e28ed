"""The contract between the one loop and the papers. ``docs/recipes.md`` shows how each of the four fits.

The loop calls, the recipe answers. A recipe holds no training state: weights are the model's, which the engine owns;
randomness is the batch's. It imports contracts, ``blocks/`` and ``losses/``, never another recipe.

Legend: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel
from torch import Tensor, nn

from pipelines.contracts import Batch
from pipelines.faults import InputError, near
from trainer.stage import Stage

Latent = Mapping[str, Tensor]
"""One step of a latent stream: named tensors with a batch dimension of 1, for as many frames as the recipe chose.

All that decoding needs is in it. ``frames`` (1,) is how many frames it decodes to, wherever the other shapes don't say
(the padded last window of a video). Tensors of whole numbers, as this one, are not counted as latent numbers.
"""


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a recipe's step returns.

    ``loss`` is a scalar with graph, the mean over the micro-batch's clips, the adversary's term not included; ``terms``
    are the unweighted loss terms and ``statistics`` whatever else is worth a curve (both detached scalars).
    ``reconstruction_BCTHW`` (with graph) and ``target_BCTHW`` in [-1, 1] are what an adversary compares, None where a
    stage has none. ``reconstruction_loss`` gives the reconstruction part of ``loss`` at another reconstruction, for an
    adaptive adversarial weight.
    """

    loss: Tensor
    terms: Mapping[str, Tensor]
    reconstruction_BCTHW: Tensor | None = None
    target_BCTHW: Tensor | None = None
    reconstruction_loss: Callable[[Tensor], Tensor] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """What a clip of (frames, height, width) becomes.

    ``shapes`` by name, without batch; ``numbers_per_frame`` all latent numbers of the clip over its frames, the first
    frame's included; ``channels`` of the main latent. Where the length of a latent follows from the clip's content,
    these are the greatest.
    """

    shapes: Mapping[str, tuple[int, ...]]
    channels: int
    numbers_per_frame: float


@runtime_checkable
class Recipe(Protocol):
    """A paper. Constructed from its validated ``Config``; cheap until ``build`` is called."""

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    config: BaseModel
    multiple: int
    """Height and width that ``encode`` takes must be multiples of this; 1 where the model pads by itself."""

    def __init__(self, config: BaseModel) -> None: ...

    def stages(self) -> tuple[Stage, ...]:
        """The published schedule for this configuration."""
        ...

    def check(self, stage: Stage) -> Iterable[str]:
        """What of a stage this recipe can't train, each as ``field: value: reason. Remedy``; none where it can.

        Asked for every stage with steps when a manifest is judged. :func:`unknown_names` does the common part.
        """
        ...

    def build(self, seed: int) -> nn.Module:
        """The trainable model, float32 on the CPU; its initial weights are a pure function of ``seed`` and of the files
        that the configuration names. Every parameter has a dimension at least: (1,), not ().
        """
        ...

    def teachers(self) -> nn.ModuleDict:
        """Frozen networks that losses need (LPIPS, SigLIP): moved to the device, never trained or checkpointed."""
        ...

    def step(self, model: nn.Module, batch: Batch, stage: Stage, teachers: nn.ModuleDict) -> StepOutput:
        """One forward pass. Calls ``model`` exactly once, so that ZeRO-3 sees a plain forward and backward.

        What is drawn at random comes from ``batch.randn`` and ``batch.rand``, outside the model: torch's own generators
        are seeded from (seed, step, rank), and the same draws would not come back at another world size.
        """
        ...

    def parts(self, model: nn.Module) -> Mapping[str, int]:
        """Parameters by part; parts that the paper does not count start with ``(``."""
        ...

    def latent(self, frames: int, height: int, width: int) -> LatentSpec:
        """The latent of a clip of that shape; raises InputError when the shape does not divide."""
        ...

    def encode(
        self, model: nn.Module, frames_1CTHW: Iterable[Tensor], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Latent]:
        """Encodes a stream of chunks of any length, in [-1, 1], in constant memory; yields as early as it can.

        ``caption_emb_1LD`` is for recipes that read text; the others ignore it, and None is no caption.
        """
        ...

    def decode(
        self, model: nn.Module, latents: Iterable[Latent], caption_emb_1LD: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Decodes a stream of latents to chunks (1, C, t, H, W) in [-1, 1], in constant memory.

        What is drawn at random is a function of the configuration's seed and the place in the stream.
        """
        ...

    def pictures(self, model: nn.Module, pixels_BCTHW: Tensor) -> Mapping[str, Tensor]:
        """Reconstruction and views worth seeing (flow, residual), each (B, 3, T, H, W) in [-1, 1]."""
        ...


def unknown_names(stage: Stage, *, losses: Collection[str], knobs: Collection[str] = ()) -> Iterator[str]:
    """Faults for the stage's loss terms and knobs that are not among those of the recipe, with the nearest name."""
    for field_, given, known in (("losses", stage.losses, losses), ("knobs", stage.knobs, knobs)):
        for name in given:
            if name not in known:
                have = f"this recipe has {', '.join(sorted(known))}" if known else "this recipe has none"
                yield f"{field_}.{name}: {given[name]!r}: no such name{near(name, known)} ({have})"


def names() -> list[str]:
    """Every recipe there is: the folders of ``trainer/recipes``."""
    import trainer.recipes as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def load(name: str) -> type[Recipe]:
    """The recipe's class; raises InputError naming the known recipes."""
    if name not in names():
        raise InputError(f"recipe {name!r} is not known; there are {', '.join(names())}", status=2)
    return importlib.import_module(f"trainer.recipes.{name}.recipe").RECIPE


def counted(parts: Mapping[str, Any]) -> int:
    """Parameters that the paper counts: those of parts whose name does not start with ``(``."""
    return sum(count for part, count in parts.items() if not part.startswith("("))
