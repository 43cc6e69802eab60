"""Lines for a reader who does not read or has gone, or for a full disk: nothing waits, and what is lost is told."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import select
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from hotport.kernel.output import Sink, open_sink
from hotport.observe import output as module
from hotport.observe.output import Output, stream_over
from tests.support import DEADLINE_S, eventually

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

LINE = "x" * 99 + "\n"


def report(lines: int, why: str) -> str:
    return f"dropped {lines}: {why}\n"


class Pipe:
    """A pipe of one page, and an output into it."""

    def __init__(self, **options: int) -> None:
        self.read, self.write = os.pipe()
        fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, 4096)
        self.output = Output(open_sink(self.write), report, **options)

    def receive(self) -> str:
        assert select.select([self.read], [], [], DEADLINE_S)[0]
        return os.read(self.read, 1 << 20).decode()

    def receive_until(self, end: str) -> str:
        text = ""
        while not text.endswith(end):
            text += self.receive()
        return text

    def close(self) -> None:
        for fd in (self.read, self.write):
            if fd >= 0:
                os.close(fd)


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    pipe = Pipe(waiting_bytes_max=8000)
    yield pipe
    if pipe.read >= 0:
        os.close(pipe.read)  # so that a thread that waits for room comes to its end
        pipe.read = -1
    end(pipe.output)
    pipe.close()


def end(output: Output) -> None:
    if (thread := output._thread) is not None:
        thread.join(DEADLINE_S)
    output.close()


def test_line_is_there_when_write_returns(pipe: Pipe) -> None:
    pipe.output.write("a line\n")
    assert os.read(pipe.read, 100) == b"a line\n"
    assert pipe.output._thread is None


def test_flags_that_other_processes_share_stay_as_they_are(pipe: Pipe) -> None:
    assert not fcntl.fcntl(pipe.write, fcntl.F_GETFL) & os.O_NONBLOCK


def test_nobody_reads_and_nothing_waits(pipe: Pipe) -> None:
    """Workers and supervisor were blocked in write(2), and every client timed out."""
    for number in range(1000):
        pipe.output.write(f"{number:099}\n")
    assert pipe.output.dropped == 1000 - 40 - 80  # the pipe's page, and what may wait
    assert pipe.output._size <= 8000
    text = pipe.receive_until("they are not read\n")
    assert text.splitlines() == [*(f"{number:099}" for number in range(120)), "dropped 880: they are not read"]
    eventually(lambda: pipe.output._thread is None, "nobody waits any more")
    pipe.output.write("later\n")
    assert pipe.receive() == "later\n"


def test_count_stands_where_lines_are_missing(pipe: Pipe) -> None:
    for _ in range(200):
        pipe.output.write(LINE)
    text = pipe.receive()  # some room, and more lines before the rest is read
    eventually(lambda: pipe.output._size < 6000, "there is room again")
    pipe.output.write("after\n")
    text += pipe.receive_until("after\n")
    lines = text.splitlines()
    told = next(number for number, line in enumerate(lines) if line.startswith("dropped"))
    assert lines[told:] == ["dropped 80: they are not read", "after"]
    assert lines[:told] == [LINE.strip()] * 120


def test_reader_has_gone(pipe: Pipe) -> None:
    """It raised BrokenPipeError into whoever answered a request."""
    os.close(pipe.read)
    pipe.read = -1
    for _ in range(10):
        pipe.output.write(LINE * 2)
    assert pipe.output.dropped == 20
    assert not pipe.output._waiting
    assert pipe.output._thread is None


def test_reader_goes_while_lines_wait(pipe: Pipe) -> None:
    for _ in range(100):
        pipe.output.write(LINE)
    os.close(pipe.read)
    pipe.read = -1
    eventually(lambda: pipe.output._thread is None, "nobody waits any more")
    assert pipe.output.dropped == 60


def test_long_line_is_torn_by_nobody_but_its_reader(pipe: Pipe) -> None:
    """A traceback is longer than what a pipe takes in one piece: a part of it is written, and the rest waits."""
    pipe.output.write("y" * 6000 + "\n" + "end\n")
    assert pipe.receive_until("end\n") == "y" * 6000 + "\n" + "end\n"


def test_lines_are_written_in_whole_pieces(pipe: Pipe) -> None:
    written: list[bytes] = []

    def write(data: bytes) -> int:
        written.append(data)
        return len(data)

    sink = Sink(pipe.write, write, False, lambda: None)
    text = "".join(f"{number:0150}\n" for number in range(100)) + "z" * 9000 + "\nunended"
    output = Output(sink, report)
    output.write(text)
    assert b"".join(written) == text.encode()
    assert max(map(len, written[:-2])) <= select.PIPE_BUF
    assert written[-2:] == [b"z" * 9000 + b"\n", b"unended"]
    assert all(piece.endswith(b"\n") for piece in written[:-1])
    output.close()


def test_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The access log of a full disk cost clients their answers."""
    has_room = threading.Event()
    path = tmp_path / "log"
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)

    def write(data: bytes) -> int:
        if not has_room.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data)

    monkeypatch.setattr(module, "RETRY_S", 0.01)
    output = Output(Sink(fd, write, False, partial(os.close, fd)), report, waiting_bytes_max=250)
    for _ in range(5):
        output.write(LINE)
    assert output.dropped == 3
    output.flush(0.0)
    has_room.set()
    eventually(lambda: output._thread is None, "all is written")
    assert path.read_text() == LINE * 2 + "dropped 3: No space left on device\n"
    output.close()


