"""What one WebSocket client can cost: memory, turns of the event loop, and time."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side
from websockets.protocol import State as ProtocolState

from hotport.adapters.asgi import deadlines
from hotport.adapters.asgi.frames import COMPRESSED_BYTES_MAX, PART_BYTES_MIN, Cutter, Violation
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.adapters.asgi.states import WebSocketState as State
from hotport.adapters.asgi.websocket import WebSocketConnection
from hotport.adapters.handoff import Handoff, Stage
from tests.adapters.asgi_support import Rig, in_memory, serving, turns, until
from tests.adapters.test_asgi_websocket import Talk, close, frame, handshake, open_raw, text

pytestmark = pytest.mark.anyio

MIB = 1 << 20
DEFLATE = "sec-websocket-extensions: permessage-deflate"


def marked(data: bytes) -> bytes:
    """A frame as the first of a compressed message (RFC 7692 section 6)."""
    return bytes((data[0] | 0x40,)) + data[1:]


def packed_by(compressor: Any, data: bytes) -> bytes:
    """The payload of one compressed message."""
    return bytes((compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4])


def deflated(data: bytes, opcode: Opcode = Opcode.BINARY) -> bytes:
    """One compressed message in one frame."""
    return marked(frame(opcode, packed_by(zlib.compressobj(9, wbits=-12), data)))


class Takes:
    """An application that takes messages when it is told to, and keeps their lengths."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.may_take = asyncio.Semaphore(1_000_000 if at_once else 0)
        self.lengths: list[int] = []
        self.code: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        while True:
            await self.may_take.acquire()
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self.code = message["code"]
                return
            content = message.get("text")
            self.lengths.append(len(message["bytes"] if content is None else content))
            del message, content


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def held(connection: WebSocketConnection) -> int:
    """Bytes that wait on a connection's behalf."""
    assembly = connection._assembly
    return (
        connection._session.waiting_bytes
        + len(connection._cutter.rest)
        + (assembly.size if assembly is not None else 0)
        + len(connection._pong)
        + sum(map(len, connection._protocol.writes))
        + len(connection._protocol.reader.buffer)
    )


async def settled(connection: WebSocketConnection) -> None:
    """What has come is read, as far as there is room."""
    await until(lambda: not connection._is_behind or connection._is_full)


# -- what waits for the application ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Opcode.BINARY, Opcode.TEXT])
@pytest.mark.parametrize("is_taken", [True, False])
async def test_messages_that_inflate_a_thousandfold_wait_one_at_a_time(
    kind: Opcode, is_taken: bool, traced: None
) -> None:
    """Six MiB on the wire were 570 MiB in the worker, as each of them was inflated before anything was counted."""
    app = Takes(at_once=is_taken)
    bomb = deflated(b"a" * 16 * MIB, kind)
    async with serving(app, ws_ping_interval_s=0) as rig:
        connection, wire = await open_raw(rig, "/", DEFLATE)
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for data in (bomb * 3, bomb):
            if wire.transport.is_reading():
                connection.data_received(data)
                await settled(connection)
        if not is_taken:
            assert app.lengths == []
            assert connection.is_mid_message  # the first one, of which the application has not asked for more
            assert not wire.transport.is_reading()
        # One message, at most twice while its buffer grows, and one that the application has just taken.
        assert tracemalloc.get_traced_memory()[1] - before < (52 if is_taken else 3) * MIB
        app.may_take.release()
        await until(lambda: len(app.lengths) >= 1)
        wire.transport.close()
        await until(lambda: not rig.connections.open)
        for _ in range(20):
            app.may_take.release()
        await until(lambda: app.code is not None)
        assert set(app.lengths) == {16 * MIB}
        assert tracemalloc.get_traced_memory()[0] - before < MIB  # although we still refer to the connection


