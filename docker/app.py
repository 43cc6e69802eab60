"""What the image serves until it has an application of its own: who answers."""

import os
import socket


async def app(scope, receive, send):
    assert scope["type"] == "http"
    who = f"generation {os.environ['HOTPORT_GENERATION']} in {socket.gethostname()}, release {os.environ['RELEASE']}\n"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": who.encode()})
