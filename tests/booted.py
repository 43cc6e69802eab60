"""A real systemd as process 1 of namespaces of its own: no unit of this machine, no bus, no journal, its own network.

Of /tmp it sees only the directory of the test. Python and hotport are elsewhere in there (`PYTHON`), because a unit
with ``PrivateTmp=`` would not see them in a checkout below /tmp.

It needs root, a cgroup v2 hierarchy that can be written to, and systemd; without them the test skips.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import psutil
import pytest

import hotport
from tests.support import DEADLINE_S, need

#: As container managers do it: /proc/sys is the machine's, and systemd would raise limits there.
BOOT: Final = """
set -e
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount -t cgroup2 none /sys/fs/cgroup
mount --bind "$1/id" /etc/machine-id
mount -t tmpfs none /etc/systemd
mkdir /etc/systemd/system
cp -r "$1/units/." /etc/systemd/system
mount -t tmpfs none /run
mkdir -p /run/hotport/venv /run/hotport/src /run/hotport/test
mount --bind "$3" /run/hotport/venv
mount --bind "$4" /run/hotport/src
mount --bind "$1" /run/hotport/test
mount -t tmpfs none /tmp
mount -t tmpfs none /var/tmp
mkdir -p "$1"
mount --bind /run/hotport/test "$1"
exec env -i container=hotport PATH=/usr/sbin:/usr/bin:/sbin:/bin NOTIFY_SOCKET="$1/booted" "$2" \\
    --unit=test.target --log-target=null --show-status=no
"""

#: The interpreter in there; it needs `ENVIRONMENT` to find hotport.
PYTHON: Final = f"/run/hotport/venv/bin/{Path(sys.executable).name}"

#: For ``Environment=``; what is mounted is not to be written to.
ENVIRONMENT: Final = "PYTHONPATH=/run/hotport/src PYTHONDONTWRITEBYTECODE=1"

#: Nothing of this is pulled in: no file systems, no journal, no login.
TARGET: Final = "[Unit]\nDefaultDependencies=no\n"


class Booted:
    """systemd with the units that a test has written; leaving the ``with`` block ends all of it.

    Args:
        directory: A short path; `units` are copied from there.
        units: Texts by file name, ``shop.service.d/test.conf`` for example.

    Attributes:
        version: Of systemd.
    """

    def __init__(self, directory: Path, units: dict[str, str]) -> None:
        self._directory = directory
        self._cgroup = _own_cgroup()
        self.version = version()
        (directory / "id").write_text("0123456789abcdef0123456789abcdef\n")
        for name, text in {**units, "test.target": TARGET}.items():
            path = directory / "units" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def __enter__(self) -> Self:
        join = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
        namespaces = ["--pid", "--mount", "--uts", "--ipc", "--net", "--cgroup", "--mount-proc"]
        unshare = [need("unshare"), *namespaces, "--propagation", "private", "--fork", "--kill-child"]
        self._cgroup.mkdir()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(self._directory / "booted"))
            sources = Path(hotport.__file__).parent.parent
            boot = ["sh", "-c", BOOT, "sh", str(self._directory), _systemd(), sys.prefix, str(sources)]
            self._process = subprocess.Popen(
                ["sh", "-c", join, str(self._cgroup), *unshare, *boot],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            pidfd = os.pidfd_open(self._process.pid)
            try:
                while True:
                    ready, _, _ = select.select([manager.fileno(), pidfd], [], [], DEADLINE_S)
                    if manager.fileno() not in ready:
                        self._refuse()
                    if b"READY=1" in manager.recv(4096):
                        break
            finally:
                os.close(pidfd)
        (self._pid1,) = [child.pid for child in psutil.Process(self._process.pid).children()]
        return self

    def _refuse(self) -> None:
        self._process.kill()
        _, words = self._process.communicate()
        self._clean_up()
        pytest.skip(f"systemd does not boot here: {' '.join(words.split()) or 'it says nothing'}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.kill(self._pid1, signal.SIGKILL)
        self._process.communicate(timeout=DEADLINE_S)
        self._clean_up()

    def _clean_up(self) -> None:
        (self._directory / "booted").unlink(missing_ok=True)
        for directory, _, _ in os.walk(self._cgroup, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)

    def run(self, *command: str, expect: int | None = 0) -> str:
        """Run a command in there; what it printed."""
        result = self.start(*command)
        words, errors = result.communicate(timeout=DEADLINE_S)
        assert expect is None or result.returncode == expect, f"{command}: {result.returncode}\n{words}{errors}"
        return words.strip()

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in there; the caller waits for it."""
        enter = [need("nsenter"), f"--target={self._pid1}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        return subprocess.Popen(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def show(self, unit: str) -> dict[str, str]:
        """Some properties of a unit."""
        names = "ActiveState,SubState,StatusText,NFileDescriptorStore,MainPID,NRestarts,Result"
        lines = self.run("systemctl", "show", unit, f"--property={names}").splitlines()
        return dict(line.partition("=")[::2] for line in lines)


def version() -> int:
    """Of the systemd that is installed."""
    words = subprocess.run([_systemd(), "--version"], capture_output=True, text=True, check=True).stdout.split()
    return int(words[1].partition(".")[0].partition("~")[0])


def _systemd() -> str:
    found = next(
        (path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if os.access(path, os.X_OK)), ""
    )
    if not found:
        pytest.skip("systemd is not installed")
    if sys.base_prefix.startswith(("/tmp/", "/var/tmp/")):
        pytest.skip(f"the units that are tested have a /tmp of their own, and the Python of {sys.prefix} is not in it")
    return found


def _own_cgroup() -> Path:
    """A name for a cgroup below all others."""
    if os.geteuid() != 0:
        pytest.skip("systemd can be booted by root only")
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.procs").exists() and (root / "cgroup.controllers").exists() and os.access(root, os.W_OK):
            return root / f"hotport-test-{os.getpid()}"
    pytest.skip("there is no cgroup v2 hierarchy to write to")
