"""Resolve a generation's options, interpreter, directory and environment, once for all its workers."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hotport.errors import ConfigError, StartError
from hotport.kernel.process import MALLOC_ENVIRONMENT, working_directory
from hotport.kernel.users import Identity
from hotport.options import Options
from hotport.options.envfile import FILE_BYTES_MAX, parse_variables
from hotport.supervisor.appmetrics import app_metrics_directory
from hotport.supervisor.manager import MANAGER_VARIABLES
from hotport.supervisor.rights import identity_for, login_environment, refuse_closed, socket_access
from hotport.wire.listenfds import LISTEN_VARIABLES
from hotport.wire.messages import TEMPLATE, WorkerSpec, encode, notify_socket, user_directory

__all__ = ["Launch", "Surroundings"]

#: Variables for this process alone, or set anew for each worker; workers do not inherit them.
PRIVATE_VARIABLES = (
    *LISTEN_VARIABLES,
    *MANAGER_VARIABLES,
    "HOTPORT_WORKER",
    "HOTPORT_UPGRADE",
    "HOTPORT_UPGRADE_CHECK",
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The supervisor's own environment and directory, kept so that no generation inherits from another.

    Attributes:
        environment: The environment without variables for the supervisor alone.
        directory: The working directory *as it was named*; each generation resolves its links again.
    """

    environment: Mapping[str, str]
    directory: str

    @classmethod
    def snapshot(cls) -> Surroundings:
        """Take them from this process, now."""
        environment = {k: v for k, v in os.environ.items() if k not in PRIVATE_VARIABLES}
        return cls(environment, working_directory(environment))


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the workers of one generation.

    A worker that is started later uses the same release and interpreter as its siblings, even if a link has changed
    meanwhile.

    Attributes:
        identity: As whom the workers run; None as the supervisor itself.
    """

    options: Options
    python: str
    directory: str
    environment: Mapping[str, str]
    identity: Identity | None = None

    @classmethod
    def resolve(cls, options: Options, surroundings: Surroundings) -> Launch:
        """Resolve the links as they are now.

        Raises:
            StartError: The directory (HP401), the interpreter (HP402) or the application's directory (HP405) is
                missing, or its path cannot be passed to workers (HP404); workers cannot run as another user (HP432),
                or that may not use one of these (HP433).
            ConfigError: A file of variables cannot be used (HP309), or there is no such user (HP430) or group (HP431).
        """
        identity = identity_for(options)
        socket_access(options)  # for its errors
        named = surroundings.directory
        directory = os.path.realpath(named)
        if not os.path.isdir(directory):
            raise StartError(
                "HP401",
                f"cannot start in {named}",
                cause=_why_no_directory(named),
                fix=f"ls -ld {named}",
            )
        python = options.python or sys.executable
        if "/" in python and not options.command:
            # Resolve the directory, not the file: Python finds a virtual environment by its python's directory.
            place, name = os.path.split(os.path.join(named, python))
            python = os.path.join(os.path.realpath(place), name)
            if not os.access(python, os.X_OK):
                raise StartError(
                    "HP402",
                    f"cannot use the interpreter {options.python or sys.executable}",
                    cause=f"{python} is not there or cannot be executed",
                    fix=f"ls -l {python}",
                    note="name another one, for example --python current/.venv/bin/python",
                )
        app_dir = os.path.realpath(os.path.join(directory, options.app_dir))  # may also be a link to a release
        if not os.path.isdir(app_dir) and not options.command:
            raise StartError(
                "HP405",
                f"cannot import from {options.app_dir}",
                cause=_why_no_directory(os.path.join(directory, options.app_dir)),
                fix=f"ls -ld {os.path.join(directory, options.app_dir)}",
                note=f"name the directory of {options.target} with --app-dir",
            )
        # Absolute, since they are read again later, when the application may have changed the working directory.
        tls_cert, tls_key = (
            tuple(os.path.join(directory, f) for f in fs) for fs in (options.tls_cert, options.tls_key)
        )
        tls_client_ca = options.tls_client_ca and os.path.join(directory, options.tls_client_ca)
        for path in (directory, python):
            if not path.isprintable() or any("\ud800" <= letter <= "\udfff" for letter in path):
                raise StartError(
                    "HP404",
                    f"cannot start in {named}",
                    cause=f"the path {os.fsencode(path)!r} is not printable UTF-8, and workers are told it as JSON",
                    note="rename the directory",
                )
        environment: dict[str, str] = {}
        for file in options.env_file:  # read here, once: workers of one generation have the same variables
            environment |= _read_variables(os.path.join(directory, file), file)
        environment |= {**surroundings.environment, "PWD": directory}
        options = replace(options, app_dir=app_dir, tls_cert=tls_cert, tls_key=tls_key, tls_client_ca=tls_client_ca)
        if identity is not None:
            wants = {directory: os.X_OK}
            if not options.command:
                wants |= {python: os.X_OK} if "/" in python else {}
                files = [*tls_cert, *tls_key, *([tls_client_ca] if tls_client_ca else [])]
                wants |= {app_dir: os.R_OK | os.X_OK, **{file: os.R_OK for file in files if os.path.exists(file)}}
            refuse_closed(identity, wants)
            environment = login_environment(environment, identity)
        return cls(options, python, directory, environment, identity)

    @property
    def uid(self) -> int | None:
        """The workers' user; None if it is the supervisor's own."""
        return self.identity.uid if self.identity is not None else None

    def place(self, directory: str) -> str:
        """The directory of the workers' control sockets, in the runtime directory of the service."""
        return directory if self.uid is None else os.path.join(directory, user_directory(self.uid))

    def command_environment(self, generation: int) -> dict[str, str]:
        """The environment of a command that runs for a generation beside its workers.

        The interpreter of the workers, and what is installed beside it, comes first on ``PATH``.
        """
        environment = {**self.environment, "HOTPORT_GENERATION": str(generation)}
        if "/" in self.python and not self.options.command:
            path = environment.get("PATH", os.defpath)
            environment["PATH"] = f"{os.path.dirname(self.python)}{os.pathsep}{path}"
        return environment

    def argv(self, service: str, generation: int, worker: int) -> list[str]:
        """The command line of one worker, or of the generation's template (number 0)."""
        if self.options.command:
            return list(self.options.command)
        label = f"{service}/{generation}.{worker or TEMPLATE}"  # for ps(1); the worker does not read it
        return [self.python, "-P", "-m", "hotport.worker", label]

    def worker_environment(self, service: str, directory: str, generation: int, worker: int) -> dict[str, str]:
        """The environment of one worker, or of the template (number 0), without the LISTEN variables."""
        added = {
            "NOTIFY_SOCKET": os.path.join(directory, notify_socket(self.uid)),
            "HOTPORT_GENERATION": str(generation),
        }
        if self.options.app_metrics:
            added["PROMETHEUS_MULTIPROC_DIR"] = app_metrics_directory(directory, self.uid)
        if not self.options.command:
            added["HOTPORT_WORKER"] = encode(self.spec(service, directory, generation, worker)).decode()
            return {**MALLOC_ENVIRONMENT, **self.environment, **added}
        if (
            self.options.hang_timeout_s
        ):  # for a program that has a watchdog; WATCHDOG_PID would exclude one in a wrapper
            added["WATCHDOG_USEC"] = str(round(self.options.hang_timeout_s * 1e6))
        return {**self.environment, **added}

    def spec(self, service: str, directory: str, generation: int, worker: int) -> WorkerSpec:
        """What one worker is told."""
        return WorkerSpec(
            service=service,
            directory=self.place(directory),
            generation=generation,
            worker=worker,
            options=self.options,
        )


def _read_variables(path: str, named: str) -> dict[str, str]:
    """Read the variables of one file.

    Raises:
        ConfigError: It cannot be read, or a line of it cannot be used (HP309).
    """
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                cause = "it is not a regular file, and it is read again at every restart"
                raise ConfigError("HP309", f"cannot read {named}", cause=cause, fix=f"ls -l {path}")
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        cause = f"{error.strerror or error}".lower()
        raise ConfigError("HP309", f"cannot read {named}", cause=cause, fix=f"ls -l {path}") from error
    if len(data) > FILE_BYTES_MAX:
        cause = f"it has more than {FILE_BYTES_MAX // 1024} KiB"
        raise ConfigError("HP309", f"cannot read {named}", cause=cause, fix=f"ls -l {path}")
    return parse_variables(data, named, reserved=PRIVATE_VARIABLES)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO would be waited for


def _why_no_directory(named: str) -> str:
    """Say why a path is no directory."""
    if not os.path.lexists(named):
        return f"{named} does not exist"
    found = os.path.realpath(named)
    is_what = "is no directory" if os.path.exists(found) else "does not exist"
    return f"it leads to {found}, which {is_what}" if os.path.islink(named) else f"{named} {is_what}"
