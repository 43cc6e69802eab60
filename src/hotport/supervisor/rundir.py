"""The runtime directory of a service, with its lock and the supervisor's sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from hotport.errors import HotportError
from hotport.kernel.fds import is_at, lock_directory, private_directory
from hotport.kernel.sockets import bind_control, bind_notify, socket_file, unlink_if_ours
from hotport.observe.logs import get_logger
from hotport.supervisor.supervisor import Supervisor
from hotport.wire.messages import ListenOrder

__all__ = ["RuntimeDirectory"]

_PATHS: Final = ("control.sock", "notify.sock")

log = get_logger("hotport.supervisor")


@dataclass(slots=True, eq=False, weakref_slot=True)
class RuntimeDirectory:
    """A runtime directory that this supervisor has locked.

    Attributes:
        lock: Held while any process has this open file description.
        relisten: Called when `control` is replaced; set by the task that accepts on it.

    Descriptors: owns `lock` and `control`; `notify` is the fleet's.
    """

    directory: str
    lock: int
    control: socket.socket
    notify: socket.socket
    relisten: Callable[[], object] = lambda: None
    _why_not: str = ""
    _made: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _PATHS:
            self._note(name)

    @classmethod
    def create(cls, directory: str, lock: int, stack: ExitStack) -> RuntimeDirectory:
        """Bind the sockets until `stack` ends, replacing files at their paths."""
        notify = stack.enter_context(bind_notify(os.path.join(directory, "notify.sock")))
        control = stack.enter_context(bind_control(os.path.join(directory, "control.sock")))
        return cls(directory, lock, control, notify)

    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that a forked child must not have: it would keep the lock while it runs."""
        return self.lock, self.control.fileno()

    async def reclaim(self, supervisor: Supervisor) -> None:
        """Bind the sockets again, after another supervisor that had replaced them has ended."""
        self._bind_notify(supervisor)
        self._bind_control()

    def mend(self, supervisor: Supervisor) -> bool:
        """Restore the directory and its sockets if they were removed, and log it.

        Returns:
            Whether anything was restored. A failure is logged once.
        """
        if supervisor.is_succeeded or supervisor.is_departing:  # another supervisor owns the paths
            return False
        made: list[str] = []
        why = ""
        try:
            why = self._mend(supervisor, made)
        except Exception as error:  # no error here may end the service
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
        for process in supervisor.fleet.processes.values():
            if not process.is_foreign and process.is_talking and not os.path.exists(process.control_path):
                process.order(ListenOrder())  # the worker logs that itself
        return ""

    def _is_missing(self, name: str) -> bool:
        file = self._made[name]
        return file is None or socket_file(self._path(name)) != file

    def _bind_notify(self, supervisor: Supervisor) -> None:
        supervisor.fleet.listen_on(bind_notify(self._path("notify.sock")))
        self._note("notify.sock")

    def _bind_control(self) -> None:
        before, self.control = self.control, bind_control(self._path("control.sock"))
        before.close()
        self._note("control.sock")
        self.relisten()

    def close(self) -> None:
        """Remove the socket files unless another supervisor has replaced them; release the lock."""
        for name, file in self._made.items():
            unlink_if_ours(self._path(name), file)
        self.control.close()
        os.close(self.lock)

    def _note(self, name: str) -> None:
        self._made[name] = socket_file(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)
