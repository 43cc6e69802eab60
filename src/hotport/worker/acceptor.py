"""Accept connections from a listener without losing any.

`asyncio.Server` is not used: on asyncio's loop its ``close()`` drops connections that were accepted but not yet
attached (python/cpython#109564). Here a connection gets its protocol object, and so its place in the registry, in the
same step in which it leaves the accept queue; stopping is one synchronous call between two such steps.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine
from time import perf_counter
from typing import Any, Final

from hotport.adapters.base import Adapter, Connections
from hotport.kernel.fork import withhold
from hotport.kernel.sockets import accept_queue_length
from hotport.model.balance import DEFER_S
from hotport.trust import Trusted
from hotport.wire.proxyprotocol import HEADER_BYTES_MAX, ProxyHeader, ProxyHeaderError, parse_proxy_header
from hotport.worker import background
from hotport.worker.share import Share
from hotport.worker.tls import Tls
from hotport.worker.tlstransport import Layer, TlsTransport

__all__ = ["Acceptor", "PlainSocket", "attach", "attach_tls"]

log = logging.getLogger("hotport.acceptor")

#: Connections accepted in one turn of the event loop, at most. Each brings a request to the next turn: so it is one at
#: first, twice as many as in the last turn if that was over within `SHORT_TURN_S`, or else one again.
BATCH_MAX: Final = 16
SHORT_TURN_S: Final = 0.003

#: With TLS each brings a handshake, which takes longer than most requests.
TLS_BATCH_MAX: Final = 1

#: Seconds until accepting is retried after an error: the process or the system is out of descriptors or memory, or
#: another process has shut the shared listener down (EINVAL, until one calls listen(2) again).
PAUSE_S: Final = 0.1

#: Errors of accept(2) for a connection that died in the queue: "treat them like EAGAIN by retrying".
TRANSIENT: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPERM,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
    }
)

EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

#: Connections that `Acceptor.empty` accepts at most, so that a flood cannot delay a stop.
EMPTY_MAX: Final = 4096

HANDSHAKE_TIMEOUT_S: Final = 15.0

#: Seconds from closing a TLS connection to aborting it; includes flushing, so clients may be slow.
GOODBYE_TIMEOUT_S: Final = 120.0

#: Seconds that a proxy has to send its PROXY header, which comes first.
PROXY_HEADER_TIMEOUT_S: Final = 5.0


class PlainSocket(socket.socket):
    """A socket whose family and type are plain numbers.

    In `socket.socket` each access to them makes an enumeration member; the event loop's five accesses are a tenth of
    the cost of accepting a connection.
    """

    __slots__ = ()

    family = socket.SocketType.family  # type: ignore[assignment]
    type = socket.SocketType.type  # type: ignore[assignment]

    def accept(self) -> tuple[PlainSocket, Any]:
        fd, address = self._accept()  # type: ignore[attr-defined]  # as in socket.accept()
        return PlainSocket(self.family, self.type, self.proto, fd), address


def attach(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, protocol: asyncio.BaseProtocol, connections: Connections
) -> None:
    """Attach a registered protocol to a transport without TLS, which owns `sock`.

    ``connect_accepted_socket`` makes the transport, waits once for ``connection_made``, and ends. A task for it would
    be a fifth of a connection's cost; so the coroutine is stepped here, and once more when it can end.
    """
    _attach(loop, sock, protocol, lambda error: _not_attached(protocol, connections, error))


def attach_tls(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    layer: Layer,
    connections: Connections,
) -> TlsTransport:
    """Attach a registered protocol to a transport with TLS, which owns `sock`, once its handshake is done."""
    transport = TlsTransport(
        protocol, layer, handshake_timeout_s=HANDSHAKE_TIMEOUT_S, goodbye_timeout_s=GOODBYE_TIMEOUT_S
    )

    def see(handshake: asyncio.Future[None]) -> None:
        if (error := handshake.exception()) is not None:
            _not_attached(protocol, connections, error)

    transport.handshake.add_done_callback(see)
    _attach(loop, sock, transport, transport.not_attached)
    return transport


def _attach(
    loop: asyncio.AbstractEventLoop,
    sock: socket.socket,
    protocol: asyncio.BaseProtocol,
    failed: Callable[[BaseException], None],
) -> None:
    attaching = loop.connect_accepted_socket(lambda: protocol, sock)
    try:
        waiter = attaching.send(None)
    except OSError as error:
        failed(error)
        sock.close()
    else:
        waiter.add_done_callback(lambda _: _finish(attaching, failed))


def _finish(attaching: Coroutine[Any, Any, object], failed: Callable[[BaseException], None]) -> None:
    try:
        attaching.send(None)
    except StopIteration:
        pass
    except (Exception, asyncio.CancelledError) as error:  # connection_made raised, or the loop is ending
        failed(error)


def _not_attached(protocol: asyncio.BaseProtocol, connections: Connections, error: BaseException) -> None:
    """Remove a protocol whose connection_made was not called: its connection_lost will not be called either."""
    log.debug("connection not attached: %r", error)
    connections.closed(protocol)  # type: ignore[arg-type]


class Acceptor:
    """One acceptor of one listener.

    Args:
        listener: A non-blocking listening socket (a duplicate, if several acceptors share a queue); owned from here on.
        tls: Makes every connection a TLS connection, with its context at that time.
        proxies: Peers whose connections begin with a PROXY header, which is read before TLS; None for no peer.
        share: Decides when to leave the queue to other workers; None if there are none.
    """

    def __init__(
        self,
        listener: socket.socket,
        adapter: Adapter,
        connections: Connections,
        *,
        tls: Tls | None = None,
        proxies: Trusted | None = None,
        share: Share | None = None,
    ) -> None:
        self._share = share
        self._listener = PlainSocket(listener.family, listener.type, listener.proto, fileno=listener.detach())
        self._adapter = adapter
        self._connections = connections
        self._tls = tls
        self._batch = 1
        self._batch_max = BATCH_MAX if tls is None else TLS_BATCH_MAX
        self._accepted_s = 0.0  # the time of the last batch
        self._proxies = proxies
        self._loop = asyncio.get_running_loop()
        self._sockname = _own_name(self._listener)
        self._is_accepting = False
        self._pause: asyncio.TimerHandle | None = None
        self._introducing: set[asyncio.Task[None]] = set()
        self._shaking: set[TlsTransport] = set()
        withhold(self)

    def start(self) -> None:
        """Start accepting."""
        if not self._is_accepting:
            self._is_accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Stop accepting; queued connections stay for the processes that share the listener.

        The descriptor leaves the event loop *before* it may be closed: epoll watches the open file description, which
        other processes keep open (epoll(7), question 6). It is never shut down, for the same reason.
        """
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        if self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener)

    def close(self) -> None:
        """Stop, and close this descriptor."""
        self.stop()
        self._listener.close()

    async def empty(self) -> None:
        """Accept the queued connections, at most `EMPTY_MAX`, even if the registry is full.

        Waits for descriptors if there are none; the caller bounds that.
        """
        taken = 0
        while taken < EMPTY_MAX:
            try:
                accepted, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in TRANSIENT:
                    continue
                if error.errno not in EXHAUSTED:
                    return
                await asyncio.sleep(PAUSE_S)
            else:
                taken += 1
                self._take(accepted, peer)

    def take(self, accepted: socket.socket) -> None:
        """Serve a connection that another process has accepted; owned from here on."""
        try:
            peer = accepted.getpeername()
        except OSError:  # the client has left
            accepted.close()
        else:
            self._take(PlainSocket(accepted.family, accepted.type, accepted.proto, accepted.detach()), peer)

    def fileno(self) -> int:
        """The listener's descriptor; -1 after `close`."""
        return self._listener.fileno()

    def descriptors(self) -> tuple[int]:
        """The descriptors that a forked child must not have."""
        return (self.fileno(),)

    def waiting(self) -> int:
        """How many connections wait in the accept queue; 0 if the kernel does not tell, or after `close`."""
        return accept_queue_length(self._listener) if self._listener.fileno() >= 0 else 0

    async def wait_attached(self) -> None:
        """Wait until every accepted socket has its transport, or has failed its PROXY header or TLS handshake."""
        while ending := {*self._introducing, *(transport.handshake for transport in self._shaking)}:
            await asyncio.wait(ending)

    def cut_attaching(self) -> None:
        """Close accepted connections that have no transport yet."""
        for task in self._introducing:
            task.cancel()
        for transport in self._shaking:
            transport.abort()

    def _accept(self) -> None:
        """Accept some connections, but leave them to other workers while this one is ahead."""
        now = perf_counter()
        self._batch = min(2 * self._batch, self._batch_max) if now - self._accepted_s < SHORT_TURN_S else 1
        self._accepted_s = now
        for _ in range(self._batch):
            if self._share is not None and self._share.is_ahead():
                self._rest(DEFER_S, self._see_what_is_left)
                return
            try:
                accepted, peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in TRANSIENT:
                    continue
                self._wait(error)
                return
            self._take(accepted, peer)
            if not self._is_accepting:  # the registry is full
                return

    def _take(self, accepted: socket.socket, peer: Any) -> None:
        try:
            protocol = self._adapter.connection()
        except Exception:
            log.exception("the application's protocol factory failed; the connection is closed")
            accepted.close()
            return
        self._connections.count_accepted()
        protocol.sock = accepted  # type: ignore[attr-defined]
        protocol.endpoints = (peer, self._sockname or accepted.getsockname())  # type: ignore[attr-defined]
        if self._proxies is not None and self._proxies.peer(peer):
            background.start("connection", self._introduce(accepted, protocol, peer), self._introducing)
        else:
            self._attach(accepted, protocol)

    def _attach(self, accepted: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        if self._tls is None:
            attach(self._loop, accepted, protocol, self._connections)
            return
        transport = attach_tls(self._loop, accepted, protocol, self._tls.session(), self._connections)
        self._shaking.add(transport)
        transport.handshake.add_done_callback(lambda _: self._shaking.discard(transport))

    async def _introduce(self, accepted: socket.socket, protocol: asyncio.BaseProtocol, peer: Any) -> None:
        """Read a proxy's PROXY header, then attach the connection like any other."""
        try:
            accepted.setblocking(False)
            async with asyncio.timeout(PROXY_HEADER_TIMEOUT_S):
                header = await self._read_proxy_header(accepted)
        except BaseException as error:
            if isinstance(error, ProxyHeaderError | TimeoutError):
                why = str(error) or f"it has not come within {PROXY_HEADER_TIMEOUT_S:g} s"
                log.info("no PROXY header from %s: %s; the connection is closed", peer or "a unix socket", why)
            _not_attached(protocol, self._connections, error)
            accepted.close()
            if not isinstance(error, OSError | ProxyHeaderError | asyncio.CancelledError):  # a timeout is an OSError
                raise
        else:
            if header.endpoints is not None:
                protocol.endpoints = header.endpoints  # type: ignore[attr-defined]
                protocol.is_proxied = True  # type: ignore[attr-defined]
            self._attach(accepted, protocol)

    async def _read_proxy_header(self, accepted: socket.socket) -> ProxyHeader:
        """Read exactly the header from the socket: the bytes behind it belong to the protocol, or to TLS.

        Bytes are peeked at first, and read once they are known to belong to the header. So a partial header does not
        stay in the socket, where it would wake a level-triggered loop for ever. SO_RCVLOWAT does not help: poll(2)
        ignores it for unix sockets (socket(7); unix_poll() in net/unix/af_unix.c).
        """
        begun = b""
        while True:
            try:
                seen = accepted.recv(HEADER_BYTES_MAX, socket.MSG_PEEK)
            except BlockingIOError:
                await self._wait_readable(accepted)
                continue
            if not seen:
                if begun:
                    raise ProxyHeaderError("its end is missing")
                raise ConnectionAbortedError("the peer left without a word")  # a health check
            header = parse_proxy_header(begun + seen)
            if header is not None:
                accepted.recv(header.size - len(begun))
                return header
            begun += accepted.recv(len(seen))

    async def _wait_readable(self, sock: socket.socket) -> None:
        is_readable = asyncio.Event()
        self._loop.add_reader(sock, is_readable.set)
        try:
            await is_readable.wait()
        finally:
            self._loop.remove_reader(sock)

    def _wait(self, error: OSError) -> None:
        log.error("cannot accept: %s; trying again in %g s", error, PAUSE_S)
        self._rest(PAUSE_S, self._resume)

    def _rest(self, pause_s: float, then: Callable[[], None]) -> None:
        """Stop accepting for `pause_s` seconds, then call `then`."""
        if self._is_accepting:
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(pause_s, then)

    def _see_what_is_left(self) -> None:
        """Accept a connection that other workers have left in the queue meanwhile, and resume accepting."""
        assert self._share is not None
        try:
            accepted, peer = self._listener.accept()
        except OSError:
            self._share.deferred(was_taken=True)
        else:
            self._share.deferred(was_taken=False)
            self._take(accepted, peer)
        if self._is_accepting:
            self._resume()

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)


def _own_name(listener: socket.socket) -> Any:
    """The local address of all of a listener's connections; None if they differ (a wildcard)."""
    name = listener.getsockname()
    return None if isinstance(name, tuple) and name[0] in {"0.0.0.0", "::"} else name
