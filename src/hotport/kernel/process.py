"""Signal, reap and inspect processes: one system call each; a process that is gone raises nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Final

from hotport.kernel import procfs

__all__ = [
    "MALLOC_ENVIRONMENT",
    "adopt_orphans",
    "adopts_orphans",
    "cpu_s",
    "describe_exit",
    "descriptors_left",
    "discard",
    "duplicate_descriptor",
    "ends_with_terminal",
    "forbid_core_files",
    "has_terminal",
    "holding",
    "is_stopped",
    "kill_group",
    "load_prctl",
    "may_raise_priority",
    "numbers",
    "open_descriptors",
    "raise_descriptor_limit",
    "reap",
    "reap_orphans",
    "rename_last_argument",
    "rss_bytes",
    "run_delay_s",
    "send_signal",
    "send_signal_to_main_thread",
    "set_niceness",
    "working_directory",
]

_GETFD: Final = 438  # pidfd_getfd, the same number on every architecture
_PR_SET_CHILD_SUBREAPER: Final = 36
_CAP_SYS_NICE: Final = 23
_RLIMIT_NICE: Final = 13  # `resource` has no name for it
_is_subreaper = False
_STAT_ARG_END: Final = 46  # of /proc/PID/stat, counted after the name


def send_signal(pidfd: int, signum: int) -> bool:
    """Signal exactly the process that `pidfd` stands for, never one that got its pid later.

    Returns:
        False if it has been waited for already. A zombie still takes signals, and ignores them.

    Sources: pidfd_send_signal(2).
    """
    try:
        signal.pidfd_send_signal(pidfd, signum)
    except ProcessLookupError:
        return False
    return True


def send_signal_to_main_thread(pid: int, pidfd: int, signum: int) -> bool:
    """Signal the main thread of a process: one to the process may be handled by any thread of it.

    Args:
        pid: Of the process that `pidfd` stands for.

    Returns:
        False if it has been waited for already.

    Sources: tgkill(2); musl, which has no such function, signals the process.
    """
    import ctypes  # not on every start: this is needed for workers that hang

    tgkill = getattr(ctypes.CDLL(None, use_errno=True), "tgkill", None)
    if tgkill is None or not send_signal(pidfd, 0):
        return send_signal(pidfd, signum)
    if tgkill(pid, pid, signum) != 0 and (number := ctypes.get_errno()) != errno.ESRCH:
        raise OSError(number, os.strerror(number))
    return True


def descriptors_left() -> int:
    """Estimate how many more descriptors this process may open, by its lowest free one; 0 if none.

    Sources: open(2): the lowest number that is free is taken; getrlimit(2) RLIMIT_NOFILE.
    """
    try:
        lowest = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # EMFILE, ENFILE
        return 0
    os.close(lowest)
    return max(0, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - lowest)


def numbers(names: Collection[str]) -> frozenset[signal.Signals]:
    """Return signals by their names."""
    return frozenset(signal.Signals[name] for name in names)


@contextmanager
def holding(signals: Collection[int]) -> Iterator[None]:
    """Block these signals inside the block; they may be unblocked before its end.

    Sources: pthread_sigmask(3); execve(2): the mask survives it, handlers do not.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def discard(signals: Collection[int]) -> None:
    """Discard pending instances of these signals; handlers stay unchanged.

    Sources: POSIX.1-2017, 2.4.3: setting the action to SIG_IGN discards a pending signal, blocked or not.
    """
    for number in signals:
        handler = signal.signal(number, signal.SIG_IGN)
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used, all its threads together; 0 if it is gone.

    Sources: clock_getcpuclockid(3); the number is made as glibc's sysdeps/unix/sysv/linux/clock_getcpuclockid.c does.
    """
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def may_raise_priority() -> bool:
    """Whether this process may restore a priority that it has lowered: CAP_SYS_NICE, or RLIMIT_NICE.

    Sources: setpriority(2); getrlimit(2) RLIMIT_NICE; proc_pid_status(5) CapEff.
    """
    with suppress(OSError, StopIteration, ValueError), open("/proc/self/status") as file:
        capabilities = int(next(line for line in file if line.startswith("CapEff:")).split()[1], 16)
        if capabilities >> _CAP_SYS_NICE & 1:
            return True
    return resource.getrlimit(_RLIMIT_NICE)[0] >= 20 - os.getpriority(os.PRIO_PROCESS, 0)


def set_niceness(pgid: int, more: int) -> None:
    """Give all threads of a process group our own niceness, and so much more; nothing if it is empty, or not permitted.

    Sources: setpriority(2) PRIO_PGRP.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PGRP, pgid, min(19, os.getpriority(os.PRIO_PROCESS, 0) + more))


