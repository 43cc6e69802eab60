"""``hotport churn``."""

from __future__ import annotations

import math
import os
import random
import re
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import click
import msgspec

from hotport.churn.certainty import attempts_to_prove, percent
from hotport.churn.fates import LOSSES, ConnectionEvent, Fate, Kind
from hotport.churn.gates import Gates, Limit
from hotport.churn.plan import Plan
from hotport.churn.restarts import AskHotport, How, Restarts, RunCommand, SendSignal
from hotport.churn.result import Load
from hotport.churn.run import Experiment, attempts_a_second, default_engines, descriptors_needed
from hotport.churn.target import BY_RATE, default_path, fitting, resolve
from hotport.cli import HELP
from hotport.cli._reportfile import ReportFile
from hotport.cli._screen import perform, print_result
from hotport.cli.client import find_service
from hotport.cli.output import console
from hotport.errors import ConfigError, ExitCode, nearest
from hotport.kernel.process import raise_descriptor_limit
from hotport.options.values import format_duration, parse_duration

__all__ = ["check_descriptors", "command"]

DURATION_S: Final = 10.0

#: Load after the last restart is over, so that what it left behind is seen.
SETTLE_S: Final = 2.0

#: Held connections ask less often than their thinking time allows for, by the time of the answers.
PROOF_MARGIN: Final = 1.2

#: With no kind given. Kinds that need an application made for them (`slow`, `upload`) are not among them.
USUAL: Final[Mapping[Kind, float]] = {
    Kind.CONNECT: 50,
    Kind.KEEPALIVE: 20,
    Kind.LATE: 5,
    Kind.HALFHEAD: 5,
    Kind.TLS: 10,
    Kind.STREAM: 20,
    Kind.DATAGRAM: 100,
}
USUAL_WEBSOCKETS: Final = 20

_HELP_OF_KINDS: Final[Mapping[Kind, str]] = {
    Kind.CONNECT: "Requests, each on a new connection.",
    Kind.KEEPALIVE: "Connections with one request after the other.",
    Kind.LATE: "Connections that say nothing for --slow-time, then ask.",
    Kind.HALFHEAD: "Requests whose head comes in two parts, --slow-time between them.",
    Kind.SLOW: "Requests for --slow-path, whose answer takes its time.",
    Kind.UPLOAD: "Requests to --upload-path whose body takes --slow-time.",
    Kind.WEBSOCKET: "WebSockets with numbered messages, which the server must echo.",
    Kind.STREAM: "TCP connections with numbered lines, which the server must echo.",
    Kind.DATAGRAM: "Numbered datagrams, which the server must echo.",
    Kind.TLS: "TLS handshakes, each with a request.",
}

_RATE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)/(s|m|h)")
_PER_S: Final = {"s": 1, "m": 60, "h": 3600}
_FATES: Final = tuple(what.value for what in (*Fate, *ConnectionEvent))


class _Given(NamedTuple):
    """A value as it was typed, and after which flag."""

    flag: str
    text: str


class _Text(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """Text that `read` makes a value of, or raises an error about."""

    def __init__(self, name: str, read: Callable[[_Given], Any]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self._read(_Given(param.opts[0] if param else self.name, value)) if isinstance(value, str) else value


def _error(code: str, given: _Given, cause: str, example: str) -> ConfigError:
    return ConfigError(code, f"{given.flag} cannot be {given.text!r}", cause=cause, fix=f"{given.flag} {example}")


def _rate(given: _Given) -> float:
    part = _RATE.fullmatch(given.text)
    if part is None or not float(part[1]):
        raise _error("HP705", given, "a rate is a number of attempts and a unit: 200/s, 90/m", "20/s")
    return float(part[1]) / _PER_S[part[2]]


def _number(given: _Given) -> int:
    if not re.fullmatch("[0-9]{1,7}", given.text) or not int(given.text):
        raise _error("HP705", given, "it is held open, so it is asked for by number and not by rate", "50")
    return int(given.text)


def _time(given: _Given) -> float:
    try:
        return parse_duration(given.text)
    except ValueError as error:
        raise _error("HP706", given, str(error), "10s") from None


def _signal(given: _Given) -> signal.Signals:
    try:
        return signal.Signals[f"SIG{given.text.upper().removeprefix('SIG')}"]
    except KeyError:
        cause = "there is no signal of this name; HUP, USR1 and USR2 are usual"
        raise _error("HP706", given, cause, "HUP") from None


def _allowed(given: _Given) -> dict[str, int | None]:
    """``refused=3, idle close=*``."""
    example = "'refused=3,timed out=*'"
    plain = {re.sub("[-_ ]", "", fate): fate for fate in _FATES}
    found: dict[str, int | None] = {}
    for part in given.text.split(","):
        name, equals, number = (piece.strip() for piece in part.partition("="))
        key = re.sub("[-_ ]", "", name.lower())
        if key not in plain:
            near = nearest(key, plain)
            known = f"did you mean {plain[near]!r}?" if near else f"fates are {', '.join(f.value for f in LOSSES)}"
            raise _error("HP707", given, f"there is no fate {name!r}; {known}", example)
        if not equals or not re.fullmatch(r"[0-9]{1,9}|\*", number):
            raise _error("HP707", given, f"{name!r} needs a number, or * for any number", example)
        found[plain[key]] = None if number == "*" else int(number)
    return found


def _limit(given: _Given) -> Limit:
    """``50ms``, or ``3x``: times the undisturbed value."""
    if part := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)x", given.text):
        if float(part[1]):
            return Limit(times=float(part[1]))
        raise _error("HP706", given, "nothing is 0 times as long as undisturbed", "3x")
    try:
        if (ms := parse_duration(given.text) * 1000) > 0:
            return Limit(ms=ms)
        cause = "a limit is above 0"
    except ValueError as error:
        cause = f"{error}; or times the undisturbed value: 3x"
    raise _error("HP706", given, cause, "50ms")


def _share(given: _Given) -> float:
    """``0.01%``."""
    part = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]{1,6})?) ?%", given.text)
    if part is None or not float(part[1]):
        raise _error("HP706", given, "a share of attempts is a percentage above 0 and below 100", "0.01%")
    return float(part[1]) / 100


