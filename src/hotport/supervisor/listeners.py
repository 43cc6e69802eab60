"""The listeners of a service, by address and generation; each is closed when no generation needs it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from hotport.address import Address, FdAddress, SystemdAddress, TcpAddress, UnixAddress, parse_address
from hotport.errors import ConfigError, HotportError
from hotport.kernel.procfs import has_socket, resets_sent
from hotport.kernel.sockets import (
    Access,
    accept_queue_length,
    access_of,
    bind_guard,
    bind_listener,
    bound_address,
    change_access,
    dropped,
    file_path,
    rebind,
    socket_file,
    take_waiting,
    unlink_if_ours,
)
from hotport.kernel.steer import deafen, share_port, steer, unsteer
from hotport.model.strategies import Strategy
from hotport.options import Options
from hotport.supervisor.rights import socket_access

__all__ = ["Listener", "Listeners", "Rebound", "listen"]

#: Why a service manager's socket file is not restored.
NOT_OURS: Final = "a service manager made it: systemctl restart its socket unit, and then the service"

#: Seconds that another processor may need to count a reset, which the kernel does after sending it
#: (tcp_v4_send_reset() in net/ipv4/tcp_ipv4.c).
COUNTED_S: Final = 0.002


@dataclass(eq=False, slots=True)
class Listener:
    """One address of one or several generations.

    Attributes:
        asked: The address in the options, in its canonical form; port 0 is still 0.
        address: The bound address.
        sock: The socket; None while another process has the address.
        why_lost: Names that process.
        before: The predecessor at the same address, if this listener has its own socket.
        path: Its socket file; empty if there is none, or if another process owns it now.
        file: Device and inode of that file.
        is_passed: Whether a service manager has made the socket and its file, and keeps them.
        access: Mode, owner and group of that file.
        why_gone: Why that file could not be restored.
    """

    asked: str
    address: str
    sock: socket.socket | None
    why_lost: str = ""
    before: Listener | None = None
    path: str = ""
    file: tuple[int, int] | None = None
    is_passed: bool = False
    access: Access | None = None
    why_gone: str = ""

    @property
    def is_listening(self) -> bool:
        """Whether clients can connect."""
        return self.sock is not None and bool(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    @property
    def is_gone(self) -> bool:
        """Whether its socket file was removed or replaced, so that new clients do not find it."""
        if self.file is None:  # a service manager's file may lie in a directory that is not visible here
            return bool(self.path) and not self.is_passed
        return socket_file(self.path) != self.file

    def leave_file(self) -> None:
        """Give the socket file up: another listener or process owns it from now on."""
        self.path, self.file = "", None

    def close(self) -> None:
        """Close it, and remove its socket file."""
        if self.sock is not None:
            self.sock.close()
        if not self.is_passed:
            unlink_if_ours(self.path, self.file)


@dataclass(slots=True)
class Rebound:
    """The result of rebinding addresses.

    Attributes:
        gap_s: The longest rebind gap of an address, in seconds.
        refused: How many connections were refused meanwhile; see `Report`.
        reset: How many connections were queued when their listener was closed.
        accepted: Connections accepted from the queues before; the caller closes them.
        why: The address that could not be bound, and who has it; empty if all are bound.
    """

    gap_s: float = 0.0
    refused: int = 0
    reset: int = 0
    accepted: list[socket.socket] = field(default_factory=list)
    why: str = ""


class Listeners:
    """The listeners of a service.

    Args:
        bound: Listeners by generation and canonical address; owned from here on.
        asked: By generation, the addresses in its options; if these do not match the listeners, their own are used.
        shared: As in `share_files`.

    Descriptors: owns every listener, and the guards.
    """

    def __init__(
        self,
        bound: Mapping[int, Mapping[str, socket.socket]],
        asked: Mapping[int, Collection[str]],
        *,
        shared: Collection[str] = (),
    ) -> None:
        known: dict[socket.socket, Listener] = {}
        self._of: dict[int, list[Listener]] = {}
        for generation, listeners in bound.items():
            names = _asked_for(asked.get(generation, ()), listeners)
            self._of[generation] = [
                known.setdefault(sock, _known(name, address, sock))
                for name, (address, sock) in zip(names, listeners.items(), strict=True)
            ]
        self._shared = frozenset(shared)
        self._guards: dict[str, socket.socket] = {}
        self._abandoned: list[Listener] = []
        self._dropped = 0  # at sockets that are closed

    # -- queries ---------------------------------------------------------------------------------------------

    def of(self, generation: int) -> list[Listener]:
        """The listeners of a generation; before it is known, those of the first one."""
        return self._of.get(generation) or next(iter(self._of.values()))

    def sockets(self, generation: int) -> dict[str, socket.socket]:
        """The sockets of a generation by address, without lost addresses."""
        return {each.address: each.sock for each in self.of(generation) if each.sock is not None}

    def named(self, sockets: Collection[socket.socket]) -> dict[str, socket.socket]:
        """The given sockets by address, abandoned listeners included."""
        known = (*self._each(), *self._abandoned)
        return {each.address: each.sock for each in known if each.sock is not None and each.sock in sockets}

    @property
    def lost(self) -> dict[str, str]:
        """Addresses lost to another process, and its name."""
        return {each.address: each.why_lost for each in self._each() if each.sock is None}

    @property
    def gone(self) -> dict[str, str]:
        """Addresses whose socket file is missing, and why it could not be restored."""
        gone = [each for each in self._each() if self._is_gone(each)]
        return {each.address: NOT_OURS if each.is_passed else each.why_gone for each in gone}

    @property
    def paths(self) -> list[str]:
        """The socket files of all listeners."""
        return [each.path for each in self._each() if each.path]

    def lingering(self, pids: Mapping[int, int], generation: int, other: int = 0) -> tuple[int, ...]:
        """Which workers (given with their pids) have a listener open that a generation has, or that was abandoned.

        Args:
            other: Check only the listeners that the generation shares with this one.
        """
        found = self.common(generation, other) if other else (*self.of(generation), *self._abandoned)
        numbers = [each.sock.fileno() for each in found if each.sock is not None]
        inodes = {os.fstat(number).st_ino for number in numbers if number >= 0}  # closed when the service stops
        return tuple(worker for worker, pid in pids.items() if has_socket(pid, inodes))

    def common(self, old: int, new: int) -> list[Listener]:
        """The listeners that two generations share."""
        return [each for each in self.of(new) if each in self.of(old) and each.sock is not None]

    # -- a restart -------------------------------------------------------------------------------------------

    def prepare(self, options: Options, strategy: Strategy, generation: int) -> list[Listener]:
        """Make the listeners of the next generation, which follows `generation`.

        A kept address has the same listener, or with *overlap* its own socket that does not listen yet; a new address
        is bound now.

        Raises:
            ConfigError, KernelError: An address cannot be bound; nothing has changed.
        """
        old = self.of(generation)
        plan: list[Listener] = []
        made: list[Listener] = []
        taken: set[Listener | None] = set()
        try:
            for text in options.bind:
                asked = str(parse_address(text))
                found = [each for each in old if asked in (each.asked, each.address) and each not in taken]
                if isinstance(parse_address(asked), SystemdAddress):  # one name may stand for several
                    taken.update(found)
                    plan += found
                    if found:
                        continue
                kept = next(iter(found), None)
                taken.add(kept)
                if kept is not None and self._is_gone(kept) and not kept.is_passed:
                    kept = None
                if kept is not None and strategy is not Strategy.OVERLAP:
                    plan.append(kept)
                    continue
                made.append(_bind(asked, options) if kept is None else _join(kept, options))
                plan.append(made[-1])
            self._guard(plan, options)
        except BaseException:
            for each in made:
                each.close()
            raise
        return plan

    def add(self, generation: int, plan: list[Listener]) -> None:
        """Add a generation that has begun, with its prepared listeners."""
        self._of[generation] = plan

    def discard(self, plan: Iterable[Listener]) -> None:
        """Close prepared listeners that are not needed."""
        known = set(self._each())
        for each in plan:
            if each not in known:
                each.close()

    def join(self, generation: int, backlog: int) -> None:
        """Make a generation's sockets listen beside their predecessors, which still get the connections.

        Raises:
            OSError: The kernel refuses.
        """
        for each in self.of(generation):
            if each.sock is None or each.is_listening or each.before is None or each.before.sock is None:
                continue
            with suppress(OSError):  # EINVAL: there has only been one socket at this address
                steer(each.before.sock, 0)
            each.sock.listen(backlog)
            with suppress(OSError):  # connections that still reach the new socket are queued there
                steer(each.sock, 0)

    def steer(self, generation: int, index: int) -> None:
        """Steer new connections to a generation's sockets (index 1), or to their predecessors (index 0).

        Each group has two sockets: `obstacle` ensures that.
        """
        for each in self.of(generation):
            if each.sock is not None and each.before is not None and each.is_listening:
                steer(each.sock, index)

    def rebind(self, old: int, new: int, backlog: int) -> Rebound:
        """Close the listeners that two generations share, and bind their addresses again.

        Before a listener is closed, it is deafened and its accept queue is emptied. See `Rebound`.
        """
        result = Rebound()
        common = self.common(old, new)
        for each in common:
            assert each.sock is not None
            with suppress(OSError):
                deafen(each.sock)
        for each in common:
            assert each.sock is not None
            result.accepted += take_waiting(each.sock)
        before = resets_sent()
        for each in common:
            assert each.sock is not None
            result.reset += accept_queue_length(each.sock)
            self._dropped += dropped(each.sock)
            try:
                each.sock, gap_s = rebind(each.sock, backlog=backlog)
                result.gap_s = max(result.gap_s, gap_s)
            except HotportError as error:
                each.sock, each.why_lost = None, error.cause
                result.why = f"{each.address}: {error.cause}"
        if common:
            time.sleep(COUNTED_S)
        result.refused = max(0, resets_sent() - before - result.reset)
        return result

    def regain(self, options: Options) -> str:
        """Retry binding the lost addresses; return the last failure, empty if all are bound."""
        why = ""
        for each in self._each():
            if each.sock is None:
                try:
                    each.sock = listen(parse_address(each.address), options)
                    each.why_lost = ""
                except HotportError as error:
                    each.why_lost = error.cause
                    why = f"{each.address}: {error.cause}"
        return why

    # -- socket files ----------------------------------------------------------------------------------------

    def remake(self, options: Options) -> list[Listener]:
        """Rebind listeners whose socket files are missing, and abandon the old ones: see `keep`.

        Returns:
            The new listeners, which all generations have from now on. `gone` has the reasons of failures.
        """
        made: list[Listener] = []
        for each in self._each():
            if not self._is_gone(each) or each.is_passed:
                continue
            try:
                new = _bind(each.address, options, each.access)
            except HotportError as error:
                each.why_gone = error.cause
                continue
            new.asked = each.asked
            for number, listeners in self._of.items():
                self._of[number] = [new if other is each else other for other in listeners]
            each.leave_file()
            self._abandoned.append(each)
            made.append(new)
        return made

    def note_access(self) -> None:
        """Remember the access rights of each socket file, for its replacement if it is removed."""
        for each in self._each():
            if each.path and not each.is_passed and not each.is_gone:
                each.access = access_of(each.path)

    def change_access(self, access: Access) -> None:
        """Give all socket files, but those of a service manager, another access.

        Raises:
            KernelError: One of them cannot have it (HP108).
        """
        for each in self._each():
            address = parse_address(each.address)
            if isinstance(address, UnixAddress) and each.path and not (each.is_passed or each.is_gone):
                change_access(address, access)

    def blame(self, why: str) -> None:
        """Note why missing socket files are not restored now."""
        for each in self._each():
            if self._is_gone(each):
                each.why_gone = why

    def unmake(self, made: Listener, why: str) -> None:
        """Undo `remake` of a listener that no worker accepts from: its address is missing again."""
        before = next((each for each in reversed(self._abandoned) if each.address == made.address), None)
        if before is None:
            return
        self._abandoned.remove(before)
        for number, listeners in self._of.items():
            self._of[number] = [before if other is made else other for other in listeners]
        before.path, before.why_gone = made.path, why
        made.close()

    def superseded(self, addresses: Collection[str]) -> set[socket.socket]:
        """The old sockets of these addresses, which a worker closes when it gets their replacements."""
        return {each.sock for each in self._abandoned if each.sock is not None and each.address in addresses}

    def _is_gone(self, each: Listener) -> bool:
        return each.address not in self._shared and each.is_gone

    # -- the end ---------------------------------------------------------------------------------------------

    def keep(self, generations: Collection[int], held: Collection[socket.socket]) -> list[socket.socket]:
        """Close listeners that belong to none of these generations, as soon as no worker holds them.

        Args:
            held: Sockets that workers have open, and empty before they close them.

        Returns:
            Connections left in the accept queues of closed listeners; the caller closes them.
        """
        if gone := [number for number in self._of if number not in generations]:
            leaving = {each for number in gone for each in self._of.pop(number)}
            self._abandoned += leaving - set(self._each())
        accepted: list[socket.socket] = []
        for each in [each for each in self._abandoned if each.sock not in held]:
            self._abandoned.remove(each)
            if each.sock is not None:
                self._dropped += dropped(each.sock)
                if each.is_listening:
                    accepted += take_waiting(each.sock)
            each.close()
            self._unguard(each.address)
            self._settle(each)
        return accepted

    def dropped(self) -> int:
        """Count what the kernel has dropped at these sockets because their queues were full."""
        open_ones = (each.sock for each in (*self._each(), *self._abandoned))
        return self._dropped + sum(dropped(sock) for sock in open_ones if sock is not None)

    @property
    def has_shared(self) -> bool:
        """Whether another supervisor also has some of these listeners."""
        return bool(self._shared)

    def share_files(self, addresses: Collection[str]) -> None:
        """Leave the socket files of these addresses in place when they are closed.

        Another supervisor also has these listeners, until it is decided which of the two continues.
        """
        self._shared = frozenset(addresses)

    def own_files(self) -> None:
        """Remove every socket file when its listener is closed: no other supervisor has it, or that one has retired."""
        self._shared = frozenset()

    def give_away(self, addresses: Collection[str]) -> None:
        """Leave the socket files of these addresses: another process owns them from now on."""
        for each in self._each():
            if each.address in addresses:
                each.leave_file()

    def close(self) -> None:
        """Close everything."""
        self.give_away(self._shared)
        for each in (*self._each(), *self._abandoned):
            each.close()
        for guard in self._guards.values():
            guard.close()

    def all_sockets(self) -> list[socket.socket]:
        """Every owned socket, guards included."""
        listeners = (each.sock for each in (*self._each(), *self._abandoned))
        return [*(sock for sock in listeners if sock is not None), *self._guards.values()]

    def _settle(self, closed: Listener) -> None:
        """Stop steering at the address of a closed listener: one socket is left there."""
        for each in self._each():
            if each.before is closed or closed.before is each:
                each.before = None if each.before is closed else each.before
                if each.sock is not None:
                    with suppress(OSError):
                        unsteer(each.sock)

    def _each(self) -> list[Listener]:
        return list(dict.fromkeys(each for listeners in self._of.values() for each in listeners))

    # -- guards ----------------------------------------------------------------------------------------------

    def guard(self, options: Options) -> None:
        """Guard the addresses of the first generation against other users, if the options say so.

        Raises:
            KernelError: An address cannot be guarded (HP101).
        """
        self._guard(self._each(), options)

    def _guard(self, listeners: Iterable[Listener], options: Options) -> None:
        if not options.guard:
            return
        for each in listeners:
            address = parse_address(each.address)
            if isinstance(address, TcpAddress) and each.address not in self._guards and each.sock is not None:
                share_port(each.sock)  # it may have been bound before the option was set
                self._guards[each.address] = bind_guard(address)

    def _unguard(self, address: str) -> None:
        if address in self._guards and not any(each.address == address for each in self._each()):
            self._guards.pop(address).close()


def _is_passed(asked: str) -> bool:
    """Whether a service manager has made the socket and its file."""
    return isinstance(parse_address(asked), FdAddress | SystemdAddress)


def _asked_for(texts: Collection[str], listeners: Collection[str]) -> list[str]:
    """The options' address for each listener, in canonical form: one ``systemd:`` name may stand for several.

    If the numbers do not match, each listener is asked for by its own address.
    """
    asked = [str(parse_address(text)) for text in texts]
    more = len(listeners) - len(asked)
    names = [text for text in asked if text.startswith("systemd:")]
    if more > 0 and len(names) == 1:
        at = asked.index(names[0])
        asked[at:at] = names * more
    return asked if len(asked) == len(listeners) else list(listeners)


def listen(address: Address, options: Options, access: Access | None = None) -> socket.socket:
    """Bind a new listener by a service's options; the caller owns it. See `bind_listener`.

    Args:
        access: Of its socket file, in place of what the options say.
    """
    shares_port = options.guard or options.strategy == "overlap"
    access = access or socket_access(options)
    sock = bind_listener(address, backlog=options.backlog, shares_port=shares_port, access=access)
    if options.command:
        sock.setblocking(True)  # as systemd passes them, for plain accept loops
    return sock


def _bind(asked: str, options: Options, access: Access | None = None) -> Listener:
    """Make a listener for a new address; `access` as in `listen`."""
    address = parse_address(asked)
    if isinstance(address, FdAddress | SystemdAddress):
        raise ConfigError(
            "HP107",
            f"cannot take {asked} in a restart",
            cause="sockets are passed to a process when it starts",
            note="restart the service with systemctl, or stop it and serve again",
        )
    sock = listen(address, options, access)
    return _known(asked, str(bound_address(address, sock)), sock)


def _join(kept: Listener, options: Options) -> Listener:
    """Make a second socket beside a listener, which does not listen yet."""
    assert kept.sock is not None
    share_port(kept.sock)  # it may have been bound for another strategy
    sock = bind_listener(parse_address(kept.address), backlog=options.backlog, shares_port=True, listens=False)
    return Listener(kept.asked, kept.address, sock, before=kept)


def _known(asked: str, address: str, sock: socket.socket) -> Listener:
    """Make a `Listener` of a bound socket, with its socket file if it has one."""
    path = file_path(parse_address(address))
    file = socket_file(path) if path else None
    return Listener(asked, address, sock, path=path, file=file, is_passed=_is_passed(asked))
