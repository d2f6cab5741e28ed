"""Worker processes for the packer: a decoder that crashes or hangs costs one video, not the packing.

Each worker is ``python -m pipelines.cutting``. It ends when its standard input does, so none outlives a killed packer.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.faults import InputError
from pipelines.rules import PackRules

PATIENCE = 120.0
"""Seconds without a sign of life after which a worker is ended and its video skipped."""


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    job: int | None = None
    name: str = ""
    heard: float = 0.0
    unread: bytearray = field(default_factory=bytearray)


class Crew:
    """Runs cutting jobs in ``count`` processes; a context manager that ends them.

    ``patience`` is in seconds. Results are those of ``pipelines.cutting``; a job whose worker crashed or fell silent
    has the skip reason ``crashed`` or ``timeout``.
    """

    def __init__(self, count: int, rules: PackRules, patience: float = PATIENCE) -> None:
        self.rules = rules
        self.patience = patience
        self.selector = selectors.DefaultSelector()
        self.workers = [self._start() for _ in range(count)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            self._end(worker)
        self.selector.close()

    @property
    def idle(self) -> int:
        """Workers without a job."""
        return sum(worker.job is None for worker in self.workers)

    @property
    def busy(self) -> int:
        """Workers with a job."""
        return len(self.workers) - self.idle

    def submit(self, job: int, work: dict[str, Any]) -> None:
        """Gives a job to an idle worker; ``work["footage"]["name"]`` names it in reports."""
        worker = next(worker for worker in self.workers if worker.job is None)
        worker.job, worker.name, worker.heard = job, work["footage"]["name"], time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it died; results() says so
            self._write(worker, json.dumps(work))

    def results(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Waits for news and yields (job, result) for all that is there; may yield nothing.

        Raises InputError that a worker raised, and RuntimeError with the traceback of a worker's bug.
        """
        for key, _ in self.selector.select(timeout=1.0):
            worker: _Worker = key.data
            data = os.read(key.fd, 1 << 20)
            if not data:
                yield from self._lost(worker)
                continue
            worker.heard = time.monotonic()
            worker.unread += data
            while (end := worker.unread.find(b"\n")) >= 0:
                report = json.loads(worker.unread[:end])
                del worker.unread[: end + 1]
                if report["kind"] == "input_error":
                    raise InputError(report["message"], status=report["status"])
                if report["kind"] == "done" and worker.job is not None:
                    job, worker.job = worker.job, None
                    yield job, report["result"]
        for worker in list(self.workers):
            if worker.job is not None and time.monotonic() - worker.heard > self.patience:
                job, name = worker.job, worker.name
                self._replace(worker)
                yield job, _skipped("timeout", f"{name}: no frame for {self.patience:.0f} s")

    def _lost(self, worker: _Worker) -> Iterator[tuple[int, dict[str, Any]]]:
        status = worker.process.wait()
        worker.errors.seek(0)
        said = worker.errors.read().decode("utf-8", "replace").strip()
        if "Traceback" in said:
            raise RuntimeError(f"the packer failed on {worker.name}:\n{said}")
        job, name = worker.job, worker.name
        self._replace(worker)
        if job is not None:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            yield job, _skipped("crashed", f"{name}: its decoder ended with {how}")

    def _start(self) -> _Worker:
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cutting"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        worker = _Worker(process, errors)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        with contextlib.suppress(BrokenPipeError):
            self._write(worker, self.rules.model_dump_json())
        return worker

    def _write(self, worker: _Worker, line: str) -> None:
        assert worker.process.stdin
        worker.process.stdin.write(line.encode() + b"\n")
        worker.process.stdin.flush()

    def _replace(self, worker: _Worker) -> None:
        self._end(worker)
        self.workers[self.workers.index(worker)] = self._start()

    def _end(self, worker: _Worker) -> None:
        self.selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        worker.process.kill()
        worker.process.wait()
        for stream in (worker.process.stdin, worker.process.stdout, worker.errors):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]


def _skipped(reason: str, detail: str) -> dict[str, Any]:
    return {"skip": [reason, detail], "clips": []}
