"""HTTP connections go on in the next generation: whatever state they are in, and wherever their bytes are cut."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hotport.adapters.asgi import State
from hotport.adapters.asgi.http import HttpConnection
from tests.adapters.asgi_support import Client, read_body, respond, until
from tests.worker.handoff_support import DEADLINE_S, Generation, Service, service

pytestmark = pytest.mark.anyio


def get(path: str, *fields: str) -> bytes:
    lines = "".join(f"{field}\r\n" for field in fields)
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


def post(path: str, body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)


def chunked(path: str, *pieces: bytes) -> bytes:
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))
    return b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%b" % (path.encode(), body)


class App:
    """Answers with its generation, the path and the body; ``/held`` waits until it is let go."""

    def __init__(self) -> None:
        self.requests: list[tuple[int, str, bytes]] = []
        self.go = asyncio.Event()
        self.disconnects = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        generation = scope["extensions"]["hotport"]["generation"]
        path = scope["path"]
        if path == "/early":
            await respond(send, b"early")
            return
        body = await read_body(receive)
        self.requests.append((generation, path, body))
        if path == "/streamed":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"begun ", "more_body": True})
            await self.go.wait()
            await send({"type": "http.response.body", "body": b"%d" % generation})
            return
        if path.startswith("/held"):
            await self.go.wait()
        if path.endswith("/large"):
            await respond(send, b"x" * (8 << 20))
            return
        await respond(send, b"%d %b %b" % (generation, path.encode(), body))


@contextlib.asynccontextmanager
async def old_and_client(
    tmp_path: Path, app: App, family: socket.AddressFamily = socket.AF_INET
) -> AsyncIterator[tuple[Service, Generation, Client]]:
    async with service(tmp_path, family) as found:
        old = await found.start(app)
        await old.server.accept()
        client = Client(await found.connect())
        await until(lambda: len(old.connections.open) == 1)
        try:
            yield found, old, client
        finally:
            client.close()


def only(generation: Generation) -> HttpConnection:
    (connection,) = generation.connections.open
    assert isinstance(connection, HttpConnection)
    return connection


async def offering(old: Generation, new: Generation) -> tuple[asyncio.Task[Any], Any]:
    """The old generation leaves, and has offered its one connection, as the mover does when it is its turn."""
    leaving = asyncio.ensure_future(old.leave(new))
    await until(lambda: only(old).handoff is not None)
    connection = only(old)
    connection.offer()
    return leaving, connection


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX], ids=["tcp", "unix"])
@pytest.mark.parametrize("sent", [b"", b"\r\n", get("/a")[:1], get("/a")[:20], get("/a")[:-1]])
async def test_connection_on_which_no_request_is_whole_moves_at_once(
    tmp_path: Path, sent: bytes, family: socket.AddressFamily
) -> None:
    app = App()
    async with old_and_client(tmp_path, app, family) as (port, old, client):
        if sent:
            await client.send(sent)
            await until(lambda: only(old).state is State.HALF_HEAD or sent == b"\r\n")
        new, fates = await port.replace(old, app)
        assert fates == {"moved_http": 1}
        await client.send(get("/a")[len(sent.lstrip(b"\r\n")) :])
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"2 /a ", False)
        assert (new.connections.accepted, new.connections.adopted) == (0, 1)


async def test_idle_connection_moves_from_generation_to_generation_and_back_again(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, serving, client):
        for number in range(1, 6):
            await client.send(get("/a"))
            assert (await client.answer()).body == b"%d /a " % number
            assert only(serving).state is State.IDLE
            serving, fates = await port.replace(serving, app)
            assert fates == {"moved_http": 1}
        assert only(serving).state is State.IDLE
        assert only(serving).due > 0


async def test_bytes_that_the_kernel_holds_travel_in_it(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        only(old).transport.pause_reading()
        await client.send(get("/a") + get("/b"))
        _, fates = await port.replace(old, app)
        assert fates == {"moved_http": 1}
        assert [(await client.answer()).body for _ in range(2)] == [b"2 /a ", b"2 /b "]


async def test_request_in_flight_is_answered_by_the_old_generation_which_does_not_say_close(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(old.connections.draining.is_set)
        assert old.connections.open
        app.go.set()
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"1 /held ", False)
        assert await leaving == {"moved_http": 1}
        await client.send(get("/next"))
        assert (await client.answer()).body == b"2 /next "


async def test_requests_behind_one_in_flight_are_the_next_generations(tmp_path: Path) -> None:
    """What was parsed before the worker began to leave is answered by it; what comes later is not even parsed."""
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held") + get("/behind"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving, _ = await offering(old, new)
        await client.send(get("/later") + post("/last", b"body") + get("/half")[:9])
        await until(lambda: only(old).unconsumed.endswith(get("/half")[:9]))
        app.go.set()
        bodies = [(await client.answer()).body for _ in range(4)]
        assert bodies == [b"1 /held ", b"1 /behind ", b"2 /later ", b"2 /last body"]
        assert await leaving == {"moved_http": 1}
        await client.send(get("/half")[9:])
        assert (await client.answer()).body == b"2 /half "


async def test_body_that_arrives_is_read_to_its_end_first(tmp_path: Path) -> None:
    app = App()
    request = chunked("/body", b"one", b"two")
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(request[:70])
        await until(lambda: only(old).state is State.BODY)
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        only(old).offer()
        await client.send(request[70:] + get("/next"))
        assert (await client.answer()).body == b"1 /body onetwo"
        assert (await client.answer()).body == b"2 /next "
        assert await leaving == {"moved_http": 1}


async def test_body_that_nobody_reads_is_read_to_its_end_before_the_connection_moves(tmp_path: Path) -> None:
    app = App()
    request = post("/early", b"x" * 1000)
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(request[:-500])
        assert (await client.answer()).body == b"early"
        assert only(old).state is State.SURPLUS
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        await client.send(request[-500:] + get("/next"))
        body = (await client.answer()).body
        assert body in (b"1 /next ", b"2 /next ")  # it may have been parsed with the end of the body
        assert await leaving == {"moved_http": 1}


async def test_answer_that_is_being_streamed_ends_first(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/streamed"))
        await client.begun(b"begun ")
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(old.connections.draining.is_set)
        app.go.set()
        assert (await client.answer()).body == b"begun 1"
        assert await leaving == {"moved_http": 1}
        await client.send(get("/next"))
        assert (await client.answer()).body == b"2 /next "


async def test_client_that_reads_slowly_gets_the_whole_answer_before_its_connection_moves(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/large"))
        await until(lambda: only(old).transport.get_write_buffer_size() > 0)
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        assert only(old).why_here() == "idle, slow to read"
        assert len((await client.answer()).body) == 8 << 20
        assert await leaving == {"moved_http": 1}
        await client.send(get("/next"))
        assert (await client.answer()).body == b"2 /next "


async def test_requests_for_which_there_was_no_room_move_unparsed_behind_those_that_wait(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held") + b"".join(get(f"/{number}") for number in range(100)) + get("/half")[:9])
        await until(lambda: only(old)._is_reading_paused)
        assert only(old).unconsumed.endswith(get("/half")[:9])
        new = await port.start(app)
        leaving, _ = await offering(old, new)
        app.go.set()
        bodies = [(await client.answer()).body for _ in range(101)]
        assert [body.split(b" ")[1] for body in bodies] == [b"/held", *(b"/%d" % number for number in range(100))]
        generations = [int(body.split(b" ")[0]) for body in bodies]
        assert (generations[0], generations[-1]) == (1, 2)
        assert generations == sorted(generations)
        assert await leaving == {"moved_http": 1}
        await client.send(get("/half")[9:])
        assert (await client.answer()).body == b"2 /half "


async def test_client_that_has_said_its_last_is_answered_here(tmp_path: Path) -> None:
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        sock = await port.connect()
        client = Client(sock)
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        only(old).offer()
        await client.send(get("/second"))
        await until(lambda: bool(only(old).unconsumed))
        sock.shutdown(socket.SHUT_WR)
        await until(lambda: only(old).has_eof)
        app.go.set()
        assert [(await client.answer()).body for _ in range(2)] == [b"1 /held ", b"1 /second "]
        assert await leaving == {"finished": 1}
        client.close()


async def test_client_that_leaves_meanwhile_is_noticed_by_its_application(tmp_path: Path) -> None:
    class Waiting(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnects += 1

    app = Waiting()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held"))
        await until(lambda: only(old).state is State.IN_FLIGHT)
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: only(old).handoff is not None)
        client.close()
        assert await leaving == {"finished": 1}
        assert app.disconnects == 1


async def test_time_that_a_client_has_left_travels(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/a")[:10])
        await until(lambda: only(old).state is State.HALF_HEAD)
        deadlines = only(old).shared.deadlines
        before = deadlines.left_s(only(old))
        new, _ = await port.replace(old, app, head_timeout_s=3600.0)
        await until(lambda: bool(only(new).due))
        deadlines = only(new).shared.deadlines
        assert deadlines.left_s(only(new)) <= before + 2


async def test_connection_is_cut_at_the_deadline_if_it_never_comes_to_a_safe_point(tmp_path: Path) -> None:
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        assert await old.leave(new, timeout_s=0.05) == {"cut_in_flight": 1}
        assert (await client.answer()).status == 503


async def test_connections_are_spread_so_that_successors_have_equally_many(tmp_path: Path) -> None:
    app = App()
    async with service(tmp_path) as port, contextlib.AsyncExitStack() as clients:
        old = await port.start(app)
        await old.server.accept()
        first, second = await port.start(app), await port.start(app)
        for count in range(600):
            clients.callback((await port.connect()).close)
            if count % 100 == 99:
                await until(lambda count=count: len(old.connections.open) == count + 1)  # type: ignore[misc]
        assert await old.leave(first, second) == {"moved_http": 600}
        assert len(first.connections.open) == len(second.connections.open) == 300


async def test_handoff_off_is_off(tmp_path: Path) -> None:
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app, handoff="off")
        await old.server.accept()
        client = Client(await port.connect())
        await until(lambda: len(old.connections.open) == 1)
        new = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(new))
        await until(old.connections.draining.is_set)
        await client.send(get("/a"))
        assert (await client.answer()).says_close
        client.close()
        assert await leaving == {"told_to_close": 1}


# -- wherever it is cut -------------------------------------------------------------------------------------

REQUESTS = [
    (get("/1"), b"/1 "),
    (b"\r\n" + get("/2"), b"/2 "),
    (post("/3", b"some body"), b"/3 some body"),
    (chunked("/4", b"in", b"pieces"), b"/4 inpieces"),
    (post("/5", b""), b"/5 "),
    (get("/6", "X-Long: " + "y" * 300), b"/6 "),
]


async def _converse(requests: list[tuple[bytes, bytes]], cuts: set[int], strikes: set[int]) -> None:
    """Send the stream in pieces; a generation is replaced before some of them, while bytes may be anywhere."""
    app = App()
    stream = b"".join(request for request, _ in requests)
    places = sorted({0, *(cut for cut in cuts if cut < len(stream)), len(stream)})
    with tempfile.TemporaryDirectory() as directory:
        async with old_and_client(Path(directory), app) as (port, serving, client):
            leaving: list[asyncio.Future[Any]] = []
            for number, (begin, end) in enumerate(itertools.pairwise(places)):
                if number in strikes:
                    new = await port.start(app)
                    for each in port.generations[:-2]:  # as the supervisor does, before the next one leaves
                        await each.redirect(new)
                    leaving.append(asyncio.ensure_future(serving.leave(new)))
                    serving = new
                await client.send(stream[begin:end])
                if number % 2:
                    await asyncio.sleep(0)
            bodies = [(await client.answer()).body.split(b" ", 1)[1] for _ in requests]
            assert bodies == [body for _, body in requests]
            assert [b"%b %b" % (path.encode(), body) for _, path, body in app.requests] == bodies
            generations = [generation for generation, _, _ in app.requests]
            assert generations == sorted(generations)
            for fates in await asyncio.gather(*leaving):
                assert fates in ({"moved_http": 1}, {})  # the latter if it was passed by
            assert sum(each.connections.accepted for each in port.generations) == 1


@settings(
    max_examples=int(os.environ.get("HOTPORT_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a hang takes its time: shrinking would take hours
)
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@given(
    requests=st.lists(st.sampled_from(REQUESTS), min_size=1, max_size=6),
    cuts=st.sets(st.integers(1, 900), max_size=8),
    strikes=st.sets(st.integers(0, 8), max_size=4),
)
def test_application_sees_the_same_stream_wherever_handoffs_strike(
    loop: Callable[[], asyncio.AbstractEventLoop],
    requests: list[tuple[bytes, bytes]],
    cuts: set[int],
    strikes: set[int],
) -> None:
    async def check() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await _converse(requests, cuts, strikes)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(check())


async def test_handoff_strikes_at_every_byte_of_a_conversation(tmp_path: Path) -> None:
    requests = [REQUESTS[0], REQUESTS[2], REQUESTS[3]]
    size = sum(len(request) for request, _ in requests)
    for place in range(1, size, 3):
        await _converse(requests, {place}, {1})


# -- what goes wrong meanwhile ------------------------------------------------------------------------------


async def test_second_restart_on_the_heels_of_the_first_tells_nobody_to_close(tmp_path: Path) -> None:
    """Between two sets of successors there seemed to be none: an answer in that moment said ``Connection: close``."""
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        second = await port.start(app)
        leaving = asyncio.ensure_future(old.leave(second))
        await until(old.connections.draining.is_set)
        third = await port.start(app)
        greet, third.peer_joined = third.peer_joined, lambda peer: None  # type: ignore[method-assign]
        may_take = asyncio.Event()
        obey = third.obey

        async def obey_later(order: Any, peer: Any) -> None:
            await may_take.wait()
            greet(peer)
            await obey(order, peer)

        third.obey = obey_later  # type: ignore[method-assign]
        redirected = asyncio.ensure_future(old.redirect(third))
        await until(lambda: len(second._taking) == 1 and all(each.done() for each in second._taking))
        app.go.set()
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"1 /held ", False)
        may_take.set()
        await redirected
        assert await leaving == {"moved_http": 1}
        assert len(third.connections.open) == 1


async def test_request_that_was_parked_before_half_a_head_takes_as_long_as_it_takes(tmp_path: Path) -> None:
    """The time that the client has for the rest of the head behind it ended the request that was being answered."""
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving, _ = await offering(old, new)
        await client.send(get("/held") + get("/half")[:9])
        await until(lambda: only(old).unconsumed.endswith(get("/half")[:9]))
        app.go.set()
        assert (await client.answer()).body == b"1 /held "
        app.go.clear()
        assert await leaving == {"moved_http": 1}
        await until(lambda: len(app.requests) == 2)
        assert only(new).state is State.IN_FLIGHT
        assert not only(new).due
        app.go.set()
        assert (await client.answer()).body == b"2 /held "
        assert only(new).state is State.HALF_HEAD
        assert only(new).due


async def test_requests_that_are_parked_behind_a_client_that_reads_slowly_do_not_expire(tmp_path: Path) -> None:
    """They had arrived whole, and got a 408 for not having arrived in time."""
    app = App()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/held/large"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving, connection = await offering(old, new)
        await client.send(get("/behind"))
        await until(lambda: bool(connection.unconsumed))
        app.go.set()
        await until(lambda: connection.transport.get_write_buffer_size() > 0 and bool(connection.due))
        connection.due = 0
        connection.expire()
        assert connection.due
        assert [len((await client.answer()).body) for _ in range(2)] == [8 << 20, len(b"2 /behind ")]
        assert await leaving == {"moved_http": 1}


async def test_requests_that_are_parked_behind_a_last_answer_are_not_begun(tmp_path: Path) -> None:
    """When nobody took the connection any more, they were: and answered behind the end of the connection."""

    class Closing(App):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            self.requests.append((1, scope["path"], b""))
            await self.go.wait()
            await respond(send, b"the last", (b"connection", b"close"))

    app = Closing()
    async with old_and_client(tmp_path, app) as (port, old, client):
        await client.send(get("/a"))
        await until(lambda: bool(app.requests))
        new = await port.start(app)
        leaving, connection = await offering(old, new)
        await client.send(get("/b"))
        await until(lambda: bool(connection.unconsumed))
        app.go.set()
        answer = await client.answer()
        assert (answer.body, answer.says_close) == (b"the last", True)
        await client.send(get("/c"))
        await until(lambda: not connection._has_unread())
        connection.drain()
        client.close()
        assert await leaving == {"finished": 1}
        assert [path for _, path, _ in app.requests] == ["/a"]


async def test_over_tls_the_last_answer_comes_at_a_random_moment_of_the_drain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all clients shake hands again at once; and a request at any moment is answered."""
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    moments = iter([1.0, 0.0])
    monkeypatch.setattr("hotport.adapters.asgi.http.random.random", lambda: next(moments))
    app = App()
    async with service(tmp_path) as port:
        old = await port.start(app, tls_cert=(str(tmp_path / "cert.pem"),))
        await old.server.accept()
        clients = [await asyncio.open_connection(*port.address, ssl=context, server_hostname="localhost") for _ in "ab"]

        async def ask(number: int) -> bool:
            reader, writer = clients[number]
            writer.write(get("/a"))
            async with asyncio.timeout(DEADLINE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(5) == b"1 /a "
            return b"connection: close" in head

        assert [await ask(0), await ask(1)] == [False, False]
        new = await port.start(app, tls_cert=(str(tmp_path / "cert.pem"),))
        leaving = asyncio.ensure_future(old.leave(new))
        await until(lambda: sum(each._is_draining for each in old.connections.open) == 1)  # type: ignore[attr-defined]
        assert all(each.why_here() == "idle, TLS: tls_handoff is off" for each in old.connections.open)
        assert [await ask(0), await ask(1)] == [False, True]
        assert [await ask(0), await ask(0)] == [False, False]
        for _, writer in clients:
            writer.close()
        assert await leaving == {"told_to_close": 1, "finished": 1}
        assert new.connections.adopted == 0
        for _, writer in clients:
            with contextlib.suppress(OSError):
                await writer.wait_closed()
