"""Whom a command talks to."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotport.cli import client
from hotport.cli.client import ask_service, find_service
from hotport.errors import ControlError
from hotport.kernel.sockets import bind_control
from hotport.wire.messages import StopRequest
from tests.support import STRANGER, assert_three_lines


@pytest.fixture
def control(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The control socket of a service; nothing answers there."""
    monkeypatch.setenv("HOTPORT_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["hotport", "stop"])
    (tmp_path / "app").mkdir()
    with bind_control(str(tmp_path / "app" / "control.sock")) as made:
        yield made
    (tmp_path / "app" / "control.sock").unlink()


@pytest.mark.parametrize("name", [None, "app"])
@pytest.mark.parametrize("user", [0, 1000])
def test_socket_of_another_user_is_refused_by_name(
    control: socket.socket, monkeypatch: pytest.MonkeyPatch, name: str | None, user: int
) -> None:
    """Whoever had made /tmp/hotport-1000/app first answered the victim's ``hotport stop``: "stopped"."""
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(client, "peer_credentials", lambda sock: STRANGER)
    with pytest.raises(ControlError, match="HP608") as refused:
        list(ask_service(find_service(name), StopRequest()))
    assert_three_lines(str(refused.value), "HP608")
    assert "another user's: pid 4242 of" in refused.value.cause
    assert "(uid 65534)" in refused.value.cause


def test_stranger_in_our_directory_does_not_hide_a_service_of_ours(
    control: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ours").mkdir()
    with bind_control(str(tmp_path / "ours" / "control.sock")):
        credentials = iter([STRANGER, (1, os.geteuid(), 0)])
        monkeypatch.setattr(client, "peer_credentials", lambda sock: next(credentials))
        assert find_service(None) == tmp_path / "ours"
    (tmp_path / "ours" / "control.sock").unlink()


def test_root_commands_the_service_of_whoever_owns_the_directory(
    control: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = (tmp_path / "app").stat().st_uid
    monkeypatch.setattr(client, "peer_credentials", lambda sock: (1, owner, 0))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert find_service("app") == tmp_path / "app"
    client._connect(tmp_path / "app").close()
