"""Deploys by symbolic link: each generation is of one piece, from the release that the link named at its start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hotport
from tests.support import LINE_APP, Hammer, Service, ask_line, write_code

#: The version is what the module ``release`` says, wherever it comes from.
RELEASED = "import release\n" + LINE_APP.format(version="{release.NUMBER}")


def switch(link: Path, target: Path) -> None:
    """Let a link point elsewhere, as deploy tools do: at no moment is it missing."""
    beside = link.with_name("next")
    beside.symlink_to(target)
    beside.replace(link)


@contextmanager
def served_through(link: Path, base: Path, *args: str) -> Iterator[Service]:
    """A service that was started in `link`, as a shell would after ``cd current``."""
    with Service(base, "app:app", *args, cwd=link).wait_ready() as service:
        yield service


def make_release(base: Path, number: int) -> Path:
    release = base / "releases" / str(number)
    release.mkdir(parents=True)
    write_code(release / "app.py", RELEASED)
    write_code(release / "release.py", f"NUMBER = {number}")
    return release


def test_restart_runs_the_release_that_the_link_names_now(tmp_path: Path) -> None:
    old, new = make_release(tmp_path, 41), make_release(tmp_path, 42)
    current = tmp_path / "current"
    switch(current, old)
    with served_through(current, tmp_path) as service, Hammer(service.port) as hammer:
        hammer.wait_answers(version="41")
        switch(current, new)
        service.restart()
        hammer.wait_answers(version="42")
        assert os.readlink(f"/proc/{ask_line(service.port).pid}/cwd") == str(new)
    assert not hammer.failures


def test_replacement_of_a_crashed_worker_comes_from_its_generations_release(tmp_path: Path) -> None:
    old, new = make_release(tmp_path, 41), make_release(tmp_path, 42)
    current = tmp_path / "current"
    switch(current, old)
    with served_through(current, tmp_path) as service:
        victim = ask_line(service.port)
        switch(current, new)
        os.kill(victim.pid, signal.SIGKILL)
        replacement = ask_line(service.port)
        assert replacement.pid != victim.pid
        assert (replacement.version, replacement.generation) == ("41", "1")
        service.restart()
        assert ask_line(service.port).version == "42"


def test_old_generation_serves_on_when_the_link_leads_nowhere(tmp_path: Path) -> None:
    current = tmp_path / "current"
    switch(current, make_release(tmp_path, 41))
    with served_through(current, tmp_path) as service:
        switch(current, tmp_path / "releases" / "43")
        result = service.run("restart")
        assert result.returncode == 4
        assert "HP401" in result.stderr
        assert "releases/43" in result.stderr
        assert ask_line(service.port).version == "41"
        switch(current, make_release(tmp_path, 43))
        service.restart()
        assert ask_line(service.port).version == "43"


def test_aborted_release_leaves_replacements_to_the_old_one(tmp_path: Path) -> None:
    """The old generation crashed after an abort, and came back as the release that had just been refused."""
    current = tmp_path / "current"
    switch(current, make_release(tmp_path, 41))
    broken = make_release(tmp_path, 42)
    write_code(broken / "release.py", "raise RuntimeError('no release')")
    with served_through(current, tmp_path) as service:
        switch(current, broken)
        service.restart(expect=4)
        victim = ask_line(service.port)
        os.kill(victim.pid, signal.SIGKILL)
        answer = ask_line(service.port)
        assert answer.pid != victim.pid
        assert (answer.version, answer.generation) == ("41", "1")


def make_venv(path: Path, number: int) -> None:
    """A virtual environment of its own, that borrows every package of ours and adds one module."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(path)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
    source = Path(hotport.__file__).parent.parent
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n{source}\n")
    (packages / "release.py").write_text(f"NUMBER = {number}\n")


def test_restart_runs_in_the_virtual_environment_that_the_link_names_now(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", RELEASED)
    for number in (41, 42):
        make_venv(tmp_path / "releases" / str(number) / "venv", number)
    current = tmp_path / "current"
    switch(current, tmp_path / "releases" / "41")
    with Service(tmp_path, "app:app", "--python", "current/venv/bin/python").wait_ready() as service:
        with Hammer(service.port) as hammer:
            hammer.wait_answers(version="41")
            switch(current, tmp_path / "releases" / "42")
            service.restart()
            hammer.wait_answers(version="42")
        assert not hammer.failures
        victim = ask_line(service.port)
        switch(current, tmp_path / "releases" / "41")
        os.kill(victim.pid, signal.SIGKILL)
        assert ask_line(service.port).version == "42"


def test_release_whose_path_cannot_be_told_is_refused(tmp_path: Path) -> None:
    current = tmp_path / "current"
    switch(current, make_release(tmp_path, 41))
    odd = os.fsdecode(os.fsencode(make_release(tmp_path, 42)) + b"-\xff")
    with served_through(current, tmp_path) as service:
        os.rename(tmp_path / "releases" / "42", odd)
        switch(current, Path(odd))
        result = service.run("restart")
        assert result.returncode == 4
        assert "HP404" in result.stderr
        assert ask_line(service.port).version == "41"


#: The version is what the environment says.
CONFIGURED = "import os\n" + LINE_APP.format(version="{os.environ['VERSION']}")


def test_restart_reads_the_variables_of_the_release_again(tmp_path: Path) -> None:
    """A new release used to get the variables of the supervisor's start, until the service was stopped."""
    write_code(tmp_path / "app.py", CONFIGURED)
    variables = tmp_path / ".env"
    variables.write_text("VERSION=41\n")
    with Service(tmp_path, "app:app", "--env-file", ".env").wait_ready() as service, Hammer(service.port) as hammer:
        hammer.wait_answers(version="41")
        variables.write_text("VERSION=42\n")
        victim = ask_line(service.port)
        os.kill(victim.pid, signal.SIGKILL)
        assert ask_line(service.port).version == "41", "a replacement has the variables of its generation"
        service.restart()
        hammer.wait_answers(version="42")
        variables.write_text("VERSION=43\nPASSWORD='secret\n")
        result = service.run("restart")
        assert result.returncode == 4
        assert "HP309" in result.stderr
        assert "line 2 of .env" in result.stderr
        assert "secret" not in result.stderr
        assert ask_line(service.port).version == "42"


def test_service_does_not_start_with_variables_that_cannot_be_read(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", CONFIGURED)
    with Service(tmp_path, "app:app", "--env-file", "missing.env") as service:
        assert service.wait() == 2
        assert "HP309 cannot read missing.env" in service.log_path.read_text()
