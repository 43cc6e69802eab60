"""A handoff at the limits of the worker that takes over: what has no room waits for it, and room is kept for it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hotport import channel
from hotport.adapters.base import Connections
from hotport.kernel import scm
from hotport.kernel.process import descriptors_left
from hotport.wire.envelope import Ack, Envelope, Frame, HttpState, decode_ack, encode_frame
from hotport.wire.messages import worker_socket
from hotport.worker import handoff
from hotport.worker.handoff import SPARE_DESCRIPTORS
from tests.adapters.asgi_support import Client, until
from tests.worker.handoff_support import Generation, Service, Successor, service
from tests.worker.test_handoff_faults import _offer
from tests.worker.test_handoff_http import App, get

pytestmark = pytest.mark.anyio


class Crowd:
    """A service whose first generation has so many idle clients."""

    def __init__(self, port: Service, old: Generation, clients: list[Client], stack: contextlib.AsyncExitStack) -> None:
        self.port = port
        self.old = old
        self.clients = clients
        self._stack = stack

    async def connect(self, count: int) -> list[Client]:
        clients = [Client(await self.port.connect()) for _ in range(count)]
        for client in clients:
            self._stack.callback(client.close)
        return clients

    async def answers(self, clients: Sequence[Client]) -> list[tuple[int, bool]]:
        """From which generation each has its answer, and whether it is told to close."""
        found = []
        for client in clients:
            await client.send(get("/a"))
            answer = await client.answer()
            found.append((int(answer.body.split()[0]), answer.says_close))
        return sorted(found)


@contextlib.asynccontextmanager
async def crowd(tmp_path: Path, app: Any, count: int, **options: Any) -> AsyncIterator[Crowd]:
    async with service(tmp_path) as port, contextlib.AsyncExitStack() as stack:
        old = await port.start(app, **options)
        await old.server.accept()
        found = Crowd(port, old, [], stack)
        found.clients = await found.connect(count)
        await until(lambda: len(old.connections.open) == count)
        yield found


def leave(old: Generation, *successors: Generation, **options: Any) -> asyncio.Future[Any]:
    return asyncio.ensure_future(old.leave(*successors, **options))


async def test_connections_without_room_are_served_here_until_there_is_some(tmp_path: Path) -> None:
    """They were told to close, or closed, at the first successor that was full."""
    async with crowd(tmp_path, App(), 5) as found:
        new = await found.port.start(App(), maximum=3)
        leaving = leave(found.old, new)
        await until(lambda: len(new.connections.open) == 3)
        await until(lambda: len(found.old.connections.crowded) == 2)
        assert await found.answers(found.clients) == [(1, False)] * 2 + [(2, False)] * 3
        for _ in range(2):
            (gone, *_) = new.connections.open
            gone.transport.abort()  # type: ignore[attr-defined]
            await until(lambda gone=gone: gone not in new.connections.open)  # type: ignore[misc]
        assert await leaving == {"moved_http": 5}


async def test_successor_that_is_full_from_the_beginning_is_waited_for(tmp_path: Path) -> None:
    async with crowd(tmp_path, App(), 2) as found:
        new = await found.port.start(App(), maximum=1)
        other = await found.port.start(App())
        new.connections.opened(blocker := _Blocker())  # type: ignore[arg-type]
        leaving = leave(found.old, new)
        await until(lambda: len(found.old.connections.crowded) == 2)
        new.connections.forget(blocker)  # type: ignore[arg-type]
        await until(lambda: len(new.connections.open) == 1)
        await found.old.redirect(new, other)  # the other one has room
        assert await leaving == {"moved_http": 2}
        assert len(other.connections.open) == 1


class _Blocker:
    """Takes a place."""


async def test_connections_that_find_no_room_by_the_deadline_are_counted_by_that_reason(tmp_path: Path) -> None:
    async with crowd(tmp_path, App(), 5) as found:
        await found.answers(found.clients)  # or they would be no idle ones, but fresh
        new = await found.port.start(App(), maximum=3)
        assert await leave(found.old, new, timeout_s=0.3) == {"moved_http": 3, "closed_no_room": 2}


async def test_connections_without_room_are_told_to_close_before_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they end between two requests, and not in the middle of one at the deadline."""
    monkeypatch.setattr(handoff, "PATIENCE", 0.0)
    async with crowd(tmp_path, App(), 5) as found:
        new = await found.port.start(App(), maximum=3)
        leaving = leave(found.old, new)
        await until(lambda: len(found.old.connections.crowded) == 2)
        await until(lambda: all(each._is_draining for each in found.old.connections.open))  # type: ignore[attr-defined]
        assert await found.answers(found.clients) == [(1, True)] * 2 + [(2, False)] * 3
        for client in found.clients:
            client.close()
        assert await leaving == {"moved_http": 3, "told_to_close": 2}


