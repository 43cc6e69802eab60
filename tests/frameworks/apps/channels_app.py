"""Django Channels: consumers for HTTP and WebSocket, and Django behind them."""

import asyncio
import json

import django_app
from channels.generic.http import AsyncHttpConsumer
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.routing import ProtocolTypeRouter, URLRouter
from common import SEEN, told, who
from django.urls import path, re_path

VERSION = "v0"


class Version(AsyncHttpConsumer):
    async def handle(self, body):
        await self.send_response(200, who(VERSION).encode(), headers=[(b"content-type", b"text/plain")])


class Receive(AsyncHttpConsumer):
    async def handle(self, body):
        answer = json.dumps(told(body)).encode()
        await self.send_response(200, answer, headers=[(b"content-type", b"application/json")])


class Events(AsyncHttpConsumer):
    """Server-sent events until the client leaves."""

    async def handle(self, body):
        await self.send_headers(headers=[(b"content-type", b"text/event-stream")])
        self.task = asyncio.create_task(self.tick())
        await self.send_body(b"data: open\n\n", more_body=True)

    async def tick(self):
        while True:
            await asyncio.sleep(0.02)
            await self.send_body(b"data: tick\n\n", more_body=True)

    async def http_request(self, message):
        self.body.append(message.get("body", b""))
        if not message.get("more_body"):
            await self.handle(b"".join(self.body))  # unlike the original, go on until `disconnect`

    async def disconnect(self):
        self.task.cancel()
        SEEN.append("sse")


class Echo(AsyncWebsocketConsumer):
    async def receive(self, text_data=None, bytes_data=None):
        await self.send(text_data=text_data)

    async def disconnect(self, code):
        SEEN.append("websocket")


class Count(AsyncWebsocketConsumer):
    async def connect(self):
        hotport = self.scope["extensions"]["hotport"]
        self.number = hotport["state"] or 0
        hotport["movable"](lambda: self.number)
        await self.accept()

    async def receive(self, text_data=None, bytes_data=None):
        self.number += 1
        await asyncio.sleep(0.02)
        await self.send(text_data=f"{self.number} {text_data}")


app = ProtocolTypeRouter(
    {
        "http": URLRouter(
            [
                path("version", Version.as_asgi()),
                path("receive", Receive.as_asgi()),
                path("sse", Events.as_asgi()),
                re_path("", django_app.app),
            ]
        ),
        "websocket": URLRouter([path("ws", Echo.as_asgi()), path("ws/count", Count.as_asgi())]),
    }
)
