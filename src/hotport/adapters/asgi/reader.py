"""Parse HTTP/1.1 requests: heads, bodies, framing, limits. Knows no transport.

httptools (llhttp) parses. A `Reader` reports requests to a `Listener`, and keeps unparsed bytes.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import deque
from enum import Enum
from functools import lru_cache
from time import perf_counter
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import unquote

import httptools

from hotport.adapters.asgi.exchange import Exchange
from hotport.adapters.asgi.shared import Shared

__all__ = ["END_OF_HEAD", "Intake", "Listener", "Reader", "Target"]

log = logging.getLogger("hotport.error")

END_OF_HEAD: Final = b"\r\n\r\n"
VERSION_11: Final = b" HTTP/1.1\r\n"

#: Memory of a waiting request beside its head: the exchange, its scope and their containers. And memory of each header
#: field: a tuple, two byte strings and their place in a list. Measured with tracemalloc.
REQUEST_BYTES: Final = 3 * 1024
FIELD_BYTES: Final = 136

#: How much of a chunked body is parsed at once: about what takes `PIECE_S`, by the time that the last piece took. A
#: chunk may hold one byte; parsing such ones takes a hundred times as long as parsing a long one.
PIECE_S: Final = 0.00005
PIECE_BYTES_FIRST: Final = 2 * 1024
PIECE_BYTES_MIN: Final = 512
PIECE_BYTES_MAX: Final = 64 * 1024

#: Stands for the length of a chunked body.
CHUNKED: Final = -1

#: The syntax of a Host field: RFC 9110 section 7.2 and RFC 3986 section 3.2.2.
HOST: Final = re.compile(rb"(?:\[[0-9A-Za-z:._~%-]*\]|[A-Za-z0-9._~%!$&'()*+,;=-]*)(?::[0-9]*)?")

#: A cache of valid hosts; cleared when it is full.
HOSTS: Final[set[bytes]] = set()
HOSTS_MAX: Final = 1024

#: llhttp knows a fixed set of methods; these are the usual ones.
METHODS: Final = {m.encode(): m for m in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}

#: The longest target that is cached, to bound the cache's memory.
TARGET_BYTES_MAX: Final = 256

#: Path, raw path and query string of a request target, as ASGI wants them; and its host if it names one.
Target: TypeAlias = tuple[str, bytes, bytes, bytes | None]


class Intake(Enum):
    """What a `Reader` does with bytes behind the arriving request."""

    OPEN = "parses the next request"
    PARKED = "keeps them as they are: the next process parses them"
    UPGRADED = "keeps them as they are: they belong to another protocol"
    CLOSED = "drops them"


OPEN: Final = Intake.OPEN
UPGRADED: Final = Intake.UPGRADED
CLOSED: Final = Intake.CLOSED


class Listener(Protocol):
    """The connection's interface for a `Reader`."""

    def on_request(
        self,
        method: str,
        is_http10: bool,
        target: Target,
        headers: list[tuple[bytes, bytes]],
        fields: dict[bytes, bytes],
        keeps_alive: bool,
    ) -> Exchange:
        """Make the exchange of a request whose head is complete; `fields` has the last of its `headers` by name."""

    def on_body_due(self) -> None:
        """Handle that the arriving request's body is yet to come, and is not too large."""

    def on_upgrade(self, exchange: Exchange, behind: bytes) -> bool:
        """Accept or decline a request for another protocol; `behind` follows its head.

        Returns:
            True if that protocol reads all bytes from here on; False to ignore the request for it.
        """

    def refuse(self, status: int, why: str) -> None:
        """Refuse input that is no request, or is not served; must call `Reader.stop`."""


