"""The state that all connections of one adapter share."""

from __future__ import annotations

import asyncio
import contextvars
import sys
import time
from collections.abc import Callable
from email.utils import formatdate
from functools import partial
from typing import Any, Final, Protocol

from hotport.adapters.asgi.access import AccessLog
from hotport.adapters.asgi.deadlines import Deadlines, Member, Pace
from hotport.adapters.asgi.fields import STATUS_LINES
from hotport.adapters.asgi.handshake import Handshakes
from hotport.adapters.asgi.spec import Application
from hotport.adapters.asgi.states import HELD
from hotport.adapters.base import Context
from hotport.adapters.turns import Turns
from hotport.options import Options
from hotport.trust import Trusted

__all__ = ["ASGI", "LINGER_S", "Held", "Running", "Shared", "name_client"]

#: Seconds that a connection stays half-closed after its last answer. A closed socket answers further data with a reset,
#: which destroys what the client has not read yet (RFC 9112 section 9.6).
LINGER_S: Final = 2.0

#: Seconds from our close frame of a WebSocket until we stop waiting for the client's, and for the connection's end.
CLOSE_TIMEOUT_S: Final = 10.0

#: Seconds for which the default header lines are cached: a date has whole seconds.
DATE_S: Final = 1.0

SMALL_HEAD_BYTES: Final = 4096

#: So many stacks of requests are logged in so many seconds.
STACKS_MAX: Final = 5
STACKS_S: Final = 1.0

ASGI: Final = {"version": "3.0", "spec_version": "2.4"}


#: Extensions of every HTTP scope, beside ``hotport`` (ASGI specification, extensions).
EXTENSIONS: Final[dict[str, dict[str, Any]]] = {
    "http.response.early_hint": {},
    "http.response.pathsend": {},
    "http.response.trailers": {},
}


class Running(Protocol):
    """An application that runs for one request or WebSocket."""

    task: asyncio.Task[None] | None


class Held(Protocol):
    """An answer whose head may wait for its body."""

    stage: int

    def open_soon(self) -> None:
        """Write the head alone if no body comes within a few turns of the loop."""


