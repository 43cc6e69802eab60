from __future__ import annotations

import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path

import msgspec
import pytest

from hotport.kernel import process
from hotport.kernel.process import (
    describe_exit,
    is_stopped,
    kill_group,
    open_descriptors,
    raise_descriptor_limit,
    reap,
    reap_orphans,
    rss_bytes,
    send_signal,
    working_directory,
)
from hotport.kernel.spawn import Child, spawn


def start(*argv: str) -> Child:
    return spawn(argv, environment=dict(os.environ), cwd="/")


def ended(child: Child) -> Child:
    select.select([child.pidfd], [], [])
    os.close(child.pidfd)
    return child


def test_child_is_signalled_until_it_has_been_reaped() -> None:
    child = start("sleep", "1000")
    assert reap(child.pid) is None
    assert send_signal(child.pidfd, signal.SIGTERM)
    select.select([child.pidfd], [], [])
    assert reap(child.pid) == -signal.SIGTERM
    assert not send_signal(child.pidfd, signal.SIGTERM)
    os.close(child.pidfd)


def test_process_that_is_not_our_child_has_no_status_to_learn() -> None:
    assert reap(os.getpid()) is None


def test_group_is_killed_with_everything_in_it() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", "sleep 1000 & sleep 1000 & echo started; wait"],
        os.environ,
        setpgroup=0,
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)],
    )
    os.close(writer)
    assert os.read(reader, 100) == b"started\n"
    kill_group(pid)
    assert os.read(reader, 100) == b""  # all three have closed it
    os.close(reader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    kill_group(pid)  # gone: nothing happens


@pytest.mark.parametrize("pgid", [-1, 0, 1])
def test_our_own_group_and_everybody_are_never_killed(pgid: int) -> None:
    with pytest.raises(AssertionError):
        kill_group(pgid)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited 0"),
        (3, "exited 3"),
        (-9, "killed by SIGKILL"),
        (-signal.SIGRTMIN - 2, f"killed by signal {signal.SIGRTMIN + 2}"),
        (None, "exited, status unknown"),
    ],
)
def test_exit_is_described(status: int | None, words: str) -> None:
    assert describe_exit(status) == words


def test_orphans_are_reaped_and_known_children_left_to_their_owner() -> None:
    """A known child that has ended must not hide the orphans that ended after it."""
    known, running = ended(start("sh", "-c", "exit 1")), start("sleep", "1000")
    orphans = [ended(start("sh", "-c", f"exit {code}")) for code in (2, 3)]
    assert sorted(reap_orphans({known.pid, running.pid})) == sorted(
        (orphan.pid, code) for orphan, code in zip(orphans, (2, 3), strict=True)
    )
    assert reap_orphans({known.pid, running.pid}) == []
    assert reap(known.pid) == 1
    send_signal(running.pidfd, signal.SIGKILL)
    ended(running)
    assert reap_orphans(()) == [(running.pid, -signal.SIGKILL)]


def test_no_children_means_no_orphans() -> None:
    assert reap_orphans(()) == []


def test_running_children_are_no_orphans() -> None:
    child = start("sleep", "1000")
    assert reap_orphans(()) == []
    send_signal(child.pidfd, signal.SIGKILL)
    assert reap(ended(child).pid) == -signal.SIGKILL


def test_process_that_a_signal_has_stopped_is_told_from_one_that_runs() -> None:
    child = start("sleep", "1000")
    assert not is_stopped(child.pid)
    send_signal(child.pidfd, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(child.pid)
    send_signal(child.pidfd, signal.SIGKILL)
    ended(child)
    assert not is_stopped(child.pid)
    assert reap(child.pid) == -signal.SIGKILL
    assert not is_stopped(child.pid)


def test_memory_is_read_and_is_nothing_for_the_dead() -> None:
    assert 1 << 20 < rss_bytes(os.getpid()) < 1 << 40
    child = ended(start("true"))
    assert rss_bytes(child.pid) == 0  # a zombie
    assert reap(child.pid) == 0
    assert rss_bytes(child.pid) == 0


def test_open_descriptors_are_exactly_those_that_are_open() -> None:
    before = open_descriptors()
    with socket.socket() as sock:
        assert set(open_descriptors()) == {*before, sock.fileno()}
    assert open_descriptors() == before == tuple(sorted(before))


def test_descriptor_limit_is_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        assert raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_kernel_package_imports_no_event_loop_and_no_command_line() -> None:
    # -S, so that nothing but the script imports; the environment and the packages of this test run do.
    script = (
        f"import sys; sys.path.insert(0, {str(Path(process.__file__).parents[2])!r});"
        f"sys.path.append({str(Path(msgspec.__file__).parents[1])!r});"
        "import hotport.kernel.spawn, hotport.kernel.sockets, hotport.kernel.notify, hotport.kernel.fds;"
        "sys.exit(bool({'asyncio', 'anyio', 'click', 'rich', 'tomllib'} & set(sys.modules)))"
    )
    child = start(sys.executable, "-I", "-S", "-c", script)
    assert reap(ended(child).pid) == 0


def test_working_directory_is_called_as_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, link = tmp_path / "1", tmp_path / "current"
    release.mkdir()
    link.symlink_to(release)
    monkeypatch.chdir(release)
    assert working_directory({"PWD": str(link)}) == str(link)
    for wrong in ({}, {"PWD": str(tmp_path)}, {"PWD": str(tmp_path / "gone")}, {"PWD": "."}):
        assert working_directory(wrong) == str(release)
    release.rmdir()
    assert working_directory({"PWD": str(link)}) == str(link)
    assert working_directory({}) == "/"


def test_time_without_a_processor_only_grows() -> None:
    before = process.run_delay_s()
    assert 0 <= before <= process.run_delay_s()
