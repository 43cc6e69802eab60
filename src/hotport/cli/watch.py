"""``serve --watch``: a process beside the supervisor that asks for a restart when code changes.

It is a process because the supervisor stays small and has one thread. One socket pair, the watcher's stdin, ties
the two together: the watcher says there that it watches, and reads the end of the file when the supervisor is gone,
however it went.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from hotport.cli._watched import Brake, Watched, changed_within
from hotport.cli.client import ask, raise_failure
from hotport.errors import ConfigError, HotportError
from hotport.kernel.process import working_directory
from hotport.observe.logs import configure, get_logger
from hotport.options import Options, service_name
from hotport.wire.messages import Progress, Report, RestartRequest

__all__ = ["check_watchfiles", "main", "watching"]

WATCHING: Final = "watching\n"

#: Answers that another try may better: a restart is in progress or the service is starting (HP410), its control
#: socket is not there yet (HP605, HP606), it went away in the middle (HP607).
RETRIED: Final = frozenset({"HP410", "HP605", "HP606", "HP607"})

#: Nobody tells us when a restart that somebody else asked for is over.
RETRY_S: Final = 0.25

#: The piece of news that all new workers are ready.
READY: Final = "restart.ready"

#: Why a restart waits.
BRAKED: Final = "each restart has changed files that are watched: does the service write its own code?"

#: What has to be watched may be moved away so many times while we begin to watch it.
MOVES_MAX: Final = 10

#: The name of threads that watch.
THREAD: Final = "watch"

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
    base = Path(working_directory(os.environ))
    paths = [base / path for path in options.watch_path or (options.app_dir,)]
    for path in paths:
        if not path.exists():
            raise ConfigError(
                "HP333",
                f"cannot watch {path}",
                cause="it does not exist",
                fix="--watch-path .",
                note="name a file or a directory that exists",
            )
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "hotport.cli.watch"),
                    *(service_name(options), options.log_format, options.log_level),
                    *(
                        json.dumps(list(each))
                        for each in (map(str, paths), options.watch_include, options.watch_exclude)
                    ),
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
                        fix="sysctl fs.inotify.max_user_watches",
                        note="raise that limit, or watch less with --watch-path",
                    )
            yield
        finally:
            process.terminate()
            process.wait()


def main(arguments: Sequence[str]) -> int:
    """The watcher itself: service, log format, log level; lists of paths and patterns; tied to stdin."""
    name, log_format, log_level, *lists = arguments
    configure(format=log_format, level=log_level, service=name, role="watcher")
    logging.getLogger("watchfiles").setLevel(logging.WARNING)  # it counts changes aloud
    paths, include, exclude = map(json.loads, lists)
    supervisor = socket.socket(fileno=os.dup(0))
    gone = threading.Event()
    changes = _Changes(Watched(paths, include=include, exclude=exclude))

    def wait_until_gone() -> None:
        supervisor.recv(1)
        gone.set()
        changes.end()

    threading.Thread(target=wait_until_gone, daemon=True).start()
    try:
        changes.stand()
        supervisor.sendall(WATCHING.encode())
        _restart_for_each(changes, name, gone)
    except OSError as error:  # too many files for inotify, a directory that may not be read
        if gone.is_set():
            return 0
        get_logger("hotport.watch").error("watch.failed", exception=str(error))
        supervisor.sendall(f"{error}\n".encode())
        return 1
    finally:
        changes.end()
    return 0


class _Changes:
    """Yield changes of code in bursts; changes between two requests are kept for the next one.

    Threads: one for the directories that are watched with all that is below them, one for single entries; `end` ends
    them within 50 ms.
    """

    def __init__(self, watched: Watched) -> None:
        self._watched = watched
        self._found: queue.SimpleQueue[frozenset[str] | OSError | None] = queue.SimpleQueue()
        self._stop = threading.Event()

    def end(self) -> None:
        """Stop watching; `next` returns None."""
        self._stop.set()
        self._found.put(None)

    def stand(self) -> None:
        """Replace the watched paths by the current ones; return once they are watched.

        Raises:
            OSError: It cannot be watched.
        """
        for _ in range(MOVES_MAX):
            stop = threading.Event()
            try:
                self._start(stop)
            except FileNotFoundError:  # it was there when we looked
                stop.set()
                self._watched.look()
            else:
                before, self._stop = self._stop, stop
                before.set()
                return
        raise FileNotFoundError("what is to be watched comes and goes")

    def _start(self, stop: threading.Event) -> None:
        stands: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
        both = ((self._watched.trees, True), (self._watched.parents, False))
        watches = [(paths, is_deep, stands, stop) for paths, is_deep in both if paths]
        for args in watches:
            threading.Thread(target=self._follow, name=THREAD, args=args, daemon=True).start()
        for _ in watches:
            if (error := stands.get()) is not None:
                raise error

    def _follow(
        self, paths: Sequence[str], is_deep: bool, stands: queue.SimpleQueue[OSError | None], stop: threading.Event
    ) -> None:
        from watchfiles import watch

        is_standing = False
        try:
            for changes in watch(
                *paths,
                watch_filter=lambda _, path: self._watched.concerns(path),
                stop_event=stop,
                rust_timeout=FIRST_YIELD_MS,
                yield_on_timeout=True,
                recursive=is_deep,
            ):
                if not is_standing:
                    is_standing = True
                    stands.put(None)
                if changes:
                    self._found.put(frozenset(path for _, path in changes))
        except OSError as error:
            (self._found if is_standing else stands).put(error)
        finally:
            stands.put(None)

    def next(self, timeout_s: float | None = None) -> frozenset[str] | None:
        """Wait for files that count to change, and return them; None at the end.

        Raises:
            queue.Empty: None has changed in time.
            OSError: What has to be watched cannot be.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (changed := self._get(deadline)) is not None:
            files = frozenset(path for path in changed if self._watched.counts(path))
            if self._watched.look():
                self.stand()  # before the restart, so that no change after it is missed
                if self._watched.is_whole:
                    return changed
            if files:
                return files
        return None

    def _get(self, deadline: float | None) -> frozenset[str] | None:
        """Wait for changes, and return all that were found."""
        files: frozenset[str] = frozenset()
        while not files or not self._found.empty():
            found = self._found.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            if found is None:
                return None
            if isinstance(found, OSError):
                raise found
            files |= found
        return files


