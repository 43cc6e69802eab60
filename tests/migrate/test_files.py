"""Configuration files of other servers are read as these read them, and a bad one costs an error and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hotport.errors import ConfigError
from hotport.migrate import files
from hotport.migrate.translate import translate_line

GUNICORN = """\
import multiprocessing, os
print("a line on stdout")
workers = multiprocessing.cpu_count() * 0 + 5
bind = ["0.0.0.0:" + os.environ.get("NO_SUCH_PORT", "80"), "unix:a.sock"]
worker_class = "uvicorn.workers.UvicornWorker"
umask = 0o007
timeout = 120
preload_app = True
reload = False
wsgi_app = "main:app"
accesslog = None
raw_env = ["A=1", "B=2"]
helper = object()
def post_fork(server, worker): pass
"""


def migrated(directory: Path, *line: str) -> dict[str, object]:
    return translate_line(line, directory).native()


def test_a_python_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(GUNICORN)
    found = translate_line(["gunicorn", "-c", "conf.py", "-w", "7"], tmp_path)
    assert found.native() == {
        "target": "main:app",
        "bind": ["tcp://0.0.0.0:80", "unix:a.sock"],
        "socket_mode": "0770",
        "workers": 7,  # the command line is stronger
        "preload": True,
        "hang_timeout": "2m",
    }
    assert {remark.theirs for remark in found.remarks} == {"raw_env = 'A=1'", "raw_env = 'B=2'", "post_fork()"}


def test_gunicorns_usual_file_needs_no_flag(tmp_path: Path) -> None:
    (tmp_path / "gunicorn.conf.py").write_text("workers = 3")
    assert migrated(tmp_path, "gunicorn", "-k", "asgi", "app:app")["workers"] == 3


def test_a_module_and_a_file_by_its_scheme_are_read(tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text("workers = 3")
    for name in ("python:settings", "file:settings.py"):
        assert migrated(tmp_path, "gunicorn", "-c", name, "-k", "asgi", "app:app")["workers"] == 3


def test_hypercorns_toml_is_read(tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text('\ufeffbind = ["0.0.0.0:80"]\nkeep_alive_timeout = 7\nmystery = 1\n')
    found = translate_line(["hypercorn", "-c", "h.toml", "app:app"], tmp_path)
    assert found.native() == {"target": "app:app", "bind": ["tcp://0.0.0.0:80"], "keep_alive": "7s"}
    assert [remark.theirs for remark in found.remarks] == ["mystery"]


@pytest.mark.parametrize("line", [["--ini", "u.ini"], ["u.ini"]])
def test_uwsgis_ini_is_read(tmp_path: Path, line: list[str]) -> None:
    (tmp_path / "u.ini").write_text("[uwsgi]\nhttp-socket = :80\nmodule = app:app\nmaster = true\nprocesses = 4\n")
    assert migrated(tmp_path, "uwsgi", *line) == {"target": "app:app", "bind": ["tcp://0.0.0.0:80"], "workers": 4}


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("conf.py", "raise RuntimeError('no')", "its code failed: RuntimeError: no"),
        ("conf.py", "import sys; sys.exit(3)", "its code failed"),
        ("conf.py", "workers = (", "its code failed: SyntaxError"),
        ("conf.toml", "workers = ", "Invalid value"),
        ("conf.ini", "[other]\nworkers = 1", "no section [uwsgi]"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, text: str, cause: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="HP340") as caught:
        files.read_settings(name, tmp_path)
    assert cause in caught.value.cause


@pytest.mark.parametrize("name", ["missing.py", "fifo.py", "large.py", "python:missing"])
def test_what_is_no_file_is_an_error(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "fifo.py")
    (tmp_path / "large.py").write_bytes(b"#" * (files.FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="HP340"):
        files.read_settings(name, tmp_path)


def test_code_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "READ_TIMEOUT_S", 0.5)
    (tmp_path / "conf.py").write_text("import subprocess; subprocess.run(['sleep', '1000'])")
    with pytest.raises(ConfigError, match="still ran"):
        files.read_settings("conf.py", tmp_path)
