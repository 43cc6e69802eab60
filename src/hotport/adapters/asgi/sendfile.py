"""Send a file as an answer's body, with sendfile(2) where possible."""

from __future__ import annotations

import asyncio
import os
from io import FileIO
from typing import Final, Protocol

__all__ = ["Sink", "send_file"]

#: Bytes sent in one turn of the event loop.
CHUNK_BYTES: Final = 256 * 1024


class Sink(Protocol):
    """The interface that `send_file` needs of the connection."""

    transport: asyncio.Transport
    is_closed: bool

    @property
    def is_tls(self) -> bool:
        """Whether bytes that are written go through a cipher."""

    async def flush(self) -> None:
        """Wait until everything that was written is in the kernel, or the client has left."""


class Answer(Protocol):
    """The interface that `send_file` needs of the answer whose body the file is."""

    sent: int
    is_gone: bool

    async def wait_writable(self, fd: int) -> None:
        """Wait until the descriptor is writable, or the answer has no reader any more."""


async def send_file(connection: Sink, answer: Answer, file: FileIO, size: int) -> bool:
    """Send the first `size` bytes of `file` behind everything that was written; False if the client has left.

    ``loop.sendfile`` is not used: uvloop has none.

    Raises:
        OSError: The file cannot be read, or has become shorter.

    Descriptors: borrows `file`. Cancellation: safe; an unknown part was sent.
    Sources: sendfile(2).
    """
    sock = connection.transport.get_extra_info("socket")
    if sock is None or connection.is_tls:
        return await _copy(connection, answer, file, size)
    await connection.flush()
    if answer.is_gone:
        return False
    fd = os.dup(sock.fileno())  # the event loop guards the transport's own
    try:
        while answer.sent < size:
            try:
                sent = os.sendfile(fd, file.fileno(), answer.sent, min(CHUNK_BYTES, size - answer.sent))
            except BlockingIOError:
                await answer.wait_writable(fd)
            except (ConnectionError, TimeoutError):
                return False
            else:
                if not sent:
                    raise OSError(f"{file.name!r} has become shorter while it was sent")
                answer.sent += sent
                await asyncio.sleep(0)
            if connection.is_closed or answer.is_gone:
                return False
    finally:
        os.close(fd)
    return True


async def _copy(connection: Sink, answer: Answer, file: FileIO, size: int) -> bool:
    while answer.sent < size:
        data = file.read(min(CHUNK_BYTES, size - answer.sent))
        if not data:
            raise OSError(f"{file.name!r} has become shorter while it was sent")
        connection.transport.write(data)
        answer.sent += len(data)
        await connection.flush()
        if answer.is_gone:
            return False
    return True
