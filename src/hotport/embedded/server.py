"""A server in the program's own event loop (`serve`) that can restart the program (`Server.restart`)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Unpack

import anyio

from hotport.adapters.base import Connections, Context, Draining
from hotport.address import UnixAddress, parse_address
from hotport.embedded.keeper import keeping
from hotport.embedded.manager import Notifier
from hotport.embedded.predecessor import Predecessor
from hotport.embedded.program import Program, Start
from hotport.embedded.successor import Successor
from hotport.errors import ConfigError, HotportError, RestartError
from hotport.kernel.fork import withhold
from hotport.kernel.process import ends_with_terminal, has_terminal
from hotport.kernel.sockets import (
    bind_listener,
    bound_address,
    file_path,
    location,
    passed_addresses,
    socket_file,
    take_waiting,
    unlink_if_ours,
)
from hotport.model.fates import Fate, by_name
from hotport.options import Options
from hotport.options.keywords import ServeOptions
from hotport.options.loading import load
from hotport.worker import background
from hotport.worker.server import ConnectionServer, DatagramServer, SocketsServer, make_server

__all__ = ["OpenConnections", "Restarted", "Server", "serve"]

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

log = logging.getLogger("hotport.embedded")

#: The servers that run in this process: a restart starts the whole program, so it must mean all of them.
_servers: Final[set[Server]] = set()


@dataclass(frozen=True, slots=True)
class Restarted:
    """The result of a restart that is done; this process serves no clients any more.

    Attributes:
        pid: The process that serves now.
        generation: Its number; the program as it was first started is number 1.
        ready_s: From the call until the new process accepted; this one accepted all the time.
        drained_s: From the call until the last connection of this process had gone.
        connections: What became of the connections that were open, by fate, as in a restart report.
    """

    pid: int
    generation: int
    ready_s: float
    drained_s: float
    connections: Mapping[str, int]

    @property
    def handed_off(self) -> int:
        """Connections that the new process serves."""
        return sum(count for fate, count in self.connections.items() if Fate(fate).is_moved)

    @property
    def cut(self) -> int:
        """Connections that were closed in the middle of work at the end of ``drain_timeout``."""
        return sum(count for fate, count in self.connections.items() if Fate(fate).is_cut)

    @property
    def finished(self) -> int:
        """All others: they ended by themselves, or after finishing what they had begun."""
        return sum(self.connections.values()) - self.handed_off - self.cut


class _Listener:
    """One address, whichever process accepts from it.

    Descriptors: owns a duplicate of `socket`, so that a successor can have it; `socket` itself is the server's.

    Attributes:
        place: What was asked for, see `location`.
        address: Where it is.
    """

    def __init__(self, text: str, sock: socket.socket, backlog: int, *, is_adopted: bool) -> None:
        address = parse_address(text)
        self._backlog = backlog
        self.place = str(location(text))
        self.socket = sock
        self.address = str(bound_address(address, sock))
        self.kept = sock.dup()
        self._path = file_path(address)
        self._file = socket_file(self._path)
        #: While a predecessor may still serve here, its socket file is not ours to remove.
        self.is_ours = not is_adopted
        self._is_dropped = False
        withhold(self)

    def descriptors(self) -> tuple[int, ...]:
        """Descriptors that a forked child must not keep."""
        return self.socket.fileno(), self.kept.fileno()

    @property
    def path(self) -> str:
        """Its socket file, if this process or a predecessor has made it."""
        return self._path

    @property
    def is_gone(self) -> bool:
        """Whether its socket file was removed or replaced: new clients do not find it."""
        is_kept = bool(self._path) and self.is_ours and not self._is_dropped
        return is_kept and (self._file is None or socket_file(self._path) != self._file)

    async def remake(self, adopt: Callable[[Mapping[str, socket.socket]], Awaitable[None]]) -> None:
        """Bind its path again and accept there.

        Raises:
            KernelError: Another process has the path, or nothing can be made there.
            OSError: The application takes no listener any more; nothing has changed.
        """
        sock = bind_listener(UnixAddress(self._path), backlog=self._backlog)
        file = socket_file(self._path)
        try:
            await adopt({self.address: sock.dup()})
        except BaseException:
            sock.close()
            unlink_if_ours(self._path, file)
            raise
        self.kept.close()
        self.kept, self._file = sock, file

    def drop(self) -> None:
        """Close a listener that the successor does not want: no process accepts there afterwards."""
        self._is_dropped = True
        self.kept.close()

    def renew(self) -> socket.socket:
        """Return the listener again after `socket` was closed."""
        if self._is_dropped:
            self._is_dropped = False
            address = UnixAddress(self._path) if self._path else parse_address(self.address)
            self.kept = bind_listener(address, backlog=self._backlog)
            self._file = socket_file(self._path)
        self.socket = self.kept.dup()
        return self.socket

    def close(self, *, is_passed_on: bool = False) -> None:
        """Close it, and remove its socket file unless a successor accepts there."""
        self.socket.close()
        self.kept.close()
        if self.is_ours and (self._is_dropped or not is_passed_on):
            unlink_if_ours(self._path, self._file)


def _listen(text: str, backlog: int, predecessor: Predecessor | None) -> Iterator[_Listener]:
    """Return the listeners of an address, passed or bound now; several for ``systemd:NAME``."""
    adopted = predecessor.adopt(text) if predecessor is not None else []
    for sock in adopted:
        yield _Listener(text, sock, backlog, is_adopted=True)
    for address in passed_addresses(parse_address(text)) if not adopted else ():
        yield _Listener(text, bind_listener(address, backlog=backlog), backlog, is_adopted=False)


class OpenConnections:
    """The connections of a server, read only."""

    __slots__ = ("_connections",)

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    @property
    def open(self) -> Mapping[Any, float]:
        """The open connections, with the time at which each was accepted, by the event loop's clock; a live view."""
        return MappingProxyType(self._connections.open)

    @property
    def fates(self) -> Mapping[Fate, int]:
        """How many connections ended in which way while draining; a live view."""
        return MappingProxyType(self._connections.fates)

    @property
    def accepted(self) -> int:
        """How many connections were accepted."""
        return self._connections.accepted

    @property
    def requests(self) -> int:
        """How many requests were begun; a stream counts as one."""
        return self._connections.requests

    @property
    def errors(self) -> int:
        """How many requests failed: answers of 5xx, and those that were broken off."""
        return self._connections.errors

    @property
    def draining(self) -> Draining:
        """The drain notice."""
        return self._connections.draining


