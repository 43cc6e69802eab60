"""What kind of application something is, told by its looks alone."""

from __future__ import annotations

import asyncio
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from a2wsgi import ASGIMiddleware, WSGIMiddleware
from asgiref.compatibility import guarantee_single_callable
from asgiref.wsgi import WsgiToAsgi
from channels.routing import ProtocolTypeRouter
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from fastapi import FastAPI
from flask import Flask
from litestar import Litestar
from quart import Quart
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Router

from hotport.adapters.base import Connections, Context
from hotport.adapters.target import SCRIPT_MODULE, detect_kind, kind_of, load_target, make_adapter
from hotport.errors import StartError
from hotport.options import Options
from hotport.options.definition import Kind
from tests.support import assert_three_lines


async def asgi(scope: Any, receive: Any, send: Any) -> None: ...


async def stream(stream: Any) -> None: ...


async def sockets(sockets: Any, lifetime: Any) -> None: ...


def wsgi(environ: Any, start_response: Any) -> list[bytes]:
    return []


async def with_config(config: Any, scope: Any, receive: Any, send: Any) -> None: ...


async def with_defaults(scope: Any, receive: Any = None, send: Any = None) -> None: ...


async def with_an_option(scope: Any, receive: Any, send: Any, is_debug: bool = False) -> None: ...


async def with_the_rest(scope: Any, *channels: Any) -> None: ...


def not_async_itself(scope: Any, receive: Any, send: Any) -> Any:
    return asgi(scope, receive, send)


def passing_on(inner: Any) -> Any:
    """As decorators usually do it: not async, any arguments, and its name and signature are those of `inner`."""

    @functools.wraps(inner)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    return wrapper


def passing_on_unnamed(inner: Any) -> Any:
    return lambda *args: inner(*args)


@functools.wraps(wsgi)
async def adapting(scope: Any, receive: Any, send: Any) -> None:
    """Carries the name of what it adapts, but takes something else."""


class Callable3:
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None: ...


class CallableAny:
    async def __call__(self, *args: Any) -> None: ...


class CallableAnyNotAsync:
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class CallableWsgi:
    def __call__(self, env: Any, start_resp: Any) -> list[bytes]:
        return []


class IterableWsgi:
    """An application as a class: an instance is the answer."""

    def __init__(self, environ: Any, start_response: Any) -> None: ...


class CallableStream:
    async def __call__(self, stream: Any) -> None: ...


class Asgi2:
    def __init__(self, scope: Any) -> None: ...

    async def __call__(self, receive: Any, send: Any) -> None: ...


def asgi2(scope: Any) -> Any:
    return Asgi2(scope)


class ClassOfThree:
    def __init__(self, one: Any, two: Any, three: Any) -> None: ...


class Lines(asyncio.Protocol):
    pass


class LinesWithArgument(asyncio.BufferedProtocol):
    def __init__(self, greeting: bytes) -> None: ...


flask = Flask("flask")

