"""One structlog chain for every log line of a process: ours, the libraries', the application's.

Everything goes through the standard library's root logger and one structlog formatter: a line of JSON, or coloured
columns on a terminal. Lines go to stderr with one write each, which never waits and never fails: see
`hotport.observe.output`. Stdout belongs to the application and to ``--json``.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TextIO

import msgspec

from hotport.errors import visible
from hotport.kernel.output import open_sink
from hotport.observe.output import Output, stream_over
from hotport.wire.counters import LOG_DROPPED

__all__ = [
    "configure",
    "count_dropped",
    "dropped",
    "flush",
    "get_logger",
    "get_shared_logger",
    "renderer",
    "revive",
    "write",
]

#: How long a process that ends waits for a reader of its last lines.
FLUSH_TIMEOUT_S: Final = 1.0


def _import_structlog() -> Any:
    """structlog, without rich.

    ``structlog.dev`` imports rich wherever it is installed, for tracebacks that nobody draws here: 40 ms and 6 MB
    in every worker. An application that has imported rich itself keeps it.
    """
    if "rich" in sys.modules:
        import structlog

        return structlog
    sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        import structlog
    finally:
        del sys.modules["rich"]
    return structlog


structlog = _import_structlog()


#: With one of these, values are written by `repr` (structlog's ConsoleRenderer), which shows what is not printable.
_QUOTED: Final = frozenset(" \t=\r\n\"'")


@dataclass
class _Look:
    """The format and the output of this process's log lines."""

    output: Output | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    console: Callable[[Any, str, dict[str, Any]], str] | None = None


_look = _Look()


def write(text: str) -> None:
    """Write whole lines to the log's output, in order; never waits and never fails."""
    _output().write(text)


def dropped() -> int:
    """Count the lines this process has dropped because too many were waiting."""
    return _look.output.dropped if _look.output is not None else 0


def count_dropped(cells: memoryview | None) -> None:
    """Count them in a page of counters, too, from now on; None: no more."""
    _output().count_in(cells[LOG_DROPPED.start : LOG_DROPPED.end] if cells is not None else None)


def flush(timeout_s: float = FLUSH_TIMEOUT_S) -> None:
    """Write the waiting lines, for at most `timeout_s` seconds."""
    if _look.output is not None:
        _look.output.flush(timeout_s)


def _output() -> Output:
    """Return the output; opened for the first line."""
    if _look.output is None:
        fd = _stderr()
        _look.output = Output(open_sink(os.open(os.devnull, os.O_WRONLY) if fd is None else fd), _dropped_line)
    return _look.output


def _stderr() -> int | None:
    """Return the descriptor of stderr; None if it is closed or replaced."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _dropped_line(lines: int, why: str) -> str:
    return renderer("hotport.log", level="warning")({"event": "log.dropped", "lines": lines, "why": why})


def renderer(name: str, *, level: str = "info") -> Callable[[dict[str, Any]], str]:
    """Make a renderer of log lines that is far cheaper than a logger, for callers that write very many.

    They look like a logger's of that name; call it after `configure`.
    """
    console, values = _look.console, {**_look.values, "level": level, "logger": name}
    if console is not None:
        return lambda event: console(None, level, {**values, **event, "timestamp": _timestamp()}) + "\n"
    prefix = msgspec.json.encode(values)[:-1].decode()
    encode = msgspec.json.Encoder().encode
    return lambda event: f'{prefix},{encode(event)[1:-1].decode()},"timestamp":"{_timestamp()}"}}\n'


def _timestamp() -> str:
    now = time.time()
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1e6):06}Z"


def get_logger(name: str) -> Any:
    """Return a structlog logger; bound values travel through the standard library's record."""
    return structlog.stdlib.get_logger(name)


def get_shared_logger(name: str) -> Any:
    """Return a logger for code that runs in workers and in user programs; call it at use, not at import.

    In a program that has configured no structlog, lines go where the standard library's go: structlog by itself would
    print them on stdout, which is the program's.
    """
    if structlog.is_configured():
        return get_logger(name)
    return structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.processors.format_exc_info,
            structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True),
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
    )


class _Handler(logging.Handler):
    """Writes formatted records to the output."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:
            self.handleError(record)
        else:
            write(text + "\n")

    def handleError(self, record: logging.LogRecord) -> None:
        """Report where a record that cannot be formatted was made, without waiting as the library's handler does."""
        where = f"a line of {record.name} cannot be shown, from {record.pathname}:{record.lineno}"
        write(f"{where}\n{traceback.format_exc()}")


def configure(*, format: str, level: str, **bound: object) -> None:
    """Set up logging for this process, and `sys.stderr`; nothing else in hotport does.

    Whatever is written to `sys.stderr` from now on is written as log lines are: it does not wait either. File
    descriptor 2 stays as it is.

    Args:
        format: ``console``, ``json``, or ``auto`` (console if stderr is a terminal).
        level: Name of the lowest level that is written.
        bound: Put on every line, whoever writes it (generation, worker).
    """
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    is_console = format == "console" or (format == "auto" and is_terminal)
    values = {**bound, "pid": os.getpid()}

    def add_bound(_: Any, __: str, event: dict[str, Any]) -> dict[str, Any]:
        return {**values, **event}

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        add_bound,
    ]
    rendering: list[Any]
    if is_console:
        use_colours = is_terminal and not os.environ.get("NO_COLOR")
        columns = structlog.dev.ConsoleRenderer(colors=use_colours, exception_formatter=_visible_traceback)
        rendering = [lambda logger, name, event: columns(logger, name, _visible_values(event))]
    else:
        rendering = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    _look.values, _look.console = values, rendering[0] if is_console else None
    if _look.output is None:
        output, fd = _output(), _stderr()
        atexit.register(flush)
        if fd is not None:
            sys.stderr = stream_over(output, fd)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
    )
    handler = _Handler()
    handler.setFormatter(formatter)
    # Applications configure the root logger as they like (Litestar does by itself); ours are ours.
    for logger in (logging.getLogger(), logging.getLogger("hotport")):
        logger.handlers[:] = [handler]
    set_level(level)
    logging.getLogger("hotport").propagate = False
    logging.captureWarnings(True)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def set_level(level: str) -> None:
    """Set the lowest level that is written from now on, as in `configure`.

    Loggers to which the application has given a level of their own keep it.
    """
    for logger in (logging.getLogger(), logging.getLogger("hotport")):
        logger.setLevel(level.upper())


def _visible_values(event: dict[str, Any]) -> dict[str, Any]:
    """Escape control characters in values, which may quote clients and programs, before they reach a terminal.

    An application's own lines are its own.
    """
    if not str(event.get("logger", "")).startswith("hotport."):
        return event
    return {key: _visible_value(key, value) if isinstance(value, str) else value for key, value in event.items()}


def _visible_value(key: str, value: str) -> str:
    if value.isprintable():
        return value
    if key == "event":
        return visible(value).replace("\n", "\n    ")
    if key in ("exception", "stack"):
        return visible(value)
    return value if set(value) & _QUOTED else visible(value)


def _visible_traceback(stream: TextIO, exc_info: Any) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    stream.write(visible(text.getvalue()))


def revive() -> None:
    """Enable our loggers again after an application has configured logging.

    By default `logging.config.dictConfig` disables every logger that it does not name.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("hotport.") and isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.getLogger("hotport").disabled = False
