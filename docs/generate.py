"""Writes the reference pages that follow from the source: ``python -m docs.generate``.

A test fails while a page differs from what this writes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import click
import msgspec

import hotport
import hotport.testing
from docs.logevents import log_events_page
from docs.man import man_page
from docs.picture import phases_picture, restart_picture
from docs.states import states_page
from hotport.churn.result import FORMAT, Result
from hotport.cli import COMMANDS
from hotport.errors import ExitCode
from hotport.migrate.peers import PEERS, UNIT
from hotport.migrate.table import ALWAYS, NO_EQUAL, Peer
from hotport.migrate.translate import translate_line
from hotport.model.signals import ALL, SUPERVISOR, WORKER, Does, Moment
from hotport.model.strategies import GUARANTEES, Facts, table
from hotport.options import OPTIONS, Option

__all__ = ["PAGES", "ErrorSite", "error_sites"]

ROOT: Final = Path(__file__).parent.parent
SOURCE: Final = ROOT / "src" / "hotport"

#: In which a terminal's help is folded.
HELP_COLUMNS: Final = 100

GENERATED: Final = "<!-- Written by docs/generate.py from the source; do not edit. -->\n"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _code(text: object) -> str:
    return f"`{text}`"


# -- options ------------------------------------------------------------------------------------------------

OPTIONS_HEAD: Final = """
Each option has one definition. It is read from `hotport.toml` (or `[tool.hotport]` in `pyproject.toml`) in the working
directory, then from the environment, then from flags of `hotport serve`; the later one wins. In TOML `-` and `_` are
the same in a key. `hotport.run` takes the TOML names as keyword arguments, stronger than everything else.

`hotport serve --show-config` prints every effective value and where it comes from, as text that is itself a
`hotport.toml`.

- A duration is a number of seconds, or like `250ms`, `30s`, `2m`, `1h30m`.
- A size is a number of bytes, or like `512M`, `1.5G`; 1K is 1024 bytes.
- A list is a TOML list, a flag that is given more than once, or text with commas.
- A restart reads them again. Addresses may come and go ([strategies.md](strategies.md)), but for
  `status_bind`, which `hotport upgrade` reads (HP411); a new `workers` counts from
  that restart on.
""".lstrip()

OPTIONS_TAIL: Final = """
## Variables that are no options

- `HOTPORT_RUNTIME_DIR`: absolute path of the directory that holds one directory for each running service. By default
  `$XDG_RUNTIME_DIR/hotport`, else `/run/hotport` for root and `hotport-UID` in the temporary directory for others.
- `HOTPORT_GENERATION`: set for each worker; the number of its generation.
- `HOTPORT_WORKER`: set for hotport's own workers, and removed before the application is imported.
- `HOTPORT_SUCCESSION`: set for a program that [restarts itself](../how-to/restart-your-own-program.md), and removed by
  `hotport.serve`.
- `HOTPORT_UPGRADE`, `HOTPORT_UPGRADE_CHECK`: set by an upgrade for the next supervisor; workers do not get them.
- `HOTPORT_FAULTS`: read by `hotport.testing.FaultyApp` ([how to](../how-to/test-that-restarts-are-invisible.md)).
- `HOTPORT_TEST_SLOWNESS`, `HOTPORT_TEST_RESTARTS`, `HOTPORT_TEST_EAGER`, `HOTPORT_TEST_PRELOAD`: of hotport's own
  tests; a factor for their deadlines, how many restarts those go through in which one restart is like the other, the
  event loops on which tasks take their first step at once, and whether services import once for all workers.
