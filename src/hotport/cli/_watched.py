"""Choose the files that count as code, follow their links, and detect restarts that cause the next one."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final

__all__ = ["Brake", "Place", "Watched", "changed_within", "find"]

#: Files in a watched directory that count, beside those that ``--watch-include`` names.
INCLUDED: Final = ("*.py", "*.pyx", "*.pyd")

#: Directories, and what editors leave beside a file, that do not count anywhere below a watched directory.
EXCLUDED: Final = (
    *("__pycache__", ".git", ".hg", ".svn", ".tox", ".nox", ".venv", "site-packages", "node_modules"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".idea"),
    *(".#*", "flycheck_*", "*.___jb_*___"),
)

#: As in the kernel (path_resolution(7)).
LINKS_MAX: Final = 40

#: So many restarts in a row for files that were written while the one before was starting are a loop.
LOOP_MIN: Final = 3

BRAKE_MAX_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Place:
    """What a path leads to at present.

    Attributes:
        root: The file or directory, without links; None if there is none.
        identity: Device and inode of a directory: another one may have been put in its place.
        spots: Directory entries that may make the path mean something else: links on the way, and the last name.
    """

    root: str | None
    identity: tuple[int, int] | None
    spots: tuple[str, ...]


def find(path: str | Path) -> Place:
    """Follow an absolute path link by link.

    Sources: path_resolution(7).
    """
    spots: list[str] = []
    todo = deque(Path(path).parts[1:])
    here = "/"
    links = 0
    while todo:
        name = todo.popleft()
        if name == "..":
            here = os.path.dirname(here)
            continue
        entry = os.path.join(here, name)
        try:
            target = os.readlink(entry)
        except OSError:  # no link
            if not os.path.exists(entry):
                return Place(None, None, (*spots, entry))
            here = entry
            continue
        spots.append(entry)
        links += 1
        if links > LINKS_MAX:
            return Place(None, None, tuple(spots))
        parts = PurePath(target).parts
        if parts[0] == "/":
            here, parts = "/", parts[1:]
        todo.extendleft(reversed(parts))
    if here not in (*spots, "/"):
        spots.append(here)
    if not os.path.isdir(here):
        return Place(here, None, tuple(spots))
    found = os.stat(here)
    return Place(here, (found.st_dev, found.st_ino), tuple(spots))


class Watched:
    """The watched files: those that are named, and the matching ones in directories that are named.

    Args:
        paths: Absolute, and as they were named: a link that is switched leads to other files.
        include: Patterns of more files in directories; one with a slash is compared with the end of the path.
        exclude: Patterns of files and directories that do not count in directories.
    """

    def __init__(self, paths: Sequence[str], *, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        self._paths = paths
        self._include = (*INCLUDED, *include)
        self._exclude = (*EXCLUDED, *exclude)
        self.places = tuple(map(find, paths))

    @property
    def trees(self) -> list[str]:
        """Directories that have to be watched with all that is below them."""
        return sorted({place.root for place in self.places if place.root is not None and place.identity})

    @property
    def parents(self) -> list[str]:
        """Directories in which entries have to be watched."""
        return sorted({os.path.dirname(spot) for place in self.places for spot in place.spots})

    def look(self) -> bool:
        """Follow the paths again; return whether one of them leads elsewhere now."""
        before, self.places = self.places, tuple(map(find, self._paths))
        return before != self.places

    @property
    def is_whole(self) -> bool:
        """Whether every path leads somewhere; one may not while a link or a directory is being replaced."""
        return all(place.root is not None for place in self.places)

    def concerns(self, path: str) -> bool:
        """Whether a change there may count, or may make a path lead elsewhere."""
        return self.counts(path) or any(path in place.spots for place in self.places)

    def counts(self, path: str) -> bool:
        """Whether a change there is a change of code."""
        for place in self.places:
            root = place.root
            if root is None:
                continue
            if not place.identity:
                if path == root:
                    return True
            elif path.startswith(root.rstrip("/") + "/") and self._counts_below(PurePath(path).relative_to(root)):
                return True
        return False

    def _counts_below(self, path: PurePath) -> bool:
        if not any(path.match(pattern) for pattern in self._include):
            return False
        return not any(each.match(pattern) for each in (path, *path.parents) for pattern in self._exclude)


class Brake:
    """Delays restarts that cause each other: a service that writes a file of its own code as it starts."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def delay_s(self, *, is_own: bool) -> float:
        """Return how many seconds to wait before the restart for a change.

        Args:
            is_own: All of it came while the code of the last restart was starting.
        """
        self._in_a_row = self._in_a_row + 1 if is_own else 0
        beyond = self._in_a_row - LOOP_MIN
        return 0.0 if beyond < 0 else min(2.0 ** min(beyond, 10), BRAKE_MAX_S)

    def release(self) -> None:
        """End the delay: a change during it has another cause than the restart."""
        self._in_a_row = 0


def changed_within(files: Iterable[str], began: float, ended: float) -> bool:
    """Whether all the files that are there, at least one, were last changed between two moments (``time.time()``).

    Sources: inode(7): ``ctime`` is the time of the last write or rename.
    """
    times: list[float] = []
    for file in files:
        with suppress(OSError):
            times.append(os.stat(file).st_ctime)
    return bool(times) and all(began <= at <= ended for at in times)
