"""Early hints, trailers and files: what ASGI lets applications do beside the plain answer."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import h11
import pytest

from hotport.adapters.asgi import State
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.spec import Message, Receive, Scope, Send
from tests.adapters.asgi_support import DEADLINE_S, Client, Rig, echo, respond, serving, turns, until
from tests.adapters.test_asgi_http import get

pytestmark = pytest.mark.anyio


def sending(*messages: Message) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


async def test_scope_names_the_extensions() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, " ".join(sorted(scope["extensions"])).encode())

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        assert (
            await client.answer()
        ).body == b"hotport http.response.early_hint http.response.pathsend http.response.trailers"


# -- early hints -----------------------------------------------------------------------------------------------

HINT: Message = {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload", b"</b.js>; rel=preload"]}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_early_hints_come_before_the_answer_and_only_to_clients_that_know_them(version: str) -> None:
    async with serving(sending(HINT, START, {"type": "http.response.body", "body": b"x"})) as rig:
        connection, transport = rig.memory()
        connection.data_received(get(version=version))
        await turns()
        hint = b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nlink: </b.js>; rel=preload\r\n\r\n"
        sent = b"".join(transport.writes)
        assert sent.startswith(hint) is (version == "1.1")
        assert sent.removeprefix(hint).startswith(b"HTTP/1.1 200 OK\r\n")


# -- trailers --------------------------------------------------------------------------------------------------

TRAILED: Message = {**START, "trailers": True}
TRAILERS: Message = {"type": "http.response.trailers", "headers": [(b"digest", b"abc")], "more_trailers": False}


@pytest.mark.parametrize("wants", [True, False])
async def test_trailers_follow_a_chunked_body_if_the_client_reads_them(wants: bool) -> None:
    first: Message = {**TRAILERS, "headers": [(b"X-First", b"1")], "more_trailers": True}
    async with serving(sending(TRAILED, {"type": "http.response.body", "body": b"abc"}, first, TRAILERS)) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/", *(["te: trailers"] if wants else [])))
        await turns()
        sent = b"".join(transport.writes)
        assert b"transfer-encoding: chunked\r\n" in sent
        lines = b"x-first: 1\r\ndigest: abc\r\n" if wants else b""
        assert sent.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n" + lines + b"\r\n")
        assert connection.state is State.IDLE


async def test_trailers_are_dropped_where_there_is_no_room_for_them() -> None:
    for request, headers in ((get(method="HEAD"), []), (get(version="1.0"), []), (get(), [(b"content-length", b"3")])):
        start = {**TRAILED, "headers": headers}
        async with serving(sending(start, {"type": "http.response.body", "body": b"abc"}, TRAILERS)) as rig:
            connection, transport = rig.memory()
            connection.data_received(request)
            await turns()
            assert b"digest" not in b"".join(transport.writes)
            assert connection.state in (State.IDLE, State.CLOSING, State.CLOSED)


async def test_answer_without_its_promised_trailers_does_not_look_whole() -> None:
    async with serving(sending(TRAILED, {"type": "http.response.body", "body": b"abc"})) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await turns()
        assert transport.is_aborted
        assert not b"".join(transport.writes).endswith(b"0\r\n\r\n")


# -- files -----------------------------------------------------------------------------------------------------


def pathsend(path: Path, **start: Any) -> Any:
    return sending({**START, **start}, {"type": "http.response.pathsend", "path": str(path)})


CONTENT = bytes(range(256)) * 20_000
SIZE = len(CONTENT)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
async def test_file_is_sent_whole_and_the_connection_goes_on(large: Path, family: socket.AddressFamily) -> None:
    async with serving(pathsend(large)) as rig:
        client, connection = await rig.connect(family=family)
        for _ in range(2):
            await client.send(get())
            answer = await client.answer()
            assert answer.headers["content-length"] == str(SIZE)
            assert answer.body == CONTENT
        assert connection.state is State.IDLE


async def test_head_of_a_file(large: Path) -> None:
    async with serving(pathsend(large)) as rig:
        client, _ = await rig.connect()
        await client.send(get(method="HEAD"))
        answer = await client.answer("HEAD")
        assert answer.headers.get("content-length") in (None, str(SIZE))
        assert answer.body == b""


async def test_file_that_is_not_there_is_a_500(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(pathsend(tmp_path / "gone")) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        assert (await client.answer()).status == 500
    assert "FileNotFoundError" in caplog.text


async def test_file_of_another_length_than_was_said_is_a_500(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(pathsend(large, headers=[(b"content-length", b"5")])) as rig:
        client, _ = await rig.connect()
        await client.send(get())
        assert (await client.answer()).status == 500
    assert "longer than its content-length" in caplog.text


async def test_client_that_leaves_while_a_file_is_sent_ends_it_quietly(
    large: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR")
    async with serving(pathsend(large)) as rig:
        client, connection = await rig.connect(family=socket.AF_UNIX)
        await client.send(get())
        await until(lambda: connection.state is State.STREAMING)
        client.close()
        await rig.connections.wait_empty()
        await rig.adapter.finish()
    assert not caplog.records


async def test_file_that_is_cut_at_the_deadline_does_not_look_whole(large: Path) -> None:
    async with serving(pathsend(large)) as rig:
        client, connection = await rig.connect(family=socket.AF_UNIX)
        await client.send(get())
        await until(lambda: connection.state is State.STREAMING)
        rig.connections.drain(0)
        rig.connections.cut()
        assert rig.connections.fates == {"cut_streaming": 1}
        assert len(await client.read_to_end()) < SIZE


@pytest.mark.parametrize("size", [SIZE, 0])
@pytest.mark.parametrize(
    ("version", "fields", "trailers"),
    [("1.1", {}, False), ("1.1", {}, True), ("1.1", {"headers": "length"}, False), ("1.0", {}, False)],
    ids=["chunked", "trailers", "length", "http10"],
)
async def test_file_behind_a_head_that_did_not_wait_for_it_is_framed_as_the_head_says(
    large: Path, size: int, version: str, fields: dict[str, Any], trailers: bool
) -> None:
    """The file was looked for in a thread, and the head was not held as long as that."""
    os.truncate(large, size)
    gate = asyncio.Event()
    headers = [(b"content-length", str(size).encode())] if fields else []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "headers": headers, "trailers": trailers})
        await gate.wait()
        await send({"type": "http.response.pathsend", "path": str(large)})
        if trailers:
            await send(TRAILERS)

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(get("/", "te: trailers", version=version))
        await until(lambda: connection.state is State.STREAMING)
        gate.set()
        assert (await client.answer()).body == CONTENT[:size]
        await until(lambda: connection.state is (State.IDLE if version == "1.1" else State.CLOSED))


async def test_file_of_another_length_than_a_head_has_said_is_broken_off(large: Path) -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START, "headers": [(b"content-length", b"5")]})
        await gate.wait()
        await send({"type": "http.response.pathsend", "path": str(large)})

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get())
        await until(lambda: connection.state is State.STREAMING)
        gate.set()
        await turns()
        assert transport.is_aborted
        assert len(transport.writes) == 1


# -- the access log --------------------------------------------------------------------------------------------


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr("hotport.observe.logs.write", lambda text: lines.extend(text.splitlines()))
    return lines


async def test_structured_access_log_has_a_line_for_each_request(written: list[str]) -> None:
    async with serving(echo, access_log="structured") as rig:
        client, _ = await rig.connect()
        await client.send(get("/a%20b?c=d") + get('/"quoted"') + b"nonsense\r\n\r\n")
        await client.answer()
        await client.answer()
        assert (await client.answer()).status == 400
        await asyncio.sleep(0)
    lines = [json.loads(line) for line in written]
    assert [(line["event"], line.get("method"), line.get("path"), line["status"]) for line in lines] == [
        ("request", "GET", "/a%20b?c=d", 200),
        ("request", "GET", '/"quoted"', 200),
        ("request", None, None, 400),
    ]
    assert lines[0]["bytes"] == len(b"GET /a b ")
    assert lines[0]["client"] == "127.0.0.1"
    assert lines[0]["ms"] >= 0
    assert {"level", "logger", "timestamp"} <= set(lines[0])


async def test_combined_access_log_cannot_be_forged(written: list[str]) -> None:
    async with serving(echo, access_log="combined") as rig:
        client, _ = await rig.connect()
        await client.send(get('/a"b', 'user-agent: x" 200 1 "\xe9\\', "referer: http://x/"))
        await client.answer()
        await asyncio.sleep(0)
    (line,) = written
    assert line.startswith("127.0.0.1 - - [")
    assert line.endswith(r'"GET /a\x22b HTTP/1.1" 200 9 "http://x/" "x\x22 200 1 \x22\xc3\xa9\x5c"')


async def test_request_whose_client_does_not_wait_is_logged_as_such(written: list[str]) -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()

    async with serving(app, access_log="combined") as rig:
        client, connection = await rig.connect()
        await client.send(get("/slow"))
        await until(lambda: connection.state is State.IN_FLIGHT)
        client.close()
        await until(lambda: bool(connection.has_eof))
        connection.transport.abort()
        await rig.connections.wait_empty()
        gate.set()
        await turns()
    (line,) = written
    assert '"GET /slow HTTP/1.1" 499 0 ' in line


# -- where several of these meet -------------------------------------------------------------------------------


async def test_file_that_cannot_be_read_on_does_not_look_whole_and_nothing_is_answered_behind_it(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came next was taken for the rest of the file."""
    real = os.sendfile

    def broken(out: int, source: int, offset: int, count: int) -> int:
        if offset:
            raise OSError(errno.EIO, "the disk is broken")
        return real(out, source, offset, 1000)

    monkeypatch.setattr(os, "sendfile", broken)
    async with serving(pathsend(large)) as rig:
        client, _ = await rig.connect()
        await client.send(get() + get("/behind"))
        with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
            await client.answer()


