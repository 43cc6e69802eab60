"""hotport's TLS transport, on both event loops: flow, endings, and what is no TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from hotport.worker.tlssession import Session
from hotport.worker.tlstransport import TlsTransport
from tests.support import DEADLINE_S
from tests.tls_support import Pki

pytestmark = pytest.mark.anyio

TLS12 = ssl.TLSVersion.TLSv1_2

#: More than the kernel takes of it at once.
LARGE = os.urandom(1 << 20) * 8


class Client:
    """The client's end of a connection, which decides when anything is sent and read."""

    def __init__(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._received, self._sent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._received, self._sent, server_hostname="localhost")

    def hello(self) -> bytes:
        """The first flight, not sent."""
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        return self._sent.read()

    def sealed(self, data: bytes) -> bytes:
        """Records with `data` that are not sent."""
        self.tls.write(data)
        return self._sent.read()

    def goodbye(self) -> bytes:
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        return self._sent.read()

    async def send_raw(self, data: bytes) -> None:
        await self._loop.sock_sendall(self.sock, data)

    async def send(self, data: bytes) -> None:
        await self.send_raw(self.sealed(data))

    async def shake_hands(self) -> None:
        await self._read(self.tls.do_handshake)
        await self.send_raw(self._sent.read())

    async def shake_hands_and_send(self, data: bytes, more: Callable[[], bytes] = bytes) -> None:
        """Send the handshake's last records and `data` together."""
        await self._read(self.tls.do_handshake)
        self.tls.write(data)
        last = self._sent.read()
        await self.send_raw(last + more())

    async def receive(self) -> bytes:
        """The next data; nothing after the server's goodbye."""
        try:
            data: bytes = await self._read(lambda: self.tls.read(1 << 16))
        except ssl.SSLZeroReturnError:
            return b""
        return data

    async def _read(self, step: Callable[[], Any]) -> Any:
        with anyio.fail_after(DEADLINE_S):
            while True:
                try:
                    return step()
                except ssl.SSLWantReadError:
                    if self._sent.pending:
                        await self.send_raw(self._sent.read())
                    data = await self._loop.sock_recv(self.sock, 1 << 18)
                    if not data:
                        raise EOFError from None
                    self._received.write(data)

    async def receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = await self.receive()
            assert more, f"the end after {len(data)} bytes"
            data += more
        return data


class Above(asyncio.Protocol):
    """A protocol that notes what happens to it."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.events: list[str] = []
        self.data = b""
        self.lost: list[Exception | None] = []
        self.stays_open = False
        self.news = asyncio.Event()

    def note(self, event: str) -> None:
        self.events.append(event)
        self.news.set()

    async def until(self, claim: Callable[[], bool]) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not claim():
                self.news.clear()
                await self.news.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.note("made")

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.note("data")

    def eof_received(self) -> bool:
        self.note("eof")
        return self.stays_open

    def pause_writing(self) -> None:
        self.note("pause")

    def resume_writing(self) -> None:
        self.note("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.note("lost")


class BufferedAbove(Above, asyncio.BufferedProtocol):
    """The same, into a buffer of four bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(4)

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data += bytes(self.buffer[:nbytes])
        self.note("data")


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def server(pki: Pki) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.issue("server.pem", "localhost"))
    context.set_alpn_protocols(["http/1.1"])
    return context


@contextlib.asynccontextmanager
async def attached(
    pki: Pki,
    server: ssl.SSLContext,
    above: Above,
    *,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    ciphers: str = "",
    handshake_timeout_s: float = DEADLINE_S,
    goodbye_timeout_s: float = DEADLINE_S,
) -> AsyncIterator[tuple[Client, TlsTransport]]:
    """A client that is connected to `above`, before the handshake."""
    context = pki.client()
    context.maximum_version = version
    context.set_alpn_protocols(["http/1.1"])
    if ciphers:
        context.set_ciphers(ciphers)
    ours, theirs = socket.socketpair()
    client = Client(theirs, context)
    transport = TlsTransport(
        above, Session(server), handshake_timeout_s=handshake_timeout_s, goodbye_timeout_s=goodbye_timeout_s
    )
    with theirs:
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lose = transport.connection_lost

        class Below(asyncio.Protocol):  # only to learn of the end
            connection_made = transport.connection_made
            data_received = transport.data_received
            eof_received = transport.eof_received
            pause_writing = transport.pause_writing
            resume_writing = transport.resume_writing

            def connection_lost(self, exc: Exception | None) -> None:
                lose(exc)
                ended.set_result(None)

        await asyncio.get_running_loop().connect_accepted_socket(Below, ours)
        try:
            yield client, transport
        finally:
            transport.abort()
            await asyncio.wait_for(ended, DEADLINE_S)
            if transport.handshake.done():
                transport.handshake.exception()  # marks it as retrieved