class _Refused(Exception):
    """Raised in a parser callback to answer the request with `status`, and read no other."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        self.why = why


class _Ignored(list[tuple[bytes, bytes]]):
    """Discards the fields of trailers, which ASGI does not deliver."""

    def append(self, field: tuple[bytes, bytes]) -> None:
        """Keep nothing."""


TRAILERS: Final = _Ignored()


class Reader:
    """Reads the requests of one connection.

    Args:
        listener: Notified of requests and errors, until `close`.
        requests: The queue to which requests are appended as soon as their heads are complete.

    Attributes:
        arriving: The newest request while its body arrives; its answer may be over.
        head: The raw bytes of an incomplete head, already fed to the parser.
        rest: Unparsed bytes behind it.
        whole_head: Bytes about to be parsed that are exactly one head.
    """

    __slots__ = (
        "_between",
        "_headers",
        "_is_upgrade",
        "_listener",
        "_parser",
        "_piece_bytes",
        "_requests",
        "_shared",
        "_tail",
        "_url",
        "arriving",
        "head",
        "intake",
        "rest",
        "whole_head",
    )

    def __init__(self, listener: Listener, shared: Shared, requests: deque[Exchange]) -> None:
        self._listener = listener
        self._shared = shared
        self._requests = requests
        self.intake = OPEN
        self.arriving: Exchange | None = None
        self.head = b""
        self.rest = b""
        self.whole_head = b""
        #: Made when the first bytes come: an idle connection that moves needs none.
        self._parser: Any = None
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._is_upgrade = False
        self._tail = b""  # the last bytes of an incomplete chunked body
        self._piece_bytes = PIECE_BYTES_FIRST
        self._between = 0  # bytes of that body since its last data: extensions, trailers

    def stop(self) -> Exchange | None:
        """Stop parsing, and drop unparsed bytes; return the request whose body is incomplete."""
        self.intake = CLOSED
        self.head = self.rest = self._tail = b""
        arriving, self.arriving = self.arriving, None
        return arriving

    def close(self) -> None:
        """Free the parser, to break the cycle between it and this reader."""
        self._parser = None
        self._listener = None  # type: ignore[assignment]  # the listener holds this reader, too, and gets no more calls

    def read(self, until: float, room_bytes: int, requests_max: int) -> None:
        """Parse `rest`, and track which bytes belong to an incomplete head.

        The parser does not tell where a request ended. But a request can end only behind an empty line (a head, a
        chunked body) or after its content-length, so the input is cut in those places.

        Args:
            until: When to stop, by `perf_counter`.
            room_bytes: Memory that requests may take; another one is begun while some of it is free.
            requests_max: No other request is begun while so many wait.
        """
        data, self.rest = self.rest, b""
        view = memoryview(data)
        start, size = 0, len(data)
        options = self._shared.options
        while start < size:
            arriving = self.arriving
            if arriving is None:
                if self.intake is not OPEN or room_bytes < 0 or len(self._requests) >= requests_max:
                    break
                end = _end_of_piece(data, start, size, self.head[-3:])
                piece = data[start:end]
                # Empty lines in front of a request are ignored (RFC 9112 section 2.2).
                head = self.head + piece if self.head else piece.lstrip(b"\r\n")
                if len(head) > self._shared.small_head_bytes:
                    if len(head) > options.head_max_bytes:
                        self._listener.refuse(431, "the request head is too large")
                        break
                    if head.count(b"\n") > self._shared.head_lines_max:
                        self._listener.refuse(431, "the request has too many header fields")
                        break
                is_whole = head.endswith(END_OF_HEAD)
                self.head = b"" if is_whole else head
                self.parse(piece)
                if is_whole and self._requests:
                    exchange = self._requests[-1]
                    scope = exchange.scope
                    exchange.held_bytes = (
                        REQUEST_BYTES + len(head) + sys.getsizeof(scope["path"]) + FIELD_BYTES * len(scope["headers"])
                    )
                    room_bytes -= exchange.held_bytes
            elif arriving.length == CHUNKED:
                end = _end_of_piece(data, start, min(size, start + self._piece_bytes), self._tail)
                tail = (self._tail + data[max(start, end - 4) : end])[-4:]
                self._tail = b"" if tail == END_OF_HEAD else tail[-3:]
                received, began = arriving.received, perf_counter()
                self.parse(view[start:end])
                self._adapt_pieces(end - start, perf_counter() - began)
                room_bytes -= end - start
                self._between = self._between + end - start if arriving.received == received else 0
                if self._between > options.head_max_bytes and self.arriving is arriving:
                    self._listener.refuse(431, "the trailers or chunk extensions are too large")
                    break
            else:
                assert arriving.length is not None  # noted when its head was parsed
                end = min(size, start + arriving.length - arriving.received)
                self.parse(view[start:end])
                room_bytes -= end - start
            start = end
            if perf_counter() >= until:
                break
        if self.intake is not CLOSED or self.arriving is not None:
            self.rest = data[start:]

    def _adapt_pieces(self, size: int, took_s: float) -> None:
        """Halve the pieces of a body if one took too long, and double them if one was parsed fast."""
        if took_s > 2 * PIECE_S:
            self._piece_bytes = max(self._piece_bytes // 2, PIECE_BYTES_MIN)
        elif size >= self._piece_bytes and 2 * took_s < PIECE_S:
            self._piece_bytes = min(self._piece_bytes * 2, PIECE_BYTES_MAX)

    def parse(self, piece: bytes | memoryview) -> None:
        """Parse all of `piece`, in which at most one request may end."""
        behind = -1
        if self._parser is None:
            self._parser = httptools.HttpRequestParser(self)
            # Bytes behind a request with `Connection: close` are dropped; as an error they would prevent its answer.
            self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            behind = upgrade.args[0]
        except httptools.HttpParserError as error:
            self._on_parser_error(error, piece)
        if behind >= 0:  # outside the handler: exceptions raised there would have the upgrade as their context
            self._upgrade(bytes(piece[behind:]))
        arriving = self.arriving
        if arriving is not None and arriving.length is None:
            self._note_framing(arriving)

    def _on_parser_error(self, error: httptools.HttpParserError, piece: bytes | memoryview) -> None:
        match error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error:
            case _Refused(status=status, why=why):
                self._listener.refuse(status, why)
            case httptools.HttpParserError() as malformed:
                self._listener.refuse(400, _spoken(self.head or bytes(piece), str(malformed)))
            case bug:
                log.error("a parser callback raised", exc_info=bug)
                self._listener.refuse(500, "")

    def _note_framing(self, exchange: Exchange) -> None:
        """Note the framing of a body that has not arrived with its head, and check its length."""
        exchange.length = CHUNKED
        self._between = 0
        self._piece_bytes = PIECE_BYTES_FIRST
        for name, value in exchange.scope["headers"]:
            if name == b"content-length":
                exchange.length = int(value)
            elif name == b"expect" and value.lower() == b"100-continue":
                exchange.expects_continue = exchange.scope["http_version"] != "1.0" and not exchange.received
        if 0 < self._shared.options.body_max_bytes < exchange.length:
            self._listener.refuse(413, "the request body is too large")
        else:
            self._listener.on_body_due()

    def _upgrade(self, behind: bytes) -> None:
        """Offer an upgrade to the listener.

        If it is declined, the request is answered without it (RFC 9110 section 7.8). llhttp stops behind the head of
        such a request even if there is a body: the body is parsed by a parser that has seen a head with the same
        framing and no upgrade.
        """
        self._is_upgrade = False
        exchange = self.arriving
        assert exchange is not None
        if self._listener.on_upgrade(exchange, behind):
            self.intake, self.arriving = UPGRADED, None
            self.close()
            return
        self._parser = httptools.HttpRequestParser(_BodyOnly(self))
        framing = (f for f in exchange.scope["headers"] if f[0] in (b"content-length", b"transfer-encoding"))
        lines = b"".join(b"%b: %b\r\n" % field for field in framing)
        self.parse(b"POST / HTTP/1.1\r\n" + lines + b"\r\n")
        assert not behind  # the piece has ended with the head

    def end_body_only(self) -> None:
        """Complete a declined upgrade request whose body has arrived."""
        self._parser = None
        self.on_message_complete()

    # -- called by the parser ------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip()))  # llhttp keeps trailing white space

    def on_headers_complete(self) -> None:
        parser = self._parser
        headers, self._headers = self._headers, TRAILERS
        url, self._url = self._url, b""
        method = parser.get_method()
        head, self.whole_head = self.whole_head, b""
        end = len(method) + 1 + len(url)
        is_http10 = False
        if head[end : end + 11] != VERSION_11:
            version = parser.get_http_version()  # makes a text of two numbers, which takes as long as all of the above
            is_http10 = version == "1.0"
            if not is_http10 and version != "1.1":
                raise _Refused(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
        if len(headers) > self._shared.options.header_fields_max:
            raise _Refused(431, "the request has too many header fields")
        fields = dict(headers)
        if fields.get(b"host") not in HOSTS or len(fields) != len(headers) or b"transfer-encoding" in fields:
            _check(headers, is_http10)
        if parser.should_upgrade():
            if method == b"CONNECT":
                raise _Refused(501, "this is not a proxy")
            self._is_upgrade = True
        read = _read_target if len(url) <= TARGET_BYTES_MAX else _read_target.__wrapped__
        target = read(url)
        host = target[3]
        if host is not None:  # replaces the Host field: RFC 9112 section 3.2.2
            headers = [(b"host", host), *(field for field in headers if field[0] != b"host")]
        self.arriving = exchange = self._listener.on_request(
            METHODS.get(method) or method.decode("ascii"),
            is_http10,
            target,
            headers,
            fields,
            parser.should_keep_alive(),
        )
        self._requests.append(exchange)

    def on_body(self, body: bytes) -> None:
        exchange = self.arriving
        assert exchange is not None
        exchange.add_body(body)
        if 0 < self._shared.options.body_max_bytes < exchange.received:
            raise _Refused(413, "the request body is too large")

    def on_message_complete(self) -> None:
        self._headers = []
        if self._is_upgrade:
            return  # llhttp ends the message here, since what follows an upgrade is not HTTP
        exchange, self.arriving = self.arriving, None
        assert exchange is not None
        exchange.is_complete = True
        if exchange.task is not None:  # else nothing waits; saves a call
            exchange.wake()


class _BodyOnly:
    """Passes the body of one request to the reader, and frees the parser at its end."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.on_body = reader.on_body

    def on_message_complete(self) -> None:
        self._reader.end_body_only()