async def test_file_leaves_no_room_for_trailers(large: Path) -> None:
    messages = ({**TRAILED}, {"type": "http.response.pathsend", "path": str(large)}, TRAILERS)
    async with serving(sending(*messages)) as rig:
        client, connection = await rig.connect()
        await client.send(get("/", "te: trailers"))
        answer = await client.answer()
        assert (answer.headers["content-length"], answer.body) == (str(SIZE), CONTENT)
        assert connection.state is State.IDLE


async def test_file_is_not_sent_on_when_its_answer_was_truncated(large: Path) -> None:
    """Its descriptors were held for as long as the client liked, and nothing counted them."""
    async with serving(pathsend(large)) as rig:
        client, connection = await rig.connect(family=socket.AF_UNIX)
        await client.send(get("/", "transfer-encoding: chunked", method="POST"))
        await until(lambda: connection.state is State.STREAMING)
        await client.send(b"zz\r\n")
        await rig.connections.wait_empty()
        async with asyncio.timeout(DEADLINE_S):
            await rig.adapter.finish()
        assert len(await client.read_to_end()) < SIZE


async def test_nothing_is_open_after_the_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.adapters.asgi.LINGER_S", 0.01)
    async with serving(echo) as rig:
        client, connection = await rig.connect()
        await client.send(get("/", "content-length: 50", method="POST"))
        await until(lambda: connection.state is State.BODY)
        rig.connections.drain(0)
        rig.connections.cut()
        assert (await client.answer()).status == 503
        await rig.adapter.shutdown()  # the client does not close
        assert connection.transport.is_closing()
        await until(lambda: connection.state is State.CLOSED)


