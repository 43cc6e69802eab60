"""The supervisor dies at every step of a restart, whatever the strategy: the next one goes on with the workers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from hotport.wire.messages import Report, RestartRequest
from tests.service.test_recovery import CRASHES, assert_healthy, die, ending
from tests.support import LINE_APP, STRIDE, Hammer, Service, write_code


@pytest.mark.soak
@pytest.mark.parametrize(("strategy", "first"), [("transfer", 2), ("overlap", 5), ("rebind", 4)])
def test_supervisor_is_killed_at_every_effect(tmp_path: Path, strategy: str, first: int) -> None:
    (tmp_path / "sitecustomize.py").write_text(CRASHES)
    write_code(tmp_path / "app.py", LINE_APP.format(version="v1"))
    args = ("app:app", "--settle", "20ms", "--strategy", strategy)
    env = {"PYTHONPATH": str(tmp_path)}
    with ending(tmp_path), ExitStack() as stack:
        at, bind = first if STRIDE > 1 else 1, "127.0.0.1:0"
        hammer: Hammer | None = None
        while True:
            with Service(tmp_path, *args, "--bind", bind, env={**env, "CRASH_AT": str(at)}) as service:
                service.wait_ready()
                assert_healthy(service, workers=1)
                # In the middle of a rebind nobody has the listener: the next supervisor must know where it was.
                bind = f"127.0.0.1:{service.port}"
                hammer = hammer or stack.enter_context(Hammer(service.port))
                hammer.wait_answers(2)
                replies = service.ask(RestartRequest())
                if replies and isinstance(replies[-1], Report):
                    die(service)
                    break  # there is no such effect any more
                service.process.wait(service.timeout_s)
                assert strategy == "rebind" or not hammer.failures, f"killed before effect {at}"
                at += STRIDE
        assert at > 7
        Service(tmp_path, *args, "--bind", bind, env=env).wait_ready().end()
