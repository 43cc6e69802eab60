"""The supervisor becomes another one by exec: the same pid, the same workers, and no connection notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hotport
from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept
from tests.service.test_recovery import FOREIGN, assert_healthy
from tests.support import (
    LINE_APP,
    RESTARTS,
    Footprint,
    Gate,
    Hammer,
    Service,
    ask_line,
    assert_three_lines,
    write_code,
)

#: What `hotport serve` needs besides the standard library.
NEEDED = ("anyio", "click", "msgspec", "rich", "structlog", "uvloop")

VERSIONED = "import sys\n" + LINE_APP.replace("{version}", "{{sys.version_info[1]}}").format()


@pytest.fixture(scope="session")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An interpreter of another version, in an environment with this hotport."""
    minors = [minor for minor in (12, 13, 14) if minor != sys.version_info[1]]
    beside = Path(sys.base_prefix).parent  # where pyenv and uv keep one beside the other
    paths = [str(path) for minor in minors for path in beside.glob(f"*3.{minor}*/bin/python3.{minor}")]
    paths += [path for minor in minors if (path := shutil.which(f"python3.{minor}"))]
    found = next(filter(works, paths), None)
    if found is None:
        pytest.skip(f"no Python of another version is installed: 3.{', 3.'.join(map(str, minors))}")
    place = tmp_path_factory.mktemp("other")
    python = place / "bin" / "python"
    try:
        subprocess.run([found, "-m", "venv", "--without-pip", place], check=True, capture_output=True, timeout=120)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile", *NEEDED]
        subprocess.run(pip, check=True, capture_output=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no environment for {found}: {error}")
    (site,) = place.glob("lib/python*/site-packages")
    (site / "hotport.pth").write_text(str(Path(hotport.__file__).parents[1]))
    yield str(python)
    shutil.rmtree(place)


def works(path: str) -> bool:
    """Not so for the stand-in of an interpreter that is not chosen."""
    return subprocess.run([path, "-c", ""], capture_output=True).returncode == 0


def upgrade(service: Service, *args: str) -> str:
    result = service.run("upgrade", "svc", *args)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}{service.log_tail()}"
    return result.stdout


def wait_upgraded(service: Service, times: int) -> None:
    service.wait_until(lambda: len(service.log_events("supervisor.upgraded")) == times, "it is upgraded")


@pytest.mark.soak
def test_supervisor_is_upgraded_to_another_interpreter_and_back_without_a_loss(
    tmp_path: Path, other_python: str
) -> None:
    write_code(tmp_path / "app.py", VERSIONED)
    with Service(tmp_path, "app:app", "--workers", "2") as service:
        pid, port = service.wait_ready().status()["pid"], service.port
        pids = service.worker_pids()
        with Hammer(port) as hammer:
            for _ in range(RESTARTS):
                for python in (other_python, sys.executable):
                    said = upgrade(service, "--python", python)
                    assert f"pid {pid} is hotport" in said
                    assert_healthy(service, workers=2)
                    assert service.status()["pid"] == pid == service.process.pid
                    assert service.worker_pids() == pids
                    hammer.wait_answers(2)
            upgrade(service, "--python", other_python)
            assert service.restart()["outcome"] == "done"
            hammer.wait_answers(2)
            assert not hammer.failures
        assert ask_line(port).version != str(sys.version_info[1])  # workers follow with the restart
        assert service.stop() == 0


