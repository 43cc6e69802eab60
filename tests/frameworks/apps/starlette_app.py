"""Starlette with the middleware, routes and answers that people use."""

import asyncio
import hashlib
from contextlib import asynccontextmanager

from common import BIG, HERE, SEEN, STATIC, chunks, told, torn, who
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import (
    FileResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles

VERSION = "v0"


class Stamp(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        response = await call_next(request)
        response.headers["x-middleware"] = "on"
        return response


@asynccontextmanager
async def lifespan(app):
    yield {"started": VERSION}
    (HERE / f"stopped-{VERSION}").touch()


def version(request):
    return PlainTextResponse(who(VERSION))


async def hello(request):
    return JSONResponse({"name": request.path_params["name"]})


async def anything(request):
    scope = request.scope
    return JSONResponse({"path": scope["path"], "raw_path": scope["raw_path"].decode()})


async def query(request):
    return JSONResponse({key: request.query_params.getlist(key) for key in request.query_params})


async def json(request):
    return JSONResponse(await request.json())


async def form(request):
    async with request.form() as fields:
        return JSONResponse(dict(fields))


async def upload(request):
    async with request.form() as fields:
        file = fields["file"]
        return JSONResponse({"name": file.filename, "note": fields["note"], **told(await file.read())})


async def receive(request):
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return JSONResponse({"size": size, "sha256": digest.hexdigest()})


async def stream(request):
    return StreamingResponse(chunks(), media_type="text/plain")


async def break_off(request):
    return StreamingResponse(torn(), media_type="text/plain")


async def file(request):
    return FileResponse(HERE / "big.bin")


async def background(request):
    return PlainTextResponse("accepted", 202, background=BackgroundTask(after))


async def after():
    await asyncio.sleep(0)
    SEEN.append("background")


async def boom(request):
    raise RuntimeError("secret words")


async def state(request):
    return PlainTextResponse(request.state.started)


async def big(request):
    return PlainTextResponse(BIG)


async def set_session(request):
    request.session["value"] = request.path_params["value"]
    return Response(status_code=204)


async def session(request):
    return PlainTextResponse(request.session.get("value", ""))


async def empty(request):
    return Response(status_code=204)


async def unchanged(request):
    return Response(status_code=304, headers={"etag": '"1"'})


async def old(request):
    return RedirectResponse(request.url_for("hello", name="new"))


async def slow(request):
    SEEN.append("slow has begun")
    while not await request.is_disconnected():
        await asyncio.sleep(0.02)
    SEEN.append("slow")


async def sse(request):
    async def events():
        try:
            while True:
                yield "data: tick\n\n"
                await asyncio.sleep(0.02)
        finally:
            SEEN.append("sse")

    return StreamingResponse(events(), media_type="text/event-stream")


async def seen(request):
    return JSONResponse(SEEN)


async def slash(request):
    return PlainTextResponse("slash")


async def echo(websocket):
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
    SEEN.append("websocket")


async def count(websocket):
    hotport = websocket.scope["extensions"]["hotport"]
    number = hotport["state"] or 0
    hotport["movable"](lambda: number)
    await websocket.accept()
    async for text in websocket.iter_text():
        number += 1
        await asyncio.sleep(0.02)
        await websocket.send_text(f"{number} {text}")


STAMPED = [
    Route("/version", version),
    Route("/hello/{name}", hello, name="hello"),
    Route("/anything/{rest:path}", anything),
    Route("/query", query),
    Route("/json", json, methods=["POST"]),
    Route("/form", form, methods=["POST"]),
    Route("/upload", upload, methods=["POST"]),
    Route("/receive", receive, methods=["POST"]),
    Route("/stream", stream),
    Route("/file", file),
    Route("/background", background),
    Route("/boom", boom),
    Route("/state", state),
    Route("/big", big),
    Route("/session", session),
    Route("/session/{value}", set_session),
    Route("/empty", empty),
    Route("/unchanged", unchanged),
    Route("/old", old),
    Route("/sse", sse),
    Route("/seen", seen),
    Route("/slash/", slash),
    Mount("/api", routes=[Route("/slash/", slash)]),
]

app = Starlette(
    lifespan=lifespan,
    middleware=[
        Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "test"]),
        Middleware(CORSMiddleware, allow_origins=["https://example.org"], allow_methods=["PUT"]),
        Middleware(SessionMiddleware, secret_key="test"),
        Middleware(GZipMiddleware),
    ],
    routes=[
        # BaseHTTPMiddleware hides from those behind it that the client has left, and ends what they break off.
        Route("/break-off", break_off),
        Route("/slow", slow),
        Mount("/static", StaticFiles(directory=STATIC)),
        WebSocketRoute("/ws", echo),
        WebSocketRoute("/ws/count", count),
        Mount("/", middleware=[Middleware(Stamp)], routes=STAMPED),
    ],
)
