"""What can be wrong with input, and who hears of it.

``InputError``  fatal: the run or command ends with the message, exit status 1 or 2, never a traceback.
``Skip``        one clip is unusable: it is counted by reason, named, and charged to the fault budget.
``Remark``      a warning of Python's: what was asked for is done, and not quite as it was asked.
Anything else   is our fault and keeps its traceback.
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterable, Mapping


class InputError(Exception):
    """A fault of input: says what, where, which value, which limit, what to do.

    ``status`` is the exit status of a command that ends with it: 2 for wrong use or a wrong manifest, else 1.
    """

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The closest of the known names, None where none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the closest of the known names, or nothing."""
    close = nearest(name, known)
    return f"; did you mean {close!r}?" if close else ""


class Skip(Exception):
    """One clip or video is unusable: ``reason`` is a short slug (a metric label), ``detail`` names it and says why."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Remark(UserWarning):
    """What was asked for is done, and not quite as it was asked: says which value, and what was done instead."""


class FaultBudget:
    """Counts skipped clips by reason and ends the run when there are more than the budget allows.

    ``limit`` is the largest tolerated share of clips in [0, 1]; the first ``grace`` skips are always tolerated, so that
    one bad clip at the start of a run does not end it. Thread-safe.
    """

    def __init__(self, limit: float = 0.01, grace: int = 10) -> None:
        self.limit = limit
        self.grace = grace
        self.seen = 0
        self.reasons: Counter[str] = Counter()
        self.named: list[str] = []
        self._lock = threading.Lock()

    def used(self, clips: int = 1) -> None:
        """Counts ``clips`` that were looked at, skipped or not."""
        with self._lock:
            self.seen += clips

    def charge(self, skip: Skip) -> None:
        """Counts one skip; raises InputError, naming the last skipped clips, once the budget is spent."""
        with self._lock:
            self.reasons[skip.reason] += 1
            self.named = [*self.named[-19:], str(skip)]
            skipped = sum(self.reasons.values())
            if skipped > self.grace and skipped > self.limit * max(self.seen, 1):
                listing = "\n  ".join(self.named[-10:])
                raise InputError(
                    f"{skipped} of {self.seen} clips were skipped; data.skip_budget allows {self.limit:.2%}. "
                    f"By reason: {dict(self.reasons)}. The last of them:\n  {listing}\n"
                    "Check the dataset with `moviola lint`, repack it, or raise data.skip_budget."
                )

    def spent(self) -> float:
        """Skips over those that are tolerated at the clips seen so far: beyond 1 the run ends."""
        with self._lock:
            return sum(self.reasons.values()) / max(self.grace, self.limit * self.seen, 1)

    def counts(self) -> Mapping[str, int]:
        """Skips so far, by reason."""
        with self._lock:
            return dict(self.reasons)
