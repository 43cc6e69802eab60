"""Run a service under a supervisor; for a server in the program's own event loop see `hotport.embedded`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Unpack

import anyio

from hotport.errors import ConfigError, ExitCode, HotportError, visible
from hotport.kernel.fork import withheld, withhold
from hotport.kernel.process import discard, holding, numbers
from hotport.model.lifecycle import Phase
from hotport.model.signals import HELD
from hotport.observe.logs import configure, get_logger
from hotport.options import service_name
from hotport.options.keywords import RunOptions
from hotport.options.loading import Loaded, load
from hotport.supervisor.contain import contained, retried
from hotport.supervisor.control import serve_control
from hotport.supervisor.keeper import keep_files
from hotport.supervisor.launch import Surroundings
from hotport.supervisor.manager import ServiceManager
from hotport.supervisor.signals import SIGNALS, handle_signals
from hotport.supervisor.startup import Startup, open_status_port, start_up
from hotport.supervisor.statusport import serve_status_port
from hotport.supervisor.supervisor import Supervisor
from hotport.supervisor.takeover import retire
from hotport.supervisor.upgrade import Upgrade, answer_check, inherit, report

__all__ = ["run", "supervise"]


def run(
    app: str | Callable[..., Any],
    *,
    bind: str | Sequence[str] | None = None,
    **options: Unpack[RunOptions],
) -> None:
    """Serve an application under a supervisor until it is stopped; the process exits if that failed.

    Then it has said why on stderr, as ``hotport serve`` does.

    Workers are processes of their own: they import the application by its name. So `app` is a target
    (``"module:attribute"``, ``"file.py:attribute"``), or something that lives at the top level of a module; the
    script that calls `run` counts as one. Workers that import that script pass over this call, and over what stands
    under ``if __name__ == "__main__"``: an application that is made there is not found (HP502).

    Args:
        app: The application or its target.
        bind: Addresses, for example ``"tcp://127.0.0.1:8000"``.
        options: Any option, by the name that it has in ``hotport.toml``; stronger than file and environment.

    Raises:
        SystemExit: With hotport's exit code, if the service did not start or ended otherwise than by a clean stop. The
            ConfigError or StartError that was printed is its ``__cause__``: an option is wrong, `app` has no name by
            which it can be imported (HP330), an address is taken.
    """
    if _is_in_worker():
        return

    def read(directory: Path) -> Loaded:
        return load(file=None, environ=os.environ, flags=flags, cwd=directory)

    try:
        flags: dict[str, Any] = {**options, "target": app if isinstance(app, str) else target_of(app)}
        if bind is not None:
            flags["bind"] = (bind,) if isinstance(bind, str) else tuple(bind)
        code = supervise(read)
    except HotportError as error:
        print(visible(str(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    if code != ExitCode.DONE:
        raise SystemExit(code)


def _is_in_worker() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return bool(spec is not None and spec.name == "hotport.worker.__main__")


def target_of(app: Callable[..., Any]) -> str:
    """Return the target by which a worker imports `app`.

    Raises:
        ConfigError: It has no name at the top level of a module (HP330).
    """
    module_name = getattr(app, "__module__", None) or type(app).__module__
    module = sys.modules.get(module_name)
    name = getattr(app, "__qualname__", None)
    found = getattr(module, name, None) if name and "." not in name else None
    if found is not app:  # an instance has no name of its own: look for the variable that holds it
        module = sys.modules["__main__"] if found is None else module
        holders = (module, sys.modules["__main__"])
        module, name = next(((m, key) for m in holders for key, value in vars(m).items() if value is app), (None, None))
    if module is None or name is None:
        raise ConfigError(
            "HP330",
            f"cannot name {app!r} for a worker",
            cause="workers import the application, and it is not at the top level of a module",
            fix='hotport.run("module:app")',
            note="pass such a target, or give the application a name at the top level of its module",
        )
    if module.__name__ != "__main__":
        return f"{module.__name__}:{name}"
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # python -m package.module
        return f"{spec.name}:{name}"
    return f"{os.path.abspath(str(module.__file__))}:{name}"


def supervise(read: Callable[[Path], Loaded], *, takes_over: bool = False) -> int:
    """Run a service in the foreground and return its exit code.

    Workers whose supervisor has died are adopted.

    Args:
        read: Reads the options in a directory; called again for each restart, since a release may bring new ones.
        takes_over: Take the listeners of the supervisor that runs this service, if there is one, and retire it.

    Raises:
        ConfigError, StartError, KernelError: The service could not start; nothing is left behind.
        ControlError: Remaining workers cannot be adopted, or the running supervisor does not pass its listeners.
    """
    surroundings = Surroundings.snapshot()
    options = read(Path(surroundings.directory)).options
    answer_check(os.environ)
    inheritance = inherit(os.environ, os.getpid())
    name = inheritance.service if inheritance is not None else service_name(options)
    configure(format=options.log_format, level=options.log_level, service=name, role="supervisor")
    with ExitStack() as stack:
        stack.enter_context(holding(numbers(HELD)))  # until they are handled, they would end this process
        stack.callback(discard, SIGNALS)
        manager = ServiceManager(os.environ, os.getpid())
        stack.callback(manager.close)
        startup = start_up(name, options, manager, stack, inheritance, surroundings, takes_over=takes_over)
        supervisor = Supervisor(
            name,
            startup.rundir.directory,
            options,
            startup.rundir.notify,
            surroundings,
            found=startup.found,
            read_options=lambda directory: read(directory).options,
            manager=manager,
            mend=startup.rundir.mend,
            admit=startup.rundir.admit,
        )
        stack.callback(supervisor.close)
        upgrade = Upgrade(supervisor, startup.rundir)
        stack.callback(upgrade.close)
        open_status_port(supervisor, startup, stack)
        supervisor.owned.guard(options)
        anyio.run(_supervise, supervisor, startup, upgrade)
        upgrade.carry_out()
    if isinstance(supervisor.failure, HotportError):
        raise supervisor.failure
    if supervisor.failure:
        print(visible(supervisor.failure), file=sys.stderr)
    return supervisor.exit_code


async def _answer_probes(supervisor: Supervisor, startup: Startup) -> None:
    """Answer on the status port while this supervisor owns it; two supervisors may hold it."""
    if supervisor.status_port is None:
        return
    inherited = startup.inheritance.status_port if startup.inheritance is not None else None
    if not startup.has_predecessor:
        if startup.inheritance is not None or startup.found.orphans:
            await supervisor.begun.wait()  # before that we know of no worker
    elif inherited is not None and inherited.listener is supervisor.status_port.listener:
        while len(supervisor.service.ids(Phase.SERVING)) < supervisor.service.wanted:
            await supervisor.wait_stepped()  # until then the other one answers
    port, is_over = None, anyio.Event()
    async with anyio.create_task_group() as tasks:
        while not (supervisor.is_succeeded and supervisor.service.is_stopping):
            if supervisor.status_port is not port:
                is_over.set()
                port, is_over = supervisor.status_port, anyio.Event()
                tasks.start_soon(serve_status_port, supervisor, withheld(port.listener.dup()), is_over)
            await supervisor.wait_stepped()
        is_over.set()


async def _supervise(supervisor: Supervisor, startup: Startup, upgrade: Upgrade) -> None:
    log = get_logger("hotport.supervisor")
    withhold(supervisor)
    withhold(startup.rundir)
    at = {"status_address": supervisor.status_port.address} if supervisor.status_port else {}
    log.info("service.starting", addresses=list(supervisor.listeners), **at)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(retried, "control", serve_control, supervisor, startup.rundir, upgrade)
        async with anyio.create_task_group() as until_the_end:
            until_the_end.start_soon(retried, "signals", handle_signals, supervisor, upgrade, until_the_end)
            if (inheritance := startup.inheritance) is not None:
                complete = retire if startup.has_predecessor else report
                until_the_end.start_soon(contained, "succession", complete, inheritance, supervisor)
            until_the_end.start_soon(retried, "status_port", _answer_probes, supervisor, startup)
            until_the_end.start_soon(retried, "files", keep_files, supervisor, startup.rundir)
            await supervisor.run()
            # From here on they wait: for the handlers of the next supervisor, or until there is nothing left to end.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for _ in range(3):  # what came before is read, handled and answered in three turns of the event loop
                await retried("signals", anyio.lowlevel.checkpoint)
            if supervisor.is_departing:
                tasks.cancel_scope.cancel()
            until_the_end.cancel_scope.cancel()
    if not supervisor.is_departing:
        log.info("service.ended", exit_code=supervisor.exit_code)
