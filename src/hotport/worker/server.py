"""Serve an application from listeners, in a worker process and in `hotport.serve`."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from hotport.adapters.base import Adapter, Connections, Context
from hotport.adapters.datagram import DatagramAdapter, Datagrams
from hotport.adapters.sockets import SocketsAdapter
from hotport.adapters.target import kind_of, make_adapter
from hotport.channel import Channel
from hotport.errors import StartError
from hotport.model.balance import LOOK_S
from hotport.model.fates import Fate
from hotport.observe.logs import get_shared_logger
from hotport.options import Options
from hotport.trust import Trusted
from hotport.wire.messages import worker_socket
from hotport.worker import background
from hotport.worker.acceptor import Acceptor
from hotport.worker.handoff import Mover, take_connections
from hotport.worker.probe import probe
from hotport.worker.share import Share
from hotport.worker.tls import Tls

__all__ = ["ApplicationServer", "ConnectionServer", "DatagramServer", "SocketsServer", "make_server"]

#: Seconds for which a worker without free descriptors tries to empty the queue of a replaced listener.
REPLACE_TIMEOUT_S: Final = 1.0

#: Seconds until the next attempt to balance when no connection has moved: they may be of a kind that cannot.
NONE_MOVED_PAUSE_S: Final = 10.0

#: Seconds that connections chosen for balancing have to reach a safe point.
BALANCE_TIMEOUT_S: Final = 5.0


class ApplicationServer(Protocol):
    """The interface of a worker's server; its methods are called in this order, `accept` and `quiesce` alternately."""

    connections: Connections

    async def startup(self) -> None:
        """Make the application ready. Raises StartError (HP5xx)."""

    async def accept(self) -> None:
        """Accept connections; started when this returns."""

    def quiesce(self) -> None:
        """Stop accepting; open connections are still served."""

    async def empty(self, timeout_s: float) -> None:
        """Accept the queued connections within `timeout_s`, and from then on late ones: no other worker takes them.

        Handshakes that began before new connections were routed elsewhere end up to a round trip later.
        """

    async def adopt(self, listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
        """Add listeners, by address, and connections that another process has accepted; all are owned from here on.

        A server that accepts also accepts from them at once. A listener replaces one with the same address, whose
        queued connections are accepted.

        Raises:
            OSError: This application takes its listeners only at its start.
        """

    async def release(self, addresses: Collection[str], timeout_s: float) -> None:
        """Accept the queued connections of these addresses, within `timeout_s`, and close their listeners."""

    def reload_tls(self) -> None:
        """Read the certificates again, for new connections; without certificates, do nothing.

        Raises:
            StartError: They cannot be used (HP507, HP513, HP514); the old ones are kept.
        """

    async def drain(self, timeout_s: float, *, is_last: bool = False, successors: Sequence[str] = ()) -> Counter[Fate]:
        """Hand off or finish every connection, cut the remaining ones after `timeout_s`; return the count of each fate.

        Args:
            is_last: No other process shares the listeners: serve queued connections, too.
            successors: Control sockets of the workers to hand connections to.
        """

    async def resume(self, listeners: Sequence[socket.socket]) -> None:
        """Accept again from these listeners (those of the start, in that order), during or after a drain.

        Connections that were told to close still close.
        """

    async def follow(self, successors: Sequence[str]) -> None:
        """Hand connections to these workers from now on, while draining or quiesced.

        Cancellation: safe; connections stay.
        """

    async def rebalance(self) -> int:
        """Hand connections to workers of the same generation that have fewer; return how many have moved."""

    async def probe(self, path: str, timeout_s: float) -> str:
        """Request `path` from the application by HTTP; return the reason of a failure, or an empty string."""

    async def take(self, channel: Channel, version: int, sender: str = "") -> None:
        """Adopt the connections that another worker offers, in envelopes of `version`, until it closes the channel."""

    async def shutdown(self) -> None:
        """Shut the application down."""


class ConnectionServer:
    """Serves applications that get one connection at a time.

    Descriptors: owns `listeners` and closes them when draining starts.
    """

    def __init__(
        self,
        adapter: Adapter,
        listeners: Sequence[socket.socket],
        connections: Connections,
        *,
        tasks: int = 1,
        tls: Tls | None = None,
        proxies: Trusted | None = None,
        hands_off: bool = True,
        names: Sequence[str] = (),
        control_name: str = "",
        share: Share | None = None,
    ) -> None:
        self.connections = connections
        self._share = share
        self._control_name = control_name
        self._may_hand_off = self._hands_off = hands_off
        self._mover: Mover | None = None
        self._released: list[Acceptor] = []
        self._staying: asyncio.Task[None] | None = None
        self._balancing: asyncio.Task[None] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._move_deadline: asyncio.Timeout | None = None
        self._asked: asyncio.Future[int] | None = None
        self._try_again_s = 0.0
        self._beside: set[asyncio.Task[None]] = set()
        self._adapter = adapter
        self._tls = tls
        self._proxies = proxies
        self._tasks = tasks
        self._acceptors = [a for listener in listeners for a in self._acceptors_of(listener)]
        self._names = [name for name in names for _ in range(tasks)]  # of each acceptor
        self._first_names = tuple(self._names)
        self._is_accepting = False
        connections.on_full = self._on_full
        connections.on_room = self._on_room
        self._count_certificates()

    def _acceptors_of(self, listener: socket.socket) -> list[Acceptor]:
        each = (listener, *(listener.dup() for _ in range(self._tasks - 1)))
        return [
            Acceptor(s, self._adapter, self.connections, tls=self._tls, proxies=self._proxies, share=self._share)
            for s in each
        ]

    async def startup(self) -> None:
        await self._adapter.startup()

    async def adopt(self, listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
        replaced = self._take_out(listeners)
        for name, listener in listeners.items():
            acceptors = self._acceptors_of(listener)
            self._acceptors += acceptors
            self._names += [name] * len(acceptors)
            if self._is_accepting and not self.connections.is_full:
                for acceptor in acceptors:
                    acceptor.start()
        for sock in accepted:
            if self._acceptors:
                self._acceptors[0].take(sock)
            else:
                sock.close()
        if replaced:
            await self._let_go(replaced, REPLACE_TIMEOUT_S)

    async def empty(self, timeout_s: float) -> None:
        await _empty(self._acceptors, timeout_s)
        self._is_accepting = True
        self._begin_to_take()

    async def release(self, addresses: Collection[str], timeout_s: float) -> None:
        # Before waiting, during which listeners of the same addresses may be added.
        leaving = self._take_out(addresses)
        await self._let_go(leaving, timeout_s)
        if not self._acceptors:
            self.quiesce()

    def _take_out(self, addresses: Collection[str]) -> list[Acceptor]:
        """Stop, remove and return the acceptors of these addresses."""
        named = list(zip(self._acceptors, self._names, strict=True))
        leaving = [acceptor for acceptor, name in named if name in addresses]
        self._acceptors = [acceptor for acceptor in self._acceptors if acceptor not in leaving]
        self._names = [name for name in self._names if name not in addresses]
        for acceptor in leaving:
            acceptor.stop()
        return leaving

    async def _let_go(self, leaving: Sequence[Acceptor], timeout_s: float) -> None:
        """Accept the queued connections of these acceptors, and close them."""
        await _empty(leaving, timeout_s)
        for acceptor in leaving:
            acceptor.close()
        self._released += leaving

    @property
    def _all(self) -> list[Acceptor]:
        """All acceptors that may still attach a connection."""
        return self._released + self._acceptors

    async def resume(self, listeners: Sequence[socket.socket]) -> None:
        await self._end_balancing()
        await self._stop_moving()
        self._hands_off = self._may_hand_off
        for acceptor in self._all:
            acceptor.close()
        self._acceptors = [a for listener in listeners for a in self._acceptors_of(listener)]
        self._names = list(self._first_names)
        self.connections.resume()
        await self.accept()

    async def accept(self) -> None:
        self._is_accepting = True
        self.connections.count_fates(False)
        self._begin_to_take()
        if self._mover is not None:  # taken back: batches under way arrive, or are withdrawn
            self._staying = background.start("handoff", self._stay(self._mover), self._beside)
            self._mover = None
        if self._share is not None and self._balancing is None:
            self._balancing = background.start("balance", self._balance(), self._beside)

    async def _stay(self, mover: Mover) -> None:
        await mover.close()
        self.connections.lead(None)
        self.connections.moves_early = False

    def quiesce(self) -> None:
        self._is_accepting = False
        self.connections.count_fates(True)
        if self._share is not None:
            self._share.take_part(False)
        self._stop_acceptors()
        self._stop_balancing()

    def held(self) -> dict[str, int]:
        """The descriptors of the open listeners, by address."""
        named = zip(self._names, self._acceptors, strict=False)
        return {name: acceptor.fileno() for name, acceptor in named if acceptor.fileno() >= 0}

    def reload_tls(self) -> None:
        if self._tls is not None:
            self._tls.reload()
            self._count_certificates()

    def _count_certificates(self) -> None:
        if self._tls is not None and self.connections.counts is not None:
            self.connections.counts.certificates(self._tls.expire_at)

    def _stop_acceptors(self) -> None:
        for acceptor in self._acceptors:
            acceptor.stop()

    def _begin_to_take(self) -> None:
        """Accept if there is room, and say so to the others."""
        if self._share is not None:
            self._share.take_part(True, is_full=self.connections.is_full)
        if not self.connections.is_full:
            for acceptor in self._acceptors:
                if acceptor.fileno() >= 0:
                    acceptor.start()

    def _on_full(self) -> None:
        if self._share is not None and self._is_accepting:
            self._share.take_part(True, is_full=True)
        self._stop_acceptors()

    def _on_room(self) -> None:
        if self._is_accepting:
            self._begin_to_take()

    async def _balance(self) -> None:
        """Hand connections to workers with clearly fewer, checking every `LOOK_S`, until cancelled."""
        assert self._share is not None
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_S)
            self._share.look()
            is_moving = any(each and not each.done() for each in (self._moving, self._staying))
            if is_moving or self._mover is not None or not self._hands_off:
                continue
            asked, self._asked = self._asked, None
            if asked is None and loop.time() < self._try_again_s:
                continue
            try:
                moves = self._share.plan_moves(is_asked=asked is not None)
            except Exception:  # ends balancing
                if asked is not None:
                    asked.set_result(0)
                raise
            if moves is not None:
                some = (moves.most, moves.stay_s)
                mover = Mover(self.connections, self._control_name, some=some, has_tls=self._tls is not None)
                self._moving = background.start("balance", self._move_some(mover, moves.paths), self._beside)
                if asked is not None:
                    self._moving.add_done_callback(partial(_say_moved, asked, mover))
            elif asked is not None:
                asked.set_result(0)

    async def rebalance(self) -> int:
        """Hand off connections until shares are as even as possible; return how many have moved."""
        if self._balancing is None or self._balancing.done() or not self._hands_off:
            return 0
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_future()
        return await asyncio.shield(self._asked)

    async def _move_some(self, mover: Mover, paths: Sequence[str]) -> None:
        """It is not cancelled, which would leave what is under way to itself: `_stop_balancing` ends its time."""
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(BALANCE_TIMEOUT_S) as self._move_deadline:
                    if self._balancing is not None:
                        await mover.follow(paths)
                        await mover.wait_through()
        finally:
            await mover.close()
            self.connections.lead(None)
            if not mover.moved:
                self._try_again_s = asyncio.get_running_loop().time() + NONE_MOVED_PAUSE_S
            else:
                to = [os.path.basename(path) for path in paths]
                get_shared_logger("hotport.worker").info("balance.moved", count=mover.moved, to=to)

    def _stop_balancing(self) -> None:
        """Start no more moves for balance; batches under way arrive, or are withdrawn."""
        if self._balancing is not None:
            self._balancing.cancel()
            self._balancing = None
        if self._move_deadline is not None:
            with suppress(RuntimeError):  # it has passed
                self._move_deadline.reschedule(asyncio.get_running_loop().time())
        if self._asked is not None:
            self._asked.set_result(0)
            self._asked = None

    async def _end_balancing(self) -> None:
        """Stop balancing and wait for batches under way; bounded by their timeouts."""
        self._stop_balancing()
        if self._moving is not None:
            await asyncio.wait({self._moving})

    async def follow(self, successors: Sequence[str]) -> None:
        await self._end_balancing()
        await self._end_stay()
        self.connections.moves_early = True
        await self._follow(successors)

    async def _end_stay(self) -> None:
        if self._staying is not None:
            await asyncio.wait({self._staying})
            self._staying = None

    async def _follow(self, successors: Sequence[str]) -> None:
        if self._hands_off and (successors or self._mover is not None):
            if self._mover is None:
                self._mover = Mover(self.connections, self._control_name, has_tls=self._tls is not None)
            await self._mover.follow(successors)

    async def probe(self, path: str, timeout_s: float) -> str:
        return await probe(self._adapter, self.connections, path, timeout_s)

    async def take(self, channel: Channel, version: int, sender: str = "") -> None:
        await take_connections(channel, version, self._adapter, self.connections, sender=sender, tls=self._tls)

    async def drain(self, timeout_s: float, *, is_last: bool = False, successors: Sequence[str] = ()) -> Counter[Fate]:
        try:
            await self._drain(timeout_s, is_last, successors)
        except Exception:  # the worker still leaves: cut and count the remaining connections
            get_shared_logger("hotport.worker").exception("drain.failed")
            await self._cut(is_last)
        return self.connections.fates

    async def _drain(self, timeout_s: float, is_last: bool, successors: Sequence[str]) -> None:
        self.quiesce()
        try:
            async with self.connections.deadline(timeout_s) as deadline:
                await self._end_balancing()
                await self._end_stay()
                self.connections.moves_early = False
                await self._follow(successors)
                self.connections.drain(_left_s(deadline))
                if is_last:
                    for acceptor in self._acceptors:
                        await acceptor.empty()
                for acceptor in self._all:
                    acceptor.close()
                    await acceptor.wait_attached()
                await self.connections.wait_empty()
                await self._adapter.finish()
        except TimeoutError:
            await self._cut(is_last)
        await self._stop_moving()

    async def _cut(self, is_last: bool) -> None:
        self._count_unaccepted(is_last)
        await self._stop_moving()
        if not self.connections.draining.is_set():  # the deadline came during the search for successors
            self.connections.drain(0.0)
        self.connections.cut()
        for acceptor in self._all:
            acceptor.close()
            acceptor.cut_attaching()
        await asyncio.sleep(0)  # transports close their sockets in the next turn of the loop

    async def _stop_moving(self) -> None:
        if self._mover is not None:
            await self._mover.close()
            self._mover = None
            self._hands_off = False

    def _count_unaccepted(self, is_last: bool) -> None:
        """Count queued connections, which the kernel resets when the last listener closes, and close the listeners."""
        if is_last:
            for acceptor in self._acceptors[:: self._tasks]:  # the acceptors in between share its queue
                if waiting := acceptor.waiting():
                    self.connections.fates[Fate.CUT_UNACCEPTED] += waiting
        for acceptor in self._acceptors:
            acceptor.close()

    async def shutdown(self) -> None:
        try:
            await self._adapter.shutdown()
        finally:
            if self._tls is not None:
                self._tls.close()


class DatagramServer:
    """Serves an application of datagrams, from sockets that all workers share.

    Descriptors: owns `listeners`; their transports close them.
    """

    def __init__(self, adapter: DatagramAdapter, listeners: Sequence[socket.socket], connections: Connections) -> None:
        self.connections = connections
        self._adapter = adapter
        self._listeners = listeners
        self._transports: list[Datagrams] = []

    async def startup(self) -> None:
        self._transports = [self._adapter.open(listener) for listener in self._listeners]

    async def accept(self) -> None:
        for transport in self._transports:
            transport.start()

    async def resume(self, listeners: Sequence[socket.socket]) -> None:
        for transport in self._transports:
            transport.abort()
        self._listeners = listeners
        self.connections.resume()
        await self.startup()
        await self.accept()

    def quiesce(self) -> None:
        for transport in self._transports:
            transport.stop()

    async def empty(self, timeout_s: float) -> None:
        """Do nothing: both generations read from the same sockets."""

    async def adopt(self, listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
        """Refuse: the application takes its sockets only at its start."""
        _refuse(listeners, accepted)

    async def release(self, addresses: Collection[str], timeout_s: float) -> None:
        """Do nothing: the sockets are kept until the drain."""

    def reload_tls(self) -> None:
        """Do nothing: datagrams have no TLS."""

    async def follow(self, successors: Sequence[str]) -> None:
        """Do nothing: the successors share the sockets."""

    async def rebalance(self) -> int:
        """Do nothing: there are no connections."""
        return 0

    async def probe(self, path: str, timeout_s: float) -> str:
        return "takes datagrams, and cannot be asked by HTTP: remove health_path"

    async def take(self, channel: Channel, version: int, sender: str = "") -> None:
        """Close the channel: there are no connections."""
        channel.close()

    async def drain(self, timeout_s: float, *, is_last: bool = False, successors: Sequence[str] = ()) -> Counter[Fate]:
        self.quiesce()
        self.connections.drain(timeout_s)
        for transport in self._transports:
            if is_last:
                transport.empty()
            transport.drain()
        try:
            async with self.connections.deadline(timeout_s):
                for transport in self._transports:
                    await transport.closed.wait()
        except TimeoutError:
            left = [transport for transport in self._transports if not transport.closed.is_set()]
            for transport in left:
                transport.abort()
            return Counter({Fate.CUT_DATAGRAM: len(left)})
        return Counter()

    async def shutdown(self) -> None:
        """Do nothing: the transports are closed already."""


class SocketsServer:
    """Runs an application that accepts connections by itself."""

    def __init__(self, adapter: SocketsAdapter, listeners: Sequence[socket.socket], connections: Connections) -> None:
        self.connections = connections
        self._adapter = adapter
        self._listeners = listeners

    async def startup(self) -> None:
        await self._adapter.startup(self._listeners)

    async def accept(self) -> None:
        """Do nothing: the application accepts since `startup`."""

    async def resume(self, listeners: Sequence[socket.socket]) -> None:
        await self._adapter.abort()
        for listener in self._listeners:
            listener.close()
        self._listeners = listeners
        self.connections.resume()
        await self.startup()

    def quiesce(self) -> None:
        """Do nothing: the application accepts until it drains, and sharing the listener loses nothing."""

    async def empty(self, timeout_s: float) -> None:
        """Do nothing: the application accepts until it drains."""

    async def adopt(self, listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket] = ()) -> None:
        """Refuse: the application takes its listeners only at its start."""
        _refuse(listeners, accepted)

    async def release(self, addresses: Collection[str], timeout_s: float) -> None:
        """Do nothing: the application keeps its listeners until it drains."""

    def reload_tls(self) -> None:
        """Do nothing: the application has its own TLS."""

    async def follow(self, successors: Sequence[str]) -> None:
        """Do nothing: the connections cannot move."""

    async def rebalance(self) -> int:
        """Do nothing: the connections cannot move."""
        return 0

    async def probe(self, path: str, timeout_s: float) -> str:
        return "has a server of its own, which cannot be asked but over the port: remove health_path"

    async def take(self, channel: Channel, version: int, sender: str = "") -> None:
        """Close the channel: the application cannot adopt connections."""
        channel.close()

    async def drain(self, timeout_s: float, *, is_last: bool = False, successors: Sequence[str] = ()) -> Counter[Fate]:
        self.connections.drain(timeout_s)
        fate = Fate.SERVER_FINISHED
        try:
            async with self.connections.deadline(timeout_s):
                await self._adapter.finish()
        except TimeoutError:
            fate = Fate.CUT_SERVER
            await self._adapter.abort()
        for listener in self._listeners:
            listener.close()
        return Counter({fate: 1})

    async def shutdown(self) -> None:
        """Do nothing: `drain` has ended the application."""


def _say_moved(asked: asyncio.Future[int], mover: Mover, _: asyncio.Task[None]) -> None:
    """Answer a requested move with its result, also after a cancellation."""
    asked.set_result(mover.moved)


def _left_s(deadline: asyncio.Timeout) -> float:
    return max(0.0, (deadline.when() or 0.0) - asyncio.get_running_loop().time())


async def _empty(acceptors: Sequence[Acceptor], timeout_s: float) -> None:
    """Empty the acceptors' queues within `timeout_s`, which bounds the wait for descriptors."""
    with suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            for acceptor in acceptors:
                await acceptor.empty()


def _refuse(listeners: Mapping[str, socket.socket], accepted: Sequence[socket.socket]) -> NoReturn:
    for sock in (*listeners.values(), *accepted):
        sock.close()
    raise OSError(errno.EOPNOTSUPP, "the application takes its sockets at its start, and only there")


def make_server(
    application: Any,
    context: Context,
    options: Options,
    listeners: Sequence[socket.socket],
    names: Sequence[str] = (),
    share: Share | None = None,
) -> ConnectionServer | DatagramServer | SocketsServer:
    """Make the server for an application, by its kind.

    Args:
        share: The worker's share of new connections; None if no other worker uses the listeners.

    Raises:
        StartError: Its kind is unclear or an extra is missing (HP504, HP505), a listener is not for connections
            (HP511) or not for datagrams (HP519), it cannot start without one (HP530), it cannot be served over TLS
            (HP512) or read a PROXY header (HP518), a certificate cannot be used (HP507, HP513, HP514), or connections
            over TLS cannot move (HP523).
    """
    adapter = make_adapter(application, context, options)
    if isinstance(adapter, SocketsAdapter | DatagramAdapter) and not listeners:
        raise StartError(
            "HP530",
            "this application has no listener to start with",
            cause="it takes its sockets at its start, and the strategy of this restart gives them later",
            fix="hotport restart --strategy inherit",
            note='or set strategy = "auto"',
        )
    if isinstance(adapter, SocketsAdapter):
        if options.proxy_protocol:
            raise StartError(
                "HP518",
                "cannot read the PROXY header for this application",
                cause="it accepts connections by itself (kind sockets)",
                note="remove proxy_protocol, and let the application's own server read the header",
            )
        if options.tls_cert:
            raise StartError(
                "HP512",
                "cannot serve this application over TLS",
                cause="it accepts connections by itself, so that they do not pass through hotport",
                note="remove tls_cert, and give the certificate to its own server",
            )
        return SocketsServer(adapter, listeners, context.connections)
    if isinstance(adapter, DatagramAdapter):
        if any(listener.type != socket.SOCK_DGRAM for listener in listeners):
            raise StartError(
                "HP519",
                "cannot serve this application from a socket for connections",
                cause="it takes datagrams",
                fix="--bind udp://:5353",
            )
        if options.tls_cert:
            raise StartError(
                "HP512",
                "cannot serve this application over TLS",
                cause="TLS needs a connection, and datagrams have none",
                note="remove tls_cert",
            )
        return DatagramServer(adapter, listeners, context.connections)
    if any(listener.type != socket.SOCK_STREAM for listener in listeners):
        raise StartError(
            "HP511",
            "cannot serve this application from a datagram socket",
            cause="it takes connections, and udp has none",
            fix="--bind :8000",
            note="or write the application as an asyncio.DatagramProtocol (--kind datagram)",
        )
    alpn = ["http/1.1"] if kind_of(application, options) == "asgi" else []
    return ConnectionServer(
        adapter,
        listeners,
        context.connections,
        tasks=options.tasks,
        tls=Tls(options, alpn=alpn) if options.tls_cert else None,
        proxies=Trusted(options.trusted_proxy) if options.proxy_protocol else None,
        hands_off=options.handoff != "off",
        names=names,
        control_name=worker_socket(context.generation, context.worker),
        share=share,
    )