def kill_group(pgid: int, signum: int = signal.SIGKILL) -> None:
    """Send a signal to every process of a group; does nothing if the group is empty.

    Sources: kill(2); killpg(3).
    """
    assert pgid > 1, "0 is our own group, and 1 is everybody"
    with suppress(ProcessLookupError, PermissionError):  # EPERM: only others' processes are left in it
        os.killpg(pgid, signum)


def has_terminal() -> bool:
    """Whether this process's session has a controlling terminal; when that hangs up, it has none any more.

    Sources: tty(4), /dev/tty: ENXIO without one. The kernel takes it away before SIGHUP is sent: __tty_hangup in
    drivers/tty/tty_io.c.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


def working_directory(environ: Mapping[str, str]) -> str:
    """The working directory *as it was named*, with its symbolic links: what ``PWD`` says, if that is it.

    So a release that is switched by a link is found anew. Of one that was removed there is only the name.
    """
    named = environ.get("PWD", "")
    try:
        directory = os.getcwd()
    except FileNotFoundError:
        return named or "/"
    is_it = os.path.isabs(named) and os.path.isdir(named) and os.path.samefile(named, directory)
    return named if is_it else directory


def duplicate_descriptor(pidfd: int, fd: int) -> int:
    """Duplicate a descriptor of another process into this one; close-on-exec, owned by the caller.

    Raises:
        OSError: EPERM: we may not trace that process. EBADF: it has no such descriptor. ESRCH: it is gone.

    Sources: pidfd_getfd(2), Linux 5.6; PTRACE_MODE_ATTACH_REALCREDS in ptrace(2) says who may.
    """
    import ctypes  # 10 ms, and seldom needed

    duplicate = ctypes.CDLL(None, use_errno=True).syscall(_GETFD, pidfd, fd, 0)
    if duplicate < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(duplicate)


def ends_with_terminal() -> bool:
    """Whether this process should end with its terminal; ask before SIGHUP is handled.

    Who ignores SIGHUP was started by nohup(1), and who has no terminal by setsid(1) or a service manager.
    """
    return has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def reap(pid: int) -> int | None:
    """Collect a child that has ended; never blocks.

    Returns:
        Its exit status, or minus the signal that killed it (as `describe_exit` takes it); None while it runs,
        and for a process that is not, or no longer, our child: then there is nothing to learn.

    Sources: waitpid(2) WNOHANG.
    """
    try:
        done, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return None
    return os.waitstatus_to_exitcode(status) if done else None


def load_prctl() -> Callable[..., int]:
    """Return prctl(2), which sets the errno of ctypes; load it before a fork, since a child must not import."""
    import ctypes  # 10 ms, and few processes need it

    prctl: Callable[..., int] = ctypes.CDLL(None, use_errno=True).prctl
    return prctl


def adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends, as pid 1 of a container is; survives exec.

    Raises:
        OSError: The kernel refuses.

    Sources: PR_SET_CHILD_SUBREAPER(2const), since Linux 3.4.
    """
    import ctypes

    global _is_subreaper
    if load_prctl()(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    _is_subreaper = True


def adopts_orphans() -> bool:
    """Whether this process is the parent of descendants whose parent has ended."""
    return _is_subreaper or os.getpid() == 1


def rename_last_argument(text: str) -> None:
    """Change what ps(1) shows as this process's last argument, within the room that it has; no error if that fails.

    Sources: proc_pid_stat(5) arg_end; proc_pid_cmdline(5); proc_pid_mem(5).
    """
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/cmdline", "rb") as file:
            room = len(file.read().split(b"\0")[-2])
        with open("/proc/self/stat") as file:
            end = int(file.read().rpartition(")")[2].split()[_STAT_ARG_END])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(end - 1 - room)
            memory.write(os.fsencode(text)[:room].ljust(room))


def reap_orphans(known: Collection[int]) -> list[tuple[int, int]]:
    """Reap orphans: a process that adopts them has children it did not start.

    A child in `known` is left to its owner, and hides no orphan behind it. Call it when SIGCHLD arrives.

    Returns:
        The pids that were collected, with their exit status or minus their signal.

    Sources: waitid(2) WNOWAIT; proc_pid_stat(5).
    """
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return []  # the usual answer, before /proc is read
    except ChildProcessError:
        return []
    orphans = [pid for pid in procfs.zombies(os.getpid()) if pid not in known]
    return [(pid, status) for pid in orphans if (status := reap(pid)) is not None]


def describe_exit(status: int | None) -> str:
    """``exited 3`` or ``killed by SIGKILL``, from what `reap` returned."""
    if status is None:
        return "exited, status unknown"
    if status >= 0:
        return f"exited {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # a real-time signal
        name = f"signal {-status}"
    return f"killed by {name}"


def rss_bytes(pid: int) -> int:
    """Resident memory of a process in bytes; 0 when it is gone or a zombie, or nothing more can be opened.

    Sources: proc_pid_statm(5), second field, in pages.
    """
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def run_delay_s(pid: int | None = None) -> float:
    """How long a process's main thread has waited for a processor in all, in seconds; 0 where the kernel is silent.

    Args:
        pid: None for this process.

    Sources: Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat, second field, in nanoseconds.
    """
    try:
        with open(f"/proc/{'self' if pid is None else pid}/schedstat", "rb") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):  # without CONFIG_SCHED_INFO
        return 0.0


