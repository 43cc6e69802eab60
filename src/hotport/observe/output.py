"""Write lines out of the process: whole, in order, without waiting for a reader, without an error to the writer.

What cannot be written at once waits in a bounded buffer; what does not fit there is dropped and counted. The count is a
line of its own, in the place of the lines that are missing.
"""

from __future__ import annotations

import errno
import io
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Final, NamedTuple
from weakref import WeakSet

from hotport.kernel.output import Sink

__all__ = ["Output", "stream_over"]

#: What waits for a reader, or for room on the disk, takes no more memory than that.
WAITING_BYTES_MAX: Final = 1024 * 1024

#: A pipe takes so much in one piece, beside other processes that write to it, or nothing of it (pipe(7), PIPE_BUF).
PIECE_BYTES_MAX: Final = select.PIPE_BUF

#: How soon it is tried again after an error of which nothing says when it is over: no room on the disk.
RETRY_S: Final = 1.0

#: The reader has gone, and none will come; EIO is a terminal's that has hung up.
GONE: Final = frozenset({errno.EPIPE, errno.EBADF, errno.ECONNRESET, errno.ENOTCONN, errno.ENXIO, errno.EIO})


#: Why a pipe is full.
NOT_READ: Final = "they are not read"


class _Waiting(NamedTuple):
    """The lines to write next.

    Attributes:
        lines: How many are lost with it.
        tells: It says that so many were dropped since the beginning; 0 for all other lines.
    """

    data: bytes
    lines: int
    tells: int = 0


class Output:
    """Lines for one sink, from any thread.

    Args:
        sink: Owned from here on.
        report: Makes the line that says that so many lines were dropped, and why.

    Attributes:
        dropped: Lines that were dropped since the beginning.

    A thread waits for room while something waits for it; there is none otherwise, and none in forked children.
    """

    def __init__(
        self, sink: Sink, report: Callable[[int, str], str], *, waiting_bytes_max: int = WAITING_BYTES_MAX
    ) -> None:
        self.dropped = 0
        self._counter: memoryview | None = None
        self._sink = sink
        self._report = report
        self._max = waiting_bytes_max
        self._told = 0
        self._reset()
        _outputs.add(self)
        _hook()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler may write while we do
        self._waiting: deque[_Waiting] = deque()
        self._size = 0
        self._will_tell = self._told
        self._why = ""
        self._is_failing = False  # with an error of which nothing says when it is over
        self._is_writing = False
        self._thread: threading.Thread | None = None

    def count_in(self, counter: memoryview | None) -> None:
        """Keep the number of dropped lines in the first cell of `counter`, too; forked children do not."""
        with self._lock:
            self._counter = counter
            self._drop(0)

    def _drop(self, lines: int) -> None:
        self.dropped += lines
        if self._counter is not None:
            self._counter[0] = self.dropped

    def forget(self) -> None:
        """Drop the waiting lines in a forked child: the parent writes them."""
        self._counter = None
        self._told = self.dropped = 0
        self._reset()

    def write(self, text: str) -> None:
        """Write whole lines, now if there is room; never waits, and raises nothing."""
        self.write_bytes(text.encode(errors="backslashreplace"))

    def write_bytes(self, data: bytes) -> None:
        """Write whole lines of bytes, as `write` does."""
        with self._lock:
            for piece in (data,) if len(data) <= PIECE_BYTES_MAX else _pieces(data):
                self._put(piece)
            if self._thread is not None or self._is_writing:
                return  # whoever writes comes to it
            if self._sink.may_wait or self._flush():
                self._start_waiting()

    def flush(self, timeout_s: float) -> None:
        """Write the waiting lines, for at most `timeout_s` seconds."""
        end_s = time.monotonic() + timeout_s
        while self._waiting and (left_s := end_s - time.monotonic()) > 0:
            if (thread := self._thread) is not None:
                thread.join(left_s)
            elif self._sink.may_wait or self._is_failing:
                return  # it cannot be waited for, and there is no thread to be had
            else:
                _wait_for_room(self._sink.fd, left_s)
                with self._lock:
                    self._flush()

    def close(self) -> None:
        """Close the sink; lines still waiting are lost."""
        with self._lock:
            self._waiting.clear()
            self._sink.close()

    def _put(self, data: bytes) -> None:
        lines = data.count(b"\n") or 1
        has_told = self.dropped == self._will_tell or self._put_report(len(data))
        if has_told and self._size + len(data) <= self._max:
            self._waiting.append(_Waiting(data, lines))
            self._size += len(data)
        else:
            self._drop(lines)

    def _put_report(self, beside: int) -> bool:
        """Report how many lines are missing here, if there is room for that and `beside` more bytes."""
        data = self._report(self.dropped - self._will_tell, self._why or NOT_READ).encode()
        if self._waiting and self._size + len(data) + beside > self._max:
            return False
        self._waiting.append(_Waiting(data, 0, self.dropped))
        self._size += len(data)
        self._will_tell = self.dropped
        return True

    def _flush(self) -> bool:
        """Write the waiting lines; return whether some must keep waiting."""
        self._is_writing = True
        try:
            while self._waiting or self.dropped > self._will_tell:
                if not self._waiting:
                    self._put_report(0)
                next_ = self._waiting[0]
                try:
                    written = self._sink.write(next_.data)
                except OSError as error:
                    return self._failed(error)
                self._written(next_, written)
        finally:
            self._is_writing = False
        return False

    def _failed(self, error: OSError) -> bool:
        """Handle a failed write; return whether to retry later."""
        is_full = isinstance(error, BlockingIOError)
        self._is_failing = not is_full
        self._why = NOT_READ if is_full else os.strerror(error.errno or 0)
        if error.errno in GONE:
            self._drop_all()
        return error.errno not in GONE

    def _written(self, what: _Waiting, written: int) -> None:
        self._is_failing = False
        self._size -= written
        if written < len(what.data):
            self._waiting[0] = what._replace(data=what.data[written:])
        else:
            self._waiting.popleft()
            self._told = max(self._told, what.tells)

    def _drop_all(self) -> None:
        self._drop(sum(each.lines for each in self._waiting))
        self._waiting.clear()
        self._size = 0
        self._will_tell = self._told

    # -- while something waits -----------------------------------------------------------------------------

    def _start_waiting(self) -> None:
        thread = threading.Thread(target=self._wait, name="hotport.output", daemon=True)
        self._thread = thread
        try:
            thread.start()
        except RuntimeError:  # no thread can be had: the next line tries again
            self._thread = None

    def _wait(self) -> None:
        while True:
            if self._is_failing:
                time.sleep(RETRY_S)
            else:
                _wait_for_room(self._sink.fd, None)
            if self._sink.may_wait:
                self._write_one()
            with self._lock:
                if not self._waiting if self._sink.may_wait else not self._flush():
                    self._thread = None
                    return

    def _write_one(self) -> None:
        """Write in one thread where writing may block; other threads may add lines meanwhile."""
        with self._lock:
            if not self._waiting:
                return
            next_ = self._waiting[0]
        try:
            written = self._sink.write(next_.data)
        except OSError as error:
            with self._lock:
                self._failed(error)
            return
        with self._lock:
            self._written(next_, written)
            if not self._waiting and self.dropped > self._will_tell:
                self._put_report(0)


