"""How a process was started: what is remembered, and what cannot be done again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hotport.embedded.program import Program
from hotport.errors import RestartError
from tests.support import assert_three_lines

SAY = """\
import json, os, sys
from hotport.embedded.program import Program
{before}
program = Program.snapshot()
print(json.dumps([program.directory, program.environment.get("GIVEN"), program.environment.get("NOTIFY_SOCKET")]))
"""


def say(before: str, cwd: Path, pwd: str) -> str:
    environment = {**os.environ, "PWD": pwd, "GIVEN": "x", "NOTIFY_SOCKET": "@private"}
    return subprocess.check_output(
        [sys.executable, "-c", SAY.format(before=before)], cwd=cwd, env=environment, text=True
    ).strip()


def test_directory_is_known_by_its_name_and_the_environment_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "release").mkdir()
    link = tmp_path / "current"
    link.symlink_to("release")
    assert say("os.environ['GIVEN'] = 'y'", link, str(link)) == f'["{link}", "x", null]'
    assert say("", link, "/elsewhere") == f'["{tmp_path}/release", "x", null]'
    assert say("os.rmdir(os.getcwd())", link, str(link)) == f'["{link}", "x", null]'


def test_environment_is_ours_where_the_kernels_was_written_over(tmp_path: Path) -> None:
    before = "os.environ['GIVEN'] = 'y'; sys.modules['setproctitle'] = None"
    assert say(before, tmp_path, str(tmp_path)) == f'["{tmp_path}", "y", null]'


@pytest.mark.parametrize(
    ("argv", "ps1", "why"),
    [(["server.py"], ">>> ", "at a prompt"), ([""], None, "stdin"), (["-"], None, "stdin"), (["server.py"], None, "")],
)
def test_program_without_a_file_is_not_started_again(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], ps1: str | None, why: str
) -> None:
    monkeypatch.delitem(sys.modules, "_pytest")
    monkeypatch.setattr(sys, "argv", argv)
    if ps1 is not None:
        monkeypatch.setattr(sys, "ps1", ps1, raising=False)
    found = Program.snapshot().why_not_again()
    assert why in found
    assert bool(why) == bool(found)


def test_script_that_was_named_from_another_directory_is_not_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["server.py"])
    program = Program(("python", "server.py"), str(tmp_path), {}, frozenset())
    with pytest.raises(RestartError) as caught:
        program.resolve(None, 1)
    assert_three_lines(str(caught.value), "HP443")
    assert f"server.py, looked for in {tmp_path}" in caught.value.cause
    (tmp_path / "server.py").touch()
    start = program.resolve(None, 1)
    assert start.argv == (sys.executable, "server.py")
    assert start.environment == {"PWD": str(tmp_path)}


def test_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(RestartError) as caught:
        Program(("python",), str(tmp_path / "gone"), {}, frozenset()).resolve(["true"], 1)
    assert_three_lines(str(caught.value), "HP443")
    assert "gone" in caught.value.cause
