"""The same as an asyncio.Protocol."""

import asyncio


class Counter(asyncio.Protocol):
    def __init__(self):
        self.count, self.rest = 0, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.count += 1
            self.transport.write(b"%d %b\n" % (self.count, line))

    def export_state(self):
        return None if self.rest else self.count

    def import_state(self, state):
        self.count = state
