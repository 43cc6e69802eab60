"""WebSockets: what an application and a client see of each other, in every state a connection can be in."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import random
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import trustme
import websockets
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection, connect
from websockets.frames import Close, Frame, Opcode
from websockets.protocol import Protocol, Side
from websockets.protocol import State as ProtocolState

from hotport.adapters.asgi import ClientLeft
from hotport.adapters.asgi import shared as shared_module
from hotport.adapters.asgi.spec import Message, Receive, Scope, Send
from hotport.adapters.asgi.states import State as HttpState
from hotport.adapters.asgi.states import WebSocketState as State
from hotport.adapters.asgi.websocket import WebSocketConnection
from tests.adapters.asgi_support import DEADLINE_S, Client, MemoryTransport, Rig, echo, serving, turns, until

pytestmark = pytest.mark.anyio

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


def handshake(path: str = "/", *fields: str, method: str = "GET", key: str = KEY, version: str = "13") -> bytes:
    own = (
        "connection: Upgrade",
        "upgrade: websocket",
        f"sec-websocket-key: {key}",
        f"sec-websocket-version: {version}",
    )
    return "\r\n".join([f"{method} {path} HTTP/1.1", "host: x", *own, *fields, "", ""]).encode()


def frame(opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=True)


def text(data: str) -> bytes:
    return frame(Opcode.TEXT, data.encode())


def close(code: int | None = None, reason: str = "") -> bytes:
    return frame(Opcode.CLOSE, b"" if code is None else Close(code, reason).serialize())


class Talk:
    """Accepts, and remembers what comes; answers each message with its echo, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.seen: list[Message] = []
        self.errors: list[BaseException] = []
        self.cancelled = 0

    @property
    def messages(self) -> list[str | bytes]:
        return [m.get("text") or m["bytes"] for m in self.seen if m["type"] == "websocket.receive"]

    @property
    def disconnect(self) -> tuple[int, str] | None:
        last: Message = self.seen[-1] if self.seen else {"type": ""}
        return (last["code"], last["reason"]) if last["type"] == "websocket.disconnect" else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await echo(scope, receive, send)
            return
        try:
            await self.talk(scope["path"], receive, send)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def talk(self, path: str, receive: Receive, send: Send) -> None:
        assert await receive() == {"type": "websocket.connect"}
        try:
            match path:
                case "/hold":
                    await self.gate.wait()
                case "/deny":
                    await send({"type": "websocket.http.response.start", "status": 401, "headers": [(b"x-y", b"z")]})
                    await send({"type": "websocket.http.response.body", "body": b"begun,", "more_body": True})
                    await self.gate.wait()
                    await send({"type": "websocket.http.response.body", "body": b"ended"})
            if path != "/deny":
                await send({"type": "websocket.accept"})
            if path == "/close":
                await send({"type": "websocket.close", "code": 4000, "reason": "enough"})
            if path == "/slow":
                await self.gate.wait()
        except OSError as error:
            self.errors.append(error)
        while True:
            self.seen.append(message := await receive())
            if message["type"] == "websocket.disconnect":
                return
            try:
                await send({**message, "type": "websocket.send"})
            except OSError as error:  # there may be more to receive
                self.errors.append(error)


class Wire:
    """The client's side of a raw connection, for bytes that no library would send."""

    def __init__(self, transport: MemoryTransport) -> None:
        self.transport = transport

    @property
    def head(self) -> str:
        return b"".join(self.transport.writes).partition(b"\r\n\r\n")[0].decode("latin-1")

    @property
    def status(self) -> int:
        return int(self.head.split()[1])

    @property
    def headers(self) -> list[tuple[str, str]]:
        fields = [line.split(": ", 1) for line in self.head.split("\r\n")[1:]]
        return [(name.lower(), value) for name, value in fields]

    @property
    def frames(self) -> list[Frame]:
        reader = Protocol(Side.CLIENT, state=ProtocolState.OPEN)
        reader.receive_data(b"".join(self.transport.writes).partition(b"\r\n\r\n")[2])
        assert reader.parser_exc is None
        return [event for event in reader.events_received() if isinstance(event, Frame)]

    @property
    def closed_with(self) -> int | None:
        """The code of the close frame that was sent: 1005 if it was empty."""
        found = [f for f in self.frames if f.opcode is Opcode.CLOSE]
        assert len(found) <= 1
        return int(Close.parse(bytes(found[0].data)).code) if found else None


async def open_raw(rig: Rig, path: str = "/", *fields: str, early: bytes = b"") -> tuple[WebSocketConnection, Wire]:
    """A WebSocket over an in-memory transport."""
    before, transport = rig.memory()
    before.data_received(handshake(path, *fields) + early)
    await turns()
    return successor(transport), Wire(transport)


def successor(transport: MemoryTransport) -> WebSocketConnection:
    connection = transport.get_protocol()
    assert isinstance(connection, WebSocketConnection)
    return connection


@contextlib.asynccontextmanager
async def connected(
    rig: Rig, path: str = "/", **options: Any
) -> AsyncIterator[tuple[ClientConnection, WebSocketConnection]]:
    """A client of the websockets library, and the server's end."""
    sock, _ = await rig.connect_socket()
    options = {"compression": None, "ping_interval": None, **options}
    async with connect(f"ws://test{path}", sock=sock, **options) as client:
        (connection,) = rig.connections.open
        assert isinstance(connection, WebSocketConnection)
        yield client, connection


# -- the handshake ---------------------------------------------------------------------------------------------


async def test_scope_says_everything_that_asgi_asks_for() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async with serving(app) as rig:
        await open_raw(rig, "/a%20b?x=1", "Sec-WebSocket-Protocol: chat, superchat", "sec-websocket-protocol: x")
    scope = scopes[0]
    extensions = scope.pop("extensions")
    headers = scope.pop("headers")
    assert scope == {
        "type": "websocket",
        "asgi": {"version": "3.0", "spec_version": "2.5"},
        "http_version": "1.1",
        "scheme": "ws",
        "path": "/a b",
        "raw_path": b"/a%20b",
        "query_string": b"x=1",
        "root_path": "",
        "client": ("192.0.2.1", 5),
        "server": ("192.0.2.2", 80),
        "subprotocols": ["chat", "superchat", "x"],
        "state": {},
    }
    assert headers[:2] == [(b"host", b"x"), (b"connection", b"Upgrade")]
    assert set(extensions) == {"hotport", "websocket.http.response"}
    assert extensions["hotport"]["generation"] == 7


