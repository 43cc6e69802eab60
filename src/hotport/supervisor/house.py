"""What belongs to whoever supervises a service: its runtime directory's lock, and the paths in there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from hotport.errors import HotportError, RestartError
from hotport.kernel.fds import is_at, lock_directory, private_directory
from hotport.kernel.sockets import bind_control, bind_notify, socket_file, unlink_if_ours
from hotport.model.effects import Refusal
from hotport.observe.logs import get_logger
from hotport.supervisor.supervisor import Supervisor
from hotport.supervisor.upgrade import preflight
from hotport.wire.messages import ListenOrder

__all__ = ["House"]

_PATHS: Final = ("control.sock", "notify.sock")

log = get_logger("hotport.supervisor")


@dataclass(slots=True, eq=False, weakref_slot=True)
class House:
    """A runtime directory that is ours.

    Attributes:
        lock: Held for as long as any process has this open file description.
        next_argv: The program to become when the event loop has ended; none if the service ends with it.
        client: Whoever asked for that, and waits.
        relisten: Called when `control` is another socket; whoever accepts there sets it.
        departed_s: When the supervisor was told to depart (CLOCK_MONOTONIC).

    Descriptors: owns `lock`, `control` and `client`; `notify` is the supervisor's.
    """

    directory: str
    lock: int
    control: socket.socket
    notify: socket.socket
    next_argv: list[str] = field(default_factory=list)
    client: socket.socket | None = None
    departed_s: float = 0.0
    relisten: Callable[[], object] = lambda: None
    _why_not: str = ""
    _made: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _PATHS:
            self._note(name)

    @classmethod
    def enter(cls, directory: str, lock: int, stack: ExitStack) -> House:
        """Make the paths, in place of whatever is there, until `stack` ends."""
        notify = stack.enter_context(bind_notify(os.path.join(directory, "notify.sock")))
        control = stack.enter_context(bind_control(os.path.join(directory, "control.sock")))
        return cls(directory, lock, control, notify)

    def descriptors(self) -> tuple[int, ...]:
        """What a forked child must not have: it would keep the lock for as long as it runs."""
        return self.lock, self.control.fileno(), -1 if self.client is None else self.client.fileno()

    def reclaim(self, supervisor: Supervisor) -> None:
        """Make the paths again: another supervisor had put its own there, and is gone."""
        self._bind_notify(supervisor)
        self._bind_control()

    def mend(self, supervisor: Supervisor) -> bool:
        """Make again what was removed of the directory and of the sockets in it, and say so.

        Returns:
            Whether anything was made. What cannot be made is logged once.
        """
        if supervisor.is_succeeded or supervisor.is_departing:  # the paths are another supervisor's
            return False
        made: list[str] = []
        why = ""
        try:
            why = self._mend(supervisor, made)
        except Exception as error:  # whatever it is, the service has its workers and serves
            why = str(error) if isinstance(error, HotportError) else repr(error)
        if made:
            log.warning("files.remade", directory=self.directory, files=made)
        if why and why != self._why_not:
            log.error("files.not_remade", directory=self.directory, error=why)
        self._why_not = why
        return bool(made)

    def _mend(self, supervisor: Supervisor, made: list[str]) -> str:
        if not is_at(self.lock, self.directory):
            private_directory(os.path.dirname(self.directory))
            private_directory(self.directory)
            lock = lock_directory(self.directory)
            if lock is None:
                return "another supervisor has locked it: stop one of the two, or start it with another --name"
            os.close(self.lock)
            self.lock = lock
            made.append(".")
        if self._is_missing("notify.sock"):
            self._bind_notify(supervisor)
            made.append("notify.sock")
        if self._is_missing("control.sock"):
            self._bind_control()
            made.append("control.sock")
        for process in supervisor.processes.values():
            if not process.is_foreign and process.is_talking and not os.path.exists(process.control_path):
                process.order(ListenOrder())  # and it says so itself
        return ""

    def _is_missing(self, name: str) -> bool:
        file = self._made[name]
        return file is None or socket_file(self._path(name)) != file

    def _bind_notify(self, supervisor: Supervisor) -> None:
        supervisor.listen_on(bind_notify(self._path("notify.sock")))
        self._note("notify.sock")

    def _bind_control(self) -> None:
        before, self.control = self.control, bind_control(self._path("control.sock"))
        before.close()
        self._note("control.sock")
        self.relisten()

    def leave(self) -> None:
        """Remove the paths, unless they are another supervisor's by now; let go of the lock."""
        for name, file in self._made.items():
            unlink_if_ours(self._path(name), file)
        self.control.close()
        if self.client is not None:
            self.client.close()
        os.close(self.lock)

    def _note(self, name: str) -> None:
        self._made[name] = socket_file(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    async def upgrade(self, supervisor: Supervisor, python: str | None, client: socket.socket | None = None) -> None:
        """Let the supervisor depart, for another one to go on in this process.

        Args:
            python: Another interpreter, or None.
            client: Whoever asked; the next supervisor answers.

        Raises:
            RestartError: There is something else going on (HP657), or the new one cannot start (HP652, HP653).
        """
        self._check(supervisor)
        argv = await preflight(supervisor, python)
        self._check(supervisor)
        self.next_argv = argv
        self.client = socket.socket(fileno=os.dup(client.fileno())) if client is not None else None
        self.departed_s = time.monotonic()
        supervisor.depart()

    def _check(self, supervisor: Supervisor) -> None:
        cause = supervisor.what_goes_on
        if not cause and supervisor.service.is_lame_duck:
            cause = Refusal.LAME_DUCK.value
        if cause:
            raise RestartError(
                "HP657",
                f"cannot upgrade the supervisor of {supervisor.name} now",
                cause=cause,
                fix=f"hotport status {supervisor.name}",
                note="try again when that has ended",
                serving=supervisor.service.generation,
            )
