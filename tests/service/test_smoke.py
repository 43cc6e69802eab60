"""A service from its start to its end, by its commands: what has to work on every Python and with every dependency."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from tests.support import DEADLINE_S, Service, http_get, write_code

#: Where tasks can be eager, they are, as an application may want it; on one of the two event loops.
APP = """\
import asyncio

def make_eager():
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.BaseEventLoop) and hasattr(asyncio, "eager_task_factory"):
        loop.set_task_factory(asyncio.eager_task_factory)

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        make_eager()
        while (await receive())["type"] != "lifespan.shutdown":
            await send({{"type": "lifespan.startup.complete"}})
        return await send({{"type": "lifespan.shutdown.complete"}})
    await asyncio.create_task(asyncio.sleep(0))
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    await send({{"type": "http.response.body", "body": {answer!r}}})
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_service_starts_answers_restarts_and_stops(tmp_path: Path, loop: str) -> None:
    write_code(tmp_path / "app.py", APP.format(answer=b"old"))
    with Service(tmp_path, "app:app", "--loop", loop) as service:
        port = service.wait_ready().port
        assert http_get(port) == (200, b"old")

        status = service.run("status", "svc", "--json")
        assert status.returncode == 0, status.stderr
        assert [worker["phase"] for worker in json.loads(status.stdout)["workers"]] == ["serving"]

        write_code(tmp_path / "app.py", APP.format(answer=b"new"))
        assert service.restart()["outcome"] == "done"
        assert http_get(port) == (200, b"new")

        stopped = service.run("stop", "svc")
        assert stopped.returncode == 0, stopped.stderr
        assert service.wait() == 0
        assert not service.log_events("control.accept_failed")


CHILD_APP = """\
import os

async def app(stream):
    with open("/proc/self/environ", "rb") as environ:
        was_started_with = b"MALLOC_TRIM_THRESHOLD_=" in environ.read()
    await stream.send(f"{was_started_with} {'MALLOC_TRIM_THRESHOLD_' in os.environ}".encode())
"""


def test_children_of_an_application_do_not_inherit_the_allocator_s_thresholds(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", CHILD_APP)
    with (
        Service(tmp_path, "app:app") as service,
        socket.create_connection(("127.0.0.1", service.wait_ready().port), DEADLINE_S) as client,
    ):
        assert client.recv(100) == b"True False"