KINDS: dict[str, tuple[str, Callable[..., Any]]] = {
    "function": ("asgi", asgi),
    "instance": ("asgi", Callable3()),
    "class_whose_instances_are_called": ("asgi", Callable3().__call__),
    "any_arguments": ("asgi", CallableAny()),
    "any_arguments_not_async": ("asgi", CallableAnyNotAsync()),
    "scope_and_the_rest": ("asgi", with_the_rest),
    "optional_receive_and_send": ("asgi", with_defaults),
    "an_option_more": ("asgi", with_an_option),
    "not_async_itself": ("asgi", not_async_itself),
    "partial": ("asgi", functools.partial(with_config, {})),
    "partial_by_name": ("asgi", functools.partial(with_an_option, is_debug=True)),
    "partial_of_instance": ("asgi", functools.partial(Callable3())),
    "decorated": ("asgi", passing_on(asgi)),
    "decorated_twice": ("asgi", passing_on(passing_on(asgi))),
    "decorated_partial": ("asgi", passing_on(functools.partial(with_config, {}))),
    "decorated_unnamed": ("asgi", passing_on_unnamed(asgi)),
    "named_after_a_wsgi_application": ("asgi", adapting),
    "asgi2_made_single": ("asgi", guarantee_single_callable(Asgi2)),  # type: ignore[no-untyped-call]
    "wsgi_wrapped_by_a2wsgi": ("asgi", WSGIMiddleware(wsgi)),
    "wsgi_wrapped_by_asgiref": ("asgi", WsgiToAsgi(wsgi)),  # type: ignore[no-untyped-call]
    "flask_wrapped": ("asgi", WSGIMiddleware(flask.wsgi_app)),  # type: ignore[arg-type]
    "starlette": ("asgi", Starlette()),
    "starlette_router": ("asgi", Router()),
    "starlette_endpoint_class": ("asgi", HTTPEndpoint),
    "starlette_middleware": ("asgi", GZipMiddleware(Starlette())),
    "fastapi": ("asgi", FastAPI()),
    "litestar": ("asgi", Litestar()),
    "quart": ("asgi", Quart("quart")),
    "django": ("asgi", ASGIHandler.__new__(ASGIHandler)),  # made without its settings
    "channels": ("asgi", ProtocolTypeRouter({})),
    "stream": ("stream", stream),
    "stream_instance": ("stream", CallableStream()),
    "stream_decorated": ("stream", passing_on(stream)),
    "sockets": ("sockets", sockets),
    "sockets_partial": ("sockets", functools.partial(asgi, None)),
    "sockets_decorated": ("sockets", passing_on(sockets)),
    "protocol": ("protocol", Lines),
    "protocol_partial": ("protocol", functools.partial(LinesWithArgument, b"hello")),
}

REFUSED: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "wsgi": ("HP515", "WSGIMiddleware", wsgi),
    "wsgi_decorated": ("HP515", "WSGIMiddleware", passing_on(wsgi)),
    "wsgi_partial": ("HP515", "WSGIMiddleware", functools.partial(wsgi)),
    "wsgi_lambda": ("HP515", "WSGIMiddleware", lambda e, start: []),
    "wsgi_instance": ("HP515", "WSGIMiddleware", CallableWsgi()),
    "wsgi_class": ("HP515", "WSGIMiddleware", IterableWsgi),
    "flask": ("HP515", "WSGIMiddleware", flask),
    "flask_wsgi_app": ("HP515", "WSGIMiddleware", flask.wsgi_app),
    "django_wsgi": ("HP515", "WSGIMiddleware", WSGIHandler.__new__(WSGIHandler)),
    "asgi_made_wsgi": ("HP515", "WSGIMiddleware", ASGIMiddleware.__new__(ASGIMiddleware)),
    "two_of_any_name": ("HP504", "WSGI", lambda a, b: None),
    "sockets_without_async": ("HP504", "a sockets function is async", lambda sockets, lifetime: None),
    "asgi2_class": ("HP516", "guarantee_single_callable", Asgi2),
    "asgi2_function": ("HP516", "guarantee_single_callable", asgi2),
    "middleware_class": ("HP504", "1 argument", GZipMiddleware),
    "class_of_three": ("HP504", "3 argument", ClassOfThree),
    "application_class": ("HP504", "--factory", FastAPI),
    "factory": ("HP504", "--factory", lambda: asgi),
    "factory_with_options": ("HP504", "--factory", lambda settings=None, *args: asgi),
    "protocol_with_argument": ("HP504", "functools.partial", LinesWithArgument),
    "four": ("HP504", "4 argument", with_config),
    "unknown": ("HP504", "--kind", iter),  # the interpreter does not tell what it takes
}


@pytest.mark.parametrize("case", KINDS)
def test_kind_is_told_by_what_an_application_takes(case: str) -> None:
    kind, application = KINDS[case]
    assert detect_kind(application) == kind


@pytest.mark.anyio
async def test_every_kind_to_choose_from_has_an_adapter_of_its_own() -> None:
    kinds = [kind for kind in get_args(Kind) if kind != "auto"]
    adapters = [make_adapter(asgi, Context(Connections()), Options(kind=kind)) for kind in kinds]
    assert len(set(map(type, adapters))) == len(kinds)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_with_a_hint(case: str) -> None:
    code, words, application = REFUSED[case]
    with pytest.raises(StartError) as caught:
        detect_kind(application)
    assert_three_lines(str(caught.value), code)
    assert words in str(caught.value)