Doing = Callable[[Rig, Client, HttpConnection], Awaitable[None]]


async def _cut(rig: Rig, client: Client, connection: HttpConnection) -> None:
    await client.send(get("/wait"))
    await until(lambda: connection.state is State.IN_FLIGHT)
    connection.cut()


async def _too_large(rig: Rig, client: Client, connection: HttpConnection) -> None:
    await client.send(get("/wait", "transfer-encoding: chunked", method="POST"))
    await until(lambda: connection.state is State.BODY)
    await client.send(b"400\r\n" + b"x" * 1024 + b"\r\n")


async def _hidden(rig: Rig, client: Client, connection: HttpConnection) -> None:
    await client.send(get("/changed?a=b"))
    await client.answer()


async def _handshake(rig: Rig, client: Client, connection: HttpConnection) -> None:
    await client.send(get("/wait", "upgrade: websocket", "connection: upgrade", "sec-websocket-version: 7"))


async def _silent_handshake(rig: Rig, client: Client, connection: HttpConnection) -> None:
    fields = ("upgrade: websocket", "connection: upgrade", "sec-websocket-version: 13")
    await client.send(get("/wait", *fields, "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="))
    await until(lambda: rig.connections.requests == 1)


@pytest.mark.parametrize(
    ("doing", "line"),
    [
        (_cut, '"GET /wait HTTP/1.1" 503 0'),
        (_too_large, '"POST /wait HTTP/1.1" 413 0'),
        (_hidden, '"GET /changed?a=b HTTP/1.1" 200 2'),
        (_handshake, '"GET /wait HTTP/1.1" 400 0'),
        (_silent_handshake, '"GET /wait HTTP/1.1" 499 0'),
    ],
)
async def test_each_request_has_one_line_in_the_access_log(written: list[str], doing: Doing, line: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/wait":
            await asyncio.Event().wait()
        scope.update(query_string="text", raw_path=None, headers=None, client="proxy", method="PUT")
        await respond(send, b"ok")

    async with serving(app, access_log="combined", body_max_bytes=1000) as rig:
        client, connection = await rig.connect()
        await doing(rig, client, connection)
        client.close()
        await rig.connections.wait_empty()
        await asyncio.sleep(0)
        for exchange in rig.adapter._shared.running:  # type: ignore[union-attr]
            if exchange.task is not None:
                exchange.task.cancel()
    assert len(written) == 1, written
    assert line in written[0]


async def test_head_stays_head_whatever_the_application_does_to_its_scope() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scope["method"] = "GET"
        await respond(send, b"no body for HEAD")

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get(method="HEAD"))
        await turns()
        assert b"".join(transport.writes).endswith(b"\r\n\r\n")


async def test_pipelined_requests_do_not_stand_in_each_others_way_at_the_concurrency_limit() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        await respond(send, b"ok")

    async with serving(app, concurrency_max=1) as rig:
        connection, transport = rig.memory()
        connection.data_received(get() * 3)
        await turns(40)
        assert [answer.status for answer in transport.answers()] == [200, 200, 200]
