"""Both sides of TLS connections in memory: OpenSSL or our record layer, on either side."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress

import msgspec
import trustme

from hotport.kernel.tls import KeyLog
from hotport.wire.tlskeys import Content, Keys12
from hotport.wire.tlsrecords import Records, TlsState
from hotport.worker.tlssession import Session

GCM12 = "ECDHE-ECDSA-AES256-GCM-SHA384"
CHACHA12 = "ECDHE-ECDSA-CHACHA20-POLY1305"
CBC12 = "ECDHE-ECDSA-AES256-SHA384"

#: Kinds of connection: TLS 1.3, or a suite of TLS 1.2.
KINDS = ("TLSv1.3", GCM12, CHACHA12)


class Contexts:
    """What servers and clients of one kind have; close it."""

    def __init__(self, kind: str = "TLSv1.3") -> None:
        authority = trustme.CA()
        self.server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(self.server)
        self.server.set_alpn_protocols(["http/1.1"])
        self.client = ssl.create_default_context()
        authority.configure_trust(self.client)
        authority.issue_cert("client@example.org").configure_cert(self.client)
        self.client.set_alpn_protocols(["http/1.1"])
        if kind != "TLSv1.3":
            self.client.maximum_version = ssl.TLSVersion.TLSv1_2
            self.client.set_ciphers(kind)
        self.authority = authority
        self.log = KeyLog()
        self.log.watch([self.server])

    def close(self) -> None:
        self.log.close()


class Server:
    """One server's end: OpenSSL's with a counter, until it moves.

    Attributes:
        wire: What was written and not sent yet.
        got: The data that has come.
    """

    def __init__(self, contexts: Contexts) -> None:
        self.session = Session(contexts.server, contexts.log)
        self.records: Records | None = None
        self.wire = b""
        self.got = b""

    @property
    def is_ready(self) -> bool:
        return not self.session.is_shaking

    @property
    def error(self) -> str:
        """What OpenSSL has said."""
        return str(self.session.error or "")

    def feed(self, data: bytes) -> None:
        was_shaking = self.session.is_shaking
        plain, written = (self.records or self.session).receive(data)
        self.got += plain
        self.wire += written
        if was_shaking and self.is_ready and self.session.pending:
            self.feed(b"")

    def send(self, data: bytes) -> None:
        self.wire += (self.records or self.session).send(data)

    def export(self) -> TlsState:
        return (self.records or self.session).export()

    def keep(self) -> None:
        (self.records or self.session).keep()

    def move(self, *, records_max: int | None = None) -> TlsState:
        """Go on as another process would."""
        state = self.export()
        self.records = Records(travelled(state), records_max=records_max)
        self.feed(b"")
        return state


class Client:
    """A client's end: OpenSSL's until `take_over`."""

    def __init__(self, contexts: Contexts) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.connection = contexts.client.wrap_bio(self._incoming, self._outgoing, server_hostname="localhost")
        self.records: Records | None = None
        self.wire = b""
        self.got = b""
        self.is_ready = False

    def shake(self) -> None:
        with suppress(ssl.SSLWantReadError):
            self.connection.do_handshake()
            self.is_ready = True
        self.wire += self._outgoing.read()

    def feed(self, data: bytes) -> None:
        if self.records is not None:
            plain, written = self.records.receive(data)
            self.got += plain
            self.wire += written
            return
        self._incoming.write(data)
        if not self.is_ready:
            self.shake()
        if self.is_ready:
            with suppress(ssl.SSLWantReadError):
                while plain := self.connection.read(1 << 16):
                    self.got += plain
            self.wire += self._outgoing.read()

    def send(self, data: bytes) -> None:
        if self.records is not None:
            self.wire += self.records.send(data)
            return
        self.connection.write(data)
        self.wire += self._outgoing.read()

    def close(self) -> None:
        if self.records is not None:
            self.wire += self.records.close()
            return
        with suppress(ssl.SSLError):
            self.connection.unwrap()
        self.wire += self._outgoing.read()

    def take_over(self, server: Server) -> None:
        """Use our own record layer from now on; nothing may be under way."""
        assert not self.wire
        assert not server.wire
        self.records = Records(mirrored(server.export()))
        server.keep()


def travelled(state: TlsState) -> TlsState:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=TlsState)


def mirrored(state: TlsState) -> TlsState:
    """The client's view of a connection with nothing under way."""
    return msgspec.structs.replace(
        state,
        read_secret=state.write_secret,
        write_secret=state.read_secret,
        read_sequence=state.write_sequence,
        write_sequence=state.read_sequence,
        write_explicit=1 << 40,
        owes_update=False,
    )


def connect(contexts: Contexts) -> tuple[Client, Server]:
    """Shake hands, and deliver everything; the records under the server's first keys are in `Client.got` only."""
    client, server = Client(contexts), Server(contexts)
    client.shake()
    for _ in range(3):
        deliver(client, server)
    assert client.is_ready
    assert server.is_ready
    return client, server


def deliver(client: Client, server: Server) -> None:
    """Deliver everything both ways until nothing is under way."""
    while client.wire or server.wire:
        wire, client.wire = client.wire, b""
        server.feed(wire)
        wire, server.wire = server.wire, b""
        client.feed(wire)


class Observer:
    """Opens what a server writes with the keys it had after the handshake: that no nonce comes twice is seen here."""

    def __init__(self, state: TlsState) -> None:
        _, self._keys = state.keys
        self._is_gcm12 = self._keys.suite.explicit_bytes > 0
        self._seen: set[object] = set()
        self._rest = b""
        self.alerts: list[int] = []
        self.updates = 0
        self.got = b""

    def feed(self, wire: bytes) -> None:
        data = self._rest + wire
        for record in whole_records(data):
            data = data[len(record) :]
            nonce = record[5:13] if self._is_gcm12 else self._keys.sequence
            assert (self._keys.secret, nonce) not in self._seen
            self._seen.add((self._keys.secret, nonce))
            content, plain = self._keys.open(record)  # fails if it is not the next one
            if content == Content.DATA:
                self.got += plain
            elif content == Content.ALERT:
                self.alerts.append(plain[1])
            else:
                assert not isinstance(self._keys, Keys12)
                assert plain[:4] == b"\x18\0\0\x01"
                self.updates += 1
                self._keys.update()
        self._rest = data


def observe(server: Server) -> Observer:
    """Observe a server from now on; nothing may be under way."""
    state = server.export()
    server.keep()
    return Observer(state)


def whole_records(data: bytes) -> Iterator[bytes]:
    at = 0
    while len(data) - at >= 5 and len(data) - at >= (size := 5 + int.from_bytes(data[at + 3 : at + 5], "big")):
        yield data[at : at + size]
        at += size
