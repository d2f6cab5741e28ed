"""The one file that knows DeepSpeed: a model, its optimizer and its average, sharded by ZeRO 0 to 3.

    init_distributed(device, timeout)                   torch.distributed and DeepSpeed, from torchrun, Ray or alone
    engine = Engine(model, stage, spec, zero_stage=2, precision="bf16", device=device, ema_decay=0.999)
    engine(x)                                           forward with a gradient; `engine.model` is what a recipe gets
    engine.module                                       the bare module, for a forward that this engine doesn't train
    engine.backward(loss, last=True)                    adds the loss's gradient; sums over ranks and micro-batches
    grad_norm = engine.step(lr, image=False)            clips, updates weights and average
    engine.next_stage(stage, spec)                      other parameters train; what goes on training keeps its state
    engine.weights(ema=False)                           whole weights on the CPU, on every rank, for evaluation
    engine.load(weights)                                starts from these weights, with a fresh optimizer and average
    engine.snapshot() -> Snapshot                       a copy of what this rank owns, taken behind the next forward
    engine.close()                                      before another is built for the same module
    engine.restore(state)                               from `checkpoint["model"]`, at any world size and ZeRO stage

A rank owns *pieces*: contiguous runs of flattened tensors, each named by its kind (``weight``, ``exp_avg``,
``exp_avg_sq``, ``ema``), its parameter and where in the parameter it starts. All ranks' pieces cover every tensor once.
A checkpoint is made of pieces and knows nothing of ZeRO, which is why it loads at another world size or ZeRO stage.

Weights are float32 at any precision; ``bf16`` runs the forward pass under autocast. With gradients accumulated and
reduced in float32, that takes the same memory as bfloat16 weights with float32 masters, and a recipe need not cast.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal, Protocol
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from pipelines.faults import InputError
from trainer.blocks import conv
from trainer.checkpoint import Piece, Snapshot, together
from trainer.stage import OptimizerSpec

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed

with patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
    # ZeRO imports Muon, which is not used here, and Muon loads torch's compiler: a second of every start.
    import deepspeed.runtime.zero.muon.muon_optimizer

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 200_000_000
"""Elements that are reduced or gathered at a time: 0.8 GB in float32."""
PERSISTENT = 100_000
"""Parameters of at most so many elements stay gathered under ZeRO-3."""


class Trains(Protocol):
    """What the engine asks of a stage."""

    name: str

    def trains(self, parameter: str) -> bool:
        """Whether the parameter of that name moves."""
        ...

    def rests(self, parameter: str) -> bool:
        """Whether it rests in steps on images: weight and moments stay, and the step doesn't count for it."""
        ...


class EngineState(Protocol):
    """Where an engine's state comes from: a checkpoint, or another sharding in memory.

    ``meta`` is what :attr:`Snapshot.meta` was; ``fill`` writes the stored numbers into the pieces' values;
    ``buffers`` are a rank's persistent buffers.
    """

    meta: Mapping[str, Any]

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fills every piece."""
        ...

    def buffers(self, rank: int) -> Mapping[str, Tensor]:
        """By name; rank 0's where that rank stored none."""
        ...


def init_distributed(device: torch.device, timeout: float = 1800.0) -> None:
    """Joins the process group (made here from torchrun's variables, or of one process, if there is none yet).

    ``timeout`` in seconds ends every collective that waits for a dead or hanging peer, also in the groups that
    DeepSpeed makes for itself.
    """
    limit = timedelta(seconds=timeout)
    dist.distributed_c10d.default_pg_timeout = limit
    dist.distributed_c10d.default_pg_nccl_timeout = limit
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=limit)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    # Training needs no shared-memory collectives, and compiling them takes half a minute; nor a look at what else this
    # machine could compile, which takes half a second of every start.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if gc.get_freeze_count() == 0:  # DeepSpeed collects garbage as it builds; what is imported by now need not be seen
        gc.freeze()
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=limit)


