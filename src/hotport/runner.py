"""The front door: a service under a supervisor (`run`), or a server inside one's own event loop (`serve`)."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import anyio

from hotport.address import Address, FdAddress, UnixAddress, parse_address
from hotport.errors import ConfigError, ExitCode, HotportError, KernelError
from hotport.kernel.fds import lock_file, private_directory
from hotport.kernel.process import has_terminal, reap_orphans
from hotport.kernel.sockets import (
    bind_control,
    bind_listener,
    bind_notify,
    bound_address,
    passed_addresses,
    unlink_if_ours,
)
from hotport.model.service import RequestStop
from hotport.observe.logs import configure, get_logger
from hotport.options import Options, runtime_root, service_name
from hotport.options.loading import Loaded, load
from hotport.supervisor.control import serve_control
from hotport.supervisor.launch import Surroundings
from hotport.supervisor.manager import Manager
from hotport.supervisor.requests import restart, scale
from hotport.supervisor.store import take_back
from hotport.supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from hotport.worker.server import ConnectionServer, DatagramServer, SocketsServer

__all__ = ["Server", "run", "serve", "supervise"]

#: How long the service manager may take to close a listener that is not wanted any more.
RELEASE_S: Final = 5.0
RELEASE_PAUSE_S: Final = 0.01


# -- under a supervisor -------------------------------------------------------------------------------------


def run(
    app: str | Callable[..., Any],
    *,
    bind: str | Sequence[str] | None = None,
    **options: Any,
) -> None:
    """Serve an application under a supervisor until it is stopped; the process exits if that failed.

    Then it has said why in three lines on stderr, as ``hotport serve`` does.

    Workers are processes of their own: they import the application by its name. So `app` is a target
    (``"module:attribute"``, ``"file.py:attribute"``), or something that lives at the top level of a module; the
    script that calls `run` counts as one. Workers that import that script pass over this call, and over what stands
    under ``if __name__ == "__main__"``: an application that is made there is not found (HP502).

    Args:
        app: The application or its target.
        bind: Addresses, for example ``"tcp://127.0.0.1:8000"``.
        options: Any option, by the name that it has in ``hotport.toml``; stronger than file and environment.

    Raises:
        SystemExit: With hotport's exit code, if the service did not start or ended otherwise than by a clean stop. The
            ConfigError or StartError that was printed is its ``__cause__``: an option is wrong, `app` has no name by
            which it can be imported (HP330), an address is taken.
    """
    if _is_in_worker():
        return

    def read(directory: Path) -> Loaded:
        return load(file=None, environ=os.environ, flags=flags, cwd=directory)

    try:
        flags: dict[str, Any] = {**options, "target": app if isinstance(app, str) else target_of(app)}
        if bind is not None:
            flags["bind"] = (bind,) if isinstance(bind, str) else tuple(bind)
        code = supervise(read)
    except HotportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    if code != ExitCode.DONE:
        raise SystemExit(code)


def _is_in_worker() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return bool(spec is not None and spec.name == "hotport.worker.__main__")


def target_of(app: Callable[..., Any]) -> str:
    """The target by which a worker finds `app`.

    Raises:
        ConfigError: It has no name at the top level of a module (HP330).
    """
    module_name = getattr(app, "__module__", None) or type(app).__module__
    module = sys.modules.get(module_name)
    name = getattr(app, "__qualname__", None)
    found = getattr(module, name, None) if name and "." not in name else None
    if found is not app:  # an instance has no name of its own: look for the variable that holds it
        module = sys.modules["__main__"] if found is None else module
        holders = (module, sys.modules["__main__"])
        module, name = next(((m, key) for m in holders for key, value in vars(m).items() if value is app), (None, None))
    if module is None or name is None:
        raise ConfigError(
            "HP330",
            f"cannot name {app!r} for a worker",
            cause="workers import the application, and it is not at the top level of a module",
            fix='give it a name there, or pass a target: hotport.run("module:app")',
        )
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
        return f"{spec.name}:{name}"
    return f"{os.path.abspath(str(module.__file__))}:{name}"


def supervise(read: Callable[[Path], Loaded]) -> int:
    """Run a service in the foreground and return its exit code.

    Args:
        read: Reads the options in a directory; called again for each restart, since a release may bring new ones.

    Raises:
        ConfigError, StartError, KernelError: The service could not start; nothing is left behind.
    """
    surroundings = Surroundings.snapshot()
    options = read(Path(surroundings.directory)).options
    name = service_name(options)
    configure(format=options.log_format, level=options.log_level, service=name, role="supervisor")
    with ExitStack() as stack:
        directory = _claim(name, stack)
        manager = Manager(os.environ, os.getpid())
        stack.callback(manager.close)
        listeners = _take_back_or_bind(options, manager, stack)
        if options.command:
            for listener in listeners.values():
                listener.setblocking(True)  # as systemd passes them: a plain accept loop expects nothing else
        notify_socket = bind_notify(os.path.join(directory, "notify.sock"))
        control = bind_control(os.path.join(directory, "control.sock"))
        for file in ("notify.sock", "control.sock"):
            stack.callback(_unlink, os.path.join(directory, file))
        supervisor = Supervisor(
            name,
            directory,
            options,
            listeners,
            notify_socket,
            surroundings,
            read_options=lambda directory: read(directory).options,
            manager=manager,
        )
        stack.callback(supervisor.close)
        anyio.run(_supervise, supervisor, control)
    if isinstance(supervisor.failure, HotportError):
        raise supervisor.failure
    if supervisor.failure:
        print(supervisor.failure, file=sys.stderr)
    return supervisor.exit_code


async def _supervise(supervisor: Supervisor, control: socket.socket) -> None:
    log = get_logger("hotport.supervisor")
    log.info("service.starting", addresses=list(supervisor.listeners))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_control, supervisor, control)
        async with anyio.create_task_group() as until_the_end:
            until_the_end.start_soon(_handle_signals, supervisor, until_the_end)
            await supervisor.run()
            until_the_end.cancel_scope.cancel()
    log.info("service.ended", exit_code=supervisor.exit_code)


async def _handle_signals(supervisor: Supervisor, tasks: anyio.abc.TaskGroup) -> None:
    log = get_logger("hotport.signals")
    handled = [
        signal.SIGHUP,
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTTIN,
        signal.SIGTTOU,
        signal.SIGUSR2,
    ]
    # Whose terminal may go: nohup(1) and setsid(1) are how somebody says that the service is to outlive it.
    is_bound_to_terminal = has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    has_hung_up = False
    if os.getpid() == 1:  # every orphan of the container is our child
        handled.append(signal.SIGCHLD)

    async def answer(what: Callable[[], Any], refused: Callable[[str], None] = lambda why: None) -> None:
        try:
            await what()
        except HotportError as error:  # nobody waits for an answer: the log has to tell
            log.warning("request.failed", error=str(error))
            refused(str(error))

    with anyio.open_signal_receiver(*handled) as signals:
        async for number in signals:
            log.debug("signal.received", signal=signal.Signals(number).name)
            match number:
                case signal.SIGHUP if is_bound_to_terminal and not has_terminal():
                    if not has_hung_up:  # the shell and the kernel may both say it, and a second stop is at once
                        log.info("terminal.hung_up")
                        if not supervisor.service.is_stopping:
                            supervisor.input(RequestStop())
                    has_hung_up = True
                case signal.SIGHUP:
                    tasks.start_soon(answer, lambda: restart(supervisor), supervisor.manager.refused)
                case signal.SIGTERM | signal.SIGINT:
                    supervisor.input(RequestStop())
                case signal.SIGQUIT:
                    supervisor.input(RequestStop(now=True))
                case signal.SIGTTIN | signal.SIGTTOU:
                    change = 1 if number == signal.SIGTTIN else -1
                    wanted = max(1, supervisor.service.wanted + change)
                    tasks.start_soon(answer, lambda wanted=wanted: scale(supervisor, wanted))
                case signal.SIGCHLD:
                    reap_orphans({process.pid for process in supervisor.processes.values()})
                case _:
                    log.warning("signal.ignored", signal=signal.Signals(number).name)


# -- inside one's own event loop ----------------------------------------------------------------------------


class Server:
    """A server that runs in the event loop that made it.

    Attributes:
        addresses: Where it listens, port 0 resolved.
        connections: What is open, and the drain notice.
    """

    def __init__(self, addresses: tuple[str, ...], inner: ConnectionServer | DatagramServer | SocketsServer) -> None:
        self.addresses = addresses
        self.connections = inner.connections
        self._inner = inner
        self._closed = anyio.Event()

    def close(self) -> None:
        """Let `wait_closed` return, and so the ``async with`` block end and drain."""
        self._closed.set()

    def reload_tls(self) -> None:
        """Read the certificates again, for connections from now on.

        Raises:
            StartError: They cannot be used; those from before are kept.
        """
        self._inner.reload_tls()

    async def wait_closed(self) -> None:
        """Return when `close` has been called."""
        await self._closed.wait()


@asynccontextmanager
async def serve(
    app: Any, *, bind: str | Sequence[str] = "tcp://127.0.0.1:8000", **options: Any
) -> AsyncIterator[Server]:
    """Serve an application inside the running asyncio event loop.

    ::

        async with hotport.serve(echo, bind="tcp://127.0.0.1:7000") as server:
            await server.wait_closed()

    Leaving the block stops accepting, serves what waits in the accept queue, lets every connection finish within
    ``drain_timeout`` seconds and cuts the rest; an exception or a cancellation cuts at once.

    Args:
        app: The application itself: ASGI, an async function over a stream, a protocol factory, or a sockets function.
        bind: Where to listen.
        options: ``kind``, ``tasks``, ``backlog``, ``connections_max``, ``drain_timeout``, ``keep_alive``, ``lifespan``,
            ``trusted_proxy``, ``proxy_protocol``, ``root_path``, ``tls_cert``, ``tls_key``, ``tls_client_ca``,
            ``tls_client_auth``, ``tls_alpn``, ``ws_...``: as in ``hotport.toml``.

    Raises:
        ConfigError: An option is wrong.
        KernelError: An address cannot be bound.
        StartError: The application cannot start.

    Descriptors: listeners are made and closed here.
    """
    from hotport.adapters.base import Connections, Context
    from hotport.worker.server import make_server  # a supervisor has no use for what serves

    texts = (bind,) if isinstance(bind, str) else tuple(bind)
    flags = {**options, "bind": texts, "target": "embedded:app"}
    settings = load(file=None, environ={}, flags=flags, cwd=Path(os.devnull)).options
    with ExitStack() as stack:
        listeners = dict(_bind(address, settings.backlog, stack) for address in _expand(texts))
        connections = Connections(maximum=settings.connections_max)
        inner = make_server(app, Context(connections), settings, list(listeners.values()))
        await inner.startup()
        await inner.accept()
        timeout_s = 0.0
        try:
            yield Server(tuple(listeners), inner)
            timeout_s = settings.drain_timeout_s
        finally:
            with anyio.CancelScope(shield=True):
                await inner.drain(timeout_s, is_last=True)
                await inner.shutdown()


# -- both ---------------------------------------------------------------------------------------------------


def _claim(name: str, stack: ExitStack) -> str:
    """Make the service's runtime directory ours alone until `stack` ends."""
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    private_directory(str(root))
    directory = str(root / name)
    private_directory(directory)
    lock = lock_file(os.path.join(directory, "lock"))
    if lock is None:
        raise ConfigError(
            "HP630",
            f"the service {name} is already running",
            cause=f"another supervisor holds {directory}/lock",
            fix=f"hotport restart {name}, or start this one with another --name",
        )
    stack.callback(os.close, lock)
    return directory


