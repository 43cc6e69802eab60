"""HTTPS services: real peers, restarts that nobody notices, certificates that are renewed."""

from __future__ import annotations

import asyncio
import http.client
import json
import signal
import subprocess
import threading
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest

from hotport.wire.messages import ReloadTlsRequest, Report, RestartRequest, TlsReport
from tests.support import (
    DEADLINE_S,
    RESTARTS,
    SLOWNESS,
    Answer,
    Gate,
    Hammer,
    Service,
    assert_three_lines,
    eventually,
    need,
    write_code,
)
from tests.tls_support import Pki, connect, serial

APP = """
import os

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        {startup}
        await receive()
        await send({{"type": "lifespan.startup.complete"}})
        await receive()
        await send({{"type": "lifespan.shutdown.complete"}})
        return
    size = 0
    while True:
        message = await receive()
        size += len(message["body"])
        if not message["more_body"]:
            break
    body = f"{version} {{os.environ['HOTPORT_GENERATION']}} {{os.getpid()}}".encode()
    if scope["path"] == "/echo":
        body = b"x" * size
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]}})
    await send({{"type": "http.response.body", "body": body}})
"""


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    (tmp_path / "pki").mkdir()
    return Pki(tmp_path / "pki")


def deploy(directory: Path, version: str, startup: str = "pass") -> None:
    write_code(directory / "app.py", APP.format(version=version, startup=startup))


def serve(directory: Path, pki: Pki, *args: str) -> Service:
    pki.issue("server.pem", "localhost")
    deploy(directory, "v0")
    return Service(directory, "app:app", "--tls-cert", "pki/server.pem", *args)  # relative: to the working directory


def parse(answer: http.client.HTTPResponse) -> Answer:
    assert answer.status == 200
    version, generation, pid = answer.read().decode().split()
    return Answer(version, generation, int(pid))


@pytest.mark.soak
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_restarts_under_https_load_cost_no_request(tmp_path: Path, pki: Pki, loop: str) -> None:
    # Their last answers are spread over the drain: it is short here, and a tenth of it is left for the last one.
    with serve(tmp_path, pki, "--workers", "2", "--loop", loop, "--drain-timeout", f"{SLOWNESS:g}s") as service:
        port = service.wait_ready().port
        context = pki.client()
        kept: dict[object, http.client.HTTPSConnection] = {}

        def ask_once(port: int) -> Answer:
            client = http.client.HTTPSConnection("localhost", port, context=context, timeout=DEADLINE_S)
            try:
                client.request("GET", "/", headers={"Connection": "close"})
                return parse(client.getresponse())
            except http.client.HTTPException as error:  # what a `Hammer` counts is an OSError
                raise ConnectionError from error
            finally:
                client.close()

        def ask_keeping(port: int) -> Answer:
            new = http.client.HTTPSConnection("localhost", port, context=context, timeout=DEADLINE_S)
            client = kept.setdefault(threading.get_ident(), new)
            try:
                client.request("GET", "/")  # opens a connection again after an answer with `Connection: close`
                return parse(client.getresponse())
            except http.client.HTTPException as error:
                raise ConnectionError from error

        with Hammer(port, clients=1, ask=ask_once) as once, Hammer(port, ask=ask_keeping) as keeping:
            for number in range(1, RESTARTS + 1):
                deploy(tmp_path, f"v{number}")
                report = service.ask(RestartRequest())[-1]
                assert isinstance(report, Report)
                assert report.outcome == "done", report
                assert report.connections is not None
                assert not any(fate.startswith(("cut_", "workers_")) for fate in report.connections), report
                for hammer in (once, keeping):
                    hammer.wait_answers(3, version=f"v{number}")
        for client in kept.values():
            client.close()
        assert (once.failures, keeping.failures) == ({}, {})
        assert "Traceback" not in service.log()


