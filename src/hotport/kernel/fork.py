"""Keep descriptors, signal handlers and the event loop from children that the application forks.

fork(2) gives a child duplicates of everything. A connection that a child has open, too, does not end for its client
when we close it; a listener goes on listening; a signal to the child wakes our event loop, whose wake-up descriptor the
child has.

A program that is executed gets nothing of this: descriptors are close-on-exec, and handlers do not survive. So a child
that is about to execute one is left alone. It is recognised by its blocked signals: `hotport.kernel.spawn` and libuv
block all of them during the fork. `subprocess` runs no Python code in the child.
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

#: Blocked in a child only if it is about to execute a program: servers have no use for these signals.
BLOCKED_FOR_EXEC: Final = frozenset({signal.SIGURG, signal.SIGWINCH, signal.SIGIO})


class Owner(Protocol):
    """An owner of descriptors that a forked child must not keep."""

    def descriptors(self) -> Iterable[int]:
        """List those that are open now; -1 is ignored. Called in the child; must not wait or close anything."""


class _Withheld:
    """State of the fork hooks of this process; hooks cannot be removed, so one serves all owners."""

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
    """Keep an owner's descriptors, and the running event loop, from children forked from now on.

    In the child, a socket whose peer has hung up takes the place of each descriptor. The number stays in use: an object
    that was copied with the process may close it later, and must not close something of the child's own. Transports are
    not closed, since that would change the epoll instance that the child's copy of the loop shares with ours; the copy
    gets another one. Signals that the loop handled get their default handlers.

    Only a weak reference to the owner is kept.

    Sources: fork(2); epoll(7), question 6; dup2(2); `os.register_at_fork`.
    """
    _withheld.owners.add(owner)
    _hook()


def withheld(sock: socket.socket) -> socket.socket:
    """Withhold a socket that has no owner; returns the socket."""
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
    """Whether a child may have duplicates of our connections in spite of `withhold`.

    A child has if it was forked by another thread in the middle of an accept or a close, or if it was given duplicates.
    """
    return _withheld.has_forked


def _before() -> None:
    """Block signals to the child until its handlers are reset: until then they reach our wake-up descriptor."""
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
        except Exception:  # withhold those of the other owners all the same
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
    """Reset what an event loop handles: in a child its handlers do nothing but wake the parent's loop."""
    signal.set_wakeup_fd(-1)
    for number in _handled():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _handled() -> set[int]:
    """Return the signals that an event loop handles."""
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
    """Give the child's copy of the loop an epoll instance of its own, and end the child if it runs that copy."""
    poll = _poll_descriptor(loop)
    if poll >= 0:
        with suppress(OSError), select.epoll() as empty:
            os.dup2(empty.fileno(), poll, inheritable=False)
    with suppress(RuntimeError):  # in debug mode, if another thread has forked: the child cannot come back to it
        loop.call_soon(_end)


def _poll_descriptor(loop: asyncio.AbstractEventLoop) -> int:
    """The epoll instance of asyncio's or uvloop's loop, neither of which has a public name for it; -1 of another's."""
    if (backend := getattr(loop, "_get_backend_id", None)) is not None:
        return int(backend())
    selector = getattr(loop, "_selector", None)
    return int(selector.fileno()) if selector is not None else -1


def _end() -> None:
    """End a child that has returned into its parent's event loop, where it would run the parent's tasks again.

    An exception and ``sys.exit()`` in a handler come back, too: the loop cancels its tasks before it lets them out.
    """
    log.error(
        "a forked child, pid %d, has come back into its parent's event loop, and is ended; "
        "end it with os._exit(), or use multiprocessing",
        os.getpid(),
    )
    os._exit(1)
