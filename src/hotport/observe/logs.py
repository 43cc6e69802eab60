"""One chain for every log line of a process: ours, the libraries', the application's.

Everything goes through the standard library's root logger and one structlog formatter: a line of JSON, or coloured
columns on a terminal. Lines go to stderr with one write each; stdout belongs to the application and to ``--json``.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any, TextIO

__all__ = ["configure", "get_logger", "revive"]


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


def get_logger(name: str) -> Any:
    """A structlog logger; bound values travel through the standard library's record."""
    return structlog.stdlib.get_logger(name)


def configure(*, format: str, level: str, stream: TextIO | None = None, **bound: object) -> None:
    """Set up logging for this process; nothing else in hotport does.

    Args:
        format: ``console``, ``json``, or ``auto`` (console if the stream is a terminal).
        level: Name of the lowest level that is written.
        bound: Put on every line, whoever writes it (generation, worker).
    """
    # Without any: we were started with stderr closed, and keep this one for as long as we live.
    out = stream or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    is_console = format == "console" or (format == "auto" and out.isatty())
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
    renderer: list[Any]
    if is_console:
        use_colours = out.isatty() and not os.environ.get("NO_COLOR")
        renderer = [
            structlog.dev.ConsoleRenderer(colors=use_colours, exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        renderer = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False, default=str),
        ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(formatter)
    # Applications configure the root logger as they like (Litestar does by itself); ours are ours.
    for logger in (logging.getLogger(), logging.getLogger("hotport")):
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
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


def revive() -> None:
    """Let our loggers speak again after an application has configured logging.

    By default `logging.config.dictConfig` disables every logger that it does not name.
    """
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("hotport.") and isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.getLogger("hotport").disabled = False