class Server:
    """A server that runs in the event loop that made it.

    Attributes:
        addresses: Where it listens, port 0 resolved.
        connections: The open connections, their counts, and the drain notice; read only.
        generation: 1 in the program as it was first started, one more in each successor.
        passed: What the predecessor has passed with `pass_on`: descriptors by name. The program closes them.
    """

    def __init__(
        self,
        inner: ConnectionServer | DatagramServer | SocketsServer,
        listeners: Sequence[_Listener],
        settings: Options,
        predecessor: Predecessor | None,
    ) -> None:
        self.addresses = tuple(listener.address for listener in listeners)
        self.connections = OpenConnections(inner.connections)
        self.generation = predecessor.spec.generation if predecessor is not None else 1
        self.passed: Mapping[str, int] = predecessor.passed if predecessor is not None else MappingProxyType({})
        self._passed_on: dict[str, FileDescriptorLike] = {}
        self._inner = inner
        self._listeners = listeners
        self._settings = settings
        self._predecessor = predecessor
        self._manager = (
            predecessor.manager if predecessor is not None else Notifier(os.environ.get("NOTIFY_SOCKET", ""))
        )
        self._program = Program.snapshot()
        self._closed = asyncio.Event()
        self._restarting: asyncio.Task[Restarted] | None = None
        self._mending = asyncio.Lock()
        self._has_committed = False
        self._is_succeeded = False
        self._is_ending = False

    async def _mend_in_between(self) -> bool:
        """Bind listeners again whose socket files have disappeared; return whether any was bound.

        A running restart is waited for: its successor has what was passed to it.
        """
        if self._restarting is not None and not self._restarting.done():
            await asyncio.wait({self._restarting})
        return await self._mend()

    async def _mend(self) -> bool:
        has_made = False
        async with self._mending:
            for listener in self._listeners:
                if not listener.is_gone or self._is_ending or self._is_succeeded:
                    continue
                try:
                    await listener.remake(self._inner.adopt)
                except (OSError, HotportError) as error:
                    log.error("the socket file of %s is gone, and is not made again: %s", listener.address, error)
                else:
                    log.warning("the socket file of %s was gone, and is made again", listener.address)
                    has_made = True
        return has_made

    def close(self) -> None:
        """Let `wait_closed` return, so that the ``async with`` block ends and drains."""
        self._closed.set()

    def reload_tls(self) -> None:
        """Read the certificates again, for new connections.

        Raises:
            StartError: They cannot be used; those from before are kept.
        """
        self._inner.reload_tls()

    def pass_on(self, name: str, file: FileDescriptorLike) -> None:
        """Pass a descriptor to the successor of each restart from now on, which finds it in `passed`.

        A state that is small goes the same way: in a file of ``os.memfd_create``.

        Args:
            name: The successor's key; a second file of that name replaces the first.
            file: A descriptor, or an object with ``fileno()``. The program owns it, and keeps it open: one that is
                closed by then makes the restart fail (HP444).
        """
        self._passed_on[name] = file

    async def wait_closed(self) -> None:
        """Wait until `close` has been called or a restart is done."""
        await self._closed.wait()

    async def restart(self, argv: Sequence[str] | None = None) -> Restarted:
        """Start this program again, hand everything over to the new process, and let `wait_closed` return.

        The new process gets the listeners, imports the program as it is on disk now, and binds nothing that is bound
        already. Once it accepts, this one stops accepting, hands over the connections that can move, lets the others
        finish within ``drain_timeout`` seconds and cuts the rest. Until then every failure leaves this process serving
        as if nothing had been asked.

        Args:
            argv: What to execute; by default the command line with which this process was started, in the working
                directory that it had then, whose symbolic links are followed anew.

        Returns:
            What became of the connections, once the last one is gone and the service manager has been told the new
            pid. End the program then.

        Raises:
            RestartError: This process cannot be succeeded (HP440, HP441, HP442, HP443), does not serve alone
                (HP447) or is busy with another restart (HP448); the new process could not be started (HP444), has
                ended (HP445) or was not ready within ``ready_timeout`` seconds (HP446). This process serves on. So it
                does if the new one dies before this one has ended (HP449); connections that it had by then are lost.

        Cancellation: until the new process accepts, it is ended, and this one serves on. After that the restart goes
            on without its caller.
        """
        assert not isinstance(argv, str), "argv is a list of words"
        assert argv is None or argv, "argv begins with the program"
        self._refuse(argv)
        task = self._restarting = asyncio.get_running_loop().create_task(self._restart(argv))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # its caller may be gone
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():  # by the end of the block
                raise _refused("this server was closed meanwhile", self.generation) from None
            if not self._has_committed:
                task.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({task})
            raise

    def _refuse(self, argv: Sequence[str] | None) -> None:
        busy = ""
        if self._restarting is not None and not self._restarting.done():
            busy = "another restart of this process is not over"
        elif self._predecessor is not None and not self._predecessor.has_ended:
            busy = f"its predecessor, pid {self._predecessor.spec.predecessor}, has not ended yet"
        elif self._closed.is_set() or self._is_ending:
            busy = "this server is closed"
        if busy:
            raise _refused(busy, self.generation)
        if len(_servers) > 1:
            raise RestartError(
                "HP447",
                "cannot restart one of several servers",
                cause=f"this process has {len(_servers)} open blocks of hotport.serve, and its successor serves all or "
                "none",
                note="serve one application on several addresses, or run each with hotport serve",
                serving=self.generation,
            )
        self._program.refuse_if_it_cannot(argv, self.generation)

    async def _restart(self, argv: Sequence[str] | None) -> Restarted:
        began_s = time.monotonic()
        if self._predecessor is not None:
            await self._predecessor.over.wait()
        start = self._program.resolve(argv, self.generation)
        await self._mend()  # or the successor would listen where nobody finds it
        await self._manager.say(reloading=True, monotonic_s=began_s, status="restarting")
        try:
            successor, dropped = await self._bring_up(start)
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                why = error.what if isinstance(error, HotportError) else "it was cancelled"
                await self._manager.say(
                    ready=True, status=f"restart aborted, generation {self.generation} serves: {why}"
                )
            raise
        ready_s = time.monotonic() - began_s
        try:
            self._inner.quiesce()
            for number in dropped:
                self._listeners[number].drop()
            await self._manager.say(ready=True, status=f"generation {self.generation + 1} serves, pid {successor.pid}")
            fates = await self._leave(successor, is_last=bool(dropped))
            if not successor.ended.is_set():
                await self._manager.pass_to(successor.pid)
        finally:
            self._has_committed = False
            successor.close()
        self._is_succeeded = True
        self._closed.set()
        return Restarted(
            pid=successor.pid,
            generation=self.generation + 1,
            ready_s=ready_s,
            drained_s=time.monotonic() - began_s,
            connections=by_name(fates),
        )

    async def _bring_up(self, start: Start) -> tuple[Successor, tuple[int, ...]]:
        """Start a successor; return it once it accepts, with the listeners it does not want; clean up if it fails."""
        successor = Successor.start(
            start,
            generation=self.generation + 1,
            manager=self._manager.path,
            listeners=[listener.kept for listener in self._listeners],
            addresses=self.addresses,
            asked=[listener.place for listener in self._listeners],
            passed={name: _number(file) for name, file in self._passed_on.items()},
        )
        try:
            channel = await successor.ready(self._settings.ready_timeout_s)
            self._has_committed = True  # it may have connections from here on: nobody can change his mind
            is_moving = self._settings.moves_connections
            committed = await successor.commit(channel, len(self._inner.connections.open) if is_moving else 0)
        except BaseException:
            self._has_committed = False
            with anyio.CancelScope(shield=True):
                await successor.abort(self._settings.kill_timeout_s)
            raise
        return successor, committed.dropped

    async def _leave(self, successor: Successor, *, is_last: bool) -> Mapping[Fate, int]:
        """Hand off and drain, and count the fates of connections; serve again if the successor dies meanwhile.

        Args:
            is_last: The successor does not accept from every listener: what waits there is served here.
        """
        loop = asyncio.get_running_loop()
        drain = loop.create_task(
            self._inner.drain(self._settings.drain_timeout_s, is_last=is_last, successors=[successor.control])
        )
        leaves = loop.create_task(successor.leaves.wait())
        await asyncio.wait({drain, leaves}, return_when=asyncio.FIRST_COMPLETED)
        leaves.cancel()
        if not successor.leaves.is_set() or successor.has_left or self._closed.is_set() or self._is_ending:
            if successor.leaves.is_set():
                for listener in self._listeners:  # or clients would wait there for nobody
                    if listener.kept.fileno() >= 0 and listener.kept.type == socket.SOCK_STREAM:
                        await self._inner.adopt({}, take_waiting(listener.kept))
                    listener.kept.close()
            return await drain
        drain.cancel()
        await asyncio.wait({drain})
        await self._inner.resume([listener.renew() for listener in self._listeners])
        status = f"generation {self.generation} serves again, pid {os.getpid()}"
        await self._manager.say(ready=True, main_pid=os.getpid(), status=status)
        raise RestartError(
            "HP449",
            f"the successor has died after it had taken over; pid {os.getpid()} serves again",
            cause=f"pid {successor.pid} {successor.how_it_ended}, and its connections ended with it",
            note="correct the program, then restart again",
            phase="drain",
            serving=self.generation,
        )

    async def _end(self, timeout_s: float) -> None:
        """Finish the remaining connections within `timeout_s` seconds, and close everything."""
        self._is_ending = True
        restarting = self._restarting
        if restarting is not None and not restarting.done():
            if not self._has_committed:
                restarting.cancel()
            elif not timeout_s:
                self._inner.connections.hurry()
            await asyncio.wait({restarting})
        try:
            if self._predecessor is not None:
                self._predecessor.leaving()
            for listener in self._listeners:
                listener.kept.close()  # the server's own is the last one
            if not self._is_succeeded:
                await self._inner.drain(timeout_s, is_last=True)
            if self._predecessor is not None:
                await self._predecessor.close()
            await self._inner.shutdown()
        finally:
            for listener in self._listeners:
                listener.close(is_passed_on=self._is_succeeded)


