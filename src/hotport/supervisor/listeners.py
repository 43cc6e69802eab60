"""Which listeners there are, at which addresses, and for which generations; each is closed when nobody needs it."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from hotport.address import Address, FdAddress, SystemdAddress, TcpAddress, parse_address
from hotport.errors import ConfigError, HotportError
from hotport.kernel.procfs import has_socket, resets_sent
from hotport.kernel.sockets import (
    accept_queue_length,
    bind_guard,
    bind_listener,
    bound_address,
    file_path,
    rebind,
    socket_file,
    unlink_if_ours,
)
from hotport.kernel.steer import deafen, share_port, steer, unsteer
from hotport.model.guarantee import Strategy
from hotport.options import Options

__all__ = ["Listener", "Listeners", "Rebound", "listen"]


@dataclass(eq=False, slots=True)
class Listener:
    """One address of one or several generations.

    Attributes:
        asked: The address as the options have it, in its canonical form; port 0 is still 0.
        address: Where it is bound.
        sock: None while somebody else has the address.
        why_lost: Who that is.
        before: The listener of the same address that this one takes over from, if it has a socket of its own.
        file: Device and inode of its socket file.
    """

    asked: str
    address: str
    sock: socket.socket | None
    why_lost: str = ""
    before: Listener | None = None
    file: tuple[int, int] | None = None

    @property
    def is_listening(self) -> bool:
        """Clients can connect."""
        return self.sock is not None and bool(self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def close(self) -> None:
        """Close it, and remove its socket file."""
        if self.sock is not None:
            self.sock.close()
        unlink_if_ours(file_path(parse_address(self.address)), self.file)


@dataclass(slots=True)
class Rebound:
    """What came of binding addresses again.

    Attributes:
        gap_s: How long nobody listened on the address with the longest gap.
        refused: How many connections were refused meanwhile; see `Report`.
        reset: How many waited in an accept queue when it was closed.
        accepted: What was taken from the accept queues before; the caller's to close.
        why: Who has an address now that could not be bound; empty if all are there.
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
        asked: For each of them, what the options say; if they cannot be told apart, the addresses themselves.

    Attributes:
        shared: Addresses whose socket files stay when they are closed: another supervisor has these listeners, too,
            and which of the two goes on is not decided.

    Descriptors: owns every listener, and the guards.
    """

    def __init__(self, bound: Mapping[int, Mapping[str, socket.socket]], asked: Mapping[int, Collection[str]]) -> None:
        known: dict[socket.socket, Listener] = {}
        self._of: dict[int, list[Listener]] = {}
        for generation, listeners in bound.items():
            names = _asked_for(asked.get(generation, ()), listeners)
            self._of[generation] = [
                known.setdefault(sock, Listener(name, address, sock, file=None if _is_passed(name) else _file(address)))
                for name, (address, sock) in zip(names, listeners.items(), strict=True)
            ]
        self.shared: frozenset[str] = frozenset()
        self._guards: dict[str, socket.socket] = {}
        self._abandoned: list[Listener] = []

    # -- looking ---------------------------------------------------------------------------------------------

    def of(self, generation: int) -> list[Listener]:
        """The listeners of a generation; those of the only one there is, if it is not known yet."""
        return self._of.get(generation) or next(iter(self._of.values()))

    def sockets(self, generation: int) -> dict[str, socket.socket]:
        """The sockets of a generation by address, without those that somebody else has."""
        return {each.address: each.sock for each in self.of(generation) if each.sock is not None}

    def named(self, sockets: Collection[socket.socket]) -> dict[str, socket.socket]:
        """Some sockets by address, whether a generation that goes on needs them or not."""
        known = (*self._each(), *self._abandoned)
        return {each.address: each.sock for each in known if each.sock is not None and each.sock in sockets}

    @property
    def lost(self) -> dict[str, str]:
        """Addresses that somebody else has, and who."""
        return {each.address: each.why_lost for each in self._each() if each.sock is None}

    def lingering(self, pids: Mapping[int, int], generation: int, other: int = 0) -> tuple[int, ...]:
        """Which of these processes (a pid by worker) have a listener open that a generation has, or one before it had.

        Args:
            other: Look only for what this generation has in common with it.
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
        """The listeners of the next generation, which takes over from `generation`.

        What stays is the same listener, or with *overlap* a socket of its own that does not listen yet; what is new is
        bound now.

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
                if isinstance(parse_address(asked), SystemdAddress):  # one name for all of them
                    taken.update(found)
                    plan += found
                    if found:
                        continue
                kept = next(iter(found), None)
                taken.add(kept)
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
        """A generation has been begun with what was prepared for it."""
        self._of[generation] = plan

    def discard(self, plan: Iterable[Listener]) -> None:
        """What was prepared is not wanted."""
        known = set(self._each())
        for each in plan:
            if each not in known:
                each.close()

    def join(self, generation: int, backlog: int) -> None:
        """Let the sockets of a generation listen beside those that it takes over from; these get the connections.

        Raises:
            OSError: The kernel refuses.
        """
        for each in self.of(generation):
            if each.sock is None or each.is_listening or each.before is None or each.before.sock is None:
                continue
            with suppress(OSError):  # EINVAL: the only socket of its address, that never had company
                steer(each.before.sock, 0)
            each.sock.listen(backlog)
            with suppress(OSError):  # what goes to the new one all the same waits there
                steer(each.sock, 0)

    def steer(self, generation: int, index: int) -> None:
        """Send newcomers to the sockets of a generation (index 1), or to those that it takes over from (index 0).

        There are two sockets in each group: `obstacle` sees to that.
        """
        for each in self.of(generation):
            if each.sock is not None and each.before is not None and each.is_listening:
                steer(each.sock, index)

    def rebind(self, old: int, new: int, backlog: int) -> Rebound:
        """Close what two generations have in common, and bind it again.

        Before it is closed a listener hears nothing new, and its accept queue is emptied. See `Rebound`.
        """
        result = Rebound()
        common = self.common(old, new)
        for each in common:
            assert each.sock is not None
            with suppress(OSError):
                deafen(each.sock)
        for each in common:
            assert each.sock is not None
            result.accepted += _empty(each.sock)
        before = resets_sent()
        for each in common:
            assert each.sock is not None
            result.reset += accept_queue_length(each.sock)
            try:
                each.sock, gap_s = rebind(each.sock, backlog=backlog)
                result.gap_s = max(result.gap_s, gap_s)
            except HotportError as error:
                each.sock, each.why_lost = None, error.cause
                result.why = f"{each.address}: {error.cause}"
        result.refused = max(0, resets_sent() - before - result.reset)
        return result

    def regain(self, options: Options) -> str:
        """Try again to bind what somebody else has; who still has an address, empty if all are there."""
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

    # -- the end ---------------------------------------------------------------------------------------------

    def keep(self, generations: Collection[int], held: Collection[socket.socket]) -> list[socket.socket]:
        """Close what belongs to none of these generations any more, as soon as no worker holds it.

        Args:
            held: Sockets that a worker has open, and empties before it closes them.

        Returns:
            Connections that nobody has taken from the accept queues of what was closed; the caller's to close.
        """
        if gone := [number for number in self._of if number not in generations]:
            leaving = {each for number in gone for each in self._of.pop(number)}
            self._abandoned += leaving - set(self._each())
        accepted: list[socket.socket] = []
        for each in [each for each in self._abandoned if each.sock not in held]:
            self._abandoned.remove(each)
            if each.sock is not None and each.is_listening:
                accepted += _empty(each.sock)
            each.close()
            self._unguard(each.address)
            self._settle(each)
        return accepted

    def give_away(self, addresses: Collection[str]) -> None:
        """Leave the socket files of these addresses: they are another process's from now on."""
        for each in self._each():
            if each.address in addresses:
                each.file = None

    def close(self) -> None:
        """Close everything."""
        self.give_away(self.shared)
        for each in (*self._each(), *self._abandoned):
            each.close()
        for guard in self._guards.values():
            guard.close()

    def _settle(self, closed: Listener) -> None:
        """A socket is alone at its address again: nothing is steered there any more."""
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
        """Hold the addresses of the first generation against other users, if that is wanted.

        Raises:
            KernelError: One cannot be held (HP101).
        """
        self._guard(self._each(), options)

    def _guard(self, listeners: Iterable[Listener], options: Options) -> None:
        if not options.guard:
            return
        for each in listeners:
            address = parse_address(each.address)
            if isinstance(address, TcpAddress) and each.address not in self._guards and each.sock is not None:
                share_port(each.sock)  # one that was bound before the option was set
                self._guards[each.address] = bind_guard(address)

    def _unguard(self, address: str) -> None:
        if address in self._guards and not any(each.address == address for each in self._each()):
            self._guards.pop(address).close()