"""


def _kind(option: Option) -> tuple[str, str]:
    """What a value is, and its unit."""
    if option.is_switch:
        return "true or false", ""
    if option.choices:
        return ", ".join(map(_code, option.choices)), ""
    kinds = {"TIME": ("duration", "seconds"), "SIZE": ("size", "bytes"), "N": ("whole number", "")}
    kinds |= dict.fromkeys(("FILE", "DIR", "PATH"), ("path", "")) | dict.fromkeys(("TARGET", "NAME"), ("text", ""))
    kind, unit = kinds.get(option.metavar, (option.metavar.lower(), ""))
    return f"list of {kind}" if option.is_list and option.key != "command" else kind, unit


def _default(option: Option) -> str:
    match option.default:
        case None | () | [] | "":
            return "none"
        case bool():
            return _code(str(option.default).lower())
        case list():
            return ", ".join(map(_code, option.default))
        case _:
            return _code(option.default)


def options_page() -> str:
    """Every option under all its names."""
    rows = []
    for option in OPTIONS:
        kind, unit = _kind(option)
        argument = {"target": "TARGET", "command": "-- COMMAND"}
        flag = option.flag or argument[option.key]
        if option.is_switch:
            flag += f", --no-{option.key.replace('_', '-')}"
        rows.append(
            (
                *(_code(option.key), ", ".join(map(_code, flag.split(", "))), _code(option.env)),
                *(kind, _default(option), unit, option.help),
            )
        )
    heads = ("TOML key", "flag", "environment", "type", "default", "unit", "what it is")
    return f"# Options\n\n{GENERATED}\n{OPTIONS_HEAD}\n{_table(heads, rows)}\n{OPTIONS_TAIL}"


# -- errors -------------------------------------------------------------------------------------------------

HUNDREDS: Final = {
    "1": "addresses and sockets",
    "2": "descriptors and processes",
    "3": "configuration",
    "4": "starting and restarting",
    "5": "the application",
    "6": "control sockets and runtime directories",
    "7": "the restart laboratory",
}

EXIT_CODES: Final = {
    "DONE": "Done.",
    "BUG": "A bug of hotport's, or a failure that no other code describes.",
    "USAGE": "A wrong option, address, file or command line; nothing has happened.",
    "NOT_STARTED": "The service, or what it was to start, could not start.",
    "ABORTED": "A restart was aborted, undone or refused; the old generation serves.",
    "CUT": "Stopped, and connections were cut at the drain deadline.",
    "NO_SUPERVISOR": "No supervisor answered.",
    "NOT_READY": "`hotport status --ready`: clients should not be sent to the service now.",
    "INTERRUPTED": "Interrupted at the terminal.",
}

ERRORS_HEAD: Final = """
An error has a code and what could not be done, the cause, and what to do: something to paste (`try:`), a note, or
both. Codes are stable: a script may look at them. `…` and words in braces are filled in when the error occurs. A
`KernelError` ends its first line with the errno: `EADDRINUSE (address already in use)`.

