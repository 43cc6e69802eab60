from __future__ import annotations

import errno
import grp
import os
import pwd
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from hotport.errors import ConfigError
from hotport.kernel import users
from hotport.kernel.users import Closed, Identity, find_closed, find_identity, group_id, identity_of, user_id

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")

ROOT = pwd.getpwnam("root")
FREE = next(
    number for number in range(2_000_000_000, 2_000_001_000) if number not in {u.pw_uid for u in pwd.getpwall()}
)
STRANGER = Identity(65534, 65534, (65534,), "nobody")


@pytest.mark.parametrize("text", ["root", "0"])
def test_a_user_is_found_by_name_and_by_number(text: str) -> None:
    found = find_identity(text)
    assert (found.uid, found.gid, found.name, found.home) == (0, ROOT.pw_gid, "root", ROOT.pw_dir)
    assert ROOT.pw_gid in found.groups
    assert user_id(text) == 0


def test_a_group_takes_the_place_of_the_users_own() -> None:
    other = next(each for each in grp.getgrall() if each.gr_gid)
    for text in (other.gr_name, str(other.gr_gid)):
        found = find_identity("root", text)
        assert found.gid == other.gr_gid
        assert other.gr_gid in found.groups


def test_a_number_needs_no_entry() -> None:
    assert find_identity(str(FREE)) == Identity(FREE, FREE, (FREE,), str(FREE))
    assert find_identity(str(FREE), "7") == Identity(FREE, 7, (7,), str(FREE))


@pytest.mark.parametrize("text", ["no-such-user", "-1", "4294967295", "\u0661"])  # a digit
def test_an_unknown_user_or_group_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="HP430"):
        find_identity(text)
    with pytest.raises(ConfigError, match="HP431"):
        group_id(text)


def test_a_process_is_who_the_kernel_says() -> None:
    found = identity_of(os.getpid())
    assert found is not None
    assert (found.uid, found.gid, set(found.groups)) == (os.getuid(), os.getgid(), set(os.getgroups()))
    assert identity_of(2**22 + 1) is None


@as_root
def test_a_process_that_can_go_back_is_nobody_in_particular() -> None:
    code = "import os, sys; os.setresuid(65534, 65534, 0); print('.', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert identity_of(process.pid) is None
        process.communicate()


@as_root
def test_the_first_path_that_is_closed_is_found(tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)
    file = outer / "inner" / "file"
    file.write_text("")
    file.chmod(0o600)
    for each in (outer, outer / "inner", tmp_path, *tmp_path.parents):
        if each != Path("/tmp") and each != Path("/"):
            each.chmod(0o711)
    wants = [("/", os.X_OK), (str(outer), os.X_OK), (str(file), os.R_OK)]
    assert find_closed(STRANGER, wants) == Closed(str(file), str(file))
    file.chmod(0o644)
    assert find_closed(STRANGER, wants) is None
    (outer / "inner").chmod(0o700)
    link = tmp_path / "link"
    link.symlink_to(file)
    closed = find_closed(STRANGER, [(str(link), os.R_OK)])
    assert closed == Closed(str(link), str(outer / "inner"))
    assert closed.why == "mode 0700, owner root"
    assert Closed("/nowhere", "/nowhere").why == "no such file or directory"


@as_root
def test_a_user_that_cannot_be_had_is_an_error() -> None:
    with patch.object(users, "assume", side_effect=PermissionError(errno.EPERM, "no")), pytest.raises(PermissionError):
        find_closed(STRANGER, [("/", os.X_OK)])


def test_no_process_for_a_try_leaves_nothing_open() -> None:
    with patch.object(os, "fork", side_effect=OSError(errno.EAGAIN, "none")), pytest.raises(OSError, match="none"):
        find_closed(STRANGER, [("/", os.X_OK)])


@as_root
def test_root_lacks_nothing() -> None:
    with patch("hotport.kernel.procfs.has_capability", return_value=True):
        assert users.missing_capabilities() == []
    with patch("hotport.kernel.procfs.has_capability", return_value=False):
        assert "CAP_SETUID" in users.missing_capabilities()
