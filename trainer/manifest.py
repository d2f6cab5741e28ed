"""A run as one YAML file: parsed safely, judged as a whole, and resolved into every stage's every field.

``load`` reports all faults in one go, each with field, value, reason and remedy. The manifest sets data, hardware and
step counts; architecture and the order of stages belong to the recipe.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from pipelines import index, storage, strict_yaml
from pipelines.contracts import PositiveInt
from pipelines.faults import InputError, near, nearest
from trainer import recipe as recipes
from trainer.losses.perceptual import LEAST_SIZE, PerceptualSpec
from trainer.losses.ssim import TAPS
from trainer.stage import OptimizerSpec, Schedule, Stage

LEAVE_SECONDS = 3.0
"""Spare time before a preemption's deadline, beside twice a step and twice a checkpoint."""
NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
"""A run's name. KubeRay takes DNS labels (RFC 1035) of 47 characters, seven of them the launch's; Ray's submission ids,
Prometheus's label values and S3's keys take all of these."""
IN_WORDS = {
    **dict.fromkeys(("model_type", "dict_type", "mapping_type"), "a mapping of fields belongs here"),
    **dict.fromkeys(("tuple_type", "list_type"), "a list belongs here"),
    "too_short": "give at least {min_length}",
    "too_long": "give at most {max_length}",
}
"""Faults that pydantic names in Python's terms, in YAML's."""
BRANCH = re.compile(r"(int|float|str|bool)$|(tuple|constrained-\w+|literal|function-\w+|nullable|dict|list)\b|.*\[")
"""What pydantic calls a branch of a union, in a fault's place."""
GREATEST_BATCH, GREATEST_WORKERS = 1 << 20, 1 << 14
STAND_IN = "/of-no-dataset"
"""Where the datasets at fault would be, while the rest of a manifest is judged."""
_LABEL = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_NAME = f"{_LABEL}([.]{_LABEL})*"
_WORD = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
DnsLabel = Annotated[str, Field(pattern=f"^{_LABEL}$")]
DnsName = Annotated[str, Field(pattern=f"^{_NAME}$", max_length=253)]
LabelKey = Annotated[str, Field(pattern=f"^({_NAME}/)?{_WORD}$", max_length=317)]
LabelValue = Annotated[str, Field(pattern=f"^({_WORD})?$")]
Seconds = Annotated[float, Field(gt=0, le=10**8)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DatasetRef(_Part):
    """One dataset of a mixture."""

    dataset: Annotated[str, Field(min_length=1, description="URL or path of a folder that holds an index.json.")]
    weight: Annotated[float, Field(gt=0, le=10**9, description="Share of the mixture, relative to the others.")] = 1.0
    digest: str | None = Field(None, description="Filled in at the first start: a dataset that changes is refused.")

    @field_validator("dataset")
    @classmethod
    def _read_from(cls, url: str) -> str:
        return _readable(url)


def _readable(url: str) -> str:
    try:
        storage.is_remote(url)
    except InputError as error:
        raise ValueError(str(error)) from None
    return url


def _as_refs(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    return [{"dataset": item} if isinstance(item, str) else item for item in items]


class DataSpec(_Part):
    """What is trained on and how it is read."""

    train: Annotated[tuple[DatasetRef, ...], Field(min_length=1)]
    images: tuple[DatasetRef, ...] = Field((), description="Image batches; empty takes frames of the videos.")
    eval: str | None = Field(None, description="Dataset of the evaluation; never trained on.")
    granularity: PositiveInt = Field(1, description="Neighbouring clips that are read, and shuffled, as one.")
    workers: Annotated[int, Field(ge=0, le=128)] = Field(1, description="Decoding threads of each rank.")
    read_ahead: PositiveInt = Field(2, description="Global batches that are fetched before they are needed.")
    memory_mb: PositiveInt = Field(1024, description="Bound on what a rank's loader holds.")
    skip_budget: Annotated[float, Field(ge=0, le=1)] = Field(0.01, description="Share of clips that may be skipped.")
    timeout_seconds: Seconds = Field(300, description="A read that takes longer ends the attempt with a message.")

    @field_validator("train", "images", mode="before")
    @classmethod
    def _refs(cls, value: Any) -> Any:
        return _as_refs(value)

    @field_validator("eval")
    @classmethod
    def _read_from(cls, url: str | None) -> str | None:
        return url and _readable(url)


class ZeroSpec(_Part):
    """DeepSpeed's ZeRO stage."""

    stage: Literal[0, 1, 2, 3] = 1


WorkerCount = Annotated[int, Field(gt=0, le=GREATEST_WORKERS)]


class WorkerSpec(_Part):
    """The worker group. ``count`` is a number, or [least, greatest] for an elastic run."""

    count: WorkerCount | tuple[WorkerCount, WorkerCount] = Field(1, description="Workers, or [least, greatest].")
    gpus: Annotated[float, Field(ge=0, le=64)] = Field(0, description="GPUs of one worker; 0 trains on CPU.")
    cpus: Annotated[float, Field(gt=0, le=1024)] = Field(1, description="CPU cores of one worker.")
    resize_seconds: Seconds = Field(60, description="Between looks for machines by which an elastic run can grow.")

    @property
    def least(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.count if isinstance(self.count, int) else self.count[0]

    @property
    def greatest(self) -> int:
        """Most workers that the run takes."""
        return self.count if isinstance(self.count, int) else self.count[1]

    @field_validator("gpus", "cpus")
    @classmethod
    def _dealt(cls, amount: float, info: ValidationInfo) -> float:
        if round(amount, 4) != amount:
            raise ValueError("give at most four decimals: Ray deals out no less than ten-thousandths")
        if info.field_name == "gpus" and amount > 1 and amount % 1:
            raise ValueError("a worker has a part of one GPU, or whole ones")
        return amount

    @field_validator("count")
    @classmethod
    def _ordered(cls, count: int | tuple[int, int]) -> int | tuple[int, int]:
        if not isinstance(count, int) and count[0] > count[1]:
            raise ValueError("the least number comes first")
        return count


class CheckpointSpec(_Part):
    """When checkpoints are taken and how many stay."""

    every_steps: PositiveInt = 500
    keep: PositiveInt = 3
    timeout_seconds: Seconds = Field(1800, description="A write or commit that takes longer ends the attempt.")


class FailureSpec(_Part):
    """What a run survives."""

    max_failures: Annotated[int, Field(ge=0)] = 10
    max_preemptions: Annotated[int, Field(ge=0)] | Literal["unlimited"] = "unlimited"
    grace_seconds: Seconds = Field(30, description="Notice before a preempted machine goes.")
    hang_seconds: Seconds = Field(600, description="A collective that waits longer for a peer ends the attempt.")


class EvaluationSpec(_Part):
    """Evaluation on ``data.eval`` while the run trains, beside its baselines; always once more at the end."""

    every_steps: PositiveInt | None = Field(None, description="Steps between evaluations; null evaluates none.")
    clips: PositiveInt = Field(16, description="Clips, spread over the dataset: the same ones every time.")
    lpips: PerceptualSpec = Field(PerceptualSpec(backbone="alex", weights="random"), description="Which LPIPS.")


class TelemetrySpec(_Part):
    """What a run says of itself."""

    log_every: PositiveInt = Field(10, description="Steps between lines of metrics.jsonl.")
    bind: str = Field("127.0.0.1", description="Address that metrics are served on; 0.0.0.0 means all of a machine.")
    port: Annotated[int, Field(ge=0, le=65000)] = Field(
        0, description="Port of the run's own address; local rank n takes port + 1 + n. 0 takes free ones."
    )
    tensorboard: bool = True

    @field_validator("bind")
    @classmethod
    def _address(cls, bind: str) -> str:
        with contextlib.suppress(ValueError):
            ipaddress.IPv4Address(bind)
            return bind
        if bind != "localhost":
            raise ValueError("an IPv4 address of this machine belongs here: 127.0.0.1, or 0.0.0.0 for all of them")
        return bind


class Toleration(_Part):
    """A taint that worker pods tolerate, as in a pod's specification."""

    key: LabelKey | None = Field(None, description="The taint's key; None tolerates every key.")
    operator: Literal["Exists", "Equal"] = "Exists"
    value: LabelValue | None = Field(None, description="The taint's value; for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Toleration:
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("value belongs to operator: Equal")
        if self.operator == "Equal" and self.key is None:
            raise ValueError("operator: Equal needs a key")
        return self


class KubernetesSpec(_Part):
    """What only a RayJob needs. A head pod, which trains nothing, and pods of ``workers_per_pod`` workers each."""

    image: str = Field(
        max_length=512,
        pattern=r"^[a-z0-9][A-Za-z0-9_./:@-]*$",
        description="The image of this repository's Dockerfile.",
    )
    namespace: DnsLabel = "default"
    queue: DnsLabel | None = Field(None, description="Kueue's LocalQueue, which starts the job when there is room.")
    spot: bool = Field(True, description="Worker pods may run on spot nodes; the head never does.")
    tolerations: tuple[Toleration, ...] = Field((), description="Further taints that worker pods tolerate.")
    node_selector: Mapping[LabelKey, LabelValue] = Field(
        default_factory=dict, description="Labels of the workers' nodes."
    )
    service_account: DnsName | None = Field(None, description="For access to storage without keys.")
    secrets: tuple[DnsName, ...] = Field((), description="Secrets whose keys become environment variables.")
    workers_per_pod: PositiveInt = Field(1, le=64, description="Workers that share a pod: the GPUs of a machine.")
    memory_gb: PositiveInt = Field(16, le=1 << 14, description="Memory of a worker pod, GiB.")
    disk_gb: PositiveInt = Field(
        20, le=1 << 16, description="Scratch of a pod, GiB: Ray's and TensorBoard's files; checkpoints take none."
    )
    retries: Annotated[int, Field(ge=0, le=100)] = Field(
        2, description="New clusters after one that was lost with its head; the run goes on from its last commit."
    )


class RunManifest(_Part):
    """One run, validated. ``stages`` holds what differs from the recipe's published stages, by stage name."""

    name: str
    recipe: str
    model: Mapping[str, Any] = Field(default_factory=dict, description="The recipe's configuration.")
    data: DataSpec
    batch: PositiveInt = Field(
        le=GREATEST_BATCH, description="Global batch; micro-batch and accumulation follow from the world size."
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="Most clips of one forward pass of one rank; of images, as many as a clip has frames count as one.",
    )
    precision: Literal["fp32", "bf16"] = "bf16"
    compile: bool = Field(False, description="torch.compile for the model: a slow first step, then faster ones.")
    channels_last: bool = Field(
        False, description="Convolutions with a pixel's channels as neighbours, as tensor cores read them."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    optimizer: OptimizerSpec = OptimizerSpec()
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Decay of the averaged weights; 0 keeps none.")
    zero: ZeroSpec = ZeroSpec()
    clip: Mapping[str, Any] = Field(default_factory=dict, description="Fields of the clip rule, for all stages.")
    teachers: Mapping[str, str] = Field(
        default_factory=dict, description="Runs whose models the recipe learns from, frozen, by name, for all stages."
    )
    stages: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    workers: WorkerSpec = WorkerSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    failure: FailureSpec = FailureSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    telemetry: TelemetrySpec = TelemetrySpec()
    kubernetes: KubernetesSpec | None = Field(None, description="What `submit --cluster kubernetes` needs beside this.")
    trace: bool = Field(False, description="Write every clip's place and key to trace/*.jsonl.")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError(
                "use 1 to 40 small letters, digits and inner hyphens, a letter first: it names pods, labels and folders"
            )
        return name

    @cached_property
    def loaded_recipe(self) -> recipes.Recipe:
        """The recipe, constructed from ``model``; one that trains on latents takes their layout from ``data.train``,
        where that can be opened.
        """
        kind = recipes.load(self.recipe)
        return kind(kind.Config.model_validate(_with_layout(kind, self.model, self.data.train[0].dataset)))

    @cached_property
    def holds(self) -> bool:
        """Whether recipe, model and stages fit together. They may not where :func:`validate` judges what is left of a
        manifest with faults; nothing that follows from them is known then.
        """
        try:
            return bool(self.resolved())
        except (ValidationError, InputError):
            return False

    @cached_property
    def schedule(self) -> Schedule:
        """Every stage resolved, and the arithmetic of steps and places."""
        return Schedule(resolve_stages(self), self.batch, self.seed)

    def optimizer_for(self, stage: Stage) -> OptimizerSpec:
        """The stage's optimizer: its own fields, where there are none the manifest's, then the defaults."""
        return OptimizerSpec.model_validate({**self.optimizer.model_dump(), **stage.optimizer})

    def adversary_optimizer_for(self, stage: Stage) -> OptimizerSpec:
        """The discriminator's optimizer: its own fields, where there are none the stage's."""
        own = stage.adversary.optimizer if stage.adversary else {}
        return OptimizerSpec.model_validate({**self.optimizer_for(stage).model_dump(), **own})

    def resolved(self) -> dict[str, Any]:
        """The manifest with every default and stage spelled out, as plain data; loading it again gives the same run."""
        plain = self.model_dump(mode="json")
        plain["model"] = self.loaded_recipe.config.model_dump(mode="json")
        plain["clip"], plain["teachers"], plain["stages"] = {}, {}, {}
        for stage in resolve_stages(self):
            said = stage.model_dump(mode="json", exclude={"name"})
            said["optimizer"] = self.optimizer_for(stage).model_dump(mode="json")
            if stage.adversary:
                said["adversary"]["optimizer"] = self.adversary_optimizer_for(stage).model_dump(mode="json")
            plain["stages"][stage.name] = said
        return plain

    def identity(self) -> dict[str, Any]:
        """What decides the weights; a run is only resumed where this is the same. Hardware and cadence are left out,
        except where hardware decides them too: by a batch normalisation's micro-batch.
        """
        plain = self.resolved()
        data = plain["data"]
        kept = ("recipe", "model", "batch", "precision", "seed", "optimizer", "ema", "stages")
        refs = {k: [{f: r[f] for f in ("dataset", "weight")} for r in data[k]] for k in ("train", "images")}
        same = {k: plain[k] for k in kept} | {"data": {**refs, "granularity": data["granularity"]}}
        if _by_micro_batch(resolve_stages(self)):
            same |= {"micro_batch": plain["micro_batch"], "workers": {"count": plain["workers"]["count"]}}
        return same

    def digest(self) -> str:
        """Short digest of ``identity``."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]


def _with_layout(kind: type[recipes.Recipe], model: Mapping[str, Any], dataset: Any) -> dict[str, Any]:
    """A recipe's configuration with the layout of the latents that it trains on, where the dataset can be opened."""
    made = dict(model)
    if "latents" in kind.Config.model_fields and made.get("latents") is None and isinstance(dataset, str):
        with contextlib.suppress(InputError, OSError, ValueError):  # of a dataset that is none, others speak
            made["latents"] = index.open_dataset(storage.absolute(dataset)).latents
    return made


def resolve_stages(manifest: RunManifest) -> tuple[Stage, ...]:
    """The recipe's stages, changed by the manifest's ``clip``, ``optimizer`` and ``teachers``, then by what it says of
    each stage.

    Raises ValidationError or InputError.
    """
    published = manifest.loaded_recipe.stages()
    unknown = [name for name in manifest.stages if name not in {s.name for s in published}]
    if unknown:
        known = [s.name for s in published]
        raise InputError(
            "\n".join(_unknown(f"stages.{name}", name, known, f"recipe {manifest.recipe} has") for name in unknown),
            status=2,
        )
    return tuple(_resolve_stage(manifest, stage) for stage in published)


def _resolve_stage(manifest: RunManifest, published: Stage) -> Stage:
    optimizer = manifest.optimizer.model_dump(exclude_unset=True)
    everywhere = {"clip": manifest.clip, "optimizer": optimizer, "teachers": manifest.teachers}
    merged = _merge(_merge(published.model_dump(), everywhere), manifest.stages.get(published.name, {}))
    return Stage.model_validate(merged)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


Judge = Callable[[RunManifest], Iterable[str]]
"""Faults of a manifest that only its target has. It may be given a manifest that doesn't ``holds``."""


def load(
    source: str | Path, sets: Sequence[str] = (), *, name: str | None = None, judge: Judge | None = None
) -> RunManifest:
    """Reads, changes and judges a manifest.

    ``source`` is a path or URL, ``sets`` are ``a.b=value`` with YAML values, ``name`` replaces the run's name. Raises
    InputError with every fault on a line of its own, those of ``judge`` too; a manifest without faults it is not given.
    """
    text = strict_yaml.read(str(source), "manifest")
    plain = parse(text, str(source))
    for change in sets:
        _set(plain, change)
    if name is not None:
        plain["name"] = name
    return validate(plain, str(source), judge)


def named_datasets(source: str) -> list[str]:
    """The datasets that a faulty manifest names, as far as it can be read."""
    try:
        plain = parse(strict_yaml.read(source, "manifest"), source)
    except InputError:
        return []
    return list(dict.fromkeys(url for name in ("train", "images", "eval") for url in _datasets(plain, name)))


def _datasets(plain: Mapping[str, Any], name: str) -> list[str]:
    """The URLs of a field of ``data``, as far as it can be read."""
    data = plain.get("data")
    refs = _as_refs(data.get(name)) if isinstance(data, dict) else []
    return [ref["dataset"] for ref in refs if isinstance(ref, dict) and isinstance(ref.get("dataset"), str)]


def validate(plain: Mapping[str, Any], where: str, judge: Judge | None = None) -> RunManifest:
    """Judges parsed YAML as a whole; raises InputError with all faults: of fields, and what the others show jointly."""
    faults: list[str] = []
    manifest: RunManifest | None = None
    try:
        manifest = RunManifest.model_validate(plain)
    except ValidationError as error:
        faults += _explain(error, RunManifest)
    if isinstance(plain.get("recipe"), str):
        faults += _recipe_faults(plain["recipe"], plain)
    faults += _keys(plain, faults)
    if faults:
        sound, places = _sound(plain, faults)
        told: list[str] = []
        if sound is not None:
            told = [*(_joint if sound.holds else _of_any_recipe)(sound), *(judge(sound) if judge else ())]
            told += _switches(plain, sound.resolved() if sound.holds else sound.model_dump())
        faults += [line for line in told if not any(re.search(rf"\b{re.escape(place)}\b", line) for place in places)]
    elif manifest is not None:
        faults += [*_joint(manifest), *_switches(plain, manifest.resolved())]
        faults += judge(manifest) if faults and judge else ()
    if faults:
        faults = list(dict.fromkeys(faults))
        listing = "\n  ".join(faults)
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise InputError(f"{where}: {count} in the manifest:\n  {listing}", status=2)
    assert manifest is not None
    return manifest


def _sound(plain: Mapping[str, Any], faults: Sequence[str]) -> tuple[RunManifest | None, list[str]]:
    """What is left of a manifest without the fields at fault, and the places of those: what is said of them, or worked
    out from them, is void.

    Fields that a manifest must have are stood in for; an unknown recipe by the one whose name is nearest.
    """
    rest: Any = copy.deepcopy({name: value for name, value in plain.items() if isinstance(name, str)})
    places: list[str] = []
    for line in faults:
        place = line.partition(": ")[0]
        node, holder, taken = rest, None, [""]
        keys = [place] if place in rest else place.split(".")
        for depth, key in enumerate(keys, 1):
            if isinstance(node, dict) and key in node:
                node, holder, taken = node[key], node, keys[:depth]
            elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
                node = node[int(key)]
            else:
                break
        if holder is not None:
            del holder[taken[-1]]
        if ": no such field" not in line:
            places += dict.fromkeys((place, ".".join(taken) or place))
    if "name" in places:
        places.remove("name")
    if "recipe" in places:
        places.remove("recipe")
        rest["recipe"] = (isinstance(plain.get("recipe"), str) and nearest(plain["recipe"], recipes.names())) or ""
    stand_ins = {"name": "run", "recipe": "", "batch": 1, "data": {"train": STAND_IN}}
    if isinstance(data := rest.get("data"), dict):
        data.setdefault("train", STAND_IN)
    try:
        manifest = _stood_in({**stand_ins, **rest}, stand_ins, places)
    except ValidationError:
        return None, places
    if "batch" not in rest:
        manifest = manifest.model_copy(update={"batch": manifest.workers.greatest})
    return manifest, places


def _stood_in(rest: dict[str, Any], stand_ins: Mapping[str, Any], places: list[str]) -> RunManifest:
    """The manifest without the parts that stay at fault when the fields at fault are gone, which join ``places``."""
    try:
        return RunManifest.model_validate(rest)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            part, *below = map(str, fault["loc"] or [""])
            if part == "data" and below[:1] == ["train"]:
                part, rest["data"] = "data.train", {**rest["data"], "train": STAND_IN}
            else:
                rest.pop(part, None)
            places.append(part)
    return RunManifest.model_validate({**stand_ins, **rest})


def _switches(said: Any, made: Any, place: str = "") -> Iterator[str]:
    """Yes and no where a number belongs. YAML has six words for each, and Python takes them for 1 and 0."""
    if isinstance(said, bool) and type(made) in (int, float):
        yield f"{place}: {json.dumps(said)}: a number belongs here; yes, no, on and off are none"
    elif isinstance(said, Mapping) and isinstance(made, Mapping):
        for key in said.keys() & made.keys():
            yield from _switches(said[key], made[key], f"{place}.{key}" if place else str(key))
    elif isinstance(said, list) and isinstance(made, list) and len(said) == len(made):
        for index, (inner, outer) in enumerate(zip(said, made, strict=True)):
            yield from _switches(inner, outer, f"{place}.{index}")


def _keys(plain: Mapping[str, Any], faults: Sequence[str]) -> Iterator[str]:
    """Keys in a URL, but where the field itself refuses them."""
    refused = [line.partition(": ")[0] for line in faults]
    for place, text in _texts(plain):
        if storage.holds_keys(text) and not any(fault.startswith(place) for fault in refused):
            yield (
                f"{place}: {storage.redact(text)[:200]}: keys would stand in the copies of the manifest, for all who "
                "see the run. Leave them out, and give the machines keys, or a copy of the file"
            )


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _texts(inner, f"{place}.{key}" if place else str(key))


def _recipe_faults(name: str, plain: Mapping[str, Any]) -> list[str]:
    """Faults of the recipe, its model and its stages, whatever else is wrong."""
    faults: list[str] = []
    try:
        kind = recipes.load(name)
    except InputError as error:
        faults = [f"recipe: {error}{near(name, recipes.names())}"]
        meant = nearest(name, recipes.names())
        if meant is None:
            return faults
        kind, name = recipes.load(meant), meant
    given = plain.get("model") or {}
    if isinstance(given, Mapping):
        given = _with_layout(kind, given, next(iter(_datasets(plain, "train")), None))
    try:
        config = kind.Config.model_validate(given)
    except ValidationError as error:
        faults += _explain(error, kind.Config, prefix="model.")
        try:
            config = kind.Config()  # the names of the stages can be judged all the same
        except ValidationError:
            return faults
    published = kind(config).stages()
    said, clip = ({**value} if isinstance(value, Mapping) else {} for value in (plain.get("stages"), plain.get("clip")))
    known = [stage.name for stage in published]
    faults += [_unknown(f"stages.{s}", s, known, f"recipe {name} has") for s in map(str, said) if s not in known]
    try:
        Stage.model_validate(_merge(published[0].model_dump(), {"clip": clip}))
    except ValidationError as error:
        faults, clip = faults + _explain(error, Stage), {}
    for stage in published:
        change = said.get(stage.name) or {}
        if not isinstance(change, Mapping):
            continue
        merged = _merge(_merge(stage.model_dump(), {"clip": clip}), change)
        adversary = merged.get("adversary")
        its = adversary.get("optimizer") if isinstance(adversary, Mapping) else None
        parts = ((Stage, "", merged), (OptimizerSpec, "optimizer.", merged.get("optimizer")),
                 (OptimizerSpec, "adversary.optimizer.", its))  # fmt: skip
        for model, place, value in parts:
            try:
                if isinstance(value, Mapping):
                    model.model_validate(value)
            except ValidationError as error:
                faults += _explain(error, model, prefix=f"stages.{stage.name}.{place}")
    return faults


def _joint(manifest: RunManifest) -> list[str]:
    """Faults that only show when fields are taken together."""
    faults: list[str] = []
    try:
        stages = resolve_stages(manifest)
    except (ValidationError, InputError):
        return []
    if not any(stage.steps for stage in stages):
        faults.append("stages: every stage has 0 steps; give at least one of them some")
    workers, recipe = manifest.workers, manifest.loaded_recipe
    for stage in stages:
        batch = min(clips for clips in (stage.batch or manifest.batch, stage.image_batch) if clips)
        if batch < workers.greatest:
            faults.append(
                f"workers.count: {workers.greatest} workers share a global batch of {batch} clips in stage "
                f"{stage.name!r}; some would have none. Raise batch or lower workers.count"
            )
            break
    for stage in stages:
        if stage.steps:
            faults += [f"stages.{stage.name}.{line}" for line in recipe.check(stage)]
        if recipes.codes(recipe):
            faults += _sizes(recipe, stage)
    if workers.least != workers.greatest:
        faults += [
            f"stages.{stage.name}.adversary.network.norm: batch: its statistics are those of a rank's micro-batch, so "
            f"workers.count {list(_pair(workers.count))} would train another model at each size. Use norm: group, or "
            "give workers.count one number"
            for stage in _by_micro_batch(stages)
        ]
    faults += _of_any_recipe(manifest)
    if manifest.data.eval and not recipes.codes(recipe):
        faults.append(f"data.eval: {manifest.data.eval}: recipe {recipe.name} decodes no videos, so nothing can be "
                      "evaluated. Leave it out; `moviola sample` draws samples")  # fmt: skip
    return faults


def _of_any_recipe(manifest: RunManifest) -> Iterator[str]:
    """Faults that only show when fields are taken together, whatever is trained."""
    if manifest.failure.grace_seconds <= LEAVE_SECONDS:
        yield (
            f"failure.grace_seconds: {manifest.failure.grace_seconds:g}: a run leaves {LEAVE_SECONDS:g} s before the "
            "end of the notice, so there is no time to commit. Raise it to the notice that your machines give"
        )
    if manifest.compile and manifest.zero.stage == 3:
        yield (
            "compile: true: ZeRO-3 gathers weights within the forward pass, which breaks compiled graphs. "
            "Set zero.stage to 2 or less, or compile: false"
        )
    if manifest.kubernetes is not None:
        yield from _kubernetes(manifest, manifest.kubernetes)
    trained = {ref.dataset.rstrip("/") for ref in (*manifest.data.train, *manifest.data.images)}
    if manifest.data.eval and manifest.data.eval.rstrip("/") in trained:
        yield f"data.eval: {manifest.data.eval} is also trained on; hold other videos back"
    if manifest.evaluation.every_steps and not manifest.data.eval:
        yield "evaluation.every_steps: there is no data.eval to evaluate on; name a dataset there"


def _by_micro_batch(stages: Iterable[Stage]) -> list[Stage]:
    """Stages in which what is computed depends on how a global batch is cut into micro-batches."""
    return [s for s in stages if s.steps and s.adversary and s.adversary.network.norm == "batch"]


def _sizes(recipe: recipes.CodecRecipe, stage: Stage) -> Iterator[str]:
    for height, width in stage.clip.sizes:
        try:
            recipe.latent(stage.clip.frames, height, width)
        except InputError as error:
            yield f"stages.{stage.name}.clip.sizes: {error}"
    perceptual = getattr(recipe.config, "perceptual", None)
    least = {"ssim": TAPS, "lpips": LEAST_SIZE[perceptual.backbone] if perceptual is not None else 0}
    for term, side in least.items() if stage.steps else ():
        if stage.losses.get(term) and min(small := min(stage.clip.sizes, key=min)) < side:
            yield (
                f"stages.{stage.name}.clip.sizes: {list(small)}: {term} needs at least {side} x {side} pixels. Take "
                f"larger frames, or set losses.{term} to 0"
            )


def _kubernetes(manifest: RunManifest, spec: KubernetesSpec) -> Iterator[str]:
    """Pods that can't be made of the workers that were asked for."""
    workers, each = manifest.workers, spec.workers_per_pod
    uneven = [count for count in sorted({workers.least, workers.greatest}) if count % each]
    if uneven:
        yield (
            f"kubernetes.workers_per_pod: {each}: workers.count {uneven[0]} is no multiple of it. "
            f"Pods are whole: use {uneven[0] // each * each or each} workers, or another workers_per_pod"
        )
    if workers.gpus * each % 1:
        yield (
            f"workers.gpus: {workers.gpus:g}: a pod of {each} would have {workers.gpus * each:g} GPUs, and Kubernetes "
            "gives whole ones. Use whole GPUs, or a workers_per_pod that makes them whole"
        )
    if spec.queue is not None and workers.least != workers.greatest:
        yield (
            f"kubernetes.queue: {spec.queue!r}: Kueue admits a fixed number of pods, and workers.count is "
            f"{list(_pair(workers.count))}. Give one number, or leave the queue out"
        )


def _pair(count: int | tuple[int, int]) -> tuple[int, int]:
    return (count, count) if isinstance(count, int) else count


def schema() -> dict[str, Any]:
    """JSON Schema of a manifest, with every recipe's ``model``: what editors complete and check with.

    It is wider than :func:`validate`: what only shows jointly is not in it.
    """
    stage = Stage.model_json_schema(ref_template="#/$defs/{model}")
    definitions = {**stage.pop("$defs"), "Stage": stage}
    for definition in definitions.values():  # a manifest says what differs from the published stage
        definition.pop("required", None)
    for name in ("Stage", "AdversaryStage"):
        definitions[name]["properties"]["optimizer"] = {"$ref": "#/$defs/OptimizerSpec"}
    del stage["properties"]["name"]
    whole = RunManifest.model_json_schema()
    fields = whole["properties"]
    whole["$defs"] |= definitions
    ref = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/DatasetRef"}]}
    for name in ("train", "images"):
        several = whole["$defs"]["DataSpec"]["properties"][name]
        several |= {"anyOf": [*ref["anyOf"], {"type": several.pop("type"), "items": ref}]}
        del several["items"]
    stages = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Stage"}}
    fields["clip"] |= {"$ref": "#/$defs/ClipRule"}
    fields["stages"] |= stages
    fields["name"]["pattern"] = f"^{NAME.pattern}$"
    fields["recipe"]["enum"] = recipes.names()
    whole["allOf"] = []
    for name in recipes.names():
        kind = recipes.load(name)
        model = kind.Config.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        whole["$defs"] |= {f"{name}.{key}": value for key, value in model.pop("$defs", {}).items()}
        whole["$defs"][name] = model
        then: dict[str, Any] = {"model": {"$ref": f"#/$defs/{name}"}}
        with contextlib.suppress(ValidationError):
            published = kind(kind.Config()).stages()
            then["stages"] = {"properties": {stage.name: {"$ref": "#/$defs/Stage"} for stage in published}}
        whole["allOf"].append({"if": {"properties": {"recipe": {"const": name}}}, "then": {"properties": then}})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **whole}


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Lines ``field: old -> new`` for every leaf that differs."""
    for key in sorted({*old, *new}):
        a, b = old.get(key, "(unset)"), new.get(key, "(unset)")
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from difference(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}: {json.dumps(a, default=str)} -> {json.dumps(b, default=str)}"


def parse(text: str, where: str) -> dict[str, Any]:
    """YAML text -> plain mapping; raises InputError with line and column."""
    return strict_yaml.mapping(text, where, "a manifest is")


def _set(plain: dict[str, Any], change: str) -> None:
    path, equals, text = change.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"--set {change!r}: write it as field=value, for example optimizer.lr=1e-4", status=2)
    if len(keys) > strict_yaml.MAX_DEPTH:
        raise InputError(f"--set {change[:80]!r}…: {len(keys)} levels of fields; no manifest has so many", status=2)
    try:
        value = strict_yaml.value(text)
    except strict_yaml.UNREADABLE as error:
        why = getattr(error, "problem", None)
        raise InputError(
            f"--set {change[:200]!r}: {text[:200]!r} is not a YAML value" + (f": {why}" if why else ""), status=2
        ) from None
    node: Any = plain
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = _item(node, key, change)
            continue
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict | list):
            raise InputError(f"--set {change!r}: {'.'.join(keys[: depth + 1])} has no fields", status=2)
    if isinstance(node, list):
        _item(node, keys[-1], change)
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def changed_model(recipe: recipes.Recipe, sets: Sequence[str]) -> recipes.Recipe:
    """A trained model's recipe with ``sets`` (``model.a=value``) of fields that change no weights.

    Raises InputError for other fields, and for values that the configuration refuses.
    """
    kind = type(recipe)
    fields = kind.Config.model_fields
    free = [name for name, known in fields.items() if known.json_schema_extra == recipes.FREE]
    plain = {"model": recipe.config.model_dump(mode="json")}
    for change in sets:
        top, _, rest = change.partition("=")[0].strip().partition(".")
        if top != "model" or rest.partition(".")[0] not in free:
            may = ", ".join(f"model.{name}" for name in free) or "none"
            raise InputError(
                f"--set {change!r}: a trained model takes only what changes no weights; of recipe {kind.name} that is "
                f"{may}",
                status=2,
            )
        _set(plain, change)
    try:
        return kind(kind.Config.model_validate(plain["model"]))
    except ValidationError as error:
        raise InputError("\n".join(_explain(error, kind.Config, prefix="model.")), status=2) from None


def _item(node: list[Any], key: str, change: str) -> Any:
    if not key.isascii() or not key.isdigit() or int(key) >= len(node):
        raise InputError(f"--set {change!r}: {key!r} is not one of the list's {len(node)} places (from 0)", status=2)
    return node[int(key)]


def _explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[str]:
    """A line a fault, without those that only repeat a fault further down."""
    faults = [(_path(fault, model), fault) for fault in error.errors(include_url=False)]
    deeper = {tuple(path[:depth]) for path, _ in faults for depth in range(1, len(path))}
    lines: dict[str, str] = {}
    for path, fault in faults:
        if tuple(path) not in deeper:
            line, place = _line(path, fault, model, prefix), ".".join(path)
            lines[place] = f"{lines[place]}, or {line.rpartition(': ')[2]}" if place in lines else line
    return list(lines.values())


def _path(fault: Any, model: type[BaseModel]) -> list[str]:
    """The fault's place as the user writes it: without the names that pydantic gives to branches of a union."""
    path: list[str] = []
    here = [model]
    *outer, last = map(str, fault["loc"] or [""])
    for part in outer if fault["type"] == "extra_forbidden" else filter(None, (*outer, last)):
        fields = [kind.model_fields[part].annotation for kind in here if part in kind.model_fields]
        branch = not fields and len(here) > 1
        if BRANCH.match(part) and not fields:
            continue
        if branch:
            here = [kind for kind in here if _tagged(kind, part)] or here
            if any(_tagged(kind, part) for kind in here):
                continue
        path.append(part)
        if fields:
            here = [kind for annotation in fields for kind in _models_in(annotation)]
    return [*path, last] if fault["type"] == "extra_forbidden" else path


def _tagged(kind: type[BaseModel], tag: str) -> bool:
    return any(tag in getattr(field.annotation, "__args__", ()) for field in kind.model_fields.values())


def _line(path: list[str], fault: Any, model: type[BaseModel], prefix: str) -> str:
    place = prefix + ".".join(path)
    if fault["type"] == "extra_forbidden":
        return _unknown(place, path[-1], _fields_at(model, fault["loc"][:-1]), "known here:")
    if fault["type"] == "missing":
        return f"{place}: missing, and there is no default"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] in IN_WORDS:
        message = IN_WORDS[fault["type"]].format(**fault.get("ctx", {}))
    given = fault["input"]
    if isinstance(given, Mapping):  # what the user wrote, without a layout that was added to it
        given = {key: value for key, value in given.items() if not isinstance(value, BaseModel)}
    shown = storage.redact(json.dumps(given, default=str))
    return f"{place.rstrip('.') or 'manifest'}: {shown[:80]}: {message[0].lower()}{message[1:]}"


def _unknown(place: str, name: str, known: Sequence[str], what: str) -> str:
    return f"{place}: no such field{near(name, known)} ({what} {', '.join(sorted(set(known)))})"


def _fields_at(model: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    here = [model]
    for part in map(str, loc):
        fields = [kind.model_fields[part].annotation for kind in here if part in kind.model_fields]
        if fields:
            here = [kind for annotation in fields for kind in _models_in(annotation)]
        elif len(here) > 1:
            here = [kind for kind in here if _tagged(kind, part)] or here
    return [name for kind in here for name in kind.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _models_in(inner)]
