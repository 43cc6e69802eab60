"""The live page: in a real browser through restarts, and bounded whatever its viewers do."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from hotport.supervisor.statusport import VIEWERS_MAX
from tests.churn.chromium import Page, browsing
from tests.service.test_handoff_faults import APP as HTTP_APP
from tests.service.test_handoff_faults import Kept
from tests.service.test_status_port import StatusPort, read_all
from tests.support import DEADLINE_S, LINE_APP, Service, eventually, write_code

#: A file name that would run if it became markup.
MARKUP = "<img src=x onerror=alert(1)>&quot;"


def url_of(service: Service) -> str:
    return str(service.status()["status_address"]).replace("tcp://", "http://") + "/"


def wait_for(page: Page, expression: str, what: str) -> None:
    """Wait until an expression is true in the page."""
    eventually(lambda: bool(page.ask(expression)), f"{what}: {expression}")


def text_of(page: Page, name: str) -> str:
    return str(page.ask(f"document.getElementById({name!r}).textContent"))


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StatusPort]:
    """The status port of a service at which nothing changes."""
    directory = tmp_path_factory.mktemp("page")
    write_code(directory / "app.py", LINE_APP.format(version="v1"))
    env = {"PYTEST_CURRENT_TEST": "", "API_TOKEN": "hunter2"}
    with Service(directory, "app:app", "--status-bind", "127.0.0.1:0", env=env) as service:
        yield StatusPort(service.wait_ready())


class Viewer:
    """Reads the events of a page."""

    def __init__(self, port: StatusPort) -> None:
        self.sock = port.connect()
        self.sock.sendall(b"GET /events HTTP/1.1\r\nHost: test\r\n\r\n")
        self.file = self.sock.makefile("rb")
        self.head = b"".join(iter(self.file.readline, b"\r\n"))

    def read(self) -> tuple[str, Any]:
        """Wait for an event; return its name and its data."""
        while not (line := self.file.readline()).startswith(b"event: "):
            assert line, "the connection has ended"
        return line[7:].strip().decode(), json.loads(self.file.readline()[6:])

    def close(self) -> None:
        self.file.close()
        self.sock.close()


@pytest.mark.measured
def test_page_shows_restarts_upgrades_and_dead_workers_and_complains_of_nothing(tmp_path: Path) -> None:
    """Values move, its connection comes back, and names stay text."""
    write_code(tmp_path / f"{MARKUP}.py", HTTP_APP.format(fault=""))
    flags = ("--workers", "2", "--lifespan", "off", "--keep-alive", "1h", "--status-bind", "127.0.0.1:0")
    with Service(tmp_path, f"{MARKUP}.py:app", *flags) as service, ExitStack() as stack:
        service.wait_ready()
        with browsing(tmp_path) as page:
            page.open(url_of(service))
            wait_for(page, "document.getElementById('link').textContent === 'live'", "it is connected")
            assert text_of(page, "stage") == "generation 1 serves"
            assert f"{MARKUP}.py:app" in text_of(page, "subject")
            assert page.ask("document.querySelectorAll('img').length") == 0
            kept = [Kept(service.port) for _ in range(6)]
            for each in kept:
                stack.enter_context(each.sock)
                each.ask()
            wait_for(page, "document.getElementById('connections').textContent === '6'", "connections are counted")
            wait_for(page, "document.querySelector('#requests-chart .line') !== null", "there is a chart")
            assert service.restart()["outcome"] == "done"
            wait_for(page, "document.getElementById('stage').textContent === 'generation 2 serves'", "it has restarted")
            moved = "document.getElementById('restarts').textContent.includes('Connections: 6 moved http.')"
            wait_for(page, moved, "the restart is shown")
            assert page.ask("document.querySelectorAll('#restarts .lane .moving').length") >= 1
            assert page.ask("document.querySelectorAll('#restarts .lane.steps i').length") == 5
            assert page.ask("document.querySelectorAll('#connections-chart .mark').length") == 1
            for each in kept:
                each.sock.close()
            os.kill(service.worker_pids()[0], signal.SIGKILL)
            wait_for(page, "document.getElementById('mishaps').textContent.includes('SIGKILL')", "the loss is told")
            pid = service.status()["pid"]
            assert service.run("upgrade", "svc").returncode == 0
            wait_for(
                page,
                f"told.status.pid === {pid} && told.status.age_s < 60 && told.status.mishaps.length === 0",
                "it is new",
            )
            assert text_of(page, "link") == "live"
            assert "6 moved http" in text_of(page, "restarts")
            for width, scheme in ((390, "dark"), (390, "light"), (1180, "dark")):
                page.show(width=width, scheme=scheme)
                assert page.ask("document.documentElement.scrollWidth") <= width
            complaints = [each for each in page.complaints if "ERR_" not in each]  # the upgrade ends its connection
            assert complaints == []
            assert {each.rpartition("/")[2] for each in page.requested} == {"", "events"}


def test_page_loads_nothing_and_runs_only_its_own_script(port: StatusPort) -> None:
    status, head, body = port.get("/")
    assert status == 200
    policy = next(line for line in head.decode().splitlines() if line.startswith("Content-Security-Policy: "))
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy
    for outside in (
        b"http://",
        b"https://",
        b"innerHTML",
        b"insertAdjacentHTML",
        b"document.write",
        b" style=",
        b"onclick",
    ):
        assert outside not in body.replace(b"http://www.w3.org/2000/svg", b"")
    assert port.get("/", "HEAD")[2] == b""


def test_events_begin_with_the_past_and_go_on_with_the_state(port: StatusPort) -> None:
    viewer = Viewer(port)
    assert viewer.head.startswith(b"HTTP/1.1 200 ")
    assert b"text/event-stream" in viewer.head
    name, past = viewer.read()
    assert (name, past["restarts"]) == ("past", [])
    for _ in range(2):
        name, state = viewer.read()
        assert (name, state["status"]["generation"]) == ("state", 1)
        assert b"hunter2" not in json.dumps(state).encode()
        assert [*state["status"]["queues"].values()] == [*state["dropped"].values()] == [0]
    viewer.close()
    status, _, body = port.get("/events", "HEAD")
    assert (status, body) == (200, b"")


def test_only_so_many_pages_are_served_and_probes_are_answered_beside_them(port: StatusPort) -> None:
    viewers = [Viewer(port) for _ in range(VIEWERS_MAX)]
    for viewer in viewers:
        assert viewer.read()[0] == "past"
    status, head, _ = port.get("/events")
    assert status == 503
    assert b"Retry-After: 5" in head
    assert port.get("/ready")[0] == 200
    assert all(viewer.read()[0] == "state" for viewer in viewers)
    viewers.pop().close()

    def has_room() -> bool:
        viewer = Viewer(port)
        if is_served := viewer.head.startswith(b"HTTP/1.1 200 "):
            viewers.append(viewer)
        else:
            viewer.close()
        return is_served

    eventually(has_room, "the place of one that has left is free")
    for viewer in viewers:
        viewer.close()


def test_pages_end_with_the_service_and_a_port_that_others_can_reach_is_warned_of(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    with Service(tmp_path, "app:app", "--status-bind", "0.0.0.0:0") as service:
        (warning,) = service.wait_ready().log_events("status_port.exposed")
        assert warning["level"] == "warning"
        viewer = Viewer(StatusPort(service))
        assert viewer.read()[0] == "past"
        service.process.send_signal(signal.SIGTERM)
        viewer.sock.settimeout(DEADLINE_S)
        assert read_all(viewer.sock) is not None
        viewer.close()
        assert service.wait() == 0


def test_a_port_that_only_this_machine_can_reach_is_not_warned_of(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    for where in ("127.0.0.1:0", f"unix:{tmp_path}/status.sock"):
        with Service(tmp_path, "app:app", "--status-bind", where) as service:
            assert not service.wait_ready().log_events("status_port.exposed")
