"""A TCP proxy in front of an HTTP server that injects one fault a request, at the socket."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections import deque
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest

from pipelines import storage


@dataclass(frozen=True)
class Fault:
    """What happens to one request. ``kind``: reset, stall, status, lose, truncate, short, dribble, drawl or corrupt.

    ``status`` with ``headers`` is what "status" answers; ``bytes`` of the body are sent before "truncate" closes, or
    are all that "short" says there are; "dribble" sends the body byte by byte, "drawl" the headers too.
    ``on`` limits the fault to requests whose first line holds that text; "lose" forwards and drops the answer.
    """

    kind: str
    status: int = 500
    headers: str = ""
    bytes: int = 0
    on: str = ""


class FaultyProxy:
    """Forwards to ``upstream`` (http://host:port), one request a connection; ``faults`` are spent in order."""

    def __init__(self, upstream: str) -> None:
        split = urlsplit(upstream)
        self.upstream = (split.hostname, split.port)
        self.faults: deque[Fault] = deque()
        self.requests: list[str] = []
        self.closed = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            request = _message(client)
            if not request:
                return
            line = request.split(b"\r\n", 1)[0].decode()
            with self._lock:
                self.requests.append(line)
                fault = self.faults.popleft() if self.faults and self.faults[0].on in line else None
            if fault is None:
                client.sendall(self._forward(request))
            else:
                self._break(client, request, fault)

    def _break(self, client: socket.socket, request: bytes, fault: Fault) -> None:
        if fault.kind == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif fault.kind == "stall":
            self.closed.wait(30)
        elif fault.kind == "status":
            body = b"<Error><Code>Injected</Code><Message>injected</Message></Error>"
            head = (
                f"HTTP/1.1 {fault.status} x\r\n{fault.headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            client.sendall(head.encode() + body)
        else:
            answer = self._forward(request)
            head, _, body = answer.partition(b"\r\n\r\n")
            if fault.kind == "lose":
                return
            if fault.kind == "truncate":
                client.sendall(head + b"\r\n\r\n" + body[: fault.bytes])
            elif fault.kind == "corrupt":
                client.sendall(head + b"\r\n\r\n" + bytes([body[0] ^ 1]) + body[1:])
            elif fault.kind == "short":
                told = re.sub(rb"(?i)(content-length: )\d+", rb"\g<1>%d" % fault.bytes, head)
                client.sendall(told + b"\r\n\r\n" + body[: fault.bytes])
            elif fault.kind in ("dribble", "drawl"):
                at_once, slowly = (head + b"\r\n\r\n", body) if fault.kind == "dribble" else (b"", answer)
                client.sendall(at_once)
                for byte in slowly:
                    client.sendall(bytes([byte]))
                    if self.closed.wait(0.02):
                        return
            else:
                raise ValueError(fault.kind)

    def _forward(self, request: bytes) -> bytes:
        with socket.create_connection(self.upstream) as upstream:
            head, _, body = request.partition(b"\r\n\r\n")
            upstream.sendall(head + b"\r\nConnection: close\r\n\r\n" + body)
            chunks = []
            while chunk := upstream.recv(1 << 16):
                chunks.append(chunk)
        return b"".join(chunks)


def _message(client: socket.socket) -> bytes:
    """One HTTP request: head and, where it has a Content-Length, body."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = client.recv(1 << 16)
        if not chunk:
            return b""
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line.split(b":", 1) for line in head.split(b"\r\n")[1:]]
    fields = {name.strip().lower(): value.strip() for name, value in lines}
    if fields.get(b"expect", b"").lower() == b"100-continue":
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))
    while len(body) < int(fields.get(b"content-length", 0)):
        body += client.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new client, of that S3 server."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testkey")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testsecret")
    monkeypatch.setenv("MOVIOLA_S3_ENDPOINT", endpoint)
    monkeypatch.setattr(storage, "_stores", {})
