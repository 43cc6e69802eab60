"""Types of option values: how each is read from text, TOML and Python, and shown."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from hotport.address import UdpAddress, parse_address
from hotport.trust import Trusted

__all__ = [
    "DURATION_MAX_S",
    "Type",
    "address",
    "addresses",
    "choice",
    "command_line",
    "count",
    "duration",
    "format_duration",
    "format_size",
    "hook",
    "mode",
    "parse_duration",
    "parse_size",
    "paths",
    "peers",
    "prefix",
    "protocols",
    "share",
    "size",
    "switch",
    "target",
    "text",
    "url_path",
]

DURATION_MAX_S: Final = 366 * 86400.0


@dataclass(frozen=True, slots=True)
class Type:
    """Readers and writers for one type of value; both readers raise ValueError that names a valid form.

    Attributes:
        metavar: What stands for a value in a usage line.
        from_text: Reads what the environment or a flag says.
        from_native: Reads what TOML or Python says.
        to_native: The value as a user would write it.
        suffix: The unit, as it ends the name of the field.
        choices: The only values allowed, if they can be listed.
        example: A value to show in an error, where the default would not help.
    """

    metavar: str
    from_text: Callable[[str], Any]
    from_native: Callable[[object], Any]
    to_native: Callable[[Any], Any] = lambda value: value
    suffix: str = ""
    choices: tuple[str, ...] = ()
    example: str | None = None
    is_switch: bool = False
    is_list: bool = False


_DURATION_UNITS_NS: Final = {"d": 86400 * 10**9, "h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6}
_DURATION_PART: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,9}))?(d|h|ms|m|s)")
_DURATION_SAYS: Final = "a duration is a number of seconds, or like 30s, 250ms, 2m or 1h30m"
_SIZE: Final = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))?(?:([KMGT])(?:iB)?)?")
_SHARE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,7})?)(%?)")
_PREFIX: Final = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_SIZE_SAYS: Final = "a size is a number of bytes, or like 512M or 1.5G (1K is 1024 bytes)"


def parse_duration(text: str) -> float:
    """Seconds from ``30s``, ``250ms``, ``2m``, ``1h30m`` or a bare number; exact to the nanosecond.

    Raises:
        ValueError: If it is no duration, or longer than a year.
    """
    if re.fullmatch(r"[0-9.]+", text):
        text += "s"
    total_ns = end = 0
    while part := _DURATION_PART.match(text, end):
        whole, fraction, unit = part[1], part[2] or "", part[3]
        total_ns += int(whole + fraction) * _DURATION_UNITS_NS[unit] // 10 ** len(fraction)
        end = part.end()
    if not text or end != len(text):
        raise ValueError(_DURATION_SAYS)
    if total_ns > DURATION_MAX_S * 10**9:
        raise ValueError("a duration is a year at most")
    return total_ns / 10**9


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads as `seconds`: ``250ms``, ``1m30s``, ``1.5s``."""
    rest_ns = round(seconds * 10**9)
    if 0 < rest_ns < 10**9:
        return f"{_decimal(rest_ns, 6)}ms"
    text = ""
    for unit in ("d", "h", "m"):
        count, rest_ns = divmod(rest_ns, _DURATION_UNITS_NS[unit])
        text += f"{count}{unit}" if count else ""
    return f"{text}{_decimal(rest_ns, 9)}s" if rest_ns or not text else text


def _decimal(number: int, places: int) -> str:
    """``1500, 3`` is ``1.5``."""
    whole, fraction = divmod(number, 10**places)
    return f"{whole}.{fraction:0{places}d}".rstrip("0").rstrip(".")


