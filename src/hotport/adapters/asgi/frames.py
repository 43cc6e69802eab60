"""Cuts what a WebSocket's client sends into frames that cost little each, and joins what comes of them.

The websockets library reads whole frames: it holds a frame of 16 MiB until its last byte has come, and inflates all of
it at once. So it gets none that are long. A long frame is fed to it as several short ones, as if the client had cut the
message there: a fragmented message means the same as a whole one (RFC 6455 section 5.4), and a compressed one is
compressed before it is cut (RFC 7692 section 6.1).

Sources: RFC 6455 section 5.2, the head of a frame; 5.3, a mask repeats every four bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from io import BytesIO, StringIO
from typing import Final

__all__ = ["Assembly", "Cutter", "Violation"]

#: So much of a frame is waited for before a part of it is read; a shorter one is read whole.
PART_BYTES_MIN: Final = 4096

#: Of a compressed message, how much is read at once: as much as is likely to become `INFLATED_BYTES`, within bounds,
#: by what has become of the part before it. Deflate makes at most 1032 bytes of one.
COMPRESSED_BYTES_FIRST: Final = 512
COMPRESSED_BYTES_MIN: Final = 128
COMPRESSED_BYTES_MAX: Final = 4096
INFLATED_BYTES: Final = 128 * 1024

CONTROL_BYTES_MAX: Final = 125

_FIN: Final = 0x80
_RSV1: Final = 0x40
_RESERVED: Final = 0x70
_OPCODE: Final = 0x0F
_CONTROL: Final = 0x08
_MASKED: Final = 0x80


class Violation(Exception):
    """A frame that is refused by what its head says.

    Attributes:
        code: With what the WebSocket is closed.
        reason: What its client is told.
    """

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class Cutter:
    """The bytes of one client that have not been read, and where in a frame they begin.

    Args:
        message_bytes_max: The longest message.
    """

    __slots__ = ("_first", "_mask", "_message_bytes_max", "_part_bytes", "is_compressed", "left", "place", "rest")

    def __init__(self, message_bytes_max: int) -> None:
        self._message_bytes_max = message_bytes_max
        #: What has come and not been read, from `place` on; without a frame's head that was read.
        self.rest = b""
        self.place = 0
        #: Of the frame that is fed in parts: how much is missing, the first byte of the next part, and its mask.
        self.left = 0
        self._first = 0
        self._mask = b""
        self.is_compressed = False
        self._part_bytes = COMPRESSED_BYTES_FIRST

    @property
    def is_between_frames(self) -> bool:
        """No part of a frame has come that was not read, and the last one was read whole."""
        return not self.rest and not self.left

    def add(self, data: bytes) -> None:
        """More has come."""
        self.rest = self.rest[self.place :] + data if self.rest else data
        self.place = 0

    def settle(self) -> None:
        """Drop what was read, unless what is left is the larger part of it."""
        if self.place > len(self.rest) // 2:
            self.rest = self.rest[self.place :]
            self.place = 0

    def clear(self) -> None:
        """Forget everything: nothing will be read any more."""
        self.rest, self.place, self.left = b"", 0, 0

    def next(self, size: int) -> bytes | None:
        """The next frame for the library, a short one; None if more has to come first.

        What the library will refuse as soon as it has read that much is returned up to there.

        Args:
            size: Of the message that has come in part, in bytes; 0 between two messages.

        Raises:
            Violation: Of something that the library would only refuse when all of it has come.
        """
        if self.left:
            return self._part()
        rest, begin = self.rest, self.place
        available = len(rest) - begin
        if available < 2:
            return None
        first, second = rest[begin], rest[begin + 1]
        opcode = first & _OPCODE
        length = second & ~_MASKED
        if not second & _MASKED or (2 < opcode < _CONTROL) or opcode > 10:
            self.place = begin + 2
            return rest[begin : begin + 2]
        head = 6
        if length > CONTROL_BYTES_MAX:
            if opcode & _CONTROL:
                raise Violation(1002, "control frame too long")
            head = 8 if length == 126 else 14
            if available < head:
                return None
            length = int.from_bytes(rest[begin + 2 : begin + head - 4], "big")
        if not opcode & _CONTROL:
            if opcode:
                self.is_compressed = bool(first & _RSV1)
                self._part_bytes = COMPRESSED_BYTES_FIRST
            most = self._message_bytes_max
            if length > (most if self.is_compressed else most - size):
                raise Violation(1009, f"a message of more than {most} bytes")
        end = begin + head + length
        if length <= (self._part_bytes if self.is_compressed else PART_BYTES_MIN) or (
            not self.is_compressed and end <= len(rest)
        ):
            if end > len(rest):
                return None
            self.place = end
            return rest[begin:end]
        if available < head:
            return None
        self.place = begin + head
        self.left, self._first, self._mask = length, first, rest[begin + head - 4 : begin + head]
        return self._part()

    def inflated(self, read: int, became: int) -> None:
        """Learn from what so many bytes of a compressed message have become how many to read next."""
        likely = read * INFLATED_BYTES // max(became, 1)
        self._part_bytes = min(max(likely, COMPRESSED_BYTES_MIN), COMPRESSED_BYTES_MAX)

    def _part(self) -> bytes | None:
        """The next part of a long frame, as a frame."""
        begin, left, first = self.place, self.left, self._first
        available = len(self.rest) - begin
        if self.is_compressed:
            length = min(left, self._part_bytes)
            if available < length:
                return None
        else:
            length = min(left, available)
            if length < left and length < PART_BYTES_MIN:
                return None
        if length < left:
            length &= ~3  # so that the mask begins again
            self._first = first & ~(_OPCODE | _RESERVED)
            first &= ~_FIN
        end = begin + length
        part = self.rest[begin:end]
        self.place, self.left = end, left - length
        if length <= CONTROL_BYTES_MAX:
            size = bytes((_MASKED | length,))
        elif length < 1 << 16:
            size = b"\xfe" + length.to_bytes(2, "big")
        else:
            size = b"\xff" + length.to_bytes(8, "big")
        return b"%c%b%b%b" % (first, size, self._mask, part)


class Assembly:
    """A message that has come in part. How many parts it had costs nothing.

    Args:
        is_text: It is UTF-8, and is decoded as it comes.
    """

    __slots__ = ("_buffer", "_decode", "size")

    def __init__(self, *, is_text: bool) -> None:
        #: What has come, in bytes.
        self.size = 0
        self._buffer: BytesIO | StringIO = StringIO() if is_text else BytesIO()
        self._decode: Callable[[bytes, bool], str] | None = None
        if is_text:
            self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def add(self, data: bytes | bytearray | memoryview, *, is_last: bool) -> None:
        """One more part.

        Raises:
            UnicodeDecodeError: It is no UTF-8, or ends in the middle of a character.
        """
        self.size += len(data)
        self._buffer.write(data if self._decode is None else self._decode(data, is_last))  # type: ignore[arg-type]

    def content(self) -> str | bytes:
        """All of it; not copied."""
        return self._buffer.getvalue()
