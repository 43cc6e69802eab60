"""Import an application from ``module:attribute``, and choose its adapter."""

from __future__ import annotations

import ast
import asyncio
import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, Final

from hotport.adapters.base import Adapter, Context
from hotport.adapters.datagram import DatagramAdapter
from hotport.adapters.sockets import SocketsAdapter
from hotport.errors import StartError, nearest
from hotport.options import Options

__all__ = [
    "detect_kind",
    "import_adapter",
    "kind_of",
    "load_application",
    "load_target",
    "make_adapter",
    "split_target",
]

#: The module name under which workers load a script that calls `hotport.run`; never ``__main__``.
SCRIPT_MODULE: Final = "__hotport_main__"

#: Attributes tried when a target names a module only.
USUAL_NAMES: Final = ("app", "application", "main", "handler")


def split_target(target: str) -> tuple[str, str]:
    """Split ``pkg.mod:attr`` or ``path/to/file.py:attr`` at the colon; the second half may be empty."""
    module, _, attribute = target.partition(":")
    return module, attribute


def load_application(options: Options) -> Any:
    """Import the application that the options name.

    Raises:
        StartError: It ends its process (HP508), or as `load_target` does.
        Exception: Raised by the application's own code.
    """
    assert options.target is not None
    try:
        return load_target(options.target, app_dir=options.app_dir, factory=options.factory)
    except SystemExit as error:
        raise StartError(
            "HP508",
            f"{options.target} ended its process while it was imported",
            cause=f"it called sys.exit({error.code!r})",
            note="guard the call: if __name__ == '__main__':",
        ) from error


def load_target(target: str, *, app_dir: str, factory: bool) -> Any:
    """Import an application.

    Args:
        app_dir: Inserted at the front of ``sys.path``, once.
        factory: The target is a function that returns the application.

    Raises:
        StartError: The module or attribute does not exist (HP501, HP502), or is not callable (HP503).
        BaseException: Raised by the application's own code.
    """
    module_name, attribute = split_target(target)
    directory = str(Path(app_dir).resolve())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    find = _load_file if module_name.endswith(".py") else _import
    try:
        module = find(module_name, attribute or USUAL_NAMES[0])
    except ImportError as error:
        raise _of_a_package(error, module_name, attribute or USUAL_NAMES[0]) or error from None
    if not attribute:
        attribute = next((name for name in USUAL_NAMES if hasattr(module, name)), USUAL_NAMES[0])
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = nearest(name, [n for n in dir(found) if not n.startswith("_")])
            cause = f"{getattr(module, '__file__', module_name)} has no {name!r}"
            fix = f"hotport serve {module_name}:{near}" if near else ""
            note = "" if near else f"name another attribute of the module: hotport serve {module_name}:NAME"
            if _is_guarded(module, name):
                cause += "; workers import it, and what stands under if __name__ == '__main__' is not run then"
                fix, note = "", f"move {name!r} out of there, to the top level of the module"
            elif near:
                cause += f"; the nearest name is {near!r}"
            raise StartError("HP502", f"cannot find {attribute!r} in {module_name}", cause=cause, fix=fix, note=note)
        found = getattr(found, name)
    if not callable(found):
        raise StartError(
            "HP503",
            f"{target} is not an application",
            cause=f"it is of type {type(found).__name__} and cannot be called",
            note="name an ASGI app, a stream handler, a protocol factory or a sockets function",
        )
    return found() if factory else found


def _of_a_package(error: ImportError, module_name: str, attribute: str) -> StartError | None:
    """Return what to do about a module that imports relatively and was not imported as a part of its package."""
    import shlex  # most workers never need it

    frame, line = [*traceback.walk_tb(error.__traceback__)][-1]
    file = Path(frame.f_code.co_filename)
    name = module_name.removesuffix(".py").rpartition("/")[2]
    if "no known parent package" not in str(error) or name.rpartition(".")[2] != file.stem:
        return None
    top = file.parent
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    module = ".".join([*file.parent.relative_to(top.parent).parts, file.stem])
    directory = os.path.relpath(top.parent)
    place = "" if directory == "." else f" --app-dir {shlex.quote(directory)}"
    return StartError(
        "HP517",
        f"cannot import {module_name} by itself",
        cause=f"line {line} of {file.name} has a relative import: the module belongs to {module.rpartition('.')[0]}",
        fix=f"hotport serve {module}:{attribute}{place}",
    )


