"""Whatever fails between two workers, each connection is served by exactly one of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hotport import channel as channel_module
from hotport.adapters.base import NotAdopted
from hotport.channel import Channel
from hotport.errors import ControlError
from hotport.wire.envelope import (
    ENVELOPE_VERSION,
    ENVELOPE_VERSIONS,
    Ack,
    Envelope,
    Frame,
    HttpState,
    decode_batch,
    encode_frame,
)
from hotport.wire.frames import encode_frame as encode_message_frame
from hotport.wire.messages import OfferOrder, Welcome, encode
from hotport.worker import handoff
from tests.adapters.asgi_support import Client, until
from tests.support import STRANGER
from tests.worker.handoff_support import DEADLINE_S, Generation, Successor, service
from tests.worker.test_handoff_http import App, get, only

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def facing(tmp_path: Path, app: App) -> AsyncIterator[tuple[Generation, Successor, Client]]:
    """A generation with one client, about to leave to a successor that misbehaves."""
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        successor = Successor(tmp_path)
        try:
            yield old, successor, client
        finally:
            client.close()
            successor.close()


def start_leaving(old: Generation, *paths: str) -> asyncio.Future[Any]:
    return asyncio.ensure_future(old.server.drain(DEADLINE_S, successors=paths))


async def leaving_with_a_batch(old: Generation, successor: Any) -> tuple[asyncio.Future[Any], list[int]]:
    """The old generation leaves; its successor has a batch in hand, and has acknowledged nothing."""
    task = start_leaving(old, successor.path)
    await successor.welcome()
    _, descriptors = await successor.batch()
    return task, descriptors


async def answers_here(client: Client, path: str = "/a") -> None:
    """The connection is in service where it was, and is told to close, since nobody else takes it."""
    await client.send(get(path))
    answer = await client.answer()
    assert (answer.body, answer.says_close) == (f"1 {path} ".encode(), True)
    client.close()


async def test_successor_that_ends_in_the_middle_of_a_batch_leaves_every_connection_here(tmp_path: Path) -> None:
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, descriptors = await leaving_with_a_batch(old, successor)
        for fd in descriptors:
            os.close(fd)  # as the kernel does with those of a process that is killed
        successor.channel.close()
        await answers_here(client)
        assert await task == {"told_to_close": 1}


async def test_successor_that_ends_after_its_acknowledgement_and_before_go_leaves_them_here(tmp_path: Path) -> None:
    """Its end is known when GO cannot be sent; it has not read a byte by then."""
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, descriptors = await leaving_with_a_batch(old, successor)
        await successor.channel.send(encode_frame(Frame.ACK, Ack([], 100)))
        for fd in descriptors:
            os.close(fd)
        successor.channel.close()
        await answers_here(client)
        assert await task == {"told_to_close": 1}


async def test_successor_that_does_not_answer_is_withdrawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "ACK_TIMEOUT_S", 0.05)
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, descriptors = await leaving_with_a_batch(old, successor)
        kind, _, _ = await successor.channel.receive_frame()
        assert kind is Frame.WITHDRAW
        for fd in descriptors:
            os.close(fd)
        await answers_here(client)
        assert await task == {"told_to_close": 1}
        successor.channel.close()


async def test_successor_that_wakes_up_too_late_serves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds a batch, its withdrawal, and the end of the channel: it must not take the end for the sender's."""
    monkeypatch.setattr(handoff, "ACK_TIMEOUT_S", 0.05)
    is_awake = asyncio.Event()

    class Asleep(Channel):
        async def receive_frame(self) -> tuple[Frame, bytes, list[int]]:
            await is_awake.wait()
            return await super().receive_frame()

    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        new = await port.start(app)
        new.channel_type = Asleep
        task = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        await until(lambda: only(old).handoff is None)  # withdrawn, and in service again
        is_awake.set()
        await asyncio.wait(new._taking)
        assert (len(new.connections.open), new.connections.adopted) == (0, 0)
        await answers_here(client)
        assert await task == {"told_to_close": 1}


