"""WebSockets go on in the next generation, if their application agrees, and their clients see nothing of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Frame, Opcode
from websockets.uri import parse_uri

from hotport.adapters.asgi.websocket import WebSocketConnection
from hotport.observe import logs
from tests.adapters.asgi_support import turns, until
from tests.worker.handoff_support import DEADLINE_S, Generation, Service, Successor, service

pytestmark = pytest.mark.anyio


class Echo:
    """Answers each message with its generation and the message; notes what it is told.

    Args:
        export: Called with a session's own state to export it; None does not ask to be moved.
    """

    def __init__(self, *, asks: bool = False, accepts: bool = True) -> None:
        self.asks = asks
        self.accepts = accepts
        self.scopes: list[dict[str, Any]] = []
        self.ends: list[dict[str, Any]] = []
        self.counts: list[int] = []
        self.go = asyncio.Event()
        self.is_busy = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        hotport = scope["extensions"]["hotport"]
        count = hotport["state"]["count"] if hotport["state"] else 0
        if self.asks:
            hotport["movable"](lambda: {"count": count} if count >= 0 else None)
        assert (await receive())["type"] == "websocket.connect"
        if not self.accepts:
            await send({"type": "websocket.close"})
            return
        await send({"type": "websocket.accept", "subprotocol": "chat" if "chat" in scope["subprotocols"] else None})
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                self.ends.append(message)
                return
            count += 1
            text = message.get("text")
            if text == "hold":
                self.is_busy = True
                await self.go.wait()
                self.is_busy = False
            if text == "decline":
                count = -100
            if text == "fine":
                count = 7
            if text is not None:
                await send({"type": "websocket.send", "text": f"{hotport['generation']} {count} {text}"})
            else:
                await send({"type": "websocket.send", "bytes": message["bytes"]})


class Client:
    """A WebSocket client made of the library's sans-I/O protocol, so that frames can be cut anywhere."""

    def __init__(self, sock: socket.socket, *, deflate: bool = True, subprotocols: list[str] | None = None) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()
        self._events: list[Any] = []
        extensions = [ClientPerMessageDeflateFactory(compress_settings={"memLevel": 5})] if deflate else None
        self.protocol = ClientProtocol(
            parse_uri("ws://x/path?query=1"),
            extensions=extensions,
            subprotocols=subprotocols,  # type: ignore[arg-type]
        )

    async def open(self) -> None:
        self.protocol.send_request(self.protocol.connect())
        await self.flush()
        await self._event()
        assert self.protocol.handshake_exc is None

    async def send(self, text: str) -> None:
        self.protocol.send_text(text.encode())
        await self.flush()

    async def send_raw(self, data: bytes) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self._loop.sock_sendall(self.sock, data)

    async def flush(self) -> None:
        await self.send_raw(b"".join(self.protocol.data_to_send()))

    async def receive(self) -> str | bytes:
        """The next message; control frames are answered."""
        while True:
            frame = await self._event()
            if frame.opcode is Opcode.TEXT:
                return bytes(frame.data).decode()
            if frame.opcode is Opcode.BINARY:
                return bytes(frame.data)
            assert frame.opcode is not Opcode.CLOSE, frame
            await self.flush()

    async def closed(self) -> int | None:
        """The code with which the server closes."""
        while True:
            frame = await self._event()
            if frame.opcode is Opcode.CLOSE:
                await self.flush()
                assert self.protocol.close_rcvd is not None
                return int(self.protocol.close_rcvd.code)

    async def _event(self) -> Any:
        while True:
            if self._events:
                return self._events.pop(0)
            async with asyncio.timeout(DEADLINE_S):
                data = await self._loop.sock_recv(self.sock, 65536)
            assert data, "the connection was closed"
            self.protocol.receive_data(data)
            self._events += self.protocol.events_received()


