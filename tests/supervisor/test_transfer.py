"""Giving a worker its listeners, and workers that do not take them."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import pytest
from anyio.abc import UNIXSocketStream

from hotport.kernel.spawn import Child
from hotport.supervisor import process as under_test
from hotport.supervisor.process import WorkerProcess
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import Hello, Order, TransferOrder, Transferred, Welcome, decode, encode
from tests.support import STRANGER

pytestmark = pytest.mark.anyio

Behaviour = Callable[[UNIXSocketStream], Awaitable[None]]


@pytest.fixture
def listeners() -> Iterator[dict[str, socket.socket]]:
    made = {f"tcp://127.0.0.1:{number}": socket.create_server(("127.0.0.1", 0)) for number in range(3)}
    yield made
    for sock in made.values():
        sock.close()


async def say(stream: UNIXSocketStream, *words: Hello | Welcome | Transferred) -> None:
    await stream.send(b"".join(encode_frame(encode(word)) for word in words))


async def read_order(stream: UNIXSocketStream) -> TransferOrder:
    decoder = FrameDecoder()
    while True:
        for payload in decoder.feed(await stream.receive()):
            order = decode(payload, Order)
            assert isinstance(order, TransferOrder)
            return order


async def give(path: Path, behaviour: Behaviour, *args: object) -> None:
    """Let a process whose worker behaves like this transfer something."""
    control = str(path / "worker.sock")
    process = WorkerProcess(1, 1, Child(os.getpid(), -1), control, is_foreign=False)

    async def behave(stream: UNIXSocketStream) -> None:
        async with stream:
            await behaviour(stream)

    failure: OSError | None = None
    async with await anyio.create_unix_listener(control) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, behave)  # type: ignore[arg-type]
        try:
            await process.transfer(*args)  # type: ignore[arg-type]
        except OSError as error:
            failure = error
        tasks.cancel_scope.cancel()
    os.unlink(control)
    if failure is not None:
        raise failure


async def test_worker_gets_listeners_by_address_and_then_connections(
    tmp_path: Path, listeners: dict[str, socket.socket]
) -> None:
    found: list[tuple[str, ...]] = []
    counts: list[int] = []
    ours, theirs = socket.socketpair()

    async def take(stream: UNIXSocketStream) -> None:
        await say(stream, Hello(pid=1, service="svc", generation=1, worker=1))
        order = await read_order(stream)
        found.append(order.addresses)
        await say(stream, Welcome(room=4))
        _, descriptors = await stream.receive_fds(1, 10)
        counts.append(len(descriptors))
        for fd in descriptors:
            os.close(fd)
        await say(stream, Transferred(count=4))

    with ours, theirs:
        await give(tmp_path, take, listeners, [ours])
        assert found == [tuple(listeners)]
        assert counts == [4]
        assert all(sock.fileno() >= 0 for sock in (*listeners.values(), ours))


@pytest.mark.parametrize("is_welcome", [False, True])
async def test_worker_that_leaves_instead_has_taken_nothing(
    tmp_path: Path, listeners: dict[str, socket.socket], is_welcome: bool
) -> None:
    async def leave(stream: UNIXSocketStream) -> None:
        await read_order(stream)
        if is_welcome:
            await say(stream, Welcome(room=3))

    with pytest.raises(ConnectionError, match="has not taken"):
        await give(tmp_path, leave, listeners)
    assert all(sock.fileno() >= 0 for sock in listeners.values())


async def test_another_users_socket_is_given_nothing(
    tmp_path: Path, listeners: dict[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leave(stream: UNIXSocketStream) -> None:
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()

    monkeypatch.setattr("hotport.kernel.sockets.peer_credentials", lambda sock: STRANGER)
    with pytest.raises(PermissionError, match="pid 4242 of uid 65534"):
        await give(tmp_path, leave, listeners)


async def test_worker_that_says_something_else_has_taken_nothing(
    tmp_path: Path, listeners: dict[str, socket.socket]
) -> None:
    async def babble(stream: UNIXSocketStream) -> None:
        await stream.send(encode_frame(b"{}"))
        await stream.receive()

    with pytest.raises(ConnectionError, match="has not taken"):
        await give(tmp_path, babble, listeners)


async def test_worker_that_hangs_is_not_waited_for_for_ever(
    tmp_path: Path, listeners: dict[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "TRANSFER_TIMEOUT_S", 0.05)

    async def hang(stream: UNIXSocketStream) -> None:
        await anyio.sleep_forever()

    with pytest.raises(TimeoutError):
        await give(tmp_path, hang, listeners)


async def test_worker_that_is_gone_cannot_be_given_anything(listeners: dict[str, socket.socket]) -> None:
    process = WorkerProcess(1, 1, Child(os.getpid(), -1), "/nowhere/worker.sock", is_foreign=False)
    with pytest.raises(OSError, match="No such file"):
        await process.transfer(listeners)
