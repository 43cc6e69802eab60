"""Lay out the documentation for the site: ``python -m docs.site``; ``make docs`` then builds it with zensical.

The pages are linked as they lie in the repository, so they are copied as they lie there, with what they link to. The
navigation is that of ``docs/README.md``: what stands in none of its lists is an error, and so is a link into the void.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Final

__all__ = ["ROOT", "lay_out", "navigation", "pages"]

ROOT: Final = Path(__file__).parent.parent
BUILD: Final = ROOT / "build" / "site"

#: Where a site begins and what stands beside the documentation.
HOME: Final = {"hotport": "README.md", "Documentation": "docs/README.md"}
PROJECT: Final = {"Changelog": "CHANGELOG.md", "Contributing": "CONTRIBUTING.md", "Security": "SECURITY.md"}

#: ``[text](target)``, or a picture.
LINK: Final = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    """Every page, relative to the repository."""
    found = [ROOT / path for path in (*HOME.values(), *PROJECT.values(), "docker/README.md")]
    found += [path for path in sorted((ROOT / "docs").rglob("*.md")) if path not in found]
    return [path.relative_to(ROOT) for path in found]


def navigation() -> list[dict[str, object]]:
    """The navigation: the sections of ``docs/README.md`` and their links, in order.

    Raises:
        ValueError: A page stands in none of them, or a link leads to no page.
    """
    text = (ROOT / "docs" / "README.md").read_text()
    sections: list[dict[str, object]] = []  # a name, and a page or a list of such
    listed = {Path(path) for path in (*HOME.values(), *PROJECT.values())}
    for title, body in re.findall(r"^\*\*(.+?)\*\*(.*?)(?=^\*\*|\Z)", text, re.MULTILINE | re.DOTALL):
        entries = []
        for _, name, target in LINK.findall(body):
            path = Path("docs", target)
            if target.endswith(".md") and path not in listed:
                listed.add(path)
                entries.append({name: str(path)})
        sections.append({title: entries})
    listed.add(Path("docker/README.md"))
    project = {**PROJECT, "Image": "docker/README.md"}
    sections.append({"Project": [{name: path} for name, path in project.items()]})
    if missing := [str(path) for path in pages() if path not in listed]:
        raise ValueError(f"in no list of docs/README.md: {', '.join(missing)}")
    if dead := [str(path) for path in listed if not (ROOT / path).is_file()]:
        raise ValueError(f"no such page: {', '.join(dead)}")
    home: list[dict[str, object]] = [{name: path} for name, path in HOME.items()]
    return home + sections


def lay_out(build: Path = BUILD) -> Path:
    """Copy the pages and their pictures, and write the configuration of the site; returns its path."""
    source = build / "pages"
    shutil.rmtree(source, ignore_errors=True)
    for page in pages():
        place = source / page
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(LINK.sub(partial(_linked, page=page, source=source), (ROOT / page).read_text()))
    config = build / "zensical.toml"
    config.write_text(CONFIG.replace("NAVIGATION", _toml(navigation())))
    return config


def _linked(link: re.Match[str], *, page: Path, source: Path) -> str:
    """A link as the site has it: pictures are copied, and what is no page is shown as its path."""
    is_picture, text, target = link.groups()
    if "://" in target or target.startswith("#"):
        return link[0]
    path = (ROOT / page.parent / target.partition("#")[0]).resolve().relative_to(ROOT)
    if is_picture:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
        return link[0]
    return link[0] if path in pages() else f"{text} (`{path}`)"


def _toml(value: object) -> str:
    match value:
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            return f"{{ {', '.join(f'{json.dumps(key)} = {_toml(each)}' for key, each in value.items())} }}"
    return json.dumps(value, ensure_ascii=False)


CONFIG: Final = """\
[project]
site_name = "hotport"
site_description = "An asyncio server whose restarts no connection notices"
docs_dir = "pages"
site_dir = "html"
use_directory_urls = false
nav = NAVIGATION

[project.theme]
language = "en"
font = false
features = [
  "content.code.copy", "navigation.footer", "navigation.path", "navigation.sections",
  "navigation.top", "search.highlight",
]

[[project.theme.palette]]
media = "(prefers-color-scheme: light)"
scheme = "default"
toggle.icon = "lucide/sun"
toggle.name = "Switch to dark mode"

[[project.theme.palette]]
media = "(prefers-color-scheme: dark)"
scheme = "slate"
toggle.icon = "lucide/moon"
toggle.name = "Switch to light mode"

[project.validation]
invalid_links = true
"""


def main() -> int:
    """Lay the site out, or say what is wrong."""
    try:
        print(lay_out())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