The third column names the Python class (`hotport.ConfigError` and so on) and the exit status of a command that ends
with it.
""".lstrip()


@dataclass(frozen=True, slots=True)
class ErrorSite:
    """One place that makes an error with a code of its own."""

    code: str
    error: str
    exit_code: int
    module: str
    what: str
    cause: str
    fix: str
    note: str


def error_sites() -> list[ErrorSite]:
    """Every place in the source that makes an error, by code."""
    found: list[ErrorSite] = []
    for path in sorted(SOURCE.rglob("*.py")):
        found += _sites_in(path)
    return sorted(found, key=lambda site: (site.code, site.module, site.what, site.cause))


def _sites_in(path: Path) -> Iterator[ErrorSite]:
    tree = ast.parse(path.read_text())
    name = path.relative_to(SOURCE).as_posix()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    makers = {function.name: (function, made) for function in functions if (made := _made_by(function)) is not None}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not _is_code(node):
            continue
        error, given = node.func.id, _arguments(node, ("code", "what"))
        if error in makers:  # a helper that is given the code and the cause, and puts the rest around them
            helper, made = makers[error]
            error, names = ast.unparse(made.func), [argument.arg for argument in helper.args.args]
            given = {**_arguments(made, ("code", "what")), **_arguments(node, names)}
        module = importlib.import_module(f"hotport.{name.removesuffix('.py').replace('/', '.')}")
        kind = getattr(module, error)
        code = node.args[0]
        assert isinstance(code, ast.Constant)
        texts = (_says(given.get(part)) for part in ("what", "cause", "fix", "note"))
        yield ErrorSite(str(code.value), error, kind.exit_code, name, *texts)


def _is_code(call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and bool(re.fullmatch(r"HP\d{3}", str(first.value)))


def _made_by(function: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.Call | None:
    """The error that a function makes for a code that it is given."""
    if "code" not in {argument.arg for argument in function.args.args}:
        return None
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
            first = node.value.args[0]
            if isinstance(first, ast.Name) and first.id == "code":
                return node.value
    return None


def _arguments(call: ast.Call, names: Sequence[str]) -> dict[str, ast.expr]:
    """The arguments of a call by the names of the parameters."""
    named = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    return dict(zip(names, call.args, strict=False)) | named


def _says(node: ast.expr | None) -> str:
    """A text of the source with what is known only later in braces; empty if all of it is."""
    match node:
        case ast.Constant(value=str(text)):
            return " ".join(text.split())
        case ast.JoinedStr(values=parts):
            return " ".join("".join(_part(part) for part in parts).split())
        case ast.BinOp(left=left):
            return f"{_says(left)}…"
        case ast.IfExp(body=body, orelse=orelse):
            return " or: ".join(text for text in (_says(body), _says(orelse)) if text)
        case _:
            return ""


def _part(part: ast.expr) -> str:
    match part:
        case ast.Constant(value=text):
            return str(text)
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return f"{{{name.strip('_')}}}"
        case _:
            return "…"


def errors_page() -> str:
    """Every code, grouped by hundred, and the exit codes."""
    parts = [f"# Errors and exit codes\n\n{GENERATED}\n{ERRORS_HEAD}"]
    sites = error_sites()
    for hundred, subject in HUNDREDS.items():
        rows: list[tuple[str, ...]] = []
        for site in sites:
            if site.code[2] != hundred:
                continue
            says = _code(site.what or "…") + (f"<br>cause: {site.cause}" if site.cause else "")
            says += f"<br>try: {_code(site.fix.replace(' or: ', '` or `'))}" if site.fix else ""
            says += f"<br>note: {site.note}" if site.note else ""
            row = (_code(site.code), says, f"{_code(site.error)}, {site.exit_code}", _code(site.module))
            if row not in rows:
                rows.append(row)
        parts.append(f"## HP{hundred}xx: {subject}\n\n{_table(('code', 'says', 'class, exit', 'raised in'), rows)}\n")
    codes = {name: value for name, value in vars(ExitCode).items() if name.isupper()}
    rows = [(str(value), EXIT_CODES[name]) for name, value in codes.items()]
    parts.append(f"## Exit codes\n\n{_table(('code', 'means'), rows)}\n")
    return "\n".join(parts)


# -- command line -------------------------------------------------------------------------------------------

CLI_HEAD: Final = """
Data goes to stdout, words go to stderr; `--json` is the form for scripts. Colour only on a terminal, and not with
`NO_COLOR`. This page is also `man hotport`, and `hotport completion bash` (zsh, fish) prints what completes it in a
shell. Commands that take a NAME need none while just one service runs; services are found in the runtime directory
([options.md](options.md), `HOTPORT_RUNTIME_DIR`). `python -m hotport` is the same as `hotport`. Exit codes are
explained in [errors.md](errors.md).
""".lstrip()


def cli_page() -> str:
    """What ``--help`` says, for each command."""
    group = importlib.import_module("hotport.cli")._group
    assert isinstance(group, click.Group)
    widths: dict[str, Any] = {"terminal_width": HELP_COLUMNS, "max_content_width": HELP_COLUMNS}
    parent = group.make_context("hotport", [], resilient_parsing=True, **widths)
    parts = [f"# Command line\n\n{GENERATED}\n{CLI_HEAD}", _help("hotport", parent)]
    for name in COMMANDS:
        command = group.get_command(parent, name)
        assert command is not None
        context = command.make_context(name, [], parent=parent, resilient_parsing=True, **widths)
        parts.append(_help(f"hotport {name}", context))
        if name == "churn":
            context = command.make_context(name, ["compare"], parent=parent, resilient_parsing=True, **widths)
            parts.append(_help("hotport churn compare", context))
    return "\n".join(parts)


def _help(title: str, context: click.Context) -> str:
    text = "\n".join(line.rstrip() for line in context.command.get_help(context).splitlines())
    return f"## {title}\n\n```text\n{text}\n```\n"


# -- strategies ---------------------------------------------------------------------------------------------

STRATEGIES_HEAD: Final = """
How the listeners reach the next generation is a restart's *strategy*: the option `strategy`, or `hotport restart
--strategy` for once. `auto` takes the first of these that can work; within one supervisor that is always `inherit`. One
that is asked for and cannot work is refused with the reason (HP420), before anything has begun. `hotport doctor` shows
this table for the service that runs, or for the options in this directory; `hotport status` says which one restarts
take, and why.
""".lstrip()

STRATEGIES_TAIL: Final = """
## Who can have which

| the service | can have |
|---|---|
{rows}

## Addresses that change

A restart compares the addresses of the options with those that are bound. What stays is passed on by the strategy. What
is new is bound before anything else is done: if that fails, the restart is refused with the reason, and nothing has
changed. What is gone is left to the old generation, which takes what waits there before it closes. An aborted restart
closes what it has bound. Port 0 means the port that it has got.

## The guard

`SO_REUSEADDR`, without which a server could not come back while connections are in TIME_WAIT, has no rule about
users: in the gap of a `rebind` any user can take a port above 1023. With `guard` the supervisor keeps a second socket
bound to each TCP address, which never listens and has `SO_REUSEPORT` alone. The kernel lets no user bind beside it but
the same user with `SO_REUSEPORT`; the listeners of the service have that, too. It also keeps the gap short: with
`SO_REUSEPORT` the kernel does not look at every connection in TIME_WAIT. Its price: processes of the same user can
join the port silently (`hotport why` names them). A guard is kept until the service ends, or its address is dropped.

## When another process takes the port

If a port cannot be bound again, the restart aborts: its report and the event `port.lost` name who has it, and so does
`hotport status`, as `lost`. The connections of the old generation stay open. The port is tried after 0.1 s, then with
pauses twice as long each time, up to 5 s; when it is ours again (`port.regained`), the old workers are given it.
Until then restarts are refused (HP410).
"""


def strategies_page() -> str:
    """What each strategy promises, and who can have it."""
    parts = [f"# Strategies\n\n{GENERATED}\n{STRATEGIES_HEAD}"]
    rows = [(_code(s.value), g.refused, g.reset, g.gap) for s, g in GUARANTEES.items()]
    parts.append(_table(("strategy", "refused", "reset", "rebind gap"), rows) + "\n")
    for strategy, says in GUARANTEES.items():
        parts.append(f"## {strategy.value}\n\n{_sentence(says.how)}\n")
        parts.append(f"**What clients see**: {says.clients_see}.\n\n**Needs**: {says.needs}.\n")
        parts.append(f"**Workers' shares** of what comes: {says.shares}.\n")
    found = [
        (name, ", ".join(_code(row.strategy.value) for row in table(facts) if not row.obstacle), _reasons(facts))
        for name, facts in SERVICES.items()
    ]
    who = "\n".join(f"| {name} | {can}{why} |" for name, can, why in found)
    return "\n".join(parts) + STRATEGIES_TAIL.format(rows=who)


def _reasons(facts: Facts) -> str:
    reasons = dict.fromkeys(row.obstacle for row in table(facts) if row.obstacle)
    return f"; {'; '.join(reasons)}" if reasons else ""


#: Examples of what decides which strategies there are.
SERVICES: Final = {
    "an asgi, stream or protocol application on tcp": Facts(),
    "the same with a unix address": Facts(schemes=("unix",)),
    "with an `fd://` address": Facts(schemes=("fd",)),
    "with a `systemd:` address": Facts(schemes=("systemd",)),
    "a datagram application": Facts(schemes=("udp",), kind="datagram"),
    "an application of kind sockets": Facts(kind="sockets"),
    "any other program (`-- ./server`)": Facts(command="./server"),
    "in a phased restart": Facts(is_phased=True),
}