@pytest.mark.parametrize(
    "nonsense", [b"\x09\0\0\0\0", b"\x03\0\0\0\0", b"\x02\0\0\0\x01\xc1"], ids=["kind", "go", "ack"]
)
async def test_successor_that_answers_nonsense_is_left_alone(tmp_path: Path, nonsense: bytes) -> None:
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, descriptors = await leaving_with_a_batch(old, successor)
        for fd in descriptors:
            os.close(fd)
        await successor.channel.send(nonsense)
        kind, _, _ = await successor.channel.receive_frame()
        assert kind is Frame.WITHDRAW  # else it would take the end of the channel for the end of its sender
        await answers_here(client)
        assert await task == {"told_to_close": 1}
        successor.channel.close()


@pytest.mark.parametrize("version", [min(ENVELOPE_VERSIONS) - 1, ENVELOPE_VERSION + 1])
async def test_generations_with_different_envelopes_hand_nothing_over(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        new = await port.start(app)
        monkeypatch.setattr(handoff, "OfferOrder", lambda **_: OfferOrder(version=version))
        task = asyncio.ensure_future(old.leave(new))
        await until(old.connections.draining.is_set)
        await answers_here(client)
        assert await task == {"told_to_close": 1}
        assert new.connections.adopted == 0


@pytest.mark.parametrize("path", ["", "nobody.sock"])
async def test_successor_that_cannot_be_reached_is_passed_over(tmp_path: Path, path: str) -> None:
    app = App()
    async with facing(tmp_path, app) as (old, _, client):
        task = start_leaving(old, str(tmp_path / path) if path else "x" * 200)
        await until(old.connections.draining.is_set)
        await answers_here(client)
        assert await task == {"told_to_close": 1}


async def test_unexpected_error_with_one_successor_keeps_no_connection_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drain ended with it, and every connection was lost uncounted."""

    def sockaddr(path: str) -> str:
        if path == "bad":
            raise LookupError("a bug of ours")
        return path

    monkeypatch.setattr(channel_module, "sockaddr", sockaddr)
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        new = await port.start(app)
        assert await start_leaving(old, "bad", new.path) == {"moved_http": 1}
        client.close()


async def test_successor_that_says_nothing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "WELCOME_TIMEOUT_S", 0.05)
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task = start_leaving(old, successor.path)
        await until(old.connections.draining.is_set)
        await answers_here(client)
        assert await task == {"told_to_close": 1}


async def test_connections_of_a_successor_that_fails_go_to_the_others(tmp_path: Path) -> None:
    app = App()
    async with service(tmp_path) as port, contextlib.AsyncExitStack() as stack:
        old = await port.start(app)
        await old.server.accept()
        clients = [Client(await port.connect()) for _ in range(20)]
        for client in clients:
            stack.callback(client.close)
        await until(lambda: len(old.connections.open) == 20)
        good = await port.start(app)
        bad = Successor(tmp_path)
        stack.callback(bad.close)
        task = start_leaving(old, good.path, bad.path)
        await bad.welcome()
        _, descriptors = await bad.batch()
        assert len(descriptors) == 10
        for fd in descriptors:
            os.close(fd)
        bad.channel.close()
        assert await task == {"moved_http": 20}
        for client in clients:
            await client.send(get("/a"))
            assert (await client.answer()).body == b"2 /a "


async def test_connection_that_the_successor_refuses_stays_and_the_others_move(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = App()
    async with service(tmp_path) as port, contextlib.AsyncExitStack() as stack:
        old = await port.start(app)
        await old.server.accept()
        clients = [Client(await port.connect()) for _ in range(3)]
        for client in clients:
            stack.callback(client.close)
        await until(lambda: len(old.connections.open) == 3)
        await clients[1].send(b"GET /half HTTP/1.1\r\n")
        await until(lambda: any(c.unconsumed for c in old.connections.open))  # type: ignore[attr-defined]
        new = await port.start(app)
        adopt = new.server._adapter.adopt

        def adopt_if_fresh(envelope: Envelope) -> asyncio.BaseProtocol:
            assert isinstance(envelope.state, HttpState)
            if envelope.unread:
                raise NotAdopted("not this one")
            return adopt(envelope)

        monkeypatch.setattr(new.server._adapter, "adopt", adopt_if_fresh)
        task = asyncio.ensure_future(old.leave(new))
        await until(lambda: len(new.connections.open) == 2)
        await clients[1].send(b"Host: x\r\n\r\n")
        answer = await clients[1].answer()
        assert (answer.body, answer.says_close) == (b"1 /half ", True)
        clients[1].close()
        assert await task == {"moved_http": 2, "told_to_close": 1}


async def test_connections_are_not_handed_to_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        with contextlib.closing(Client(await port.connect())):
            await until(lambda: len(old.connections.open) == 1)
            new = await port.start(app)
            monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
            assert await old.leave(new, timeout_s=0.1) == {"cut_fresh": 1}
        assert not new.connections.open


async def test_connection_whose_envelope_cannot_travel_stays_and_the_others_move(tmp_path: Path) -> None:
    """A unix client's own address need not be UTF-8. All connections stood still until the drain deadline."""
    app = App()
    async with service(tmp_path, socket.AF_UNIX) as port, contextlib.AsyncExitStack() as stack:
        old = await port.start(app)
        await old.server.accept()
        odd = socket.socket(socket.AF_UNIX)
        odd.setblocking(False)
        odd.bind(own := os.fsencode(tmp_path) + b"/caf\xe9")
        await asyncio.get_running_loop().sock_connect(odd, port.address)
        clients = [Client(odd), Client(await port.connect())]
        for client in clients:
            stack.callback(client.close)
        await until(lambda: len(old.connections.open) == 2)
        new = await port.start(app)
        task = asyncio.ensure_future(old.leave(new))
        await until(lambda: len(new.connections.open) == 1)
        for client in clients:
            await client.send(get("/a"))
        answers = [await client.answer() for client in clients]
        assert [(answer.body, answer.says_close) for answer in answers] == [(b"1 /a ", True), (b"2 /a ", False)]
        clients[0].close()
        assert await task == {"moved_http": 1, "told_to_close": 1}
        os.unlink(own)


async def test_connection_for_which_one_successor_has_lost_its_room_goes_to_another(tmp_path: Path) -> None:
    """It was told to close, as if nobody could go on with it."""
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        successor, other = Successor(tmp_path), await port.start(app)
        task = start_leaving(old, successor.path, other.path)
        await successor.welcome(connections=-1)  # fewer than the other one: it is asked first
        _, descriptors = await successor.batch()
        await successor.channel.send(encode_frame(Frame.ACK, Ack([0], 0)))
        assert await task == {"moved_http": 1}
        await client.send(get("/a"))
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"2 /a ", False)
        client.close()
        for fd in descriptors:
            os.close(fd)
        successor.channel.close()
        successor.close()


