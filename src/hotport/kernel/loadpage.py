"""A page of memory in which the workers of a generation see each other's load, without a system call.

It is a file without a name, whose descriptor workers are started with, so it cannot be removed or replaced. It is
sealed: an access to a part that another process has cut off would be SIGBUS. Each worker writes its own slot only. A
slot belongs to the process that holds a lock on its byte of the file, which the kernel releases when that process ends,
however it does.

Sources: memfd_create(2); fcntl(2) on sealing and on advisory record locks: these are not inherited over fork(2), and
all that a process has on a file end when it closes any descriptor of that file, so a worker has only one.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final

from hotport.kernel.fds import memory_file
from hotport.kernel.fork import withhold

__all__ = ["SLOTS", "LoadPage", "make_load_page"]

#: Workers that can see each other; one that finds no slot serves without.
SLOTS: Final = 128

#: Columns of numbers: group and whether it takes more, worker, when it looks again, gauge.
_COLUMNS: Final = 4
_PAGE_BYTES: Final = _COLUMNS * 8 * SLOTS

_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def make_load_page() -> int:
    """Make a page for the workers of a generation; the descriptor is close-on-exec, and the caller's.

    Raises:
        OSError: There is no descriptor or memory left for it, or the kernel cannot make such files.
    """
    fd = memory_file("hotport-load")
    try:
        os.posix_fallocate(fd, 0, _PAGE_BYTES)  # without memory, writing would be SIGBUS
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


class LoadPage:
    """This process's slot in the page of a generation, and those of the others.

    Args:
        fd: Of `make_load_page`, inherited; owned from here on, also if this raises.
        worker: Its number, for others to see.

    Raises:
        OSError: It is no such page (EINVAL) or cannot be mapped, or every slot is taken (EAGAIN).

    Attributes:
        slot: This process's.
        gauge: One number, to be written: how many connections this worker has.

    Descriptors: owns one, until `close`.
    """

    def __init__(self, fd: int, worker: int) -> None:
        self._fd = fd
        try:
            os.set_inheritable(fd, False)
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(fd).st_size != _PAGE_BYTES:
                raise OSError(errno.EINVAL, "another version of hotport has made the page")
            self._map = mmap.mmap(self._fd, _PAGE_BYTES)
            words = memoryview(self._map).cast("Q")
            self._groups, self._workers, self._dues, self._gauges = (
                words[n * SLOTS : (n + 1) * SLOTS] for n in range(_COLUMNS)
            )
            self.slot = self._claim()
        except OSError:
            os.close(self._fd)
            raise
        self.gauge = self._gauges[self.slot : self.slot + 1]
        self.gauge[0] = 0
        self._workers[self.slot] = worker
        withhold(self)

    def _claim(self) -> int:
        for slot in range(SLOTS):
            if self._lock(slot):
                return slot
        raise BlockingIOError("no slot is free")

    def _lock(self, slot: int) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
        except OSError:  # EAGAIN, EACCES
            return False
        return True

    def join(self, group: int, *, takes: bool = True) -> None:
        """Belong to a group from now on; 0: to none.

        Args:
            takes: More connections may come at present.
        """
        self._groups[self.slot] = 2 * group + takes if group else 0

    def promise(self, due_s: float) -> None:
        """Say when this worker does so again (CLOCK_MONOTONIC), by which others see that its event loop runs."""
        self._dues[self.slot] = int(due_s * 1e6)

    def due_s(self, slot: int) -> float:
        """What a worker has promised."""
        return self._dues[slot] / 1e6

    def others(self) -> list[int]:
        """The slots of the others in this process's group, alive or not."""
        groups = self._groups.tolist()
        mine = groups[self.slot] >> 1
        return [slot for slot, group in enumerate(groups) if group >> 1 == mine != 0 and slot != self.slot]

    def takes(self, slot: int) -> bool:
        """Whether the worker in a slot takes more connections at present, as it has said."""
        return bool(self._groups[slot] & 1)

    def counts(self, slots: list[int]) -> list[int]:
        """What the gauges in these slots say."""
        gauges = self._gauges
        return [gauges[slot] for slot in slots]

    def worker(self, slot: int) -> int:
        """The number of the worker in a slot."""
        return self._workers[slot]

    def forget_dead(self, slots: list[int]) -> None:
        """Take those of these slots out of their group whose process has ended."""
        for slot in slots:
            if self._lock(slot):
                self._groups[slot] = 0
                with suppress(OSError):
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, slot)

    def fileno(self) -> int:
        """The page's descriptor, to be passed on; -1 after `close`."""
        return self._fd

    def descriptors(self) -> tuple[int]:
        """What a forked child must not have."""
        return (self._fd,)

    def close(self) -> None:
        """Leave the group and the page."""
        if self._fd >= 0:
            self.join(0)
            os.close(self._fd)
            self._fd = -1