@contextlib.asynccontextmanager
async def opened(
    tmp_path: Path, app: Echo, *, deflate: bool = True, subprotocols: list[str] | None = None, **options: Any
) -> AsyncIterator[tuple[Service, Generation, Client]]:
    async with service(tmp_path) as port:
        old = await port.start(app, **options)
        await old.server.accept()
        client = Client(await port.connect(), deflate=deflate, subprotocols=subprotocols)
        try:
            await client.open()
            yield port, old, client
        finally:
            client.sock.close()


def only(generation: Generation) -> WebSocketConnection:
    (connection,) = generation.connections.open
    assert isinstance(connection, WebSocketConnection)
    return connection


async def leaving(port: Service, old: Generation, app: Echo, **options: Any) -> tuple[Generation, Any]:
    """A restart that has begun: the new generation, and what awaits the end of the old one."""
    new = await port.start(app, **options)
    task = asyncio.ensure_future(old.leave(new))
    await until(old.connections.draining.is_set)
    return new, task


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
async def test_websocket_moves_from_generation_to_generation(tmp_path: Path, deflate: bool) -> None:
    app = Echo()
    async with opened(tmp_path, app, deflate=deflate, handoff="websocket") as (port, serving, client):
        for number in range(1, 5):
            for count in range(1, 4):
                await client.send(f"m{number}.{count} " + "y" * 200)
                assert await client.receive() == f"{number} {count} m{number}.{count} " + "y" * 200
            serving, fates = await port.replace(serving, app, handoff="websocket")
            assert fates == {"moved_websocket": 1}
        assert bool(client.protocol.extensions) is deflate
    assert app.ends[:4] == [{"type": "websocket.disconnect", "code": 1012, "reason": "service restart"}] * 4
    first, *others = app.scopes
    for scope in others:
        assert scope["extensions"]["hotport"]["resumed"]
        for key in ("path", "raw_path", "query_string", "headers", "client", "server", "subprotocols", "scheme"):
            assert scope[key] == first[key], key
    assert not first["extensions"]["hotport"]["resumed"]


async def test_application_that_asks_is_moved_with_its_state_and_deflates_each_message_by_itself(
    tmp_path: Path,
) -> None:
    app = Echo(asks=True)
    async with opened(tmp_path, app, subprotocols=["chat"]) as (port, old, client):
        await client.send("a")
        assert await client.receive() == "1 1 a"
        _, fates = await port.replace(old, app)
        assert fates == {"moved_websocket": 1}
        await client.send("b")
        assert await client.receive() == "2 2 b"
        assert client.protocol.subprotocol == "chat"
        (deflate,) = client.protocol.extensions
        assert deflate.remote_no_context_takeover  # type: ignore[attr-defined]
        assert deflate.local_no_context_takeover  # type: ignore[attr-defined]


