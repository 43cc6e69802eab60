"""Applications that fork: what the child has of the server, and how connections end that somebody has duplicates of."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import hotport
import hotport.channel
from hotport.address import parse_address
from hotport.kernel import fork
from tests.support import DEADLINE_S
from tests.worker.handoff_support import service

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSE = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


async def answer_ok(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        await receive()
        await receive()
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def echo(stream: hotport.Stream) -> None:
    async for chunk in stream:
        await stream.send(chunk)


async def say_much(stream: hotport.Stream) -> None:
    await stream.receive()
    await stream.send(b"x" * 4_000_000)


async def fail(stream: hotport.Stream) -> None:
    await stream.send(b"half of ")
    await stream.receive()
    raise ValueError("no other half")


class Closes(asyncio.Protocol):
    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)
        self.transport.close()


@pytest.fixture(autouse=True)
def unforked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork._withheld, "has_forked", False)


@contextmanager
def forked() -> Iterator[int]:
    """The pid of a child that stays to the end of the block."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        theirs.sendall(b"x")  # what it must not have, it has not from here on
        theirs.recv(1)
        os._exit(0)
    theirs.close()
    try:
        ours.recv(1)
        yield pid
    finally:
        ours.close()
        os.waitpid(pid, 0)


def port_of(server: hotport.Server) -> int:
    return int(parse_address(server.addresses[0]).port)  # type: ignore[union-attr]


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[socket.socket]:
    with socket.socket() as client:
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, address)
        yield client


async def ask(client: socket.socket, what: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(client, what)
    return await asyncio.wait_for(loop.sock_recv(client, 65536), DEADLINE_S)


async def read_all(client: socket.socket) -> bytes:
    data = b""
    while piece := await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1 << 20), DEADLINE_S):
        data += piece
    return data


async def only(server: hotport.Server) -> Any:
    """The one connection that the server has, or will have."""
    while not server.connections.open:  # noqa: ASYNC110  there is no event for it
        await asyncio.sleep(0)
    (connection,) = server.connections.open
    return connection


def held_at(pid: int, port: int) -> list[Any]:
    """A process's sockets whose own end is this port."""
    return [each for each in psutil.Process(pid).net_connections("tcp") if each.laddr.port == port]


@pytest.mark.parametrize("app", [answer_ok, echo, Closes])
async def test_forked_child_has_neither_listener_nor_connections(app: Any) -> None:
    async with hotport.serve(app, bind="127.0.0.1:0") as server, connected(("127.0.0.1", port_of(server))) as client:
        if app is not Closes:
            assert await ask(client, GET)
        late = socket.create_connection(("127.0.0.1", port_of(server)))
        while len(server.connections.open) < 2:  # noqa: ASYNC110  the very turn in which it comes is meant
            await asyncio.sleep(0)
        with late, forked() as pid:  # one has answered; of the other one the transport may not be there yet
            assert len(held_at(os.getpid(), port_of(server))) == 3
            assert held_at(pid, port_of(server)) == []


async def test_child_that_is_forked_by_a_request_keeps_no_client_waiting() -> None:
    """The client got no end of its connection for as long as the child lived."""
    children = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        child = forked()
        children.append((child, child.__enter__()))
        await answer_ok(scope, receive, send)

    async with (
        hotport.serve(app, bind="127.0.0.1:0", kind="asgi", lifespan="off") as server,
        connected(("127.0.0.1", port_of(server))) as client,
    ):
        await asyncio.get_running_loop().sock_sendall(client, CLOSE)
        assert (await read_all(client)).endswith(b"ok")
    for child, pid in children:
        assert held_at(pid, port_of(server)) == []
        child.__exit__(None, None, None)


