"""The plugin as users have it: in a pytest of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import DEADLINE_S

SHOP = """\
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"1"})
"""

TESTS = """\
from urllib.request import urlopen

import pytest
import hotport
from hotport.testing import FaultyApp, assert_invisible_restart
from shop import app

faulty = FaultyApp(app)


def test_it_restarts(hotport_service):
    service = hotport_service("shop:app", workers=2)
    assert urlopen(service.url + "/").read() == b"1"
    assert service.restart()["serving"] == 2
    assert service.status()["wanted"] == 2
    assert "restart.done" in service.log()
    assert service.stop() == 0


def test_a_broken_release_does_no_harm(hotport_service):
    service = hotport_service("test_shop:faulty", env={"HOTPORT_FAULTS": "fail-startup@2"})
    with pytest.raises(hotport.RestartError, match="HP721") as caught:
        service.restart()
    assert caught.value.serving == 1
    assert "FaultyApp was told to fail" in "".join(caught.value.__notes__)
    assert urlopen(service.url).read() == b"1"


def test_its_restarts_are_invisible():
    assert_invisible_restart(app, kinds=["connect"], restarts=1)


def test_it_fails(hotport_service):
    hotport_service("shop:app")
    assert False
"""


def test_fixtures_serve_restart_and_end(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    (tmp_path / "test_shop.py").write_text(TESTS)
    # By its module: whether the entry point is installed depends on how hotport is.
    plugins = ["-p", "hotport.testing.plugin", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, "--rootdir", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
    )
    assert "1 failed, 3 passed" in result.stdout, result.stdout + result.stderr
    assert "service.starting" in result.stdout, result.stdout


def test_it_costs_nothing_when_it_is_not_used() -> None:
    code = "import hotport.testing.plugin, sys; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    ours = {name for name in result.stdout.split() if name.startswith("hotport")}
    assert ours == {"hotport", "hotport.errors", "hotport.testing", "hotport.testing.plugin"}
    assert {"anyio", "asyncio", "uvloop", "msgspec", "click"}.isdisjoint(result.stdout.split())