@pytest.mark.parametrize("application", [wsgi, asgi2], ids=["wsgi", "asgi2"])
def test_line_in_the_hint_makes_it_servable(application: Any) -> None:
    module = {"api": application}
    with pytest.raises(StartError) as caught:
        detect_kind(application, "api")
    exec(caught.value.fix, module)
    assert detect_kind(module["api"]) == "asgi"


#: What is in app.py, the target, and what is said.
NOT_FOUND = {
    "attribute": ("async def app(stream): ...", "app:appp", "HP502", "nearest name is 'app'"),
    "guarded": ("if __name__ == '__main__':\n    app = 1", "app:app", "HP502", "move 'app' out of there"),
    "module": ("", "apps:app", "HP501", "nearest name is 'app'"),
    "nowhere": ("", "no.mod:a", "HP501", "hotport serve no.mod:a --app-dir DIR"),
    "file": ("", "apx.py:app", "HP501", "nearest name is 'app.py'"),
    "near_file": ("", "./apx.py:a", "HP501", "hotport serve app.py:a"),
    "no_file": ("", "sub/no.py:a", "HP501", "ls /"),
    "number": ("app = 42", "app:app", "HP503", "type int"),
}


@pytest.mark.parametrize(
    ("cwd", "target", "fix"),
    [
        (".", "shop/web/main.py:app", "hotport serve shop.web.main:app"),
        ("shop", "web/main.py", "hotport serve shop.web.main:app --app-dir .."),
        ("shop/web", "main:app", "hotport serve shop.web.main:app --app-dir ../.."),
    ],
)
def test_a_module_with_relative_imports_gets_the_line_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cwd: str, target: str, fix: str
) -> None:
    (tmp_path / "shop" / "web").mkdir(parents=True)
    for name in ("shop", "shop/web"):
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "shop/web/main.py").write_text("import os\n\nfrom . import models\napp = models.app\n")
    monkeypatch.chdir(tmp_path / cwd)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("main", SCRIPT_MODULE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(StartError) as caught:
        load_target(target, app_dir=".", factory=False)
    sys.modules.pop(SCRIPT_MODULE, None)
    assert_three_lines(str(caught.value), "HP517")
    assert caught.value.fix == fix
    assert "line 3 of main.py" in caught.value.cause


def test_an_import_error_inside_the_application_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_main.py").write_text("import broken_other\n")
    (tmp_path / "broken_other.py").write_text("from . import models\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with pytest.raises(ImportError, match="no known parent package"):
        load_target("broken_main:app", app_dir=str(tmp_path), factory=False)


@pytest.mark.parametrize("case", NOT_FOUND)
def test_target_that_is_not_there_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    code, target, error_code, words = NOT_FOUND[case]
    (tmp_path / "app.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for name in ("app", SCRIPT_MODULE):
        monkeypatch.delitem(sys.modules, name, raising=False)
    try:
        with pytest.raises(StartError) as caught:
            load_target(target, app_dir=".", factory=False)
    finally:
        sys.modules.pop("app", None)
    assert_three_lines(str(caught.value), error_code)
    assert words in str(caught.value)


def test_a_wsgi_module_with_an_asgi_one_beside_leads_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shopsite").mkdir()
    (tmp_path / "shopsite" / "wsgi.py").write_text("def application(environ, start_response): ...")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    options = Options(target="shopsite.wsgi")
    application = load_target("shopsite.wsgi", app_dir=str(tmp_path), factory=False)
    with pytest.raises(StartError, match="WSGIMiddleware") as caught:
        kind_of(application, options)
    assert "application = WSGIMiddleware(application)" in caught.value.fix
    (tmp_path / "shopsite" / "asgi.py").touch()
    importlib.invalidate_caches()
    with pytest.raises(StartError) as caught:
        kind_of(application, options)
    assert caught.value.fix == "hotport serve shopsite.asgi:application"