async def test_connections_under_way_count_when_the_next_one_is_assigned(tmp_path: Path) -> None:
    """The room of a successor was known from its last answer only, and so was given away twice."""
    app = App()
    async with facing(tmp_path, app) as (old, successor, _):
        task = start_leaving(old, successor.path)
        await successor.welcome(room=1)
        _, descriptors = await successor.batch()
        (found,) = old.server._mover._successors.values()  # type: ignore[union-attr]
        assert (found.room, found.connections) == (0, 1)
        await successor.channel.send(encode_frame(Frame.ACK, Ack([], 0)))
        assert await task == {"moved_http": 1}
        for fd in descriptors:
            os.close(fd)
        successor.channel.close()


async def test_sender_that_ends_after_the_acknowledgement_leaves_its_connections_to_the_successor(
    tmp_path: Path,
) -> None:
    await _send_by_hand(tmp_path, lambda sock: sock.close(), is_served=True)


async def test_sender_that_withdraws_is_believed(tmp_path: Path) -> None:
    await _send_by_hand(tmp_path, lambda sock: sock.sendall(encode_frame(Frame.WITHDRAW)), is_served=False)


async def test_sender_that_speaks_out_of_turn_gets_nothing_served(tmp_path: Path) -> None:
    await _send_by_hand(tmp_path, lambda sock: sock.sendall(encode_frame(Frame.BATCH, [])), is_served=False)


