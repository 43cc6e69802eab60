"""A worker that has stopped accepting hands its connections over and stays; when it accepts again, they come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from hotport.worker import handoff, lag
from hotport.worker.lag import LagMeter
from tests.adapters.asgi_support import Client, read_body, respond, until
from tests.worker import test_handoff_streams as streams
from tests.worker.handoff_support import DEADLINE_S, Generation, Service, Successor, service
from tests.worker.test_handoff_http import App, get
from tests.worker.test_handoff_websocket import Client as WebSocketClient
from tests.worker.test_handoff_websocket import Echo

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def quiesced(
    tmp_path: Path, app: Any, **options: Any
) -> AsyncIterator[tuple[Service, Generation, socket.socket]]:
    """An old generation that accepts no more, and a client of it."""
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        sock = await port.connect()
        await until(lambda: len(old.connections.open) == 1)
        old.server.quiesce()
        with sock:
            yield port, old, sock


async def follow(port: Service, old: Generation, app: Any, **options: Any) -> Generation:
    """A new generation accepts, and gets the connections of the old one, which stays."""
    new = await port.start(app, **options)
    await new.server.accept()
    await old.server.follow([new.path])
    return new


async def take_back(old: Generation, new: Generation) -> Any:
    await old.server.accept()
    return await new.leave(old)


async def answer(client: Client, request: bytes = get("/a")) -> bytes:
    await client.send(request)
    found = await client.answer()
    assert not found.says_close
    return found.body


async def test_http_connection_goes_over_and_comes_back_again_and_again(tmp_path: Path) -> None:
    app = App()
    async with quiesced(tmp_path, app) as (port, old, sock):
        client = Client(sock)
        for number in (2, 3):
            new = await follow(port, old, app)
            await until(lambda: not old.connections.open)
            assert await answer(client) == b"%d /a " % number
            assert old.connections.fates == {"moved_http": 1}
            assert not old.connections.draining.is_set()
            assert await take_back(old, new) == {"moved_http": 1}
            assert await answer(client) == b"1 /a "
            old.server.quiesce()


async def test_request_under_way_is_answered_here_and_its_connection_moves_then(tmp_path: Path) -> None:
    app = App()
    async with quiesced(tmp_path, app) as (port, old, sock):
        client = Client(sock)
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        await follow(port, old, app)
        app.go.set()
        assert (await client.answer()).body == b"1 /held "
        await until(lambda: not old.connections.open)
        assert await answer(client) == b"2 /a "


async def test_request_under_way_keeps_its_connection_if_the_old_one_accepts_again_meanwhile(tmp_path: Path) -> None:
    app = App()
    async with quiesced(tmp_path, app) as (port, old, sock):
        client = Client(sock)
        await client.send(get("/held"))
        await until(lambda: bool(app.requests))
        await follow(port, old, app)
        await old.server.accept()
        app.go.set()
        assert (await client.answer()).body == b"1 /held "
        assert await answer(client) == b"1 /a "
        assert len(old.connections.open) == 1


async def test_connection_that_nobody_takes_stays_and_is_not_told_to_close(tmp_path: Path) -> None:
    async with quiesced(tmp_path, App()) as (_, old, sock):
        await old.server.follow([str(tmp_path / "nobody.sock")])
        assert await answer(Client(sock)) == b"1 /a "


async def test_old_worker_accepts_at_once_though_its_successor_hangs_and_the_connection_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff, "ACK_TIMEOUT_S", 0.05)
    successor = Successor(tmp_path)
    async with quiesced(tmp_path, App()) as (port, old, sock):
        following = asyncio.ensure_future(old.server.follow([successor.path]))
        await successor.welcome()
        await following
        _, descriptors = await successor.batch()
        await old.server.accept()
        newcomer = Client(await port.connect())
        assert await answer(newcomer) == b"1 /a "
        newcomer.close()
        assert await answer(Client(sock)) == b"1 /a "
        for fd in descriptors:
            os.close(fd)
        new = await follow(port, old, App())  # waits until that is over
        await until(lambda: bool(new.connections.adopted))
        successor.channel.close()
        successor.close()


async def test_offers_can_be_given_up_while_a_successor_does_not_answer(tmp_path: Path) -> None:
    successor = Successor(tmp_path)
    app = App()
    async with quiesced(tmp_path, app) as (port, old, sock):
        new = await port.start(app)
        following = asyncio.ensure_future(old.server.follow([new.path, successor.path]))
        await until(lambda: bool(new._taking))
        following.cancel()
        await asyncio.wait({following})
        await until(lambda: all(task.done() for task in new._taking))
        await old.server.accept()
        assert await answer(Client(sock)) == b"1 /a "
        successor.close()


async def test_websocket_goes_over_and_comes_back(tmp_path: Path) -> None:
    app = Echo(asks=True)
    async with quiesced(tmp_path, app) as (port, old, sock):
        client = WebSocketClient(sock)
        await client.open()
        new = await follow(port, old, app)
        await until(lambda: not old.connections.open)
        await client.send("a")
        assert await client.receive() == "2 1 a"
        assert await take_back(old, new) == {"moved_websocket": 1}
        await client.send("b")
        assert await client.receive() == "1 2 b"


async def test_websocket_whose_application_does_not_agree_stays_and_is_not_closed(tmp_path: Path) -> None:
    app = Echo()
    async with quiesced(tmp_path, app) as (port, old, sock):
        client = WebSocketClient(sock)
        await client.open()
        new = await follow(port, old, app)
        await client.send("a")
        assert await client.receive() == "1 1 a"
        await take_back(old, new)
        await client.send("b")
        assert await client.receive() == "1 2 b"


async def test_over_tls_connections_stay_and_are_not_told_to_close(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    context = ssl.create_default_context()
    authority.configure_trust(context)
    app = App()
    options: dict[str, Any] = {"tls_cert": (str(tmp_path / "cert.pem"),)}
    async with service(tmp_path) as port:
        old = await port.start(app, **options)
        await old.server.accept()
        reader, writer = await asyncio.open_connection(*port.address, ssl=context, server_hostname="localhost")
        old.server.quiesce()
        await follow(port, old, app, **options)
        for _ in range(2):
            writer.write(get("/a"))
            async with asyncio.timeout(DEADLINE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                assert await reader.readexactly(5) == b"1 /a "
            assert b"connection: close" not in head
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@pytest.mark.parametrize(("app", "kind"), [(streams.counting, "stream"), (streams.Counter, "protocol")])
async def test_streams_and_protocols_go_over_and_come_back(tmp_path: Path, app: Any, kind: str) -> None:
    async with service(tmp_path) as port:
        old = await port.start(app)
        await old.server.accept()
        reader, writer = await asyncio.open_connection(*port.address)
        peer = streams.Peer(reader, writer)
        first = await peer.ask("a")
        old.server.quiesce()
        new = await follow(port, old, app)
        await until(lambda: not old.connections.open)
        second = await peer.ask("a")
        assert await take_back(old, new) == {f"moved_{kind}": 1}
        third = await peer.ask("a")
        assert len({first, second, third}) == 3  # it counts on
        writer.close()


async def test_stream_that_waits_to_be_handed_off_goes_on_when_the_worker_accepts_again(tmp_path: Path) -> None:
    async with service(tmp_path) as port:
        old = await port.start(streams.choosing)
        await old.server.accept()
        reader, writer = await asyncio.open_connection(*port.address)
        peer = streams.Peer(reader, writer)
        assert await peer.ask("a") == "a"
        old.server.quiesce()
        await old.server.follow([str(tmp_path / "nobody.sock")])
        assert await peer.ask("move") == "move"
        assert await peer.ask("b") == "b"
        writer.close()


# -- what a worker finds out about itself -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/well", ""),
        ("/moved", ""),
        ("/sick", "answered GET /sick with 503"),
        ("/raises", "answered GET /raises with 500"),
        ("/hangs", "did not answer GET /hangs within 0.1 s"),
        ("/early", ""),
    ],
)
async def test_worker_asks_its_application_over_a_connection_of_its_own(tmp_path: Path, path: str, why: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_body(receive)
        match scope["path"]:
            case "/well":
                await respond(send, b"x" * 200_000)
            case "/moved":
                await respond(send, b"", status=308)
            case "/sick":
                await respond(send, b"", status=503)
            case "/hangs":
                await receive()
            case "/early":
                await send({"type": "http.response.early_hint", "links": [b"</a>"]})
                await respond(send, b"")
            case _:
                raise ValueError

    async with service(tmp_path) as port:
        found = await port.start(app)  # it does not accept
        assert await found.server.probe(path, 0.1 if path == "/hangs" else DEADLINE_S) == why
        assert found.connections.accepted == 0
        assert found.connections.errors == (path in ("/sick", "/raises"))
        await until(lambda: not found.connections.open)


async def test_application_that_does_not_speak_http_cannot_be_well(tmp_path: Path) -> None:
    async def app(stream: Any) -> None:
        await stream.receive()
        await stream.send(b"hello\n")

    async with service(tmp_path) as port:
        found = await port.start(app)
        assert await found.server.probe("/", DEADLINE_S) == "did not answer GET / with HTTP"


async def test_lag_that_is_longer_than_the_time_between_readings_is_not_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that was blocked for 5 s had a lag of 4 ms in `hotport status`."""
    monkeypatch.setattr(lag, "READ_AGAIN_S", 0.2)
    loop = asyncio.get_running_loop()
    meter = LagMeter()
    meter.read()
    held_up = loop.time() + 0.6
    while loop.time() < held_up:
        pass
    has_ticked = asyncio.Event()
    loop.call_later(0, has_ticked.set)  # due later than the tick was
    await has_ticked.wait()
    assert meter.read() >= 0.4
    meter.close()


async def test_lag_of_an_event_loop_is_what_it_was_held_up_since_the_last_reading() -> None:
    meter = LagMeter()
    assert meter.read() < 0.5
    held_up = asyncio.get_running_loop().time() + 0.6

    def hold_up() -> None:
        while asyncio.get_running_loop().time() < held_up:
            pass

    hold_up()
    assert meter.read() >= 0.5
    meter.close()
    meter.close()
