"""``serve --watch``: a process beside the supervisor that asks for a restart when code changes.

It is a process because the supervisor stays small and has one thread. One socket pair, the watcher's stdin, ties
the two together: the watcher says there that it watches, and reads the end of the file when the supervisor is gone,
however it went.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from hotport.cli.client import ask, raise_failure
from hotport.errors import ConfigError, HotportError
from hotport.observe.logs import configure, get_logger
from hotport.options import Options, service_name
from hotport.wire.messages import Report, RestartRequest

__all__ = ["check_watchfiles", "main", "watching"]

WATCHING: Final = "watching\n"

#: Answers that another try may better: a restart is in progress or the service is starting (HP410), its control
#: socket is not there yet (HP605, HP606), it went away in the middle (HP607).
RETRIED: Final = frozenset({"HP410", "HP605", "HP606", "HP607"})

#: Nobody tells us when a restart that somebody else asked for is over.
RETRY_S: Final = 0.25

#: The watch stands when the generator first yields, and without a change that is after this time.
FIRST_YIELD_MS: Final = 100


def check_watchfiles() -> None:
    """Raise ConfigError (HP332) if ``watchfiles`` is not installed."""
    if find_spec("watchfiles") is None:
        raise ConfigError(
            "HP332",
            "cannot watch for changes",
            cause=f"the package watchfiles is not installed in {sys.executable}",
            fix=f"{sys.executable} -m pip install 'hotport[watch]'",
        )


@contextmanager
def watching(options: Options) -> Iterator[None]:
    """Restart the service that `options` describe whenever Python code changes, while the block runs.

    Every change after the beginning of the block counts, also one that happens during a restart. A restart that
    is aborted is told in the log, and the next change is tried.

    Raises:
        ConfigError: ``watchfiles`` is not installed (HP332), a path does not exist (HP333) or cannot be watched
            (HP334); nothing was started.

    Processes: one child, which ends with the block or with this process, whichever is first.
    """
    check_watchfiles()
    paths = [Path(path).resolve() for path in options.watch_path or (options.app_dir,)]
    for path in paths:
        if not path.exists():
            raise ConfigError(
                "HP333",
                f"cannot watch {path}",
                cause="it does not exist",
                fix="name a file or directory with --watch-path",
            )
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "hotport.cli.watch"),
                    *(service_name(options), options.log_format, options.log_level),
                    *map(str, paths),
                ],
                stdin=theirs.fileno(),
                process_group=0,  # Ctrl-C is for the supervisor, which may go on for a while
            )
        try:
            with ours.makefile() as words:
                if (said := words.readline()) != WATCHING:
                    raise ConfigError(
                        "HP334",
                        f"cannot watch {', '.join(map(str, paths))}",
                        cause=said.strip() or "the watcher ended without a word; what it wrote is above",
                        fix="sysctl fs.inotify.max_user_watches, or watch less with --watch-path",
                    )
            yield
        finally:
            process.terminate()
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """The watcher itself: service, log format, log level, paths; tied to stdin."""
    name, log_format, log_level, *paths = arguments
    configure(format=log_format, level=log_level, service=name, role="watcher")
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts changes aloud
    supervisor = socket.socket(fileno=os.dup(0))
    gone = threading.Event()

    def wait_until_gone() -> None:
        supervisor.recv(1)
        gone.set()

    threading.Thread(target=wait_until_gone, daemon=True).start()
    try:
        for changed in _changes(paths, gone):
            if changed is None:
                supervisor.sendall(WATCHING.encode())
            else:
                get_logger("hotport.watch").info("watch.changed", files=changed)
                _restart(name, gone)
    except OSError as error:  # too many files for inotify, a directory that may not be read
        supervisor.sendall(f"{error}\n".encode())
        return 1
    return 0


def _changes(paths: Sequence[str], gone: threading.Event) -> Iterator[list[str] | None]:
    """First None, when every path is being watched; then the changed files, in bursts, until `gone`."""
    from watchfiles import PythonFilter, watch

    is_standing = False
    # What changes while nobody asks for the next burst is collected by watchfiles' own thread.
    for changes in watch(
        *paths, watch_filter=PythonFilter(), stop_event=gone, rust_timeout=FIRST_YIELD_MS, yield_on_timeout=True
    ):
        if not is_standing:
            is_standing = True
            yield None
        if changes:
            yield sorted({os.path.relpath(path) for _, path in changes})


def _restart(name: str, gone: threading.Event) -> None:
    """Restart the service and tell about it if it fails; one that cannot begin yet is tried until it can."""
    log = get_logger("hotport.watch")
    while not gone.is_set():
        try:
            for reply in ask(name, RestartRequest()):
                raise_failure(reply)
                if isinstance(reply, Report) and reply.outcome in ("aborted", "undone"):
                    log.error("watch.restart_failed", serving=reply.serving)  # why: the supervisor has just said it
            return
        except HotportError as error:
            if error.code not in RETRIED:
                log.error("watch.restart_refused", exception=str(error))
                return
        gone.wait(RETRY_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
