"""A chat over plain TCP, without a framework. Everybody in a room is in one process, so there is one worker.

pip install hotport
hotport serve raw_stream_chat:chat --bind 127.0.0.1:7000
nc 127.0.0.1 7000                         (in two terminals)
hotport restart raw_stream_chat           (everybody is asked to come back)
"""

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream

import hotport

LINE_BYTES_MAX = 1000

room: set[hotport.Stream] = set()


async def chat(stream: hotport.Stream) -> None:
    draining = stream.extra(hotport.StreamAttribute.draining)
    room.add(stream)
    try:
        await stream.send(b"* welcome, %d here\n" % len(room))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, stream, tasks.cancel_scope)
            await draining.wait()
            await stream.send(b"* the server restarts, please connect again\n")
            tasks.cancel_scope.cancel()
    finally:
        room.discard(stream)


async def listen(stream: hotport.Stream, scope: anyio.CancelScope) -> None:
    """Pass on what one says, until it leaves."""
    lines = BufferedByteReceiveStream(stream)
    try:
        while True:
            line = await lines.receive_until(b"\n", LINE_BYTES_MAX)
            for other in room - {stream}:
                try:
                    await other.send(line + b"\n")
                except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                    continue  # its own task sees to it
    except (anyio.EndOfStream, anyio.IncompleteRead, anyio.DelimiterNotFound, anyio.BrokenResourceError):
        scope.cancel()
