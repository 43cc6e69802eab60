"""Directories that mark which process owns a service; files without a name."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from typing import Final

from hotport.errors import ConfigError, KernelError

__all__ = ["give_directory", "is_at", "let_through", "lock_directory", "memory_file", "private_directory"]

#: The mode of a directory that others may pass through.
PASSED_MODE: Final = 0o711

#: A file that can never be executed (Linux 6.3), which some systems insist on (sysctl vm.memfd_noexec).
_MFD_NOEXEC_SEAL: Final = 8


def memory_file(name: str) -> int:
    """Make an empty file in memory that can be sealed; the descriptor is close-on-exec, and the caller's.

    Raises:
        OSError: There is no descriptor or memory left for it, or the kernel cannot make such files.

    Sources: memfd_create(2); `name` is shown in /proc only.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)


def lock_directory(path: str) -> int | None:
    """Lock a directory until this process ends, however it ends.

    The lock is the directory's own: there is no file in it that could be removed to let a second owner in. It also
    keeps systemd-tmpfiles from removing what lies in there for long.

    Returns:
        The descriptor that holds the lock (close-on-exec; close it to let go); None if another holds it.

    Raises:
        KernelError: If the directory cannot be opened (HP620).

    Sources: flock(2): the lock belongs to the open file description, not to the process id; tmpfiles.d(5), Age.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError(
                "HP620",
                f"cannot lock the directory {path}",
                errno=error.errno or 0,
                cause="it is not there any more, is a symbolic link, or is another user's",
                fix=f"ls -ld {path}",
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        if is_at(fd, path):
            return fd
        os.close(fd)  # replaced since it was opened


def is_at(fd: int, path: str) -> bool:
    """Whether a path still names the file or directory that is open as `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def private_directory(path: str) -> None:
    """Make a directory that only this user may enter, or check an existing one: others may pass through it at most.

    Its parent must exist. What is found is refused rather than repaired: another user may have put it there.

    Raises:
        ConfigError: If it cannot be made (HP621), or is not ours alone (HP622).

    Sources: mkdir(2); lstat(2), so that a symbolic link is not followed.
    """
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(
            "HP621",
            f"cannot make the runtime directory {path}",
            cause=os.strerror(error.errno or 0),
            fix="HOTPORT_RUNTIME_DIR=/a/directory/of/yours hotport serve",
        ) from error
    found = os.lstat(path)
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        cause, fix = "it is not a directory, or a symbolic link to one", f"ls -ld {path}"
    elif found.st_uid != os.geteuid():
        cause, fix = f"it belongs to uid {found.st_uid}, and we are {os.geteuid()}", f"ls -ld {path}"
    elif mode & 0o077 and mode != PASSED_MODE:
        cause, fix = f"others may enter it (mode {mode:04o})", f"chmod 700 {path}"
    else:
        return
    raise ConfigError("HP622", f"cannot use the runtime directory {path}", cause=cause, fix=fix)


def let_through(path: str) -> None:
    """Let other users pass through a directory of ours, to names in it that they know; they can neither list nor write.

    Raises:
        ConfigError: If it is not ours (HP622).

    Sources: path_resolution(7): search permission.
    """
    private_directory(path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fchmod(fd, PASSED_MODE)
    finally:
        os.close(fd)


def give_directory(path: str, uid: int, gid: int) -> None:
    """Make a directory for another user alone, or check an existing one.

    Only this process's user may write to the directory around it.

    Raises:
        ConfigError: If it cannot be made or given (HP621), or is something else (HP622).
    """
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            cause = "it is not a directory, or a symbolic link to one"
            raise ConfigError("HP622", f"cannot use the runtime directory {path}", cause=cause, fix=f"ls -ld {path}")
        os.chmod(path, 0o700)
        os.chown(path, uid, gid)
    except OSError as error:
        raise ConfigError(
            "HP621",
            f"cannot make the runtime directory {path}",
            cause=os.strerror(error.errno or 0),
            fix="HOTPORT_RUNTIME_DIR=/a/directory/of/yours hotport serve",
            note="it belongs to the workers' user, and must lie on a file system that has owners",
        ) from error
