"""HTTP/1.1 connections: what an application and a client see of each other, in every state a connection can be in."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotport.adapters.asgi import ClientLeft, State
from hotport.adapters.asgi import http as http_module
from hotport.adapters.asgi import shared as shared_module
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.spec import Application, Message, Receive, Scope, Send
from hotport.adapters.asgi.states import STATES, Moves
from tests.adapters.asgi_support import (
    DEADLINE_S,
    Client,
    MemoryTransport,
    Rig,
    echo,
    read_body,
    respond,
    serving,
    turns,
    until,
)

pytestmark = pytest.mark.anyio


def get(path: str = "/", *fields: str, version: str = "1.1", method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "host: x", *fields, "", ""]).encode()


def post(path: str, body: bytes, *fields: str) -> bytes:
    return get(path, f"content-length: {len(body)}", *fields, method="POST") + body


class Told:
    """An application that does what the path says, and waits where a test wants it to."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.seen: list[str] = []
        self.cancelled: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        self.seen.append(path)
        try:
            match path:
                case "/slow":
                    await self.gate.wait()
                    await respond(send, b"slow")
                case "/stream":
                    await send({"type": "http.response.start", "status": 200, "headers": []})
                    await send({"type": "http.response.body", "body": b"begun,", "more_body": True})
                    await self.gate.wait()
                    await send({"type": "http.response.body", "body": b"ended", "more_body": False})
                case "/early":
                    await respond(send, b"early")
                case _:
                    await echo(scope, receive, send)
        except asyncio.CancelledError:
            self.cancelled.append(path)
            raise


# -- what an application sees of a request ---------------------------------------------------------------------


async def scope_of(request: bytes, **options: Any) -> Scope:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await respond(send, b"")

    async with serving(app, **options) as rig:
        connection, _ = rig.memory()
        connection.data_received(request)
        await turns()
    return scopes[0]


async def test_scope_says_everything_that_asgi_asks_for() -> None:
    scope = await scope_of(get("/a%20b/%C3%A9?x=1&y=%20", "X-Mixed: Case", "x-mixed: twice"))
    extension = scope.pop("extensions")["hotport"]
    assert scope == {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/a b/é",
        "raw_path": b"/a%20b/%C3%A9",
        "query_string": b"x=1&y=%20",
        "root_path": "",
        "headers": [(b"host", b"x"), (b"x-mixed", b"Case"), (b"x-mixed", b"twice")],
        "client": ("192.0.2.1", 5),
        "server": ("192.0.2.2", 80),
        "state": {},
    }
    assert (extension["generation"], extension["worker"]) == (7, 2)
    assert not extension["draining"].is_set()


async def test_unix_socket_has_no_client_and_its_path_as_server(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("u") / "s")
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await respond(send, b"")

    async with serving(app) as rig:
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as theirs:
            listener.bind(path)
            listener.listen()
            theirs.connect(path)
            theirs.setblocking(False)
            ours, _ = listener.accept()
            ours.setblocking(False)
            connection = rig.adapter.connection()
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, ours)
            client = Client(theirs)
            await client.send(get())
            await client.answer()
    assert scopes[0]["client"] is None
    assert tuple(scopes[0]["server"]) == (path, None)


async def test_each_request_gets_its_own_copy_of_the_lifespan_state() -> None:
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
        await respond(send, b"")

    async with serving(app, lifespan="on") as rig:
        connection, _ = rig.memory()
        for _ in range(2):
            connection.data_received(get())
            await turns()
    assert seen == [{"pool": "a pool"}, {"pool": "a pool"}]


async def test_context_variables_of_one_request_are_not_seen_by_the_next() -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(variable.get())
        variable.set("leaked")
        await respond(send, b"")

    variable.set("of the worker")
    async with serving(app) as rig:
        connection, _ = rig.memory()
        variable.set("of the accepting task")
        for _ in range(2):
            connection.data_received(get())
            await turns()
    assert seen == ["of the worker", "of the worker"]


# -- answers ---------------------------------------------------------------------------------------------------


async def answer_to(request: bytes, *messages: Message) -> tuple[bytes, MemoryTransport]:
    """What goes over the wire when the application sends `messages`, without the date."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(request)
        await turns()
    written = b"".join(transport.writes)
    lines = written.split(b"\r\n")
    return b"\r\n".join(line for line in lines if not line.startswith(b"date: ")), transport


def start(status: int = 200, *headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


async def test_small_answer_is_one_write() -> None:
    written, transport = await answer_to(get(), start(200, (b"content-length", b"2")), body(b"ok"))
    assert written == b"HTTP/1.1 200 OK\r\nserver: hotport\r\ncontent-length: 2\r\n\r\nok"
    assert len(transport.writes) == 1


async def test_large_answer_is_one_write_too() -> None:
    written, transport = await answer_to(get(), start(), body(b"x" * 100_000))
    assert written.endswith(b"content-length: 100000\r\n\r\n" + b"x" * 100_000)
    assert len(transport.writes) == 1


async def test_answer_in_one_piece_needs_no_chunks() -> None:
    written, _ = await answer_to(get(), start(404, (b"X-Y", b"z")), body(b"gone"))
    assert written == b"HTTP/1.1 404 Not Found\r\nx-y: z\r\nserver: hotport\r\ncontent-length: 4\r\n\r\ngone"


async def test_answer_of_unknown_length_is_chunked() -> None:
    written, transport = await answer_to(get(), start(), body(b"a" * 17, True), body(b"", True), body(b"bc"))
    head = b"HTTP/1.1 200 OK\r\nserver: hotport\r\ntransfer-encoding: chunked\r\n\r\n"
    assert written == head + b"11\r\n" + b"a" * 17 + b"\r\n2\r\nbc\r\n0\r\n\r\n"
    assert len(transport.writes) == 2


async def test_an_application_that_never_waits_lets_others_have_their_turn() -> None:
    """Forty of them sent 2.5 MiB each in one turn of the event loop."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200))
        for left in range(256 if scope["path"] == "/long" else 1, 0, -1):
            await send({"type": "http.response.body", "body": bytes(65536), "more_body": left > 1})

    async with serving(app) as rig:
        (long, much), (short, little) = rig.memory(), rig.memory()
        long.data_received(get("/long"))
        short.data_received(get())
        await until(lambda: bool(little.writes))
        assert len(much.writes) < 60
        await until(lambda: long.state is State.IDLE)


