"""Files and directories that say whose a service is."""

from __future__ import annotations

import fcntl
import os
import stat

from hotport.errors import ConfigError, KernelError

__all__ = ["lock_file", "private_directory"]


def lock_file(path: str) -> int | None:
    """Take a lock that the kernel gives back when this process ends, however it ends.

    The file stays when the lock goes: whoever unlinks it invites a second owner.

    Returns:
        The descriptor that holds the lock (close-on-exec; close it to let go); None if another holds it.

    Raises:
        KernelError: If the file cannot be opened (HP620).

    Sources: flock(2): the lock belongs to the open file description, not to the process id.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise KernelError(
            "HP620",
            f"cannot open the lock {path}",
            errno=error.errno or 0,
            cause="it is somebody else's, a symbolic link, or its directory cannot be written to",
            fix=f"ls -ld {os.path.dirname(path) or '.'} {path}",
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def private_directory(path: str) -> None:
    """Make a directory that only we may enter, or make sure that an existing one is such.

    Its parent must exist. What is found is refused rather than repaired: somebody else may have put it there.

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
    elif mode & 0o077:
        cause, fix = f"others may enter it (mode {mode:04o})", f"chmod 700 {path}"
    else:
        return
    raise ConfigError("HP622", f"cannot use the runtime directory {path}", cause=cause, fix=fix)
