"""TLS of one connection by OpenSSL, without I/O, and with every record counted.

OpenSSL is given one whole record at a time. So it never waits for the rest of one, and the size of the data in it is
known: reading takes one call, and ends without an `ssl.SSLWantReadError`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from typing import Any, Final

from hotport.kernel.tls import KeyLog, about
from hotport.wire.tlskeys import HEADER_BYTES, PLAIN_BYTES_MAX
from hotport.wire.tlsrecords import (
    RECORD_BYTES_MAX,
    Counter,
    Event,
    IllegalTransition,
    NotMovable,
    Phase,
    TlsState,
    advance,
)

__all__ = ["Session"]

LIVE: Final = Phase.LIVE
HALF_CLOSED: Final = Phase.HALF_CLOSED
CLOSING: Final = Phase.CLOSING

#: Of `Content`, whose members take long to compare.
CHANGE_CIPHER_SPEC: Final = 20
DATA: Final = 23

#: What a transport tells of a TLS connection (`asyncio.BaseTransport.get_extra_info`).
EXTRA: Final[Mapping[str, Callable[[ssl.SSLObject], Any]]] = {
    "cipher": ssl.SSLObject.cipher,
    "compression": ssl.SSLObject.compression,
    "peercert": ssl.SSLObject.getpeercert,
    "ssl_object": lambda tls: tls,
    "sslcontext": lambda tls: tls.context,
}


class Session(Counter):
    """The server's side of a connection.

    Args:
        log: Where the contexts of the connection log its secrets; None: it cannot move.
        why_no_log: Why there is none.
        clients: See `TlsAbout.clients`.

    Attributes:
        phase: What may be done now.
        error: What has ended the connection, once `phase` is BROKEN.
    """

    __slots__ = ("_clients", "_incoming", "_log", "_outgoing", "_tls", "_why_no_log", "error")

    def __init__(
        self,
        context: ssl.SSLContext,
        log: KeyLog | None = None,
        *,
        why_no_log: str = "tls_handoff is off",
        clients: str = "",
    ) -> None:
        super().__init__()
        self._log: KeyLog | None = log
        self._why_no_log = why_no_log
        self._clients = clients
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.error: Exception | None = None

    @property
    def can_half_close(self) -> bool:
        """Whether one direction may end before the other; TLS 1.2 ends both at once (RFC 5246 section 7.2.1)."""
        return self._tls.version() == "TLSv1.3"

    def extra(self, name: str, default: Any) -> Any:
        """See `asyncio.BaseTransport.get_extra_info`; `default` for names that have nothing to do with TLS."""
        if name == "tls_layer":
            return self
        look = EXTRA.get(name)
        return default if look is None else look(self._tls)

    # -- from the client

    def receive(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Decrypt what has come; when the handshake is done, call it once more for what has come behind it.

        Returns:
            Data, and bytes to be sent now. After the client's close_notify `phase` is HALF_CLOSED (or CLOSED), after an
            error BROKEN; what comes behind that is dropped.

        Raises:
            IllegalTransition: The connection's state was exported.
        """
        size = len(data)
        if (  # nearly always there is exactly one record
            size > HEADER_BYTES
            and data[0] == DATA
            and (data[3] << 8 | data[4]) == size - HEADER_BYTES
            and not self.pending
            and self.phase is LIVE
            and not self.is_shaking
        ):
            plain = self._open(data, size)
            return plain, b"" if plain else self._take_written()
        if self.phase is Phase.FROZEN or self.phase is Phase.GONE:
            raise IllegalTransition(f"received in {self.phase}")
        plains: list[bytes] = []
        begun, written, at, is_shaking = self.pending, b"", 0, self.is_shaking
        if begun:
            self.pending = b""
            at = _end(begun + data[:HEADER_BYTES], 0) - len(begun)
            if 0 < at < size:
                written = self._process(begun + data[:at], 0, plains, is_shaking)
            else:
                data, at = begun + data, 0
        written += self._process(data, at, plains, is_shaking)
        return plains[0] if len(plains) == 1 else b"".join(plains), written

    def _process(self, data: bytes, at: int, plains: list[bytes], is_shaking: bool) -> bytes:
        """Process whole records, until the handshake or the connection ends; return what to send."""
        written, view, size = b"", memoryview(data), len(data)
        while (
            self.is_shaking is is_shaking
            and (self.phase is LIVE or self.phase is CLOSING)
            and 0 < (end := _end(data, at) or self._hear_noise(size)) <= size
        ):
            record, at = view[at:end], end
            if is_shaking:
                written += self._shake_hands(record, is_last=not 0 < _end(data, at) <= size)
            elif plain := self._open(record, len(record)):
                plains.append(plain)
            else:
                written += self._take_written()
        self.pending = data[at:]
        return written

    def _hear_noise(self, size: int) -> int:
        """Give all of it to OpenSSL, which knows what to say to what is no record; it must not wait for the rest."""
        self.why_not = "its client has sent bytes that are no record"
        return size

    def _open(self, record: bytes | memoryview, size: int) -> bytes:
        """Decrypt one record; nothing if it has no data."""
        self._incoming.write(record)
        try:
            plain = self._tls.read(size)
        except ssl.SSLError as error:
            plain = self._see_no_data(error)
        else:
            if not plain:
                self._see_no_data(None)
        if len(plain) == size - self._overhead:
            self._read_sequence += 1
        elif not self.why_not:
            self._inspect(bytes(record), is_read=True)
        return plain

    def _see_no_data(self, error: ssl.SSLError | None) -> bytes:
        """Note what came in place of data: the client's goodbye, an error, or a message for OpenSSL itself."""
        if error is None or isinstance(error, ssl.SSLZeroReturnError):
            self.phase = advance(self.phase, Event.HEARD_CLOSE)
        elif not isinstance(error, ssl.SSLWantReadError):
            self._fail(error)
        return b""

    def _take_written(self) -> bytes:
        """Take what OpenSSL itself has to say: an alert, or an answer to what was no data."""
        written = self._outgoing.read()
        self.wrote(written)
        return written

    def _fail(self, error: OSError) -> None:
        self.error = error
        self.phase = advance(self.phase, Event.FAILED)

    def _shake_hands(self, record: memoryview, *, is_last: bool) -> bytes:
        """Give OpenSSL the next record of a handshake; return what to send."""
        self._incoming.write(record)
        if self._log is not None:
            self.hear(bytes(record))
        if record[0] == CHANGE_CIPHER_SPEC and not is_last:
            return b""  # nothing comes of it
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            written = self._outgoing.read()
            if self._log is not None:
                self.shook(written, self._log.read())
            return written
        except OSError as error:  # ssl.SSLError is one; another one is of the key log
            if self._log is not None:
                self._log.read()
            self._fail(error)
            return self._outgoing.read()
        written = self._outgoing.read()
        if self._log is None:
            self.is_shaking, self._hello = False, None
            self.why_not = self._why_no_log
        else:
            cipher = self._tls.cipher()
            assert cipher is not None
            self.establish(written, self._log.read(), self._tls.version(), cipher[0])
            self._log = None
        return written

    # -- to another process

    def export(self) -> TlsState:
        """Freeze the connection, and return all that another process needs to go on.

        Raises:
            NotMovable: It stays live.
        """
        if self.why_not or self.phase is not LIVE:  # OpenSSL cannot be asked about it any more
            raise NotMovable(self.why_not or f"it is {self.phase}")
        if self._incoming.pending or self._outgoing.pending or self._tls.pending():
            raise NotMovable("something is under way in OpenSSL")
        return self.freeze(about(self._tls, self.server_name, self._clients))

    # -- to the client

    def send(self, data: bytes | memoryview) -> bytes:
        """Encrypt data.

        Raises:
            IllegalTransition: Nothing may be written in this phase.
            ssl.SSLError: OpenSSL refuses.
        """
        if self.phase is not LIVE and self.phase is not HALF_CLOSED:
            raise IllegalTransition(f"written in {self.phase}")
        size = len(data)
        done = self._tls.write(data)
        while done < size:  # one record at a time
            done += self._tls.write(memoryview(data)[done : done + PLAIN_BYTES_MAX])
        sealed = self._outgoing.read()
        if self.why_not:
            return sealed  # nothing is counted any more
        if len(sealed) == size + self._overhead and size <= self._fragment:
            self._write_sequence += 1
            self._explicit += 1
        else:
            self.wrote(sealed, size)
        return sealed

    def close(self) -> bytes:
        """Say close_notify, once; the client may still send. Returns nothing if nothing may be written."""
        if self.phase is not LIVE and self.phase is not HALF_CLOSED:
            return b""
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:  # the client has not said it yet
            pass
        except ssl.SSLError as error:
            self._fail(error)
            return self._take_written()
        self.phase = advance(self.phase, Event.SAID_CLOSE)
        return self._take_written()


def _end(data: bytes, at: int) -> int:
    """Where the record ends that begins at `at`, which may be behind `data`; -1 without its header, 0 if it is none."""
    if len(data) - at < HEADER_BYTES:
        return -1
    length = data[at + 3] << 8 | data[at + 4]
    if data[at + 1] != 3 or not CHANGE_CIPHER_SPEC <= data[at] <= DATA or length > RECORD_BYTES_MAX:
        return 0
    return at + HEADER_BYTES + length
