"""How processes are named, and how they are ended."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from hotport.model.process import Container, Origin, Process, age, container_in, ending

ID = "0123456789ab" + "c" * 52
NGINX = Process(7, "nginx: master", "www")


def test_process_is_named_with_what_is_known_of_it() -> None:
    assert str(Process(7, "nginx", "www")) == "pid 7 (nginx, user www)"
    whole = Process(7, "python -m hotport.worker x", "www", "web.service", 3)
    assert str(whole) == "pid 7 (python -m hotport.worker x, user www, web.service, hotport generation 3)"
    contained = replace(NGINX, unit=f"docker-{ID}.scope", origin=Origin(container=Container("docker", "shop")))
    assert str(contained) == "pid 7 (nginx: master, user www, container shop)"


@pytest.mark.parametrize(
    ("holders", "texts"),
    [
        ([replace(NGINX, stop="hotport stop web")], ("hotport stop web",)),
        ([Process(7, "hotport serve app:app", "www")], ("kill 7",)),
        ([NGINX, replace(NGINX, pid=8)], ("kill 7 8",)),
        (
            [replace(NGINX, stop="systemctl stop a.service"), Process(9, "sleep", "www")],
            ("systemctl stop a.service && kill 9",),
        ),
        ([replace(NGINX, stop="docker stop x"), replace(NGINX, pid=8, stop="docker stop x")], ("docker stop x",)),
        ([], ()),
    ],
)
def test_manager_is_asked_to_stop_what_it_would_start_again_and_others_are_killed(
    holders: list[Process], texts: tuple[str, ...]
) -> None:
    assert ending(holders).texts == texts


@pytest.mark.parametrize("stop", ["", "hotport stop web"])
def test_suspended_process_is_told_to_go_on_before_it_can_end(stop: str) -> None:
    """``kill`` alone does nothing to it."""
    process = Process(7, "nginx", "www", stop=stop, is_suspended=True, origin=Origin(terminal="pts/3"))
    assert str(process) == "pid 7 (nginx, user www, suspended)"
    first, going_on, at_once = ending([process]).texts
    assert first.startswith("kill 7 && kill -CONT 7  #")
    assert going_on.startswith("kill -CONT 7  #")
    assert going_on.endswith("fg in the shell that started it at pts/3")
    assert at_once.startswith("kill -KILL 7  #")


def test_manager_ends_a_suspended_process_by_itself() -> None:
    suspended = replace(NGINX, stop="systemctl stop a.service", is_suspended=True)
    assert ending([suspended]).texts == ("systemctl stop a.service",)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        (f"/system.slice/docker-{ID}.scope", Container("docker", ID[:12])),
        (f"/docker/{ID}", Container("docker", ID[:12])),
        (f"/docker/{'f' * 64}/docker/{ID}", Container("docker", ID[:12])),
        (f"/machine.slice/libpod-{ID}.scope/container", Container("podman", ID[:12])),
        (f"/machine.slice/libpod-conmon-{ID}.scope", None),
        (f"/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope", Container("crictl", ID[:12])),
        (f"/kubepods/besteffort/pod1/{ID}", Container("crictl", ID[:12])),
        ("/system.slice/web.service", None),
        ("", None),
    ],
)
def test_container_is_found_in_a_control_group(path: str, found: Container | None) -> None:
    assert container_in(path) == found


def test_origin_is_told_in_a_line() -> None:
    shell = Origin(("bash (pid 5)", "code (pid 4)"), "pts/3", 7200.0, deleted=("program file",))
    assert str(shell) == ("2 h ago by bash (pid 5) in code (pid 4) at pts/3 (program file deleted or replaced since)")
    proxy = Origin(("a", "b", "c", "d", "e"), container=Container("docker", "shop"), forwards="172.17.0.2:80")
    assert str(proxy) == "by a in b in c in d in ... to forward to 172.17.0.2:80 for container shop"
    assert str(Origin(is_left=True, container=Container("podman", "x"))) == (
        "by a process that has ended (left behind) in container x"
    )
    assert str(Origin()) == ""


def test_ages_are_written_in_their_largest_unit() -> None:
    assert [age(seconds) for seconds in (5, 60, 3 * 3600, 9 * 86_400)] == ["5 s", "1 min", "3 h", "9 d"]
