"""The flight recorder: the last restarts of a service, in files that survive its supervisor.

A file is written whenever a restart reaches a phase, so one that a killed supervisor had begun is there as well. The
files are in the runtime directory, which every next supervisor of the service has: by upgrade, take-over or adoption.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import msgspec

from hotport.observe.logs import get_logger
from hotport.wire.recording import Recording

__all__ = ["RECORDINGS_MAX", "Recorder", "read_recordings"]

#: How many restarts are kept.
RECORDINGS_MAX: Final = 20

#: The longest file that is read. A recording is bounded (`hotport.supervisor.timeline`); most have a few kilobytes.
RECORDING_BYTES_MAX: Final = 2 * 1024 * 1024

_DIRECTORY: Final = "restarts"


class Recorder:
    """Writes and reads the recordings of a service.

    Args:
        directory: Its runtime directory.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._why_not = ""
        self._known: dict[str, Recording] | None = None

    def keep(self, recording: Recording) -> None:
        """Write a recording, in place of the one of the same restart; beyond `RECORDINGS_MAX` the oldest are removed.

        A failure is logged once: a full disk must not end a restart.
        """
        self._know()[_name(recording)] = recording
        self._forget()
        directory = os.path.join(self._directory, _DIRECTORY)
        path = os.path.join(directory, _name(recording))
        try:
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
            with open(os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(msgspec.json.encode(recording))
            os.replace(f"{path}.new", path)
            for name in sorted(os.listdir(directory))[:-RECORDINGS_MAX]:
                os.unlink(os.path.join(directory, name))
        except OSError as error:
            why = error.strerror or str(error)
            if why != self._why_not:
                get_logger("hotport.supervisor").warning("recorder.failed", path=path, error=why)
            self._why_not = why
        else:
            self._why_not = ""

    def read(self) -> list[Recording]:
        """The recordings that were there at first, and those since; oldest first."""
        return [*self._know().values()]

    def _know(self) -> dict[str, Recording]:
        if self._known is None:
            self._known = {_name(each): each for each in read_recordings(self._directory)}
        return self._known

    def _forget(self) -> None:
        known = self._know()
        while len(known) > RECORDINGS_MAX:
            del known[min(known)]


def read_recordings(directory: str, last: int = RECORDINGS_MAX) -> list[Recording]:
    """Read the last recordings of the service with this runtime directory, oldest first; skip what is none.

    Raises:
        PermissionError: The directory is another user's.
    """
    return [*_read(os.path.join(directory, _DIRECTORY), last)]


def _read(directory: str, last: int) -> Iterator[Recording]:
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    for name in names[-last:]:
        with suppress(FileNotFoundError, msgspec.MsgspecError), open(os.path.join(directory, name), "rb") as file:
            yield msgspec.json.decode(file.read(RECORDING_BYTES_MAX), type=Recording)


def _name(recording: Recording) -> str:
    """The name of a recording's file; names are in the order of time."""
    at = recording.report.began_at.partition("+")[0].replace("-", "").replace(":", "")
    return f"{at}Z-{recording.report.generation}.json"
