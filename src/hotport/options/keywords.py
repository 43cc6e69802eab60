"""The keyword arguments of `hotport.serve` and `hotport.run`, typed: the options by their names in ``hotport.toml``."""

from __future__ import annotations

from typing import TypeAlias, TypedDict

from hotport.options.definition import (
    AccessLog,
    Balance,
    ClientAuth,
    HandoffChoice,
    Kind,
    Lifespan,
    LogFormat,
    LogLevel,
    Loop,
    Ready,
    StrategyChoice,
    TlsHandoff,
)

__all__ = ["RunOptions", "ServeOptions"]

Duration: TypeAlias = float | str
"""Seconds, or like ``250ms``, ``30s``, ``2m``, ``1h30m``."""

Size: TypeAlias = int | str
"""Bytes, or like ``512M``, ``1.5G``."""

Share: TypeAlias = float | str
"""From 0 to 1, or like ``5%``."""

Command: TypeAlias = str | list[str] | tuple[str, ...]
"""A program and its arguments: a list, or text that is split as a shell would."""

Texts: TypeAlias = str | list[str] | tuple[str, ...]
"""A list, or text with commas."""


class ServeOptions(TypedDict, total=False):
    """Options of a server in the program's own event loop (`hotport.serve`), as in ``hotport.toml``."""

    kind: Kind
    tasks: int
    backlog: int
    connections_max: int
    ready_timeout: Duration
    drain_timeout: Duration
    kill_timeout: Duration
    handoff: HandoffChoice
    balance: Balance
    keep_alive: Duration
    head_max: Size
    header_fields_max: int
    head_timeout: Duration
    body_max: Size
    connection_buffer: Size
    send_timeout: Duration
    body_timeout: Duration
    rate_min: Size
    request_timeout: Duration
    concurrency_max: int
    server_header: bool
    ws_message_max: Size
    ws_queue: int
    ws_ping_interval: Duration
    ws_ping_timeout: Duration
    ws_deflate: bool
    trusted_proxy: Texts
    proxy_protocol: bool
    root_path: str
    tls_cert: Texts
    tls_key: Texts
    tls_client_ca: str | None
    tls_client_auth: ClientAuth
    tls_alpn: Texts
    tls_handoff: TlsHandoff
    lifespan: Lifespan
    access_log: AccessLog
    request_id: bool


class RunOptions(ServeOptions, total=False):
    """Options of a service under a supervisor (`hotport.run`), as in ``hotport.toml``."""

    name: str | None
    factory: bool
    user: str | None
    group: str | None
    socket_mode: str | None
    socket_user: str | None
    socket_group: str | None
    workers: int
    loop: Loop
    ready: Ready
    before_start: Command
    before_start_timeout: Duration
    after_restart: Command
    after_restart_timeout: Duration
    settle: Duration
    orphan_timeout: Duration
    phased: bool
    max_requests: int
    max_requests_jitter: int
    max_memory: Size
    memory_pressure: Size
    max_age: Duration
    hang_report: Duration
    hang_timeout: Duration
    app_dir: str
    python: str | None
    env_file: Texts
    watch: bool
    watch_path: Texts
    watch_include: Texts
    watch_exclude: Texts
    log_format: LogFormat
    log_level: LogLevel
    lame_duck: Duration
    status_bind: str | None
    app_metrics: bool
    strategy: StrategyChoice
    guard: bool
    preload: bool
    start_parallel: int
    undo_window: Duration
    canary: int
    bake: Duration
    health_path: str | None
    health_timeout: Duration
    health_errors_max: Share
    health_requests_min: int
    health_lag_max: Duration
    health_memory_max: Size