async def test_state_of_the_lifespan_is_a_copy_for_each() -> None:
    seen: list[dict[str, Any]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            scope["state"]["pool"] = "a pool"
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        seen.append(dict(scope["state"]))
        scope["state"]["mine"] = True

    async with serving(app, lifespan="on") as rig:
        await open_raw(rig)
        await open_raw(rig)
    assert seen == [{"pool": "a pool"}, {"pool": "a pool"}]


async def answer_to_accept(message: Message, *fields: str) -> Wire:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept", **message})
        await receive()
        await receive()

    async with serving(app) as rig:
        _, wire = await open_raw(rig, "/", *fields)
        return wire


async def test_accepted_handshake_has_the_key_a_date_and_a_server() -> None:
    wire = await answer_to_accept({})
    headers = dict(wire.headers)
    assert wire.status == 101
    assert headers.pop("date").endswith(" GMT")
    assert headers == {
        "upgrade": "websocket",
        "connection": "Upgrade",
        "sec-websocket-accept": "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=",
        "server": "hotport",
    }
    assert wire.transport.writes[0].endswith(b"\r\n\r\n")


async def test_application_sets_headers_and_chooses_a_subprotocol() -> None:
    fields = [(b"X-Y", b"z"), (b"x-y", b"\xe9"), (b"server", b"mine"), (b"Date", b"then"), (b"upgrade", b"h2c")]
    wire = await answer_to_accept({"subprotocol": "b", "headers": fields}, "sec-websocket-protocol: a, b")
    expected = {"sec-websocket-protocol": ["b"], "x-y": ["z", "é"], "server": ["mine"], "date": ["then"]}
    for name, values in (expected | {"upgrade": ["websocket"]}).items():
        assert [v for n, v in wire.headers if n == name] == values


@pytest.mark.parametrize(
    "message",
    [
        {"headers": [(b"x", b"a\r\nset-cookie: evil")]},
        {"headers": [(b"x\n", b"a")]},
        {"headers": [(b"", b"a")]},
        {"headers": [(b"x y", b"a")]},
        {"headers": [(b"x:", b"a")]},
        {"headers": [(b"x", b"a\0")]},
        {"headers": [("x", "a")]},
        {"headers": [(b"sec-websocket-protocol", b"a")]},
        {"subprotocol": "b"},
    ],
    ids=["injection", "name", "empty", "space", "colon", "nul", "text", "subprotocol-header", "not-offered"],
)
async def test_wrong_accept_is_the_applications_error_and_a_500(
    message: Message, caplog: pytest.LogCaptureFixture
) -> None:
    wire = await answer_to_accept(message, "sec-websocket-protocol: a")
    assert wire.status == 500
    assert "RuntimeError" in caplog.text


@pytest.mark.parametrize("is_cut", [False, True])
async def test_log_tells_a_cut_from_a_client_that_has_left(is_cut: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        with contextlib.suppress(asyncio.CancelledError):
            await receive()
        await receive()
        raise OSError("nobody is there")

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        await client.received()
        if is_cut:
            rig.connections.cut()
        client.close()
        await rig.connections.wait_empty()
        await until(lambda: "the application ended" in caplog.text)
    assert ("its connection was cut" in caplog.text) == is_cut
    assert ("its client had left" in caplog.text) != is_cut


async def test_log_names_a_path_as_it_was_sent(caplog: pytest.LogCaptureFixture) -> None:
    """A quoted line break in it forged a line of the log."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError(scope["path"].encode().hex())

    async with serving(app) as rig:
        await open_raw(rig, "/%1b[2J%0aforged")
    assert "the application raised: WebSocket /%1b[2J%0aforged" in caplog.text


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (handshake(method="POST"), 405),
        (handshake(key="short"), 400),
        (handshake(version="12"), 400),
        (handshake("/", "upgrade: h2c"), 426),
        (handshake("/", "sec-websocket-key: again"), 400),
        (handshake("/", "content-length: 3") + b"abc", 400),
        (handshake().replace(f"sec-websocket-key: {KEY}\r\n".encode(), b""), 400),
    ],
    ids=["method", "key", "version", "upgrade", "two-keys", "body", "no-key"],
)
async def test_malformed_handshake_gets_the_librarys_answer_and_no_application(request_: bytes, status: int) -> None:
    app = Talk()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(request_)
        answer = await client.answer()
        assert (answer.status, answer.says_close) == (status, True)
        assert await client.read_to_end() == b""
        assert rig.connections.requests == 0
        client.close()
        await rig.connections.wait_empty()


async def test_http_1_0_has_no_upgrades() -> None:
    async with serving(Talk()) as rig:
        client, _ = await rig.connect()
        await client.send(handshake().replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await client.answer()).body == b"GET / "


async def test_handshake_behind_unanswered_requests_is_answered_as_if_it_were_none() -> None:
    async with serving(Talk()) as rig:
        client, _ = await rig.connect()
        await client.send(
            b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n" + handshake("/b") + b"GET /c HTTP/1.1\r\nhost: x\r\n\r\n"
        )
        assert [(await client.answer()).body for _ in range(3)] == [b"GET /a ", b"GET /b ", b"GET /c "]


async def test_handshake_after_an_answered_request_is_taken_up() -> None:
    app = Talk()
    async with serving(app, keep_alive_s=0.01) as rig:
        sock, _ = await rig.connect_socket()
        client = Client(sock)
        await client.send(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await client.answer()).body == b"GET /a "
        async with connect("ws://test/", sock=sock, compression=None) as websocket:
            await websocket.send("hello")
            assert await websocket.recv() == "hello"
        await rig.connections.wait_empty()


async def test_handshake_may_be_as_large_as_any_request() -> None:
    async with serving(Talk()) as rig:
        connection, _ = await open_raw(rig, "/" + "x" * 9000, *(f"x-{n}: y" for n in range(110)))
        assert connection.state is State.OPEN


async def test_denial_has_no_trailers() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.http.response.start", "status": 404, "headers": [], "trailers": True})
        await send({"type": "websocket.http.response.body", "body": b"no"})

    async with serving(app) as rig:
        _, wire = await open_raw(rig)
        await turns()
        sent = b"".join(wire.transport.writes)
        assert sent.count(b"HTTP/1.1 ") == 1
        assert sent.endswith(b"no")


async def test_upgraded_connection_stays_one_connection() -> None:
    async with serving(Talk(), maximum=2) as rig:
        async with connected(rig) as (_, connection):
            assert [*rig.connections.open] == [connection]
            assert (rig.connections.accepted, rig.connections.requests) == (1, 1)
        await rig.connections.wait_empty()
        assert rig.connections.fates == {}


async def test_object_that_was_replaced_has_no_say_any_more() -> None:
    async with serving(Talk()) as rig:
        before, transport = rig.memory()
        before.data_received(handshake())
        assert before.state is HttpState.CLOSED
        written = len(transport.writes)  # the handshake's answer, where applications begin at once
        assert before.cut() == "finished"
        assert len(transport.writes) == written


@pytest.mark.parametrize("is_whole", [True, False])
async def test_frames_behind_the_handshake_wait_until_it_is_answered(is_whole: bool) -> None:
    app = Talk()
    early = text("one") + text("two\r\n\r\n")
    async with serving(app) as rig:
        before, transport = rig.memory()
        if is_whole:
            before.data_received(handshake("/hold") + early)
        else:
            before.data_received(handshake("/hold")[:20])
            before.data_received(handshake("/hold")[20:] + early[:3])
            successor(transport).data_received(early[3:])
        await turns()
        assert transport.writes == []
        app.gate.set()
        await turns()
    assert app.messages == ["one", "two\r\n\r\n"]


async def test_reading_pauses_while_too_much_has_come_before_the_handshake_is_answered() -> None:
    app = Talk()
    async with serving(app) as rig:
        connection, wire = await open_raw(rig, "/hold")
        for _ in range(9):
            connection.data_received(frame(Opcode.BINARY, b"x" * 8192))
        assert not wire.transport.is_reading()
        app.gate.set()
        await turns()
        assert wire.transport.is_reading()
    assert app.messages == [b"x" * 8192] * 9


async def test_client_that_leaves_before_it_is_answered_is_a_disconnect_and_an_os_error() -> None:
    app = Talk()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake("/hold"))
        await until(lambda: rig.connections.requests == 1)
        client.close()
        await rig.connections.wait_empty()
        app.gate.set()
        await until(lambda: app.disconnect is not None)
    assert app.disconnect == (1006, "")
    assert isinstance(app.errors[0], ClientLeft)


# -- denials ---------------------------------------------------------------------------------------------------


async def test_denial_is_an_answer_whose_body_is_streamed() -> None:
    app = Talk()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake("/deny"))
        answer = await client.begun(b"begun,")
        assert (answer.status, answer.headers["x-y"], answer.says_close) == (401, "z", True)
        assert {"date", "server"} <= set(answer.headers)
        app.gate.set()
        assert (await client.answer()).body == b"begun,ended"
        assert await client.read_to_end() == b""
        client.close()
        await rig.connections.wait_empty()
    assert app.disconnect == (1006, "")


async def answer_to(*messages: Message) -> tuple[int, bytes]:
    """Status and body of what a client gets when the application sends `messages` and returns."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        answer = await client.answer()
        assert await client.read_to_end() == b""
        return answer.status, answer.body


async def test_close_before_accept_is_403() -> None:
    assert await answer_to({"type": "websocket.close", "code": 4000}) == (403, b"")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"type": "websocket.send", "text": "early"}],
        [{"type": "websocket.http.response.start", "status": 404}],
        [{"type": "websocket.http.response.start", "status": 404}, {"type": "websocket.accept"}],
        [{"type": "websocket.http.response.start", "status": 101}],
        [{"type": "websocket.http.response.start", "status": 404, "headers": [(b"x", b"a\nb")]}],
        [{"type": "websocket.http.response.body", "body": b""}],
    ],
    ids=["nothing", "send", "no-body", "accept-instead", "interim", "injection", "body-first"],
)
async def test_application_that_does_not_answer_the_handshake_is_a_500(
    messages: list[Message], caplog: pytest.LogCaptureFixture
) -> None:
    assert await answer_to(*messages) == (500, b"Internal Server Error\n")
    assert "the application" in caplog.text