async def test_large_chunks_are_framed_like_small_ones() -> None:
    written, _ = await answer_to(get(), start(), body(b"a" * 40_000, True), body(b"b" * 40_000))
    assert written.endswith(b"\r\n9c40\r\n" + b"b" * 40_000 + b"\r\n0\r\n\r\n")


async def test_http_1_0_answer_of_unknown_length_ends_with_the_connection() -> None:
    written, transport = await answer_to(get(version="1.0"), start(), body(b"a", True), body(b"bc", True), body(b""))
    assert written == b"HTTP/1.1 200 OK\r\nserver: hotport\r\nconnection: close\r\n\r\nabc"
    assert transport.is_closed


async def test_http_1_0_client_that_asks_for_it_keeps_its_connection() -> None:
    written, _transport = await answer_to(get("/", "connection: keep-alive", version="1.0"), start(), body(b"a"))
    assert written.endswith(b"content-length: 1\r\nconnection: keep-alive\r\n\r\na")


async def test_client_that_says_close_gets_it() -> None:
    written, transport = await answer_to(get("/", "Connection: close"), start(), body(b"a"))
    assert written.endswith(b"content-length: 1\r\nconnection: close\r\n\r\na")
    assert transport.is_closed


async def test_application_that_says_close_gets_it() -> None:
    written, transport = await answer_to(get(), start(200, (b"Connection", b"close")), body(b"a"))
    assert written.count(b"close") == 1
    assert transport.has_ended


async def test_head_gets_the_head_only() -> None:
    written, _transport = await answer_to(get(method="HEAD"), start(200, (b"content-length", b"7")), body(b"1234567"))
    assert written == b"HTTP/1.1 200 OK\r\nserver: hotport\r\ncontent-length: 7\r\n\r\n"


async def test_head_without_a_length_is_not_given_a_false_one() -> None:
    written, _ = await answer_to(get(method="HEAD"), start(), body(b"", True), body(b""))
    assert written == b"HTTP/1.1 200 OK\r\nserver: hotport\r\n\r\n"


async def test_204_has_neither_body_nor_length() -> None:
    written, _ = await answer_to(get(), start(204, (b"content-length", b"0")), body(b""))
    assert written == b"HTTP/1.1 204 No Content\r\nserver: hotport\r\n\r\n"


async def test_304_keeps_its_length_and_has_no_body() -> None:
    written, _ = await answer_to(get(), start(304, (b"content-length", b"9")), body(b""))
    assert written == b"HTTP/1.1 304 Not Modified\r\nserver: hotport\r\ncontent-length: 9\r\n\r\n"


async def test_date_and_server_are_ours_unless_the_application_has_set_them() -> None:
    _, transport = await answer_to(get(), start(), body(b""))
    assert transport.answers()[0].headers["date"].endswith(" GMT")
    _, transport = await answer_to(get(), start(200, (b"Server", b"mine"), (b"date", b"then")), body(b""))
    assert transport.writes[0].count(b"server:") == transport.writes[0].count(b"date:") == 1
    assert transport.answers()[0].headers["server"] == "mine"
    _, transport = await answer_to(get(), start(200, (b"server", b"mine")), body(b""))
    assert transport.writes[0].count(b"server:") == transport.writes[0].count(b"date:") == 1


async def test_transfer_encoding_of_the_application_is_the_servers_business() -> None:
    written, _ = await answer_to(get(), start(200, (b"transfer-encoding", b"chunked")), body(b"a"))
    assert b"transfer-encoding" not in written


async def test_head_is_held_until_the_first_body_event() -> None:
    _, transport = await answer_to(get(), start())
    assert transport.answers()[0].status == 500  # it was never sent, so there was still a choice


