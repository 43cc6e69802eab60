"""A worker from its first moment to its last, in this process: what it does about signals and orders."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from hotport.errors import ExitCode
from hotport.kernel.sockets import bind_control
from hotport.model.signals import WORKER, Does, Moment
from hotport.options import Options
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import (
    Accepting,
    AcceptOrder,
    Drained,
    DrainOrder,
    HurryOrder,
    Inspection,
    InspectOrder,
    Quiesced,
    QuiesceOrder,
    SuccessorsOrder,
    Word,
    WorkerSpec,
    decode,
    encode,
)
from hotport.worker import worker
from hotport.worker.worker import Worker
from tests.support import DEADLINE_S

pytestmark = pytest.mark.anyio

#: Starts when it is let, and answers when it is let; `asked` is set by a request.
APP = """\
import asyncio
may_start, may_answer, asked = asyncio.Event(), asyncio.Event(), asyncio.Event()

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        await may_start.wait()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        return await send({"type": "lifespan.shutdown.complete"})
    asked.set()
    await may_answer.wait()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

async def sockets(sockets, lifetime):
    lifetime.started()
    await lifetime.draining.wait()
    try:
        await may_answer.wait()
    finally:
        for each in sockets:
            each.close()
"""


class Log:
    """Remembers the names of events."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def bind(self) -> Log:
        return self

    def info(self, event: str, **_: Any) -> None:
        self.events.append(event)

    warning = error = exception = info


