"""hypercorn inside a hotport worker: HTTP/2 and WebSocket, restarted by hotport."""

import logging

from app import app
from hypercorn.asyncio import serve
from hypercorn.config import Config


async def main(sockets, lifetime):
    config = Config()
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    config.backlog = 4096
    config.errorlog = logging.getLogger("hypercorn.error")  # its lines among hotport's, at --log-level
    lifetime.started()  # hypercorn does not say when; until then connections wait in the accept queue
    await serve(app, config, shutdown_trigger=lifetime.draining.wait)
