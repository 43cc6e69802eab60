"""The counters of a service: those of its workers, of those that have ended, and the supervisor's own.

Each process counts in a page of its own (`hotport.kernel.counterpage`), a file in the runtime directory. A sum is the
total of those that have ended, a file as well, and all pages. So it goes on whichever process ends, and however: the
next supervisor finds the files where this one has left them.

A page whose process has ended is folded into the total: a new file with the sum and the page's name takes the place of
the old one, then the page is removed. A page that the total names is in it, whether it was removed or not. Two
supervisors may do that, during a take-over, so one of them has a lock meanwhile.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import msgspec

from hotport.errors import HotportError
from hotport.kernel.counterpage import CounterPage, is_held, make_counter_page, read_counter_page
from hotport.kernel.fds import lock_directory, private_directory
from hotport.model.effects import Announce, News
from hotport.observe.logs import count_dropped, get_logger
from hotport.wire import counters
from hotport.wire.messages import Report

__all__ = ["Counters"]

DIRECTORY: Final = "counters"

_TOTAL: Final = "total.json"
_SUFFIX: Final = ".page"

#: Seconds after which a page that no process has taken is removed: its worker has ended before it could.
UNCLAIMED_S: Final = 3600.0

#: The longest total that is read.
_TOTAL_BYTES_MAX: Final = 1024 * 1024

_EVENTS: Final = {News.WORKER_LOST: "lost", News.WORKER_GIVEN_UP: "given_up"}

log = get_logger("hotport.supervisor")


class Total(msgspec.Struct, frozen=True):
    """The counters of processes that have ended; `folded` are the names of their last pages."""

    cells: tuple[int, ...] = ()
    folded: tuple[str, ...] = ()


class Counters:
    """The counters of one service.

    Args:
        directory: The service's runtime directory.
        is_on: Whether to count at all.

    Descriptors: owns one, of its own page, until `close`.
    """

    def __init__(self, directory: str, *, is_on: bool) -> None:
        self.is_on = is_on
        self._directory = os.path.join(directory, DIRECTORY)
        self._name = f"supervisor-{os.getpid()}-{time.monotonic_ns()}{_SUFFIX}"
        self._page: CounterPage | None = None
        if not is_on:
            return
        try:
            self._page = CounterPage(self._make(self._name))
            count_dropped(self._page.cells)
        except (HotportError, OSError) as error:
            log.warning("metrics.off", error=str(error))
        self.fold()

    # -- counting ------------------------------------------------------------------------------------------

    def make_page(self, generation: int, worker: int) -> int:
        """Make a worker's page; the descriptor is close-on-exec, and the caller's.

        Raises:
            OSError: There is no descriptor or memory left for it.
            ConfigError: The directory is gone, or is not ours (HP621, HP622).
        """
        return self._make(f"{generation}.{worker}-{time.monotonic_ns()}{_SUFFIX}")

    def _make(self, name: str) -> int:
        private_directory(self._directory)
        return make_counter_page(os.path.join(self._directory, name))

    def count(self, event: str) -> None:
        """Count something that has happened to a worker: one of `WORKER_EVENTS`."""
        self._add(counters.WORKERS.start + counters.WORKER_EVENTS.index(event))

    def hear(self, news: Announce | Report) -> None:
        """Count news of the service; a subscriber."""
        if isinstance(news, Announce):
            if (event := _EVENTS.get(news.news)) is not None:
                self.count(event)
            return
        self._add(counters.RESTARTS.start + counters.OUTCOMES.index(news.outcome))
        self._add(counters.GAP.start, round(news.accept_gap_ms * 1e6))
        self._add(counters.GAP.start + 1)
        before_ms = 0.0
        for phase in news.phases:
            place = counters.PHASES.index(phase.name)
            self._add(counters.PHASE_NS.start + place, round((phase.ms - before_ms) * 1e6))
            self._add(counters.PHASE_COUNT.start + place)
            before_ms = phase.ms

    def _add(self, cell: int, amount: int = 1) -> None:
        if self._page is not None:
            self._page.cells[cell] += amount

    # -- reading -------------------------------------------------------------------------------------------

    def read(self) -> tuple[list[int], dict[tuple[int, int], Sequence[int]]]:
        """Read the sum of all pages, and the page of each worker that has one, by generation and number."""
        while True:
            before = self._stamp()
            total = self._total()
            pages = {name: page for name in self._names() if (page := self._read(name)) is not None}
            if self._stamp() == before:  # else a page that was folded meanwhile may be missing, or may be there twice
                break
        cells = counters.fold(total.cells, ())
        workers: dict[tuple[int, int], Sequence[int]] = {}
        for name, page in pages.items():
            if name in total.folded:
                continue
            cells = [a + b for a, b in zip(cells, page, strict=True)]
            generation, _, rest = name.partition(".")
            with suppress(ValueError):
                workers[int(generation), int(rest.partition("-")[0])] = page
        return cells, workers

    def _read(self, name: str) -> Sequence[int] | None:
        if name == self._name:  # to open and close its file would be to lose it
            return self._page.cells.tolist() if self._page is not None else None
        return read_counter_page(os.path.join(self._directory, name))

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self._directory) if name.endswith(_SUFFIX)]
        except OSError:  # somebody has removed it
            return [self._name]

    def _stamp(self) -> tuple[int, int]:
        try:
            found = os.stat(os.path.join(self._directory, _TOTAL))
        except OSError:
            return 0, 0
        return found.st_ino, found.st_mtime_ns

    def _total(self) -> Total:
        try:
            with open(os.path.join(self._directory, _TOTAL), "rb") as file:
                return msgspec.json.decode(file.read(_TOTAL_BYTES_MAX), type=Total)
        except FileNotFoundError:
            return Total()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("metrics.lost", error=str(error))
            return Total()

    # -- folding -------------------------------------------------------------------------------------------

    def fold(self) -> None:
        """Add the pages of processes that have ended to the total, unless another supervisor does so now."""
        if not self.is_on:
            return
        try:
            with self._lock() as is_locked:
                if is_locked:
                    self._fold()
        except Exception as error:  # the pages stay, and are read as they are
            log.warning("metrics.not_folded", error=str(error))

    def _fold(self) -> None:
        total, names = self._total(), self._names()
        ended: dict[str, Sequence[int]] = {}
        for name in names:
            path = os.path.join(self._directory, name)
            if name == self._name or name in total.folded:
                continue
            # In this order: a process that ends between the two has counted everything before.
            is_over, page = not is_held(path), read_counter_page(path)
            if is_over and page is not None and page[counters.STATE.start]:
                ended[name] = page
            elif is_over and _age_s(path) > UNCLAIMED_S:
                os.unlink(path)
        folded = {name for name in total.folded if name in names} | ended.keys()
        if ended:
            new = Total(tuple(counters.fold(total.cells, ended.values())), tuple(folded))
            path = os.path.join(self._directory, _TOTAL)
            with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.json.encode(new))
            os.rename(f"{path}.new", path)
        for name in folded:
            with suppress(OSError):
                os.unlink(os.path.join(self._directory, name))

    @contextmanager
    def _lock(self) -> Iterator[bool]:
        fd = lock_directory(self._directory)
        try:
            yield fd is not None
        finally:
            if fd is not None:
                os.close(fd)

    def close(self, *, is_last: bool) -> None:
        """Leave the own page to the next supervisor; remove all files if the service has ended."""
        if self._page is not None:
            count_dropped(None)
            self._page.close()
        if not is_last:
            return
        with suppress(OSError):
            for name in os.listdir(self._directory):
                os.unlink(os.path.join(self._directory, name))
            os.rmdir(self._directory)


def _age_s(path: str) -> float:
    return time.time() - os.stat(path, follow_symlinks=False).st_mtime
