"""Units of systemd, of processes that are in some and of others."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from hotport.kernel import unit
from hotport.kernel.unit import Unit, kill_mode, unit_of


@pytest.mark.parametrize(
    ("cgroup", "expected"),
    [
        ("0::/system.slice/shop.service\n", Unit("shop.service", False)),
        ("0::/system.slice/system-app.slice/app@blog.service\n", Unit("app@blog.service", False)),
        ("12:cpu:/x\n1:name=systemd:/system.slice/shop.service\n", Unit("shop.service", False)),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/shop.service\n", Unit("shop.service", True)),
        ("0::/system.slice/shop.service/payload\n", Unit("shop.service", False)),
        ("0::/user.slice/user-7.slice/session-3.scope\n", None),
        ("0::/user.slice/user-7.slice/user@7.service/app.slice/run-4.scope\n", None),
        ("0::/user.slice/user-7.slice/user@7.service/init.scope\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_unit_is_read_from_the_control_group(
    cgroup: str, expected: Unit | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unit, "open", lambda _: io.StringIO(cgroup), raising=False)
    assert unit_of(7) == expected


def test_process_that_is_gone_is_in_no_unit() -> None:
    assert unit_of(2**30) is None


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('test "$*" = "show --property=KillMode --value -- shop.service" && echo mixed', "mixed"),
        ("echo Failed to connect to bus >&2; exit 1", ""),
        ("exec sleep 1000", ""),
    ],
)
def test_systemd_is_asked_how_it_ends_a_unit(
    script: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "systemctl"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    if "sleep" in script:
        monkeypatch.setattr(unit, "ANSWER_TIMEOUT_S", 0.05)
    assert kill_mode(Unit("shop.service", False)) == expected


def test_manager_of_a_user_is_asked_about_its_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "systemctl"
    program.write_text('#!/bin/sh\ntest "$1" = --user && echo control-group\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert kill_mode(Unit("shop.service", True)) == "control-group"


def test_nothing_is_known_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kill_mode(Unit("shop.service", False)) == ""
