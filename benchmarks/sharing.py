"""Ways in which four processes can share what comes to one port, with bare system calls.

- *plain*: all wait for one listener, each with an epoll instance of its own.
- *exclusive*: likewise, with EPOLLEXCLUSIVE, so that not all of them wake up for one connection.
- *defer*: a process with clearly more connections than the mean leaves the queue to others for 1 ms (hotport's way).
- *exact*: whoever accepts hands the connection to the process with the fewest, through a unix socket. Two must not
  choose at the same time, so a lock guards the counts.
- *steered*: each has a listener of its own in one SO_REUSEPORT group, and whoever has accepted has the kernel send the
  next connections to the process with the fewest.

The counts stand in one shared page. As in balance.py: 400 connections one a millisecond, then 64 at once, which stay;
then one for each request, 64 at a time, as fast as they are closed. A share is the largest count of a process divided
by the mean. *us* is the processor time of all four processes for a connection with one request. *failed* is 1 for a
round in which clients saw resets.

Sources: epoll_ctl(2); socket(7), SO_REUSEPORT and SO_ATTACH_REUSEPORT_CBPF; unix(7), SCM_RIGHTS.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import select
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from multiprocessing.synchronize import Lock
from pathlib import Path
from typing import Final

sys.path.pop(0)  # this directory: its http.py is not the library's
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Samples, arguments, cpu_s, save, show, wrk
from hotport.kernel.steer import steer
from hotport.model.balance import DEFER_S, is_ahead
from tests.support import eventually

WORKERS: Final = 4
ARRIVALS: Final = 400
AT_ONCE: Final = 64
WAYS: Final = ("plain", "exclusive", "defer", "exact", "steered")

ANSWER: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


class Worker:
    """One process; never returns from `run`."""

    def __init__(
        self,
        way: str,
        number: int,
        listeners: Sequence[socket.socket],
        counts: memoryview,
        accepted: memoryview,
        channels: Sequence[tuple[socket.socket, socket.socket]],
        lock: Lock,
    ) -> None:
        self.lock = lock if way == "exact" else nullcontext()
        self.way, self.number, self.counts, self.accepted = way, number, counts, accepted
        self.listener = listeners[number if way == "steered" else 0]
        self.listeners = listeners
        self.inbox = channels[number][0]
        self.outboxes = [outbox for _, outbox in channels]
        self.open: dict[int, socket.socket] = {}
        self.flags = select.EPOLLIN | (select.EPOLLEXCLUSIVE if way == "exclusive" else 0)
        self.epoll = select.epoll()
        self.epoll.register(self.listener, self.flags)
        self.epoll.register(self.inbox, select.EPOLLIN)
        self.resumes_s = 0.0

    def run(self) -> None:
        while True:
            wait_s = max(0.0, self.resumes_s - time.perf_counter()) if self.resumes_s else None
            ready = self.epoll.poll(wait_s)
            if self.resumes_s and time.perf_counter() >= self.resumes_s:
                self.resumes_s = 0.0
                self.epoll.register(self.listener, self.flags)
                self.accept_one()  # nobody else has taken it
            for fd, _ in ready:
                if fd == self.listener.fileno():
                    self.accept()
                elif fd == self.inbox.fileno():
                    self.take_in()
                else:
                    self.serve(self.open[fd])

    def is_ahead(self) -> bool:
        counts = self.counts.tolist()
        return is_ahead(counts.pop(self.number), counts)

    def accept(self) -> None:
        for _ in range(16):
            if self.way == "defer" and self.is_ahead():
                self.epoll.unregister(self.listener)
                self.resumes_s = time.perf_counter() + DEFER_S
                return
            if not self.accept_one():
                return

    def accept_one(self) -> bool:
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return False
        with self.lock:
            counts = self.counts.tolist()
            least = counts.index(min(counts))
            taker = least if self.way == "exact" and counts[self.number] > counts[least] else self.number
            self.counts[taker] += 1
        if taker == self.number:
            self.add(sock)
        else:
            socket.send_fds(self.outboxes[taker], [b"\0"], [sock.fileno()])
            sock.close()
        if self.way == "steered":
            counts[self.number] += 1
            steer(self.listener, counts.index(min(counts)))
        return True

    def take_in(self) -> None:
        _, descriptors, _, _ = socket.recv_fds(self.inbox, 1, 1)
        for fd in descriptors:
            self.add(socket.socket(fileno=fd))

    def add(self, sock: socket.socket) -> None:
        self.accepted[self.number] += 1
        sock.setblocking(False)
        self.open[sock.fileno()] = sock
        self.epoll.register(sock, select.EPOLLIN)

    def serve(self, sock: socket.socket) -> None:
        if sock.recv(4096):
            sock.send(ANSWER)
        self.open.pop(sock.fileno()).close()  # epoll forgets it
        with self.lock:
            self.counts[self.number] -= 1


@contextmanager
def serving(way: str) -> Iterator[tuple[int, list[int], memoryview, memoryview]]:
    """The port, the processes, how many connections each has, and how many it has accepted in all."""
    with ExitStack() as stack, mmap.mmap(-1, mmap.PAGESIZE) as page:
        counts, accepted = (memoryview(page)[at : at + 8 * WORKERS].cast("q") for at in (0, 8 * WORKERS))
        listeners: list[socket.socket] = []
        for _ in range(WORKERS if way == "steered" else 1):
            port = listeners[0].getsockname()[1] if listeners else 0
            listener = socket.create_server(("127.0.0.1", port), backlog=1024, reuse_port=way == "steered")
            listener.setblocking(False)
            listeners.append(stack.enter_context(listener))
        channels = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(WORKERS)]
        lock = multiprocessing.Lock()
        pids = []
        for number in range(WORKERS):
            pid = os.fork()
            if pid == 0:
                try:
                    Worker(way, number, listeners, counts, accepted, channels, lock).run()
                finally:
                    os._exit(1)
            pids.append(pid)
        try:
            yield listeners[0].getsockname()[1], pids, counts, accepted
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            for pair in channels:
                for sock in pair:
                    sock.close()
            counts.release()
            accepted.release()


def measure(way: str, seconds: float) -> dict[str, float]:
    """One round of one way."""
    with serving(way) as (port, pids, counts, accepted), ExitStack() as stack:

        def share(values: Sequence[int]) -> float:
            return max(values) / (sum(values) / WORKERS)

        found = {}
        clients: deque[socket.socket] = deque()
        due = time.perf_counter()
        for _ in range(ARRIVALS):
            clients.append(stack.enter_context(socket.create_connection(("127.0.0.1", port))))
            due += 0.001
            time.sleep(max(0.0, due - time.perf_counter()))
        eventually(lambda: sum(counts) == ARRIVALS, "all are accepted")
        found["one a millisecond, share"] = share(counts.tolist())
        for sock in clients:
            sock.close()
        eventually(lambda: sum(counts) == 0, "all are closed")
        before = accepted.tolist()
        for _ in range(AT_ONCE):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            clients.append(sock)
        eventually(lambda: sum(counts) == AT_ONCE, "all are accepted")
        found["at once, share"] = share(counts.tolist())
        while clients:
            clients.popleft().close()
        eventually(lambda: sum(counts) == 0, "all are closed")
        before, cpu = accepted.tolist(), sum(map(cpu_s, pids))
        found["closed, failed"] = 0.0
        try:
            wrk(port, seconds=seconds, connections=AT_ONCE, close=True)
        except RuntimeError:  # it saw resets
            found["closed, failed"] = 1.0
        done = [after - was for after, was in zip(accepted.tolist(), before, strict=True)]
        found["closed, share"] = share(done)
        found["closed, us"] = (sum(map(cpu_s, pids)) - cpu) / sum(done) * 1e6
        return found


def main() -> int:
    """Measure and report; there are no goals: it says which way was taken, and why."""
    parser = arguments(__doc__, name="sharing.json", rounds=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of the closed connections [default: 1]")
    options = parser.parse_args()
    samples: dict[str, Samples] = {}
    for number in range(options.rounds):
        for way in WAYS if number % 2 else reversed(WAYS):
            for name, value in measure(way, options.seconds).items():
                samples.setdefault(f"{way}: {name}", Samples()).append(value)
    show(f"{options.rounds} rounds", dict(sorted(samples.items(), key=lambda item: WAYS.index(item[0].split(":")[0]))))
    save(options.output, method=(__doc__ or "").strip(), samples=samples, goals=[], seconds=options.seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
