"""One process full of clients: ``python -m hotport.churn.engine`` (`churn.plan` says what it is told and tells).

It never counts against the target what was its own doing: how late it began is measured, what was there in
time is looked at before anything is called overdue, and what this machine does not allow has a list of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import random
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from hotport.churn.clients.crowd import Address, Crowd, Site
from hotport.churn.clients.messages import DatagramCrowd, Streamer, TalkerCrowd
from hotport.churn.clients.requests import asker_crowd
from hotport.churn.fates import Kind
from hotport.churn.loop import Loop
from hotport.churn.plan import Armed, Begin, End, Plan, Summary, Tick
from hotport.churn.recorder import Recorder
from hotport.churn.result import Load
from hotport.errors import ConfigError, ExitCode, HotportError

__all__ = ["Engine", "main"]

_What = TypeVar("_What", Plan, Begin)

_STDIN: Final = 0
_STDOUT: Final = 1
_PIPE_BYTES: Final = 1 << 20
_PLAN_BYTES_MAX: Final = 1 << 20


class Engine:
    """Runs everything that one plan asks for.

    Args:
        tell: Takes each tick.

    Raises:
        ConfigError: If it cannot be done (HP782, HP783, HP784).
    """

    def __init__(self, plan: Plan, tell: Callable[[Tick], None]) -> None:
        self._plan = plan
        self._loop = Loop()
        self._is_stopped = False
        end_ns = plan.begin_ns + int(plan.duration_ms * 1e6)
        self._recorder = Recorder(plan, tell=tell, load=self._load)
        self._site = Site(plan, resolve(plan), self._loop, self._recorder, end_ns)
        self._crowds = [
            _crowd(self._site, load, random.Random(f"{plan.seed}/{number}")) for number, load in enumerate(plan.loads)
        ]

    def watch_stdin(self, fd: int) -> None:
        """Read stdin: stop when it ends, obey an `End`."""
        line = b""

        def on_event(_: int) -> None:
            nonlocal line
            try:
                while data := os.read(fd, 4096):
                    line += data
                    if line.endswith(b"\n"):
                        self._site.end_ns = min(self._site.end_ns, msgspec.json.decode(line, type=End).at_ns)
                        line = b""
                        self._loop.interrupt()
            except BlockingIOError:
                return
            self.stop()

        os.set_blocking(fd, False)
        try:
            self._loop.watch(fd, on_event)
        except PermissionError:  # epoll(7) takes no regular file: it was ended before it began
            os.set_blocking(fd, True)
        else:
            on_event(0)

    def stop(self) -> None:
        """Stop now; attempts in progress get no fate."""
        self._is_stopped = True
        self._loop.interrupt()

    def run(self) -> Summary:
        """From the time to begin until the last attempt has its fate, or stdin ends."""
        plan = self._plan
        for crowd in self._crowds:
            crowd.start()
        while not self._is_stopped:
            now = time.monotonic_ns()
            if now >= plan.begin_ns:
                self._recorder.advance(now)
            for crowd in self._crowds:
                crowd.give_up_overdue(self._loop.seen_ns)
            # An engine that is behind begins what it should have begun, late as it is.
            has_begun_all = now >= self._site.end_ns and not self._loop.has_timer_by(self._site.end_ns)
            if has_begun_all and all(crowd.is_over() for crowd in self._crowds):
                break
            until_ns = min([self._recorder.over_ns, *(crowd.due_ns(now) for crowd in self._crowds)])
            if has_begun_all:
                self._loop.turn(until_ns)  # the next answer may be the last
            else:
                self._loop.run(max(now, min(until_ns, self._site.end_ns)))
        self._recorder.flush()
        return self._recorder.summary()

    def close(self) -> None:
        """Close every socket."""
        for client in list(self._site.clients):
            client.close()
        self._loop.end()

    def _load(self) -> tuple[int, int]:
        return sum(len(crowd.under_way) for crowd in self._crowds), len(self._site.clients)


def _crowd(site: Site, load: Load, rng: random.Random) -> Crowd:
    target = site.plan.target
    try:
        kind = Kind(load.kind)
    except ValueError:
        raise _impossible(load, f"there is no such kind: {', '.join(kind.value for kind in Kind)}") from None
    if load.rate <= 0 and load.count <= 0:
        raise _impossible(load, "it has neither a rate nor a count")
    if kind in (Kind.SLOW, Kind.UPLOAD, Kind.WEBSOCKET) and not target.is_http:
        raise _impossible(load, f"{target.url} does not speak HTTP")
    if kind is Kind.TLS and not target.is_tls:
        raise _impossible(load, f"{target.url} does not speak TLS")
    if kind is Kind.DATAGRAM:
        if target.socket_path or target.is_tls:
            raise _impossible(load, f"{target.url} is not a UDP port")
        return DatagramCrowd(site, kind, load, rng)
    if kind is Kind.STREAM:
        return TalkerCrowd(site, kind, load, rng, Streamer)
    if kind is Kind.WEBSOCKET:
        try:
            from hotport.churn.clients.websocket import WebSocketer
        except ModuleNotFoundError as error:
            raise ConfigError(
                "HP783",
                "WebSocket clients need the package websockets",
                cause=str(error),
                fix="pip install 'hotport[asgi]'",
            ) from None
        return TalkerCrowd(site, kind, load, rng, WebSocketer)
    return asker_crowd(site, kind, load, rng)


def _impossible(load: Load, cause: str) -> ConfigError:
    return ConfigError("HP782", f"no clients of kind {load.kind!r} can be had", cause=cause, fix="hotport churn --help")


def resolve(plan: Plan) -> Address:
    """Resolve the one address that every client of this engine connects to."""
    target = plan.target
    tls = None
    if target.is_tls:
        tls = ssl.create_default_context()
        if not plan.verify_tls:
            tls.check_hostname = False
            tls.verify_mode = ssl.CERT_NONE
    if target.socket_path:
        path = target.socket_path
        path = "\0" + path[1:] if path.startswith("@") else path
        return Address(socket.AF_UNIX, path, tls, target.host, is_tcp=False)
    try:
        found = socket.getaddrinfo(target.address or target.host, target.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            "HP784",
            f"cannot find {target.host}",
            cause=error.strerror or str(error),
            fix=f"getent ahosts {target.host}",
        ) from None
    family, _, _, _, where = found[0]
    return Address(family, where, tls, target.host)  # type: ignore[arg-type]


def read_plan(fd: int) -> Plan:
    """Read the plan, the first line of stdin.

    Raises:
        ConfigError: If it is no plan (HP781).
    """
    return _read(fd, Plan)


def _read(fd: int, what: type[_What]) -> _What:
    line = b""
    while b"\n" not in line and len(line) < _PLAN_BYTES_MAX:
        data = os.read(fd, 65536)
        if not data:
            break
        line += data
    try:
        return msgspec.json.decode(line.partition(b"\n")[0], type=what)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "HP781", "the engine was not given a plan", cause=str(error), fix="hotport churn --help"
        ) from None


def _tell(what: Armed | Tick | Summary) -> None:
    data = msgspec.json.encode(what) + b"\n"
    while data:
        data = data[os.write(_STDOUT, data) :]


def main() -> int:
    """Run one plan; exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to everybody: the coordinator decides
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.suppress(OSError):  # no pipe, or no right to so large a one
        fcntl.fcntl(_STDOUT, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # a coordinator that is slow to read stops no engine
    try:
        try:
            plan = read_plan(_STDIN)
            engine = Engine(plan, _tell)
        except HotportError as error:
            print(error, file=sys.stderr)
            _tell(Summary({}, error=str(error)))
            return error.exit_code
        _tell(Armed())
        if not plan.begin_ns:  # what cannot be done has been found, and what is needed is imported
            engine.close()
            engine = Engine(msgspec.structs.replace(plan, begin_ns=_read(_STDIN, Begin).at_ns), _tell)
        engine.watch_stdin(_STDIN)
        gc.freeze()
        _tell(engine.run())
        engine.close()
    except BrokenPipeError:  # nobody is there to be told
        return ExitCode.BUG
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
