"""What one HTTP client can cost: bytes that wait on its behalf, turns of the event loop, and time."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from hotport.adapters.asgi import ClientLeft, State
from hotport.adapters.asgi import http as http_module
from hotport.adapters.asgi.deadlines import Deadlines
from hotport.adapters.asgi.http import HttpConnection
from hotport.adapters.asgi.spec import Receive, Scope, Send
from hotport.options import Options
from tests.adapters.asgi_support import Rig, echo, read_body, respond, serving, turns, until
from tests.adapters.test_asgi_http import Told, get, post

pytestmark = pytest.mark.anyio

TINY = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
BUDGET_BYTES = Options().connection_buffer_bytes

#: A head of nearly 64 KiB that holds as many fields as a head may hold bytes for.
TINY_FIELDS = TINY[:-2] + b"a:\r\n" * 15_900 + b"\r\n"


def chunked(path: str, *chunks: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))
    return get(path, "transfer-encoding: chunked", method="POST") + body


def pass_ticks(rig: Rig, count: int = 1) -> None:
    """Let time go by for everything that waits, without waiting."""
    deadlines = clock(rig)
    for _ in range(count):
        if deadlines._timer is not None:
            deadlines._timer.cancel()
            deadlines._on_timer()


def pass_seconds(rig: Rig, seconds: float) -> None:
    pass_ticks(rig, clock(rig).ticks(seconds))


def clock(rig: Rig) -> Deadlines[Any]:
    assert rig.adapter._shared is not None
    return rig.adapter._shared.deadlines


async def grown(work: Callable[[], AsyncIterator[None]]) -> tuple[int, int]:
    """Bytes that `work` holds where it yields, and that are left of it in the end."""
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        held = 0
        async for _ in work():
            held = tracemalloc.get_traced_memory()[0] - before
        await turns()
        gc.collect()
        return held, tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


# -- bytes --------------------------------------------------------------------------------------------------


async def test_heads_of_many_tiny_fields_cost_no_more_than_their_bytes() -> None:
    """20 of them took 2.4 GiB: each field had become a tuple and two byte strings, and each head many requests."""
    app = Told()
    async with serving(app) as rig:

        async def work() -> AsyncIterator[None]:
            connections = [rig.memory() for _ in range(20)]
            for connection, _ in connections:
                connection.data_received(get("/slow"))
                connection.data_received(TINY_FIELDS[:-1])
            yield
            app.gate.set()
            await turns(20)
            assert [[a.status for a in transport.answers()] for _, transport in connections] == [[200, 431]] * 20
            for _, transport in connections:
                transport.close()
            rig._transports.clear()
            connections.clear()

        held, left = await grown(work)
    assert held < 20 * BUDGET_BYTES
    assert left < 256 * 1024


async def test_pipelined_requests_wait_unparsed_beyond_the_first_ones_and_are_all_answered() -> None:
    """Of 64 KiB of them 2,000 were queued, 11 MiB, because the limit was looked at once a read."""
    app = Told()
    async with serving(app) as rig:
        connection, transport = rig.memory()
        data = get("/slow") + TINY * 2_000
        connection.data_received(data)
        assert len(connection._pipeline) == http_module.PIPELINE_MAX - 1  # the first one is under way
        assert connection.unconsumed == TINY * (2_000 - http_module.PIPELINE_MAX + 1)
        assert not transport.is_reading()
        await turns(100)
        assert connection.state is State.IN_FLIGHT
        app.gate.set()
        await until(lambda: connection.state is State.IDLE)
        assert transport.is_reading()
        assert len(transport.answers()) == 2_001
        assert app.seen == ["/slow"] + ["/"] * 2_000


@pytest.mark.parametrize(
    "request_",
    [
        TINY,
        get("/", *(f"a{n}: b" for n in range(120))),
        get("/", *(f"field-{n}: {'x' * 400}" for n in range(100))),
        get("/" + "x" * 60_000),
        get("/" + "x" * 60_000 + "%F0%9F%98%80"),
        post("/", b"x" * 50_000),
        chunked("/", *[b"x"] * 5_000),
    ],
    ids=["tiny", "fields", "large-fields", "target", "wide-target", "body", "chunks"],
)
async def test_queued_requests_take_no_more_memory_than_is_counted_and_that_stays_in_the_budget(
    request_: bytes,
) -> None:
    app = Told()
    async with serving(app) as rig:
        connection, _ = rig.memory()
        connection.data_received(get("/slow"))
        await turns()
        counted = 0

        async def work() -> AsyncIterator[None]:
            nonlocal counted
            connection.data_received(request_ * (1 + 256_000 // len(request_)))
            counted = connection._waiting_bytes() + len(connection.unconsumed)
            yield
            connection.transport.abort()

        held, left = await grown(work)
    assert held <= counted * 1.1 + 8192
    assert counted <= 2 * BUDGET_BYTES + 256_000 + len(request_)
    assert left < 64 * 1024


async def test_small_budget_still_lets_every_request_through_one_after_the_other() -> None:
    async with serving(echo, connection_buffer_bytes=1) as rig:
        connection, transport = rig.memory()
        connection.data_received(b"".join(post(f"/{n}", b"b" * 100) for n in range(30)))
        await until(lambda: connection.state is State.IDLE)
        bodies = [answer.body for answer in transport.answers()]
        assert bodies == [f"POST /{n} ".encode() + b"b" * 100 for n in range(30)]


async def test_trailers_and_chunk_extensions_are_not_kept() -> None:
    app = Told()
    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/slow", "transfer-encoding: chunked", method="POST") + b"1\r\nx\r\n")
        await turns()

        async def work() -> AsyncIterator[None]:
            connection.data_received(b"0;" + b"e" * 20_000 + b"\r\n" + b"a:\r\n" * 10_000)
            yield

        held, _left = await grown(work)
        assert held < 64 * 1024
        connection.data_received(b"\r\n" + get("/behind"))
        app.gate.set()
        await until(lambda: len(transport.answers()) == 2)


async def test_nothing_more_is_parsed_for_a_client_that_does_not_read() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await respond(send, b"x")

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.pause_writing()
        connection.data_received(get("/a") + get("/b"))
        await turns()
        assert (seen, transport.is_reading()) == ([], False)
        connection.resume_writing()
        await until(lambda: len(transport.answers()) == 2)
        assert transport.is_reading()


# -- turns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flood",
    [TINY * 300, chunked("/", *[b"x"] * 20_000), get("/", method="HEAD") * 300],
    ids=["requests", "chunks", "heads"],
)
async def test_client_that_sends_much_at_once_takes_turns_with_others(flood: bytes) -> None:
    order: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await respond(send, b"")
        order.append(scope["path"])

    async with serving(app, turn_s=0.0) as rig:
        connection, _ = rig.memory()
        other, _ = rig.memory()
        connection.data_received(flood)
        assert connection.unconsumed
        other.data_received(get("/other"))
        await until(lambda: connection.state is State.IDLE)
    assert "/other" in order[:5]


# -- time ---------------------------------------------------------------------------------------------------

LENGTH = get("/", "content-length: 1000000", method="POST")
CHUNKS = get("/", "transfer-encoding: chunked", method="POST")


@pytest.mark.parametrize(
    ("head", "piece"),
    [(LENGTH, b"x"), (CHUNKS, b"1\r\nx\r\n"), (CHUNKS + b"5;", b"e")],
    ids=["length", "chunks", "ext"],
)
async def test_body_that_comes_in_drops_is_answered_408(
    head: bytes, piece: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read_body(receive))

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(head)
        for _ in range(61):
            await turns(3)
            assert transport.answers() == []
            connection.data_received(piece)
            pass_seconds(rig, 1.0)
            if transport.answers():
                break
        else:
            pass_seconds(rig, 20.0)
        assert [(a.status, a.says_close) for a in transport.answers()] == [(408, True)]
        await turns()
        assert bodies[0].endswith(b"<disconnected>")
        assert "the request body arrived too slowly; it came from 192.0.2.1 port 5" in caplog.text
        transport.close()
        await turns()
        assert rig.connections.cuts == {"cut_slow_body": 1}


@pytest.mark.parametrize("bytes_per_s", [64 * 1024, 10_000, 1_000])
async def test_slow_upload_takes_the_time_that_it_takes(bytes_per_s: int) -> None:
    async with serving(echo) as rig:
        connection, transport = rig.memory()
        size = bytes_per_s * 300
        connection.data_received(get("/", f"content-length: {size}", method="POST"))
        for _ in range(100):  # in bursts, as `curl --limit-rate` sends
            connection.data_received(b"x" * (bytes_per_s * 3))
            await turns(3)
            pass_ticks(rig, clock(rig).ticks(3.0) - 1)
        await turns()
        assert [len(answer.body) for answer in transport.answers()] == [len(b"POST / ") + size]


async def test_client_is_not_blamed_while_its_body_is_not_read_or_not_asked_for() -> None:
    gate = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await gate.wait()
        await respond(send, b"%d" % len(await read_body(receive)))

    async with serving(app) as rig:
        waiting, waiting_transport = rig.memory()
        waiting.data_received(get("/", "content-length: 3", "expect: 100-continue", method="POST"))
        full, full_transport = rig.memory()
        full.data_received(get("/", "content-length: 100000", method="POST") + b"x" * 90_000)
        await turns()
        pass_seconds(rig, 300.0)
        gate.set()
        await turns()
        pass_seconds(rig, 50.0)
        waiting.data_received(b"abc")
        full.data_received(b"x" * 10_000)
        await turns()
        assert [a.body for a in waiting_transport.answers()] == [b"3"]
        assert [a.body for a in full_transport.answers()] == [b"100000"]


@pytest.mark.parametrize("option", ["body_timeout_s", "send_timeout_s"])
async def test_time_can_be_without_a_limit(option: str) -> None:
    options: dict[str, Any] = {option: 0.0}
    async with serving(Told(), **options) as rig:
        connection, transport = rig.memory()
        if option == "body_timeout_s":
            connection.data_received(LENGTH)
        else:
            connection.data_received(get("/slow"))
            await turns()
            connection.pause_writing()
        pass_seconds(rig, 1000.0)
        assert transport.answers() == []
        assert not transport.is_closed


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with 10 MiB, in the way that the path names."""
    await send({"type": "http.response.start", "status": 200})
    match scope["path"]:
        case "/whole":
            await send({"type": "http.response.body", "body": bytes(10 << 20)})
        case "/pieces":
            for _ in range(160):
                await send({"type": "http.response.body", "body": bytes(64 << 10), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        case "/file":
            await send({"type": "http.response.pathsend", "path": scope["query_string"].decode()})


@pytest.mark.parametrize("path", ["/whole", "/pieces", "/file", "/last"])
async def test_client_that_stops_reading_is_reset_and_its_memory_comes_back(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each such client held its answer for ever."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "large"
    file.write_bytes(bytes(10 << 20))
    ended: list[BaseException | None] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await large(scope, receive, send)
        except ClientLeft as error:
            ended.append(error)
            raise

    async with serving(app) as rig:
        client, connection = await rig.connect()
        is_last = path == "/last"
        await client.send(get("/whole", "connection: close") if is_last else get(f"{path}?{file}"))
        await until(lambda: connection.state is (State.CLOSING if is_last else State.STREAMING) or path == "/whole")
        await until(lambda: connection._reading_pace is not None)
        await turns(100)
        for _ in range(59):
            pass_ticks(rig, 2)
        assert not connection.is_closed
        pass_seconds(rig, 40.0)
        await rig.connections.wait_empty()
        await turns()
        assert rig.connections.cuts == {"cut_slow_reader": 1}
        assert len(ended) == (path in {"/pieces", "/file"})
        assert "takes too little of what is sent to it; it is 127.0.0.1 port" in caplog.text
        with pytest.raises(ConnectionResetError):
            await client.read_to_end()
        assert connection._current is None


async def test_client_that_takes_a_little_of_its_answer_now_and_then_is_reset() -> None:
    async with serving(large) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/pieces"))
        await turns()
        transport.unsent_bytes = 1_000_000
        connection.pause_writing()
        seconds = 0
        while not transport.is_aborted:
            transport.unsent_bytes -= 300
            pass_ticks(rig, clock(rig).ticks(1.0) - 1)
            seconds += 1
        assert 60 <= seconds <= 80
        await turns()
    assert rig.connections.cuts == {"cut_slow_reader": 1}


async def test_client_that_reads_slowly_is_served() -> None:
    async with serving(large) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/pieces"))
        await turns()
        transport.unsent_bytes = 10_000_000
        connection.pause_writing()
        for _ in range(30):  # 10 kB/s, in steps as large as a receive window
            pass_seconds(rig, 29.0)
            transport.unsent_bytes -= 300_000
        assert not transport.is_aborted


async def test_answer_that_waits_for_its_application_is_not_the_fault_of_the_client() -> None:
    app = Told()
    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(get("/slow"))
        await turns()
        connection.pause_writing()
        pass_ticks(rig, 3)
        connection.resume_writing()
        pass_seconds(rig, 300.0)
        app.gate.set()
        await turns()
        assert [answer.body for answer in transport.answers()] == [b"slow"]


# -- clients that leave while nothing is read from them -----------------------------------------------------


async def paused(rig: Rig) -> tuple[socket.socket, HttpConnection]:
    """A client with more pipelined requests than are read."""
    theirs, connection = await rig.connect_socket()
    await asyncio.get_running_loop().sock_sendall(theirs, get("/slow") + TINY * 100)
    await until(lambda: connection in clock(rig).paused)
    return theirs, connection


async def test_reset_of_a_connection_that_is_not_read_from_ends_it() -> None:
    """The event loop does not look at it then: it was kept until its application had ended."""
    app = Told()
    async with serving(app) as rig:
        theirs, connection = await paused(rig)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        pass_ticks(rig)
        await until(lambda: connection.is_closed)
        assert not rig.connections.open
        assert not clock(rig).paused
        assert not connection._pipeline
        app.gate.set()


async def test_application_hears_that_a_client_has_left_that_is_not_read_from() -> None:
    heard: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            await receive()
            heard.append((await receive())["type"])
        await respond(send, b"")

    async with serving(app) as rig:
        theirs, _ = await paused(rig)
        await turns()
        pass_ticks(rig, 3)
        await turns()
        assert heard == []
        theirs.shutdown(socket.SHUT_WR)
        pass_ticks(rig, 2)
        await until(lambda: heard == ["http.disconnect"])
        await until(lambda: not rig.connections.open)
        assert rig.connections.requests == 101
        theirs.close()


async def test_body_that_arrives_later_than_the_turn_of_its_head_is_read() -> None:
    """Reading was paused by the first turn, and not resumed by the last one."""
    request = chunked("/", b"in", b"pieces")
    async with serving(echo, turn_s=0) as rig:
        connection, transport = rig.memory()
        connection.data_received(TINY + request[:-20])
        await until(lambda: b"".join(transport.writes).count(b"HTTP/1.1 200") == 1)
        await until(transport.is_reading)
        connection.data_received(request[-20:])
        await until(lambda: b"inpieces" in b"".join(transport.writes))
