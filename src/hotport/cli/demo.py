"""``hotport demo``: a real application, real load, real restarts, and what the clients saw."""

from __future__ import annotations

import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from hotport.churn.fates import Kind
from hotport.churn.plan import Plan
from hotport.churn.restarts import AskHotport, Restarts
from hotport.churn.result import Load, Result, Target
from hotport.churn.run import Experiment
from hotport.churn.verdict import answered_by, count_of
from hotport.cli import HELP
from hotport.cli._screen import perform, print_result, write_json
from hotport.cli.churn import check_descriptors
from hotport.cli.client import ask_service
from hotport.cli.output import console
from hotport.errors import ConfigError, ExitCode, StartError
from hotport.wire.messages import StatusRequest
from hotport.wire.sdnotify import Notification

__all__ = ["command"]

NAME: Final = "demo"
WORKERS: Final = 2

TEMPORARY_CHARS_MAX: Final = 48

#: Everything is bounded: a start, a restart with its drain, an end.
START_TIMEOUT_S: Final = 30.0
RESTART_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0

#: Load before the first restart and after the last, and from the beginning of each to that of the next.
STEADY_S: Final = 1.0
EVERY_S: Final = 4.0

CONNECT_RATE_MAX: Final = 500.0

APP: Final = '''\
"""The application that `hotport demo` serves and edits."""

import asyncio

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

VERSION = "{version}"


def headers(request):
    generation = request.scope["extensions"]["hotport"]["generation"]
    return {{"x-generation": f"{{VERSION}}, generation {{generation}}"}}


async def home(request):
    return PlainTextResponse(f"hello from {{VERSION}}\\n", headers=headers(request))


async def slow(request):
    async def pieces():
        for _ in range(10):
            await asyncio.sleep(0.2)
            yield b"." * 100

    return StreamingResponse(pieces(), headers={{**headers(request), "content-length": "1000"}})


app = Starlette(routes=[Route("/", home), Route("/slow", slow)])
'''


@click.command("demo", context_settings=HELP)
@click.option("--restarts", type=click.IntRange(1, 1000), default=5, show_default=True, help="How often to restart.")
@click.option("--connections", type=click.IntRange(1, 10_000), default=50, show_default=True, help="Clients at a time.")
@click.option("--json", "as_json", is_flag=True, help="Print what clients saw as JSON.")
def command(restarts: int, connections: int, as_json: bool) -> int:
    """Restart an application under load; show what its clients saw.

    In a temporary directory: writes a Starlette application, serves it with two workers, puts it under the load of
    `hotport churn`, edits the code on disk and restarts, again and again. Nothing is left behind.

    Exit codes: 0 every request was answered; 1 some were not; 4 a restart was aborted.
    """
    missing = [package for package in ("starlette", "httptools") if find_spec(package) is None]
    if missing:
        raise ConfigError(
            "HP335",
            "cannot run the demo",
            cause=f"it serves an application that needs {' and '.join(missing)}, not installed in {sys.executable}",
            fix=f"{sys.executable} -m pip install 'hotport[demo]'",
        )
    words = console(stderr=True)
    # The path of a unix socket has 107 bytes, and there are sockets in there (unix(7)).
    place = None if len(tempfile.gettempdir()) < TEMPORARY_CHARS_MAX else "/tmp"
    with (
        tempfile.TemporaryDirectory(prefix="hotport-demo-", dir=place) as name,
        _serving(Path(name), words) as service,
    ):
        (status,) = ask_service(service.runtime, StatusRequest())
        address = status.addresses[0].removeprefix("tcp://")
        experiment = _experiment(service, address, restarts, connections)
        heading = (
            f"hotport demo: a Starlette app on http://{address}, "
            f"{count_of(WORKERS, 'worker')}, {count_of(connections, 'client')}"
        )
        result = perform(experiment, words, heading, lambda mark: None if mark.outcome else service.edit())
        if result.is_partial:
            words.print("\ninterrupted; the service is stopped and its directory removed")
            return ExitCode.INTERRUPTED
        service.stop()
        code, said = _outcome(result, service)
        if as_json:
            write_json(result)
        else:
            print_result(result, console())
            console().print(said, markup=False, style="bold green" if code == ExitCode.DONE else "bold red")
        if code != ExitCode.DONE:
            words.print(f"\nThe service's last words:\n{service.log_tail()}", markup=False)
        return code


# -- the service --------------------------------------------------------------------------------------------


