"""Frames of any content, at every socket of a service that other processes can reach: nothing dies, nothing leaks."""

from __future__ import annotations

import json
import os
import random
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hotport.errors import RestartError
from hotport.supervisor import upgrade
from hotport.wire.messages import Report, RestartRequest, StatusRequest
from tests.supervisor.stage import Nursery, Stage, play
from tests.support import DEADLINE_S, RESTARTS, SLOWNESS, eventually

#: With HOTPORT_TEST_RESTARTS=1000 it is 200,000 of them.
FRAMES = 200 * RESTARTS

#: What each mutation starts from. `stop` is seldom: the service has to be started again after it.
REQUESTS: list[Any] = [
    *[{"type": "stop"}, {"type": "stop", "now": True}, {"type": "stop", "lame_duck_s": 0.1}],
    *[{"type": "status"}, {"type": "reload_tls"}, {"type": "undo"}, {"type": "undo", "keep": True}] * 10,
    *[{"type": "scale", "workers": number} for number in (1, 2)] * 10,
    *[{"type": "restart"}, {"type": "restart", "phased": True}, {"type": "restart", "strategy": "transfer"}] * 10,
    *[{"type": "restart", "canary": 1, "bake_s": 0.1}, {"type": "restart", "undo_window_s": 0.1}] * 10,
    *[{"type": "upgrade", "python": "/bin/false"}, {"type": "take_over", "version": "1"}] * 10,
]
ORDERS: list[Any] = [
    *[{"type": "accept"}, {"type": "quiesce"}, {"type": "quiesce", "empties": True}, {"type": "inspect"}] * 5,
    *[{"type": "drain", "timeout_s": 0.1}, {"type": "drain", "timeout_s": 0.1, "successors": ["/nowhere"]}],
    *[{"type": "successors", "successors": ["/nowhere"]}, {"type": "offer", "version": 1}, {"type": "listeners"}] * 5,
    *[{"type": "reload_tls"}, {"type": "probe", "path": "/", "timeout_s": 0.1}] * 5,
    *[{"type": "transfer", "addresses": ["tcp://127.0.0.1:1"]}, {"type": "release", "addresses": []}] * 5,
    {"type": "remember", "memory": {"wanted": 1, "generations": 1, "spawned": 1}},
]
NOTIFICATIONS = [b"READY=1", b"STOPPING=1", b"STATUS=x", b"EXTEND_TIMEOUT_USEC=1000", b"X_ERROR=x\nREADY=1"]
QUESTIONS = [b"GET /ready HTTP/1.1\r\n\r\n", b"GET /status HTTP/1.1\r\n\r\n", b"agent\n"]

#: What a field may be instead.
NASTY = [
    *[None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 1e-300, 0.5, 1e18, 1e300],
    *["", "\0", "x" * 5000, "\x1b[31m", "../..", "/", "\ud800", [], [[]], ["x"], {}, {"type": "stop"}],
]


