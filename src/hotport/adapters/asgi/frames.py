"""Cut a WebSocket client's long frames into short ones, and join their content again.

The websockets library reads whole frames: it buffers a frame of 16 MiB until its last byte has come, and inflates all
of it at once. So a long frame is fed to it as several short ones, as if the client had fragmented the message there: a
fragmented message means the same as a whole one (RFC 6455 section 5.4), and a compressed one is compressed before it is
fragmented (RFC 7692 section 6.1).

Sources: RFC 6455 section 5.2, the head of a frame; 5.3, a mask repeats every four bytes.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from io import BytesIO, StringIO
from typing import Final

__all__ = ["Assembly", "Cutter", "Violation"]

#: Bytes of a long frame that must have come before a part of it is read; a shorter frame is read whole.
PART_BYTES_MIN: Final = 4096

#: Bytes of a compressed message that are read at once: within these bounds, as many as will probably inflate to
#: `INFLATED_BYTES`, by the ratio of the part before. Deflate makes at most 1032 bytes of one.
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
    """A frame whose head is refused.

    Attributes:
        code: The close code.
        reason: The close reason.
    """

    def __init__(self, code: int, reason: str) -> None:
        self.code = code
        self.reason = reason


class Cutter:
    """The unread bytes of one client, and the position in the current frame.

    Args:
        message_bytes_max: The longest message.
    """

    __slots__ = ("_first", "_mask", "_message_bytes_max", "_part_bytes", "is_compressed", "left", "place", "rest")

    def __init__(self, message_bytes_max: int) -> None:
        self._message_bytes_max = message_bytes_max
        #: Bytes of which those from `place` on are unread; a frame's head that was read is not among these.
        self.rest = b""
        self.place = 0
        #: Of the frame that is fed in parts: its remaining bytes, the first byte of the next part, and the mask.
        self.left = 0
        self._first = 0
        self._mask = b""
        self.is_compressed = False
        self._part_bytes = COMPRESSED_BYTES_FIRST

    @property
    def is_between_frames(self) -> bool:
        """Whether all bytes are read, and the last frame was read whole."""
        return not self.rest and not self.left

    def add(self, data: bytes) -> None:
        """Add received bytes."""
        self.rest = self.rest[self.place :] + data if self.rest else data
        self.place = 0

    def settle(self) -> None:
        """Drop the bytes already read, unless more than half of the buffer is unread."""
        if self.place > len(self.rest) // 2:
            self.rest = self.rest[self.place :]
            self.place = 0

    def clear(self) -> None:
        """Drop all bytes: nothing more will be read."""
        self.rest, self.place, self.left = b"", 0, 0

    def next(self, size: int) -> bytes | None:
        """Return the next short frame for the library; None if more bytes must come first.

        A frame that the library refuses after its first two bytes is returned up to there.

        Args:
            size: The bytes of the incomplete message so far; 0 between two messages.

        Raises:
            Violation: The library would refuse the frame, but only after receiving all of it.
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
        """Adapt the size of the next part: `read` bytes of a compressed message inflated to `became`."""
        likely = read * INFLATED_BYTES // max(became, 1)
        self._part_bytes = min(max(likely, COMPRESSED_BYTES_MIN), COMPRESSED_BYTES_MAX)

    def _part(self) -> bytes | None:
        """Return the next part of a long frame, as a frame."""
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
            length &= ~3  # so that the mask starts at its first byte
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
    """An incomplete message; its cost does not depend on the number of parts.

    Args:
        is_text: Whether to decode it as UTF-8 as it comes.
    """

    __slots__ = ("_buffer", "_decode", "size")

    def __init__(self, *, is_text: bool) -> None:
        #: Bytes received.
        self.size = 0
        self._buffer: BytesIO | StringIO = StringIO() if is_text else BytesIO()
        self._decode: Callable[[bytes, bool], str] | None = None
        if is_text:
            self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def add(self, data: bytes | bytearray | memoryview, *, is_last: bool) -> None:
        """Add a part.

        Raises:
            UnicodeDecodeError: It is not UTF-8, or ends in the middle of a character.
        """
        self.size += len(data)
        self._buffer.write(data if self._decode is None else self._decode(data, is_last))  # type: ignore[arg-type]

    def content(self) -> str | bytes:
        """Return the whole message, without a copy."""
        return self._buffer.getvalue()
