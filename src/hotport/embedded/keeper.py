"""Watch the socket files of an embedded server, and notice when they disappear."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Final

from hotport.errors import KernelError
from hotport.kernel.inotify import Watch

__all__ = ["keeping"]

#: Between two looks: whoever removes files in a loop must not keep the program busy.
PAUSE_S: Final = 0.1

log = logging.getLogger("hotport.embedded")


@contextmanager
def keeping(paths: Sequence[str], mend: Callable[[], Awaitable[bool]]) -> Iterator[None]:
    """Call `mend` whenever one of these files is removed, renamed or replaced inside the block.

    Args:
        mend: Makes them again, and returns whether it has made any.

    Descriptors: one for inotify, if there is a path; closed at the end.
    """
    try:
        watch = Watch() if paths else None
    except KernelError as error:
        log.info("socket files are looked at only by a restart: %s", error)
        watch = None
    if watch is None:
        yield
        return
    loop, has_changed = asyncio.get_running_loop(), asyncio.Event()

    def on_change() -> None:
        watch.drain()
        has_changed.set()

    async def look() -> None:
        while True:
            for path in paths:
                watch.add_file(path)
            if not await mend():  # else what was made may be gone again, and is not watched yet
                await has_changed.wait()
            has_changed.clear()
            await asyncio.sleep(PAUSE_S)

    with closing(watch):
        loop.add_reader(watch.fileno(), on_change)
        looking = loop.create_task(look())
        try:
            yield
        finally:
            looking.cancel()
            loop.remove_reader(watch.fileno())