class Engine:
    """Trains one module under ZeRO. Every rank makes the same calls in the same order.

    A gradient is the plain sum over ranks and micro-batches of the losses given to :meth:`backward`: the caller weighs
    each with its share of the global batch, and the number of micro-batches may differ from step to step. A parameter
    that no loss of a step reached has gradient zero. Parameters that the stage doesn't train have no gradient and no
    optimizer state and keep every bit.

    ``model`` is float32, on the CPU or ``device``; its parameters are replaced, so hold no references to them.
    ``ema_decay`` None keeps no average. ``channels_last`` lays out what convolutions read (:func:`channels_last` of
    :mod:`trainer.blocks.conv`). ``compile`` runs the forward and backward pass through torch's compiler, for
    ZeRO 0 to 2: ZeRO-3's hooks would break every graph. Raises InputError when the stage trains no parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Trains,
        spec: OptimizerSpec,
        *,
        zero_stage: int = 1,
        precision: Literal["fp32", "bf16"] = "fp32",
        device: torch.device | str = "cpu",
        ema_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
        timeout: float = 1800.0,
    ) -> None:
        self.device = torch.device(device)
        init_distributed(self.device, timeout)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.zero_stage, self.precision, self.ema_decay = zero_stage, precision, ema_decay
        self.module = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if scalars := [name for name, shape in self.shapes.items() if not shape]:
            raise ValueError(f"DeepSpeed can't broadcast a parameter without dimensions; give {scalars} shape (1,)")
        self.waited = 0.0
        """Seconds that :meth:`step` and others stood still for a snapshot's copy, since the start."""
        self._snapshot: Snapshot | None = None
        self._host: dict[str, Tensor] = {}
        if channels_last:
            conv.channels_last(model)
        if compile:
            model.compile()
        self._build(stage, spec, {})
        if ema_decay is not None:
            self._start_average()

    # -- training ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The module under ZeRO's hooks and autocast: call this one to train."""
        return self._ds

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with a gradient."""
        return self._ds(*args, **kwargs)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision of the forward pass, for calls of :attr:`module`."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradient of a scalar loss that already carries its share of the global batch.

        ``last`` says that :meth:`step` follows.
        """
        self._ds.set_gradient_accumulation_boundary(last)
        self._ds.backward(loss * self.world)  # DeepSpeed averages over ranks

    def step(self, lr: float, image: bool = False) -> float:
        """Clips by the global norm, updates weights and average; the norm before clipping.

        After batches of images (``image``), what the stage lets rest then keeps weight and moments, and Adam's count.
        A norm that is not finite leaves everything as it was.
        """
        self._settle()
        for group in self._ds.basic_optimizer.param_groups:
            group["lr"] = lr
        self._resting = image
        norm = self._clip() if self.zero_stage == 0 else None
        if norm is None or torch.isfinite(norm):
            self._ds.step()
        else:
            self._ds.zero_grad()
        if norm is None:
            norm = self._ds.get_global_grad_norm()
        if self.zero_stage == 3:
            # A parameter that the next step's losses don't reach would otherwise keep this step's gradient.
            self._ds.optimizer.grad_partitions_flat_buffer.zero_()
        norm = float(norm)
        if math.isfinite(norm):
            self._average()
        return norm

    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._spec.clip:
            torch._foreach_div_(gradients, ((norm + 1e-6) / self._spec.clip).clamp(min=1.0))
        return norm

    def next_stage(self, stage: Trains, spec: OptimizerSpec) -> None:
        """Rebuilds for a stage. Parameters that go on training keep their optimizer state; others start afresh."""
        self._settle()
        old = _Carried(self)
        steps = {name: step for name, step in self._steps().items() if stage.trains(name)}
        self._unwrap()
        self._build(stage, spec, steps)
        old.fill([piece for piece in self.pieces() if piece.kind in old.kinds])
        self._publish()

    def close(self) -> None:
        """Lets go of the module, which DeepSpeed's hooks otherwise keep alive together with all of its memory."""
        self._settle()
        self._ds.module_forward_pre_hook.remove()
        self._ds.module_forward_post_hook.remove()
        self._ds.destroy()
        for parameter in self.module.parameters():
            parameter.__dict__.clear()  # ZeRO-3's, by which its optimizer would live on

    # -- state ------------------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """What this rank owns, as views of the live tensors."""
        return [*self._weights.values(), *self._moments, *self._ema.values()]

    def meta(self) -> dict[str, Any]:
        """What all ranks' pieces are pieces of, as plain data. ``step`` is Adam's, None without optimizer state."""
        steps = self._steps()
        return {
            "zero_stage": self.zero_stage,
            "world": self.world,
            "ema_decay": self.ema_decay,
            "parameters": {n: {"shape": list(shape), "step": steps.get(n)} for n, shape in self.shapes.items()},
        }

    def snapshot(self) -> Snapshot:
        """Starts copying to the host and returns; the next :meth:`step` waits for the copy if it isn't done by then.

        Forward and backward passes only read what is copied, so they may run meanwhile. Buffers, which a forward pass
        may change, are copied before this returns.
        """
        self._settle()
        sources = {f"{p.kind}/{p.name}@{p.start}": p.values for p in self.pieces()}
        for key in self._host.keys() - sources.keys():
            del self._host[key]
        for key, values in sources.items():
            if key not in self._host or self._host[key].numel() != values.numel():
                self._host[key] = torch.empty(
                    values.shape, dtype=values.dtype, pin_memory=self.device.type == "cuda", device="cpu"
                )
        pairs = [(self._host[key], values) for key, values in sources.items()]
        buffers = {f"buffer/{n}": b.detach().to("cpu", copy=True) for n, b in _buffers(self.module).items()}
        snapshot = Snapshot(self.meta(), {**{key: self._host[key] for key in sources}, **buffers})
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))

        def copy() -> None:
            try:
                with torch.no_grad(), torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                    for target, source in pairs:
                        target.copy_(source, non_blocking=stream is not None)
                if stream is not None:
                    stream.synchronize()
            except BaseException as error:
                snapshot._error = error
            snapshot._done.set()

        self._snapshot = snapshot
        threading.Thread(target=copy, name="snapshot", daemon=True).start()
        return snapshot

    def restore(self, state: EngineState) -> None:
        """Takes over weights, optimizer, average and buffers; raises InputError if they are another model's.

        A collective: what one rank could not read, every rank raises, and a next candidate may be restored over it.
        A parameter that trains now and did not then starts with a fresh optimizer state; an average that was not kept
        then starts at the weights.
        """
        self._settle()
        stored = {name: tuple(entry["shape"]) for name, entry in state.meta["parameters"].items()}
        _check_same(stored, self.shapes)
        steps = {
            name: entry["step"]
            for name, entry in state.meta["parameters"].items()
            if entry["step"] is not None and self._stage.trains(name)
        }
        trained = [name for group in self._groups for name in group]
        groups, counts = _grouped([name for name in self.shapes if name in trained], steps, self._stage)
        if groups != self._groups:
            self._unwrap()
            self._build(self._stage, self._spec, steps)
        self._set_counts(counts)
        averaged = state.meta["ema_decay"] is not None
        kept = [
            piece
            for piece in self.pieces()
            if (averaged if piece.kind == "ema" else piece.kind == "weight" or piece.name in steps)
        ]
        with together():
            state.fill(kept)
            buffers = state.buffers(self.rank)
        self._load_buffers(buffers)
        self._publish()
        if self.ema_decay is not None and not averaged:
            self._start_average()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Starts from whole weights by name (and buffers), with a fresh optimizer and average."""
        self._settle()
        tensors = {name: weights[name] for name in self.shapes if name in weights}
        _check_same({name: tuple(tensor.shape) for name, tensor in tensors.items()}, self.shapes)
        self._unwrap()
        self._build(self._stage, self._spec, {})
        for piece in self._weights.values():
            whole = tensors[piece.name].reshape(-1)
            piece.values.copy_(whole[piece.start : piece.start + piece.values.numel()])
        self._load_buffers({name: weights[name] for name in _buffers(self.module) if name in weights})
        self._publish()
        if self.ema_decay is not None:
            self._start_average()

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """Whole weights (or their average) and persistent buffers, on the CPU, on every rank."""
        if ema and self.ema_decay is None:
            raise ValueError("this engine keeps no average")
        source = self._ema if ema else self._weights
        whole = {name: flat.reshape(self.shapes[name]).to("cpu", copy=True) for name, flat in self._whole(source)}
        return {**whole, **{n: b.detach().to("cpu", copy=True) for n, b in _buffers(self.module).items()}}

    # -- inside -----------------------------------------------------------------------------------------------------

    def _build(self, stage: Trains, spec: OptimizerSpec, steps: Mapping[str, int]) -> None:
        """Wraps the plain module. One parameter group for each number of Adam steps done, since ZeRO counts by group,
        and those that rest in image batches apart from the others.

        The order of groups and of parameters within them is a function of ``steps`` and the stage alone, and the same
        all through a stage, so that a resumed run sums in the same order as the run it resumes.
        """
        self._stage, self._spec = stage, spec
        parameters = dict(self.module.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(stage.trains(name))
        trained = [name for name, p in parameters.items() if p.requires_grad]
        if not trained:
            raise InputError(
                f'stage "{stage.name}" trains no parameter of {type(self.module).__name__}: '
                "its train and freeze patterns leave none; parameters are named like "
                f"{', '.join(list(parameters)[:3])}"
            )
        self._groups, counts = _grouped(trained, steps, stage)
        optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[spec.name](
            [{"params": [parameters[name] for name in group]} for group in self._groups],
            lr=spec.lr,
            betas=spec.betas,
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            fused=self.device.type == "cuda",
        )
        for names, group in zip(self._groups, optimizer.param_groups, strict=True):
            group["rests"] = stage.rests(names[0])
        self._resting = False
        optimizer.register_step_pre_hook(self._rest)
        bucket = min(BUCKET, sum(p.numel() for p in parameters.values()) + 1024) // 2 * 2
        largest = max(math.prod(shape) for shape in self.shapes.values())
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": spec.clip if self.zero_stage else 0.0,
            "zero_optimization": {
                "stage": self.zero_stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                "overlap_comm": False,
                "stage3_param_persistence_threshold": PERSISTENT,
                # How far ahead ZeRO-3 looks before it lets go of a parameter. A recurrent model's first steps take
                # seconds longer for it; where every parameter is kept, it need not look.
                "stage3_max_reuse_distance": 0 if largest <= PERSISTENT else 1_000_000_000,
            },
            "timers": {"throughput": {"enabled": False}},
        }
        if self.precision == "bf16":
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        with _tersely():
            self._ds, *_ = deepspeed.initialize(
                model=self.module, optimizer=optimizer, config=config, dist_init_required=False
            )
        self._optimizer = self._ds.basic_optimizer
        for flat, _ in self._flats():
            self._optimizer.state[flat] = {
                "step": torch.zeros((), device=flat.device if self.device.type == "cuda" else "cpu"),
                "exp_avg": torch.zeros_like(flat, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(flat, requires_grad=False),
            }
        self._set_counts(counts)
        self._shard()

    def _rest(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Takes the gradients of what rests in this step: Adam leaves a parameter without one alone."""
        for group in optimizer.param_groups:
            if self._resting and group["rests"]:
                for flat in group["params"]:
                    flat.grad = None

    def _flats(self) -> Iterator[tuple[Tensor, int]]:
        """What the inner optimizer updates, with the index of its group."""
        zero = self._ds.optimizer
        if self.zero_stage == 0:
            parameters = dict(self.module.named_parameters())
            for index, group in enumerate(self._groups):
                yield from ((parameters[name], index) for name in group)
        elif self.zero_stage == 3:
            for at, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield flat, zero.sub_group_to_group_id[at]
        else:
            yield from ((flat, index) for index, flat in enumerate(zero.single_partition_of_fp32_groups))

    def _set_counts(self, counts: Sequence[int]) -> None:
        for flat, index in self._flats():
            self._optimizer.state[flat]["step"].fill_(float(counts[index]))

    def _steps(self) -> dict[str, int]:
        """Adam steps done, by name of the parameters that train."""
        counts = {index: int(self._optimizer.state[flat]["step"]) for flat, index in self._flats()}
        return {name: counts[index] for index, group in enumerate(self._groups) for name in group}

    def _shard(self) -> None:
        """Finds this rank's pieces in DeepSpeed's tensors."""
        zero, state = self._ds.optimizer, self._optimizer.state
        parameters = dict(self.module.named_parameters())
        self._weights: dict[str, Piece] = {}
        self._moments: list[Piece] = []

        def own(name: str, start: int, at: int, numel: int, weight: Tensor, states: Mapping[str, Tensor]) -> None:
            if numel > 0:
                values = weight.detach().view(-1)[at : at + numel]
                self._weights[name] = Piece("weight", name, start, values)
                self._moments.extend(
                    Piece(kind, name, start, states[kind].view(-1)[at : at + numel]) for kind in MOMENTS if states
                )

        if self.zero_stage == 3:
            for name, p in parameters.items():
                share = p.ds_tensor.numel()
                start = self.rank * share
                numel = min(share, p.ds_numel - start)
                if p.requires_grad:
                    group, at, _ = zero.grad_position[zero.get_param_id(p)]
                    flat = zero.fp32_partitioned_groups_flat[group]
                    own(name, start, at, numel, flat, state[flat])
                else:
                    own(name, start, 0, numel, p.ds_tensor, {})
        else:
            sharded = {name for name, p in parameters.items() if p.requires_grad and self.zero_stage}
            for name in sharded:
                if (mapping := parameters[name]._hp_mapping) is not None:
                    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
                    at, part = mapping.hp_fragment_address, mapping.lp_fragment_address
                    own(name, part.start, at.start, part.numel, flat, state[flat])
            whole = {name: p for name, p in parameters.items() if name not in sharded}
            share = -(-sum(p.numel() for p in whole.values()) // self.world)
            low, high, first = self.rank * share, (self.rank + 1) * share, 0
            for name, p in whole.items():
                begin, end = max(low - first, 0), min(high - first, p.numel())
                own(name, begin, begin, end - begin, p, state.get(p, {}))
                first += p.numel()
        layout = {name: (piece.start, piece.values.numel()) for name, piece in self._weights.items()}
        self._layout: list[dict[str, tuple[int, int]]] = [{}] * self.world
        dist.all_gather_object(self._layout, layout)
        if self.ema_decay is not None:
            self._ema = {
                name: Piece("ema", name, piece.start, torch.empty_like(piece.values))
                for name, piece in self._weights.items()
            }
        else:
            self._ema = {}

    def _whole(self, own: Mapping[str, Piece], names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's flat tensor, put together from all ranks' pieces of one kind, one at a time."""
        yield from _whole(self._layout, own, self.shapes if names is None else names, self.device)

    @torch.no_grad()
    def _publish(self) -> None:
        """Makes what the ranks compute with agree with the pieces that they own."""
        zero = self._ds.optimizer
        parameters = dict(self.module.named_parameters())
        if self.zero_stage == 3:
            zero._partition_all_parameters()
            for index in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(index)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            return
        replicated = [name for name, p in parameters.items() if not (p.requires_grad and self.zero_stage)]
        for name, flat in self._whole(self._weights, replicated):
            parameters[name].view(-1).copy_(flat)
        if self.zero_stage:
            zero.update_lp_params()
            return
        trained = [name for group in self._groups for name in group]
        for kind in MOMENTS:
            own = {piece.name: piece for piece in self._moments if piece.kind == kind}
            for name, flat in self._whole(own, trained):
                self._optimizer.state[parameters[name]][kind].view(-1).copy_(flat)

    def _unwrap(self) -> None:
        """Hands back a plain module: new parameters with the same values, none of DeepSpeed's hooks."""
        names = {p: name for name, p in self.module.named_parameters()}
        values = dict(self._whole(self._weights)) if self.zero_stage == 3 else {}
        fresh: dict[nn.Parameter, nn.Parameter] = {}
        for parameter, name in names.items():
            value = values.pop(name).view(self.shapes[name]) if values else parameter.detach().clone()
            fresh[parameter] = nn.Parameter(value)
        self.close()
        for module in self.module.modules():
            module._parameters = {key: p if p is None else fresh[p] for key, p in module._parameters.items()}
        del self._ds, self._optimizer

    @torch.no_grad()
    def _start_average(self) -> None:
        for name, piece in self._ema.items():
            piece.values.copy_(self._weights[name].values)

    @torch.no_grad()
    def _average(self) -> None:
        """One step of the exponential average, on the owned pieces."""
        if self.ema_decay is not None:
            averages = [piece.values for piece in self._ema.values()]
            weights = [self._weights[name].values for name in self._ema]
            torch._foreach_lerp_(averages, weights, 1.0 - self.ema_decay)

    @torch.no_grad()
    def _load_buffers(self, stored: Mapping[str, Tensor]) -> None:
        for name, buffer in _buffers(self.module).items():
            if name in stored:
                buffer.copy_(stored[name])

    def _settle(self) -> None:
        """Waits until the running snapshot has read what is about to change."""
        if self._snapshot is not None:
            begin = time.perf_counter()
            self._snapshot._done.wait()
            self.waited += time.perf_counter() - begin
            self._snapshot = None


class _Carried:
    """The optimizer state and average of an engine before it is rebuilt, for the same ranks under another sharding."""

    def __init__(self, engine: Engine) -> None:
        self.layout, self.shapes, self.device = engine._layout, engine.shapes, engine.device
        moments = {k: {p.name: p for p in engine._moments if p.kind == k} for k in MOMENTS}
        self.own: dict[str, dict[str, Piece]] = {**moments, "ema": engine._ema}
        self.trained = {name for group in engine._groups for name in group}
        self.kinds = {*MOMENTS, "ema"} if engine.ema_decay is not None else {*MOMENTS}

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fills what was there before; a collective. Pieces of parameters that did not train stay as they are."""
        wanted = {(piece.kind, piece.name): piece for piece in pieces}
        for kind in sorted(self.kinds):
            names = [name for name in self.shapes if kind == "ema" or name in self.trained]
            for name, flat in _whole(self.layout, self.own[kind], names, self.device):
                if piece := wanted.get((kind, name)):
                    piece.values.copy_(flat[piece.start : piece.start + piece.values.numel()])


@contextlib.contextmanager
def _tersely() -> Iterator[None]:
    """Prints tensors without their values: ZeRO-3 puts each parameter into a log line that nobody sees when it starts,
    which takes 7 ms a parameter, and seconds at each stage.
    """
    torch.set_printoptions(threshold=0, edgeitems=0)
    try:
        yield
    finally:
        torch.set_printoptions(profile="default")


def _grouped(names: Sequence[str], steps: Mapping[str, int], stage: Trains) -> tuple[list[list[str]], list[int]]:
    """Names by whether they rest in image batches and by their number of Adam steps, fewest first; those numbers."""
    keys = {name: (stage.rests(name), steps.get(name, 0)) for name in names}
    order = sorted(set(keys.values()))
    return [[name for name in names if keys[name] == key] for key in order], [count for _, count in order]


def _whole(
    layout: Sequence[Mapping[str, tuple[int, int]]],
    own: Mapping[str, Piece],
    names: Iterable[str],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        runs = sorted((*ranks[name], rank) for rank, ranks in enumerate(layout) if name in ranks)
        if len(layout) == 1:
            yield name, own[name].values if runs else torch.empty(0, device=device)
            continue
        longest = max((numel for _, numel, _ in runs), default=0)
        sent = torch.zeros(longest, device=device)
        if name in own:
            sent[: own[name].values.numel()].copy_(own[name].values)
        got = [torch.empty_like(sent) for _ in layout]
        dist.all_gather(got, sent)
        yield name, torch.cat([got[rank][:numel] for _, numel, rank in runs] or [sent])


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers, by name."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    kept = module.state_dict(keep_vars=True).keys() - parameters
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _check_same(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    wrong = [f"{name}: not in the model" for name in stored.keys() - wanted.keys()]
    wrong += [f"{name}: not in the checkpoint" for name in wanted.keys() - stored.keys()]
    wrong += [
        f"{name}: {list(stored[name])} in the checkpoint, {list(wanted[name])} in the model"
        for name in stored.keys() & wanted.keys()
        if stored[name] != wanted[name]
    ]
    if wrong:
        listing = "\n  ".join(sorted(wrong)[:10])
        raise InputError(
            f"the checkpoint is another model's ({len(wrong)} parameters differ):\n  {listing}\n"
            "Resume with the manifest that made it, or start a run under another name."
        )
