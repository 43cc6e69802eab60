"""A program with an event loop of its own, and an HTTP page that tells how it is doing.

pip install 'hotport[asgi]'
python embedded_server.py                 (it prints where it listens; Ctrl-C drains and ends it)
"""

import asyncio
import signal

import hotport

done = 0


async def status(scope, receive, send):
    body = b"%d jobs done\n" % done
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": body})


async def work():
    global done
    while True:
        await asyncio.sleep(0.1)
        done += 1


async def main():
    async with (
        hotport.serve(status, bind="tcp://127.0.0.1:0", lifespan="off", drain_timeout=5) as server,
        asyncio.TaskGroup() as tasks,
    ):
        working = tasks.create_task(work())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, working.cancel)
        print(*server.addresses, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