@pytest.mark.parametrize("asks", [False, True])
async def test_application_that_is_resumed_and_never_agreed_is_named_once(
    tmp_path: Path, asks: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A protocol that keeps state (Socket.IO, graphql-transport-ws) was open and silent for ever, without a word."""
    app = Echo(asks=asks)
    async with opened(tmp_path, app, handoff="websocket") as (port, old, client):
        other = Client(await port.connect(), deflate=False)
        await other.open()
        new, fates = await port.replace(old, app, handoff="websocket")
        assert fates == {"moved_websocket": 2}
        await until(lambda: sum(scope["extensions"]["hotport"]["resumed"] for scope in app.scopes) == 2)
        for each in (client, other):
            await each.send("still here")
            await each.receive()
        other.sock.close()
        await until(lambda: len(new.connections.open) == 1)
    warned = [record for record in caplog.records if "has not called movable()" in record.getMessage()]
    assert len(warned) == (0 if asks else 1)


async def test_without_agreement_context_is_kept_and_the_websocket_is_closed_with_1012(tmp_path: Path) -> None:
    app = Echo()
    async with opened(tmp_path, app) as (port, old, client):
        (deflate,) = client.protocol.extensions
        assert not deflate.remote_no_context_takeover  # type: ignore[attr-defined]
        _, task = await leaving(port, old, app)
        only(old)._tell_to_close()  # at its random moment
        assert await client.closed() == 1012
        client.sock.close()
        assert await task == {"told_to_close": 1}


async def test_it_is_too_late_to_agree_once_messages_depend_on_each_other(tmp_path: Path) -> None:
    class Late(Echo):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            with pytest.raises(RuntimeError, match=r"before 'websocket\.accept'"):
                scope["extensions"]["hotport"]["movable"]()
            await send({"type": "websocket.send", "text": "too late"})
            await receive()

    async with opened(tmp_path, Late()) as (_, _, client):
        assert await client.receive() == "too late"


async def test_application_that_is_busy_answers_first(tmp_path: Path) -> None:
    app = Echo()
    async with opened(tmp_path, app, handoff="websocket") as (port, old, client):
        await client.send("hold")
        await until(lambda: app.is_busy)
        await client.send("behind")
        _, task = await leaving(port, old, app, handoff="websocket")
        assert only(old).why_here() == "open, its application is busy"
        app.go.set()
        assert await client.receive() == "1 1 hold"
        generation, _, text = str(await client.receive()).split()
        assert (generation in "12", text) == (True, "behind")
        assert await task == {"moved_websocket": 1}
        await client.send("after")
        assert str(await client.receive()).endswith("after")


async def test_messages_that_the_application_has_not_received_travel(tmp_path: Path) -> None:
    """It has been woken for them, and has not run yet: they must not be answered twice, nor get lost."""
    app = Echo()
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (port, old, client):
        await until(lambda: only(old)._session.is_receiving)
        new, task = await leaving(port, old, app, handoff="websocket")
        if old.connections.open:  # the mover has not had its turn: more than one message at once, and bytes among them
            frames = [(Opcode.TEXT, b"one"), (Opcode.BINARY, b"\x00two"), (Opcode.TEXT, b"three")]
            data = b"".join(Frame(op, payload).serialize(mask=True) for op, payload in frames)
            only(old).data_received(data)
            received = [await client.receive() for _ in frames]
            assert received[1] == b"\x00two"
            assert {str(received[0]), str(received[2])} <= {
                *(f"{g} {n} {t}" for g in (1, 2) for n in (1, 3) for t in ("one", "three"))
            }
        assert await task == {"moved_websocket": 1}
        await until(lambda: len(new.connections.open) == 1)


async def test_undelivered_messages_are_held_back_and_put_back(tmp_path: Path) -> None:
    app = Echo()
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (_, old, client):
        await until(lambda: only(old)._session.is_receiving)
        connection = only(old)
        asked: list[Any] = []
        assert connection.prepare_handoff(asked.append)
        connection.data_received(Frame(Opcode.TEXT, b"one").serialize(mask=True))
        offer = connection.offer()
        assert offer is not None
        assert offer.envelope.state.undelivered == ["one"]  # type: ignore[union-attr]
        await turns()
        assert connection.undelivered == ()
        assert not connection.transport.is_reading()  # what the client sends is for the process that takes it
        assert connection.offer() is None  # it is offered already
        connection.keep()
        assert await client.receive() == "1 1 one"
        await client.send("two")
        assert await client.receive() == "1 2 two"


async def test_application_that_ends_while_its_websocket_stands_still_closes_it_only_if_it_stays(
    tmp_path: Path,
) -> None:
    class Impatient(Echo):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await send({"type": "websocket.accept"})
            async with asyncio.timeout(0) as ends:
                ends.reschedule(None)
                self.ends.append({"now": lambda: ends.reschedule(0)})
                await receive()

    app = Impatient()
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (_, old, client):
        await until(lambda: only(old)._session.is_receiving)
        connection = only(old)
        assert connection.prepare_handoff(lambda _: None)
        assert connection.offer() is not None
        app.ends[0]["now"]()
        await until(lambda: connection._session.has_finished)
        assert connection._protocol.close_sent is None
        connection.keep()
        assert await client.closed() == 1011


@pytest.mark.parametrize("cut", [1, 2, 5, 6, 8])
async def test_half_a_frame_and_half_a_message_are_waited_for(tmp_path: Path, cut: int) -> None:
    app = Echo()
    first = Frame(Opcode.TEXT, b"he", fin=False).serialize(mask=True)
    second = Frame(Opcode.CONT, b"llo").serialize(mask=True)
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (port, old, client):
        await client.send_raw(first + second[: cut - 1])
        await until(lambda: only(old).is_mid_message)
        _, task = await leaving(port, old, app, handoff="websocket")
        assert only(old).why_here() in ("open, half a message", "open, its application is busy")
        await client.send_raw(second[cut - 1 :])
        assert str(await client.receive()).endswith("hello")
        assert await task == {"moved_websocket": 1}


async def test_frame_that_is_cut_while_it_stands_still_arrives_whole(tmp_path: Path) -> None:
    app = Echo()
    frame = Frame(Opcode.TEXT, b"hello").serialize(mask=True)
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (port, old, client):
        for cut in range(1, len(frame)):
            await client.send_raw(frame[:cut])
            _, task = await leaving(port, old, app, handoff="websocket")
            await client.send_raw(frame[cut:])
            assert str(await client.receive()).endswith("hello")
            assert await task == {"moved_websocket": 1}
            old = port.generations[-1]
            await old.server.accept()


async def test_application_that_declines_is_asked_again_after_another_message(tmp_path: Path) -> None:
    app = Echo(asks=True)
    async with opened(tmp_path, app) as (port, old, client):
        await client.send("decline")
        assert await client.receive() == "1 -100 decline"
        _, task = await leaving(port, old, app)
        await client.send("still")
        assert await client.receive() == "1 -99 still"
        await client.send("fine")
        assert await client.receive() == "1 7 fine"
        assert await task == {"moved_websocket": 1}
        await client.send("after")
        assert await client.receive() == "2 8 after"


async def test_state_that_cannot_travel_stays_with_its_websocket(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(Echo):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            scope["extensions"]["hotport"]["movable"](lambda: self)
            await super().__call__(scope, receive, send)

    app = Wrong()
    async with opened(tmp_path, app) as (port, old, client):
        await until(lambda: only(old)._session.is_receiving)
        _, task = await leaving(port, old, app)
        await until(lambda: only(old)._drain_timer is not None)
        only(old)._tell_to_close()
        assert await client.closed() == 1012
        client.sock.close()
        assert await task == {"told_to_close": 1}
    assert "could not export its state" in caplog.text


@pytest.mark.parametrize("how", ["closes", "denies", "raises", "returns"])
async def test_new_application_that_does_not_accept_closes_with_a_code(tmp_path: Path, how: str) -> None:
    class Refusing(Echo):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await receive()
            if how == "raises":
                raise ValueError("not you")
            if how == "closes":
                await send({"type": "websocket.close", "code": 4000})
            if how == "denies":
                await send({"type": "websocket.http.response.start", "status": 401, "headers": []})

    async with opened(tmp_path, Echo(), handoff="websocket") as (port, old, client):
        await until(lambda: only(old)._session.is_receiving)
        _, fates = await port.replace(old, Refusing(), handoff="websocket")
        assert fates == {"moved_websocket": 1}
        assert await client.closed() == (1011 if how in ("raises", "returns") else 1008)


async def test_next_generation_that_would_agree_upon_something_else_leaves_it_with_the_old_one(tmp_path: Path) -> None:
    app = Echo()
    async with opened(tmp_path, app, handoff="websocket") as (port, old, client):
        await until(lambda: only(old)._session.is_receiving)
        _, task = await leaving(port, old, app, handoff="websocket", ws_deflate=False)
        await until(lambda: only(old)._drain_timer is not None)
        await client.send("here")
        assert await client.receive() == "1 1 here"
        only(old)._tell_to_close()
        assert await client.closed() == 1012
        client.sock.close()
        assert await task == {"told_to_close": 1}


async def test_ping_that_waits_for_its_pong_travels(tmp_path: Path) -> None:
    app = Echo()
    async with opened(tmp_path, app, handoff="websocket", ws_ping_timeout_s=60.0) as (port, old, client):
        await until(lambda: only(old)._session.is_receiving)
        only(old)._ping()
        new, fates = await port.replace(old, app, handoff="websocket")
        assert fates == {"moved_websocket": 1}
        await until(lambda: bool(only(new).due))
        assert only(new)._waits_for.name == "PONG"
        await client.send("also a sign of life")
        await client.receive()
        await until(lambda: only(new)._waits_for.name == "PING")


async def test_sender_beside_the_receiver_waits_while_the_connection_stands_still(tmp_path: Path) -> None:
    """An application with a task that pushes: what it pushes goes out whole, or it is told that the client is gone."""
    sent: list[int] = []
    left: list[BaseException] = []

    async def push(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        generation = scope["extensions"]["hotport"]["generation"]

        async def pusher() -> None:
            try:
                while True:
                    await send({"type": "websocket.send", "text": str(generation)})
                    sent.append(generation)
                    await asyncio.sleep(0)
            except OSError as error:
                left.append(error)

        task = asyncio.ensure_future(pusher())
        while (await receive())["type"] != "websocket.disconnect":
            pass
        await task

    async with opened(tmp_path, push, deflate=False, handoff="websocket") as (port, old, client):  # type: ignore[arg-type]
        received = [str(await client.receive()) for _ in range(20)]
        _, task = await leaving(port, old, push, handoff="websocket")  # type: ignore[arg-type]
        while "2" not in received:
            received.append(str(await client.receive()))
        assert await task == {"moved_websocket": 1}
        assert received == sorted(received)
        assert received.count("1") == sent.count(1)
        assert len(left) == 1


async def test_access_log_has_one_line_for_a_websocket_however_often_it_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process that it had been moved to wrote another one, 499, at its end there."""
    written: list[str] = []
    monkeypatch.setattr(logs, "write", written.append)
    app = Echo()
    async with opened(tmp_path, app, handoff="websocket", access_log="combined") as (port, serving, client):
        for _ in range(2):
            await client.send("a")
            await client.receive()
            serving, _ = await port.replace(serving, app, handoff="websocket", access_log="combined")
        client.sock.close()
        await until(lambda: not serving.connections.open)
    lines = "".join(written).splitlines()
    assert [line.split('"')[2].split()[0] for line in lines] == ["101"]


async def test_websocket_that_stays_keeps_waiting_for_a_client_that_reads_slowly(tmp_path: Path) -> None:
    """When nobody took it any more, its application could send without end into a buffer."""
    app = Echo()
    async with opened(tmp_path, app, deflate=False, handoff="websocket") as (_, old, _client):
        connection = only(old)
        await until(lambda: connection.is_open)
        assert connection.prepare_handoff(lambda _: None)
        while connection.writable is None:
            connection.send_message(None, bytes(1 << 20))
            await asyncio.sleep(0)
        connection.drain()
        assert connection.writable is not None


async def test_websocket_that_nobody_takes_is_in_service_here_and_closed_at_its_random_moment(tmp_path: Path) -> None:
    """Going on it says that it is ready, and is told that nobody takes it: once, not again and again."""
    app = Echo()
    async with opened(tmp_path, app, handoff="websocket") as (_, old, client):
        await until(lambda: only(old)._session.is_receiving)
        successor = Successor(tmp_path)
        task = asyncio.ensure_future(old.server.drain(DEADLINE_S, successors=[successor.path]))
        await successor.welcome()
        _, descriptors = await successor.batch()
        for fd in descriptors:
            os.close(fd)
        successor.channel.close()
        await until(lambda: only(old)._drain_timer is not None)
        await client.send("here")
        assert await client.receive() == "1 1 here"
        only(old)._tell_to_close()
        assert await client.closed() == 1012
        client.sock.close()
        assert await task == {"told_to_close": 1}
        successor.close()