async def test_denial_without_a_body_yet_opens_at_once() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 404})
        await gate.wait()
        await send({"type": "websocket.http.response.body", "body": b"reason"})

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        connection = await upgraded(rig)
        await until(lambda: connection.state is State.DENYING)
        assert (await client.received()).startswith(b"HTTP/1.1 404 Not Found\r\n")
        gate.set()
        assert await client.read_to_end() == b"6\r\nreason\r\n0\r\n\r\n"


async def test_denial_that_fails_midway_does_not_look_whole() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.http.response.start", "status": 404})
        await send({"type": "websocket.http.response.body", "body": b"begun,", "more_body": True})
        raise ValueError

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = await client.read_to_end()
        assert not data.endswith(b"0\r\n\r\n")


# -- messages --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("deflate", [True, False])
async def test_messages_of_every_size_and_kind_come_back(compression: str | None, deflate: bool) -> None:
    async with (
        serving(Talk(), ws_deflate=deflate) as rig,
        connected(rig, compression=compression) as (client, _),
    ):
        assert client.response is not None
        is_negotiated = "Sec-WebSocket-Extensions" in client.response.headers
        assert is_negotiated == (deflate and compression is not None)
        for message in ("é" * 50, "x" * 126, b"y" * 65536, b"z" * 1_000_000, "w" * 70_000):
            await client.send(message)
            assert await client.recv() == message
        await client.send(["frag", "men", "ted"])
        assert await client.recv() == "fragmented"