def test_curl_aiohttp_and_httpx_are_served(tmp_path: Path, pki: Pki) -> None:
    curl = need("curl")
    with serve(tmp_path, pki) as service:
        url = f"https://localhost:{service.wait_ready().port}"
        got = subprocess.run(
            [curl, "--silent", "--show-error", "--cacert", str(pki.ca), f"{url}/", f"{url}/"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert got.stdout.count("v0 1 ") == 2
        data = b"x" * 1_000_000

        async def ask() -> None:
            context = pki.client()
            async with aiohttp.ClientSession() as session:
                for _ in range(2):
                    async with session.post(f"{url}/echo", data=data, ssl=context) as answer:
                        assert await answer.read() == data
            async with httpx.AsyncClient(verify=context) as client:
                for _ in range(2):
                    assert (await client.post(f"{url}/echo", content=data)).content == data

        asyncio.run(ask())
        with httpx.Client(verify=pki.client()) as client:
            assert client.get(f"{url}/").text.startswith("v0")
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(url.replace("https", "http"))
        assert "Traceback" not in service.log()


def test_a_restart_reads_the_certificates_anew(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service:
        port = service.wait_ready().port
        before = serial(port, pki.client())
        pki.issue("server.pem", "localhost")
        assert serial(port, pki.client()) == before
        service.restart()
        assert serial(port, pki.client()) != before


def test_a_restart_with_a_broken_certificate_is_aborted_and_says_why(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service:
        port = service.wait_ready().port
        (pki.directory / "server.pem").write_text("broken")
        report = service.restart(expect=4)
        assert_three_lines(report["error"], "HP507")
        assert serial(port, pki.client())


def test_certificates_are_renewed_without_a_restart(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki, "--workers", "2") as service:
        port = service.wait_ready().port
        pids = service.worker_pids()
        before = serial(port, pki.client())
        with connect(port, pki.client()) as early:
            pki.issue("server.pem", "localhost")
            result = service.run("reload-tls", "svc")
            assert result.returncode == 0, result.stderr
            assert "renewed" in result.stdout
            assert "2 have read them" in result.stdout
            seen = {serial(port, pki.client()) for _ in range(20)}
            assert len(seen) == 1
            assert before not in seen
            early.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert early.recv(4096).startswith(b"HTTP/1.1 200"), "open connections go on"
        assert service.worker_pids() == pids


def test_workers_that_cannot_renew_are_named_and_keep_what_they_had(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki, "--workers", "2") as service:
        port = service.wait_ready().port
        before = serial(port, pki.client())
        (pki.directory / "server.pem").write_text("broken")
        result = service.run("reload-tls", "--json")
        assert result.returncode == 4
        workers = json.loads(result.stdout)["workers"]
        assert [worker["pid"] for worker in workers] == service.worker_pids()
        for worker in workers:
            assert worker["outcome"] == "kept"
            assert_three_lines(worker["error"], "HP507")
        words = service.run("reload-tls")
        assert words.returncode == 4
        assert words.stdout.count("HP507 cannot use the certificate") == 2
        assert f"pid {workers[0]['pid']}" in words.stdout
        assert serial(port, pki.client()) == before


def test_a_worker_that_is_starting_gets_the_new_files_even_if_it_has_read_the_old_ones(
    tmp_path: Path, pki: Pki
) -> None:
    """It reads them before the application starts up, which may take its time."""
    with serve(tmp_path, pki) as service:
        port = service.wait_ready().port
        before = serial(port, pki.client())
        gate = Gate(tmp_path)
        deploy(tmp_path, "v1", startup=f"open('came', 'w').close(); {gate.LINE.strip()}")
        restarting = service.start("restart", "--json")
        eventually((tmp_path / "came").exists, "the new worker is in its startup")
        pki.issue("server.pem", "localhost")
        result = service.run("reload-tls", "--json")
        assert result.returncode == 0
        assert [worker["outcome"] for worker in json.loads(result.stdout)["workers"]] == ["reloaded", "starting"]
        gate.open()
        out, _ = restarting.communicate()
        assert json.loads(out)["outcome"] == "done"
        eventually(lambda: len(service.log_events("tls.reloaded")) == 2, "both have read them")
        assert serial(port, pki.client()) != before


def test_services_without_certificates_of_ours_are_refused_with_a_reason(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app") as service:
        service.wait_ready()
        result = service.run("reload-tls")
        assert result.returncode == 4
        assert_three_lines(result.stderr, "HP413")
        assert "no tls_cert is set" in result.stderr
    with Service(tmp_path, "--ready", "exec", "--settle", "0", "--", "sleep", "600") as service:
        service.wait_ready()
        result = service.run("reload-tls")
        assert result.returncode == 4
        assert "sleep is a program of its own" in result.stderr


def test_a_worker_that_does_not_answer_is_named(tmp_path: Path, pki: Pki) -> None:
    with serve(tmp_path, pki) as service:
        service.wait_ready()
        [pid] = service.worker_pids()
        psutil.Process(pid).send_signal(signal.SIGSTOP)
        try:
            report = service.ask(ReloadTlsRequest())[-1]
        finally:
            psutil.Process(pid).send_signal(signal.SIGCONT)
        assert isinstance(report, TlsReport)
        assert_three_lines(report.workers[0].error, "HP414")
