"""Where every rank stands, so that a hang ends, and says who waited for whom.

Each rank tells rank 0 what it does and for how long. A collective can't say why it hangs, and a process that is stopped
says nothing at all: its beats, which no longer come, do.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

STEP = "forward and backward"
"""What the watch limits: the part of a step in which a rank computes, or waits for its peers."""

IN_VAIN = "waited in vain"
COLLECTIVE = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "timed out")


class PeerLost(RuntimeError):
    """A collective failed, or took too long, because a rank is dead, stopped, or elsewhere. Worth another attempt."""


class _World(Protocol):
    rank: int
    size: int


class _Place(NamedTuple):
    step: int
    doing: str
    since: float


class Heartbeat:
    """One rank's beat, and its watch. All ranks make theirs together.

    A step may take ``limit`` seconds, and a peer may be silent for as long. A collective that is over it raises, and
    :meth:`blame` says why; where nothing raises, ``tell`` is given the reason and the process ends.
    """

    def __init__(self, world: _World, limit: float, tell: Callable[[str], None]) -> None:
        self._rank, self._size, self._limit, self._tell = world.rank, world.size, limit, tell
        self._pause = min(limit / 10, max(1.0, world.size / 100), 5.0)
        self._place = self._vain = _Place(-1, "starting", time.monotonic())
        self._stood = 0.0
        self._answered: float | None = None
        self._closing = threading.Event()
        self._server: _Server | None = None
        self._address = self._meet()
        for task in (self._beat, self._watch):
            threading.Thread(target=task, name=f"heartbeat-{task.__name__.strip('_')}", daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """Notes what the training thread begins to do."""
        self._place = _Place(step, doing, time.monotonic())

    def blame(self, error: BaseException) -> PeerLost | None:
        """Who was waited for, where ``error`` is that of a collective; None for other errors."""
        text = f"{type(error).__name__} {error}".lower()
        if not isinstance(error, RuntimeError) or not any(word in text for word in COLLECTIVE):
            return None
        return PeerLost(self._explain(self._place))

    def lost(self) -> PeerLost:
        """Who is waited for, where that is no collective."""
        return PeerLost(self._explain(self._place))

    def close(self) -> None:
        """Ends beat and watch."""
        self._closing.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def _meet(self) -> tuple[str, int, str] | None:
        """Where rank 0 listens, and the word that proves a rank of this group."""
        if self._size == 1:
            return None
        where: list[Any] = [None]
        if self._rank == 0:
            self._server = _Server(secrets.token_hex(16), self._size)
            where = [(os.environ.get("MASTER_ADDR", "127.0.0.1"), self._server.server_address[1], self._server.word)]
        dist.broadcast_object_list(where, src=0)
        return where[0]

    def _beat(self) -> None:
        while self._address is not None and not self._closing.is_set():
            with contextlib.suppress(OSError, ValueError):
                self._call(ask=False)
                self._answered = time.monotonic()
            self._closing.wait(self._pause)

    def _watch(self) -> None:
        """Ends a step that is over its limit and raised nothing, and any other wait for a peer that is silent."""
        before = time.monotonic()
        while not self._closing.wait(self._pause):
            place = self._place
            self._stood = max(self._stood, time.monotonic() - before - self._pause)
            before = time.monotonic()
            slow = place.doing == STEP and time.monotonic() - place.since > self._limit + 5 * self._pause
            if not slow and self._silence() < self._limit:
                continue
            message = self._explain(place)
            if not self._closing.wait(5 * self._pause) and self._place.doing == IN_VAIN:
                teller = threading.Thread(target=self._tell, args=(message,), daemon=True)
                teller.start()
                teller.join(5.0)
                os._exit(1)

    def _silence(self) -> float:
        """Seconds since the peer that was heard of longest ago, of those that this rank hears; 0 for none."""
        heard = [self._answered] if self._server is None else [then for then, *_ in self._server.table if then]
        return max((time.monotonic() - then for then in heard if then), default=0.0)

    def _explain(self, place: _Place) -> str:
        self._vain = place if place.doing != IN_VAIN else self._vain
        step, doing, since = self._vain
        waited = f"rank {self._rank} waited {time.monotonic() - since:.0f} s in step {step} ({doing})"
        self._place = _Place(step, IN_VAIN, since)
        if self._address is None:
            return f"{waited}, and there is no other rank: look at what this process does"
        time.sleep(3 * self._pause)
        if self._stood > self._limit / 2:
            return f"rank {self._rank} itself stood still for {self._stood:.0f} s, and the others went on without it"
        try:
            everyone = self._call(ask=True)
        except (OSError, ValueError):
            return (
                f"{waited} for rank 0, which keeps the heartbeats and does not answer: it is dead, stopped, or cut "
                "off. Look at its machine and its log."
            )
        if self._rank == 0:
            time.sleep(2 * self._pause)  # the others ask too
        others = {rank: now for rank, now in enumerate(everyone) if rank != self._rank and now[2] != IN_VAIN}
        if silent := [rank for rank, now in others.items() if now[0] > 2.5 * self._pause]:
            age, at, what, _ = others[silent[0]]
            return (
                f"{waited} for {_ranks(silent)}, without a sign of life for {age:.0f} s: dead, stopped, or cut off. "
                f"Rank {silent[0]} was last at step {at}, {what}. Look at its machine and its log."
            )
        if behind := {rank: now for rank, now in others.items() if (now[1], now[2]) != (step, doing)}:
            where = "; ".join(
                f"rank {rank}: step {at}, {what}, for {spent:.0f} s"
                for rank, (_, at, what, spent) in list(behind.items())[:8]
            )
            return f"{waited} for {_ranks(list(behind))}, alive but elsewhere. {where}."
        return (
            f"{waited}, and all ranks are alive and in the same step: a network that carries heartbeats but no "
            "tensors, or a step that takes longer than failure.hang_seconds"
        )

    def _call(self, ask: bool) -> Any:
        """One beat; with ``ask``, what rank 0 knows of every rank: age of its last beat, step, doing, for how long."""
        assert self._address is not None
        host, port, word = self._address
        place = self._place
        beat = [word, self._rank, place.step, place.doing, time.monotonic() - place.since, ask]
        with socket.create_connection((host, port), timeout=1.0) as connection, connection.makefile("rw") as stream:
            stream.write(json.dumps(beat) + "\n")
            stream.flush()
            return json.loads(stream.readline())


class _Server(socketserver.TCPServer):
    """Rank 0's table of beats."""

    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, word: str, ranks: int) -> None:
        self.word = word
        self.began = time.monotonic()
        self.table: list[tuple[float | None, int, str, float]] = [(None, -1, "starting", 0.0)] * ranks
        super().__init__(("", 0), _Answer)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that goes in mid-sentence is no news."""


class _Answer(socketserver.StreamRequestHandler):
    timeout = 0.5
    server: _Server

    def handle(self) -> None:
        word, rank, step, doing, spent, ask = json.loads(self.rfile.readline(4096))
        if not secrets.compare_digest(str(word), self.server.word):
            return
        now = time.monotonic()
        self.server.table[rank] = (now, int(step), str(doing), float(spent))
        rows = [(now - (then or self.server.began), *rest) for then, *rest in self.server.table] if ask else []
        self.wfile.write(json.dumps(rows).encode() + b"\n")


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