# -- Python API ---------------------------------------------------------------------------------------------

API_HEAD: Final = """
Everything here is imported from `hotport` or, where it says so, from `hotport.testing`; nothing else is public.
`hotport` is typed (`py.typed`).
""".lstrip()


def api_page() -> str:
    """The public names with their signatures and docstrings."""
    parts = [f"# Python API\n\n{GENERATED}\n{API_HEAD}"]
    parts += _module(hotport, "")
    parts.append(f"## \\_\\_version\\_\\_\n\nThe version, as text: `{hotport.__version__}`.\n")
    parts += _module(hotport.testing, "testing.")
    return "\n".join(parts)


def _module(module: ModuleType, prefix: str) -> list[str]:
    parts = []
    names = [name for name in module.__all__ if not name.startswith("__")]
    for name in sorted(names, key=lambda name: (isinstance(getattr(module, name), type), name.lower())):
        thing = getattr(module, name)
        parts.append(f"## {prefix}{name}\n\n{_signature(name, thing)}\n{_markdown(inspect.getdoc(thing) or '')}")
        if isinstance(thing, type):
            parts += [f"### `{key}`\n\n{_sentence(says)}\n" for says, key in _commented(thing)]
            own = [base for base in thing.__mro__ if base.__module__ == thing.__module__ and base.__name__ not in names]
            parts += [_member(k, v) for base in (thing, *own) for k, v in vars(base).items() if _is_shown(k, v)]
    return parts


