"""Two generations in one event loop, and whatever stands between them: for the tests of handing connections off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hotport.adapters.base import Connections, Context
from hotport.channel import Channel
from hotport.model.fates import Fate
from hotport.options import Options
from hotport.wire.envelope import Envelope, Frame, decode_batch
from hotport.wire.frames import encode_frame
from hotport.wire.messages import Hello, OfferOrder, Order, Welcome, encode
from hotport.worker.server import ConnectionServer, make_server
from hotport.worker.worker import _Peer

DEADLINE_S = 10.0 * float(os.environ.get("HOTPORT_TEST_SLOWNESS", "1"))


class Generation:
    """A server, and the control socket on which other workers offer it their connections.

    It stands for a worker process, without the process: `_Peer` is the worker's own.
    """

    def __init__(
        self,
        number: int,
        application: Any,
        listener: socket.socket,
        path: Path,
        *,
        share: Any = None,
        **options: Any,
    ) -> None:
        self.number = number
        self.connections = Connections(maximum=options.pop("maximum", 0))
        context = Context(self.connections, service="web", generation=number, worker=number)
        settings = Options(keep_alive_s=60.0, lifespan="off", **options)
        server = make_server(application, context, settings, [listener.dup()], share=share)
        assert isinstance(server, ConnectionServer)
        self.server = server
        self.path = str(path / f"worker-{number}.sock")
        self._control: asyncio.AbstractServer | None = None
        self._taking: set[asyncio.Task[None]] = set()
        self.channel_type = Channel
        self._successors: list[str] = []
        self._is_leaving = False

    async def start(self) -> None:
        await self.server.startup()
        loop = asyncio.get_running_loop()
        self._control = await loop.create_unix_server(lambda: _Peer(self), self.path)  # type: ignore[arg-type]

    async def leave(self, *successors: Generation, timeout_s: float = DEADLINE_S) -> Counter[Fate]:
        """Drain, as a worker does that has successors; the fates of its connections."""
        self._successors = self._successors or [each.path for each in successors]
        self._is_leaving = True
        return await self.server.drain(timeout_s, successors=self._successors)

    async def redirect(self, *successors: Generation) -> None:
        """What a worker does that is told, while it leaves or just before, who can go on with its connections."""
        self._successors = [each.path for each in successors]
        if self._is_leaving:
            await self.server.follow(self._successors)

    async def end(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            if self._control is not None:
                self._control.close()
                await self._control.wait_closed()
                with contextlib.suppress(FileNotFoundError):  # from Python 3.13 on the event loop has removed it
                    os.unlink(self.path)
            await self.server.drain(0.0)
            if self._taking:
                await asyncio.wait(self._taking)
            await self.server.shutdown()

    # what `_Peer` asks of a worker

    def peer_joined(self, peer: _Peer) -> None:
        peer.say(Hello(pid=os.getpid(), service="web", generation=self.number, worker=self.number))

    def peer_left(self, peer: _Peer) -> None:
        pass

    async def obey(self, order: Any, peer: _Peer) -> None:
        assert isinstance(order, OfferOrder)
        channel = self.channel_type(peer.detach())
        task = asyncio.get_running_loop().create_task(self.server.take(channel, order.version, order.sender))
        self._taking.add(task)


class Service:
    """A port, and generations that serve it."""

    def __init__(self, listener: socket.socket, path: Path) -> None:
        self._listener = listener
        self._path = path
        self.address = listener.getsockname()
        self.generations: list[Generation] = []

    async def start(self, application: Any, **options: Any) -> Generation:
        """One more generation, which does not accept yet."""
        generation = Generation(len(self.generations) + 1, application, self._listener, self._path, **options)
        self.generations.append(generation)
        await generation.start()
        return generation

    async def replace(
        self, old: Generation, application: Any, *, timeout_s: float = DEADLINE_S, **options: Any
    ) -> tuple[Generation, Counter[Fate]]:
        """A restart: the new generation accepts, the old one leaves."""
        new = await self.start(application, **options)
        await new.server.accept()
        return new, await old.leave(new, timeout_s=timeout_s)

    async def connect(self) -> socket.socket:
        """A client's socket, non-blocking; the connection is accepted by whoever accepts."""
        sock = socket.socket(self._listener.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        return sock


class Successor:
    """A worker that misbehaves: it welcomes, and what it does then is the test's."""

    def __init__(self, path: Path) -> None:
        self.path = str(path / "successor.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        self._listener.bind(self.path)
        self._listener.listen()
        self.channel: Channel
        self.sock: socket.socket

    async def welcome(self, *, room: int = 100, connections: int = 0) -> None:
        self.sock, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        self.channel = Channel(self.sock)
        assert isinstance(await self.channel.receive_word(Order), OfferOrder)
        await self.channel.send(encode_frame(encode(Welcome(room=room, connections=connections))))

    async def batch(self) -> tuple[list[Envelope], list[int]]:
        kind = Frame.REST
        while kind is Frame.REST:
            kind, payload, descriptors = await self.channel.receive_frame()
        assert kind is Frame.BATCH
        return [each for each in decode_batch(payload) if each is not None], descriptors

    def close(self) -> None:
        self._listener.close()
        os.unlink(self.path)


@contextlib.asynccontextmanager
async def service(path: Path, family: socket.AddressFamily = socket.AF_INET) -> AsyncIterator[Service]:
    """A service without a generation; ends all that were started."""
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setblocking(False)
    listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(path / "port"))
    listener.listen(512)
    found = Service(listener, path)
    try:
        yield found
    finally:
        async with contextlib.AsyncExitStack() as stack:  # what fails there must not keep the others from ending
            stack.callback((path / "port").unlink, missing_ok=True)
            stack.callback(listener.close)
            for generation in reversed(found.generations):
                stack.push_async_callback(generation.end)
