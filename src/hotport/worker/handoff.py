"""Hand established connections to successors, and adopt those of predecessors.

A batch of connections moves in four steps, so that two processes can never answer the same client, and a connection is
lost only with the process that serves it::

    old                                       new
    REST                                   -> reserves room for so many
    offers stand still; BATCH, descriptors -> adopts each one, reads nothing
                                           <- ACK: taken, but for these
    closes its descriptors; GO             -> serves them
    (no ACK in time: WITHDRAW              -> drops them)

If the old worker ends without GO or WITHDRAW, the new worker serves the connections that it has received: an old
worker that keeps them sends WITHDRAW.

A new worker at its limit of connections or descriptors takes as many of a batch as fit; the old worker serves the
others until ROOM comes, or until the drain deadline.

Sources: unix(7) SCM_RIGHTS: a descriptor in transit keeps its connection open.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from hotport.adapters.base import Adapter, Connection, Connections, NotAdopted, Offer
from hotport.channel import Channel
from hotport.errors import ControlError
from hotport.kernel.fork import withhold
from hotport.kernel.process import descriptors_left
from hotport.kernel.scm import DESCRIPTORS_MAX
from hotport.model.balance import BATCH_MAX
from hotport.model.fates import Fate
from hotport.observe.logs import get_shared_logger
from hotport.wire.envelope import (
    ENVELOPE_VERSION,
    ENVELOPE_VERSIONS,
    PLAIN_VERSION,
    Ack,
    Envelope,
    Frame,
    decode_ack,
    decode_batch,
    decode_count,
    encode_frame,
    pack,
)
from hotport.wire.messages import Move, OfferOrder, Welcome
from hotport.worker.acceptor import PlainSocket, attach, attach_tls
from hotport.worker.tls import Tls
from hotport.worker.tlsadopted import Adopted

__all__ = ["Mover", "take_connections"]

#: Seconds from an offer to its acknowledgement; clients wait so long if the new worker hangs.
ACK_TIMEOUT_S: Final = 2.0

#: Seconds from connecting to a successor to its welcome; connections are served meanwhile.
WELCOME_TIMEOUT_S: Final = 5.0

#: Descriptors that a process keeps for other uses than adopted connections.
SPARE_DESCRIPTORS: Final = 8

#: Seconds between two checks for free descriptors, and until a retry when too many of the user's descriptors are in
#: transit (ETOOMANYREFS).
PAUSE_S: Final = 0.5

#: The part of the drain after which connections without room are told to close, so that they end between two requests.
PATIENCE: Final = 0.5

#: How many batches of connections are told one by one in a restart's recording.
MOVES_MAX: Final = 64

#: The size of a batch's envelopes at which it is full: a larger batch would take too much of `ACK_TIMEOUT_S`.
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024


# -- the leaving worker -------------------------------------------------------------------------------------


class _Packed(NamedTuple):
    """A connection that stands still, with its packed envelope."""

    connection: Connection
    fd: int
    envelope: msgspec.Raw


class _Successor:
    """A worker that takes connections.

    Attributes:
        room: How many more connections it takes, by its last message.
        batch_max: How many descriptors the kernel accepts in one message.
        rest: The number of connections in the last REST.
        answer: The future answer to the current batch.
        failure: The error that ended its channel.
    """

    def __init__(self, path: str, channel: Channel, welcome: Welcome) -> None:
        self.path = path
        self.channel = channel
        self.room = welcome.room
        self.connections = welcome.connections
        #: Connections that were at a safe point when they were queued.
        self.waiting: deque[Connection] = deque()
        #: Connections that it serves, and that are not closed here yet.
        self.moved: list[Connection] = []
        #: The batch before, which the event loop closes in its next turn.
        self.released: list[Connection] = []
        self.batch_max = DESCRIPTORS_MAX
        self.rest = 0
        self.answer: asyncio.Future[Ack] | None = None
        self.failure: Exception | None = None
        self.has_work = asyncio.Event()
        self.is_closing = False
        self.task: asyncio.Task[None] | None = None
        withhold(self)

    def descriptors(self) -> tuple[int, ...]:
        """The descriptors of connections that have left the registry; a forked child must not have them."""
        return tuple(each.sock.fileno() for each in (*self.moved, *self.released) if each.sock is not None)


class Mover:
    """Hands off a worker's connections, each to the least-loaded successor.

    Args:
        name: The name of this worker's control socket.
        some: About how many connections to move, and how many seconds adopted ones stay at least; None for all.
        has_tls: Connections may travel with their TLS, which not every version of hotport understands.

    Attributes:
        moved: How many have moved.
    """

    def __init__(
        self, connections: Connections, name: str = "", *, some: tuple[int, float] | None = None, has_tls: bool = False
    ) -> None:
        self._connections = connections
        self._name = name
        self._some = some
        self._version = ENVELOPE_VERSION if has_tls else PLAIN_VERSION
        self._is_through = asyncio.Event()
        self.moved = 0
        self._patience: asyncio.TimerHandle | None = None
        self._is_late = False
        connections.on_fewer = self._on_fewer
        self._loop = asyncio.get_running_loop()
        self._successors: dict[str, _Successor] = {}
        self._waiting: set[Connection] = set()
        self._is_closed = False
        self._following = asyncio.Lock()
        #: The list of successors is changing: do not tell connections that there is none.
        self._is_between = False
        self._log = get_shared_logger("hotport.handoff")

    async def follow(self, paths: Sequence[str]) -> None:
        """Hand connections to the workers with these control sockets from now on, and to no others.

        Skips workers that do not answer within `WELCOME_TIMEOUT_S`. Without a successor, connections are told to close
        if the worker leaves. Connections for which no successor has room wait for it.
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
                    self._lead()
                    self._tell_rest()

    def _lead(self) -> None:
        if self._some is None:
            self._connections.lead(self._ready if self._successors else None)
        elif self._successors:
            for successor in self._successors.values():
                successor.batch_max = BATCH_MAX
            self._connections.lead_some(self._ready, *self._some)
        self._see_through()

    async def wait_through(self) -> None:
        """Wait until no connection will move, or there is no successor."""
        await self._is_through.wait()

    def _on_fewer(self) -> None:
        self._tell_rest()
        self._see_through()

    def _see_through(self) -> None:
        if not self._connections.moving or not self._successors:
            self._is_through.set()

    async def close(self) -> None:
        """Stop moving connections; wait until batches under way have arrived, or have been withdrawn.

        The timeouts of a batch bound this; a task that is still stuck is cancelled.
        """
        self._is_closed = True
        if self._patience is not None:
            self._patience.cancel()
        self._connections.on_fewer = None
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
        channel: Channel | None = None
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                channel = Channel.connect(path)
                await channel.say(OfferOrder(version=self._version, sender=self._name))
                while not isinstance(word := await channel.receive_word(), Welcome):
                    pass
            if not word.why:
                return _Successor(path, channel, word)
            why = word.why
        except (OSError, EOFError, ControlError) as error:
            why = str(error) or type(error).__name__
        except Exception as error:  # a bug here must not affect the other successors
            why = f"{type(error).__name__}: {error}"
            self._log.exception("handoff.failed", successor=os.path.basename(path))
        except BaseException:
            if channel is not None:
                channel.close()
            raise
        if channel is not None:
            channel.close()
        self._log.warning("handoff.declined", successor=os.path.basename(path), why=why)
        return None

    def _ready(self, connection: Connection) -> None:
        """Queue a connection at a safe point for the least-loaded successor that has room."""
        if connection in self._waiting or connection not in self._connections.open:
            return
        self._connections.will_move(connection)
        crowded = self._connections.crowded
        open_to = [each for each in self._successors.values() if each.room > len(each.waiting)]
        if not open_to:
            if self._successors:
                crowded[connection] = None
                self._be_patient(connection)
            elif not self._is_between:
                self._connections.not_taken(connection)
            return
        crowded.pop(connection, None)
        successor = min(open_to, key=lambda each: each.connections + len(each.waiting))
        self._waiting.add(connection)
        successor.waiting.append(connection)
        successor.has_work.set()

    def _spread(self) -> None:
        """Retry the connections that wait for room."""
        for connection in list(self._connections.crowded):
            if self._is_closed or not any(each.room > len(each.waiting) for each in self._successors.values()):
                return
            self._connections.tell(connection)

    def _be_patient(self, connection: Connection) -> None:
        """Let a connection wait for room, but tell it to close after the part `PATIENCE` of the drain."""
        draining = self._connections.draining
        if not draining.is_set():
            return
        if self._patience is None:
            self._patience = self._loop.call_later(draining.remaining_s() * PATIENCE, self._lose_patience)
        elif self._is_late:
            connection.drain()

    def _lose_patience(self) -> None:
        self._is_late = True
        for connection in list(self._connections.crowded):
            connection.drain()

    def _tell_rest(self) -> None:
        for successor in self._successors.values():
            successor.has_work.set()

    async def _say_rest(self, successor: _Successor) -> None:
        """Send REST: a successor's share of the connections that may still move."""
        rest = -(-self._connections.moving // max(1, len(self._successors)))
        if rest != successor.rest:
            successor.rest = rest
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await successor.channel.send(encode_frame(Frame.REST, rest))

    async def _hear(self, successor: _Successor) -> None:
        """Receive a successor's messages until its channel ends."""
        try:
            while True:
                kind, payload, _ = await successor.channel.receive_frame()
                if kind is Frame.ROOM:
                    successor.room = decode_count(payload)
                    self._spread()
                elif kind is Frame.ACK and successor.answer is not None and not successor.answer.done():
                    successor.answer.set_result(decode_ack(payload))
                else:
                    raise EOFError(f"an acknowledgement was expected, not {kind.name}")
        except Exception as error:  # `_serve` logs it
            successor.failure = error
            if successor.answer is not None and not successor.answer.done():
                successor.answer.set_exception(error)
            successor.has_work.set()

    async def _serve(self, successor: _Successor) -> None:
        hearing = self._loop.create_task(self._hear(successor))
        try:
            while not successor.is_closing:
                successor.has_work.clear()
                await self._say_rest(successor)
                if successor.failure is not None:
                    raise successor.failure
                if batch := self._take(successor):
                    await self._move(successor, batch)
                else:
                    self._release(successor)
                    await successor.has_work.wait()
        except (OSError, EOFError, ControlError) as error:
            if successor.waiting or not isinstance(error, EOFError):  # otherwise it ended while no batch was under way
                why = str(error) or type(error).__name__
                self._log.warning("handoff.broken", successor=os.path.basename(successor.path), why=why)
        except Exception:  # after a bug here no connection must stand still for ever
            self._log.exception("handoff.failed", successor=os.path.basename(successor.path))
        self._release(successor)
        self._dismiss(successor)
        self._waiting.difference_update(successor.waiting)
        if not self._is_closed:
            if not self._successors and not self._is_between:
                self._connections.lead(None)
                self._see_through()
            for connection in list(successor.waiting):  # retry with the other successors
                self._ready(connection)
            self._tell_rest()  # the others' shares have grown
        hearing.cancel()
        await asyncio.wait({hearing})
        successor.channel.close()

    def _take(self, successor: _Successor) -> list[_Packed]:
        """Take the next batch of connections that are still at a safe point; the others report their next one."""
        batch: list[_Packed] = []
        size = 0
        most = min(successor.batch_max, successor.room)
        while successor.waiting and len(batch) < most and size < BATCH_BYTES_MAX:
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
            connection.keep()  # the rest of the batch can still move
            self._connections.not_taken(connection)
            return None

    async def _move(self, successor: _Successor, batch: list[_Packed]) -> None:
        channel = successor.channel
        frame = encode_frame(Frame.BATCH, [each.envelope for each in batch])
        is_sent = False
        began_s = time.monotonic()
        answer = successor.answer = self._loop.create_future()
        try:
            async with asyncio.timeout(ACK_TIMEOUT_S):
                await channel.send(frame, [each.fd for each in batch])
                is_sent = True
                self._release(successor)  # meanwhile the successor adopts this batch
                ack = await answer
            await channel.send(encode_frame(Frame.GO))
        except BaseException as error:
            is_taken_back = not is_sent or await self._withdraw(channel)
            for connection, *_ in batch:
                if connection not in self._connections.open:
                    continue
                if is_taken_back:
                    connection.keep()
                    self._waiting.add(connection)
                    successor.waiting.append(connection)
                else:
                    self._connections.closed(connection, Fate.CUT_OFFERED)
                    connection.release()
            if isinstance(error, OSError) and error.errno == errno.ETOOMANYREFS and not is_sent:
                successor.room += len(batch)
                successor.connections -= len(batch)
                successor.batch_max = max(1, len(batch) // 2)
                await asyncio.sleep(PAUSE_S)
                return
            raise
        finally:
            successor.answer = None
            if not answer.cancel() and not answer.cancelled():
                answer.exception()  # marks the exception as retrieved
        refused = set(ack.refused)
        moved = 0
        successor.room = ack.room
        successor.connections -= len(refused)
        for number, (connection, *_) in enumerate(batch):
            if connection not in self._connections.open:
                continue  # cut while it stood still
            if number in refused:
                connection.keep()
                if ack.room:
                    self._connections.not_taken(connection)
                else:  # the successor is full: others may have room
                    self._ready(connection)
            else:
                moved += 1
                successor.moved.append(connection)
                self._connections.closed(connection, connection.moved_fate)
        self.moved += moved
        if self._some is None and moved:
            name = os.path.basename(successor.path)
            ms = round((time.monotonic() - began_s) * 1000, 3)
            _note(self._connections.moves, Move(at_s=began_s, ms=ms, to=name, connections=moved))
        while len(successor.waiting) > successor.room:  # retry with the other successors, or wait for room
            connection = successor.waiting.pop()
            self._waiting.discard(connection)
            self._ready(connection)
        self._spread()

    def _release(self, successor: _Successor) -> None:
        """Close the descriptors of the last batch, which the successor serves now."""
        successor.released, successor.moved = successor.moved, []
        for connection in successor.released:
            connection.release()

    async def _withdraw(self, channel: Channel) -> bool:
        """Send WITHDRAW to a successor whose acknowledgement has not come: it must not serve the batch.

        Returns:
            False if the channel is full: the successor has the batch, and will serve it if it ever wakes up.
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
        """Remove a successor; its task ends after the current batch."""
        successor.is_closing = True
        successor.has_work.set()
        if self._successors.get(successor.path) is successor:
            del self._successors[successor.path]


def _note(moves: list[Move], move: Move) -> None:
    """Add a batch to what is known of those before; beyond `MOVES_MAX`, to the last one with this successor."""
    if len(moves) >= MOVES_MAX:
        for at, last in reversed([*enumerate(moves)]):
            if last.to == move.to:
                moves[at] = Move(
                    at_s=last.at_s,
                    ms=round((move.at_s - last.at_s) * 1000 + move.ms, 3),
                    to=last.to,
                    connections=last.connections + move.connections,
                    batches=last.batches + 1,
                )
                return
    moves.append(move)


# -- the new worker -----------------------------------------------------------------------------------------


class _AdoptedOne(NamedTuple):
    """A connection that is not attached yet, with its TLS."""

    sock: socket.socket
    protocol: asyncio.BaseProtocol
    layer: Adopted | None


async def take_connections(
    channel: Channel,
    version: int,
    adapter: Adapter,
    connections: Connections,
    *,
    sender: str = "",
    tls: Tls | None = None,
) -> None:
    """Answer another worker's offer, and adopt the connections that it sends until it closes the channel.

    Args:
        version: The version of its envelopes.
        sender: The worker's name, see `OfferOrder`.
        tls: Adopts connections over TLS; without it only others are taken, and with it no others.

    Cancellation: safe between two batches; in the middle of one, its connections are dropped, and stay the other's.
    Descriptors: received ones are owned by the connections made of them, or closed. `channel` is closed.
    """
    log = get_shared_logger("hotport.handoff")
    adopted: list[_AdoptedOne] = []
    whose = sender or channel
    try:
        welcome = _welcome(version, connections)
        await channel.say(welcome)
        room = welcome.room
        while not welcome.why:
            room, (kind, payload, descriptors) = await _receive(channel, connections, room)
            if kind is Frame.REST:
                connections.keep(whose, decode_count(payload))
                continue
            adopted, refused = _adopt(
                kind, payload, descriptors, adapter, connections, tls, is_whole=not channel.has_lost
            )
            room = 0 if channel.has_lost else _room(connections)
            with suppress(OSError):  # if the other has closed, its last messages are still read
                await channel.send(encode_frame(Frame.ACK, Ack(refused, room)))
            try:
                kind, _, _ = await channel.receive_frame()
            except (EOFError, OSError):
                kind = Frame.GO  # the other has ended, and cannot serve them
            if kind is Frame.GO:
                _go_on(adopted, connections)
                adopted = []
            _let_go(adopted, connections)
    except EOFError:
        pass
    except (OSError, ControlError) as error:
        log.warning("handoff.broken", why=str(error))
    finally:
        connections.keep(whose, 0)
        _let_go(adopted, connections)
        channel.close()


async def _receive(channel: Channel, connections: Connections, room: int) -> tuple[int, tuple[Frame, bytes, list[int]]]:
    """Receive a frame; if `room` is 0, first send ROOM as soon as there is any. Return the room sent, and the frame."""
    if room:
        return room, await channel.receive_frame()
    receiving = asyncio.create_task(channel.receive_frame())
    waiting = asyncio.create_task(_wait_room(connections))
    try:
        await asyncio.wait({receiving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            room = waiting.result()
            await channel.send(encode_frame(Frame.ROOM, room))
        return room, await receiving
    finally:
        for task in (receiving, waiting):
            task.cancel()
        await asyncio.wait({receiving, waiting})


async def _wait_room(connections: Connections) -> int:
    """Wait until there is room for a connection; return for how many."""
    while True:
        await connections.wait_freed()
        if room := _room(connections):
            return room
        await asyncio.sleep(PAUSE_S)  # the kernel does not notify about free descriptors


def _room(connections: Connections) -> int:
    """How many more connections can be adopted."""
    return max(0, min(connections.room, descriptors_left() - SPARE_DESCRIPTORS))


def _welcome(version: int, connections: Connections) -> Welcome:
    room, why = _room(connections), ""
    if version not in ENVELOPE_VERSIONS:
        room, why = 0, f"envelopes of version {version} came, and those of version {ENVELOPE_VERSION} are understood"
    elif connections.is_leaving:
        why = "it leaves, too"
    return Welcome(room=room, connections=len(connections.open), why=why)


def _adopt(
    kind: Frame,
    payload: bytes,
    descriptors: list[int],
    adapter: Adapter,
    connections: Connections,
    tls: Tls | None,
    *,
    is_whole: bool,
) -> tuple[list[_AdoptedOne], list[int]]:
    """Make the connections of a batch, not attached yet; also return the numbers of those that are refused."""
    sockets = [_socket_of(fd) for fd in descriptors]
    adopted: list[_AdoptedOne] = []
    refused: list[int] = []
    try:
        if kind is not Frame.BATCH:
            raise EOFError(f"a batch was expected, not {kind.name}")
        envelopes = decode_batch(payload)
        if len(envelopes) < len(sockets) or (is_whole and len(envelopes) > len(sockets)):
            raise EOFError(f"{len(envelopes)} envelopes came with {len(sockets)} descriptors")
    except BaseException:
        for sock in sockets:
            if sock is not None:
                sock.close()
        raise
    if len(sockets) < len(envelopes):  # out of descriptors, some of which must stay free for other uses
        fits = max(0, len(sockets) - SPARE_DESCRIPTORS)
        for sock in sockets[fits:]:
            if sock is not None:
                sock.close()
        refused += range(fits, len(envelopes))
        del sockets[fits:], envelopes[fits:]
    for number, (sock, envelope) in enumerate(zip(sockets, envelopes, strict=True)):
        try:
            if sock is None:
                raise NotAdopted("its descriptor is none of a connection")
            if envelope is None:
                raise NotAdopted("its envelope cannot be understood")
            if not connections.room:
                raise NotAdopted("no room")
            layer = _adopt_tls(envelope, tls)
            protocol = adapter.adopt(envelope)
        except Exception as error:
            get_shared_logger("hotport.handoff").warning("handoff.refused", why=str(error) or repr(error))
            if sock is not None:
                sock.close()
            refused.append(number)
            continue
        protocol.sock = sock  # type: ignore[attr-defined]
        protocol.endpoints = envelope.endpoints  # type: ignore[attr-defined]
        protocol.is_proxied = envelope.is_proxied  # type: ignore[attr-defined]
        adopted.append(_AdoptedOne(sock, protocol, layer))
    return adopted, refused


def _adopt_tls(envelope: Envelope, tls: Tls | None) -> Adopted | None:
    """Make a connection's TLS; None if it has none.

    Raises:
        NotAdopted, NotMovable: It cannot be served here.
    """
    if (envelope.tls is None) != (tls is None):
        raise NotAdopted("it speaks TLS, and here no connection does" if tls is None else "it speaks no TLS")
    return None if tls is None or envelope.tls is None else tls.adopt(envelope.tls)


def _socket_of(fd: int) -> PlainSocket | None:
    """Return the socket of a connection; close any other descriptor and return None."""
    try:
        sock = PlainSocket(fileno=fd)
    except OSError:
        os.close(fd)
        return None
    if sock.type == socket.SOCK_STREAM:
        return sock
    sock.close()
    return None


def _go_on(adopted: Iterable[_AdoptedOne], connections: Connections) -> None:
    loop = asyncio.get_running_loop()
    for sock, protocol, layer in adopted:
        connections.count_adopted(protocol)  # type: ignore[arg-type]
        if layer is None:
            attach(loop, sock, protocol, connections)
        else:
            attach_tls(loop, sock, protocol, layer, connections)


def _let_go(adopted: Iterable[_AdoptedOne], connections: Connections) -> None:
    for sock, protocol, _ in adopted:
        connections.forget(protocol)  # type: ignore[arg-type]
        sock.close()
