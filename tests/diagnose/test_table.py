from __future__ import annotations

from ipaddress import ip_address

from hotport.diagnose.table import table
from hotport.kernel.listeners import Found
from hotport.model.listening import Listening
from hotport.model.port import Local, State
from hotport.model.process import Container, Origin, Process

HERE = Local(ip_address("127.0.0.1"))
NGINX = Process(
    7, "nginx: master process /usr/sbin/nginx -g daemon off;", "www", "nginx.service", origin=Origin(age_s=7200)
)


def test_table_has_a_row_each_and_what_is_odd_below() -> None:
    contained = Process(9, "docker-proxy", "root", origin=Origin(container=Container("docker", "shop")))
    found = Found(
        (
            Listening("unix", "@x", user="eve", unit="x.service"),
            Listening("udp", "127.0.0.1:53", HERE, 53, State.BOUND, holders=(contained,), queue=212),
            Listening("tcp", "127.0.0.1:8000", HERE, 8000, State.BOUND, holders=(contained,)),
            Listening("tcp", "127.0.0.1:80", HERE, 80, count=2, holders=(NGINX, contained), backlog=511, odd=("fire",)),
        ),
        ("half of it",),
    )
    lines = table(found, columns=60).splitlines()
    assert lines[0].split() == ["ADDRESS", "PROGRAM", "PID", "USER", "UNIT", "AGE", "QUEUE"]
    assert [line.split()[0] for line in lines[1:6]] == [
        "tcp://127.0.0.1:80", "!", "tcp://127.0.0.1:8000", "udp://127.0.0.1:53", "unix:@x",
    ]  # fmt: skip
    assert "x2" in lines[1]
    assert "7 +1" in lines[1]
    assert "nginx: master process /usr/sbin..." in lines[1]
    assert "nginx.service" in lines[1]
    assert "2 h" in lines[1]
    assert "0 of 511" in lines[1]
    assert "(bound)" in lines[3]
    assert "container shop" in lines[4]
    assert lines[4].endswith("212")
    assert "(not permitted)" in lines[5]
    assert "x.service" in lines[5]
    assert lines[-1] == "not read: half of it"
