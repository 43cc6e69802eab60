from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from hotport.diagnose.doctor import Finding
from hotport.diagnose.rights import Rights, SocketFile, examine_rights, read_rights
from hotport.options import Options
from hotport.wire.messages import Status, WorkerStatus


def findings(rights: Rights, **options: object) -> list[Finding]:
    found = list(examine_rights(rights, Options(**options)))  # type: ignore[arg-type]
    assert all(finding.consequence and finding.fix and finding.note for finding in found)
    return found


def status(*addresses: str, pid: int | None = None) -> Status:
    worker = WorkerStatus(worker=1, generation=1, pid=pid or os.getpid(), phase="serving", age_s=1.0)
    return Status(
        service="svc", pid=os.getpid(), version="1", generation=1, wanted=1, restarting=0, addresses=addresses,
        target="app:app", age_s=1.0, rss_bytes=1, workers=(worker,),
    )  # fmt: skip


def test_a_service_with_few_rights_has_nothing_to_repair() -> None:
    closed = SocketFile("unix:/run/a.sock", 0o660, "www-data")
    hidden = SocketFile("unix:/run/b.sock", 0o777, "root", is_reachable=False)
    assert findings(Rights(sockets=(closed, hidden), user="www-data")) == []


def test_workers_of_root_are_found_and_not_all_are_named() -> None:
    (found,) = findings(Rights(root=tuple(f"worker 1.{number}" for number in range(9))))
    assert found.what.endswith("worker 1.3 and 5 more of this service run as root")


@pytest.mark.parametrize("file", [SocketFile("unix:/run/a.sock", 0o666), SocketFile("unix:@a")], ids=["file", "name"])
def test_a_socket_that_every_user_can_connect_to_is_found_if_its_peers_are_trusted(file: SocketFile) -> None:
    (found,) = findings(Rights(sockets=(file,)))
    assert found.what.startswith(f"every user may connect to {file.address}")
    assert findings(Rights(sockets=(file,)), trusted_proxy=("127.0.0.1",)) == []
    assert len(findings(Rights(sockets=(file,)), trusted_proxy=("*",))) == 1


def test_a_directory_that_the_group_of_a_socket_cannot_enter_is_found() -> None:
    (found,) = findings(Rights(sockets=(SocketFile("unix:/a/b.sock", 0o660, "web", False, "/a"),)))
    assert found.what == "the group web may connect to unix:/a/b.sock, but cannot enter /a"


def test_what_the_workers_user_may_change_of_the_supervisor_is_found() -> None:
    (found,) = findings(Rights(user="shop", loose=("/srv/shop/hotport.toml",)))
    assert found.what.startswith("shop may change /srv/shop/hotport.toml, and the supervisor, which is root,")


def test_socket_files_are_read_with_the_directories_on_the_way(tmp_path: Path) -> None:
    place = tmp_path / "closed"
    place.mkdir()
    path = place / "a.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        path.chmod(0o660)
        place.chmod(0o700)
        read = read_rights(status("tcp://127.0.0.1:1", f"unix:{path}", "unix:@name", f"unix:{place}/gone"))
        path.unlink()
    file, name, gone = read.sockets
    assert (file.mode, file.is_reachable) == (0o660, False)
    assert file.closed_to_group in {str(place), *map(str, place.parents)}
    assert (name.mode, gone.mode) == (None, 0)
    assert read.root == (("worker 1.1",) if os.geteuid() == 0 else ())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of other users")
def test_files_that_workers_of_another_user_may_change_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hotport.toml").touch()
    (tmp_path / "pyproject.toml").touch()
    os.chown("hotport.toml", 65534, -1)
    pid = os.fork()
    if pid == 0:
        os.setresuid(65534, 65534, 65534)
        os.execv("/bin/sleep", ["sleep", "1000"])
    try:
        while os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe"):
            os.sched_yield()
        read = read_rights(status(pid=pid))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    assert read.root == ()
    assert str(tmp_path / "hotport.toml") in read.loose
    assert str(tmp_path / "pyproject.toml") not in read.loose
