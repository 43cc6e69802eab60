"""Pages of counters: files in memory that a process counts in, and that outlive it, however it ends.

Counting is an addition in mapped memory. Whoever reads a page reads the file, at any time: also while its process is
blocked, and after its end. A page belongs to the process that holds a lock on its first byte.

Sources: fcntl(2) on advisory record locks: they are not inherited over fork(2), and all that a process has on a file
end when it closes any descriptor of that file; mmap(2), MAP_SHARED; posix_fallocate(3).
"""

from __future__ import annotations

import array
import errno
import fcntl
import mmap
import os
import stat
from typing import Final

from hotport.kernel.fork import withhold
from hotport.wire.counters import CELLS, MAGIC, SECONDS, STATE

__all__ = ["CounterPage", "is_held", "make_counter_page", "read_counter_page"]

_PAGE_BYTES: Final = 8 * CELLS

#: A worker has not served for longer, whatever it writes.
SECONDS_MAX: Final = 1e9


def make_counter_page(path: str) -> int:
    """Make a page at a path where there is nothing; the descriptor is close-on-exec, and the caller's.

    Raises:
        OSError: There is something, or no descriptor or memory left for it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, _PAGE_BYTES)  # without memory, counting would be SIGBUS
        os.pwrite(fd, MAGIC.to_bytes(8, "little"), 0)
    except OSError:
        os.close(fd)
        os.unlink(path)
        raise
    return fd


def read_counter_page(path: str) -> array.array[int] | None:
    """Read the numbers of a page, with times in nanoseconds; None if there is none, or one of another format.

    The process that counts there may belong to another user, so nothing but its size is relied upon.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        data = os.pread(fd, _PAGE_BYTES, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    except OSError:
        return None
    finally:
        os.close(fd)
    cells = array.array("Q", data[: len(data) // 8 * 8])
    if not cells or cells[0] != MAGIC:
        return None
    cells.extend([0] * (CELLS - len(cells)))
    times = array.array("d", cells.tobytes())
    for cell in SECONDS:
        cells[cell] = round(times[cell] * 1e9) if 0 <= times[cell] <= SECONDS_MAX else 0
    return cells


def is_held(path: str) -> bool:
    """Whether a process counts in a page; not to be called by that process, which would lose it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
    except OSError:  # EAGAIN, EACCES
        return True
    finally:
        os.close(fd)
    return False


class CounterPage:
    """The page that this process counts in.

    Args:
        fd: Of `make_counter_page`, inherited; owned from here on, also if this raises.

    Raises:
        OSError: It is no such page (EINVAL), cannot be mapped, or another process counts there (EAGAIN, EACCES).

    Attributes:
        cells: The numbers, to be added to; see `hotport.wire.counters`.
        seconds: The same memory as doubles, for the cells that are `SECONDS`.

    Descriptors: owns one, until `close`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            os.set_inheritable(fd, False)
            if os.fstat(fd).st_size != _PAGE_BYTES:
                raise OSError(errno.EINVAL, "another version of hotport has made the page")
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
            memory = memoryview(mmap.mmap(fd, _PAGE_BYTES))
            self.cells, self.seconds = memory.cast("Q"), memory.cast("d")
            if self.cells[0] != MAGIC:
                raise OSError(errno.EINVAL, "another version of hotport has made the page")
        except OSError:
            os.close(fd)
            raise
        self.cells[STATE.start] = 1
        withhold(self)

    def descriptors(self) -> tuple[int]:
        """What a forked child must not have."""
        return (self._fd,)

    def close(self) -> None:
        """Leave the page to readers. It stays mapped, so that late events can still be counted."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
