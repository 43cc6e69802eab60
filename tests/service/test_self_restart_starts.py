"""However a program was started, its successor is started so, too; or it is said why that cannot be."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import zipfile
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.service.embedded_support import LINES, PROGRAM, Embedded, hello
from tests.support import DEADLINE_S, assert_three_lines, need, watching_pid, write_code


def lines(version: str) -> str:
    return LINES.format(version=version)


@pytest.mark.parametrize("how", ["script", "-c", "-m", "zipapp", "shebang"])
def test_program_is_started_as_it_was(tmp_path: Path, how: str) -> None:
    argv = {
        "script": ("server.py", "--flag", "a b"),
        "-c": ("-c", PROGRAM, "--flag", "a b"),
        "-m": ("-m", "server", "--flag", "a b"),
        "zipapp": ("server.pyz", "--flag", "a b"),
        "shebang": ("--flag", "a b"),
    }[how]
    with zipfile.ZipFile(tmp_path / "server.pyz", "w") as archive:
        archive.writestr("__main__.py", PROGRAM)
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\n{PROGRAM}")
    script.chmod(0o755)
    python = "./script" if how == "shebang" else sys.executable
    with Embedded(tmp_path, lines("one"), *argv, python=python) as program:
        program.write(lines("two"))
        program.restart()
        first, second = program.serving
        assert second["argv"] == first["argv"]
        assert second["argv"][-2:] == ["--flag", "a b"]
        assert program.hello() == ("two", program.pid)


def test_release_that_a_link_leads_to_by_now_is_started(tmp_path: Path) -> None:
    for number in "12":
        release = tmp_path / f"release{number}"
        release.mkdir()
        write_code(release / "server.py", PROGRAM)
        write_code(release / "app.py", lines(f"release{number}"))
    current = tmp_path / "current"
    current.symlink_to("release1")
    with Embedded(tmp_path, lines("none"), cwd=current, env={"PYTHONPATH": ""}) as program:
        assert program.hello() == ("release1", program.pid)
        current.unlink()
        current.symlink_to("release2")
        shutil.rmtree(tmp_path / "release1")
        program.restart()
        assert program.hello() == ("release2", program.pid)
        assert program.serving[-1]["cwd"] == str(tmp_path / "release2")
        current.unlink()
        said = program.fail()
        assert_three_lines(said["text"], "HP443")
        assert str(current) in said["text"]


def test_environment_is_the_one_from_the_beginning(tmp_path: Path) -> None:
    app = (
        "import os\nassert 'ADDED' not in os.environ and os.environ['GIVEN'] == 'x'\n"
        "os.environ['ADDED'] = os.environ['GIVEN'] = 'y'\n"
    )
    with Embedded(tmp_path, app + lines("one"), env={"GIVEN": "x"}) as program:
        for _ in range(2):
            program.restart()


def test_other_command_is_started_if_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(PROGRAM)
    app = lines("one") + f"\nRESTART = [[{sys.executable!r}, 'other.py', 'x']]\n"
    with Embedded(tmp_path, app, "-c", PROGRAM) as program:
        program.restart()
        assert program.serving[-1]["argv"] == ["other.py", "x"]


def test_program_that_was_read_from_stdin_is_refused(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", lines("one"))
    for argv in ([], ["-"]):
        process = subprocess.run(
            [sys.executable, *argv],
            input=REFUSED,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert_three_lines(process.stdout, "HP442")
        assert "read from stdin" in process.stdout


REFUSED = """\
import asyncio, hotport, app
async def main():
    async with hotport.serve(app.APP, bind="tcp://127.0.0.1:0") as server:
        try:
            await server.restart()
        except hotport.RestartError as error:
            print(error)
