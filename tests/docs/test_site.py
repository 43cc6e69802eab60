"""The site has every page in its navigation and no dead link, and it is built as ``make docs`` does."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from docs import site
from tests.support import DEADLINE_S, need


def test_every_page_stands_in_the_navigation() -> None:
    text = repr(site.navigation())
    assert [str(page) for page in site.pages() if f"'{page}'" not in text] == []


def test_a_page_outside_of_the_navigation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in site.pages():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text((site.ROOT / page).read_text())
    (tmp_path / "docs" / "how-to" / "lonely.md").write_text("# Lonely")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"in no list of docs/README\.md: docs/how-to/lonely\.md"):
        site.navigation()
    (tmp_path / "docs" / "how-to" / "lonely.md").unlink()
    (tmp_path / "docs" / "how-to" / "tls.md").unlink()
    with pytest.raises(ValueError, match=r"no such page: docs/how-to/tls\.md"):
        site.navigation()


def test_site_is_built_without_a_complaint(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("zensical")
    if not program.exists():
        pytest.skip("zensical is not installed (group docs)")
    config = site.lay_out(tmp_path)
    built = subprocess.run(
        [program, "build", "--strict"], cwd=config.parent, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert built.returncode == 0, built.stdout + built.stderr
    html = tmp_path / "html"
    missing = [page for page in site.pages() if not _place(html, page).is_file()]
    assert missing == []
    assert "needs nothing" in (html / "docs" / "coming-from" / "uvicorn.html").read_text()
    fetched = [path for path in html.rglob("*.html") if 'src="http' in path.read_text()]
    assert fetched == []  # it works without a network


def _place(html: Path, page: Path) -> Path:
    name = "index.html" if page.name == "README.md" else f"{page.stem}.html"
    return html / page.parent / name


def test_configuration_of_the_site_is_toml(tmp_path: Path) -> None:
    project = tomllib.loads(site.lay_out(tmp_path).read_text())["project"]
    assert project["nav"][0] == {"hotport": "README.md"}


def test_man_finds_nothing_wrong_in_the_manual_page() -> None:
    command = [need("man"), "--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l", str(site.ROOT / "docs" / "hotport.1")]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE_S, env={**os.environ, "LC_ALL": "C"}
    )
    assert (shown.returncode, shown.stderr) == (0, "")
