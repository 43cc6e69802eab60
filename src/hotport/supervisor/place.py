"""Where a supervisor begins: from nothing, or from whatever there is of its service already."""

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
from pathlib import Path
from typing import Final

import anyio

from hotport.address import Address, FdAddress, parse_address
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
from hotport.observe.logs import get_logger
from hotport.options import Options, runtime_root
from hotport.supervisor.house import House
from hotport.supervisor.listeners import listen
from hotport.supervisor.manager import Manager
from hotport.supervisor.recovery import Found, survey
from hotport.supervisor.store import take_back
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.supervisor.takeover import Predecessor, ask_predecessor
from hotport.supervisor.upgrade import Baggage, carried, listeners_of, sockets_of, status_port_of

__all__ = ["Place", "move_in", "open_status_port"]

#: Probes that may wait to be accepted.
STATUS_BACKLOG: Final = 128
#: How long the service manager may take to close a listener that is not wanted any more.
RELEASE_S: Final = 5.0
RELEASE_PAUSE_S: Final = 0.01


@dataclass(slots=True)
class Place:
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


def move_in(name: str, options: Options, manager: Manager, stack: ExitStack, *, takes_over: bool) -> Place:
    """Become the one supervisor of a service until `stack` ends: from nothing, or from what there is of it."""
    directory = _directory(name)
    if (baggage := carried(os.environ, os.getpid())) is not None:
        house = House(directory, baggage.lock, *sockets_of(baggage))
        stack.callback(house.leave)
        found = anyio.run(survey, directory, baggage.memory, baggage.numbers, listeners_of(baggage))
        reap_orphans({survivor.pid for survivor in found.survivors})  # nobody knows what has ended during the exec
        _park(found.listeners[found.going], options, manager)
        return Place(house, found, baggage)
    lock = lock_directory(directory)
    if lock is not None:
        house = House.enter(directory, lock, stack)
        stack.callback(house.leave)
        found = anyio.run(survey, directory)
        _refuse_beside_another(name, directory, found)
        if found.going in found.listeners:
            _park(found.listeners[found.going], options, manager)
        else:
            found.listeners[found.going] = _listen(options, manager)
        return Place(house, found)
    if not takes_over:
        raise ConfigError(
            "HP630",
            f"the service {name} is already running",
            cause=f"another supervisor has locked {directory}",
            fix=f"hotport restart {name}",
            note="to start this one as well, use --take-over, or another --name",
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
    return Place(house, found, predecessor=predecessor)


def open_status_port(supervisor: Supervisor, place: Place, stack: ExitStack) -> None:
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
    is_shared = place.predecessor is not None and port is place.predecessor.status_port
    path = file_path(parse_address(port.address))
    supervisor.status_port = port._replace(file=socket_file(path))

    def close() -> None:
        assert supervisor.status_port is not None
        supervisor.status_port.listener.close()
        if not (supervisor.is_succeeded or (is_shared and supervisor.owned.shared)):
            unlink_if_ours(path, supervisor.status_port.file)

    stack.callback(close)


def _refuse_beside_another(name: str, directory: str, found: Found) -> None:
    """Raise if the workers that were found have a supervisor: the directory that it has locked was removed.

    Raises:
        ConfigError: They have (HP630).
    """
    parents = {procfs.parent(survivor.pid) for survivor in found.survivors} - {0, os.getpid()}
    alive = sorted(pid for pid in parents if procfs.supervises(pid, directory))
    if not alive:
        return
    for listener in {id(each): each for listeners in found.listeners.values() for each in listeners.values()}.values():
        listener.close()
    raise ConfigError(
        "HP630",
        f"the service {name} is already running",
        cause=f"its supervisor is pid {alive[0]}, and {directory}, which it had locked, was removed meanwhile",
        fix=f"kill -HUP {alive[0]}",
    )


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
            listener.setblocking(bool(options.command))  # as in `listen`
        for address, text in _expand(options.bind).items():
            if predecessor is not None and (kept := predecessor.listener(text)) is not None:
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
                    fix=f"--bind {text}",
                    note="leave the other one out",
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
        listener = listen(address, options)
        stack.callback(listener.close)
    path = file_path(address)
    stack.callback(unlink_if_ours, path, socket_file(path))
    return str(bound_address(address, listener)), listener
