"""Fixtures for pytest, which finds this by its entry point; what they need is imported when a test asks for one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hotport.testing.service import Service

__all__ = ["hotport_service"]


@pytest.fixture
def hotport_service() -> Iterator[Callable[..., Service]]:
    """Starts services, and ends them after the test: ``hotport_service("module:app", workers=2)``.

    It takes what `hotport.testing.Service` takes, makes a directory for each, and returns when every worker serves.
    What the services have logged is shown beside a test that fails.
    """
    from hotport.testing.service import Service

    with ExitStack() as stack:

        def start(app: str | Callable[..., Any], **options: Any) -> Service:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hotport-")))
            service = Service(app, directory=directory, **options)
            stack.callback(lambda: print(service.log()))  # into the report of a test that fails
            stack.callback(service.end)
            return service.wait_ready()

        yield start
