"""One service, two supervisors: what each does about the other's workers."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest

from hotport.supervisor import takeover

pytestmark = pytest.mark.anyio


async def test_socket_of_a_worker_that_is_gone_may_be_removed_by_somebody_else_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended the task that tells all the other workers to leave."""
    path = tmp_path / "worker-1.1.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    unlink = os.unlink

    def unlink_twice(what: str) -> None:
        unlink(what)
        unlink(what)

    monkeypatch.setattr(os, "unlink", unlink_twice)
    supervisor = Mock(directory=str(tmp_path), processes={})
    supervisor.options.drain_timeout_s = 1.0
    supervisor.service.ids.return_value = ()
    await takeover._drain_orphans(supervisor, lambda generation: True)
    assert not path.exists()
