from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from hotport.errors import ConfigError, ExitCode, KernelError
from hotport.kernel.fds import give_directory, is_at, let_through, lock_directory, memory_file, private_directory

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives a directory away")


def test_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path)
    first = lock_directory(path)
    assert first is not None
    assert not os.get_inheritable(first)
    assert lock_directory(path) is None
    os.close(first)
    second = lock_directory(path)
    assert second is not None
    os.close(second)


def test_lock_is_given_back_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = str(tmp_path)
    pid = os.fork()
    if pid == 0:
        held = lock_directory(path)
        os.kill(os.getpid(), signal.SIGTERM if held is None else signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # a zombie holds nothing
    fd = lock_directory(path)
    assert fd is not None
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_nothing_in_a_directory_can_be_removed_to_get_its_lock(tmp_path: Path) -> None:
    """``rm lock`` let a second supervisor in, and the two fought."""
    fd = lock_directory(str(tmp_path))
    assert fd is not None
    assert list(tmp_path.iterdir()) == []
    assert lock_directory(str(tmp_path)) is None
    os.close(fd)


def test_lock_is_of_the_directory_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run"
    path.mkdir()

    def replaced(fd: int, how: int) -> None:
        monkeypatch.undo()
        path.rename(tmp_path / "before")
        path.mkdir()

    monkeypatch.setattr("fcntl.flock", replaced)
    fd = lock_directory(str(path))
    assert fd is not None
    assert is_at(fd, str(path))
    assert not is_at(fd, str(tmp_path / "before"))
    assert not is_at(fd, str(tmp_path / "nothing"))
    os.close(fd)


@pytest.mark.parametrize("make", ["link", "nothing"])
def test_lock_does_not_follow_a_link(tmp_path: Path, make: str) -> None:
    if make == "link":
        (tmp_path / "run").symlink_to(tmp_path)
    with pytest.raises(KernelError, match="HP620"):
        lock_directory(str(tmp_path / "run"))


def test_directory_is_made_for_us_alone_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    umask = os.umask(0)
    try:
        private_directory(str(path))
    finally:
        os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    (path / "control.sock").touch()
    private_directory(str(path))
    assert (path / "control.sock").exists()


def test_directory_without_a_parent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HP621") as raised:
        private_directory(str(tmp_path / "missing" / "run"))
    assert raised.value.exit_code == ExitCode.USAGE
    assert "HOTPORT_RUNTIME_DIR=" in raised.value.fix


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o777, 0o1777])
def test_directory_that_others_may_enter_is_refused_and_left_as_it_is(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(ConfigError, match="HP622") as raised:
        private_directory(str(path))
    assert raised.value.fix == f"chmod 700 {path}"
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("make", ["link", "dangling link", "file"])
def test_path_that_is_no_directory_is_refused(tmp_path: Path, make: str) -> None:
    path = tmp_path / "run"
    if make == "file":
        path.touch(0o600)
    else:
        path.symlink_to(tmp_path if make == "link" else tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"HP622(.|\n)*not a directory"):
        private_directory(str(path))


@needs_root
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir(0o700)
    os.chown(path, 65534, 65534)
    with pytest.raises(ConfigError, match=r"HP622(.|\n)*belongs to uid 65534"):
        private_directory(str(path))


def test_others_pass_through_a_directory_of_ours_and_do_no_more(tmp_path: Path) -> None:
    path = tmp_path / "run"
    private_directory(str(path))
    let_through(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o711
    private_directory(str(path))
    path.chmod(0o755)
    with pytest.raises(ConfigError, match="HP622"):
        let_through(str(path))


def test_a_directory_is_given_to_another_user(tmp_path: Path) -> None:
    path = tmp_path / "user"
    uid, gid = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    for _ in range(2):  # and found again
        give_directory(str(path), uid, gid)
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o700, uid, gid)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ConfigError, match="HP622"):
        give_directory(str(tmp_path / "link"), uid, gid)
    with pytest.raises(ConfigError, match="HP621"):
        give_directory(str(tmp_path / "missing" / "user"), uid, gid)


def test_file_in_memory_has_no_name_and_is_not_inherited() -> None:
    fd = memory_file("hotport-test")
    try:
        assert not os.get_inheritable(fd)
        assert os.fstat(fd).st_nlink == 0
        assert os.write(fd, b"x" * 1_000_000) == 1_000_000
    finally:
        os.close(fd)
