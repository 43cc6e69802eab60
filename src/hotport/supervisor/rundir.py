"""The runtime directory of a service, with its lock and the supervisor's sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from hotport.errors import HotportError
from hotport.kernel.fds import give_directory, is_at, let_through, lock_directory, private_directory
from hotport.kernel.sockets import bind_control, bind_notify, socket_file, unlink_if_ours
from hotport.kernel.users import Identity
from hotport.observe.logs import get_logger
from hotport.supervisor.rights import refuse_closed
from hotport.supervisor.supervisor import Supervisor
from hotport.wire.messages import ListenOrder, notify_socket, user_directory

__all__ = ["RuntimeDirectory"]

_PATHS: Final = ("control.sock", "notify.sock")

log = get_logger("hotport.supervisor")


@dataclass(slots=True, eq=False, weakref_slot=True)
class RuntimeDirectory:
    """A runtime directory that this supervisor has locked.

    Workers of another user have a directory of their own in it, and another socket to notify. All else belongs to the
    supervisor's user, and is closed to theirs.

    Attributes:
        lock: Held while any process has this open file description.
        relisten: Called when `control` is replaced; set by the task that accepts on it.

    Descriptors: owns `lock` and `control`; `notify` is the fleet's, and so are other users' sockets once it has them.
    """

    directory: str
    lock: int
    control: socket.socket
    notify: socket.socket
    relisten: Callable[[], object] = lambda: None
    _why_not: str = ""
    _made: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    _users: dict[int, Identity] = field(default_factory=dict)
    _new: dict[int, socket.socket] = field(default_factory=dict)

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
        return self.lock, self.control.fileno(), *(sock.fileno() for sock in self._new.values())

    @property
    def places(self) -> list[str]:
        """The directories for the control sockets of other users' workers."""
        return [self._path(user_directory(uid)) for uid in self._users]

    def admit(self, identity: Identity | None) -> None:
        """Make a place for workers of another user, if they are; may be called again.

        The directory and the one around it let others pass from now on; they can neither list nor change anything.

        Raises:
            ConfigError: That cannot be done (HP603, HP621, HP622).
            KernelError: Its socket cannot be bound (HP604).
            StartError: That user cannot get there (HP433).
        """
        if identity is None:
            return
        let_through(os.path.dirname(self.directory))
        let_through(self.directory)
        place = self._path(user_directory(identity.uid))
        give_directory(place, identity.uid, identity.gid)
        refuse_closed(identity, {place: os.W_OK | os.X_OK})
        if identity.uid not in self._users:
            self._new[identity.uid] = self._bind_user(identity)
            self._users[identity.uid] = identity

    async def reclaim(self, supervisor: Supervisor) -> None:
        """Bind the sockets again, after another supervisor that had replaced them has ended."""
        self._bind_notify(supervisor)
        for identity in self._users.values():
            supervisor.fleet.listen_on(self._bind_user(identity), identity.uid)
        self._bind_control()

    def mend(self, supervisor: Supervisor) -> bool:
        """Restore the directory and its sockets if they were removed, and log it.

        Returns:
            Whether anything was restored. A failure is logged once.
        """
        if supervisor.is_succeeded or supervisor.is_departing:  # another supervisor owns the paths
            return False
        for uid in list(self._new):
            supervisor.fleet.listen_on(self._new.pop(uid), uid)
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
        for uid, identity in self._users.items():
            if not os.path.isdir(self._path(user_directory(uid))):
                self.admit(identity)
                made.append(user_directory(uid))
            if self._is_missing(notify_socket(uid)):
                supervisor.fleet.listen_on(self._bind_user(identity), uid)
                made.append(notify_socket(uid))
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

    def _bind_user(self, identity: Identity) -> socket.socket:
        name = notify_socket(identity.uid)
        sock = bind_notify(self._path(name), user=(identity.uid, identity.gid))
        self._note(name)
        return sock

    def _bind_control(self) -> None:
        before, self.control = self.control, bind_control(self._path("control.sock"))
        before.close()
        self._note("control.sock")
        self.relisten()

    def close(self) -> None:
        """Remove the socket files unless another supervisor has replaced them; release the lock."""
        for name, file in self._made.items():
            unlink_if_ours(self._path(name), file)
        for place in self.places:
            with suppress(OSError):  # workers that continue without a supervisor have their sockets there
                os.rmdir(place)
        for sock in self._new.values():
            sock.close()
        self.control.close()
        os.close(self.lock)

    def _note(self, name: str) -> None:
        self._made[name] = socket_file(self._path(name))

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)
