"""``hotport serve`` as a child process of a test."""

from __future__ import annotations

import os
import select
import shlex
import signal
import site
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec

from hotport.channel import exchange
from hotport.errors import ConfigError, HotportError, RestartError, StartError
from hotport.options import OPTIONS
from hotport.options.loading import load
from hotport.wire.messages import Failure, Report, RestartRequest, StatusRequest
from hotport.wire.sdnotify import Notification

__all__ = ["ServeProcess", "Service"]

#: Of the log, in errors.
LOG_LINES: Final = 30

_Error = TypeVar("_Error", bound=HotportError)

#: What nobody announces is looked at so often.
_LOOK_MS: Final = 10


class ServeProcess:
    """``hotport serve`` with any arguments, in a runtime directory of its own.

    It is started at once; `wait_ready` returns when every worker serves. Leaving the ``with`` block ends it, and
    cuts what is still connected.

    Args:
        directory: Holds the runtime directory and the log; a short path, as sockets are made in it (``unix(7)``).
        args: After ``hotport serve --name NAME``.
        env: Variables beside those of this process.
        cwd: Its working directory; by default `directory`.
        prefix: What the command runs under, for example ``unshare``.
        timeout_s: For each thing that is waited for.

    Attributes:
        process: The supervisor.

    Processes: the supervisor and its workers; all have ended after the block.
    """

    def __init__(
        self,
        directory: Path,
        *args: str,
        name: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        prefix: Sequence[str] = (),
        timeout_s: float = 30.0,
    ) -> None:
        self.directory = directory
        self.name = name
        self.timeout_s = timeout_s
        self.log_path = directory / "service.log"
        self.env = {**os.environ, "HOTPORT_RUNTIME_DIR": str(directory / "run"), **(env or {})}
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify_path = directory / f"manager-{os.urandom(3).hex()}.sock"
        self._notify.bind(str(self._notify_path))
        where = cwd or directory
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "hotport", "serve", "--name", name, *args],
                cwd=where,
                env={**self.env, "PWD": str(where), "NOTIFY_SOCKET": str(self._notify_path)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()
        if kind is not None:
            sys.stderr.write(self.log())  # pytest shows it beside the failure

    def end(self) -> None:
        """Kill it now, if it still runs; connections are cut."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGQUIT)
            self.process.wait(self.timeout_s)
        finally:
            if self.process.poll() is None:
                self.kill()
            self._notify.close()
            self._notify_path.unlink(missing_ok=True)

    def stop(self) -> int:
        """Stop as a service manager does, with SIGTERM: connections finish first. Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(self.timeout_s)

    def kill(self) -> None:
        """Send SIGKILL to the supervisor, and remove the sockets that it had no time to unlink."""
        self.process.kill()
        self.process.wait(self.timeout_s)
        for name in ("control.sock", "notify.sock"):
            (self.runtime / name).unlink(missing_ok=True)

    def wait_ready(self) -> Self:
        """Wait until it has sent READY=1 and every worker serves.

        Raises:
            StartError: It has ended instead, or nothing has happened for `timeout_s` (HP720).
        """
        pidfd = os.pidfd_open(self.process.pid)
        end = time.monotonic() + self.timeout_s
        is_ready = False
        try:
            while not is_ready:
                left_s = max(0.0, end - time.monotonic())
                ready, _, _ = select.select([self._notify.fileno(), pidfd], [], [], left_s)
                if self._notify.fileno() not in ready:
                    break
                is_ready = Notification.parse(self._notify.recv(4096)).ready
        finally:
            os.close(pidfd)
        if not is_ready:
            ended = self.process.poll()
            raise self._with_log(
                StartError(
                    "HP720",
                    f"the service {self.name} did not start",
                    cause=f"exit code {ended}" if ended is not None else f"not ready after {self.timeout_s:g} s",
                    note="its log is below",
                )
            )
        self.wait_serving()
        return self

    def wait_serving(self, workers: int | None = None) -> None:
        """Wait until there are this many workers (by default as many as are wanted), and all of them serve."""

        def all_serve() -> bool:
            status = self.status()
            phases = [worker["phase"] for worker in status["workers"]]
            return bool(phases == ["serving"] * (status["wanted"] if workers is None else workers))

        self.wait_until(all_serve, "every worker serves")

    def wait_until(self, claim: Callable[[], bool], what: str) -> None:
        """Poll until a condition is true that nothing announces; raise an AssertionError after `timeout_s`."""
        pause = select.poll()
        end = time.monotonic() + self.timeout_s
        while not claim():
            assert time.monotonic() < end, f"not within {self.timeout_s:g} s: {what}\n{self.log_tail()}"
            pause.poll(_LOOK_MS)

    @property
    def runtime(self) -> Path:
        """The service's own runtime directory."""
        return Path(self.env["HOTPORT_RUNTIME_DIR"], self.name)

    @property
    def addresses(self) -> list[str]:
        """The addresses it listens on, as ``hotport status`` shows them."""
        return list(self.status()["addresses"])

    @property
    def port(self) -> int:
        """The TCP port of the first address."""
        return int(self.addresses[0].rpartition(":")[2])

    def log(self) -> str:
        """Return everything that the supervisor and its workers have written so far."""
        return self.log_path.read_text(errors="replace")

    def log_tail(self) -> str:
        """Return the end of the log."""
        return "\n".join(self.log().splitlines()[-LOG_LINES:])

    def _with_log(self, error: _Error) -> _Error:
        error.add_note(f"the log of {self.name} ends with:\n{self.log_tail()}")
        return error

    def ask(self, request: msgspec.Struct) -> list[Any]:
        """Send one request over the control socket and return every reply, without starting a command."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(self.timeout_s)
            sock.connect(str(self.runtime / "control.sock"))
            return list(exchange(sock, request))

    def status(self) -> Any:
        """Return what ``hotport status --json`` prints.

        Raises:
            OSError: No supervisor is there, or it has ended before it has answered.
        """
        replies = self.ask(StatusRequest())
        if not replies:
            raise ConnectionResetError(f"the supervisor of {self.name} has ended before it has answered")
        return msgspec.to_builtins(replies[-1])


class Service(ServeProcess):
    """A service for one test: on a free port of the loopback interface, with its own supervisor and workers.

    Args:
        app: A target (``"module:app"``, ``"path/file.py:app"``), or a function or class at the top level of a module.
        directory: Holds the runtime directory and the log; a short path, as sockets are made in it (``unix(7)``).
        cwd: Its working directory, where ``hotport.toml`` is looked for; by default that of this process.
        options: As ``hotport.run`` takes them; stronger than file and environment.

    Raises:
        ConfigError: An option is wrong or is ``bind`` (HP724), or `app` has no name by which a worker can import it
            (HP330).
    """

    def __init__(
        self,
        app: str | Callable[..., Any],
        *,
        directory: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 30.0,
        **options: Any,
    ) -> None:
        if "bind" in options:
            raise ConfigError(
                "HP724",
                f"bind cannot be {options['bind']!r} in a test",
                cause="the service listens on a free port of the loopback interface, so that tests can run together",
                note="leave bind out; Service.url says where it listens",
            )
        cwd = cwd or Path.cwd()
        target, root = (app, []) if isinstance(app, str) else _target_of(app)
        flags = {"name": "testing", "log_format": "console", **options, "target": target, "bind": ("127.0.0.1:0",)}
        path = os.pathsep.join([*root, *_import_path()])
        self._options = load(file=None, environ={**os.environ, **(env or {})}, flags=flags, cwd=cwd).options
        super().__init__(
            directory,
            *_arguments(flags),
            name=flags["name"],
            env={"PYTHONPATH": path, **(env or {})},
            cwd=cwd,
            timeout_s=timeout_s,
        )

    @property
    def url(self) -> str:
        """The URL it answers on, without a slash at the end; for applications that speak HTTP."""
        return f"http{'s' if self._options.tls_cert else ''}://127.0.0.1:{self.port}"

    def restart(self, *, phased: bool | None = None) -> Any:
        """Restart it, and wait until the old generation has left.

        Returns:
            The report, as ``hotport restart --json`` prints it.

        Raises:
            RestartError: It was refused or aborted, and the old generation serves (HP721, or the code of the refusal).
        """
        reply = self.ask(RestartRequest(phased=phased))[-1]
        if isinstance(reply, Failure):
            generation = self._generation()
            raise RestartError(
                reply.code, reply.what, cause=reply.cause, fix=reply.fix, note=reply.note, serving=generation
            )
        assert isinstance(reply, Report), self.log_tail()
        if reply.outcome != "done":
            raise self._with_log(
                RestartError(
                    "HP721",
                    f"the restart of {self.name} was aborted, generation {reply.serving} serves on",
                    cause=reply.error.partition("\n")[0],
                    note="correct the application; its log is below",
                    phase=reply.phases[-1].name,
                    serving=reply.serving,
                )
            )
        return msgspec.to_builtins(reply)

    def _generation(self) -> int:
        return int(self.status()["generation"])


def _target_of(app: Callable[..., Any]) -> tuple[str, list[str]]:
    """Return the target of a function or a class, and the directory from which its module is imported.

    pytest imports test modules from directories of which nobody else knows.
    """
    from hotport.runner import target_of

    target = target_of(app)
    module, _, _ = target.partition(":")
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        return target, []
    path = Path(file).resolve()
    if path.name == "__init__.py":
        path = path.parent
    parts = path.with_suffix("").parts
    names = tuple(module.split("."))
    return target, [str(Path(*parts[: -len(names)]))] if parts[-len(names) :] == names else []


def _import_path() -> list[str]:
    """Return this process's import path, without the entries that every interpreter of its installation has."""
    known = (sysconfig.get_path("stdlib"), *site.getsitepackages())
    return [entry for entry in sys.path if entry and not entry.startswith(known)]


def _arguments(flags: Mapping[str, Any]) -> list[str]:
    """Convert options by key to arguments of ``hotport serve``; the target comes last."""
    words: list[str] = []
    for option in OPTIONS:
        value = flags.get(option.key)
        if value is None or option.flag is None or option.key == "name":
            continue
        if option.is_switch:
            words.append(option.flag if value else f"--no-{option.flag.removeprefix('--')}")
        else:
            items = value if isinstance(value, list | tuple) else [value]
            items = items if option.is_list or not isinstance(value, list | tuple) else [shlex.join(value)]
            words += [word for item in items for word in (option.flag, str(item))]
    return [*words, flags["target"]]
