"""Python stacks as faulthandler writes them, and the line to show of one.

Sources: the documentation of faulthandler; Python/traceback.c: 100 threads of 100 frames each, names of 500 characters.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

__all__ = ["STACK_BYTES_MAX", "Frame", "Stack"]

#: What a worker can write, and what is kept of it.
STACK_BYTES_MAX: Final = 64 * 1024

#: What is logged and shown of it.
_SHOWN_CHARS_MAX: Final = 16 * 1024

_HEAD: Final = re.compile(r"(?:(Current thread|Thread) 0x[0-9a-f]+.*|(Stack)) \(most recent call first\):")
_FRAME: Final = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')

#: Files of Python, of what is installed beside it, and of no file at all.
_LIBRARY: Final = re.compile(r"<.*>|.*/(?:site-packages|dist-packages|python3(?:\.\d+)?t?)/.*")


class Frame(msgspec.Struct, frozen=True):
    """A function call: the file, the line that it is at, and the function's name."""

    file: str
    line: str
    name: str


class Stack(msgspec.Struct, frozen=True):
    """What a worker's threads are doing.

    Attributes:
        threads: Their calls, the most recent one first; the thread with the event loop comes first.
        text: All of it as it was told, in this order.
        is_whole: The stack of the thread with the event loop has come to its end.
    """

    threads: tuple[tuple[Frame, ...], ...] = ()
    text: str = ""
    is_whole: bool = False

    @classmethod
    def parse(cls, data: bytes, *, hidden: str = "") -> Stack:
        """Parse what faulthandler has written in the thread with the event loop; never fails.

        Args:
            hidden: The name of the function, if one has called it: that is no part of the stack.
        """
        threads: list[list[str]] = []
        main: list[str] = []
        for line in data.decode("ascii", "backslashreplace").splitlines():
            if head := _HEAD.fullmatch(line):
                threads.append([line])
                if head[1] != "Thread":
                    main = threads[-1]
            elif threads and line.strip():
                threads[-1].append(line)
        if hidden and len(main) > 1 and main[1].endswith(f" in {hidden}"):
            del main[1]
        ordered = [thread for thread in (main, *(each for each in threads if each is not main)) if thread]
        found = tuple(_frames(thread) for thread in ordered)
        text = "\n\n".join("\n".join(thread) for thread in ordered)
        is_whole = bool(main) and (main[-1] == "  ..." or main[-1].endswith(" in _run_module_as_main"))
        if len(text) > _SHOWN_CHARS_MAX:
            text = text[:_SHOWN_CHARS_MAX].rpartition("\n")[0] + "\n..."
        return cls(found, text, is_whole)

    def place(self, ours: str, directory: str, *, is_waiting: bool = False) -> str:
        """Where the worker is, for people: ``app.py:34 in handler``; empty if that is unknown.

        It is the innermost call of the application's own code, else of any code.

        Args:
            ours: hotport's own directory.
            directory: Files below it are named from there.
            is_waiting: The thread with the event loop waits for another one, whose calls are looked at first.
        """
        inside = directory.rstrip("/") + "/"
        threads = (*self.threads[1:], *self.threads[:1]) if is_waiting else self.threads
        calls = [frame for thread in threads for frame in thread]
        own = (frame for frame in calls if not _is_library(frame.file, ours))
        if (found := next(own, next(iter(calls), None))) is None:
            return ""
        return f"{found.file.removeprefix(inside)}:{found.line} in {found.name}"


def _is_library(file: str, ours: str) -> bool:
    return bool(_LIBRARY.fullmatch(file)) or file.startswith(ours.rstrip("/") + "/")


def _frames(lines: list[str]) -> tuple[Frame, ...]:
    return tuple(Frame(*found.groups()) for line in lines if (found := _FRAME.fullmatch(line)))
