"""``hotport migrate`` prints a file that ``hotport serve`` reads, and ``serve`` knows the flags of other servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hotport.options.loading import load
from tests.support import run_here

LINE = "gunicorn -k uvicorn.workers.UvicornWorker -w 3 -b :8001 -D main:app"


def run(directory: Path, *args: str) -> tuple[int, str, str]:
    done = run_here(*args, cwd=directory, env=dict(os.environ))
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words", [[LINE], LINE.split()])
def test_what_migrate_prints_is_read_by_serve(tmp_path: Path, words: list[str]) -> None:
    code, out, err = run(tmp_path, "migrate", *words)
    assert code == 0
    assert tomllib.loads(out) == {"target": "main:app", "bind": ["tcp://0.0.0.0:8001"], "workers": 3}
    assert "# No equal:\n# - -D: a service manager" in out
    assert err == "3 options; 1 without an equal, as comments. Then: hotport serve\n"
    (tmp_path / "hotport.toml").write_text(out)
    assert load(file=None, environ={}, flags={}, cwd=tmp_path).options.workers == 3


def test_migrate_prints_json(tmp_path: Path) -> None:
    told = json.loads(run(tmp_path, "migrate", "--json", LINE)[1])
    assert told["server"] == "gunicorn"
    assert told["options"]["workers"] == 3
    assert [(remark["theirs"], remark["has_no_equal"]) for remark in told["remarks"]] == [("-D", True)]


@pytest.mark.parametrize("line", ["nginx -t", "gunicorn 'app"])
def test_migrate_refuses_what_is_no_line_of_a_server(tmp_path: Path, line: str) -> None:
    code, _, err = run(tmp_path, "migrate", line)
    assert code == 2
    assert err.startswith("HP341")


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (
            "app:app --host 0.0.0.0 --port 80 --uds /run/a --ssl-keyfile k --ssl-certfile c --proxy-headers "
            "--env-file .env --reload",
            "unknown flag --host",
            "hotport serve app:app --bind unix:/run/a --tls-cert c --tls-key k --env-file .env --watch",
        ),
        ("app:app -w 4 -k asgi", "unknown flag -w", "hotport serve app:app --workers 4"),
        (
            "app:app -c conf.py -w 2",
            "unknown flag -c",
            "hotport migrate 'gunicorn app:app -c conf.py -w 2' >hotport.toml && hotport serve",
        ),
        (
            "app:app --access-log",
            "--access-log cannot be used like this",
            "hotport serve app:app --access-log combined",
        ),
        ("app:app --loop auto", "--loop cannot be used like this", "hotport serve app:app"),
        ("app:app --wokers 3", "unknown flag --wokers", "hotport serve --help"),
        (
            "app:app --config gunicorn.conf.py",
            "cannot read gunicorn.conf.py",
            "hotport migrate 'gunicorn -c gunicorn.conf.py app:app' >hotport.toml && hotport serve",
        ),
    ],
)
def test_serve_answers_to_flags_of_others_with_the_line_to_paste(
    tmp_path: Path, words: str, what: str, fix: str
) -> None:
    code, out, err = run(tmp_path, "serve", *words.split())
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0].partition(" ")[2] == what
    assert lines[2] == f"  try:   {fix}"


@pytest.mark.parametrize("words", ["app:app --log-level foo", "app:app --max-requests"])
def test_serve_refuses_what_no_server_takes(tmp_path: Path, words: str) -> None:
    code, _, err = run(tmp_path, "serve", *words.split())
    assert code == 2
    assert "Error:" in err


def test_serve_loads_no_table_of_others_unless_a_flag_is_unknown(tmp_path: Path) -> None:

    code = (
        "import sys; from hotport.cli.serve import command; "
        "command.main(['--show-config', 'app:app'], standalone_mode=False); "
        "print([name for name in sys.modules if name.startswith('hotport.migrate')])"
    )
    asked = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert asked.stdout.splitlines()[-1] == "[]"
