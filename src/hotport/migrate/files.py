"""Read other servers' configuration files.

A ``gunicorn.conf.py`` is a program: ``workers = cpu_count() * 2 + 1`` and ``bind = f":{environ['PORT']}"`` are the
rule rather than the exception, and no look at its source says what they are. So it is run, as gunicorn runs it, but in
a child process with a time limit, whose output is not ours.
"""

from __future__ import annotations

import configparser
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from hotport.errors import ConfigError, in_one_line

__all__ = ["CALLABLE", "READ_TIMEOUT_S", "read_settings"]

READ_TIMEOUT_S: Final = 10.0
"""A configuration file computes a few values; one that takes longer waits for something."""

FILE_BYTES_MAX: Final = 1 << 20

#: The value of a setting that is a function.
CALLABLE: Final = object()

_CHILD: Final = """
import json, os, runpy, sys
out = os.dup(1)
os.dup2(2, 1)
kind, _, rest = sys.argv[1].partition(":")
found = runpy.run_module(rest) if kind == "python" else runpy.run_path(rest if kind == "file" else sys.argv[1])
told = {}
for name, value in found.items():
    if name.startswith("_") or isinstance(value, type(sys)):
        continue
    try:
        told[name] = {"value": json.loads(json.dumps(value, default=str))} if not callable(value) else {}
    except (TypeError, ValueError):
        told[name] = {"value": repr(value)}
with os.fdopen(out, "w") as file:
    json.dump(told, file)
os._exit(0)
"""


def read_settings(path: str, directory: Path) -> dict[str, Any]:
    """Read the settings of a configuration file: Python, TOML, or an INI file's section ``[uwsgi]``.

    Args:
        path: As the server is given it: relative to `directory`, or ``file:PATH``, ``python:MODULE``.

    Raises:
        ConfigError: It cannot be read, or its code fails or takes longer than `READ_TIMEOUT_S` (HP340).
    """
    if path.startswith("python:"):
        return _run(path, directory)
    file = directory / path.removeprefix("file:")
    try:
        if not file.is_file():  # a FIFO would wait for somebody to write
            raise _unread(path, "there is no such file", f"ls {shlex.quote(str(file.parent))}")
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise _unread(path, f"{error.strerror or error}".lower(), f"ls -ld {shlex.quote(str(file))}") from None
    if len(data) > FILE_BYTES_MAX:
        raise _unread(path, f"it has more than {FILE_BYTES_MAX} bytes")
    try:
        match file.suffix:
            case ".toml":
                import tomllib

                return tomllib.loads(data.decode("utf-8-sig"))
            case ".ini":
                return _ini(data.decode("utf-8-sig"))
    except (ValueError, configparser.Error) as error:
        raise _unread(path, in_one_line(str(error))) from None
    return _run(path, directory)


def _unread(path: str, cause: str, fix: str = "") -> ConfigError:
    note = "" if fix else f"correct {path}, or leave it out and give the options on the command line"
    return ConfigError("HP340", f"cannot read {path}", cause=cause, fix=fix, note=note)


def _ini(text: str) -> dict[str, Any]:
    parser = configparser.ConfigParser(
        strict=False, interpolation=None, delimiters=("=",), inline_comment_prefixes=None
    )
    parser.read_string(text)
    if not parser.has_section("uwsgi"):
        raise ValueError("it has no section [uwsgi]")
    on = {"true": True, "false": False}
    return {name.replace("-", "_"): on.get(value, value) for name, value in parser["uwsgi"].items()}


def _run(path: str, directory: Path) -> dict[str, Any]:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, path],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # with whatever it starts
    ) as process:
        try:
            out, err = process.communicate(timeout=READ_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise _unread(path, f"its code still ran after {READ_TIMEOUT_S:g} s, and was ended") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise _unread(path, f"its code failed: {in_one_line(err)}", shlex.join([sys.executable, path]))
    return {name: told.get("value", CALLABLE) for name, told in json.loads(out).items()}
