"""The reference of log events, found in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hotport.model.effects import News
from hotport.supervisor.news import BAD

__all__ = ["Event", "log_events", "log_events_page"]

SOURCE: Final = Path(__file__).parent.parent / "src" / "hotport"

LEVELS: Final = ("debug", "info", "warning", "error", "exception", "critical")

NAME: Final = re.compile(r"[a-z_*]+(\.[a-z_*]+)+")

#: Fields of every announcement, by `hotport.supervisor.news`.
NEWS_FIELDS: Final = ("generation", "worker", "why")

HEAD: Final = """\
# Log events

<!-- Written by docs/generate.py from the source; do not edit. -->

With `log_format = "json"`, the default where stderr is no terminal, each line is an object. Its `event` is one of these
names, which stay as they are; what is known of it is in fields beside it. Count and search by name:
`jq 'select(.event == "worker.lost")'`.

Fields of every line:

| field | |
|---|---|
| `event`, `level`, `timestamp` | its name; `debug`, `info`, `warning` or `error`; in UTC, ISO 8601 |
| `logger` | the part of hotport that says so; of other libraries and the application, their logger |
| `service`, `pid` | the name of the service; the process that has written the line |
| `role` | `supervisor` in its lines |
| `generation`, `worker` | in lines of a worker: its numbers |
| `exception` | a traceback or an error of several lines, where there is one |
| `request_id` | with `request_id`: in lines that are written for a request |

Lines of the application, and those that tell of one client (`hotport.error`, `hotport.tls` and other loggers of the
standard library), have a sentence as `event`. The access log's lines have the event `request`, and the fields
`client`, `method`, `path`, `status`, `bytes` and `ms`.

"""

TAIL: Final = """
`*` stands for what was done: `*.failed` is an unexpected error, which is a bug of hotport, was contained, and has its
traceback in `exception`; `before_start.began` and its like are about commands of the operator.
"""


@dataclass(slots=True)
class Event:
    """One name, with everything that was found about it."""

    levels: set[str] = field(default_factory=set)
    fields: dict[str, None] = field(default_factory=dict)
    rooms: set[str] = field(default_factory=set)


def log_events() -> dict[str, Event]:
    """Every event of the source, by name."""
    found: dict[str, Event] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        for name, level, fields in _calls(ast.parse(path.read_text())):
            event = found.setdefault(name, Event())
            event.levels.add("error" if level == "exception" else level)
            event.fields |= dict.fromkeys([*fields, *(["exception"] if level == "exception" else [])])
            event.rooms.add(room)
    for news in News:
        event = found.setdefault(news.value, Event())
        event.levels.add("warning" if news in BAD else "info")
        event.fields |= dict.fromkeys([*NEWS_FIELDS, *(["exception"] if news is News.WORKER_LOST else [])])
        event.rooms.add("supervisor")
    return dict(sorted(found.items()))


def _calls(tree: ast.Module) -> Iterator[tuple[str, str, list[str]]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):  # for `renderer`
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            if "event" in keys and (name := _name(node.values[keys.index("event")])):
                yield name, "warning", [str(key) for key in keys if key not in ("event", None)]
        if not (isinstance(node, ast.Call) and node.args):
            continue
        name = _name(node.args[0])
        levels = _levels(node.func)
        fields = ["exception" if each.arg == "exc_info" else each.arg for each in node.keywords if each.arg]
        for level in levels if name else ():
            yield name, level, fields


def _levels(function: ast.expr) -> list[str]:
    """The methods of a logger that are called: there are two if a condition chooses one."""
    if isinstance(function, ast.IfExp):
        return [*_levels(function.body), *_levels(function.orelse)]
    is_logger = isinstance(function, ast.Attribute) and function.attr in LEVELS and "log" in ast.unparse(function.value)
    return [function.attr] if is_logger and isinstance(function, ast.Attribute) else []


def _name(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(text)):
            pass
        case ast.JoinedStr(values=values):
            text = "".join(str(each.value) if isinstance(each, ast.Constant) else "*" for each in values)
        case _:
            return ""
    return text if NAME.fullmatch(text) else ""


def log_events_page() -> str:
    """The page."""
    lines = ["| event | level | fields | logged by |", "|---|---|---|---|"]
    for name, event in log_events().items():
        fields = ", ".join(f"`{each}`" for each in event.fields)
        lines.append(f"| `{name}` | {', '.join(sorted(event.levels))} | {fields} | {', '.join(sorted(event.rooms))} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL
