"""Handing established connections to the workers that come next, and taking them from those that leave.

A batch of connections changes hands in four steps, so that at no moment two processes could answer one client, and a
connection is lost only with the process that serves it::

    old                                       new
    offers stand still; BATCH, descriptors -> adopts each one, reads nothing
                                           <- ACK: taken, but for these
    closes its descriptors; GO             -> serves them
    (no ACK in time: WITHDRAW              -> lets go of them)

What the new one has when the old one ends without a word is the new one's to serve: an old one that goes on says so.

Sources: unix(7) SCM_RIGHTS: a descriptor under way keeps its connection open.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import msgspec

from hotport.adapters.base import Adapter, Connection, Connections, NotAdopted, Offer
from hotport.errors import ControlError
from hotport.kernel.abstract import sockaddr
from hotport.kernel.scm import DESCRIPTORS_MAX, receive_descriptors, send_descriptors
from hotport.observe.logs import get_shared_logger
from hotport.wire.envelope import (
    ENVELOPE_VERSION,
    HEADER_BYTES,
    Ack,
    Frame,
    decode_ack,
    decode_batch,
    encode_frame,
    pack,
    parse_header,
)
from hotport.wire.frames import FrameDecoder
from hotport.wire.frames import encode_frame as encode_message_frame
from hotport.wire.messages import OfferOrder, Welcome, Word, decode, encode
from hotport.worker.acceptor import PlainSocket, attach

__all__ = ["Channel", "Mover", "take_connections"]

#: From an offer to its acknowledgement. Clients wait that long if the worker that should take them hangs.
ACK_TIMEOUT_S: Final = 2.0

#: From calling a successor to its welcome; connections are served meanwhile.
WELCOME_TIMEOUT_S: Final = 5.0

#: How much of a frame is read at once.
PIECE_BYTES: Final = 256 * 1024

#: Envelopes as large as that in all make a batch: a larger one would take too much of `ACK_TIMEOUT_S`.
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024


class Channel:
    """Frames and descriptors between two workers.

    Descriptors: owns `sock`, and those that have come and were not returned yet.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._descriptors: list[int] = []

    async def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send all of it; the descriptors leave with the first byte, and stay open here.

        Raises:
            OSError: Nobody receives any more; nothing, or not all of it, has arrived.
        """
        left = memoryview(data)
        while left:
            try:
                sent = send_descriptors(self._sock, left, descriptors)
            except BlockingIOError:
                await self._wait(self._loop.add_writer, self._loop.remove_writer)
                continue
            left, descriptors = left[sent:], ()

    async def receive_frame(self) -> tuple[Frame, bytes, list[int]]:
        """The next frame, and the descriptors that came with it: the caller's to close.

        Raises:
            EOFError: The peer has closed.
            OSError: The connection is broken; DescriptorsLostError: this process is out of descriptors.
            ControlError: What came is no frame (HP220).
        """
        kind, size = parse_header(await self._receive(HEADER_BYTES))
        payload = await self._receive(size)
        descriptors, self._descriptors = self._descriptors, []
        return kind, payload, descriptors

    async def receive_word(self, kind: Any = Word) -> Any:
        """The next control message, one of the closed set `kind`.

        Raises:
            EOFError, OSError, ControlError: As in `receive_frame`.
        """
        decoder = FrameDecoder()
        while True:
            # Not one byte more than it needs: what follows is none.
            if payloads := decoder.feed(await self._receive(1)):
                return decode(payloads[0], kind)

    async def receive_descriptors(self, count: int) -> list[int]:
        """So many descriptors, the caller's to close, that come with messages of one byte each.

        Raises:
            EOFError, OSError: As in `receive_frame`.
        """
        while len(self._descriptors) < count:
            await self._receive(1)
        descriptors, self._descriptors = self._descriptors, []
        return descriptors

    def close(self) -> None:
        """Close; what the peer has not received yet, it still receives."""
        for fd in self._descriptors:
            os.close(fd)
        self._descriptors = []
        self._sock.close()

    async def _receive(self, size: int) -> bytes:
        data = b""
        parts = []
        while size:
            try:
                data, descriptors = receive_descriptors(self._sock, min(size, PIECE_BYTES))
            except BlockingIOError:
                await self._wait(self._loop.add_reader, self._loop.remove_reader)
                continue
            self._descriptors += descriptors
            if not data:
                raise EOFError("the peer has closed")
            parts.append(data)
            size -= len(data)
        return data if len(parts) == 1 else b"".join(parts)

    async def _wait(self, add: Callable[..., object], remove: Callable[..., object]) -> None:
        is_ready = asyncio.Event()
        add(self._sock, is_ready.set)
        try:
            await is_ready.wait()
        finally:
            remove(self._sock)


# -- the worker that leaves ---------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A connection that stands still, and what goes to the successor."""

    connection: Connection
    fd: int
    envelope: msgspec.Raw


class _Successor:
    """A worker that takes connections."""

    def __init__(self, path: str, channel: Channel, welcome: Welcome) -> None:
        self.path = path
        self.channel = channel
        self.room = welcome.room
        self.connections = welcome.connections
        #: At a safe point when they were put here.
        self.waiting: deque[Connection] = deque()
        #: Served there, and not closed here yet.
        self.moved: list[Connection] = []
        self.has_work = asyncio.Event()
        self.is_closing = False
        self.task: asyncio.Task[None] | None = None


class Mover:
    """Moves the connections of a worker that leaves or may leave, each to the successor with the fewest by then."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._successors: dict[str, _Successor] = {}
        self._waiting: set[Connection] = set()
        self._is_closed = False
        self._following = asyncio.Lock()
        #: Some successors may be gone, and others not there yet: nobody is told that there is none.
        self._is_between = False
        self._log = get_shared_logger("hotport.handoff")

    async def follow(self, paths: Sequence[str]) -> None:
        """Hand connections to the workers with these control sockets from now on, and to no others.

        One that does not answer within `WELCOME_TIMEOUT_S`, or has no room, is passed over; without any, connections
        are told to close if the worker leaves, as if there had never been one.
        """
        async with self._following:
            self._is_between = True
            for path in self._successors.keys() - set(paths):
                self._dismiss(self._successors[path])
            new = [path for path in paths if path not in self._successors]
            try:
                for found in await self._call_all(new):
                    if found is None:
                        continue
                    if self._is_closed:
                        found.channel.close()
                        continue
                    self._successors[found.path] = found
                    found.task = self._loop.create_task(self._serve(found))
            finally:
                self._is_between = False
                if not self._is_closed:
                    self._connections.lead(self._ready if self._successors else None)

    async def close(self) -> None:
        """Move nothing any more; return when what was under way has arrived, or has been taken back.

        That is bounded by the timeouts of a batch; a task that is stuck all the same is not waited for any longer.
        """
        self._is_closed = True
        tasks = []
        for successor in list(self._successors.values()):
            self._dismiss(successor)
            if successor.task is not None:
                tasks.append(successor.task)
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=3 * ACK_TIMEOUT_S)
            for task in stuck:
                task.cancel()

    async def _call_all(self, paths: Sequence[str]) -> list[_Successor | None]:
        calls = [self._loop.create_task(self._call(path)) for path in paths]
        try:
            return await asyncio.gather(*calls)
        except asyncio.CancelledError:
            for call in calls:
                if call.done() and not call.cancelled() and (found := call.result()) is not None:
                    found.channel.close()
            raise

    async def _call(self, path: str) -> _Successor | None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        channel = Channel(sock)
        why = ""
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await self._loop.sock_connect(sock, sockaddr(path))
                await channel.send(encode_message_frame(encode(OfferOrder(version=ENVELOPE_VERSION))))
                while not isinstance(word := await channel.receive_word(), Welcome):
                    pass
            if word.room:
                return _Successor(path, channel, word)
            why = word.why
        except (OSError, EOFError, ControlError) as error:
            why = str(error) or type(error).__name__
        except Exception as error:  # a bug of ours must not keep connections from the other successors
            why = f"{type(error).__name__}: {error}"
            self._log.exception("handoff.failed", successor=os.path.basename(path))
        except BaseException:
            channel.close()
            raise
        channel.close()
        self._log.warning("handoff.declined", successor=os.path.basename(path), why=why)
        return None

    def _ready(self, connection: Connection) -> None:
        """A connection is at a safe point."""
        if connection in self._waiting or connection not in self._connections.open:
            return
        open_to = [each for each in self._successors.values() if each.room > len(each.waiting)]
        if not open_to:
            if not self._is_between:
                self._connections.not_taken(connection)
            return
        successor = min(open_to, key=lambda each: each.connections + len(each.waiting))
        self._waiting.add(connection)
        successor.waiting.append(connection)
        successor.has_work.set()

    async def _serve(self, successor: _Successor) -> None:
        try:
            while not successor.is_closing:
                successor.has_work.clear()
                if batch := self._take(successor):
                    await self._move(successor, batch)
                else:
                    self._release(successor)
                    await successor.has_work.wait()
        except (OSError, EOFError, ControlError) as error:
            why = str(error) or type(error).__name__
            self._log.warning("handoff.broken", successor=os.path.basename(successor.path), why=why)
        except Exception:  # a bug of ours must not leave connections standing still
            self._log.exception("handoff.failed", successor=os.path.basename(successor.path))
        self._release(successor)
        successor.channel.close()
        self._dismiss(successor)
        self._waiting.difference_update(successor.waiting)
        if self._is_closed:
            return
        if not self._successors and not self._is_between:
            self._connections.lead(None)
        for connection in list(successor.waiting):  # to others, if there are any
            self._ready(connection)

    def _take(self, successor: _Successor) -> list[_Packed]:
        """The next ones that are at a safe point still; the others say so when they are again."""
        batch: list[_Packed] = []
        size = 0
        while successor.waiting and len(batch) < DESCRIPTORS_MAX and size < BATCH_BYTES_MAX:
            connection = successor.waiting.popleft()
            self._waiting.discard(connection)
            if connection not in self._connections.open or (offer := self._offer(connection)) is None:
                continue
            try:
                envelope = pack(offer.envelope)
            except TypeError as error:
                self._log.warning("handoff.kept", why=str(error))
                connection.keep()
                self._connections.not_taken(connection)
                continue
            batch.append(_Packed(connection, offer.fd, envelope))
            size += len(memoryview(envelope))
            successor.room -= 1
            successor.connections += 1
        return batch

    def _offer(self, connection: Connection) -> Offer | None:
        try:
            return connection.offer()
        except Exception:
            self._log.exception("handoff.offer_failed")
            connection.keep()  # the others of the batch can still move
            self._connections.not_taken(connection)
            return None

    async def _move(self, successor: _Successor, batch: list[_Packed]) -> None:
        channel = successor.channel
        frame = encode_frame(Frame.BATCH, [each.envelope for each in batch])
        is_sent = False
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await channel.send(frame, [each.fd for each in batch])
                is_sent = True
                self._release(successor)  # while the other one is busy with this batch
                kind, payload, _ = await channel.receive_frame()
            if kind is not Frame.ACK:
                raise EOFError(f"an acknowledgement was expected, not {kind.name}")
            ack = decode_ack(payload)
            await channel.send(encode_frame(Frame.GO))
        except BaseException as error:
            is_taken_back = True
            if is_sent and isinstance(error, TimeoutError):
                is_taken_back = await self._withdraw(channel)
            for connection, *_ in batch:
                if connection not in self._connections.open:
                    continue
                if is_taken_back:
                    connection.keep()
                    self._waiting.add(connection)
                    successor.waiting.append(connection)
                else:
                    self._connections.closed(connection, "cut_offered")
                    connection.release()
            raise
        refused = set(ack.refused)
        successor.room = ack.room
        successor.connections -= len(refused)
        for number, (connection, *_) in enumerate(batch):
            if connection not in self._connections.open:
                continue  # cut while it stood still
            if number in refused:
                connection.keep()
                if ack.room:
                    self._connections.not_taken(connection)
                else:  # it is not the connection's fault: others may have room
                    self._ready(connection)
            else:
                self._connections.closed(connection, f"moved_{connection.kind}")
                successor.moved.append(connection)

    def _release(self, successor: _Successor) -> None:
        """Close the descriptors of the last batch, which is served elsewhere by now."""
        moved, successor.moved = successor.moved, []
        for connection in moved:
            connection.release()

    async def _withdraw(self, channel: Channel) -> bool:
        """Tell one that has not acknowledged in time that it must not serve what it may still receive.

        Returns:
            False if there is no room for even that: it has the batch, and will serve it if it ever wakes up.
        """
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await channel.send(encode_frame(Frame.WITHDRAW))
        except TimeoutError:
            return False
        except OSError:  # it has ended
            pass
        return True

    def _dismiss(self, successor: _Successor) -> None:
        """Send it nothing any more, once it has answered."""
        successor.is_closing = True
        successor.has_work.set()
        if self._successors.get(successor.path) is successor:
            del self._successors[successor.path]


# -- the worker that comes ----------------------------------------------------------------------------------


async def take_connections(channel: Channel, version: int, adapter: Adapter, connections: Connections) -> None:
    """Answer another worker's offer, and go on with the connections that it sends until it closes the channel.

    Args:
        version: Of the envelopes that it would send.

    Cancellation: safe between two batches; in the middle of one, its connections are let go of, and stay the other's.
    Descriptors: what is received belongs to the connections made of it, or is closed. `channel` is closed.
    """
    log = get_shared_logger("hotport.handoff")
    adopted: list[tuple[socket.socket, asyncio.BaseProtocol]] = []
    try:
        welcome = _welcome(version, connections)
        await channel.send(encode_message_frame(encode(welcome)))
        while welcome.room:
            kind, payload, descriptors = await channel.receive_frame()
            adopted, refused = _adopt(kind, payload, descriptors, adapter, connections)
            with suppress(OSError):  # if the other one has closed, what it said before that is still to be heard
                await channel.send(encode_frame(Frame.ACK, Ack(refused, connections.room)))
            try:
                kind, _, _ = await channel.receive_frame()
            except (EOFError, OSError):
                kind = Frame.GO  # it has ended without a word: it cannot serve them any more
            if kind is Frame.GO:
                _go_on(adopted, connections)
                adopted = []
            _let_go(adopted, connections)
    except EOFError:
        pass
    except (OSError, ControlError) as error:
        log.warning("handoff.broken", why=str(error))
    finally:
        _let_go(adopted, connections)
        channel.close()


def _welcome(version: int, connections: Connections) -> Welcome:
    room, why = connections.room, ""
    if version != ENVELOPE_VERSION:
        room, why = 0, f"envelopes of version {version} came, and those of version {ENVELOPE_VERSION} are understood"
    elif not room:
        why = "it leaves, or has as many connections as it may"
    return Welcome(room=room, connections=len(connections.open), why=why)


def _adopt(
    kind: Frame, payload: bytes, descriptors: list[int], adapter: Adapter, connections: Connections
) -> tuple[list[tuple[socket.socket, asyncio.BaseProtocol]], list[int]]:
    """Make connections of a batch, which are not attached yet; and the numbers of those that cannot be made here."""
    sockets = [PlainSocket(fileno=fd) for fd in descriptors]
    adopted: list[tuple[socket.socket, asyncio.BaseProtocol]] = []
    refused: list[int] = []
    try:
        if kind is not Frame.BATCH:
            raise EOFError(f"a batch was expected, not {kind.name}")
        envelopes = decode_batch(payload)
        if len(envelopes) != len(sockets):
            raise EOFError(f"{len(envelopes)} envelopes came with {len(sockets)} descriptors")
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    for number, (sock, envelope) in enumerate(zip(sockets, envelopes, strict=True)):
        try:
            if envelope is None:
                raise NotAdopted("its envelope cannot be understood")
            if not connections.room:
                raise NotAdopted("no room")
            protocol = adapter.adopt(envelope)
        except Exception as error:
            get_shared_logger("hotport.handoff").warning("handoff.refused", why=str(error) or repr(error))
            sock.close()
            refused.append(number)
            continue
        protocol.endpoints = envelope.endpoints  # type: ignore[attr-defined]
        protocol.is_proxied = envelope.is_proxied  # type: ignore[attr-defined]
        adopted.append((sock, protocol))
    return adopted, refused


def _go_on(adopted: Iterable[tuple[socket.socket, asyncio.BaseProtocol]], connections: Connections) -> None:
    loop = asyncio.get_running_loop()
    for sock, protocol in adopted:
        connections.count_adopted()
        attach(loop, sock, protocol, connections)


def _let_go(adopted: Iterable[tuple[socket.socket, asyncio.BaseProtocol]], connections: Connections) -> None:
    for sock, protocol in adopted:
        connections.forget(protocol)  # type: ignore[arg-type]
        sock.close()