#: Called by the event loop or the worker, not by an application.
INTERNAL: Final = frozenset(
    {
        *("connection_made", "connection_lost", "data_received", "eof_received", "pause_writing", "resume_writing"),
        *("drain", "cut", "with_traceback"),
    }
)


def _commented(thing: type) -> list[tuple[str, str]]:
    """Class attributes that a ``#:`` comment describes."""
    return re.findall(r"^    #: (.*)\n    (\w+): ", inspect.getsource(thing), re.MULTILINE)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}."


def _is_shown(key: str, value: Any) -> bool:
    if key.startswith("_") or key in INTERNAL:
        return False
    return inspect.isfunction(value) or isinstance(value, property)


def _member(name: str, value: Any) -> str:
    function = value.fget if isinstance(value, property) else value
    assert function is not None
    signature = f"`{name}`" if isinstance(value, property) else f"`{_one_line(name, function)}`"
    return f"### {signature}\n\n{_markdown(inspect.getdoc(function) or '')}"


def _one_line(name: str, function: Callable[..., Any]) -> str:
    parameters = inspect.signature(function)
    kept = [p for p in parameters.parameters.values() if p.name != "self"]
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    text = str(parameters.replace(parameters=kept))
    return prefix + name + re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations are texts, defaults stay quoted


def _signature(name: str, thing: Any) -> str:
    if not isinstance(thing, type):
        is_context = hasattr(thing, "__wrapped__")
        line = _one_line(name, thing.__wrapped__ if is_context else thing)
        prefix = "async with " if is_context else ""
        return f"```text\n{prefix}{line.split(' -> ')[0] if is_context else line}\n```\n"
    bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
    return f"```text\nclass {name}{f'({bases})' if bases else ''}\n```\n"


def _markdown(doc: str) -> str:
    """A docstring: paragraphs stay, sections become lists, ``::`` blocks become code."""
    doc = re.sub(r"``(.+?)``", r"`\1`", doc)
    lines: list[str] = []
    section = ""
    is_code = False
    for line in doc.splitlines():
        if is_code and line and not line.startswith(" "):
            lines.append("```\n")
            is_code = False
        if line == "::":
            lines.append("```python")
            is_code = True
        elif is_code:
            if line or lines[-1] != "```python":
                lines.append(line.removeprefix("    "))
        elif heading := re.fullmatch(r"(Args|Attributes|Raises|Returns|Descriptors|Sources|Cancellation):(.*)", line):
            section = heading[1]
            lines += [f"**{section}**", "", *([heading[2].strip()] if heading[2] else [])]
        elif section and (item := re.fullmatch(r"    (\S[^:]*): (.*)", line)):
            lines.append(f"- `{item[1]}`: {item[2]}")
        elif section and line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.strip())
    if is_code:
        lines.append("```")
    text = "\n".join(lines).strip()
    text = re.sub(r"\n+```", r"\n```", text) if "```" in text else text
    return re.sub(r"(?<=\S)\n```python", "\n\n```python", text) + "\n"


# -- signals ------------------------------------------------------------------------------------------------

