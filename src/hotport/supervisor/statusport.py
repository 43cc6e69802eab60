"""The status port, on which the supervisor answers load balancers and orchestrators.

A connection carries one question and one answer, over TCP or a unix socket: an HTTP/1 request, or the line that HAProxy
sends to an agent (``agent-send "agent\\n"``). Workers, which may hang, are not asked whether the service is ready: the
supervisor's state counts. Everything is bounded: the size of a question, the time of an exchange, and the number of
connections, of which the oldest is dropped.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from http import HTTPStatus
from typing import Final

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

log = get_logger("hotport.status")


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
    line = question.partition(b"\n")[0].rstrip(b"\r")
    stage = supervisor.service.stage
    if stage is Stage.STOPPING and supervisor.is_succeeded:
        stage = Stage.READY  # another supervisor has the service, and serves
    if line == b"agent":
        return f"{AGENT[stage]}\n".encode()
    words = line.decode("latin-1").split(" ")
    if len(question) > QUESTION_BYTES_MAX or not _is_http(line) or len(words) != 3 or not words[1].startswith("/"):
        return _response(HTTPStatus.BAD_REQUEST, "one HTTP/1 request with a short head, or the line: agent\n")
    method, path = words[0], words[1].partition("?")[0]
    if path not in ("/ready", "/live", "/status"):
        return _response(HTTPStatus.NOT_FOUND, "there are /ready, /live and /status\n", method)
    if method not in ("GET", "HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, "GET or HEAD\n", method)
    if path == "/status":
        status = public(await describe(supervisor), supervisor.options)
        return _response(HTTPStatus.OK, msgspec.json.format(encode(status)).decode() + "\n", method)
    is_good = path == "/live" or stage is Stage.READY
    return _response(HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE, f"{stage.value}\n", method)


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


def _response(status: HTTPStatus, body: str, method: str = "GET") -> bytes:
    content = body.encode()
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {'application/json' if body.startswith('{') else 'text/plain; charset=utf-8'}",
        f"Content-Length: {len(content)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        head.append("Allow: GET, HEAD")
    return "\r\n".join([*head, "", ""]).encode() + (b"" if method == "HEAD" else content)
