"""FastAPI: what the lifespan makes is there for every request; a restart runs it anew.

pip install fastapi 'hotport[asgi]'
hotport serve fastapi_app:app --workers 2
curl http://127.0.0.1:8000/greetings/Ann
hotport restart fastapi_app
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, str]]:
    yield {"greeting": "Hello"}  # open pools and clients before, close them after


app = FastAPI(lifespan=lifespan)


@app.get("/greetings/{name}")
async def greet(request: Request, name: str) -> dict[str, str]:
    return {"greeting": f"{request.state.greeting}, {name}!"}
