"""The application of the tutorial: it says which version of the code answered."""

import asyncio
import os

VERSION = "one"


async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/slow":
        await asyncio.sleep(3)
    body = f"version {VERSION}, generation {os.environ['HOTPORT_GENERATION']}\n".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})
