"""Listeners that come and go while a server serves."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from hotport.adapters.base import Connections, Context
from hotport.errors import StartError
from hotport.kernel.sockets import accept_queue_length
from hotport.options import Options
from hotport.worker.server import ConnectionServer, DatagramServer, make_server
from tests.support import DEADLINE_S, assert_three_lines

pytestmark = pytest.mark.anyio


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


async def echo(stream: Any) -> None:
    await stream.send(await stream.receive())


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[ConnectionServer]:
    """A server that has no listener."""
    server = make_server(echo, Context(Connections()), Options(kind="stream", **options), [])
    assert isinstance(server, ConnectionServer)
    await server.startup()
    yield server
    await server.drain(0.0)
    await server.shutdown()


async def connected(listener: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
    await asyncio.get_running_loop().sock_sendall(sock, b"hello")
    return sock


async def is_answered(sock: socket.socket) -> bool:
    with sock:
        async with asyncio.timeout(DEADLINE_S):
            return await asyncio.get_running_loop().sock_recv(sock, 10) == b"hello"


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("tasks", [1, 2])
async def test_listener_that_comes_is_accepted_from(listener: socket.socket, is_first: bool, tasks: int) -> None:
    async with serving(tasks=tasks) as server:
        if is_first:
            await server.accept()
        await server.adopt({"a": listener.dup()})
        if not is_first:
            await server.accept()
        assert await is_answered(await connected(listener))


async def test_listener_takes_the_place_of_one_with_the_same_address(listener: socket.socket) -> None:
    """A socket file was removed, and is bound again: who waited at the old one is served, and its descriptor closed."""
    async with serving(tasks=2) as server:
        await server.adopt({"a": listener.dup(), "b": listener.dup()})
        before = server.held()
        waiting = await connected(listener)
        with socket.create_server(("127.0.0.1", 0)) as new:
            new.setblocking(False)
            await server.adopt({"a": new.dup()})
            assert await is_answered(waiting)
            assert server.held()["b"] == before["b"]
            assert os.fstat(server.held()["a"]).st_ino == os.fstat(new.fileno()).st_ino
            await server.accept()
            assert await is_answered(await connected(new))


async def test_who_comes_late_to_a_queue_that_nobody_else_serves_is_served_until_the_worker_leaves(
    listener: socket.socket,
) -> None:
    """A handshake that ended after the old worker of an overlap had emptied its queue waited for the undo window."""
    async with serving(handoff="off") as server:
        await server.adopt({"a": listener.dup()})
        await server.accept()
        server.quiesce()
        await server.empty(DEADLINE_S)
        assert await is_answered(await connected(listener))
        server.quiesce()
        client = await connected(listener)
        await asyncio.sleep(0)
        await server.accept()
        assert await is_answered(client)
        assert not server.connections.fates


async def test_emptying_that_outlasts_its_worker_begins_nothing(listener: socket.socket) -> None:
    async with serving() as server:
        await server.adopt({"a": listener.dup()})
        await server.accept()
        await server.drain(0.0)
        await server.empty(DEADLINE_S)


async def test_connection_that_comes_is_served_like_one_that_was_accepted(listener: socket.socket) -> None:
    async with serving() as server:
        client = await connected(listener)
        await server.adopt({"a": listener.dup()}, [listener.accept()[0]])
        assert await is_answered(client)
        assert server.connections.accepted == 1


async def test_connection_whose_client_has_gone_is_none(listener: socket.socket) -> None:
    async with serving() as server:
        ours = socket.socket()  # not connected: what getpeername says of one that was reset
        await server.adopt({"a": listener.dup()}, [ours])
        assert ours.fileno() == -1
        assert server.connections.accepted == 0


async def test_connection_that_comes_without_a_listener_is_closed(listener: socket.socket) -> None:
    async with serving() as server:
        ours, theirs = socket.socketpair()
        with theirs:
            await server.adopt({}, [ours])
            assert ours.fileno() == -1


async def test_release_takes_what_waits_and_closes_only_what_it_names(listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        async with serving() as server:
            await server.adopt({"a": listener.dup(), "b": other.dup()})
            client = await connected(listener)
            await server.release(["a"], 1.0)
            assert await is_answered(client)
            await server.accept()
            waiting = await connected(listener)  # for whoever else has it
            assert await is_answered(await connected(other))
            listener.accept()[0].close()
            waiting.close()


async def test_released_listener_may_come_again(listener: socket.socket) -> None:
    async with serving() as server:
        await server.adopt({"a": listener.dup()})
        await server.accept()
        await server.release(["a"], 1.0)
        await server.adopt({"a": listener.dup()})
        await server.accept()
        assert await is_answered(await connected(listener))


async def test_queue_is_emptied_without_closing_the_listener(listener: socket.socket) -> None:
    async with serving() as server:
        await server.adopt({"a": listener.dup()})
        client = await connected(listener)
        await server.empty(1.0)
        assert await is_answered(client)
        await server.accept()
        assert await is_answered(await connected(listener))


async def test_queue_that_cannot_be_emptied_is_left_after_a_moment(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(self: object) -> None:
        await asyncio.Event().wait()

    async with serving() as server:
        await server.adopt({"a": listener.dup()})
        monkeypatch.setattr("hotport.worker.acceptor.Acceptor.empty", never)
        await server.release(["a"], 0.01)


async def test_full_server_does_not_accept_from_what_comes(listener: socket.socket) -> None:
    async with serving() as server:
        server.connections.maximum = 1
        server.connections.keep("another worker", 1)
        assert server.connections.is_full
        await server.adopt({"a": listener.dup()})
        await server.accept()
        client = await connected(listener)
        await asyncio.sleep(0)
        assert accept_queue_length(listener) == 1
        server.connections.keep("another worker", 0)
        assert await is_answered(client)


@pytest.mark.parametrize("kind", ["sockets", "datagram"])
def test_application_that_takes_its_sockets_at_its_start_cannot_start_without(kind: str) -> None:
    async def make() -> None:
        make_server(asyncio.DatagramProtocol, Context(Connections()), Options(kind=kind), [])  # type: ignore[arg-type]

    with pytest.raises(StartError) as caught:
        asyncio.run(make())
    assert_three_lines(str(caught.value), "HP530")


async def test_application_that_took_its_sockets_at_its_start_takes_no_more() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        server = make_server(asyncio.DatagramProtocol, Context(Connections()), Options(kind="datagram"), [sock.dup()])
        assert isinstance(server, DatagramServer)
        await server.startup()
        more = sock.dup()
        with pytest.raises(OSError, match="at its start, and only there"):  # or clients would wait for nobody
            await server.adopt({"a": more})
        await server.release(["a"], 0.0)
        await server.empty(0.0)
        assert more.fileno() == -1
        await server.drain(0.0)
