"""The supervisor's side of a template: a process of one generation from which its workers are forked."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import anyio

from hotport.errors import StartError
from hotport.kernel import procfs
from hotport.kernel.process import adopt_orphans, describe_exit, kill_group, numbers, reap, send_signal
from hotport.kernel.scm import receive_descriptors, send_descriptors
from hotport.kernel.spawn import Child, spawn
from hotport.model.signals import WORKER
from hotport.supervisor.launch import Launch
from hotport.wire.messages import TEMPLATE, Forked, ForkOrder, Loaded, WorkerSpec, decode, encode

__all__ = ["Template"]

#: Seconds in which a template forks a worker, while the supervisor waits. It takes milliseconds on a machine with time.
FORK_TIMEOUT_S: Final = 10.0

ANSWER_BYTES_MAX: Final = 256 * 1024


class Template:
    """A template that was started.

    Attributes:
        is_loaded: Whether it has imported the application.
        is_killed: Whether it was killed from here.

    Descriptors: owns the pidfd and the conversation.
    """

    def __init__(self, name: str, directory: str, generation: int, launch: Launch) -> None:
        """Start it.

        Raises:
            HotportError: As `spawn`.
            OSError: There is no descriptor left.
        """
        adopt_orphans()
        self._conversation, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                child = spawn(
                    launch.argv(name, generation, 0),
                    environment=launch.worker_environment(name, directory, generation, 0),
                    cwd=launch.directory,
                    listeners=[theirs.fileno()],
                    listen_names=[TEMPLATE],
                    held=numbers(WORKER.keys()),
                    identity=launch.identity,
                )
        except BaseException:
            self._conversation.close()
            raise
        self.generation = generation
        self._user = launch.uid
        self.pid = child.pid
        self.is_loaded = self.is_killed = False
        self._pidfd = child.pidfd

    async def wait_loaded(self) -> str:
        """Wait until it has imported the application; return why it could not, empty if it has, or has ended."""
        await anyio.wait_readable(self._conversation)
        data = b""
        with suppress(ConnectionError):
            data = self._conversation.recv(ANSWER_BYTES_MAX, socket.MSG_DONTWAIT)
        error: str = decode(data, Loaded).error if data else ""
        self.is_loaded = bool(data) and not error
        return error

    async def wait_ended(self) -> None:
        """Wait for its end; may be called again."""
        await anyio.wait_readable(self._pidfd)

    def fork(self, spec: WorkerSpec, passed: Mapping[str, int]) -> Child:
        """Fork a worker, which gets descriptors by name. Blocks for some milliseconds, `FORK_TIMEOUT_S` at most.

        Raises:
            StartError: The template could not fork (HP521), or does not answer (HP522) and was killed.

        Descriptors: one created, ``Child.pidfd``; those that are passed stay open here.
        """
        self._conversation.settimeout(FORK_TIMEOUT_S)
        try:
            send_descriptors(self._conversation, encode(ForkOrder(spec=spec, names=tuple(passed))), [*passed.values()])
            data, descriptors, _ = receive_descriptors(self._conversation, ANSWER_BYTES_MAX)
        except OSError as error:
            self.kill()
            raise _no_answer(str(error) or type(error).__name__) from error
        if not data:
            raise _no_answer("it has ended")
        answer: Forked = decode(data, Forked)
        if not descriptors:
            raise StartError(
                "HP521",
                "cannot fork a worker",
                cause=answer.error,
                fix="ulimit -a",
                note="raise the limit (systemctl show -p TasksMax shows that of a unit), or set preload = false",
            )
        if self._user is None:
            return Child(answer.pid, descriptors[0])
        os.close(descriptors[0])
        if not self._is_worker(answer.pid):
            raise _no_answer(f"process {answer.pid}, which it names, is none that it can have forked")
        return Child(answer.pid, os.pidfd_open(answer.pid))

    def _is_worker(self, pid: int) -> bool:
        """Whether a process is the user's, and our child: a template of another user might name any."""
        return procfs.user_of(pid) == self._user and procfs.parent(pid) == os.getpid()

    def kill(self) -> None:
        """Kill it, with what its import has started."""
        self.is_killed = True
        kill_group(self.pid)
        send_signal(self._pidfd, signal.SIGKILL)

    def collect(self) -> str:
        """Reap it after its end, close what belongs to it, and describe its exit; once."""
        kill_group(self.pid)
        why = describe_exit(reap(self.pid))
        self._conversation.close()
        os.close(self._pidfd)
        return why

    def end(self) -> None:
        """Kill it and wait for its end, which takes milliseconds."""
        self.kill()
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        self._conversation.close()
        os.close(self._pidfd)

    def descriptors(self) -> tuple[int, int]:
        """Those that a forked child must not have."""
        return self._conversation.fileno(), self._pidfd


def _no_answer(why: str) -> StartError:
    return StartError(
        "HP522",
        "cannot fork a worker",
        cause=f"the process that has imported the application does not answer: {why}",
        note="it is started again with the next worker",
    )
