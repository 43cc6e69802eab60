"""The listeners of several generations, and when each is closed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from hotport.address import parse_address
from hotport.errors import KernelError
from hotport.kernel.sockets import bind_listener, bound_address
from hotport.model.strategies import Strategy
from hotport.options import Options
from hotport.supervisor.listeners import Listeners

HERE = "tcp://127.0.0.1:0"


def options(*bind: str, guard: bool = False, command: tuple[str, ...] = ()) -> Options:
    return Options(target="app:app", bind=bind or (HERE,), guard=guard, command=command)


def first(*texts: str) -> Listeners:
    bound = {}
    for text in texts or (HERE,):
        address = parse_address(text)
        sock = bind_listener(address, backlog=16)
        bound[str(bound_address(address, sock))] = sock
    return Listeners({1: bound}, {1: texts or (HERE,)})


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    made = first()
    yield made
    made.close()


def call(listeners: Listeners, generation: int = 1) -> socket.socket:
    sock = next(iter(listeners.sockets(generation).values()))
    return socket.create_connection(sock.getsockname(), 5)


@pytest.mark.parametrize("strategy", [Strategy.INHERIT, Strategy.TRANSFER, Strategy.REBIND])
def test_listener_that_stays_is_the_same_one(listeners: Listeners, strategy: Strategy) -> None:
    plan = listeners.prepare(options(), strategy, 1)
    assert plan == listeners.of(1)
    listeners.discard(plan)
    with call(listeners):
        pass


def test_drops_at_closed_listeners_still_count(listeners: Listeners) -> None:
    (listener,) = listeners.of(1)
    assert listener.sock is not None
    listener.sock.listen(0)
    clients = [socket.socket() for _ in range(4)]
    for client in clients:
        client.setblocking(False)
        client.connect_ex(listener.sock.getsockname())
    count = listeners.dropped()
    assert count > 0
    listeners.add(2, [])
    for sock in (*listeners.keep([2], []), *clients):
        sock.close()
    assert listener.sock.fileno() == -1
    assert listeners.dropped() >= count


def test_listener_that_stays_may_be_named_by_where_it_is(listeners: Listeners) -> None:
    (address,) = listeners.sockets(1)
    assert listeners.prepare(options(address), Strategy.INHERIT, 1) == listeners.of(1)


def test_two_free_ports_stay_two() -> None:
    listeners = first(HERE, HERE)
    plan = listeners.prepare(options(HERE, HERE), Strategy.INHERIT, 1)
    assert plan == listeners.of(1)
    listeners.close()


def test_what_is_new_is_closed_when_it_is_not_wanted(listeners: Listeners) -> None:
    plan = listeners.prepare(options(HERE, "tcp://127.0.0.2:0"), Strategy.INHERIT, 1)
    listeners.discard(plan)
    assert [each.sock is not None and each.sock.fileno() >= 0 for each in plan] == [True, False]


def test_program_gets_what_is_new_as_it_got_what_it_has(listeners: Listeners) -> None:
    plan = listeners.prepare(options("tcp://127.0.0.2:0", command=("server",)), Strategy.INHERIT, 1)
    assert plan[0].sock is not None
    assert plan[0].sock.getblocking()
    listeners.add(2, plan)
    assert listeners.keep({1}, ()) == []  # closing it does not wait for a client


def test_socket_that_nobody_needs_is_closed_when_no_worker_holds_it_and_its_queue_is_given_back(
    listeners: Listeners,
) -> None:
    listeners.add(2, listeners.prepare(options(), Strategy.OVERLAP, 1))
    listeners.join(2, 16)
    listeners.join(2, 16)
    with call(listeners) as client:  # to the old one
        (old,) = listeners.sockets(1).values()
        assert listeners.keep({2}, {old}) == []
        assert old.fileno() >= 0
        (accepted,) = listeners.keep({2}, ())
        assert old.fileno() == -1
        with accepted:
            assert accepted.getpeername() == client.getsockname()
    with call(listeners, 2):
        pass


def test_overlap_is_steered_to_and_fro(listeners: Listeners) -> None:
    listeners.add(2, listeners.prepare(options(), Strategy.OVERLAP, 1))
    listeners.join(2, 16)
    ours = {number: next(iter(listeners.sockets(number).values())) for number in (1, 2)}
    for index, number in ((1, 2), (0, 1)):
        listeners.steer(2, index)
        with call(listeners):
            ours[number].accept()[0].close()
    listeners.keep({1}, ())
    with call(listeners):
        ours[1].accept()[0].close()


def test_rebind_takes_the_queue_first_and_listens_again_at_once(listeners: Listeners) -> None:
    listeners.add(2, listeners.prepare(options(), Strategy.REBIND, 1))
    with call(listeners):
        result = listeners.rebind(1, 2, 16)
        assert (len(result.accepted), result.reset, result.why) == (1, 0, "")
        assert result.gap_s > 0
        result.accepted[0].close()
    assert listeners.sockets(1) == listeners.sockets(2)
    with call(listeners):
        pass


def test_address_that_somebody_has_is_lost_until_it_is_free(listeners: Listeners) -> None:
    listeners.add(2, listeners.prepare(options(), Strategy.REBIND, 1))
    ((address, sock),) = listeners.sockets(1).items()
    thief = sock.dup()  # it listens for as long as this is open
    result = listeners.rebind(1, 2, 16)
    assert result.why.startswith(f"{address}: ")
    assert listeners.lost.keys() == {address}
    assert listeners.sockets(1) == {}
    assert listeners.regain(options()).startswith(f"{address}: ")
    thief.close()
    assert listeners.regain(options()) == ""
    assert listeners.lost == {}
    with call(listeners, 2):
        pass


def test_guard_outlives_the_listener_and_ends_with_its_address(listeners: Listeners) -> None:
    listeners.guard(options(guard=True))
    listeners.add(2, listeners.prepare(options("tcp://127.0.0.2:0", guard=True), Strategy.INHERIT, 1))
    (address,) = listeners.sockets(1)
    listeners.keep({1, 2}, ())
    with pytest.raises(KernelError):
        bind_listener(parse_address(address), backlog=16)
    listeners.keep({2}, ())
    bind_listener(parse_address(address), backlog=16).close()


def test_socket_file_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    listeners = first(f"unix:{path}", HERE)
    listeners.add(2, listeners.prepare(options(), Strategy.INHERIT, 1))
    listeners.keep({2}, ())
    assert not path.exists()
    listeners.close()


def test_socket_file_that_somebody_has_removed_is_no_concern(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bind_listener(parse_address(f"unix:{path}"), backlog=16) as sock:
        path.unlink()
        listeners = Listeners({1: {f"unix:{path}": sock}}, {})
        assert [each.asked for each in listeners.of(1)] == [f"unix:{path}"]
        listeners.close()


@pytest.mark.parametrize("strategy", [Strategy.INHERIT, Strategy.TRANSFER])
def test_restart_binds_a_socket_file_again_that_somebody_has_removed(tmp_path: Path, strategy: Strategy) -> None:
    """The restart was done, and the new generation listened where nobody could find it."""
    text = f"unix:{tmp_path / 'a.sock'}"
    listeners = first(text)
    (old,) = listeners.sockets(1).values()
    (tmp_path / "a.sock").unlink()
    assert listeners.gone == {text: ""}
    plan = listeners.prepare(options(text), strategy, 1)
    listeners.discard(plan)
    assert not (tmp_path / "a.sock").exists()
    listeners.add(2, listeners.prepare(options(text), strategy, 1))
    assert listeners.keep({2}, ()) == []
    assert old.fileno() == -1
    assert listeners.gone == {}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "a.sock"))
    listeners.close()
    assert not (tmp_path / "a.sock").exists()


@pytest.mark.parametrize("passed", ["systemd:web", "fd://3"])
def test_socket_file_of_a_service_manager_is_its_own_to_keep(tmp_path: Path, passed: str) -> None:
    path = tmp_path / "a.sock"
    text = f"unix:{path}"
    with bind_listener(parse_address(text), backlog=16) as sock:
        listeners = Listeners({1: {text: sock}}, {1: (passed,)})
        assert listeners.gone == {}
        path.rename(tmp_path / "b.sock")
        assert listeners.remake(options(text)) == []
        assert listeners.gone.keys() == {text}
        assert "systemctl restart its socket unit" in listeners.gone[text]
        (tmp_path / "b.sock").rename(path)
        assert listeners.gone == {}
        listeners.close()
    assert path.exists()
    path.unlink()


def test_socket_file_of_a_service_manager_may_lie_where_we_cannot_see_it(tmp_path: Path) -> None:
    path = tmp_path / "a.sock"
    with bind_listener(parse_address(f"unix:{path}"), backlog=16) as sock:
        path.unlink()
        listeners = Listeners({1: {f"unix:{path}": sock}}, {1: ("systemd:web",)})
        assert listeners.gone == {}
        listeners.close()


def test_socket_file_that_another_supervisor_may_have_made_again_is_not_missed(tmp_path: Path) -> None:
    listeners = first(f"unix:{tmp_path / 'a.sock'}")
    listeners.share_files(listeners.sockets(1))
    (tmp_path / "a.sock").unlink()
    assert listeners.gone == {}
    listeners.close()


def test_worker_that_holds_a_listener_is_found(listeners: Listeners) -> None:
    assert listeners.lingering({7: os.getpid()}, 1) == (7,)
    assert listeners.lingering({}, 1) == ()
    listeners.add(2, listeners.prepare(options("tcp://127.0.0.2:0"), Strategy.REBIND, 1))
    assert listeners.lingering({7: os.getpid()}, 1, 2) == ()  # what is dropped may stay open


def test_status_is_told_while_the_service_stops(listeners: Listeners) -> None:
    """``hotport status`` and health checks had no answer as soon as the listeners were closed."""
    listeners.close()
    assert listeners.lingering({7: os.getpid()}, 1) == ()
