"""Parse files of environment variables: lines of NAME=VALUE, as uvicorn, Docker and systemd read them.

Those read some lines each in a different way: a comment behind a value, a reference to another variable, a
continued line. Such a line is refused, since the wrong value may be a password that nearly works.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final

from hotport.errors import ConfigError

__all__ = ["FILE_BYTES_MAX", "parse_variables"]

#: The kernel passes no more than that in one variable (execve(2), MAX_ARG_STRLEN is 128 KiB) and little more in all.
FILE_BYTES_MAX: Final = 1024 * 1024

_NAME: Final = re.compile(r"(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=[ \t]*")
_SINGLE: Final = re.compile(r"'([^']*)'")
_DOUBLE: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED: Final = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$", "`": "`", "\n": ""}
_REFERENCE: Final = re.compile(r"(?<!\\)(?:\\\\)*\$\{")

_QUOTE: Final = "write the value between single quotes if it is meant as it stands"


def parse_variables(data: bytes, named: str, *, reserved: Collection[str] = ()) -> dict[str, str]:
    """Parse the content of a file; of a name that stands there twice the last value counts.

    Args:
        named: How the user calls the file, for messages. These contain no value: most are secrets.
        reserved: Names that cannot be set there; so cannot those that begin with ``HOTPORT_``.

    Raises:
        ConfigError: A line cannot be used (HP309).
    """
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise _bad_line(named, number, "it is not UTF-8", "save the file as UTF-8") from None
    found: dict[str, str] = {}
    at = began = 0
    number = 1
    while at < len(text):
        number += text.count("\n", began, at)  # a quoted value may have several lines
        began = at
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at:end].strip()
        if not line or line[0] in "#;":
            at = end + 1
            continue
        at += len(text[at:end]) - len(text[at:end].lstrip())
        name, value, at = _parse_line(text, at, end, named, number)
        if name in reserved or name.startswith("HOTPORT_"):
            note = "set an option in hotport.toml, or in the environment of hotport itself; else remove the line"
            raise _bad_line(named, number, f"hotport sets {name} itself, or reads it before this file", note)
        found[name] = value
    return found


def _parse_line(text: str, at: int, end: int, named: str, number: int) -> tuple[str, str, int]:
    """Parse one variable; return its name, its value, and where the next line begins."""
    head = _NAME.match(text, at, end)
    if head is None:
        line = text[at:end]
        if "=" not in line:
            raise _bad_line(named, number, "it has no =", "a line is NAME=VALUE, or a comment that begins with #")
        note = "a name has A-Z a-z 0-9 and _, and begins with no digit"
        raise _bad_line(named, number, "there is no name of a variable before its =", note)
    name, at = head[1], head.end()
    quote = text[at : at + 1]
    if quote not in ("'", '"'):
        value, at = text[at:end].rstrip(), end
        _check_plain(value, named, number, name)
    else:
        quoted = (_SINGLE if quote == "'" else _DOUBLE).match(text, at)  # its end may be on another line
        if quoted is None:
            note = "close the quote; a quoted value may have several lines"
            raise _bad_line(named, number, f"the value of {name} begins with {quote} and does not end with it", note)
        value, at = quoted[1], quoted.end()
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        if rest := text[at:end].strip():
            what = "a comment" if rest.startswith("#") else "something"
            note = "put a comment on a line of its own" if what == "a comment" else "quote the whole value"
            raise _bad_line(named, number, f"{what} follows the quoted value of {name}", note)
        if quote == '"':
            _check_reference(value, named, number, name)
            value = _ESCAPE.sub(lambda part: _ESCAPED.get(part[1], part[0]), value)
    if "\0" in value:
        raise _bad_line(named, number, f"the value of {name} has a NUL character", "no variable can have one")
    return name, value, end + 1


def _check_plain(value: str, named: str, number: int, name: str) -> None:
    """Refuse a value without quotes that is read differently elsewhere."""
    _check_reference(value, named, number, name)
    if value.startswith("#") or re.search(r"\s#", value):
        cause = f"a # in the value of {name} begins a comment for some programs, and not for others"
        raise _bad_line(named, number, cause, f"put a comment on a line of its own; {_QUOTE}")
    if value.endswith("\\"):
        cause = f"the value of {name} ends with a backslash: some programs continue it on the next line"
        raise _bad_line(named, number, cause, _QUOTE)


def _check_reference(value: str, named: str, number: int, name: str) -> None:
    if _REFERENCE.search(value):
        cause = f"the value of {name} refers to another variable, and references are not replaced"
        raise _bad_line(named, number, cause, f"write the other value out; {_QUOTE}")


def _bad_line(named: str, number: int, cause: str, note: str) -> ConfigError:
    return ConfigError("HP309", f"cannot use line {number} of {named}", cause=cause, note=note)