class Shared:
    """The state that all connections of one adapter share; mostly plain attributes, since every request reads them.

    Attributes:
        count_request: See `Counts.request`; None if nobody reads metrics.
        takes_times: Whether the access log or the metrics ask how long requests take.
        can_gather: Whether to use the transports' ``writelines``. asyncio's does not pause the protocol (from Python
            3.12 on, until 3.12.9 and 3.13.2: CVE-2024-12254), nor check that the connection is lost (gh-136234).
        extensions: The extensions of every scope.
        held: Answers of this turn of the loop whose heads waited for a body.
        running: Running applications, also after their answer, or after the client has left.
        defaults: Header lines of every answer; ``b""`` when `make_defaults` must make them anew.
    """

    __slots__ = (
        "access",
        "application",
        "can_gather",
        "concurrency_max",
        "context",
        "count_request",
        "deadlines",
        "defaults",
        "extensions",
        "handshakes",
        "head_lines_max",
        "head_ticks",
        "held",
        "keep_alive_ticks",
        "linger_ticks",
        "loop",
        "makes_ids",
        "options",
        "raw_root_path",
        "registry",
        "request_ticks",
        "root_path",
        "run",
        "running",
        "scope",
        "small_head_bytes",
        "stacks_left",
        "stacks_until",
        "state",
        "takes_times",
        "trusted",
        "turns",
        "variables",
        "ws_close_ticks",
        "ws_ping_ticks",
        "ws_pong_ticks",
    )

    def __init__(
        self,
        application: Application,
        context: Context,
        state: dict[str, Any],
        options: Options,
        access: AccessLog | None = None,
    ) -> None:
        self.application = application
        self.context = context
        self.registry = context.connections
        counts = context.connections.counts
        self.count_request = counts.request if counts is not None else None
        self.takes_times = access is not None or counts is not None
        self.options = options
        self.trusted = Trusted(options.trusted_proxy)
        self.root_path = options.root_path
        self.raw_root_path = options.root_path.encode("ascii")
        self.state = state
        #: Each request has a copy, and what differs is set there: that takes a third as long as making a new one.
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": ASGI,
            "http_version": "1.1",
            "method": "",
            "scheme": "http",
            "path": "",
            "raw_path": b"",
            "query_string": b"",
            "root_path": options.root_path,
            "headers": [],
            "client": None,
            "server": None,
            "state": {},
            "extensions": {},
        }
        self.concurrency_max = options.concurrency_max
        self.access = access
        self.makes_ids = options.request_id
        self.loop = loop = asyncio.get_running_loop()
        self.can_gather = not isinstance(loop, asyncio.BaseEventLoop)  # but uvloop's
        self.extensions = {"hotport": context.extension, **EXTENSIONS}
        waits = (
            LINGER_S,
            options.keep_alive_s,
            options.head_timeout_s,
            options.body_timeout_s,
            options.send_timeout_s,
            options.request_timeout_s,
            options.ws_ping_interval_s,
        )
        self.turns = Turns(loop)
        self.deadlines: Deadlines[Member] = Deadlines(min(s for s in (*waits, options.ws_ping_timeout_s) if s), loop)
        self.keep_alive_ticks = self.deadlines.ticks(options.keep_alive_s)
        self.request_ticks = self.deadlines.ticks(options.request_timeout_s) if options.request_timeout_s else 0
        self.linger_ticks = self.deadlines.ticks(LINGER_S)
        self.head_ticks = self.deadlines.ticks(options.head_timeout_s) if options.head_timeout_s else 0
        #: The fields of a smaller head are counted after parsing, which is cheaper and takes little memory.
        self.small_head_bytes = min(SMALL_HEAD_BYTES, options.head_max_bytes)
        self.head_lines_max = options.header_fields_max + 2  # with the request line and the empty one
        self.handshakes = Handshakes(options)
        self.ws_ping_ticks = self.deadlines.ticks(options.ws_ping_interval_s) if options.ws_ping_interval_s else 0
        self.ws_pong_ticks = self.deadlines.ticks(options.ws_ping_timeout_s)
        self.ws_close_ticks = self.deadlines.ticks(CLOSE_TIMEOUT_S)
        self.held: list[Held] = []
        self.running: set[Running] = set()
        #: Each request gets a copy: callbacks run in the context in which their connection was accepted, and
        #: variables that one request sets must not leak into the next (python/cpython#140947).
        self.variables = contextvars.copy_context()
        self.run = _starter(loop)
        self.defaults = b""
        self.stacks_left = STACKS_MAX
        self.stacks_until = 0.0

    def may_show_stack(self) -> bool:
        """Whether a stack may be logged now: when everything hangs, rendering all of them would block the loop."""
        if (now := self.loop.time()) >= self.stacks_until:
            self.stacks_left, self.stacks_until = STACKS_MAX, now + STACKS_S
        self.stacks_left -= 1
        return self.stacks_left >= 0

    def pace(self, period_s: float, moved_bytes: Callable[[], int | None], on_slow: Callable[[], None]) -> Pace:
        """Enforce a rate of at least `Options.rate_min_bytes`; see `Pace`."""
        return Pace(self.deadlines, period_s, period_s * self.options.rate_min_bytes, moved_bytes, on_slow)

    def open_held(self) -> None:
        """Call `open_soon` for answers whose heads still wait for a body: one callback for all answers of a turn."""
        for exchange in self.held:
            if exchange.stage == HELD:
                exchange.open_soon()
        self.held.clear()

    def make_defaults(self) -> bytes:
        """Make the default header lines of every answer, cached for `DATE_S`."""
        now = formatdate(time.time(), usegmt=True)
        server = "server: hotport\r\n" if self.options.server_header else ""
        self.defaults = f"date: {now}\r\n{server}".encode("ascii")
        self.loop.call_later(DATE_S, self._forget_defaults)
        return self.defaults

    def refusal(self, status: int, why: str) -> bytes:
        """Render a complete last answer, in place of the application's."""
        body = f"{why}\n".encode() if why else b""
        return b"%b%bcontent-type: text/plain; charset=utf-8\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (
            STATUS_LINES[status],
            self.defaults or self.make_defaults(),
            len(body),
            body,
        )

    def _forget_defaults(self) -> None:
        self.defaults = b""


def name_client(client: tuple[str, int] | None) -> str:
    """Name a client for the log."""
    return f"{client[0]} port {client[1]}" if client else "a unix socket"


def _starter(loop: asyncio.AbstractEventLoop) -> Any:
    """Return a factory of tasks: the loop's if the application has set one, else the fastest.

    From Python 3.12 on these tasks are eager: most applications answer in their first step, and need no turn of the
    loop. In that step, ``asyncio.current_task()``, cancellation and context variables are those of the task.
    """
    if loop.get_task_factory() is not None:
        return loop.create_task
    if sys.version_info >= (3, 12):
        return partial(asyncio.Task, loop=loop, eager_start=True)
    return partial(asyncio.Task, loop=loop, name="request")  # otherwise it would make up a name for each
