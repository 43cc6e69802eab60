"""``hotport demo``: a real application, real load, real restarts, and what the clients saw."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
import msgspec
import uvloop
from rich.console import Console

from hotport.churn.verdict import count_of
from hotport.cli import HELP
from hotport.cli._load import Load
from hotport.cli._screen import Screen, print_summary
from hotport.cli.output import console, write
from hotport.errors import ConfigError, ExitCode, StartError
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import (
    Failure,
    Progress,
    Reply,
    Report,
    RestartRequest,
    StatusRequest,
    decode,
    encode,
)

__all__ = ["command"]

NAME: Final = "demo"
WORKERS: Final = 2

TEMPORARY_CHARS_MAX: Final = 48

#: Everything is bounded: a start, a restart with its drain, an end.
START_TIMEOUT_S: Final = 30.0
RESTART_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 20.0

#: Load without a restart, before the first and after each.
STEADY_S: Final = 1.0

APP: Final = '''\
"""The application that `hotport demo` serves and edits."""

import asyncio

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

VERSION = "{version}"


def headers(request):
    return {{"x-version": VERSION, "x-generation": str(request.scope["extensions"]["hotport"]["generation"])}}


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

    In a temporary directory: writes a Starlette application, serves it with two workers, sends requests from this
    process, edits the code on disk and restarts, again and again. Nothing is left behind.

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
        demo = _Demo(service, restarts, connections, words)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(demo.run())
        except (KeyboardInterrupt, asyncio.CancelledError):
            words.print("\ninterrupted; the service is stopped and its directory removed")
            return ExitCode.INTERRUPTED
        service.stop()
        result = demo.result()
        if as_json:
            write(json.dumps(result, indent=2))
        else:
            print_summary(result, demo.error)
        if result["exit_code"] != ExitCode.DONE:
            words.print(f"\nThe service's last words:\n{service.log_tail()}", markup=False)
        return int(result["exit_code"])


# -- the service --------------------------------------------------------------------------------------------


class _Service:
    """``hotport serve`` in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
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
        try:
            ready, _, _ = select.select([manager.fileno(), pidfd], [], [], START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(pidfd)
        if manager.fileno() not in ready:
            self.kill()
            raise StartError(
                "HP403",
                "the demo's service did not start",
                cause=f"it said:\n{self.log_tail()}",
                fix="hotport serve, with an application of your own, to see whether that starts",
            )

    def edit(self) -> str:
        """Write the next version of the code and return its name.

        Byte code is judged by size and modification time in whole seconds: each version is dated two seconds later.
        """
        self.version += 1
        self._dated_s += 2
        path = self._directory / "app.py"
        path.write_text(APP.format(version=f"v{self.version}"))
        os.utime(path, (self._dated_s, self._dated_s))
        return f"v{self.version}"

    async def ask(self, request: msgspec.Struct) -> AsyncIterator[Any]:
        """What ``hotport restart`` and ``hotport status`` say to the service, and its replies."""
        reader, writer = await asyncio.open_unix_connection(self._directory / "run" / NAME / "control.sock")
        decoder = FrameDecoder()
        try:
            writer.write(encode_frame(encode(request)))
            while data := await reader.read(65536):
                for payload in decoder.feed(data):
                    yield decode(payload, Reply)
        finally:
            writer.close()

    def stop(self) -> None:
        """Stop as ``hotport stop`` does; `exit_code` says afterwards whether a connection was cut."""
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


class _Demo:
    """Load, edits and restarts, one after the other.

    Attributes:
        error: Why a restart did not come to its end.
    """

    def __init__(self, service: _Service, restarts: int, clients: int, words: Console) -> None:
        self.error = ""
        self._service = service
        self._restarts = restarts
        self._clients = clients
        self._words = words
        self._reports: list[Report] = []
        self._duration_s = 0.0
        self._load: Load
        self._screen: Screen

    async def run(self) -> None:
        """Everything between the service's start and its end."""
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        (status,) = [reply async for reply in self._service.ask(StatusRequest())]
        address = status.addresses[0].removeprefix("tcp://")
        self._load = Load(int(address.rpartition(":")[2]), connections=self._clients)
        self._screen = Screen(self._words, self._load.seen, restarts=self._restarts)
        self._words.print(
            f"[bold]hotport demo[/]: a Starlette app on http://{address}, "
            f"{count_of(WORKERS, 'worker')}, {count_of(self._clients, 'client')}"
        )
        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._load.run())
            drawing = tasks.create_task(self._screen.draw())
            await asyncio.sleep(STEADY_S)
            for number in range(1, self._restarts + 1):
                await self._restart(number)
                if self.error:
                    break
                await asyncio.sleep(STEADY_S)
            self._load.stop()
            self._duration_s = time.monotonic() - began
            drawing.cancel()

    async def _restart(self, number: int) -> None:
        failed_before = self._load.seen.failed
        version = self._service.edit()
        self._screen.restart_began(number, version)
        crossing = await self._load.place()
        finishing: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(RESTART_TIMEOUT_S):
                report = None
                async for reply in self._service.ask(RestartRequest()):
                    match reply:
                        case Progress():
                            self._screen.heard(reply)
                            if reply.event == "restart.draining" and finishing is None:
                                finishing = asyncio.create_task(self._load.finish(crossing))
                        case Report():
                            report = reply
                        case Failure():
                            self.error = f"{reply.code} {reply.what}: {reply.cause}"
        except TimeoutError:
            report, self.error = None, f"restart {number} had no outcome within {RESTART_TIMEOUT_S:g} s"
        except OSError as error:
            self.error = f"the supervisor cannot be reached: {error}"
        await (finishing or self._load.finish(crossing))
        if report is None:
            self.error = self.error or f"the supervisor ended in restart {number}"
        else:
            self._reports.append(report)
            self.error = report.error if report.outcome == "aborted" else ""
        self._screen.restart_ended(number, version, report, self._load.seen.failed - failed_before)

    def result(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        seen = self._load.seen
        code, verdict = self._verdict()
        latencies = sorted(seen.latencies_ms) or [0.0]
        return {
            "verdict": verdict,
            "error": self.error,
            "exit_code": code,
            "requests": seen.requests,
            "failed": seen.failed,
            "failures": dict(seen.failures),
            "duration_s": round(self._duration_s, 3),
            "latency_ms": {
                "median": round(statistics.median(latencies), 2),
                "p99": round(latencies[int(len(latencies) * 0.99)], 2),
                "slowest": round(latencies[-1], 2),
            },
            "answers": [
                {"version": version, "generation": generation, "requests": count}
                for (version, generation), count in sorted(seen.answers.items(), key=lambda item: item[0][1])
            ],
            "asked_to_reconnect": seen.asked_to_reconnect,
            "crossed": dict(seen.crossed),
            "clients": self._clients,
            "workers": WORKERS,
            "restarts": [msgspec.to_builtins(report) for report in self._reports],
        }

    def _verdict(self) -> tuple[int, str]:
        seen = self._load.seen
        written = {f"v{number}" for number in range(1, self._service.version + 1)}
        silent = written - {version for version, _ in seen.answers}
        stopped = self._service.process.poll()
        if seen.failed:
            return ExitCode.BUG, f"{seen.failed:,} of {count_of(seen.requests, 'request')} failed."
        if self.error:
            code = ExitCode.ABORTED if self._reports and self._reports[-1].outcome == "aborted" else ExitCode.BUG
            return code, "A restart did not come off; every request was answered all the same."
        if silent:
            return ExitCode.BUG, f"Every request was answered, but none by {', '.join(sorted(silent))}."
        if stopped != 0:
            return ExitCode.BUG, f"Every request was answered, but the service ended with exit code {stopped}."
        restarts = count_of(len(self._reports), "restart")
        return ExitCode.DONE, (
            f"{restarts}, {count_of(seen.requests, 'request')}, none lost; after each restart the new code answered."
        )
