"""Find the application of a directory, for ``hotport serve`` without arguments.

By the source alone: the supervisor never imports an application.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["FILES", "Found", "find_target"]

#: Where frameworks' tutorials put it; the first that has an application is taken. Django's lies one directory deeper.
FILES: Final = ("app.py", "main.py", "asgi.py", "api.py", "app/app.py", "app/main.py", "app/asgi.py", "*/asgi.py")

NAMES: Final = ("app", "application", "api")

#: What is called "app" as well and serves nothing.
_OTHERS: Final = frozenset({"Typer", "Celery", "QApplication"})

FILE_BYTES_MAX: Final = 1 << 20


class Found(NamedTuple):
    """An application.

    Attributes:
        target: ``main:app``.
        file: ``main.py``.
        others: Files that have one as well, and were not taken.
    """

    target: str
    file: str
    others: tuple[str, ...]


def find_target(directory: Path) -> Found | None:
    """Find the application in the usual files of a directory; None if there is none."""
    found = []
    for pattern in FILES:
        for path in sorted(directory.glob(pattern)):
            if (name := _application(path)) is not None:
                relative = path.relative_to(directory)
                module = ".".join(relative.with_suffix("").parts)
                found.append((f"{module}:{name}", relative.as_posix()))
    others = tuple(file for _, file in dict.fromkeys(found[1:]) if file != found[0][1])
    return Found(*found[0], others) if found else None


def _application(path: Path) -> str | None:
    """Return the name of a file's application."""
    try:
        if not path.is_file() or path.stat().st_size > FILE_BYTES_MAX:
            return None
        bound = dict(_bound(ast.parse(path.read_bytes()).body))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return None
    return next((name for name in NAMES if bound.get(name)), None)


def _bound(body: list[ast.stmt]) -> Iterator[tuple[str, bool]]:
    """Each name that is bound at the top level, and whether it can be an ASGI application."""
    for node in body:
        match node:
            case ast.Assign(targets=targets, value=value):
                yield from ((target.id, _may_serve(value)) for target in targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=value):
                yield name, _may_serve(value)
            case ast.AsyncFunctionDef(name=name, args=arguments):
                yield name, len(arguments.posonlyargs + arguments.args) == 3
            case ast.ImportFrom(names=names):
                yield from ((alias.asname or alias.name, True) for alias in names)
            case ast.Try(body=inner) | ast.With(body=inner):
                yield from _bound(inner)
            case ast.If(test=test, body=inner) if "'__main__'" not in ast.dump(test):
                yield from _bound(inner)


def _may_serve(value: ast.expr | None) -> bool:
    match value:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name not in _OTHERS
        case None | ast.Constant() | ast.List() | ast.Dict() | ast.Tuple() | ast.Set():
            return False
    return True
