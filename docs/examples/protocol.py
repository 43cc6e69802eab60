"""An asyncio.Protocol that hears of the drain through one more method."""

import asyncio


class Lines(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(b"250 " + data)

    def drain_started(self, draining):
        self.transport.write(f"221 leaving within {draining.remaining_s():.0f} s\n".encode())
        self.transport.close()
