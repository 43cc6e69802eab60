"""``python -m hotport.worker``: how the supervisor starts a worker."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from hotport.errors import HotportError
from hotport.kernel.sockets import bind_control, inherited_listener
from hotport.observe import logs
from hotport.wire.listenfds import LISTEN_VARIABLES, parse_listen_environment
from hotport.wire.messages import WorkerSpec
from hotport.worker.worker import Worker


def main() -> int:
    """Become the worker that the environment describes; return its exit code."""
    if "HOTPORT_WORKER" not in os.environ:
        print("hotport.worker is started by `hotport serve`, not by hand", file=sys.stderr)
        return 2
    spec = msgspec.json.decode(os.environ.pop("HOTPORT_WORKER"), type=WorkerSpec)
    passed = parse_listen_environment(os.environ, os.getpid())
    listeners = [inherited_listener(fd) for fd, _ in passed]
    notify_path = os.environ.pop("NOTIFY_SOCKET", None)
    for name in LISTEN_VARIABLES:  # they were for us, not for what the application starts
        os.environ.pop(name, None)
    path = os.path.join(spec.directory, f"worker-{spec.generation}.{spec.worker}.sock")
    try:
        control = bind_control(path)
    except HotportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    logs.configure(
        format=spec.options.log_format,
        level=spec.options.log_level,
        service=spec.service,
        generation=spec.generation,
        worker=spec.worker,
    )

    async def run() -> int:
        return await Worker(spec, listeners, control, path, notify_path=notify_path).run()

    with asyncio.Runner(loop_factory=_loop_factory(spec.options.loop)) as runner:
        return runner.run(run())


def _loop_factory(name: str):  # type: ignore[no-untyped-def]  # uvloop is only imported if wanted
    if name == "asyncio":
        return asyncio.new_event_loop
    import uvloop

    return uvloop.new_event_loop


if __name__ == "__main__":
    sys.exit(main())
