"""Measure which modules take the time in which an application is imported."""

from __future__ import annotations

import importlib._bootstrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from heapq import nlargest
from typing import Any, Final

from hotport.wire.messages import Import

__all__ = ["measured_imports"]

#: How many modules are kept, those that took longest themselves.
IMPORTS: Final = 10

#: The function that runs a module's code, once; private, but the same in all Pythons that hotport supports.
_LOAD: Final = "_load_unlocked"


@contextmanager
def measured_imports() -> Iterator[list[Import]]:
    """Measure the imports of this thread in the block; the list has the slowest, in order, after it.

    That costs about a microsecond for a module, and nothing after the block. Tracebacks do not show it: Python removes
    the frames of its import system from them, by file name.
    """
    slowest: list[Import] = []
    load = getattr(importlib._bootstrap, _LOAD, None)
    if load is None:
        yield slowest
        return
    thread = threading.get_ident()
    found: list[Import] = []
    nested_s: list[float] = []

    def measured(spec: Any) -> Any:
        if threading.get_ident() != thread:
            return load(spec)
        at_s = time.monotonic()
        nested_s.append(0.0)
        try:
            return load(spec)
        finally:
            took_s = time.monotonic() - at_s
            own_s = took_s - nested_s.pop()
            if nested_s:
                nested_s[-1] += took_s
            found.append(Import(name=spec.name, at_s=at_s, ms=_ms(took_s), own_ms=_ms(own_s)))

    measured.__code__ = measured.__code__.replace(co_filename=load.__code__.co_filename)
    setattr(importlib._bootstrap, _LOAD, measured)
    try:
        yield slowest
    finally:
        if getattr(importlib._bootstrap, _LOAD) is measured:
            setattr(importlib._bootstrap, _LOAD, load)
        slowest += sorted(nlargest(IMPORTS, found, key=lambda each: each.own_ms), key=lambda each: each.at_s)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
