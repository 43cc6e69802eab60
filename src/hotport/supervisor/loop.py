"""The interface of the supervisor's loop to those who act for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVarTuple

from hotport.model import inputs
from hotport.model.service import Service
from hotport.options import Options

__all__ = ["Loop"]

Arguments = TypeVarTuple("Arguments")


class Loop(Protocol):
    """What the fleet, the starter and the watch for hung workers need of the loop."""

    @property
    def service(self) -> Service:
        """The state of the model."""

    @property
    def options(self) -> Options:
        """The options of the generation that serves, or starts."""

    def input(self, event: inputs.Input) -> None:
        """Queue an input for the model."""

    def start(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that an unexpected error ends."""

    def keep(self, what: str, run: Callable[[*Arguments], Awaitable[None]], *args: *Arguments) -> None:
        """Start a task that is retried after an unexpected error."""