@pytest.mark.parametrize("above_class", [Above, BufferedAbove])
@pytest.mark.parametrize(
    ("version", "ciphers"),
    [
        (ssl.TLSVersion.TLSv1_3, ""),
        (TLS12, "ECDHE+AESGCM"),
        (TLS12, "ECDHE+CHACHA20"),
        (TLS12, "ECDHE-ECDSA-AES256-SHA384:ECDHE-RSA-AES256-SHA384"),
    ],
    ids=["1.3", "1.2 AES-GCM", "1.2 ChaCha20", "1.2 CBC"],
)
async def test_data_arrives_whole_both_ways_however_it_is_cut(
    pki: Pki, server: ssl.SSLContext, above_class: type[Above], version: ssl.TLSVersion, ciphers: str
) -> None:
    above = above_class()
    async with attached(pki, server, above, version=version, ciphers=ciphers) as (client, transport):
        await client.shake_hands()
        sizes = (1, 5, 100, 16384, 16385, 40000)
        parts = [os.urandom(size) for size in sizes]
        records = b"".join(client.sealed(part) for part in parts)
        for cut in (1, 4, 7, 500, 16000, 40000):  # bytes in a row, as far as this process can have it
            await client.send_raw(records[:cut])
            records = records[cut:]
            await asyncio.sleep(0)
        await client.send_raw(records)
        whole = b"".join(parts)
        await above.until(lambda: len(above.data) >= len(whole))
        assert above.data == whole
        for part in parts:
            transport.write(part)
        transport.write(bytearray(parts[2]))
        transport.write(memoryview(parts[4])[1:])
        transport.write(b"")
        transport.writelines(parts)
        expected = whole + parts[2] + parts[4][1:] + whole
        assert await client.receive_exactly(len(expected)) == expected
        with pytest.raises(TypeError):
            transport.write("text")  # type: ignore[arg-type]


async def test_a_handshake_may_come_in_single_bytes_with_data_behind_it(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, _):
        for byte in client.hello():
            await client.send_raw(bytes((byte,)))
            await asyncio.sleep(0)
        await client.shake_hands_and_send(b"first")
        await above.until(lambda: above.data == b"first")
        assert above.events == ["made", "data"]


