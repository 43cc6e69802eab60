"""The front door of a service under a supervisor; for a server in one's own event loop see `hotport.embedded`."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio

from hotport.address import Address, FdAddress, UnixAddress, parse_address
from hotport.errors import ConfigError, ExitCode, HotportError, KernelError
from hotport.kernel.fds import lock_file, private_directory
from hotport.kernel.process import has_terminal, reap_orphans
from hotport.kernel.sockets import bind_listener, bound_address, passed_addresses, unlink_if_ours
from hotport.model.lifecycle import Phase
from hotport.model.service import RequestStop
from hotport.observe.logs import configure, get_logger
from hotport.options import Options, runtime_root, service_name
from hotport.options.loading import Loaded, load
from hotport.supervisor.control import serve_control
from hotport.supervisor.house import House
from hotport.supervisor.launch import Surroundings
from hotport.supervisor.listeners import shares_port
from hotport.supervisor.manager import Manager
from hotport.supervisor.recovery import Found, survey
from hotport.supervisor.requests import restart, scale
from hotport.supervisor.statusport import serve_status_port
from hotport.supervisor.store import take_back
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.supervisor.takeover import Predecessor, ask_predecessor, retire
from hotport.supervisor.upgrade import (
    CHECK,
    Baggage,
    become,
    carried,
    describe_self,
    listeners_of,
    pack,
    report,
    sockets_of,
    status_port_of,
)
from hotport.wire.messages import encode

__all__ = ["run", "supervise"]

#: Probes that may wait to be accepted.
STATUS_BACKLOG: Final = 128
#: How long the service manager may take to close a listener that is not wanted any more.
RELEASE_S: Final = 5.0
RELEASE_PAUSE_S: Final = 0.01


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


def supervise(read: Callable[[Path], Loaded], *, takes_over: bool = False) -> int:
    """Run a service in the foreground and return its exit code.

    What is left of the service after the death of its last supervisor is adopted.

    Args:
        read: Reads the options in a directory; called again for each restart, since a release may bring new ones.
        takes_over: Take the listeners of the supervisor that runs this service, if there is one, and retire it.

    Raises:
        ConfigError, StartError, KernelError: The service could not start; nothing is left behind.
        ControlError: Workers that are left cannot be adopted, or the supervisor that runs does not give its listeners.
    """
    surroundings = Surroundings.snapshot()
    options = read(Path(surroundings.directory)).options
    if CHECK in os.environ:  # a supervisor asks whom it would become
        print(encode(describe_self()).decode())
        return ExitCode.DONE
    name = service_name(options)
    configure(format=options.log_format, level=options.log_level, service=name, role="supervisor")
    with ExitStack() as stack:
        manager = Manager(os.environ, os.getpid())
        stack.callback(manager.close)
        place = _move_in(name, options, manager, stack, takes_over=takes_over)
        supervisor = Supervisor(
            name,
            place.house.directory,
            options,
            place.house.notify,
            surroundings,
            found=place.found,
            read_options=lambda directory: read(directory).options,
            manager=manager,
        )
        stack.callback(supervisor.close)
        _open_status_port(supervisor, place, stack)
        supervisor.owned.guard(options)
        anyio.run(_supervise, supervisor, place)
        if supervisor.is_departing:
            house = place.house
            baggage = pack(
                supervisor, lock=house.lock, control=house.control, client=house.client, began_s=house.departed_s
            )
            become(house.next_argv, baggage, surroundings.directory)
    if isinstance(supervisor.failure, HotportError):
        raise supervisor.failure
    if supervisor.failure:
        print(supervisor.failure, file=sys.stderr)
    return supervisor.exit_code


@dataclass(slots=True)
class _Place:
    """What a supervisor starts with.

    Attributes:
        found: What is left of the last supervisor, and the listeners.
        baggage: What this process carries from the supervisor that it was.
        predecessor: The supervisor that leaves when ours serves.
    """

    house: House
    found: Found
    baggage: Baggage | None = None
    predecessor: Predecessor | None = None


def _move_in(name: str, options: Options, manager: Manager, stack: ExitStack, *, takes_over: bool) -> _Place:
    """Become the one supervisor of a service until `stack` ends: from nothing, or from what there is of it."""
    directory = _directory(name)
    if (baggage := carried(os.environ, os.getpid())) is not None:
        house = House(directory, baggage.lock, *sockets_of(baggage))
        stack.callback(house.leave)
        found = anyio.run(survey, directory, baggage.memory, baggage.numbers, listeners_of(baggage))
        reap_orphans({survivor.pid for survivor in found.survivors})  # nobody knows what has ended during the exec
        _park(found.listeners[found.going], options, manager)
        return _Place(house, found, baggage)
    lock = lock_file(os.path.join(directory, "lock"))
    if lock is not None:
        house = House.enter(directory, lock, stack)
        stack.callback(house.leave)
        found = anyio.run(survey, directory)
        if found.going in found.listeners:
            _park(found.listeners[found.going], options, manager)
        else:
            found.listeners[found.going] = _listen(options, manager)
        return _Place(house, found)
    if not takes_over:
        raise ConfigError(
            "HP630",
            f"the service {name} is already running",
            cause=f"another supervisor holds {directory}/lock",
            fix=f"hotport restart {name}, or start this one with --take-over or with another --name",
        )
    predecessor = ask_predecessor(directory, name)
    stack.callback(predecessor.connection.close)
    house = House.enter(directory, predecessor.lock, stack)
    stack.callback(house.leave)
    memory = predecessor.memory
    found = Found(generations=memory.generations, spawned=memory.spawned)
    listeners = found.listeners[found.going] = _listen(options, manager, predecessor)
    for address, listener in predecessor.listeners.items():
        if address not in listeners:
            listener.close()
    return _Place(house, found, predecessor=predecessor)


def _open_status_port(supervisor: Supervisor, place: _Place, stack: ExitStack) -> None:
    """Have a status port until `stack` ends, if there is to be one: the one that there is already, or bound now."""
    bind = supervisor.options.status_bind
    port = status_port_of(place.baggage) if place.baggage else None
    port = place.predecessor.status_port if place.predecessor else port
    if port is not None and port.bind != bind:
        port.listener.close()
        port = None
    if bind is None:
        return
    if port is None:
        listener = bind_listener(parse_address(bind), backlog=STATUS_BACKLOG)
        port = StatusPort(bind, str(bound_address(parse_address(bind), listener)), listener)
    stack.callback(port.listener.close)
    supervisor.status_port = port
    address = parse_address(port.address)
    if isinstance(address, UnixAddress) and not address.is_abstract:
        path = os.path.abspath(address.path)
        with suppress(FileNotFoundError):  # somebody has removed it
            found = os.stat(path)
            stack.callback(lambda: supervisor.is_succeeded or unlink_if_ours(path, (found.st_dev, found.st_ino)))


async def _answer_probes(supervisor: Supervisor, place: _Place) -> None:
    """Answer on the status port for as long as it is ours to answer: two supervisors may have it."""
    if supervisor.status_port is None:
        return
    if place.baggage is not None or place.found.survivors:
        await supervisor.wait_stepped()  # before that we know of no worker
    if place.predecessor is not None and place.predecessor.status_port is supervisor.status_port:
        while len(supervisor.service.ids(Phase.SERVING)) < supervisor.service.wanted:
            await supervisor.wait_stepped()  # until then the other one answers
    is_over = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_status_port, supervisor, supervisor.status_port.listener.dup(), is_over)
        while not (supervisor.is_succeeded and supervisor.service.is_stopping):
            await supervisor.wait_stepped()
        is_over.set()


async def _supervise(supervisor: Supervisor, place: _Place) -> None:
    log = get_logger("hotport.supervisor")
    at = {"status_address": supervisor.status_port.address} if supervisor.status_port else {}
    log.info("service.starting", addresses=list(supervisor.listeners), **at)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve_control, supervisor, place.house.control.dup(), place.house)
        async with anyio.create_task_group() as until_the_end:
            until_the_end.start_soon(_handle_signals, supervisor, place.house, until_the_end)
            until_the_end.start_soon(_succeed, supervisor, place)
            until_the_end.start_soon(_answer_probes, supervisor, place)
            await supervisor.run()
            if supervisor.is_departing:  # signals wait for the handlers of the next supervisor
                signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
                tasks.cancel_scope.cancel()
            until_the_end.cancel_scope.cancel()
    if not supervisor.is_departing:
        log.info("service.ended", exit_code=supervisor.exit_code)


async def _succeed(supervisor: Supervisor, place: _Place) -> None:
    """Bring to its end what has made us the supervisor."""
    if place.baggage is not None:
        await supervisor.wait_stepped()
        get_logger("hotport.supervisor").info("supervisor.upgraded", detail=report(place.baggage, supervisor))
    if place.predecessor is not None:
        await retire(place.predecessor, supervisor)


_SIGNALS: Final = (
    signal.SIGHUP,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGUSR2,
)


async def _handle_signals(supervisor: Supervisor, house: House, tasks: anyio.abc.TaskGroup) -> None:
    log = get_logger("hotport.signals")
    handled = list(_SIGNALS)
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
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # blocked by the supervisor that this process was
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
                case signal.SIGTERM:
                    supervisor.stop()
                case signal.SIGINT:  # of a person at a terminal, whom no load balancer follows
                    supervisor.input(RequestStop())
                case signal.SIGQUIT:
                    supervisor.input(RequestStop(now=True))
                case signal.SIGTTIN | signal.SIGTTOU:
                    change = 1 if number == signal.SIGTTIN else -1
                    wanted = max(1, supervisor.service.wanted + change)
                    tasks.start_soon(answer, lambda wanted=wanted: scale(supervisor, wanted))
                case signal.SIGCHLD:
                    reap_orphans({process.pid for process in supervisor.processes.values()})
                case signal.SIGUSR2:
                    tasks.start_soon(answer, lambda: house.upgrade(supervisor, None))


def _directory(name: str) -> str:
    """The service's runtime directory, made if it is not there."""
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    private_directory(str(root))
    directory = str(root / name)
    private_directory(directory)
    return directory


