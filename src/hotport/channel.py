"""Conversations between processes of one service: messages in frames, and descriptors, over a unix socket.

A channel has no timeout of its own: the caller bounds each wait with one of the event loop.

Sources: unix(7), SCM_RIGHTS and SO_PEERCRED.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from hotport.kernel.abstract import sockaddr
from hotport.kernel.fork import withhold
from hotport.kernel.scm import DESCRIPTORS_MAX, receive_descriptors, send_descriptors
from hotport.kernel.sockets import check_peer, peer_credentials
from hotport.wire.envelope import HEADER_BYTES, Frame, parse_header
from hotport.wire.frames import FRAME_BYTES_MAX, FrameDecoder, encode_frame
from hotport.wire.messages import Reply, Word, decode, encode, user_of_socket

__all__ = ["Channel", "DescriptorsLostError", "exchange"]

#: How much of a frame is read at once.
PIECE_BYTES: Final = 256 * 1024


class DescriptorsLostError(OSError):
    """This process has no room for all descriptors of a message; the sender has all of them still."""


class Channel:
    """One end of a conversation.

    It may outlive an event loop, and be used in another one.

    Args:
        sock: Connected, of the unix family.

    Attributes:
        has_lost: Some of the descriptors of the last frame could not be installed here.

    Descriptors: owns `sock`, and those that have come and were not returned yet.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.has_lost = False
        self._sock = sock
        self._descriptors: list[int] = []
        withhold(self)

    @classmethod
    def connect(cls, path: str) -> Channel:
        """Connect to a process of this user that listens at a path, or at ``@name``.

        A socket in the directory of another user's workers must be that user's.

        Raises:
            OSError: None listens there (FileNotFoundError, ConnectionRefusedError), it accepts nothing
                (BlockingIOError), or it is another user's (PermissionError).
        """
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(sockaddr(path))
            check_peer(sock, user_of_socket(path))
        except BaseException:
            sock.close()
            raise
        return cls(sock)

    @property
    def peer(self) -> tuple[int, int]:
        """The pid and uid of the process at the other end; see `peer_credentials`."""
        return peer_credentials(self._sock)[:2]

    def descriptors(self) -> tuple[int, ...]:
        """What a forked child must not have."""
        return (self._sock.fileno(), *self._descriptors)

    async def say(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Send a control message.

        Raises:
            OSError: As in `send`.
        """
        await asyncio.sleep(0)  # each message is a point at which others run, and at which this can be cancelled
        await self.send(encode_frame(encode(message)), descriptors)

    async def ask(self, message: Any, kind: Any) -> Any:
        """Send a control message and return the answer, one of the closed set `kind`.

        Raises:
            EOFError, OSError, ControlError: As in `receive_word`.
        """
        await self.say(message)
        return await self.receive_word(kind)

    async def send_descriptors(self, descriptors: Sequence[int]) -> None:
        """Send descriptors, one byte with as many as travel at once; the peer calls `receive_descriptors`.

        Raises:
            OSError: As in `send`.
        """
        await asyncio.sleep(0)
        for start in range(0, len(descriptors), DESCRIPTORS_MAX):
            await self.send(b"d", descriptors[start : start + DESCRIPTORS_MAX])

    async def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send all of it; the descriptors leave with the first byte, and stay open here.

        Raises:
            OSError: The peer has ended; nothing, or not all of it, has arrived.
        """
        left = memoryview(data)
        while left:
            try:
                sent = send_descriptors(self._sock, left, descriptors)
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_writer, loop.remove_writer)
                continue
            left, descriptors = left[sent:], ()

    async def receive_frame(self) -> tuple[Frame, bytes, list[int]]:
        """The next frame of a handoff, and those of its descriptors for which there was room: the caller's to close.

        Raises:
            EOFError: The peer has closed.
            OSError: The connection is broken.
            ControlError: What came is no frame (HP220).
        """
        self.has_lost = False
        kind, size = parse_header(await self._receive(HEADER_BYTES))
        payload = await self._receive(size)
        return kind, payload, self._take_descriptors()

    async def receive_word(self, kind: Any = Word, *, frame_bytes_max: int = FRAME_BYTES_MAX) -> Any:
        """The next control message, one of the closed set `kind`; nothing that follows it is read.

        Raises:
            EOFError, OSError: As in `receive_frame`.
            ControlError: What came is no such message.
        """
        await asyncio.sleep(0)  # a peer that talks without a pause must not occupy the event loop
        decoder = FrameDecoder(frame_bytes_max)
        while not (payloads := decoder.feed(await self._receive(decoder.missing_bytes))):
            pass
        return decode(payloads[0], kind)

    async def receive_descriptors(self, count: int) -> list[int]:
        """So many descriptors, the caller's to close, that come with messages of one byte each.

        Raises:
            EOFError, OSError: As in `receive_frame`.
            DescriptorsLostError: This process is out of descriptors.
        """
        while len(self._descriptors) < count and not self.has_lost:
            await self._receive(1)
        return self.take_descriptors()

    def take_descriptors(self) -> list[int]:
        """Those that came with the last message, the caller's to close.

        Raises:
            DescriptorsLostError: This process is out of descriptors.
        """
        if self.has_lost:
            raise DescriptorsLostError("out of descriptors: a message did not arrive whole")
        return self._take_descriptors()

    async def wait_closed(self) -> bool:
        """Wait until the peer has closed; drop what it says, and return whether it has said anything."""
        has_spoken = False
        with suppress(EOFError, OSError):
            while True:
                await asyncio.sleep(0)
                await self._receive_some(PIECE_BYTES)
                has_spoken = True
        return has_spoken

    def fileno(self) -> int:
        """The connection's descriptor; -1 once it is closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close; what the peer has not received yet, it still receives."""
        for fd in self._take_descriptors():
            os.close(fd)
        self._sock.close()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_descriptors(self) -> list[int]:
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    async def _receive(self, size: int) -> bytes:
        parts = []
        while size:
            parts.append(await self._receive_some(size))
            size -= len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def _receive_some(self, size: int) -> bytes:
        while True:
            try:
                data, descriptors, is_whole = receive_descriptors(self._sock, min(size, PIECE_BYTES))
            except BlockingIOError:
                loop = asyncio.get_running_loop()
                await self._wait(loop.add_reader, loop.remove_reader)
                continue
            self._descriptors += descriptors
            self.has_lost |= not is_whole
            if not data:
                raise EOFError("the peer has closed")
            return data

    async def _wait(self, add: Callable[..., object], remove: Callable[..., object]) -> None:
        is_ready = asyncio.Event()
        add(self._sock, is_ready.set)
        try:
            await is_ready.wait()
        finally:
            remove(self._sock)


def exchange(sock: socket.socket, request: Any) -> Iterator[Any]:
    """Send one request to a supervisor, and yield its replies until it ends the conversation; blocks.

    Args:
        sock: Connected to its control socket, blocking or with a timeout.

    Raises:
        OSError: No answer came within the timeout of `sock`.
        ControlError: What came is no reply.
    """
    with suppress(BrokenPipeError):  # it refuses some clients before they have sent anything; its answer can be read
        sock.sendall(encode_frame(encode(request)))
    decoder = FrameDecoder()
    with suppress(ConnectionResetError):  # it has ended, perhaps without having read the request
        while data := sock.recv(65536):
            for payload in decoder.feed(data):
                yield decode(payload, Reply)
