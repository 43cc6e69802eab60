"""Describe the machine of a measurement, so that its numbers can be judged later."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from hotport.kernel.procfs import sysctl

__all__ = ["PACKAGES", "SYSCTLS", "machine"]

#: Settings that change what clients and servers of one machine meet.
SYSCTLS: Final = (
    "net.core.somaxconn",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_max_syn_backlog",
    "net.ipv4.tcp_tw_reuse",
    "net.ipv4.tcp_abort_on_overflow",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_migrate_req",
    "fs.nr_open",
    "kernel.randomize_va_space",
    "vm.overcommit_memory",
)

PACKAGES: Final = ("hotport", "anyio", "httptools", "msgspec", "uvloop", "websockets")


def machine(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describe the processor, the kernel, its settings, and the versions of installed `packages`."""
    cpu = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s*(\d+) kB", _read("/proc/meminfo"))
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "load_average": os.getloadavg(),
        "kernel": platform.release(),
        "python": sys.version,
        "packages": {name: found for name in packages if (found := _version(name))},
        "sysctls": {name: sysctl(name) for name in SYSCTLS},
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