def parse_size(text: str) -> int:
    """Bytes from ``512M``, ``1.5G``, ``64KiB`` or a bare number; units are powers of 1024.

    Raises:
        ValueError: If it is no size.
    """
    part = _SIZE.fullmatch(text)
    if part is None:
        raise ValueError(_SIZE_SAYS)
    whole, fraction, unit = part[1], part[2] or "", part[3] or ""
    scale: int = 10 ** len(fraction)
    size_bytes, rest = divmod(int(whole + fraction) << 10 * " KMGT".index(unit or " "), scale)
    if rest and not unit:
        raise ValueError("a size is a whole number of bytes")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The size in the largest unit that divides it: ``512M``, ``1000``."""
    unit = ""
    for larger in "KMGT":
        if not size_bytes or size_bytes % 1024:
            break
        size_bytes //= 1024
        unit = larger
    return f"{size_bytes}{unit}"


def text(metavar: str) -> Type:
    """Any text but the empty one."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ValueError("it must be text, and not empty")
        return value

    return Type(metavar, read, read)


def target() -> Type:
    """``module:name`` or ``path/to/file.py:name``; the name may be missing."""
    any_text = text("TARGET").from_native

    def read(value: object) -> str:
        found: str = any_text(value)
        module = found.partition(":")[0]
        if not module.endswith(".py") and ("/" in module or not all(module.split("."))):
            raise ValueError("it must be module:name or path/to/file.py:name; --app-dir is for a directory")
        return found

    return Type("TARGET", read, read, example="app:app")


def choice(*choices: str) -> Type:
    """One of a few words."""

    def read(value: object) -> str:
        if value not in choices:
            raise ValueError(f"it must be one of {', '.join(choices)}")
        return str(value)

    return Type("|".join(choices), read, read, choices=choices)


def mode() -> Type:
    """The mode of a file, as chmod(1) takes it: three or four octal digits."""

    def read(value: object) -> str:
        if isinstance(value, int) and not isinstance(value, bool):  # 0o660 in TOML and Python
            value = f"{value:04o}"
        if not isinstance(value, str) or not re.fullmatch(r"0?[0-7]{3}", value):
            raise ValueError("a mode has three octal digits, like 0660")
        return f"{int(value, 8):04o}"

    return Type("MODE", read, read, example="0660")


