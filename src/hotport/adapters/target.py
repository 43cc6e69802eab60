"""From ``module:attribute`` to an application and the adapter that fits it."""

from __future__ import annotations

import ast
import asyncio
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any, Final

from hotport.adapters.base import Adapter, Context
from hotport.adapters.sockets import SocketsAdapter
from hotport.errors import StartError, nearest
from hotport.options import Options

__all__ = ["detect_kind", "load_target", "make_adapter", "split_target"]

#: What a script that calls `hotport.run` is loaded as in its workers; never ``__main__``.
SCRIPT_MODULE: Final = "__hotport_main__"

#: Attributes tried when a target names a module only.
USUAL_NAMES: Final = ("app", "application", "main", "handler")


def split_target(target: str) -> tuple[str, str]:
    """``pkg.mod:attr`` and ``path/to/file.py:attr`` into their two halves; the second may be empty."""
    module, _, attribute = target.partition(":")
    return module, attribute


def load_target(target: str, *, app_dir: str, factory: bool) -> Any:
    """Import an application.

    Args:
        app_dir: Put in front of ``sys.path`` (once).
        factory: The target is a function that returns the application.

    Raises:
        StartError: The module or attribute does not exist (HP501, HP502), or is not callable (HP503).
        BaseException: Whatever the application's own code raises.
    """
    module_name, attribute = split_target(target)
    directory = str(Path(app_dir).resolve())
    if directory not in sys.path:
        sys.path.insert(0, directory)
    find = _load_file if module_name.endswith(".py") else _import
    module = find(module_name, attribute or USUAL_NAMES[0])
    if not attribute:
        attribute = next((name for name in USUAL_NAMES if hasattr(module, name)), USUAL_NAMES[0])
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            near = nearest(name, [n for n in dir(found) if not n.startswith("_")])
            cause = f"{getattr(module, '__file__', module_name)} has no {name!r}"
            fix = f"hotport serve {module_name}:{near or 'NAME'}"
            if _is_guarded(module, name):
                cause += "; workers import it, and what stands under if __name__ == '__main__' is not run then"
                fix = f"move {name!r} out of there, to the top level of the module"
            elif near:
                cause += f"; the nearest name is {near!r}"
            raise StartError("HP502", f"cannot find {attribute!r} in {module_name}", cause=cause, fix=fix)
        found = getattr(found, name)
    if not callable(found):
        raise StartError(
            "HP503",
            f"{target} is not an application",
            cause=f"it is of type {type(found).__name__} and cannot be called",
            fix="name an ASGI app, a stream handler, a protocol factory or a sockets function",
        )
    return found() if factory else found


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
            fix=f"hotport serve {near}:{attribute}"
            if near
            else f"hotport serve {name}:{attribute} --app-dir DIR, where DIR is the directory that it is in",
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


def detect_kind(application: Any) -> str:
    """``asgi``, ``protocol``, ``sockets`` or ``stream``, by what the application can be called with.

    Raises:
        StartError: None of them fits (HP504).
    """
    if isinstance(application, type) and issubclass(application, asyncio.BaseProtocol):
        return "protocol"
    try:
        parameters = list(inspect.signature(application).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    is_async = _is_async(application)
    match len(required):
        case 3:
            return "asgi"
        case 2 if is_async:
            return "sockets"
        case 1 if is_async:
            return "stream"
        case 0 if takes_any:
            return "asgi"
    hint = ""
    if len(required) == 2:
        hint = "; with two parameters it looks like a WSGI application: wrap it with a2wsgi.WSGIMiddleware"
    elif not required:
        hint = "; if it makes the application, say --factory; if it makes a protocol, --kind protocol"
    raise StartError(
        "HP504",
        "cannot tell what kind of application this is",
        cause=f"it takes {len(required)} argument(s) and is {'' if is_async else 'not '}async{hint}",
        fix="say it with --kind asgi, stream, protocol or sockets",
    )


def _is_async(application: Any) -> bool:
    call = getattr(application, "__call__", None)  # noqa: B004  the bound method itself is wanted
    return inspect.iscoroutinefunction(application) or inspect.iscoroutinefunction(call)


def make_adapter(application: Any, context: Context, options: Options) -> Adapter | SocketsAdapter:
    """The adapter for an application, after ``options.kind`` or by looking at it.

    Raises:
        StartError: Its kind is unclear (HP504), or it needs an extra that is not installed (HP505).
    """
    match detect_kind(application) if options.kind == "auto" else options.kind:
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
            return AsgiAdapter(application, context, options)
        case "stream":
            from hotport.adapters.stream import StreamAdapter  # anyio, which others do not need

            return StreamAdapter(application, context)
        case "sockets":
            return SocketsAdapter(application, context)
        case _:
            from hotport.adapters.protocol import ProtocolAdapter

            return ProtocolAdapter(application, context)