SIGNALS_HEAD: Final = """
What a signal does depends on who gets it and what that process is doing. These tables are in the source
(`hotport.model.signals`); the tests send each signal in each of these states.

- **starting**: nothing serves yet; of a worker: it has not said `READY=1`
- **serving**
- **restarting**: a restart is in progress or can still be undone; of a worker: it accepts no more and can be taken back
- **draining**: the service serves, and workers of older generations finish; of a worker: it was told to leave
- **stopping**: the service was told to stop; of a worker: it was told to leave as one of the last
""".lstrip()

SIGNALS_ALL: Final = """
systemd's default `KillMode=control-group` signals every process of a service at once, and so do many tools that
signal a process tree. The result is that of the first table: what a worker does about its own signal does not hinder
what the supervisor does. With a lame duck, a TERM to all gives up a restart, and replaces the workers for that time;
programs that an application has started are signalled as well; and a program after `--` gets SIGTERM from both sides,
which some take for an order to hurry. `KillMode=mixed` ([run under systemd](../how-to/run-under-systemd.md)) avoids
all of that, and `hotport doctor` says which mode a service has.
"""

SIGNALS_TAIL: Final = """
## What else there is to know

- An order of the supervisor is no signal. A worker cuts connections before the drain deadline only at its own
  second TERM or INT, at QUIT, or when the supervisor was told to hurry: by a second TERM or INT, by QUIT, or by
  `hotport stop --now`.
- What is cut is counted: in the worker's log line `drain.ended`, in the [report](report.md) of a restart, and by
  exit code 5 of the supervisor when the service stops. A worker that is killed while the service stops counts as
  cut.
- Nothing is reopened on USR1: logs go to stdout and stderr. Let a service manager, or the program that reads them,
  rotate them.
- Ctrl-C and Ctrl-Z in a terminal reach the supervisor alone: each worker has a process group of its own. A
  supervisor that is suspended (Ctrl-Z, STOP) does nothing until it is continued (`fg`, CONT); its workers serve on.
- HUP because the terminal is gone stops the supervisor as INT does, unless it was started by nohup or setsid.
- KILL ends a supervisor without a word; its workers [serve on](../how-to/upgrade-the-supervisor.md#lose-it). A
  worker that is killed is replaced.
- Workers ignore TTIN and TTOU, which would suspend them. All other signals of these tables wait while a process
  cannot handle them yet; only TERM, INT and QUIT end a supervisor that has not begun to serve.
- An application may set handlers of its own for signals that its worker gets, in its module or later; they replace
  those of the worker.
- Real-time signals 61 to 63 ask a worker that [does not answer](../how-to/hung-workers.md) for its Python stacks.
- A program after `--` has the signals of any program that is started: default handling, none blocked. The
  supervisor sends it SIGTERM when it should leave, and SIGKILL to its process group when that takes too long or the
  supervisor is told to hurry.
- A server in your own event loop (`hotport.serve`) handles no signal but HUP, and that only with `restart_on_hup`.
""".lstrip()


def signals_page() -> str:
    """What each signal does."""

    def rows(table: Mapping[str, Mapping[Moment, Does]]) -> str:
        lines = [[name.removeprefix("SIG"), *(row[at].value for at in Moment)] for name, row in table.items()]
        return _table(["signal", *(moment.value for moment in Moment)], lines)

    parts = ["# Signals\n", GENERATED, SIGNALS_HEAD]
    parts += ["## To the supervisor\n", rows(SUPERVISOR) + "\n", "## To one worker\n", rows(WORKER) + "\n"]
    parts += ["## To every process at once\n", rows(ALL), SIGNALS_ALL, SIGNALS_TAIL]
    return "\n".join(parts)


# -- coming from other servers -------------------------------------------------------------------------------

#: By server: an example of its command line, and the beginning of its page.
COMING_FROM: Final = {
    "uvicorn": "main:app --host 0.0.0.0 --port 80 --workers 4 --proxy-headers --timeout-keep-alive 10",
    "gunicorn": "-k uvicorn.workers.UvicornWorker -w 4 -b 0.0.0.0:80 --timeout 120 --access-logfile - main:app",
    "hypercorn": "main:app --bind 0.0.0.0:80 --workers 4 --graceful-timeout 10",
    "granian": "--interface asgi main:app --host 0.0.0.0 --port 80 --workers 4 --workers-max-rss 512",
    "uwsgi": "--http :80 --module mysite.wsgi:application --master --processes 4 --harakiri 30 --uid www-data",
}

