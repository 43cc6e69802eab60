"""The status port, on which the supervisor answers load balancers and orchestrators.

A connection carries one question and one answer, over TCP or a unix socket: an HTTP/1 request, or the line that HAProxy
sends to an agent (``agent-send "agent\\n"``). Workers, which may hang, are not asked whether the service is ready: the
supervisor's state counts. Everything is bounded: the size of a question, the time of an exchange, and the number of
connections, of which the oldest is dropped.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Final, NamedTuple

import anyio
import msgspec
from anyio.abc import ByteStream

from hotport.model.service import Stage
from hotport.observe.logs import get_logger
from hotport.options import Options
from hotport.supervisor.contain import Containing, retried
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

log = get_logger("hotport.status")


class Request(NamedTuple):
    """The head of an HTTP request, without its query: the names of `fields` are in lower case."""

    method: str
    path: str
    fields: Mapping[str, str]


class Reply(NamedTuple):
    """The answer to an HTTP request."""

    body: str | bytes
    content_type: str = "text/plain; charset=utf-8"
    status: HTTPStatus = HTTPStatus.OK


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

    async def converse(connection: socket.socket, scope: anyio.CancelScope) -> None:
        try:
            gone = suppress(anyio.BrokenResourceError, anyio.EndOfStream, OSError)
            with Containing("status_port"), scope, gone:
                connection.getpeername()  # fails if the client has left already
                async with await anyio.abc.SocketStream.from_socket(connection) as stream:
                    await stream.send(await _answer(supervisor, await _read_question(stream)))
                    await stream.send_eof()
                    while await stream.receive():  # closing with unread data would reset the connection
                        pass
        finally:
            del clients[connection]
            connection.close()

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
                await is_over.wait()
                accepting.cancel_scope.cancel()
            sock.close()  # before the last answer, so that no client is left in this queue


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


async def _answer(supervisor: Supervisor, question: bytes) -> bytes:
    line, _, fields = question.partition(b"\n")
    line = line.rstrip(b"\r")
    if line == b"agent":
        return f"{AGENT[_stage(supervisor)]}\n".encode()
    words = line.decode("latin-1").split(" ")
    if len(question) > QUESTION_BYTES_MAX or not _is_http(line) or len(words) != 3 or not words[1].startswith("/"):
        return _response(
            Reply("one HTTP/1 request with a short head, or the line: agent\n", status=HTTPStatus.BAD_REQUEST)
        )
    request = Request(words[0], words[1].partition("?")[0], _parse_fields(fields))
    handler = ROUTES.get(request.path)
    if handler is None:
        *paths, last = ROUTES
        reply = Reply(f"there are {', '.join(paths)} and {last}\n", status=HTTPStatus.NOT_FOUND)
    elif request.method not in ("GET", "HEAD"):
        reply = Reply("GET or HEAD\n", status=HTTPStatus.METHOD_NOT_ALLOWED)
    else:
        reply = await handler(supervisor, request)
    return _response(reply, has_body=request.method != "HEAD")


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


#: What answers GET and HEAD, by path.
ROUTES: Final[Mapping[str, Handler]] = {"/ready": _ready, "/live": _live, "/status": _status}


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
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if reply.status is HTTPStatus.METHOD_NOT_ALLOWED:
        head.append("Allow: GET, HEAD")
    return "\r\n".join([*head, "", ""]).encode() + (content if has_body else b"")
