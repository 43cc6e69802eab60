"""The page in which workers see each other's load: slots, and what becomes of those of processes that end."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hotport.kernel.loadpage import SLOTS, LoadPage, make_load_page

OTHER = """
import sys
from hotport.kernel.loadpage import LoadPage
page = LoadPage(int(sys.argv[1]), 2)
page.gauge[0] = int(sys.argv[2])
page.join(int(sys.argv[3]))
print(flush=True)
sys.stdin.read()
if "closes" in sys.argv:
    page.close()
"""


@contextmanager
def other(fd: int, count: int, group: int, *how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with a slot: POSIX locks are a process's, so it takes one."""
    argv = [sys.executable, "-c", OTHER, str(fd), str(count), str(group), *how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[fd]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process
        process.communicate()


@pytest.fixture
def page_fd() -> Iterator[int]:
    """A page, of which each user has a duplicate."""
    fd = make_load_page()
    yield fd
    os.close(fd)


def test_workers_of_a_group_see_each_other(page_fd: int) -> None:
    with closing(LoadPage(os.dup(page_fd), 1)) as page, other(page_fd, 7, 3), other(page_fd, 9, 4):
        assert page.others() == []
        page.join(3)
        assert page.counts(page.others()) == [7]
        assert page.takes(page.others()[0])
        page.join(3, takes=False)
        assert not page.takes(page.slot)
        assert page.counts(page.others()) == [7]
        page.join(4)
        [other_slot] = page.others()
        assert page.counts([other_slot]) == [9]
        assert page.worker(other_slot) == 2
        assert page.due_s(other_slot) == 0
        page.promise(12.5)
        assert page.due_s(page.slot) == 12.5


@pytest.mark.parametrize("is_killed", [True, False])
def test_slot_of_a_process_that_has_ended_is_found_out_and_used_again(page_fd: int, is_killed: bool) -> None:
    with closing(LoadPage(os.dup(page_fd), 1)) as page:
        page.join(3)
        with other(page_fd, 7, 3) as process:
            if is_killed:
                process.kill()
        slots = page.others()
        assert page.counts(slots) == [7]  # it had no time to say that it ends
        page.forget_dead(slots)
        assert page.others() == []
        with other(page_fd, 8, 3):
            assert page.others() == slots
            page.forget_dead(slots)
            assert page.counts(page.others()) == [8]


def test_worker_that_closes_leaves_its_group(page_fd: int) -> None:
    with closing(LoadPage(os.dup(page_fd), 1)) as page:
        page.join(3)
        with other(page_fd, 7, 3, "closes"):
            assert len(page.others()) == 1
        assert page.others() == []
        page.close()
        assert page.fileno() == -1


def test_without_a_free_slot_there_is_no_page(page_fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.kernel.loadpage.SLOTS", 1)
    with other(page_fd, 7, 3), pytest.raises(BlockingIOError, match="no slot is free"):
        LoadPage(os.dup(page_fd), 1)
    assert SLOTS > 100


def test_no_process_can_take_a_part_of_the_page_away(page_fd: int) -> None:
    """A file that was truncated killed every worker at its next look, with SIGBUS."""
    with closing(LoadPage(os.dup(page_fd), 1)) as page:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.truncate(f"/proc/self/fd/{page_fd}", size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(page_fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        page.join(3)
        assert page.others() == []


def test_only_a_sealed_page_of_the_right_size_is_used(tmp_path: Path) -> None:
    with (tmp_path / "load").open("w+b") as file, closing(socket.socket()) as sock:
        file.truncate(1 << 20)
        unsealed = os.memfd_create("load", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        for fd in (os.dup(file.fileno()), os.dup(sock.fileno()), unsealed):
            with pytest.raises(OSError, match=r"Invalid argument|another version"):
                LoadPage(fd, 1)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.close(fd)


def test_kernel_that_does_not_know_files_that_cannot_be_executed_makes_one_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = os.memfd_create

    def old(name: str, flags: int) -> int:
        if flags & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return make(name, flags)

    monkeypatch.setattr(os, "memfd_create", old)
    with closing(LoadPage(make_load_page(), 1)) as page:
        assert page.slot == 0


@pytest.mark.parametrize("step", ["memfd_create", "posix_fallocate"])
def test_page_that_cannot_be_made_leaves_nothing(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        make_load_page()
