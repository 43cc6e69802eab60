"""Where a service of a test runs."""

from __future__ import annotations

import subprocess

import pytest

from tests import support
from tests.support import need


@pytest.fixture(params=[False, True], ids=["exec", "fork"])
def either_start(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are started one by one, and then forked from a template; for tests that show something of both."""
    monkeypatch.setattr(support, "PRELOAD", request.param)


@pytest.fixture
def container() -> tuple[str, ...]:
    """A prefix for commands: namespaces like those of a container, in which we are the user of `docker/Dockerfile`."""
    new = ("--user", "--map-user=10001", "--map-group=10001", "--pid", "--mount", "--mount-proc", "--fork")
    prefix = (need("unshare"), *new, "--kill-child")
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("user, pid and mount namespaces cannot be made here")
    return prefix
