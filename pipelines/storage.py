"""The one file that knows fsspec and s3fs.

URLs are a path, ``file://`` or ``s3://``. ``MOVIOLA_S3_ENDPOINT`` names an endpoint other than AWS's.

read_bytes(url, start=None, end=None) -> bytes          ranged read, retried; end exclusive
read_json(url), write_bytes(url, data), write_json(url, value)      whole objects, atomic
upload(url, path), writer(url)                          files and streams
append_text(url, text)                                  grows a log
read_versioned(url) -> (bytes, Version) | None; swap(url, data, expected) -> Version | None        compare and swap
put_if_absent(url, data) -> bool
exists, size, list_dir -> [Entry(name, bytes, is_dir)], list_below(url), delete(url, recursive=False), join(url, *parts)
redact(text)                                            without keys and secrets
drop_uploads(url)                                       what killed processes left unfinished below a folder
pause(reason, attempt)                                  before bytes with a wrong digest are read again

A reader sees the old object or the new one, never a part: local files are written beside their place, synced and
renamed; S3 objects are one PUT, or a multipart upload that becomes visible when it is completed. Timeouts, resets, 429,
5xx and truncated bodies are retried within ``policy``; ``counters`` says how often. What the operator must mend (no
such bucket, no permission, a full disk) is an InputError.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import hashlib
import http.client
import io
import json
import os
import random
import re
import select
import shutil
import socket
import ssl
import struct
import tempfile
import threading
import time
import urllib.request
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urlsplit

from pipelines.faults import InputError

Version = str
"""What :func:`swap` compares: an ETag on S3, a digest of the content on a local disk."""

PART_BYTES = 16 << 20
SINGLE_PUT_BYTES = 64 << 20
LEAST_PART_BYTES = 5 << 20
CONNECTIONS = 64
SIGNED_SECONDS = 3600
SIGNED_URLS = 4096
HEADER_BYTES = 64 << 10
HEADERS = 100
_QUICK = getattr(socket, "TCP_QUICKACK", None)
"""Acknowledge at once: a gateway that sends headers, then waits with a short body until they are acknowledged (Ceph's
as it comes) would answer each small read 40 ms late."""


@dataclass
class RetryPolicy:
    """How long a request may take and how often it is tried again. Seconds; rates in bytes/s."""

    attempts: int = 8
    first_wait: float = 0.1
    longest_wait: float = 10.0
    deadline: float = 120.0
    connect_timeout: float = 5.0
    idle_timeout: float = 20.0
    request_timeout: float = 30.0
    least_rate: float = 512 << 10

    def wait(self, attempt: int, retry_after: float | None) -> float:
        """Seconds before the next attempt: exponential with jitter, after the server's Retry-After (within a bound), so
        that ranks which were sent away together do not come back together.
        """
        backoff = min(self.longest_wait, self.first_wait * 2**attempt) * random.uniform(0.5, 1.0)
        return min(retry_after or 0.0, 3 * self.longest_wait) + backoff


class Counters:
    """What this process has asked of storage so far. Thread-safe; telemetry reads :meth:`snapshot`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes_read = 0
        self.bytes_written = 0
        self.retries: Counter[str] = Counter()

    def request(self, *, read: int = 0, written: int = 0) -> None:
        """Counts one answered request."""
        with self._lock:
            self.requests += 1
            self.bytes_read += read
            self.bytes_written += written

    def retry(self, reason: str) -> None:
        """Counts one failed attempt that is tried again."""
        with self._lock:
            self.retries[reason] += 1

    def snapshot(self) -> dict[str, Any]:
        """``requests``, ``bytes_read``, ``bytes_written`` and ``retries`` by reason."""
        with self._lock:
            return {
                "requests": self.requests,
                "bytes_read": self.bytes_read,
                "bytes_written": self.bytes_written,
                "retries": dict(self.retries),
            }


policy = RetryPolicy()
counters = Counters()

REREADS = 2
"""How often bytes with a wrong digest are read again before what is stored is taken to be wrong."""


def pause(reason: str, attempt: int) -> None:
    """Counts a failed attempt (from 1) and waits as long as the policy says before the next one."""
    counters.retry(reason)
    time.sleep(policy.wait(attempt - 1, None))


class Missing(InputError):
    """The object is not there."""


