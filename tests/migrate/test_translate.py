"""Command lines of other servers become options that hotport takes, and nothing of them is lost silently."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from hotport.errors import ConfigError
from hotport.migrate.peers import PEERS
from hotport.migrate.table import Peer
from hotport.migrate.translate import Translation, recognise, translate_line
from hotport.options.loading import load


def translated(line: str, directory: Path = Path("/nonexistent")) -> Translation:
    found = translate_line(shlex.split(line), directory)
    if "target" in found.options:
        load(file=None, environ={}, flags=found.native(), cwd=Path("/nonexistent"))
    return found


@pytest.mark.parametrize(
    ("line", "here"),
    [
        ("uvicorn app:app", "app:app"),
        ("uvicorn app:app --host 0.0.0.0", "app:app --bind 0.0.0.0:8000"),
        ("uvicorn app:app --port=80", "app:app --bind 127.0.0.1:80"),
        ("uvicorn app:app --host :: --port 80", "app:app --bind '[::]:80'"),
        ("uvicorn app:app --uds /run/a.sock --port 80", "app:app --bind unix:/run/a.sock"),
        ("uvicorn app:app --fd 3", "app:app --bind fd://3"),
        ("uvicorn main:make --factory --app-dir src", "main:make --factory --app-dir src"),
        ("uvicorn app:app --reload --reload-dir src --reload-include '*.html'",
         "app:app --watch --watch-path src --watch-include '*.html'"),
        ("uvicorn app:app --reload-dir src", "app:app"),
        ("uvicorn app:app --ssl-keyfile k --ssl-certfile c", "app:app --tls-cert c --tls-key k"),
        ("uvicorn app:app --forwarded-allow-ips '10.0.0.1, ::1'", "app:app --trusted-proxy 10.0.0.1,::1"),
        ("uvicorn app:app --no-proxy-headers", "app:app --trusted-proxy 192.0.2.1"),
        ("uvicorn app:app --no-server-header --no-access-log", "app:app --no-server-header --access-log off"),
        ("uvicorn app:app --log-level trace --loop auto", "app:app --log-level debug"),
        ("uvicorn app:app --ws-per-message-deflate false", "app:app --no-ws-deflate"),
        ("gunicorn -w4 -k asgi -b :80 app:app", "app:app --bind :80 --workers 4"),
        ("gunicorn -k uvicorn_worker.UvicornWorker -b 0.0.0.0 app", "app:application --bind 0.0.0.0:8000"),
        ("gunicorn -k asgi -b unix:a.sock -m 007 app:app", "app:app --bind unix:a.sock --socket-mode 0770"),
        ("gunicorn -k asgi -b :80 -m 007 app:app", "app:app --bind :80"),
        ("gunicorn -k asgi --proxy-protocol app:app", "app:app --proxy-protocol"),
        ("gunicorn -k asgi --proxy-protocol v2 app:app", "app:app --proxy-protocol"),
        ("gunicorn -k asgi --proxy-protocol off app:app", "app:app"),
        ("gunicorn -k asgi --reload --reload-extra-file a.yaml app:app",
         "app:app --watch --watch-path .,a.yaml"),
        ("gunicorn -k asgi --keyfile k --certfile c --ca-certs a --cert-reqs 1 app:app",
         "app:app --tls-cert c --tls-key k --tls-client-ca a --tls-client-auth optional"),
        ("gunicorn -k asgi --max-requests-jitter 5 app:app", "app:app"),
        ("gunicorn -k asgi -u www-data -g www-data -n my.site app:app",
         "app:app --name my.site --user www-data --group www-data"),
        ("gunicorn -k asgi 'app:make()'", "app:make --factory"),
        ("/usr/bin/env A=1 python3 -m gunicorn -k asgi app:app", "app:app"),
        ("hypercorn app:app -b 0.0.0.0:80 -b unix:a.sock -m 7 -k uvloop",
         "app:app --bind 0.0.0.0:80 --bind unix:a.sock --socket-mode 0770 --loop uvloop"),
        ("hypercorn app:app --verify-mode CERT_REQUIRED --ca-certs a --certfile c",
         "app:app --tls-cert c --tls-client-ca a --tls-client-auth required"),
        ("granian --interface asgi app:app --http1-header-read-timeout 1500 --workers-max-rss 100",
         "app:app --head-timeout 1.5 --max-memory 100M"),
        ("granian --interface asgi app:app --no-http1-keep-alive --workers-lifetime 6h",
         "app:app --keep-alive 0 --max-age 6h"),
        ("granian --interface asgi app:app --metrics", "app:app --status-bind 127.0.0.1:9090"),
        ("granian --interface asgi app:app --metrics-port 1 --metrics", "app:app --status-bind 127.0.0.1:1"),
        ("uwsgi --http :80 -w app --callable site -H /venv",
         "app:site --bind :80 --python /venv/bin/python"),
    ],
)  # fmt: skip
def test_a_line_becomes_one_of_ours(line: str, here: str) -> None:
    assert translated(line).command() == f"hotport serve {here}"


@pytest.mark.parametrize(
    ("line", "theirs", "why"),
    [
        ("uvicorn app:app --log-config x.ini", "--log-config x.ini", "the application configures its logging"),
        ("uvicorn app:app --frobnicate", "--frobnicate", "does not know this option of uvicorn"),
        ("uvicorn app:app --workers many", "--workers many", "`workers` cannot be 'many': it must be a whole number"),
        ("uvicorn app:app --loop zuvloop", "--loop zuvloop", "uvloop or asyncio"),
        ("uvicorn app:app other:app", "other:app", "one service serves one application"),
        ("gunicorn app:app", "app:app", "WSGIMiddleware(app)"),
        ("gunicorn -k gevent app:app", "-k gevent", "no worker class gevent"),
        ("gunicorn -k asgi -g staff app:app", "-g staff", "without `user`"),
        ("gunicorn -k asgi -b 1.2.3.4:x app:app", "-b 1.2.3.4:x", "'x' is not a port number"),
        ("gunicorn -k asgi -w '$(nproc)' app:app", "-w '$(nproc)'", "between double quotes"),
        ("granian app:app --http 2 --interface asgi", "--http 2", "HTTP/1.1"),
        ("granian app:app --interface rsgi", "--interface rsgi", "must be ASGI"),
        ("env KEY=1 uvicorn app:app", "KEY=1", "env_file"),
    ],
)
def test_what_has_no_equal_is_said(line: str, theirs: str, why: str) -> None:
    [remark] = [remark for remark in translated(line).remarks if remark.theirs == theirs]
    assert remark.is_lost
    assert why in remark.why


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_flag_is_taken_or_remarked(peer: Peer) -> None:
    for row in peer.rows:
        for flag in row.flags.split():
            if row.how not in {"config", "callable"}:
                given = [flag, "1"] if row.takes_value else [flag]
                found = translate_line([peer.name, *given, "x.asgi:app"], Path("/nonexistent"))
                assert row.here in found.options or found.remarks, flag


def test_django_is_taken_by_its_asgi_entry(tmp_path: Path) -> None:
    (tmp_path / "mysite").mkdir()
    (tmp_path / "mysite" / "asgi.py").touch()
    found = translated("gunicorn mysite.wsgi -w 2", tmp_path)
    assert found.command() == "hotport serve mysite.asgi:application --workers 2"
    [remark] = found.remarks
    assert not remark.is_lost


def test_a_line_without_a_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="HP341"):
        translate_line(["nginx", "-t"], Path())


@pytest.mark.parametrize(
    ("words", "unknown", "here"),
    [
        ("app:app --host :: --drain-timeout 3", "--host", "app:app --bind '[::]:8000' --drain-timeout 3"),
        ("app:app -w 4 -k uvicorn.workers.UvicornWorker", "-w", "app:app --workers 4"),
        ("a:a -w 4 --access-log structured --no-guard", "-w", "a:a --workers 4 --access-log structured --no-guard"),
        ("app:app --port 1 --access-log --watch", "--port", "app:app --bind 127.0.0.1:1 --watch --access-log combined"),
        ("mysite.wsgi -w 4", "-w", "mysite.wsgi:application --workers 4"),
    ],
)  # fmt: skip
def test_flags_of_others_beside_ours_are_recognised(words: str, unknown: str, here: str) -> None:
    found = recognise(shlex.split(words), unknown, Path("/nonexistent"))
    assert found is not None
    assert found.command() == f"hotport serve {here}"


def test_a_flag_of_no_server_is_not_recognised() -> None:
    assert recognise(["app:app", "--wrokers", "3"], "--wrokers", Path()) is None