def _take_back_or_bind(options: Options, manager: Manager, stack: ExitStack) -> dict[str, socket.socket]:
    """The listeners until `stack` ends, by canonical address: as the service manager has kept them, or new ones."""
    taken = take_back(options.bind, os.environ, backlog=options.backlog)
    for listener in taken.listeners.values():
        stack.callback(listener.close)
    manager.forget(taken.unfit)
    listeners: dict[str, socket.socket] = {}
    held = set()
    free_by = time.monotonic() + (RELEASE_S if taken.unfit else 0.0)
    for address, text in _expand(options.bind).items():
        bind = partial(_bind, address, options.backlog, stack, taken.listeners.get(text), keeps=manager.keeps)
        where, listener = _bind_by(free_by, bind)
        listeners[where] = listener
        if isinstance(address, FdAddress):
            held.add(where)
    manager.park(listeners, held=held)
    if taken.listeners:
        get_logger("hotport.supervisor").info("listeners.taken_back", addresses=list(taken.listeners))
    return listeners


def _bind_by(free_by_s: float, bind: Callable[[], tuple[str, socket.socket]]) -> tuple[str, socket.socket]:
    """Bind, and until `free_by_s` (on the monotonic clock) try again if the address is taken.

    systemd closes what it removes from its store in a thread of its own, and nobody tells when that has happened
    (``asynchronous_close`` in its source).
    """
    while True:
        try:
            return bind()
        except KernelError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= free_by_s:
                raise
            time.sleep(RELEASE_PAUSE_S)