COMING_WITH: Final = """
`hotport serve` answers to these flags with the line to paste; `hotport migrate` prints the `hotport.toml`, with what
has no equal as comments:

```text
$ {line}
$ {here}
```

```sh
hotport migrate '{line}' >hotport.toml
hotport serve
```
"""

COMING_WSGI: Final = """
## WSGI applications

hotport serves ASGI. Django has an ASGI entry beside the other one: `mysite.asgi:application` for
`mysite.wsgi:application`; `hotport migrate` takes it if the file is there. Flask and others are
[wrapped in two lines](../how-to/frameworks.md#flask-and-other-wsgi-applications). An application that has to stay as
it is can keep gunicorn as its worker, with hotport's restarts around it:

```sh
hotport serve --bind :8000 -- gunicorn --preload mysite.wsgi
```
"""

COMING_TAIL: Final = """
## Deploying

`hotport restart` takes the place of `systemctl reload`, `kill -HUP` and their waiting: it exits 0 when the new code
serves, and 4, with the traceback, when it does not; then the old code still does. The
[unit for systemd](../how-to/run-under-systemd.md) has the lines to compare with yours. What clients meet
while each of these servers restarts: [measured](../discussion/what-restarts-cost-elsewhere.md).
"""


def coming_from_page(peer: Peer) -> str:
    """What each option of another server is here."""
    parts = [f"# Coming from {peer.title}\n\n{GENERATED}"]
    if example := COMING_FROM.get(peer.name):
        line = f"{peer.name} {example}"
        here = translate_line(line.split(), ROOT / "docs").command()
        parts.append(COMING_WITH.format(line=line, here=here))
    rows = []
    for row in peer.rows:
        names = row.flags.split() or row.settings.split()
        here = {ALWAYS: "needs nothing", NO_EQUAL: "no equal"}.get(row.here, _code(row.here))
        rows.append((", ".join(map(_code, names)), here, row.why))
    head = "## Options\n\n[All options](../reference/options.md), with their defaults and variables.\n\n"
    parts.append(f"{head}{_table((peer.title, 'hotport', 'to know'), rows)}\n")
    parts.append("## What else is different\n\n" + "".join(f"- {text}\n" for text in peer.differs))
    parts += [COMING_WSGI] if peer.name in {"gunicorn", "uwsgi", "unitd"} else []
    return "\n".join(part.strip("\n") + "\n" for part in [*parts, COMING_TAIL])


# -- schemas ------------------------------------------------------------------------------------------------

SCHEMA_ID: Final = "hotport-churn-result-{format}"


def churn_schema() -> str:
    """The JSON schema of what ``hotport churn --json`` writes."""
    schema = msgspec.json.schema(Result)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID.format(format=FORMAT),
        "title": f"A result of hotport churn, format {FORMAT}",
    }
    return json.dumps({**head, **schema}, indent=2, sort_keys=False) + "\n"


# -- all of them --------------------------------------------------------------------------------------------

#: What is written where.
PAGES: Final[dict[str, Callable[[], str]]] = {
    "docs/reference/options.md": options_page,
    "docs/reference/errors.md": errors_page,
    "docs/reference/cli.md": cli_page,
    "docs/reference/python-api.md": api_page,
    "docs/reference/signals.md": signals_page,
    "docs/reference/states.md": states_page,
    "docs/phases.svg": phases_picture,
    "docs/restart.svg": restart_picture,
    "docs/hotport.1": man_page,
    "docs/reference/log-events.md": log_events_page,
    "docs/reference/strategies.md": strategies_page,
    "docs/reference/churn-result.schema.json": churn_schema,
    **{f"docs/coming-from/{peer.name}.md": partial(coming_from_page, peer) for peer in (*PEERS, UNIT)},
}


def main() -> int:
    """Write what has changed, and say so."""
    for name, make in PAGES.items():
        path = ROOT / name
        text = make()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
