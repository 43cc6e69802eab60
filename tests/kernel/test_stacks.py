"""Stacks of a process that is blocked, as another one gets them."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.kernel.process import send_signal_to_main_thread
from hotport.kernel.stacks import HANDLER, STACK_IN_C, STACKS, STACKS_IN_C, StackPipe, open_stack_pipe, read_stack
from hotport.wire.stack import Stack
from tests.support import DEADLINE_S, eventually

#: A process with a pipe, a thread that waits, and a call that does not return.
BLOCKED = """
import ctypes, os, sys, threading, time
from hotport.kernel.stacks import StackPipe

def wait_in_thread():
    threading.Event().wait()

def hang():
    {body}

pipe = StackPipe()
threading.Thread(target=wait_in_thread, daemon=True).start()
sys.stdout.write("%d %d\\n" % pipe.identity)
sys.stdout.flush()
hang()
"""

#: Locks a mutex twice: in C code, where no handler of Python's is called.
MUTEX = "lock, mutex = ctypes.{library}(None).pthread_mutex_lock, bytes(64); lock(mutex); lock(mutex)"


@contextmanager
def blocked(body: str) -> Iterator[tuple[int, int, int]]:
    """Gives the pid and a pidfd of a process that is in there, and our descriptor of its pipe."""
    argv = [sys.executable, "-c", BLOCKED.format(body=body)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        fd, inode = map(int, process.stdout.readline().split())
        pipe, pidfd = open_stack_pipe(process.pid, (fd, inode)), os.pidfd_open(process.pid)
        try:
            yield process.pid, pidfd, pipe
            assert process.poll() is None
        finally:
            os.close(pipe)
            os.close(pidfd)
            process.kill()


def ask(pid: int, pidfd: int, pipe: int, number: int, hidden: str = "") -> Stack:
    """The stacks, once the process hangs."""
    found = Stack()

    def hangs() -> bool:
        nonlocal found
        assert send_signal_to_main_thread(pid, pidfd, number)
        told = b""
        while not told.rstrip().endswith(b"in <module>"):
            assert select.select([pipe], [], [], DEADLINE_S)[0]
            told += read_stack(pipe)
        found = Stack.parse(told, hidden=hidden)
        return found.threads[0][0].name == "hang"

    eventually(hangs, "it hangs")
    return found


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(900)",
        "while True: pass",
        "lock = threading.Lock(); lock.acquire(); lock.acquire()",
        "os.read(os.pipe()[0], 1)",
    ],
    ids=["sleep", "loop", "lock", "read"],
)
def test_process_that_runs_python_tells_the_stacks_of_all_threads(body: str) -> None:
    with blocked(body) as process:
        for _ in range(2):  # it is blocked as before
            _, *others = ask(*process, STACKS, HANDLER).threads
            assert "wait_in_thread" in {frame.name for thread in others for frame in thread}


def test_process_that_is_in_c_tells_the_stack_of_its_main_thread() -> None:
    with blocked(MUTEX.format(library="CDLL")) as process:
        (main,) = ask(*process, STACK_IN_C).threads
        assert main[1].name == "<module>"
        send_signal_to_main_thread(*process[:2], STACKS)  # there is nobody who could run the handler
        assert ask(*process, STACK_IN_C).threads == (main,)


def test_process_that_keeps_the_interpreters_lock_tells_all_stacks() -> None:
    with blocked(MUTEX.format(library="PyDLL")) as process:
        _, *others = ask(*process, STACKS_IN_C).threads
        assert "wait_in_thread" in {frame.name for thread in others for frame in thread}


def test_nothing_is_opened_but_a_pipe_of_the_processs_own_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker of another user could have a supervisor of root open a device, or read what root writes to a pipe."""
    read, write = os.pipe()
    file = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(FileNotFoundError, match="is not its pipe"):
            open_stack_pipe(os.getpid(), (file, os.fstat(file).st_ino))
        inode = os.fstat(read).st_ino
        os.close(open_stack_pipe(os.getpid(), (write, inode)))
        monkeypatch.setattr("hotport.kernel.procfs.user_of", lambda pid: os.getuid() + 1)
        with pytest.raises(FileNotFoundError, match="is not its pipe"):
            open_stack_pipe(os.getpid(), (read, inode))
    finally:
        for fd in (read, write, file):
            os.close(fd)


def test_pipe_of_a_process_is_not_taken_for_that_of_another() -> None:
    pipe = StackPipe()
    try:
        fd, inode = pipe.identity
        with pytest.raises(
            FileNotFoundError, match=f"descriptor {fd} of process {os.getpid()} is not its pipe for stacks"
        ):
            open_stack_pipe(os.getpid(), (fd, inode + 1))
        assert fd in pipe.descriptors()
    finally:
        pipe.close()
    assert set(pipe.descriptors()) == {-1}
    with pytest.raises(OSError, match=str(os.getpid())):
        open_stack_pipe(os.getpid(), (1 << 20, inode))


def test_pipe_that_nobody_reads_blocks_nothing() -> None:
    pipe = StackPipe()
    try:
        for _ in range(1000):
            os.kill(os.getpid(), STACKS)
        theirs = open_stack_pipe(os.getpid(), pipe.identity)
        told = read_stack(theirs)
        assert 4096 < len(told) <= 65536
        assert HANDLER in told.decode()
        while read_stack(theirs):
            pass
        os.close(theirs)
    finally:
        pipe.close()
