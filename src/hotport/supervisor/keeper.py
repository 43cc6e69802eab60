"""Restore a service's directory and socket files when they disappear.

The kernel notifies about removals (`hotport.kernel.inotify`). Without inotify, files are checked when a worker is
started, a restart begins, or a client asks for the status.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from typing import Final

import anyio

from hotport.address import parse_address
from hotport.errors import HotportError
from hotport.kernel.inotify import Watch
from hotport.kernel.sockets import bind_listener, file_path, socket_file
from hotport.model.steps import Step
from hotport.model.strategies import Strategy, obstacle
from hotport.observe.logs import get_logger
from hotport.supervisor.requests import facts
from hotport.supervisor.rights import socket_access
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.startup import STATUS_BACKLOG
from hotport.supervisor.supervisor import StatusPort, Supervisor

__all__ = ["keep_files"]

#: Seconds between two checks, so that a program that removes files in a loop does not keep the supervisor busy.
PAUSE_S: Final = 0.1

#: Seconds until the next check after an unexpected error.
FAILED_PAUSE_S: Final = 10.0

log = get_logger("hotport.supervisor")


async def keep_files(supervisor: Supervisor, rundir: RuntimeDirectory) -> None:
    """Restore the runtime directory, the sockets in it and the socket files of listeners, until cancelled.

    Cancellation: safe. Descriptors: one for inotify, closed at the end.
    """
    told: dict[str, str] = {}
    with ExitStack() as stack:
        try:
            watch = stack.enter_context(closing(Watch()))
        except HotportError as error:
            log.warning("files.not_watched", error=str(error))
            return
        while True:
            try:
                await _look(watch, supervisor, rundir, told)
            except Exception:  # a bug here must not end the supervisor
                log.exception("files.failed")
                await anyio.sleep(FAILED_PAUSE_S)
            await anyio.sleep(PAUSE_S)


async def _look(watch: Watch, supervisor: Supervisor, rundir: RuntimeDirectory, told: dict[str, str]) -> None:
    """Restore missing files; if nothing was restored, wait until a file changes.

    Args:
        told: The reasons already logged, by missing address; kept from one check to the next.
    """
    _watch_all(watch, supervisor, rundir)
    has_made = rundir.mend(supervisor)
    why_no_status = _mend_status_port(supervisor)
    if supervisor.owned.gone and _is_busy(supervisor):
        await supervisor.wait_stepped()
        return
    has_made = await _mend_listeners(supervisor) or has_made
    gone = {**supervisor.owned.gone, **why_no_status}
    for address, why in gone.items():
        if told.get(address) != why:
            log.error("listener.gone", address=address, why=why)
    told.clear()
    told.update(gone)
    if not has_made:  # else a restored file may be missing again, and is not watched yet
        await anyio.wait_readable(watch.fileno())
        watch.drain()


def _watch_all(watch: Watch, supervisor: Supervisor, rundir: RuntimeDirectory) -> None:
    for directory in (os.path.dirname(supervisor.directory), supervisor.directory, *rundir.places):
        watch.add_directory(directory)
    for path in (*supervisor.owned.paths, _path_of(supervisor.status_port)):
        watch.add_file(path)
    supervisor.owned.note_access()


def _path_of(port: StatusPort | None) -> str:
    return file_path(parse_address(port.address)) if port is not None else ""


def _mend_status_port(supervisor: Supervisor) -> dict[str, str]:
    """Restore the status port's socket file if it is missing; return its address and the reason of a failure."""
    port = supervisor.status_port
    path = _path_of(port)
    if port is None or not path or supervisor.is_succeeded or supervisor.is_departing:
        return {}
    if port.file is not None and socket_file(path) == port.file:
        return {}
    try:
        access = socket_access(supervisor.options)
        listener = bind_listener(parse_address(port.address), backlog=STATUS_BACKLOG, access=access)
    except HotportError as error:
        return {port.address: error.cause}
    supervisor.use_status_port(port._replace(listener=listener, file=socket_file(path)))
    log.warning("listener.remade", address=port.address)
    return {}


def _is_busy(supervisor: Supervisor) -> bool:
    """Whether a generation is starting, whose workers get listeners."""
    service = supervisor.service
    return service.generation == 0 or (service.restart is not None and service.restart.step is not Step.WATCHING)


async def _mend_listeners(supervisor: Supervisor) -> bool:
    """Rebind listeners whose socket files are missing, and give them to the workers; return whether any was made.

    A program that takes listeners only at its start gets them with the next restart: until then no worker would accept
    from a new one.
    """
    owned, service = supervisor.owned, supervisor.service
    if not owned.gone or service.is_stopping or supervisor.is_succeeded or supervisor.is_departing:
        return False
    restart = f"hotport restart {supervisor.name} binds it again"
    if why := obstacle(Strategy.TRANSFER, facts(supervisor, supervisor.options)):
        owned.blame(f"{why}; {restart}")
        return False
    has_made = False
    for made in owned.remake(supervisor.options):
        await supervisor.fleet.give_all()
        if any(made.sock in process.held for process in supervisor.fleet.processes.values()):
            log.warning("listener.remade", address=made.address)
            has_made = True
        else:
            owned.unmake(made, f"no worker takes it while it serves; {restart}")
    supervisor.news.manager.follow(supervisor.listeners)
    return has_made
