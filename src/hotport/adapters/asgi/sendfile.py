"""A file as (part of) an answer, without its bytes passing through this process where the kernel allows it."""

from __future__ import annotations

import asyncio
import os
from io import FileIO
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hotport.adapters.asgi.http import HttpConnection

__all__ = ["send_file"]

#: Sent in one turn of the event loop; others want theirs.
CHUNK_BYTES: Final = 256 * 1024


async def send_file(connection: HttpConnection, file: FileIO, size: int) -> None:
    """Send the first `size` bytes of `file` behind everything that was written; return early if the client leaves.

    ``loop.sendfile`` is not used: uvloop has none.

    Raises:
        RuntimeError: The file has become shorter meanwhile.

    Descriptors: borrows `file`. Cancellation: safe; an unknown part has been sent.
    Sources: sendfile(2).
    """
    sock = connection.transport.get_extra_info("socket")
    if sock is None or connection.is_tls:
        await _copy(connection, file, size)
        return
    await connection.flush()
    if connection.is_closed:
        return
    fd = os.dup(sock.fileno())  # the event loop guards the transport's own
    try:
        offset = 0
        while offset < size:
            try:
                sent = os.sendfile(fd, file.fileno(), offset, min(CHUNK_BYTES, size - offset))
            except BlockingIOError:
                await _wait_writable(fd)
                continue
            except OSError:  # the client has left; the transport learns it by itself
                return
            if not sent:
                raise RuntimeError(f"{file.name} has become shorter while it was sent")
            offset += sent
            await asyncio.sleep(0)
    finally:
        os.close(fd)


async def _copy(connection: HttpConnection, file: FileIO, size: int) -> None:
    while size and not connection.is_closed:
        data = file.read(min(CHUNK_BYTES, size))
        if not data:
            raise RuntimeError(f"{file.name} has become shorter while it was sent")
        size -= len(data)
        connection.transport.write(data)
        await connection.flush()


async def _wait_writable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    writable = loop.create_future()

    def on_writable() -> None:
        if not writable.done():
            writable.set_result(None)

    loop.add_writer(fd, on_writable)
    try:
        await writable
    finally:
        loop.remove_writer(fd)
