"""Lines for a terminal that quote clients and programs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
import structlog

from hotport.observe import logs


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """What would be on the terminal; everything is as before afterwards."""
    loggers = [logging.getLogger(), logging.getLogger("hotport")]
    before = [(each, each.handlers[:], each.level, each.propagate) for each in loggers]
    look = (logs._look.output, logs._look.values, logs._look.console)
    out = io.StringIO()
    logs._look.output = out  # type: ignore[assignment]  # whoever writes lines only calls `write`
    logs.configure(format="console", level="info")
    yield out
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
    logs._look.output, logs._look.values, logs._look.console = look
    logging.captureWarnings(False)
    structlog.reset_defaults()


def test_what_a_client_has_sent_writes_no_line_and_moves_no_cursor(console: io.StringIO) -> None:
    """A path with a line break forged a line of the console's log, and ESC reached the terminal."""
    logging.getLogger("hotport.error").error("the application raised: GET /\x1b[2J\n2026-01-01 forged")
    structlog.stdlib.get_logger("hotport.supervisor").info("worker.lost", why="\x1b[31m", error="\x1b[31m red\nforged")
    text = console.getvalue()
    assert "\x1b" not in text
    assert "GET /\\u001b[2J\n    2026-01-01 forged" in text
    assert "why=\\u001b[31m" in text
    assert [line for line in text.splitlines() if line.startswith("forged")] == []


def test_access_log_on_a_terminal_shows_what_was_sent(console: io.StringIO) -> None:
    assert "path=/\\u009b2J " in logs.renderer("hotport.access")({"event": "request", "path": "/\x9b2J"})


def test_exception_of_an_application_is_shown_and_not_obeyed(console: io.StringIO) -> None:
    try:
        raise ValueError("\x1b]0;title\x07")
    except ValueError:
        logging.getLogger("hotport.error").exception("the application raised")
    structlog.stdlib.get_logger("hotport.supervisor").warning("worker.lost", exception="Traceback:\n\x1b[2J")
    text = console.getvalue()
    assert "ValueError: \\u001b]0;title\\u0007\n" in text
    assert "Traceback:\n\\u001b[2J" in text
    assert "\x1b" not in text


def test_line_of_an_application_is_its_own(console: io.StringIO) -> None:
    logging.getLogger("app").warning("\x1b[1mbold\x1b[0m\nand more")
    assert "\x1b[1mbold\x1b[0m\nand more" in console.getvalue()
