"""Load options from file, environment and flags, each with its origin, and check them together."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from hotport.address import UdpAddress, parse_address
from hotport.errors import ConfigError, nearest
from hotport.options.definition import (
    ENVIRONMENT_PREFIX,
    NAME,
    NAME_CHARS_MAX,
    OPTIONS,
    Option,
    Options,
    as_name,
)

__all__ = ["Loaded", "Row", "checked", "load", "meant_flag", "rows", "show"]

ENVIRONMENT_OTHERS: Final = frozenset(
    {
        "HOTPORT_FAULTS",
        "HOTPORT_GENERATION",
        "HOTPORT_RUNTIME_DIR",
        "HOTPORT_SUCCESSION",
        "HOTPORT_UPGRADE",
        "HOTPORT_UPGRADE_CHECK",
        "HOTPORT_TEST_EAGER",
        "HOTPORT_TEST_PRELOAD",
        "HOTPORT_TEST_RESTARTS",
        "HOTPORT_TEST_SLOWNESS",
        "HOTPORT_WORKER",
    }
)
"""Variables of ours that are no options; ``docs/generate.py`` explains them."""

EXEC_SETTLE_S: Final = 5.0
"""A program that cannot say that it is ready has to prove it by living on; an import error takes its time to show."""

WATCH_DRAIN_S: Final = 1.0
"""Short, because an edit waits for it, and a page that holds a stream open reconnects by itself."""

_DEFAULT: Final = "default"
_ARGUMENT: Final = "command line"
_DEFAULTS: Final = Options()
_BY_KEY: Final[Mapping[str, Option]] = {option.key: option for option in OPTIONS}
_BY_ENV: Final[Mapping[str, Option]] = {option.env: option for option in OPTIONS}


@dataclass(frozen=True, slots=True)
class Loaded:
    """Options, and the origin of each.

    Attributes:
        options: The effective values.
        origins: By key: ``default``, ``hotport.toml``, ``HOTPORT_BIND``, ``--bind`` or ``command line``.
    """

    options: Options
    origins: Mapping[str, str]


def load(
    *,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    cwd: Path,
    needs_program: bool = True,
) -> Loaded:
    """Load the options from all sources and check them together.

    Args:
        file: A TOML file; None looks for ``hotport.toml``, else for ``[tool.hotport]`` in ``pyproject.toml``.
        environ: ``HOTPORT_*`` counts; an empty variable is as good as none.
        flags: Values by key; None and empty lists were not given.
        cwd: Where files are looked for.
        needs_program: Whether a target or a command must be among them.

    Raises:
        ConfigError: HP301 the file, HP302 a key, HP303 a variable, HP304 a value, HP305 values that exclude
            each other, HP306 no program, HP307 the name; HP11x an address.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(_BY_KEY, _DEFAULT)

    def take(option: Option, value: object, origin: str) -> None:
        values[option.field] = _read(option, value, origin)
        origins[option.key] = origin

    table, source = _read_file(file, cwd)
    for option, value in _known_keys(table, source):
        take(option, value, source)
    for option, text in _known_variables(environ):
        take(option, text, option.env)
    for option, value in _known_keys(flags, "the arguments"):
        if value is not None and value != ():
            take(option, value, option.flag or _ARGUMENT)

    if values.get("ready") == "exec" and "settle_s" not in values:
        values["settle_s"] = EXEC_SETTLE_S
        origins["settle"] = "default with ready = exec"
    if values.get("watch") and "drain_timeout_s" not in values:
        values["drain_timeout_s"] = WATCH_DRAIN_S
        origins["drain_timeout"] = "default with watch"
    loaded = Loaded(Options(**values), origins)
    _check(loaded, needs_program=needs_program)
    return loaded


def checked(values: Mapping[str, object]) -> dict[str, Any]:
    """Check values of options by field, from a control socket, as flags are checked; None passes.

    Raises:
        ConfigError: One of them cannot be used (HP304, HP11x).
    """
    fields = {option.field: option for option in OPTIONS}
    given = {field: value for field, value in values.items() if value is not None}
    return {field: _read(fields[field], value, fields[field].flag or _ARGUMENT) for field, value in given.items()}


