"""Request ids: of a trusted proxy, or made; for the application, the access log and log lines."""

from __future__ import annotations

import os
import re
from contextvars import Context
from typing import Any, Final

from structlog.contextvars import bind_contextvars

__all__ = ["bind", "identify"]

#: The header field, and the key of log lines and of ``scope["state"]``.
FIELD: Final = b"x-request-id"
KEY: Final = "request_id"

#: What is taken from a proxy: it ends up in log lines, and perhaps in headers of other services.
TAKEN: Final = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")


def identify(headers: list[tuple[bytes, bytes]], given: bytes | None) -> tuple[list[tuple[bytes, bytes]], str]:
    """Return a request's id, and its header fields with that id in place of any other.

    Args:
        given: The id in its header fields, if these are of a trusted peer.
    """
    if given is not None and TAKEN.fullmatch(given):
        value = given
    else:
        value = os.urandom(16).hex().encode("ascii")
    others = [field for field in headers if field[0] != FIELD]
    others.append((FIELD, value))
    return others, value.decode("ascii")


def bind(context: Context, state: dict[str, Any]) -> None:
    """Put a request's id on the log lines of structlog, and of the standard library, that are written in a context."""
    context.run(bind_contextvars, **{KEY: state[KEY]})
