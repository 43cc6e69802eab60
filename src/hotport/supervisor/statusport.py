"""The status port, on which the supervisor answers load balancers and orchestrators.

A connection carries one question and one answer, over TCP or a unix socket: an HTTP/1 request, or the line that HAProxy
sends to an agent (``agent-send "agent\\n"``). Workers, which may hang, are not asked whether the service is ready: the
supervisor's state counts. Everything is bounded: the size of a question, the time of an exchange, and the number of
connections, of which the oldest is dropped. Only the events of the live page have no end; their viewers are counted
apart, and dropped if they do not read.
"""

from __future__ import annotations

import math
import socket
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import cache
from hashlib import sha256
from http import HTTPStatus
from importlib.resources import files
from typing import Final, NamedTuple

import anyio
import msgspec
from anyio.abc import ByteStream, SocketStream

from hotport.model.service import Stage
from hotport.observe.logs import get_logger
from hotport.options import Options
from hotport.supervisor import metrics
from hotport.supervisor.contain import Containing, retried
from hotport.supervisor.feed import Feed
from hotport.supervisor.requests import describe
from hotport.supervisor.supervisor import Supervisor
from hotport.wire.messages import Status, encode

__all__ = ["serve_status_port"]

#: Seconds from accepting a connection to its end.
EXCHANGE_TIMEOUT_S: Final = 2.0

#: The longest question; a probe's request is short.
QUESTION_BYTES_MAX: Final = 8192

CLIENTS_MAX: Final = 64

#: Seconds until accepting is retried when descriptors or memory are exhausted.
ACCEPT_PAUSE_S: Final = 0.1

#: Answers to HAProxy's agent-check. ``ready`` undoes ``drain``, which outlives the process that has sent it; ``up``
#: undoes the states before the sharp.
AGENT: Final = {
    Stage.STARTING: "down#starting",
    Stage.READY: "up ready",
    Stage.UNSERVED: "fail#unserved",
    Stage.LAME_DUCK: "drain",
    Stage.STOPPING: "stopped#stopping",
}

JSON: Final = "application/json"

NO_FIELDS: Final[Mapping[str, str]] = {}

#: How many live pages are served at a time; the kernel keeps so much for each that does not read, and so long it may
#: take for what was sent.
VIEWERS_MAX: Final = 16
VIEWER_BUFFER_BYTES: Final = 64 * 1024
VIEWER_TIMEOUT_S: Final = 10.0

#: For the live page: as it is, in no frame, and nothing about it to others.
PAGE_FIELDS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

log = get_logger("hotport.status")


class Request(NamedTuple):
    """The head of an HTTP request, without its query: the names of `fields` are in lower case."""

    method: str
    path: str
    fields: Mapping[str, str]


class Reply(NamedTuple):
    """The answer to an HTTP request.

    Attributes:
        fields: Further header fields, by name.
        has_events: The events of the live page follow, until the connection ends.
    """

    body: str | bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK
    fields: Mapping[str, str] = NO_FIELDS
    has_events: bool = False


Handler = Callable[[Supervisor, Request], Awaitable[Reply]]


