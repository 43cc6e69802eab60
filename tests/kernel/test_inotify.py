from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from hotport.errors import KernelError
from hotport.kernel.inotify import Watch
from tests.support import DEADLINE_S


@pytest.fixture
def watch() -> Iterator[Watch]:
    with closing(Watch()) as made:
        yield made


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Path]:
    """The file of a socket that stays open, so that the kernel keeps the file when its name is removed."""
    path = tmp_path / "app.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        yield path
    path.unlink(missing_ok=True)


def has_told(watch: Watch, timeout_s: float = DEADLINE_S) -> bool:
    return bool(select.select([watch.fileno()], [], [], timeout_s)[0])


def replaced(path: Path) -> None:
    path.with_name("other").touch()
    path.with_name("other").rename(path)


@pytest.mark.parametrize("happens", [os.unlink, replaced, lambda path: path.rename(path.with_name("elsewhere"))])
def test_socket_file_that_is_removed_renamed_or_replaced_is_told_of(
    watch: Watch, bound: Path, happens: Callable[[Path], None]
) -> None:
    assert watch.add_file(str(bound))
    (bound.parent / "beside").touch()
    assert not has_told(watch, 0)
    happens(bound)
    assert has_told(watch)
    watch.drain()
    assert not has_told(watch, 0)
    for left in bound.parent.iterdir():
        left.unlink()


@pytest.mark.parametrize("happens", ["emptied", "renamed", "replaced"])
def test_directory_that_is_emptied_or_renamed_is_told_of(watch: Watch, tmp_path: Path, happens: str) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "a").touch()
    assert watch.add_directory(str(directory))
    if happens == "emptied":
        (directory / "a").unlink()
    elif happens == "renamed":
        directory.rename(tmp_path / "elsewhere")
    else:
        (tmp_path / "b").touch()
        (tmp_path / "b").rename(directory / "a")
    assert has_told(watch)


def test_what_is_not_there_cannot_be_watched(watch: Watch, tmp_path: Path) -> None:
    assert not watch.add_file(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    assert not watch.add_directory(str(tmp_path / "file"))


def test_without_an_instance_it_says_so(tmp_path: Path) -> None:
    """Where every descriptor is taken, as where every instance is, the kernel says EMFILE."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    Watch().close()  # ctypes has loaded what it needs
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(KernelError, match="HP214"):
            Watch()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