def _number(file: FileDescriptorLike) -> int:
    """Return the descriptor of a file; -1 if it is closed, which cannot be passed."""
    try:
        return file if isinstance(file, int) else file.fileno()
    except ValueError:
        return -1


def _refused(why: str, serving: int) -> RestartError:
    return RestartError(
        "HP448",
        "cannot restart now",
        cause=why,
        note="wait until that has ended, then restart again",
        serving=serving,
    )


@asynccontextmanager
async def serve(
    app: Any,
    *,
    bind: str | Sequence[str] = "tcp://127.0.0.1:8000",
    restart_on_hup: bool = False,
    **options: Unpack[ServeOptions],
) -> AsyncIterator[Server]:
    """Serve an application inside the running asyncio event loop.

    ::

        async with hotport.serve(echo, bind="tcp://127.0.0.1:7000") as server:
            await server.wait_closed()

    Leaving the block stops accepting, serves what waits in the accept queue, lets every connection finish within
    ``drain_timeout`` seconds and cuts the rest; an exception or a cancellation cuts at once.

    In a process that `Server.restart` has started, addresses that are bound there already are taken over. The block is
    entered when this process accepts; then the service manager, if there is one, is told ``READY=1``.

    Args:
        app: The application itself: ASGI, an async function over a stream, a protocol factory, or a sockets function.
        bind: Where to listen.
        restart_on_hup: SIGHUP calls `Server.restart`, and the log says what came of it. One that comes because the
            terminal is gone closes the server instead. Under nohup it is ignored while a predecessor that leads the
            session has not ended: the kernel sends it at that end.
        options: Those of `ServeOptions`, as in ``hotport.toml``; ``ready_timeout``, ``kill_timeout`` and ``handoff``
            are about restarts.

    Raises:
        ConfigError: An option is wrong; or signals cannot be handled here (HP450).
        KernelError: An address cannot be bound.
        StartError: The application cannot start.

    Descriptors: listeners are made and closed here, two for each address.
    """
    predecessor = Predecessor.claim()
    listeners: list[_Listener] = []
    try:
        try:
            texts = (bind,) if isinstance(bind, str) else tuple(bind)
            flags = {**options, "bind": texts, "target": "embedded:app"}
            settings = load(file=None, environ={}, flags=flags, cwd=Path(os.devnull)).options
            for text in texts:
                for listener in _listen(text, settings.backlog, predecessor):
                    listeners.append(listener)  # noqa: PERF402  what there is when another one fails, is closed below
            connections = Connections(maximum=settings.connections_max)
            context = Context(connections, generation=predecessor.spec.generation if predecessor is not None else 1)
            names = [listener.address for listener in listeners]
            inner = make_server(app, context, settings, [listener.socket for listener in listeners], names)
            server = Server(inner, listeners, settings, predecessor)
            await inner.startup()
            if predecessor is not None:
                await predecessor.wait_for_order(inner)
            await inner.accept()
        except BaseException as error:
            if predecessor is not None:
                predecessor.failed(_describe(error))
            raise
        for listener in listeners:
            listener.is_ours = True
        if predecessor is not None:
            await predecessor.accepting()
        else:
            await server._manager.say(ready=True)
    except BaseException:
        if predecessor is not None:
            await predecessor.close()
        for listener in listeners:
            listener.close()
        raise
    timeout_s = 0.0
    _servers.add(server)
    try:
        paths = [listener.path for listener in listeners if listener.path]
        restarting = _restarting_on_hup(server, predecessor) if restart_on_hup else nullcontext()
        with restarting, keeping(paths, server._mend_in_between):
            yield server
            timeout_s = settings.drain_timeout_s
    finally:
        _servers.discard(server)
        with anyio.CancelScope(shield=True):
            await server._end(timeout_s)


