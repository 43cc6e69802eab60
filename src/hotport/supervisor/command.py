"""One command of the operator: its input, its output, and the end of everything that it has started."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final

import anyio

from hotport.kernel.fds import memory_file
from hotport.kernel.process import kill_group, reap
from hotport.kernel.spawn import spawn
from hotport.kernel.users import Identity

__all__ = ["OUTPUT_BYTES_MAX", "Command"]

#: The end of a command's output that is kept.
OUTPUT_BYTES_MAX: Final = 8192

_READ_BYTES: Final = 65536

#: Reads of what a command has left in the pipe; a process that it has put into another group may go on writing.
_LAST_READS: Final = 4


class Command:
    """A command that runs in a process group of its own, and ends with this process.

    Args:
        argv: The program and its arguments.
        identity: As whom it runs; None as this process.
        stdin: What it reads; nothing by default.
        timeout_s: Seconds until it is ended; None: never.
        kill_timeout_s: Seconds from SIGTERM to SIGKILL when it is ended.

    Attributes:
        is_late: Whether it was ended because its time was over.
        ended: Set when it has ended and was reaped, or its `wait` was cancelled.

    Raises:
        KernelError: It cannot be executed, see `spawn`; nothing is left then.
        OSError: There is no descriptor left for its output.

    Descriptors: owns the process's pidfd and the read end of its output; `wait` closes them.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        cwd: str,
        identity: Identity | None = None,
        stdin: bytes = b"",
        timeout_s: float | None = None,
        kill_timeout_s: float,
    ) -> None:
        heard, said = os.pipe2(os.O_CLOEXEC)
        streams = {1: said, 2: said}
        try:
            os.set_blocking(heard, False)
            if stdin:  # a file, since a pipe would take only so much until it is read
                streams[0] = memory_file("hotport-stdin")
                os.write(streams[0], stdin)
                os.lseek(streams[0], 0, os.SEEK_SET)
            if identity is not None:
                os.fchown(said, identity.uid, identity.gid)  # else it could not open /dev/stdout
            child = spawn(argv, environment=environment, cwd=cwd, identity=identity, streams=streams, ends_with_us=True)
        except BaseException:
            os.close(heard)
            raise
        finally:
            for fd in {*streams.values()}:
                os.close(fd)
        self.pid = child.pid
        self.is_late = False
        self.ended = anyio.Event()
        self._pidfd = child.pidfd
        self._heard = heard
        self._tail = b""
        self._timeout_s = timeout_s
        self._kill_timeout_s = kill_timeout_s
        self._is_unwanted = anyio.Event()
        self._is_hurried = anyio.Event()

    @property
    def output(self) -> str:
        """The end of what it has written, without the line in whose middle that begins."""
        text = self._tail[-OUTPUT_BYTES_MAX:]
        if len(self._tail) > OUTPUT_BYTES_MAX:
            text = text.partition(b"\n")[2] or text
        return text.decode(errors="replace").strip()

    def end(self) -> None:
        """Send its process group SIGTERM, and SIGKILL if it has not ended in time."""
        self._is_unwanted.set()

    def hurry(self) -> None:
        """Send its process group SIGKILL."""
        self._is_hurried.set()
        self._is_unwanted.set()

    async def wait(self) -> int | None:
        """Wait for its end and kill what it has left in its process group; return what `reap` does.

        Cancellation: kills the command.
        """
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._listen)
                tasks.start_soon(self._bound)
                await anyio.wait_readable(self._pidfd)
                tasks.cancel_scope.cancel()
        finally:
            kill_group(self.pid)  # until it is reaped, the id belongs to its group
            for _ in range(_LAST_READS):
                if not self._read():
                    break
            status = reap(self.pid)
            os.close(self._pidfd)
            os.close(self._heard)
            self.ended.set()
        return status

    async def _bound(self) -> None:
        with anyio.move_on_after(self._timeout_s):
            await self._is_unwanted.wait()
        self.is_late = not self._is_unwanted.is_set()
        kill_group(self.pid, signal.SIGTERM)
        with anyio.move_on_after(self._kill_timeout_s):
            await self._is_hurried.wait()
        kill_group(self.pid)

    async def _listen(self) -> None:
        is_open = True
        while is_open:
            await anyio.wait_readable(self._heard)
            is_open = self._read()

    def _read(self) -> bool:
        """Read what has come; False at the end of the output, or if nothing has come."""
        try:
            data = os.read(self._heard, _READ_BYTES)
        except BlockingIOError:
            return False
        self._tail = (self._tail + data)[-OUTPUT_BYTES_MAX - 1 :]
        return bool(data)
