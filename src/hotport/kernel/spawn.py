"""Start a program that inherits listeners: fork, then exec, with a clean environment."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import re
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NoReturn

from hotport.errors import KernelError
from hotport.kernel.process import load_prctl, open_descriptors
from hotport.kernel.users import Identity, assume
from hotport.wire.listenfds import FIRST_FD, LISTEN_VARIABLES, listen_environment

__all__ = ["Child", "spawn"]

NO_STREAMS: Final[Mapping[int, int]] = MappingProxyType({})

_PR_SET_PDEATHSIG: Final = 1
_REPORT_BYTES_MAX = 4096
_ORPHAN = re.compile(rb"\0(\d+)\0")


@dataclass(frozen=True, slots=True)
class Child:
    """A process that was started here and has not been waited for.

    Attributes:
        pid: Its process id, and the id of the process group that it leads unless it is a successor.
        pidfd: Readable when it has ended; close-on-exec; the caller closes it.
    """

    pid: int
    pidfd: int


def spawn(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    cwd: str,
    listeners: Sequence[int] = (),
    listen_names: Sequence[str] = (),
    is_successor: bool = False,
    ignored: Collection[int] = (),
    held: Collection[int] = (),
    is_orphan: bool = False,
    identity: Identity | None = None,
    streams: Mapping[int, int] = NO_STREAMS,
    ends_with_us: bool = False,
) -> Child:
    """Start a program and return when it has been exec'ed.

    The program gets exactly stdin (``/dev/null``), our stdout and stderr (``/dev/null`` if we have none), and
    the listeners from descriptor 3 up; a process group of its own, no blocked signal but `held`, and none ignored
    but `ignored`; and `environment` plus the LISTEN variables, with the right ``LISTEN_PID``. Blocks for the time of
    fork and exec: a few milliseconds, more in a process with much memory.

    A signal that kills the child before its exec is no failure here: its pidfd is readable, and its status
    says so. The child runs between fork and exec only what is below: no event loop, no exit handlers. Python
    3.12 and later warn about fork when other threads run; here they do no harm: the child takes no lock of
    theirs.

    Args:
        argv: The program and its arguments. A name without a slash is searched for on the ``PATH`` of
            `environment`; a relative path starts from `cwd`.
        environment: All of it; nothing of ours is added. LISTEN variables that it has are replaced.
        cwd: Where the program starts.
        listeners: Descriptors to pass, in order; they stay open here, and may be any, in any order.
        listen_names: A name for each of them, see `hotport.wire.listenfds.listen_environment`.
        is_successor: It is to take our place: it gets our stdin as well, stays in our process group, so that Ctrl-C
            and whoever signals the group means it, too.
        ignored: Signals that it ignores from the beginning, as after nohup(1).
        held: Signals that wait until it unblocks them: it handles them, and is not there yet.
        is_orphan: It is a child of init (or of the nearest subreaper) from the beginning: systemd ends a main process
            that is not its own child with SIGKILL. How it ends is not known here.
        identity: As whom it runs; None as ourselves. It is that user before it enters `cwd` and is exec'ed.
        streams: Descriptors for stdin (0), stdout (1) and stderr (2), in place of the usual ones; they stay open here.
        ends_with_us: It gets SIGKILL when this process ends, however that ends; not what it starts itself.

    Raises:
        KernelError: If there is no process or descriptor left for it (HP210), a listener cannot be passed
            (HP211), the program cannot be executed (HP550), `cwd` cannot be entered (HP551) or it may not run as
            that user (HP552); nothing is left then.
        ConfigError: If a name cannot be passed (HP321); nothing was started.

    Descriptors: one created, ``Child.pidfd``.
    Signals: if SIGCHLD is ignored (that survives exec, so our own parent may have chosen it), it is set to
        its default: otherwise the kernel throws exit statuses away. Call from the main thread.
    Sources: fork(2), execve(2) on what survives; signal(7); sd_listen_fds(3); wait(2), NOTES, on an ignored
        SIGCHLD; pidfd_open(2); prctl(2) PR_SET_PDEATHSIG, which means the end of the thread that has forked.
    """
    assert argv, "nothing to execute"
    assert len(listeners) == len(listen_names), "every listener has a name"
    assert is_successor or not is_orphan, "others end with us"
    pristine = {key: value for key, value in environment.items() if key not in LISTEN_VARIABLES}
    pristine.update(listen_environment(listen_names, 0))  # the child knows its pid and corrects it
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    prctl = load_prctl() if ends_with_us else None

    parent = os.getpid()
    pid = pidfd = -1
    try:
        heard, report = os.pipe()  # close-on-exec: end of file is how a successful exec shows
        try:
            blocked = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
            try:
                pid = os.fork()
                if pid == 0:
                    _become(
                        argv, pristine, cwd, listeners, report, parent, is_successor, ignored, held, is_orphan,
                        identity, streams, prctl,
                    )  # fmt: skip
                pidfd = os.pidfd_open(pid)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(report)
            report = -1
            failure = _read_all(heard)
            if is_orphan:
                _discard(pid, pidfd)  # the one in between
                pid = pidfd = -1
                failure, orphan = _without_orphan(failure)
                if not failure:
                    pidfd = os.pidfd_open(orphan)
                    pid = orphan
        finally:
            os.close(heard)
            if report >= 0:
                os.close(report)
    except BaseException as error:
        _discard(pid, pidfd)
        if isinstance(error, OSError):
            raise _no_room(argv, error) from error
        raise
    if failure:
        _discard(pid, pidfd)
        raise _not_started(failure, argv, pristine, cwd)
    return Child(pid, pidfd)


def _become(
    argv: Sequence[str],
    environment: dict[str, str],
    cwd: str,
    listeners: Sequence[int],
    report: int,
    parent: int,
    is_successor: bool,
    ignored: Collection[int],
    held: Collection[int],
    is_orphan: bool,
    identity: Identity | None,
    streams: Mapping[int, int],
    prctl: Callable[..., int] | None,
) -> NoReturn:
    """Run in the child from fork to exec; all signals are blocked at its start."""
    step = "prepare"
    try:
        gc.disable()  # a finaliser of ours must not run here
        if is_orphan and (orphan := os.fork()):
            os.write(report, b"\0%d\0" % orphan)
            os._exit(0)
        signal.set_wakeup_fd(-1)
        for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            # One that we ignore would stay ignored through exec.
            signal.signal(signum, signal.SIG_IGN if signum in ignored else signal.SIG_DFL)
        if not is_successor:
            os.setpgid(0, 0)

        step = "pass"
        # Sources may lie where targets or streams go, and so may the pipe: first move all above them.
        above = FIRST_FD + len(listeners)
        report = fcntl.fcntl(report, fcntl.F_DUPFD_CLOEXEC, above)
        moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in listeners]
        given = {stream: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for stream, fd in streams.items()}
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(FIRST_FD):
            # If we have no stdout, the first file that the program opens would become its stdout.
            if stream in given:
                os.dup2(given[stream], stream)
            elif (stream == 0 and not is_successor) or not _is_inherited(stream):
                os.dup2(null, stream)
                os.set_inheritable(stream, True)  # dup2 does nothing if `null` itself came to lie there
        for target, fd in enumerate(moved, FIRST_FD):
            os.dup2(fd, target)
        # Ours are close-on-exec, but what we were started with may not be: a leaked listener holds its port.
        with suppress(FileNotFoundError):  # /proc may not be mounted
            for fd in open_descriptors():
                if fd >= above and fd != report:
                    os.close(fd)

        if identity is not None:
            step = "assume"
            assume(identity)

        step = "enter"
        os.chdir(cwd)

        step = "execute"
        if listeners:
            environment["LISTEN_PID"] = str(os.getpid())
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent and not is_successor:  # which would be the last one that has the listeners
            os._exit(127)  # it was killed: the next supervisor could not know of us, and does not miss us
        os.execvpe(argv[0], list(argv), environment)
    except BaseException as error:
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EINVAL
        os.write(report, f"{step} {number} {error}".encode(errors="replace")[:_REPORT_BYTES_MAX])
    finally:
        os._exit(127)


def _without_orphan(report: bytes) -> tuple[bytes, int]:
    """Separate the failure from the pid of the child's child."""
    found = _ORPHAN.search(report)
    if found is None:
        if not report:
            raise OSError(errno.ECHILD, os.strerror(errno.ECHILD))  # killed between two forks
        return report, 0
    return report.replace(found[0], b""), int(found[1])


