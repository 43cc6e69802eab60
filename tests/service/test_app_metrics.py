"""The application's own metrics on the status port: those of well-known packages, unchanged."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.service.test_metrics import scrape
from tests.service.test_status_port import StatusPort
from tests.support import Service, assert_three_lines, eventually, http_get, write_code

#: With the metric in which each package counts requests.
APPLICATIONS = {
    "starlette_requests_total": """
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette_exporter import PrometheusMiddleware

app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("x"))])
app.add_middleware(PrometheusMiddleware)
""",
    "http_requests_total": """
from fastapi import FastAPI
from prometheus_fastapi_instrumentator import Instrumentator

app = FastAPI()
app.get("/")(lambda: "x")
Instrumentator().instrument(app)
""",
    "django_http_requests_total_by_method_total": """
import sys
import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, SECRET_KEY="x", INSTALLED_APPS=["django_prometheus"],
    MIDDLEWARE=["django_prometheus.middleware.PrometheusBeforeMiddleware",
                "django_prometheus.middleware.PrometheusAfterMiddleware"],
    PROMETHEUS_EXPORT_MIGRATIONS=False,
)
urlpatterns = [path("", lambda request: HttpResponse("x"))]
app = get_asgi_application()
""",
}


def counted(port: StatusPort, metric: str) -> float:
    return sum(value for name, value in scrape(port).items() if name.startswith(f"{metric}{{"))


@pytest.mark.parametrize("metric", APPLICATIONS)
def test_metrics_of_a_package_go_on_through_restarts_kills_and_a_lost_supervisor(tmp_path: Path, metric: str) -> None:
    write_code(tmp_path / "app.py", APPLICATIONS[metric])
    args = ("app:app", "--app-metrics", "--workers", "2")
    with ExitStack() as stack:
        service = stack.enter_context(Service(tmp_path, *args, "--status-bind", "127.0.0.1:0")).wait_ready()
        address = service.status()["status_address"].removeprefix("tcp://")
        port, asked = StatusPort(service), 0

        def check() -> None:
            nonlocal asked
            for _ in range(6):
                assert http_get(service.port)[0] == 200
                asked += 1
            eventually(lambda: counted(port, metric) == asked, f"{asked} requests")

        check()
        service.restart()
        check()
        os.kill(service.worker_pids()[0], signal.SIGKILL)
        eventually(lambda: len(service.worker_pids()) == 2, "it is replaced")
        check()
        service.process.send_signal(signal.SIGKILL)
        service.process.wait()
        service = stack.enter_context(Service(tmp_path, *args, "--status-bind", address)).wait_ready()
        check()
        service.restart()
        check()
        assert len(list((service.runtime / "app-metrics").iterdir())) <= 16
        assert service.run("stop", "svc").returncode == 0
        assert service.wait() == 0
        assert not (service.runtime / "app-metrics").exists()
        service = stack.enter_context(Service(tmp_path, *args, "--preload", "--status-bind", address)).wait_ready()
        asked = 0  # it is a new one
        check()


def test_metrics_need_a_place_where_they_are_shown(tmp_path: Path) -> None:
    write_code(tmp_path / "app.py", "")
    with Service(tmp_path, "app:app", "--app-metrics") as service:
        assert service.wait() == 2
        assert_three_lines(service.log(), "HP305")
        assert "--status-bind" in service.log()