RATE: Final = _Text("RATE", _rate)
LIMIT: Final = _Text("LIMIT", _limit)
SHARE: Final = _Text("PERCENT", _share)
NUMBER: Final = _Text("N", _number)
TIME: Final = _Text("TIME", _time)
SIGNAL: Final = _Text("SIGNAL", _signal)
ALLOWED: Final = _Text("FATES", _allowed)
FILE: Final = click.Path(path_type=Path, allow_dash=True)


class _Churn(click.Command):
    """Takes ``compare`` in the place of a URL for another command."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["compare"]:
            from hotport.cli._compare import command as compare

            return compare.make_context(f"{info_name} compare", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command(
    "churn", cls=_Churn, short_help="Restart a server under load, and say what each client met.", context_settings=HELP
)
@click.argument("url")
@click.option("--restart", "restart_command", metavar="CMD", help="Restart with this command, run by the shell.")
@click.option("--hotport", "service", metavar="NAME", help="Restart this service of hotport's.")
@click.option("--signal", "signum", type=SIGNAL, help="Restart by a signal, to --pid or the pid in --pid-file.")
@click.option("--pid", type=click.IntRange(2), help="For --signal.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="For --signal; read anew each time.")
@click.option("--after", type=TIME, default="2s", show_default=True, help="Load before the first restart.")
@click.option("--every", type=TIME, default="5s", show_default=True, help="From one restart to the next.")
@click.option("--times", type=click.IntRange(1, 10_000), default=3, show_default=True, help="How many restarts.")
@click.option("--restart-timeout", type=TIME, default="60s", show_default=True, help="For each restart.")
@click.option("--duration", type=TIME, help="Of the load.  [default: until all restarts are over, else 10s]")
@click.option("--think", type=TIME, default="50ms", show_default=True, help="Between requests on a held connection.")
@click.option("--timeout", type=TIME, default="10s", show_default=True, help="After it an attempt is given up.")
@click.option("--late-after", type=TIME, default="1s", show_default=True, help="After it an answer is late.")
@click.option("--expect-status", type=click.IntRange(100, 599), default=200, show_default=True, help="Of answers.")
@click.option("--path", help="What is asked for.  [default: as in URL]")
@click.option("--slow-path", help="For --slow.  [default: /slow]")
@click.option("--upload-path", help="For --upload.  [default: /]")
@click.option("--slow-time", type=TIME, default="1s", show_default=True, help="Of late, halfhead and upload.")
@click.option("--who-header", default="x-generation", show_default=True, help="Of answers: says who has answered.")
@click.option("--insecure", is_flag=True, help="Take any certificate.")
@click.option("--engines", type=click.IntRange(1, 256), help="Processes that make load.  [default: what it needs]")
@click.option("--seed", type=click.IntRange(0, 2**31), help="Of all random choices.  [default: another each time]")
@click.option("--allow", "allowed", type=ALLOWED, help="Losses that do not fail the run: 'refused=3,timed out=*'.")
@click.option("--gap-max", type=LIMIT, help="Longest accept gap of a restart: 50ms, or 3x that without a restart.")
@click.option("--p99-max", type=LIMIT, help="Highest p99 latency during restarts: 50ms, or 3x that without a restart.")
@click.option("--reconnects-max", type=click.IntRange(0), metavar="N", help="Clients that may have to connect again.")
@click.option("--prove", type=SHARE, help="Make load until no loss proves that fewer than this share are lost: 0.01%.")
@click.option("--json", "json_path", type=FILE, metavar="FILE", help="Write everything as JSON; - is stdout.")
@click.option("--html", "html_path", type=FILE, metavar="FILE", help="Write a page with everything in it.")
@click.option("--junit", "junit_path", type=FILE, metavar="FILE", help="Write the verdict as JUnit XML, for CI.")
def command(url: str, json_path: Path | None, html_path: Path | None, junit_path: Path | None, **options: Any) -> int:
    """Put URL under load, restart its server meanwhile, and report the fate of every single attempt.

    URL is http://, https://, ws://, wss://, tcp://, udp:// or unix:PATH. Without any kind of client there is a
    mixture that suits it. The server is restarted by --restart, --hotport or --signal, or not at all.

    Exit codes: 0 nothing was lost; 1 something was, or a limit was not kept; 2 the run means nothing (usage,
    target, or this machine); 130 interrupted: what was seen until then is told.

    `hotport churn compare A.json B.json` tells what differs between two runs.
    """
    words = console(stderr=True)
    experiment = _experiment(url, options)
    if not any(options[kind.value] for kind in Kind):
        words.print(f"the usual clients: {_shown(experiment.plan.loads)}", markup=False)
    with ExitStack() as stack:
        paths = {"json": json_path, "html": html_path, "junit": junit_path}
        files = {name: stack.enter_context(ReportFile(path)) for name, path in paths.items() if path}
        result = perform(experiment, words)
        with ExitStack() as reports:  # each is written whatever becomes of the others
            if "junit" in files:
                from hotport.churn.junit import junit

                reports.callback(files["junit"].write, junit(result))
            if "html" in files:
                from hotport.churn.html import render

                reports.callback(files["html"].write, render(result).encode())
            if "json" in files:
                reports.callback(files["json"].write, msgspec.json.format(msgspec.json.encode(result)) + b"\n")
            print_result(result, console(stderr=Path("-") in paths.values()))
    return ExitCode.INTERRUPTED if result.is_partial else result.verdict.exit_code


def _option(kind: Kind) -> click.Option:
    is_rate = kind in BY_RATE
    return click.Option([f"--{kind.value}"], type=RATE if is_rate else NUMBER, help=_HELP_OF_KINDS[kind])


command.params[1:1] = map(_option, Kind)


def _experiment(url: str, options: Mapping[str, Any]) -> Experiment:
    """Make the experiment from the options, and check that this machine and the target allow it.

    Raises:
        ConfigError: They do not (HP70x, HP71x).
    """
    loads = _loads(url, options)
    restarts = _restarts(options)
    gates = Gates(options["gap_max"], options["p99_max"], options["reconnects_max"], options["prove"])
    if options["prove"]:
        options, restarts = _prolonged(options, loads, restarts)
    duration_s = options["duration"] or (restarts.needs_s_max + SETTLE_S if restarts else DURATION_S)
    target = resolve(url, timeout_s=options["timeout"], verify_tls=not options["insecure"])
    plan = Plan(
        target=target,
        loads=loads,
        seed=random.SystemRandom().randrange(2**31) if options["seed"] is None else options["seed"],
        begin_ns=0,
        duration_ms=duration_s * 1000,
        timeout_ms=options["timeout"] * 1000,
        late_ms=options["late_after"] * 1000,
        expected_status=options["expect_status"],
        path=options["path"] or default_path(url),
        slow_path=options["slow_path"] or "/slow",
        upload_path=options["upload_path"] or "/",
        slow_ms=options["slow_time"] * 1000,
        verify_tls=target.is_tls and not options["insecure"],
        generation_header=options["who_header"].lower(),
    )
    engines = options["engines"] or default_engines(loads, len(os.sched_getaffinity(0)))
    check_descriptors(plan, engines)
    settle_s = SETTLE_S if restarts and not options["duration"] else None
    return Experiment(plan, engines, restarts, options["allowed"] or {}, settle_s, gates=gates)


def _prolonged(
    options: Mapping[str, Any], loads: Sequence[Load], restarts: Restarts | None
) -> tuple[Mapping[str, Any], Restarts | None]:
    """Restart as often as it takes to make enough attempts, and say how long that is.

    Raises:
        ConfigError: --duration is too short for it (HP715).
    """
    needed, rate = attempts_to_prove(options["prove"]), attempts_a_second(loads)
    needs_s = math.ceil(needed / rate * PROOF_MARGIN)
    share = percent(options["prove"])
    if options["duration"] and options["duration"] < needs_s:
        raise ConfigError(
            "HP715",
            f"cannot prove {share} in {format_duration(options['duration'])}",
            cause=f"it takes {needed:,} attempts without a loss, and this load makes about {rate:,.0f} a second",
            fix=f"--duration {needs_s}s",
            note="or ask for more load",
        )
    if restarts:
        times = max(restarts.times, math.ceil((needs_s - restarts.after_s) / restarts.every_s))
        restarts = replace(restarts, times=times)
    else:
        options = {**options, "duration": options["duration"] or float(needs_s)}
    often = f" and {restarts.times:,} restarts" if restarts else ""
    console(stderr=True).print(
        f"to prove that fewer than {share} are lost takes {needed:,} attempts without a loss: "
        f"about {format_duration(float(needs_s))}{often} at about {rate:,.0f} attempts a second",
        markup=False,
        highlight=False,
    )
    return options, restarts


def _loads(url: str, options: Mapping[str, Any]) -> list[Load]:
    fits = fitting(url)
    wanted: dict[Kind, float] = {kind: options[kind.value] for kind in Kind if options[kind.value]}
    for kind in wanted:
        if kind not in fits:
            raise ConfigError(
                "HP708",
                f"--{kind.value} cannot be used with {url}",
                cause=f"clients for such a target are {', '.join(sorted(kind.value for kind in fits))}",
                note="use another URL: ws:// and http:// are the same here, udp:// takes --datagram, tcp:// --stream",
            )
    if not wanted:
        is_websocket = url.startswith(("ws:", "wss:"))
        wanted = {Kind.WEBSOCKET: USUAL_WEBSOCKETS} if is_websocket else {k: n for k, n in USUAL.items() if k in fits}
    think_ms = options["think"] * 1000
    return [
        Load(kind.value, rate=n) if kind in BY_RATE else Load(kind.value, count=int(n), think_ms=think_ms)
        for kind, n in wanted.items()
    ]


def _restarts(options: Mapping[str, Any]) -> Restarts | None:
    asked = [flag for flag in ("restart_command", "service", "signum") if options[flag]]
    has_pid = [flag for flag in ("pid", "pid_file") if options[flag]]
    if len(asked) > 1 or (options["signum"] and len(has_pid) != 1) or (has_pid and not options["signum"]):
        raise ConfigError(
            "HP709",
            "it is not clear how to restart",
            cause="it needs one of --restart, --hotport and --signal; and --signal one of --pid and --pid-file",
            fix="--restart 'systemctl reload app'",
            note="or --signal HUP --pid-file app.pid, or --hotport app",
        )
    if not asked:
        return None
    how: How
    if options["service"]:
        path = find_service(options["service"])
        how = AskHotport(path.name, path / "control.sock")
    elif options["signum"]:
        how = SendSignal(options["signum"], options["pid_file"], options["pid"] or 0)
        how.check()
    else:
        how = RunCommand(options["restart_command"])
    return Restarts(how, options["times"], options["after"], options["every"], options["restart_timeout"])


def check_descriptors(plan: Plan, engines: int) -> None:
    """Raises:
    ConfigError: This machine does not let engines open as many connections as the plan needs (HP704).
    """
    limit = raise_descriptor_limit()
    needed = descriptors_needed(plan, engines)
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return
    share = (limit - descriptors_needed(msgspec.structs.replace(plan, loads=[]), 1)) * engines
    asked = sum(load.count + load.rate * plan.timeout_ms / 1000 for load in plan.loads)
    enough = next((n for n in range(engines + 1, 257) if descriptors_needed(plan, n) <= limit), None)
    raise ConfigError(
        "HP704",
        f"cannot hold {math.ceil(asked):,} connections with {engines} engine{'s' if engines > 1 else ''}",
        cause=f"each may open {limit:,} descriptors (RLIMIT_NOFILE), so {max(0, share):,} connections would fit; "
        f"while the target stalls, the attempts of {format_duration(plan.timeout_ms / 1000)} (--timeout) are open",
        fix=f"--engines {enough}" if enough else f"ulimit -n {needed}",
        note=f"or raise the limit: ulimit -n {needed}" if enough else "or make a smaller load",
    )


def _shown(loads: Sequence[Load]) -> str:
    return " ".join(f"--{load.kind} {f'{load.rate:g}/s' if load.rate else load.count}" for load in loads)
