"""Every error that hotport raises: what happened, why, and what to do.

::

    HotportError            exit 1   a bug, if nothing below fits
    |-- ConfigError         exit 2   yours, found before anything happened (also a ValueError)
    |-- StartError          exit 3   the service did not start
    |   `-- KernelError     exit 3   the operating system refused (also an OSError)
    |-- RestartError        exit 4   a restart was aborted; says who serves
    `-- ControlError        exit 6   no supervisor answered

Codes are stable; ``docs/reference/errors.md`` lists them, by hundreds (`HUNDREDS` in ``docs/generate.py``).
"""

from __future__ import annotations

import errno as _errno
import os
import re
from collections.abc import Iterable
from typing import ClassVar, Final

__all__ = [
    "ConfigError",
    "ControlError",
    "ExitCode",
    "HotportError",
    "KernelError",
    "RestartError",
    "StartError",
    "advice",
    "in_one_line",
    "nearest",
    "visible",
]

#: What a terminal obeys, or shows as something else than it is: control characters but for line breaks and tabs, breaks
#: that few know of, reversals of the direction of writing, and bytes that are no text (`os.fsdecode`).
_OBEYED: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class ExitCode:
    """Exit statuses of hotport commands."""

    DONE: Final = 0
    BUG: Final = 1
    USAGE: Final = 2
    NOT_STARTED: Final = 3
    ABORTED: Final = 4
    CUT: Final = 5
    NO_SUPERVISOR: Final = 6
    NOT_READY: Final = 7
    INTERRUPTED: Final = 130


class HotportError(Exception):
    """Base of the tree; carries its lines as data.

    Args:
        code: Stable identifier, ``HP`` and three digits.
        what: What could not be done, in one line.
        cause: Why, as far as it is known.
        fix: One command, option or line of code that can be pasted; empty if there is none.
        note: What to do beside it, or in its place, in prose; mostly empty.
    """

    exit_code: ClassVar[int] = ExitCode.BUG

    def __init__(self, code: str, what: str, *, cause: str, fix: str = "", note: str = "") -> None:
        super().__init__(code, what)
        self.code = code
        self.what = what
        self.cause = cause
        self.fix = fix
        self.note = note

    def __str__(self) -> str:
        return "\n".join([f"{self.code} {self.what}", f"  cause: {self.cause}", *advice(self.fix, self.note)])


class ConfigError(HotportError, ValueError):
    """An address, option, file or target that cannot be used."""

    exit_code = ExitCode.USAGE


class StartError(HotportError):
    """The service, or a worker of it, could not start."""

    exit_code = ExitCode.NOT_STARTED


class KernelError(StartError, OSError):
    """A system call failed; ``errno`` is kept, and ``except OSError`` catches it."""

    def __init__(self, code: str, what: str, *, errno: int, cause: str, fix: str = "", note: str = "") -> None:
        StartError.__init__(self, code, f"{what}: {describe_errno(errno)}", cause=cause, fix=fix, note=note)
        self.errno = errno


class RestartError(HotportError):
    """A restart was refused or aborted.

    Attributes:
        phase: The step that was reached, or ``"refused"``.
        serving: The generation that serves now; 0 if none does.
    """

    exit_code = ExitCode.ABORTED

    def __init__(
        self, code: str, what: str, *, cause: str, fix: str = "", note: str = "", phase: str = "refused", serving: int
    ) -> None:
        super().__init__(code, what, cause=cause, fix=fix, note=note)
        self.phase = phase
        self.serving = serving


class ControlError(HotportError):
    """A control socket is missing, belongs to another user, or did not answer."""

    exit_code = ExitCode.NO_SUPERVISOR


def advice(fix: str, note: str) -> list[str]:
    """Render a fix and a note, where there are such, as lines to show below a cause."""
    return [f"  {label:7}{text}" for label, text in (("try:", fix), ("note:", note)) if text]


def describe_errno(number: int) -> str:
    """``EADDRINUSE (address already in use)``."""
    name = _errno.errorcode.get(number, str(number))
    return f"{name} ({os.strerror(number).lower()})"


def in_one_line(error: str) -> str:
    """Shorten an error: the first line of our own, the last one of a traceback."""
    lines = error.strip().splitlines() or [""]
    return lines[0 if lines[0].startswith("HP") else -1].strip()


def visible(text: str) -> str:
    """Make foreign text safe to show on a terminal: a control character becomes its escape, for example ``\\u001b``.

    JSON stays the same JSON.
    """
    return _OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `word`, if one is close enough."""
    from difflib import get_close_matches  # most processes never look for a near miss

    found = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None
