"""What a child made by fork must not have of ours: descriptors, signal handlers, the event loop.

fork(2) gives a child duplicates of everything. A connection that a child has open, too, does not end for its client
when we close it; a listener goes on listening; a signal to the child wakes our event loop, whose wake-up descriptor the
child has.

A program that is executed gets nothing of this: descriptors are close-on-exec, and handlers do not survive. So a child
that is about to execute one is left alone. It is known by its blocked signals: `hotport.kernel.spawn` and libuv block
all of them over the fork, those that nobody has a use for included. `subprocess` runs no Python code in the child.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Final, Protocol
from weakref import WeakSet

__all__ = ["Owner", "has_forked", "withheld", "withhold"]

log = logging.getLogger("hotport.fork")

#: Who forks to execute a program blocks these as well.
BLOCKED_FOR_EXEC: Final = frozenset({signal.SIGURG, signal.SIGWINCH, signal.SIGIO})


class Owner(Protocol):
    """Something that owns descriptors which are no child's."""

    def descriptors(self) -> Iterable[int]:
        """Those that are open now; -1 is passed over. Called in the child, where nothing must be awaited or closed."""


class _Withheld:
    """What the hooks of this process know; fork hooks cannot be taken back, so there is one for all owners."""

    def __init__(self) -> None:
        self.owners: WeakSet[Owner] = WeakSet()
        self.sockets: WeakSet[socket.socket] = WeakSet()
        self.loops: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
        self.is_hooked = False
        self.has_forked = False
        #: The mask of a thread that is forking.
        self.thread = threading.local()


_withheld: Final = _Withheld()


def withhold(owner: Owner) -> None:
    """Keep an owner's descriptors, and the event loop that runs now, from children that are forked from now on.

    Such a child finds a socket whose peer has hung up in place of each descriptor: the number stays taken, so that an
    object that is copied with the process, and closes it later, closes nothing of the child's own. Nothing is done to
    the event loop, which shares its epoll instance with ours; the child gets another one. Signals that the loop
    handled have their defaults.

    Ends with the owner, to which only a weak reference is kept.

    Sources: fork(2); epoll(7), question 6; dup2(2); `os.register_at_fork`.
    """
    _withheld.owners.add(owner)
    _hook()


def withheld(sock: socket.socket) -> socket.socket:
    """A socket that no owner tells of, kept from children as in `withhold`."""
    _withheld.sockets.add(sock)
    _hook()
    return sock


def _hook() -> None:
    if not _withheld.is_hooked:
        _withheld.is_hooked = True
        os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
    if (loop := asyncio._get_running_loop()) is not None:
        _withheld.loops.add(loop)


def has_forked() -> bool:
    """Whether a child may have duplicates of descriptors here, in spite of `withhold`.

    One that was forked in the middle of an accept or a close has; so has one that was given them.
    """
    return _withheld.has_forked


def _before() -> None:
    """Let signals to the child wait until its handlers are its own: before, they go to our wake-up descriptor."""
    _withheld.thread.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handled() - BLOCKED_FOR_EXEC)


def _in_parent() -> None:
    mask = _withheld.thread.__dict__.pop("mask", None)
    if mask is None or not mask >= BLOCKED_FOR_EXEC:
        _withheld.has_forked = True
    if mask is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _in_child() -> None:
    if signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= BLOCKED_FOR_EXEC:
        return
    _default_signals()
    _withhold_all()
    if (mask := _withheld.thread.__dict__.pop("mask", None)) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _withhold_all() -> None:
    descriptors = {sock.fileno() for sock in list(_withheld.sockets)}
    for owner in list(_withheld.owners):
        try:
            descriptors.update(owner.descriptors())
        except Exception:  # the others' are withheld all the same
            log.exception("descriptors of %r stay open in a forked child", owner)
    _put_away(descriptors - {-1})
    for loop in list(_withheld.loops):
        if not loop.is_closed():
            _leave(loop)
    _withheld.owners.clear()
    _withheld.sockets.clear()
    _withheld.loops.clear()
    _withheld.has_forked = False


def _default_signals() -> None:
    """Handlers of an event loop do nothing in a child but wake the parent's."""
    signal.set_wakeup_fd(-1)
    for number in _handled():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _handled() -> set[int]:
    """Signals that an event loop handles."""
    return {number for number in signal.valid_signals() if _is_of_event_loop(signal.getsignal(number))}


def _is_of_event_loop(handler: object) -> bool:
    if isinstance(handler, partial):  # asyncio.Runner's for SIGINT
        return isinstance(getattr(handler.func, "__self__", None), asyncio.Runner)
    return getattr(handler, "__module__", None) in {"asyncio.unix_events", "uvloop.loop"}


def _put_away(descriptors: set[int]) -> None:
    try:
        harmless, peer = socket.socketpair()
    except OSError:  # no number is left for what would take their place
        for fd in descriptors:
            with suppress(OSError):
                os.close(fd)
        return
    peer.close()
    with harmless:
        for fd in descriptors:
            with suppress(OSError):
                os.dup2(harmless.fileno(), fd, inheritable=False)


def _leave(loop: asyncio.AbstractEventLoop) -> None:
    """Whatever this child does to the loop must not change what the parent's waits for; and it must not run here."""
    poll = _poll_descriptor(loop)
    if poll >= 0:
        with suppress(OSError), select.epoll() as empty:
            os.dup2(empty.fileno(), poll, inheritable=False)
    with suppress(RuntimeError):  # in debug mode, if another thread has forked: then nobody comes back to it
        loop.call_soon(_end)


def _poll_descriptor(loop: asyncio.AbstractEventLoop) -> int:
    """The epoll instance of asyncio's or uvloop's loop, neither of which has a public name for it; -1 of another's."""
    if (backend := getattr(loop, "_get_backend_id", None)) is not None:
        return int(backend())
    selector = getattr(loop, "_selector", None)
    return int(selector.fileno()) if selector is not None else -1


def _end() -> None:
    """End a child that has come back into its parent's event loop: it would run the parent's tasks a second time.

    So do an exception and ``sys.exit()`` in a handler: they end handlers and tasks on their way out of the loop.
    """
    log.error(
        "a forked child, pid %d, has come back into its parent's event loop, and is ended; "
        "end it with os._exit(), or use multiprocessing",
        os.getpid(),
    )
    os._exit(1)