def _spoken(begin: bytes, error: str) -> str:
    """Name the protocol of input that is no HTTP/1 request if it is known, else return the parser's error.

    Sources: RFC 8446 section 5.1, TLSPlaintext; RFC 9113 section 3.4, of which llhttp reads the first line.
    """
    if begin.startswith(b"\x16"):
        return "this is a TLS handshake, and the port speaks HTTP without TLS: use http://, or set tls_cert"
    if "PRI/Upgrade" in error:
        return "this is the preface of HTTP/2, and the port speaks HTTP/1.1"
    return error


def _check(headers: list[tuple[bytes, bytes]], is_http10: bool) -> None:
    """Check what llhttp does not: the Host field, and the transfer-encoding (RFC 9112 sections 3.2, 6.1 and 6.3)."""
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
            if not HOST.fullmatch(value):
                raise _Refused(400, "the host field does not hold a host")
            if len(value) <= TARGET_BYTES_MAX:
                if len(HOSTS) >= HOSTS_MAX:
                    HOSTS.clear()
                HOSTS.add(value)
        elif name == b"transfer-encoding":
            if is_http10:
                raise _Refused(400, "HTTP/1.0 has no transfer-encoding")
            if value.lower() != b"chunked":
                raise _Refused(400, "the only transfer-encoding here is chunked")
    if hosts != 1 and (hosts or not is_http10):
        raise _Refused(400, "a request must have one host field")


def _end_of_piece(data: bytes, start: int, stop: int, before: bytes) -> int:
    """Return where the next `END_OF_HEAD` ends, which may have begun in `before`; else `stop`."""
    if before:
        across = (before + data[start : min(start + 3, stop)]).find(END_OF_HEAD)
        if across >= 0:
            return start + across + 4 - len(before)
    found = data.find(END_OF_HEAD, start, stop)
    return stop if found < 0 else found + 4


@lru_cache(maxsize=1024)
def _read_target(target: bytes) -> Target:
    url = httptools.parse_url(target)
    host = url.host
    if host is not None:
        host = (b"[%b]" if b":" in host else b"%b") % host
        if url.port is not None:
            host += b":%d" % url.port
    raw_path = url.path or b"/"
    path = raw_path.decode("ascii")
    return (unquote(path) if "%" in path else path), raw_path, url.query or b"", host