async def test_sockets_application_may_serve_from_forked_children() -> None:
    """The listeners that it is given are its own; ours are not in the child."""
    pids = []

    async def main(sockets: list[socket.socket], lifetime: hotport.Lifetime) -> None:
        for _ in range(2):
            pid = os.fork()
            if pid == 0:
                sockets[0].setblocking(True)
                while True:
                    client, _ = sockets[0].accept()
                    client.sendall(str(os.getpid()).encode())
                    client.close()
            pids.append(pid)
        sockets[0].close()
        lifetime.started()
        await lifetime.draining.wait()
        for pid in pids:
            os.kill(pid, 15)
            assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == 15  # noqa: ASYNC222  it ends at once

    async with hotport.serve(main, bind="127.0.0.1:0", kind="sockets") as server:
        for pid in pids:
            assert len(held_at(pid, port_of(server))) == 1
        async with connected(("127.0.0.1", port_of(server))) as client:
            assert int(await read_all(client)) in pids


@pytest.mark.parametrize(
    ("app", "said", "end"),
    [
        (answer_ok, CLOSE, b"ok"),
        (answer_ok, UPGRADE + b"\x88\x80\0\0\0\0", b"\x88\x00"),
        (Closes, b"bye", b"bye"),
        (say_much, b"go", b"x" * 4_000_000),
    ],
    ids=["http", "websocket", "protocol", "stream"],
)
async def test_end_of_a_connection_is_seen_although_somebody_has_a_duplicate(
    app: Any, said: bytes, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of the answer, however slowly the client reads it."""
    monkeypatch.setattr(fork._withheld, "has_forked", True)
    async with (
        hotport.serve(app, bind="127.0.0.1:0", lifespan="off") as server,
        connected(("127.0.0.1", port_of(server))) as client,
    ):
        connection = await only(server)
        duplicate = os.dup(connection.sock.fileno())
        try:
            await asyncio.get_running_loop().sock_sendall(client, said)
            assert (await read_all(client)).endswith(end)
        finally:
            os.close(duplicate)


@pytest.mark.parametrize("is_shared", [False, True])
async def test_torn_answer_ends_with_a_reset_although_somebody_has_a_duplicate(
    is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork._withheld, "has_forked", is_shared)
    async with (
        hotport.serve(fail, bind="127.0.0.1:0") as server,
        connected(("127.0.0.1", port_of(server))) as client,
    ):
        connection = await only(server)
        duplicate = os.dup(connection.sock.fileno() if is_shared else client.fileno())
        try:
            assert await ask(client, b"") == b"half of "
            with pytest.raises(ConnectionResetError):
                await ask(client, b"go")
        finally:
            os.close(duplicate)


async def test_connection_that_has_moved_goes_on_although_its_worker_has_forked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork._withheld, "has_forked", True)
    async with service(tmp_path) as found:
        old = await found.start(answer_ok)
        await old.server.accept()
        with await found.connect() as client:
            assert (await ask(client, GET)).endswith(b"ok")
            _, fates = await found.replace(old, answer_ok)
            assert fates == {"moved_http": 1}
            assert (await ask(client, GET)).endswith(b"ok")


async def test_child_that_is_forked_while_connections_move_has_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two processes they are in no registry: those that have moved, and the channel."""
    async with service(tmp_path) as found:
        old = await found.start(answer_ok)
        await old.server.accept()
        with await found.connect() as client:
            assert (await ask(client, GET)).endswith(b"ok")
            connection = next(iter(old.connections.open))
            seen: list[Any] = []
            release = type(connection).release

            def look(self: Any) -> None:
                with forked() as pid:
                    seen.append(held_at(pid, found.address[1]))
                    sockets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
                    seen.append([each for each in sockets if each in channels])
                release(self)

            channels = set()
            init = hotport.channel.Channel.__init__

            def note(self: Any, sock: socket.socket) -> None:
                init(self, sock)
                channels.add(os.readlink(f"/proc/self/fd/{sock.fileno()}"))

            monkeypatch.setattr(hotport.channel.Channel, "__init__", note)
            monkeypatch.setattr(type(connection), "release", look)
            await found.replace(old, answer_ok)
            # `found` has a listener of its own, which is the test's.
            assert [[each.status for each in seen[0]], seen[1]] == [["LISTEN"], []]
            assert channels
