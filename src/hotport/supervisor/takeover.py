"""Move a service to another live supervisor: other code, another environment, another container.

The new supervisor asks over the control socket, and gets the listeners and the lock of the runtime directory. It starts
a generation beside the old one. When that accepts, the old supervisor drains its own and leaves. Until then the old one
serves, and continues if the new one dies.

Both supervisors share the runtime directory, through which connections are handed off. Process ids are not used: they
have no meaning across containers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final

import anyio

from hotport import __version__
from hotport.channel import Channel
from hotport.errors import ControlError, RestartError
from hotport.kernel.sockets import inherited_listener
from hotport.model.lifecycle import Phase
from hotport.observe.logs import get_logger
from hotport.supervisor.contain import retried
from hotport.supervisor.inheritance import Inheritance
from hotport.supervisor.recovery import worker_paths
from hotport.supervisor.rundir import RuntimeDirectory
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.wire.messages import (
    PROTOCOL,
    Done,
    DrainOrder,
    Failure,
    HandOver,
    Reply,
    TakenOver,
    TakeOverRequest,
    may_hand_to,
    parse_worker_socket,
)

__all__ = ["hand_over", "retire", "take_over"]

#: Seconds to wait for a supervisor's answer; it is always between two steps, and answers at once.
ANSWER_TIMEOUT_S: Final = 10.0

log = get_logger("hotport.takeover")


# -- the old supervisor -------------------------------------------------------------------------------------


async def hand_over(
    supervisor: Supervisor, request: TakeOverRequest, channel: Channel, rundir: RuntimeDirectory
) -> Done | None:
    """Give the listeners and the lock to another supervisor, and leave when its workers accept.

    Returns:
        The last message for the new supervisor; None if it has ended.

    Raises:
        RestartError: It is refused: another protocol (HP654), or a restart, stop or take-over is in progress (HP655).
    """
    _check(supervisor, request)
    status = supervisor.status_port
    supervisor.begin_hand_over()
    answer = HandOver(
        version=__version__,
        memory=supervisor.fleet.memory,
        bind=supervisor.options.bind,
        addresses=tuple(supervisor.listeners),
        status_bind=status.bind if status else "",
        status_address=status.address if status else "",
    )
    committed: list[TakenOver] = []
    failure: Exception | None = None
    try:
        listeners = [*supervisor.listeners.values(), *([status.listener] if status else [])]
        descriptors = [rundir.lock, *(listener.fileno() for listener in listeners)]
        await channel.say(answer, descriptors)
        log.info("take_over.began", version=request.version)
        await retried("take_over.commit", _read_commit, channel, committed)
    except OSError as error:
        log.warning("take_over.failed", error=str(error))
    except Exception as error:  # this supervisor continues, and reports the error to the other
        failure = error
    supervisor.end_hand_over(committed[0] if committed else None)
    if not committed:
        own = supervisor.service.generations
        # Some of its workers may accept already. This conversation has no client any more, and does not wait for them.
        supervisor.start("take_over.drain", _drain_orphans, supervisor, lambda generation: generation > own)
        await retried("take_over.reclaim", rundir.reclaim, supervisor)
        if failure is not None:
            raise failure
        return None
    log.info("take_over.committed", workers=committed[0].workers)
    await supervisor.finished.wait()
    return Done(detail="retired", exit_code=supervisor.exit_code)


async def _read_commit(channel: Channel, committed: list[TakenOver]) -> None:
    try:
        committed.append(await channel.receive_word(TakenOver))
    except (EOFError, OSError):
        log.warning("take_over.failed", error="the other supervisor is gone")
    except ControlError as error:
        log.warning("take_over.failed", error=str(error))


def _check(supervisor: Supervisor, request: TakeOverRequest) -> None:
    if request.protocol != PROTOCOL:
        cause = (
            f"the other supervisor (hotport {request.version}) speaks version {request.protocol} of the control "
            f"protocol, and this one (hotport {__version__}) version {PROTOCOL}"
        )
        note = "or stop the service and serve again"
        raise _refused("HP654", supervisor, cause, f"hotport upgrade {supervisor.name}", note)
    if cause := supervisor.why_busy:
        raise _refused("HP655", supervisor, cause, f"hotport status {supervisor.name}", "try again when that has ended")


def _refused(code: str, supervisor: Supervisor, cause: str, fix: str, note: str) -> RestartError:
    return RestartError(
        code,
        f"cannot hand {supervisor.name} over to another supervisor",
        cause=cause,
        fix=fix,
        note=note,
        serving=supervisor.service.generation,
    )


# -- the new supervisor -------------------------------------------------------------------------------------


async def take_over(directory: str, name: str) -> Inheritance:
    """Get the listeners of the supervisor that runs this service.

    Until `retire` that supervisor continues if the connection is closed.

    Raises:
        ControlError: It refuses (its own code), or does not answer (HP656). It continues.

    Descriptors: the caller owns those in the result.
    """
    with ExitStack() as stack:
        try:
            with anyio.fail_after(ANSWER_TIMEOUT_S):
                channel = stack.enter_context(Channel.connect(os.path.join(directory, "control.sock")))
                reply = await channel.ask(TakeOverRequest(version=__version__), Reply)
                descriptors = channel.take_descriptors()
        except (OSError, EOFError) as error:
            raise ControlError(
                "HP656",
                f"cannot take over {name}",
                cause=f"its supervisor does not pass its listeners: {_why(error)}",
                fix=f"hotport status {name}",
            ) from error
        stack.callback(lambda: list(map(os.close, descriptors)))
        if isinstance(reply, Failure):
            raise reply.error()
        assert isinstance(reply, HandOver), reply
        lock, *fds = descriptors
        status = None
        if reply.status_bind:
            status = StatusPort(reply.status_bind, reply.status_address, inherited_listener(fds.pop(), is_in_use=True))
        listeners = {
            address: inherited_listener(fd, is_in_use=True) for address, fd in zip(reply.addresses, fds, strict=True)
        }
        stack.pop_all()
    return Inheritance(reply.version, reply.memory, lock, listeners, reply.bind, status, channel)


def _why(error: OSError | EOFError) -> str:
    if isinstance(error, EOFError):
        return "it closed the connection"
    return "it did not answer in time" if isinstance(error, TimeoutError) else error.strerror or str(error)


async def retire(inheritance: Inheritance, supervisor: Supervisor) -> None:
    """Wait until our workers serve, send the commit to the predecessor, and wait until it has left.

    Also drains the predecessor's workers if it dies meanwhile.
    """
    assert inheritance.predecessor is not None
    await retried("take_over.wait", _wait_serving, supervisor)
    workers = _serving(supervisor)
    supervisor.owned.own_files()
    commit = TakenOver(workers=workers, addresses=tuple(supervisor.listeners))
    has_retired = False

    async def commit_and_wait() -> None:
        nonlocal has_retired
        with suppress(OSError):
            await predecessor.say(commit)
            has_retired = await predecessor.wait_closed()

    with inheritance.predecessor as predecessor:
        await retried("take_over.retire", commit_and_wait)
    log.info("take_over.done", predecessor=inheritance.version, has_retired=has_retired)
    own = inheritance.memory.generations
    await retried("take_over.drain", _drain_orphans, supervisor, lambda generation: generation <= own)


async def _wait_serving(supervisor: Supervisor) -> None:
    while len(supervisor.service.ids(Phase.SERVING)) < supervisor.service.wanted:
        await supervisor.wait_stepped()


def _serving(supervisor: Supervisor) -> tuple[str, ...]:
    """The paths of the serving workers' control sockets in the runtime directory."""
    processes = (supervisor.fleet.processes.get(number) for number in supervisor.service.ids(Phase.SERVING))
    paths = (each.control_path for each in processes if each is not None and not each.is_foreign)
    return tuple(os.path.relpath(path, supervisor.directory) for path in paths)


