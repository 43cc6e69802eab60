"""What a generation is started from: resolved once, so that all its workers are of one piece."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from hotport.errors import StartError
from hotport.kernel.process import working_directory
from hotport.options import Options
from hotport.supervisor.manager import MANAGER_VARIABLES
from hotport.wire.listenfds import LISTEN_VARIABLES
from hotport.wire.messages import WorkerSpec, encode

__all__ = ["Launch", "Surroundings"]

#: Meant for this process or set anew for each worker; never handed on as they are.
PRIVATE_VARIABLES = (
    *LISTEN_VARIABLES,
    *MANAGER_VARIABLES,
    "HOTPORT_WORKER",
    "HOTPORT_UPGRADE",
    "HOTPORT_UPGRADE_CHECK",
)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the supervisor itself was started in: kept, so that no generation inherits from another.

    Attributes:
        environment: As it was, less what was meant for the supervisor alone.
        directory: The working directory *as it was named*; its links are followed anew by each generation.
    """

    environment: Mapping[str, str]
    directory: str

    @classmethod
    def snapshot(cls) -> Surroundings:
        """Remember them now."""
        environment = {k: v for k, v in os.environ.items() if k not in PRIVATE_VARIABLES}
        return cls(environment, working_directory(environment))


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start the workers of one generation.

    A worker that is replaced later comes from the same release and interpreter as its siblings, whatever a link
    points to by then.
    """

    options: Options
    python: str
    directory: str
    environment: Mapping[str, str]

    @classmethod
    def resolve(cls, options: Options, surroundings: Surroundings) -> Launch:
        """Follow the links as they are now.

        Raises:
            StartError: The directory (HP401), the interpreter (HP402) or the application's directory (HP405) is not
                there, or workers cannot be told where it is (HP404).
        """
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
            # The directory is resolved, the name is not: a virtual environment is known by where its python lies.
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
        app_dir = os.path.realpath(os.path.join(directory, options.app_dir))  # may be a link to a release, too
        if not os.path.isdir(app_dir) and not options.command:
            raise StartError(
                "HP405",
                f"cannot import from {options.app_dir}",
                cause=_why_no_directory(os.path.join(directory, options.app_dir)),
                fix=f"ls -ld {os.path.join(directory, options.app_dir)}",
                note=f"name the directory of {options.target} with --app-dir",
            )
        # Read again while the worker runs; the application may have changed the directory by then.
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
        environment = {**surroundings.environment, "PWD": directory}
        options = replace(options, app_dir=app_dir, tls_cert=tls_cert, tls_key=tls_key, tls_client_ca=tls_client_ca)
        return cls(options, python, directory, environment)

    def argv(self, service: str, generation: int, worker: int) -> list[str]:
        """The command line of one worker."""
        if self.options.command:
            return list(self.options.command)
        label = f"{service}/{generation}.{worker}"  # for ps(1); the worker does not read it
        return [self.python, "-P", "-m", "hotport.worker", label]

    def worker_environment(self, service: str, directory: str, generation: int, worker: int) -> dict[str, str]:
        """The environment of one worker, without the LISTEN variables."""
        added = {
            "NOTIFY_SOCKET": os.path.join(directory, "notify.sock"),
            "HOTPORT_GENERATION": str(generation),
        }
        if not self.options.command:
            spec = WorkerSpec(
                service=service,
                directory=directory,
                generation=generation,
                worker=worker,
                options=self.options,
            )
            added["HOTPORT_WORKER"] = encode(spec).decode()
        return {**self.environment, **added}


def _why_no_directory(named: str) -> str:
    """What a path is in place of a directory."""
    if not os.path.lexists(named):
        return f"{named} does not exist"
    found = os.path.realpath(named)
    is_what = "is no directory" if os.path.exists(found) else "does not exist"
    return f"it leads to {found}, which {is_what}" if os.path.islink(named) else f"{named} {is_what}"
