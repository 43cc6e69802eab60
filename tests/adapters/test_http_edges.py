"""Every row of the table in `http_edges`, whole over a socket and in every two pieces; and how connections end."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

import pytest

from hotport.adapters.asgi import ClientLeft, State
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.options import Options
from tests.adapters.asgi_support import (
    Answer,
    Answers,
    Client,
    Rig,
    in_memory,
    read_body,
    respond,
    serving,
    turns,
    until,
)
from tests.adapters.http_edges import CHUNKED, EDGES, GET, POST, PROBE, SECTIONS, Edge, Recorder, Saw

pytestmark = pytest.mark.anyio

HEAD_BYTES_MAX = Options().head_max_bytes

every_section = pytest.mark.parametrize("section", SECTIONS)

WAITING = {State.FRESH, State.HALF_HEAD, State.BODY, State.IDLE}


def running(rig: Rig) -> int:
    """How many applications run."""
    assert rig.adapter._shared is not None
    return len(rig.adapter._shared.running)


@asynccontextmanager
async def recorded(caplog: pytest.LogCaptureFixture, **options: int) -> AsyncIterator[tuple[Rig, Recorder]]:
    """An adapter that must leave neither a connection nor a task behind, and nothing in the log."""
    recorder = Recorder()
    before = asyncio.all_tasks()
    async with serving(recorder, **options) as rig:
        yield rig, recorder
    await until(lambda: asyncio.all_tasks() <= before)
    assert not running(rig)
    assert not rig.connections.open
    assert [r for r in caplog.records if r.levelno >= logging.WARNING or r.exc_info] == []


def read(data: bytes, methods: Iterable[str]) -> list[Answer]:
    """The answers to requests with these methods; there is nothing between or behind them."""
    reader, answers = Answers(), []
    for method in methods:
        answer = reader.feed(data, method=method)
        assert answer is not None, data
        answers.append(answer)
        data, reader.rest = reader.rest, b""
    assert data == b""
    return answers


def check(edge: Edge, answers: list[Answer], *, is_last: bool) -> None:
    """They are what the row says, with the header fields that it takes."""
    assert [answer.status for answer in answers] == edge.statuses
    for saw, answer in zip(edge.served, answers, strict=False):
        if saw.method != "HEAD":
            assert Saw.from_json(answer.body).like(saw) == saw
    for number, answer in enumerate(answers, 1):
        if number == len(answers) and is_last:
            connection = "close"
        elif answer.status == 200 and edge.seen[number - 1].version == "1.0":
            connection = "keep-alive"
        else:
            connection = None
        assert answer.headers.pop("connection", None) == connection
        expected = {"date", "server"}
        if answer.status != 200:
            expected.add("content-type")
        if answer.status != 200 or edge.seen[number - 1].method != "HEAD":
            expected.add("content-length")  # h11 has compared it
        assert set(answer.headers) == expected


def check_seen(edge: Edge, recorder: Recorder, seen: list[Saw]) -> None:
    """The application was asked what the row says; what is refused in one piece, it never hears of."""
    if edge.outcome == "refuses" and len(recorder.seen) == len(edge.served):
        seen = edge.served
    assert [saw.like(row) for saw, row in zip(recorder.seen, seen, strict=True)] == seen


def methods_of(edge: Edge) -> list[str]:
    return [saw.method for saw in edge.served] + ["GET"] * (edge.outcome == "refuses")


Check = Callable[[Edge, pytest.LogCaptureFixture], Awaitable[None]]


async def check_all(section: str, caplog: pytest.LogCaptureFixture, check_one: Check) -> None:
    for edge in SECTIONS[section]:
        try:
            await check_one(edge, caplog)
        except BaseException as error:
            error.add_note(f"in the row {edge.name!r}")
            raise


@every_section
async def test_edges_over_a_socket(section: str, caplog: pytest.LogCaptureFixture) -> None:
    await check_all(section, caplog, over_a_socket)


async def over_a_socket(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    async with recorded(caplog) as (rig, recorder):
        client, connection = await rig.connect()
        seen = list(edge.seen)
        if edge.outcome == "waits":
            await client.send(edge.sent)
            await until(lambda: not connection.transport.is_closing() and rig.connections.requests == len(seen))
            await turns()
            assert connection.state in WAITING
            client.end()
            interim = await client.read_to_end()
            assert interim in (b"", b"HTTP/1.1 100 Continue\r\n\r\n")
            await rig.connections.wait_empty()
            await turns()
        elif edge.outcome == "serves":
            await client.send(edge.sent + PROBE)
            answers = read(await client.read_to_end(), [*methods_of(edge), "GET"])
            assert (answers[-1].status, answers.pop().says_close) == (200, True)
            check(edge, answers, is_last=False)
            seen.append(Saw("GET", "/probe"))
        else:
            await client.send(edge.sent + (PROBE if edge.outcome == "refuses" else b""))
            check(edge, read(await client.read_to_end(), methods_of(edge)), is_last=True)
        check_seen(edge, recorder, seen)


def cuts(sent: bytes) -> list[list[bytes]]:
    """Two pieces, cut at every byte (large ones: at many), and every byte for itself."""
    size = len(sent)
    pairs = [[sent[:place], sent[place:]] for place in range(1, size, 1 if size < 1_000 else size // 10)]
    return [*pairs, [sent[place : place + 1] for place in range(size)] if size < 1_000 else [sent[:9], sent[9:]]]


@every_section
@in_memory
@pytest.mark.unmeasured
async def test_edges_in_pieces_are_the_same(section: str, caplog: pytest.LogCaptureFixture) -> None:
    await check_all(section, caplog, in_pieces)


async def in_pieces(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    async with recorded(caplog) as (rig, recorder):
        for pieces in cuts(edge.sent):
            recorder.seen.clear()
            connection, transport = rig.memory()
            for piece in pieces:
                if not transport.is_closed:
                    connection.data_received(piece)
                    await turns(1)
            if edge.outcome == "waits":
                await turns(4)
                assert connection.state in WAITING, pieces
                transport.close()
            await until(lambda: not running(rig))
            written = b"".join(transport.writes)
            if edge.outcome == "waits":
                assert written in (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), pieces
            else:
                check(edge, read(written, methods_of(edge)), is_last=edge.outcome != "serves")
                assert (transport.has_ended or transport.is_closed) == (edge.outcome != "serves"), pieces
            check_seen(edge, recorder, list(edge.seen))
            assert not transport.is_aborted
            transport.close()
            await turns(1)


def test_names_of_edges_are_unique() -> None:
    assert len({edge.name for edge in EDGES}) == len(EDGES)


# -- clients that end their side -------------------------------------------------------------------------------

BODY = POST + b"Content-Length: 5\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (b"", []),
        (b"\r\n", []),
        (GET, []),
        (GET + b"\r\n", [Saw("GET", "/")]),
        (GET + b"\r\n" + GET, [Saw("GET", "/")]),
        (BODY + b"hello", [Saw("POST", "/", body=b"hello")]),
        (BODY + b"hel", [Saw("POST", "/", body=b"hel", is_cut=True)]),
        (BODY, [Saw("POST", "/", is_cut=True)]),
        (GET + b"\r\n" + BODY + b"hel", [Saw("GET", "/"), Saw("POST", "/", body=b"hel", is_cut=True)]),
        (CHUNKED + b"3\r\nabc\r\n0\r\n", [Saw("POST", "/", body=b"abc", is_cut=True)]),
        (CHUNKED + b"3\r\nab", [Saw("POST", "/", body=b"ab", is_cut=True)]),
    ],
    ids=[
        "nothing",
        "empty-line",
        "half-a-head",
        "request",
        "request-and-half-a-head",
        "body",
        "half-a-body",
        "no-body",
        "request-and-half-a-body",
        "trailers-missing",
        "half-a-chunk",
    ],
)
async def test_half_closed_connection_answers_whole_requests_only(
    sent: bytes, seen: list[Saw], caplog: pytest.LogCaptureFixture
) -> None:
    async with recorded(caplog) as (rig, recorder):
        client, connection = await rig.connect()
        await client.send(sent)
        client.end()
        served = [saw for saw in seen if not saw.is_cut]
        answers = read(await client.read_to_end(), [saw.method for saw in served])
        assert [answer.status for answer in answers] == [200] * len(served)
        await until(lambda: connection.state is State.CLOSED and not running(rig))
        # A request that had to wait for its turn is not begun any more if its end cannot come.
        assert [saw.like(Saw("", "")) for saw in recorder.seen] in (seen, served or seen)


async def test_reset_in_the_middle_of_an_answer_ends_the_application_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors: list[BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        except OSError as error:
            errors.append(error)
            raise

    async with serving(app) as rig:
        client, _ = await rig.connect()
        await client.send(GET + b"\r\n")
        await client.received()
        reset(client)
        await rig.connections.wait_empty()
        await until(lambda: not running(rig))
    assert len(errors) == 1
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("size", [100, 65536])
async def test_application_that_only_sends_learns_in_the_same_turn_that_its_client_has_left(size: int) -> None:
    """It sent for ever, and nothing else of the worker ran: what is written to a lost transport pauses nobody."""
    clients: list[Client] = []
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await read_body(receive)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        reset(clients[0])
        with pytest.raises(ClientLeft):
            for _ in range(10_000):
                await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})
                sent += 1

    async with serving(app) as rig:
        client, _ = await rig.connect()
        clients.append(client)
        await client.send(GET + b"\r\n")
        await rig.connections.wait_empty()
        await until(lambda: not running(rig))
    assert sent < 10_000


async def test_answer_that_its_client_does_not_read_pauses_its_application() -> None:
    """Large bodies were taken without end on asyncio's event loop, into memory (CVE-2024-12254)."""
    sent = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 1

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(GET + b"\r\n")
        await until(lambda: connection.writable is not None)
        assert sent < 1_000


