"""Storage on a local disk and on S3: whole, atomic, conditional; faults injected at the socket."""

from __future__ import annotations

import contextlib
import email.utils
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faulty import Fault, FaultyProxy, point_at

from pipelines import storage
from pipelines.faults import InputError

OPENSSL = shutil.which("openssl")


def test_objects_come_back_whole_and_in_ranges(any_url: str) -> None:
    url, data = storage.join(any_url, "a", "b c+d.bin"), bytes(range(256)) * 40
    storage.write_bytes(url, data)
    assert storage.read_bytes(url) == data
    assert storage.read_bytes(url, 5, 900) == data[5:900]
    assert storage.read_bytes(url, 10_000) == data[10_000:]
    assert storage.read_bytes(url, 7, 7) == b""
    assert storage.size(url) == len(data)
    storage.write_json(storage.join(any_url, "x.json"), {"half": 0.5, "name": "é"})
    assert storage.read_json(storage.join(any_url, "x.json")) == {"half": 0.5, "name": "é"}


def test_a_read_past_the_end_says_that_the_object_changed(any_url: str) -> None:
    url = storage.join(any_url, "x")
    storage.write_bytes(url, b"0123456789")
    for start, end in ((5, 11), (10, 12)):
        with pytest.raises(InputError, match="index"):
            storage.read_bytes(url, start, end)


def test_listing_existence_and_deletion(any_url: str) -> None:
    for name in ("b", "a/x", "a/y"):
        storage.write_bytes(storage.join(any_url, name), name.encode())
    assert storage.list_dir(any_url) == [storage.Entry("a", 0, True), storage.Entry("b", 1, False)]
    for name in (".hidden", ".a/x", "a/.b/x", "a/b/c/d"):
        storage.write_bytes(storage.join(any_url, name), b"")
    assert [(entry.name, entry.bytes) for entry in storage.list_below(any_url)] == [
        ("a/b/c/d", 0),
        ("a/x", 3),
        ("a/y", 3),
        ("b", 1),
    ]
    assert storage.list_below(storage.join(any_url, "nothing")) == []
    storage.delete(storage.join(any_url, ".hidden"))
    storage.delete(storage.join(any_url, ".a"), recursive=True)
    assert storage.exists(any_url) and storage.exists(storage.join(any_url, "a", "x"))
    assert not storage.exists(storage.join(any_url, "a", "z"))
    storage.delete(storage.join(any_url, "b"))
    storage.delete(storage.join(any_url, "b"))
    storage.delete(storage.join(any_url, "a"), recursive=True)
    assert storage.list_dir(any_url) == []
    with pytest.raises(storage.Missing, match="b is not there"):
        storage.read_bytes(storage.join(any_url, "b"))
    with pytest.raises(storage.Missing):
        storage.size(storage.join(any_url, "b"))


