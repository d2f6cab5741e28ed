"""The address of a run, for as long as its command lives: where Prometheus finds it, and people its report.

``/targets``   Prometheus's HTTP service discovery: this address, and each rank of the running attempt
``/metrics``   the run's metrics (the ranks serve their own)
``/report``    what ``moviola report`` writes
``/events``    events.jsonl

``instance`` is the run's name, or ``NAME/rank-N``: a series goes on where a worker is replaced by another.
"""

from __future__ import annotations

import errno
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from pipelines import storage
from pipelines.faults import InputError
from trainer.manifest import RunManifest
from trainer.metrics import RunMetrics
from trainer.telemetry import reachable, read_lines, unbound

WATCHED_SECONDS = 120.0
"""Who has asked for the targets so lately counts as watching."""
FAREWELL_SECONDS = 20.0


class Service:
    """Serves on ``telemetry.bind``; ``address`` says where. What is on storage already is taken in at once."""

    def __init__(self, manifest: RunManifest, run_url: str) -> None:
        self._name, self._run_url = manifest.name, run_url
        self._asked = self._scraped = 0.0
        bind, port = manifest.telemetry.bind, manifest.telemetry.port
        handler = type("Handler", (_Handler,), {"service": self})
        try:
            self._server = _Server((bind, port), handler)
        except OSError as error:
            if not port or error.errno != errno.EADDRINUSE:
                raise unbound(bind, error) from None
            self._server = _Server((bind, 0), handler)
        self.address = f"{reachable(bind)}:{self._server.server_port}"
        """host:port under which others reach it."""
        self._metrics = RunMetrics(manifest, self.address)
        events, lines = (read_lines(storage.join(run_url, f"{log}.jsonl")) for log in ("events", "metrics"))
        self._metrics.take(events, lines)
        self._registry = CollectorRegistry()
        self._registry.register(self._metrics)
        threading.Thread(target=self._server.serve_forever, name="service", daemon=True).start()

    def take(self, events: Iterable[Mapping[str, Any]], lines: Iterable[Mapping[str, Any]]) -> None:
        """Takes in what has come to events.jsonl and metrics.jsonl."""
        self._metrics.take(events, lines)

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends; where Prometheus has been watching, it is first given a while to see how the run ended."""
        end = time.monotonic()
        while self._asked > end - WATCHED_SECONDS and self._scraped < end and not hurry():
            if time.monotonic() > end + FAREWELL_SECONDS:
                break
            time.sleep(0.1)
        self._server.shutdown()
        self._server.server_close()

    def targets(self) -> list[dict[str, Any]]:
        """Prometheus's ``http_sd`` format."""
        self._asked = time.monotonic()
        ranks = [(worker["metrics"], f"{self._name}/rank-{worker['rank']}") for worker in self._metrics.workers]
        listed = [(self.address, self._name), *ranks]
        return [{"targets": [address], "labels": {"instance": instance}} for address, instance in listed]

    def exposition(self) -> bytes:
        """Prometheus's text format."""
        text = generate_latest(self._registry)
        self._scraped = time.monotonic()
        return text

    def report(self) -> bytes:
        """The run's report."""
        from cluster import report

        return report.render([self._run_url]).encode()

    def events(self) -> bytes:
        """events.jsonl as it is."""
        return storage.read_bytes(storage.join(self._run_url, "events.jsonl"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who goes away before the answer is no news; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    service: Service

    def do_GET(self) -> None:
        pages: dict[str, tuple[str, Callable[[], bytes]]] = {
            "/targets": ("application/json", lambda: json.dumps(self.service.targets()).encode()),
            "/metrics": (CONTENT_TYPE_LATEST, self.service.exposition),
            "/report": ("text/html; charset=utf-8", self.service.report),
            "/events": ("text/plain; charset=utf-8", self.service.events),
        }
        kind, page = pages.get(self.path.partition("?")[0], ("text/plain", None))
        try:
            status, body = (200, page()) if page else (404, " ".join(pages).encode())
        except InputError as error:
            status, kind, body = 503, "text/plain; charset=utf-8", storage.redact(str(error)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A scrape is no news."""
