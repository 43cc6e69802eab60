"""Applications that are an `asyncio.DatagramProtocol` factory.

All workers, and on a restart both generations, read from one socket: each datagram waits in the socket's queue until
one process receives it. So a restart hands nothing over, and loses nothing, as long as each process serves what it has
received before it closes the socket. The event loops' own transports cannot stop reading; this one can.

Sources: udp(7); socket(7).
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from hotport.adapters.base import Connections, Context

__all__ = ["DatagramAdapter", "Datagrams"]

log = logging.getLogger("hotport.datagram")

#: Datagrams received in one turn of the event loop, so that other callbacks get their turn.
BATCH: Final = 64

#: The largest possible datagram: its length field has 16 bits (udp(7)).
DATAGRAM_BYTES_MAX: Final = 65535

#: Unsent bytes at which the application is told to pause.
HIGH_WATER_BYTES: Final = 64 * 1024

#: Datagrams that `Datagrams.empty` serves at most, so that a flood cannot delay a stop.
EMPTY_MAX: Final = 4096


class DatagramAdapter:
    """Makes one application protocol for each socket.

    An application protocol may have ``drain_started(draining)``, called once when its worker leaves, with a
    `hotport.Draining`: nothing is received from then on, and the protocol calls ``transport.close()`` when it has sent
    everything. Without that method the transport closes when everything is sent.
    """

    def __init__(self, factory: Callable[[], asyncio.DatagramProtocol], context: Context) -> None:
        self._factory = factory
        self._connections = context.connections

    def open(self, sock: socket.socket) -> Datagrams:
        """Make the application's transport, which owns `sock` from here on; nothing is read yet."""
        return Datagrams(sock, self._factory(), self._connections)


class Datagrams(asyncio.DatagramTransport):
    """One socket and its application protocol.

    Descriptors: owns `sock`, and closes it when the application does, or in `abort`.
    """

    def __init__(self, sock: socket.socket, protocol: asyncio.DatagramProtocol, connections: Connections) -> None:
        super().__init__({"socket": sock, "sockname": sock.getsockname(), "peername": None})
        self._sock = sock
        self._protocol = protocol
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[tuple[bytes, Any]] = deque()
        self._unsent_bytes = 0
        self._is_reading = False
        self._is_paused = False  # the application was asked to
        self._is_closing = False
        self.closed = asyncio.Event()
        protocol.connection_made(self)

    # -- called by the worker ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start receiving."""
        if not self._is_reading and not self._is_closing:
            self._is_reading = True
            self._loop.add_reader(self._sock, self._receive)

    def stop(self) -> None:
        """Stop receiving; queued datagrams stay for the processes that share the socket."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._sock)

    def empty(self) -> None:
        """Receive the queued datagrams, at most `EMPTY_MAX`."""
        for _ in range(EMPTY_MAX):
            if self._is_closing or not self._receive_one():
                return

    def drain(self) -> None:
        """Call the application's ``drain_started`` if there is one; else close when everything is sent."""
        notice = getattr(self._protocol, "drain_started", None)
        if notice is None:
            self.close()
        else:
            try:
                notice(self._connections.draining)
            except Exception:
                log.exception("the application failed in drain_started()")
                self.close()

    def _receive(self) -> None:
        for _ in range(BATCH):
            if not self._is_reading or not self._receive_one():
                return

    def _receive_one(self) -> bool:
        try:
            data, address = self._sock.recvfrom(DATAGRAM_BYTES_MAX)
        except BlockingIOError:
            return False
        except OSError as error:  # an ICMP error for an earlier datagram (udp(7))
            self._protocol.error_received(error)
            return True
        self._connections.count_request()
        try:
            self._protocol.datagram_received(data, address)
        except Exception:
            log.exception("the application failed on a datagram from %s", address)
        return True

    # -- asyncio.DatagramTransport -------------------------------------------------------------------------

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Send one datagram to `addr`, or queue it while the kernel has no room."""
        if self._is_closing:
            return
        if not self._unsent:
            try:
                self._send(data, addr)
            except BlockingIOError:
                self._loop.add_writer(self._sock, self._send_unsent)
            except OSError as error:
                self._protocol.error_received(error)
                return
            else:
                return
        self._unsent.append((bytes(data), addr))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > HIGH_WATER_BYTES and not self._is_paused:
            self._is_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """How many bytes wait for the kernel."""
        return self._unsent_bytes

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._is_closing

    def close(self) -> None:
        """Stop receiving, send queued datagrams, then close."""
        self.stop()
        if not self._is_closing:
            self._is_closing = True
            if not self._unsent:
                self._loop.call_soon(self._end)

    def abort(self) -> None:
        """Drop queued datagrams and close now."""
        self._unsent.clear()
        self.close()
        self._end()

    def _send(self, data: Any, address: Any) -> None:
        if address is None:
            self._sock.send(data)
        else:
            self._sock.sendto(data, address)

    def _send_unsent(self) -> None:
        while self._unsent:
            data, address = self._unsent[0]
            try:
                self._send(data, address)
            except BlockingIOError:
                return
            except OSError as error:
                self._protocol.error_received(error)
            self._unsent.popleft()
            self._unsent_bytes -= len(data)
        self._loop.remove_writer(self._sock)
        if self._is_paused:
            self._is_paused = False
            self._protocol.resume_writing()
        if self._is_closing:
            self._end()

    def _end(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._protocol.connection_lost(None)