def test_streams_and_uploads_of_several_parts(any_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PART_BYTES", storage.LEAST_PART_BYTES)
    monkeypatch.setattr(storage, "SINGLE_PUT_BYTES", storage.LEAST_PART_BYTES)
    data = os.urandom(2 * storage.LEAST_PART_BYTES + 77)
    (tmp_path / "source").write_bytes(data)
    storage.upload(storage.join(any_url, "uploaded"), tmp_path / "source")
    with storage.writer(storage.join(any_url, "streamed")) as stream:
        for start in range(0, len(data), 1 << 20):
            stream.write(data[start : start + (1 << 20)])
        assert stream.tell() == len(data)
    storage.write_bytes(storage.join(any_url, "written"), data)
    for name in ("uploaded", "streamed", "written"):
        assert storage.read_bytes(storage.join(any_url, name)) == data, name


def test_a_stream_that_breaks_leaves_what_was_there(any_url: str) -> None:
    url = storage.join(any_url, "x")
    storage.write_bytes(url, b"old")
    with pytest.raises(ZeroDivisionError), storage.writer(url) as stream:
        stream.write(b"n" * (storage.PART_BYTES + 1))
        raise ZeroDivisionError
    assert storage.read_bytes(url) == b"old"
    assert [entry.name for entry in storage.list_dir(any_url)] == ["x"]


def test_logs_grow_small_and_large(any_url: str) -> None:
    url = storage.join(any_url, "log.jsonl")
    storage.append_text(url, "one\n")
    storage.append_text(url, "two\n")
    assert storage.read_bytes(url) == b"one\ntwo\n"
    large = b"x" * (storage.LEAST_PART_BYTES + 10)
    storage.write_bytes(url, large)
    storage.append_text(url, "last\n")
    assert storage.read_bytes(url) == large + b"last\n"


def test_swap_needs_the_version_that_was_read(any_url: str) -> None:
    url = storage.join(any_url, "lease.json")
    assert storage.read_versioned(url) is None
    assert storage.swap(url, b"x", "0" * 32) is None
    first = storage.swap(url, b"attempt 1", None)
    assert first is not None
    assert storage.read_versioned(url) == (b"attempt 1", first)
    assert storage.swap(url, b"attempt 2", None) is None
    second = storage.swap(url, b"attempt 2", first)
    assert second not in (None, first)
    assert storage.swap(url, b"attempt 3", first) is None
    assert storage.read_bytes(url) == b"attempt 2"
    assert storage.put_if_absent(storage.join(any_url, "new"), b"1")
    assert not storage.put_if_absent(storage.join(any_url, "new"), b"2")


def _increment(url: str, times: int, who: int) -> None:
    for _ in range(times):
        while True:
            found = storage.read_versioned(url)
            count = int(found[0].split()[0]) if found else 0
            if storage.swap(url, b"%d by %d" % (count + 1, who), found[1] if found else None):
                break


def test_no_increment_of_several_processes_is_lost(tmp_path: Path) -> None:
    url = str(tmp_path / "counter")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_increment, args=(url, 20, who)) for who in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert storage.read_bytes(url).split()[0] == b"80"


def test_lines_of_several_writers_stay_whole(tmp_path: Path) -> None:
    url, lines = str(tmp_path / "log"), [f"{i}-" + "x" * 5000 + "\n" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda line: storage.append_text(url, line), lines))
    assert sorted(storage.read_bytes(url).decode().splitlines(keepends=True)) == sorted(lines)


def _read_all(url: str, reads: int, wrong: object) -> None:
    for i in range(reads):
        if storage.read_bytes(url, i * 100, i * 100 + 100) != bytes([i]) * 100:
            wrong.value += 1  # type: ignore[attr-defined]


def test_a_forked_child_has_connections_of_its_own(s3_url: str) -> None:
    url = storage.join(s3_url, "x")
    storage.write_bytes(url, b"".join(bytes([i]) * 100 for i in range(60)))
    storage.read_bytes(url, 0, 1)
    context = multiprocessing.get_context("fork")
    wrong = context.Value("i", 0)
    children = [context.Process(target=_read_all, args=(url, 60, wrong)) for _ in range(2)]
    for child in children:
        child.start()
    _read_all(url, 60, wrong)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert wrong.value == 0
    assert set(storage._stores) == {os.getpid()}


RETRIED = {
    "reset": Fault("reset"),
    "stall": Fault("stall"),
    "500": Fault("status", 500),
    "503": Fault("status", 503, "Retry-After: 0\r\n"),
    "429": Fault("status", 429),
    "truncated": Fault("truncate", bytes=3),
    "short": Fault("short", bytes=3),
    "dribble": Fault("dribble"),
    "drawl": Fault("drawl"),
}


@pytest.mark.parametrize("name", RETRIED)
def test_a_fault_of_a_read_is_retried_and_counted(proxy: FaultyProxy, s3_url: str, name: str) -> None:
    url, data = storage.join(s3_url, "x"), os.urandom(100)
    storage.write_bytes(url, data)
    before = sum(storage.counters.snapshot()["retries"].values())
    proxy.faults.extend([RETRIED[name], RETRIED[name]])
    assert storage.read_bytes(url, 10, 90) == data[10:90]
    assert sum(storage.counters.snapshot()["retries"].values()) == before + 2
    assert not proxy.faults


@pytest.mark.parametrize("name", ["reset", "stall", "500", "503"])
def test_a_fault_of_a_write_is_retried(proxy: FaultyProxy, s3_url: str, name: str) -> None:
    url = storage.join(s3_url, "x")
    proxy.faults.append(RETRIED[name])
    storage.write_bytes(url, b"content")
    assert storage.read_bytes(url) == b"content"
    assert not proxy.faults


