"""``hotport churn``: against hotport through restarts, against a server that fails, and with whatever users type."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import (
    DEADLINE_S,
    HOTPORT,
    LIFESPAN_AND_ECHO,
    RESTARTS,
    SLOWNESS,
    Service,
    assert_three_lines,
    eventually,
    run_here,
    write_code,
)
from tests.tls_support import Pki

APP = (
    """\
import asyncio

async def app(scope, receive, send):
"""
    + LIFESPAN_AND_ECHO
    + """\
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})
"""
)

ECHO = """\
async def app(stream):
    while data := await stream.receive():
        await stream.send(data)
"""

CLIENTS = (
    *("--connect", "10/s", "--keepalive", "5", "--late", "4/s", "--halfhead", "4/s", "--slow", "4/s"),
    *("--upload", "4/s", "--websocket", "5", "--slow-time", "300ms"),
)
LIGHT = ("--connect", "20/s", "--duration", "500ms", "--timeout", "2s")


def churn(*args: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HOTPORT, "churn", *args],
        env={**os.environ, **(env or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_S,
    )


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that reads something, says this, and closes; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:  # shut down
                    return
                with sock:
                    if sock.recv(65536):
                        sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(DEADLINE_S)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"


@pytest.fixture
def url() -> Iterator[str]:
    """A server at which nothing is wrong."""
    with answering(OK) as url:
        yield url


def count(result: Any, what: str) -> int:
    return sum(fates.get(what, 0) for fates in result["totals"].values())


def churn_hotport(service: Service, url: str, *clients: str) -> Any:
    """`RESTARTS` restarts of a service under load: nothing is lost, and clients that keep a connection have kept it."""
    result = service.run(
        *("churn", url, *clients, "--hotport", service.name, "--engines", "2", "--seed", "7"),
        *("--after", "500ms", "--every", "4s", "--times", str(RESTARTS)),
        *("--json", "run.json", "--html", "run.html"),
        timeout_s=2 * DEADLINE_S + 20 * SLOWNESS * RESTARTS,
    )
    found = json.loads((service.directory / "run.json").read_text())
    assert [incident for incident in found["incidents"] if incident["fate"] != "late"] == []
    # On a machine that is busy with other things the clients may be late themselves: then nothing is proven.
    assert result.returncode == 0 or not found["verdict"]["is_valid"], result.stdout + result.stderr
    assert [mark["outcome"] for mark in found["restarts"]] == ["done"] * RESTARTS
    assert [mark["report"]["generation"] for mark in found["restarts"]] == list(range(2, RESTARTS + 2))
    assert f"{RESTARTS} restarts" in result.stdout
    for load in found["loads"]:
        if load["count"]:
            seen = found["totals"][load["kind"]]
            assert seen["connected"] == load["count"]
            assert set(seen) <= {"answered", "late", "connected"}, "nothing was closed, and nobody has reconnected"
    return found


@pytest.mark.soak
@pytest.mark.timeout(180 * SLOWNESS + 30 * SLOWNESS * RESTARTS)
def test_restarts_of_hotport_lose_nothing_and_no_connection(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", APP)
    options = ("--workers", "2", "--drain-timeout", "1m", "--handoff", "websocket")
    with Service(tmp_path, "app:app", *options).wait_ready() as service:
        found = churn_hotport(service, f"http://127.0.0.1:{service.port}/", *CLIENTS)
    assert all(gap is not None for gap in found["accept_gap_ms"])
    assert set(found["totals"]) == {load["kind"] for load in found["loads"]}
    for mark in found["restarts"]:
        fates = mark["report"]["connections"]
        assert fates["moved_websocket"] == 5
        assert fates["moved_http"] >= 5
        assert set(fates) <= {"moved_websocket", "moved_http", "finished"}, "nobody was told to close"
    assert (tmp_path / "run.html").read_text().lower().startswith("<!doctype html>")


@pytest.mark.soak
@pytest.mark.timeout(180 * SLOWNESS + 30 * SLOWNESS * RESTARTS)
def test_restarts_of_hotport_keep_streams(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", f"import hotport\n\n@hotport.restartable\n{ECHO}")
    with Service(tmp_path, "app:app", "--workers", "2", "--drain-timeout", "1m").wait_ready() as service:
        found = churn_hotport(service, f"tcp://127.0.0.1:{service.port}", "--stream", "20")
    assert [mark["report"]["connections"] for mark in found["restarts"]] == [{"moved_stream": 20}] * RESTARTS


def test_a_status_that_was_not_expected_is_a_loss() -> None:
    with answering(OK.replace(b"200 OK", b"503 Service Unavailable")) as url:
        result = churn(url, *LIGHT, "--json", "-")
    found = json.loads(result.stdout)
    assert count(found, "wrong status") > 0
    assert count(found, "answered") == 0
    assert result.returncode == found["verdict"]["exit_code"] == (1 if found["verdict"]["is_valid"] else 2)
    assert "wrong status" in result.stderr


def test_an_answer_that_ends_in_the_middle_is_truncated() -> None:
    with answering(OK[:-1]) as url:
        found = json.loads(churn(url, *LIGHT, "--json", "-").stdout)
    assert count(found, "truncated") > 0
    assert count(found, "answered") == 0


def test_who_has_answered_is_told_by_whatever_header_says_it() -> None:
    with answering(OK.replace(b"\r\n\r\n", b"\r\nX-Served-By: pid 7\r\n\r\n")) as url:
        found = json.loads(churn(url, *LIGHT, "--who-header", "X-Served-By", "--json", "-").stdout)
    assert {name for bucket in found["buckets"] for name in bucket["answered_by"]} == {"pid 7"}


@pytest.mark.measured
def test_a_loss_may_be_allowed() -> None:
    with answering(b"") as url:
        found = json.loads(churn(url, *LIGHT, "--json", "-", "--allow", "Closed_Unanswered=*, refused=3").stdout)
    assert count(found, "closed unanswered") > 0
    assert found["verdict"]["is_clean"]
    assert found["verdict"]["allowed"] == {"closed unanswered": None, "refused": 3}


@pytest.mark.measured
def test_without_any_kind_the_usual_clients_are_named(url: str) -> None:
    result = churn(url, "--duration", "200ms", "--slow-time", "50ms")
    assert "the usual clients: --connect 50/s --keepalive 20 --late 5/s --halfhead 5/s" in result.stderr


def test_interrupting_tells_what_was_seen(url: str, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            *HOTPORT,
            "churn",
            url,
            "--connect",
            "20/s",
            "--duration",
            "1h",
            "--restart",
            "touch begun; sleep 1000",
            "--after",
            "200ms",
            "--json",
            "run.json",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually((tmp_path / "begun").exists, "the restart has begun")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, out + err
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["is_partial"]
    assert [mark["detail"] for mark in found["restarts"]] == ["interrupted"]
    assert "ended early" in out


@pytest.mark.measured
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_full_disk_under_the_output_is_no_traceback_and_reports_are_written(
    url: str, stream: str, tmp_path: Path
) -> None:
    with open("/dev/full", "w") as full:
        out: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: full}
        # Without a kind of client there is something to be said on stderr before the load.
        kinds = LIGHT[:2] if stream == "stdout" else ()
        result = subprocess.run(
            [*HOTPORT, "churn", url, *kinds, *LIGHT[2:], "--json", "run.json", "--html", "run.html"],
            cwd=tmp_path,
            text=True,
            timeout=DEADLINE_S,
            **out,
        )
    assert result.returncode == 2
    if stream == "stdout":
        assert_three_lines(result.stderr, "HP336")
        assert json.loads((tmp_path / "run.json").read_text())["format"] == 1
        assert (tmp_path / "run.html").exists()


def test_full_disk_under_one_report_keeps_no_other_from_being_written(url: str, tmp_path: Path) -> None:
    result = churn(url, *LIGHT, "--json", "/dev/full", "--html", "run.html", cwd=tmp_path)
    assert result.returncode == 2
    assert "HP712 could not write /dev/full" in result.stderr
    assert "attempts" in result.stdout
    assert (tmp_path / "run.html").exists()


def test_long_restart_has_its_time_without_a_duration(url: str) -> None:
    restarts = ("--restart", "sleep 2", "--times", "1", "--after", "100ms", "--every", "200ms")
    found = json.loads(churn(url, "--connect", "20/s", *restarts, "--json", "-").stdout)
    (mark,) = found["restarts"]
    assert mark["outcome"] == "done"
    assert mark["ended_ms"] + 2000 <= found["duration_ms"] < 60_000
    assert sum(sum(bucket["lag"].values()) for bucket in found["buckets"]) > 0


def test_reports_keep_what_was_there_until_they_are_whole(url: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("before")
    (tmp_path / "run.json").chmod(0o640)
    result = churn(url, *LIGHT, "--json", "run.json", cwd=tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["format"] == 1, result.stderr
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.measured
def test_a_full_disk_is_told_after_the_verdict(url: str) -> None:
    result = churn(url, *LIGHT, "--json", "/dev/full")
    assert result.returncode == 2
    assert "nothing lost" in result.stdout
    assert "HP712 could not write /dev/full" in result.stderr
    assert "ENOSPC" in result.stderr


# -- what is found before anything begins -------------------------------------------------------------------


def refused(*args: str) -> str:
    result = run_here("churn", *args, cwd=Path.cwd(), env=os.environ)
    assert result.returncode == 2, result.stdout + result.stderr
    assert not result.stdout
    return result.stderr


@pytest.mark.parametrize(
    ("given", "cause", "fix"),
    [
        ("127.0.0.1:8000", "does not say what is spoken", "hotport churn http://127.0.0.1:8000"),
        ("htpp://a:1/", "'htpp' is not one of", "hotport churn http://a:1/"),
        ("tcp://localhost", "names no port", "tcp://localhost:8000"),
        ("http://", "names no host", "hotport churn http://"),
        ("http://a:99999/", "ort", "hotport churn http://"),
        ("http://[::1/", "IPv6", "hotport churn http://"),
        ("unix:", "1 to 107 bytes", "unix:run/app.sock"),
    ],
)
def test_what_is_no_target_is_refused(given: str, cause: str, fix: str) -> None:
    said = refused(given)
    assert_three_lines(said, "HP701")
    assert cause in said.split("\n")[1]
    assert fix in said.split("\n")[2]


def test_an_unknown_host_is_refused() -> None:
    assert_three_lines(refused("http://no-such-host.invalid/"), "HP702")


def test_a_target_that_nobody_serves_is_refused(tmp_path: Path) -> None:
    with socket.socket() as sock:  # bound, and nobody listens: it stays refused
        sock.bind(("127.0.0.1", 0))
        said = refused(f"http://127.0.0.1:{sock.getsockname()[1]}/")
    assert_three_lines(said, "HP703")
    assert "ECONNREFUSED" in said
    assert_three_lines(refused(f"unix:{tmp_path}/no.sock"), "HP703")


@pytest.mark.measured
def test_tls_must_be_spoken_and_trusted(tmp_path: Path, url: str) -> None:
    pki = Pki(tmp_path)
    write_code(tmp_path / "app.py", APP)
    with Service(tmp_path, "app:app", "--tls-cert", pki.issue("server.pem", "localhost")) as service:
        service.wait_ready()
        https = f"https://localhost:{service.port}/"
        said = refused(https)
        light = ("--tls", "10/s", "--connect", "10/s", "--duration", "1s", "--json", "-")
        insecure = json.loads(churn(https, *light, "--insecure").stdout)
        trusted = json.loads(churn(https, *light, env={"SSL_CERT_FILE": str(pki.ca)}).stdout)
    assert_three_lines(said, "HP713")
    assert "--insecure" in said
    for found in (insecure, trusted):
        assert found["verdict"]["is_clean"]
        assert count(found, "answered") + count(found, "late") > 0  # a busy machine is no failure
    assert_three_lines(refused(url.replace("http:", "https:")), "HP713")


def test_streams_and_datagrams_are_echoed(tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        stop = threading.Event()

        def echo() -> None:
            while not stop.is_set():
                data, peer = sock.recvfrom(2048)
                sock.sendto(data, peer)

        thread = threading.Thread(target=echo)
        thread.start()
        port = sock.getsockname()[1]
        found = json.loads(churn(f"udp://127.0.0.1:{port}", "--duration", "300ms", "--json", "-").stdout)
        stop.set()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", port))
        thread.join(DEADLINE_S)
    assert found["verdict"]["is_clean"]
    assert count(found, "answered") > 0
    write_code(tmp_path / "app.py", ECHO)
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        tcp = f"tcp://127.0.0.1:{service.port}"
        found = json.loads(churn(tcp, "--stream", "3", "--duration", "300ms", "--json", "-").stdout)
    assert found["verdict"]["is_clean"]
    assert count(found, "answered") > 0


@pytest.mark.measured
def test_a_descriptor_limit_says_what_would_fit(url: str) -> None:
    result = subprocess.run(
        [
            "sh",
            "-c",
            'ulimit -n 200 && exec "$@"',
            "sh",
            *HOTPORT,
            "churn",
            url,
            "--keepalive",
            "500",
            "--engines",
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert result.returncode == 2
    assert_three_lines(result.stderr, "HP704")
    assert "168 connections would fit" in result.stderr
    assert "--engines 3" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--connect", "200"), "HP705", "200/s"),
        (("--connect", "0/s"), "HP705", "200/s"),
        (("--keepalive", "50/s"), "HP705", "by number"),
        (("--duration", "soon"), "HP706", "30s"),
        (("--restart-timeout", "-1"), "HP706", "30s"),
        (("--signal", "HIP", "--pid", "2"), "HP706", "HUP"),
        (("--allow", "refuse=3"), "HP707", "did you mean 'refused'"),
        (("--allow", "bananas=3"), "HP707", "fates are refused"),
        (("--allow", "refused"), "HP707", "needs a number"),
        (("--datagram", "10/s"), "HP708", "connect"),
        (("--tls", "10/s"), "HP708", "connect"),
        (("--restart", "true", "--hotport", "app"), "HP709", "one of"),
        (("--signal", "HUP"), "HP709", "--pid"),
        (("--pid", "4711"), "HP709", "--signal"),
        (("--hotport", "nobody"), "HP605", "no service"),
        (("--signal", "HUP", "--pid-file", "/no/such.pid"), "HP714", "ENOENT"),
        (("--json", "/no/such/directory/run.json"), "HP711", "ENOENT"),
        (("--html", "/"), "HP711", "EISDIR"),
    ],
)
def test_what_cannot_be_is_said_before_anything_begins(
    url: str, tmp_path: Path, args: tuple[str, ...], code: str, words: str
) -> None:
    result = run_here("churn", url, *args, cwd=tmp_path, env={**os.environ, "HOTPORT_RUNTIME_DIR": str(tmp_path)})
    assert result.returncode in {2, 6}
    said = result.stderr[result.stderr.index("HP") :]
    assert_three_lines(said, code)
    assert words in said


def test_an_unknown_kind_has_a_near_one() -> None:
    assert "--keepalive" in refused("http://127.0.0.1:1/", "--keepalives", "5")
