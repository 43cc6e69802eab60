"""Report files: checked before the run, and replaced only when whole."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from hotport.errors import ConfigError, describe_errno

__all__ = ["ReportFile"]


class ReportFile:
    """A file that appears under its name when it is whole; one that was there stays until then.

    ``-`` is stdout, and what is no regular file (/dev/null, a FIFO) is written as it is.

    Raises:
        ConfigError: It cannot be made here (HP711), on entering, or could not be written (HP712).

    Descriptors: one, of a temporary file beside it, from entering to leaving.
    """

    def __init__(self, path: Path) -> None:
        self._path = path if path == Path("-") else path.resolve()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ReportFile:
        path = self._path
        try:
            if path.is_dir():
                raise IsADirectoryError(21, "Is a directory")
            if path != Path("-") and (path.is_file() or not path.exists()):
                self._file = tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False)
        except OSError as error:
            raise ConfigError(
                "HP711",
                f"cannot write {path}",
                cause=describe_errno(error.errno or 0),
                fix=f"ls -ld {shlex.quote(str(path.parent))}",
                note="name a file in a directory that exists and that you may write to",
            ) from None
        return self

    def write(self, data: bytes) -> None:
        """Write everything at once; the file appears under its name."""
        try:
            if self._file is None:
                self._write_as_it_is(data)
                return
            self._file.write(data)
            self._file.flush()
            os.fchmod(self._file.fileno(), self._mode())
            os.fsync(self._file.fileno())
            os.replace(self._file.name, self._path)
        except OSError as error:
            raise ConfigError(
                "HP712",
                f"could not write {self._path}",
                cause=f"{describe_errno(error.errno or 0)}; an earlier file is unchanged",
                fix="df -h",
                note="run it again, with another file if the disk is full",
            ) from None

    def _write_as_it_is(self, data: bytes) -> None:
        if self._path == Path("-"):
            sys.stdout.flush()
            with open(sys.stdout.fileno(), "wb", closefd=False) as stdout, suppress(BrokenPipeError):
                stdout.write(data)
        else:
            self._path.write_bytes(data)

    def _mode(self) -> int:
        try:
            return self._path.stat().st_mode & 0o777
        except FileNotFoundError:
            mask = os.umask(0)
            os.umask(mask)
            return 0o666 & ~mask

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk, of which `write` has told
                self._file.close()
            with suppress(FileNotFoundError):
                os.unlink(self._file.name)
