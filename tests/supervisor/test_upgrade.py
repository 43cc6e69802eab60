"""What a supervisor would become."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hotport.supervisor.upgrade import _command_line


@pytest.mark.parametrize("is_in_environment", [True, False])
def test_script_that_a_link_leads_to_now_runs_by_the_interpreter_of_its_own_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_environment: bool
) -> None:
    for release in ("1", "2"):
        place = tmp_path / release / "bin"
        place.mkdir(parents=True)
        python = place / "python" if is_in_environment else "/bin/sh"
        (place / "python").symlink_to(sys.executable)
        (place / "hotport").write_text(f"#!{python}\nimport hotport\n")
    current = tmp_path / "current"
    current.symlink_to(tmp_path / "2")
    script, old = "current/bin/hotport", str(tmp_path / "1" / "bin" / "python")
    monkeypatch.setattr(sys, "orig_argv", [old, script, "serve", "app:app"])
    expected = str(tmp_path / "2" / "bin" / "python") if is_in_environment else old
    assert _command_line(None, str(tmp_path)) == [expected, script, "serve", "app:app"]
    assert _command_line("/other/python", str(tmp_path)) == ["/other/python", "-m", "hotport", "serve", "app:app"]