asyncio.run(main())
"""


def test_process_of_multiprocessing_is_refused(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", lines("one"))
    (tmp_path / "refused.py").write_text(REFUSED.replace("asyncio.run(main())", "def run(): asyncio.run(main())"))
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import multiprocessing as m, refused; p = m.Process(target=refused.run); p.start(); p.join()",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert_three_lines(process.stdout, "HP442")
    assert "multiprocessing" in process.stdout


def test_worker_of_a_supervisor_is_refused(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", lines("one"))
    (tmp_path / "refused.py").write_text(REFUSED)
    process = subprocess.run(
        [sys.executable, "refused.py"],
        cwd=tmp_path,
        env={**os.environ, "HOTPORT_GENERATION": "3"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert_three_lines(process.stdout, "HP441")


@pytest.mark.parametrize("init", ["", "sh"])
def test_program_that_is_a_container_is_refused(tmp_path: Path, init: str) -> None:
    """As pid 1, or started by one that leaves with it, it takes everything along."""
    write_code(tmp_path / "app.py", lines("one"))
    (tmp_path / "refused.py").write_text(REFUSED)
    command = [sys.executable, "refused.py"]
    if init:
        command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    process = subprocess.run(
        [need("unshare"), "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    if "unshare" in process.stderr:
        pytest.skip(process.stderr)
    assert_three_lines(process.stdout, "HP440")
    assert ("sh (pid 1)" if init else "it is pid 1") in process.stdout


def test_stdin_and_process_group_stay(tmp_path: Path) -> None:
    """So Ctrl-C ends both while both live."""
    with Embedded(tmp_path, lines("one")) as program:
        program.restart()
        first, second = program.serving
        assert second["group"] == first["group"]
        assert os.readlink(f"/proc/{program.pid}/fd/0") == "/dev/null"


def test_program_that_was_to_outlive_the_terminal_has_such_successors(tmp_path: Path) -> None:
    app = lines("one") + 'OPTIONS = {"restart_on_hup": True}'
    ours, theirs = os.openpty()
    try:
        prefix = [need("setsid"), "--ctty", "nohup"]
        with Embedded(tmp_path, app, prefix=prefix, stdin=theirs) as program:
            os.close(theirs)
            for _ in range(2):
                program.restart()
            os.close(ours)
            assert program.hello() == ("one", program.pid)
            program.restart()
            assert [said["generation"] for said in program.serving] == [1, 2, 3, 4], "none that was not asked for"
        assert "HP448" not in program.stderr(), "the end of the leader of the session is no request to restart"
    finally:
        for fd in (ours, theirs):
            with suppress(OSError):
                os.close(fd)


def test_program_that_outlives_its_terminal_restarts_once_when_that_goes(tmp_path: Path) -> None:
    """The kernel sends SIGHUP twice: when the terminal goes, and when the process ends that had led its session."""
    app = lines("one") + 'OPTIONS = {"restart_on_hup": True}'
    ours, theirs = os.openpty()
    with ExitStack() as stack:
        close = stack.enter_context(open(ours, "wb", buffering=0)).close
        stack.callback(os.close, theirs)
        program = stack.enter_context(Embedded(tmp_path, app, prefix=[need("setsid"), "--ctty", "nohup"], stdin=theirs))
        with watching_pid(program.pid) as wait_ended:
            close()
            program.wait("serving")
            wait_ended()
        program.restart()
        assert [said["generation"] for said in program.serving] == [1, 2, 3]
        assert "HP448" not in program.stderr()


def test_program_that_leads_the_session_of_a_terminal_is_refused(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    with Embedded(tmp_path, lines("one"), prefix=[need("setsid"), "--ctty"], stdin=theirs) as program:
        said = program.fail()
        assert_three_lines(said["text"], "HP440")
        assert "terminal" in said["text"]
    os.close(theirs)
    os.close(ours)


def test_interrupt_at_the_terminal_ends_both_while_both_live(tmp_path: Path) -> None:
    app = lines("one").replace("@hotport.restartable", "") + 'OPTIONS = {"drain_timeout": 1000, "restart_on_hup": True}'
    ours, theirs = os.openpty()
    prefix = [need("setsid"), "--ctty", "sh", "-c", 'trap : INT; "$@"; exit 0', "sh"]
    with Embedded(tmp_path, app, prefix=prefix, stdin=theirs) as program, program.connect() as client:
        hello(client)
        program.ask()
        program.wait("serving")
        assert len(program.pids) == 2
        os.write(ours, b"\x03")
        while program.told() is not None:  # until both have ended
            pass
        program.has_stopped = True
    os.close(theirs)
    os.close(ours)


# -- addresses ----------------------------------------------------------------------------------------------


def test_addresses_are_kept_added_and_dropped(tmp_path: Path) -> None:
    def app(version: str, *bind: str) -> str:
        return lines(version) + f"OPTIONS = {{'bind': {bind!r}}}\n"

    def ask_unix(path: Path) -> tuple[str, int]:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return hello(client)

    kept, dropped, added = tmp_path / "kept", tmp_path / "dropped", tmp_path / "added"
    tcp, other = "tcp://127.0.0.1:0", "tcp://127.0.0.2:0"
    with Embedded(tmp_path, app("one", tcp, f"unix:{kept}", "unix:dropped", other)) as program:
        assert ask_unix(dropped) == ("one", program.pid)
        first, last = (int(program.said[0].said["addresses"][n].rpartition(":")[2]) for n in (0, 3))
        inode = kept.stat().st_ino
        # A port that was free is named now, and another one is let go.
        program.write(app("two", f"unix:{kept}", f"tcp://127.0.0.2:{last}", f"unix:{added}"))
        program.restart()
        assert program.serving[-1]["addresses"] == [f"unix:{kept}", f"tcp://127.0.0.2:{last}", f"unix:{added}"]
        assert kept.stat().st_ino == inode
        assert ask_unix(kept) == ask_unix(added) == ("two", program.pid)
        with Embedded.connect_to(last, "127.0.0.2") as client:
            assert hello(client) == ("two", program.pid)
        with pytest.raises(ConnectionRefusedError):
            Embedded.connect_to(first)
        assert not dropped.exists()
        # An abort leaves every path as it was.
        program.write("raise SystemExit(1)\n")
        program.fail()
        assert ask_unix(kept) == ("two", program.pid)
    assert not kept.exists()
    assert not added.exists()


def test_nothing_adds_up_over_many_restarts(tmp_path: Path) -> None:
    """Neither while a generation serves, once its predecessor is gone and a restart has failed, nor after its end."""
    broken = "raise SystemExit(1)\n"
    with Embedded(tmp_path, lines("one")) as program:
        program.write(broken)
        serving = [program.fail()["descriptors"]]
        program.write(lines("one"))
        for _ in range(2):
            program.restart()
        program.write(broken)
        serving += [program.fail()["descriptors"] for _ in range(2)]
        program.stop()
        ended = [told.said["descriptors"] for told in program.said if told.what == "ended"]
    assert len(set(serving)) == 1, serving
    assert len(set(ended)) == 1, ended
    assert ended[0] < serving[0]
