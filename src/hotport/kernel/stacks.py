"""Let a process tell another one its Python stacks, even while it is blocked.

The process has a pipe for them, and three signals with which it is asked:

- ``STACKS``: Python itself calls the handler, which holds the interpreter's lock, so nothing changes under it. It works
  wherever Python code runs, or a call is interrupted for handlers: in ``while True``, ``time.sleep``, ``lock.acquire``.
- ``STACK_IN_C``: faulthandler writes at once, in the middle of C code, the stack of the main thread. Only for one that
  has not carried out STACKS: the frames of a thread that runs Python may be half made, and reading them can be the end
  of the process (1 in 1000 with CPython 3.11).
- ``STACKS_IN_C``: the same with those of all threads. Only if the main thread waits for one that keeps the lock: then
  none of them runs Python.

All of them are sent to the main thread: the kernel may choose another one for a signal to the process.

They are real-time signals, which applications and Python leave alone. Their default action is to end the process, so
they are only sent to one that has told its pipe.

Sources: faulthandler; signal(7); pipe(7); proc_pid_fd(5): opening a pipe there needs no capability for a process of the
same user.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
from contextlib import suppress
from types import FrameType
from typing import Final

from hotport.kernel import procfs
from hotport.kernel.fork import withhold
from hotport.wire.stack import STACK_BYTES_MAX

__all__ = ["HANDLER", "STACKS", "STACKS_IN_C", "STACK_IN_C", "StackPipe", "open_stack_pipe", "read_stack"]

STACKS: Final = signal.SIGRTMAX - 3
STACK_IN_C: Final = signal.SIGRTMAX - 2
STACKS_IN_C: Final = signal.SIGRTMAX - 1

#: The function that Python calls for `STACKS`; its frame is the first one that is told.
HANDLER: Final = "_tell_stacks"


class StackPipe:
    """This process's pipe for its stacks, and the handlers that fill it; made in the main thread.

    Writing to it never waits, and what does not fit is lost: a pipe has 64 KiB.

    Attributes:
        identity: The descriptor's number, and the pipe's inode, by which another process finds it.

    Descriptors: owns two, until `close`.
    Signals: replaces the handlers of three, until `close`.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.identity = (self._read, os.fstat(self._read).st_ino)

        def _tell_stacks(number: int, frame: FrameType | None) -> None:
            with suppress(Exception):  # it runs between any two instructions of the application
                faulthandler.dump_traceback(self._write)

        self._handlers = {number: signal.getsignal(number) for number in (STACKS, STACK_IN_C, STACKS_IN_C)}
        signal.signal(STACKS, _tell_stacks)
        faulthandler.register(STACK_IN_C, self._write, all_threads=False)
        faulthandler.register(STACKS_IN_C, self._write, all_threads=True)
        withhold(self)

    def descriptors(self) -> tuple[int, int]:
        """What a forked child must not have; -1 after `close`."""
        return self._read, self._write

    def close(self) -> None:
        """Restore the handlers, of which one may end the process when a signal comes late."""
        for number, handler in self._handlers.items():
            faulthandler.unregister(number)
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)
        self._read = self._write = -1


def open_stack_pipe(pid: int, identity: tuple[int, int]) -> int:
    """Open another process's pipe for reading; return a descriptor that does not wait, and is the caller's.

    The process may be less trusted than this one: nothing is opened but a pipe that its own user has made.

    Raises:
        OSError: It is not there any more, or another process has that pid, or another user that process.

    Sources: open(2), O_PATH: has no effect on what it names.
    """
    fd, inode = identity
    named = os.open(f"/proc/{pid}/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(named)
        if (found.st_ino, found.st_uid) != (inode, procfs.user_of(pid)) or not stat.S_ISFIFO(found.st_mode):
            raise FileNotFoundError(f"descriptor {fd} of process {pid} is not its pipe for stacks")
        return os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(named)


def read_stack(fd: int) -> bytes:
    """Read everything that is in the pipe by now; does not wait."""
    try:
        return os.read(fd, STACK_BYTES_MAX)
    except BlockingIOError:
        return b""
