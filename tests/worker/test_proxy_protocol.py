"""Connections that begin with a PROXY header: who is told what, and what becomes of those without one."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from anyio.abc import SocketAttribute

import hotport
from hotport.address import parse_address
from hotport.errors import StartError
from hotport.worker import acceptor
from tests.adapters.asgi_support import until
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio

V1 = b"PROXY TCP4 192.0.2.1 198.51.100.2 4711 443\r\n"
V2 = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"
    + bytes([192, 0, 2, 1, 198, 51, 100, 2])
    + (4711).to_bytes(2, "big")
    + (443).to_bytes(2, "big")
)
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
TOLD = {"client": ["192.0.2.1", 4711], "server": ["198.51.100.2", 443], "scheme": "http"}


async def tell(scope: Any, receive: Any, send: Any) -> None:
    told = {key: scope[key] for key in TOLD}
    body = json.dumps(told).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]}
    )
    await send({"type": "http.response.body", "body": body})


async def tell_stream(stream: hotport.Stream) -> None:
    addresses = {
        "client": stream.extra(SocketAttribute.remote_address),
        "server": stream.extra(SocketAttribute.local_address),
    }
    assert await stream.receive() == b"G"  # and no byte of the header
    await stream.send(json.dumps({**addresses, "scheme": "http"}).encode())


class TellProtocol(asyncio.Protocol):
    addresses: Any = (None, None)

    def proxied(self, source: tuple[str, int], destination: tuple[str, int]) -> None:
        self.addresses = (source, destination)

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        assert data == b"G"
        client, server = self.addresses
        self.transport.write(json.dumps({"client": client, "server": server, "scheme": "http"}).encode())
        self.transport.close()


@asynccontextmanager
async def serving(app: Any, bind: str = "127.0.0.1:0", **options: Any) -> AsyncIterator[tuple[hotport.Server, Any]]:
    """A server that expects the header, and a function that connects to it."""
    options.setdefault("proxy_protocol", True)
    async with hotport.serve(app, bind=bind, **options) as server:
        address: Any = parse_address(server.addresses[0])

        async def connect() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX if bind.startswith("unix:") else socket.AF_INET)
            sock.setblocking(False)
            target = address.path if bind.startswith("unix:") else ("127.0.0.1", address.port)
            await asyncio.get_running_loop().sock_connect(sock, target)
            return sock

        yield server, connect


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the server closes, however it does that."""
    data = b""
    async with asyncio.timeout(DEADLINE_S):
        try:
            while more := await asyncio.get_running_loop().sock_recv(sock, 65536):
                data += more
        except ConnectionResetError:  # closed with bytes of ours unread
            pass
    sock.close()
    return data


async def told(sock: socket.socket) -> Any:
    """What the application has told of the connection."""
    return json.loads((await read_to_end(sock)).rpartition(b"\r\n")[2])


@pytest.fixture(params=["tcp", "unix"])
def bind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path / 'app.sock'}"


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_an_asgi_application_learns_whom_the_proxy_speaks_for(header: bytes, bind: str) -> None:
    async with serving(tell, bind) as (_, connect):
        sock = await connect()
        await send(sock, header + REQUEST + b"\r\n")
        assert await told(sock) == TOLD


@pytest.mark.parametrize("app", [tell_stream, TellProtocol])
async def test_so_do_streams_and_protocols(app: Any, bind: str) -> None:
    async with serving(app, bind) as (_, connect):
        sock = await connect()
        await send(sock, V2 + b"G")
        assert await told(sock) == TOLD


async def test_a_proxy_that_speaks_for_itself_is_the_client(bind: str) -> None:
    async with serving(tell, bind) as (_, connect):
        for header in (LOCAL, b"PROXY UNKNOWN\r\n"):
            sock = await connect()
            name = sock.getsockname()
            await send(sock, header + REQUEST + b"\r\n")
            assert (await told(sock))["client"] == (list(name) if name else None)


