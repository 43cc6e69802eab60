"""What the applications have in common: texts, files, and a memory of what they have noticed."""

import hashlib
import os
from pathlib import Path

HERE = Path(__file__).parent

STATIC = HERE / "static"

#: Compresses well.
BIG = "hotport " * 20_000

CHUNKS = [f"chunk {number}\n" for number in range(200)]

#: What has happened without an answer that could tell: a task after it, a client that left.
SEEN: list[str] = []


def who(version: str) -> str:
    """Which code answers, in the form that ``Hammer`` wants."""
    return f"{version} {os.environ['HOTPORT_GENERATION']} {os.getpid()}\n"


async def chunks():
    for chunk in CHUNKS:
        yield chunk


async def torn():
    """A body that breaks off."""
    yield "begun"
    raise RuntimeError("broken in the middle")


def told(data: bytes) -> dict[str, object]:
    """What arrived."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
