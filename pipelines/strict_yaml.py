"""YAML that people write: manifests and rules. Safe tags, no aliases, no key twice; bounds on length and depth."""

from __future__ import annotations

from typing import Any

import yaml

from pipelines import storage
from pipelines.faults import InputError

MAX_BYTES = 1 << 20
MAX_DEPTH = 50
MAX_DIGITS = 300
"""Of a whole number. Python shows none of more than 4300 digits, also where 0x… made it one."""
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, OverflowError)
"""What :func:`value` raises; the last three come from scalars (a date, a number) and from depth."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases (which can grow a short file without bound)."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark = self.peek_event().start_mark
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not allowed; write it out", mark)
        if self.depth >= MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {MAX_DEPTH} deep", mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_yaml_int(self, node: Any) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark)
        return super().construct_yaml_int(node)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                repeated = key in seen
            except TypeError:
                raise yaml.MarkedYAMLError(None, None, "a key must be plain text", key_node.start_mark) from None
            if repeated:
                raise yaml.MarkedYAMLError(None, None, f"key {key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read(source: str, kind: str) -> str:
    """The text at a path or URL, of a ``kind`` of file. Raises InputError where there is none, or it is too long."""
    try:
        if "://" in source:
            long = storage.size(source) > MAX_BYTES
            data = b"" if long else storage.read_bytes(source)
        else:
            with open(source, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            long = len(data) > MAX_BYTES
    except (storage.Missing, FileNotFoundError):
        raise InputError(f"{kind} {source}: there is no such file", status=2) from None
    except OSError as error:
        raise InputError(f"{kind} {source}: {(error.strerror or str(error)).lower()}", status=2) from None
    except ValueError as error:
        raise InputError(f"{kind} {source}: {error}", status=2) from None
    if long:
        raise InputError(f"{kind} {source}: more than {MAX_BYTES} bytes", status=2)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{kind} {source}: not UTF-8 text at byte {error.start}", status=2) from None


def value(text: str) -> Any:
    """One YAML value; raises one of ``UNREADABLE``."""
    return yaml.load(text, Loader=_Loader)


def mapping(text: str, where: str, what: str) -> dict[str, Any]:
    """A whole file, ``what`` it is being "a manifest is", say. Raises InputError with line and column."""
    if len(text) > MAX_BYTES:
        raise InputError(f"{where}: {len(text)} bytes; the limit is {MAX_BYTES}", status=2)
    try:
        plain = value(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{where}:{at}: {error.problem or error.context}", status=2) from None
    except UNREADABLE as error:
        raise InputError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}", status=2) from None
    if not isinstance(plain, dict):
        kind = "empty" if plain is None else f"a {type(plain).__name__}"
        raise InputError(f"{where}: {what} a mapping of fields; this is {kind}", status=2)
    return plain
