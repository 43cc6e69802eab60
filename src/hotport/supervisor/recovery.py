"""Workers whose supervisor is gone: found, asked, and their listeners taken back from them.

A supervisor keeps nothing that it could not learn again here; so this is how the next one begins, whether its
predecessor was killed or has exec'ed itself.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import anyio
import msgspec

from hotport.address import parse_listener_name
from hotport.errors import ControlError, HotportError
from hotport.kernel import procfs
from hotport.kernel.process import duplicate_descriptor
from hotport.kernel.scm import receive_descriptors
from hotport.kernel.sockets import check_peer, inherited_listener, peer_credentials
from hotport.model import lifecycle, service
from hotport.model.lifecycle import Phase
from hotport.observe.logs import get_logger
from hotport.supervisor.contain import Containing
from hotport.supervisor.launch import PRIVATE_VARIABLES, Launch
from hotport.wire.frames import FrameDecoder, encode_frame
from hotport.wire.listenfds import parse_listen_environment
from hotport.wire.messages import (
    PROTOCOL,
    Hello,
    ListenersOrder,
    Listening,
    Memory,
    Word,
    WorkerSpec,
    decode,
    encode,
    parse_worker_socket,
    worker_socket,
)

__all__ = ["Found", "Survivor", "survey"]

#: A worker that serves answers at once; one that still imports its application, or is busy with it, is taken at its
#: supervisor's word: it has been started.
ANSWER_TIMEOUT_S: Final = 2.0

_PHASES: Final = {phase.value: phase for phase in (Phase.STARTING, Phase.READY, Phase.SERVING, Phase.QUIESCED)}


@dataclass(slots=True)
class Survivor:
    """A worker that somebody else has started.

    Attributes:
        phase: By its own word. A program of somebody else's is taken to serve.
        launch: How it was started; None if that cannot be read.
        listeners: Duplicates of its own, by canonical address.
        has_answered: It has said which these are; if none, it has none.
    """

    worker: int
    generation: int
    pid: int
    control_path: str
    is_foreign: bool = False
    phase: Phase = Phase.STARTING
    launch: Launch | None = None
    memory: Memory | None = None
    listeners: dict[str, socket.socket] = field(default_factory=dict)
    has_answered: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """What is left of a service.

    Attributes:
        survivors: Oldest first.
        wanted: How many workers should serve; 0 if nobody remembers.
        generations: How many generation numbers were given out, as far as anybody remembers.
        spawned: How many worker numbers.
        favoured: The generation that its supervisor would have gone on with.
        generation: The one that serves; 0 if none has begun to.
        listeners: By generation and canonical address; sockets of the survivors are the same objects.
    """

    survivors: tuple[Survivor, ...] = ()
    wanted: int = 0
    generations: int = 0
    spawned: int = 0
    favoured: int = 0
    generation: int = 0
    listeners: dict[int, dict[str, socket.socket]] = field(default_factory=dict)

    @property
    def workers(self) -> tuple[lifecycle.Worker, ...]:
        """The survivors, as the model knows workers."""
        return tuple(lifecycle.Worker(each.worker, each.generation, each.phase) for each in self.survivors)

    @property
    def going(self) -> int:
        """The generation that goes on, or the next one if none can."""
        current = (each.generation for each in self.survivors if each.phase is not Phase.DRAINING)
        return self.generation or max(current, default=self.generations + 1)


async def survey(
    directory: str,
    memory: Memory | None = None,
    numbers: Mapping[int, int] | None = None,
    carried: Mapping[str, socket.socket] | None = None,
) -> Found:
    """Find and ask whatever is left of the service with this runtime directory; its lock is ours already.

    Sockets that nobody answers on any more are removed.

    Args:
        memory: What its last supervisor remembered, if that was asked; workers have it otherwise.
        numbers: Its workers by pid: programs of somebody else's do not know theirs.
        carried: Listeners of the generation that goes on which this process has already.

    Raises:
        ControlError: A worker speaks another protocol (HP650), or workers hold the port and none gives a duplicate of
            it (HP651). They serve on.

    Descriptors: owned by `Found.listeners`; what else was received is closed.
    """
    survivors = _started(directory)
    for file in os.listdir(directory):
        if named := parse_worker_socket(file):
            generation, worker = named
            path = os.path.join(directory, file)
            survivors.setdefault((generation, worker), Survivor(worker, generation, 0, path))
    asked = list(survivors.values())
    # Outside of the task group, which would wrap an error.
    errors: list[HotportError] = []

    async def ask(survivor: Survivor) -> None:
        with Containing("survey", path=survivor.control_path), anyio.move_on_after(ANSWER_TIMEOUT_S):
            try:
                await _ask(survivor)
            except HotportError as error:
                errors.append(error)

    async with anyio.create_task_group() as tasks:
        for survivor in asked:
            if not survivor.is_foreign:
                tasks.start_soon(ask, survivor)
    alive = [survivor for survivor in asked if survivor.pid]
    if not alive:
        _tidy(directory)
    for survivor in alive:
        if not survivor.has_answered:
            _take(survivor)
    try:
        if errors:
            raise errors[0]
        found = _number(alive, memory, numbers or {})
        _gather(found, carried or {}, directory)
    except HotportError:
        for survivor in alive:
            for listener in survivor.listeners.values():
                listener.close()
        raise
    return found


def _tidy(directory: str) -> None:
    """Remove what processes that were killed between bind and rename have left (`hotport.kernel.sockets`)."""
    for file in os.listdir(directory):
        if file.startswith("."):
            with suppress(OSError):
                os.unlink(os.path.join(directory, file))


def _number(survivors: Sequence[Survivor], memory: Memory | None, numbers: Mapping[int, int]) -> Found:
    """Which generation and how many workers there should be, and the highest numbers that were given out."""
    memories = [each for each in (memory, *(survivor.memory for survivor in survivors)) if each is not None]
    latest = max(memories, key=lambda memory: (memory.generations, memory.spawned), default=None)
    generations = max([latest.generations if latest else 0, *(each.generation for each in survivors)])
    spawned = max([latest.spawned if latest else 0, *(each.worker for each in survivors)])
    for survivor in survivors:
        if not survivor.worker and (number := numbers.get(survivor.pid)):
            survivor.worker = number
        elif not survivor.worker:
            spawned += 1
            survivor.worker = spawned
    ordered = tuple(sorted(survivors, key=lambda each: each.worker))
    options = [each.launch.options.workers for each in ordered if each.launch]
    wanted = latest.wanted if latest else max(options, default=0)
    found = Found(ordered, wanted, generations, spawned, latest.favoured if latest else 0)
    return replace(found, generation=service.surviving(found.workers, max(1, wanted), found.favoured))


def _gather(found: Found, carried: Mapping[str, socket.socket], directory: str) -> None:
    """One socket for each listener, however many duplicates of it there are."""
    known = {os.fstat(listener.fileno()).st_ino: listener for listener in carried.values()}
    if carried:
        found.listeners[found.going] = dict(carried)
    for survivor in found.survivors:
        for address, listener in survivor.listeners.items():
            kept = known.setdefault(os.fstat(listener.fileno()).st_ino, listener)
            if kept is not listener:
                listener.close()
            survivor.listeners[address] = kept
            found.listeners.setdefault(survivor.generation, {}).setdefault(address, kept)
    silent = [each for each in found.survivors if each.phase is not Phase.DRAINING and not each.has_answered]
    if silent and not found.listeners:
        pids = " ".join(str(each.pid) for each in silent)
        raise ControlError(
            "HP651",
            f"cannot adopt the workers of {os.path.basename(directory)}",
            cause=f"its workers (pid {pids.replace(' ', ', ')}) may have listeners, and give none of them back",
            fix=f"kill {pids}",
            note="then start the service again",
        )
    if found.listeners and found.going not in found.listeners:  # it has let go of them, for others to have them
        found.listeners[found.going] = dict(found.listeners[max(found.listeners)])


def _started(directory: str) -> dict[tuple[int, int], Survivor]:
    """Processes that were started to be workers of this service, whether they listen yet or not."""
    found: dict[tuple[int, int], Survivor] = {}
    for pid in procfs.leaders_with("NOTIFY_SOCKET", os.path.join(directory, "notify.sock")):
        with Containing("survey", worker_pid=pid):  # its environment may be anything
            if (survivor := _survivor(pid, directory)) is not None:
                found.setdefault((survivor.generation, survivor.worker or -pid), survivor)
    return found


def _survivor(pid: int, directory: str) -> Survivor | None:
    """What a process was started to be, by its environment; None if that is no worker."""
    environment = procfs.environment(pid)
    generation = int(environment.get("HOTPORT_GENERATION", "0"))
    if text := environment.get("HOTPORT_WORKER"):
        try:
            spec = msgspec.json.decode(text, type=WorkerSpec)
        except msgspec.MsgspecError:  # another version's: then it has to say itself who it is
            return None
        path = os.path.join(directory, worker_socket(generation, spec.worker))
        return Survivor(spec.worker, generation, pid, path, launch=_launch(pid, spec, environment))
    if environment.get("LISTEN_PID") != str(pid):  # started by such a program, in a group of its own
        return None
    return Survivor(0, generation, pid, "", is_foreign=True, phase=Phase.SERVING)


def _launch(pid: int, spec: WorkerSpec, environment: Mapping[str, str]) -> Launch | None:
    python = next(iter(procfs.arguments(pid)), "")
    mine = (*PRIVATE_VARIABLES, "HOTPORT_GENERATION")
    kept = {key: value for key, value in environment.items() if key not in mine}
    directory = environment.get("PWD", "")
    return Launch(spec.options, python, directory, kept) if python and directory else None


async def _ask(survivor: Survivor) -> None:
    """Who it is, how far it is, and its listeners; nothing of it is known if it does not answer in time."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        try:
            sock.connect(survivor.control_path)
            check_peer(sock)
        except FileNotFoundError:  # started, but it does not listen yet
            return
        except PermissionError as error:
            get_logger("hotport.supervisor").warning("worker.refused", path=survivor.control_path, error=str(error))
            return
        except OSError:  # ECONNREFUSED: killed, like its supervisor; EAGAIN: it is stuck, and has been for long
            if not survivor.pid:
                with suppress(FileNotFoundError):
                    os.unlink(survivor.control_path)
            return
        # Who listens is the worker, whoever else has its environment; 0: it is in another pid namespace.
        survivor.pid = peer_credentials(sock)[0] or survivor.pid
        has_spoken = False
        with suppress(OSError):  # ECONNRESET, EPIPE: it ends just now
            sock.send(encode_frame(encode(ListenersOrder())))
            decoder, received = FrameDecoder(), list[socket.socket]()
            data = b"?"
            while data and not survivor.has_answered:
                await anyio.wait_readable(sock)
                data, descriptors = receive_descriptors(sock, 65536)
                received += [inherited_listener(fd, is_in_use=True) for fd in descriptors]
                for word in [decode(payload, Word) for payload in decoder.feed(data)]:
                    if isinstance(word, Hello):
                        _believe(survivor, word)
                        has_spoken = True
                    elif isinstance(word, Listening):
                        survivor.listeners = dict(zip(word.addresses, received, strict=True))
                        survivor.has_answered = True
        if not has_spoken:
            survivor.phase = Phase.DRAINING


def _believe(survivor: Survivor, hello: Hello) -> None:
    if hello.protocol != PROTOCOL:
        raise ControlError(
            "HP650",
            f"cannot supervise worker {survivor.worker} (pid {survivor.pid})",
            cause=f"it speaks version {hello.protocol} of the control protocol, and this hotport version {PROTOCOL}",
            fix=f"kill {survivor.pid}",
            note="to keep the worker, serve with the hotport version that started it",
        )
    survivor.phase = _PHASES.get(hello.phase, Phase.DRAINING)
    survivor.memory = hello.memory


def _take(survivor: Survivor) -> None:
    """Listeners of a process that does not answer, or has no way to: straight from its table of descriptors."""
    environment = procfs.environment(survivor.pid)
    with suppress(OSError, HotportError):  # not permitted, or gone
        pidfd = os.pidfd_open(survivor.pid)
        try:
            for fd, name in parse_listen_environment(environment, survivor.pid):
                listener = inherited_listener(duplicate_descriptor(pidfd, fd), is_in_use=True)
                survivor.listeners[str(parse_listener_name(name))] = listener
        finally:
            os.close(pidfd)