class Unreachable(InputError):
    """The store did not answer properly within the retry policy."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in a folder; ``bytes`` is 0 for folders."""

    name: str
    bytes: int
    is_dir: bool


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The object, or its bytes ``start`` to ``end`` (exclusive). Exactly that many bytes, or an error.

    Raises Missing, Unreachable, or InputError when the object ends before ``end``.
    """
    if is_remote(url):
        return _s3().read(url, start, end)[0]
    path = _path(url)
    with _explained("read", url):
        if start is None and end is None:
            data = path.read_bytes()
        else:
            with path.open("rb") as file:
                file.seek(start or 0)
                data = file.read() if end is None else file.read(end - (start or 0))
            if end is not None and len(data) < end - (start or 0):
                raise _too_short(url, start or 0, end, path.stat().st_size)
    counters.request(read=len(data))
    return data


def read_json(url: str) -> Any:
    """The parsed JSON object; raises InputError naming the place of a syntax error."""
    data = read_bytes(url)
    try:
        return json.loads(data)
    except ValueError as error:
        raise InputError(f"{redact(url)} is not valid JSON: {error}") from None


def write_bytes(url: str, data: bytes) -> None:
    """Writes or replaces the object, atomically."""
    if is_remote(url):
        _s3().write(url, data)
        return
    with _replacing(url) as file:
        file.write(data)
    counters.request(written=len(data))


def write_json(url: str, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically."""
    write_bytes(url, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def upload(url: str, path: str | os.PathLike[str]) -> None:
    """Copies a local file to ``url``, atomically; in parallel parts to S3 when it is large."""
    if is_remote(url):
        _s3().upload(url, Path(path))
        return
    with _replacing(url) as file, open(path, "rb") as source:
        shutil.copyfileobj(source, file, 1 << 20)
    counters.request(written=os.path.getsize(path))


@contextlib.contextmanager
def writer(url: str) -> Iterator[BinaryIO]:
    """A binary stream into ``url``. The object appears when the block ends; an exception leaves what was there."""
    if not is_remote(url):
        with _replacing(url) as file:
            yield file
        return
    stream = _MultipartStream(_s3(), url)
    try:
        yield stream
    except BaseException:
        stream.abort()
        raise
    stream.finish()


def append_text(url: str, text: str) -> None:
    """Appends to a log, creating it. Lines of several local writers stay whole; on S3 a log has one writer."""
    data = text.encode()
    if is_remote(url):
        _s3().append(url, data)
        return
    path = _path(url)
    with _explained("append to", url):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            before, view = os.lseek(handle, 0, os.SEEK_END), memoryview(data)
            try:
                while view:
                    view = view[os.write(handle, view) :]
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(handle, before)  # half a line would spoil the next one too
                raise
        finally:
            os.close(handle)
    counters.request(written=len(data))


def read_versioned(url: str) -> tuple[bytes, Version] | None:
    """The object with its version, or None where there is none."""
    try:
        if is_remote(url):
            return _s3().read(url, None, None)
        data = read_bytes(url)
    except Missing:
        return None
    return data, _digest(data)


def swap(url: str, data: bytes, expected: Version | None) -> Version | None:
    """Replaces the object if its version is ``expected`` (None: if there is no object); the new version, else None.

    Writers that race must write different bytes (an attempt number, a random id): after a lost answer, an object equal
    to ``data`` counts as ours. Raises InputError where the store has no conditional writes.
    """
    if is_remote(url):
        return _s3().swap(url, data, expected)
    path = _path(url)
    with _explained("write", url):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            found = read_versioned(url)
            if (found[1] if found else None) != expected:
                return None
            write_bytes(url, data)
    return _digest(data)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def put_if_absent(url: str, data: bytes) -> bool:
    """Creates the object; False where there already is one. One of several racing writers wins."""
    return swap(url, data, None) is not None


def exists(url: str) -> bool:
    """Whether there is an object or a folder."""
    if is_remote(url):
        return _s3().exists(url)
    with _explained("look for", url):
        return _path(url).exists()


def size(url: str) -> int:
    """Bytes of the object; raises Missing."""
    if is_remote(url):
        return _s3().head(url)
    with _explained("look for", url):
        return _path(url).stat().st_size


def list_dir(url: str) -> list[Entry]:
    """What lies directly in the folder, sorted by name; an absent folder is empty."""
    if is_remote(url):
        return _s3().list_dir(url)
    with _explained("list", url):
        try:
            found = list(os.scandir(_path(url)))
        except FileNotFoundError:
            return []
        entries = []
        for item in found:
            if not (item.name.startswith(".") and item.name.endswith((".lock", ".tmp"))):
                with contextlib.suppress(FileNotFoundError):  # deleted just now, or a link to nowhere
                    entries.append(Entry(item.name, 0 if item.is_dir() else item.stat().st_size, item.is_dir()))
    return sorted(entries, key=lambda entry: entry.name)


def list_below(url: str) -> list[Entry]:
    """Every file at any depth below the folder, by its path there, sorted: on S3 a request for each 1000, however many
    folders they lie in. Hidden ones are left out; a circle of links is walked once.
    """
    found = _s3().list(url) if is_remote(url) else list(_below(url, "", frozenset()))
    hidden = re.compile(r"(^|/)\.")
    return sorted((entry for entry in found if not hidden.search(entry.name)), key=lambda entry: entry.name)


def _below(url: str, prefix: str, above: frozenset[str]) -> Iterator[Entry]:
    folder = join(url, prefix) if prefix else url
    real = os.path.realpath(_path(folder))
    if real in above:
        return
    for entry in list_dir(folder):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if not entry.is_dir:
            yield Entry(name, entry.bytes, False)
        elif not entry.name.startswith("."):
            yield from _below(url, name, above | {real})


def drop_uploads(url: str) -> None:
    """Removes the parts of uploads into the folder that were begun and not completed: nobody sees them, and a store
    charges for them until someone does. Where that may not be asked, they stay.
    """
    if is_remote(url):
        _s3().drop_uploads(url)


def delete(
    url: str, recursive: bool = False, *, version: Version | None = None, keep: Callable[[str], bool] | None = None
) -> None:
    """Removes the object, or everything below the folder with ``recursive``. What is absent stays absent.

    With ``version`` the object goes only while it is of that version; stores that don't know conditional deletes (other
    than AWS S3's) let it go at any. ``keep`` tells by a name directly in the folder whether that stays.
    """
    if is_remote(url):
        _s3().delete(url, recursive, version, keep)
        return
    path = _path(url)
    with _explained("delete", url), contextlib.suppress(FileNotFoundError):
        if version is not None:
            with _locked(path):
                if _digest(path.read_bytes()) == version:
                    path.unlink()
        elif not (recursive and path.is_dir() and not path.is_symlink()):
            path.unlink()
        elif keep is None:
            shutil.rmtree(path)
        else:
            for name in os.listdir(path):
                if not keep(name):
                    delete(join(url, name), recursive=True)
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` below it."""
    return "/".join([url.rstrip("/") or "/", *(part.strip("/") for part in parts)])


def absolute(url: str) -> str:
    """``url``, with a local path made absolute: other processes have other working directories."""
    return url if is_remote(url) else os.path.abspath(_path(url))


def is_remote(url: str) -> bool:
    """Whether ``url`` is on S3; raises InputError for a scheme but path, file:// and s3://, and for keys in one."""
    if "\0" in (unquote(url) if url.startswith("file://") else url) or not _encodable(url):
        raise InputError(f"{url!r}: not a name that a file can have", status=2)
    scheme, found, rest = url.partition("://")
    if found and scheme == "s3":
        bucket = rest.partition("/")[0]
        if not bucket:
            raise InputError(f"{redact(url)}: no bucket; write s3://BUCKET/PREFIX", status=2)
        if "@" in bucket or ":" in bucket:
            raise InputError(
                f"{redact(url)}: keys in a URL are not read, and would get into logs and copies of manifests; leave "
                "them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile",
                status=2,
            )
        return True
    if (found and scheme != "file") or re.match(r"(pipe|http|https|gs|hf|data|exec):", url):
        raise InputError(f"{redact(url)}: only a path, file:// and s3:// are read", status=2)
    return False


def _encodable(url: str) -> bool:
    try:
        os.fsencode(url)
    except UnicodeEncodeError:
        return False
    return True


_SECRETS = (
    (re.compile(r"(?<=://)(?:[^/@\s]+|[^/@:\s]+:(?!\d+/)[^@\s]*)@"), ""),  # secret keys may hold slashes
    (re.compile(r"(?i)\b(X-Amz-[\w-]+|AWSAccessKeyId|Signature|Expires)=[^&\s\"']+"), r"\1=***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b"), "***"),
    (
        re.compile(
            r"(?i)((?:aws_)?(?:secret(?:_access)?_key|access_key(?:_id)?|session_token|security_token)|password|"
            r"secret|token|authorization)([\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic|AWS4-HMAC-SHA256)\s+)?[^\s,;&\"'}]+"
        ),
        r"\1\2***",
    ),
)
_SECRET_VARIABLES = {"AWS_SECRET_ACCESS_KEY": 4, "AWS_ACCESS_KEY_ID": 16, "AWS_SESSION_TOKEN": 4}
"""With the least length that is no mere name: a store of one's own may call its user as its image, or this command."""


def redact(text: str) -> str:
    """``text`` without keys, secrets, user names in URLs and signatures of signed URLs."""
    for name, least in _SECRET_VARIABLES.items():
        value = os.environ.get(name, "")
        if len(value) >= least:
            text = text.replace(value, "***")
    return _masked(text)


def holds_keys(text: str) -> bool:
    """Whether ``text`` has what :func:`redact` takes out of any text, whatever this process's own keys are."""
    return _masked(text) != text


def _masked(text: str) -> str:
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _digest(data: bytes) -> Version:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _path(url: str) -> Path:
    return Path(unquote(url.removeprefix("file://")) if url.startswith("file://") else url).expanduser()


def _too_short(url: str, start: int, end: int, length: int) -> InputError:
    return InputError(
        f"{redact(url)} has {length} bytes, but bytes {start} to {end} were asked for: "
        "it changed since it was indexed; run `moviola index` on the dataset again"
    )


@contextlib.contextmanager
def _explained(action: str, url: str) -> Iterator[None]:
    """Turns an OSError that the operator must mend into an InputError that says how."""
    try:
        yield
    except OSError as error:
        where = f"can't {action} {redact(url)}"
        match error.errno:
            case errno.ENOENT:
                raise Missing(f"{redact(url)} is not there") from None
            case errno.ENOSPC | errno.EDQUOT:
                raise InputError(f"{where}: the disk is full ({os.strerror(error.errno)}); free some space") from None
            case errno.EACCES | errno.EPERM | errno.EROFS:
                raise InputError(f"{where}: {os.strerror(error.errno).lower()}; check its owner and mode") from None
            case errno.EISDIR | errno.ENOTDIR | errno.EEXIST | errno.ENOTEMPTY:
                raise InputError(f"{where}: {os.strerror(error.errno).lower()}") from None
        raise


@contextlib.contextmanager
def _replacing(url: str) -> Iterator[BinaryIO]:
    """A temporary file that takes the object's place, synced, when the block ends without an exception."""
    path = _path(url)
    with _explained("write", url):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return bucket, key


_stores: dict[int, _S3] = {}
_stores_lock = threading.Lock()


def _s3() -> _S3:
    """The client of this process: a forked child on its parent's connections would read its parent's answers."""
    store = _stores.get(os.getpid())
    if store is None:
        with _stores_lock:
            store = _stores.setdefault(os.getpid(), _S3())
    return store


def _after_fork() -> None:
    global _stores_lock
    _stores_lock = threading.Lock()
    counters._lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class _Answered(Exception):
    """An HTTP answer that is an error, in the shape of botocore's ClientError."""

    def __init__(self, status: int, headers: Mapping[str, str], body: str) -> None:
        code, message = (re.search(f"<{tag}>([^<]*)", body) for tag in ("Code", "Message"))
        self.response = {
            "Error": {"Code": code[1] if code else None, "Message": message[1] if message else ""},
            "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": {k.lower(): v for k, v in headers.items()}},
        }
        self.stale = False
        super().__init__(f"status {status}")


class _Headers(dict[str, str]):
    """Headers by lower-case name; of one that comes twice, the last."""

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name.lower(), default)


def _receive(sock: Any, deadline: float, begun: bool) -> bytes:
    """What is there, at most HEADER_BYTES; raises TimeoutError where what has begun should have been whole by now."""
    if begun and time.monotonic() > deadline:
        raise TimeoutError("the answer was not whole before the time was up")
    return sock.recv(HEADER_BYTES)


def _head(sock: Any, deadline: float) -> tuple[int, _Headers, bytes]:
    """Status, headers and what came with them of the body. The standard library's parser, made for mail, takes longer
    than all else of a small read.
    """
    data = b""
    while True:
        while (end := data.find(b"\r\n\r\n")) < 0:
            if data.count(b"\n") > HEADERS or len(data) > HEADER_BYTES:
                raise http.client.HTTPException(f"more than {HEADERS} headers, or {HEADER_BYTES} bytes of them")
            more = _receive(sock, deadline, bool(data))
            if not more:
                raise ConnectionResetError("closed within the headers" if data else "closed without an answer")
            data += more
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        data = data[end + 4 :]
        version, _, status = first.partition(" ")
        if not version.startswith("HTTP/1.") or not status[:3].isdecimal():
            raise http.client.HTTPException(f"no HTTP/1 but {first[:40]!r}")
        headers = _Headers(connection="close" if version == "HTTP/1.0" else "")
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise http.client.HTTPException("headers that are cut off or none")
            headers[name.lower()] = value.strip()
        if int(status[:3]) >= 200:
            return int(status[:3]), headers, data


def _chunks(sock: Any, data: bytes, deadline: float) -> bytes:
    """A body in chunks, error messages mostly; ``data`` is what came of it."""
    body = b""
    while True:
        size, found, rest = data.partition(b"\r\n")
        try:
            count = int(size.partition(b";")[0], 16) if found else 0
        except ValueError:
            raise http.client.HTTPException(f"a chunk of size {size[:20]!r}") from None
        if found and len(rest) >= count + 2:
            body, data = body + rest[:count], rest[count + 2 :]
            if not count:
                return body
        elif more := _receive(sock, deadline, bool(data or body)):
            data += more
        else:
            raise EOFError(f"{len(body)} bytes of an answer in chunks came")


class _Reads:
    """Ranged GETs over kept connections. A URL is signed once for all ranges of its object: signing anew, an event
    loop and a general HTTP client would cost more processor time than the rest of a small read.
    """

    def __init__(self, credentials: Callable[[], Any], endpoint: str | None, region: str) -> None:
        self.credentials = credentials
        self.region = region
        self.base = (endpoint or f"https://s3.{region}.amazonaws.com").rstrip("/")
        self.signed: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.idle: deque[http.client.HTTPConnection] = deque(maxlen=CONNECTIONS)
        self.lock = threading.Lock()
        split = urlsplit(self.base)
        self.secure, self.host, self.port = split.scheme == "https", split.hostname or "", split.port
        self.netloc = split.netloc.rpartition("@")[2]
        proxy = urllib.request.getproxies().get(split.scheme)
        self.proxy = urlsplit(proxy) if proxy and not urllib.request.proxy_bypass(self.host) else None
        self.tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE")) if self.secure else None

    def get(self, url: str, start: int | None, end: int | None, limit: float) -> tuple[bytes, Version]:
        """One attempt; raises _Answered, TimeoutError, EOFError, HTTPException, or what a socket raises."""
        ranged = start is not None or end is not None
        part = f"Range: bytes={start or 0}-{'' if end is None else end - 1}\r\n" if ranged else ""
        deadline = time.monotonic() + limit
        signed, fresh = self._sign(url)
        connection = self._connection()
        try:
            target = signed if self.proxy and not self.secure else signed[signed.index("/", len("https://")) :]
            connection.sock.sendall(f"GET {target} HTTP/1.1\r\nHost: {self.netloc}\r\n{part}\r\n".encode("ascii"))
            if _QUICK is not None:
                connection.sock.setsockopt(socket.IPPROTO_TCP, _QUICK, 1)
            status, headers, data = _head(connection.sock, deadline)
            length = headers.get("content-length", "")
            if headers.get("transfer-encoding", "").lower() == "chunked":
                data, ends = _chunks(connection.sock, data, deadline), True
            else:
                ends = headers.get("connection", "").lower() == "close" or not length.isdecimal()
                data = self._body(connection.sock, data, int(length) if length.isdecimal() else None, deadline)
        except BaseException as error:
            connection.close()
            if isinstance(error, BlockingIOError):  # SO_RCVTIMEO
                raise TimeoutError(f"timed out after {policy.idle_timeout:g} s without a byte") from None
            raise
        if ends:
            connection.close()
        else:
            self.idle.append(connection)
        if status not in (200, 206):
            error = _Answered(status, headers, data.decode("utf-8", "replace"))
            if status in (400, 403) and not fresh:  # the credentials behind the signature may have expired
                error.stale = True
                with self.lock:
                    self.signed.pop(url, None)
            raise error
        if ranged and status == 200:
            raise InputError(f"can't read part of {redact(url)}: {redact(self.base)} ignores byte ranges")
        if ranged and end is not None and len(data) != end - (start or 0):
            whole = headers.get("content-range", "").rpartition("/")[2]
            if not whole.isdecimal() or int(whole) >= end:
                raise EOFError(f"{len(data)} of {end - (start or 0)} bytes came")
            raise _too_short(url, start or 0, end, int(whole))
        if not length and "transfer-encoding" not in headers:
            raise EOFError(f"{len(data)} bytes of an answer without a length came")
        counters.request(read=len(data))
        return data, headers.get("etag", "").strip('"')

    def _body(self, sock: Any, data: bytes, length: int | None, deadline: float) -> bytes:
        """The body that begins with ``data``: without TLS in one call, which the kernel fills; without length, all."""
        if length is None:
            while more := _receive(sock, deadline, bool(data)):
                data += more
            return data
        if len(data) >= length:
            return data[:length]
        body, got = bytearray(length), len(data)
        body[:got] = data
        view = memoryview(body)
        while got < length:
            count = sock.recv_into(view[got:], 0, 0 if self.tls else socket.MSG_WAITALL)
            if not count:
                raise EOFError(f"{got} of {length} bytes came")
            got += count
            if time.monotonic() > deadline:
                raise TimeoutError(f"{got} of {length} bytes came before the time was up")
        return bytes(body)

    def _connection(self) -> http.client.HTTPConnection:
        """An idle connection that the store has not closed, or a new one."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self.idle.pop()
                if not select.select([connection.sock], [], [], 0)[0]:
                    return connection
                connection.close()
        made: Callable[..., http.client.HTTPConnection] = http.client.HTTPConnection
        if self.tls:
            made = partial(http.client.HTTPSConnection, context=self.tls)
        host, port = (self.proxy.hostname or "", self.proxy.port) if self.proxy else (self.host, self.port)
        connection = made(host, port, timeout=policy.connect_timeout)
        if self.proxy and self.secure:
            connection.set_tunnel(self.host, self.port)
        connection.connect()
        connection.sock.settimeout(policy.idle_timeout if self.tls else None)
        idle = struct.pack("ll", int(policy.idle_timeout), int(policy.idle_timeout % 1 * 1e6))
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, idle)  # of the kernel's, for MSG_WAITALL
        return connection

    def _sign(self, url: str) -> tuple[str, bool]:
        """The signed URL, and whether it was signed just now."""
        now = time.time()
        with self.lock:
            found = self.signed.get(url)
            if found and found[1] > now:
                return found[0], False
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import NoCredentialsError

        credentials = self.credentials()
        if credentials is None:
            raise NoCredentialsError
        bucket, key = _split(url)
        request = AWSRequest("GET", f"{self.base}/{bucket}/{quote(key, safe='/~')}")
        frozen = credentials.get_frozen_credentials()
        S3SigV4QueryAuth(frozen, "s3", self.region, expires=SIGNED_SECONDS).add_auth(request)
        with self.lock:
            self.signed[url] = request.url, now + SIGNED_SECONDS / 4
            while len(self.signed) > SIGNED_URLS:
                self.signed.popitem(last=False)
        return request.url, True


class _S3:
    """One process's S3 clients, with our retries: :class:`_Reads`, and for all else s3fs's session and event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fs: Any = None
        self._credentials: Any = None
        self.region = self._setting("region", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
        self.endpoint = self._setting("endpoint_url", "MOVIOLA_S3_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        self.reads = _Reads(self.credentials, self.endpoint, self.region)

    def _setting(self, name: str, *variables: str) -> str | None:
        """The first of the environment's variables that is set, else the profile's setting."""
        found = next(filter(None, map(os.environ.get, variables)), None)
        return found or self.session.get_scoped_config().get(name)

    @cached_property
    def session(self) -> Any:
        """botocore's: 20 ms of processor time, spared where the environment says all that reads need."""
        import botocore.session

        return botocore.session.Session()

    def credentials(self) -> Any:
        """The environment's, else what the session finds; None without any."""
        from botocore.credentials import EnvProvider

        if self._credentials is None:
            self._credentials = EnvProvider().load() or self.session.get_credentials()
        return self._credentials

    @property
    def fs(self) -> Any:
        """s3fs, made when something other than a read is first asked for."""
        with self._lock:
            if self._fs is None:
                self._fs = self._connect()
            return self._fs

    def _connect(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint,
            skip_instance_cache=True,
            client_kwargs={"region_name": self.region},
            config_kwargs={
                "signature_version": "s3v4",
                "s3": {"addressing_style": "path"},
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
                "retries": {"total_max_attempts": 1},
                "connect_timeout": policy.connect_timeout,
                "read_timeout": policy.idle_timeout,
                "max_pool_connections": CONNECTIONS,
            },
        )

    def read(self, url: str, start: int | None, end: int | None) -> tuple[bytes, Version]:
        length = 0 if end is None else end - (start or 0)
        if end is not None and length <= 0:
            return b"", ""
        limit = policy.request_timeout + length / policy.least_rate
        return self._retried("read", url, lambda: self.reads.get(url, start, end, limit))

    def write(self, url: str, data: bytes) -> None:
        if len(data) > SINGLE_PUT_BYTES:
            stream = _MultipartStream(self, url)
            try:
                stream.write(data)
            except BaseException:
                stream.abort()
                raise
            stream.finish()
        else:
            self._put(url, data)

    def _put(self, url: str, data: bytes, **condition: str) -> Version:
        bucket, key = _split(url)

        async def put(client: Any) -> Version:
            answer = await client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
            counters.request(written=len(data))
            return answer["ETag"].strip('"')

        return self._run("write", url, put, len(data))

    def upload(self, url: str, path: Path) -> None:
        with _explained("read", str(path)):
            length = path.stat().st_size
            if length <= SINGLE_PUT_BYTES:
                self._put(url, path.read_bytes())
                return
            stream = _MultipartStream(self, url, max(PART_BYTES, -(-length // 9000)))
            try:
                with path.open("rb") as file:
                    while chunk := file.read(stream.part_bytes):
                        stream.write(chunk)
            except BaseException:
                stream.abort()
                raise
            stream.finish()

    def append(self, url: str, data: bytes) -> None:
        """Small logs are read and replaced; of large ones the store copies the old bytes itself (5 MiB parts)."""
        for _ in range(policy.attempts):
            found = self._version(url)
            if found is None or found[0] < LEAST_PART_BYTES:
                old = read_versioned(url)
                if self.swap(url, (old[0] if old else b"") + data, old[1] if old else None) is not None:
                    return
            elif self._extend(url, data, found[1]):
                return
            else:
                now = self._version(url)
                if now and now[0] == found[0] + len(data) and read_bytes(url, found[0], now[0]) == data:
                    return  # ours: only the answer was lost
        raise Unreachable(f"can't append to {redact(url)}: another process keeps changing it")

    def _extend(self, url: str, data: bytes, version: Version) -> bool:
        bucket, key = _split(url)

        async def extend(client: Any) -> bool:
            upload = (await client.create_multipart_upload(Bucket=bucket, Key=key))["UploadId"]
            name = {"Bucket": bucket, "Key": key, "UploadId": upload}
            try:
                copied = await client.upload_part_copy(
                    **name, PartNumber=1, CopySource={"Bucket": bucket, "Key": key}, CopySourceIfMatch=version
                )
                added = await client.upload_part(**name, PartNumber=2, Body=data)
                parts = [
                    {"PartNumber": 1, "ETag": copied["CopyPartResult"]["ETag"]},
                    {"PartNumber": 2, "ETag": added["ETag"]},
                ]
                await client.complete_multipart_upload(**name, MultipartUpload={"Parts": parts})
            except BaseException as error:
                with contextlib.suppress(Exception):
                    await client.abort_multipart_upload(**name)
                if _status(error) == 412:
                    return False
                raise
            counters.request(written=len(data))
            return True

        return self._run("append to", url, extend, len(data))

    def swap(self, url: str, data: bytes, expected: Version | None) -> Version | None:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        try:
            return self._put(url, data, **condition)
        except Missing:
            return None
        except _Refused:
            found = read_versioned(url)
            return found[1] if found and found[0] == data and found[1] != expected else None

    def exists(self, url: str) -> bool:
        if self._version(url) is not None:
            return True
        bucket, key = _split(url)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""

        async def some(client: Any) -> bool:
            answer = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            counters.request()
            return bool(answer.get("KeyCount", len(answer.get("Contents", ()))))

        return self._run("list", url, some)

    def head(self, url: str) -> int:
        found = self._version(url)
        if found is None:
            raise Missing(f"{redact(url)} is not there")
        return found[0]

    def _version(self, url: str) -> tuple[int, Version] | None:
        bucket, key = _split(url)
        if not key:
            return None

        async def head(client: Any) -> tuple[int, Version]:
            answer = await client.head_object(Bucket=bucket, Key=key)
            counters.request()
            return answer["ContentLength"], answer["ETag"].strip('"')

        try:
            return self._run("look for", url, head)
        except Missing:
            return None

    def _list(self, url: str, delimiter: str) -> list[Entry]:
        bucket, key = _split(url)
        prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        entries: list[Entry] = []
        token: dict[str, str] = {}
        while True:

            async def page(client: Any, token: dict[str, str] = token) -> dict[str, Any]:
                answer = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **token)
                counters.request()
                return answer

            answer = self._run("list", url, page)
            entries += [Entry(i["Prefix"][len(prefix) : -1], 0, True) for i in answer.get("CommonPrefixes", ())]
            entries += [
                Entry(i["Key"][len(prefix) :], i["Size"], False)
                for i in answer.get("Contents", ())
                if i["Key"] != prefix
            ]
            if not answer.get("IsTruncated"):
                return entries
            token = {"ContinuationToken": answer["NextContinuationToken"]}

    def list(self, url: str) -> list[Entry]:
        return [entry for entry in self._list(url, "") if not entry.name.endswith("/")]  # a folder's mark

    def list_dir(self, url: str) -> list[Entry]:
        return sorted(self._list(url, "/"), key=lambda entry: entry.name)

    def delete(
        self, url: str, recursive: bool, version: Version | None = None, keep: Callable[[str], bool] | None = None
    ) -> None:
        below = [entry.name for entry in self._list(url, "")] if recursive else []
        names = [join(url, name) for name in below if not (keep and keep(name))] if recursive else [url]
        condition = {} if version is None else {"IfMatch": version}

        async def one(client: Any, name: str) -> None:
            bucket, key = _split(name)
            try:
                await client.delete_object(Bucket=bucket, Key=key, **condition)
            except Exception as error:
                if not condition or _status(error) != 501:
                    raise
                await client.delete_object(Bucket=bucket, Key=key)

        async def remove(client: Any) -> None:
            for first in range(0, len(names), CONNECTIONS):
                await asyncio.gather(*(one(client, name) for name in names[first : first + CONNECTIONS]))
                counters.request()

        with contextlib.suppress(Missing, _Refused):
            self._run("delete", url, remove, len(names) * 4096)

    def drop_uploads(self, url: str) -> None:
        bucket, key = _split(url)

        async def drop(client: Any) -> None:
            answer = await client.list_multipart_uploads(Bucket=bucket, Prefix=key.rstrip("/") + "/")
            for upload in answer.get("Uploads", ()):
                await client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            counters.request()

        with contextlib.suppress(InputError):
            self._run("look for unfinished uploads to", url, drop)

    def _run(self, action: str, url: str, request: Callable[[Any], Awaitable[Any]], length: int = 0) -> Any:
        """Runs ``request`` with s3fs's client until it succeeds or the policy is spent."""
        limit = policy.request_timeout + length / policy.least_rate

        def attempt() -> Any:
            future = asyncio.run_coroutine_threadsafe(self._once(request, limit), self.fs.loop)
            try:
                return future.result()
            except KeyboardInterrupt:
                future.cancel()
                raise

        return self._retried(action, url, attempt)

    def _retried(self, action: str, url: str, attempt: Callable[[], Any]) -> Any:
        began = time.monotonic()
        for number in range(policy.attempts):
            try:
                return attempt()
            except InputError:
                raise
            except Exception as error:
                reason = _transient(error)
                if reason is None:
                    raise self._explain(action, url, error) from None
                wait = policy.wait(number, _retry_after(error))
                if number + 1 == policy.attempts or time.monotonic() - began + wait > policy.deadline:
                    raise Unreachable(
                        f"can't {action} {redact(url)}: gave up after {number + 1} attempts in "
                        f"{time.monotonic() - began:.0f} s; the last one failed with {redact(_brief(error))}. "
                        f"Is the object store at {self._where()} up and reachable?"
                    ) from None
                counters.retry(reason)
                time.sleep(wait)
        raise ValueError(f"storage.policy.attempts is {policy.attempts}; it must be at least 1")

    async def _once(self, request: Callable[[Any], Awaitable[Any]], limit: float) -> Any:
        client = await self.fs.set_session()
        return await asyncio.wait_for(request(client), limit)

    def _where(self) -> str:
        return redact(self.endpoint or "AWS S3")

    def _explain(self, action: str, url: str, error: Exception) -> Exception:
        """The InputError for an answer that trying again won't change."""
        code, status, where = _code(error), _status(error), redact(url)
        bucket, key = _split(url)
        if code in ("NoSuchBucket", "InvalidBucketName"):
            return InputError(f"can't {action} {where}: there is no bucket {redact(bucket)!r} at {self._where()}")
        if status == 412 or (status == 409 and code in ("ConditionalRequestConflict", "OperationAborted")):
            return _Refused(f"can't {action} {where}: it changed meanwhile")
        if code in ("NoSuchKey", "NoSuchUpload") or (status == 404 and key):
            return Missing(f"{where} is not there (at {self._where()})")
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            return InputError(
                f"can't {action} {where}: no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
            )
        if status in (401, 403):
            return InputError(
                f"can't {action} {where}: {self._where()} refused the credentials ({code or status}); check the keys, "
                "the bucket's policy and the clock"
            )
        if status in (301, 307, 400) and (region := _region(error)) and region != self.region:
            return InputError(f"can't {action} {where}: the bucket lies in region {region}; set AWS_REGION={region}")
        if status == 416:
            return InputError(f"{where} is shorter than its index says: run `moviola index` on the dataset again")
        if status == 507 or code in ("QuotaExceeded", "InsufficientStorage", "EntityTooLarge"):
            return InputError(f"can't {action} {where}: the store is full ({code or status}); free some space")
        if status == 501 or code == "NotImplemented":
            return InputError(f"can't {action} {where}: {self._where()} does not offer this operation ({code})")
        if code is not None or status is not None or type(error).__module__.startswith("botocore"):
            return InputError(f"can't {action} {where}: {self._where()} answered {redact(_brief(error))}")
        return error


class _Refused(InputError):
    """A conditional write whose condition did not hold."""


class _MultipartStream(io.RawIOBase):
    """A write-only stream that uploads parts as they fill; a stream smaller than one part is a single PUT."""

    def __init__(self, store: _S3, url: str, part_bytes: int = PART_BYTES) -> None:
        super().__init__()
        self.store = store
        self.url = url
        self.part_bytes = part_bytes
        self.bucket, self.key = _split(url)
        self.buffer = bytearray()
        self.written = 0
        self.upload_id: str | None = None
        self.etags: list[str] = []

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.written

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.buffer += view
        self.written += len(view)
        while len(self.buffer) > self.part_bytes:
            self._send(bytes(self.buffer[: self.part_bytes]))
            del self.buffer[: self.part_bytes]
        return len(view)

    def _name(self) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.key, "UploadId": self.upload_id or ""}

    def _send(self, part: bytes) -> None:
        if self.upload_id is None:

            async def create(client: Any) -> str:
                counters.request()
                return (await client.create_multipart_upload(Bucket=self.bucket, Key=self.key))["UploadId"]

            self.upload_id = self.store._run("write", self.url, create)

        async def send(client: Any) -> str:
            answer = await client.upload_part(**self._name(), PartNumber=len(self.etags) + 1, Body=part)
            counters.request(written=len(part))
            return answer["ETag"]

        self.etags.append(self.store._run("write", self.url, send, len(part)))

    def finish(self) -> None:
        """Makes the object visible."""
        if self.upload_id is None:
            self.store._put(self.url, bytes(self.buffer))
            return
        if self.buffer:
            self._send(bytes(self.buffer))
        parts = [{"PartNumber": i + 1, "ETag": etag} for i, etag in enumerate(self.etags)]

        async def complete(client: Any) -> None:
            await client.complete_multipart_upload(**self._name(), MultipartUpload={"Parts": parts})
            counters.request()

        try:
            self.store._run("write", self.url, complete, self.written)
        except Missing:  # a retry after a lost answer: the upload is gone because it is complete
            if self.store.head(self.url) != self.written:
                raise
        self.close()

    def abort(self) -> None:
        """Leaves what was there before."""

        async def drop(client: Any) -> None:
            await client.abort_multipart_upload(**self._name())

        if self.upload_id is not None:
            with contextlib.suppress(Exception):
                self.store._run("write", self.url, drop)
        self.close()


def _response(error: BaseException) -> dict[str, Any]:
    return getattr(error, "response", None) or {}


def _status(error: BaseException) -> int | None:
    return _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")


def _code(error: BaseException) -> str | None:
    return _response(error).get("Error", {}).get("Code")


def _region(error: BaseException) -> str | None:
    return _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")


def _retry_after(error: BaseException) -> float | None:
    """Seconds, from a header of either form: a number of them, or a date."""
    value = _response(error).get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    with contextlib.suppress(ValueError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def _brief(error: BaseException) -> str:
    code, status = _code(error), _status(error)
    if code or status:
        return f"{code or ''} (status {status}) {_response(error).get('Error', {}).get('Message', '')}".strip()
    return f"{type(error).__name__}: {error}".rstrip(": ")


_RETRIED_CODES = ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "Throttling", "BadDigest")


def _transient(error: BaseException) -> str | None:
    """The reason for which ``error`` is worth another attempt (a metric label), or None."""
    import aiohttp
    from botocore import exceptions as botocore

    status, code = _status(error), _code(error)
    if getattr(error, "stale", False):
        return "signature"
    if status is not None and (status in (408, 429) or (status >= 500 and status not in (501, 507))):
        return f"http_{status}"
    if code in _RETRIED_CODES:
        return "throttled"
    if isinstance(error, (TimeoutError, botocore.ReadTimeoutError, botocore.ConnectTimeoutError)):
        return "timeout"
    if isinstance(error, (EOFError, aiohttp.ClientPayloadError, botocore.IncompleteReadError)):
        return "truncated"
    if isinstance(
        error,
        (OSError, http.client.HTTPException, botocore.ConnectionError, botocore.HTTPClientError, aiohttp.ClientError),
    ):
        return "connection"
    if isinstance(error, botocore.ResponseStreamingError) or type(error).__name__ == "ResponseParserError":
        return "garbled"
    return None