async def test_what_is_known_of_a_connection(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        tls = transport.get_extra_info("ssl_object")
        assert tls.selected_alpn_protocol() == "http/1.1"
        assert transport.get_extra_info("cipher") == client.tls.cipher()
        assert transport.get_extra_info("sslcontext") is server
        assert transport.get_extra_info("compression", "other") is None
        assert transport.get_extra_info("peercert") is None
        assert transport.get_extra_info("socket").fileno() >= 0
        assert transport.get_extra_info("nonsense", "default") == "default"
        assert transport.get_protocol() is above
        assert transport.handshake.result() is None


# -- flow -----------------------------------------------------------------------------------------------


async def test_a_protocol_is_told_to_pause_and_all_that_is_unsent_is_known(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        transport.set_write_buffer_limits(high=1000, low=10)
        assert transport.get_write_buffer_limits() == (10, 1000)
        transport.write(LARGE)
        await above.until(lambda: "pause" in above.events)
        assert transport.get_write_buffer_size() > len(LARGE) // 2
        assert await client.receive_exactly(len(LARGE)) == LARGE
        await above.until(lambda: above.events[-1] == "resume")
        transport.set_write_buffer_limits(high=0)
        assert transport.get_write_buffer_size() == 0


async def test_nothing_is_delivered_while_reading_is_paused(pki: Pki, server: ssl.SSLContext) -> None:
    """The end neither, nor what comes together with the handshake's last record."""

    class Paused(Above):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.transport.pause_reading()
            self.transport.pause_reading()

    above = Paused()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands_and_send(b"early", client.goodbye)
        await above.until(lambda: "made" in above.events)
        assert not transport.is_reading()
        for _ in range(20):
            await asyncio.sleep(0)
        assert above.events == ["made"]
        transport.resume_reading()
        transport.resume_reading()
        await above.until(lambda: "lost" in above.events)
        assert above.events == ["made", "data", "eof", "lost"]
        assert (above.data, above.lost) == (b"early", [None])


async def test_the_end_waits_for_a_protocol_that_pauses_when_it_gets_data(pki: Pki, server: ssl.SSLContext) -> None:
    class Pausing(Above):
        def data_received(self, data: bytes) -> None:
            self.transport.pause_reading()
            super().data_received(data)

    above = Pausing()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send_raw(client.sealed(b"last") + client.goodbye())
        await above.until(lambda: above.data == b"last")
        assert above.events == ["made", "data"]
        transport.resume_reading()
        await above.until(lambda: "lost" in above.events)
        assert above.events == ["made", "data", "eof", "lost"]


async def test_an_application_can_send_a_file(
    pki: Pki, server: ssl.SSLContext, tmp_path: Path, anyio_backend: tuple[str, dict[str, Any]]
) -> None:
    """asyncio's event loop alone has ``sendfile``; it copies."""
    above = Above()
    file = tmp_path / "file"
    await anyio.Path(file).write_bytes(LARGE)
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        loop = asyncio.get_running_loop()
        with open(file, "rb") as opened:  # noqa: ASYNC230  a local file, as ``sendfile`` wants it
            if not isinstance(loop, asyncio.BaseEventLoop):
                with pytest.raises(NotImplementedError):
                    await loop.sendfile(transport, opened)
                return
            sending = asyncio.create_task(loop.sendfile(transport, opened))
            assert await client.receive_exactly(len(LARGE)) == LARGE
            assert await sending == len(LARGE)
        await client.send(b"y")
        await above.until(lambda: above.data == b"xy")


# -- endings --------------------------------------------------------------------------------------------


async def test_a_client_that_has_said_goodbye_gets_its_answer(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    above.stays_open = True
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send_raw(client.sealed(b"question") + client.goodbye())
        client.sock.shutdown(socket.SHUT_WR)
        await above.until(lambda: "eof" in above.events)
        assert not transport.is_closing()
        transport.write(LARGE)
        transport.close()
        assert transport.is_closing()
        assert await client.receive_exactly(len(LARGE)) == LARGE
        assert await client.receive() == b""
        await above.until(lambda: "lost" in above.events)
        assert above.lost == [None]


@pytest.mark.parametrize("version", [TLS12, ssl.TLSVersion.TLSv1_3])
async def test_the_servers_goodbye_leaves_the_other_direction_open_in_tls_13_only(
    pki: Pki, server: ssl.SSLContext, version: ssl.TLSVersion
) -> None:
    above = Above()
    above.stays_open = True
    async with attached(pki, server, above, version=version) as (client, transport):
        await client.shake_hands()
        await client.send(b"one ")
        await above.until(lambda: "data" in above.events)
        if version == TLS12:
            assert not transport.can_write_eof()
            with pytest.raises(NotImplementedError):
                transport.write_eof()
            await client.send_raw(client.goodbye())
        else:
            transport.write(b"all")
            transport.write_eof()
            transport.write_eof()
            assert await client.receive() == b"all"
            assert await client.receive() == b""
            with pytest.raises(RuntimeError, match="write_eof"):
                transport.write(b"more")
            await client.send(b"two ")
            await above.until(lambda: above.data == b"one two ")
            assert not transport.is_closing()
            await client.send_raw(client.goodbye())
        await above.until(lambda: "lost" in above.events)
        assert above.events[-2:] == ["eof", "lost"]
        assert above.lost == [None]


async def test_close_drops_what_comes_and_waits_for_the_clients_goodbye(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        transport.pause_reading()
        transport.write(b"last")
        transport.close()
        transport.close()
        transport.write(b"too late")
        assert await client.receive() == b"last"
        await client.send(b"dropped")
        assert await client.receive() == b""
        await client.send_raw(client.goodbye())
        await above.until(lambda: "lost" in above.events)
        assert (above.data, above.lost, above.events[-1]) == (b"x", [None], "lost")
        assert transport.is_closing()


async def test_a_client_that_says_no_goodbye_is_not_waited_for_for_ever(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above, goodbye_timeout_s=0.05) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        transport.close()
        await above.until(lambda: "lost" in above.events)
        assert isinstance(above.lost[0], TimeoutError)


async def test_an_end_without_goodbye_is_an_end(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    above.stays_open = True
    async with attached(pki, server, above) as (client, _):
        await client.shake_hands()
        await client.send_raw(client.sealed(b"x") + client.sealed(b"never ends")[:-1])
        client.sock.shutdown(socket.SHUT_WR)
        await above.until(lambda: "lost" in above.events)
        assert (above.data, above.events[-2:], above.lost) == (b"x", ["eof", "lost"], [None])


async def test_abort_ends_without_a_word(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, transport):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        transport.abort()
        with pytest.raises((EOFError, ConnectionResetError)):
            await client.receive()
        await above.until(lambda: "lost" in above.events)
        assert above.lost == [None]
        transport.write(b"too late")
        transport.close()


# -- what is no TLS -------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["garbage", "forged", "too long", "alert"])
async def test_what_breaks_a_connection_is_answered_with_an_alert(pki: Pki, server: ssl.SSLContext, what: str) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, _):
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "data" in above.events)
        record = client.sealed(b"never arrives")
        await client.send_raw(
            {
                "garbage": b"GET / HTTP/1.1\r\n\r\n",
                "forged": record[:-1] + bytes((record[-1] ^ 1,)),
                "too long": b"\x17\x03\x03\xff\xff",
                "alert": b"\x15\x03\x03\x00\x02\x02\x28",
            }[what]
        )
        with pytest.raises((ssl.SSLError, EOFError) if what == "alert" else ssl.SSLError):
            await client.receive()
        await above.until(lambda: "lost" in above.events)
        assert above.data == b"x"
        assert isinstance(above.lost[0], ssl.SSLError)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b""),  # OpenSSL knows that it could not read an alert
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", b"\x15\x03\x03\x00\x02\x02\x32"),  # decode_error
        (b"\x16\x03\x03\xff\xff", b"\x15\x03\x03\x00\x02\x02\x16"),  # record_overflow
    ],
    ids=["HTTP", "broken", "too long"],
)
async def test_a_handshake_that_fails_is_answered_with_an_alert(
    pki: Pki, server: ssl.SSLContext, said: bytes, answer: bytes
) -> None:
    above = Above()
    async with attached(pki, server, above) as (client, transport):
        await client.send_raw(said)
        with anyio.fail_after(DEADLINE_S):
            assert await asyncio.get_running_loop().sock_recv(client.sock, 100) == answer
            with pytest.raises(ssl.SSLError):
                await transport.handshake
        assert above.events == []


async def test_a_handshake_that_does_not_end_is_ended(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    async with attached(pki, server, above, handshake_timeout_s=0.05) as (_, transport):
        with anyio.fail_after(DEADLINE_S), pytest.raises(TimeoutError, match="the TLS handshake takes more than"):
            await transport.handshake
        transport.close()
        assert above.events == []


async def test_a_connection_may_end_before_its_handshake_has_begun(pki: Pki, server: ssl.SSLContext) -> None:
    above = Above()
    transport = TlsTransport(above, Session(server), handshake_timeout_s=1, goodbye_timeout_s=1)
    transport.close()
    ours, theirs = socket.socketpair()
    with theirs:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: transport, ours)
        with anyio.fail_after(DEADLINE_S), pytest.raises(ConnectionAbortedError):
            await transport.handshake
    assert above.events == []


async def test_a_buffered_protocol_must_have_room(pki: Pki, server: ssl.SSLContext) -> None:
    above = BufferedAbove()
    above.buffer = bytearray()
    async with attached(pki, server, above) as (client, _):
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        await client.shake_hands()
        await client.send(b"x")
        await above.until(lambda: "lost" in above.events)
        assert isinstance(above.lost[0], RuntimeError)
        assert reported == above.lost