FLOODS = {
    "tiny-texts": text("") * 1_500,
    "tiny-binaries": frame(Opcode.BINARY) * 1_500,
    "short-texts": text("x" * 100) * 500,
    "fragments-without-end": frame(Opcode.BINARY, fin=False) + frame(Opcode.CONT, fin=False) * 1_500,
    "text-fragments-without-end": frame(Opcode.TEXT, fin=False) + frame(Opcode.CONT, fin=False) * 1_500,
    "messages-in-fragments": (frame(Opcode.TEXT, b"x", fin=False) + frame(Opcode.CONT, b"y")) * 1_000,
    "pings": frame(Opcode.PING, b"x" * 125) * 500,
    "empty-pings": frame(Opcode.PING) * 1_500,
    "pongs": frame(Opcode.PONG, b"x" * 125) * 500,
}


@pytest.mark.parametrize("name", FLOODS)
@in_memory
@pytest.mark.unmeasured
async def test_flood_stays_within_the_budget_while_the_application_takes_nothing(name: str, traced: None) -> None:
    async with serving(Takes(), ws_ping_interval_s=0, ws_queue=1_000_000) as rig:
        connection, wire = await open_raw(rig)
        wire.transport.writes.clear()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        data = FLOODS[name]
        continuing = frame(Opcode.CONT, fin=False) * 1_500 if "without-end" in name else data
        for _ in range(8):
            if not wire.transport.is_reading():
                break
            connection.data_received(data)
            data = continuing
            await settled(connection)
            wire.transport.writes.clear()
        assert held(connection) < 256 * 1024 + len(data) + 1024
        assert tracemalloc.get_traced_memory()[1] - before < MIB


async def test_queue_is_not_longer_than_the_option_says_whatever_one_read_holds() -> None:
    app = Takes()
    async with serving(app, ws_queue=8) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(text("x") * 1000 + close(4000))
        await turns()
        assert len(connection.undelivered) == 8
        assert not wire.transport.is_reading()
        assert not connection.is_between_frames  # so it does not move: nobody would take the rest along
        for taken in range(1, 1001):
            app.may_take.release()
            await until(lambda: len(app.lengths) == taken)  # noqa: B023
            assert len(connection.undelivered) <= 8
        app.may_take.release()
        await until(lambda: app.code == 4000)


async def test_handshake_with_many_frames_behind_it_keeps_to_the_queue() -> None:
    async with serving(Takes(), ws_queue=8) as rig:
        connection, _ = await open_raw(rig, early=text("x") * 1000)
        await turns()
        assert len(connection.undelivered) == 8


@pytest.mark.parametrize("step", [997, 65536, 256_000])
@pytest.mark.parametrize("kind", [Opcode.BINARY, Opcode.TEXT])
async def test_message_of_the_full_size_arrives_however_it_comes(kind: Opcode, step: int) -> None:
    """Also through the smallest buffer, and with characters of two bytes that are cut anywhere."""
    app = Talk()
    content = ("xé" * 100_000).encode()
    async with serving(app, ws_message_max_bytes=300_000, connection_buffer_bytes=0) as rig:
        connection, wire = await open_raw(rig)
        stream = frame(kind, content) + b"".join(
            frame(kind if not at else Opcode.CONT, content[at : at + 65536], fin=at + 65536 >= 300_000)
            for at in range(0, 300_000, 65536)
        )
        for at in range(0, len(stream), step):
            await until(wire.transport.is_reading)
            connection.data_received(stream[at : at + step])
        await until(lambda: len(app.messages) == 2)
    expected = content.decode() if kind is Opcode.TEXT else content
    assert app.messages == [expected, expected]


@pytest.mark.parametrize("size", [300_000, 300_001])
@pytest.mark.parametrize("is_dense", [True, False])
async def test_compressed_message_of_the_full_size_arrives_and_a_larger_one_does_not(size: int, is_dense: bool) -> None:
    app = Takes(at_once=True)
    content = bytes(size) if is_dense else os.urandom(size)
    async with serving(app, ws_message_max_bytes=300_000) as rig:
        connection, wire = await open_raw(rig, "/", DEFLATE)
        packed = packed_by(zlib.compressobj(9, wbits=-12), content)
        parts = [packed[at : at + 50_000] for at in range(0, len(packed), 50_000)]
        for number, part in enumerate(parts):
            opcode, is_last = (Opcode.CONT if number else Opcode.BINARY), number == len(parts) - 1
            data = frame(opcode, part, fin=is_last)
            connection.data_received(data if number else marked(data))
            await until(lambda: wire.transport.is_reading() or wire.transport.is_closed)
        await until(lambda: bool(app.lengths) or app.code is not None)
        assert (app.lengths, wire.closed_with) == (([size], None) if size == 300_000 else ([], 1009))


