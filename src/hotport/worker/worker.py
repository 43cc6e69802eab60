"""A worker process: serve one generation's application from inherited listeners.

A worker listens on its own control socket from its start, and takes orders from every process of its user. It does not
depend on a living supervisor: logs go to inherited descriptors, messages on the notify socket are datagrams, and the
worker never waits for an order.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import os
import random
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, cast

import msgspec

import hotport
from hotport.adapters.base import Connection, Connections, Context
from hotport.adapters.counts import Counts
from hotport.adapters.target import load_application
from hotport.channel import Channel
from hotport.errors import ControlError, ExitCode, HotportError, KernelError, StartError
from hotport.kernel.counterpage import CounterPage
from hotport.kernel.fds import private_directory
from hotport.kernel.fork import withhold
from hotport.kernel.inotify import Watch
from hotport.kernel.loadpage import LoadPage
from hotport.kernel.notify import notify
from hotport.kernel.process import numbers, raise_descriptor_limit, rss_bytes
from hotport.kernel.sockets import (
    as_sockets,
    bind_control,
    may_command,
    peer_credentials,
    socket_file,
    unlink_if_ours,
)
from hotport.model.fates import by_name
from hotport.model.signals import NOTES, SUSPENDING, TERMINATING, WORKER, Does, Moment
from hotport.observe.logs import count_dropped, dropped, get_logger, revive, set_level
from hotport.options import Options
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import (
    Accepting,
    AcceptOrder,
    Drained,
    DrainOrder,
    ExpectOrder,
    Expired,
    Hello,
    HurryOrder,
    Import,
    Inspection,
    InspectOrder,
    Lingering,
    ListenersOrder,
    Listening,
    ListenOrder,
    LogLevelOrder,
    Memory,
    OfferOrder,
    Order,
    Probed,
    ProbeOrder,
    Quiesced,
    QuiesceOrder,
    Rebalanced,
    RebalanceOrder,
    Released,
    ReleaseOrder,
    ReloadTlsOrder,
    RememberOrder,
    SuccessorsOrder,
    TlsReloaded,
    TransferOrder,
    Transferred,
    Welcome,
    WorkerSpec,
    decode,
    encode,
)
from hotport.wire.sdnotify import encode_notification
from hotport.worker import background
from hotport.worker.imports import measured_imports
from hotport.worker.lag import LagMeter
from hotport.worker.pressure import Pressure
from hotport.worker.server import ApplicationServer, ConnectionServer, make_server
from hotport.worker.share import Share
from hotport.worker.template import run_after_fork

__all__ = ["Worker"]

#: The longest order; a peer that sends more does not speak the protocol.
ORDER_BYTES_MAX: Final = 64 * 1024

#: How many orders of one peer may be queued; a supervisor has a few under way.
ORDERS_MAX: Final = 256

#: Descriptors kept for the application itself when connections are limited by RLIMIT_NOFILE.
RESERVED_DESCRIPTORS: Final = 128

#: How many lingering connections are described.
LINGERING_MAX: Final = 20

#: Seconds for which a worker that a signal ends waits for its successors' addresses.
SUCCESSORS_TIMEOUT_S: Final = 1.0

#: Seconds for which a worker without free descriptors tries to empty its accept queue.
EMPTY_TIMEOUT_S: Final = 1.0

#: Seconds from the welcome to the last listener.
TRANSFER_TIMEOUT_S: Final = 5.0

#: Seconds until READY=1 is sent again if the supervisor's queue was full.
READY_REPEAT_S: Final = 0.25

#: Seconds between two checks of memory, which has no event to await.
MEMORY_CHECK_S: Final = 5.0


class Worker:
    """Runs a worker process, from start-up to the end of its drain.

    Args:
        listeners: Inherited, by address, non-blocking; owned from here on. If empty, `TransferOrder` brings them later.
        control: Bound and listening on `control_path`; both are owned from here on.
        notify_path: The socket for ``READY=1``; None sends nothing.
        page: The descriptor of the load page, owned from here on; -1 if there is none.
        counters: That of its page of counters, likewise.
        application: What a template has loaded; None to load it here.
        stack: How a supervisor finds this process's `hotport.kernel.stacks.StackPipe`.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        listeners: Mapping[str, socket.socket],
        control: socket.socket,
        control_path: str,
        *,
        notify_path: str | None,
        page: int = -1,
        counters: int = -1,
        application: Any = None,
        imports: Sequence[Import] = (),
        stack: tuple[int, int] | None = None,
    ) -> None:
        self._spec = spec
        self._application = application
        self._imports = imports
        self._options: Options = spec.options
        self._listeners = dict(listeners)
        self._control = control
        self._control_file: tuple[int, int] | None = None
        self._close_control: Callable[[], None] = control.close
        self._control_path = control_path
        self._notify_path = notify_path
        self._loop = asyncio.get_running_loop()
        self._log = get_logger("hotport.worker").bind()  # bound now: the application may configure structlog
        self._peers: set[_Peer] = set()
        self._server: ApplicationServer | None = None
        self._starting: asyncio.Task[ApplicationServer] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._beside: set[asyncio.Task[None]] = set()  # tasks that the next order does not wait for
        self._lag = LagMeter()
        self._stack = stack
        self._pressure: Pressure | None = None
        self._page: LoadPage | None = None
        try:
            self._page = LoadPage(page, spec.worker) if page >= 0 else None
        except OSError as error:
            self._log.warning("balance.off", error=str(error))
        self._counters: CounterPage | None = None
        try:
            self._counters = CounterPage(counters) if counters >= 0 else None
        except OSError as error:
            self._log.warning("metrics.off", error=str(error))
        if self._counters is not None:
            count_dropped(self._counters.cells)
        self._is_quiesced = False
        self._following: asyncio.Task[None] | None = None  # while quiesced, the task that hands off connections
        # A service manager may signal all processes at once, so a leaving worker also serves queued connections.
        self._drain_order = DrainOrder(timeout_s=self._options.drain_timeout_s, is_last=True)
        self._leaving = asyncio.Event()
        self._is_asking = False  # has sent STOPPING=1, and waits for its successors' addresses
        self._signals = 0  # how many terminating signals have come
        self._orphan_timer: asyncio.TimerHandle | None = None
        self._has_expired = False
        self._is_accepting: bool | None = None  # None before the first order to accept
        self._watch: Watch | None = None  # of the runtime directory, while there is no supervisor
        self._memory: Memory | None = None
        self._expected: set[str] = set()  # workers for whose connections room is reserved
        self._drained: Drained | None = None
        withhold(self)

    def descriptors(self) -> Iterator[int]:
        """The worker's own descriptors, which a forked child must not have."""
        yield self._control.fileno()
        yield from (listener.fileno() for listener in self._listeners.values())
        yield from (peer.fileno() for peer in self._peers)

    async def run(self) -> int:
        """Start up, serve until told to leave, drain; return the process's exit code."""
        await self._listen(self._control)
        self._watch_for_orphanhood(self._options.ready_timeout_s)
        try:
            with self._handling_signals():
                return await self._serve()
        finally:
            self._lag.close()
            if self._page is not None:
                self._page.close()
            if self._counters is not None:
                count_dropped(None)
                self._counters.close()
            if self._pressure is not None:
                self._pressure.close()
            for peer in list(self._peers):
                peer.close()
            self._unwatch_files()
            self._close_control()
            unlink_if_ours(self._control_path, self._control_file)

    async def _serve(self) -> int:
        self._starting = self._loop.create_task(self._start())
        leaving = self._loop.create_task(self._leaving.wait())
        await asyncio.wait({self._starting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not self._starting.done():  # ended before it was ready: there are no connections
            self._starting.cancel()
            await asyncio.wait({self._starting}, timeout=self._options.kill_timeout_s)
            return ExitCode.DONE
        try:
            self._server = self._starting.result()
        except Exception as error:
            leaving.cancel()
            self._fail(error)
            return ExitCode.NOT_STARTED
        await self._keep_listening()
        self._say_ready()
        self._log.info("worker.ready")
        self._watch_age()
        await leaving
        self._draining = self._loop.create_task(self._drain(self._server))
        await self._draining
        return ExitCode.DONE

    def _say_ready(self) -> None:
        """Send READY=1, and retry while the supervisor's queue is full."""
        has_said = self._tell(ready=True, status="ready")
        if not has_said and self._notify_path is not None and not self._leaving.is_set():
            self._loop.call_later(READY_REPEAT_S, self._say_ready)

    # -- start ---------------------------------------------------------------------------------------------

    async def _start(self) -> ApplicationServer:
        options = self._options
        limit = raise_descriptor_limit()
        connections = Connections(
            maximum=options.connections_max or max(16, limit - RESERVED_DESCRIPTORS),
            requests_max=_with_jitter(options.max_requests, options.max_requests_jitter),
        )
        if self._counters is not None:
            connections.counts = Counts(self._counters.cells, self._counters.seconds)
        connections.on_requests_max = lambda: self._expire(f"served {connections.requests} requests")
        context = Context(connections, self._spec.service, self._spec.generation, self._spec.worker)
        application = self._application
        if application is None:
            with measured_imports() as self._imports:
                application = load_application(options)
        run_after_fork()
        server = make_server(
            application,
            context,
            options,
            list(self._listeners.values()),
            list(self._listeners),
            self._take_share(connections),
        )
        await server.startup()
        revive()
        gc.collect()
        gc.freeze()  # imported objects stay, and scanning them would take longer than most requests
        return server

    def _take_share(self, connections: Connections) -> Share | None:
        """Show the other workers this one's load, and see theirs; None without a page."""
        if self._page is None:
            return None
        connections.gauge = self._page.gauge
        return Share(self._page, self._spec.generation, self._spec.directory)

    def _fail(self, error: BaseException) -> None:
        """Report a failed start to the supervisor, else log it."""
        if isinstance(error, HotportError):
            text = str(error)
        else:
            text = _traceback(error)
        if not self._tell(status="failed to start", error=text):
            self._log.error("worker.failed", error=text)

    def _watch_age(self) -> None:
        if self._options.max_age_s:
            age = self._options.max_age_s * random.uniform(0.9, 1.1)
            self._loop.call_later(age, self._expire, f"served for {age:.0f} s")
        most, used = self._options.max_memory_bytes, rss_bytes(os.getpid())
        if most and used >= most:  # its replacement would be replaced at once, too, and so on
            self._log.warning(
                "memory.not_watched",
                why=f"this worker has {used >> 20} MiB when it starts, and max_memory is {most >> 20} MiB",
                note="choose a max_memory that leaves room above that",
            )
        elif most:
            self._check_memory()
        if self._options.memory_pressure_bytes and self._server is not None:
            self._pressure = Pressure(self._server.connections, self._options.memory_pressure_bytes)

    def _check_memory(self) -> None:
        used = rss_bytes(os.getpid())
        if used > self._options.max_memory_bytes:
            self._expire(f"uses {used >> 20} MiB of memory")
        else:
            self._loop.call_later(MEMORY_CHECK_S, self._check_memory)

    def _expire(self, why: str) -> None:
        if not self._has_expired:
            self._has_expired = True
            self._log.info("worker.expired", why=why)
            self._broadcast(Expired(why=why))

    # -- leave ---------------------------------------------------------------------------------------------

    @contextmanager
    def _handling_signals(self) -> Iterator[None]:
        """Handle signals as `WORKER` says; an application imported later may replace the handlers."""
        handled = [name for name, row in WORKER.items() if set(row.values()) != {Does.NOTHING}]
        before = {number: signal.getsignal(number) for number in numbers(WORKER.keys())}
        for name in handled:
            self._loop.add_signal_handler(signal.Signals[name], self._on_signal, name)
        for number in numbers(SUSPENDING):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, before.keys())
        try:
            yield
        finally:
            for name in handled:
                self._loop.remove_signal_handler(signal.Signals[name])
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, name: str) -> None:
        self._signals += name in TERMINATING
        does = WORKER[name][self._moment()]
        if does is Does.NOTE:
            self._log.info("signal.ignored", signal=name, why=NOTES[name])
            return
        self._log.info("signal.received", signal=name, does=does.value)
        match does:
            case Does.LEAVE | Does.DRAIN:
                self._ask_to_leave()
            case Does.CUT:
                self._hurry()
            case Does.SECOND if self._signals > 1:
                self._hurry()
            case _:
                pass

    def _moment(self) -> Moment:
        if self._leaving.is_set() or self._is_asking:
            return Moment.STOPPING if self._drain_order.is_last else Moment.DRAINING
        if self._server is None:
            return Moment.STARTING
        return Moment.RESTARTING if self._is_quiesced else Moment.SERVING

    def _ask_to_leave(self) -> None:
        """Drain, once the supervisor has named the successors."""
        self._is_asking = True
        self._tell(stopping=True, status="draining")
        if self._server is not None and self._peers:
            self._loop.call_later(SUCCESSORS_TIMEOUT_S, self._leaving.set)
        else:
            self._leaving.set()

    def _hurry(self) -> None:
        """Leave now, and cut open connections."""
        self._log.info("drain.hurried")
        if not self._leaving.is_set():
            self._tell(stopping=True, status="leaving at once")
        if self._server is not None:
            self._server.connections.hurry()
        self._leaving.set()

    def _leave(self, order: DrainOrder) -> None:
        self._drain_order = order
        self._leaving.set()

    async def _drain(self, server: ApplicationServer) -> None:
        order = self._drain_order
        self._log.info("drain.began", connections=len(server.connections.open))
        fates = await server.drain(order.timeout_s, is_last=order.is_last, successors=order.successors)
        told = by_name(fates)
        self._log.info("drain.ended", **told)
        self._drained = Drained(fates=told, moves=tuple(server.connections.moves))
        self._broadcast(self._drained)
        try:
            async with asyncio.timeout(self._options.kill_timeout_s):
                await server.shutdown()
        except TimeoutError:
            self._log.warning("worker.shutdown_overdue", timeout_s=self._options.kill_timeout_s)
        except Exception:
            self._log.exception("worker.shutdown_failed")

    def _watch_for_orphanhood(self, extra_s: float = 0.0) -> None:
        """Leave after ``orphan_timeout`` if no peer is connected to the control socket."""
        if self._orphan_timer is not None:
            self._orphan_timer.cancel()
            self._orphan_timer = None
        if not self._peers:
            delay = self._options.orphan_timeout_s + extra_s
            self._orphan_timer = self._loop.call_later(delay, self._orphaned, delay)

    def _watch_files(self) -> None:
        """Watch the control socket's file while there is no supervisor: the next one finds the worker by it."""
        with suppress(KernelError):
            self._watch = Watch()
            self._loop.add_reader(self._watch.fileno(), self._on_files_changed)
            self._on_files_changed()  # a file that is already missing causes no event

    def _unwatch_files(self) -> None:
        if self._watch is not None:
            self._loop.remove_reader(self._watch.fileno())
            self._watch.close()
            self._watch = None

    def _on_files_changed(self) -> None:
        if self._watch is None:
            return
        self._watch.drain()
        with suppress(HotportError):  # `_keep_listening` logs the obstacle
            private_directory(os.path.dirname(self._spec.directory))
            private_directory(self._spec.directory)
        self._watch.add_directory(self._spec.directory)
        background.start("control", self._keep_listening(), self._beside)

    def _orphaned(self, delay: float) -> None:
        self._log.warning("worker.orphaned", waited_s=delay)
        self._leave(DrainOrder(timeout_s=self._options.drain_timeout_s, is_last=True))

    # -- control -------------------------------------------------------------------------------------------

    def peer_joined(self, peer: _Peer) -> None:
        """Register a control connection, and send it the worker's state."""
        self._peers.add(peer)
        self._unwatch_files()
        self._watch_for_orphanhood()
        spec = self._spec
        peer.say(
            Hello(
                pid=os.getpid(),
                service=spec.service,
                generation=spec.generation,
                worker=spec.worker,
                phase=self._phase(),
                memory=self._memory,
                stack=self._stack,
                imports=tuple(self._imports),
            )
        )
        if self._has_expired:
            peer.say(Expired(why="expired before"))
        if self._drained is not None:
            peer.say(self._drained)

    def _phase(self) -> str:
        if self._leaving.is_set():
            return "draining"
        if self._server is None:
            return "starting"
        return {None: "ready", True: "serving", False: "quiesced"}[self._is_accepting]

    def peer_left(self, peer: _Peer) -> None:
        """Handle the end of a control connection."""
        if peer in self._peers:
            self._peers.discard(peer)
            self._watch_for_orphanhood()
            if not self._peers and self._watch is None and self._server is not None and not self._leaving.is_set():
                self._watch_files()
            if not self._peers:  # no peer would report the end of the expected workers
                self._expect(dict.fromkeys(self._expected, 0))

    async def _listen(self, control: socket.socket) -> None:
        self._control, self._control_file = control, socket_file(self._control_path)
        self._close_control = (await self._loop.create_unix_server(lambda: _Peer(self), sock=control)).close

    async def _keep_listening(self) -> None:
        """Recreate the control socket if its file has disappeared: others find this worker by it."""
        if socket_file(self._control_path) == self._control_file:
            return
        try:
            control = bind_control(self._control_path)
        except HotportError as error:
            self._log.warning("control.not_remade", error=str(error))
            return
        close = self._close_control
        await self._listen(control)
        close()
        self._log.warning("control.remade", path=self._control_path)

    async def obey(self, order: Order, peer: _Peer) -> None:
        """Carry out an order, and report the result."""
        match order:
            case DrainOrder():
                self._leave(order)
            case HurryOrder():
                self._hurry()
            case InspectOrder():
                peer.say(self._inspect(is_watched=order.is_watched))
            case SuccessorsOrder(successors=successors):
                self._drain_order = msgspec.structs.replace(self._drain_order, successors=successors)
                if self._server is not None and self._draining is not None:
                    background.start(
                        "handoff", self._server.follow(successors), self._beside
                    )  # not awaited: it may take long, and the next order may be to hurry
                elif self._is_asking:
                    self._leaving.set()
                elif self._is_quiesced:
                    self._follow(successors)
            case ListenOrder():
                await self._keep_listening()
            case OfferOrder(version=version, sender=sender):
                self._take(version, sender, peer)
            case ExpectOrder(connections=connections):
                self._expect(connections)
            case ReloadTlsOrder():
                peer.say(TlsReloaded(error=self._reload_tls()))
            case LogLevelOrder(level=level):
                set_level(level)
                self._log.info("log.level", level_now=level)
            case RememberOrder(memory=memory):
                self._memory = memory
            case ListenersOrder():
                background.start("listeners", self._pass_listeners(Channel(peer.detach())), self._beside)
            case TransferOrder():
                self._take_listeners(order, peer)
            case ProbeOrder() if self._server is not None:
                background.start("probe", self._probe(self._server, order, peer), self._beside)
            case RebalanceOrder() if self._server is not None:
                background.start("balance", self._rebalance(self._server, peer), self._beside)
            case _ if self._server is None or self._leaving.is_set():
                self._log.warning("control.too_early_or_late", order=type(order).__name__)
            case AcceptOrder():
                self._is_quiesced = False
                if self._following is not None:
                    self._following.cancel()
                fates = by_name(self._server.connections.fates)
                await self._server.accept()
                self._is_accepting = True
                peer.say(Accepting(at_s=time.monotonic(), fates=fates))
            case QuiesceOrder(empties=empties):
                self._is_quiesced = True
                self._server.quiesce()
                self._is_accepting = False
                if empties:
                    await self._server.empty(EMPTY_TIMEOUT_S)
                peer.say(Quiesced(at_s=time.monotonic()))
            case ReleaseOrder(addresses=addresses, timeout_s=timeout_s):
                await self._server.release(addresses, timeout_s)
                self._is_quiesced, self._is_accepting = True, False
                peer.say(Released(addresses=addresses, at_s=time.monotonic()))

    def _follow(self, successors: Sequence[str]) -> None:
        """Hand off connections while quiesced; in the background, since the next order may be to accept again."""
        assert self._server is not None
        before, server = self._following, self._server

        async def follow() -> None:
            if before is not None:
                before.cancel()
                await asyncio.wait({before})
            await server.follow(successors)

        self._following = background.start("handoff", follow(), self._beside)

    def _expect(self, connections: Mapping[str, int]) -> None:
        self._expected |= connections.keys()
        if self._server is not None:
            for name, count in connections.items():
                self._server.connections.keep(name, count)

    def _take(self, version: int, sender: str, peer: _Peer) -> None:
        """Adopt another worker's connections, over its control connection, which now carries nothing else."""
        channel = Channel(peer.detach())
        if self._server is None:
            channel.close()
            return
        background.start("handoff", self._server.take(channel, version, sender), self._beside)

    async def _pass_listeners(self, channel: Channel) -> None:
        """Send the next supervisor duplicates of the open listeners, and of the load page."""
        if isinstance(self._server, ConnectionServer):
            listeners = self._server.held()
        else:
            listeners = {name: sock.fileno() for name, sock in self._listeners.items() if sock.fileno() >= 0}
        with channel, suppress(OSError):  # the supervisor has ended
            pages = [self._page.fileno()] if self._page is not None else []
            told = Listening(addresses=tuple(listeners), has_page=bool(pages))
            await channel.say(told, [*listeners.values(), *pages])

    def _take_listeners(self, order: TransferOrder, peer: _Peer) -> None:
        """Receive listeners over a control connection, which now carries nothing else."""
        background.start("transfer", self._receive_listeners(order, Channel(peer.detach())), self._beside)

    async def _receive_listeners(self, order: TransferOrder, channel: Channel) -> None:
        count = len(order.addresses) + order.connections
        try:
            if self._server is None or self._leaving.is_set():
                return
            await channel.say(Welcome(room=count))
            async with asyncio.timeout(TRANSFER_TIMEOUT_S):
                sockets = as_sockets(await channel.receive_descriptors(count))
            listeners = dict(zip(order.addresses, sockets, strict=False))
            await self._server.adopt(listeners, sockets[len(listeners) :])
            await channel.say(Transferred(count=count))
        except (OSError, EOFError) as error:  # the sender still has all of them
            self._log.warning("transfer.failed", error=str(error) or type(error).__name__)
        finally:
            channel.close()

    async def _probe(self, server: ApplicationServer, order: ProbeOrder, peer: _Peer) -> None:
        peer.say(Probed(why=await server.probe(order.path, order.timeout_s)))

    async def _rebalance(self, server: ApplicationServer, peer: _Peer) -> None:
        peer.say(Rebalanced(moved=await server.rebalance()))

    def _inspect(self, *, is_watched: bool) -> Inspection:
        connections = self._server.connections if self._server is not None else None
        return Inspection(
            connections=len(connections.open) if connections else 0,
            accepted=connections.accepted if connections else 0,
            adopted=connections.adopted if connections else 0,
            lingering=_lingering(connections) if connections and self._leaving.is_set() else (),
            requests=connections.requests if connections else 0,
            rss_bytes=rss_bytes(os.getpid()),
            errors=connections.errors if connections else 0,
            timeouts=connections.timeouts if connections else 0,
            lag_s=self._lag.read() if is_watched else 0.0,
            log_dropped=dropped(),
            cuts=by_name(connections.cuts) if connections else {},
        )

    def _reload_tls(self) -> str:
        """Reload the certificates; return why the old ones are kept, else an empty string."""
        try:
            if self._server is not None:
                self._server.reload_tls()
        except StartError as error:
            self._log.warning("tls.kept", error=str(error))
            return str(error)
        self._log.info("tls.reloaded")
        return ""

    def _broadcast(self, message: Any) -> None:
        for peer in list(self._peers):
            peer.say(message)

    def _tell(self, **said: Any) -> bool:
        """Notify the supervisor; False if none receives the message."""
        return self._notify_path is not None and notify(self._notify_path, encode_notification(**said))


