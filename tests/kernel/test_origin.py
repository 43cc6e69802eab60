"""Who started a process, read of real ones; what manages it, of files as the managers write them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.kernel import origin as module
from hotport.kernel import procfs
from hotport.kernel.origin import describe, origin_of
from hotport.kernel.unit import Unit
from hotport.model.process import Container, Origin

ID = "0123456789ab" + "c" * 52


@contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


def test_process_is_described_with_its_parents() -> None:
    with running("cat", "-u", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()  # by then it is what it was started as
        found = describe(process.pid)
    assert found.command == "cat -u"
    assert found.origin.parents[0].endswith(f"(pid {os.getpid()})")
    assert (found.origin.is_left, found.origin.deleted, found.origin.container) == (False, (), None)
    assert describe(2**30).command == "?"


def test_deleted_program_and_directory_are_told(tmp_path: Path) -> None:
    place = tmp_path / "release"
    place.mkdir()
    program = shutil.copy(shutil.which("sleep") or "sleep", place / "server")
    with running(str(program), "1000", cwd=place) as process:
        shutil.rmtree(place)
        assert origin_of(process.pid).deleted == ("program file", "working directory")


def test_terminal_is_named() -> None:
    ours, theirs = os.openpty()
    with running("setsid", "--ctty", "cat", stdin=theirs, stdout=theirs) as process:
        os.write(ours, b"x\n")  # cat echoes it: by then it has its terminal
        os.read(ours, 2)
        while b"x" not in os.read(ours, 64):
            pass
        assert origin_of(process.pid).terminal == os.ttyname(theirs).removeprefix("/dev/")
    os.close(ours)
    os.close(theirs)


def test_child_whose_parent_and_group_have_ended_is_left_behind() -> None:
    code = "import os, signal\nif os.fork() == 0:\n  print(os.getpid(), flush=True); signal.pause()\nsignal.pause()"
    with running(sys.executable, "-c", code, stdout=subprocess.PIPE, process_group=0) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not origin_of(child).is_left
        parent.kill()
        parent.wait()
        assert origin_of(child).is_left
        assert "left behind" in str(describe(child))
        os.kill(child, signal.SIGKILL)


def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ID
    place.mkdir()
    networks = {"bridge": {"IPAddress": "172.17.0.2"}}
    text = json.dumps({"Name": "/shop", "NetworkSettings": {"Networks": networks}})
    (place / "config.v2.json").write_text(text)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.v2.json").write_text("{")
    monkeypatch.setattr(module, "_DOCKER", str(tmp_path))


def test_container_behind_a_proxy_of_docker_is_stopped_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["/usr/bin/docker-proxy", "-host-port", "8000", "-container-ip", "172.17.0.2", "-container-port", "80"]
    monkeypatch.setattr(procfs, "arguments", lambda _: words)
    unknown = describe(os.getpid())
    assert unknown.stop == "docker stop $(docker ps --quiet --filter publish=8000)"
    docker(tmp_path, monkeypatch)
    found = describe(os.getpid())
    assert (found.origin.container, found.origin.forwards) == (Container("docker", "shop"), "172.17.0.2:80")
    assert found.stop == "docker stop shop"


def test_process_in_a_container_is_stopped_with_it_from_outside_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        procfs, "group_path", lambda pid: "/" if pid == os.getpid() else f"/system.slice/docker-{ID}.scope"
    )
    with running("sleep", "1000") as process:
        assert describe(process.pid).stop == f"docker stop {ID[:12]}"
        docker(tmp_path, monkeypatch)
        assert describe(process.pid).stop == "docker stop shop"
        monkeypatch.setattr(procfs, "group_path", lambda _: f"/docker/{ID}")
        assert describe(process.pid).stop == ""


def test_service_of_systemd_is_stopped_by_its_unit_and_its_guests_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    units, outside = {os.getpid(): None}, {os.getpid(), *module._parents(os.getpid())}
    monkeypatch.setattr(module, "unit_of", lambda pid: units.get(pid, Unit("web.service", False)))
    monkeypatch.setattr(procfs, "group_path", lambda pid: "/" if pid in outside else "/web.service")
    relations = procfs.relations
    script = "sleep 1000 & echo $!; wait"
    with running("sh", "-c", script, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        job = int(process.stdout.readline())
        assert describe(process.pid).stop == "systemctl stop web.service"
        assert describe(job).stop == "systemctl stop web.service"
        # A job of cron's is in cron.service, and leads a session of its own.
        monkeypatch.setattr(procfs, "relations", lambda pid: (*relations(pid)[:2], pid, ""))
        assert describe(job).stop == ""
        os.kill(job, signal.SIGKILL)
        monkeypatch.undo()
        monkeypatch.setattr(module, "unit_of", lambda _: Unit("ssh.service", False))
        assert describe(process.pid).stop == ""  # we would end with it


@pytest.mark.parametrize(
    ("uid", "stop"),
    [(None, "systemctl --user stop web.service"), (2**30, "systemctl --user --machine=eve@ stop web.service")],
)
def test_unit_of_a_users_manager_is_stopped_through_that_one(
    uid: int | None, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = {os.getpid(), *module._parents(os.getpid())}
    monkeypatch.setattr(module, "unit_of", lambda pid: None if pid == os.getpid() else Unit("web.service", True))
    monkeypatch.setattr(procfs, "user_of", lambda _: os.geteuid() if uid is None else uid)
    monkeypatch.setattr(procfs, "owner", lambda _: "eve")
    monkeypatch.setattr(procfs, "group_path", lambda pid: "/" if pid in outside else "/web.service")
    with running("sleep", "1000") as process:
        assert describe(process.pid).stop == stop


def test_socket_of_systemd_is_stopped_with_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemctl = tmp_path / "systemctl"
    rows = "0.0.0.0:80 other.socket other.service\\n[::]:8000 web.socket web.service\\n"
    systemctl.write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(procfs, "comm", lambda _: "systemd")
    assert describe(1, port=8000).stop == "systemctl stop web.socket web.service"
    assert describe(1, port=8001).stop == ""
    systemctl.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe(1, port=8000).stop == ""


def test_other_managers_are_known_by_what_they_tell_their_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"SUPERVISOR_PROCESS_NAME": "web", "SUPERVISOR_GROUP_NAME": "shop"}
    monkeypatch.setattr(procfs, "environment", lambda _: given)
    assert module._managed(os.getpid(), Origin(("supervisord (pid 5)",)), 0) == "supervisorctl stop shop:web"
    assert module._managed(os.getpid(), Origin(("sh (pid 5)",)), 0) == ""
    monkeypatch.setattr(procfs, "environment", lambda _: {"pm_id": "3", "PM2_HOME": "/srv/shop/.pm2"})
    assert module._managed(os.getpid(), Origin(), 0) == "pm2 stop 3"
    assert module._managed(os.getpid(), Origin(is_left=True), 0) == ""


def test_service_is_stopped_by_its_name_wherever_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTPORT_RUNTIME_DIR", "/run/ours")
    assert module._stopping("/run/ours/web") == "hotport stop web"
    assert module._stopping("/run/the others/web") == "HOTPORT_RUNTIME_DIR='/run/the others' hotport stop web"
    assert module._stopping("") == ""
    monkeypatch.setenv("HOTPORT_RUNTIME_DIR", "relative")
    assert module._stopping("/run/ours/web") == "HOTPORT_RUNTIME_DIR=/run/ours hotport stop web"
