"""How long one connection may work before others have their turn."""

from __future__ import annotations

from typing import Final

__all__ = ["TURN_S"]

#: Seconds of parsing, inflating and delivering for one connection in one turn of the event loop. What has been read and
#: not been looked at by then waits for the next turn (``loop.call_soon``), behind every connection that is ready by now.
#: Looked at between two pieces of work, so each piece has to be short by itself.
TURN_S: Final = 0.002
