"""A server that restarts itself: kill -HUP PID, and the code on disk continues where this one stopped."""

import asyncio
import os
import signal

import hotport


@hotport.restartable
async def handler(stream):
    count = stream.state or 0  # None for a client that has just come
    async for _ in stream:
        count += 1
        stream.state = count
        await stream.send(f"{count}\n".encode())


async def main():
    async with hotport.serve(handler, bind="tcp://127.0.0.1:0", restart_on_hup=True) as server:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
        print(os.getpid(), *server.addresses, flush=True)
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
