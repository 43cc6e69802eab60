"""A hotport server beside other tasks, in an event loop that is not hotport's."""

import asyncio
import signal

import hotport


async def echo(stream):
    async for chunk in stream:
        await stream.send(chunk)


async def main():
    async with hotport.serve(echo, bind="tcp://127.0.0.1:0", drain_timeout=5) as server:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
        print(*server.addresses, flush=True)
        await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
