"""Clients and transports for the tests of the ASGI adapter; h11 reads the answers, as an independent oracle."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import h11
import pytest

from hotport.adapters.asgi import AsgiAdapter
from hotport.adapters.asgi import http as http_module
from hotport.adapters.asgi import websocket as websocket_module
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.spec import Application, Receive, Scope, Send
from hotport.adapters.base import Connections, Context
from hotport.options import Options

#: The one deadline under which every wait in a test happens.
DEADLINE_S = 10.0 * float(os.environ.get("HOTPORT_TEST_SLOWNESS", "1"))


#: For tests that compute for long and have no transport of the event loop: it only runs their tasks, so one is enough.
in_memory = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)


async def read_body(receive: Receive) -> bytes:
    """All of a request's body."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return body + b"<disconnected>"
        body += bytes(message["body"])
        if not message["more_body"]:
            return body


async def respond(send: Send, body: bytes, *headers: tuple[bytes, bytes], status: int = 200) -> None:
    """A whole answer."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with method, path and body."""
    body = await read_body(receive)
    await respond(send, f"{scope['method']} {scope['path']} ".encode() + body)


@dataclass
class Answer:
    """One answer as a client understands it."""

    status: int
    headers: dict[str, str]
    body: bytes
    interim: list[int] = field(default_factory=list)

    @property
    def says_close(self) -> bool:
        return self.headers.get("connection") == "close"


class Answers:
    """Reads answers out of bytes."""

    def __init__(self) -> None:
        self.rest = b""
        self._reader: h11.Connection | None = None
        self._answer = Answer(0, {}, b"")

    def feed(self, data: bytes, *, method: str = "GET") -> Answer | None:
        """The next answer, if `data` (``b""`` is the end of the stream) makes it whole.

        Raises:
            h11.RemoteProtocolError: It is malformed, or truncated.
        """
        if self._reader is None:
            if not data and not self.rest:
                raise EOFError("the connection was closed between two answers")
            self._reader = h11.Connection(h11.CLIENT)
            self._reader.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            self._reader.send(h11.EndOfMessage())
            self._answer = Answer(0, {}, b"")
            if self.rest:
                self._reader.receive_data(self.rest)
                self.rest = b""
            if data:
                self._reader.receive_data(data)
        else:
            self._reader.receive_data(data)
        while True:
            event = self._reader.next_event()
            match event:
                case h11.InformationalResponse():
                    self._answer.interim.append(event.status_code)
                case h11.Response():
                    self._answer.status = event.status_code
                    self._answer.headers = {n.decode(): v.decode() for n, v in event.headers}
                case h11.Data():
                    self._answer.body += bytes(event.data)
                case h11.EndOfMessage():
                    self.rest = self._reader.trailing_data[0]
                    self._reader = None
                    return self._answer
                case _:
                    return None

    @property
    def so_far(self) -> Answer:
        """What has arrived of the answer that is not whole."""
        return self._answer


