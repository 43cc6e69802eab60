"""Datagram services: one socket that generations share, so that nothing in its queue is lost or taken twice."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

import hotport
from hotport.adapters.base import Connections, Context
from hotport.adapters.datagram import HIGH_WATER_BYTES, DatagramAdapter
from hotport.errors import StartError
from hotport.options import Options
from hotport.worker.server import DatagramServer, make_server
from tests.adapters.asgi_support import DEADLINE_S, until

pytestmark = pytest.mark.anyio


class Echo(asyncio.DatagramProtocol):
    """Answers each datagram with itself; notes what it is told."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.received: list[bytes] = []
        self.ends: list[Exception | None] = []
        self.errors: list[Exception] = []
        self.paused: list[bool] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.append(exc)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append(data)
        if data == b"fail":
            raise ValueError("as asked")
        self.transport.sendto(data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.paused.append(True)

    def resume_writing(self) -> None:
        self.paused.append(False)


class Told(Echo):
    """Has something to do before it lets its worker go."""

    draining: hotport.Draining | None = None

    def drain_started(self, draining: hotport.Draining) -> None:
        self.draining = draining


class Port:
    """A bound socket, and servers that share it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.client.connect(self._socket.getsockname())
        self.client.setblocking(False)
        self.servers: list[DatagramServer] = []

    async def start(self, application: asyncio.DatagramProtocol) -> DatagramServer:
        options = Options(kind="datagram")
        server = make_server(lambda: application, Context(Connections()), options, [self._socket.dup()])
        assert isinstance(server, DatagramServer)
        self.servers.append(server)
        await server.startup()
        return server

    async def ask(self, data: bytes) -> bytes:
        self.client.send(data)
        return await self.answer()

    async def answer(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.get_running_loop().sock_recv(self.client, 65536)

    async def close(self) -> None:
        for server in self.servers:
            await server.drain(0.0)
            await server.shutdown()
        self._socket.close()
        self.client.close()


@contextlib.asynccontextmanager
async def port() -> AsyncIterator[Port]:
    found = Port()
    try:
        yield found
    finally:
        await found.close()


async def test_next_generation_reads_on_and_nothing_is_taken_twice() -> None:
    async with port() as found:
        serving, app = await found.start(first := Echo()), first
        await serving.accept()
        applications: list[Echo] = [app]
        for number in range(6):
            assert await found.ask(b"%d" % number) == b"%d" % number
            serving.quiesce()
            found.client.send(b"waits %d" % number)
            new = await found.start(app := Echo())
            applications.append(app)
            assert await serving.drain(DEADLINE_S) == {}
            await new.accept()
            assert await found.answer() == b"waits %d" % number
            serving = new
        received = [data for each in applications for data in each.received]
        assert len(received) == len(set(received)) == 12
        assert all(each.ends == [None] for each in applications[:-1])


async def test_quiesced_generation_can_be_taken_back() -> None:
    async with port() as found:
        server = await found.start(Echo())
        await server.accept()
        await server.accept()
        server.quiesce()
        found.client.send(b"waits")
        await asyncio.sleep(0)
        await server.accept()
        assert await found.answer() == b"waits"


async def test_last_one_serves_what_waits() -> None:
    async with port() as found:
        server = await found.start(app := Echo())
        for number in range(100):
            found.client.send(b"%d" % number)
        assert await server.drain(DEADLINE_S, is_last=True) == {}
        assert [await found.answer() for _ in range(100)] == app.received == [b"%d" % n for n in range(100)]


async def test_application_that_wants_to_know_says_when_it_is_done() -> None:
    async with port() as found:
        server = await found.start(app := Told())
        await server.accept()
        await found.ask(b"a")
        task = asyncio.ensure_future(server.drain(DEADLINE_S))
        await until(lambda: app.draining is not None)
        app.transport.sendto(b"late", found.client.getsockname())
        assert await found.answer() == b"late"
        assert not task.done()
        app.transport.close()
        app.transport.sendto(b"too late", found.client.getsockname())
        assert await task == {}
        assert app.ends == [None]


async def test_application_that_never_says_so_is_cut() -> None:
    async with port() as found:
        server = await found.start(Told())
        assert await server.drain(0.01) == {"cut_datagram": 1}


async def test_application_that_fails_on_one_datagram_gets_the_next(caplog: pytest.LogCaptureFixture) -> None:
    async with port() as found:
        await (await found.start(Echo())).accept()
        found.client.send(b"fail")
        assert await found.ask(b"next") == b"next"
    assert "as asked" in caplog.text


async def test_error_of_the_network_is_the_applications_to_know() -> None:
    async with port() as found:
        await (await found.start(app := Echo())).accept()
        await found.ask(b"a")
        app.transport.sendto(b"x" * 70_000, found.client.getsockname())
        assert [type(error) for error in app.errors] == [OSError]  # EMSGSIZE
        assert await found.ask(b"b") == b"b"


async def test_what_the_kernel_has_no_room_for_waits_and_the_application_is_asked_to_pause() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)  # a full queue blocks, as a full interface does
    left.setblocking(False)
    right.setblocking(False)
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    app = Echo()
    transport = DatagramAdapter(lambda: app, Context(Connections())).open(left)
    sent = 0
    while not app.paused:
        transport.sendto(b"x" * 1000)
        sent += 1
    assert transport.get_write_buffer_size() > HIGH_WATER_BYTES
    transport.close()
    assert transport.is_closing()
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE_S):
        for _ in range(sent):
            assert await loop.sock_recv(right, 2000) == b"x" * 1000
        await transport.closed.wait()
    assert app.paused == [True, False]
    transport.abort()
    assert app.ends == [None]
    right.close()


@pytest.mark.parametrize(("kind", "code"), [("datagram", "HP519"), ("stream", "HP511")])
async def test_socket_of_the_wrong_type_is_refused(kind: Any, code: str) -> None:
    type_ = socket.SOCK_STREAM if kind == "datagram" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, type_) as sock, pytest.raises(StartError, match=code):
        make_server(Echo, Context(Connections()), Options(kind=kind), [sock])


async def test_datagrams_over_tls_are_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, pytest.raises(StartError, match="HP512"):
        make_server(Echo, Context(Connections()), Options(tls_cert=("x.pem",)), [sock])


async def test_embedded_server_takes_datagrams() -> None:
    async with hotport.serve(Echo, bind="udp://127.0.0.1:0") as server:
        host, _, number = server.addresses[0].removeprefix("udp://").rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setblocking(False)
            client.connect((host, int(number)))
            client.send(b"hello")
            async with asyncio.timeout(DEADLINE_S):
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b"hello"
