"""``python -m trainer`` and ``moviola`` as real processes, without the seconds that each takes to import torch.

They are forked from one server that has imported everything, and meet as the processes of torchrun do: at a store that
whoever started them keeps.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["trainer.__main__", "trainer.engine", "trainer.recipes.arvae.recipe"])


class Group:
    """The ranks of one attempt at a run, with ``env`` beside their own environment; ``log`` is where all of them write.

    A context manager that ends them.
    """

    def __init__(self, world: int, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.log = log
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            **(env or {}),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        self.ranks = [CONTEXT.Process(target=_rank, args=(env, list(arguments), str(log))) for env in ranks]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def wait(self, timeout: float = 240.0) -> list[int | None]:
        """Exit statuses by rank; None for one that is still running when the time is over."""
        for process in self.ranks:
            process.join(timeout)
        return [process.exitcode for process in self.ranks]

    @property
    def said(self) -> str:
        """What the ranks wrote."""
        return self.log.read_text()


def run(world: int, arguments: Sequence[str], log: Path) -> tuple[list[int | None], str]:
    """Starts a group and waits for it; its exit statuses and what it wrote."""
    with Group(world, arguments, log) as group:
        return group.wait(), group.said


def command(arguments: Sequence[str], folder: Path, timeout: float = 240.0) -> tuple[int | None, str, str]:
    """``moviola`` with these arguments, typed in a folder: its exit status (None: still running), stdout and stderr."""
    with tempfile.TemporaryDirectory() as said:
        out, err = (Path(said, name) for name in ("out", "err"))
        process = CONTEXT.Process(target=_command, args=(list(arguments), str(folder), str(out), str(err)))
        process.start()
        process.join(timeout)
        process.kill()
        return process.exitcode, out.read_text(), err.read_text()


def _command(arguments: list[str], folder: str, out: str, err: str) -> None:
    os.chdir(folder)
    _write_to(out, err)
    sys.argv = ["moviola", *arguments]
    from cluster.cli import main

    main()


def _rank(env: dict[str, str], arguments: list[str], log: str) -> None:
    os.environ.update(env)
    _write_to(log, log)
    from trainer.__main__ import main

    sys.exit(main(arguments))


def _write_to(out: str, err: str) -> None:
    for number, name in ((1, out), (2, err)):
        with open(name, "a") as file:
            os.dup2(file.fileno(), number)