def quiet(gate: asyncio.Event, begin: Message) -> Application:
    """An application that says its status, and nothing more before the gate opens."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(begin)
        await gate.wait()
        await send(body(b"event", True))
        await send(body(b""))

    return app


@pytest.mark.parametrize(
    ("request_", "fields", "framing", "rest"),
    [
        (get(), [], b"transfer-encoding: chunked\r\n\r\n", b"5\r\nevent\r\n0\r\n\r\n"),
        (get(), [(b"content-length", b"5")], b"content-length: 5\r\n\r\n", b"event"),
        (get(version="1.0"), [], b"connection: close\r\n\r\n", b"event"),
        (get(method="HEAD"), [], b"server: hotport\r\n\r\n", b""),
    ],
    ids=["chunked", "length", "http10", "head"],
)
@pytest.mark.parametrize("is_eager", [True, False])
async def test_stream_without_an_event_opens_at_once(
    request_: bytes, fields: list[tuple[bytes, bytes]], framing: bytes, rest: bytes, is_eager: bool
) -> None:
    """An event stream did not open before its first event; with none by the drain deadline it got a 503."""
    gate = asyncio.Event()
    inner = quiet(gate, start(200, *fields))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if not is_eager:
            await asyncio.sleep(0)
        await inner(scope, receive, send)

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(request_)
        await turns()
        (head,) = transport.writes
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert head.endswith(framing)
        assert connection.state is State.STREAMING
        gate.set()
        await turns()
        assert b"".join(transport.writes[1:]) == rest


async def test_quiet_stream_that_is_cut_at_the_deadline_is_broken_off() -> None:
    """A browser's EventSource connects again after a broken stream, and never again after a 503."""
    async with serving(quiet(asyncio.Event(), start())) as rig:
        client, connection = await rig.connect()
        await client.send(get())
        assert (await client.received()).startswith(b"HTTP/1.1 200 OK\r\n")
        rig.connections.drain(0)
        rig.connections.cut()
        assert rig.connections.fates == {"cut_streaming": 1}
        assert await client.read_to_end() == b"", "the end of the chunks would have looked like a whole answer"
        await until(lambda: connection.state is State.CLOSED)