async def _drain_orphans(supervisor: Supervisor, is_other: Callable[[int], bool]) -> None:
    """Tell the other supervisor's workers to hand their connections to ours, and wait until they have left.

    Args:
        is_other: Whether a generation is the other supervisor's.
    """
    options = supervisor.options
    paths = tuple(os.path.join(supervisor.directory, name) for name in _serving(supervisor))

    async def drain(path: str) -> None:
        successors = tuple(each for each in paths if may_hand_to(path, each))
        order = DrainOrder(timeout_s=options.drain_timeout_s, successors=successors)
        with anyio.move_on_after(options.drain_timeout_s + ANSWER_TIMEOUT_S):
            try:
                with Channel.connect(path) as channel:
                    await channel.say(order)
                    log.info("take_over.draining", worker=os.path.basename(path))
                    await retried("take_over.drain", channel.wait_closed)
            except ConnectionRefusedError:
                with suppress(FileNotFoundError):  # another process has removed it meanwhile
                    os.unlink(path)
            except OSError as error:
                log.warning("take_over.unreachable", worker=os.path.basename(path), error=str(error))

    async with anyio.create_task_group() as tasks:
        for path in worker_paths(supervisor.directory):
            named = parse_worker_socket(path.rpartition("/")[2])
            if named is not None and is_other(named[0]):
                tasks.start_soon(drain, path)
