"""Streams and protocols go on in the next generation, with the state that they have exported."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from anyio.streams.buffered import BufferedByteReceiveStream

import hotport
from hotport.adapters.protocol import Transferable
from hotport.model.fates import Fate
from tests.adapters.asgi_support import turns, until
from tests.worker.handoff_support import DEADLINE_S, Generation, Service, service

pytestmark = pytest.mark.anyio


class Peer:
    """A client that talks in lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def line(self) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return (await self._reader.readline()).decode().rstrip()

    async def read(self, size: int) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.readexactly(size)

    async def ask(self, text: str) -> str:
        self.send(f"{text}\n".encode())
        return await self.line()


@contextlib.asynccontextmanager
async def connected(tmp_path: Path, app: Any, **options: Any) -> AsyncIterator[tuple[Service, Generation, Peer]]:
    async with service(tmp_path) as port:
        old = await port.start(app, **options)
        await old.server.accept()
        reader, writer = await asyncio.open_connection(*port.address)
        await until(lambda: len(old.connections.open) == 1)
        try:
            yield port, old, Peer(reader, writer)
        finally:
            writer.close()


async def leave(port: Service, old: Generation, app: Any) -> tuple[Generation, asyncio.Future[Any]]:
    new = await port.start(app)
    task = asyncio.ensure_future(old.leave(new))
    await until(old.connections.draining.is_set)
    return new, task


# -- streams ------------------------------------------------------------------------------------------------


@hotport.restartable
async def counting(stream: hotport.Stream) -> None:
    """Counts the lines of a client over all generations; keeps half a line in its state, too."""
    count, rest = stream.state or (0, "")
    async for chunk in stream:
        *lines, rest = (rest + chunk.decode()).split("\n")
        for line in lines:
            count += 1
            await stream.send(f"{count} {line}\n".encode())
        stream.state = (count, rest)


async def choosing(stream: hotport.Stream) -> None:
    """Moves only behind a line that says so."""
    heard = list(stream.state or ())
    if heard:
        await stream.send(f"resumed {heard}\n".encode())
    buffered = BufferedByteReceiveStream(stream)
    while True:
        line = (await buffered.receive_until(b"\n", 100)).decode()
        heard.append(line)
        await stream.send(f"{line}\n".encode())
        if line == "move":
            await hotport.hand_off(heard)


