"""A stream connection to the target, over TLS or not, that reports every change to its owner."""

from __future__ import annotations

import errno
import select
import socket
import ssl
import time
from typing import Final

from hotport.churn.classify import Happening, happening_of
from hotport.churn.clients.crowd import Attempt, Crowd, OwnLimit
from hotport.churn.fates import ConnectionEvent

__all__ = ["Connection"]

_READ: Final = 65536
_TCP_ESTABLISHED: Final = b"\x01"  # the first byte of struct tcp_info (netinet/tcp.h)
_GONE: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_BACKLOG_NS: Final = 2_000_000
_MOMENT_NS: Final = 100_000  # what was looked at within it is not looked at again
_FINE: Final = (0, errno.EINPROGRESS)
_WAIT: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Connection:
    """The owner of a socket; subclasses implement the hooks at the end.

    Attributes:
        sock: None while there is none.
        is_made: TCP's handshake is done.
        rest: What is to be sent and was not yet taken.
    """

    __slots__ = ("_broken", "_has_been_made", "_tries", "crowd", "is_made", "rest", "sock")

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.sock: socket.socket | None = None
        self.is_made = False
        self.rest = b""
        self._broken: tuple[Happening, str] | None = None
        self._has_been_made = False
        self._tries = 0

    def connect(self) -> None:
        """Start connecting; `made`, `failed` or `limited` is called, perhaps before this returns."""
        self.rest = b""
        self._broken = None
        try:
            sock, number = self.crowd.open()
        except OwnLimit as limit:
            self.limited(limit)
            return
        if number in _FINE:
            self.sock = sock
            site = self.crowd.site
            site.clients.add(self)
            if site.address.tls is None and (not number or _is_established(sock)):  # as on one machine
                site.loop.watch(sock.fileno(), self._on_event, can_send=True)
                self.is_made = True
                self._made(0)
            else:
                site.loop.watch(sock.fileno(), self._on_connecting)
            return
        sock.close()
        if number == errno.EAGAIN:
            self._tries += 1
            self.crowd.site.loop.call_at(time.monotonic_ns() + _BACKLOG_NS, self._try_again, self._tries)
        else:
            self.failed(happening_of(number), errno.errorcode.get(number, ""))

    def send(self, data: bytes) -> None:
        """Send now what the kernel takes, and the rest later; may call `failed`."""
        self.rest = self.rest + data if self.rest else data
        while self.rest and self.sock is not None:
            try:
                count = self.sock.send(self.rest)
            except _WAIT:
                self.crowd.site.loop.watch_sending(self.sock.fileno())
                return
            except OSError as error:
                self._broken = _happening(error), _detail(error)  # an answer may still be there to be read
                self.receive(select.EPOLLERR)
                return
            self.rest = self.rest[count:]
            self.sent(count)

    def look(self) -> None:
        """Check whether the connection has just ended, so that no attempt is sent on it."""
        site = self.crowd.site
        if self.sock is None or time.monotonic_ns() - site.loop.seen_ns < _MOMENT_NS:
            return
        if not (site.address.is_tcp and _is_established(self.sock)):
            self.receive(_GONE)

    def receive(self, mask: int = 0) -> None:
        """Read what is there."""
        while self.sock is not None:
            try:
                data = self.sock.recv(_READ)
            except _WAIT:
                return
            except ssl.SSLEOFError:
                self._ended(is_clean=False)
                return
            except OSError as error:
                self.failed(_happening(error), _detail(error))
                return
            if not data:
                self._ended(is_clean=True)
                return
            self.fed(data)
            if len(data) < _READ and not mask & _GONE and self.crowd.site.address.tls is None:
                return

    def close(self, *, politely: bool = False) -> None:
        """Close the connection, if there is one.

        Args:
            politely: Everything has been said, so that the other side may close first.
        """
        self._tries += 1
        self.is_made = False
        if self.sock is not None:
            sock, self.sock = self.sock, None
            self.crowd.site.clients.discard(self)
            loop = self.crowd.site.loop
            (loop.leave if politely else loop.close)(sock)

    def _try_again(self, tries: int) -> None:
        if tries == self._tries:
            self.connect()

    def _on_connecting(self, mask: int) -> None:
        assert self.sock is not None
        if mask & (select.EPOLLERR | select.EPOLLHUP):
            number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if number:
                self.failed(happening_of(number), errno.errorcode.get(number, ""))
                return
        elif not mask & select.EPOLLOUT:
            return
        self.is_made = True
        site = self.crowd.site
        fd = self.sock.fileno()
        if site.address.tls is None:
            site.loop.rewatch(fd, self._on_event)
            self._made(mask)
            return
        try:
            self.sock = site.address.tls.wrap_socket(
                self.sock,
                server_hostname=site.address.tls_name or None,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
            )
        except (OSError, ValueError) as error:  # it has been reset in this very moment
            self.failed(Happening.RESET, str(error))
            return
        site.loop.rewatch(fd, self._on_handshake)
        self._on_handshake(mask)

    def _on_handshake(self, mask: int) -> None:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except _WAIT:
            return
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self.failed(Happening.ENDED, "in the TLS handshake")
            return
        except OSError as error:
            self.failed(_happening(error), f"in the TLS handshake: {_detail(error)}")
            return
        self.crowd.site.loop.rewatch(self.sock.fileno(), self._on_event)
        self._made(mask)

    def _made(self, mask: int) -> None:
        if self.crowd.keeps:
            self.crowd.event(ConnectionEvent.CONNECTED)
            if self._has_been_made:
                self.crowd.event(ConnectionEvent.RECONNECTED)
        self._has_been_made = True
        if mask & _GONE:
            self.receive(mask)
        if self.sock is not None:
            self.made()

    def _on_event(self, mask: int) -> None:
        if mask & ~select.EPOLLOUT:
            self.receive(mask)
        if self.rest:
            self.send(b"")

    def _ended(self, *, is_clean: bool) -> None:
        if is_clean and self.is_whole_at_end():
            return
        if self._broken is not None:
            self.failed(*self._broken)
        else:
            self.failed(Happening.ENDED, "")

    # Hooks

    def made(self) -> None:
        """Called when the connection is established."""
        raise NotImplementedError

    def sent(self, count: int) -> None:
        """Called when the kernel has taken bytes."""

    def fed(self, data: bytes) -> None:
        """Called with received bytes."""
        raise NotImplementedError

    def is_whole_at_end(self) -> bool:
        """Called at the orderly end of the connection; return whether that completed an answer."""
        return False

    def give_up(self, attempt: Attempt) -> None:
        """Give up the attempt: it is overdue."""
        raise NotImplementedError

    def failed(self, happening: Happening, detail: str) -> None:
        """Called when the connection has failed; close it."""
        raise NotImplementedError

    def limited(self, limit: OwnLimit) -> None:
        """Called when this machine could not open the connection."""
        raise NotImplementedError


def _is_established(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == _TCP_ESTABLISHED


def _happening(error: OSError) -> Happening:
    # The numbers of TLS errors are OpenSSL's own.
    return Happening.RESET if isinstance(error, ssl.SSLError) else happening_of(error.errno or 0)


def _detail(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS"
    return errno.errorcode.get(error.errno or 0, str(error))
