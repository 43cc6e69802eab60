"""Which files count as code, and what the paths that lead to them mean."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hotport.cli._watched import Brake, Watched, changed_within, find


def test_a_path_without_links_means_itself(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("")
    place = find(f"{tmp_path}/sub/../app.py")
    assert place.root is None
    assert place.spots == (f"{tmp_path}/sub",), "it will mean something once this is there"
    (tmp_path / "sub").mkdir()
    place = find(f"{tmp_path}/sub/../app.py")
    assert (place.root, place.identity, place.spots) == (f"{tmp_path}/app.py", None, (f"{tmp_path}/app.py",))


def test_every_link_on_the_way_may_change_what_a_path_means(tmp_path: Path) -> None:
    (tmp_path / "releases" / "1" / "src").mkdir(parents=True)
    (tmp_path / "releases" / "latest").symlink_to("1")
    (tmp_path / "current").symlink_to(tmp_path / "releases" / "latest")
    place = find(tmp_path / "current" / "src")
    assert place.root == f"{tmp_path}/releases/1/src"
    assert place.spots == (f"{tmp_path}/current", f"{tmp_path}/releases/latest", place.root)


def test_links_in_a_circle_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert find(tmp_path / "a").root is None


def test_the_root_directory_has_no_entry_that_could_be_replaced() -> None:
    assert (find("/").root, find("/").spots) == ("/", ())


def test_a_link_that_is_switched_is_seen_and_another_entry_is_not(tmp_path: Path) -> None:
    for name in ("r1", "r2"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("r1")
    watched = Watched([f"{tmp_path}/current"])
    assert watched.trees == [f"{tmp_path}/r1"]
    assert watched.parents == [f"{tmp_path}"]
    assert watched.concerns(f"{tmp_path}/current")
    assert not watched.concerns(f"{tmp_path}/other")
    assert not watched.look()
    (tmp_path / "next").symlink_to("r2")
    os.replace(tmp_path / "next", tmp_path / "current")
    assert watched.look()
    assert watched.is_whole
    assert watched.trees == [f"{tmp_path}/r2"]


def test_a_directory_that_was_put_in_place_of_another_is_another(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    watched = Watched([f"{tmp_path}/app"])
    (tmp_path / "app").rename(tmp_path / "old")
    assert watched.look()
    assert not watched.is_whole
    (tmp_path / "app").mkdir()
    assert watched.look()
    assert watched.is_whole


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("app.py", True),
        ("sub/fast.pyx", True),
        ("readme.md", False),
        ("pages/index.html", True),
        ("mails/index.html", True),
        ("conf/local.toml", True),
        ("other/local.toml", False),
        ("tests/test_app.py", False),
        ("sub/tests/test_app.py", False),
        ("sub/gen_models.py", False),
        ("env/lib/python3.11/site-packages/x.py", False),
        (".venv/x.py", False),
        (".git/hooks/x.py", False),
        ("flycheck_app.py", False),
        (".#app.py", False),
    ],
)
def test_a_file_in_a_directory_counts_by_its_name(tmp_path: Path, name: str, counts: bool) -> None:
    include, exclude = ("*.html", "conf/*.toml"), ("tests", "gen_*.py")
    assert Watched([f"{tmp_path}"], include=include, exclude=exclude).counts(f"{tmp_path}/{name}") is counts


def test_a_file_that_is_named_counts_whatever_its_name_is(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    watched = Watched([f"{path}"], exclude=("*.yaml",))
    assert watched.counts(f"{path}")
    assert not watched.counts(f"{tmp_path}/other.yaml")
    assert watched.trees == []


def test_a_directory_below_one_of_a_name_that_does_not_count_counts(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    assert Watched([f"{tmp_path}/site-packages"]).counts(f"{tmp_path}/site-packages/app.py")


def test_restarts_that_cause_each_other_are_held_back_for_longer_and_longer() -> None:
    brake = Brake()
    assert [brake.delay_s(is_own=True) for _ in range(5)] == [0, 0, 1, 2, 4]
    for _ in range(20):
        last = brake.delay_s(is_own=True)
    assert last == 60
    assert brake.delay_s(is_own=False) == 0
    assert [brake.delay_s(is_own=True) for _ in range(3)] == [0, 0, 1]
    brake.release()
    assert [brake.delay_s(is_own=True) for _ in range(3)] == [0, 0, 1]


def test_files_have_changed_within_a_time_if_all_that_are_there_have(tmp_path: Path) -> None:
    files = [f"{tmp_path}/{number}.py" for number in range(2)]
    Path(files[0]).write_text("")
    at = os.stat(files[0]).st_ctime
    assert changed_within(files, at, at), "the other one is not there"
    assert not changed_within(files, at - 2, at - 1)
    assert not changed_within(files[1:], 0, at)
