"""The edges of HTTP/1.1 as a table: what goes over the wire, what the application sees, what is answered.

Each row is made by one of four functions, which say what becomes of the connection:

* `serves`: the requests are answered with 200, and the connection stays open;
* `ends`: they are answered with 200, and then the connection is closed, as its client wants;
* `refuses`: what is no request gets a status, the connection is closed, and nothing behind it is read;
* `waits`: the request is not whole, so nothing is answered yet.

Sources: RFC 9110, RFC 9112, the ASGI HTTP specification.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from hotport.adapters.asgi.spec import Receive, Scope, Send
from tests.adapters.asgi_support import read_body, respond

__all__ = ["EDGES", "PROBE", "SECTIONS", "Edge", "Recorder", "Saw", "recorder"]

Fields = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Saw:
    """What an application sees of a request; None, in a row of the table, is anything."""

    method: str
    path: str
    query: bytes = b""
    body: bytes = b""
    version: str = "1.1"
    raw_path: bytes | None = None
    headers: Fields | None = None
    #: It received a disconnect instead of the end of the body.
    is_cut: bool = False

    def like(self, row: Saw) -> Saw:
        """Without what `row` does not ask for."""
        return replace(
            self,
            raw_path=None if row.raw_path is None else self.raw_path,
            headers=None if row.headers is None else self.headers,
        )

    def to_json(self) -> bytes:
        return json.dumps([getattr(self, name) for name in self.__slots__], default=bytes.hex).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Saw:
        method, path, query, body, version, raw_path, headers, is_cut = json.loads(data)
        fields = tuple((bytes.fromhex(name), bytes.fromhex(value)) for name, value in headers)
        unhex = bytes.fromhex
        return cls(method, path, unhex(query), unhex(body), version, unhex(raw_path), fields, is_cut)


class Recorder:
    """An application that answers with what it has seen, and remembers it."""

    def __init__(self) -> None:
        self.seen: list[Saw] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/slow":
            for _ in range(10):  # turns of the event loop, in which what comes behind is read
                await asyncio.sleep(0)
        body = await read_body(receive)
        end = b"<disconnected>"
        saw = Saw(
            scope["method"],
            scope["path"],
            scope["query_string"],
            body.removesuffix(end),
            scope["http_version"],
            scope["raw_path"],
            tuple((name, value) for name, value in scope["headers"]),
            body.endswith(end),
        )
        self.seen.append(saw)
        if not saw.is_cut:
            await respond(send, saw.to_json())


async def recorder(scope: Scope, receive: Receive, send: Send) -> None:
    """The same for other servers; remembers nothing."""
    await Recorder()(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Edge:
    """A row: `sent` is what the client writes, in one piece or in many."""

    name: str
    outcome: Literal["serves", "ends", "refuses", "waits"]
    sent: bytes
    #: Everything that the application is asked, in order. Of what is refused later it may have seen a part: `is_cut`.
    seen: tuple[Saw, ...]
    #: Of the last answer, if the server makes it itself.
    status: int = 200

    @property
    def served(self) -> list[Saw]:
        """The requests that are answered by the application."""
        return [saw for saw in self.seen if not saw.is_cut]

    @property
    def statuses(self) -> list[int]:
        refusal = [self.status] if self.outcome == "refuses" else []
        return [200 for _ in self.served] + refusal


def serves(name: str, sent: bytes, *seen: Saw) -> Edge:
    return Edge(name, "serves", sent, seen)


def ends(name: str, sent: bytes, *seen: Saw) -> Edge:
    return Edge(name, "ends", sent, seen)


def refuses(name: str, sent: bytes, *seen: Saw, status: int = 400) -> Edge:
    return Edge(name, "refuses", sent, seen, status)


def waits(name: str, sent: bytes, *seen: Saw) -> Edge:
    return Edge(name, "waits", sent, seen)


#: Sent behind a row: answered if the connection is open, and never if what is before it was refused.
PROBE: Final = b"GET /probe HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

GET: Final = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST: Final = b"POST / HTTP/1.1\r\nHost: x\r\n"
CHUNKED: Final = POST + b"Transfer-Encoding: chunked\r\n\r\n"
END: Final = b"\r\n"
HOST: Final = (b"host", b"x")

#: Most rows are about something else than what the application sees.
ROOT: Final = Saw("GET", "/")
CUT: Final = Saw("POST", "/", is_cut=True)


def target(line: bytes) -> bytes:
    return line + b" HTTP/1.1\r\nHost: x\r\n\r\n"


def posted(body: bytes, **other: Any) -> Saw:
    return Saw("POST", "/", body=body, **other)


PIPELINING = [
    serves("one", GET + END, ROOT),
    serves("two", GET + END + target(b"GET /b"), ROOT, Saw("GET", "/b")),
    serves("slow-first", target(b"GET /slow") + target(b"GET /b"), Saw("GET", "/slow"), Saw("GET", "/b")),
    serves(
        "bodies",
        POST + b"Content-Length: 2\r\n\r\nhi" + CHUNKED + b"2\r\nho\r\n0\r\n\r\n" + GET + END,
        posted(b"hi"),
        posted(b"ho"),
        ROOT,
    ),
    ends("close-first", GET + b"Connection: close\r\n\r\n" + target(b"GET /b"), ROOT),
    ends(
        "close-in-the-middle",
        target(b"GET /slow") + GET + b"Connection: close\r\n\r\n" + target(b"GET /b"),
        Saw("GET", "/slow"),
        ROOT,
    ),
    ends("close-with-a-body", POST + b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", posted(b"hi")),
    ends("close-in-a-list", GET + b"Connection: foo, Close\r\n\r\n", ROOT),
    ends("close-behind-keep-alive", GET + b"Connection: keep-alive\r\nConnection: close\r\n\r\n", ROOT),
    serves("keep-alive-said", GET + b"Connection: keep-alive\r\n\r\n", ROOT),
    refuses("nonsense-behind", target(b"GET /slow") + b"nonsense\r\n\r\n", Saw("GET", "/slow")),
]

CHUNKS = [
    serves("chunked", CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", posted(b"abcde")),
    serves("chunk-extensions", CHUNKED + b'3;a=b;c="d e";f\r\nabc\r\n0;x\r\n\r\n', posted(b"abc")),
    serves("chunk-size-upper-case", CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n", posted(b"0123456789")),
    serves("chunk-size-lower-case", CHUNKED + b"a\r\n0123456789\r\n0\r\n\r\n", posted(b"0123456789")),
    serves("chunk-size-leading-zeros", CHUNKED + b"0003\r\nabc\r\n000\r\n\r\n", posted(b"abc")),
    serves("chunk-zero-only", CHUNKED + b"0\r\n\r\n", posted(b"")),
    serves("chunk-of-line-ends", CHUNKED + b"6\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", posted(b"\r\n\r\n\r\n")),
    serves("chunked-get", GET + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", Saw("GET", "/", body=b"a")),
    serves(
        "trailers",
        CHUNKED + b"3\r\nabc\r\n0\r\nX-T: u\r\nHost: y\r\n\r\n",
        posted(b"abc", headers=(HOST, (b"transfer-encoding", b"chunked"))),
    ),
    refuses("trailer-content-length", CHUNKED + b"0\r\nContent-Length: 5\r\n\r\n", CUT),
    refuses("trailer-without-colon", CHUNKED + b"3\r\nabc\r\n0\r\nbad\r\n\r\n", posted(b"abc", is_cut=True)),
    waits("chunked-final-crlf-missing", CHUNKED + b"3\r\nabc\r\n0\r\n", posted(b"abc", is_cut=True)),
    waits("chunk-of-2^63-1", CHUNKED + b"7fffffffffffffff\r\nabc", posted(b"abc", is_cut=True)),
    waits("chunk-of-2^64-1", CHUNKED + b"ffffffffffffffff\r\nabc", posted(b"abc", is_cut=True)),
    refuses("chunk-of-2^64", CHUNKED + b"10000000000000000\r\nabc", CUT),
    refuses("chunk-size-negative", CHUNKED + b"-1\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-plus", CHUNKED + b"+3\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-0x", CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-not-hex", CHUNKED + b"zz\r\n", CUT),
    refuses("chunk-size-empty", CHUNKED + b"\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-space-before", CHUNKED + b" 3\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-space-behind", CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-size-space-extension", CHUNKED + b"3 ;a=b\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-extension-line-feed", CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n", CUT),
    refuses("chunk-bare-line-feeds", CHUNKED + b"3\nabc\n0\n\n", CUT),
    refuses("chunk-longer-than-said", CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", posted(b"abc", is_cut=True)),
    refuses("chunk-shorter-than-said", CHUNKED + b"4\r\nabc\r\n0\r\n\r\n", posted(b"abc\r", is_cut=True)),
]

CONTENT_LENGTH = [
    serves("length", POST + b"Content-Length: 5\r\n\r\nhello", posted(b"hello")),
    serves("length-zero", POST + b"Content-Length: 0\r\n\r\n", posted(b"")),
    serves("length-none", POST + END, posted(b"")),
    serves("length-of-get", GET + b"Content-Length: 5\r\n\r\nhello", Saw("GET", "/", body=b"hello")),
    serves("length-leading-zeros", POST + b"Content-Length: 005\r\n\r\nhello", posted(b"hello")),
    serves(
        "length-white-space",
        POST + b"Content-Length:  \t5 \r\n\r\nhello",  # httptools before 0.8 refuses a tab behind it
        posted(b"hello", headers=(HOST, (b"content-length", b"5"))),
    ),
    refuses("length-plus", POST + b"Content-Length: +5\r\n\r\nhello"),
    refuses("length-minus", POST + b"Content-Length: -5\r\n\r\nhello"),
    refuses("length-hex", POST + b"Content-Length: 0x5\r\n\r\nhello"),
    refuses("length-exponent", POST + b"Content-Length: 5e0\r\n\r\nhello"),
    refuses("length-inner-space", POST + b"Content-Length: 0 5\r\n\r\nhello"),
    refuses("length-empty", POST + b"Content-Length:\r\n\r\nhello"),
    refuses("length-blank", POST + b"Content-Length: \r\n\r\nhello"),
    refuses("length-list", POST + b"Content-Length: 5, 5\r\n\r\nhello"),
    refuses("length-twice-equal", POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello"),
    refuses("length-twice-different", POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello"),
    waits("length-2^64-1", POST + b"Content-Length: 18446744073709551615\r\n\r\nhi", posted(b"hi", is_cut=True)),
    refuses("length-2^64", POST + b"Content-Length: 18446744073709551616\r\n\r\nhello"),
    refuses("length-and-chunked", POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    refuses("chunked-and-length", POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n"),
    refuses("length-zero-and-chunked", POST + b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    refuses("length-and-identity", POST + b"Content-Length: 5\r\nTransfer-Encoding: identity\r\n\r\nhello"),
]

TRANSFER_ENCODING = [
    serves("coding-case", POST + b"Transfer-Encoding: ChunKed\r\n\r\n0\r\n\r\n", posted(b"")),
    serves("coding-white-space", POST + b"Transfer-Encoding:\tchunked \r\n\r\n0\r\n\r\n", posted(b"")),
    serves("coding-underscore", POST + b"Transfer_Encoding: chunked\r\n\r\n", posted(b"")),
    refuses("coding-twice", POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-list-twice", POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-identity", POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
    refuses("coding-chunked-identity", POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n"),
    refuses("coding-identity-chunked", POST + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-gzip", POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n"),
    refuses("coding-gzip-chunked", POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-chunked-gzip", POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n"),
    refuses(
        "coding-gzip-then-chunked", POST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    ),
    refuses("coding-xchunked", POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-chunkedx", POST + b"Transfer-Encoding: chunkedx\r\n\r\n0\r\n\r\n"),
    refuses("coding-quoted", POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n'),
    refuses("coding-parameter", POST + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n"),
    refuses("coding-comma-before", POST + b"Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-comma-behind", POST + b"Transfer-Encoding: chunked,\r\n\r\n0\r\n\r\n"),
    refuses("coding-empty", POST + b"Transfer-Encoding:\r\n\r\n0\r\n\r\n"),
    refuses("coding-folded", POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-vertical-tab", POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-space-before-colon", POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n"),
    refuses("coding-in-1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    refuses(
        "coding-in-1.0-kept",
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
]

FIELDS = [
    refuses("line-feeds", b"GET / HTTP/1.1\nHost: x\n\n"),
    refuses("line-feed-in-a-field", GET + b"A: b\nC: d\r\n\r\n"),
    refuses("line-feed-at-the-end", GET + b"\n"),
    refuses("carriage-returns", b"GET / HTTP/1.1\rHost: x\r\r"),
    refuses("carriage-return-in-a-value", GET + b"X: a\rb\r\n\r\n"),
    refuses("carriage-return-before-a-field", GET + b"\rX: y\r\n\r\n"),
    refuses("nul-in-a-value", GET + b"X: a\0b\r\n\r\n"),
    refuses("nul-in-a-name", GET + b"X\0: a\r\n\r\n"),
    refuses("control-in-a-value", GET + b"X: a\x01b\r\n\r\n"),
    refuses("del-in-a-value", GET + b"X: a\x7fb\r\n\r\n"),
    refuses("folded", GET + b"X: a\r\n b\r\n\r\n"),
    refuses("folded-first", b"GET / HTTP/1.1\r\n X: a\r\nHost: x\r\n\r\n"),
    refuses("space-before-colon", GET + b"X : a\r\n\r\n"),
    refuses("name-empty", GET + b": a\r\n\r\n"),
    refuses("name-not-ascii", GET + b"X\xe9: a\r\n\r\n"),
    refuses("name-no-token", GET + b"a(b): a\r\n\r\n"),
    refuses("colon-missing", GET + b"Xa\r\n\r\n"),
    serves(
        "name-any-token",
        GET + b"!#$%&'*+-.^_`|~09: a\r\n\r\n",
        replace(ROOT, headers=(HOST, (b"!#$%&'*+-.^_`|~09", b"a"))),
    ),
    serves("value-empty", GET + b"X:\r\nY: \r\n\r\n", replace(ROOT, headers=(HOST, (b"x", b""), (b"y", b"")))),
    serves("value-white-space", GET + b"X: \t a b \t \r\n\r\n", replace(ROOT, headers=(HOST, (b"x", b"a b")))),
    serves(
        "value-not-ascii", GET + b"X: \xc3\xa9 \xff\r\n\r\n", replace(ROOT, headers=(HOST, (b"x", b"\xc3\xa9 \xff")))
    ),
    serves(
        "value-long", GET + b"X: " + b"x" * 60_000 + b"\r\n\r\n", replace(ROOT, headers=(HOST, (b"x", b"x" * 60_000)))
    ),
    refuses("value-too-long", GET + b"X: " + b"x" * 70_000 + b"\r\n\r\n", status=431),
    refuses("value-endless", GET + b"X: " + b"x" * 70_000, status=431),
    serves("fields-many", GET + b"X: y\r\n" * 127 + END, replace(ROOT, headers=(HOST, *[(b"x", b"y")] * 127))),
    refuses("fields-too-many", GET + b"X: y\r\n" * 128 + END, status=431),
    refuses("fields-tiny", GET + b"a:\r\n" * 128 + END, status=431),
    refuses("fields-far-too-many", GET + b"a:\r\n" * 15_900 + END, status=431),
]

TARGET = [
    # llhttp reads white space around the target as "whitespace-delimited word boundaries" (RFC 9112 section 3).
    serves("spaces-around-the-target", b"GET  /  HTTP/1.1\r\nHost: x\r\n\r\n", ROOT),
    refuses("space-in-the-target", target(b"GET /a b")),
    refuses("space-behind-the-version", b"GET / HTTP/1.1 \r\nHost: x\r\n\r\n"),
    refuses("space-before-the-method", b" GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
    refuses("tabs-in-the-request-line", b"GET\t/\tHTTP/1.1\r\nHost: x\r\n\r\n"),
    refuses("target-missing", b"GET HTTP/1.1\r\nHost: x\r\n\r\n"),
    refuses("target-empty", b"GET  HTTP/1.1\r\nHost: x\r\n\r\n"),
    refuses("target-relative", target(b"GET path")),
    refuses("target-query-only", target(b"GET ?a=b")),
    refuses("target-nul", target(b"GET /\0")),
    refuses("target-not-ascii", target(b"GET /\xc3\xa9")),
    refuses("target-too-long", target(b"GET /" + b"x" * 70_000), status=431),
    # The host in the target counts, not the one in the field: RFC 9112 section 3.2.2.
    serves("absolute-form", target(b"GET http://h/a/b?c"), Saw("GET", "/a/b", b"c", headers=((b"host", b"h"),))),
    serves("absolute-form-port", target(b"GET http://h:80/a"), Saw("GET", "/a", headers=((b"host", b"h:80"),))),
    serves("absolute-form-ipv6", target(b"GET http://[::1]:80/"), Saw("GET", "/", headers=((b"host", b"[::1]:80"),))),
    serves("absolute-form-user", target(b"GET http://u:p@h/a"), Saw("GET", "/a", headers=((b"host", b"h"),))),
    serves("absolute-form-no-path", target(b"GET http://h"), Saw("GET", "/", raw_path=b"/")),
    serves("absolute-form-query", target(b"GET http://h?q"), Saw("GET", "/", b"q", raw_path=b"/")),
    serves("absolute-form-other-scheme", target(b"GET foo://h/a"), Saw("GET", "/a")),
    refuses("absolute-form-no-host", target(b"GET http:///a")),
    refuses("absolute-form-bad-port", target(b"GET http://h:x/a")),
    refuses("authority-form", target(b"CONNECT h:443"), status=501),
    refuses("authority-form-get", target(b"GET h:443")),
    serves("asterisk-form", target(b"OPTIONS *"), Saw("OPTIONS", "*", raw_path=b"*")),
    serves("path-encoded-slash", target(b"GET /a%2Fb%20c"), Saw("GET", "/a/b c", raw_path=b"/a%2Fb%20c")),
    serves("path-encoded-nul", target(b"GET /a%00b"), Saw("GET", "/a\0b", raw_path=b"/a%00b")),
    serves("path-encoded-line-end", target(b"GET /a%0D%0Ab"), Saw("GET", "/a\r\nb", raw_path=b"/a%0D%0Ab")),
    serves("path-no-escape", target(b"GET /a%zzb%4"), Saw("GET", "/a%zzb%4", raw_path=b"/a%zzb%4")),
    serves("path-utf-8", target(b"GET /%C3%A9"), Saw("GET", "/é", raw_path=b"/%C3%A9")),
    serves("path-not-utf-8", target(b"GET /%C3%28%ff"), Saw("GET", "/�(�", raw_path=b"/%C3%28%ff")),
    serves("path-encoded-twice", target(b"GET /%2541"), Saw("GET", "/%41", raw_path=b"/%2541")),
    serves("path-double-slashes", target(b"GET //double//slash"), Saw("GET", "//double//slash")),
    serves("path-dots", target(b"GET /a/../b/./%2e%2e/c"), Saw("GET", "/a/../b/./../c")),
    serves("path-odd-characters", target(b'GET /a\\b"<>{}|^`'), Saw("GET", '/a\\b"<>{}|^`')),
    serves("query-empty", target(b"GET /?"), Saw("GET", "/", raw_path=b"/")),
    serves("query-raw", target(b"GET /?a=%zz&b=%00+%C3%A9?c"), Saw("GET", "/", b"a=%zz&b=%00+%C3%A9?c")),
    serves("fragment", target(b"GET /a?b#c?d"), Saw("GET", "/a", b"b", raw_path=b"/a")),
]

HOSTS = [
    refuses("host-missing", b"GET / HTTP/1.1\r\n\r\n"),
    refuses("host-twice", GET + b"Host: x\r\n\r\n"),
    refuses("host-twice-different", GET + b"Host: y\r\n\r\n"),
    refuses("host-twice-in-1.0", b"GET / HTTP/1.0\r\nHost: x\r\nHost: x\r\n\r\n"),
    refuses("host-with-a-space", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n"),
    refuses("host-with-a-path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n"),
    refuses("host-with-a-user", b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n"),
    refuses("host-with-a-bad-port", b"GET / HTTP/1.1\r\nHost: a:b\r\n\r\n"),
    refuses("host-list", b"GET / HTTP/1.1\r\nHost: a, b\r\nX: y\r\n\r\n"),
    refuses("host-not-ascii", b"GET / HTTP/1.1\r\nHost: \xc3\xa9\r\n\r\n"),
    refuses("host-missing-in-absolute-form", b"GET http://h/ HTTP/1.1\r\n\r\n"),
    serves("host-empty", b"GET / HTTP/1.1\r\nHost:\r\n\r\n", replace(ROOT, headers=((b"host", b""),))),
    serves("host-ipv6", b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", replace(ROOT, headers=((b"host", b"[::1]:80"),))),
    serves("host-any", b"GET / HTTP/1.1\r\nHost: A_b-1.%20~x:\r\n\r\n", ROOT),
]

VERSIONS = [
    ends("1.0", b"GET / HTTP/1.0\r\n\r\n", Saw("GET", "/", version="1.0")),
    ends("1.0-body", b"POST / HTTP/1.0\r\nContent-Length: 2\r\n\r\nhi", posted(b"hi", version="1.0")),
    ends("1.0-body-without-length", b"POST / HTTP/1.0\r\n\r\nhi", posted(b"", version="1.0")),
    serves("1.0-keep-alive", b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", Saw("GET", "/", version="1.0")),
    serves(
        "1.0-keep-alive-body",
        b"POST / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nhi",
        posted(b"hi", version="1.0"),
    ),
    waits("0.9", b"GET /\r\n"),
    refuses("0.9-empty-line", b"GET /\r\n\r\n", status=505),
    refuses("0.9-said", b"GET / HTTP/0.9\r\nHost: x\r\n\r\n", status=505),
    refuses("2.0", b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", status=505),
    refuses("2.0-preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    refuses("1.2", b"GET / HTTP/1.2\r\nHost: x\r\n\r\n"),
    refuses("1.10", b"GET / HTTP/1.10\r\nHost: x\r\n\r\n"),
    refuses("1.", b"GET / HTTP/1.\r\nHost: x\r\n\r\n"),
    refuses("11.1", b"GET / HTTP/11.1\r\nHost: x\r\n\r\n"),
    refuses("version-lower-case", b"GET / http/1.1\r\nHost: x\r\n\r\n"),
    refuses("version-misspelt", b"GET / HTTQ/1.1\r\nHost: x\r\n\r\n"),
    # llhttp takes it for 1.0, without a way to tell: it is answered in HTTP, and closed.
    ends("rtsp", b"GET / RTSP/1.0\r\n\r\n", Saw("GET", "/", version="1.0")),
]

METHODS = [
    refuses("method-unknown", target(b"FOO /")),
    refuses("method-lower-case", target(b"get /")),
    refuses("method-of-rtsp", target(b"DESCRIBE /")),
    serves("method-rare", target(b"M-SEARCH /"), Saw("M-SEARCH", "/")),
    serves("method-of-webdav", target(b"PROPFIND /"), Saw("PROPFIND", "/")),
    serves("head", target(b"HEAD /"), Saw("HEAD", "/")),
    serves(
        "head-with-a-body", b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi", Saw("HEAD", "/", body=b"hi")
    ),
]

EXPECT = [
    serves("continue-not-waited-for", POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\nhi", posted(b"hi")),
    serves("continue-without-a-body", GET + b"Expect: 100-continue\r\n\r\n", ROOT),
    waits("continue-waited-for", POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n", CUT),
    ends(
        "continue-in-1.0",
        b"POST / HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
        posted(b"hi", version="1.0"),
    ),
    # It may be answered with 417 (RFC 9110 section 10.1.1); it need not, and no client is helped by that.
    serves("expectation-unknown", POST + b"Expect: 200-ok\r\nContent-Length: 2\r\n\r\nhi", posted(b"hi")),
]

UPGRADES = [
    serves("upgrade-unknown", GET + b"Connection: upgrade\r\nUpgrade: foo\r\n\r\n", ROOT),
    serves("upgrade-without-connection", GET + b"Upgrade: foo\r\n\r\n", ROOT),
    serves(
        "upgrade-body",
        POST + b"Connection: upgrade\r\nUpgrade: foo\r\nContent-Length: 2\r\n\r\nhi" + GET + END,
        posted(b"hi"),
        ROOT,
    ),
    serves(
        "upgrade-body-begins-with-an-empty-line",
        POST + b"Connection: upgrade\r\nUpgrade: foo\r\nContent-Length: 4\r\n\r\n\r\nhi" + GET + END,
        posted(b"\r\nhi"),
        ROOT,
    ),
    serves(
        "upgrade-chunked",
        POST + b"Connection: upgrade\r\nUpgrade: foo\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        posted(b"hi"),
    ),
    serves(
        "upgrade-h2c",
        GET + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n\r\n",
        ROOT,
    ),
    ends("upgrade-and-close", GET + b"Connection: upgrade, close\r\nUpgrade: foo\r\n\r\n" + target(b"GET /b"), ROOT),
    refuses(
        "upgrade-bad-chunk",
        POST + b"Connection: upgrade\r\nUpgrade: f\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        CUT,
    ),
    refuses(
        "upgrade-before-a-refused-one",
        GET + b"Connection: upgrade\r\nUpgrade: f\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n",
        ROOT,
    ),
    refuses(
        "upgrade-length-and-chunked",
        POST + b"Connection: upgrade\r\nUpgrade: f\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
]

NOISE = [
    serves("empty-lines-before", b"\r\n\r\n\r\n" + GET + END, ROOT),
    serves("empty-lines-between", GET + END + b"\r\n\r\n" + GET + END, ROOT, ROOT),
    # Alone they are no empty lines, but no harm either: nothing was before them that could be split.
    serves("line-feeds-before", b"\n\n" + GET + END, ROOT),
    serves("carriage-return-before", b"\r" + GET + END, ROOT),
    waits("only-empty-lines", b"\r\n\r\n"),
    waits("half-a-head", GET[:-4]),
    refuses("tls-client-hello", bytes.fromhex("16030100c8010000c40303") + bytes(range(32))),
    refuses("garbage", bytes(range(1, 256))),
    refuses("words", b"hello\r\n\r\n"),
    refuses("answer", b"HTTP/1.1 200 OK\r\n\r\n"),
]

SECTIONS: Final[dict[str, list[Edge]]] = {
    "pipelining": PIPELINING,
    "chunks": CHUNKS,
    "content-length": CONTENT_LENGTH,
    "transfer-encoding": TRANSFER_ENCODING,
    "fields": FIELDS,
    "target": TARGET,
    "hosts": HOSTS,
    "versions": VERSIONS,
    "methods": METHODS,
    "expect": EXPECT,
    "upgrades": UPGRADES,
    "noise": NOISE,
}
EDGES: Final[list[Edge]] = [edge for section in SECTIONS.values() for edge in section]