def test_device_that_is_always_full() -> None:
    fd = os.open("/dev/full", os.O_WRONLY)
    output = Output(open_sink(fd), report, waiting_bytes_max=250)
    for _ in range(5):
        output.write(LINE)
    assert output.dropped == 3
    started_s = time.monotonic()
    output.flush(0.05)
    assert time.monotonic() - started_s < DEADLINE_S
    output._sink = Sink(fd, lambda data: len(data), False, output._sink.close)  # or its thread would try for ever
    end(output)
    os.close(fd)


def test_socket_that_nobody_reads() -> None:
    """As systemd passes the journal."""
    ours, theirs = socket.socketpair()
    output = Output(open_sink(ours.fileno()), report, waiting_bytes_max=8000)
    for _ in range(10_000):
        output.write(LINE)
    assert output.dropped
    assert ours.getblocking()
    theirs.settimeout(DEADLINE_S)
    text = ""
    while not text.endswith("they are not read\n"):
        text += theirs.recv(1 << 20).decode()
    assert text.count("\n") == 10_000 - output.dropped + 1
    theirs.close()
    output.write(LINE)
    assert output.dropped
    end(output)
    ours.close()


def test_terminal_that_is_stopped() -> None:
    """Ctrl-S, or a connection over which nothing comes through."""
    ours, theirs = pty.openpty()
    output = Output(open_sink(theirs), report, waiting_bytes_max=8000)
    for _ in range(1000):
        output.write(LINE)
    assert output.dropped
    os.close(ours)
    end(output)
    os.close(theirs)


def test_pipe_that_another_user_has_made_is_written_by_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be opened once more: whoever writes waits, and must not be an event loop."""

    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        pipe = Pipe(waiting_bytes_max=8000)
    assert pipe.output._sink.may_wait
    for number in range(1000):
        pipe.output.write(f"{number:099}\n")
    assert pipe.output.dropped
    text = pipe.receive_until("they are not read\n").splitlines()
    assert text[:-1] == [f"{number:099}" for number in range(len(text) - 1)]
    assert text[-1] == f"dropped {pipe.output.dropped}: they are not read"
    pipe.output.write("later\n")
    assert pipe.receive() == "later\n"
    pipe.output.flush(DEADLINE_S)
    os.close(pipe.read)
    pipe.read = -1
    before = pipe.output.dropped
    pipe.output.write(LINE)
    eventually(lambda: pipe.output._thread is None, "nobody waits any more")
    assert pipe.output.dropped == before + 1
    end(pipe.output)
    pipe.close()


def test_last_lines_are_written_within_their_time(pipe: Pipe) -> None:
    for _ in range(80):
        pipe.output.write(LINE)
    pipe.output.write("last\n")
    pipe.output.flush(0.01)  # nobody reads, and nobody waits for ever
    assert pipe.output._waiting
    reader = threading.Thread(target=pipe.receive_until, args=["last\n"])
    reader.start()
    pipe.output.flush(DEADLINE_S)
    assert not pipe.output._waiting
    reader.join(DEADLINE_S)


def test_without_a_thread_the_next_line_tries_again(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(60):
        pipe.output.write(LINE)
    assert pipe.output._waiting
    pipe.output.flush(0.0)
    pipe.receive()
    pipe.output.write("later\n")
    assert pipe.receive() == LINE * 20 + "later\n"
    for _ in range(60):
        pipe.output.write(LINE)
    reader = threading.Timer(0.0, pipe.receive)
    monkeypatch.undo()
    reader.start()
    pipe.output.flush(DEADLINE_S)
    assert not pipe.output._waiting
    reader.join(DEADLINE_S)


def test_line_out_of_a_signal_handler_comes_behind_the_one_that_is_being_written(pipe: Pipe) -> None:
    def write(data: bytes) -> int:
        if data == b"first\n":
            output.write("from a handler\n")
        return os.write(pipe.write, data)

    output = Output(Sink(pipe.write, write, False, lambda: None), report)
    output.write("first\n")
    assert pipe.receive() == "first\nfrom a handler\n"


def test_what_waits_is_not_written_by_a_forked_child_too(pipe: Pipe) -> None:
    for _ in range(60):
        pipe.output.write(LINE)
    pipe.output.write("last\n")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            pipe.output.write("of the child" * 10)  # it has a lock of its own, whoever held ours
            code = 0 if len(pipe.output._waiting) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert pipe.receive_until("last\n") == LINE * 60 + "last\n"


def test_standard_error_of_a_program_does_not_wait_either(pipe: Pipe) -> None:
    stream = stream_over(pipe.output, pipe.write)
    print("a", "line", file=stream)
    assert pipe.receive() == "a line\n"
    print("\udc80", file=stream, flush=True)
    assert pipe.receive() == "\\udc80\n"
    assert not stream.isatty()
    assert stream.fileno() == pipe.write
    for _ in range(1000):
        print(LINE, end="", file=stream)
    assert pipe.output.dropped
    os.close(pipe.read)
    pipe.read = -1
    print("nobody hears it", file=stream)
