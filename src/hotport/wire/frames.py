"""Frames: where one control message ends on a stream. Four bytes of length, big endian, then the payload."""

from __future__ import annotations

from typing import Final

from hotport.errors import ControlError

__all__ = ["FRAME_BYTES_MAX", "FrameDecoder", "FrameError", "encode_frame"]

FRAME_BYTES_MAX: Final = 1 << 20
"""The longest payload, in bytes, that either side sends or believes."""

_HEADER_BYTES: Final = 4


class FrameError(ControlError):
    """A frame is too long to read (HP610) or to send (HP612)."""


def encode_frame(payload: bytes, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> bytes:
    """Encode one frame that carries `payload`.

    Raises:
        FrameError: If it is longer than `frame_bytes_max`, so that no peer would take it (HP612).
    """
    if len(payload) > frame_bytes_max:
        raise FrameError(
            "HP612",
            f"cannot send a control message of {len(payload)} bytes",
            cause=f"a frame carries at most {frame_bytes_max} bytes",
            note="ask for less at a time",
        )
    return len(payload).to_bytes(_HEADER_BYTES, "big") + payload


class FrameDecoder:
    """Cuts received bytes into payloads; holds at most one unfinished frame."""

    __slots__ = ("_buffer", "_frame_bytes_max")

    def __init__(self, frame_bytes_max: int = FRAME_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._frame_bytes_max = frame_bytes_max

    def feed(self, data: bytes) -> list[bytes]:
        """Take received bytes and return the payloads that are complete now.

        Raises:
            FrameError: If a header announces more than ``frame_bytes_max``; known from four bytes, before any
                payload is kept (HP610). The stream cannot be read on: close it.
        """
        buffer = self._buffer
        buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(buffer) - start >= _HEADER_BYTES:
            begin = start + _HEADER_BYTES
            length = int.from_bytes(buffer[start:begin], "big")
            if length > self._frame_bytes_max:
                del buffer[:start], buffer[_HEADER_BYTES:]  # every later feed() fails too, and keeps nothing
                raise FrameError(
                    "HP610",
                    f"cannot read a control message of {length} bytes",
                    cause=f"a frame carries at most {self._frame_bytes_max} bytes; is the peer hotport?",
                    fix="hotport status",
                )
            if len(buffer) - begin < length:
                break
            start = begin + length
            payloads.append(bytes(buffer[begin:start]))
        del buffer[:start]
        return payloads

    @property
    def missing_bytes(self) -> int:
        """How many bytes the next payload still lacks, as far as is known: first those of its header."""
        if len(self._buffer) < _HEADER_BYTES:
            return _HEADER_BYTES - len(self._buffer)
        return _HEADER_BYTES + int.from_bytes(self._buffer[:_HEADER_BYTES], "big") - len(self._buffer)
