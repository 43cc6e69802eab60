"""What belongs to whoever supervises a service: its runtime directory's lock, and the paths in there."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Final

from hotport.errors import RestartError
from hotport.kernel.sockets import bind_control, bind_notify, socket_file, unlink_if_ours
from hotport.model.service import Refusal
from hotport.supervisor.supervisor import Supervisor
from hotport.supervisor.upgrade import preflight

__all__ = ["House"]

_PATHS: Final = ("control.sock", "notify.sock")


@dataclass(slots=True)
class House:
    """A runtime directory that is ours.

    Attributes:
        lock: Held for as long as any process has this open file description.
        next_argv: The program to become when the event loop has ended; none if the service ends with it.
        client: Whoever asked for that, and waits.
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
    _made: dict[str, tuple[int, int] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._note()

    @classmethod
    def enter(cls, directory: str, lock: int, stack: ExitStack) -> House:
        """Make the paths, in place of whatever is there, until `stack` ends."""
        notify = stack.enter_context(bind_notify(os.path.join(directory, "notify.sock")))
        control = stack.enter_context(bind_control(os.path.join(directory, "control.sock")))
        return cls(directory, lock, control, notify)

    def reclaim(self, supervisor: Supervisor) -> None:
        """Make the paths again: another supervisor had put its own there, and is gone."""
        supervisor.listen_on(bind_notify(os.path.join(self.directory, "notify.sock")))
        control, self.control = self.control, bind_control(os.path.join(self.directory, "control.sock"))
        control.close()
        self._note()

    def leave(self) -> None:
        """Remove the paths, unless they are another supervisor's by now; let go of the lock."""
        for path, file in self._made.items():
            unlink_if_ours(path, file)
        self.control.close()
        if self.client is not None:
            self.client.close()
        os.close(self.lock)

    def _note(self) -> None:
        paths = (os.path.join(self.directory, name) for name in _PATHS)
        self._made = {path: socket_file(path) for path in paths}

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
                fix=f"hotport status {supervisor.name}, and try again",
                serving=supervisor.service.generation,
            )
