"""Undo with listeners that the generations do not share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.service.test_undo import lost, serving, wait_watched
from tests.service.undo_support import Clients, write_version
from tests.support import DEADLINE_S


@pytest.mark.parametrize("strategy", ["transfer", "overlap"])
def test_undo_gives_the_port_and_the_connections_back(tmp_path: Path, strategy: str) -> None:
    with serving(tmp_path, "--strategy", strategy) as service, Clients(service.port) as clients:
        clients.wait("1")
        write_version(tmp_path, "2")
        restart = service.start("restart", "--undo-window", "1h", "--json")
        wait_watched(service, "watching")
        clients.wait("2")
        assert service.run("undo").returncode == 0
        clients.wait("1")
        restart.communicate(timeout=DEADLINE_S)
        assert lost(service.status()["last_restart"]) == {}
    assert not clients.failures