async def test_aiohttp_client_over_tls_is_served() -> None:
    authority = trustme.CA()
    server_context, client_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server_context)
    authority.configure_trust(client_context)
    schemes: list[str] = []
    app = Talk()

    async def noting(scope: Scope, receive: Receive, send: Send) -> None:
        schemes.append(scope["scheme"])
        await app(scope, receive, send)

    async with serving(noting) as rig:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(rig.adapter.connection, "127.0.0.1", 0, ssl=server_context)
        port = server.sockets[0].getsockname()[1]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_context)) as session:
            async with session.ws_connect(f"https://localhost:{port}/", compress=15) as client:
                for message in ("text", "x" * 100_000):
                    await client.send_str(message)
                    assert await client.receive_str() == message
                await client.send_bytes(b"bytes")
                assert await client.receive_bytes() == b"bytes"
                await client.close(code=4001, message=b"bye")
            await rig.connections.wait_empty()
        server.close()
        await server.wait_closed()
    assert schemes == ["wss"]
    assert app.disconnect == (4001, "bye")


async def test_one_message_is_one_write() -> None:
    async with serving(Talk()) as rig:
        connection, wire = await open_raw(rig)
        wire.transport.writes.clear()
        connection.data_received(text("one") + text("two"))
        await turns()
        assert len(wire.transport.writes) == 2


async def test_message_is_either_text_or_bytes() -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        for message in ({}, {"text": None, "bytes": None}, {"type": "websocket.accept"}):
            with pytest.raises(RuntimeError) as raised:
                await send({"type": "websocket.send", **message})
            errors.append(raised.value)
        await send({"type": "websocket.send", "text": None, "bytes": b""})
        await send({"type": "websocket.send", "text": ""})

    async with serving(app) as rig:
        _, wire = await open_raw(rig)
        assert [(f.opcode, bytes(f.data)) for f in wire.frames][:2] == [(Opcode.BINARY, b""), (Opcode.TEXT, b"")]
    assert len(errors) == 3


async def test_several_tasks_may_receive() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})

        async def one() -> None:
            while (message := await receive())["type"] == "websocket.receive":
                seen.append(message["text"])

        for _ in range(20):  # a receive that was given up must not take a message with it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0):
                    await receive()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(one())
            tasks.create_task(one())

    async with serving(app) as rig, connected(rig) as (client, connection):
        await until(lambda: len(connection._session._waiters) == 2)
        for n in range(10):
            await client.send(str(n))
        await until(lambda: len(seen) == 10)
    assert sorted(seen) == [str(n) for n in range(10)]


async def test_reading_pauses_while_too_many_messages_wait_and_goes_on_when_few_do() -> None:
    app = Talk()
    async with serving(app, ws_queue=8) as rig:
        connection, wire = await open_raw(rig, "/slow")
        for n in range(7):
            connection.data_received(text(str(n)))
        assert wire.transport.is_reading()
        connection.data_received(text("7"))
        assert not wire.transport.is_reading()
        assert [m["text"] for m in connection.undelivered] == [str(n) for n in range(8)]
        app.gate.set()
        await turns()
        assert wire.transport.is_reading()
    assert app.messages == [str(n) for n in range(8)]


async def test_client_that_sends_faster_than_the_application_receives_has_to_wait() -> None:
    app = Talk()
    async with serving(app) as rig, connected(rig, "/slow") as (client, connection):

        async def flood() -> None:
            for _ in range(300):
                await client.send(b"x" * 100_000)

        flooding = asyncio.create_task(flood())
        await until(lambda: connection.is_reading_paused)
        await turns(50)
        assert not flooding.done()
        app.gate.set()
        for _ in range(300):
            assert len(await client.recv()) == 100_000
        await flooding


async def test_send_waits_while_the_client_does_not_read() -> None:
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "websocket.accept"})
        for _ in range(200):
            await send({"type": "websocket.send", "bytes": b"x" * 100_000})
            sent += 1

    async with serving(app) as rig:
        client, _before = await rig.connect()
        await client.send(handshake())
        connection = await upgraded(rig)
        await until(lambda: connection.writable is not None)
        before_count = sent
        await turns(50)
        assert sent == before_count < 200
        reader = Protocol(Side.CLIENT, state=ProtocolState.OPEN, max_size=None)
        data = b""
        while b"\r\n\r\n" not in data:
            data += await client.received()
        reader.receive_data(data.partition(b"\r\n\r\n")[2])
        while sent < 200:
            reader.receive_data(await client.received())
        while not reader.close_rcvd:
            reader.receive_data(await client.received())
        frames = [f for f in reader.events_received() if isinstance(f, Frame)]
        assert [len(f.data) for f in frames[:-1]] == [100_000] * 200


async def upgraded(rig: Rig) -> WebSocketConnection:
    def is_upgraded() -> bool:
        return any(isinstance(each, WebSocketConnection) for each in rig.connections.open)

    await until(is_upgraded)
    (connection,) = rig.connections.open
    assert isinstance(connection, WebSocketConnection)
    return connection


async def test_application_that_only_sends_learns_in_the_same_turn_that_its_client_has_left() -> None:
    """It sent for ever, and nothing else of the worker ran: what is written to a lost transport pauses nobody."""
    clients: list[Client] = []
    left: list[bool] = []
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await receive()
        await send({"type": "websocket.accept"})
        clients[0]._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        clients[0].close()
        with pytest.raises(ClientLeft):
            for _ in range(10_000):
                await send({"type": "websocket.send", "bytes": b"x" * 1000})
                sent += 1
        left.append(True)

    async with serving(app) as rig:
        client, _ = await rig.connect()
        clients.append(client)
        await client.send(handshake())
        await rig.connections.wait_empty()
        await until(lambda: bool(left))
    assert sent < 10_000


