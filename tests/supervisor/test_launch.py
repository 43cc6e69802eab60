"""What a generation is started from is resolved once."""

from __future__ import annotations

from pathlib import Path

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
