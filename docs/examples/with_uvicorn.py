"""uvicorn inside a hotport worker: hotport restarts it, uvicorn speaks HTTP and WebSocket."""

import asyncio

import uvicorn


class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        if not self.should_exit:  # its lifespan may have failed
            self.lifetime.started()


async def main(sockets, lifetime):
    server = Server(uvicorn.Config("app:app", log_config=None, backlog=4096))
    server.lifetime = lifetime

    async def follow():
        await lifetime.draining.wait()
        server.should_exit = True

    async with asyncio.TaskGroup() as tasks:
        follower = tasks.create_task(follow())
        await server._serve(sockets)  # serve() would take over the worker's signals
        follower.cancel()  # it could not start, or has drained