async def test_send_that_waits_learns_that_the_client_has_left() -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        try:
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 100_000})
        except OSError as error:
            errors.append(error)
            raise

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        connection = await upgraded(rig)
        await until(lambda: connection.writable is not None)
        client.close()
        await rig.connections.wait_empty()
        await until(lambda: bool(errors))
    assert isinstance(errors[0], ClientLeft)


# -- endings: who says what, and what the other one gets ---------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "seen"),
    [(1000, 1000), (1001, 1001), (1011, 1011), (1012, 1012), (3000, 3000), (4999, 4999), (None, 1005)],
)
async def test_close_of_the_client_is_echoed_and_reaches_the_application(sent: int | None, seen: int) -> None:
    app = Talk()
    async with serving(app) as rig:
        connection, wire = await open_raw(rig)
        reason = "" if sent is None else "why"
        connection.data_received(text("before") + close(sent, reason) + text("after"))
        await turns()
        assert wire.closed_with == seen
        assert connection.state is State.CLOSING
        assert wire.transport.has_ended
        connection.eof_received()
        wire.transport.close()
        await until(lambda: connection.state is State.CLOSED)
    assert app.messages == ["before"]
    assert app.disconnect == (seen, reason)


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 3000, 4999, None])
async def test_close_of_the_application_reaches_the_client(code: int | None) -> None:
    seen: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close", "code": code, "reason": None if code is None else "why"})
        seen.append(await receive())
        seen.append(await receive())

    async with serving(app) as rig:
        async with connected(rig) as (client, _):
            with pytest.raises(websockets.ConnectionClosed) as raised:
                await client.recv()
        await rig.connections.wait_empty()
    expected = (code or 1000, "why" if code else "")
    assert raised.value.rcvd is not None
    assert (raised.value.rcvd.code, raised.value.rcvd.reason) == expected
    assert seen == [{"type": "websocket.disconnect", "code": expected[0], "reason": expected[1]}] * 2


@pytest.mark.parametrize("message", [{"code": 1005}, {"code": 999}, {"code": 4000, "reason": "x" * 124}])
async def test_close_that_cannot_be_said_is_the_applications_error(message: Message) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        with pytest.raises(RuntimeError, match="cannot close with"):
            await send({"type": "websocket.close", **message})
        await send({"type": "websocket.close", "code": 4000})

    async with serving(app) as rig:
        _, wire = await open_raw(rig)
        assert wire.closed_with == 4000


@pytest.mark.parametrize(("how", "code"), [("returns", 1000), ("raises", 1011), ("cancels", 1011)])
async def test_end_of_the_application_closes(how: str, code: int, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        if how == "raises":
            raise ValueError("broken")
        if how == "cancels":
            raise asyncio.CancelledError

    async with serving(app) as rig:
        connection, wire = await open_raw(rig)
        assert wire.closed_with == code
        connection.data_received(text("too late") * 100 + close(code))
        await until(lambda: wire.transport.has_ended)
        assert connection.undelivered == ()
    assert ("the application" in caplog.text) == (how != "returns")


async def test_nothing_is_sent_after_the_application_has_closed() -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.close"})
        try:
            await send({"type": "websocket.send", "text": "x"})
        except RuntimeError as error:
            errors.append(error)

    async with serving(app) as rig:
        await open_raw(rig)
    assert "after the end" in str(errors[0])


UNTIDY = b"\xc3\x28"

#: What a client must not send, and the code with which it is closed.
VIOLATIONS: dict[str, tuple[bytes, int]] = {
    "unmasked": (Frame(Opcode.TEXT, b"x").serialize(mask=False), 1002),
    "reserved-bit": (b"\xc1\x80abcd", 1002),
    "reserved-opcode": (b"\x83\x80abcd", 1002),
    "fragmented-ping": (b"\x09\x80abcd", 1002),
    "long-ping": (b"\x89\xfe\x00\x7eabcd" + b"x" * 126, 1002),
    "continuation-of-nothing": (frame(Opcode.CONT, b"x"), 1002),
    "two-beginnings": (frame(Opcode.TEXT, b"x", fin=False) + text("y"), 1002),
    "short-close": (frame(Opcode.CLOSE, b"x"), 1002),
    "close-1005": (frame(Opcode.CLOSE, b"\x03\xed"), 1002),
    "text": (frame(Opcode.TEXT, UNTIDY), 1007),
    "fragmented-text": (frame(Opcode.TEXT, b"ok", fin=False) + frame(Opcode.CONT, UNTIDY), 1007),
    "close-reason": (frame(Opcode.CLOSE, b"\x03\xe8" + UNTIDY), 1007),
    "large": (frame(Opcode.BINARY, b"x" * 1001), 1009),
    "large-fragments": (frame(Opcode.BINARY, b"x" * 600, fin=False) + frame(Opcode.CONT, b"x" * 401), 1009),
}


@pytest.mark.parametrize("name", VIOLATIONS)
async def test_violation_closes_with_its_code_and_nothing_behind_it_is_read(name: str) -> None:
    data, code = VIOLATIONS[name]
    app = Talk()
    async with serving(app, ws_message_max_bytes=1000) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(text("before") + data + text("after"))
        await turns()
        assert wire.closed_with == code
        assert wire.transport.has_ended
        connection.data_received(text("much later"))
    assert app.messages == ["before"]
    assert app.disconnect is not None
    assert app.disconnect[0] == code


async def test_compressed_message_that_would_become_too_large_is_refused() -> None:
    async with (
        serving(Talk(), ws_message_max_bytes=1000) as rig,
        connected(rig, compression="deflate") as (client, _),
    ):
        await client.send(b"\0" * 900)
        assert len(await client.recv()) == 900
        await client.send(b"\0" * 1_000_000)
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert client.close_code == 1009


@pytest.mark.parametrize("how", ["end", "close", "reset"])
@pytest.mark.parametrize(
    "rest",
    [b"", text("half")[:-1], frame(Opcode.TEXT, b"half", fin=False)],
    ids=["nothing", "half_a_frame", "half_a_message"],
)
async def test_client_that_leaves_without_a_word_is_1006(how: str, rest: bytes) -> None:
    app = Talk()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake())
        await client.received()
        await client.send(text("whole") + rest)
        await client.received()
        match how:
            case "end":
                client.end()
                assert await client.read_to_end() == b""
            case "reset":
                client._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
        await rig.connections.wait_empty()
        await until(lambda: app.disconnect is not None)
    assert app.messages == ["whole"]
    assert app.disconnect == (1006, "")


