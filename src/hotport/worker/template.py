"""A template: a process that has imported a generation's application, and from which its workers are forked.

It runs no event loop and holds no listener. Each worker is forked twice, so that the supervisor, a subreaper, becomes
its parent. The template ends with its supervisor, whose end closes the conversation.

Sources: fork(2); `gc.freeze` on copy-on-write; PR_SET_CHILD_SUBREAPER(2const).
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Final, NamedTuple, TypeVar

from hotport.adapters.target import import_adapter, kind_of, load_application
from hotport.errors import ExitCode, HotportError, StartError
from hotport.kernel.process import open_descriptors, rename_last_argument
from hotport.kernel.scm import receive_descriptors, send_descriptors
from hotport.observe.logs import get_logger
from hotport.wire.messages import Forked, ForkOrder, Import, Loaded, WorkerSpec, decode, encode
from hotport.worker.imports import measured_imports

__all__ = ["NewWorker", "after_fork", "run_after_fork", "serve"]

Function = TypeVar("Function", bound=Callable[[], object])

#: The longest order: a worker's options.
ORDER_BYTES_MAX: Final = 128 * 1024

#: The longest error text.
ERROR_CHARS_MAX: Final = 32 * 1024

_functions: Final[list[Callable[[], object]]] = []


class NewWorker(NamedTuple):
    """What a worker that was forked just now is to be.

    Attributes:
        passed: Its descriptors with their names, as from `hotport.wire.listenfds.parse_listen_environment`.
        imports: The slowest modules of the application.
    """

    spec: WorkerSpec
    passed: list[tuple[int, str]]
    application: Any
    imports: list[Import]


def after_fork(function: Function) -> Function:
    """Have a function called at the start of each worker process, before the application's lifespan.

    It makes anew what workers must not share if the application was imported once for all of them (``preload``):
    connections, threads, random generators. It is called without `preload` as well, in the running event loop; an
    exception is a failed start. Use it as a decorator.
    """
    _functions.append(function)
    return function


def run_after_fork() -> None:
    """Call the functions of `after_fork`, in the order in which they were given."""
    for function in _functions:
        function()


def serve(spec: WorkerSpec, channel: socket.socket) -> NewWorker | int:
    """Import the application, and fork workers until the supervisor closes the channel.

    Returns:
        In each worker, what it is to be. In the template, its exit code.

    Descriptors: owns `channel`; a worker owns the descriptors that it has got.
    """
    supervisor = os.getppid()
    gc.disable()  # a collection would leave holes in pages that are shared from now on
    try:
        with measured_imports() as imports:
            application = load_application(spec.options)
        import_adapter(kind_of(application, spec.options))
        _refuse_threads(spec)
    except Exception as error:
        text = str(error) if isinstance(error, HotportError) else "".join(traceback.format_exception(error))
        _say(channel, Loaded(error=text[-ERROR_CHARS_MAX:]))
        return ExitCode.NOT_STARTED
    _warn_of_connections(channel)
    gc.freeze()
    _say(channel, Loaded())
    while True:
        data, descriptors, is_whole = receive_descriptors(channel, ORDER_BYTES_MAX)
        if not data:
            return ExitCode.DONE
        order = decode(data, ForkOrder)
        if not is_whole:
            _say(channel, Forked(error="the template has no descriptor left (RLIMIT_NOFILE)"))
        elif _fork(channel, supervisor):
            channel.close()
            rename_last_argument(f"{spec.service}/{spec.generation}.{order.spec.worker}")
            _seed()
            gc.enable()
            return NewWorker(order.spec, list(zip(descriptors, order.names, strict=True)), application, imports)
        for fd in descriptors:
            os.close(fd)


def _fork(channel: socket.socket, supervisor: int) -> bool:
    """Fork a worker and tell the supervisor; True in the worker."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # the application may have replaced or closed it
            stream.flush()  # else each worker would write what waits there
    try:
        with ExitStack() as stack:
            heard, report, waits, hold = map(stack.enter_context, (*socket.socketpair(), *socket.socketpair()))
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # native libraries' threads
                if (between := os.fork()) == 0:
                    _fork_again(report)
                    hold.close()
                    waits.recv(1)  # until the process in between has ended
                    if os.getppid() != supervisor:  # it was killed: the next one could not know of us
                        os._exit(ExitCode.NOT_STARTED)
                    return True
            os.waitpid(between, 0)
            worker = int(heard.recv(20, socket.MSG_DONTWAIT))
            pidfd = os.pidfd_open(worker)
    except OSError as error:
        _say(channel, Forked(error=str(error)))
        return False
    with suppress(ConnectionError):
        send_descriptors(channel, encode(Forked(pid=worker)), [pidfd])
    os.close(pidfd)
    return False


def _fork_again(report: socket.socket) -> None:
    """Fork the worker from the process in between, which ends; return in the worker."""
    try:
        if worker := os.fork():
            os.setpgid(worker, worker)
            report.send(b"%d" % worker)
            os._exit(0)
    except BaseException:
        os._exit(1)


def _say(channel: socket.socket, message: Loaded | Forked) -> None:
    with suppress(ConnectionError):  # the supervisor has ended, which `serve` sees next
        channel.send(encode(message))


def _refuse_threads(spec: WorkerSpec) -> None:
    """Raise an error if threads run: a forked process has only the thread that has called fork(2)."""
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    names = [name for name in names if not name.startswith("hotport.")]  # ours are started again where they are needed
    if names:
        raise StartError(
            "HP520",
            f"cannot fork workers from a process that has imported {spec.options.target}",
            cause=f"its import has started threads, which forked workers would not have: {', '.join(names)}",
            note="start them in the lifespan, or in a function that is decorated with hotport.after_fork, "
            "or set preload = false",
        )


def _warn_of_connections(channel: socket.socket) -> None:
    """Warn of connections that the import has made: all workers would read from them and write to them."""
    for fd in set(open_descriptors()) - {0, 1, 2, channel.fileno()}:
        with suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:
            if sock.type == socket.SOCK_STREAM and (peer := sock.getpeername()):
                get_logger("hotport.worker").warning(
                    "preload.connection",
                    peer=peer,
                    why="the import has made a connection, which all workers share",
                    note="connect in the lifespan, or in a function that is decorated with hotport.after_fork",
                )


def _seed() -> None:
    """Give the worker random numbers of its own; `random` and OpenSSL do that for theirs at a fork."""
    if (numpy := sys.modules.get("numpy.random")) is not None:
        numpy.seed()
