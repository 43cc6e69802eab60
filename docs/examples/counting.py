"""Counts the lines of each client over all restarts."""

import hotport


@hotport.restartable
async def handler(stream):
    count, rest = stream.state or (0, "")  # None for a client that has just come
    async for chunk in stream:
        *lines, rest = (rest + chunk.decode()).split("\n")
        for line in lines:
            count += 1
            await stream.send(f"{count} {line}\n".encode())
        stream.state = (count, rest)