async def test_context_that_is_taken_over_inflates_in_parts_like_any_other() -> None:
    app = Takes(at_once=True)
    compressor = zlib.compressobj(9, wbits=-12)
    async with serving(app) as rig:
        connection, wire = await open_raw(rig, "/", DEFLATE)
        seed = os.urandom(2000)
        for _ in range(20):
            connection.data_received(marked(frame(Opcode.BINARY, packed_by(compressor, seed * 500))))
            await until(lambda: wire.transport.is_reading() or wire.transport.is_closed)
        await until(lambda: len(app.lengths) == 20)
    assert set(app.lengths) == {1_000_000}


@pytest.mark.parametrize("head", [b"\x89\xff", b"\x88\xff", b"\x8a\xff"], ids=["ping", "close", "pong"])
async def test_control_frame_that_announces_a_gigabyte_is_refused_by_its_head(head: bytes) -> None:
    async with serving(Talk()) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(head + (1 << 23).to_bytes(8, "big") + b"mask")
        assert wire.closed_with == 1002


# -- pongs, and clients that take nothing ----------------------------------------------------------------------


async def test_pings_of_a_client_that_does_not_read_are_answered_by_one_pong() -> None:
    """The memory of a ping flood that never reads grew with every byte that it sent."""
    async with serving(Takes()) as rig:
        connection, wire = await open_raw(rig)
        connection.pause_writing()
        before = len(wire.frames)
        for n in range(3000):
            connection.data_received(frame(Opcode.PING, b"%d" % n))
        assert len(wire.frames) == before
        assert held(connection) < 1024
        connection.resume_writing()
        assert [bytes(f.data) for f in wire.frames[before:]] == [b"2999"]
        connection.data_received(frame(Opcode.PING, b"again"))
        assert bytes(wire.frames[-1].data) == b"again"


async def test_no_pong_follows_a_close_frame() -> None:
    async with serving(Takes()) as rig:
        connection, wire = await open_raw(rig)
        connection.pause_writing()
        connection.data_received(frame(Opcode.PING, b"x"))
        connection.close(4000, "")
        connection.resume_writing()
        assert wire.frames[-1].opcode is Opcode.CLOSE


@pytest.mark.unmeasured
async def test_pings_without_end_of_a_real_client_that_never_reads(traced: None) -> None:
    async with serving(Takes(), ws_ping_interval_s=0) as rig:
        client, connection = await opened(rig)
        assert connection.sock is not None
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        pings = frame(Opcode.PING, b"x" * 125) * 500
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        sent = 0
        while sent < 2 * MIB:
            with contextlib.suppress(BlockingIOError):
                sent += client.send(pings)
            await asyncio.sleep(0)
        assert tracemalloc.get_traced_memory()[1] - before < MIB
        client.close()


async def opened(rig: Rig) -> tuple[socket.socket, WebSocketConnection]:
    """A socket on which the handshake was sent, and the server's end of it."""
    client, _ = await rig.connect_socket()
    await asyncio.get_running_loop().sock_sendall(client, handshake())
    await until(lambda: all(isinstance(c, WebSocketConnection) and c.is_open for c in rig.connections.open))
    (connection,) = rig.connections.open
    assert isinstance(connection, WebSocketConnection)
    return client, connection


async def test_client_that_takes_nothing_is_cut_and_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deadlines, "TICK_MAX_S", deadlines.TICK_MIN_S)
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": bytes(MIB)})
        except OSError as error:
            errors.append(error)

    with caplog.at_level(logging.INFO, "hotport.error"):
        async with serving(app, send_timeout_s=0.05) as rig:
            client, _ = await opened(rig)
            rig.connections.drain(60)  # from then on fates are counted
            await until(lambda: not rig.connections.open)
            assert rig.connections.fates == {"cut_slow_reader": 1}
            host, port = client.getsockname()
            await until(lambda: bool(errors))
            client.close()
    assert f"it came from {host} port {port}" in caplog.text
    assert "takes too little" in caplog.text