class Client:
    """The other end of a connection, over a real socket."""

    def __init__(self, sock: socket.socket | ssl.SSLSocket) -> None:
        self._sock = sock
        self._answers = Answers()
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._loop.sock_sendall(self._sock, data)

    async def answer(self, method: str = "GET") -> Answer:
        """The next whole answer."""
        async with asyncio.timeout(DEADLINE_S):
            answer = self._answers.feed(b"", method=method) if self._answers.rest else None
            while answer is None:
                answer = self._answers.feed(await self._loop.sock_recv(self._sock, 65536), method=method)
            return answer

    async def received(self) -> bytes:
        """What has come since, raw; at least a byte."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._loop.sock_recv(self._sock, 65536)

    async def begun(self, body: bytes) -> Answer:
        """The answer that is on its way, as soon as `body` of it has arrived."""
        async with asyncio.timeout(DEADLINE_S):
            while self._answers.so_far.body != body:
                assert self._answers.feed(await self._loop.sock_recv(self._sock, 65536)) is None
            return self._answers.so_far

    async def read_to_end(self) -> bytes:
        """Everything until the server closes."""
        received = self._answers.rest
        async with asyncio.timeout(DEADLINE_S):
            while data := await self._loop.sock_recv(self._sock, 65536):
                received += data
        return received

    def end(self) -> None:
        """Send no more, but read on."""
        self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._sock.close()


class MemoryTransport(asyncio.Transport):
    """Remembers what was done to it; for tests in which single writes and reads matter."""

    def __init__(self, protocol: HttpConnection) -> None:
        super().__init__({"peername": ("192.0.2.1", 5), "sockname": ("192.0.2.2", 80)})
        self._protocol: asyncio.Protocol = protocol
        self.unsent_bytes = 0
        self.writes: list[bytes] = []
        self._is_reading = True
        self.has_ended = False
        self.is_closed = False
        self.is_aborted = False
        protocol.connection_made(self)

    def write(self, data: Any) -> None:
        assert not self.has_ended
        self.writes.append(bytes(data))

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(parts))

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol

    def get_protocol(self) -> asyncio.Protocol:
        return self._protocol

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.has_ended = True

    def pause_reading(self) -> None:
        self._is_reading = False

    def resume_reading(self) -> None:
        self._is_reading = True

    def is_reading(self) -> bool:
        return self._is_reading

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    def abort(self) -> None:
        self.is_aborted = True
        self.close()

    def answers(self) -> list[Answer]:
        """What a client would make of the writes so far."""
        reader, found = Answers(), []
        data = b"".join(self.writes)
        while data and (answer := reader.feed(data)) is not None:
            found.append(answer)
            data, reader.rest = reader.rest, b""
        return found


class Rig:
    """An adapter with its registry, and ways to connect to it."""

    def __init__(
        self,
        application: Application,
        *,
        keep_alive_s: float = 60.0,
        lifespan: Literal["auto", "on", "off"] = "off",
        maximum: int = 0,
        **options: Any,
    ) -> None:
        self.connections = Connections(maximum=maximum)
        self.context = Context(self.connections, service="web", generation=7, worker=2)
        self.adapter = AsgiAdapter(
            application, self.context, Options(keep_alive_s=keep_alive_s, lifespan=lifespan, **options)
        )
        self._clients: list[Client] = []
        self._transports: list[MemoryTransport] = []

    async def connect(
        self, *, family: socket.AddressFamily = socket.AF_INET, tls: ssl.SSLContext | None = None
    ) -> tuple[Client, HttpConnection]:
        """A client and the server's end of its connection."""
        theirs, connection = await self.connect_socket(family=family, tls=tls)
        client = Client(theirs)
        self._clients.append(client)
        return client, connection

    async def connect_socket(
        self, *, family: socket.AddressFamily = socket.AF_INET, tls: ssl.SSLContext | None = None
    ) -> tuple[socket.socket, HttpConnection]:
        """A socket for a client that is not ours, which closes it; and the server's end."""
        theirs, ours = _pair(family)
        theirs.setblocking(False)
        ours.setblocking(False)
        connection = self.adapter.connection()
        connection.sock = ours
        await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours, ssl=tls)
        return theirs, connection

    def memory(self) -> tuple[HttpConnection, MemoryTransport]:
        """The server's end of a connection without a client."""
        connection = self.adapter.connection()
        transport = MemoryTransport(connection)
        self._transports.append(transport)
        return connection, transport

    def close(self) -> None:
        """Every client leaves."""
        for client in self._clients:
            client.close()
        for transport in self._transports:
            transport.close()


def _pair(family: socket.AddressFamily) -> tuple[socket.socket, socket.socket]:
    if family == socket.AF_UNIX:
        return socket.socketpair()
    with socket.create_server(("127.0.0.1", 0), family=family) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
        ours.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return theirs, ours


@contextlib.asynccontextmanager
async def serving(application: Application, *, turn_s: float = math.inf, **options: Any) -> AsyncIterator[Rig]:
    """A started adapter; at the end its clients leave and it is shut down.

    Args:
        turn_s: How long one connection works at a time. So how fast the machine is changes nothing by default; with 0
            each piece of work has a turn of the event loop for itself.
    """
    rig = Rig(application, **options)
    await rig.adapter.startup()
    try:
        with (
            mock.patch.object(http_module, "TURN_S", turn_s),
            mock.patch.object(websocket_module, "TURN_S", turn_s),
        ):
            yield rig
    finally:
        rig.close()
        for connection in list(rig.connections.open):
            connection.cut()
        async with asyncio.timeout(DEADLINE_S):
            await rig.connections.wait_empty()
            await rig.adapter.shutdown()


async def turns(count: int = 12) -> None:
    """Let everything that is ready run; in-memory connections need nothing else."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(is_true: Callable[[], bool]) -> None:
    """Return when the event loop has made it true."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_true():  # noqa: ASYNC110  there is nobody to set an event
            await asyncio.sleep(0)