def _listen(options: Options, manager: Manager, predecessor: Predecessor | None = None) -> dict[str, socket.socket]:
    """The listeners of a service, by canonical address; the caller owns them.

    They are the predecessor's or those that the service manager has kept, else new ones.
    """
    taken = take_back(options.bind, os.environ, backlog=options.backlog)
    manager.forget(taken.unfit)
    free_by = time.monotonic() + (RELEASE_S if taken.unfit else 0.0)
    listeners: dict[str, socket.socket] = {}
    held = set()
    with ExitStack() as unless_all_can_be_bound:
        for listener in taken.listeners.values():
            unless_all_can_be_bound.callback(listener.close)
        for address, text in _expand(options.bind).items():
            if predecessor is not None and (kept := predecessor.listener(text)) is not None:
                listeners.update([kept])
                continue
            bind = partial(_bind, address, options, unless_all_can_be_bound, taken.listeners.get(text))
            where, listener = _bind_by(free_by, bind)
            if options.command:
                listener.setblocking(True)  # as systemd passes them: a plain accept loop expects nothing else
            listeners[where] = listener
            if isinstance(address, FdAddress):
                held.add(where)
        unless_all_can_be_bound.pop_all()
    manager.park(listeners, held=held)
    if taken.listeners:
        get_logger("hotport.supervisor").info("listeners.taken_back", addresses=list(taken.listeners))
    return listeners


def _park(listeners: Mapping[str, socket.socket], options: Options, manager: Manager) -> None:
    """Have the service manager keep listeners that we have from elsewhere; what it has passed again is the same."""
    taken = take_back(options.bind, os.environ, backlog=options.backlog)
    for listener in taken.listeners.values():
        listener.close()
    manager.forget(taken.unfit)
    is_held = any(text.startswith(("fd:", "systemd:")) for text in options.bind)
    manager.park(listeners, held=listeners if is_held else ())


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
    address: Address, options: Options, stack: ExitStack, taken: socket.socket | None = None
) -> tuple[str, socket.socket]:
    """Bind one address until `stack` ends; return it as it really is, and its listener.

    Args:
        taken: The listener of this address, if there is one already; the caller closes it.
    """
    listener = taken
    if listener is None:
        listener = bind_listener(address, backlog=options.backlog, shares_port=shares_port(options))
        stack.callback(listener.close)
    if isinstance(address, UnixAddress) and not address.is_abstract:
        found = os.stat(address.path)
        path = os.path.abspath(address.path)
        stack.callback(unlink_if_ours, path, (found.st_dev, found.st_ino))
    return str(bound_address(address, listener)), listener
