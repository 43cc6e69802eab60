"""Serving an application from listeners: what a worker process and `hotport.serve` have in common."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from hotport.adapters.base import Adapter, Connections, Context
from hotport.adapters.sockets import SocketsAdapter
from hotport.adapters.target import make_adapter
from hotport.errors import StartError
from hotport.options import Options
from hotport.trust import Trusted
from hotport.worker.acceptor import Acceptor

__all__ = ["ConnectionServer", "Server", "SocketsServer", "make_server", "tls_context"]


class Server(Protocol):
    """The steps of a generation's life, in order; `accept` and `quiesce` may alternate."""

    connections: Connections

    async def startup(self) -> None:
        """Make the application ready. Raises StartError (HP5xx)."""

    async def accept(self) -> None:
        """Accept connections; true when this returns."""

    def quiesce(self) -> None:
        """Stop accepting; every connection goes on."""

    async def drain(self, timeout_s: float, *, is_last: bool = False) -> Counter[str]:
        """Finish every connection, cut what is left after `timeout_s` seconds; return fates and counts.

        Args:
            is_last: Nobody else shares the listeners: serve what waits in the accept queue, too.
        """

    async def shutdown(self) -> None:
        """Let the application release what it holds."""


class ConnectionServer:
    """Serves the kinds of application that get one connection at a time.

    Descriptors: owns `listeners` and closes them when draining starts.
    """

    def __init__(
        self,
        adapter: Adapter,
        listeners: Sequence[socket.socket],
        connections: Connections,
        *,
        tasks: int = 1,
        tls: ssl.SSLContext | None = None,
        proxies: Trusted | None = None,
    ) -> None:
        self.connections = connections
        self._adapter = adapter
        self._acceptors = [
            Acceptor(each, adapter, connections, tls=tls, proxies=proxies)
            for listener in listeners
            for each in (listener, *(listener.dup() for _ in range(tasks - 1)))
        ]
        self._tasks = tasks
        self._is_accepting = False
        connections.on_full = self._stop_acceptors
        connections.on_room = self._on_room

    async def startup(self) -> None:
        await self._adapter.startup()

    async def accept(self) -> None:
        self._is_accepting = True
        self.connections.count_fates(False)
        for acceptor in self._acceptors:
            acceptor.start()

    def quiesce(self) -> None:
        self._is_accepting = False
        self.connections.count_fates(True)
        self._stop_acceptors()

    def _stop_acceptors(self) -> None:
        for acceptor in self._acceptors:
            acceptor.stop()

    def _on_room(self) -> None:
        if self._is_accepting:
            for acceptor in self._acceptors:
                acceptor.start()

    async def drain(self, timeout_s: float, *, is_last: bool = False) -> Counter[str]:
        self.quiesce()
        self.connections.drain(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                if is_last:
                    for acceptor in self._acceptors:
                        await acceptor.empty()
                for acceptor in self._acceptors:
                    acceptor.close()
                    await acceptor.wait_attached()
                await self.connections.wait_empty()
                await self._adapter.finish()
        except TimeoutError:
            self._count_unaccepted(is_last)
            self.connections.cut()
            for acceptor in self._acceptors:
                acceptor.cut_attaching()
            await asyncio.sleep(0)  # transports close their sockets in the next turn of the loop
        return self.connections.fates

    def _count_unaccepted(self, is_last: bool) -> None:
        """What could not be taken from the queue by the deadline is reset when the last listener closes."""
        if is_last:
            for acceptor in self._acceptors[:: self._tasks]:  # those in between share its queue
                if waiting := acceptor.waiting():
                    self.connections.fates["cut_unaccepted"] += waiting
        for acceptor in self._acceptors:
            acceptor.close()

    async def shutdown(self) -> None:
        await self._adapter.shutdown()


class SocketsServer:
    """Runs a server of somebody else's inside the worker; it has its own idea of connections."""

    def __init__(self, adapter: SocketsAdapter, listeners: Sequence[socket.socket], connections: Connections) -> None:
        self.connections = connections
        self._adapter = adapter
        self._listeners = listeners

    async def startup(self) -> None:
        await self._adapter.startup(self._listeners)

    async def accept(self) -> None:
        """It has accepted since it said that it had started."""

    def quiesce(self) -> None:
        """It cannot stop accepting without leaving; sharing the listener until it drains loses nothing."""

    async def drain(self, timeout_s: float, *, is_last: bool = False) -> Counter[str]:
        self.connections.drain(timeout_s)
        is_cut = await self._adapter.finish(timeout_s)
        for listener in self._listeners:
            listener.close()
        return Counter({"cut_server": 1} if is_cut else {"server_finished": 1})

    async def shutdown(self) -> None:
        """Its own affair."""


def make_server(
    application: Any, context: Context, options: Options, listeners: Sequence[socket.socket]
) -> ConnectionServer | SocketsServer:
    """The server for an application, after its kind.

    Raises:
        StartError: Its kind is unclear, an extra is missing, or its certificate cannot be used (HP504, HP505, HP507),
            a listener is not for connections (HP511), or a PROXY header has nobody to read it (HP518).
    """
    adapter = make_adapter(application, context, options)
    if isinstance(adapter, SocketsAdapter):
        if options.proxy_protocol:
            raise StartError(
                "HP518",
                "cannot read the PROXY header for this application",
                cause="it accepts connections by itself (kind sockets)",
                fix="remove proxy_protocol, and let the application's own server read the header",
            )
        return SocketsServer(adapter, listeners, context.connections)
    if any(listener.type != socket.SOCK_STREAM for listener in listeners):
        raise StartError(
            "HP511",
            "cannot serve this application from a datagram socket",
            cause="it takes connections, and udp has none",
            fix="bind a tcp or unix address, or write it as a `sockets` application (--kind sockets)",
        )
    return ConnectionServer(
        adapter,
        listeners,
        context.connections,
        tasks=options.tasks,
        tls=tls_context(options),
        proxies=Trusted(options.trusted_proxy) if options.proxy_protocol else None,
    )


def tls_context(options: Options) -> ssl.SSLContext | None:
    """A server's TLS context from the files that the options name, read now; None without them.

    Raises:
        StartError: They cannot be read or do not belong together (HP507).
    """
    if options.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise StartError(
            "HP507",
            f"cannot use the certificate {options.tls_cert}",
            cause=f"{error} (key: {options.tls_key or 'in the same file'})",
            fix=f"openssl x509 -in {options.tls_cert} -noout -subject -enddate",
        ) from None
    context.set_alpn_protocols(["http/1.1"])
    return context
