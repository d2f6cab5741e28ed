"""A run's events.jsonl, as launcher and controller read and write it. Both start often, so this imports little."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from pipelines import storage


def note(run_url: str, event: str, **fields: Any) -> None:
    """Appends a line to a run's events.jsonl on behalf of no attempt."""
    record = {"time": time.time(), "event": event, "attempt": 0, **fields}
    storage.append_text(storage.join(run_url, "events.jsonl"), json.dumps(record) + "\n")


class Follower:
    """Reads what a run appends to a log of its own, from where the last read ended."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._place = 0
        with contextlib.suppress(storage.Missing):
            self._place = storage.size(url)

    def new(self) -> list[dict[str, Any]]:
        """Whole lines since the last call."""
        try:
            size = storage.size(self._url)
        except storage.Missing:
            return []
        if size <= self._place:
            return []
        data = storage.read_bytes(self._url, self._place, size)
        whole = data[: data.rfind(b"\n") + 1]
        self._place += len(whole)
        records = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):  # a line that a full disk cut short
                records.append(json.loads(line))
        return records
