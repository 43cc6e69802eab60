"""Applications that a test names for workers: they live at the top level of a module."""

from __future__ import annotations

import os
from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with its generation."""
    assert scope["type"] == "http"
    body = os.environ["HOTPORT_GENERATION"].encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


async def lines(stream: Any) -> None:
    """Echoes."""
    while data := await stream.receive():
        await stream.send(data)


def crashing() -> Any:
    """With the faults that the environment names; they need an application that is made in each worker."""
    from hotport.testing import FaultyApp

    return FaultyApp(app)
