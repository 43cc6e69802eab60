"""The options of a service, and what is computed from them alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

from hotport.errors import ConfigError
from hotport.options.values import (
    Type,
    address,
    addresses,
    choice,
    command_line,
    count,
    duration,
    hook,
    mode,
    paths,
    peers,
    prefix,
    protocols,
    share,
    size,
    switch,
    target,
    text,
    url_path,
)

__all__ = [
    "ENVIRONMENT_PREFIX",
    "NAME",
    "NAME_CHARS_MAX",
    "OPTIONS",
    "WORKERS_MAX",
    "Option",
    "Options",
    "as_name",
    "runtime_root",
    "service_name",
]

ENVIRONMENT_PREFIX: Final = "HOTPORT_"

NAME_CHARS_MAX: Final = 48
"""Leaves room in the 107 bytes of a unix path for the runtime directory and a worker's socket."""

WORKERS_MAX: Final = 1024
"""However the number of workers is asked for: each of them is a process."""

Kind: TypeAlias = Literal["auto", "asgi", "stream", "protocol", "datagram", "sockets"]
Loop: TypeAlias = Literal["uvloop", "asyncio"]
Ready: TypeAlias = Literal["notify", "exec"]
Balance: TypeAlias = Literal["auto", "off"]
HandoffChoice: TypeAlias = Literal["auto", "websocket", "off"]
AccessLog: TypeAlias = Literal["off", "structured", "combined"]
StrategyChoice: TypeAlias = Literal["auto", "inherit", "transfer", "overlap", "rebind"]
TlsHandoff: TypeAlias = Literal["off", "on"]
ClientAuth: TypeAlias = Literal["auto", "none", "optional", "required"]
Lifespan: TypeAlias = Literal["auto", "on", "off"]
LogFormat: TypeAlias = Literal["auto", "console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]


def _option(default: object, type_: Type, says: str) -> Any:
    return field(default=default, metadata={"type": type_, "help": says})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of a service; durations are seconds, sizes bytes.

    It travels to workers as JSON, so it holds nothing but numbers, texts and tuples of texts.
    """

    target: str | None = _option(None, target(), "The application: module:name or path/to/file.py:name.")
    command: tuple[str, ...] = _option(
        (), command_line(), "Any program that supports socket activation, in place of a target."
    )
    bind: tuple[str, ...] = _option(
        ("tcp://127.0.0.1:8000",), addresses(), "Where to listen; may be given more than once."
    )
    name: str | None = _option(None, text("NAME"), "The name of the service; by default made from the target.")
    kind: Kind = _option("auto", choice(*get_args(Kind)), "The kind of application; auto detects it.")
    factory: bool = _option(False, switch(), "The target is a function that returns the application.")
    user: str | None = _option(
        None, text("USER"), "As whom workers run, with its groups; the supervisor stays root, and loads no application."
    )
    group: str | None = _option(None, text("GROUP"), "The group of workers, in place of the user's own.")
    socket_mode: str | None = _option(
        None,
        mode(),
        "The mode of unix: socket files; by default 0660 with a user or group, else what the umask leaves.",
    )
    socket_user: str | None = _option(None, text("USER"), "Whose unix: socket files are; by default user.")
    socket_group: str | None = _option(
        None, text("GROUP"), "The group of unix: socket files, such as a proxy's; by default that of workers."
    )
    workers: int = _option(1, count(1, WORKERS_MAX), "Worker processes.")
    tasks: int = _option(1, count(1, 1024), "Acceptor tasks in each worker.")
    loop: Loop = _option("uvloop", choice(*get_args(Loop)), "The event loop of a worker.")
    backlog: int = _option(4096, count(1), "The accept queue; the kernel caps it at net.core.somaxconn.")
    connections_max: int = _option(
        0, count(0), "Open connections at which a worker stops accepting; 0: what RLIMIT_NOFILE allows."
    )
    ready: Ready = _option(
        "notify", choice(*get_args(Ready)), "When a command is ready: by its READY=1, or once it runs."
    )
    ready_timeout_s: float = _option(
        60.0, duration(is_positive=True), "How long a new worker may take to become ready."
    )
    before_start: tuple[str, ...] = _option(
        (),
        hook(),
        "A command that is run once before the workers of a generation start; if it fails, they do not start.",
    )
    before_start_timeout_s: float = _option(
        300.0, duration(is_positive=True), "How long before_start may take; then it is ended, and has failed."
    )
    after_restart: tuple[str, ...] = _option(
        (), hook(), "A command that is run after each restart, and reads its report on stdin, as JSON."
    )
    after_restart_timeout_s: float = _option(
        30.0, duration(is_positive=True), "How long after_restart may take before it is ended."
    )
    settle_s: float = _option(0.25, duration(), "How long a new worker must stay alive after it said ready.")
    drain_timeout_s: float = _option(30.0, duration(), "How long a leaving worker may take to finish; 1s with --watch.")
    kill_timeout_s: float = _option(5.0, duration(), "Time between asking a worker to leave at once and SIGKILL.")
    handoff: HandoffChoice = _option(
        "auto",
        choice(*get_args(HandoffChoice)),
        "Which connections a leaving worker hands to its successors: those whose application agrees, WebSockets of any "
        "application as well, or none.",
    )
    balance: Balance = _option(
        "auto",
        choice(*get_args(Balance)),
        "Whether workers share connections evenly: one with more leaves new ones to others, and hands open ones over.",
    )
    preload: bool = _option(
        False,
        switch(),
        "Whether a generation imports the application once, in a process from which all its workers are forked.",
    )
    start_parallel: int = _option(
        0, count(0), "How many workers may start at a time while others serve; 0: as many as half of the processors."
    )
    orphan_timeout_s: float = _option(60.0, duration(), "How long workers keep serving without a supervisor.")
    keep_alive_s: float = _option(5.0, duration(), "How long an idle HTTP connection stays open.")
    head_max_bytes: int = _option(65536, size(), "The largest HTTP request head; above it the answer is 431.")
    header_fields_max: int = _option(
        128, count(1), "The most header fields of an HTTP request; above it the answer is 431."
    )
    head_timeout_s: float = _option(
        30.0, duration(), "How long a request head may take to arrive, counted from connecting at first; 0: for ever."
    )
    body_max_bytes: int = _option(0, size(), "The largest HTTP request body; above it the answer is 413; 0: any.")
    connection_buffer_bytes: int = _option(
        256 * 1024, size(), "How much is buffered for one connection, in either direction, before reading pauses."
    )
    send_timeout_s: float = _option(
        60.0, duration(), "How long a client may read nothing of what is sent to it; 0: for ever."
    )
    body_timeout_s: float = _option(
        60.0, duration(), "How long nothing of an HTTP request body may arrive; then the answer is 408; 0: for ever."
    )
    rate_min_bytes: int = _option(
        500,
        size(),
        "Bytes a second below which an HTTP client sends too slowly over body_timeout, or reads too slowly over "
        "send_timeout.",
    )
    request_timeout_s: float = _option(
        0.0,
        duration(),
        "How long an HTTP request may take from its complete head to the end of its answer; then it is cancelled and "
        "answered 503; 0: for ever.",
    )
    concurrency_max: int = _option(
        0, count(0), "Concurrent requests in a worker above which the answer is 503; 0: any number."
    )
    server_header: bool = _option(True, switch(), "Say `server: hotport` in answers.")
    ws_message_max_bytes: int = _option(
        16 * 1024 * 1024, size(), "The largest WebSocket message; a larger one closes with 1009."
    )
    ws_queue: int = _option(32, count(1), "WebSocket messages that wait for the application before reading pauses.")
    ws_ping_interval_s: float = _option(20.0, duration(), "From a WebSocket's pong to the next ping; 0: no pings.")
    ws_ping_timeout_s: float = _option(
        20.0, duration(is_positive=True), "How long a WebSocket's client may be silent after a ping."
    )
    ws_deflate: bool = _option(True, switch(), "WebSocket messages may be compressed (permessage-deflate).")
    phased: bool = _option(False, switch(), "Restart one worker after the other, for machines short of memory.")
    max_requests: int = _option(0, count(0), "Requests after which a worker is replaced; 0: never.")
    max_requests_jitter: int = _option(0, count(0), "Random number of further requests for each worker, at most this.")
    max_memory_bytes: int = _option(0, size(), "Resident memory at which a worker is replaced; 0: never.")
    memory_pressure_bytes: int = _option(
        0,
        size(),
        "Resident memory above which a worker accepts nothing, and ends the connections that hold most; 0: never.",
    )
    max_age_s: float = _option(0.0, duration(), "Age at which a worker is replaced; 0: never.")
    hang_report_s: float = _option(
        10.0,
        duration(),
        "How long a worker's event loop may be blocked before its Python stack is logged; 0: for ever.",
    )
    hang_timeout_s: float = _option(
        60.0, duration(), "How long a worker's event loop may be blocked before the worker is replaced; 0: for ever."
    )
    trusted_proxy: tuple[str, ...] = _option(
        ("127.0.0.1", "::1", "unix"),
        peers(),
        "Proxies that are trusted to name their clients: addresses, networks, unix or *; may be given more than once.",
    )
    proxy_protocol: bool = _option(
        False, switch(), "Trusted proxies begin each connection with a PROXY header (version 1 or 2)."
    )
    root_path: str = _option("", prefix(), "The path prefix that a proxy removes before an ASGI application: /api.")
    tls_cert: tuple[str, ...] = _option(
        (),
        paths("FILE"),
        "Certificate chain (PEM), read again by each generation; several are chosen by name, the first one is for "
        "all other names.",
    )
    tls_key: tuple[str, ...] = _option(
        (), paths("FILE"), "Its private key, if it is not in the same file; as many as certificates."
    )
    tls_client_ca: str | None = _option(None, text("FILE"), "Authorities (PEM) that sign the certificates of clients.")
    tls_client_auth: ClientAuth = _option(
        "auto",
        choice(*get_args(ClientAuth)),
        "Whether clients need a certificate; auto: required with a tls_client_ca.",
    )
    tls_alpn: tuple[str, ...] = _option(
        (), protocols(), "Protocols over TLS (ALPN), the preferred one first; by default http/1.1 for asgi."
    )
    tls_handoff: TlsHandoff = _option(
        "off",
        choice(*get_args(TlsHandoff)),
        "Whether connections over TLS are handed to other workers as well, with their keys; needs hotport[tls].",
    )
    app_dir: str = _option(".", text("DIR"), "Where the target is imported from.")
    python: str | None = _option(None, text("FILE"), "The interpreter of workers; by default this one.")
    env_file: tuple[str, ...] = _option(
        (),
        paths("FILE"),
        "Variables for workers, as lines of NAME=VALUE, read again at each restart; hotport's own environment is "
        "stronger; may be given more than once.",
    )
    lifespan: Lifespan = _option("auto", choice(*get_args(Lifespan)), "ASGI lifespan; auto: if the app supports it.")
    watch: bool = _option(False, switch(), "Restart when code changes.")
    watch_path: tuple[str, ...] = _option(
        (),
        paths(),
        "What to watch in place of the app directory: a directory's code, or any file; may be given more than once.",
    )
    watch_include: tuple[str, ...] = _option(
        (),
        paths("PATTERN"),
        "More files that count in watched directories, like *.html; may be given more than once.",
    )
    watch_exclude: tuple[str, ...] = _option(
        (),
        paths("PATTERN"),
        "Files and directories that do not count in watched ones, like tests; may be given more than once.",
    )
    access_log: AccessLog = _option(
        "off", choice(*get_args(AccessLog)), "A line for each HTTP request: like other log lines, or Apache's."
    )
    request_id: bool = _option(
        False,
        switch(),
        "Give each HTTP request an id, or take that of a trusted proxy: in X-Request-ID, the access log, log lines.",
    )
    log_format: LogFormat = _option("auto", choice(*get_args(LogFormat)), "Log lines; auto: console on a terminal.")
    log_level: LogLevel = _option("info", choice(*get_args(LogLevel)), "The lowest level that is logged.")
    lame_duck_s: float = _option(
        0.0,
        duration(),
        "How long a stopping service reports that on its status port and keeps serving, before it drains.",
    )
    status_bind: str | None = _option(
        None,
        address(),
        "Where to answer health checks (/ready, /live, HAProxy's agent-check) and Prometheus (/metrics), and show the "
        "service (/, /status).",
    )
    app_metrics: bool = _option(
        False,
        switch(),
        "Whether /metrics has the application's own metrics, too, for which prometheus_client gets a directory.",
    )
    strategy: StrategyChoice = _option(
        "auto",
        choice(*get_args(StrategyChoice)),
        "How listeners reach the next generation; auto: the best way that can work.",
    )
    guard: bool = _option(False, switch(), "Keep TCP ports from other users even while nothing listens on them.")
    undo_window_s: float = _option(
        0.0, duration(), "How long the old generation stays after a restart, so that it can be undone; 0: not at all."
    )
    canary: int = _option(
        0,
        count(0, WORKERS_MAX),
        "New workers that serve beside the old ones, and bake, before the others start; 0: none.",
    )
    bake_s: float = _option(60.0, duration(is_positive=True), "How long a canary is watched before the others start.")
    health_path: str | None = _option(
        None,
        url_path(),
        "What each new worker is asked for while it is watched (GET, not over the port); 2xx and 3xx are healthy.",
    )
    health_timeout_s: float = _option(2.0, duration(is_positive=True), "How long the answer to health_path may take.")
    health_errors_max: float = _option(
        0.0, share(), "The share of 5xx among the new workers' answers above which they are taken back; 0: any."
    )
    health_requests_min: int = _option(20, count(1), "Requests before health_errors_max is applied.")
    health_lag_max_s: float = _option(
        0.0, duration(), "How long a new worker's event loop may be blocked while it is watched; 0: for ever."
    )
    health_memory_max_bytes: int = _option(
        0, size(), "Resident memory of a new worker above which it is taken back while it is watched; 0: any."
    )

    @property
    def moves_connections(self) -> bool:
        """Whether connections may move to other workers."""
        return self.handoff != "off" and (not self.tls_cert or self.tls_handoff == "on")


@dataclass(frozen=True, slots=True)
class Option:
    """One option under all its names.

    Attributes:
        field: The attribute of `Options`, with its unit: ``ready_timeout_s``.
        key: In TOML and in the ``flags`` of `load`: ``ready_timeout``.
        env: ``HOTPORT_READY_TIMEOUT``.
        flag: ``--ready-timeout``; None for the target and the command, which are arguments.
        help: One sentence.
        metavar: What stands for the value in a usage line; empty for a switch.
        default: In the form in which a user writes it: ``"1m"``, not ``60.0``.
        choices: The only values allowed; empty if there are others.
        is_switch: It is on or off: ``--watch``, ``--no-watch``.
        is_list: It may be given more than once.
        type: How its values are read and shown.
    """

    field: str
    key: str
    env: str
    flag: str | None
    help: str
    metavar: str
    default: object
    choices: tuple[str, ...]
    is_switch: bool
    is_list: bool
    type: Type


def _describe() -> Iterable[Option]:
    for definition in fields(Options):
        type_: Type = definition.metadata["type"]
        key = definition.name.removesuffix(type_.suffix)
        yield Option(
            field=definition.name,
            key=key,
            env=ENVIRONMENT_PREFIX + key.upper(),
            flag=None if key in {"target", "command"} else "--" + key.replace("_", "-"),
            help=definition.metadata["help"],
            metavar=type_.metavar,
            default=None if definition.default is None else type_.to_native(definition.default),
            choices=type_.choices,
            is_switch=type_.is_switch,
            is_list=type_.is_list,
            type=type_,
        )


OPTIONS: Final[tuple[Option, ...]] = tuple(_describe())

NAME: Final = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{NAME_CHARS_MAX - 1}}}")


def service_name(options: Options) -> str:
    """Return the service's name: as given, else made from the target's module or file, or the command.

    ``app:app`` is ``app``, ``path/to/server.py:echo`` is ``server``, ``/usr/bin/gunicorn`` is ``gunicorn``.
    """
    if options.name is not None:
        return options.name
    if options.command:
        return as_name(options.command[0].rpartition("/")[2])
    if options.target is None:
        return "embedded"
    module = options.target.rpartition(":")[0] or options.target
    return as_name(module.rpartition("/")[2].removesuffix(".py"))


def as_name(text: str) -> str:
    """Convert `text` to a name that `NAME` matches."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")[:NAME_CHARS_MAX] or "app"


def runtime_root(environ: Mapping[str, str], uid: int, tmp: Path) -> Path:
    """Return the directory that holds one directory for each service of this user.

    Args:
        environ: ``HOTPORT_RUNTIME_DIR`` wins over ``XDG_RUNTIME_DIR``.
        uid: Root's is ``/run/hotport`` otherwise.
        tmp: That of other users is ``hotport-UID`` in there.

    Raises:
        ConfigError: If ``HOTPORT_RUNTIME_DIR`` is relative (HP308): workers run in other directories.
    """
    if given := environ.get("HOTPORT_RUNTIME_DIR"):
        if not given.startswith("/"):
            cause = "every process of a service must find it, wherever it runs"
            fix = f'HOTPORT_RUNTIME_DIR="$PWD/{given}"'
            raise ConfigError("HP308", f"HOTPORT_RUNTIME_DIR cannot be {given!r}", cause=cause, fix=fix)
        return Path(given)
    xdg = environ.get("XDG_RUNTIME_DIR", "")
    if xdg.startswith("/"):  # a relative one is to be ignored, says the XDG base directory specification
        return Path(xdg, "hotport")
    return Path("/run/hotport") if uid == 0 else tmp / f"hotport-{uid}"
