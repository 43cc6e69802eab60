"""Shells complete commands, flags and the names of services, by the script that hotport prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, HOTPORT, need, run_here


def completed(words: str, directory: Path) -> list[str]:
    """What bash would offer for the last word."""
    environment = {
        **os.environ,
        "HOTPORT_RUNTIME_DIR": str(directory),
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_HOTPORT_COMPLETE": "bash_complete",
    }
    code = "import sys; sys.argv[0] = 'hotport'; from hotport.cli import main; main()"
    asked = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    return [line.partition(",")[2] for line in asked.stdout.splitlines()]


def test_commands_flags_values_and_services_are_completed(tmp_path: Path) -> None:
    for name in ("shop", "blog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "control.sock").touch()
    assert completed("hotport re", tmp_path)[:1] == ["restart"]
    assert completed("hotport serve --log-l", tmp_path) == ["--log-level"]
    assert completed("hotport serve --loop ", tmp_path) == ["uvloop", "asyncio"]
    assert completed("hotport restart ", tmp_path) == ["blog", "shop"]
    assert completed("hotport status s", tmp_path) == ["shop"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_is_printed_that_its_shell_can_read(tmp_path: Path, shell: str) -> None:
    printed = run_here("completion", shell, cwd=tmp_path, env=dict(os.environ))
    assert printed.returncode == 0
    assert f"_HOTPORT_COMPLETE={shell}_complete" in printed.stdout
    checked = subprocess.run(
        [need(shell), "-n"], input=printed.stdout, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_script_works_in_bash(tmp_path: Path) -> None:
    program = tmp_path / "hotport"
    program.write_text(f'#!/bin/sh\nexec {" ".join(HOTPORT)} "$@"\n')
    program.chmod(0o755)
    script = """
    eval "$(hotport completion bash)"
    COMP_WORDS=(hotport serve --stra) COMP_CWORD=2
    _hotport_completion hotport
    echo "${COMPREPLY[@]}"
    """
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    asked = subprocess.run(
        [need("bash"), "-c", script], env=environment, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert asked.stdout.split() == ["--strategy"], asked.stderr
