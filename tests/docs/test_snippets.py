"""What README and docs show is true: code is tested code, commands parse, links lead somewhere."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from hotport.cli import _group
from tests.support import DEADLINE_S, Service, http_get

ROOT = Path(__file__).parent.parent.parent
PAGES = (*sorted(ROOT.glob("*.md")), ROOT / "docker" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
EXAMPLES = sorted((ROOT / "docs" / "examples").rglob("*.*"))


#: A line that begins with our command, or one that has a program in front which starts it.
COMMAND = re.compile(r"(?:^\s*|\S (?=hotport (?:serve|restart|undo|reload-tls|status|scale|stop|demo)\b))(hotport .*)")


class Block(NamedTuple):
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            yield Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])


BLOCKS = list(_blocks())
BY_EXAMPLE = "\n".join(path.read_text() for path in EXAMPLES)


def _id(block: Block) -> str:
    return f"{block.page.relative_to(ROOT)}:{block.line}"


def _of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


@pytest.mark.parametrize("block", _of("python"), ids=_id)
def test_python_is_that_of_an_example_or_at_least_python(block: Block) -> None:
    if block.text not in BY_EXAMPLE:
        compile(block.text, _id(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("block", _of("haproxy", "ini", "nginx"), ids=_id)
def test_a_configuration_file_is_that_of_an_example(block: Block) -> None:
    assert block.text in BY_EXAMPLE


@pytest.mark.parametrize("block", _of("sh", "console"), ids=_id)
def test_hotport_commands_parse(block: Block) -> None:
    for command in _commands(block):
        words = shlex.split(command, comments=True)
        name = words[1]
        parent = _group.make_context("hotport", [], resilient_parsing=True)
        found = _group.get_command(parent, name)
        assert found is not None, command
        found.make_context(name, words[2:], parent=parent)


def _commands(block: Block) -> Iterator[str]:
    """Each ``hotport ...`` of a block, alone or behind ``&&``, ``;`` or a program that starts it."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        for part in re.split(r"&&|;|\|", line.removeprefix("$ ")):
            if found := COMMAND.search(part):
                yield found[1].removesuffix("&")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        found = page if not path else page.parent / path
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in headings}, target


def test_the_application_in_the_readme_is_found_and_served(tmp_path: Path) -> None:
    [block] = [block for block in _of("python") if block.page.name == "README.md" and "FastAPI()" in block.text]
    (tmp_path / "main.py").write_text(block.text)
    with Service(tmp_path) as service:
        assert http_get(service.wait_ready().port) == (200, b'{"hello":"world"}')
        assert "hotport serve main:app   (found in main.py)" in service.log()


def test_the_server_in_the_readme_serves(tmp_path: Path) -> None:
    [block] = [block for block in _of("python") if block.page.name == "README.md" and "hotport.run(" in block.text]
    assert block.text == (ROOT / "docs/examples/server.py").read_text()
    (tmp_path / "server.py").write_text(block.text.replace("tcp://127.0.0.1:7000", "unix:s"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "manager"))
        manager.settimeout(DEADLINE_S)
        paths = {"HOTPORT_RUNTIME_DIR": str(tmp_path / "run"), "NOTIFY_SOCKET": str(tmp_path / "manager")}
        environment = {**os.environ, **paths}
        with subprocess.Popen([sys.executable, "server.py"], cwd=tmp_path, env=environment) as process:
            try:
                while b"READY=1" not in manager.recv(4096):
                    pass
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(DEADLINE_S)
                    client.connect(str(tmp_path / "s"))
                    client.sendall(b"hello")
                    assert client.recv(100) == b"hello"
            finally:
                process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0
    (tmp_path / "manager").unlink()
