"""Start a supervisor, with the workers and listeners that its service already has."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import anyio

from hotport.address import Address, FdAddress, TcpAddress, parse_address
from hotport.errors import ConfigError, KernelError
from hotport.kernel import procfs
from hotport.kernel.fds import lock_directory, private_directory
from hotport.kernel.process import reap_orphans
from hotport.kernel.sockets import (
    bind_listener,
    bound_address,
    file_path,
    passed_addresses,
    socket_file,
    unlink_if_ours,
)
from hotport.kernel.users import Identity
from hotport.observe.logs import get_logger
from hotport.options import Options, runtime_root
from hotport.supervisor.inheritance import Inheritance
from hotport.supervisor.launch import Launch, Surroundings
from hotport.supervisor.listeners import listen
from hotport.supervisor.manager import ServiceManager
from hotport.supervisor.recovery import Found, survey
from hotport.supervisor.rights import socket_access
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.store import take_back
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.supervisor.takeover import take_over

__all__ = ["Startup", "open_status_port", "start_up"]

#: The backlog of the status port.
STATUS_BACKLOG: Final = 128
#: Seconds that the service manager has to close a listener that is not needed any more.
RELEASE_S: Final = 5.0
RELEASE_PAUSE_S: Final = 0.01


@dataclass(frozen=True, slots=True)
class Startup:
    """The runtime directory, workers, listeners and inheritance with which a supervisor starts.

    Attributes:
        found: Orphans and listeners.
        inheritance: What the predecessor has passed, if it could.
    """

    rundir: RuntimeDirectory
    found: Found
    inheritance: Inheritance | None = None

    @property
    def has_predecessor(self) -> bool:
        """Whether a live predecessor serves until our workers do."""
        return self.inheritance is not None and self.inheritance.predecessor is not None


def start_up(
    name: str,
    options: Options,
    manager: ServiceManager,
    stack: ExitStack,
    inheritance: Inheritance | None,
    surroundings: Surroundings,
    *,
    takes_over: bool,
) -> Startup:
    """Become the service's supervisor until `stack` ends: start, adopt, upgrade or take over.

    Args:
        inheritance: From this process before its exec, see `inherit`.
        takes_over: Take the listeners of the supervisor that runs this service, if there is one.

    If workers are to run as another user, that is checked before anything is bound, or taken from another supervisor.
    """
    directory = _directory(name)
    if inheritance is not None and inheritance.paths is not None:
        rundir = RuntimeDirectory(directory, inheritance.lock, *inheritance.paths)
        stack.callback(rundir.close)
        stack.callback(inheritance.close)
        found = anyio.run(survey, directory, inheritance.memory, inheritance.numbers, inheritance.listeners)
        reap_orphans({orphan.pid for orphan in found.orphans})  # SIGCHLDs during the exec are lost
        _park(found.listeners[found.current], options, manager)
        return Startup(rundir, found, inheritance)
    lock = lock_directory(directory)
    if lock is not None:
        rundir = RuntimeDirectory.create(directory, lock, stack)
        stack.callback(rundir.close)
        found = anyio.run(survey, directory)
        _refuse_beside_another(name, directory, found)
        if found.current in found.listeners:
            _park(found.listeners[found.current], options, manager)
        else:
            rundir.admit(_identity(options, surroundings))
            found.listeners[found.current] = _listen(options, manager)
        return Startup(rundir, found)
    if not takes_over:
        raise ConfigError(
            "HP630",
            f"the service {name} is already running",
            cause=f"another supervisor has locked {directory}",
            fix=f"hotport restart {name}",
            note="to start this one as well, use --take-over, or another --name",
        )
    identity = _identity(options, surroundings)
    inheritance = anyio.run(take_over, directory, name)
    stack.callback(inheritance.close)
    rundir = RuntimeDirectory.create(directory, inheritance.lock, stack)
    stack.callback(rundir.close)
    rundir.admit(identity)
    memory = inheritance.memory
    found = Found(generations=memory.generations, spawned=memory.spawned, shared=frozenset(inheritance.listeners))
    listeners = found.listeners[found.current] = _listen(options, manager, inheritance)
    for address, listener in inheritance.listeners.items():
        if address not in listeners:
            listener.close()
    return Startup(rundir, found, inheritance)


def _identity(options: Options, surroundings: Surroundings) -> Identity | None:
    """As whom workers run; with `user`, all that they need was checked: see `Launch.resolve`."""
    return Launch.resolve(options, surroundings).identity if options.user is not None else None


def open_status_port(supervisor: Supervisor, startup: Startup, stack: ExitStack) -> None:
    """Open the status port of the options, inherited or new, until `stack` ends."""
    bind = supervisor.options.status_bind
    inherited = port = startup.inheritance.status_port if startup.inheritance else None
    if port is not None and port.bind != bind:
        port.listener.close()
        port = None
    if bind is None:
        return
    if port is None:
        access = socket_access(supervisor.options)
        listener = bind_listener(parse_address(bind), backlog=STATUS_BACKLOG, access=access)
        port = StatusPort(bind, str(bound_address(parse_address(bind), listener)), listener)
    _warn_if_exposed(port.address)
    is_shared = startup.has_predecessor and port is inherited
    path = file_path(parse_address(port.address))
    supervisor.use_status_port(port._replace(file=socket_file(path)))

    def close() -> None:
        assert supervisor.status_port is not None
        supervisor.status_port.listener.close()
        if not (supervisor.is_succeeded or (is_shared and supervisor.owned.has_shared)):
            unlink_if_ours(path, supervisor.status_port.file)

    stack.callback(close)


def _warn_if_exposed(address: str) -> None:
    """Warn if other machines may reach the status port."""
    match parse_address(address):
        case TcpAddress(host=host) if not ip_address(host.partition("%")[0]).is_loopback:
            get_logger("hotport.supervisor").warning(
                "status_port.exposed",
                address=address,
                why="who reaches it sees the state of this service, without a password",
                note="bind it to 127.0.0.1, ::1 or unix:PATH unless only trusted machines can reach it",
            )
        case _:
            pass


def _refuse_beside_another(name: str, directory: str, found: Found) -> None:
    """Refuse to start if the found workers have a supervisor, whose locked directory was removed.

    Raises:
        ConfigError: They have one (HP630).
    """
    parents = {procfs.parent(orphan.pid) for orphan in found.orphans} - {0, os.getpid()}
    alive = sorted(pid for pid in parents if procfs.supervises(pid, directory))
    if not alive:
        return
    for listener in {id(each): each for listeners in found.listeners.values() for each in listeners.values()}.values():
        listener.close()
    for page in found.pages.values():
        os.close(page)
    raise ConfigError(
        "HP630",
        f"the service {name} is already running",
        cause=f"its supervisor is pid {alive[0]}, and {directory}, which it had locked, was removed meanwhile",
        fix=f"kill -HUP {alive[0]}",
    )


def _directory(name: str) -> str:
    """Return the service's runtime directory; create it if it does not exist."""
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    private_directory(str(root))
    directory = str(root / name)
    private_directory(directory)
    return directory


