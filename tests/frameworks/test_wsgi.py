"""WSGI applications are refused with the line that helps, and served once they are wrapped."""

from __future__ import annotations

import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support import DEADLINE_S, Gate, Service, assert_three_lines, eventually, read_response, write_code

FLASK = """
from flask import Flask, request

VERSION = "v0"

app = Flask(__name__)

@app.get("/")
def index():
    return VERSION

@app.post("/slow")
def slow():
    open("gate").close()
    return VERSION + " " + request.form["word"]
"""

DJANGO = """
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path

VERSION = "v0"

settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="test", ALLOWED_HOSTS=["127.0.0.1"])

def index(request):
    return HttpResponse(VERSION)

def slow(request):
    open("gate").close()
    return HttpResponse(VERSION + " " + request.POST["word"])

urlpatterns = [path("", index), path("slow", slow)]
app = get_wsgi_application()
"""

PLAIN = """
from urllib.parse import parse_qs

VERSION = "v0"

def app(environ, start_response):
    body = VERSION
    if environ["PATH_INFO"] == "/slow":
        open("gate").close()
        form = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])).decode()
        body += " " + parse_qs(form)["word"][0]
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [body.encode()]
"""


@pytest.mark.parametrize("code", [FLASK, DJANGO, PLAIN], ids=["flask", "django", "function"])
def test_wsgi_application_is_refused_and_served_once_wrapped(tmp_path: Path, code: str) -> None:
    write_code(tmp_path / "app.py", code)
    with Service(tmp_path, "app:app") as service:
        assert service.wait() == 3
        error = service.log().rpartition("HP515")
    assert_three_lines("".join(error[1:]), "HP515")
    line = error[2].rpartition("try:")[2].strip()

    code += line + "\n"
    gate = Gate(tmp_path)
    write_code(tmp_path / "app.py", code)
    with Service(tmp_path, "app:app", name="wrapped") as service:
        url = f"http://127.0.0.1:{service.wait_ready().port}"
        assert httpx.get(url).text == "v0"
        with ThreadPoolExecutor() as threads:
            slow = threads.submit(httpx.post, f"{url}/slow", data={"word": "hello"}, timeout=DEADLINE_S)
            eventually(lambda: service.status()["workers"][0]["requests"] == 2, "the slow request is being worked on")
            write_code(tmp_path / "app.py", code.replace('VERSION = "v0"', 'VERSION = "v1"'))
            restarting = threads.submit(service.restart)
            eventually(lambda: bool(service.log_events("drain.began")), "the old code is told to leave")
            gate.open()
            assert slow.result().text == "v0 hello"
            report = restarting.result()
        assert sum(report["connections"].values()) == 1
        assert not any(fate.startswith(("cut_", "workers_")) for fate in report["connections"]), report
        assert httpx.get(url).text == "v1"


def test_django_project_as_its_command_makes_it(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "django", "startproject", "mysite", "."], cwd=tmp_path, check=True)
    with Service(tmp_path, "mysite.wsgi:application", name="wsgi") as service:
        assert service.wait() == 3
        assert "try:   hotport serve mysite.asgi:application" in service.log()
        assert "application = WSGIMiddleware(application)" in service.log()
    with (
        Service(tmp_path, "mysite.asgi:application") as service,
        socket.create_connection(("127.0.0.1", service.wait_ready().port), DEADLINE_S) as client,
    ):
        client.sendall(b"GET /admin/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_response(client)[0] == 302  # to its login