def test_a_swap_whose_answer_was_lost_still_counts_as_won(proxy: FaultyProxy, s3_url: str) -> None:
    url = storage.join(s3_url, "lease")
    proxy.faults.append(Fault("lose"))
    version = storage.swap(url, b"mine", None)
    assert storage.read_versioned(url) == (b"mine", version)
    proxy.faults.append(Fault("lose"))
    assert storage.swap(url, b"mine again", version) is not None
    proxy.faults.append(Fault("lose"))
    assert storage.swap(url, b"theirs", version) is None


def test_retries_end_with_what_was_tried(proxy: FaultyProxy, s3_url: str) -> None:
    proxy.faults.extend([Fault("status", 503)] * 10)
    began = time.monotonic()
    with pytest.raises(storage.Unreachable, match=r"gave up after 4 attempts .* 503.*up and reachable"):
        storage.read_bytes(storage.join(s3_url, "x"))
    assert time.monotonic() - began < 5
    assert len(proxy.faults) == 6


def test_retry_after_is_waited_for_within_a_bound() -> None:
    policy = storage.RetryPolicy(first_wait=0.1, longest_wait=2.0)
    asked = [policy.wait(0, 1.5) for _ in range(50)]
    assert 1.55 <= min(asked) < max(asked) <= 1.6, "after it, and not all at the same instant"
    assert 6.05 <= policy.wait(0, 3600.0) <= 6.1
    waits = [policy.wait(3, None) for _ in range(50)]
    assert 0.4 <= min(waits) < max(waits) <= 0.8
    assert max(policy.wait(30, None) for _ in range(50)) <= 2.0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_server_that_asks_for_time_gets_it(
    proxy: FaultyProxy, s3_url: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = storage.join(s3_url, "x")
    storage.write_bytes(url, b"content")
    monkeypatch.setattr(storage.policy, "longest_wait", 2.0)
    value = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)  # to whole seconds
    proxy.faults.append(Fault("status", 503, f"Retry-After: {value}\r\n"))
    began = time.monotonic()
    assert storage.read_bytes(url) == b"content"
    assert 0.9 < time.monotonic() - began < 4


