"""A service moves to another supervisor that is alive: other code, another environment, another container.

The newcomer asks over the control socket and gets the listeners and the lock of the runtime directory. It starts a
generation of its own beside the old one, and only when that accepts is the old supervisor told to drain and to leave.
Until then the old one serves, and goes on as if nothing had been if the newcomer dies.

Both supervisors share the runtime directory: connections are handed over through it. A process id means nothing between
two containers, so none is used.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Final

import anyio
from anyio.abc import SocketAttribute, SocketStream

from hotport import __version__
from hotport.errors import ControlError, RestartError
from hotport.kernel.scm import DescriptorsLostError, receive_descriptors, send_descriptors
from hotport.kernel.sockets import check_peer, inherited_listener
from hotport.model.inputs import RequestStop
from hotport.model.lifecycle import Phase
from hotport.observe.logs import get_logger
from hotport.supervisor.contain import retried
from hotport.supervisor.supervisor import StatusPort, Supervisor
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.messages import (
    PROTOCOL,
    Committed,
    Done,
    DrainOrder,
    Estate,
    Failure,
    Memory,
    Reply,
    TakeOverRequest,
    decode,
    encode,
    parse_worker_socket,
)

__all__ = ["Predecessor", "ask_predecessor", "hand_over", "retire"]

#: A supervisor is only ever between two steps: it answers at once.
ANSWER_TIMEOUT_S: Final = 10.0

log = get_logger("hotport.takeover")


# -- the old supervisor -------------------------------------------------------------------------------------


async def hand_over(
    supervisor: Supervisor,
    request: TakeOverRequest,
    stream: SocketStream,
    lock: int,
    reclaim: Callable[[], Awaitable[None]],
) -> Done | None:
    """Give the listeners to another supervisor, and leave when its workers accept.

    Args:
        lock: Of the runtime directory; a duplicate goes.
        reclaim: Awaited when the other one is gone without having committed: the paths in the runtime directory are
            the other's by then.

    Returns:
        The last word to the newcomer; None if it is not there any more.

    Raises:
        RestartError: It is refused: another protocol (HP654), or there is something else going on (HP655).
    """
    _check(supervisor, request)
    status = supervisor.status_port
    supervisor.is_succeeded = True  # from here on nothing of ours is begun: numbers and paths are the other's
    supervisor.owned.shared = frozenset(supervisor.listeners)
    estate = Estate(
        version=__version__,
        memory=supervisor.memory,
        bind=supervisor.options.bind,
        addresses=tuple(supervisor.listeners),
        status_bind=status.bind if status else "",
        status_address=status.address if status else "",
    )
    log.info("take_over.began", version=request.version)
    committed: list[Committed] = []
    failure: Exception | None = None
    try:
        listeners = [*supervisor.listeners.values(), *([status.listener] if status else [])]
        descriptors = [lock, *(listener.fileno() for listener in listeners)]
        send_descriptors(stream.extra(SocketAttribute.raw_socket), encode_frame(encode(estate)), descriptors)
        await retried("take_over.commit", _read_commit, stream, FrameDecoder(), committed)
    except OSError as error:
        log.warning("take_over.failed", error=str(error))
    except Exception as error:  # this supervisor goes on all the same, and the other one is told
        failure = error
    supervisor.owned.shared = frozenset()
    if not committed:
        supervisor.is_succeeded = False
        own = supervisor.service.generations
        # Some of its workers may accept already. They are not waited for: this conversation has no client any more.
        supervisor.start("take_over.drain", _drain_orphans, supervisor, lambda generation: generation > own)
        await retried("take_over.reclaim", reclaim)
        if failure is not None:
            raise failure
        return None
    names = tuple(filter(parse_worker_socket, committed[0].workers))
    supervisor.heirs = tuple(os.path.join(supervisor.directory, name) for name in names)
    supervisor.owned.give_away(committed[0].addresses)
    log.info("take_over.committed", workers=names)
    supervisor.input(RequestStop(is_succeeded=True))
    await supervisor.finished.wait()
    return Done(detail="retired", exit_code=supervisor.exit_code)


async def _read_commit(stream: SocketStream, decoder: FrameDecoder, committed: list[Committed]) -> None:
    try:
        while not committed:
            committed += [decode(payload, Committed) for payload in decoder.feed(await stream.receive())]
    except (OSError, ControlError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
        log.warning("take_over.failed", error=str(error) or "the other supervisor is gone")


def _check(supervisor: Supervisor, request: TakeOverRequest) -> None:
    if request.protocol != PROTOCOL:
        cause = (
            f"the other supervisor (hotport {request.version}) speaks version {request.protocol} of the control "
            f"protocol, and this one (hotport {__version__}) version {PROTOCOL}"
        )
        note = "or stop the service and serve again"
        raise _refused("HP654", supervisor, cause, f"hotport upgrade {supervisor.name}", note)
    if cause := supervisor.what_goes_on:
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


@dataclass(slots=True)
class Predecessor:
    """The supervisor that has given us its listeners.

    Attributes:
        lock: Descriptor of the runtime directory's lock.
        bind: Its addresses as its options name them.
        listeners: By canonical address.
        status_port: Where it answers health checks, and goes on to until our workers serve.

    Descriptors: owns none of them; `connection` is closed by `retire`, or by whoever gives up.
    """

    connection: socket.socket
    version: str
    memory: Memory
    lock: int
    bind: tuple[str, ...]
    listeners: dict[str, socket.socket]
    status_port: StatusPort | None = None

    def listener(self, text: str) -> tuple[str, socket.socket] | None:
        """Its listener of an address as our options name it."""
        for named, (address, listener) in zip(self.bind, self.listeners.items(), strict=False):
            if text in (named, address):
                return address, listener
        return None


def ask_predecessor(directory: str, name: str) -> Predecessor:
    """Take the listeners of the supervisor that runs this service.

    Raises:
        ControlError: It refuses (its own code), or does not answer (HP656). It goes on.

    Descriptors: the caller owns what is in the result.
    """
    with ExitStack() as stack:
        connection = stack.enter_context(socket.socket(socket.AF_UNIX))
        connection.settimeout(ANSWER_TIMEOUT_S)
        decoder, descriptors, replies = FrameDecoder(), list[int](), list[Any]()
        stack.callback(lambda: list(map(os.close, descriptors)))
        try:
            connection.connect(os.path.join(directory, "control.sock"))
            check_peer(connection)
            connection.sendall(encode_frame(encode(TakeOverRequest(version=__version__))))
            while not replies:
                data, received = receive_descriptors(connection, 65536)
                descriptors += received
                if not data:
                    raise ConnectionResetError(0, "it closed the connection")
                replies = [decode(payload, Reply) for payload in decoder.feed(data)]
        except (OSError, DescriptorsLostError) as error:
            raise ControlError(
                "HP656",
                f"cannot take over {name}",
                cause=f"its supervisor does not pass its listeners: {error.strerror or error}",
                fix=f"hotport status {name}",
            ) from error
        reply = replies[0]
        if isinstance(reply, Failure):
            raise reply.error()
        assert isinstance(reply, Estate), reply
        connection.setblocking(False)
        lock, *fds = descriptors
        status = None
        if reply.status_bind:
            status = StatusPort(reply.status_bind, reply.status_address, inherited_listener(fds.pop(), is_in_use=True))
        listeners = {
            address: inherited_listener(fd, is_in_use=True) for address, fd in zip(reply.addresses, fds, strict=True)
        }
        stack.pop_all()
    return Predecessor(connection, reply.version, reply.memory, lock, reply.bind, listeners, status)


async def retire(predecessor: Predecessor, supervisor: Supervisor) -> None:
    """Wait until our workers serve, tell the predecessor so, and see it off.

    If it dies meanwhile, its workers, which nobody supervises any more, are told to drain by us.
    """
    await retried("take_over.wait", _wait_serving, supervisor)
    workers = _serving(supervisor)
    supervisor.owned.shared = frozenset()
    said: list[bytes] = []
    with predecessor.connection as connection, suppress(OSError):
        connection.send(encode_frame(encode(Committed(workers=workers, addresses=tuple(supervisor.listeners)))))
        await retried("take_over.retire", _read_to_end, connection, said)
    log.info("take_over.done", predecessor=predecessor.version, has_retired=bool(said))
    own = predecessor.memory.generations
    await retried("take_over.drain", _drain_orphans, supervisor, lambda generation: generation <= own)


async def _wait_serving(supervisor: Supervisor) -> None:
    while len(supervisor.service.ids(Phase.SERVING)) < supervisor.service.wanted:
        await supervisor.wait_stepped()


async def _read_to_end(sock: socket.socket, said: list[bytes]) -> None:
    """Note whatever comes until the other side has closed."""
    with suppress(OSError):
        while True:
            await anyio.wait_readable(sock)
            if not (data := sock.recv(65536)):
                return
            said.append(data)


def _serving(supervisor: Supervisor) -> tuple[str, ...]:
    """Names of the control sockets of the workers that serve."""
    processes = (supervisor.processes.get(number) for number in supervisor.service.ids(Phase.SERVING))
    return tuple(os.path.basename(each.control_path) for each in processes if each is not None and not each.is_foreign)


async def _drain_orphans(supervisor: Supervisor, is_other: Callable[[int], bool]) -> None:
    """Tell workers of the other supervisor to hand their connections to ours, and wait until they have left.

    Args:
        is_other: Whether a generation is one of its.
    """
    options = supervisor.options
    paths = tuple(os.path.join(supervisor.directory, name) for name in _serving(supervisor))
    order = encode_frame(encode(DrainOrder(timeout_s=options.drain_timeout_s, successors=paths)))

    async def drain(path: str) -> None:
        with socket.socket(socket.AF_UNIX) as sock, anyio.move_on_after(options.drain_timeout_s + ANSWER_TIMEOUT_S):
            sock.setblocking(False)
            try:
                sock.connect(path)
                check_peer(sock)
                sock.send(order)
                log.info("take_over.draining", worker=os.path.basename(path))
                await retried("take_over.drain", _read_to_end, sock, [])
            except ConnectionRefusedError:
                with suppress(FileNotFoundError):  # somebody else has removed it meanwhile
                    os.unlink(path)
            except OSError as error:
                log.warning("take_over.unreachable", worker=os.path.basename(path), error=str(error))

    async with anyio.create_task_group() as tasks:
        for file in os.listdir(supervisor.directory):
            named = parse_worker_socket(file)
            if named is not None and is_other(named[0]):
                tasks.start_soon(drain, os.path.join(supervisor.directory, file))
