"""Read answers: where one ends, and whether its connection is kept; bodies are counted, not stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

__all__ = ["AnswerError", "AnswerReader", "HttpReader", "LineReader"]

HEAD_BYTES_MAX: Final = 65536

#: Heads of one server differ in little but the date: most need not be read again.
_HEADS_KEPT: Final = 256

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n]*)?")
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_CHUNK: Final = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?", re.DOTALL)


class AnswerError(ValueError):
    """The received bytes are not an answer."""


class AnswerReader(Protocol):
    """Reads the answers of one connection, one at a time.

    Attributes:
        status: Of the answer; 0 before it, and where there is none.
        who: What the generation header said.
        has_begun: A byte of the answer was there.
        keeps_open: After a whole answer: the connection can carry another request.
    """

    status: int
    who: str
    has_begun: bool
    keeps_open: bool

    def start(self) -> None:
        """Expect the next answer."""

    def feed(self, data: bytes) -> bool:
        """Whether the answer is whole; raises `AnswerError`."""

    def end(self) -> bool:
        """Whether the answer is whole now that the connection has ended."""


class LineReader:
    """An answer is one line."""

    __slots__ = ("has_begun", "keeps_open", "status", "who")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.status = 0
        self.who = ""
        self.has_begun = False
        self.keeps_open = True

    def feed(self, data: bytes) -> bool:
        self.has_begun = True
        return b"\n" in data

    def end(self) -> bool:
        return False


class _Head(NamedTuple):
    """The parsed head of an answer; for an interim one, the status only.

    Attributes:
        body_bytes: None if the connection's end is the body's.
    """

    status: int
    who: str = ""
    keeps_open: bool = False
    is_chunked: bool = False
    body_bytes: int | None = 0


@lru_cache(_HEADS_KEPT)
def _read_head(head: bytes, generation_header: bytes) -> _Head:
    first, *lines = head.split(b"\r\n")
    match = _STATUS_LINE.fullmatch(first)
    if match is None:
        raise AnswerError("no HTTP answer")
    status, is_http11 = int(match[2]), match[1] == b"1"
    if status < 200 and status != 101:
        return _Head(status)
    who, coding, keeps_open = "", b"", is_http11
    length: bytes | None = None
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            raise AnswerError("a header line without a colon")
        name = name.lower()
        if name == b"content-length":
            value = value.strip()
            if length not in (None, value) or not _LENGTH.fullmatch(value):
                raise AnswerError("a Content-Length that is none")
            length = value
        elif name == b"transfer-encoding":
            coding = value.rpartition(b",")[2].strip().lower()
        elif name == b"connection":
            tokens = {token.strip().lower() for token in value.split(b",")}
            keeps_open = b"close" not in tokens and (is_http11 or b"keep-alive" in tokens)
        elif name == generation_header:
            who = value.strip().decode("latin-1")
    if status in (101, 204, 304):
        return _Head(status, who, keeps_open)
    if coding == b"chunked":
        return _Head(status, who, keeps_open, is_chunked=True)
    if coding or length is None:
        return _Head(status, who, body_bytes=None)
    return _Head(status, who, keeps_open, body_bytes=int(length))


class HttpReader:
    """HTTP/1.x answers to GET and POST (RFC 9112, 6.3): interim ones are skipped.

    Args:
        generation_header: Lower case.
    """

    __slots__ = ("_buffer", "_header", "_is_chunked", "_left", "_part", "has_begun", "keeps_open", "status", "who")

    def __init__(self, generation_header: bytes = b"") -> None:
        self._header = generation_header
        self.start()

    def start(self) -> None:
        self.status = 0
        self.who = ""
        self.has_begun = False
        self.keeps_open = False
        self._buffer = b""
        self._left = 0
        self._is_chunked = False
        #: No bound method, which would make a cycle.
        self._part: Callable[[HttpReader], bool | None] = HttpReader._read_head

    def feed(self, data: bytes) -> bool:
        self.has_begun = True
        self._buffer = self._buffer + data if self._buffer else data
        while (is_whole := self._part(self)) is None:
            pass
        if is_whole and self._buffer:
            self.keeps_open = False  # bytes that nobody has asked for
        return is_whole

    def end(self) -> bool:
        return self._part is HttpReader._read_to_end

    # Each part: True when the answer is whole, False if bytes are wanting, None to go on with the next part.

    def _read_head(self) -> bool | None:
        buffer = self._buffer
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(buffer) > HEAD_BYTES_MAX or not b"HTTP/1.".startswith(buffer[:7]):
                raise AnswerError("no HTTP answer")
            return False
        head = _read_head(buffer[:end], self._header)
        self._buffer = buffer[end + 4 :]
        self.status, self.who, self.keeps_open, self._is_chunked, body_bytes = head
        if self.status < 200 and self.status != 101:
            self.has_begun = bool(self._buffer)
            return None if self._buffer else False
        if self._is_chunked:
            self._part = HttpReader._read_chunk_size
        elif body_bytes is None:
            self._part = HttpReader._read_to_end
        elif body_bytes == len(self._buffer):  # as nearly always
            self._buffer = b""
            return True
        else:
            self._left = body_bytes
            self._part = HttpReader._read_body
        return None

    def _read_body(self) -> bool | None:
        taken = min(self._left, len(self._buffer))
        self._left -= taken
        self._buffer = self._buffer[taken:]
        if self._left:
            return False
        if not self._is_chunked:
            return True
        self._part = HttpReader._read_chunk_end
        return None

    def _read_to_end(self) -> bool | None:
        self._buffer = b""
        return False

    def _line(self) -> bytes | None:
        line, found, rest = self._buffer.partition(b"\r\n")
        if not found:
            if len(line) > HEAD_BYTES_MAX:
                raise AnswerError("a line without end")
            return None
        self._buffer = rest
        return line

    def _read_chunk_size(self) -> bool | None:
        line = self._line()
        if line is None:
            return False
        match = _CHUNK.fullmatch(line)
        if match is None:
            raise AnswerError("a chunk without size")
        self._left = int(match[1], 16)
        self._part = HttpReader._read_body if self._left else HttpReader._read_trailer
        return None

    def _read_chunk_end(self) -> bool | None:
        line = self._line()
        if line is None:
            return False
        if line:
            raise AnswerError("a chunk longer than its size")
        self._part = HttpReader._read_chunk_size
        return None

    def _read_trailer(self) -> bool | None:
        line = self._line()
        if line is None:
            return False
        return None if line else True