async def test_client_that_takes_a_little_now_and_then_stays() -> None:
    """Less than that, and it is cut."""
    async with serving(Takes(), send_timeout_s=10, rate_min_bytes=100, ws_ping_interval_s=0) as rig:
        connection, wire = await open_raw(rig)
        watches = connection.shared.deadlines
        wire.transport.unsent_bytes = 1_000_000
        connection.pause_writing()
        for _ in range(500):
            wire.transport.unsent_bytes -= 100 * watches.ticks(1)
            watches._on_timer()
        assert connection.state is State.OPEN
        for _ in range(watches.ticks(15)):
            wire.transport.unsent_bytes -= 1
            watches._on_timer()
        assert wire.transport.is_aborted


# -- clients that leave while they are not read ----------------------------------------------------------------


@pytest.mark.parametrize("how", ["end", "close", "reset"])
async def test_end_of_a_client_that_is_not_read_is_noticed(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither event loop looks at a paused connection: what waited for a client stayed after it had left."""
    monkeypatch.setattr(deadlines, "TICK_MAX_S", deadlines.TICK_MIN_S)
    monkeypatch.setattr("hotport.adapters.asgi.shared.LINGER_S", 0.01)
    app = Takes()
    async with serving(app, ws_queue=1, ws_ping_interval_s=0) as rig:
        client, connection = await opened(rig)
        await asyncio.get_running_loop().sock_sendall(client, text("x") * 1000)
        await until(lambda: connection.is_reading_paused and connection._is_full)
        match how:
            case "end":
                client.shutdown(socket.SHUT_WR)
            case "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how != "end":
            client.close()
        await until(lambda: not rig.connections.open)
        assert held(connection) < 1024
        for _ in range(3):
            app.may_take.release()
        await until(lambda: app.code == 1006)
        client.close()
    assert app.lengths == [1]


async def test_what_a_client_had_sent_is_still_delivered_while_the_application_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deadlines, "TICK_MAX_S", deadlines.TICK_MIN_S)
    app = Takes()
    async with serving(app, ws_queue=1) as rig:
        client, _ = await opened(rig)
        await asyncio.get_running_loop().sock_sendall(client, text("x") * 200 + close(4000))
        client.close()
        for taken in range(1, 201):
            app.may_take.release()
            await until(lambda: len(app.lengths) == taken)  # noqa: B023
        app.may_take.release()
        await until(lambda: app.code == 4000)


async def test_close_without_reading_frees_everything() -> None:
    app = Takes()
    async with serving(app, ws_queue=1) as rig:
        connection, wire = await open_raw(rig, "/", DEFLATE)
        connection.data_received(text("x") * 1000 + frame(Opcode.TEXT, b"x" * 100, fin=False))
        wire.transport.close()
        await until(lambda: not rig.connections.open)
        assert (connection._cutter.rest, connection._assembly, connection._early) == (b"", None, b"")
        assert connection._protocol.extensions == []
        for _ in range(3):
            app.may_take.release()
        await until(lambda: app.code == 1006)


# -- turns -----------------------------------------------------------------------------------------------------


async def test_others_have_their_turn_between_two_parts_of_what_one_client_sends() -> None:
    """Another client waited until everything was inflated that a flood had brought in one read."""
    app = Takes(at_once=True)
    async with serving(app, turn_s=0.0) as rig:
        connection, wire = await open_raw(rig, "/", DEFLATE)
        connection.data_received(deflated(bytes(4 * MIB)) + text("x") * 20)
        others = 0
        while connection._is_behind:
            sizes = [held(connection)]
            await asyncio.sleep(0)  # that is one turn
            sizes.append(held(connection))
            assert sizes[1] - sizes[0] < MIB
            others += 1
        assert others > 40
        assert wire.transport.is_reading()
        await until(lambda: len(app.lengths) == 21)


async def test_long_read_ends_a_turn() -> None:
    app = Takes(at_once=True)
    async with serving(app) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(frame(Opcode.BINARY, bytes(200_000)))
        assert not wire.transport.is_reading()
        await turns()
        assert wire.transport.is_reading()
        assert app.lengths == [200_000]


async def test_long_read_that_ends_with_a_close_leaves_the_client_s_end_to_be_seen() -> None:
    async with serving(Takes(at_once=True)) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(frame(Opcode.BINARY, bytes(70_000)) + close())
        await until(wire.transport.is_reading)
        assert connection.state is State.CLOSING


async def test_connection_that_stands_still_reads_nothing_in_its_next_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process may serve it by then."""
    async with serving(Takes(at_once=True), handoff="websocket") as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(frame(Opcode.BINARY, bytes(200_000)))
        connection.handoff = Handoff(rig.connections, ready=lambda _: None)
        connection.handoff.stage = Stage.OFFERED
        await turns()
        assert not wire.transport.is_reading()
        connection.hung_up(is_gone=False)
        assert connection._taken_bytes() is None
        assert not wire.transport.is_aborted
        connection.handoff = None


# -- the cutter ------------------------------------------------------------------------------------------------


def read_whole(data: bytes) -> list[tuple[int, bytes, bool]]:
    """What the library makes of frames, with neighbouring parts of one message joined."""
    reader = Protocol(Side.SERVER, state=ProtocolState.OPEN, max_size=None)
    reader.receive_data(data)
    assert reader.parser_exc is None
    messages: list[tuple[int, bytes, bool]] = []
    begun: list[Any] = []
    for each in reader.events_received():
        assert isinstance(each, Frame)
        if each.opcode in (Opcode.PING, Opcode.PONG):
            messages.append((each.opcode, bytes(each.data), True))
            continue
        begun = begun if each.opcode is Opcode.CONT else [each.opcode, b""]
        begun[1] += bytes(each.data)
        if each.fin:
            messages.append((begun[0], begun[1], True))
    return messages


@settings(max_examples=60)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 125, 126, 4095, 4096, 4097, 65535, 65536, 100_001]), max_size=4),
    places=st.lists(st.integers(0, 300_000), max_size=8),
    fins=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_what_is_cut_means_the_same(lengths: list[int], places: list[int], fins: list[bool]) -> None:
    stream, is_begun = b"", False
    for length, fin in zip(lengths, fins, strict=False):
        stream += frame(Opcode.CONT if is_begun else Opcode.BINARY, os.urandom(length), fin=fin)
        stream += frame(Opcode.PING, b"p")
        is_begun = not fin
    cutter, cut = Cutter(1 << 24), b""
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    for begin, end in itertools.pairwise(edges):
        cutter.add(stream[begin:end])
        while (piece := cutter.next(0)) is not None:
            cut += piece
        cutter.settle()
        assert len(cutter.rest) - cutter.place < PART_BYTES_MIN + 14
    assert cutter.is_between_frames
    assert read_whole(cut) == read_whole(stream)


def test_compressed_frame_is_cut_by_what_becomes_of_it() -> None:
    cutter = Cutter(1 << 24)
    cutter.add(marked(frame(Opcode.BINARY, bytes(40_000))))
    sizes = []
    for became in (512 * 1000, 128 * 1000, 128, 4096, 4096 * 4):
        piece = cutter.next(0)
        assert piece is not None
        sizes.append(len(piece))
        cutter.inflated(len(piece), became)
    assert sizes[0] < 512 + 9
    assert sizes[1] < 200
    assert max(sizes) <= COMPRESSED_BYTES_MAX + 8


@pytest.mark.parametrize(
    ("data", "size", "code"),
    [
        (b"\x89\xfe\x00\x7emask", 0, 1002),
        (b"\x82\xfe\x10\x00mask", 0, 1009),
        (b"\x80\xfe\x03\xe8mask", 1, 1009),
        (b"\xc2\xff" + b"\xff" * 8 + b"mask", 0, 1009),
    ],
)
def test_cutter_refuses_by_the_head(data: bytes, size: int, code: int) -> None:
    cutter = Cutter(1000)
    cutter.add(data)
    with pytest.raises(Violation) as caught:
        cutter.next(size)
    assert caught.value.code == code
