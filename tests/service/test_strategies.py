"""Every way for a listener to reach the next generation: clients see what the table promises, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import LINE_APP, RESTARTS, Hammer, Service, write_code


@pytest.mark.parametrize("strategy", ["transfer", "overlap"])
def test_restarts_lose_nobody(tmp_path: Path, strategy: str) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="v0"))
    with Service(tmp_path, "--strategy", strategy, "--workers", "2", "--settle", "50ms", "app:app") as service:
        service.wait_ready()
        with Hammer(service.port) as clients:
            for number in range(1, RESTARTS + 1):
                write_code(app, LINE_APP.format(version=f"v{number}"))
                report = service.restart()
                assert (report["outcome"], report["strategy"]) == ("done", strategy)
                clients.wait_answers(20, f"v{number}")
        assert not clients.failures


def test_rebind_counts_what_clients_saw(tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    write_code(app, LINE_APP.format(version="v0"))
    with Service(tmp_path, "--strategy", "rebind", "--workers", "2", "--settle", "50ms", "app:app") as service:
        service.wait_ready()
        refused = reset = 0
        with Hammer(service.port) as clients:
            for number in range(1, RESTARTS + 1):
                write_code(app, LINE_APP.format(version=f"v{number}"))
                report = service.restart()
                assert (report["outcome"], report["strategy"]) == ("done", "rebind")
                assert report["rebind_gap_us"] > 0
                refused += report["refused"]
                reset += report["reset"]
                clients.wait_answers(20, f"v{number}")
        assert clients.failures["ConnectionRefusedError"] <= refused  # others refuse connections here, too
        assert clients.failures["ConnectionResetError"] <= reset
        assert clients.failures.total() <= refused + reset