async def test_room_is_kept_for_what_is_to_move(tmp_path: Path) -> None:
    """Newcomers filled the new worker from the accept queue, and all connections of the old one were closed."""
    async with crowd(tmp_path, App(), 10) as found:
        found.old.server.quiesce()
        queued = await found.connect(4)
        new = await found.port.start(App(), maximum=12)
        new.connections.keep(worker_socket(1, 1), 10)
        await new.server.accept()
        await until(lambda: len(new.connections.open) == 2)
        leaving = leave(found.old, new)
        assert await leaving == {"moved_http": 10}
        assert len(new.connections.open) == 12
        for client in found.clients[:2]:
            client.close()
        assert await found.answers([*queued, *found.clients[2:]]) == [(2, False)] * 12


async def test_room_is_kept_for_requests_that_are_under_way(tmp_path: Path) -> None:
    app = App()
    async with crowd(tmp_path, app, 2) as found:
        for client in found.clients:
            await client.send(get("/held"))
        await until(lambda: len(app.requests) == 2)
        new = await found.port.start(app, maximum=2)
        leaving = leave(found.old, new)
        await until(lambda: new.connections.is_full)
        (queued,) = await found.connect(1)
        await new.server.accept()
        app.go.set()
        assert [(await client.answer()).body for client in found.clients] == [b"1 /held "] * 2
        assert await leaving == {"moved_http": 2}
        found.clients[0].close()
        assert await found.answers([queued]) == [(2, False)]


async def test_no_room_is_kept_for_what_ends_or_cannot_move(tmp_path: Path) -> None:
    app = App()
    async with crowd(tmp_path, app, 2) as found:
        for client in found.clients:
            await client.send(get("/held"))
        await until(lambda: len(app.requests) == 2)
        new = await found.port.start(app, maximum=2)
        leaving = leave(found.old, new)
        await until(lambda: new.connections.is_full)
        for client in found.clients:
            client.close()
        app.go.set()
        await leaving
        assert not new.connections.is_full


async def echo(stream: Any) -> None:
    async for data in stream:
        await stream.send(data)


async def test_no_room_is_kept_for_streams_that_have_not_agreed(tmp_path: Path) -> None:
    async with crowd(tmp_path, echo, 2, kind="stream") as found:
        new = await found.port.start(echo, kind="stream", maximum=2)
        leaving = leave(found.old, new)
        await until(found.old.connections.draining.is_set)
        await new.server.accept()
        (client,) = await found.connect(1)
        await client.send(b"hello")
        assert await client.received() == b"hello"
        for each in found.clients:
            each.close()
        await leaving


@contextlib.contextmanager
def descriptors_left_but(count: int) -> Iterator[None]:
    """This process may open so many more."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[0] - descriptors_left() + count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_worker_that_is_short_of_descriptors_takes_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 300 connections were closed, since 253 did not fit at once. Here each that moves makes room for one."""
    monkeypatch.setattr(handoff, "PAUSE_S", 0.01)
    async with crowd(tmp_path, App(), 300) as found:
        new = await found.port.start(App())
        with descriptors_left_but(SPARE_DESCRIPTORS + 12):
            assert await leave(found.old, new) == {"moved_http": 300}
        assert await found.answers(found.clients[::50]) == [(2, False)] * 6