class _Service:
    """``hotport serve`` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.runtime = directory / "run" / NAME
        self._log = directory / "service.log"
        self._dated_s = time.time() - 10_000
        self.version = 0
        self.edit()
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HOTPORT_")}
        environment |= {"HOTPORT_RUNTIME_DIR": str(directory / "run"), "PWD": str(directory)}
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, self._log.open("wb") as log:
            manager.bind(str(directory / "ready.sock"))
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "hotport", "serve", "app:app"),
                    *("--name", NAME, "--bind", "127.0.0.1:0", "--workers", str(WORKERS)),
                    *("--drain-timeout", "15s", "--orphan-timeout", "5s", "--log-format", "console"),
                ],
                cwd=directory,
                env={**environment, "NOTIFY_SOCKET": str(directory / "ready.sock")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,  # Ctrl-C is for us: the clients end first
            )
            self._wait_ready(manager)

    def _wait_ready(self, manager: socket.socket) -> None:
        pidfd = os.pidfd_open(self.process.pid)
        end = time.monotonic() + START_TIMEOUT_S
        is_ready, ready = False, [manager.fileno()]
        try:
            while not is_ready and manager.fileno() in ready:
                ready, _, _ = select.select([manager.fileno(), pidfd], [], [], max(0.0, end - time.monotonic()))
                if manager.fileno() in ready:
                    is_ready = Notification.parse(manager.recv(4096)).ready
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(pidfd)
        if not is_ready:
            self.kill()
            raise StartError(
                "HP403",
                "the demo's service did not start",
                cause=f"it said:\n{self.log_tail()}",
                note="see whether an application of your own starts: hotport serve app:app",
            )

    def edit(self) -> None:
        """Write the next version of the code.

        Byte code is judged by size and modification time in whole seconds: each version is dated two seconds later.
        """
        self.version += 1
        self._dated_s += 2
        path = self._directory / "app.py"
        path.write_text(APP.format(version=f"v{self.version}"))
        os.utime(path, (self._dated_s, self._dated_s))

    def stop(self) -> None:
        """Stop as ``hotport stop`` does; the exit code says afterwards whether a connection was cut."""
        self.process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        """Stop now, if it still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGQUIT)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log_tail(self) -> str:
        """The last lines that the service wrote."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])


@contextmanager
def _serving(directory: Path, words: Console) -> Iterator[_Service]:
    with words.status("starting hotport serve"):
        service = _Service(directory)
    try:
        yield service
    finally:
        service.kill()


# -- the run ------------------------------------------------------------------------------------------------


def _experiment(service: _Service, address: str, restarts: int, connections: int) -> Experiment:
    """Make clients in every state in which a restart can find them, most with kept connections."""
    host, _, port = address.rpartition(":")
    keeping = -(-connections * 4 // 5)
    loads = [
        Load(Kind.KEEPALIVE.value, count=keeping, think_ms=20.0),
        Load(Kind.CONNECT.value, rate=min(CONNECT_RATE_MAX, 2.0 * connections)),
        Load(Kind.LATE.value, rate=8.0),
        Load(Kind.HALFHEAD.value, rate=4.0),
        Load(Kind.SLOW.value, rate=2.0),
    ]
    how = AskHotport(NAME, service.runtime / "control.sock")
    schedule = Restarts(how, restarts, STEADY_S, EVERY_S, RESTART_TIMEOUT_S)
    plan = Plan(
        target=Target(f"http://{address}", host, int(port), is_http=True, is_tls=False, address=host),
        loads=loads,
        seed=random.randrange(2**31),
        begin_ns=0,
        duration_ms=(schedule.needs_s_max + STEADY_S) * 1000,
    )
    check_descriptors(plan, 1)
    # How late these clients are themselves is told, and no matter: it is losses that are shown.
    return Experiment(plan, restarts=schedule, settle_s=STEADY_S, lag_p99_us_max=math.inf)


def _outcome(result: Result, service: _Service) -> tuple[int, str]:
    """Return the exit code, and remarks beside what clients saw."""
    written = {f"v{number}" for number in range(1, service.version + 1)}
    silent = written - {name.partition(",")[0] for name in answered_by(result.buckets)}
    if not result.verdict.is_clean:
        return ExitCode.BUG, ""
    if any(mark.outcome == "aborted" for mark in result.restarts):
        return ExitCode.ABORTED, "A restart was aborted; every request was answered all the same."
    if not result.verdict.is_valid:
        return ExitCode.BUG, ""
    if silent:
        return ExitCode.BUG, f"Every request was answered, but none by {', '.join(sorted(silent))}."
    if status := service.process.poll():
        return ExitCode.BUG, f"Every request was answered, but the service ended with exit code {status}."
    return ExitCode.DONE, "After each restart the new code answered."
