"""Runs a function on several ranks, each a process of its own, and hands back what they return.

They are forked from the server of ``tests.trainer.processes``, which has imported everything.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.trainer import processes


def on_ranks(world: int, job: Callable[..., Any], *args: Any) -> list[Any]:
    """``job(rank, world, *args)`` on every rank; its results by rank. Raises what a rank raised."""
    method = processes.CONTEXT.get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, args=(world, folder, job, args), nprocs=world, start_method=method)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(job(rank, world, *args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