def _read_file(file: Path | None, cwd: Path) -> tuple[Mapping[str, object], str]:
    """Read the table of options, with its name for messages."""
    if file is not None:
        return _read_toml(cwd / file, str(file))
    for name in ("hotport.toml", "pyproject.toml"):
        path = cwd / name
        if path.exists() and not path.is_file():  # reading a FIFO would wait for somebody to write
            raise ConfigError("HP301", f"cannot read {name}", cause="it is not a regular file", fix=f"ls -ld {path}")
        if path.exists() or path.is_symlink():  # a link that leads nowhere was meant to lead somewhere
            table, source = _read_toml(cwd / name, name)
            if table or name == "hotport.toml":
                return table, source
    return {}, _DEFAULT


def _read_toml(path: Path, name: str) -> tuple[Mapping[str, object], str]:
    import tomllib  # workers have no use for it

    try:
        data = path.read_bytes()
        document = tomllib.loads(data.decode("utf-8-sig"))  # editors on Windows begin with a byte order mark
    except OSError as error:
        cause = f"{error.strerror or error}".lower()
        raise ConfigError("HP301", f"cannot read {name}", cause=cause, fix=f"ls -ld {path}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError; or one in another
        is_deep = isinstance(error, RecursionError)
        cause = "it is nested too deeply" if is_deep else " ".join(str(error).split())
        note = f"correct {name}; https://toml.io describes the format"
        if data[:2] in {b"\xff\xfe", b"\xfe\xff"}:
            raise ConfigError(
                "HP301",
                f"{name} is not TOML",
                cause="it is UTF-16, and TOML is UTF-8",
                fix=f"iconv -f UTF-16 {name} >{name}.utf8 && mv {name}.utf8 {name}",
            ) from error
        raise ConfigError("HP301", f"{name} is not TOML", cause=cause, note=note) from error
    if path.name != "pyproject.toml":
        if "tool" in document:
            cause = "[tool.hotport] is for pyproject.toml"
            note = f"remove this line from {name}: options stand in no table there"
            raise ConfigError("HP302", f"unknown option 'tool' in {name}", cause=cause, note=note)
        return document, name
    tool = document.get("tool", {})
    table = tool.get("hotport", {}) if isinstance(tool, dict) else {}
    if not isinstance(table, dict):
        cause = "tool.hotport is not a table"
        raise ConfigError("HP301", f"cannot use {name}", cause=cause, note="start it with [tool.hotport]")
    return table, f"{name} [tool.hotport]"


def _known_keys(table: Mapping[str, object], source: str) -> Iterable[tuple[Option, object]]:
    seen: dict[str, str] = {}
    for written, value in table.items():
        key = written.replace("-", "_")
        if key not in _BY_KEY:
            meant = _meant(key)
            raise ConfigError(
                "HP302",
                f"unknown option {written!r} in {source}",
                cause="hotport has no option of this name",
                fix=f"{meant.key} = {_toml(value)}" if meant else "hotport serve --help",
            )
        if key in seen:
            cause = f"as {seen[key]!r} and as {written!r}"
            raise ConfigError("HP302", f"{key} stands twice in {source}", cause=cause, note="remove one of them")
        seen[key] = written
        yield _BY_KEY[key], value


# Kubernetes tells every container about a Service named "hotport" in such variables, as Docker links did.
_FOREIGN_VARIABLE: Final = re.compile(
    r"HOTPORT_(SERVICE_(HOST|PORT(_\w+)?)=|PORT=\w+://|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?=).*", re.DOTALL
)


def _known_variables(environ: Mapping[str, str]) -> Iterable[tuple[Option, str]]:
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in ENVIRONMENT_OTHERS:
            continue
        if variable in _BY_ENV:
            if text:
                yield _BY_ENV[variable], text
        elif not _FOREIGN_VARIABLE.fullmatch(f"{variable}={text}"):
            option = _meant(variable.removeprefix(ENVIRONMENT_PREFIX).lower())
            meant = option.env if option else nearest(variable, ENVIRONMENT_OTHERS)
            raise ConfigError(
                "HP303",
                f"unknown option {variable} in the environment",
                cause="hotport has no option of this name",
                fix=f"{meant}={shlex.quote(text)}" if meant else f"unset {variable}",
            )


# What other servers call it.
_ELSEWHERE: Final = {
    "app": "target",
    "harakiri": "request_timeout",
    "graceful_timeout": "drain_timeout",
    "forwarded_allow_ips": "trusted_proxy",
    "gid": "group",
    "host": "bind",
    "listen": "bind",
    "port": "bind",
    "reload": "watch",
    "timeout_keep_alive": "keep_alive",
    "uid": "user",
    "umask": "socket_mode",
    "ws_max_queue": "ws_queue",
    "ws_max_size": "ws_message_max",
    "ws_per_message_deflate": "ws_deflate",
}


def _meant(key: str) -> Option | None:
    """Return the option that was most likely meant by `key`."""
    found = _ELSEWHERE.get(key) or nearest(key, _BY_KEY)
    return _BY_KEY[found] if found else None


def meant_flag(flag: str) -> str | None:
    """Return the flag that was most likely meant, by our names and those of other servers."""
    found = _meant(flag.lstrip("-").replace("-", "_"))
    return found.flag if found else None


def _read(option: Option, value: object, origin: str) -> object:
    """Read one value from one source; text from the environment and from flags may be of any type."""
    is_text = isinstance(value, str) and origin in {option.env, option.flag, _ARGUMENT}
    try:
        return option.type.from_text(str(value)) if is_text else option.type.from_native(value)
    except ConfigError as error:  # an address
        what = f"{_where(option, origin)}: {error.what}"
        raise ConfigError(error.code, what, cause=error.cause, fix=error.fix, note=error.note) from None
    except ValueError as error:
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value  # of a flag given more than once
        right = nearest(str(value), option.choices) or option.type.example or option.default
        raise ConfigError(
            "HP304",
            f"{_where(option, origin)} cannot be {shown!r}",
            cause=str(error),
            fix=_written(option, right, origin),
        ) from None


def _where(option: Option, origin: str) -> str:
    """``--workers``, ``HOTPORT_WORKERS`` or ``workers in hotport.toml``."""
    if origin in {option.env, option.flag}:
        return origin
    return option.key if origin in {_DEFAULT, _ARGUMENT} else f"{option.key} in {origin}"


def _written(option: Option, right: object, origin: str) -> str:
    """Write a valid value in the syntax of the source that had the invalid one."""
    if origin in {option.env, option.flag}:
        text = ",".join(map(str, right)) if isinstance(right, list) else _toml(right).strip('"')
        text = option.metavar if right in (None, []) else text
        return f"{origin}={text}" if origin == option.env else f"{origin} {text}"
    if option.key == "target" and origin == _ARGUMENT:
        return f"hotport serve {right}"
    return f"{option.key} = {_toml(right) if right is not None else _toml(option.metavar)}"


_OF_OUR_WORKERS: Final = (
    *("factory", "kind", "lifespan", "max_requests", "preload", "proxy_protocol", "request_timeout", "root_path"),
    *("tls_alpn", "tls_cert", "tls_client_auth", "tls_client_ca", "tls_handoff", "tls_key", "trusted_proxy"),
    *("health_path", "health_errors_max", "health_lag_max", "health_memory_max"),
)
"""A foreign program serves, and counts, by itself."""


def _check(loaded: Loaded, *, needs_program: bool) -> None:
    options = loaded.options
    if options.name is not None and not NAME.fullmatch(options.name):
        raise ConfigError(
            "HP307",
            f"{_where(_BY_KEY['name'], loaded.origins['name'])} cannot be {options.name!r}",
            cause=f"a name has up to {NAME_CHARS_MAX} of A-Z a-z 0-9 . _ - and begins with none of . -",
            fix=f"--name {as_name(options.name)}",
        )
    if options.target is None and not options.command and needs_program:
        cause = "no target was given, and neither app.py nor main.py has an application named app"
        note = "or name a command: hotport serve -- COMMAND"
        raise ConfigError("HP306", "there is nothing to serve", cause=cause, fix="hotport serve app:app", note=note)
    for clash in _clashes(options):
        one, two = (_where(_BY_KEY[name], loaded.origins[name]) for name in (clash.key, clash.other))
        what = f"{one} cannot be used {clash.relation} {two}"
        raise ConfigError("HP305", what, cause=clash.cause, fix=clash.fix, note=clash.note)


class _Clash(NamedTuple):
    """An option that cannot be used ``with`` or ``without`` another one."""

    key: str
    relation: str
    other: str
    cause: str
    fix: str = ""
    note: str = ""


def _clashes(options: Options) -> Iterable[_Clash]:
    if options.command:
        if options.target is not None:
            cause = "a service is an application or a command"
            yield _Clash("target", "with", "command", cause, fix=f"hotport serve -- {shlex.join(options.command)}")
        for key in _OF_OUR_WORKERS:
            field = _BY_KEY[key].field
            if getattr(options, field) != getattr(_DEFAULTS, field):
                yield _Clash(key, "with", "command", "only hotport's own workers know it", note=f"remove {key}")
    elif options.ready == "exec":
        cause = "only a command can be ready without saying so"
        yield _Clash("ready", "without", "command", cause, fix='ready = "notify"')
    yield from _tls_clashes(options)
    if options.group is not None and options.user is None:
        cause = "workers of root would stay root, whatever their group is"
        yield _Clash("group", "without", "user", cause, fix="--user www-data")
    if options.app_metrics and options.status_bind is None:
        cause = "they are shown on the status port, and there is none"
        yield _Clash("app_metrics", "without", "status_bind", cause, fix="--status-bind 127.0.0.1:9000")
    if options.canary and options.phased:
        cause = "a phased restart starts with one new worker anyway"
        note = "remove phased; or use undo_window, which watches each worker of it"
        yield _Clash("canary", "with", "phased", cause, note=note)
    if options.max_requests_jitter and not options.max_requests:
        cause = "there is no number of requests to add it to"
        yield _Clash("max_requests_jitter", "without", "max_requests", cause, fix="--max-requests 10000")
    if options.proxy_protocol and options.kind == "sockets":
        cause = "a sockets application reads from its connections by itself"
        note = "remove proxy_protocol, and read the header in the application"
        yield _Clash("proxy_protocol", "with", "kind", cause, note=note)
    for key in ("watch_path", "watch_include", "watch_exclude"):
        if getattr(options, key) and not options.watch:
            yield _Clash(key, "without", "watch", "nothing is watched", fix="--watch")
    if any(isinstance(parse_address(text), UdpAddress) for text in options.bind):
        if options.kind in {"asgi", "stream"}:
            cause = f"{options.kind} needs connections, and UDP has none"
            yield _Clash("bind", "with", "kind", cause, fix="--kind datagram", note="or bind a tcp:// address")
        if options.tls_cert:
            yield _Clash("bind", "with", "tls_cert", "TLS needs connections, and UDP has none", fix="--bind :8443")


def _tls_clashes(options: Options) -> Iterable[_Clash]:
    certs, keys = len(options.tls_cert), len(options.tls_key)
    if not certs:
        if keys:
            cause = "a key is of no use without its certificate"
            yield _Clash("tls_key", "without", "tls_cert", cause, note="name its certificate with --tls-cert")
        for key in ("tls_client_ca", "tls_client_auth", "tls_alpn", "tls_handoff"):
            if getattr(options, key) != getattr(_DEFAULTS, key):
                cause = "it is a part of TLS, which needs a certificate"
                yield _Clash(key, "without", "tls_cert", cause, note="name a certificate with --tls-cert")
    elif keys not in (0, certs):
        cause = f"the number of certificates is {certs}, that of keys {keys}: each key goes with one certificate"
        note = "like this: --tls-cert A.pem --tls-key A.key --tls-cert B.pem --tls-key B.key"
        yield _Clash("tls_key", "with", "tls_cert", cause, note=note)
    if options.tls_client_auth in {"optional", "required"} and options.tls_client_ca is None:
        cause = "there is no authority to judge certificates of clients by"
        note = "name its certificates with --tls-client-ca"
        yield _Clash("tls_client_auth", "without", "tls_client_ca", cause, note=note)
    if options.kind == "sockets" and certs:
        cause = "a sockets application has a server of its own, which speaks TLS by itself"
        note = "remove tls_cert, and give the certificate to that server"
        yield _Clash("tls_cert", "with", "kind", cause, note=note)


class Row(NamedTuple):
    """One line of ``--show-config``; `value` is as in TOML, and None if there is none."""

    key: str
    value: Any
    origin: str


def rows(loaded: Loaded) -> tuple[Row, ...]:
    """List each effective value and its origin, in the order of `OPTIONS`."""

    def value(option: Option) -> Any:
        found = getattr(loaded.options, option.field)
        return None if found is None else option.type.to_native(found)

    return tuple(Row(option.key, value(option), loaded.origins[option.key]) for option in OPTIONS)


def show(loaded: Loaded) -> str:
    """Show the rows as aligned text that is itself a ``hotport.toml``."""
    table = rows(loaded)
    name_width = max(len(row.key) for row in table)
    value_width = max(len(_toml(row.value)) for row in table)
    return "\n".join(
        f"# {row.key} is not set"
        if row.value is None
        else f"{row.key:{name_width}} = {_toml(row.value):{value_width}}  # {row.origin}"
        for row in table
    )


def _toml(value: object) -> str:
    """A TOML value; JSON is one but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
