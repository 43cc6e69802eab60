"""A protocol of lines over a stream: after the notice, one last line, and the end."""

import anyio

import hotport


async def handler(stream):
    draining = stream.extra(hotport.StreamAttribute.draining)
    async with anyio.create_task_group() as tasks:

        async def say_goodbye():
            await draining.wait()
            await stream.send(f"221 leaving within {draining.remaining_s():.0f} s\n".encode())
            tasks.cancel_scope.cancel()

        tasks.start_soon(say_goodbye)
        async for chunk in stream:
            await stream.send(b"250 " + chunk)
        tasks.cancel_scope.cancel()