async def test_send_after_the_client_has_left_is_an_os_error(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        assert (await receive())["type"] == "websocket.disconnect"
        for message in ({"type": "websocket.send", "text": "x"}, {"type": "websocket.close"}):
            try:
                await send(message)
            except ClientLeft as error:
                errors.append(error)
        raise errors[0]

    async with serving(app) as rig:
        connection, _ = await open_raw(rig)
        connection.data_received(close(1000))
        await turns()
    assert len(errors) == 2
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_error_of_an_application_that_does_not_know_that_its_client_has_left_is_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await gate.wait()
        raise ValueError("broken")

    async with serving(app) as rig:
        connection, _ = await open_raw(rig)
        connection.data_received(close(1000))
        gate.set()
        await turns()
    assert "ValueError: broken" in caplog.text


@pytest.mark.parametrize("path", ["/close", "/"])
async def test_closing_handshake_that_is_not_finished_is_bounded(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "CLOSE_TIMEOUT_S", 0.01)
    app = Talk()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(handshake(path) + (close(4000, "enough") if path == "/" else b""))
        await rig.connections.wait_empty()  # although the client does not close
        await until(lambda: app.disconnect is not None)
    assert app.disconnect == (4000, "enough")


async def test_pause_does_not_keep_the_clients_close_frame_out() -> None:
    """The closing handshake ran into its timeout because reading was paused for a queue nobody was interested in."""
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        await gate.wait()
        await send({"type": "websocket.close"})

    async with serving(app, ws_queue=1) as rig:
        connection, wire = await open_raw(rig)
        connection.data_received(text("one") + text("two"))
        assert not wire.transport.is_reading()
        gate.set()
        await turns()
        assert wire.transport.is_reading()


# -- pings -----------------------------------------------------------------------------------------------------


async def test_ping_of_the_client_is_answered() -> None:
    async with serving(Talk()) as rig, connected(rig) as (client, _):
        await (await client.ping(b"payload"))


async def test_client_that_answers_pings_stays() -> None:
    quick = {"ws_ping_interval_s": 0.001, "ws_ping_timeout_s": 5}
    pings = 0

    class Counting(ClientConnection):
        def data_received(self, data: bytes) -> None:
            nonlocal pings
            pings += data.count(b"\x89\x00")
            super().data_received(data)

    async with serving(Talk(), **quick) as rig, connected(rig, create_connection=Counting) as (client, _):
        await until(lambda: pings >= 5)
        await client.send("still here")
        assert await client.recv() == "still here"


async def test_silent_client_is_given_up() -> None:
    app = Talk()
    quick = {"ws_ping_interval_s": 0.01, "ws_ping_timeout_s": 0.01}
    async with serving(app, **quick) as rig:
        connection, wire = await open_raw(rig)
        await until(lambda: connection.state is State.CLOSING)
        assert [f.opcode for f in wire.frames] == [Opcode.PING, Opcode.CLOSE]
        assert wire.closed_with == 1011
        await until(lambda: app.disconnect is not None)
    assert app.disconnect == (1011, "keepalive ping timeout")


async def test_client_is_not_silent_while_it_sends_or_is_not_read() -> None:
    app = Talk()
    async with serving(app, ws_queue=1) as rig:
        connection, wire = await open_raw(rig, "/slow")
        connection.expire()  # it is time for a ping

        def time_is_up() -> None:
            connection.expire()

        large = frame(Opcode.BINARY, b"x" * 300)
        connection.data_received(large[:200])  # a message that takes long: no pong can come in between
        time_is_up()
        connection.data_received(large[200:])
        assert not wire.transport.is_reading()
        time_is_up()
        time_is_up()  # we are not listening, so we cannot know
        assert connection.state is State.OPEN
        app.gate.set()
        await turns()
        assert wire.transport.is_reading()
        time_is_up()
        await until(lambda: connection.state is State.CLOSING)


async def test_there_are_no_pings_if_their_interval_is_zero() -> None:
    async with serving(Talk(), ws_ping_interval_s=0) as rig:
        connection, _ = await open_raw(rig)
        assert connection.due == 0


async def test_timers_forget_a_connection_that_has_ended() -> None:
    async with serving(Talk()) as rig:
        connection, wire = await open_raw(rig)
        assert connection.due > 0
        wire.transport.close()
        await turns()
        assert connection.due == 0
        async with asyncio.timeout(DEADLINE_S):
            await connection.shared.deadlines.wait_empty()


# -- wherever the bytes are split ------------------------------------------------------------------------------

#: Pieces of a conversation, each with what the application sees of it.
PIECES: list[tuple[bytes, list[str | bytes]]] = [
    (text("a"), ["a"]),
    (text("é" * 200), ["é" * 200]),
    (frame(Opcode.BINARY, b"\0" * 70_000), [b"\0" * 70_000]),
    (frame(Opcode.TEXT, b"\xc3", fin=False) + frame(Opcode.CONT, b"\xa9"), ["é"]),
    (
        frame(Opcode.BINARY, b"1", fin=False)
        + frame(Opcode.PING, b"between")
        + frame(Opcode.CONT, fin=False)
        + frame(Opcode.CONT, b"2"),
        [b"12"],
    ),
    (frame(Opcode.PING, b"p"), []),
    (frame(Opcode.PONG), []),
    (text("x" * 125) + text("y" * 126), ["x" * 125, "y" * 126]),
]

#: How a conversation ends, and the code that the application gets.
ENDINGS: list[tuple[bytes, int]] = [(b"", 1006), (close(4001), 4001), (close(), 1005), *VIOLATIONS.values()]


def cut_at(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@settings(max_examples=80)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=6),
    ending=st.sampled_from(ENDINGS),
    places=st.lists(st.integers(0, 100_000), max_size=8),
    queue=st.integers(1, 40),
)
def test_application_sees_the_same_wherever_the_bytes_are_split(
    pieces: list[tuple[bytes, list[str | bytes]]], ending: tuple[bytes, int], places: list[int], queue: int
) -> None:
    app = Talk()
    maximum = 1000 if ending in VIOLATIONS.values() else 100_000
    if maximum == 1000:
        pieces = [piece for piece in pieces if len(piece[0]) < 1000]

    async def check() -> None:
        async with serving(app, ws_queue=queue, ws_message_max_bytes=maximum) as rig:
            _before, transport = rig.memory()
            stream = handshake() + b"".join(data for data, _ in pieces) + ending[0]
            for data in cut_at(stream, places):
                transport.get_protocol().data_received(data)
                await turns(3)
                await until(lambda: transport.is_reading() or transport.is_closed)
            if not transport.is_closed:
                transport.get_protocol().eof_received()
            transport.close()
            await until(lambda: app.disconnect is not None)

    asyncio.run(check())
    assert app.messages == [message for _, messages in pieces for message in messages]
    assert app.disconnect is not None
    assert app.disconnect[0] == ending[1]


