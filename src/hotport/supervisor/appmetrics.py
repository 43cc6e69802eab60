"""The application's own metrics: a directory for prometheus_client's multiprocess mode, of which hotport takes care.

Each process writes files there that are named by its pid. Files of processes that have ended are merged into one for
each kind, when metrics are asked for: else a service that restarts often would collect them for ever. A merge is
written down before it is done, so one that is interrupted is completed by the next: nothing counts twice.

The files belong to workers, possibly of another user, so a file that cannot be read is left out, and links are not
followed.

Sources: prometheus_client's documentation, "Multiprocess Mode (E.g. Gunicorn)"; `prometheus_client.multiprocess`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hotport.errors import HotportError
from hotport.kernel.fds import give_directory, lock_directory, private_directory
from hotport.kernel.users import Identity
from hotport.observe.logs import get_logger

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["AppMetrics", "app_metrics_directory"]

_DIRECTORY: Final = "app-metrics"

#: Larger files are left out.
FILE_BYTES_MAX: Final = 64 * 1024 * 1024

#: What the next merge replaces and removes.
_PLAN: Final = "merge.json"

#: Files of processes that run; a value for each process would be a label without bounds once it has ended.
_OF_RUNNING: Final = ("gauge_live", "gauge_all")

log = get_logger("hotport.supervisor")


class Plan(msgspec.Struct, frozen=True):
    """A merge: files that get their name, and those that are in them, by name."""

    made: tuple[str, ...]
    merged: tuple[str, ...]


def app_metrics_directory(directory: str, uid: int | None) -> str:
    """Where workers of a user write, in the runtime directory of a service; None: those of its own user."""
    return os.path.join(directory, _DIRECTORY if uid is None else f"{_DIRECTORY}-{uid}")


class AppMetrics:
    """The files of one service's applications.

    Args:
        directory: Its runtime directory.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._why_not = ""

    def prepare(self, identity: Identity | None) -> None:
        """Make the directory for workers that are to be started.

        Raises:
            ConfigError: That cannot be done (HP621, HP622).
        """
        path = app_metrics_directory(self._directory, identity.uid if identity is not None else None)
        if identity is None:
            private_directory(path)
        else:
            give_directory(path, identity.uid, identity.gid)

    def ended(self, pid: int) -> None:
        """Rename the files of a process that has ended, so that a new process with the same pid does not reuse them."""
        for place in self._places():
            for name in _names(place):
                path = os.path.join(place, name)
                with suppress(OSError):
                    if _pid(name) == str(pid) and name.startswith(_OF_RUNNING):
                        os.unlink(path)
                    elif _pid(name) == str(pid):
                        os.rename(path, f"{path.removesuffix('.db')}x{time.monotonic_ns()}.db")

    def clear(self) -> None:
        """Remove everything: the service begins, or has ended."""
        for place in self._places():
            with suppress(OSError):
                for name in os.listdir(place):
                    os.unlink(os.path.join(place, name))
                os.rmdir(place)

    def collect(self) -> list[Metric]:
        """Read the metrics of all processes; may take a while. What cannot be read is logged once, and left out."""
        from prometheus_client.multiprocess import MultiProcessCollector

        files: list[str] = []
        for place in self._places():
            try:
                self._merge(place)
            except (HotportError, OSError, ValueError, msgspec.MsgspecError) as error:
                self._warn(place, error)
            files += (os.path.join(place, name) for name in self._readable(place, _names(place)))
        try:
            found: Iterable[Metric] = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]
            return [metric for metric in found if not metric.name.startswith("hotport_")]
        except Exception as error:  # the files are not ours
            self._warn(self._directory, error)
            return []

    def _places(self) -> list[str]:
        with suppress(OSError):
            names = [name for name in os.listdir(self._directory) if name.startswith(_DIRECTORY)]
            return [os.path.join(self._directory, name) for name in names]
        return []

    def _readable(self, place: str, names: Iterable[str]) -> dict[str, list[Any]]:
        """The values in the files that can be read, by name."""
        from prometheus_client.mmap_dict import MmapedDict

        found: dict[str, list[Any]] = {}
        for name in names:
            path = os.path.join(place, name)
            try:
                about = os.lstat(path)
                if not stat.S_ISREG(about.st_mode) or about.st_size > FILE_BYTES_MAX:
                    raise ValueError("it is no file of this kind")
                values = list(MmapedDict.read_all_values_from_file(path))  # type: ignore[no-untyped-call]
                for key, *_ in values:
                    metric, sample, labels, _ = msgspec.json.decode(key, type=tuple[str, str, dict[str, str], str])
                    assert metric, (sample, labels)
                found[name] = values
            except FileNotFoundError:
                pass
            except Exception as error:  # the file is not ours
                self._warn(path, error)
        return found

    def _merge(self, place: str) -> None:
        """Merge the files of processes that have ended."""
        lock = lock_directory(place)
        if lock is None:  # another supervisor does so, in a take-over
            return
        try:
            _carry_out(place)
            ended = [name for name in _names(place) if not _is_running(_pid(name)) and _pid(name) != "0"]
            if not ended:
                return
            dropped = [name for name in ended if name.startswith(_OF_RUNNING)]
            kinds = {name.rpartition("_")[0] for name in ended if name not in dropped}
            for kind in kinds:
                mine = [name for name in ended if name.rpartition("_")[0] == kind]
                _write(os.path.join(place, f"{kind}_0.db.new"), kind, self._readable(place, [f"{kind}_0.db", *mine]))
            plan = Plan(tuple(f"{kind}_0.db" for kind in kinds), tuple(ended))
            with open(os.path.join(place, f"{_PLAN}.new"), "wb") as file:
                file.write(msgspec.json.encode(plan))
            os.rename(os.path.join(place, f"{_PLAN}.new"), os.path.join(place, _PLAN))
            _carry_out(place)
        finally:
            os.close(lock)

    def _warn(self, path: str, error: Exception) -> None:
        why = f"{path}: {error!r}"
        if why != self._why_not:
            log.warning("metrics.app_unreadable", path=path, error=str(error) or type(error).__name__)
        self._why_not = why