async def _send_by_hand(tmp_path: Path, then: Callable[[socket.socket], object], *, is_served: bool) -> None:
    """A batch of one connection, an acknowledgement, and then whatever `then` does."""
    app = App()
    async with service(tmp_path) as port:
        new = await port.start(app)
        theirs, ours = socket.socketpair()
        loop = asyncio.get_running_loop()
        channel, sock = await _offer(new)
        state = HttpState(False, 5.0)
        envelope = Envelope(("127.0.0.1", 1), ("127.0.0.1", 2), False, get("/a")[:10], state)
        await channel.send(encode_frame(Frame.BATCH, [envelope]), [ours.fileno()])
        assert (await channel.receive_frame())[0] is Frame.ACK
        ours.close()
        assert len(new.connections.open) == 1
        theirs.setblocking(False)
        await loop.sock_sendall(theirs, get("/a")[10:])
        then(sock)
        received = b""
        async with asyncio.timeout(DEADLINE_S):
            with contextlib.suppress(ConnectionResetError):  # closed, with bytes in it that nobody has read
                received = await loop.sock_recv(theirs, 100)
        theirs.close()
        channel.close()
        assert received.startswith(b"HTTP/1.1 200") is is_served
        await until(lambda: not new.connections.open)
        assert (new.connections.accepted, new.connections.adopted) == (0, is_served)


async def _offer(new: Generation, version: int = ENVELOPE_VERSION) -> tuple[Channel, socket.socket]:
    """A worker's side of the conversation, up to its welcome."""
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, new.path)
    channel = Channel(sock)
    await channel.send(encode_message_frame(encode(OfferOrder(version=version))))
    while not isinstance(await channel.receive_word(), Welcome):
        pass
    return channel, sock


@pytest.mark.parametrize(
    "data",
    [b"\0" * 5, encode_frame(Frame.GO), encode_frame(Frame.BATCH, Ack([], 0)), b"\1\0\0\0\x01\xc1", b"\1\0\0"],
    ids=["zeros", "go", "content", "garbage", "half"],
)
async def test_sender_that_sends_nonsense_costs_the_successor_nothing(tmp_path: Path, data: bytes) -> None:
    async with service(tmp_path) as port:
        new = await port.start(App())
        channel, sock = await _offer(new)
        await channel.send(data, [sock.fileno()])
        sock.shutdown(socket.SHUT_WR)
        with pytest.raises((EOFError, OSError)):
            await channel.receive_frame()
        channel.close()
        assert not new.connections.open


async def test_connection_that_is_cut_while_it_stands_still_gets_no_answer_from_here(tmp_path: Path) -> None:
    """Its successor may have it: whatever were written here could be a second answer."""
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        await client.send(get("/a")[:10])
        await until(lambda: bool(only(old).unconsumed))
        task, (fd,) = await leaving_with_a_batch(old, successor)
        old.connections.cut()
        await until(lambda: old.connections.fates == {"cut_offered": 1})
        await successor.channel.send(encode_frame(Frame.ACK, Ack([], 100)))
        assert (await successor.channel.receive_frame())[0] is Frame.GO
        with socket.socket(fileno=fd) as sock:
            sock.setblocking(False)
            await client.send(get("/a")[10:])
            received = await asyncio.get_running_loop().sock_recv(sock, 100)
            assert received == get("/a")[10:]
            await asyncio.get_running_loop().sock_sendall(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
            assert (await client.answer()).body == b"hi"
        await task
        successor.channel.close()


def test_an_unknown_frame_is_a_control_error() -> None:
    with pytest.raises(ControlError, match="HP220 cannot understand another worker's connections"):
        decode_batch(b"\xc1")


async def test_connection_that_stands_still_is_told_nothing_until_its_batch_is_over(tmp_path: Path) -> None:
    """New successors are named and none of them takes anything: the batch that is under way is not theirs."""
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, (fd,) = await leaving_with_a_batch(old, successor)
        await old.server.follow(["nobody.sock"])
        assert only(old).handoff is not None
        assert not only(old).transport.is_reading()
        await client.send(get("/a"))
        await successor.channel.send(encode_frame(Frame.ACK, Ack([], 100)))
        assert (await successor.channel.receive_frame())[0] is Frame.GO
        with socket.socket(fileno=fd) as sock:
            sock.setblocking(False)
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == get("/a")
        assert await task == {"moved_http": 1}
        successor.channel.close()


async def test_connection_that_stood_still_is_told_to_close_if_it_comes_back_to_nobody(tmp_path: Path) -> None:
    app = App()
    async with facing(tmp_path, app) as (old, successor, client):
        task, (fd,) = await leaving_with_a_batch(old, successor)
        await old.server.follow(["nobody.sock"])
        os.close(fd)
        successor.channel.close()
        await answers_here(client)
        assert await task == {"told_to_close": 1}