def test_what_the_operator_must_mend_is_an_input_error(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no bucket 'not-there'"):
        storage.read_bytes("s3://not-there/x")
    with pytest.raises(InputError, match="there is no bucket 'not-there'"):
        storage.write_bytes("s3://not-there/x", b"")
    monkeypatch.setattr(storage, "_stores", {})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    with pytest.raises(InputError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(storage.join(s3_url, "x"))


def test_a_refusal_is_not_retried(proxy: FaultyProxy, s3_url: str) -> None:
    proxy.faults.extend([Fault("status", 403)] * 2)
    with pytest.raises(InputError, match=r"refused the credentials .*check the keys"):
        storage.read_bytes(storage.join(s3_url, "x"))
    assert len(proxy.faults) == 1
    proxy.faults.clear()
    proxy.faults.append(Fault("status", 400, "x-amz-bucket-region: eu-west-3\r\n"))
    with pytest.raises(InputError, match="set AWS_REGION=eu-west-3"):
        storage.read_bytes(storage.join(s3_url, "y"))


def test_a_signature_that_expired_is_renewed(proxy: FaultyProxy, s3_url: str) -> None:
    url = storage.join(s3_url, "x")
    storage.write_bytes(url, b"content")
    storage.read_bytes(url)
    proxy.faults.append(Fault("status", 403))
    assert storage.read_bytes(url) == b"content"
    assert not proxy.faults


def test_a_full_disk_is_named() -> None:
    with pytest.raises(InputError, match=r"can't append to /dev/full: the disk is full .*free some space"):
        storage.append_text("/dev/full", "x")


def test_a_line_that_the_disk_has_no_room_for_leaves_no_half(tmp_path: Path) -> None:
    url = str(tmp_path / "log")
    storage.append_text(url, "one\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))  # a write across it is cut short, as on a full disk
        with pytest.raises(OSError, match="File too large"):
            storage.append_text(url, "a long line\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    storage.append_text(url, "two\n")
    assert storage.read_bytes(url) == b"one\ntwo\n"


def test_a_place_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"can't write .*file/x: "):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")
    with pytest.raises(InputError, match=r"can't read .*is a directory"):
        storage.read_bytes(str(tmp_path))


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        error = OSError(errno.EACCES, "denied")
        with (
            pytest.raises(InputError, match="can't write /x: permission denied; check its owner"),
            storage._explained("write", "/x"),
        ):
            raise error
        return
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission denied; check its owner"):
        storage.write_bytes(str(tmp_path / "x"), b"")


def test_a_reader_never_sees_half_of_a_write(tmp_path: Path) -> None:
    url, versions = str(tmp_path / "x"), [bytes([i]) * (100_000 + i) for i in range(30)]
    storage.write_bytes(url, versions[0])
    done = threading.Event()

    def write() -> None:
        for version in versions:
            storage.write_bytes(url, version)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = {storage.read_bytes(url) for _ in iter(done.is_set, True)}
    thread.join()
    assert seen <= set(versions)


@pytest.mark.parametrize("url", ["pipe:cat x", "http://x/y", "https://x/y", "gs://b/x", "ftp://x/y", "exec:ls"])
def test_other_schemes_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="only a path, file:// and s3:// are read"):
        storage.read_bytes(url)


@pytest.mark.parametrize("url", ["a\0b", "file:///a%00b", "\ud800", "s3://bucket/\0"])
def test_names_that_no_file_can_have(url: str) -> None:
    with pytest.raises(InputError, match="not a name that a file can have"):
        storage.absolute(url)


def test_file_urls_and_paths_are_the_same(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/a%20b", b"x")
    assert (tmp_path / "a b").read_bytes() == b"x"
    assert storage.read_bytes(str(tmp_path / "a b")) == b"x"


def test_secrets_never_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "Kq7/abcd+ef0123456789")
    text = storage.redact(
        "GET https://me:pw@host/b/k?X-Amz-Credential=AKIAABCDEFGHIJKLMNOP%2F2026&X-Amz-Signature=deadbeef&x=1 "
        "s3://user:word@bucket/key aws_secret_access_key = hunter22 token: tok123 AKIAABCDEFGHIJKLMNOP "
        "Authorization: Bearer abc.def leaked Kq7/abcd+ef0123456789 s3://key:sla/sh+ed@bucket/key "
        "http://127.0.0.1:9000/a@b"
    )
    for secret in ("pw", "AKIA", "deadbeef", "word", "hunter22", "tok123", "abc.def", "Kq7", "sla", "ed@"):
        assert secret not in text, (secret, text)
    assert "host/b/k" in text and "x=1" in text and text.count("s3://bucket/key") == 2
    assert "http://127.0.0.1:9000/a@b" in text
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "moviola")
    assert storage.redact("moviola logs mine -f") == "moviola logs mine -f", "a user of a store of one's own"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "0123456789abcdef")
    assert storage.redact("id 0123456789abcdef") == "id ***"