async def test_it_is_known_at_every_byte_whether_a_frame_or_a_message_is_under_way() -> None:
    app = Talk()
    async with serving(app) as rig:
        connection, _ = await open_raw(rig)
        frames = [
            (text("abc"), False),
            (frame(Opcode.TEXT, b"x" * 200, fin=False), True),
            (frame(Opcode.PING, b"p"), True),
            (frame(Opcode.CONT, b"y"), False),
            (frame(Opcode.BINARY), False),
        ]
        assert connection.is_between_frames
        for data, is_mid_message in frames:
            for place in range(len(data) - 1):
                connection.data_received(data[place : place + 1])
                assert not connection.is_between_frames
            connection.data_received(data[-1:])
            assert connection.is_between_frames
            assert connection.is_mid_message is is_mid_message
        connection.data_received(close())
        assert not connection.is_between_frames


@settings(max_examples=150)
@given(
    data=st.one_of(
        st.binary(max_size=300),
        st.lists(
            st.one_of(
                st.builds(
                    lambda opcode, data, fin, rsv: (
                        bytes([frame(opcode, data[:125])[0] & (0xFF if fin else 0x7F) | rsv << 4])
                        + frame(opcode, data[:125])[1:]
                    ),
                    st.sampled_from(list(Opcode)),
                    st.binary(max_size=200),
                    st.booleans(),
                    st.sampled_from([0, 0, 0, 1, 4]),
                ),
                st.binary(max_size=4),
            ),
            max_size=8,
        ).map(b"".join),
    ),
    places=st.lists(st.integers(0, 300), max_size=4),
    deflate=st.booleans(),
    ending=st.sampled_from(["leave", "end", "cut", "drain"]),
)
def test_arbitrary_bytes_never_hang_never_raise_and_never_leave_a_task(
    data: bytes, places: list[int], deflate: bool, ending: str
) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append  # type: ignore[method-assign, assignment]
    logging.getLogger().addHandler(handler)
    app = Talk()
    broken: list[dict[str, Any]] = []

    async def check() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: broken.append(context))
        async with serving(app) as rig:
            fields = ("sec-websocket-extensions: permessage-deflate",) if deflate else ()
            connection, wire = await open_raw(rig, "/", *fields)
            for piece in cut_at(data, places):
                connection.data_received(piece)
                await turns(2)
            match ending:
                case "end":
                    connection.eof_received()
                case "cut":
                    connection.cut()
                case "drain":
                    rig.connections.drain(0.001)
                    await until(lambda: connection.state is not State.OPEN)
            wire.transport.close()
            await rig.connections.wait_empty()
            await until(lambda: bool(app.cancelled) or app.disconnect is not None)
            await turns()
            assert not rig.adapter._shared.running  # type: ignore[union-attr]
            assert asyncio.all_tasks() == {asyncio.current_task()}

    try:
        asyncio.run(check())
    finally:
        logging.getLogger().removeHandler(handler)
    assert [r.getMessage() for r in records] == []
    assert broken == []


# -- every state: drain, cut, and a client that leaves ---------------------------------------------------------

#: The path that leads into each state in which a client may wait.
ENTER: dict[State, str] = {
    State.CONNECTING: "/hold",
    State.DENYING: "/deny",
    State.OPEN: "/",
    State.CLOSING: "/close",
}

#: The fate of a connection that is cut, and the same if it was drained before: the status or close code that the
#: client gets, or 0 for nothing.
CUT: dict[State, tuple[str, int]] = {
    State.CONNECTING: ("cut_in_flight", 503),
    State.DENYING: ("cut_streaming", 0),
    State.OPEN: ("cut_websocket", 1012),
    State.CLOSING: ("finished", 4000),
}

every_state = pytest.mark.parametrize("state", list(ENTER), ids=lambda state: state.value)


async def enter(rig: Rig, state: State, **how: Any) -> tuple[Client, WebSocketConnection]:
    client, _ = await rig.connect(**how)
    await client.send(handshake(ENTER[state]))
    connection = await upgraded(rig)
    await until(lambda: connection.state is state)
    await turns()
    return client, connection


def frames_in(data: bytes) -> list[Frame]:
    reader = Protocol(Side.CLIENT, state=ProtocolState.OPEN)
    reader.receive_data(data.partition(b"\r\n\r\n")[2])
    return [event for event in reader.events_received() if isinstance(event, Frame)]


def test_every_state_in_which_a_client_may_wait_is_in_the_tables() -> None:
    assert set(ENTER) == set(CUT) == set(State) - {State.CLOSED}