async def test_a_header_may_come_in_pieces_and_a_partial_one_does_not_keep_the_loop_busy(
    bind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte left in the socket would wake a level-triggered loop for ever."""
    wakeups = 0

    async def wait_readable(self: acceptor.Acceptor, sock: socket.socket) -> None:
        nonlocal wakeups
        wakeups += 1
        await original(self, sock)

    original = acceptor.Acceptor._wait_readable
    monkeypatch.setattr(acceptor.Acceptor, "_wait_readable", wait_readable)
    for header in (V1, V2):
        async with serving(tell, bind) as (server, connect):
            wakeups = 0
            sock = await connect()
            for position in range(len(header)):
                await until(lambda: wakeups == position + 1)  # noqa: B023  it has taken all that was sent
                await send(sock, header[position : position + 1])
            await send(sock, REQUEST + b"\r\n")
            assert await told(sock) == TOLD
            assert wakeups == len(header)
            assert server.connections.accepted == 1


async def test_the_header_comes_before_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    pem = tmp_path / "cert.pem"
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with serving(tell, tls_cert=str(pem)) as (_, connect):
        sock = await connect()
        await send(sock, V2)
        reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname="localhost")
        writer.write(REQUEST + b"\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert json.loads(answer.rpartition(b"\r\n")[2]) == {**TOLD, "scheme": "https"}


# -- whom to believe ----------------------------------------------------------------------------------------

FORWARDED = b"X-Forwarded-For: 203.0.113.5\r\nX-Forwarded-Proto: https\r\n"


@pytest.mark.parametrize("header", [V1, V2], ids=["v1", "v2"])
async def test_the_header_of_a_peer_that_is_not_trusted_is_malformed_http(header: bytes) -> None:
    async with serving(tell, trusted_proxy=["10.0.0.0/8", "unix"]) as (_, connect):
        sock = await connect()
        await send(sock, header + REQUEST + FORWARDED + b"\r\n")
        assert (await read_to_end(sock)).startswith(b"HTTP/1.1 400 ")


async def test_a_peer_that_is_not_trusted_speaks_for_itself() -> None:
    async with serving(tell, trusted_proxy=["10.0.0.0/8", "unix"]) as (_, connect):
        sock = await connect()
        name = list(sock.getsockname())
        await send(sock, REQUEST + FORWARDED + b"\r\n")
        found = await told(sock)
        assert (found["client"], found["scheme"]) == (name, "http")


async def test_without_the_option_no_header_is_expected_of_anybody(bind: str) -> None:
    async with serving(tell, bind, proxy_protocol=False) as (_, connect):
        sock = await connect()
        await send(sock, V1 + REQUEST + b"\r\n")
        assert (await read_to_end(sock)).startswith(b"HTTP/1.1 400 ")


async def test_fields_are_believed_by_whom_the_proxy_speaks_for(bind: str) -> None:
    """The proxy passes bytes through: X-Forwarded-For is the word of the client that it names."""
    for trusted, client, scheme in (
        (["127.0.0.1", "unix"], TOLD["client"], "http"),
        (["127.0.0.1", "unix", "192.0.2.1"], ["203.0.113.5", 0], "https"),
    ):
        async with serving(tell, bind, trusted_proxy=trusted) as (_, connect):
            sock = await connect()
            await send(sock, V2 + REQUEST + FORWARDED + b"\r\n")
            found = await told(sock)
            assert (found["client"], found["scheme"]) == (client, scheme)


# -- what is no header --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (REQUEST + b"\r\n", "begins with b'GET / HTTP/1"),
        (b"\x16\x03\x01", "begins with"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.2 4711 65536\r\n", "is not a port"),
        (V2[:13] + b"\xff", "family and transport"),
    ],
)
@pytest.mark.parametrize("app", [tell, tell_stream, TellProtocol])
async def test_a_trusted_peer_without_a_header_is_closed_with_a_line_in_the_log(
    app: Any, data: bytes, why: str, bind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hotport.acceptor")
    async with serving(app, bind) as (server, connect):
        sock = await connect()
        await send(sock, data)
        assert await read_to_end(sock) == b""
        assert not server.connections.open
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hotport.acceptor"]
    assert line.startswith("no PROXY header from ")
    assert why in line


async def test_a_peer_that_leaves_within_its_header_is_told_from_one_that_says_nothing(
    bind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hotport.acceptor")
    async with serving(tell, bind) as (server, connect):
        for data in (b"", V1[:20]):
            sock = await connect()
            await send(sock, data)
            sock.shutdown(socket.SHUT_WR)
            assert await read_to_end(sock) == b""
        assert not server.connections.open
    (line,) = [record.getMessage() for record in caplog.records if record.name == "hotport.acceptor"]
    assert "its end is missing" in line


async def test_a_header_that_does_not_come_is_not_waited_for_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "hotport.acceptor")
    monkeypatch.setattr(acceptor, "PROXY_HEADER_TIMEOUT_S", 0.05)
    async with serving(tell) as (server, connect):
        sock = await connect()
        await send(sock, V2[:14])
        assert await read_to_end(sock) == b""
        assert not server.connections.open
    assert "it has not come within 0.05 s" in caplog.text


# -- leaving ------------------------------------------------------------------------------------------------


async def accepted(server: hotport.Server) -> None:
    await until(lambda: bool(server.connections.accepted))


async def test_a_drain_waits_for_a_header_and_what_follows(bind: str) -> None:
    async with asyncio.TaskGroup() as tasks, serving(tell, bind) as (server, connect):
        sock = await connect()
        await send(sock, V1[:10])
        await accepted(server)
        assert len(server.connections.open) == 1

        async def go_on() -> None:
            await server.connections.draining.wait()
            await send(sock, V1[10:] + REQUEST + b"\r\n")

        tasks.create_task(go_on())
    assert sum(server.connections.fates.values()) == 1
    assert not any(fate.startswith("cut_") for fate in server.connections.fates)
    assert await told(sock) == TOLD


@pytest.mark.parametrize(
    ("app", "fate"), [(tell, "cut_fresh"), (tell_stream, "cut_stream"), (TellProtocol, "cut_protocol")]
)
async def test_a_drain_cuts_a_header_that_has_not_come_by_its_deadline(app: Any, fate: str, bind: str) -> None:
    async with serving(app, bind, drain_timeout=0.05) as (server, connect):
        sock = await connect()
        await send(sock, V1[:10])
        await accepted(server)
    assert server.connections.fates == {fate: 1}
    assert await read_to_end(sock) == b""


async def test_a_drain_cuts_a_tls_handshake_that_does_not_end(tmp_path: Path) -> None:
    """It went on for up to 15 seconds after the server had ended."""
    pem = tmp_path / "cert.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(pem))
    async with serving(tell, tls_cert=str(pem), drain_timeout=0.05) as (server, connect):
        sock = await connect()
        await send(sock, V1)
        await accepted(server)
    assert await read_to_end(sock) == b""


async def test_a_sockets_application_has_to_read_the_header_itself() -> None:
    async def app(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        raise AssertionError("not started")

    with pytest.raises(StartError, match="HP518"):
        async with serving(app):
            pass
