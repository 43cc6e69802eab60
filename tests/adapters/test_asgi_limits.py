"""How much and how slowly a client may send, how many may be served at once, and who says so."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hotport.adapters.asgi import State
from hotport.adapters.asgi.deadlines import Deadlines
from hotport.adapters.asgi.spec import Receive, Scope, Send
from tests.adapters.asgi_support import DEADLINE_S, Rig, echo, read_body, respond, serving, turns, until
from tests.adapters.test_asgi_http import Told, get, post

pytestmark = pytest.mark.anyio


async def tick(rig: Rig) -> None:
    """Return when every connection has been looked at once more."""
    assert rig.adapter._shared is not None
    deadlines = rig.adapter._shared.deadlines
    before = deadlines.now
    await until(lambda: deadlines.now > before)


async def test_head_that_takes_too_long_is_answered_408() -> None:
    async with serving(echo, head_timeout_s=0.02) as rig:
        client, connection = await rig.connect()
        await client.send(get()[:10])
        answer = await client.answer()
        assert (answer.status, answer.says_close) == (408, True)
        assert await client.read_to_end() == b""
        assert connection.state is State.CLOSING


async def test_head_that_comes_in_drops_gets_no_more_time_by_them() -> None:
    async with serving(echo, head_timeout_s=0.05) as rig:
        client, _connection = await rig.connect()
        answering = asyncio.create_task(client.answer())
        for byte in get("/" + "x" * 200):
            await client.send(bytes([byte]))
            if answering.done():
                break
            await tick(rig)
        assert (await answering).status == 408


async def test_connection_on_which_nothing_is_ever_sent_is_closed_without_a_word() -> None:
    async with serving(echo, head_timeout_s=0.02) as rig:
        client, _connection = await rig.connect()
        assert await client.read_to_end() == b""


async def test_second_head_has_its_own_time() -> None:
    async with serving(echo, head_timeout_s=0.02, keep_alive_s=60) as rig:
        client, _connection = await rig.connect()
        await client.send(get("/a"))
        assert (await client.answer()).body == b"GET /a "
        await client.send(get("/b")[:12])
        assert (await client.answer()).status == 408


async def test_half_a_head_behind_a_request_waits_for_its_answer_first() -> None:
    app = Told()
    async with serving(app, head_timeout_s=0.02) as rig:
        client, connection = await rig.connect()
        await client.send(get("/slow") + get("/b")[:12])
        await until(lambda: bool(app.seen))
        for _ in range(12):  # three times its time
            await tick(rig)
        assert connection.state is State.IN_FLIGHT
        app.gate.set()
        assert (await client.answer()).body == b"slow"
        assert (await client.answer()).status == 408


async def test_without_a_head_time_a_connection_waits_for_ever() -> None:
    async with serving(echo, head_timeout_s=0, keep_alive_s=0.02) as rig:
        client, connection = await rig.connect()
        other, _ = await rig.connect()
        await other.send(get())
        await other.answer()
        assert await other.read_to_end() == b""  # its keep-alive time is over: ticks have passed
        assert connection.state is State.FRESH
        await client.send(get("/a"))
        assert (await client.answer()).body == b"GET /a "


@pytest.mark.parametrize("pieces", [1, 2])
async def test_head_above_the_limit_is_answered_431(pieces: int) -> None:
    async with serving(echo, head_max_bytes=200) as rig:
        client, _connection = await rig.connect()
        request = get("/", "x: " + "y" * 200)
        for start in range(0, len(request), len(request) // pieces + 1):
            await client.send(request[start : start + len(request) // pieces + 1])
        assert (await client.answer()).status == 431


@pytest.mark.parametrize(
    "request_",
    [
        post("/", b"x" * 11),
        get("/", "transfer-encoding: chunked", method="POST") + b"6\r\nabcdef\r\n6\r\nabcdef\r\n0\r\n\r\n",
        get("/", "content-length: 99999999999", method="POST"),
        get("/", "content-length: 11", "expect: 100-continue", method="POST"),
    ],
    ids=["length", "chunked", "announced", "expected"],
)
async def test_body_above_the_limit_is_answered_413(request_: bytes) -> None:
    async with serving(echo, body_max_bytes=10) as rig:
        client, _connection = await rig.connect()
        await client.send(post("/", b"x" * 10))
        assert (await client.answer()).body == b"POST / xxxxxxxxxx"
        await client.send(request_ + get("/behind"))
        answer = await client.answer()
        assert (answer.status, answer.says_close, answer.interim) == (413, True, [])
        assert await client.read_to_end() == b""


async def test_application_that_reads_a_body_above_the_limit_sees_its_client_leave() -> None:
    bodies: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        bodies.append(await read_body(receive))

    async with serving(app, body_max_bytes=10) as rig:
        client, connection = await rig.connect()
        await client.send(get("/", "transfer-encoding: chunked", method="POST") + b"6\r\nabcdef\r\n")
        await until(lambda: connection.state is State.BODY)
        await turns()
        await client.send(b"6\r\nabcdef\r\n")
        assert (await client.answer()).status == 413
        await until(lambda: bool(bodies))
        assert bodies[0].endswith(b"<disconnected>")


async def test_requests_above_the_concurrency_are_answered_503_in_order_and_the_connection_stays() -> None:
    app = Told()
    async with serving(app, concurrency_max=2) as rig:
        first, _ = await rig.connect()
        second, _ = await rig.connect()
        third, connection = await rig.connect()
        await first.send(get("/slow"))
        await second.send(get("/slow"))
        await until(lambda: len(app.seen) == 2)
        await third.send(post("/third", b"body"))
        answer = await third.answer()
        assert (answer.status, answer.headers["retry-after"], answer.says_close) == (503, "1", False)
        assert connection.state is State.IDLE
        app.gate.set()
        assert (await first.answer()).body == (await second.answer()).body == b"slow"
        await third.send(get("/third"))
        assert (await third.answer()).body == b"GET /third "
    assert app.seen == ["/slow", "/slow", "/third"]


@pytest.mark.parametrize("is_said", [True, False])
async def test_server_header_can_be_left_out(is_said: bool) -> None:
    async with serving(echo, server_header=is_said) as rig:
        client, _connection = await rig.connect()
        await client.send(get())
        answer = await client.answer()
        assert ("server" in answer.headers) is is_said
        assert "date" in answer.headers


class Waiting:
    def __init__(self, deadlines: Deadlines[Any], seconds: float) -> None:
        self.due = deadlines.now + deadlines.ticks(seconds)
        self.expired = asyncio.Event()

    def abort(self) -> None: ...

    def expire(self) -> None:
        self.expired.set()


async def test_deadline_is_never_early_and_every_member_gets_its_own() -> None:
    loop = asyncio.get_running_loop()
    deadlines: Deadlines[Waiting] = Deadlines(0.02, loop)
    began = loop.time()
    members = [Waiting(deadlines, seconds) for seconds in (0.06, 0.02, 0.04)]
    for member in members:
        deadlines.add(member)
    async with asyncio.timeout(DEADLINE_S):
        for member, seconds in ((members[1], 0.02), (members[2], 0.04), (members[0], 0.06)):
            await member.expired.wait()
            assert loop.time() - began >= seconds - 0.001  # uvloop counts whole milliseconds
            assert member.due == 0
            deadlines.discard(member)
        await deadlines.wait_empty()


async def test_nothing_expires_after_a_cancel() -> None:
    loop = asyncio.get_running_loop()
    deadlines: Deadlines[Waiting] = Deadlines(0.01, loop)
    member, other = Waiting(deadlines, 0.01), Waiting(deadlines, 0.02)
    deadlines.add(member)
    deadlines.cancel()
    second: Deadlines[Waiting] = Deadlines(0.01, loop)
    second.add(other)
    async with asyncio.timeout(DEADLINE_S):
        await other.expired.wait()
    assert not member.expired.is_set()
    second.cancel()


async def test_answer_of_an_application_that_never_waits_is_the_same_in_a_pipeline() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await respond(send, scope["path"].encode())

    async with serving(app) as rig:
        connection, transport = rig.memory()
        connection.data_received(b"".join(get(f"/{n}") for n in range(200)))
        await turns(1000)
        assert [answer.body for answer in transport.answers()] == [f"/{n}".encode() for n in range(200)]
        assert connection.state is State.IDLE
