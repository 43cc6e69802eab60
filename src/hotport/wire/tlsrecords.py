"""TLS connections that can move to another process, without I/O: TLS 1.3, and the AEAD suites of TLS 1.2.

The process that accepts a connection leaves it to OpenSSL, and a `Counter` follows what OpenSSL does. The process that
adopts it uses `Records` in place of OpenSSL. What travels between them is a `TlsState`. The server's side of a
connection is meant everywhere: read is what the client has sent.

A counter is told of each step of the handshake (`Counter.hear`, `Counter.shook`, `Counter.establish`), then of what
OpenSSL writes (`Counter.wrote`); its subclass `hotport.worker.tlssession.Session` drives OpenSSL, and counts what that
opens. OpenSSL has to be given one whole record at a time, and the key log to be read right after each
``do_handshake``, which is synchronous: so its lines are this connection's. Nothing may be under way in OpenSSL when a
connection is exported.

How counting stays exact: a record of data takes a fixed number of bytes more than its data. If the data is as long as
the records say, all of them were data without padding. Otherwise they are opened with keys of our own to see what they
were: KeyUpdate, session tickets, alerts, padding.

Sources: RFC 8446 (TLS 1.3), RFC 5246 (TLS 1.2), RFC 6066 sections 3 and 4 (server name, maximum fragment length).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from hotport.wire.tlskeys import (
    HEADER_BYTES,
    PLAIN_BYTES_MAX,
    TAG_BYTES,
    TLS12,
    TLS13,
    Alert,
    Content,
    Keys,
    Keys12,
    Keys13,
    RecordError,
    Suite,
    split_master_secret,
    suite_of,
)

__all__ = [
    "TRANSITIONS",
    "Counter",
    "Event",
    "IllegalTransition",
    "NotMovable",
    "Phase",
    "Records",
    "TlsAbout",
    "TlsState",
    "advance",
]

#: The longest record that is believed: RFC 5246 section 6.2.3 allows more than RFC 8446 section 5.2.
RECORD_BYTES_MAX: Final = PLAIN_BYTES_MAX + 2048
RECORD_BYTES_MAX_13: Final = PLAIN_BYTES_MAX + 256

#: Records in a row that bring no data (KeyUpdates, empty ones, warnings): a client that sends more costs work for
#: nothing. OpenSSL has the same limit for KeyUpdates.
BARREN_RECORDS_MAX: Final = 32

#: The most bytes of a ClientHello that are kept to read its server name from.
HELLO_BYTES_MAX: Final = 1 << 16

VERSIONS: Final = {"TLSv1.2": TLS12, "TLSv1.3": TLS13}

KEY_UPDATE: Final = b"\x18\0\0\x01"  # type and length of the message (RFC 8446 section 4.6.3); one byte follows
NOT_REQUESTED, REQUESTED = b"\0", b"\1"

CLIENT_HELLO, SERVER_HELLO, CERTIFICATE_REQUEST = 1, 2, 13


# -- who may write ------------------------------------------------------------------------------------------


class Phase(enum.StrEnum):
    """What a process may do with a connection."""

    LIVE = "live"
    HALF_CLOSED = "half-closed"  # the client has said close_notify: it can still be answered
    CLOSING = "closing"  # close_notify was sent: the client can still send
    CLOSED = "closed"
    BROKEN = "broken"  # after a fatal alert, sent or received
    FROZEN = "frozen"  # its state was exported, so that another process may write
    GONE = "gone"  # another process has it


class Event(enum.StrEnum):
    """What happens to a connection."""

    HEARD_CLOSE = "heard close_notify"
    SAID_CLOSE = "said close_notify"
    FAILED = "failed"
    EXPORTED = "exported"
    KEPT = "kept"  # no other process has the exported state
    LEFT = "left"


_P, _E = Phase, Event

#: Two processes that seal records with one key and one sequence number would give the key of AES-GCM away, so the
#: only way out of FROZEN leads over the other process's refusal.
TRANSITIONS: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (_P.LIVE, _E.HEARD_CLOSE): _P.HALF_CLOSED,
    (_P.LIVE, _E.SAID_CLOSE): _P.CLOSING,
    (_P.LIVE, _E.FAILED): _P.BROKEN,
    (_P.LIVE, _E.EXPORTED): _P.FROZEN,
    (_P.HALF_CLOSED, _E.SAID_CLOSE): _P.CLOSED,
    (_P.HALF_CLOSED, _E.FAILED): _P.BROKEN,
    (_P.CLOSING, _E.HEARD_CLOSE): _P.CLOSED,
    (_P.CLOSING, _E.FAILED): _P.BROKEN,
    (_P.FROZEN, _E.KEPT): _P.LIVE,
    (_P.FROZEN, _E.LEFT): _P.GONE,
}

MAY_WRITE: Final = frozenset({Phase.LIVE, Phase.HALF_CLOSED})
MAY_READ: Final = frozenset({Phase.LIVE, Phase.CLOSING})


class IllegalTransition(Exception):
    """Something happens to a connection that cannot happen in its phase; a bug."""


class NotMovable(Exception):
    """A connection cannot move now, or at all; the text says why."""


def advance(phase: Phase, event: Event) -> Phase:
    """The phase that follows.

    Raises:
        IllegalTransition: The pair is not in `TRANSITIONS`.
    """
    try:
        return TRANSITIONS[phase, event]
    except KeyError:
        raise IllegalTransition(f"{event} in {phase}") from None


# -- what travels -------------------------------------------------------------------------------------------


class TlsAbout(msgspec.Struct, frozen=True, array_like=True):
    """The results of a handshake, which only the process with its OpenSSL object can look up.

    Attributes:
        cipher: As `ssl.SSLObject.cipher` has it: name, version, bits.
        alpn: The protocol that was agreed upon, if any.
        server_name: The name that the client has asked for (SNI), if any.
        chain: The client's certificates as DER, its own first; only that one before Python 3.13.
        peercert: As `ssl.SSLObject.getpeercert` has it.
        certificate: The server's certificate as PEM; empty if unknown.
        suite: The number of the cipher suite (IANA's registry "TLS Cipher Suites"), if known.
        clients: Which clients the server's options let in at that time, in a form that can be compared.
        version: As `ssl.SSLObject.version` has it.
    """

    cipher: tuple[str, str, int]
    alpn: str | None = None
    server_name: str | None = None
    chain: list[bytes] = []
    peercert: Any = None
    certificate: str = ""
    suite: int | None = None
    clients: str = ""
    version: str | None = None


class TlsState(msgspec.Struct, frozen=True, array_like=True):
    """A connection's TLS, between two records. Its text shows no secret.

    Attributes:
        version: `TLS12` or `TLS13`.
        suite: OpenSSL's name of the cipher suite.
        read_secret: TLS 1.3: the traffic secret of what the client sends; TLS 1.2: key and fixed nonce.
        write_secret: The same of what the server sends.
        read_sequence: How many records of the client were opened with the present keys.
        write_sequence: How many records were sealed for it.
        write_explicit: The next explicit nonce (TLS 1.2 with AES-GCM).
        owes_update: The client has asked for new keys, and has not had them yet.
        fragment_bytes_max: The longest content of a record that the client takes.
        pending: Bytes of the client that are no whole record yet.
        about: What the handshake has shown.
    """

    version: int
    suite: str
    read_secret: bytes
    write_secret: bytes
    read_sequence: int
    write_sequence: int
    write_explicit: int
    owes_update: bool
    fragment_bytes_max: int
    pending: bytes
    about: TlsAbout

    def __repr__(self) -> str:
        return f"<TlsState {self.suite} read {self.read_sequence}, written {self.write_sequence}>"

    def __rich_repr__(self) -> list[tuple[str, Any]]:  # that of msgspec would show all fields
        return [("suite", self.suite)]

    @property
    def keys(self) -> tuple[Keys, Keys]:
        """Make the keys to read and to write with.

        Raises:
            NotMovable: The suite is unknown here, or a number cannot be right.
        """
        suite = suite_of(self.version, self.suite)
        if suite is None:
            raise NotMovable(f"its cipher suite {self.suite} is unknown here")
        if not 0 < self.fragment_bytes_max <= PLAIN_BYTES_MAX or min(self.read_sequence, self.write_sequence) < 0:
            raise NotMovable("its TLS state is impossible")
        try:
            if self.version == TLS13:
                return (
                    Keys13(suite, self.read_secret, self.read_sequence),
                    Keys13(suite, self.write_secret, self.write_sequence),
                )
            return (
                Keys12(suite, self.read_secret, self.read_sequence),
                Keys12(suite, self.write_secret, self.write_sequence, self.write_explicit),
            )
        except ImportError:
            raise NotMovable("cryptography is not installed here (hotport[tls])") from None


# -- headers ------------------------------------------------------------------------------------------------


def _end(data: bytes, at: int, longest: int) -> int:
    """Where the record ends that begins at `at`, by its header.

    Raises:
        RecordError: It is no record.
    """
    length = data[at + 3] << 8 | data[at + 4]
    if data[at + 1] != 3 or not Content.CHANGE_CIPHER_SPEC <= data[at] <= Content.DATA:
        raise RecordError(Alert.UNEXPECTED_MESSAGE, "bytes that are no record")
    if length > longest:
        raise RecordError(Alert.RECORD_OVERFLOW, f"a record of {length} bytes")
    return at + HEADER_BYTES + length


def _each(records: bytes) -> Iterator[bytes]:
    """Split whole records."""
    at = 0
    while at < len(records):
        end = at + HEADER_BYTES + (records[at + 3] << 8 | records[at + 4])
        yield records[at:end]
        at = end


# -- what OpenSSL does --------------------------------------------------------------------------------------


class _Hello:
    """What is read from a ClientHello, in as many records as it takes."""

    __slots__ = ("_data", "fragment_bytes_max", "is_over", "random", "server_name")

    def __init__(self) -> None:
        self._data = b""
        self.is_over = False
        self.random = b""
        self.server_name: str | None = None
        self.fragment_bytes_max = PLAIN_BYTES_MAX

    def feed(self, record: bytes) -> None:
        """Take the next record of the client, until `is_over`."""
        self._data += record[HEADER_BYTES:]
        size = int.from_bytes(self._data[1:4], "big") + 4
        is_hello = record[0] == Content.HANDSHAKE and self._data[:1] == bytes((CLIENT_HELLO,))
        if not is_hello or size > HELLO_BYTES_MAX:
            self.is_over = True
        elif len(self._data) >= max(size, 4):
            self.is_over = True
            try:
                self._parse(self._data[4:size])
            except (IndexError, UnicodeDecodeError):  # OpenSSL has the last word about it
                self.random = b""
        if self.is_over:
            self._data = b""

    def _parse(self, body: bytes) -> None:
        self.random = body[2:34]
        at = 35 + body[34]  # behind the session id
        at += 2 + int.from_bytes(body[at : at + 2], "big")  # behind the cipher suites
        at += 1 + body[at] + 2  # behind the compression methods and the length of extensions
        while at + 4 <= len(body):
            kind, size = int.from_bytes(body[at : at + 2], "big"), int.from_bytes(body[at + 2 : at + 4], "big")
            content = body[at + 4 : at + 4 + size]
            if kind == 0 and content[2:3] == b"\0":  # server_name, of type host_name
                self.server_name = content[5:].decode("ascii")
            elif kind == 1 and len(content) == 1 and 1 <= content[0] <= 4:  # max_fragment_length
                self.fragment_bytes_max = 256 << content[0]
            at += 4 + size


class Counter:
    """Follows what OpenSSL does on the server's side of one connection.

    Attributes:
        phase: What may be done now.
        is_shaking: The handshake is not done.
        why_not: Why the connection cannot move; empty if it can.
        pending: Bytes that OpenSSL has not got yet, since they are no whole record.
        server_name: The name that the client has asked for, once its hello has come (SNI).
        key_updates: How many KeyUpdates were seen, of both sides.
    """

    __slots__ = (
        "_explicit",
        "_fragment",
        "_hello",
        "_overhead",
        "_owes_update",
        "_read_message",
        "_read_secret",
        "_read_sequence",
        "_secrets",
        "_server_random",
        "_suite",
        "_suite_name",
        "_version",
        "_write_message",
        "_write_secret",
        "_write_sequence",
        "is_shaking",
        "key_updates",
        "pending",
        "phase",
        "server_name",
        "why_not",
    )

    def __init__(self) -> None:
        self.phase = Phase.LIVE
        self.is_shaking = True
        self.why_not = "its handshake is not done"
        self.pending = b""
        self.server_name: str | None = None
        self.key_updates = 0
        self._hello: _Hello | None = _Hello()
        self._secrets: dict[str, bytes] = {}
        self._server_random = b""
        self._suite: Suite | None = None
        self._suite_name = ""
        self._version = TLS13
        self._fragment = PLAIN_BYTES_MAX
        self._overhead = HEADER_BYTES
        self._owes_update = False
        self._explicit = 0
        self._read_message = self._write_message = b""
        self._read_secret = self._write_secret = b""
        self._read_sequence = self._write_sequence = 0

    # -- the handshake

    def hear(self, record: bytes) -> None:
        """Follow a record of the client that OpenSSL gets during the handshake."""
        if self._hello is not None and not self._hello.is_over:
            self._hello.feed(record)
            self.server_name = self._hello.server_name

    def shook(self, written: bytes, log: bytes) -> None:
        """Follow a ``do_handshake`` that wants to read more.

        Args:
            written: What OpenSSL has written.
            log: What the key log has had since it was last read.
        """
        self._follow(written)
        hello = self._hello
        if hello is not None and log:
            self._note_secrets(log, hello.random.hex())

    def _note_secrets(self, log: bytes, client_random: str) -> None:
        """Take the lines of the key log (draft-ietf-tls-keylogfile), none of which may be another connection's."""
        for line in log.decode("ascii").splitlines():
            label, random, secret = line.split(" ")
            value = bytes.fromhex(secret) if random == client_random else b""
            # a line too many is no reason to choose: somebody on the path can shake hands with another client's random
            self._secrets[label] = value if self._secrets.get(label, value) == value else b""

    def _follow(self, written: bytes) -> None:
        """Note the server's random, and the last explicit nonce."""
        if not self._server_random and written[:1] == b"\x16" and written[5:6] == bytes((SERVER_HELLO,)):
            self._server_random = written[11:43]
        if written:
            *_, last = _each(written)
            self._explicit = int.from_bytes(last[HEADER_BYTES : HEADER_BYTES + 8], "big")

    def establish(self, written: bytes, log: bytes, version: str | None, cipher: str) -> None:
        """Follow the last ``do_handshake``; whether the connection can move is in `why_not`.

        Args:
            written: What OpenSSL has written; in TLS 1.3, its first records with the new keys (session tickets).
            log: As for `shook`.
            version: As `ssl.SSLObject.version` has it.
            cipher: OpenSSL's name of the suite.
        """
        self.shook(written, log)
        hello, secrets = self._hello, self._secrets
        assert hello is not None
        self.is_shaking, self._hello, self._secrets = False, None, {}  # the handshake's own secrets, and the exporter's
        self._version, self._suite_name = VERSIONS.get(version or "", 0), cipher
        self._suite = suite = suite_of(self._version, cipher)
        if suite is None:
            self.why_not = f"the records of {cipher} in {version} cannot be counted"
            return
        self._fragment = hello.fragment_bytes_max
        self._overhead = HEADER_BYTES + TAG_BYTES + suite.explicit_bytes + (self._version == TLS13)
        if self._version == TLS13:
            self._read_secret = secrets.get("CLIENT_TRAFFIC_SECRET_0", b"")
            self._write_secret = secrets.get("SERVER_TRAFFIC_SECRET_0", b"")
            self._write_sequence = sum(1 for _ in _each(written))
        else:
            master = secrets.get("CLIENT_RANDOM", b"")
            if master and self._server_random:
                self._read_secret, self._write_secret = split_master_secret(
                    suite, master, hello.random, self._server_random
                )
            # one record each with these keys: Finished (RFC 5246 section 7.4.9)
            self._read_sequence = self._write_sequence = 1
            self._explicit += 1
        self.why_not = "" if self._read_secret and self._write_secret else "its keys are not in the key log"

    # -- data

    def wrote(self, records: bytes, size: int = 0) -> None:
        """Follow what OpenSSL has written; to be called before it is sent.

        Args:
            size: How many bytes of data are in it; 0 for something of OpenSSL's own.

        Raises:
            IllegalTransition: The connection's state was exported; nothing of this may be sent.
        """
        if self.phase is Phase.FROZEN or self.phase is Phase.GONE:
            raise IllegalTransition(f"written in {self.phase}")
        if self.why_not or not records:
            return
        count = -(-size // self._fragment)
        if size and len(records) == size + count * self._overhead:
            self._write_sequence += count
            if self._version != TLS13:
                self._explicit += count
        else:
            self._inspect(records, is_read=False)

    def _inspect(self, records: bytes, *, is_read: bool) -> None:
        """Find out what OpenSSL has read or written that was not data alone."""
        try:
            if self._version == TLS13:
                self._inspect13(records, is_read=is_read)
            else:
                self._inspect12(records, is_read=is_read)
        except (RecordError, ImportError) as error:
            self.why_not = f"its records cannot be counted: {error}"

    def _inspect12(self, records: bytes, *, is_read: bool) -> None:
        for record in _each(records):
            if record[0] == Content.HANDSHAKE:
                self.why_not = "another handshake has begun in it"
            elif record[0] == Content.ALERT:
                self.why_not = "an alert was sent or received"
            if is_read:
                self._read_sequence += 1
            else:
                self._write_sequence += 1
        if not is_read:
            self._follow(records)
            self._explicit += 1

    def _inspect13(self, records: bytes, *, is_read: bool) -> None:
        suite = self._suite
        assert suite is not None
        if is_read:
            keys, message = Keys13(suite, self._read_secret, self._read_sequence), self._read_message
        else:
            keys, message = Keys13(suite, self._write_secret, self._write_sequence), self._write_message
        for record in _each(records):
            if record[0] != Content.DATA:
                continue  # a ChangeCipherSpec, which counts nothing, or means the end (RFC 8446 section 5)
            content, plain = keys.open(record)
            if content == Content.ALERT:
                self.why_not = "an alert was sent or received"
            elif content == Content.HANDSHAKE:
                message += plain
                while len(message) >= 4 and len(message) >= (size := 4 + int.from_bytes(message[1:4], "big")):
                    if message[:4] == KEY_UPDATE:
                        keys.update()
                        self.key_updates += 1
                        self._owes_update = is_read and (self._owes_update or message[4:5] == REQUESTED)
                    elif is_read or message[0] == CERTIFICATE_REQUEST:
                        self.why_not = "its client was asked for a certificate after the handshake"
                    message = message[size:]
        if is_read:
            self._read_secret, self._read_sequence, self._read_message = keys.secret, keys.sequence, message
        else:
            self._write_secret, self._write_sequence, self._write_message = keys.secret, keys.sequence, message

    # -- moving

    def freeze(self, about: TlsAbout) -> TlsState:
        """Freeze the connection, and return all that another process needs to go on.

        Raises:
            NotMovable: It stays as it is.
        """
        if self.why_not or self.phase is not Phase.LIVE:
            raise NotMovable(self.why_not or f"it is {self.phase}")
        if self._read_message or self._write_message:
            raise NotMovable("a handshake message is under way")
        self.phase = advance(self.phase, Event.EXPORTED)
        return TlsState(
            self._version,
            self._suite_name,
            self._read_secret,
            self._write_secret,
            self._read_sequence,
            self._write_sequence,
            self._explicit & 0xFFFF_FFFF_FFFF_FFFF if self._version == TLS12 else 0,
            self._owes_update,
            self._fragment,
            self.pending,
            about,
        )

    def keep(self) -> None:
        """Thaw the connection: its state has not been, and will not be, taken by another process."""
        self.phase = advance(self.phase, Event.KEPT)

    def leave(self) -> None:
        """Note that another process has the connection."""
        self.phase = advance(self.phase, Event.LEFT)


# -- in place of OpenSSL ------------------------------------------------------------------------------------


class Records:
    """The record layer of a connection that another process has shaken hands for.

    Args:
        records_max: After so many records of one key, the next one gets another key; None for what the suite needs.

    Attributes:
        phase: Changes with what is received and sent; see `MAY_WRITE` and `MAY_READ`.
        version: `TLS12` or `TLS13`.
        about: What the handshake has shown.
        why: What has ended the connection, once its phase is BROKEN.
        key_updates: How many KeyUpdates were seen, of both sides.

    Raises:
        NotMovable: As in `TlsState.keys`.
    """

    __slots__ = (
        "_barren",
        "_fragment",
        "_message",
        "_owes_update",
        "_read",
        "_records_max",
        "_suite_name",
        "_write",
        "about",
        "key_updates",
        "pending",
        "phase",
        "version",
        "why",
    )

    def __init__(self, state: TlsState, *, records_max: int | None = None) -> None:
        self._read, self._write = state.keys
        self.version, self._suite_name, self._fragment = state.version, state.suite, state.fragment_bytes_max
        self._records_max = self._write.suite.records_max if records_max is None else records_max
        self._owes_update = state.owes_update
        self._message = b""
        self._barren = 0
        self.pending = state.pending
        self.about = state.about
        self.phase = Phase.LIVE
        self.why = ""
        self.key_updates = 0

    @property
    def why_not(self) -> str:
        """Why the connection cannot move; empty if it can."""
        return "" if self.phase is Phase.LIVE else f"it is {self.phase}"

    def receive(self, data: bytes = b"") -> tuple[bytes, bytes]:
        """Open what the client has sent; call it once without data, since whole records may have travelled.

        Returns:
            The data in it, and what to send now: an alert, or nothing. After an alert `phase` is BROKEN, after the
            client's close_notify HALF_CLOSED (or CLOSED): data is dropped from then on.

        Raises:
            IllegalTransition: The connection's state was exported.
        """
        if self.phase in (Phase.FROZEN, Phase.GONE):
            raise IllegalTransition(f"received in {self.phase}")
        if self.pending:
            data = self.pending + data
            self.pending = b""
        plains: list[bytes] = []
        alert = b""
        try:
            alert = self._open_all(data, plains)
        except RecordError as error:
            self.why = str(error)
            if self.phase in MAY_WRITE:
                alert = self._write.seal(Content.ALERT, bytes((2, error.alert)))
            self.phase = advance(self.phase, Event.FAILED)
        return plains[0] if len(plains) == 1 else b"".join(plains), alert

    def _open_all(self, data: bytes, plains: list[bytes]) -> bytes:
        longest = RECORD_BYTES_MAX_13 if self.version == TLS13 else RECORD_BYTES_MAX
        written = b""
        at, size = 0, len(data)
        while self.phase in MAY_READ and size - at >= HEADER_BYTES:
            if (end := _end(data, at, longest)) > size:
                break
            content, plain = self._read.open(data[at:end])
            at = end
            if content == Content.DATA and plain and not self._message:
                self._barren = 0
                plains.append(plain)
            else:
                written += self._on_other(content, plain)
        if self.phase in MAY_READ:
            self.pending = data[at:]
        return written

    def _on_other(self, content: int, plain: bytes) -> bytes:
        """Handle a record that brings no data; return what to send."""
        self._barren += 1
        if self._barren > BARREN_RECORDS_MAX:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"{self._barren} records in a row without data")
        if self._message and content != Content.HANDSHAKE:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "another record inside of a handshake message")
        if content == Content.ALERT:
            self._on_alert(plain)
        elif content == Content.HANDSHAKE and self.version == TLS13:
            self._on_handshake(plain)
        elif content == Content.HANDSHAKE and self.phase in MAY_WRITE:
            return self._write.seal(Content.ALERT, bytes((1, Alert.NO_RENEGOTIATION)))
        elif content != Content.DATA:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a record of type {content}")
        return b""

    def _on_alert(self, plain: bytes) -> None:
        if len(plain) != 2:
            raise RecordError(Alert.DECODE_ERROR, f"an alert of {len(plain)} bytes")
        level, alert = plain
        if alert == Alert.CLOSE_NOTIFY:
            self.phase = advance(self.phase, Event.HEARD_CLOSE)
        elif alert != Alert.USER_CANCELED and (level != 1 or self.version == TLS13):  # RFC 8446 section 6
            self.phase = advance(self.phase, Event.FAILED)
            self.why = f"the client's alert {alert}"

    def _on_handshake(self, plain: bytes) -> None:
        """Take a KeyUpdate, which is all that a client may send (RFC 8446 section 4.6)."""
        if not plain:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "an empty handshake record")
        message = self._message + plain
        if not KEY_UPDATE.startswith(message[:4]):
            raise RecordError(Alert.UNEXPECTED_MESSAGE, f"a handshake message of type {message[0]}")
        if len(message) > 5:
            raise RecordError(Alert.UNEXPECTED_MESSAGE, "something behind a KeyUpdate in its record")
        self._message = message
        if len(message) == 5:
            self._message = b""
            if message[4:] not in (NOT_REQUESTED, REQUESTED):
                raise RecordError(Alert.ILLEGAL_PARAMETER, f"a KeyUpdate of kind {message[4]}")
            assert isinstance(self._read, Keys13)
            self._read.update()
            self.key_updates += 1
            # answered before the next data (RFC 8446 section 4.6.3): many requests cost one answer
            self._owes_update = self._owes_update or message[4:] == REQUESTED

    def update_keys(self, *, asks: bool = False) -> bytes:
        """Change the keys to write with, and return the KeyUpdate to send; TLS 1.3 only.

        Args:
            asks: The client should do the same.

        Raises:
            IllegalTransition: As in `send`.
        """
        self._check_writing()
        assert isinstance(self._write, Keys13)
        self._owes_update = False
        self.key_updates += 1
        message = self._write.seal(Content.HANDSHAKE, KEY_UPDATE + (REQUESTED if asks else NOT_REQUESTED))
        self._write.update()
        return message

    def send(self, data: bytes | bytearray | memoryview) -> bytes:
        """Seal data in as many records as it takes; nothing for no data.

        Raises:
            IllegalTransition: Nothing may be written in this phase.
        """
        self._check_writing()
        if len(data) <= self._fragment and not self._owes_update and not self._is_worn:
            return self._write.seal(Content.DATA, bytes(data)) if data else b""
        records: list[bytes] = []
        for at in range(0, len(data), self._fragment):
            if self._owes_update or self._is_worn:
                records.append(self.update_keys())
            records.append(self._write.seal(Content.DATA, bytes(data[at : at + self._fragment])))
        return b"".join(records)

    @property
    def _is_worn(self) -> bool:
        return bool(self._records_max) and self._write.sequence >= self._records_max

    def _check_writing(self) -> None:
        if self.phase not in MAY_WRITE:
            raise IllegalTransition(f"written in {self.phase}")

    def close(self) -> bytes:
        """Say close_notify, once; the client may still send. Returns nothing if nothing may be written."""
        if self.phase not in MAY_WRITE:
            return b""
        self.phase = advance(self.phase, Event.SAID_CLOSE)
        return self._write.seal(Content.ALERT, bytes((1, Alert.CLOSE_NOTIFY)))

    def export(self) -> TlsState:
        """Freeze the connection, and return all that another process needs to go on.

        Raises:
            NotMovable: It is being closed, or inside of a handshake message.
        """
        if self.why_not:
            raise NotMovable(self.why_not)
        if self._message:
            raise NotMovable("a handshake message is under way")
        self.phase = advance(self.phase, Event.EXPORTED)
        return TlsState(
            self.version,
            self._suite_name,
            self._read.secret,
            self._write.secret,
            self._read.sequence,
            self._write.sequence,
            self._write.explicit,
            self._owes_update,
            self._fragment,
            self.pending,
            self.about,
        )

    def keep(self) -> None:
        """Thaw the connection: its state has not been, and will not be, taken by another process."""
        self.phase = advance(self.phase, Event.KEPT)

    def leave(self) -> None:
        """Note that another process has the connection."""
        self.phase = advance(self.phase, Event.LEFT)
