"""The page in which workers see each other's load: slots, and what becomes of those of processes that end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from hotport.kernel.loadpage import SLOTS, LoadPage

OTHER = """
import sys
from hotport.kernel.loadpage import LoadPage
page = LoadPage(sys.argv[1], 2)
page.gauge[0] = int(sys.argv[2])
page.join(int(sys.argv[3]))
print(flush=True)
sys.stdin.read()
if "closes" in sys.argv:
    page.close()
"""


@contextmanager
def other(path: Path, count: int, group: int, *how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Another process with a slot: POSIX locks are a process's, so it takes one."""
    argv = [sys.executable, "-c", OTHER, str(path), str(count), str(group), *how]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process
        process.communicate()


def test_workers_of_a_group_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "load"
    with closing(LoadPage(str(path), 1)) as page, other(path, 7, 3), other(path, 9, 4):
        assert page.others() != []  # none of them accepts yet, nor does this one
        page.join(3)
        assert page.counts(page.others()) == [7]
        page.join(4)
        [other_slot] = page.others()
        assert page.counts([other_slot]) == [9]
        assert page.worker(other_slot) == 2
        assert page.due_s(other_slot) == 0
        page.promise(12.5)
        assert page.due_s(page.slot) == 12.5


@pytest.mark.parametrize("is_killed", [True, False])
def test_slot_of_a_process_that_has_ended_is_found_out_and_used_again(tmp_path: Path, is_killed: bool) -> None:
    path = tmp_path / "load"
    with closing(LoadPage(str(path), 1)) as page:
        page.join(3)
        with other(path, 7, 3) as process:
            if is_killed:
                process.kill()
        slots = page.others()
        assert page.counts(slots) == [7]  # it had no time to say that it ends
        page.forget_dead(slots)
        assert page.others() == []
        with other(path, 8, 3):
            assert page.others() == slots
            page.forget_dead(slots)
            assert page.counts(page.others()) == [8]


def test_worker_that_closes_leaves_its_group_and_the_last_one_the_directory(tmp_path: Path) -> None:
    path = tmp_path / "load"
    page = LoadPage(str(path), 1)
    page.join(3)
    with other(path, 7, 3, "closes"):
        assert len(page.others()) == 1
    assert page.others() == []
    assert path.exists()
    page.close()
    page.close()
    assert list(tmp_path.iterdir()) == []


def test_without_a_free_slot_there_is_no_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hotport.kernel.loadpage.SLOTS", 1)
    path = tmp_path / "load"
    with other(path, 7, 3), pytest.raises(BlockingIOError, match="no slot is free"):
        LoadPage(str(path), 1)
    assert SLOTS > 100


def test_a_link_in_place_of_the_page_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "load").symlink_to("victim")
    with pytest.raises(OSError, match="symbolic links"):
        LoadPage(str(tmp_path / "load"), 1)
    assert (tmp_path / "victim").read_bytes() == b"precious"
