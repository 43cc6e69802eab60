"""A page of memory in which the workers of a service see each other's load, without a system call.

It is a file in the runtime directory that all of them map: so it outlives a supervisor, and the next generation finds
it. Each worker writes its own slot only. A slot belongs to the process that holds a lock on its byte of the file, which
the kernel releases when that process ends, however it does.

Sources: mmap(2) MAP_SHARED; fcntl(2), advisory record locking: such locks are not inherited over fork(2), and all of a
process's locks on a file end when it closes any descriptor of that file, so this module is the only one to open it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import suppress
from typing import Final

from hotport.kernel.fork import withhold

__all__ = ["SLOTS", "LoadPage"]

#: Workers that can see each other; one that finds no slot serves without.
SLOTS: Final = 128

#: Columns of numbers: group, worker, when it looks again, gauge.
_COLUMNS: Final = 4
_PAGE_BYTES: Final = _COLUMNS * 8 * SLOTS


class LoadPage:
    """This process's slot in the page of a service, and those of the others.

    Args:
        path: Made if it does not exist.
        worker: Its number, for others to see.

    Raises:
        OSError: It cannot be opened or mapped, or every slot is taken (EAGAIN).

    Attributes:
        slot: This process's.
        gauge: One number, to be written: how many connections this worker has.

    Descriptors: owns one, until `close`.
    """

    def __init__(self, path: str, worker: int) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(self._fd, 0, _PAGE_BYTES)  # on a full disk, writing would be SIGBUS
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

    def join(self, group: int) -> None:
        """Take from the queue of a group from now on; 0: of none."""
        self._groups[self.slot] = group

    def promise(self, due_s: float) -> None:
        """Say when this worker does so again (CLOCK_MONOTONIC), by which others see that its event loop runs."""
        self._dues[self.slot] = int(due_s * 1e6)

    def due_s(self, slot: int) -> float:
        """What a worker has promised."""
        return self._dues[slot] / 1e6

    def others(self) -> list[int]:
        """The slots of the others in this process's group, alive or not."""
        groups = self._groups.tolist()
        mine = groups[self.slot]
        return [slot for slot, group in enumerate(groups) if group == mine and slot != self.slot]

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

    def descriptors(self) -> tuple[int]:
        """What a forked child must not have."""
        return (self._fd,)

    def close(self) -> None:
        """Leave the group and the page; the last one removes the file."""
        if self._fd >= 0:
            self.join(0)
            with suppress(OSError):
                fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, self.slot)
                # In order: of several that close at once, the first to have slot 0 goes on.
                if all(self._lock(slot) for slot in range(SLOTS)):
                    os.unlink(self._path)
            os.close(self._fd)
            self._fd = -1
