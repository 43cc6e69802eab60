"""The units of the documentation are ones that systemd takes, and the ones that the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, need

ROOT = Path(__file__).parents[2]
UNITS = sorted(path for path in (ROOT / "docs" / "examples" / "systemd").iterdir() if path.suffix != ".conf")

#: What an older systemd says of what it does not know; the page tells what to do there.
UNKNOWN = re.compile(r".*Failed to parse service type, ignoring: notify-reload")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_systemd_finds_nothing_wrong(unit: Path, tmp_path: Path) -> None:
    analyze = need("systemd-analyze")
    for each in UNITS:
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", each.read_text(), flags=re.MULTILINE)
        (tmp_path / each.name.replace("@.", "@blog.")).write_text(text)
    verified = subprocess.run(
        [analyze, "verify", "--man=no", str(tmp_path / unit.name.replace("@.", "@blog."))],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    told = [line for line in verified.stderr.splitlines() if not UNKNOWN.fullmatch(line)]
    assert (verified.returncode, told) == (0, [])


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.suffix == ".service"], ids=lambda unit: str(unit.name))
def test_systemd_finds_it_little_exposed(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name.replace("@.", "@blog.")
    copy.write_text(unit.read_text())
    judged = subprocess.run(
        [need("systemd-analyze"), "security", "--offline=yes", "--threshold=20", "--no-pager", str(copy)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert judged.returncode == 0, judged.stdout + judged.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: str(unit.name))
def test_a_page_shows_it(unit: Path) -> None:
    pages = [page.read_text() for page in (ROOT / "docs" / "how-to").glob("*.md")]
    assert any(f"```ini\n{unit.read_text()}```" in page for page in pages)


def test_the_page_gives_each_line_that_matters_its_reason() -> None:
    page = (ROOT / "docs" / "how-to" / "run-under-systemd.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for key in ("Type", "NotifyAccess", "RuntimeDirectory", "FileDescriptorStoreMax", "KillMode", "WatchdogSec"):
        assert any(row.startswith(f"| `{key}=") for row in rows), key