async def serve_status_port(supervisor: Supervisor, sock: socket.socket, is_over: anyio.Event) -> None:
    """Answer on a status port until `is_over`, and complete the exchanges under way.

    ``/ready`` is 200 while clients should be sent here, else 503; ``/live`` is 200; ``/status`` is the output of
    ``hotport status --json``, without texts of the application, its command line or its clients.

    Args:
        sock: A listening stream socket, non-blocking; another process may hold a duplicate.

    Cancellation: safe; exchanges are cut. Descriptors: owns `sock`.
    """
    clients: dict[socket.socket, anyio.CancelScope] = {}
    feed = Feed(supervisor, lambda status: public(status, supervisor.options))

    async def converse(connection: socket.socket, scope: anyio.CancelScope) -> None:
        try:
            gone = suppress(anyio.BrokenResourceError, anyio.EndOfStream, OSError)
            with Containing("status_port"), scope, gone:
                connection.getpeername()  # fails if the client has left already
                async with await anyio.abc.SocketStream.from_socket(connection) as stream:
                    answer, has_events = await _answer(supervisor, await _read_question(stream), has_room)
                    await stream.send(answer)
                    if has_events:
                        del clients[connection]
                        scope.deadline = math.inf
                        await _show(stream, connection, feed, is_over)
                        return
                    await stream.send_eof()
                    while await stream.receive():  # closing with unread data would reset the connection
                        pass
        finally:
            clients.pop(connection, None)
            connection.close()

    def has_room() -> bool:
        return len(feed) < VIEWERS_MAX

    async def accept() -> None:
        while True:
            await anyio.wait_readable(sock)  # no await between accepting a connection and starting its task
            try:
                connection, _ = sock.accept()
            except BlockingIOError:  # another supervisor has it, or its client has left
                continue
            except OSError as error:
                log.error("status_port.accept_failed", error=str(error))
                await anyio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(clients) >= CLIENTS_MAX:
                next(iter(clients.values())).cancel()
            clients[connection] = anyio.CancelScope(deadline=anyio.current_time() + EXCHANGE_TIMEOUT_S)
            conversations.start_soon(converse, connection, clients[connection])

    with sock:
        async with anyio.create_task_group() as conversations:
            async with anyio.create_task_group() as accepting:
                accepting.start_soon(retried, "status_port", accept)
                accepting.start_soon(retried, "feed", feed.run)
                await is_over.wait()
                accepting.cancel_scope.cancel()
            sock.close()  # before the last answer, so that no client is left in this queue


async def _show(stream: SocketStream, connection: socket.socket, feed: Feed, is_over: anyio.Event) -> None:
    """Send events until the viewer leaves, does not read, or the port is not served any more."""
    if len(feed) >= VIEWERS_MAX:  # others have come meanwhile
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, VIEWER_BUFFER_BYTES)
    with feed.subscribed() as events:
        async with anyio.create_task_group() as tasks:

            async def until(end: Callable[[], Awaitable[object]]) -> None:
                with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                    await end()
                tasks.cancel_scope.cancel()

            async def read() -> None:
                while await stream.receive():
                    pass

            tasks.start_soon(until, read)
            tasks.start_soon(until, is_over.wait)
            async for event in events:
                with anyio.move_on_after(VIEWER_TIMEOUT_S) as sending:
                    await stream.send(event)
                if sending.cancelled_caught:
                    break
            tasks.cancel_scope.cancel()


async def _read_question(stream: ByteStream) -> bytes:
    """Read the head of an HTTP request or an agent's line; return any other input as it came."""
    question = b""
    while len(question) <= QUESTION_BYTES_MAX:
        try:
            question += await stream.receive()
        except anyio.EndOfStream:
            break
        line, end, _ = question.partition(b"\n")
        if end and (not _is_http(line) or b"\n\n" in question.replace(b"\r\n", b"\n")):
            break
    return question


def _is_http(line: bytes) -> bool:
    return line.rstrip(b"\r").endswith((b" HTTP/1.0", b" HTTP/1.1"))