def _is_passed(asked: str) -> bool:
    """Whether a service manager has made the socket, and its file."""
    return isinstance(parse_address(asked), FdAddress | SystemdAddress)


def _asked_for(texts: Collection[str], listeners: Collection[str]) -> list[str]:
    """What the options say of each listener, in canonical form: one ``systemd:`` name may stand for several.

    Listeners that cannot be told apart by their number are asked for by their own addresses.
    """
    asked = [str(parse_address(text)) for text in texts]
    more = len(listeners) - len(asked)
    names = [text for text in asked if text.startswith("systemd:")]
    if more > 0 and len(names) == 1:
        at = asked.index(names[0])
        asked[at:at] = names * more
    return asked if len(asked) == len(listeners) else list(listeners)


def listen(address: Address, options: Options) -> socket.socket:
    """A new listener, as a service with these options wants it; the caller owns it. See `bind_listener`."""
    shares_port = options.guard or options.strategy == "overlap"
    sock = bind_listener(address, backlog=options.backlog, shares_port=shares_port)
    if options.command:
        sock.setblocking(True)  # as systemd passes them: a plain accept loop expects nothing else
    return sock


def _bind(asked: str, options: Options) -> Listener:
    """A listener for an address that is new."""
    address = parse_address(asked)
    if isinstance(address, FdAddress | SystemdAddress):
        raise ConfigError(
            "HP107",
            f"cannot take {asked} in a restart",
            cause="sockets are passed to a process when it starts",
            fix="systemctl restart the service, or stop it and serve again",
        )
    sock = listen(address, options)
    bound = str(bound_address(address, sock))
    return Listener(asked, bound, sock, file=_file(bound))


def _join(kept: Listener, options: Options) -> Listener:
    """A socket of its own beside a listener, that does not listen yet."""
    assert kept.sock is not None
    share_port(kept.sock)  # one that was bound for another strategy
    sock = bind_listener(parse_address(kept.address), backlog=options.backlog, shares_port=True, listens=False)
    return Listener(kept.asked, kept.address, sock, before=kept)


def _file(address: str) -> tuple[int, int] | None:
    return socket_file(file_path(parse_address(address)))


def _empty(listener: socket.socket) -> list[socket.socket]:
    """What waits in an accept queue, as far as there are descriptors for it."""
    accepted = []
    listener.setblocking(False)  # programs get it blocking
    with suppress(OSError):
        while True:
            accepted.append(listener.accept()[0])
    return accepted
