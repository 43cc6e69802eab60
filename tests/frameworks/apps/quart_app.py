"""Quart: Flask's ways over ASGI, with sessions, files and static files."""

import asyncio
import hashlib

from common import BIG, HERE, SEEN, STATIC, chunks, told, torn, who
from quart import Quart, Response, jsonify, redirect, request, send_file, url_for, websocket
from quart import session as cookies

VERSION = "v0"

app = Quart(__name__, static_folder=str(STATIC))
app.secret_key = "test"


@app.before_serving
async def startup():
    app.started = VERSION


@app.after_serving
async def shutdown():
    (HERE / f"stopped-{VERSION}").touch()


@app.after_request
async def stamp(response):
    response.headers["x-middleware"] = "on"
    return response


@app.get("/version")
def version():
    return who(VERSION)


@app.get("/hello/<name>")
async def hello(name):
    return {"name": name}


@app.get("/anything/<path:rest>")
async def anything(rest):
    return {"path": request.scope["path"], "raw_path": request.scope["raw_path"].decode()}


@app.get("/query")
async def query():
    return request.args.to_dict(flat=False)


@app.post("/json")
async def json():
    return jsonify(await request.get_json())


@app.post("/form")
async def form():
    return (await request.form).to_dict()


@app.post("/upload")
async def upload():
    file = (await request.files)["file"]
    return {"name": file.filename, "note": (await request.form)["note"], **told(file.read())}


@app.post("/receive")
async def receive():
    digest, size = hashlib.sha256(), 0
    async for chunk in request.body:
        digest.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


@app.get("/stream")
async def stream():
    return chunks(), {"content-type": "text/plain"}


@app.get("/break-off")
async def break_off():
    return torn(), {"content-type": "text/plain"}


@app.get("/file")
async def file():
    return await send_file(HERE / "big.bin", conditional=True)


@app.get("/background")
async def background():
    async def after():
        SEEN.append("background")

    app.add_background_task(after)
    return "accepted", 202


@app.get("/boom")
async def boom():
    raise RuntimeError("secret words")


@app.get("/state")
async def state():
    return app.started


@app.get("/big")
async def big():
    return BIG


@app.get("/session/<value>")
async def set_session(value):
    cookies["value"] = value
    return "", 204


@app.get("/session")
async def session():
    return cookies.get("value", "")


@app.get("/empty")
async def empty():
    return "", 204


@app.get("/unchanged")
async def unchanged():
    return Response(status=304, headers={"etag": '"1"'})


@app.get("/old")
async def old():
    return redirect(url_for("hello", name="new"))


@app.get("/slow")
async def slow():
    SEEN.append("slow has begun")
    try:
        await asyncio.sleep(600)
    finally:
        SEEN.append("slow")


@app.get("/sse")
async def sse():
    async def events():
        try:
            while True:
                yield "data: tick\n\n"
                await asyncio.sleep(0.02)
        finally:
            SEEN.append("sse")

    response = Response(events(), content_type="text/event-stream")
    response.timeout = None
    return response


@app.get("/seen")
async def seen():
    return jsonify(SEEN)


@app.get("/slash/")
async def slash():
    return "slash"


@app.websocket("/ws")
async def echo():
    try:
        while True:
            await websocket.send(await websocket.receive())
    finally:
        SEEN.append("websocket")
