"""Probe a worker's own application with one HTTP request over a socket pair."""

from __future__ import annotations

import asyncio
import re
import socket
from typing import Final

from hotport.adapters.base import Adapter, Connections
from hotport.worker.acceptor import PlainSocket, attach

__all__ = ["probe"]

PIECE_BYTES: Final = 65536

REQUEST: Final = b"GET %b HTTP/1.1\r\nHost: localhost\r\nUser-Agent: hotport\r\nConnection: close\r\n\r\n"

#: Skips interim answers, each of which has its own head (RFC 9110 section 15.2).
STATUS: Final = re.compile(rb"(?:HTTP/1\.[01] 1\d\d[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n)*HTTP/1\.[01] ([2-9]\d\d)[ \r]")


async def probe(adapter: Adapter, connections: Connections, path: str, timeout_s: float) -> str:
    """Request `path` from the application, and read the whole answer.

    The request comes over a socket pair, not over a listener: no other process that shares the port can answer it, and
    neither TLS nor a PROXY header is needed.

    Returns:
        The reason of the failure; empty if the status is 2xx or 3xx.
    """
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        theirs.setblocking(False)
        accepted = PlainSocket(theirs.family, theirs.type, theirs.proto, fileno=theirs.detach())
        protocol = adapter.connection()
        protocol.sock = accepted  # type: ignore[attr-defined]
        connections.count_own(protocol)  # type: ignore[arg-type]
        attach(loop, accepted, protocol, connections)
        begin = b""
        try:
            async with asyncio.timeout(timeout_s):
                await loop.sock_sendall(ours, REQUEST % path.encode())
                while data := await loop.sock_recv(ours, PIECE_BYTES):
                    if len(begin) < PIECE_BYTES:
                        begin += data
        except TimeoutError:
            return f"did not answer GET {path} within {timeout_s:g} s"
        except OSError as error:
            return f"broke off its answer to GET {path}: {error}"
    found = STATUS.match(begin)
    if found is None:
        return f"did not answer GET {path} with HTTP"
    return "" if found[1] < b"400" else f"answered GET {path} with {found[1].decode()}"