def test_errors_carry_no_secret(proxy: FaultyProxy, s3_url: str) -> None:
    proxy.faults.extend([Fault("reset")] * 10)
    with pytest.raises(storage.Unreachable) as caught:
        storage.read_bytes(storage.join(s3_url, "x"))
    for secret in ("testsecret", "testkey", "X-Amz-Signature"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize("keys", ["someone:password@", "AKIAABCDEFGHIJKLMNOP:pass/word@"])
def test_keys_in_a_url_are_refused_without_showing_them(keys: str) -> None:
    with pytest.raises(
        InputError, match=r"^s3://bucket/x: keys in a URL are not read, and would get into logs"
    ) as caught:
        storage.read_bytes(f"s3://{keys}bucket/x")
    assert "pass" not in str(caught.value)


def answers(monkeypatch: pytest.MonkeyPatch, *pieces: bytes, tls: ssl.SSLContext | None = None) -> str:
    """A URL on a gateway that keeps its connection and gives every request this answer, a piece a ``send``."""
    listener = socket.create_server(("127.0.0.1", 0))
    if tls:
        listener = tls.wrap_socket(listener, server_side=True)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=talk, args=(client,), daemon=True).start()

    def talk(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            while client.recv(1 << 16):
                for piece in pieces:
                    client.sendall(piece)
                if b"length" not in pieces[0] and b"chunked" not in pieces[0]:
                    return

    threading.Thread(target=serve, daemon=True).start()
    point_at(f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}", monkeypatch)
    monkeypatch.setattr(storage, "policy", storage.RetryPolicy(attempts=2, first_wait=0.01, idle_timeout=2))
    return "s3://bucket/key"


@pytest.mark.parametrize("secure", [False, pytest.param(True, marks=pytest.mark.skipif(not OPENSSL, reason="openssl"))])
def test_a_body_that_comes_in_pieces_is_whole_with_tls_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    tls = None
    if secure:
        key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
        made = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=x", "-keyout", key]
        made += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate]
        subprocess.run([str(OPENSSL), "req", *made], check=True, capture_output=True)
        monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate, key)
    data = os.urandom(400_000)
    head = b"HTTP/1.1 206 x\r\ncontent-length: %d\r\n\r\n" % len(data)
    url = answers(monkeypatch, head, data[:10], data[10:200_000], data[200_000:], tls=tls)
    for _ in range(3):
        assert storage.read_bytes(url, 0, len(data)) == data
    assert len(storage._s3().reads.idle) == 1
    url = answers(monkeypatch, head, data[:300_000], tls=tls)
    monkeypatch.setattr(storage.policy, "idle_timeout", 0.2)
    with pytest.raises(storage.Unreachable, match=r"timed out"):
        storage.read_bytes(url, 0, len(data))


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")
def test_a_small_read_does_not_wait_for_the_kernel_to_acknowledge_its_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    url = answers(monkeypatch, b"HTTP/1.1 206 x\r\ncontent-length: 5\r\n\r\n", b"ab", b"cde")
    seconds = []
    for _ in range(40):  # a new connection is acknowledged at once, for a while
        began = time.perf_counter()
        assert storage.read_bytes(url, 0, 5) == b"abcde"
        seconds.append(time.perf_counter() - began)
    assert min(seconds[20:]) < 0.03


def test_answers_in_chunks_and_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    head = b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 x\r\nETag: "7"\r\nTransfer-Encoding: chunked\r\n\r\n'
    url = answers(monkeypatch, head + b"2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n")
    assert [storage.read_versioned(url) for _ in range(2)] == [(b"abcde", "7")] * 2
    error = b"<Error><Code>NoSuchBucket</Code></Error>"
    url = answers(monkeypatch, b"HTTP/1.1 404 x\r\nTransfer-Encoding: chunked\r\n\r\n28\r\n" + error + b"\r\n0\r\n\r\n")
    with pytest.raises(InputError, match="there is no bucket 'bucket'"):
        storage.read_bytes(url)
    url = answers(monkeypatch, b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\nfive\r\nabcde\r\n0\r\n\r\n")
    with pytest.raises(storage.Unreachable, match="a chunk of size b'five'"):
        storage.read_bytes(url)
    url = answers(monkeypatch, b"HTTP/1.1 200 x\r\n\r\nabc")  # whole, or cut off? nobody knows
    with pytest.raises(storage.Unreachable, match="without a length"):
        storage.read_bytes(url)
    for lines, fault in (
        (b"".join(b"x-%d: y\r\n" % n for n in range(200)), "more than 100 headers"),
        (b"no header\r\n\r\n", "cut off or none"),
    ):
        url = answers(monkeypatch, b"HTTP/1.1 200 x\r\ncontent-length: 3\r\n" + lines)
        with pytest.raises(storage.Unreachable, match=fault):
            storage.read_bytes(url)


def test_uploads_that_nobody_completed_are_dropped_with_their_folder(s3_url: str) -> None:
    bucket, _, _ = s3_url.removeprefix("s3://").partition("/")

    def begun() -> set[str]:
        async def ask(client: Any) -> set[str]:
            answer = await client.list_multipart_uploads(Bucket=bucket)
            return {upload["Key"].rpartition("/")[2] for upload in answer.get("Uploads", ())}

        return storage._s3()._run("list", s3_url, ask) & {"lost", "other"}

    part = bytes(storage.PART_BYTES + 1)
    for name in ("dead/step-1/lost", "living/other"):
        storage._MultipartStream(storage._s3(), f"{s3_url}/{name}").write(part)
    storage.write_bytes(f"{s3_url}/dead/step-1/small", b"whole")
    assert begun() == {"lost", "other"}
    storage.drop_uploads(f"{s3_url}/dead")
    assert begun() == {"other"}
    assert storage.read_bytes(f"{s3_url}/dead/step-1/small") == b"whole"
    storage.drop_uploads(f"{s3_url}/nowhere")