class Mutator:
    """Makes frames, always the same ones for a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def chance(self, share: float) -> bool:
        return self._random.random() < share

    def message(self, corpus: Sequence[dict[str, Any]]) -> tuple[str, bytes]:
        """What it starts from, and JSON as it may be, with another field or without one, or no JSON any more."""
        found: dict[str, Any] = dict(self._random.choice(corpus))
        name = " ".join([found["type"], *(key for key in ("canary", "keep") if key in found)])
        change = self._random.randrange(6)
        if change in (1, 2) and (fields := [key for key in found if key != "type"]):
            found[self._random.choice(fields)] = self._random.choice(NASTY)
        elif change == 3:
            found[self._random.choice(["type", "workers", "canary", "phased", "python", "x"])] = self._random.choice(
                NASTY
            )
        payload = json.dumps(found).encode()
        return name, self.mangled(payload) if change == 4 else payload

    def mangled(self, data: bytes) -> bytes:
        """Some of it changed, cut off, doubled, or nested."""
        at = self._random.randrange(len(data) + 1)
        match self._random.randrange(5):
            case 0:
                return data[:at]
            case 1:
                return data[:at] + self._random.randbytes(self._random.randrange(1, 9)) + data[at + 1 :]
            case 2:
                return data + data
            case 3:
                return data[:at] + b"[" * self._random.choice([1, 50_000]) + data[at:]
            case _:
                return self._random.randbytes(self._random.randrange(64))

    def frame(self, payload: bytes) -> bytes:
        """The payload behind its length, or behind another one."""
        length = len(payload) if self.chance(0.95) else self._random.choice([0, 1, 2**16, 2**20 + 1, 2**32 - 1])
        return length.to_bytes(4, "big") + payload

    def choice(self, of: Sequence[Any]) -> Any:
        return self._random.choice(of)


def throw(stage: Stage, mutator: Mutator) -> list[str]:
    """Send to one of the sockets, and name what was sent.

    Raises:
        FileNotFoundError, ConnectionRefusedError: The service is gone.
    """
    where = mutator.choice(["control"] * 6 + ["worker", "notify", "status"])
    if where == "notify":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(BlockingIOError):
            sock.setblocking(False)
            sock.connect(str(stage.runtime / "notify.sock"))
            sock.send(mutator.mangled(mutator.choice(NOTIFICATIONS)) or b"x")
            return [where]
        return []
    if where == "status":
        with suppress(OSError), socket.create_connection(("127.0.0.1", stage.status_port), 1.0) as sock:
            sock.sendall(mutator.mangled(mutator.choice(QUESTIONS)))
            return [where]
        return []
    path = stage.runtime / "control.sock"
    if where == "worker" and (workers := sorted(stage.runtime.glob("worker-*.sock"))):
        path = mutator.choice(workers)
    corpus = ORDERS if where == "worker" else REQUESTS
    messages = [mutator.message(corpus) for _ in range(mutator.choice([1, 1, 1, 3]))]
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.05 if mutator.chance(0.01) else 0.0005)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            if where == "worker":
                return []  # it has left meanwhile
            raise
        except (BlockingIOError, TimeoutError):  # as many as may wait do
            return []
        with suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            sock.sendall(b"".join(mutator.frame(payload) for _, payload in messages))
            sock.recv(65536)
    return [f"{where} {name}" for name, _ in messages]


@pytest.mark.soak
@pytest.mark.timeout(60 * SLOWNESS + 3 * SLOWNESS * RESTARTS)
def test_nothing_dies_and_nothing_leaks(
    tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of what can end a service only a request to stop does, and no error was one that nobody expected."""

    async def refuse(*_: object) -> None:  # else this process would become another one
        raise RestartError("HP652", "not here", cause="it is a test", fix="", serving=1)

    monkeypatch.setattr(upgrade, "preflight", refuse)
    mutator = Mutator(int(os.environ.get("HOTPORT_TEST_RESTARTS", "3")))
    thrown: Counter[str] = Counter()
    lives = 0
    options: dict[str, Any] = {"status_bind": "127.0.0.1:0", "drain_timeout": 1, "ready_timeout": 10 * DEADLINE_S}

    def client(stage: Stage) -> None:
        stage.wait_serving()
        before = descriptors()
        assert stage.supervisor is not None
        while thrown.total() < FRAMES:
            try:
                thrown.update(throw(stage, mutator))
            except (FileNotFoundError, ConnectionRefusedError):
                eventually(lambda: stage.is_gone or (stage.runtime / "control.sock").exists(), "it ends, or goes on")
            if is_leaving(stage):
                return
        settle(stage)
        if is_leaving(stage):  # one of the last was a request to stop
            return
        eventually(lambda: descriptors() <= before + 2, "no descriptor is left open")  # of a worker more

    while thrown.total() < FRAMES:
        begun, lives = thrown.total(), lives + 1
        code = play(tmp_path, nursery, monkeypatch, client, **options)
        told = capfd.readouterr().out
        assert code in (0, 5), told[-5000:]
        assert "Traceback" not in told, told[told.index("Traceback") - 500 :][:5000]
        assert thrown.total() > begun
    if RESTARTS < 10:
        return
    begins = {" ".join(kind.split()[:2]) for kind in thrown}
    assert {f"control {each['type']}" for each in REQUESTS} | {f"worker {each['type']}" for each in ORDERS} <= begins
    with capfd.disabled():
        print(f"\n{thrown.total()} frames in {lives} lives of the service: {dict(thrown.most_common())}")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_leaving(stage: Stage) -> bool:
    assert stage.supervisor is not None
    return stage.supervisor.service.is_stopping or stage.is_gone


def settle(stage: Stage) -> None:
    """Restart the service, as soon as what was begun is over."""
    reports: list[Any] = []

    def is_restarted() -> bool:
        with suppress(OSError, ValueError):
            if not stage.ask(StatusRequest()).restarting:
                reports.append(stage.ask(RestartRequest()))
        return bool(reports) and isinstance(reports[-1], Report) and reports[-1].outcome == "done"

    eventually(lambda: is_leaving(stage) or is_restarted(), "it can be restarted")