@pytest.mark.soak
def test_connections_and_signals_survive_the_exec(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    warm: Footprint | None = None
    write_code(tmp_path / "app.py", HTTP_APP.format(fault=""))
    with Service(tmp_path, "app:app", "--lifespan", "off", "--keep-alive", "1h") as service:
        descriptors = service.wait_ready().descriptors()
        kept = [Kept(service.port) for _ in range(10)]
        assert [each.ask() for each in kept] == [(1, False)] * 10
        for number in range(2, 2 + RESTARTS):
            service.process.send_signal(signal.SIGUSR2)
            wait_upgraded(service, number - 1)
            assert [each.ask() for each in kept] == [(number - 1, False)] * 10
            assert service.restart()["connections"] == {"moved_http": 10}
            assert [each.ask() for each in kept] == [(number, False)] * 10
            assert service.descriptors() <= descriptors
            warm = warm or service.footprint()
        assert warm is not None
        with capfd.disabled():
            warm.assert_kept(service.footprint(), RESTARTS)
        for each in kept:
            each.sock.close()
        assert service.stop() == 0


def test_program_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(FOREIGN)
    with Service(tmp_path, "--", sys.executable, "server.py") as service:
        before = service.wait_ready().status()["workers"]
        upgrade(service)
        after = service.status()["workers"]
        assert [(each["pid"], each["worker"]) for each in after] == [(each["pid"], each["worker"]) for each in before]
        assert service.restart()["outcome"] == "done"
        assert ask_line(service.port).generation == "2"


@pytest.mark.measured
@pytest.mark.parametrize("is_later", [False, True])
def test_stop_that_comes_when_it_departs_is_not_lost(tmp_path: Path, is_later: bool) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "if 'serve' in sys.orig_argv and not {'HOTPORT_UPGRADE', 'HOTPORT_UPGRADE_CHECK'} & {*os.environ}:\n"
        "    import anyio\n"
        "    from hotport.supervisor.supervisor import Supervisor\n"
        "    depart, run = Supervisor.depart, Supervisor.run\n"
        "    def depart_and_stop(self):\n"
        "        depart(self)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    async def run_and_stop(self):\n"
        "        await run(self)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        await anyio.sleep(0.1)\n"
        f"    Supervisor.{'run' if is_later else 'depart'} = {'run' if is_later else 'depart'}_and_stop\n"
    )
    with Service(tmp_path, "app:app", env={"PYTHONPATH": str(tmp_path)}) as service:
        service.wait_ready().process.send_signal(signal.SIGUSR2)
        assert service.wait() == 0


@pytest.mark.measured
def test_worker_that_ends_during_the_exec_is_reaped_and_replaced(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    #: The next supervisor kills a worker before it has looked for any.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if 'HOTPORT_UPGRADE' in os.environ:\n"
        "    os.kill(int(open('victim').read()), signal.SIGKILL)\n"
    )
    with Service(tmp_path, "app:app", "--workers", "2", env={"PYTHONPATH": str(tmp_path)}) as service:
        victim, other = service.wait_ready().worker_pids()
        (tmp_path / "victim").write_text(str(victim))
        upgrade(service)
        status = assert_healthy(service, workers=2)
        pids = [each["pid"] for each in status["workers"]]
        assert other in pids
        assert victim not in pids
        service.wait_until(lambda: not os.path.exists(f"/proc/{victim}"), "it is reaped")
        assert service.stop() == 0


#: Programs that are no interpreters with hotport, and what is said of each.
OTHERS = {
    "/nowhere/python": "/nowhere/python: No such file or directory",
    "/bin/false": "it did not say who it is",
    "/bin/sh": "sh: ",
}


def test_interpreter_or_options_that_cannot_be_used_are_refused_beforehand(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        for python, cause in OTHERS.items():
            result = service.run("upgrade", "--python", python)
            assert result.returncode == 4
            assert "HP652 cannot upgrade the supervisor of svc; it continues unchanged" in result.stderr
            assert cause in result.stderr
            assert ask_line(service.port).version == "v1"
        assert service.restart()["outcome"] == "done"
        (tmp_path / "hotport.toml").write_text("workers = 'many'\n")
        result = service.run("upgrade")
        assert result.returncode == 4
        assert "workers" in result.stderr
        assert ask_line(service.port).version == "v1"


def test_code_of_another_protocol_is_refused_beforehand(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if 'HOTPORT_UPGRADE_CHECK' in os.environ:\n"
        "    import hotport.wire.messages as messages\n"
        "    messages.PROTOCOL += 1\n"
    )
    with Service(tmp_path, "app:app", env={"PYTHONPATH": str(tmp_path)}) as service:
        service.wait_ready()
        result = service.run("upgrade")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP653")
        assert ask_line(service.port).version == "v1"


def test_upgrade_during_a_restart_is_refused(tmp_path: Path) -> None:
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        write_code(tmp_path / "app.py", Gate.LINE + LINE_APP.format(version="v2"))
        restart = service.start("restart", "svc", "--json")
        service.wait_until(lambda: bool(service.status()["restarting"]), "a restart is in progress")
        result = service.run("upgrade")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP657")
        gate.open()
        assert json.loads(restart.communicate(timeout=service.timeout_s)[0])["outcome"] == "done"


@pytest.mark.measured
def test_interpreter_that_lacks_what_the_options_need_is_refused_beforehand(tmp_path: Path, other_python: str) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--watch") as service:
        service.wait_ready()
        result = service.run("upgrade", "--python", other_python)
        assert result.returncode == 4
        assert "HP332 cannot watch for changes" in result.stderr
        assert ask_line(service.port).version == "v1"
