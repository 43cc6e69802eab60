"""How long one connection may work before others have their turn."""

from __future__ import annotations

from typing import Final

__all__ = ["LONG_READ_BYTES", "TURN_S"]

#: Seconds of parsing, inflating and delivering for one connection in one turn of the event loop. What has been read
#: and not been looked at by then waits for the next turn (``loop.call_soon``), behind every connection that is ready by
#: now. Looked at between two pieces of work, so each piece has to be short by itself.
TURN_S: Final = 0.0005

#: A read of so many bytes ends a turn, too: libuv reads up to 32 times in a row while a client fills its buffer of
#: 256,000 bytes each time (``uv__read``), unless reading is paused meanwhile.
LONG_READ_BYTES: Final = 128 * 1024