class _Peer(asyncio.Protocol):
    """One control connection, from a supervisor or another process of the user."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._decoder = FrameDecoder(frame_bytes_max=ORDER_BYTES_MAX)
        self._transport: asyncio.Transport | None = None
        self._orders: asyncio.Queue[Order] = asyncio.Queue(ORDERS_MAX)
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop has classes of its own
        _, uid, _ = peer_credentials(transport.get_extra_info("socket"))
        if not may_command(uid):
            self._transport.abort()
            return
        self._task = asyncio.get_running_loop().create_task(self._obey())
        self._worker.peer_joined(self)

    def data_received(self, data: bytes) -> None:
        try:
            for payload in self._decoder.feed(data):
                self._orders.put_nowait(decode(payload, Order))
        except ControlError as error:
            get_logger("hotport.control").warning("control.garbage", error=str(error))
            self.close()
        except asyncio.QueueFull:
            get_logger("hotport.control").warning("control.flooded", orders_max=ORDERS_MAX)
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        self._worker.peer_left(self)

    def say(self, message: Any) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(encode(message)))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def fileno(self) -> int:
        """The connection's descriptor; -1 once it is closed."""
        assert self._transport is not None
        return int(self._transport.get_extra_info("socket").fileno())

    def detach(self) -> socket.socket:
        """Return the connection as a socket; this object stops reading and writing."""
        assert self._transport is not None
        sock = socket.socket(fileno=os.dup(self.fileno()))
        self._transport.abort()
        self._worker.peer_left(self)
        return sock

    async def _obey(self) -> None:
        try:
            while True:
                await self._worker.obey(await self._orders.get(), self)
        except Exception:  # close, so that the peer does not wait for an answer
            get_logger("hotport.control").exception("control.failed")
            self.close()


