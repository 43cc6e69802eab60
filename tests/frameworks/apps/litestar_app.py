"""Litestar with its own middleware, responses and static files."""

import asyncio
import hashlib
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any

from common import BIG, HERE, SEEN, STATIC, chunks, told, torn, who
from litestar import Litestar, MediaType, Request, Response, WebSocket, get, head, post, websocket
from litestar.background_tasks import BackgroundTask
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.exceptions import WebSocketDisconnect
from litestar.logging import LoggingConfig
from litestar.middleware.session.client_side import CookieBackendConfig
from litestar.params import Parameter
from litestar.response import File, Redirect, ServerSentEvent, Stream
from litestar.static_files import create_static_files_router

VERSION = "v0"


@asynccontextmanager
async def lifespan(app: Litestar):
    app.state.started = VERSION
    yield
    (HERE / f"stopped-{VERSION}").touch()


async def stamp(response: Response) -> Response:
    response.headers["x-middleware"] = "on"
    return response


@get("/version", media_type=MediaType.TEXT, sync_to_thread=True)
def version() -> str:
    return who(VERSION)


@get("/hello/{name:str}", name="hello")
async def hello(name: str) -> dict[str, str]:
    return {"name": name}


@head("/hello/{name:str}")
async def head_hello(name: str) -> None:
    return


@get("/anything/{rest:path}")
async def anything(request: Request, rest: str) -> dict[str, str]:
    return {"path": request.scope["path"], "raw_path": request.scope["raw_path"].decode()}


@get("/query")
async def query(a: list[str], unicode: Annotated[list[str], Parameter(query="u")]) -> dict[str, list[str]]:
    return {"a": a, "u": unicode}


@post("/json", status_code=200)
async def json(data: dict[str, Any]) -> dict[str, Any]:
    return data


@post("/form", status_code=200)
async def form(request: Request) -> dict[str, str]:
    return dict(await request.form())


@post("/upload", status_code=200, request_max_body_size=None)
async def upload(request: Request) -> dict[str, Any]:
    fields = await request.form()
    file = fields["file"]
    return {"name": file.filename, "note": fields["note"], **told(await file.read())}


@post("/receive", status_code=200, request_max_body_size=None)
async def receive(request: Request) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


@get("/stream", media_type=MediaType.TEXT)
async def stream() -> Stream:
    return Stream(chunks())


@get("/break-off", media_type=MediaType.TEXT)
async def break_off() -> Stream:
    return Stream(torn())


@get("/file")
async def file() -> File:
    return File(HERE / "big.bin")


async def after() -> None:
    SEEN.append("background")


@get("/background", status_code=202)
async def background() -> Response[str]:
    return Response("accepted", background=BackgroundTask(after))


@get("/boom")
async def boom() -> None:
    raise RuntimeError("secret words")


@get("/state", media_type=MediaType.TEXT)
async def started(state: State) -> str:
    return state.started


@get("/big", media_type=MediaType.TEXT)
async def big() -> str:
    return BIG


@get("/session/{value:str}", status_code=204)
async def set_session(request: Request, value: str) -> None:
    request.set_session({"value": value})


@get("/session", media_type=MediaType.TEXT)
async def session(request: Request) -> str:
    return request.session.get("value", "")


@get("/empty", status_code=204)
async def empty() -> None:
    return


@get("/unchanged", status_code=304)
async def unchanged() -> Response[None]:
    return Response(None, headers={"etag": '"1"'})


@get("/old", status_code=302)
async def old() -> Redirect:
    return Redirect("/hello/new")


@get("/slow")
async def slow(request: Request) -> None:
    SEEN.append("slow has begun")
    while (await request.receive())["type"] != "http.disconnect":
        pass
    SEEN.append("slow")


@get("/sse")
async def sse() -> ServerSentEvent:
    async def events():
        try:
            while True:
                yield {"data": "tick"}
                await asyncio.sleep(0.02)
        finally:
            SEEN.append("sse")

    return ServerSentEvent(events())


@get("/seen")
async def seen() -> list[str]:
    return SEEN


@get("/slash/", media_type=MediaType.TEXT)
async def slash() -> str:
    return "slash"


@websocket("/ws")
async def echo(socket: WebSocket) -> None:
    await socket.accept()
    try:
        while True:
            await socket.send_text(await socket.receive_text())
    except WebSocketDisconnect:
        SEEN.append("websocket")


@websocket("/ws/count")
async def count(socket: WebSocket) -> None:
    hotport = socket.scope["extensions"]["hotport"]
    number = hotport["state"] or 0
    hotport["movable"](lambda: number)
    await socket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            text = await socket.receive_text()
            number += 1
            await asyncio.sleep(0.02)
            await socket.send_text(f"{number} {text}")


app = Litestar(
    [
        version,
        hello,
        head_hello,
        anything,
        query,
        json,
        form,
        upload,
        receive,
        stream,
        break_off,
        file,
        background,
        boom,
        started,
        big,
        set_session,
        session,
        empty,
        unchanged,
        old,
        slow,
        sse,
        seen,
        slash,
        echo,
        count,
        create_static_files_router(path="/static", directories=[STATIC]),
    ],
    lifespan=[lifespan],
    after_request=stamp,
    middleware=[CookieBackendConfig(secret=b"sixteen letters!").middleware],
    compression_config=CompressionConfig(backend="gzip", exclude="/sse"),
    cors_config=CORSConfig(allow_origins=["https://example.org"], allow_methods=["PUT"]),
    logging_config=LoggingConfig(log_exceptions="always"),
    openapi_config=None,
)
