"""Taking connections from a listener, so that nothing taken is ever lost.

`asyncio.Server` is not used: on the standard loop its ``close()`` drops connections that were accepted but not yet
attached (python/cpython#109564). Here a connection gets its protocol object, and so its place in the registry,
in the same step in which it leaves the accept queue; stopping is one synchronous call between two such steps.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Coroutine
from typing import Any, Final

from hotport.adapters.base import Adapter, Connections
from hotport.kernel.sockets import accept_queue_length
from hotport.worker.tls import Tls

__all__ = ["Acceptor"]

log = logging.getLogger("hotport.acceptor")

#: Connections taken in one turn of the event loop; the rest waits so that open connections get their turn.
BATCH: Final = 16

#: How long to leave the accept queue alone when nothing can be taken from it: the process or the system is out of
#: descriptors or memory, or somebody has shut the shared listener down (EINVAL, until somebody listens again).
PAUSE_S: Final = 0.1

#: What accept(2) reports of a connection that died in the queue: "treat them like EAGAIN by retrying".
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

#: How much of an accept queue is served when nobody will serve it later; a flood must not keep a service alive.
EMPTY_MAX: Final = 4096

HANDSHAKE_TIMEOUT_S: Final = 15.0

#: From closing a TLS connection to dropping it. That includes sending what is buffered, so clients may be slow.
GOODBYE_TIMEOUT_S: Final = 120.0


class Acceptor:
    """One acceptor of one listener.

    Args:
        listener: A non-blocking listening socket of its own (a duplicate, if several acceptors share a queue);
            it is closed by `close`.
        tls: Makes every connection a TLS connection, with the context that it has by then.
    """

    def __init__(
        self,
        listener: socket.socket,
        adapter: Adapter,
        connections: Connections,
        *,
        tls: Tls | None = None,
    ) -> None:
        self._listener = listener
        self._adapter = adapter
        self._connections = connections
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._is_accepting = False
        self._pause: asyncio.TimerHandle | None = None
        self._attaching: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Accept from now on."""
        if not self._is_accepting:
            self._is_accepting = True
            self._loop.add_reader(self._listener, self._accept)

    def stop(self) -> None:
        """Accept no more. What waits in the accept queue stays there, for whoever shares the listener.

        The descriptor leaves the event loop *before* it may be closed: epoll watches the open file description,
        which lives on in other processes (epoll(7), question 6). It is never shut down, for the same reason.
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
        """Take what waits in the accept queue now, up to `EMPTY_MAX` connections, however full the registry is.

        Out of descriptors it waits until some are free; the caller bounds that.
        """
        taken = 0
        while taken < EMPTY_MAX:
            try:
                accepted, _ = self._listener.accept()
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
                self._take(accepted)

    def waiting(self) -> int:
        """How many connections wait in the accept queue; 0 where the kernel does not say, or after `close`."""
        return accept_queue_length(self._listener) if self._listener.fileno() >= 0 else 0

    async def wait_attached(self) -> None:
        """Return when every accepted socket has its transport, or has failed its TLS handshake."""
        while self._attaching:
            await asyncio.wait(self._attaching)

    def cut(self) -> None:
        """End handshakes that are not done."""
        for task in self._attaching:
            task.cancel()

    def _accept(self) -> None:
        """Take up to `BATCH` connections."""
        for _ in range(BATCH):
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in TRANSIENT:
                    continue
                self._wait(error)
                return
            self._take(accepted)
            if not self._is_accepting:  # the registry is full
                return

    def _take(self, accepted: socket.socket) -> None:
        try:
            protocol = self._adapter.connection()
        except Exception:
            log.exception("the application's protocol factory failed; the connection is closed")
            accepted.close()
            return
        attaching = self._loop.connect_accepted_socket(
            lambda: protocol,
            accepted,
            ssl=self._tls.context if self._tls else None,
            ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S if self._tls else None,
            ssl_shutdown_timeout=GOODBYE_TIMEOUT_S if self._tls else None,
        )
        if self._tls is not None:
            task = self._loop.create_task(self._shake_hands(attaching, protocol))
            self._attaching.add(task)
            task.add_done_callback(self._attaching.discard)
            return
        # Without TLS it makes the transport, waits once until connection_made has been called, and ends. A task
        # for that would be a fifth of what a connection costs; so it is stepped here, and once more when it can end.
        try:
            waiter = attaching.send(None)
        except OSError as error:
            self._not_attached(protocol, error)
            accepted.close()
        else:
            waiter.add_done_callback(lambda _: self._finish(attaching, protocol))

    def _finish(self, attaching: Coroutine[Any, Any, object], protocol: asyncio.BaseProtocol) -> None:
        try:
            attaching.send(None)
        except StopIteration:
            pass
        except (Exception, asyncio.CancelledError) as error:  # connection_made raised, or the loop is ending
            self._not_attached(protocol, error)

    async def _shake_hands(self, attaching: Coroutine[Any, Any, object], protocol: asyncio.BaseProtocol) -> None:
        try:
            await attaching
        except OSError as error:  # ssl.SSLError is one: the peer left, or spoke no TLS
            self._not_attached(protocol, error)

    def _not_attached(self, protocol: asyncio.BaseProtocol, error: BaseException) -> None:
        """A protocol without connection_made gets no connection_lost either."""
        log.debug("connection not attached: %r", error)
        self._connections.closed(protocol)  # type: ignore[arg-type]

    def _wait(self, error: OSError) -> None:
        log.error("cannot accept: %s; trying again in %g s", error, PAUSE_S)
        if self._is_accepting:
            self._loop.remove_reader(self._listener)
            self._pause = self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listener, self._accept)
