"""A stage of training as data. The four papers' schedules are lists of stages, not training scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.contracts import BatchPlan, ClipRule, PositiveInt, Stream, derive
from trainer.blocks.discriminator import Kind, Norm, least_side
from trainer.losses.gan import GanLoss

Share = Annotated[float, Field(ge=0, le=1)]


Decay = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class OptimizerSpec(BaseModel):
    """Adam or AdamW with warm-up and decay, counted in optimizer steps of the stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["adam", "adamw"] = "adamw"
    lr: float = Field(1e-4, gt=0, le=1, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Decays of the averages of gradient and square.")
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, ge=0, description="Greatest global gradient norm; 0 turns clipping off.")
    warmup: int = Field(0, ge=0, description="Steps of linear warm-up from 0.")
    decay: Literal["constant", "cosine", "linear"] = "constant"
    floor: Share = Field(0.0, description="Where decay ends, as a share of lr.")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate at ``step`` of a stage of ``steps``."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.decay == "constant":
            return self.lr
        along = (step - self.warmup) / max(1, steps - self.warmup)
        share = 0.5 * (1 + math.cos(math.pi * along)) if self.decay == "cosine" else 1 - along
        return self.lr * (self.floor + (1 - self.floor) * share)


class DiscriminatorSpec(BaseModel):
    """The network of an adversary. It goes on training over a stage border where this is the same on both sides."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: Kind = Field("patch-2d", description="PatchGAN over frames, or over the clip.")
    width: Annotated[int, Field(ge=1, le=512)] = Field(64, description="Channels of the first convolution.")
    layers: Annotated[int, Field(ge=1, le=6)] = Field(3, description="Convolutions of stride 2.")
    norm: Norm = Field(
        "group", description="`batch` depends on the micro-batch, and so on the number of workers; the others don't."
    )


class AdversaryStage(BaseModel):
    """The adversary's part in a stage.

    ``adaptive`` multiplies ``weight`` by the ratio of the gradients of reconstruction and adversarial loss at the
    reconstruction, clamped to it (Esser et al. 2021, equation 7, at the reconstruction instead of the last layer): that
    of the step before, which is the same at any number of workers. In its first step the generator has no such term.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(gt=0, description="Weight of the adversarial term in the generator's loss.")
    start: int = Field(0, ge=0, description="Step of the stage at which the adversary starts.")
    network: DiscriminatorSpec = DiscriminatorSpec()
    generator: GanLoss = Field("non-saturating", description="The generator's loss.")
    discriminator: GanLoss = Field("hinge", description="The discriminator's loss.")
    adaptive: Annotated[float, Field(gt=0)] | None = Field(None, description="Greatest ratio; null takes weight as is.")
    lecam: float = Field(0.0, ge=0, description="Weight of LeCam's regularisation.")
    lecam_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.999, description="Of its running means of logits.")
    r1: float = Field(0.0, ge=0, description="Weight of half the squared gradient at real pixels.")
    optimizer: Mapping[str, Any] = Field(
        default_factory=dict, description="Fields that differ from the stage's; steps count from start."
    )


class Stage(BaseModel):
    """One stage: everything that may differ between phases of a schedule.

    ``train`` and ``freeze`` are name patterns (``fnmatch``) over parameters, and ``freeze`` wins. ``supervise`` counts
    frames from 1, both ends included; None is every frame. ``image_share`` is the share of global batches that are
    images, dealt by arithmetic; in a micro-batch, as many images as a clip has frames count as one clip. ``knobs``
    holds what only one recipe knows (One-DVA's latent length, for example); the recipe validates it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
    steps: Annotated[int, Field(ge=0, description="Optimizer steps; 0 leaves the stage out.")]
    clip: ClipRule
    batch: PositiveInt | None = Field(None, description="Global batch; None takes the manifest's.")
    image_share: Share = 0.0
    image_batch: PositiveInt | None = Field(None, description="Images in a global image batch; None takes batch.")
    image_freeze: tuple[str, ...] = Field(
        (), description="Parameters that rest in image batches: weights and optimizer state stay as they are."
    )
    train: tuple[str, ...] = ("*",)
    freeze: tuple[str, ...] = ()
    losses: Mapping[str, Weight] = Field(default_factory=dict, description="Weight of each loss term, by name.")
    supervise: tuple[PositiveInt, PositiveInt] | None = None
    adversary: AdversaryStage | None = None
    optimizer: Mapping[str, Any] = Field(default_factory=dict, description="Fields that differ from the run's.")
    init_from: str | None = Field(
        None, description="Checkpoint or run whose weights this stage starts from; optimizer and average start afresh."
    )
    init_average: bool = Field(
        False, description="Whether init_from means the weights that encode: averaged ones where the run keeps any."
    )
    teachers: Mapping[str, str] = Field(
        default_factory=dict, description="Checkpoints or runs whose models the recipe learns from, frozen, by name."
    )
    knobs: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Stage:
        if self.supervise and not 1 <= self.supervise[0] <= self.supervise[1] <= self.clip.frames:
            raise ValueError(f"supervise {list(self.supervise)} must lie within frames 1 to {self.clip.frames}")
        if self.adversary and self.steps:
            if self.adversary.start >= self.steps:
                raise ValueError(
                    f"adversary.start is {self.adversary.start} and the stage has {self.steps} steps: it would never "
                    "start. Lower start, or set adversary: null"
                )
            kind, layers = self.adversary.network.kind, self.adversary.network.layers
            least = least_side(kind, layers)
            if small := [size for size in self.clip.sizes if min(size) < least]:
                raise ValueError(
                    f"adversary.network.layers is {layers}: a {kind} discriminator of so many needs frames of at least "
                    f"{least} x {least} pixels, and the stage has {small[0][0]} x {small[0][1]}"
                )
        return self

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of that name moves in this stage."""
        return any(fnmatchcase(parameter, p) for p in self.train) and not any(
            fnmatchcase(parameter, p) for p in self.freeze
        )

    def rests(self, parameter: str) -> bool:
        """Whether the parameter of that name rests in the stage's image batches."""
        return bool(self.image_share) and any(fnmatchcase(parameter, p) for p in self.image_freeze)


