"""``hotport serve`` without arguments takes the application that a reader would take."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hotport.cli._find import FILE_BYTES_MAX, find_target
from hotport.cli.serve import _whole_line
from tests.support import run_here


def write(directory: Path, **files: str) -> None:
    for name, text in files.items():
        path = directory / (name.replace("__", "/") + ".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "app = FastAPI()",
        "app: FastAPI = fastapi.FastAPI()",
        "async def app(scope, receive, send): ...",
        "from shop import app",
        "from shop import site as app",
        "try:\n    app = make()\nexcept OSError:\n    raise",
        "if True:\n    app = make()",
        "app = Middleware(app)",
        "import typer\napp = FastAPI()",
    ],
)
def test_an_application_is_found(tmp_path: Path, text: str) -> None:
    write(tmp_path, main=text)
    assert find_target(tmp_path) == ("main:app", "main.py", ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "app = typer.Typer()",
        "app = None",
        "async def app(): ...",
        "if __name__ == '__main__':\n    app = FastAPI()",
        "def main(): app = FastAPI()",
        "app = (",
        "#" * (FILE_BYTES_MAX + 1),
    ],
)
def test_what_serves_nothing_is_not_taken(tmp_path: Path, text: str) -> None:
    write(tmp_path, main=text)
    assert find_target(tmp_path) is None


def test_first_file_is_taken_and_others_are_named(tmp_path: Path) -> None:
    write(tmp_path, main="app = FastAPI()", app="app = FastAPI()", mysite__asgi="application = get()")
    assert find_target(tmp_path) == ("app:app", "app.py", ("main.py", "mysite/asgi.py"))


def test_djangos_entry_is_found(tmp_path: Path) -> None:
    write(tmp_path, manage="", mysite__asgi="application = get_asgi_application()")
    assert find_target(tmp_path) == ("mysite.asgi:application", "mysite/asgi.py", ())


def test_serve_says_what_it_took(tmp_path: Path) -> None:
    write(tmp_path, main="app = FastAPI()")
    done = run_here("serve", "--show-config", cwd=tmp_path, env=dict(os.environ))
    assert done.stderr == "hotport serve main:app   (found in main.py)\n"
    assert 'target                = "main:app"' in done.stdout


def test_a_target_in_the_file_of_options_is_stronger(tmp_path: Path) -> None:
    write(tmp_path, main="app = FastAPI()")
    (tmp_path / "hotport.toml").write_text('target = "shop:app"')
    done = run_here("serve", "--show-config", cwd=tmp_path, env=dict(os.environ))
    assert done.stderr == ""
    assert '"shop:app"' in done.stdout


@pytest.mark.parametrize(
    ("fix", "words", "line"),
    [
        ("--bind :81", ["app:app"], "hotport serve app:app --bind :81"),
        ("--bind :81", ["app:app", "--bind", ":80", "--watch"], "hotport serve app:app --watch --bind :81"),
        ("--bind :81", ["app:app", "--bind=:80"], "hotport serve app:app --bind :81"),
        ("--bind :81", ["--bind", ":80", "--bind", ":90"], "--bind :81"),
        ("--bind :81", ["--", "./server"], "--bind :81"),
        ("--watch", ["app:app"], "hotport serve app:app --watch"),
        ("kill 7", ["app:app"], "kill 7"),
        ("", ["app:app"], ""),
    ],
)
def test_a_fix_of_one_flag_becomes_a_line(fix: str, words: list[str], line: str) -> None:
    assert _whole_line(fix, words) == line
