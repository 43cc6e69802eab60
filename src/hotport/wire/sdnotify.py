"""Notifications that a program sends about itself to ``NOTIFY_SOCKET``, one datagram at a time.

Newline-separated ``KEY=value``; unknown keys are ignored, so are values that make
no sense. One key is ours: ``X_HOTPORT_ERROR`` says why a worker cannot start. Its lines must survive a
protocol of lines, so the value is a JSON string; plain text, as a shell script sends it, is taken as it is.

Listeners are kept in the manager's descriptor store under names that say where they listen, so that they can be
told from whatever else is in there.
Sources: sd_notify(3), well-known assignments; sd_pid_notify_with_fds(3).
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote, unquote_to_bytes

import msgspec

from hotport.address import Address, parse_address
from hotport.errors import ConfigError

__all__ = [
    "BARRIER",
    "NOTIFICATION_BYTES_MAX",
    "Notification",
    "encode_notification",
    "encode_store",
    "encode_store_remove",
    "parse_store_name",
    "store_name",
]

BARRIER: Final = b"BARRIER=1"
"""Comes with a descriptor, which the manager closes when it has carried out everything sent before."""

STORE_PREFIX: Final = "hotport+"
FDNAME_BYTES_MAX: Final = 255

NOTIFICATION_BYTES_MAX: Final = 64 << 10
"""The longest datagram that is sent or read; a traceback fits, and the kernel queues several."""

_STATUS_CHARS_MAX: Final = 1000
_USEC_PER_S: Final = 1_000_000


class Notification(msgspec.Struct, frozen=True):
    """The content of one datagram; a field that it does not mention keeps its default.

    Attributes:
        ready: Initialised; or, after `reloading`, finished with it.
        stopping: Has begun to leave.
        reloading: Reads its configuration again; `monotonic_s` says since when.
        status: One line for people.
        errno: Why it failed, as an errno.
        extend_timeout_s: Seconds from now within which the next message comes.
        watchdog: Alive.
        has_failed: Not alive, by its own word.
        watchdog_s: Seconds within which it says from now on that it is alive.
        main_pid: The process to watch from now on.
        monotonic_s: Seconds on CLOCK_MONOTONIC when the message was made.
        error: Why a worker cannot start, with all its lines.
    """

    ready: bool = False
    stopping: bool = False
    reloading: bool = False
    status: str | None = None
    errno: int | None = None
    extend_timeout_s: float | None = None
    watchdog: bool = False
    has_failed: bool = False
    watchdog_s: float | None = None
    main_pid: int | None = None
    monotonic_s: float | None = None
    error: str | None = None

    @classmethod
    def parse(cls, payload: bytes) -> Notification:
        """Parse a datagram; never fails, the last of several equal keys counts."""
        text = payload[:NOTIFICATION_BYTES_MAX].decode(errors="replace")
        said = dict(line.partition("=")[::2] for line in text.split("\n"))
        return cls(
            ready=said.get("READY") == "1",
            stopping=said.get("STOPPING") == "1",
            reloading=said.get("RELOADING") == "1",
            status=said.get("STATUS"),
            errno=_number(said.get("ERRNO")),
            extend_timeout_s=_seconds(said.get("EXTEND_TIMEOUT_USEC")),
            watchdog=said.get("WATCHDOG") == "1",
            has_failed=said.get("WATCHDOG") == "trigger",
            watchdog_s=_seconds(said.get("WATCHDOG_USEC")),
            main_pid=_number(said.get("MAINPID")) or None,  # pid 0 is nobody
            monotonic_s=_seconds(said.get("MONOTONIC_USEC")),
            error=_lines(said.get("X_HOTPORT_ERROR")),
        )


def encode_notification(
    *,
    ready: bool = False,
    stopping: bool = False,
    reloading: bool = False,
    status: str | None = None,
    errno: int | None = None,
    extend_timeout_s: float | None = None,
    watchdog: bool = False,
    has_failed: bool = False,
    watchdog_s: float | None = None,
    main_pid: int | None = None,
    monotonic_s: float | None = None,
    error: str | None = None,
) -> bytes:
    """Encode what is given; the arguments are the attributes of `Notification`.

    Always fits into `NOTIFICATION_BYTES_MAX`: a status becomes one line of at most 1000 characters, and of an
    error that is too long the end is kept, because there a traceback says what went wrong.
    """
    said = {
        "READY": "1" if ready else None,
        "STOPPING": "1" if stopping else None,
        "RELOADING": "1" if reloading else None,
        "STATUS": None if status is None else " ".join(status.splitlines())[:_STATUS_CHARS_MAX],
        "ERRNO": errno,
        "EXTEND_TIMEOUT_USEC": None if extend_timeout_s is None else round(extend_timeout_s * _USEC_PER_S),
        "WATCHDOG": "trigger" if has_failed else "1" if watchdog else None,
        "WATCHDOG_USEC": None if watchdog_s is None else round(watchdog_s * _USEC_PER_S),
        "MAINPID": main_pid,
        "MONOTONIC_USEC": None if monotonic_s is None else round(monotonic_s * _USEC_PER_S),
    }
    lines = [f"{key}={value}" for key, value in said.items() if value is not None]
    head = "\n".join(lines).encode(errors="backslashreplace")
    if error is None:
        return head
    room = NOTIFICATION_BYTES_MAX - len(head)
    return b"\n".join(part for part in (head, _encode_error(error, room)) if part)


def store_name(address: Address) -> str | None:
    """Return a listener's name in the descriptor store: ``hotport+tcp%3A//127.0.0.1%3A8000``.

    Returns:
        Printable ASCII without a colon (sd_notify(3), FDNAME); None if that has over 255 bytes, as a long path in
        another script may.
    """
    name = STORE_PREFIX + quote(str(address).encode("utf-8", "surrogateescape"), safe="/[]@")
    return name if len(name) <= FDNAME_BYTES_MAX else None


def parse_store_name(name: str) -> Address | None:
    """Parse a name that `store_name` made; None for any other name."""
    if not name.startswith(STORE_PREFIX):
        return None
    try:
        return parse_address(unquote_to_bytes(name.removeprefix(STORE_PREFIX)).decode("utf-8", "surrogateescape"))
    except ConfigError:
        return None


def encode_store(name: str) -> bytes:
    """Ask the manager to store the descriptors that come with it; unwatched, since a listener never hangs up."""
    return f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode("ascii")


def encode_store_remove(name: str) -> bytes:
    """Ask the manager to close every descriptor that it stores under a name."""
    return f"FDSTOREREMOVE=1\nFDNAME={name}".encode("ascii")


def _encode_error(error: str, room: int) -> bytes:
    """``X_HOTPORT_ERROR=`` with as much of the end as fits into fewer than `room` bytes."""
    kept = error.encode(errors="backslashreplace").decode()[-room:]
    while len(line := b"X_HOTPORT_ERROR=" + msgspec.json.encode(kept)) >= room:
        kept = "[...] " + kept[len(kept) // 8 + len("[...] ") :]
    return line


def _number(text: str | None) -> int | None:
    if text is None or not (text.isascii() and text.isdigit() and len(text) <= 20):
        return None
    return int(text)


def _seconds(text: str | None) -> float | None:
    usec = _number(text)
    return None if usec is None else usec / _USEC_PER_S


def _lines(text: str | None) -> str | None:
    if text is None or not text.startswith('"'):
        return text
    try:
        return msgspec.json.decode(text, type=str)
    except (msgspec.MsgspecError, UnicodeError):
        return text
