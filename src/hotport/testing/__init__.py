"""Tools to test your own service; fixtures are in `hotport.testing.plugin`, which pytest finds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hotport.testing.faults import FaultyApp
    from hotport.testing.invisible import assert_invisible_restart, assert_invisible_restart_async
    from hotport.testing.service import Service

__all__ = ["FaultyApp", "Service", "assert_invisible_restart", "assert_invisible_restart_async"]

#: Where a name lives. Imported when it is first used: pytest loads this package's plugin at every start.
_HOMES = {
    "FaultyApp": "hotport.testing.faults",
    "Service": "hotport.testing.service",
    "assert_invisible_restart": "hotport.testing.invisible",
    "assert_invisible_restart_async": "hotport.testing.invisible",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
