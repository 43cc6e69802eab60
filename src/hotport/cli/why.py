"""``hotport why``."""

from __future__ import annotations

import os
import select
import shutil
import sys
from contextlib import ExitStack, suppress

import click

from hotport.address import TcpAddress, UdpAddress, UnixAddress, parse_address
from hotport.cli import HELP, is_terminal
from hotport.diagnose.diagnosis import Diagnosis, Subject, diagnose
from hotport.errors import ConfigError, ExitCode
from hotport.kernel.port import ourselves
from hotport.kernel.procfs import user_name
from hotport.model.bind import Can
from hotport.model.port import Asker, Port

__all__ = ["command"]

#: 0 is free; 2 is usage, as everywhere.
EXIT_CODES = {Can.YES: ExitCode.DONE, Can.NO: 1, Can.UNKNOWN: 3}

#: The last of 32 bits means nobody at all (chown(2)).
UID_END = 0xFFFFFFFF

#: Seconds between two looks of --watch, if nothing happens before.
TICK_S = 1.0


@click.command("why", context_settings=HELP)
@click.argument("address", required=False)
@click.option("--user", help="Whether this user could bind, instead of you; a name or a number.")
@click.option("--watch", is_flag=True, help="Stay until the address is free, with the reason and the time left.")
@click.option(
    "--probe",
    is_flag=True,
    help="Really bind, for a moment, with each choice of options; never listens. Without it nothing is bound.",
)
@click.option("--explain", "topic", metavar="STATE", help="What a state, option or error means: TIME_WAIT, BUSY, ...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--free",
    "wants_free",
    is_flag=True,
    help="Make the address free: show the steps, ask, and take them one by one until it is. Binds nothing.",
)
@click.option("--yes", is_flag=True, help="With --free: do not ask.")
def command(
    address: str | None,
    user: str | None,
    watch: bool,
    probe: bool,
    topic: str | None,
    as_json: bool,
    wants_free: bool,
    yes: bool,
) -> int:
    """Explain ADDRESS: what holds it, until when, and what to do.

    Whether a server could bind to it, with which options, and by which rule not. ADDRESS is like 8000,
    :8000, 127.0.0.1:8000, [::1]:8000, udp://:5353 or unix:run/app.sock. Nothing is bound and nothing is sent.
    Without ADDRESS: a table of everything that listens here, and what is odd about it.

    Exits with 0 if a server could start there (it sets SO_REUSEADDR on TCP, as servers do), with 1 if not, with 3 if
    that depends on what cannot be read.
    """
    if topic is not None:
        from hotport.diagnose.explain import explain

        _say(explain(topic))
        return ExitCode.DONE
    if address is None:
        if user is not None or watch or probe or wants_free:
            raise click.UsageError("Give an ADDRESS; without one, only --json is possible.")
        _require_linux()
        return _list(as_json=as_json)
    if yes and not wants_free:
        raise click.UsageError("--yes belongs to --free.")
    if wants_free and (watch or probe or user is not None):
        raise click.UsageError("--free waits by itself, binds nothing, and acts as you: no --watch, --probe, --user.")
    if wants_free and not yes and not is_terminal(sys.stdin):
        raise click.UsageError("--free asks before it ends anything, and there is no terminal: give --yes.")
    if user is not None and probe:
        raise click.UsageError("--probe binds as you; it cannot try for another --user.")
    if watch and probe:
        raise click.UsageError("--watch looks every second, and a bind each time would hold up the port: no --probe.")
    _require_linux()
    subject = _subject(address)
    if isinstance(subject, UnixAddress) and (user is not None or probe):
        raise click.UsageError("--user and --probe are about ports; permissions of a unix socket are judged for you.")
    asker = _asker(user)
    diagnosis = diagnose(subject, asker, probe=probe)
    if wants_free:
        diagnosis = _free(subject, asker, diagnosis, yes=yes)
    if watch:
        return _watch(subject, asker, diagnosis, as_json=as_json)
    _show(diagnosis, as_json=as_json)
    is_asked = not (as_json or probe or wants_free or user is not None)
    if diagnosis.free == Can.UNKNOWN and is_asked and isinstance(diagnosis.facts, Port) and _wants_probe():
        diagnosis = diagnose(subject, asker, probe=True)
        _show(diagnosis, as_json=False)
    return EXIT_CODES[diagnosis.free]


def _wants_probe() -> bool:
    """Offer at a terminal to ask the kernel for what cannot be read."""
    if not (is_terminal(sys.stdin) and is_terminal(sys.stdout) and is_terminal(sys.stderr)):
        return False
    click.echo("\np: bind for a moment, which tells; any other key: leave it at that ", nl=False, err=True)
    try:
        key = click.getchar()
    except (KeyboardInterrupt, EOFError):
        key = ""
    click.echo(err=True)
    return key == "p"


def _require_linux() -> None:
    if sys.platform != "linux":
        raise ConfigError(
            "HP131",
            "cannot explain a port here",
            cause=f"it reads tables of the Linux kernel, and this is {sys.platform}",
            fix="netstat -an",
            note="the documentation of bind() on this system has its rules",
        )


def _subject(text: str) -> Subject:
    try:
        address = parse_address(f":{text}" if text.isascii() and text.isdigit() else text)
    except ConfigError as error:
        error.fix = error.fix.replace("--bind ", "hotport why ")
        error.note = error.note.replace("--bind ", "hotport why ")
        raise
    if isinstance(address, UnixAddress):
        return address
    if not isinstance(address, TcpAddress | UdpAddress):
        cause, fix = "it is a socket that another process passes on, and not a port", "hotport why :8000"
    elif address.port == 0:
        cause, fix = "port 0 stands for any port that is free: a bind to it finds one", "hotport why :8000"
    else:
        return address
    raise ConfigError("HP132", f"there is nothing to explain about {address}", cause=cause, fix=fix)


def _asker(user: str | None) -> Asker:
    if user is None:
        return ourselves()
    import pwd

    try:
        uid = int(user) if user.isascii() and user.isdigit() else pwd.getpwnam(user).pw_uid
        if uid >= UID_END:
            raise KeyError
    except KeyError:
        cause = "this machine knows no user of that name"
        raise ConfigError("HP133", f"there is no user {user!r}", cause=cause, fix="getent passwd") from None
    return Asker(uid, user_name(uid), may_bind_low=uid == 0)


def _show(diagnosis: Diagnosis, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        value = msgspec.to_builtins(diagnosis, enc_hook=str)
        for answer in value["answers"].values():
            del answer["blockers"]  # they are among the facts
        _say(msgspec.json.format(msgspec.json.encode(value)).decode())
        return
    from hotport.diagnose.page import page

    is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb" or not is_terminal(sys.stdout)
    columns = shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 120
    _say(page(diagnosis, columns=columns, paint=lambda text, colour: text if is_plain else click.style(text, colour)))


def _say(text: str) -> None:
    """Write like `hotport.cli.output.write`, without rich, which takes a third of the whole time to load."""
    try:
        click.echo(text)
    except BrokenPipeError:  # the exit code tells all the same
        from hotport.cli.output import swallow

        swallow(sys.stdout)


def _list(*, as_json: bool) -> int:
    from hotport.diagnose.table import table
    from hotport.kernel.listeners import read_listeners

    found = read_listeners()
    if as_json:
        import msgspec

        value = msgspec.to_builtins(found._asdict(), enc_hook=str)
        _say(msgspec.json.format(msgspec.json.encode(value)).decode())
    else:
        _say(table(found, columns=shutil.get_terminal_size().columns if is_terminal(sys.stdout) else 120))
    return ExitCode.DONE


def _free(subject: Subject, asker: Asker, diagnosis: Diagnosis, *, yes: bool) -> Diagnosis:
    from hotport.diagnose.free import Step, free

    def agrees(steps: tuple[Step, ...]) -> bool:
        answer = diagnosis.answers[diagnosis.usual]
        click.echo(f"{diagnosis.address}: {answer.who or answer.rule}", err=True)
        click.echo("Steps, one after the other until it is free:", err=True)
        for number, step in enumerate(steps, 1):
            click.echo(f"  {number}. {step.text} (at most {step.timeout_s:.0f} s)", err=True)
        return yes or click.confirm("Take them?", err=True)

    return free(diagnosis, lambda: diagnose(subject, asker), agrees=agrees)


def _watch(subject: Subject, asker: Asker, diagnosis: Diagnosis, *, as_json: bool) -> int:
    """Look again whenever a holder ends, and every second."""
    last = ""
    try:
        while diagnosis.free != Can.YES:
            answer = diagnosis.answers[diagnosis.usual]
            line = f"{answer.because}; {answer.until}" if answer.until else answer.because
            if is_terminal(sys.stderr):
                columns = shutil.get_terminal_size().columns
                click.echo(f"\r\x1b[K{line[: columns - 1]}", nl=False, err=True)
            elif line.rstrip("0123456789 s") != last:  # not for each second that has passed
                click.echo(line, err=True)
                last = line.rstrip("0123456789 s")
            _wait(diagnosis)
            diagnosis = diagnose(subject, asker)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    finally:
        if is_terminal(sys.stderr):
            click.echo("\r\x1b[K", nl=False, err=True)
    _show(diagnosis, as_json=as_json)
    return ExitCode.DONE


def _wait(diagnosis: Diagnosis) -> None:
    """Wait until the last TIME_WAIT ends, a blocking process ends, or a second has passed."""
    answer = diagnosis.answers[diagnosis.usual]
    pids = {holder.pid for old in answer.blockers for holder in old.holders}
    if not isinstance(diagnosis.facts, Port):
        pids = {holder.pid for holder in diagnosis.facts.holders}
    with ExitStack() as stack:
        ended = select.poll()
        for pid in pids:
            with suppress(OSError):
                pidfd = os.pidfd_open(pid)
                stack.callback(os.close, pidfd)
                ended.register(pidfd, select.POLLIN)
        ended.poll(min(TICK_S, answer.ends_in_s or TICK_S) * 1000)