def _is_guarded(module: Any, name: str) -> bool:
    """Whether a module binds a name under ``if __name__ == "__main__"``."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # it has no source
        return False
    guards = [node for node in tree.body if isinstance(node, ast.If) and "'__main__'" in ast.dump(node.test)]
    stored = [
        node for guard in guards for node in ast.walk(guard) if not isinstance(getattr(node, "ctx", None), ast.Load)
    ]
    return name in {getattr(node, "name", getattr(node, "id", None)) for node in stored}


def _import(name: str, attribute: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the application's own import failed: its traceback says where
        places = [Path(entry or ".") for entry in sys.path[:1]]
        modules = [p.stem for place in places for p in place.glob("*.py")]
        packages = [p.parent.name for place in places for p in place.glob("*/__init__.py")]
        near = nearest(name, modules + packages)
        raise StartError(
            "HP501",
            f"cannot find the module {name!r}",
            cause=f"it is neither in {places[0]} nor installed in {sys.executable}"
            + (f"; the nearest name is {near!r}" if near else ""),
            fix=f"hotport serve {near}:{attribute}" if near else "",
            note="" if near else f"name the directory that it is in: hotport serve {name}:{attribute} --app-dir DIR",
        ) from None


def _load_file(path: str, attribute: str) -> Any:
    file = Path(path).resolve()
    if not file.is_file():
        near = nearest(file.name, [p.name for p in file.parent.glob("*.py")])
        raise StartError(
            "HP501",
            f"cannot find the file {path}",
            cause=f"{file} does not exist" + (f"; the nearest name is {near!r}" if near else ""),
            fix=f"hotport serve {Path(path).with_name(near)}:{attribute}" if near else f"ls {file.parent}",
        )
    if SCRIPT_MODULE in sys.modules:
        return sys.modules[SCRIPT_MODULE]
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(SCRIPT_MODULE, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SCRIPT_MODULE] = module
    spec.loader.exec_module(module)
    return module


def detect_kind(application: Any, name: str = "app") -> str:
    """Return ``asgi``, ``protocol``, ``datagram``, ``sockets`` or ``stream``, by the application's signature.

    Args:
        name: Its attribute name, for the suggested lines that wrap it as an ASGI application.

    Raises:
        StartError: It is a WSGI (HP515) or an ASGI 2 application (HP516), or of no known kind (HP504).
    """
    inner = _unwrapped(application)
    is_class = isinstance(inner, type)
    is_protocol = is_class and issubclass(inner, asyncio.BaseProtocol)
    is_async = _is_async(application) or _is_async(inner)
    try:
        parameters = _parameters(application)
    except (TypeError, ValueError):
        parameters = []
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    hint = ""
    match required:
        case [] if is_protocol:
            return "datagram" if issubclass(inner, asyncio.DatagramProtocol) else "protocol"
        case [*_] if is_protocol:
            hint = "; a protocol is made without arguments: functools.partial can carry them"
        case [_, _, _] if is_async or not is_class:
            return "asgi"
        case ["scope", *_] if is_async and len(required) < 3 and (takes_any or len(positional) >= 3):
            return "asgi"
        case [] if takes_any and not positional and not is_class:
            return "asgi"
        case [_, _] if is_async:
            return "sockets"
        case [_] if is_async:
            return "stream"
        case [first, second] if first.startswith("env") or second.startswith("start"):
            raise StartError(
                "HP515",
                "cannot serve a WSGI application as it is",
                cause=f"it takes {first} and {second}, and is not async",
                fix=f"from a2wsgi import WSGIMiddleware; {name} = WSGIMiddleware({name})  # pip install a2wsgi",
            )
        case ["scope"]:
            raise StartError(
                "HP516",
                "cannot serve an ASGI 2 application as it is",
                cause="it takes the scope alone, and returns a callable for receive and send",
                fix=f"from asgiref.compatibility import guarantee_single_callable as single; {name} = single({name})"
                "  # pip install asgiref",
            )
        case [_, _]:
            hint = "; a sockets function is async, a WSGI application must be wrapped: a2wsgi.WSGIMiddleware"
        case []:
            hint = "; if it makes the application, say --factory; if it makes a protocol, --kind protocol"
    raise StartError(
        "HP504",
        "cannot tell what kind of application this is",
        cause=f"it takes {len(required)} argument(s) and is {'' if is_async else 'not '}async{hint}",
        note="name the kind: --kind asgi, stream, protocol, datagram or sockets",
    )


def _unwrapped(application: Any) -> Any:
    """Unwrap partials, and decorators that use ``functools.wraps``."""
    while isinstance(inner := inspect.unwrap(application), functools.partial):
        application = inner.func
    return inner


def _parameters(application: Any) -> list[inspect.Parameter]:
    """The application's own parameters; if it takes ``*args``, those of the function that it wraps."""
    own = list(inspect.signature(application, follow_wrapped=False).parameters.values())
    if all(p.kind is not p.VAR_POSITIONAL for p in own):
        return own
    return list(inspect.signature(application).parameters.values())


