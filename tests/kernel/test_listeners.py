"""Everything that listens here, and some of it is ours."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack

from hotport.kernel.listeners import read_listeners
from hotport.model.listening import Listening
from hotport.model.port import State


def test_every_kind_of_listener_is_found_with_its_process() -> None:
    with ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        unix = stack.enter_context(socket.socket(socket.AF_UNIX))
        name = f"hotport-test-{os.getpid()}"
        unix.bind("\0" + name)
        unix.listen(7)
        group = [stack.enter_context(socket.socket()) for _ in range(2)]
        port = 0
        for each in group:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("127.0.0.1", port))
            port = each.getsockname()[1]
            each.listen(9)
        tcp_port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
        listening = read_listeners().listening

    def found(protocol: str, place: str) -> Listening:
        (one,) = [one for one in listening if (one.protocol, one.place) == (protocol, place)]
        assert os.getpid() in {holder.pid for holder in one.holders}
        return one

    assert found("tcp", f"127.0.0.1:{tcp_port}").state == State.LISTEN
    assert found("udp", f"127.0.0.1:{udp_port}").state == State.BOUND
    assert found("unix", f"@{name}").backlog == 7
    assert (found("tcp", f"127.0.0.1:{port}").count, found("tcp", f"127.0.0.1:{port}").backlog) == (2, 9)
