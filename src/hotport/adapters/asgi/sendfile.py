"""A file as an answer's body, without its bytes passing through this process where the kernel allows it."""

from __future__ import annotations

import asyncio
import os
from io import FileIO
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from hotport.adapters.asgi.exchange import Exchange
    from hotport.adapters.asgi.http import HttpConnection

__all__ = ["send_file"]

#: Sent in one turn of the event loop; others want theirs.
CHUNK_BYTES: Final = 256 * 1024


async def send_file(exchange: Exchange, file: FileIO, size: int) -> bool:
    """Send the first `size` bytes of `file` behind everything that was written; False if the client has left meanwhile.

    ``loop.sendfile`` is not used: uvloop has none.

    Raises:
        OSError: The file cannot be read, or has become shorter.

    Descriptors: borrows `file`. Cancellation: safe; an unknown part has been sent.
    Sources: sendfile(2).
    """
    connection = cast("HttpConnection", exchange.connection)  # a WebSocket's denial has no files
    sock = connection.transport.get_extra_info("socket")
    if sock is None or connection.is_tls:
        return await _copy(exchange, connection, file, size)
    await connection.flush()
    if exchange.is_gone:
        return False
    fd = os.dup(sock.fileno())  # the event loop guards the transport's own
    try:
        while exchange.sent < size:
            try:
                sent = os.sendfile(fd, file.fileno(), exchange.sent, min(CHUNK_BYTES, size - exchange.sent))
            except BlockingIOError:
                await exchange.wait_writable(fd)
            except (ConnectionError, TimeoutError):
                return False
            else:
                if not sent:
                    raise OSError(f"{file.name!r} has become shorter while it was sent")
                exchange.sent += sent
                await asyncio.sleep(0)
            if connection.is_closed or exchange.is_gone:
                return False
    finally:
        os.close(fd)
    return True


async def _copy(exchange: Exchange, connection: HttpConnection, file: FileIO, size: int) -> bool:
    while exchange.sent < size:
        data = file.read(min(CHUNK_BYTES, size - exchange.sent))
        if not data:
            raise OSError(f"{file.name!r} has become shorter while it was sent")
        connection.transport.write(data)
        exchange.sent += len(data)
        await connection.flush()
        if exchange.is_gone:
            return False
    return True
