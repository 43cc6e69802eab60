"""Answers datagrams: hotport serve datagrams:Echo --bind udp://127.0.0.1:5353"""

import asyncio


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)