#: Environment of processes that shall return large blocks to the system as soon as these are freed. By default, glibc
#: takes blocks of up to 32 MiB from its heap once the first such block was freed, and one small block behind them keeps
#: them there; growing one copies it. Below the first threshold the heap serves as before.
#:
#: Sources: mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD; other C libraries ignore them.
MALLOC_ENVIRONMENT: Final[Mapping[str, str]] = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(2 << 20),
}


def trim_memory() -> None:
    """Return freed memory from the allocator to the system, where the C library can.

    Sources: malloc_trim(3), of glibc alone.
    """
    import ctypes  # not on every start: this is needed when memory is short

    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP, SIGTSTP) or a debugger has stopped a process.

    Sources: proc_pid_stat(5), states T and t.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b") ")[2][:1] in (b"T", b"t")
    except OSError:
        return False


def open_descriptors() -> tuple[int, ...]:
    """Every descriptor that is open in this process, in order.

    Sources: proc_pid_fd(5).
    """
    return tuple(sorted(filter(_is_open, map(int, os.listdir("/proc/self/fd")))))


def _is_open(fd: int) -> bool:
    """Whether a descriptor is open; false for the one that listed the directory."""
    try:
        fcntl.fcntl(fd, fcntl.F_GETFD)
    except OSError:
        return False
    return True


def raise_descriptor_limit() -> int:
    """Raise the soft limit of descriptors to the hard limit, for this process and its children.

    Returns:
        The limit now: the soft limit, made equal to the hard one.

    Sources: getrlimit(2) RLIMIT_NOFILE.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def forbid_core_files() -> None:
    """Leave no memory of this process, or of its children, in a core file.

    Sources: getrlimit(2) RLIMIT_CORE; core(5): a program that takes cores over a pipe gets them whatever the limit is,
    except at 1, which the kernel reserves to stop that (fs/coredump.c), and which is less than the least file.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (min(1, hard) if hard != resource.RLIM_INFINITY else 1, hard))
