"""FastAPI with dependencies, models, uploads, and the middleware that people use."""

import asyncio
import hashlib
from contextlib import asynccontextmanager
from typing import Annotated, Any

from common import BIG, HERE, SEEN, STATIC, chunks, told, torn, who
from fastapi import BackgroundTasks, Body, Depends, FastAPI, File, Form, Query, Request, Response, UploadFile, WebSocket
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.sessions import SessionMiddleware

VERSION = "v0"


@asynccontextmanager
async def lifespan(app: FastAPI):
    yield {"started": VERSION}
    (HERE / f"stopped-{VERSION}").touch()


app = FastAPI(lifespan=lifespan)
api = FastAPI()
app.add_middleware(GZipMiddleware)
app.add_middleware(SessionMiddleware, secret_key="test")
app.add_middleware(CORSMiddleware, allow_origins=["https://example.org"], allow_methods=["PUT"])
app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "test"])
app.mount("/api", api)
app.mount("/static", StaticFiles(directory=STATIC))


@app.middleware("http")
async def stamp(request: Request, call_next):
    response = await call_next(request)
    response.headers["x-middleware"] = "on"
    return response


def started(request: Request) -> str:
    return request.state.started


@app.get("/version", response_class=PlainTextResponse)
def version():
    return who(VERSION)


@app.get("/hello/{name}")
async def hello(name: str):
    return {"name": name}


@app.get("/anything/{rest:path}")
async def anything(request: Request):
    return {"path": request.scope["path"], "raw_path": request.scope["raw_path"].decode()}


@app.get("/query")
async def query(a: Annotated[list[str], Query()], u: Annotated[list[str], Query()]):
    return {"a": a, "u": u}


@app.post("/json")
async def json(value: Annotated[Any, Body()]):
    return value


@app.post("/form")
async def form(one: Annotated[str, Form()], two: Annotated[str, Form()]):
    return {"one": one, "two": two}


@app.post("/upload")
async def upload(file: Annotated[UploadFile, File()], note: Annotated[str, Form()]):
    return {"name": file.filename, "note": note, **told(await file.read())}


@app.post("/receive")
async def receive(request: Request):
    digest, size = hashlib.sha256(), 0
    async for chunk in request.stream():
        digest.update(chunk)
        size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


@app.get("/stream")
async def stream():
    return StreamingResponse(chunks(), media_type="text/plain")


@app.get("/break-off")
async def break_off():
    return StreamingResponse(torn(), media_type="text/plain")


@app.get("/file")
async def file():
    return FileResponse(HERE / "big.bin")


@app.get("/background", status_code=202)
async def background(tasks: BackgroundTasks):
    tasks.add_task(SEEN.append, "background")


@app.get("/boom")
async def boom():
    raise RuntimeError("secret words")


@app.get("/state", response_class=PlainTextResponse)
async def state(value: Annotated[str, Depends(started)]):
    return value


@app.get("/big", response_class=PlainTextResponse)
async def big():
    return BIG


@app.get("/session/{value}", status_code=204)
async def set_session(request: Request, value: str):
    request.session["value"] = value


@app.get("/session", response_class=PlainTextResponse)
async def session(request: Request):
    return request.session.get("value", "")


@app.get("/empty", status_code=204)
async def empty():
    return


@app.get("/unchanged")
async def unchanged():
    return Response(status_code=304, headers={"etag": '"1"'})


@app.get("/old")
async def old(request: Request):
    return RedirectResponse(request.url_for("hello", name="new").path)


@app.get("/slow")
async def slow(request: Request):
    SEEN.append("slow has begun")
    while not await request.is_disconnected():
        await asyncio.sleep(0.02)
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

    return StreamingResponse(events(), media_type="text/event-stream")


@app.get("/seen")
async def seen():
    return SEEN


@app.get("/slash/", response_class=PlainTextResponse)
@api.get("/slash/", response_class=PlainTextResponse)
async def slash():
    return "slash"


@app.websocket("/ws")
async def echo(websocket: WebSocket):
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
    SEEN.append("websocket")


@app.websocket("/ws/count")
async def count(websocket: WebSocket):
    hotport = websocket.scope["extensions"]["hotport"]
    number = hotport["state"] or 0
    hotport["movable"](lambda: number)
    await websocket.accept()
    async for text in websocket.iter_text():
        number += 1
        await asyncio.sleep(0.02)
        await websocket.send_text(f"{number} {text}")