@every_state
@pytest.mark.parametrize("is_drained", [False, True])
async def test_cut_connection_ends_as_politely_as_its_state_allows(state: State, is_drained: bool) -> None:
    app = Talk()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        if is_drained:
            rig.connections.drain(0)
        fate, outcome = CUT[state]
        rig.connections.cut()
        assert rig.connections.fates == {fate: 1}
        assert connection.state is State.CLOSING
        data = b""
        with contextlib.suppress(ConnectionResetError):
            data = await client.read_to_end()
        match outcome:
            case 503:
                assert data.startswith(b"HTTP/1.1 503 ")
            case 0:
                assert not data.endswith(b"0\r\n\r\n")
            case code:
                assert Close.parse(bytes(frames_in(data)[-1].data)).code == code
        client.close()
        await until(lambda: connection.state is State.CLOSED)
        assert app.cancelled == 1
        assert connection.cut() == "finished"
    assert sum(rig.connections.fates.values()) == 1, "each connection is counted once"


@every_state
async def test_client_that_leaves_during_the_drain_has_finished(state: State) -> None:
    app = Talk()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        rig.connections.drain(1000)
        client.close()
        await until(lambda: connection.has_eof or connection.state is State.CLOSED)
        app.gate.set()
        await rig.connections.wait_empty()
        assert rig.connections.fates == {"finished": 1}
        await until(lambda: app.disconnect is not None)


@every_state
async def test_drained_connection_is_told_or_gets_what_it_waits_for(state: State) -> None:
    app = Talk()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        rig.connections.drain(0.02)
        if state in (State.CONNECTING, State.DENYING):
            await turns()
            assert connection.state is state, "drain closes nothing that is not open"
            app.gate.set()
        await until(lambda: connection.state is State.CLOSING)
        if state is not State.DENYING:
            await client.send(close(1012))
        data = await client.read_to_end()
        client.close()
        await rig.connections.wait_empty()
        if state is State.DENYING:
            assert data.endswith(b"ended\r\n0\r\n\r\n")
        else:
            assert Close.parse(bytes(frames_in(data)[-1].data)).code == (4000 if state is State.CLOSING else 1012)
        is_told = state in (State.CONNECTING, State.OPEN)
        assert rig.connections.fates == ({"told_to_close": 1} if is_told else {"finished": 1})
        await until(lambda: app.disconnect is not None)
        assert app.disconnect == {
            State.DENYING: (1006, ""),
            State.CLOSING: (4000, "enough"),
        }.get(state, (1012, "service restart"))


@every_state
async def test_connection_over_a_unix_socket_has_the_same_states(state: State) -> None:
    async with serving(Talk()) as rig:
        _, connection = await enter(rig, state, family=socket.AF_UNIX)
        assert [*rig.connections.open] == [connection]


async def test_drained_clients_are_not_closed_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    delays: list[float] = []
    moments = iter([0.1, 0.5, 0.999])
    monkeypatch.setattr(random, "random", lambda: next(moments))
    async with serving(Talk()) as rig:
        for _ in range(3):
            await open_raw(rig)
        loop = asyncio.get_running_loop()
        rig.connections.drain(1000)
        for connection in rig.connections.open:
            assert isinstance(connection, WebSocketConnection)
            assert connection._drain_timer is not None
            delays.append(connection._drain_timer.when() - loop.time())
    assert sorted(round(delay / 10) for delay in delays) == [9, 45, 90]


async def test_websocket_that_is_opened_during_a_drain_is_drained_too() -> None:
    async with serving(Talk()) as rig:
        rig.connections.drain(0.05)
        async with connected(rig) as (client, _):
            with pytest.raises(websockets.ConnectionClosed):
                await client.recv()
            assert (client.close_code, client.close_reason) == (1012, "service restart")
        await rig.connections.wait_empty()
        assert rig.connections.fates == {"told_to_close": 1}


async def test_messages_that_come_behind_the_1012_still_reach_the_application() -> None:
    app = Talk()
    async with serving(app) as rig:
        connection, wire = await open_raw(rig, "/slow")
        connection.data_received(text("before"))
        connection._tell_to_close()
        connection.data_received(text("crossing") + close(1012))
        app.gate.set()
        await turns()
        assert wire.closed_with == 1012
        assert isinstance(app.errors[0], ClientLeft)  # but it cannot answer them
    assert app.messages == ["before", "crossing"]


async def test_client_that_has_not_taken_the_1012_when_it_is_given_up_was_cut() -> None:
    async with serving(Talk()) as rig:
        connection, wire = await open_raw(rig)
        rig.connections.drain(1000)
        connection._tell_to_close()
        wire.transport.unsent_bytes = 4
        connection._expire_closing()
        await turns()
        assert rig.connections.fates == {"cut_websocket": 1}


@pytest.mark.parametrize(("unsent_bytes", "fate"), [(0, "told_to_close"), (4, "cut_websocket")])
async def test_deadline_that_comes_during_the_closing_handshake(unsent_bytes: int, fate: str) -> None:
    app = Talk()
    async with serving(app) as rig:
        connection, wire = await open_raw(rig)
        rig.connections.drain(1000)
        connection._tell_to_close()
        wire.transport.unsent_bytes = unsent_bytes
        rig.connections.cut()
        assert rig.connections.fates == {fate: 1}
        assert wire.transport.is_closed


async def test_client_that_never_closes_is_given_up_after_the_linger_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "LINGER_S", 0.01)
    async with serving(Talk()) as rig:
        _client, connection = await enter(rig, State.OPEN)
        rig.connections.drain(0)
        rig.connections.cut()
        await until(lambda: connection.state is State.CLOSED)


async def test_application_is_told_when_draining_starts() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})
        draining = scope["extensions"]["hotport"]["draining"]
        assert draining.remaining_s() == math.inf
        await draining.wait()
        await send({"type": "websocket.close", "code": 4012, "reason": "come back"})

    async with serving(app) as rig, connected(rig) as (client, _):
        rig.connections.drain(1000)
        with pytest.raises(websockets.ConnectionClosed):
            await client.recv()
        assert (client.close_code, client.close_reason) == (4012, "come back")
