"""aiohttp inside a hotport worker."""

from aiohttp import web


async def hello(request):
    return web.Response(text="hello\n")


async def main(sockets, lifetime):
    application = web.Application()
    application.router.add_get("/", hello)
    runner = web.AppRunner(application, handle_signals=False)
    await runner.setup()
    for sock in sockets:
        await web.SockSite(runner, sock, backlog=4096).start()
    lifetime.started()
    await lifetime.draining.wait()
    await runner.cleanup()