def _is_async(application: Any) -> bool:
    """Whether a call returns an awaitable, as far as inspection can tell."""
    if isinstance(application, type):
        return hasattr(application, "__await__")  # its instances: Starlette's endpoints are such classes
    call = getattr(application, "__call__", None)  # noqa: B004  the bound method itself is wanted
    return inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(call)


def kind_of(application: Any, options: Options) -> str:
    """Return ``options.kind``, or detect the kind if it is ``auto``; raises StartError as `detect_kind` does."""
    if options.kind != "auto":
        return options.kind
    module, name = split_target(options.target or "")
    if not name:
        loaded = vars(sys.modules[module]) if module in sys.modules else {}
        name = next((usual for usual in USUAL_NAMES if loaded.get(usual) is application), "")
    try:
        return detect_kind(application, "app" if options.factory else name or "app")
    except StartError as error:
        beside = re.sub(r"(^|\.)wsgi$", r"\1asgi", module)
        if error.code == "HP515" and beside != module and importlib.util.find_spec(beside) is not None:
            error.fix, error.note = f"hotport serve {beside}:{name}", f"or wrap it: {error.fix}"  # Django has both
        raise


def make_adapter(application: Any, context: Context, options: Options) -> Adapter | DatagramAdapter | SocketsAdapter:
    """Make the adapter for an application, by ``options.kind`` or by detection.

    Raises:
        StartError: Its kind is unclear or not served (HP504, HP515, HP516), or it needs an extra that is not
            installed (HP505).
    """
    kind = kind_of(application, options)
    arguments = (application, context, options) if kind == "asgi" else (application, context)
    adapter: Adapter | DatagramAdapter | SocketsAdapter = import_adapter(kind)(*arguments)
    return adapter


def import_adapter(kind: str) -> Any:
    """Import the class that adapts applications of one kind: each needs packages that the others do not.

    Raises:
        StartError: It needs an extra that is not installed (HP505).
    """
    match kind:
        case "asgi":
            try:
                from hotport.adapters.asgi import AsgiAdapter
            except ModuleNotFoundError as error:
                raise StartError(
                    "HP505",
                    "cannot serve an ASGI application",
                    cause=f"the package {error.name} is not installed in {sys.executable}",
                    fix=f"{sys.executable} -m pip install 'hotport[asgi]'",
                ) from None
            return AsgiAdapter
        case "stream":
            from hotport.adapters.stream import StreamAdapter

            return StreamAdapter
        case "sockets":
            return SocketsAdapter
        case "datagram":
            return DatagramAdapter
        case "protocol":
            from hotport.adapters.protocol import ProtocolAdapter

            return ProtocolAdapter
        case _:
            raise AssertionError(f"no adapter serves the kind {kind}")