class Run:
    """A worker that runs here, with a supervisor that says what the test wants."""

    def __init__(self, application: dict[str, Any], path: str, port: int) -> None:
        self.application = application
        self.words: list[Any] = []
        self.task: asyncio.Task[int]
        self.log = Log()
        self._path = path
        self._port = port
        self._decoder = FrameDecoder()
        self._writer: asyncio.StreamWriter | None = None

    async def order(self, message: Any) -> None:
        """Give an order over the control connection, which is made first."""
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_unix_connection(self._path)
        self._writer.write(encode_frame(encode(message)))

    async def hear(self, kind: type) -> Any:
        """The first word of this kind."""
        async with asyncio.timeout(DEADLINE_S):
            while not (found := [word for word in self.words if isinstance(word, kind)]):
                data = await self._reader.read(4096)
                assert data, "the worker has left"
                self.words += [decode(payload, Word) for payload in self._decoder.feed(data)]
        return found[0]

    async def request(self) -> asyncio.Task[bytes]:
        """A request that is under way; what comes back."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        await self.application["asked"].wait()

        async def answer() -> bytes:
            try:
                return await reader.read()
            finally:
                writer.close()

        return asyncio.create_task(answer())

    async def bring_to(self, moment: Moment) -> None:
        """Give it the orders that make it what `moment` says, with a request under way."""
        if moment is Moment.STARTING:
            return
        self.application["may_start"].set()
        await self.order(InspectOrder())
        await self.wait_log("worker.ready")
        await self.order(AcceptOrder())
        await self.hear(Accepting)
        self.answer = await self.request()
        match moment:
            case Moment.RESTARTING:
                await self.order(QuiesceOrder())
                await self.hear(Quiesced)
            case Moment.DRAINING | Moment.STOPPING:
                await self.order(DrainOrder(timeout_s=DEADLINE_S, is_last=moment is Moment.STOPPING))
                await self.wait_log("drain.began")

    async def ends(self) -> int:
        """Its exit code; and every word that it has said."""
        async with asyncio.timeout(DEADLINE_S):
            code = await self.task
            while self._writer is not None and (data := await self._reader.read(4096)):
                self.words += [decode(payload, Word) for payload in self._decoder.feed(data)]
        return code

    @property
    def fates(self) -> Counter[str]:
        return Counter(next(word.fates for word in self.words if isinstance(word, Drained)))

    async def wait_log(self, event: str) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while event not in self.log.events:  # noqa: ASYNC110  it has no event of its own
                await asyncio.sleep(0)


@asynccontextmanager
async def running(tmp_path: Path, *, has_listener: bool = True, **options: Any) -> AsyncIterator[Run]:
    """A worker that handles signals, and is hurried in the end."""
    application: dict[str, Any] = {}
    exec(APP, application)
    kind = options.get("kind", "asgi")
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        patch.setattr(worker, "raise_descriptor_limit", lambda: 1024)
        patch.setattr(worker, "revive", lambda: None)
        patch.setattr("gc.freeze", lambda: None)
        listener.setblocking(False)
        path = str(tmp_path / "worker.sock")
        spec = WorkerSpec(
            service="test",
            directory=str(tmp_path),
            generation=1,
            worker=1,
            options=Options(**{"target": "app:app", "kind": kind, "drain_timeout_s": DEADLINE_S, **options}),
        )
        run = Run(application, path, listener.getsockname()[1])
        patch.setattr(worker, "get_logger", lambda _: run.log)
        listeners = (
            {"a": listener.dup()} if has_listener else {}
        )  # one that never starts leaves it to its process's end
        loaded = application["sockets" if kind == "sockets" else "app"]
        made = Worker(spec, listeners, bind_control(path), path, notify_path=None, application=loaded)
        run.task = asyncio.create_task(made.run())
        while signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # noqa: ASYNC110  likewise
            await asyncio.sleep(0)
        try:
            yield run
        finally:
            if not run.task.done():
                run.application["may_answer"].set()
                await run.order(HurryOrder())
                await run.ends()
            if run._writer is not None:
                run._writer.close()
                await run._writer.wait_closed()


CELLS = [(name, moment, does) for name, row in WORKER.items() for moment, does in row.items()]


@pytest.mark.parametrize(("name", "moment", "does"), CELLS, ids=[f"{name}-{at.value}" for name, at, _ in CELLS])
async def test_worker_does_what_the_table_says(tmp_path: Path, name: str, moment: Moment, does: Does) -> None:
    async with running(tmp_path, has_listener=moment is not Moment.STARTING) as run:
        await run.bring_to(moment)
        os.kill(os.getpid(), signal.Signals[name])
        match does:
            case Does.NOTE:
                await run.wait_log("signal.ignored")
            case Does.NOTHING:
                await asyncio.sleep(0)
            case _:
                await run.wait_log("signal.received")
        if does is Does.LEAVE:
            assert await run.ends() == ExitCode.DONE
        elif does is Does.CUT:
            assert (await run.answer).startswith(b"HTTP/1.1 503 ")
            assert await run.ends() == ExitCode.DONE
            assert run.fates == {"cut_in_flight": 1}
        elif moment is Moment.STARTING:
            run.application["may_start"].set()
            await run.wait_log("worker.ready")
        else:  # in every other case the request is answered
            if does is Does.DRAIN:
                await run.order(SuccessorsOrder(successors=()))
                await run.wait_log("drain.began")
            if moment is not Moment.DRAINING:
                await run.order(InspectOrder())
                assert (await run.hear(Inspection)).connections <= 1
            run.application["may_answer"].set()
            assert (await run.answer).startswith(b"HTTP/1.1 200 ")
            if does in (Does.DRAIN, Does.SECOND):
                assert await run.ends() == ExitCode.DONE
                assert run.fates == {"finished": 1}


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("moment", [at for at in Moment if at is not Moment.STARTING])
async def test_second_signal_cuts_and_counts(tmp_path: Path, moment: Moment, first: str) -> None:
    """What was cut before the drain had begun was counted by nobody."""
    async with running(tmp_path, has_listener=moment is not Moment.STARTING) as run:
        await run.bring_to(moment)
        os.kill(os.getpid(), signal.Signals[first])
        await run.wait_log("signal.received")
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await run.answer).startswith(b"HTTP/1.1 503 ")
        assert await run.ends() == ExitCode.DONE
        assert run.fates == {"cut_in_flight": 1}


async def test_order_to_drain_and_a_signal_together_are_one(tmp_path: Path) -> None:
    """A service manager that signals everybody had the requests of all workers cut within milliseconds."""
    async with running(tmp_path) as run:
        await run.bring_to(Moment.SERVING)
        await run.order(DrainOrder(timeout_s=DEADLINE_S, is_last=True))
        os.kill(os.getpid(), signal.SIGTERM)
        await run.wait_log("drain.began")
        await run.wait_log("signal.received")
        run.application["may_answer"].set()
        assert (await run.answer).startswith(b"HTTP/1.1 200 ")
        assert await run.ends() == ExitCode.DONE
        assert run.fates == {"finished": 1}


@pytest.mark.parametrize("moment", list(Moment))
async def test_hurried_worker_cuts_and_counts(tmp_path: Path, moment: Moment) -> None:
    async with running(tmp_path, has_listener=moment is not Moment.STARTING) as run:
        await run.bring_to(moment)
        await run.order(HurryOrder())
        if moment is not Moment.STARTING:
            assert (await run.answer).startswith(b"HTTP/1.1 503 ")
        assert await run.ends() == ExitCode.DONE
        if moment is not Moment.STARTING:
            assert run.fates == {"cut_in_flight": 1}


async def test_application_with_a_server_of_its_own_is_hurried_too(tmp_path: Path) -> None:
    """A second signal did nothing: there was no connection of ours to cut."""
    async with running(tmp_path, kind="sockets") as run:
        await run.order(AcceptOrder())
        await run.wait_log("worker.ready")
        os.kill(os.getpid(), signal.SIGTERM)
        await run.wait_log("signal.received")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await run.ends() == ExitCode.DONE
        assert run.fates == {"cut_server": 1}


async def test_peer_whose_orders_pile_up_is_hung_up_on() -> None:
    """Whoever sent orders faster than they were obeyed had the worker keep all of them."""
    obeying = asyncio.Event()

    async def obey(*_: object) -> None:
        await obeying.wait()

    told = Mock(obey=obey)
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    with theirs:
        await loop.connect_accepted_socket(lambda: worker._Peer(told), ours)
        theirs.setblocking(False)
        with suppress(BrokenPipeError, ConnectionResetError):
            await loop.sock_sendall(theirs, encode_frame(encode(InspectOrder())) * (worker.ORDERS_MAX + 2))
            assert await loop.sock_recv(theirs, 1) == b""
    told.peer_left.assert_called_once()
