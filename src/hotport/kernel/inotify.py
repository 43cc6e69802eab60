"""Watch files and directories for being removed, renamed or replaced (inotify).

Sources: inotify(7), inotify_add_watch(2).
"""

from __future__ import annotations

import os
from typing import Final

from hotport.errors import KernelError

__all__ = ["Watch"]

_CLOEXEC: Final = os.O_CLOEXEC
_NONBLOCK: Final = os.O_NONBLOCK

_ATTRIB: Final = 0x4
_MOVED_FROM: Final = 0x40
_MOVED_TO: Final = 0x80
_DELETE: Final = 0x200
_DELETE_SELF: Final = 0x400
_MOVE_SELF: Final = 0x800
_ONLYDIR: Final = 0x01000000
_DONT_FOLLOW: Final = 0x02000000

#: What happens to entries of a directory, or to the directory itself.
_OF_DIRECTORY: Final = _MOVED_FROM | _MOVED_TO | _DELETE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR

#: A file that is open somewhere is not deleted when its name is removed: its number of links changes.
_OF_FILE: Final = _ATTRIB | _DELETE_SELF | _MOVE_SELF | _DONT_FOLLOW

_EVENTS_BYTES: Final = 64 * 1024


class Watch:
    """An inotify instance; becomes readable when a watched file changes.

    Raises:
        KernelError: The kernel has no inotify, or this user has no instance left (HP214).

    Descriptors: owns one.
    """

    def __init__(self) -> None:
        import ctypes  # 10 ms, and only supervisors watch

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(_CLOEXEC | _NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise KernelError(
                "HP214",
                "cannot watch files",
                errno=number,
                cause="this user has no inotify instance left, or the kernel has none",
                fix="sysctl fs.inotify.max_user_instances",
            )

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._fd

    def add_directory(self, path: str) -> bool:
        """Watch a directory for removed, renamed and replaced entries; idempotent. False if that is not possible."""
        return self._add(path, _OF_DIRECTORY)

    def add_file(self, path: str) -> bool:
        """Watch one file and nothing else in its directory; idempotent. False if that is not possible."""
        return self._add(path, _OF_FILE)

    def drain(self) -> None:
        """Discard all pending events; the caller checks what has changed."""
        try:
            while os.read(self._fd, _EVENTS_BYTES):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fd)

    def _add(self, path: str, mask: int) -> bool:
        return bool(self._libc.inotify_add_watch(self._fd, os.fsencode(path), self._ctypes.c_uint32(mask)) >= 0)
