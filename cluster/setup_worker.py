"""Begins a worker of an embedded Ray that has an environment of its own, in place of Ray's ``setup_worker.py``.

It is started as ``python setup_worker.py WORKER ARGUMENTS... --serialized-runtime-env-context=JSON --language=PYTHON``,
sets the environment's variables and becomes the worker. Ray's imports Ray for that, and the worker does so again.
"""

import argparse
import json
import os
import shlex
import sys


def main(arguments: list[str]) -> None:
    """Becomes the worker of a command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--serialized-runtime-env-context", type=json.loads, default={})
    parser.add_argument("--language")
    known, worker = parser.parse_known_args(arguments)
    context = known.serialized_runtime_env_context
    os.environ.update({name: os.path.expandvars(value) for name, value in (context.get("env_vars") or {}).items()})
    prefix, python = context.get("command_prefix") or [], context.get("py_executable") or sys.executable
    if prefix:
        os.execvp("bash", ["bash", "-c", " ".join([*prefix, "exec", python, *map(shlex.quote, worker)])])
    os.execvp(python, [python, *worker])


if __name__ == "__main__":
    main(sys.argv[1:])
