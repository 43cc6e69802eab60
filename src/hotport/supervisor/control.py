"""The supervisor's control socket: receive commands, send progress and outcomes."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final

import anyio
import msgspec

from hotport.channel import Channel
from hotport.errors import ControlError, HotportError
from hotport.kernel.fork import withheld
from hotport.kernel.sockets import may_command
from hotport.model.effects import Announce
from hotport.observe.logs import get_logger
from hotport.options import OPTIONS
from hotport.options.loading import checked
from hotport.supervisor.contain import Containing, retried
from hotport.supervisor.requests import Hear, describe, keep, rebalance, reload_tls, restart, scale, undo
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.supervisor import Supervisor
from hotport.supervisor.takeover import hand_over
from hotport.supervisor.upgrade import Upgrade
from hotport.wire.messages import (
    Done,
    Failure,
    LogLevelRequest,
    Progress,
    RebalanceRequest,
    ReloadTlsRequest,
    Report,
    Request,
    RestartRequest,
    ScaleRequest,
    StatusRequest,
    StopRequest,
    TakeOverRequest,
    UndoRequest,
    UpgradeRequest,
)

__all__ = ["serve_control"]

#: The longest request; a client that sends more does not speak the protocol.
REQUEST_BYTES_MAX: Final = 64 * 1024

#: Seconds that a client has to send its request.
REQUEST_TIMEOUT_S: Final = 5.0

#: Seconds that clients have to read the last reply of a service that has ended.
GOODBYE_TIMEOUT_S: Final = 1.0

CLIENTS_MAX: Final = 64

#: The length at which an unexpected error is cut in a reply.
ERROR_CHARS_MAX: Final = 500

#: Seconds until accepting is retried when descriptors or memory are exhausted.
ACCEPT_PAUSE_S: Final = 0.1

#: The errors when a client has left.
_GONE: Final = (EOFError, ConnectionError)

_OPTIONS: Final = frozenset(option.field for option in OPTIONS)

log = get_logger("hotport.control")


async def serve_control(supervisor: Supervisor, rundir: RuntimeDirectory, upgrade: Upgrade) -> None:
    """Answer commands until the service has finished, and complete the replies under way.

    Descriptors: owns a duplicate of the control socket. Cancellation: safe; clients see the end of the stream.
    """
    room = anyio.Semaphore(CLIENTS_MAX)
    listening = anyio.CancelScope()

    async def handle(connection: socket.socket) -> None:
        try:
            # A client that leaves ends its conversation, but never the request.
            with Channel(connection) as channel, Containing("control"), suppress(*_GONE):
                await _converse(supervisor, channel, rundir, upgrade)
        finally:
            room.release()

    async def accept(control: socket.socket) -> None:
        while True:
            await room.acquire()  # before the accept: silent clients must not exhaust our descriptors
            try:
                await anyio.wait_readable(control)  # anyio's listeners take AF_UNIX sockets from 4.14 on
                conversations.start_soon(handle, control.accept()[0])
            except BlockingIOError:  # its client has left
                room.release()
            except BaseException as error:
                room.release()
                if not isinstance(error, OSError):
                    raise
                log.error("control.accept_failed", error=str(error))
                await anyio.sleep(ACCEPT_PAUSE_S)

    async def listen() -> None:
        nonlocal listening
        with anyio.CancelScope() as listening, withheld(rundir.control.dup()) as control:
            control.setblocking(False)
            await retried("control", accept, control)

    def relisten() -> None:
        listening.cancel()
        accepting.start_soon(retried, "control", listen)

    async with anyio.create_task_group() as conversations:
        async with anyio.create_task_group() as accepting:
            rundir.relisten = relisten
            accepting.start_soon(retried, "control", listen)
            await supervisor.finished.wait()
            rundir.relisten = lambda: None
            accepting.cancel_scope.cancel()
        conversations.cancel_scope.deadline = anyio.current_time() + GOODBYE_TIMEOUT_S


async def _converse(supervisor: Supervisor, channel: Channel, rundir: RuntimeDirectory, upgrade: Upgrade) -> None:
    pid, uid = channel.peer
    try:
        if not may_command(uid):
            raise ControlError(
                "HP640",
                f"uid {uid} may not control {supervisor.name}",
                cause=f"the service belongs to uid {os.geteuid()}",
                fix=f"sudo -u '#{os.geteuid()}' hotport status {supervisor.name}",
                note="run commands as that user, or as root",
            )
        request = await _read_request(channel)
        reply = await _carry_out(supervisor, request, channel, rundir, upgrade, by=f"pid {pid} of uid {uid}")
    except HotportError as error:
        log.warning("control.refused", error=error.what, cause=error.cause, fix=error.fix, note=error.note)
        reply = _failure(error)
    except _GONE:
        raise
    except Exception as error:  # a bug here must not let the client wait for a reply
        failed = HotportError(
            "HP642",
            f"{supervisor.name} could not do this",
            cause=f"an unexpected error: {type(error).__name__} ({str(error)[:ERROR_CHARS_MAX]})",
            fix=f"hotport status {supervisor.name}",
            note="the service's log has the traceback",
        )
        with suppress(*_GONE):
            await channel.say(_failure(failed))
        raise
    if reply is not None:
        await channel.say(reply)


def _failure(error: HotportError) -> Failure:
    return Failure(
        code=error.code,
        what=error.what,
        cause=error.cause,
        fix=error.fix,
        note=error.note,
        exit_code=error.exit_code,
    )


async def _read_request(channel: Channel) -> Any:
    with anyio.move_on_after(REQUEST_TIMEOUT_S):
        return _checked(await channel.receive_word(Request, frame_bytes_max=REQUEST_BYTES_MAX))
    raise ControlError(
        "HP641",
        "no request came",
        cause=f"no complete request arrived within {REQUEST_TIMEOUT_S:g} s",
        fix="hotport status",
        note="the control socket is for the hotport command",
    )


def _checked(request: Any) -> Any:
    """Validate the options in a request, which any client may have sent."""
    options = {name: getattr(request, name) for name in _OPTIONS.intersection(request.__struct_fields__)}
    return msgspec.structs.replace(request, **checked(options))


async def _carry_out(
    supervisor: Supervisor,
    request: Any,
    channel: Channel,
    rundir: RuntimeDirectory,
    upgrade: Upgrade,
    *,
    by: str,
) -> Any:
    match request:
        case StatusRequest():
            return await describe(supervisor)
        case RestartRequest():
            return await _report_progress(channel, lambda hear: restart(supervisor, request, hear))
        case UndoRequest(keep=True):
            return Done(detail=await keep(supervisor))
        case UndoRequest():
            return await _report_progress(channel, lambda hear: undo(supervisor, f"hotport undo ({by})", hear))
        case ScaleRequest(workers=workers):
            await scale(supervisor, workers)
            return Done(detail=f"{workers} workers serve")
        case RebalanceRequest():
            return Done(detail=f"{await rebalance(supervisor)} connections moved")
        case ReloadTlsRequest():
            return await reload_tls(supervisor)
        case LogLevelRequest(log_level=level):
            before = supervisor.options.log_level
            supervisor.set_log_level(level)
            return Done(detail=f"log level {level} until the next restart (it was {before})")
        case StopRequest(now=now, lame_duck_s=lame_duck_s):
            supervisor.stop(now=now, lame_duck_s=lame_duck_s)
            await supervisor.finished.wait()
            return Done(detail="stopped", exit_code=supervisor.exit_code)
        case UpgradeRequest(python=python):
            await upgrade.begin(python, channel)
            return None  # the next supervisor replies
        case TakeOverRequest():
            return await hand_over(supervisor, request, channel, rundir)
    raise AssertionError(request)


async def _report_progress(channel: Channel, run: Callable[[Hear], Awaitable[Report]]) -> Report:
    """Restart, or undo a restart; send progress to the client, without waiting for one that does not read."""
    send, receive = anyio.create_memory_object_stream[Progress](256)

    def hear(news: Announce, ms: float) -> None:
        with suppress(anyio.WouldBlock, anyio.BrokenResourceError):
            send.send_nowait(
                Progress(
                    event=news.news.value,
                    ms=ms,
                    generation=news.generation,
                    worker=news.worker,
                    detail=news.why,
                )
            )

    async def forward() -> None:
        with suppress(ConnectionError):
            async for progress in receive:
                await channel.say(progress)

    async with receive, anyio.create_task_group() as tasks, send:
        tasks.start_soon(forward)
        try:
            report = await run(hear)
        except HotportError as error:
            refused: HotportError | None = error
        else:
            refused = None
        send.close()
    if refused is not None:
        raise refused  # outside the task group, which would wrap it
    return report
