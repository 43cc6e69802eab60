"""The worker's entry point, ``python -m hotport.worker``, as the supervisor starts it."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from importlib.machinery import SourceFileLoader
from typing import Any, Final

import msgspec

from hotport.address import parse_listener_name
from hotport.errors import HotportError
from hotport.kernel.process import MALLOC_ENVIRONMENT
from hotport.kernel.sockets import bind_control, inherited_listener
from hotport.kernel.stacks import StackPipe
from hotport.observe import logs
from hotport.wire.listenfds import LISTEN_VARIABLES, parse_listen_environment
from hotport.wire.messages import COUNTERS, LOAD_PAGE, TEMPLATE, Import, WorkerSpec, worker_socket
from hotport.worker import template
from hotport.worker.worker import Worker

#: Seconds in which a changed source may change again with the same modification time: one for its resolution, and one
#: for the coarse clock of file times.
RACY_S: Final = 2.0


def main() -> int:
    """Become the worker, or the template of workers, that the environment describes; return its exit code."""
    if "HOTPORT_WORKER" not in os.environ:
        print("hotport.worker is started by `hotport serve`, not by hand", file=sys.stderr)
        return 2
    spec = msgspec.json.decode(os.environ.pop("HOTPORT_WORKER"), type=WorkerSpec)
    passed = list(parse_listen_environment(os.environ, os.getpid()))
    notify_path = os.environ.pop("NOTIFY_SOCKET", None)
    for name in LISTEN_VARIABLES:  # the application's own children must not inherit them
        os.environ.pop(name, None)
    for name, value in MALLOC_ENVIRONMENT.items():  # nor these, unless they are the user's
        if os.environ.get(name) == value:
            del os.environ[name]
    _keep_no_racy_byte_code()
    make_loop = _loop_factory(spec.options.loop)
    _configure_logs(spec)
    application, imports = None, list[Import]()
    if [name for _, name in passed] == [TEMPLATE]:
        ready = template.serve(spec, socket.socket(fileno=passed[0][0]))
        if isinstance(ready, int):
            return ready
        spec, passed, application, imports = ready
        _configure_logs(spec)
    page, counters = (next((fd for fd, name in passed if name == wanted), -1) for wanted in (LOAD_PAGE, COUNTERS))
    listeners = {
        str(parse_listener_name(name)): inherited_listener(fd) for fd, name in passed if fd not in (page, counters)
    }
    path = os.path.join(spec.directory, worker_socket(spec.generation, spec.worker))
    try:
        control = bind_control(path)
    except HotportError as error:
        print(error, file=sys.stderr)
        return error.exit_code

    pipe = StackPipe()  # before the application is imported here; for the life of this process

    async def run() -> int:
        worker = Worker(
            spec,
            listeners,
            control,
            path,
            notify_path=notify_path,
            page=page,
            counters=counters,
            application=application,
            imports=imports,
            stack=pipe.identity,
        )
        return await worker.run()

    with asyncio.Runner(loop_factory=make_loop) as runner:
        return runner.run(run())


def _configure_logs(spec: WorkerSpec) -> None:
    logs.configure(
        format=spec.options.log_format,
        level=spec.options.log_level,
        service=spec.service,
        generation=spec.generation,
        worker=spec.worker,
    )


def _keep_no_racy_byte_code() -> None:
    """Write no byte code for sources that were changed just before this process started, or since.

    Byte code is validated by the source's size and whole second of modification. An edit of the same size in the second
    in which the source was compiled would be missed: the restart would succeed, and the old code would serve. Sources
    are read from now on, so an older source can only be changed in a later second.

    Sources: Python reference, 5.4.7 "Cached bytecode invalidation"; PEP 552 for the header.
    """
    settled_s = time.time() - RACY_S
    set_data = SourceFileLoader.set_data

    def set_data_unless_racy(loader: SourceFileLoader, path: str, data: Any, *, _mode: int = 0o666) -> None:
        is_hash_based = any(data[4:8])
        if is_hash_based or int.from_bytes(data[8:12], "little") <= settled_s:
            set_data(loader, path, data, _mode=_mode)

    SourceFileLoader.set_data = set_data_unless_racy  # type: ignore[assignment]


def _loop_factory(name: str):  # type: ignore[no-untyped-def]  # uvloop is only imported if needed
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