async def stubborn(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def test_restartable_handler_goes_on_with_its_state_and_half_a_line(tmp_path: Path) -> None:
    async with connected(tmp_path, counting) as (port, serving, peer):
        for number in range(1, 6):
            assert await peer.ask("x") == f"{3 * number - 2} x"
            assert await peer.ask("y") == f"{3 * number - 1} y"
            peer.send(b"ha")
            (stream,) = serving.connections.open
            await until(lambda stream=stream, number=number: stream.state == (3 * number - 1, "ha"))  # type: ignore[misc]
            serving, fates = await port.replace(serving, counting)
            assert fates == {"moved_stream": 1}
            assert await peer.ask("lf") == f"{3 * number} half"


async def test_handler_moves_where_it_says_so_and_nowhere_else(tmp_path: Path) -> None:
    async with connected(tmp_path, choosing) as (port, old, peer):
        assert await peer.ask("move") == "move"  # nobody leaves: it returns at once
        assert await peer.ask("a") == "a"
        _, task = await leave(port, old, choosing)
        assert await peer.ask("b") == "b"
        assert old.connections.open
        assert await peer.ask("move") == "move"
        assert await task == {"moved_stream": 1}
        assert await peer.line() == "resumed ['move', 'a', 'b', 'move']"
        assert await peer.ask("c") == "c"


async def test_bytes_that_a_handler_has_not_received_travel(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def waits(stream: hotport.Stream) -> None:
        if stream.state is None:
            await stream.receive(1)
            await gate.wait()
            await stream.hand_off("moved")
            raise AssertionError("it has moved")
        received = b""
        while len(received) < 5:
            received += await stream.receive()
        await stream.send(received)

    async with connected(tmp_path, waits) as (port, old, peer):
        peer.send(b"xhello")
        (stream,) = old.connections.open
        await until(lambda: bytes(stream._unread) == b"hello")  # type: ignore[attr-defined]
        _, task = await leave(port, old, waits)
        gate.set()
        assert await peer.read(5) == b"hello"
        assert await task == {"moved_stream": 1}


async def test_handler_that_does_not_agree_is_told_and_then_cut(tmp_path: Path) -> None:
    async with connected(tmp_path, stubborn) as (port, old, peer):
        assert await peer.ask("a") == "a"
        new = await port.start(stubborn)
        assert await old.leave(new, timeout_s=0.05) == {"cut_stream": 1}


async def test_hand_off_returns_when_nobody_takes_the_connection(tmp_path: Path) -> None:
    async with connected(tmp_path, choosing) as (port, old, peer):
        await port.start(choosing, maximum=1)
        full = port.generations[-1]
        await full.server.accept()
        old.server.quiesce()
        _, writer = await asyncio.open_connection(*port.address)
        await until(lambda: len(full.connections.open) == 1)
        task = asyncio.ensure_future(old.leave(full))
        await until(old.connections.draining.is_set)
        assert await peer.ask("move") == "move"
        assert await peer.ask("still here") == "still here"
        peer.writer.close()
        assert await task == {"finished": 1}
        writer.close()


async def test_sender_beside_a_receiver_waits_and_then_finds_the_stream_closed(tmp_path: Path) -> None:
    ends: list[str] = []

    @hotport.restartable
    async def pushing(stream: hotport.Stream) -> None:
        number = 2 if stream.state else 1
        stream.state = True

        async def push() -> None:
            try:
                while True:
                    await stream.send(b"%d" % number)
            except (anyio.ClosedResourceError, anyio.BrokenResourceError) as error:
                ends.append(type(error).__name__)

        task = asyncio.ensure_future(push())
        try:
            await stream.receive()
        finally:
            await task

    async with connected(tmp_path, pushing) as (port, old, peer):
        received = await peer.read(20)
        _, task = await leave(port, old, pushing)
        while not received.endswith(b"2"):
            received += await peer.read(1)
        assert await task == {"moved_stream": 1}
        assert bytes(sorted(received)) == received
        assert ends == ["ClosedResourceError"]
        peer.writer.close()
        await until(lambda: len(ends) == 2)


async def test_state_of_a_stream_that_cannot_travel_keeps_it_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @hotport.restartable
    async def wrong(stream: hotport.Stream) -> None:
        stream.state = stream
        await stubborn(stream)

    async with connected(tmp_path, wrong) as (port, old, peer):
        assert await peer.ask("a") == "a"
        _, task = await leave(port, old, wrong)
        await until(lambda: "cannot travel" in caplog.text)
        assert await peer.ask("b") == "b"
        peer.writer.close()
        assert await task == {"finished": 1}


# -- protocols ----------------------------------------------------------------------------------------------


class Counter(asyncio.Protocol):
    """Counts lines; declines while half a line is there, or while it is told to."""

    busy = False
    asks: list[Any] = []  # noqa: RUF012  read by the one test that resets it
    ends: list[Exception | None] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.count = 0
        self.rest = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.ends.append(exc)

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.transport.write(b"%d %b\n" % (self.count, line))

    def export_state(self) -> Any:
        return None if self.rest or self.busy else {"count": self.count}

    def import_state(self, state: Any) -> None:
        self.count = state["count"]

    def transfer_wanted(self, ask: Any) -> None:
        self.asks.append(ask)


class Buffered(asyncio.BufferedProtocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.buffer = bytearray(64)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.transport.write(bytes(self.buffer[:nbytes]))

    def export_state(self) -> Any:
        return True

    def import_state(self, state: Any) -> None:
        assert state is True


class Immovable(asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        pass


async def test_protocol_goes_on_with_its_state(tmp_path: Path) -> None:
    assert isinstance(Counter(), Transferable)
    Counter.ends.clear()
    async with connected(tmp_path, Counter) as (port, serving, peer):
        for number in range(1, 5):
            assert await peer.ask("x") == f"{number} x"
            serving, fates = await port.replace(serving, Counter)
            assert fates == {"moved_protocol": 1}
        assert Counter.ends == [None] * 4


async def test_protocol_that_declines_is_asked_again_when_its_client_has_sent_more(tmp_path: Path) -> None:
    async with connected(tmp_path, Counter) as (port, old, peer):
        peer.send(b"ha")
        (tracked,) = old.connections.open
        await until(lambda: tracked._application.rest == b"ha")  # type: ignore[attr-defined]
        _, task = await leave(port, old, Counter)
        assert old.connections.open
        assert await peer.ask("lf") == "1 half"
        assert await task == {"moved_protocol": 1}
        assert await peer.ask("x") == "2 x"


async def test_protocol_that_declines_asks_when_it_has_become_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Counter.asks.clear()
    monkeypatch.setattr(Counter, "busy", True)
    async with connected(tmp_path, Counter) as (port, old, peer):
        assert await peer.ask("x") == "1 x"
        _, task = await leave(port, old, Counter)
        await until(lambda: bool(Counter.asks))
        assert not task.done()
        monkeypatch.setattr(Counter, "busy", False)
        Counter.asks[0]()
        assert await task == {"moved_protocol": 1}
        assert await peer.ask("x") == "2 x"


async def test_buffered_protocol_goes_on(tmp_path: Path) -> None:
    async with connected(tmp_path, Buffered) as (port, old, peer):
        assert await peer.ask("x") == "x"
        _, fates = await port.replace(old, Buffered)
        assert fates == {"moved_protocol": 1}
        assert await peer.ask("y") == "y"


@pytest.mark.parametrize("successor", [Immovable, counting], ids=["no import_state", "another kind"])
async def test_protocol_that_the_next_generation_cannot_take_stays_here(tmp_path: Path, successor: Any) -> None:
    async with connected(tmp_path, Counter) as (port, old, peer):
        _, task = await leave(port, old, successor)
        await until(lambda: not any(each.handoff for each in old.connections.open))  # type: ignore[attr-defined]
        assert await peer.ask("x") == "1 x"
        peer.writer.close()
        assert await task == {"finished": 1}


async def test_import_that_raises_leaves_the_connection_with_the_old_generation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Counter):
        def import_state(self, state: Any) -> None:
            raise KeyError("count")

    async with connected(tmp_path, Counter) as (port, old, peer):
        _, task = await leave(port, old, Broken)
        await until(lambda: "could not import" in caplog.text)
        assert await peer.ask("x") == "1 x"
        peer.writer.close()
        assert await task == {"finished": 1}


async def test_export_that_raises_or_cannot_travel_keeps_the_connection_here(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Counter):
        def export_state(self) -> Any:
            return {"transport": self.transport}

    async with connected(tmp_path, Broken) as (port, old, peer):
        _, task = await leave(port, old, Broken)
        await until(lambda: "could not export" in caplog.text)
        assert await peer.ask("x") == "1 x"
        peer.writer.close()
        assert await task == {"finished": 1}


@pytest.mark.parametrize("app", [counting, Counter], ids=["stream", "protocol"])
async def test_over_tls_nothing_moves_and_nothing_is_lost(tmp_path: Path, app: Any) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    issued.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with service(tmp_path) as port:
        old = await port.start(app, tls_cert=(str(tmp_path / "cert.pem"),))
        await old.server.accept()
        reader, writer = await asyncio.open_connection(*port.address, ssl=context, server_hostname="localhost")
        peer = Peer(reader, writer)
        assert await peer.ask("x") == "1 x"
        new = await port.start(app, tls_cert=(str(tmp_path / "cert.pem"),))
        task = asyncio.ensure_future(old.leave(new))
        await until(old.connections.draining.is_set)
        (connection,) = old.connections.open
        assert "TLS" in connection.why_here()
        assert await peer.ask("y") == "2 y"
        writer.close()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            await writer.wait_closed()
        assert await task == {"finished": 1}


# -- what goes wrong meanwhile ------------------------------------------------------------------------------


async def test_handler_that_fails_when_its_connection_moves_does_not_reset_it(tmp_path: Path) -> None:
    """A reset is an option of the socket, which the next process shares: its last bytes would never arrive."""

    @hotport.restartable
    async def failing(stream: hotport.Stream) -> None:
        try:
            await stream.receive()
        except asyncio.CancelledError:
            raise RuntimeError("it does not like to be cancelled") from None

    @hotport.restartable
    async def closing(stream: hotport.Stream) -> None:
        sock = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        linger = sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        await stream.send(b"%d\n" % any(linger))

    async with connected(tmp_path, failing) as (port, old, peer):
        _, fates = await port.replace(old, closing)
        assert fates == {"moved_stream": 1}
        assert await peer.line() == "0"


@pytest.mark.parametrize("is_taken", [True, False])
async def test_handler_that_fails_while_its_connection_stands_still_resets_it_only_if_it_stays(
    tmp_path: Path, is_taken: bool
) -> None:
    ends: list[asyncio.Timeout] = []

    @hotport.restartable
    async def impatient(stream: hotport.Stream) -> None:
        async with asyncio.timeout(None) as end:
            ends.append(end)
            await stream.receive()

    async with connected(tmp_path, impatient) as (_, old, peer):
        (stream,) = old.connections.open
        assert isinstance(stream, hotport.Stream)
        await until(lambda: stream._reader is not None)
        assert stream.prepare_handoff(lambda _: None)
        offer = stream.offer()
        assert offer is not None
        with socket.socket(fileno=os.dup(offer.fd)) as taken:  # as the process has it that takes it
            ends[0].reschedule(0)
            await until(lambda: stream._is_closed)
            if is_taken:
                old.connections.closed(stream, Fate.MOVED_STREAM)
                stream.release()
                await turns()
                assert not any(taken.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)), "its close would be a reset"
                await asyncio.get_running_loop().sock_sendall(taken, b"goes on\n")
                assert await peer.line() == "goes on"
            else:
                taken.close()
                stream.keep()
                with pytest.raises(ConnectionResetError):
                    await peer.line()


async def test_end_of_our_side_waits_while_the_connection_stands_still(tmp_path: Path) -> None:
    """It ends the connection for every process that has it, and the next one would not know."""
    async with connected(tmp_path, counting) as (_, old, peer):
        (stream,) = old.connections.open
        assert isinstance(stream, hotport.Stream)
        await until(lambda: stream._reader is not None)
        assert stream.prepare_handoff(lambda _: None)
        assert stream.offer() is not None
        ending = asyncio.ensure_future(stream.send_eof())
        await turns()
        assert not ending.done()
        stream.keep()
        await ending
        assert await peer.line() == ""


async def test_worker_waits_until_a_handler_has_cleaned_up_whose_connection_has_moved(tmp_path: Path) -> None:
    """The worker ended at once, and cancelled it in the middle of that."""
    is_clean = False
    may_clean = asyncio.Event()

    @hotport.restartable
    async def tidy(stream: hotport.Stream) -> None:
        nonlocal is_clean
        try:
            await stream.receive()
        finally:
            await may_clean.wait()
            is_clean = True

    async with connected(tmp_path, tidy) as (port, old, _):
        new, task = await leave(port, old, counting)
        await until(lambda: len(new.connections.open) == 1 and not old.connections.open)
        await turns()
        assert not task.done()
        may_clean.set()
        assert await task == {"moved_stream": 1}
        assert is_clean


async def test_stream_that_stays_keeps_waiting_for_a_client_that_reads_slowly(tmp_path: Path) -> None:
    """When nobody took it any more, its handler could send without end into a buffer."""
    sent = 0

    async def sending(stream: hotport.Stream) -> None:
        nonlocal sent
        while True:
            await stream.send(bytes(1 << 20))
            sent += 1

    async with connected(tmp_path, sending) as (_, old, _peer):
        (stream,) = old.connections.open
        assert isinstance(stream, hotport.Stream)
        await until(lambda: not stream._is_writable.is_set())
        assert stream.prepare_handoff(lambda _: None)
        before = sent
        stream.drain()
        await turns()
        assert sent == before
        assert not stream._is_writable.is_set()


@pytest.mark.parametrize("notice", ["drain_started", "transfer_wanted"])
async def test_protocol_that_fails_when_it_is_told_costs_nobody_else(
    tmp_path: Path, notice: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker ended with an exception, and with all of its connections."""

    class Failing(Counter):
        def __getattr__(self, name: str) -> Any:
            if name != notice:
                raise AttributeError(name)

            def fail(_: object) -> None:
                raise RuntimeError("told")

            return fail

    if notice == "transfer_wanted":
        Failing.transfer_wanted = property(lambda self: self.__getattr__("transfer_wanted"))  # type: ignore[assignment]
    async with connected(tmp_path, Failing) as (port, old, peer):
        if notice == "drain_started":
            task = asyncio.ensure_future(old.leave())
            await until(lambda: "the application failed" in caplog.text)
            assert await peer.ask("x") == "1 x"
            peer.writer.close()
            assert await task == {"finished": 1}
        else:
            _, fates = await port.replace(old, Counter)
            assert fates == {"moved_protocol": 1}
            assert "the application failed" in caplog.text
