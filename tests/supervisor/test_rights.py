from __future__ import annotations

import errno
import os
from unittest.mock import patch

import pytest

from hotport.errors import ConfigError, StartError
from hotport.kernel.sockets import Access
from hotport.kernel.users import Identity
from hotport.options import Options
from hotport.supervisor import rights
from hotport.supervisor.rights import identity_for, login_environment, refuse_closed, socket_access

SHOP = Identity(7001, 7002, (7002, 7003), "shop", "/home/shop", "/bin/zsh")


@pytest.fixture(autouse=True)
def users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "find_identity", lambda user, group=None: SHOP)
    monkeypatch.setattr(rights, "user_id", int)
    monkeypatch.setattr(rights, "group_id", int)


def test_workers_run_as_the_user_if_that_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "missing_capabilities", list)
    assert identity_for(Options()) is None
    assert identity_for(Options(user="shop")) == SHOP
    monkeypatch.setattr(os, "geteuid", lambda: SHOP.uid)
    monkeypatch.setattr(os, "getegid", lambda: SHOP.gid)
    assert identity_for(Options(user="shop")) is None


def test_who_is_not_root_is_told_which_rights_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "missing_capabilities", lambda: ["CAP_KILL", "CAP_SETUID"])
    with pytest.raises(StartError, match="HP432") as raised:
        identity_for(Options(user="shop", group="web"))
    assert raised.value.what == "cannot run workers as shop of group web"
    assert "CAP_KILL, CAP_SETUID" in raised.value.cause


def test_a_container_in_which_root_cannot_become_another_user_is_explained() -> None:
    with (
        patch.object(rights, "find_closed", side_effect=PermissionError(errno.EPERM, "no")),
        pytest.raises(StartError, match="HP432") as raised,
    ):
        refuse_closed(SHOP, {"/": os.X_OK})
    assert "CAP_SETUID" in raised.value.note


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (SHOP, {"HOME": "/home/shop", "USER": "shop", "LOGNAME": "shop", "SHELL": "/bin/zsh"}),
        (Identity(1, 1, (), "a", "/", "/usr/sbin/nologin"), {"USER": "a", "LOGNAME": "a"}),
        (Identity(1, 1, (), "1"), {"USER": "1", "LOGNAME": "1"}),
    ],
)
def test_the_environment_is_the_users(identity: Identity, expected: dict[str, str]) -> None:
    roots = dict.fromkeys(("HOME", "USER", "LOGNAME", "SHELL", "MAIL", "XDG_RUNTIME_DIR"), "root")
    assert login_environment({**roots, "PATH": "/bin"}, identity) == {"PATH": "/bin", **expected}


@pytest.mark.parametrize(
    ("options", "access"),
    [
        ({}, None),
        ({"socket_mode": "0600"}, Access(0o600, -1, -1)),
        ({"socket_group": "8"}, Access(0o660, -1, 8)),
        ({"socket_user": "9"}, Access(0o660, 9, -1)),
        ({"user": "shop"}, Access(0o660, 7001, 7002)),
        ({"user": "shop", "socket_mode": "0666", "socket_user": "9", "socket_group": "8"}, Access(0o666, 9, 8)),
    ],
)
def test_socket_files_are_the_workers_users_unless_they_are_said_to_be_anothers(
    options: dict[str, str], access: Access | None
) -> None:
    assert socket_access(Options(**options)) == access  # type: ignore[arg-type]


def test_what_an_error_of_the_options_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="HP431"):
        socket_access(Options(socket_group="no-such-group"))
