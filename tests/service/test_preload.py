"""A generation that imports the application once, and forks its workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hotport.wire.messages import Report, RestartRequest, ScaleRequest, UpgradeRequest
from tests.support import LINE_APP, Hammer, Service, eventually, http_get, write_code

#: Each import adds a line.
COUNTED = """
import os
with open("imports", "a") as file:
    print(os.getpid(), file=file)
"""


def deploy(directory: Path, version: str, code: str = COUNTED) -> None:
    write_code(directory / "app.py", code + LINE_APP.format(version=version))


def imports(directory: Path) -> list[int]:
    """The processes that have imported the application."""
    return [int(line) for line in (directory / "imports").read_text().split()]


@contextmanager
def preloading(directory: Path, *args: str) -> Iterator[tuple[Service, Hammer]]:
    """Two workers, under load; nothing is lost."""
    deploy(directory, "v0")
    with Service(directory, "app:app", "--workers", "2", "--preload", "--settle", "0", *args).wait_ready() as service:
        with Hammer(service.port) as hammer:
            yield service, hammer
        assert not hammer.failures


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_generation_imports_once_and_a_restart_imports_the_new_code(tmp_path: Path) -> None:
    with preloading(tmp_path) as (service, hammer):
        assert len(imports(tmp_path)) == 1
        assert {parent_of(pid) for pid in service.worker_pids()} == {service.process.pid}
        deploy(tmp_path, "v1")
        report = service.ask(RestartRequest())[-1]
        assert isinstance(report, Report)
        assert report.outcome == "done"
        hammer.wait_answers(20, "v1")
        old, new = imports(tmp_path)
        eventually(lambda: not Path(f"/proc/{old}").exists(), "the old template is gone")
        assert parent_of(new) == service.process.pid
    assert not Path(f"/proc/{new}").exists()


def test_workers_that_come_later_are_forked_too_and_a_lost_template_is_made_again(tmp_path: Path) -> None:
    with preloading(tmp_path) as (service, hammer):
        service.ask(ScaleRequest(workers=3))
        (template,) = imports(tmp_path)
        os.kill(template, signal.SIGKILL)
        service.wait_until(lambda: bool(service.log_events("template.lost")), "its end is told")
        service.ask(ScaleRequest(workers=4))
        assert len(imports(tmp_path)) == 2
        hammer.wait_answers()
        assert len(service.worker_pids()) == 4


def test_worker_that_is_killed_is_forked_again(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    with Service(tmp_path, "app:app", "--workers", "2", "--preload").wait_ready() as service:
        killed, other = service.worker_pids()
        os.kill(killed, signal.SIGKILL)
        service.wait_until(
            lambda: len(service.worker_pids()) == 2 and killed not in service.worker_pids(), "another one serves"
        )
        assert other in service.worker_pids()
        assert [event["why"] for event in service.log_events("worker.lost")] == ["killed by SIGKILL"]
        assert len(imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise RuntimeError('broken')", "RuntimeError: broken"),
        ("import os; os._exit(9)", "the process that imports the application for all workers: exited 9"),
        ("import threading; threading.Event().wait()", "did not say READY=1 in time"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_import_that_fails_aborts_the_restart(tmp_path: Path, code: str, why: str) -> None:
    with preloading(tmp_path) as (service, hammer):
        deploy(tmp_path, "v1", code + "\n")
        if "READY" in why:
            (tmp_path / "hotport.toml").write_text('ready_timeout = "500ms"\n')
        report = service.ask(RestartRequest())[-1]
        assert isinstance(report, Report)
        assert report.outcome == "aborted"
        assert why in report.error, report.error
        hammer.wait_answers(20, "v0")
        (tmp_path / "hotport.toml").unlink(missing_ok=True)
        deploy(tmp_path, "v2")
        assert service.ask(RestartRequest())[-1].outcome == "done"
        hammer.wait_answers(20, "v2")
        alive = {template for template in imports(tmp_path) if Path(f"/proc/{template}").exists()}
        assert alive == {imports(tmp_path)[-1]}


def test_next_supervisor_makes_a_template_of_its_own(tmp_path: Path) -> None:
    with preloading(tmp_path) as (service, hammer):
        pid = service.process.pid
        before = service.worker_pids()
        service.ask(UpgradeRequest())
        service.wait_until(lambda: len(imports(tmp_path)) == 2, "the upgraded supervisor has a template")
        assert (service.process.pid, service.worker_pids()) == (pid, before)
        service.ask(ScaleRequest(workers=3))
        assert len(imports(tmp_path)) == 2
        hammer.wait_answers()
        eventually(lambda: not Path(f"/proc/{imports(tmp_path)[0]}").exists(), "the first one is reaped")


def test_upgraded_supervisor_reaps_what_workers_leave_behind_also_without_preload(tmp_path: Path) -> None:
    orphan = "import subprocess\nsubprocess.run(['sh', '-c', 'setsid sleep 3600 & echo $! >orphan'])\n"
    deploy(tmp_path, "v0", COUNTED + orphan)
    (tmp_path / "hotport.toml").write_text("preload = true\n")
    with Service(tmp_path, "app:app").wait_ready() as service:
        pid = int((tmp_path / "orphan").read_text())
        assert parent_of(pid) == service.process.pid
        (tmp_path / "hotport.toml").unlink()
        service.ask(UpgradeRequest())
        with os.fdopen(os.pidfd_open(pid)):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "it is reaped")


def test_supervisor_that_is_killed_leaves_no_template(tmp_path: Path) -> None:
    deploy(tmp_path, "v0")
    options = ("--workers", "2", "--preload")
    with Service(tmp_path, "app:app", *options).wait_ready() as service:
        port = service.port
        (template,) = imports(tmp_path)
        service.process.kill()
        service.process.wait(service.timeout_s)
        eventually(lambda: not Path(f"/proc/{template}").exists(), "the template ends with it")
        with Service(tmp_path, "app:app", *options, "--bind", f"127.0.0.1:{port}").wait_ready() as heir:
            heir.wait_until(lambda: len(imports(tmp_path)) == 2, "there is another template")
            with Hammer(port) as hammer:
                heir.ask(ScaleRequest(workers=3))
                hammer.wait_answers()
            assert not hammer.failures
            assert len(imports(tmp_path)) == 2


HTTP = """
import asyncio, os
import hotport
lock = asyncio.Lock()
made = []

@hotport.after_fork
def connect():
    asyncio.get_running_loop()
    made.append(os.getpid())

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            scope["state"]["pid"] = os.getpid()
            await send({"type": "lifespan.startup.complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    async with lock:
        same = made == [os.getpid()] == [scope["state"]["pid"]]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"its own" if same else b"another's"})
"""


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_lifespan_and_after_fork_run_in_each_worker(tmp_path: Path, preload: str, loop: str) -> None:
    write_code(tmp_path / "app.py", HTTP)
    with Service(tmp_path, "app:app", "--workers", "2", preload, "--loop", loop).wait_ready() as service:
        assert http_get(service.port) == (200, b"its own")