def _is_inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:  # closed
        return False


def _read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, _REPORT_BYTES_MAX):
        parts.append(part)
    return b"".join(parts)


def _discard(pid: int, pidfd: int) -> None:
    """Kill and reap a child that did not exec, and close what belongs to it."""
    if pid <= 0:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # not waited for yet, so the pid is still its own
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)
    if pidfd >= 0:
        os.close(pidfd)


def _no_room(argv: Sequence[str], error: OSError) -> KernelError:
    causes = {
        errno.EMFILE: "this process has no descriptor left (RLIMIT_NOFILE)",
        errno.ENFILE: "the machine has no descriptor left (fs.file-max)",
        errno.EAGAIN: "the user or the cgroup has no process left (RLIMIT_NPROC, pids.max)",
        errno.ENOMEM: "the machine or the cgroup has no memory left",
    }
    number = error.errno or 0
    return KernelError(
        "HP210",
        f"cannot start {argv[0]}",
        errno=number,
        cause=causes.get(number, "fork, pipe or pidfd_open was refused"),
        fix="ulimit -a",
        note="raise the limit (systemctl show -p TasksMax shows that of a unit), or run fewer workers",
    )


def _not_started(failure: bytes, argv: Sequence[str], environment: Mapping[str, str], cwd: str) -> KernelError:
    """Make the error for a child's report: the step it reached, an errno, and the exception's text."""
    step, number_text, words = failure.decode(errors="replace").split(" ", 2)
    number, program = int(number_text), argv[0]
    if step == "enter":
        return KernelError(
            "HP551",
            f"cannot start {program} in {cwd}",
            errno=number,
            cause="that directory cannot be entered",
            fix=f"ls -ld {cwd}",
        )
    if step == "assume":
        return KernelError(
            "HP552",
            f"cannot start {program} as another user",
            errno=number,
            cause="this process may not change its user or groups",
            fix="grep Cap /proc/self/status",
            note="run the service as root, or as that user and without the option user",
        )
    if step != "execute":
        return KernelError(
            "HP211",
            f"cannot pass listeners to {program}",
            errno=number,
            cause=f"the new process could not take them: {words}",
            fix="ulimit -n",
        )
    path, note = os.path.join(cwd, program), ""
    if "/" not in program and number == errno.ENOENT:
        cause = f"it is in no directory of PATH={environment.get('PATH', os.defpath)}"
        fix, note = f"command -v {program}", "install it, or give its path"
    elif number == errno.ENOENT and os.path.exists(path):
        cause = "it exists, but the interpreter that its first line names does not"
        fix = f"head -1 {path}"
    elif number == errno.ENOENT:
        cause, fix = f"there is no file {path}", f"ls -l {os.path.dirname(path)}"
    elif number == errno.EACCES:
        cause, fix = "it is not executable, or is a directory, or may not be reached", f"chmod +x {path}"
    elif number == errno.ENOEXEC:
        cause, fix = "it is no program for this machine, or a script without a #! line", f"file {path}"
    else:
        cause, fix = words, f"ls -l {path}"
    return KernelError("HP550", f"cannot execute {program}", errno=number, cause=cause, fix=fix, note=note)
