"""The fence: which attempt at a run may commit, and what is committed, in one small object that is only ever swapped.

    lease = Lease.take(run_url)              the next attempt number; a collective where there are several ranks
    lease.register(step, digest, keep)       makes a checkpoint count; rank 0; raises Fenced for an older attempt

``lease.json`` holds ``attempt``, who took it, and ``commits``: step, attempt and manifest digest of what counts. Each
change is a compare-and-swap, so an attempt that was declared dead but lives can change nothing: its swap fails. A
checkpoint counts from its swap on. The files that readers look for (``manifest.json``, ``COMMITTED``) are written after
it, and an attempt that finds them missing writes them.

Some stores have no conditional writes, and some ignore the condition. :meth:`Lease.take` tries it out; there, a change
is a read, a comparison and a write, and ``lease.weakness`` says what that leaves open.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from pipelines import storage
from pipelines.faults import InputError


class Fenced(InputError):
    """Another attempt at the same run has taken over; this one may not change anything any more."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint that counts: whose it is, and the digest of its manifest."""

    step: int
    attempt: int
    manifest: str


class Lease:
    """One attempt's right to commit to a run. Rank 0 alone changes it; the others know the attempt's number."""

    def __init__(self, run_url: str, attempt: int, atomic: bool = True) -> None:
        self.run_url = run_url
        self.url = storage.join(run_url, "lease.json")
        self.attempt = attempt
        self.atomic = atomic

    @property
    def weakness(self) -> str | None:
        """What the fence does not hold off on this storage; None where it holds off everything."""
        if self.atomic:
            return None
        return (
            f"{storage.redact(self.run_url)} is on storage without conditional writes: an older attempt is fenced off, "
            "but not one that commits in the very moment in which the new one starts. Don't start a run twice there."
        )

    @classmethod
    def take(cls, run_url: str) -> Lease:
        """Takes the next attempt number, whoever had the last one. Raises InputError, on every rank, if it can't."""
        answer: list[Any] = [None]
        if not dist.is_initialized() or dist.get_rank() == 0:
            try:
                lease = cls(run_url, 0, _is_conditional(run_url))
                lease.attempt = lease._next()
                answer = [(lease.attempt, lease.atomic)]
            except InputError as error:
                answer = [error]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], InputError):
            raise answer[0]
        return cls(run_url, *answer[0])

    def swap(self, url: str, data: bytes, expected: storage.Version | None) -> bool:
        """Replaces the object if its version is ``expected`` (None: if there is none); whether it did."""
        if self.atomic:
            return storage.swap(url, data, expected) is not None
        found = storage.read_versioned(url)
        if (found[1] if found else None) != expected:
            return False
        storage.write_bytes(url, data)
        return True

    def _next(self) -> int:
        while True:
            found = storage.read_versioned(self.url)
            old = _parse(self.url, found[0]) if found else {"attempt": 0, "commits": []}
            new = {
                "attempt": old["attempt"] + 1,
                "holder": {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex},
                "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "commits": old["commits"],
            }
            if self.swap(self.url, _bytes(new), found[1] if found else None):
                return new["attempt"]

    def hold(self) -> None:
        """Raises Fenced where another attempt has taken the run over."""
        self._read()

    def commits(self) -> list[Commit]:
        """What counts, oldest first; raises Fenced."""
        return [Commit(**entry) for entry in self._read()[0]["commits"]]

    def register(self, step: int, manifest: str, keep: int) -> list[int]:
        """Makes the checkpoint of ``step`` count; the steps that no longer do, because ``keep`` newer ones do."""
        dropped: list[int] = []

        def change(commits: list[Commit]) -> list[Commit]:
            kept = [commit for commit in commits if commit.step != step]
            kept = sorted([*kept, Commit(step, self.attempt, manifest)], key=lambda commit: commit.step)
            dropped[:] = [commit.step for commit in kept[:-keep]]
            return kept[-keep:]

        self._change(change)
        return dropped

    def forget(self, step: int) -> None:
        """Strikes out a checkpoint that turned out to be damaged."""
        self._change(lambda commits: [commit for commit in commits if commit.step != step])

    def adopt(self, found: Iterable[Commit]) -> None:
        """Counts exactly what is whole on storage, as the new holder found it."""
        whole = sorted(found, key=lambda commit: commit.step)
        self._change(lambda commits: whole)

    def _change(self, change: Callable[[list[Commit]], list[Commit]]) -> None:
        while True:
            old, version = self._read()
            commits = change([Commit(**entry) for entry in old["commits"]])
            entries = [{"step": c.step, "attempt": c.attempt, "manifest": c.manifest} for c in commits]
            if self.swap(self.url, _bytes({**old, "commits": entries}), version):
                return

    def _read(self) -> tuple[dict[str, Any], storage.Version]:
        found = storage.read_versioned(self.url)
        if found is None:
            raise Fenced(
                f"{storage.redact(self.url)} is gone: the run was removed while attempt {self.attempt} trained"
            )
        value = _parse(self.url, found[0])
        if value["attempt"] != self.attempt:
            holder = value.get("holder", {})
            raise Fenced(
                f"attempt {self.attempt} at {storage.redact(self.run_url)} (this process) was replaced by attempt "
                f"{value['attempt']} on {holder.get('host')}, process {holder.get('pid')}, at {value.get('since')}. "
                "This one can't commit, delete or overwrite anything any more and ends here. If both were started on "
                "purpose, give one of them another name."
            )
        return value, found[1]


def _is_conditional(run_url: str) -> bool:
    """Whether the storage keeps to the condition of a write."""
    if not storage.is_remote(run_url):
        return True
    url = storage.join(run_url, f".conditional-{uuid.uuid4().hex}")
    storage.write_bytes(url, b"first")
    try:
        return not storage.put_if_absent(url, b"second") and storage.swap(url, b"third", "0" * 32) is None
    except storage.Unreachable:
        raise
    except InputError:
        return False
    finally:
        storage.delete(url)


def _bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _parse(url: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
        if not isinstance(value["attempt"], int) or not all(Commit(**entry) for entry in value["commits"]):
            raise ValueError("no attempt number")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{storage.redact(url)} is not a lease ({error}); it is written by training alone. With no process at this "
            "run, remove it: the next start counts the checkpoints that are there."
        ) from None
    return value