def _carry_out(place: str) -> None:
    """Complete a merge that was written down; do nothing if there is none."""
    try:
        with open(os.path.join(place, _PLAN), "rb", opener=_no_link) as file:
            plan = msgspec.json.decode(file.read(FILE_BYTES_MAX), type=Plan)
    except FileNotFoundError:
        return
    for name in map(os.path.basename, plan.made):
        path = os.path.join(place, name)
        with suppress(FileNotFoundError):  # it has its name already
            os.rename(f"{path}.new", path)
    for name in map(os.path.basename, plan.merged):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(place, name))
    os.unlink(os.path.join(place, _PLAN))


def _write(path: str, kind: str, files: dict[str, list[Any]]) -> None:
    """Write the merged values of files of one kind."""
    from prometheus_client.mmap_dict import MmapedDict

    merged: dict[str, tuple[float, float]] = {}
    for values in files.values():
        for key, value, at, *_ in values:
            before = merged.get(key)
            if before is None:
                merged[key] = value, at
            elif kind in ("gauge_min", "gauge_max"):
                merged[key] = (min if kind == "gauge_min" else max)(before[0], value), max(before[1], at)
            elif kind == "gauge_mostrecent":
                merged[key] = max(before, (value, at), key=lambda pair: pair[1])
            else:
                merged[key] = before[0] + value, max(before[1], at)
    with suppress(FileNotFoundError):
        os.unlink(path)
    target: Any = MmapedDict(path)  # type: ignore[no-untyped-call]
    for key, (value, at) in merged.items():
        target.write_value(key, value, at)
    target.close()


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW)


def _names(place: str) -> list[str]:
    try:
        return sorted(name for name in os.listdir(place) if name.endswith(".db"))
    except OSError:
        return []


def _pid(name: str) -> str:
    """Whose file it is: a pid, a pid that has ended (with an x), or 0 for merged ones."""
    return name.removesuffix(".db").rpartition("_")[2]


def _is_running(pid: str) -> bool:
    return pid.isdecimal() and os.path.exists(f"/proc/{pid}")
