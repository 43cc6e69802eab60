"""Server-sent events that end by themselves when the worker leaves; the browser reconnects to the next one."""

import asyncio


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    draining = scope["extensions"]["hotport"]["draining"]
    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    number = 0
    while not draining.is_set():
        await send({"type": "http.response.body", "body": f"data: {number}\n\n".encode(), "more_body": True})
        number += 1
        try:
            async with asyncio.timeout(1):
                await draining.wait()
        except TimeoutError:
            continue
    await send({"type": "http.response.body", "body": b"event: bye\ndata:\n\n"})