async def test_connections_that_the_kernel_had_no_descriptors_for_stay_until_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MSG_CTRUNC: they go where descriptors are taken by others between the word about room and the batch."""
    monkeypatch.setattr(handoff, "PAUSE_S", 0.01)
    cut: list[int] = []

    def receive(sock: socket.socket, size: int) -> scm.Received:
        found = scm.receive_descriptors(sock, size)
        if len(found.descriptors) < 20 or cut:
            return found
        cut.append(len(found.descriptors))
        for fd in found.descriptors[20:]:
            os.close(fd)
        return scm.Received(found.data, found.descriptors[:20], False)

    monkeypatch.setattr(channel, "receive_descriptors", receive)
    async with crowd(tmp_path, App(), 30) as found:
        new = await found.port.start(App())
        leaving = leave(found.old, new)
        assert await leaving == {"moved_http": 30}
        assert cut == [30]
        assert await found.answers(found.clients) == [(2, False)] * 30


async def test_batches_shrink_when_too_many_descriptors_are_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETOOMANYREFS broke the handoff off, and all connections were closed."""
    monkeypatch.setattr(handoff, "PAUSE_S", 0.01)
    sent: list[int] = []

    def send(sock: socket.socket, data: bytes | memoryview, descriptors: Sequence[int]) -> int:
        if len(descriptors) > 4:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        if descriptors:
            sent.append(len(descriptors))
        return scm.send_descriptors(sock, data, descriptors)

    monkeypatch.setattr(channel, "send_descriptors", send)
    async with crowd(tmp_path, App(), 20) as found:
        assert await leave(found.old, await found.port.start(App())) == {"moved_http": 20}
        assert max(sent) <= 4


async def test_descriptor_that_is_no_socket_is_refused_and_closed(tmp_path: Path) -> None:
    """It broke the batch off, and every descriptor behind it stayed open for ever."""
    async with service(tmp_path) as port:
        new = await port.start(App())
        pairs = [socket.socketpair() for _ in range(2)]
        datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        reading, writing = os.pipe()
        envelope = Envelope(None, None, False, b"", HttpState(False, 5.0))
        channel, _ = await _offer(new)
        descriptors = [pairs[0][0].fileno(), writing, datagram.fileno(), pairs[1][0].fileno()]
        await channel.send(encode_frame(Frame.BATCH, [envelope] * 4), descriptors)
        kind, payload, _ = await channel.receive_frame()
        assert (kind, decode_ack(payload).refused) == (Frame.ACK, [1, 2])
        os.close(writing)
        assert os.read(reading, 1) == b""  # nobody has it open any more
        os.close(reading)
        await channel.send(encode_frame(Frame.GO))
        await until(lambda: new.connections.adopted == 2)
        channel.close()
        datagram.close()
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


async def test_successor_that_talks_out_of_turn_is_left_alone(tmp_path: Path) -> None:
    async with crowd(tmp_path, App(), 1) as found:
        successor = Successor(tmp_path)
        leaving = asyncio.ensure_future(found.old.server.drain(10.0, successors=[successor.path]))
        await successor.welcome(room=0)
        await successor.channel.send(encode_frame(Frame.ACK, Ack([], 5)))
        await until(lambda: not found.old.connections.crowded and found.old.connections.draining.is_set())
        assert await found.answers(found.clients) == [(1, True)]
        found.clients[0].close()
        assert await leaving == {"told_to_close": 1}
        successor.channel.close()
        successor.close()


@pytest.mark.parametrize("count", [0, 3])
async def test_registry_that_keeps_room_is_full_before_its_maximum(count: int) -> None:
    told: list[str] = []
    connections = Connections(maximum=3)
    connections.on_full = lambda: told.append("full")
    connections.on_room = lambda: told.append("room")
    connections.keep("a", count)
    assert (connections.is_full, connections.room) == (bool(count), 3)
    connections.keep("a", 0)
    assert told == (["full", "room"] if count else [])
    assert not connections.is_full
