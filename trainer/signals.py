"""What reaches a run from outside while it trains: a request to stop, or the notice that a machine will be taken away.

Ranks agree by a small reduction before each step, where they would wait for each other anyway: for the last one's data.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from pipelines import storage
from pipelines.faults import InputError
from trainer.lease import Fenced


class Wish(NamedTuple):
    """What all ranks know at the same time: ``stop`` for good, a ``notice`` was given, ``leave`` because time is up;
    ``late`` while the data of one of them is not there yet.
    """

    stop: bool
    notice: bool
    leave: bool
    late: bool


class _World(Protocol):
    rank: int
    size: int


class Signals:
    """The run's ear. ``stop.json`` on its storage, :meth:`stop` (a signal) and :meth:`notice` (a preemption) speak.

    It also looks whether the lease still holds: an attempt that was replaced ends within seconds, not at its next
    commit. A context manager around training.
    """

    def __init__(self, run_url: str, world: _World, hold: Callable[[], None]) -> None:
        self._hold, self._fenced = hold, False
        self._url = storage.join(run_url, "stop.json")
        self._asked = threading.Event()
        self._closing = threading.Event()
        self._deadline: float | None = None
        self._held = 0.0
        self.left = threading.Event()
        """Set once this rank holds: what it trained is committed."""
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        if world.rank == 0:
            threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    def stop(self) -> None:
        """Asks for a committed checkpoint and the end of the run, after the present step."""
        self._asked.set()

    def notice(self, deadline: float) -> None:
        """Says that a machine of the group goes at ``deadline`` (seconds since the epoch). The earliest counts.

        A notice that was held for already is not heard again.
        """
        if deadline > self._held:
            self._deadline = min(deadline, self._deadline or deadline)

    @property
    def deadline(self) -> float | None:
        """The deadline that this rank knows of."""
        return self._deadline

    def agreed(self, margin: float, late: bool = False) -> Wish:
        """The same answer on all ranks; each calls it equally often, and waits for the others.

        ``leave`` comes ``margin`` seconds before the deadline. Raises Fenced, on rank 0, where the lease is another's.
        """
        if self._fenced:
            self._hold()
        known = self._deadline
        flags = torch.tensor(
            [self._asked.is_set(), known is not None, known is not None and time.time() > known - margin, late],
            dtype=torch.float32,
        )
        if self._group is not None:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return Wish(*map(bool, flags.tolist()))

    def hold(self, seconds: float) -> None:
        """Waits to be taken away: the checkpoint is committed, and further steps would be lost.

        At most until ``seconds`` after the deadline; a machine that is still there then goes on training.
        """
        self._held = max(self._deadline or time.time(), time.time())
        self.left.set()
        self._asked.wait(max(0.0, self._held + seconds - time.time()))
        self.left.clear()
        self._deadline = None

    @property
    def open(self) -> bool:
        """Whether the run still listens."""
        return not self._closing.is_set()

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()

    def _watch(self) -> None:
        while not self._closing.wait(3.0 if storage.is_remote(self._url) else 0.5):
            with contextlib.suppress(InputError):  # storage that does not answer now will later
                try:
                    self._hold()
                except Fenced:
                    self._fenced = True
                    return
                if storage.exists(self._url):
                    self._asked.set()
                    return