def switch() -> Type:
    """True or false; as text also 1, yes, on and their opposites."""

    def from_text(text: str) -> bool:
        if text.lower() in {"1", "true", "yes", "on"}:
            return True
        if text.lower() in {"0", "false", "no", "off"}:
            return False
        raise ValueError("it must be true or false")

    def from_native(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("it must be true or false, without quotes")
        return value

    return Type("", from_text, from_native, is_switch=True)


def count(minimum: int, maximum: int = 2**31 - 1) -> Type:
    """A whole number within bounds, which belong to it."""

    def check(number: int) -> int:
        if not minimum <= number <= maximum:
            raise ValueError(f"it must be at least {minimum} and at most {maximum}")
        return number

    def from_text(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ValueError("it must be a whole number")
        return check(int(text))

    def from_native(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("it must be a whole number, without quotes")
        return check(value)

    return Type("N", from_text, from_native)


def duration(*, is_positive: bool = False) -> Type:
    """Seconds, written as `parse_duration` reads them; `is_positive` refuses zero."""

    def from_text(text: str) -> float:
        seconds = parse_duration(text)
        if is_positive and not seconds:
            raise ValueError("it must be longer than nothing")
        return seconds

    def from_native(value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not 0 <= value <= DURATION_MAX_S:
                raise ValueError("a duration is neither negative nor longer than a year")
            value = format_duration(value)
        if not isinstance(value, str):
            raise ValueError(_DURATION_SAYS)
        return from_text(value)

    return Type("TIME", from_text, from_native, format_duration, suffix="_s")


def size() -> Type:
    """Bytes, written as `parse_size` reads them."""

    def from_native(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(_SIZE_SAYS)
        return parse_size(str(value))

    return Type("SIZE", parse_size, from_native, format_size, suffix="_bytes", example="512M")


def share() -> Type:
    """A part of a whole, from 0 to 1; written as ``5%`` or ``0.05``."""
    says = "it must be a percentage from 0% to 100%, like 5%, or a number from 0 to 1"

    def from_text(text: str) -> float:
        part = _SHARE.fullmatch(text)
        if part is None:
            raise ValueError(says)
        return from_native(float(part[1]) / 100 if part[2] else float(part[1]))

    def from_native(value: object) -> float:
        if isinstance(value, str):
            return from_text(value)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(says)
        return float(value)

    def to_native(value: float) -> str:
        return f"{_decimal(round(value * 10**9), 7)}%"

    return Type("SHARE", from_text, from_native, to_native, example="5%")


def addresses() -> Type:
    """Addresses in their canonical spelling, at least one and none twice; separated by commas in a text."""

    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        canonical = tuple(str(parse_address(item)) for item in items)
        if not canonical:
            raise ValueError("it must name an address")
        if twice := next((one for one in canonical if canonical.count(one) > 1), None):
            raise ValueError(f"it names an address twice: {twice}")
        return canonical

    return _list("ADDRESS", _by_comma, check)


def address() -> Type:
    """One address of connections, in its canonical spelling."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("it must be one address, as text")
        found = parse_address(value)
        if isinstance(found, UdpAddress):
            raise ValueError("it must be an address of connections, and UDP has none")
        return str(found)

    return Type("ADDRESS", read, read, example="127.0.0.1:9000")


def paths(metavar: str = "PATH") -> Type:
    """Paths; separated by commas in a text."""

    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if not all(items) or any("\0" in item for item in items):
            raise ValueError("it must be a list of paths, and none of them empty")
        return items

    return _list(metavar, _by_comma, check)


def protocols() -> Type:
    """Names of protocols as in TLS (RFC 7301 section 3.1); separated by commas in a text."""

    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        if not all(item.isascii() and 1 <= len(item) <= 255 for item in items):
            raise ValueError("a protocol is named with 1 to 255 ASCII letters")
        return items

    return _list("PROTOCOL", _by_comma, check)


def peers() -> Type:
    """Peers as `hotport.trust.Trusted` knows them; separated by commas in a text."""

    def check(items: tuple[str, ...]) -> tuple[str, ...]:
        Trusted(items)
        return items

    return _list("PEER", _by_comma, check)


def prefix() -> Type:
    """The beginning of a URL path, spelled so that it is the same encoded and decoded; empty is none."""

    def read(value: object) -> str:
        if value != "" and not (isinstance(value, str) and _PREFIX.fullmatch(value)):
            raise ValueError("it must begin with / and not end with it, and have only A-Z a-z 0-9 - . _ ~ between")
        return str(value)

    return Type("PATH", read, read, example="/api")


def url_path() -> Type:
    """The path of a URL, and a query perhaps, as it stands in a request line."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not re.fullmatch(r"/[!-\"$-~]*", value):
            raise ValueError("it must begin with /, and have no spaces, no # and nothing but ASCII")
        return value

    return Type("PATH", read, read, example="/healthz")


def hook() -> Type:
    """A command to run; a text is split as a shell would, but no shell runs it. An empty list is none."""

    def check(items: list[str]) -> tuple[str, ...]:
        if not items[0] or any("\0" in item for item in items):
            raise ValueError("it must name a program, and may have arguments behind it")
        return tuple(items)

    def from_text(text: str) -> tuple[str, ...]:
        import shlex  # workers have no use for it

        return check(shlex.split(text) or [""])

    def from_native(value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            return from_text(value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError("it must be text, or a list of texts")
        return check(list(value)) if value else ()

    return Type("COMMAND", from_text, from_native, list, example="./migrate.sh")


def command_line() -> Type:
    """A command and its arguments; split as a shell would in a text."""

    def split(text: str) -> list[str]:
        import shlex  # workers have no use for it

        return shlex.split(text)

    return _list("COMMAND", split)


def _list(
    metavar: str,
    split: Callable[[str], list[str]],
    check: Callable[[tuple[str, ...]], tuple[str, ...]] = lambda items: items,
) -> Type:
    def from_text(text: str) -> tuple[str, ...]:
        return check(tuple(split(text)))

    def from_native(value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            return from_text(value)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError("it must be a list of texts")
        return check(tuple(value))

    return Type(metavar, from_text, from_native, list, is_list=True)


def _by_comma(text: str) -> list[str]:
    return [item for item in (item.strip() for item in text.split(",")) if item]
