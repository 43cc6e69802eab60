"""What a generation is started from is resolved once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hotport.errors import ConfigError
from hotport.kernel.process import MALLOC_ENVIRONMENT
from hotport.options import Options
from hotport.options.envfile import FILE_BYTES_MAX
from hotport.supervisor.launch import Launch, Surroundings
from tests.support import assert_three_lines


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


def test_variables_from_files_are_weaker_than_the_environment_and_read_again(tmp_path: Path) -> None:
    for release, value in (("41", "old"), ("42", "new")):
        (tmp_path / release).mkdir()
        (tmp_path / release / ".env").write_text(f"A={value}\nB=file\nPWD=/nowhere\n")
        (tmp_path / release / "local.env").write_text("C=local\n")
    link = tmp_path / "current"
    link.symlink_to("41")
    options = Options(target="app:app", env_file=(".env", "local.env"))
    surroundings = Surroundings({"B": "ours", "D": "kept"}, str(link))
    launch = Launch.resolve(options, surroundings)
    expected = {"A": "old", "B": "ours", "C": "local", "D": "kept", "PWD": str(tmp_path / "41")}
    assert launch.environment == expected
    link.unlink()
    link.symlink_to("42")
    assert launch.environment == expected, "a worker that is replaced has the variables of its siblings"
    assert Launch.resolve(options, surroundings).environment["A"] == "new"


@pytest.mark.parametrize("name", ["HOTPORT_WORKERS", "LISTEN_FDS", "NOTIFY_SOCKET"])
def test_a_file_of_variables_does_not_set_what_hotport_sets(tmp_path: Path, name: str) -> None:
    (tmp_path / ".env").write_text(f"{name}=1\n")
    with pytest.raises(ConfigError, match=r"HP309 cannot use line 1 of \.env"):
        Launch.resolve(Options(target="app:app", env_file=(".env",)), Surroundings({}, str(tmp_path)))


def test_a_file_of_variables_that_cannot_be_read_again_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"#" * (FILE_BYTES_MAX + 1))
    for name, cause in {"fifo": "regular file", "large": "KiB", "missing": "no such file", ".": "directory"}.items():
        with pytest.raises(ConfigError, match=cause) as caught:
            Launch.resolve(Options(target="app:app", env_file=(name,)), Surroundings({}, str(tmp_path)))
        assert_three_lines(str(caught.value), "HP309")
