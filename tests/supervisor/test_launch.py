"""What a generation is started from is resolved once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hotport.kernel.process import MALLOC_ENVIRONMENT
from hotport.options import Options
from hotport.supervisor.launch import Launch, Surroundings


def test_a_link_to_a_release_is_followed_once_for_a_generation(tmp_path: Path) -> None:
    """A worker replaced after the link was switched, but before the restart, used to import the new release."""
    releases = [tmp_path / "41", tmp_path / "42"]
    for release in releases:
        release.mkdir()
    link = tmp_path / "current"
    link.symlink_to("41")
    options = Options(target="app:app", app_dir="current")
    surroundings = Surroundings({}, str(tmp_path))
    launch = Launch.resolve(options, surroundings)
    link.unlink()
    link.symlink_to("42")
    assert launch.options.app_dir == str(releases[0])
    assert Launch.resolve(options, surroundings).options.app_dir == str(releases[1])


def test_workers_do_not_learn_what_the_service_manager_set_for_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    private = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "FDSTORE", "LISTEN_FDS", "LISTEN_PID"}
    for name in private | {"KEPT"}:
        monkeypatch.setenv(name, "1")
    environment = Surroundings.snapshot().environment
    assert environment["KEPT"] == "1"
    assert private.isdisjoint(environment)


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (Options(target="app:app"), {}, MALLOC_ENVIRONMENT),
        (
            Options(target="app:app"),
            {"MALLOC_TRIM_THRESHOLD_": "7"},
            {**MALLOC_ENVIRONMENT, "MALLOC_TRIM_THRESHOLD_": "7"},
        ),
        (Options(command=("server",)), {}, {}),
    ],
    ids=["worker", "user's", "program"],
)
def test_workers_return_large_blocks_to_the_system(
    tmp_path: Path, options: Options, environment: dict[str, str], expected: dict[str, str]
) -> None:
    """A client whose message inflated to 16 MiB left 24 MiB behind."""
    launch = Launch.resolve(options, Surroundings(environment, str(tmp_path)))
    found = launch.worker_environment("web", str(tmp_path), 1, 1)
    assert {name: value for name, value in found.items() if name.startswith("MALLOC_")} == expected
