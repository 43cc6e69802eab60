"""A WebSocket that a restart does not close: it moves to the new code, with what the application knows of it."""


async def app(scope, receive, send):
    if scope["type"] != "websocket":
        return
    hotport = scope["extensions"]["hotport"]
    count = hotport["state"] or 0  # None for a client that has just come
    hotport["movable"](lambda: count)
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        count += 1
        await send({"type": "websocket.send", "text": f"{count} {message['text']}"})
