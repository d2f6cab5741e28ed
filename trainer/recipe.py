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
from typing import Any, ClassVar, Protocol, TypeGuard, runtime_checkable

from pydantic import BaseModel, JsonValue
from torch import Tensor, nn

from pipelines.contracts import Batch, LatentLayout
from pipelines.faults import InputError, near
from trainer.stage import Stage

FREE: dict[str, JsonValue] = {"free": True}
"""``json_schema_extra`` of a configuration's field that changes no weights, so that a trained model may be given it."""

Latent = Mapping[str, Tensor]
"""One step of a latent stream: named tensors (1, C, ...), for as many frames as the recipe chose.

Channels come first, then any number of token axes: (1, C, t, h, w) for a grid, (1, C, n) for a row of tokens. Time is
the first token axis of a grid; the last axis is the one whose length may follow from the clip's content. All that
decoding needs is in it. ``frames`` (1,) is how many frames it decodes to, wherever the other shapes don't say (the
padded last window of a video). Tensors of whole numbers, as this one, are not counted as latent numbers.
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
    """What trains: all that the loop needs. Constructed from its validated ``Config``; cheap until ``build`` is called.

    A paper's autoencoder is a :class:`CodecRecipe` too, a diffusion model over stored latents a :class:`LatentRecipe`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[BaseModel]]
    config: BaseModel

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
        """Frozen networks that losses need (LPIPS, SigLIP): moved to the device, never trained or checkpointed.

        ``step`` gets them together with the models of other runs that the stage names in ``Stage.teachers``.
        """
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


@runtime_checkable
class CodecRecipe(Recipe, Protocol):
    """What also codes: pixels to latents and back. ``trainer.codec`` makes a command of it."""

    multiple: int
    """Height and width that ``encode`` takes must be multiples of this; 1 where the model pads by itself."""

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


@runtime_checkable
class Predicts(Protocol):
    """A recipe that predicts frames from others and codes what is left."""

    def residual(self, model: nn.Module, pixels_BCTHW: Tensor) -> Tensor | None:
        """What the prediction leaves, (B, 3, T', H, W) in pixels, for the T' frames that are predicted; None of none.

        As it is before it is coded: prediction plus residual is the clip.
        """
        ...


@runtime_checkable
class LatentRecipe(Recipe, Protocol):
    """What trains on the latents that ``moviola encode --dataset`` stored, and makes new ones.

    Its ``Config`` has a field ``latents``, None or a LatentLayout: a manifest leaves it out and gets that of the first
    dataset of ``data.train``. Batches have ``arrays`` and ``masks``, and pixels of no frames. Its model is a
    :class:`Predictor`.
    """

    @property
    def layout(self) -> LatentLayout:
        """What is stored of a clip; raises InputError where ``latents`` is None."""
        ...

    def sample(
        self,
        model: nn.Module,
        seed: int,
        place: int,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        caption_emb_1LD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """New arrays (1, C, ...) of the layout, in the units of the stored ones, each as long as its kept part.

        A pure function of the weights and of the arguments; ``steps`` and ``guidance`` None take the configuration's.
        """
        ...


class Predictor(Protocol):
    """What a latent diffusion model offers to post-training, as ``teachers["predictor"]`` of ``Recipe.step``."""

    def predict(
        self,
        latents: Mapping[str, Tensor],
        t_B: Tensor,
        noise: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
        *,
        caption_emb_BLD: Tensor | None = None,
        caption_mask_BL: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Clean latents (B, C, ...), noised to ``t_B`` and predicted from that: same names, shapes and units.

        ``latents`` are in the codec's own units, as ``encode`` yields them but B at once; ``noise`` is standard normal
        of the same shapes. The model normalises by its stored statistics, noises to z_t = (1 - t) z + t ε with t in
        [0, 1], and returns z_t - t v in the codec's units. ``masks`` (B, ...) over the token axes are True where there
        is a token; a name that is missing there has all of them. Raises ValueError for latents of another layout.
        """
        ...


def codes(recipe: Recipe) -> TypeGuard[CodecRecipe]:
    """Whether the recipe is a codec."""
    return isinstance(recipe, CodecRecipe)


def samples(recipe: Recipe) -> TypeGuard[LatentRecipe]:
    """Whether the recipe trains on stored latents."""
    return not codes(recipe)


def codec_of(recipe: Recipe, where: str) -> CodecRecipe:
    """The recipe, if it is a codec; else raises InputError that says what ``where`` is instead."""
    if codes(recipe):
        return recipe
    raise InputError(
        f"{where} is a latent diffusion model (recipe {recipe.name}): it makes latents, and neither encodes nor "
        "decodes videos. Give a codec's checkpoint here; `moviola sample CHECKPOINT OUT --codec CODEC` draws samples",
        status=2,
    )


def skeleton(recipe: Recipe) -> nn.Module:
    """The model for weights that are assigned afterwards, or not needed: float32 on the CPU.

    A recipe whose ``build`` reads files that only say how training starts has a method ``skeleton()`` that leaves them
    unread: a trained model needs them no more.
    """
    own = getattr(recipe, "skeleton", None)
    return own() if own is not None else recipe.build(0)


def portable(recipe: Recipe) -> BaseModel:
    """The configuration for an export: that of a recipe which reads files to know its model's shape has what they say
    written out, by its method ``portable()``.
    """
    own = getattr(recipe, "portable", None)
    return own() if own is not None else recipe.config


def caption_width(recipe: Recipe) -> int:
    """Numbers a token of the captions that the recipe's step reads: its property ``caption_width``, else 0 for none."""
    return getattr(recipe, "caption_width", 0)


def unknown_names(
    stage: Stage, *, losses: Collection[str], knobs: Collection[str] = (), teachers: Collection[str] = ()
) -> Iterator[str]:
    """Faults for loss terms, knobs and teachers of the stage that the recipe does not know, with the nearest name."""
    lists = (("losses", stage.losses, losses), ("knobs", stage.knobs, knobs), ("teachers", stage.teachers, teachers))
    for field_, given, known in lists:
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