def reset(client: Client) -> None:
    """Leave without a goodbye."""
    client._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# -- what a client can make a server remember ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["trailers", "trailer", "extension"])
async def test_endless_trailers_and_extensions_are_refused(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A client could fill the memory with trailers that never end."""
    start, more = {
        "trailers": (b"0\r\n", b"X: y\r\n" * 1000),
        "trailer": (b"0\r\nX: ", b"y" * 6000),
        "extension": (b"3;x=", b"y" * 6000),
    }[how]
    async with recorded(caplog) as (rig, recorder):
        connection, transport = rig.memory()
        connection.data_received(CHUNKED + b"3\r\nabc\r\n" + start)
        fed = 0
        while not transport.has_ended:
            connection.data_received(more)
            fed += len(more)
            assert fed <= HEAD_BYTES_MAX + len(more)
        await until(lambda: bool(recorder.seen))
        assert [answer.status for answer in transport.answers()] == [431]
    assert recorder.seen[0].like(Saw("POST", "/")) == Saw("POST", "/", body=b"abc", is_cut=True)


async def test_many_small_chunks_are_no_endless_extensions(caplog: pytest.LogCaptureFixture) -> None:
    head_bytes_max = 4096
    count = 2 * head_bytes_max // 5
    async with recorded(caplog, head_max_bytes=head_bytes_max) as (rig, recorder):
        connection, _transport = rig.memory()
        connection.data_received(CHUNKED)
        for _ in range(count):
            connection.data_received(b"1\r\n")
            connection.data_received(b"x\r\n")
        connection.data_received(b"0\r\n\r\n")
        await until(lambda: bool(recorder.seen))
        assert len(recorder.seen[0].body) == count
        for _ in range(head_bytes_max // 5):  # nor are many requests without any
            connection.data_received(CHUNKED)
            connection.data_received(b"0\r\n\r\n")
        await until(lambda: connection.state is State.IDLE)


async def test_malformed_rest_of_an_answered_request_is_not_answered_a_second_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The refusal would have been taken for the answer to the next request."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, b"early")

    async with serving(app) as rig:
        client, connection = await rig.connect()
        await client.send(CHUNKED)
        assert (await client.answer()).body == b"early"
        assert connection.state is State.SURPLUS
        await client.send(b"zz\r\n" + PROBE)
        assert await client.read_to_end() == b""
        assert rig.connections.requests == 1
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []
