"""Read and judge one address, and try it if asked to."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from msgspec.structs import replace

from hotport.address import TcpAddress, UdpAddress, UnixAddress
from hotport.diagnose.risks import risks_of
from hotport.kernel.port import read_name, read_port
from hotport.kernel.resolve import resolve
from hotport.model.bind import CHOICES, Answer, Can, blame, judge, judge_name, remedies, remedies_of_name, usual
from hotport.model.port import Asker, Local, Port, ReuseOptions, UnixName
from hotport.model.process import Process

__all__ = ["Diagnosis", "Subject", "diagnose", "holders_of"]

Subject: TypeAlias = TcpAddress | UdpAddress | UnixAddress


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything known about an address.

    Attributes:
        free: The answer for the options that servers usually set: SO_REUSEADDR on TCP, none elsewhere.
        usual: The name of that choice in `answers`.
        answers: By the names in `hotport.model.bind.CHOICES`; of AF_UNIX only ``none``, as options change nothing.
        remedies: What to do, the most promising first; empty if it is free.
        facts: What was read.
        is_probed: The answers are the kernel's own, by a bind.
    """

    address: str
    asker: Asker
    free: Can
    usual: str
    answers: dict[str, Answer]
    remedies: tuple[str, ...]
    risks: tuple[str, ...]
    facts: Port | UnixName
    is_probed: bool = False


def diagnose(address: Subject, asker: Asker, *, probe: bool = False) -> Diagnosis:
    """Read an address and judge it; without a bind and without a packet, unless it is to be probed.

    Args:
        probe: Bind with each choice of options, as ourselves, and let go at once; never listens. On a port with many
            connections in TIME_WAIT that holds up new connections for milliseconds.

    Raises:
        ConfigError: If the host is unknown (HP102).
        KernelError: If netlink is not to be had (HP130).
    """
    if isinstance(address, UnixAddress):
        return _diagnose_name(address, asker)
    kind = socket.SOCK_STREAM if isinstance(address, TcpAddress) else socket.SOCK_DGRAM
    family, _, sockaddr = resolve(address, kind)
    port = read_port(address, sockaddr)
    answers = {name: judge(port, asker, options) for name, options in CHOICES.items()}
    if probe:
        for name, options in CHOICES.items():
            number = _bind(family, kind, sockaddr, options)
            answers[name] = _told(answers[name], blame(port, asker, options), number)
    common = next(name for name, options in CHOICES.items() if options == usual(port))
    answer = answers[common]
    todo = () if answer.can == Can.YES else tuple(remedies(port, answer))
    risks = *_dual_stack(port, asker, answer), *risks_of(port)
    return Diagnosis(str(address), asker, answer.can, common, answers, todo, risks, port, is_probed=probe)


def holders_of(diagnosis: Diagnosis) -> list[Process]:
    """The processes that are in the way of the usual options, as far as they are known; each once."""
    if isinstance(diagnosis.facts, UnixName):
        return list(diagnosis.facts.holders)
    blockers = diagnosis.answers[diagnosis.usual].blockers
    return list({holder.pid: holder for old in blockers for holder in old.holders}.values())


def _dual_stack(port: Port, asker: Asker, answer: Answer) -> Iterator[str]:
    """Judge the address for a dual-stack server, which takes IPv4 on its IPv6 socket."""
    if port.local.host.version == 6 and port.local.host.is_unspecified:
        dual = judge(replace(port, local=Local(port.local.host, v6only=False)), asker, usual(port))
        if dual.can != answer.can:
            yield (
                "this is said of a socket that is IPv6 only (IPV6_V6ONLY), as hotport's are; for one that takes IPv4 "
                f"as well (dual stack) it is {dual.can}: {dual.because}"
            )


def _diagnose_name(address: UnixAddress, asker: Asker) -> Diagnosis:
    name = read_name(address)
    answer = judge_name(name)
    todo = tuple(remedies_of_name(name, answer))
    return Diagnosis(str(address), asker, answer.can, "none", {"none": answer}, todo, (), name)


def _bind(family: int, kind: int, sockaddr: tuple[Any, ...], options: ReuseOptions) -> int:
    """The errno of a bind; 0 if it works."""
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, options.reuse_address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, options.reuse_port)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            sock.bind(sockaddr)
        except OSError as error:
            return error.errno or errno.EINVAL
    return 0


def _told(answer: Answer, blamed: Answer, number: int) -> Answer:
    """Correct an answer by the kernel's own."""
    if not number:
        return answer if answer.can == Can.YES else Answer(Can.YES, "a bind has just worked")
    name = errno.errorcode.get(number, str(number))
    if blamed.can == Can.NO:
        return replace(blamed, error=name)
    return Answer(Can.NO, "a bind was just refused, and the kernel does not show who is in the way", error=name)