_outputs: Final[WeakSet[Output]] = WeakSet()


def _forget_all() -> None:
    for output in list(_outputs):
        output.forget()


@cache
def _hook() -> None:
    os.register_at_fork(after_in_child=_forget_all)


def _wait_for_room(fd: int, timeout_s: float | None) -> None:
    poll = select.poll()
    with suppress(OSError, ValueError):
        poll.register(fd, select.POLLOUT)
        poll.poll(None if timeout_s is None else timeout_s * 1000)


def _pieces(data: bytes) -> list[bytes]:
    """Split into pieces of whole lines that are written at once; a longer line is a piece, and may be torn."""
    pieces, start = list[bytes](), 0
    while start < len(data):
        end = data.rfind(b"\n", start, start + PIECE_BYTES_MAX) + 1
        if end <= start:
            end = data.find(b"\n", start) + 1 or len(data)
        pieces.append(data[start:end])
        start = end
    return pieces


class _Raw(io.RawIOBase):
    """The raw stream under `sys.stderr`, so that writes of other code do not wait either."""

    def __init__(self, output: Output, fd: int) -> None:
        self._output = output
        self._fd = fd

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    def write(self, data: object) -> int:
        written = bytes(data)  # type: ignore[call-overload]
        self._output.write_bytes(written)
        return len(written)


def stream_over(output: Output, fd: int) -> io.TextIOWrapper:
    """A text stream like `sys.stderr` that writes to `output`; `fd` is what it says that it is open on."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Raw(output, fd)), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
