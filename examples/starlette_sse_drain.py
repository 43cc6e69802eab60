"""Server-sent events with Starlette that survive restarts: a client is told to reconnect, and goes on where it was.

pip install starlette 'hotport[asgi]'
hotport serve starlette_sse_drain:app
curl -N http://127.0.0.1:8000/events
hotport restart starlette_sse_drain       (in another terminal)

A browser's EventSource does the rest: it reconnects after `retry` milliseconds and sends the last id that it has seen.
"""

import asyncio
import random
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route


async def events(request: Request) -> StreamingResponse:
    draining = request.scope["extensions"]["hotport"]["draining"]

    async def numbers() -> AsyncIterator[str]:
        number = int(request.headers.get("last-event-id", "0"))
        while not draining.is_set():
            number += 1
            yield f"id: {number}\ndata: {number}\n\n"
            try:
                async with asyncio.timeout(1):
                    await draining.wait()
            except TimeoutError:
                continue
        yield f"retry: {random.randint(100, 2000)}\n\n"  # not all clients at once

    return StreamingResponse(numbers(), media_type="text/event-stream", headers={"cache-control": "no-store"})


app = Starlette(routes=[Route("/events", events)])