def _expand(texts: Sequence[str]) -> dict[Address, str]:
    """Every address that is to be bound or adopted, and the text that stands for it; a ``systemd:`` may be several.

    Raises:
        ConfigError: A descriptor is named twice (HP106), or no service manager has passed what is named (HP105).
    """
    found: dict[Address, str] = {}
    for text in texts:
        for address in passed_addresses(parse_address(text)):
            if address in found:
                raise ConfigError(
                    "HP106",
                    f"cannot listen on {text} and on {found[address]}",
                    cause=f"both are {address}, and a socket has one owner",
                    fix=f"leave one of them out: --bind {text}",
                )
            found[address] = text
    return found


def _bind(
    address: Address,
    backlog: int,
    stack: ExitStack,
    taken: socket.socket | None = None,
    *,
    keeps: Callable[[str], bool] = lambda where: False,
) -> tuple[str, socket.socket]:
    """Bind one address until `stack` ends; return it as it really is, and its listener.

    Args:
        taken: The listener of this address, if there is one already; the caller closes it.
        keeps: Whether somebody else keeps the listener that is there when we end; then its file stays, too.
    """
    listener = taken
    if listener is None:
        listener = bind_listener(address, backlog=backlog)
        stack.callback(listener.close)
    where = str(bound_address(address, listener))
    if isinstance(address, UnixAddress) and not address.is_abstract:
        found = os.stat(address.path)
        path = os.path.abspath(address.path)
        stack.callback(_unlink_listener, path, (found.st_dev, found.st_ino), partial(keeps, where))
    return where, listener


def _unlink_listener(path: str, dev_ino: tuple[int, int], is_kept: Callable[[], bool]) -> None:
    if not is_kept():
        unlink_if_ours(path, dev_ino)


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