def _traceback(error: BaseException) -> str:
    """Format a traceback from the application's first frame on, without those of hotport and the import system."""
    told = traceback.TracebackException.from_exception(error)
    package = os.path.dirname(hotport.__file__)
    ours = [f.filename.startswith((package, "<frozen importlib", importlib.__file__)) for f in told.stack]
    if all(ours) and told.stack[-1].filename.startswith("<frozen importlib"):
        return "".join(told.format_exception_only()).rstrip()  # it cannot be read or parsed: none of its code has run
    first = ours.index(False) if False in ours else 0
    told.stack = traceback.StackSummary.from_list(told.stack[first:])
    return "".join(told.format()).rstrip()


def _lingering(connections: Connections) -> tuple[Lingering, ...]:
    """Describe the oldest connections that delay the end of the drain."""
    now = asyncio.get_running_loop().time()
    oldest = sorted(connections.open.items(), key=lambda item: item[1])[:LINGERING_MAX]
    return tuple(
        Lingering(
            peer=_peer_name(each),
            kind=each.kind,
            age_s=round(now - since, 3),
            why="no new worker has room for it" if each in connections.crowded else each.why_here(),
        )
        for each, since in oldest
    )


def _peer_name(connection: Connection) -> str:
    match connection.endpoints:
        case ((str(host), int(port), *_), _):
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return "a unix socket"


def _with_jitter(value: int, jitter: int) -> int:
    return value + random.randint(0, jitter) if value else 0
