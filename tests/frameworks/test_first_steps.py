"""What a framework's first pages tell people to write, served by the one command line of docs/how-to/frameworks.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import Service, http_get, write_code

STARLETTE_FUNCTION = """
from starlette.responses import PlainTextResponse

async def app(scope, receive, send):
    await PlainTextResponse("hello")(scope, receive, send)
"""

STARLETTE_ENDPOINT = """
from starlette.endpoints import HTTPEndpoint
from starlette.responses import PlainTextResponse

class Page(HTTPEndpoint):
    async def get(self, request):
        return PlainTextResponse("hello")
"""

FASTAPI_FACTORY = """
from typing import Annotated
from fastapi import Depends, FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

class Greeting(BaseModel):
    word: str = "hello"

def create_app():
    app = FastAPI()

    @app.get("/", response_class=PlainTextResponse)
    def read(greeting: Annotated[Greeting, Depends()]) -> str:
        return greeting.word

    return app
"""

LITESTAR_CONTROLLER = """
from litestar import Controller, Litestar, MediaType, get
from litestar.di import Provide

async def word() -> str:
    return "hello"

class Words(Controller):
    path = "/"
    dependencies = {"word": Provide(word)}

    @get(media_type=MediaType.TEXT)
    async def read(self, word: str) -> str:
        return word

app = Litestar([Words])
"""

QUART_BLUEPRINT = """
from quart import Blueprint, Quart, render_template_string

pages = Blueprint("pages", __name__)

@pages.get("/")
async def index():
    return await render_template_string("{{ word }}", word="hello")

app = Quart(__name__)
app.register_blueprint(pages)
"""

CHANNELS_ROUTER = """
from django.conf import settings
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY="test", ALLOWED_HOSTS=["test"])

from channels.routing import ProtocolTypeRouter
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

urlpatterns = [path("", lambda request: HttpResponse("hello"))]
application = ProtocolTypeRouter({"http": get_asgi_application()})
"""

FLASK_WRAPPED_BY_ASGIREF = """
from asgiref.wsgi import WsgiToAsgi
from flask import Flask

flask = Flask(__name__)
app = WsgiToAsgi(flask)

@flask.get("/")
def index():
    return "hello"
"""

FASTAPI_WITH_FLASK_INSIDE = """
from a2wsgi import WSGIMiddleware
from fastapi import FastAPI
from flask import Flask

old = Flask(__name__)

@old.get("/")
def index():
    return "hello"

app = FastAPI()
app.mount("/", WSGIMiddleware(old))
"""

FIRST_STEPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "starlette_function": (STARLETTE_FUNCTION, ("app:app",)),
    "starlette_endpoint": (STARLETTE_ENDPOINT, ("app:Page",)),
    "fastapi_factory": (FASTAPI_FACTORY, ("app:create_app", "--factory")),
    "litestar_controller": (LITESTAR_CONTROLLER, ("app:app",)),
    "quart_blueprint": (QUART_BLUEPRINT, ("app:app",)),
    "channels_router": (CHANNELS_ROUTER, ("app:application",)),
    "flask_wrapped_by_asgiref": (FLASK_WRAPPED_BY_ASGIREF, ("app:app",)),
    "fastapi_with_flask_inside": (FASTAPI_WITH_FLASK_INSIDE, ("app:app",)),
}


@pytest.mark.parametrize("case", FIRST_STEPS)
def test_first_steps_say_hello(tmp_path: Path, case: str) -> None:
    code, arguments = FIRST_STEPS[case]
    write_code(tmp_path / "app.py", code)
    with Service(tmp_path, *arguments) as service:
        assert http_get(service.wait_ready().port) == (200, b"hello")