async def _answer(supervisor: Supervisor, question: bytes, has_room: Callable[[], bool]) -> tuple[bytes, bool]:
    """Return the answer, and whether events follow it; `has_room` is asked just before."""
    line, _, fields = question.partition(b"\n")
    line = line.rstrip(b"\r")
    if line == b"agent":
        return f"{AGENT[_stage(supervisor)]}\n".encode(), False
    words = line.decode("latin-1").split(" ")
    if len(question) > QUESTION_BYTES_MAX or not _is_http(line) or len(words) != 3 or not words[1].startswith("/"):
        what = "one HTTP/1 request with a short head, or the line: agent\n"
        return _response(Reply(what, status=HTTPStatus.BAD_REQUEST)), False
    request = Request(words[0], words[1].partition("?")[0], _parse_fields(fields))
    handler = ROUTES.get(request.path)
    if handler is None:
        *paths, last = ROUTES
        reply = Reply(f"there are {', '.join(paths)} and {last}\n", status=HTTPStatus.NOT_FOUND)
    elif request.method not in ("GET", "HEAD"):
        reply = Reply("GET or HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
    else:
        reply = await handler(supervisor, request)
    if reply.has_events and not has_room():
        what = f"{VIEWERS_MAX} live pages are open: close one\n"
        reply = Reply(what, status=HTTPStatus.SERVICE_UNAVAILABLE, fields={"Retry-After": "5"})
    has_body = request.method != "HEAD"
    return _response(reply, has_body=has_body), reply.has_events and has_body


def _parse_fields(lines: bytes) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in lines.decode("latin-1").splitlines():
        name, _, value = line.partition(":")
        name = name.lower()
        fields[name] = f"{fields[name]}, {value.strip()}" if name in fields else value.strip()
    return fields


def _stage(supervisor: Supervisor) -> Stage:
    stage = supervisor.service.stage
    if stage is Stage.STOPPING and supervisor.is_succeeded:
        return Stage.READY  # another supervisor has the service, and serves
    return stage


async def _ready(supervisor: Supervisor, request: Request) -> Reply:
    stage = _stage(supervisor)
    status = HTTPStatus.OK if stage is Stage.READY else HTTPStatus.SERVICE_UNAVAILABLE
    return Reply(f"{stage.value}\n", status=status)


async def _live(supervisor: Supervisor, request: Request) -> Reply:
    return Reply(f"{_stage(supervisor).value}\n")


async def _status(supervisor: Supervisor, request: Request) -> Reply:
    status = public(await describe(supervisor), supervisor.options)
    return Reply(msgspec.json.format(encode(status)) + b"\n", JSON)


async def _page(supervisor: Supervisor, request: Request) -> Reply:
    page, policy = _read_page()
    return Reply(page, "text/html; charset=utf-8", fields={"Content-Security-Policy": policy, **PAGE_FIELDS})


@cache
def _read_page() -> tuple[bytes, str]:
    """Read the live page, and make its policy: it loads nothing, and runs only its own script."""
    page = files("hotport.supervisor").joinpath("page.html").read_bytes()
    hashes = {
        what: b64encode(sha256(page.partition(f"<{what}>".encode())[2].partition(f"</{what}>".encode())[0]).digest())
        for what in ("script", "style")
    }
    allowed = "; ".join(f"{what}-src 'sha256-{digest.decode()}'" for what, digest in hashes.items())
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return page, f"default-src 'none'; {allowed}; {rest}"


async def _events(supervisor: Supervisor, request: Request) -> Reply:
    return Reply("", "text/event-stream", has_events=True)


async def _metrics(supervisor: Supervisor, request: Request) -> Reply:
    return Reply(*await metrics.render(supervisor, request.fields.get("accept", "")))


#: What answers GET and HEAD, by path.
ROUTES: Final[Mapping[str, Handler]] = {
    "/": _page,
    "/events": _events,
    "/ready": _ready,
    "/live": _live,
    "/status": _status,
    "/metrics": _metrics,
}


def public(status: Status, options: Options) -> Status:
    """Remove possible secrets from a status: arguments, texts and code of an application, and its clients."""
    last = status.last_restart
    if last is not None and last.error:
        last = msgspec.structs.replace(last, error=f"see hotport status {status.service}")
    target = status.target if options.target else options.command[0]
    workers = tuple(
        msgspec.structs.replace(worker, status="", lingering=(), hung_at="", stack="") for worker in status.workers
    )
    return msgspec.structs.replace(status, target=target, workers=workers, last_restart=last)


def _response(reply: Reply, *, has_body: bool = True) -> bytes:
    content = reply.body.encode() if isinstance(reply.body, str) else reply.body
    head = [
        f"HTTP/1.1 {reply.status.value} {reply.status.phrase}",
        f"Content-Type: {reply.content_type}",
        *([] if reply.has_events else [f"Content-Length: {len(content)}"]),
        "Cache-Control: no-store",
        "Connection: close",
        *(f"{name}: {value}" for name, value in reply.fields.items()),
    ]
    if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
        head.append("Allow: GET, HEAD")
    return "\r\n".join([*head, "", ""]).encode() + (content if has_body else b"")
