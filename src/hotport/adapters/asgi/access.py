"""The access log: one line for each finished request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Final, Literal

from hotport.adapters.asgi import requestid
from hotport.adapters.asgi.spec import Scope
from hotport.observe import logs

__all__ = ["AccessLog"]

#: The longest single write: several workers may share a pipe, which interleaves longer ones (pipe(7), PIPE_BUF).
BATCH_CHARS_MAX: Final = 4096

#: The status of a request whose client did not wait for an answer, as in nginx.
CLIENT_LEFT: Final = 499

#: Characters to escape in a field of the combined format.
UNSAFE: Final = re.compile(r'["\\\x00-\x1f\x7f-\xff]')

Client = tuple[str, int] | None


class AccessLog:
    """Writes a line for each request in batches, at the end of a turn of the event loop.

    Args:
        format: ``structured`` is that of all other log lines, ``combined`` is Apache's.
    """

    def __init__(self, format: Literal["structured", "combined"], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lines: list[str] = []
        self._size = 0
        self._render = _combined if format == "combined" else _structured(logs.renderer("hotport.access"))

    def ended(self, request: Scope, status: int, sent: int, began: float) -> None:
        """Log a request that has its answer, or whose client has left.

        Args:
            status: 0 if no answer was begun.
            sent: Bytes of the answer's body.
            began: The start, by `perf_counter`; 0 if the application was not called.
        """
        ms = (time.perf_counter() - began) * 1000 if began else 0.0
        self._write(self._render(request, request["client"], status or CLIENT_LEFT, sent, ms))

    def refused(self, client: Client, status: int) -> None:
        """Log input that was no request."""
        self._write(self._render(None, client, status, 0, 0.0))

    def _write(self, line: str) -> None:
        if not self._lines:
            self._loop.call_soon(self.flush)
        elif self._size + len(line) > BATCH_CHARS_MAX:
            self.flush()
        self._lines.append(line)
        self._size += len(line)

    def flush(self) -> None:
        """Write the buffered lines."""
        if self._lines:
            text = "".join(self._lines)
            self._lines.clear()
            self._size = 0
            logs.write(text)


Render = Callable[[Scope | None, Client, int, int, float], str]


def _structured(render: Callable[[dict[str, Any]], str]) -> Render:
    def line(scope: Scope | None, client: Client, status: int, sent: int, ms: float) -> str:
        event: dict[str, Any] = {"event": "request", "client": client[0] if client else None}
        if scope is not None:
            event["method"] = scope["method"]
            event["path"] = _target(scope)
            if requestid.KEY in scope:
                event[requestid.KEY] = scope[requestid.KEY]
        event["status"] = status
        event["bytes"] = sent
        event["ms"] = round(ms, 3)
        return render(event)

    return line


def _combined(scope: Scope | None, client: Client, status: int, sent: int, ms: float) -> str:
    """Sources: httpd.apache.org/docs/current/logs.html, "combined"."""
    request, referer, agent = "-", "-", "-"
    if scope is not None:
        request = _safe(f"{scope['method']} {_target(scope)} HTTP/{scope['http_version']}")
        for name, value in scope["headers"]:
            if name == b"referer":
                referer = _safe(value.decode("latin-1"))
            elif name == b"user-agent":
                agent = _safe(value.decode("latin-1"))
    when = time.strftime("%d/%b/%Y:%H:%M:%S +0000", time.gmtime())
    return f'{client[0] if client else "-"} - - [{when}] "{request}" {status} {sent} "{referer}" "{agent}"\n'


def _target(scope: Scope) -> str:
    query = scope["query_string"]
    raw: bytes = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
    return raw.decode("latin-1")


def _safe(text: str) -> str:
    return UNSAFE.sub(lambda match: f"\\x{ord(match[0]):02x}", text) if UNSAFE.search(text) else text