@contextmanager
def _restarting_on_hup(server: Server, predecessor: Predecessor | None) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGHUP)
    is_bound_to_terminal = ends_with_terminal()
    tasks: set[asyncio.Task[None]] = set()

    async def restart() -> None:
        try:
            log.info("restarted: %s", await server.restart())
        except HotportError as error:  # nobody else would hear of it
            log.error("%s", "\n".join([str(error), *getattr(error, "__notes__", ())]))

    def on_hup() -> None:
        if is_bound_to_terminal and not has_terminal():
            log.info("the terminal is gone")
            server.close()
            return
        background.start("restart", restart(), tasks)

    async def handle_hup_after(predecessor: Predecessor) -> None:
        await predecessor.over.wait()
        loop.add_signal_handler(signal.SIGHUP, on_hup)

    later: asyncio.Task[None] | None = None
    try:
        if predecessor is not None and predecessor.leads_session and before is signal.SIG_IGN:
            signal.signal(signal.SIGHUP, before)  # raises where no handler could be set
            later = loop.create_task(handle_hup_after(predecessor))
        else:
            loop.add_signal_handler(signal.SIGHUP, on_hup)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            "HP450",
            "cannot restart on SIGHUP",
            cause=f"only the main thread handles signals, and this event loop runs in another one ({error})",
            fix="await server.restart()",
            note="leave restart_on_hup out, and restart by that call",
        ) from error
    try:
        yield
    finally:
        if later is not None:
            later.cancel()
        loop.remove_signal_handler(signal.SIGHUP)
        signal.signal(signal.SIGHUP, before if before is not None else signal.SIG_DFL)


def _describe(error: BaseException) -> str:
    """Render one of our errors as its lines, any other with its traceback."""
    return str(error) if isinstance(error, HotportError) else "".join(traceback.format_exception(error)).rstrip()
