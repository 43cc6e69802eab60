"""Render the lines of an answer's head: the status line, and the application's header fields."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any, Final

__all__ = ["LINES", "NOTED", "STATUS_LINES", "check_field", "render_field"]

#: Header fields of an answer that the server handles itself.
NOTED: Final = frozenset({b"connection", b"content-length", b"date", b"server", b"transfer-encoding"})

#: RFC 9110 section 5.1; and 5.5: bytes that would end a field's line, or its value for some parsers.
NAME: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
FORBIDDEN: Final = re.compile(rb"[\r\n\0]")

#: A cache of rendered header fields, which most answers repeat; cleared when it is full.
LINES: Final[dict[tuple[bytes, bytes], bytes]] = {}
LINES_MAX: Final = 1024
LINE_BYTES_MAX: Final = 128


def _status_line(status: int) -> bytes:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


#: Final answers only: interim ones are not for `http.response.start`.
STATUS_LINES: Final = {status: _status_line(status) for status in range(200, 1000)}


def check_field(name: Any, value: Any) -> None:
    """Raise RuntimeError if an application's header field is malformed (RFC 9110, section 5)."""
    if not isinstance(name, bytes) or not isinstance(value, bytes):
        raise RuntimeError(f"a header field is a pair of byte strings, not {(name, value)!r}")
    if not NAME.fullmatch(name):
        raise RuntimeError(f"{name!r} is not the name of a header field")
    if FORBIDDEN.search(value):
        raise RuntimeError(f"the header field {name!r} contains a line break or a NUL")


def render_field(field: Any) -> tuple[bytes, bytes]:
    """Return a field's name in lower case, and its line; cache short lines."""
    name, value = field
    check_field(name, value)
    name = name.lower()
    line = b"%b: %b\r\n" % (name, value)
    if name not in NOTED and len(line) <= LINE_BYTES_MAX:
        if len(LINES) >= LINES_MAX:
            LINES.clear()
        LINES[field] = line
    return name, line