async def test_body_from_another_task_is_one_write_with_its_head() -> None:
    """As behind Starlette's BaseHTTPMiddleware, whose application runs in a task of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        writer, reader = anyio.create_memory_object_stream[Message](0)

        async def inner() -> None:
            async with writer:
                await writer.send(start())
                await writer.send(body(b"whole"))

        async with anyio.create_task_group() as tasks, reader:
            tasks.start_soon(inner)
            async for message in reader:
                await send(message)

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await turns()
        (write,) = transport.writes
        assert write.endswith(b"content-length: 5\r\n\r\nwhole")


async def test_nothing_is_written_for_a_stream_whose_client_has_left_before_it_opened() -> None:
    async with serving(quiet(asyncio.Event(), start())) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await until(lambda: connection.shared.running != set() and connection.state is State.IN_FLIGHT)
        connection.connection_lost(None)
        await turns()
        assert transport.writes == []


async def test_application_that_answers_before_it_reads_still_asks_for_the_body() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(await read_body(receive)))

    async with serving(app) as rig:
        client, _ = await rig.connect()
        head, _, data = post("/", b"data", "expect: 100-continue").partition(b"data")
        await client.send(head)
        assert await client.received() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await client.received()).startswith(b"HTTP/1.1 200 OK\r\n")
        await client.send(b"data" + data)
        assert await client.received() == b"4\r\ndata\r\n0\r\n\r\n"


async def test_unknown_status_has_an_empty_phrase() -> None:
    written, _ = await answer_to(get(), start(299), body(b""))
    assert written.startswith(b"HTTP/1.1 299 \r\n")


async def test_application_that_raises_is_a_500_and_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start(200, (b"x", b"y")))
        raise ValueError("broken")

    async with serving(app) as rig:
        client, connection = await rig.connect()
        for _ in range(2):
            await client.send(get("/a"))
            answer = await client.answer()
            assert (answer.status, answer.body) == (500, b"Internal Server Error")
            assert "x" not in answer.headers
        assert connection.state is State.IDLE
    assert "the application raised: GET /a" in caplog.text
    assert "ValueError: broken" in caplog.text


@pytest.mark.parametrize(
    ("sent", "name"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"this is a TLS handshake"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0", b"this is the preface of HTTP/2"),
        (b"nonsense\r\n\r\n", b""),
    ],
    ids=["tls", "http2", "nonsense"],
)
async def test_what_is_no_http_1_is_called_by_its_name_with_who_sent_it(
    sent: bytes, name: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with serving(echo) as rig:
        sock, _ = await rig.connect_socket()
        client, (host, port) = Client(sock), sock.getsockname()
        await client.send(sent)
        answer = await client.answer()
        assert answer.status == 400
        assert answer.body.startswith(name)
        client.close()
        await rig.connections.wait_empty()
    assert f"refused with 400: {name.decode()}" in caplog.text
    assert f"it came from {host} port {port}" in caplog.text


@pytest.mark.parametrize("is_cut", [False, True])
async def test_log_tells_a_cut_from_a_client_that_has_left(is_cut: bool, caplog: pytest.LogCaptureFixture) -> None:
    """What was cut at the drain deadline was logged as left by its client."""
    caplog.set_level("INFO")
    has_begun = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        has_begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await receive()
        assert (await receive())["type"] == "http.disconnect"
        raise OSError("nobody is there")

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        await has_begun.wait()
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
        raise ValueError("broken")

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/%1b[2J%0aforged"))
        assert (await client.answer()).status == 500
    assert "the application raised: GET /%1b[2J%0aforged" in caplog.text


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("how", ["raises", "returns", "cancels"])
async def test_answer_that_fails_midway_does_not_look_whole(version: str, how: str) -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        await send(body(b"begun,", True))
        await gate.wait()
        if how == "raises":
            raise ValueError
        if how == "cancels":
            raise asyncio.CancelledError

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(get(version=version))
        await client.begun(b"begun,")
        gate.set()
        with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
            await client.answer()
        await until(lambda: connection.state is State.CLOSED)


# -- the request's body ----------------------------------------------------------------------------------------


async def test_body_arrives_in_pieces_and_whole() -> None:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while not received or received[-1]["more_body"]:
            received.append(await receive())
        await respond(send, b"")

    async with serving(app) as rig:
        connection, _transport = rig.memory()
        connection.data_received(post("/", b"abcdef")[:-6])
        for piece in (b"abc", b"d", b"ef"):
            await turns()
            connection.data_received(piece)
        await turns()
    assert [(m["body"], m["more_body"]) for m in received] == [(b"abc", True), (b"d", True), (b"ef", False)]


async def test_request_without_a_body_receives_an_empty_one() -> None:
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/a"))
        await turns()
    assert transport.answers()[0].body == b"GET /a "


async def test_upload_is_read_no_faster_than_the_application_receives_it() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await respond(send, b"%d" % len(await read_body(receive)))

    size = 4 * http_module.BODY_HIGH_WATER_BYTES
    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/", f"content-length: {size}", method="POST"))
        fed = 0
        while transport.is_reading():
            connection.data_received(b"x" * 10_000)
            fed += 10_000
        assert http_module.BODY_HIGH_WATER_BYTES < fed <= http_module.BODY_HIGH_WATER_BYTES + 10_000
        gate.set()
        await turns()
        assert transport.is_reading()
        while fed < size:
            connection.data_received(b"x" * min(10_000, size - fed))
            fed += min(10_000, size - fed)
            await turns()
    assert transport.answers()[0].body == b"%d" % size


async def test_continue_is_sent_when_the_application_asks_for_the_body() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await respond(send, await read_body(receive))

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(get("/", "content-length: 3", "Expect: 100-Continue", method="POST"))
        await until(lambda: connection.state is State.BODY)
        assert rig.connections.requests == 1
        gate.set()
        assert await client.received() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"abc")
        assert (await client.answer()).body == b"abc"


async def test_continue_is_not_sent_when_the_body_has_come_without_it() -> None:
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        connection.data_received(post("/", b"abc", "expect: 100-continue"))
        await turns()
    assert transport.answers()[0].interim == []


async def test_answer_instead_of_continue_closes_because_the_body_may_or_may_not_come() -> None:
    async with serving(Told()) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/early", "content-length: 3", "expect: 100-continue", method="POST"))
        await turns()
        assert transport.answers()[0].says_close
        assert transport.has_ended


# -- keep-alive and pipelining ---------------------------------------------------------------------------------


async def test_one_connection_serves_many_requests() -> None:
    async with serving(echo) as rig:
        client, _connection = await rig.connect()
        for number in range(5):
            await client.send(post(f"/{number}", b"x"))
            assert (await client.answer()).body == f"POST /{number} x".encode()
        assert rig.connections.requests == 5
        assert rig.connections.accepted == 1


async def test_pipelined_requests_are_answered_in_order_one_at_a_time() -> None:
    running = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        await echo(scope, receive, send)

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(b"".join(post(f"/{n}", b"b" * n) for n in range(200)))
        for number in range(200):
            assert (await client.answer()).body == f"POST /{number} ".encode() + b"b" * number


async def test_reading_pauses_while_too_many_requests_wait_for_their_turn() -> None:
    app = Told()
    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/slow") + get("/x") * (http_module.PIPELINE_MAX // 2))
        assert transport.is_reading()
        connection.data_received(get("/x"))
        assert not transport.is_reading()
        app.gate.set()
        await until(lambda: connection.state is State.IDLE)
        assert transport.is_reading()
        assert len(transport.answers()) == http_module.PIPELINE_MAX // 2 + 2


async def test_requests_behind_one_that_says_close_are_not_answered() -> None:
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/a", "connection: close") + get("/b"))
        await turns()
    assert [a.body for a in transport.answers()] == [b"GET /a "]


async def test_idle_connection_is_closed_after_the_keep_alive_time() -> None:
    async with serving(echo, keep_alive_s=0.01) as rig:
        client, connection = await rig.connect()
        await client.send(get())
        await client.answer()
        assert await client.read_to_end() == b""
        assert connection.state is State.CLOSED


async def test_only_idle_connections_are_timed() -> None:
    app = Told()
    async with serving(app, keep_alive_s=0.01) as rig:
        fresh, _ = await rig.connect()
        half, half_connection = await rig.connect()
        slow, _ = await rig.connect()
        idle, _ = await rig.connect()
        await half.send(get("/a")[:10])
        await slow.send(get("/slow"))
        await until(lambda: half_connection.state is State.HALF_HEAD and bool(app.seen))
        for _ in range(3):  # three times over, an idle one is closed
            idle, _ = await rig.connect()
            await idle.send(get())
            await idle.answer()
            await idle.read_to_end()
        app.gate.set()
        assert (await slow.answer()).body == b"slow"
        await half.send(get("/a")[10:])
        assert (await half.answer()).body == b"GET /a "
        await fresh.send(get("/b"))
        assert (await fresh.answer()).body == b"GET /b "


async def test_request_that_arrives_as_the_keep_alive_time_ends_is_answered() -> None:
    """The client had sent its request; the server closed on it because its timer ran before its read."""
    async with serving(echo) as rig:
        client, connection = await rig.connect()
        await client.send(get())
        await client.answer()
        await client.send(get("/late"))  # in the kernel, not read yet: nothing has run since
        connection.expire()
        assert (await client.answer()).body == b"GET /late "


# -- leaving clients -------------------------------------------------------------------------------------------


async def test_receive_says_disconnect_after_the_answer() -> None:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"")
        received.extend([await receive(), await receive()])

    async with serving(app) as rig:
        connection, _ = rig.memory()
        connection.data_received(get())
        await turns()
    assert received == [{"type": "http.disconnect"}] * 2


async def test_waiting_receive_learns_of_the_answer_that_another_task_sends() -> None:
    received: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        waiting = [asyncio.ensure_future(receive()) for _ in range(2)]
        await asyncio.sleep(0)
        await respond(send, b"")
        received.extend(await asyncio.gather(*waiting))

    async with serving(app) as rig:
        connection, _ = rig.memory()
        connection.data_received(get())
        await turns()
    assert received == [{"type": "http.disconnect"}] * 2


async def test_client_that_leaves_is_a_disconnect_and_then_an_os_error(caplog: pytest.LogCaptureFixture) -> None:
    outcome: list[Any] = []
    is_running = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        is_running.set()
        outcome.append(await receive())
        while True:  # the first write may still be taken by the kernel
            try:
                await send(body(b"x", True) if len(outcome) > 1 else start())
            except OSError as error:
                outcome.append(error)
                raise
            outcome.append("sent")
            await asyncio.sleep(0)

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        await is_running.wait()
        client.close()
        await rig.connections.wait_empty()
        await until(lambda: isinstance(outcome[-1], OSError))
    assert outcome[0] == {"type": "http.disconnect"}
    assert isinstance(outcome[-1], ClientLeft)
    assert "raised" not in caplog.text  # it is not the application's error


async def test_what_a_framework_makes_of_a_client_that_left_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await receive()
        try:
            await respond(send, b"")
        except OSError:
            raise RuntimeError("ClientDisconnect") from None

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await turns()
        transport.abort()
        await turns()
    assert "raised" not in caplog.text


async def test_error_of_an_application_that_does_not_know_that_its_client_has_left_is_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        raise ValueError("broken")

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await turns()
        transport.abort()
        await turns()
        gate.set()
        await turns()
    assert "ValueError: broken" in caplog.text


async def test_body_that_ends_with_the_connection_is_a_disconnect() -> None:
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read_body(receive))

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(post("/", b"abcdef")[:-3])
        await until(lambda: connection.state is State.BODY)
        client.end()
        assert await client.read_to_end() == b""
        await until(lambda: bool(bodies))
    assert bodies == [b"abc<disconnected>"]


async def test_client_that_only_ends_its_side_gets_its_answers() -> None:
    """``printf 'GET / ...' | nc`` got an empty answer."""
    app = Told()
    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(get("/slow") + get("/a") + get("/half")[:9])
        client.end()
        await until(lambda: connection.has_eof)
        app.gate.set()
        assert (await client.answer()).body == b"slow"
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"GET /a ", True)
        assert await client.read_to_end() == b""


async def test_send_waits_while_the_client_does_not_read() -> None:
    sent: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        for number in range(3):
            await send(body(b"x", True))
            sent.append(number)
        await send(body(b""))

    async with serving(app) as rig:
        connection, _transport = rig.memory()
        connection.pause_writing()
        connection.data_received(get())
        await turns()
        assert sent == []
        connection.resume_writing()
        await turns()
        assert sent == [0, 1, 2]


async def test_send_that_waits_learns_that_the_client_has_left() -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await respond(send, b"x")
        except OSError as error:
            errors.append(error)

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.pause_writing()
        connection.data_received(get())
        await turns()
        transport.abort()
        await turns()
    assert isinstance(errors[0], ClientLeft)


async def test_slow_reader_gets_all_of_a_large_answer() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(start())
        for _ in range(64):
            await send(body(b"x" * 65536, True))
        await send(body(b""))

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        assert len((await client.answer()).body) == 64 * 65536


async def test_work_after_the_answer_does_not_hold_the_connection() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"ok")
        await gate.wait()
        done.set()

    async with serving(app) as rig:
        client, connection = await rig.connect()
        for _ in range(2):
            await client.send(get())
            await client.answer()
        assert connection.state is State.IDLE
        gate.set()
        await done.wait()


async def test_shutdown_waits_for_work_after_the_answer_until_the_drain_deadline() -> None:
    outcome: list[str] = []
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"ok")
        try:
            if scope["path"] == "/long":
                await asyncio.Event().wait()
            await gate.wait()
            outcome.append("done")
        except asyncio.CancelledError:
            outcome.append("cancelled")
            raise

    async with serving(app) as rig:
        for path in ("/short", "/long"):
            client, _ = await rig.connect()
            await client.send(get(path, "connection: close"))
            await client.answer()
            client.close()
        rig.connections.drain(0.2)
        asyncio.get_running_loop().call_soon(gate.set)
        await rig.connections.wait_empty()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await rig.adapter.finish()
        await rig.adapter.shutdown()
    assert outcome == ["done", "cancelled"]


# -- input that is no request ----------------------------------------------------------------------------------


async def test_requests_in_front_of_a_malformed_one_are_answered_first() -> None:
    app = Told()
    async with serving(app) as rig:
        client, _connection = await rig.connect()
        await client.send(get("/slow") + get("/a") + b"nonsense\r\n\r\n")
        await until(lambda: bool(app.seen))
        app.gate.set()
        assert (await client.answer()).body == b"slow"
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"GET /a ", False)
        assert (await client.answer()).status == 400


@pytest.mark.parametrize("is_behind", [False, True])
async def test_body_that_turns_out_malformed_is_refused(is_behind: bool) -> None:
    bodies: list[bytes] = []
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/front":
            await gate.wait()
            await respond(send, b"front")
        else:
            bodies.append(await read_body(receive))
            await respond(send, b"")

    async with serving(app) as rig:
        client, _ = await rig.connect()
        front = get("/front") if is_behind else b""
        await client.send(front + get("/", "transfer-encoding: chunked", method="POST") + b"1\r\na\r\nzz")
        gate.set()
        if is_behind:
            assert (await client.answer()).body == b"front"
        assert (await client.answer()).status == 400
    assert bodies == []  # it is never begun with: what is known to be malformed reaches no application


async def test_body_that_turns_out_malformed_midway_through_the_answer_truncates_it() -> None:
    app = Told()
    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get("/stream", "transfer-encoding: chunked", method="POST"))
        await client.begun(b"begun,")
        await client.send(b"zz\r\n")
        with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
            await client.answer()


# -- upgrades --------------------------------------------------------------------------------------------------

UPGRADE = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: x")


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_declined_upgrade_is_served_as_plain_http_with_its_body_and_what_follows(size: int) -> None:
    chunked = get("/c", "transfer-encoding: chunked", *UPGRADE, method="POST") + b"3\r\nabc\r\n0\r\nx: y\r\n\r\n"
    stream = get("/a", *UPGRADE) + post("/b", b"GET /no HTTP/1.1\r\n\r\n", *UPGRADE) + chunked + get("/d")
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        for place in range(0, len(stream), size):
            connection.data_received(stream[place : place + size])
        await turns(40)
    assert [a.body for a in transport.answers()] == [
        b"GET /a ",
        b"POST /b GET /no HTTP/1.1\r\n\r\n",
        b"POST /c abc",
        b"GET /d ",
    ]


# -- where one request ends and the next begins ----------------------------------------------------------------

#: Requests and what is answered; together they end in every way in which a request can end.
CONVERSATION: list[tuple[bytes, bytes]] = [
    (get("/1"), b"GET /1 "),
    (post("/2", b"two\r\n\r\n"), b"POST /2 two\r\n\r\n"),
    (b"\r\n\r\n" + get("/3"), b"GET /3 "),
    (
        get("/4", "transfer-encoding: chunked", method="PUT") + b"4\r\n\r\n\r\n\r\n3;a=b\r\nabc\r\n0\r\n\r\n",
        b"PUT /4 \r\n\r\nabc",
    ),
    (get("/5", "transfer-encoding: chunked", method="PUT") + b"1\r\nx\r\n0\r\nt: u\r\n\r\n", b"PUT /5 x"),
    (post("/6", b""), b"POST /6 "),
    (get("/7", *UPGRADE), b"GET /7 "),
    (get("/8"), b"GET /8 "),
]


def half_head_at(conversation: list[tuple[bytes, bytes]], place: int) -> bytes:
    """What has been sent of a head that is not whole, when `place` bytes have been sent."""
    for request, _ in conversation:
        if place < len(request):
            head = request[:place].lstrip(b"\r\n")
            return b"" if b"\r\n\r\n" in head else head
        place -= len(request)
    return b""


async def test_conversation_split_at_every_byte_is_the_same_conversation() -> None:
    stream = b"".join(request for request, _ in CONVERSATION)
    async with serving(echo) as rig:
        for place in range(len(stream) + 1):
            connection, transport = rig.memory()
            if place:
                connection.data_received(stream[:place])
            assert connection.unconsumed == half_head_at(CONVERSATION, place), place
            if place < len(stream):
                connection.data_received(stream[place:])
            assert connection.unconsumed == b""
            await turns(40)
            assert [a.body for a in transport.answers()] == [answer for _, answer in CONVERSATION], place
            assert connection.state is State.IDLE
            transport.close()


async def test_conversation_sent_byte_by_byte_is_the_same_conversation() -> None:
    stream = b"".join(request for request, _ in CONVERSATION)
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        for place in range(len(stream)):
            connection.data_received(stream[place : place + 1])
            assert connection.unconsumed == half_head_at(CONVERSATION, place + 1), place
            await turns(3)
        await turns(40)
        assert [a.body for a in transport.answers()] == [answer for _, answer in CONVERSATION]


@settings(max_examples=60, deadline=None)
@given(
    conversation=st.lists(st.sampled_from(CONVERSATION), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 900), max_size=6),
    partial=st.integers(0, 30),
)
def test_any_conversation_in_any_pieces_is_answered_and_its_rest_can_be_replayed(
    conversation: list[tuple[bytes, bytes]], cuts: list[int], partial: int
) -> None:
    async def check() -> None:
        stream = b"".join(request for request, _ in conversation) + get("/last")[:partial]
        places = sorted({0, *(cut for cut in cuts if cut < len(stream)), len(stream)})
        async with serving(echo) as rig:
            connection, transport = rig.memory()
            for begin, end in itertools.pairwise(places):
                connection.data_received(stream[begin:end])
                await turns(2)
            await turns(60)
            assert [a.body for a in transport.answers()] == [answer for _, answer in conversation]
            assert connection.unconsumed == get("/last")[:partial]
            other, other_transport = rig.memory()
            rest = connection.unconsumed + get("/last")[partial:]
            other.data_received(rest)
            await turns()
            assert [a.body for a in other_transport.answers()] == [b"GET /last "]

    asyncio.run(check())


# -- every state: drain, cut, and one after the other ----------------------------------------------------------

Enter = Callable[[Client], Awaitable[None]]


async def _fresh(client: Client) -> None:
    pass


async def _half_head(client: Client) -> None:
    await client.send(get("/half")[:12])


async def _body(client: Client) -> None:
    await client.send(post("/body", b"abcd")[:-2])


async def _in_flight(client: Client) -> None:
    await client.send(get("/slow"))


async def _streaming(client: Client) -> None:
    await client.send(get("/stream"))
    await client.begun(b"begun,")


async def _surplus(client: Client) -> None:
    await client.send(post("/early", b"abcd")[:-2])
    assert (await client.answer()).body == b"early"


async def _idle(client: Client) -> None:
    await client.send(get("/idle"))
    assert (await client.answer()).body == b"GET /idle "


ENTER: dict[State, Enter] = {
    State.FRESH: _fresh,
    State.HALF_HEAD: _half_head,
    State.BODY: _body,
    State.IN_FLIGHT: _in_flight,
    State.STREAMING: _streaming,
    State.SURPLUS: _surplus,
    State.IDLE: _idle,
}

#: What the client sends on, and the bodies of the answers that it gets: the last one says close.
FINISH: dict[State, tuple[bytes, list[bytes]]] = {
    State.FRESH: (get("/a"), [b"GET /a "]),
    State.HALF_HEAD: (get("/half")[12:], [b"GET /half "]),
    State.BODY: (b"cd", [b"POST /body abcd"]),
    State.IN_FLIGHT: (b"", [b"slow"]),
    State.STREAMING: (b"", [b"begun,ended"]),
    State.SURPLUS: (b"cd" + get("/a"), [b"GET /a "]),
    State.IDLE: (get("/a"), [b"GET /a "]),
}

#: Fate, and what the client gets: nothing, a status, or something that cannot be mistaken for a whole answer.
CUT: dict[State, tuple[str, int | str]] = {
    State.FRESH: ("cut_fresh", "nothing"),
    State.HALF_HEAD: ("cut_half_head", 503),
    State.BODY: ("cut_body", 503),
    State.IN_FLIGHT: ("cut_in_flight", 503),
    State.STREAMING: ("cut_streaming", "truncated"),
    State.SURPLUS: ("idle_closed", "nothing"),
    State.IDLE: ("idle_closed", "nothing"),
}

every_state = pytest.mark.parametrize("state", list(ENTER), ids=lambda state: state.value)


async def enter(rig: Rig, state: State, **how: Any) -> tuple[Client, HttpConnection]:
    client, connection = await rig.connect(**how)
    await ENTER[state](client)
    await until(lambda: connection.state is state)
    await turns()  # an application that was begun is at its first wait
    return client, connection


def test_every_state_in_which_a_client_may_wait_is_in_the_tables() -> None:
    assert set(ENTER) == set(FINISH) == set(CUT) == set(State) - {State.CLOSING, State.CLOSED}


@every_state
async def test_drained_connection_answers_what_comes_and_says_close_on_the_last(state: State) -> None:
    app = Told()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        rig.connections.drain(60)
        await turns()
        assert connection.state is state, "drain closes nothing"
        request, bodies = FINISH[state]
        await client.send(request)
        app.gate.set()
        answers = [await client.answer() for _ in bodies]
        assert [a.body for a in answers] == bodies
        if state is State.STREAMING:  # its head was out before the drain: the next answer says it
            await client.send(get("/a"))
            answers.append(await client.answer())
        assert [a.says_close for a in answers] == [False] * (len(answers) - 1) + [True]
        assert await client.read_to_end() == b""
        assert connection.state is State.CLOSING
        client.close()
        await rig.connections.wait_empty()
        assert rig.connections.fates == {"told_to_close": 1}


@every_state
async def test_connection_moves_at_once_exactly_in_the_states_of_which_the_table_says_it(state: State) -> None:
    async with serving(app := Told()) as rig:
        _, connection = await enter(rig, state)
        ready: list[Any] = []
        assert connection.prepare_handoff(ready.append)
        moves_at_once = STATES[state].moves is Moves.AT_ONCE
        assert bool(ready) is moves_at_once
        assert (connection.offer() is not None) is moves_at_once
        connection.drain()
        app.gate.set()


@every_state
@pytest.mark.parametrize("is_drained", [False, True])
async def test_cut_connection_ends_as_politely_as_its_state_allows(state: State, is_drained: bool) -> None:
    app = Told()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        if is_drained:
            rig.connections.drain(0)
        fate, outcome = CUT[state]
        rig.connections.cut()
        assert rig.connections.fates == {fate: 1}
        assert connection.state is State.CLOSING
        match outcome:
            case 503:
                answer = await client.answer()
                assert (answer.status, answer.says_close) == (503, True)
                assert await client.read_to_end() == b""
            case "nothing":
                assert await client.read_to_end() == b""
            case _:
                with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
                    await client.answer()
        client.close()
        await until(lambda: connection.state is State.CLOSED)
        running = {State.IN_FLIGHT: ["/slow"], State.BODY: ["/body"], State.STREAMING: ["/stream"]}
        assert app.cancelled == running.get(state, [])
    assert sum(rig.connections.fates.values()) == 1, "each connection is counted once"


@every_state
async def test_client_that_leaves_during_the_drain_has_finished(state: State) -> None:
    app = Told()
    async with serving(app) as rig:
        client, connection = await enter(rig, state)
        rig.connections.drain(60)
        client.close()
        await until(lambda: connection.has_eof or connection.state is State.CLOSED)
        app.gate.set()
        await rig.connections.wait_empty()
        assert rig.connections.fates == {"finished": 1}


@every_state
async def test_connection_over_a_unix_socket_has_the_same_states(state: State) -> None:
    async with serving(Told()) as rig:
        _, connection = await enter(rig, state, family=socket.AF_UNIX)
        assert [*rig.connections.open] == [connection]


async def test_connection_that_is_accepted_into_a_drain_is_told_at_once() -> None:
    async with serving(echo) as rig:
        rig.connections.drain(60)
        client, _connection = await rig.connect()
        await client.send(get("/a"))
        assert (await client.answer()).says_close


async def test_connection_cut_before_it_is_attached_is_closed_when_it_is() -> None:
    async with serving(echo) as rig:
        connection = rig.adapter.connection()
        rig.connections.drain(0)
        rig.connections.cut()
        assert rig.connections.fates == {"cut_fresh": 1}
        transport = MemoryTransport(connection)
        assert transport.is_aborted
        await turns()
        assert connection.state is State.CLOSED


async def test_pipelined_requests_are_all_answered_after_a_drain_and_only_the_last_says_close() -> None:
    app = Told()
    async with serving(app) as rig:
        client, _connection = await rig.connect()
        await client.send(get("/slow") + get("/a") + post("/b", b"bcd")[:-1])
        await until(lambda: bool(app.seen))
        rig.connections.drain(60)
        app.gate.set()
        answers = [await client.answer(), await client.answer()]
        await client.send(b"d" + get("/c")[:5])
        answers.append(await client.answer())
        await client.send(get("/c")[5:])
        answers.append(await client.answer())
        assert [a.body for a in answers] == [b"slow", b"GET /a ", b"POST /b bcd", b"GET /c "]
        assert [a.says_close for a in answers] == [False, False, False, True]


async def test_pipelined_request_that_is_still_in_the_kernel_is_answered_after_a_drain() -> None:
    app = Told()
    async with serving(app) as rig:
        client, _connection = await enter(rig, State.IN_FLIGHT)
        rig.connections.drain(60)
        app.gate.set()
        await client.send(get("/a"))  # in the kernel before the application goes on: nothing has run since
        answers = [await client.answer(), await client.answer()]
        assert [(a.body, a.says_close) for a in answers] == [(b"slow", False), (b"GET /a ", True)]


async def test_late_bytes_cannot_reset_the_last_answer() -> None:
    """A client that pipelined on after the last answer was written lost that answer to a reset."""
    async with serving(echo) as rig:
        client, connection = await rig.connect()
        rig.connections.drain(60)
        await client.send(get("/a"))
        await until(lambda: connection.state is State.CLOSING)
        for _ in range(50):
            await client.send(get("/late") * 20)
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"GET /a ", True)
        assert await client.read_to_end() == b""
        client.close()
        await rig.connections.wait_empty()
    assert rig.connections.requests == 1


async def test_refused_upload_is_read_to_its_end_so_that_the_refusal_arrives() -> None:
    async with serving(Told()) as rig:
        client, connection = await rig.connect()
        await client.send(get("/body", "content-length: 3000000", method="POST"))
        await until(lambda: connection.state is State.BODY)
        rig.connections.drain(0)
        rig.connections.cut()
        await client.send(b"x" * 3_000_000)
        assert (await client.answer()).status == 503


async def test_client_that_never_closes_is_given_up_after_the_linger_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_module, "LINGER_S", 0.01)
    async with serving(echo) as rig:
        client, _connection = await rig.connect()
        rig.connections.drain(60)
        await client.send(get("/a"))
        async with asyncio.timeout(DEADLINE_S):
            await rig.connections.wait_empty()
        assert rig.connections.fates == {"told_to_close": 1}


async def test_idle_connection_may_run_into_its_keep_alive_time_while_draining() -> None:
    async with serving(echo, keep_alive_s=0.05) as rig:
        client, _connection = await enter(rig, State.IDLE)
        rig.connections.drain(60)
        assert await client.read_to_end() == b""
        await rig.connections.wait_empty()
        assert rig.connections.fates == {"idle_closed": 1}


@pytest.mark.parametrize("state", [State.FRESH, State.IDLE], ids=lambda state: state.value)
async def test_cut_counts_a_request_that_was_sent_but_not_read(state: State) -> None:
    async with serving(echo) as rig:
        client, connection = await enter(rig, state)
        await client.send(get("/unread"))  # in the kernel, not read yet: nothing has run since
        assert connection.cut() == "cut_half_head"
        assert (await client.answer()).status == 503


async def test_cut_counts_an_answer_that_the_client_has_not_taken_yet() -> None:
    size = 3_000_000  # more than the kernel takes

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"x" * size)

    async with serving(app) as rig:
        client, connection = await rig.connect(family=socket.AF_UNIX)
        await client.send(get())
        await until(lambda: connection.state is State.IDLE)
        assert connection.cut() == "cut_streaming"
        assert len((await client.answer()).body) == size  # and sends it as long as the process lives


async def test_close_delimited_answer_that_is_cut_is_reset_because_an_end_would_look_whole() -> None:
    async with serving(Told()) as rig:
        client, connection = await rig.connect()
        await client.send(get("/stream", version="1.0"))
        await client.begun(b"begun,")
        connection.cut()
        with pytest.raises(ConnectionResetError):
            await client.read_to_end()


async def test_cut_application_gets_an_os_error_if_it_sends_on(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await respond(send, b"too late")
            except OSError as error:
                errors.append(error)
            raise

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(get())
        await until(lambda: rig.connections.requests == 1)
        await turns()
        connection.cut()
        assert (await client.answer()).status == 503
        await until(lambda: bool(errors))
    assert isinstance(errors[0], ClientLeft)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_application_is_told_when_draining_starts() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        draining = scope["extensions"]["hotport"]["draining"]
        await send(start())
        await send(body(b"begun,", True))
        await draining.wait()
        await send(body(b"ended"))

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        await client.begun(b"begun,")
        rig.connections.drain(60)
        assert (await client.answer()).body == b"begun,ended"