class Schedule:
    """The stages in a row: which stage, batch, stream and bucket belong to a step. Pure arithmetic, O(1) in the step.

    ``batch`` is the global batch of stages that name none. Steps and places count from 0 over the whole run.
    ``batches`` and ``image_batches`` are the clips of a video and of an image batch, by stage.
    """

    def __init__(self, stages: Sequence[Stage], batch: int, seed: int) -> None:
        self.stages = tuple(stage for stage in stages if stage.steps)
        if not self.stages:
            raise ValueError("no stage has any steps")
        self.seed = seed
        self.batches = tuple(stage.batch or batch for stage in self.stages)
        self.image_batches = tuple(s.image_batch or b for s, b in zip(self.stages, self.batches, strict=True))
        self.first_steps: list[int] = []
        self._work_of = [
            clips * stage.clip.frames * sum(h * w for h, w in stage.clip.sizes) / len(stage.clip.sizes)
            for stage, clips in zip(self.stages, self.batches, strict=True)
        ]
        self.first_places: list[int] = []
        self._first_of: dict[Stream, list[int]] = {"video": [], "image": []}
        step = place = 0
        counts: dict[Stream, int] = {"video": 0, "image": 0}
        for stage, clips, pictures in zip(self.stages, self.batches, self.image_batches, strict=True):
            self.first_steps.append(step)
            self.first_places.append(place)
            for stream in counts:
                self._first_of[stream].append(counts[stream])
            images = _dealt(stage.image_share, stage.steps)
            counts["image"] += images * pictures
            counts["video"] += (stage.steps - images) * clips
            step += stage.steps
            place = sum(counts.values())
        self.steps = step
        self.clips = place

    def index(self, step: int) -> int:
        """Index into ``stages`` of the stage that holds ``step``; raises IndexError outside the run."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the run's {self.steps} steps")
        return max(i for i, first in enumerate(self.first_steps) if first <= step)

    def stage(self, step: int) -> Stage:
        """The stage that holds ``step``."""
        return self.stages[self.index(step)]

    def work(self, step: int) -> float:
        """Pixels trained on before ``step``, on average over buckets: what time left is estimated from."""
        return sum(
            work * min(max(step - first, 0), stage.steps)
            for work, first, stage in zip(self._work_of, self.first_steps, self.stages, strict=True)
        )

    def plan(self, step: int) -> BatchPlan:
        """The global batch of ``step``."""
        i = self.index(step)
        stage, within = self.stages[i], step - self.first_steps[i]
        images_before = _dealt(stage.image_share, within)
        is_image = _dealt(stage.image_share, within + 1) > images_before
        stream: Stream = "image" if is_image else "video"
        before: dict[Stream, int] = {
            "image": images_before * self.image_batches[i],
            "video": (within - images_before) * self.batches[i],
        }
        sizes = stage.clip.sizes
        size = sizes[derive(self.seed, step, "bucket") % len(sizes)]
        rule = stage.clip.model_copy(update={"frames": 1}) if is_image else stage.clip
        return BatchPlan(
            step=step,
            stage=stage.name,
            place=self.first_places[i] + sum(before.values()),
            clips=self.image_batches[i] if is_image else self.batches[i],
            stream=stream,
            stream_place=self._first_of[stream][i] + before[stream],
            size=size,
            rule=rule,
            per_clip=stage.clip.frames if is_image else 1,
        )


def _dealt(share: float, batches: int) -> int:
    """Image batches among the first ``batches`` of a stage: dealt as evenly as whole numbers allow."""
    return int(share * batches + 1e-9)