def _listen(
    options: Options, manager: ServiceManager, inheritance: Inheritance | None = None
) -> dict[str, socket.socket]:
    """Make the listeners of a service, by canonical address; the caller owns them.

    Each is inherited, or from the service manager's store, or new.
    """
    taken = take_back(options.bind, os.environ, backlog=options.backlog)
    manager.forget(taken.unfit)
    free_by = time.monotonic() + (RELEASE_S if taken.unfit else 0.0)
    listeners: dict[str, socket.socket] = {}
    held = set()
    with ExitStack() as unless_all_can_be_bound:
        for listener in taken.listeners.values():
            unless_all_can_be_bound.callback(listener.close)
            listener.setblocking(bool(options.command))  # as in `listen`
        for address, text in _expand(options.bind).items():
            if inheritance is not None and (kept := inheritance.listener(text)) is not None:
                listeners.update([kept])
                continue
            bind = partial(_bind, address, options, unless_all_can_be_bound, taken.listeners.get(text))
            where, listener = _bind_by(free_by, bind)
            listeners[where] = listener
            if isinstance(address, FdAddress):
                held.add(where)
        unless_all_can_be_bound.pop_all()
    manager.park(listeners, held=held)
    if taken.listeners:
        get_logger("hotport.supervisor").info("listeners.taken_back", addresses=list(taken.listeners))
    return listeners


def _park(listeners: Mapping[str, socket.socket], options: Options, manager: ServiceManager) -> None:
    """Store inherited listeners with the service manager; the ones that it passed are duplicates."""
    taken = take_back(options.bind, os.environ, backlog=options.backlog)
    for listener in taken.listeners.values():
        listener.close()
    manager.forget(taken.unfit)
    is_held = any(text.startswith(("fd:", "systemd:")) for text in options.bind)
    manager.park(listeners, held=listeners if is_held else ())


def _bind_by(free_by_s: float, bind: Callable[[], tuple[str, socket.socket]]) -> tuple[str, socket.socket]:
    """Bind; retry until `free_by_s` (on the monotonic clock) while the address is in use.

    systemd closes descriptors removed from its store in another thread, without a notification (``asynchronous_close``
    in its source).
    """
    while True:
        try:
            return bind()
        except KernelError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= free_by_s:
                raise
            time.sleep(RELEASE_PAUSE_S)


def _expand(texts: Sequence[str]) -> dict[Address, str]:
    """Map every address to bind or adopt to its text in the options; a ``systemd:`` text may stand for several.

    Raises:
        ConfigError: A descriptor is named twice (HP106), or no service manager has passed a named one (HP105).
    """
    found: dict[Address, str] = {}
    for text in texts:
        for address in passed_addresses(parse_address(text)):
            if address in found:
                raise ConfigError(
                    "HP106",
                    f"cannot listen on {text} and on {found[address]}",
                    cause=f"both are {address}, and a socket has one owner",
                    fix=f"--bind {text}",
                    note="leave the other one out",
                )
            found[address] = text
    return found


def _bind(
    address: Address, options: Options, stack: ExitStack, taken: socket.socket | None = None
) -> tuple[str, socket.socket]:
    """Bind one address until `stack` ends; return the bound address and its listener.

    Args:
        taken: The existing listener of this address, if any; the caller closes it.
    """
    listener = taken
    if listener is None:
        listener = listen(address, options)
        stack.callback(listener.close)
    path = file_path(address)
    stack.callback(unlink_if_ours, path, socket_file(path))
    return str(bound_address(address, listener)), listener
