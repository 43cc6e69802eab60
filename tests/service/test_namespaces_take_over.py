"""Blue and green: one container takes the listeners from another, through a volume that both have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support import LINE_APP, RESTARTS, SLOWNESS, Hammer, Service, ask_line, write_code

pytestmark = pytest.mark.timeout(120 * SLOWNESS + 20 * SLOWNESS * RESTARTS)


@pytest.fixture
def host() -> str:
    """An address of this machine that nobody else uses: both services have to name the same port."""
    return f"127.102.{os.getpid() >> 8 & 255}.{os.getpid() & 255}"


@contextmanager
def release(directory: Path, version: str, host: str, container: tuple[str, ...]) -> Iterator[Service]:
    """A container with this version, with code of its own, and the volume of all the others."""
    own = directory / version
    own.mkdir()
    write_code(own / "app.py", LINE_APP.format(version=version))
    env = {"HOTPORT_RUNTIME_DIR": str(directory / "volume")}
    args = ("app:app", "--bind", f"{host}:8000", "--take-over")
    with Service(own, *args, prefix=container, env=env) as service:
        yield service.wait_ready()


@pytest.mark.soak
def test_each_container_takes_over_from_the_one_before_it(
    tmp_path: Path, host: str, container: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        old = stack.enter_context(release(tmp_path, "v0", host, container))  # there is nobody to take over from
        with Hammer(old.port, ask=partial(ask_line, host=host)) as hammer:
            hammer.wait_answers(version="v0")
            for number in range(1, RESTARTS + 1):
                new = stack.enter_context(release(tmp_path, f"v{number}", host, container))
                hammer.wait_answers(version=f"v{number}")
                assert old.wait() == 0
                assert new.status()["pid"] == 1
                old = new
        assert old.run("stop", "svc").returncode == 0
        assert old.wait() == 0
    assert not hammer.failures