def _restart_for_each(changes: _Changes, name: str, gone: threading.Event) -> None:
    """Restart the service whenever code has changed, until there are no more changes."""
    log = get_logger("hotport.watch")
    brake = Brake()
    starting = 0.0, 0.0
    while (files := changes.next()) is not None:
        log.info("watch.changed", files=_shown(files))
        if delay_s := brake.delay_s(is_own=changed_within(files, *starting)):
            note = "exclude them with --watch-exclude"
            log.warning("watch.braked", files=_shown(files), wait_s=delay_s, why=BRAKED, note=note)
            with suppress(queue.Empty):
                files = changes.next(delay_s)
                if files is None:
                    return
                brake.release()
                log.info("watch.changed", files=_shown(files))
        starting = _restart(name, gone)


def _shown(files: frozenset[str]) -> list[str]:
    return sorted(map(os.path.relpath, files))


def _restart(name: str, gone: threading.Event) -> tuple[float, float]:
    """Restart the service, and report a failure; retry while it cannot begin yet.

    Returns:
        From when to when new code was starting (``time.time()``).
    """
    log = get_logger("hotport.watch")
    began = 0.0
    while not gone.is_set():
        began = time.time()
        ready = math.inf
        try:
            for reply in ask(name, RestartRequest()):
                raise_failure(reply)
                if isinstance(reply, Progress) and reply.event == READY:
                    ready = began + reply.ms / 1000
                if isinstance(reply, Report) and reply.outcome in ("aborted", "undone"):
                    log.error("watch.restart_failed", serving=reply.serving)  # why: the supervisor has just said it
            return began, min(ready, time.time())
        except HotportError as error:
            if error.code not in RETRIED:
                log.error("watch.restart_refused", exception=str(error))
                break
        gone.wait(RETRY_S)
    return began, began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
