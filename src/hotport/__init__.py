"""hotport: an asyncio server framework whose restarts no connection notices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hotport.errors import (
    ConfigError,
    ControlError,
    HotportError,
    KernelError,
    RestartError,
    StartError,
)

if TYPE_CHECKING:
    from hotport.adapters.base import Draining
    from hotport.adapters.protocol import Transferable
    from hotport.adapters.sockets import Lifetime
    from hotport.adapters.stream import Stream, StreamAttribute, hand_off, restartable
    from hotport.embedded.server import OpenConnections, Restarted, Server, serve
    from hotport.options.keywords import RunOptions, ServeOptions
    from hotport.runner import run
    from hotport.worker.template import after_fork

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ControlError",
    "Draining",
    "HotportError",
    "KernelError",
    "Lifetime",
    "OpenConnections",
    "RestartError",
    "Restarted",
    "RunOptions",
    "ServeOptions",
    "Server",
    "StartError",
    "Stream",
    "StreamAttribute",
    "Transferable",
    "__version__",
    "after_fork",
    "hand_off",
    "restartable",
    "run",
    "serve",
]

#: Where a name lives. Imported when it is first used: a worker that serves ASGI needs none of them.
_HOMES = {
    "Draining": "hotport.adapters.base",
    "Lifetime": "hotport.adapters.sockets",
    "OpenConnections": "hotport.embedded.server",
    "Restarted": "hotport.embedded.server",
    "RunOptions": "hotport.options.keywords",
    "ServeOptions": "hotport.options.keywords",
    "Server": "hotport.embedded.server",
    "Stream": "hotport.adapters.stream",
    "StreamAttribute": "hotport.adapters.stream",
    "Transferable": "hotport.adapters.protocol",
    "after_fork": "hotport.worker.template",
    "hand_off": "hotport.adapters.stream",
    "restartable": "hotport.adapters.stream",
    "run": "hotport.runner",
    "serve": "hotport.embedded.server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
