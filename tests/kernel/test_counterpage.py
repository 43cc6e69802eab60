"""Pages of counters: what a process has counted there is found however it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from hotport.kernel.counterpage import SECONDS_MAX, CounterPage, is_held, make_counter_page, read_counter_page
from hotport.wire.counters import ACCEPTED, CELLS, SECONDS


def in_child(path: str, *, then: str) -> int:
    """Count in a process of its own; return its pid while it waits, or once it was killed."""
    ready, says = os.pipe()
    if (pid := os.fork()) == 0:
        page = CounterPage(os.open(path, os.O_RDWR))
        page.cells[ACCEPTED.start] += 5
        page.seconds[SECONDS[0]] += 1.5
        os.write(says, b"x")
        if then == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
        os._exit(0)
    os.close(says)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return pid


def test_a_killed_process_has_lost_nothing_and_holds_its_page_no_more(tmp_path: Path) -> None:
    path = str(tmp_path / "page")
    os.close(make_counter_page(path))
    assert not is_held(path)
    pid = in_child(path, then="wait")
    try:
        assert is_held(path)
        found = read_counter_page(path)
        assert found is not None
        assert found[ACCEPTED.start] == 5
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not is_held(path)
    found = read_counter_page(path)
    assert found is not None
    assert (found[ACCEPTED.start], found[SECONDS[0]]) == (5, 1_500_000_000)
    with pytest.raises(FileExistsError):
        make_counter_page(path)


def test_a_page_has_one_process(tmp_path: Path) -> None:
    path = str(tmp_path / "page")
    os.close(make_counter_page(path))
    pid = in_child(path, then="wait")
    try:
        with pytest.raises(OSError, match=r"temporarily unavailable|Permission denied"):
            CounterPage(os.open(path, os.O_RDWR))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    page = CounterPage(os.open(path, os.O_RDWR))
    page.cells[ACCEPTED.start] += 1
    page.close()
    page.cells[ACCEPTED.start] += 1  # a late event
    page.close()
    found = read_counter_page(path)
    assert found is not None
    assert found[ACCEPTED.start] == 5 + 2


@pytest.mark.parametrize("size", [0, 7, 8, 100, 16384, 100_000])
def test_what_is_no_page_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "page"
    path.write_bytes(b"\xff" * size)
    assert read_counter_page(str(path)) is None
    assert not is_held(str(path))
    with pytest.raises(OSError, match="another version"):
        CounterPage(os.open(path, os.O_RDWR))


def test_other_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.symlink("/dev/zero", tmp_path / "link")
    for name in ("fifo", "link", ".", "missing"):
        assert read_counter_page(str(tmp_path / name)) is None
    assert not is_held(str(tmp_path / "missing"))


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 2 * SECONDS_MAX])
def test_garbage_in_a_page_is_no_time(tmp_path: Path, seconds: float) -> None:
    """A worker may belong to a user who is not trusted."""
    path = str(tmp_path / "page")
    page = CounterPage(make_counter_page(path))
    page.seconds[SECONDS[3]] = seconds
    page.close()
    os.truncate(path, 8 * (CELLS - 1))  # it may do that as well
    found = read_counter_page(path)
    assert found is not None
    assert found[SECONDS[3]] == 0
    assert len(found) == CELLS
