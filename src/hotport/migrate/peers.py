"""The options of other servers and what they are here; data alone.

``hotport serve`` recognises their flags by these tables, ``hotport migrate`` translates by them, the pages in
``docs/coming-from`` are written from them, and a test compares them with the ``--help`` of the installed servers.
"""

from __future__ import annotations

from typing import Final

from hotport.migrate.table import ALWAYS, NO_EQUAL, Peer, Row

__all__ = ["PEERS", "UNIT"]

_ALPN: Final = "TLS 1.2 or newer, with OpenSSL's own choice of ciphers; `OPENSSL_CONF` changes it"
_BACKGROUND: Final = "a service manager, a container or `nohup` runs it in the background"
_CHECK: Final = "`hotport serve --show-config` checks the options and prints them"
_DATE: Final = "every answer has a `date`"
_ENCRYPTED: Final = "keys must be readable as they are; protect the file by its mode"
_HTTP2: Final = "HTTP/1.1 and WebSockets alone: a proxy in front speaks HTTP/2 and HTTP/3"
_LOGFILE: Final = "log lines go to stderr: redirect it, or let the service manager keep them"
_LOGGING: Final = "the application configures its logging; for hotport's lines there are `log_format` and `log_level`"
_METRICS: Final = "`/metrics` of the status port, for Prometheus; with `hotport[metrics]`"
_PARSER: Final = "httptools, always"
_PIDS: Final = "`hotport status` names the pids, and `hotport restart` finds the service by its name"
_STATSD: Final = "no statsd: `status_bind` has `/metrics` for Prometheus, with `hotport[metrics]`"
_STRICT: Final = "what RFC 9112 wants refused is refused"
_THREADS: Final = "an ASGI application has its own threads; of a WSGI one `WSGIMiddleware(app, workers=N)` sets them"
_WORKER_TMP: Final = "workers are watched over sockets, not by files"

UVICORN: Final = Peer(
    "uvicorn",
    "uvicorn",
    (
        Row("--host", "bind", "host"),
        Row("--port", "bind", "port"),
        Row("--uds", "bind", "uds"),
        Row("--fd", "bind", "fd"),
        Row("--reload", "watch", "on"),
        Row("--reload-dir", "watch_path"),
        Row("--reload-include", "watch_include", why="Python files always count"),
        Row("--reload-exclude", "watch_exclude"),
        Row("--reload-delay", ALWAYS, why="the kernel reports changes (inotify); nothing is polled"),
        Row("--workers", "workers"),
        Row("--loop", "loop", "loop"),
        Row("--http", ALWAYS, why=_PARSER),
        Row("--http2", NO_EQUAL, "alone", _HTTP2),
        Row("--ws", ALWAYS, why="the sans-I/O core of websockets, always"),
        Row("--ws-max-size", "ws_message_max"),
        Row("--ws-max-queue", "ws_queue"),
        Row("--ws-ping-interval", "ws_ping_interval"),
        Row("--ws-ping-timeout", "ws_ping_timeout"),
        Row("--ws-per-message-deflate", "ws_deflate"),
        Row("--lifespan", "lifespan"),
        Row("--interface", "kind", "interface", "WSGI and ASGI 2 applications are wrapped: `hotport serve` says how"),
        Row("--env-file", "env_file"),
        Row("--log-config", NO_EQUAL, why=_LOGGING),
        Row("--log-level", "log_level", "level"),
        Row("--access-log", "access_log", "combined"),
        Row("--no-access-log", "access_log", "silent"),
        Row("--use-colors --no-use-colors", ALWAYS, "alone", "colour on a terminal, unless `NO_COLOR` is set"),
        Row("--proxy-headers", ALWAYS, "alone", "on for each `trusted_proxy`: 127.0.0.1, ::1 and unix sockets"),
        Row("--no-proxy-headers", "trusted_proxy", "nobody", "192.0.2.1 is the address of no machine (RFC 5737)"),
        Row("--server-header", "server_header", "on"),
        Row("--no-server-header", "server_header", "off"),
        Row("--date-header", ALWAYS, "alone", _DATE),
        Row("--no-date-header", NO_EQUAL, "alone", _DATE),
        Row("--forwarded-allow-ips", "trusted_proxy", "trusted"),
        Row("--root-path", "root_path", "prefix"),
        Row("--limit-concurrency", "concurrency_max"),
        Row("--backlog", "backlog"),
        Row("--limit-max-requests", "max_requests", why="a worker is replaced, and its connections move"),
        Row("--limit-max-requests-jitter", "max_requests_jitter"),
        Row("--timeout-keep-alive", "keep_alive"),
        Row("--timeout-graceful-shutdown", "drain_timeout"),
        Row("--timeout-worker-healthcheck", "hang_timeout"),
        Row("--ssl-keyfile", "tls_key"),
        Row("--ssl-certfile", "tls_cert"),
        Row("--ssl-keyfile-password", NO_EQUAL, why=_ENCRYPTED),
        Row("--ssl-version", ALWAYS, why=_ALPN),
        Row("--ssl-cert-reqs", "tls_client_auth", "auth"),
        Row("--ssl-ca-certs", "tls_client_ca"),
        Row("--ssl-ciphers", NO_EQUAL, why=_ALPN),
        Row("--header", NO_EQUAL, why="the application, its middleware or the proxy adds header fields"),
        Row("--version", ALWAYS, "alone", "`hotport --version`"),
        Row("--app-dir", "app_dir"),
        Row("--h11-max-incomplete-event-size", "head_max"),
        Row(
            "--reset-contextvars", NO_EQUAL, "alone", "the application runs what it wants apart in a context of its own"
        ),
        Row("--factory", "factory", "on"),
        Row("--help", ALWAYS, "alone", "`hotport serve --help`"),
    ),
    (
        "uvicorn logs each request unless told not to; here `access_log` is `off` until it is set.",
        "`WEB_CONCURRENCY`, `FORWARDED_ALLOW_IPS` and `UVICORN_*` are not read; each option has a `HOTPORT_*` "
        "variable.",
        "`--workers` and `--watch` go together.",
    ),
)

GUNICORN: Final = Peer(
    "gunicorn",
    "gunicorn",
    (
        Row("-h --help -v --version", ALWAYS, "alone", "`hotport serve --help`, `hotport --version`"),
        Row("-c --config", ALWAYS, "config", "`hotport migrate` reads it and prints a `hotport.toml`"),
        Row("-b --bind", "bind", "address"),
        Row("--backlog", "backlog"),
        Row("-w --workers", "workers"),
        Row("-k --worker-class", "loop", "class", "ASGI workers need nothing; WSGI is below"),
        Row("--threads", NO_EQUAL, why=_THREADS),
        Row("--worker-connections", "connections_max"),
        Row("--max-requests", "max_requests", why="a worker is replaced, and its connections move"),
        Row("--max-requests-jitter", "max_requests_jitter"),
        Row("-t --timeout", "hang_timeout", why="of the event loop; of one request: `request_timeout`"),
        Row("--graceful-timeout", "drain_timeout"),
        Row("--keep-alive", "keep_alive", settings="keepalive"),
        Row("--limit-request-line", NO_EQUAL, why="`head_max` is for the line and all fields together"),
        Row("--limit-request-fields", "header_fields_max"),
        Row("--limit-request-field_size", NO_EQUAL, why="`head_max` is for the line and all fields together"),
        Row("--reload", "watch", "on"),
        Row("--reload-engine", ALWAYS, why="the kernel reports changes (inotify)"),
        Row("--reload-extra-file", "watch_path", "extra", settings="reload_extra_files"),
        Row("--spew", NO_EQUAL, "alone", "a debugger does this"),
        Row("--check-config --print-config", ALWAYS, "alone", _CHECK),
        Row("--preload", "preload", "on", settings="preload_app"),
        Row(
            "--no-sendfile",
            NO_EQUAL,
            "alone",
            "an application that does not use `http.response.pathsend` sends none",
            settings="sendfile",
        ),
        Row("--reuse-port", ALWAYS, "alone", "workers share one listener, and open connections evenly"),
        Row("--chdir", "app_dir", why="it is where modules are found; for relative paths, `cd` there first"),
        Row("-D --daemon", NO_EQUAL, "alone", _BACKGROUND),
        Row(
            "-e --env",
            NO_EQUAL,
            why="write it into a file of lines NAME=VALUE, and name that in `env_file`",
            settings="raw_env",
        ),
        Row("-p --pid", NO_EQUAL, why=_PIDS, settings="pidfile"),
        Row("--worker-tmp-dir", ALWAYS, why=_WORKER_TMP),
        Row("-u --user", "user"),
        Row("-g --group", "group"),
        Row(
            "-m --umask", "socket_mode", "umask", "of socket files; workers keep the umask that hotport is started with"
        ),
        Row("--initgroups", ALWAYS, "alone", "workers get all groups of `user`"),
        Row("--forwarded-allow-ips", "trusted_proxy", "trusted"),
        Row("--access-logfile", "access_log", "logfile", _LOGFILE, settings="accesslog"),
        Row("--disable-redirect-access-to-syslog", ALWAYS, "alone", "nothing goes to syslog"),
        Row(
            "--access-logformat",
            NO_EQUAL,
            why="`access_log` is `combined`, or `structured` for JSON",
            settings="access_log_format",
        ),
        Row("--error-logfile --log-file", ALWAYS, why=_LOGFILE, settings="errorlog"),
        Row("--log-level", "log_level", "level", settings="loglevel"),
        Row("--capture-output", ALWAYS, "alone", "workers inherit stdout and stderr"),
        Row("--logger-class", NO_EQUAL, why=_LOGGING),
        Row(
            "--log-config --log-config-json", NO_EQUAL, why=_LOGGING, settings="logconfig logconfig_dict logconfig_json"
        ),
        Row(
            "--log-syslog-to --log-syslog-prefix --log-syslog-facility",
            NO_EQUAL,
            why=_LOGFILE,
            settings="syslog_addr syslog_prefix syslog_facility",
        ),
        Row("--log-syslog", NO_EQUAL, "alone", _LOGFILE, settings="syslog"),
        Row("-R --enable-stdio-inheritance", ALWAYS, "alone", "workers inherit stdout and stderr"),
        Row("--statsd-host --dogstatsd-tags --statsd-prefix", NO_EQUAL, why=_STATSD),
        Row("--enable-backlog-metric", NO_EQUAL, "alone", "`hotport status` shows the accept queue"),
        Row(
            "-n --name",
            "name",
            "name",
            "in `hotport status` and the log; processes keep their titles",
            settings="proc_name default_proc_name",
        ),
        Row("--pythonpath", "app_dir", "first", "one directory; `PYTHONPATH` takes more"),
        Row(
            "--paste --paster --paste-global",
            NO_EQUAL,
            why="no PasteDeploy: name a factory (`factory`)",
            settings="paste raw_paste_global_conf",
        ),
        Row("--proxy-protocol", "proxy_protocol", "proxy"),
        Row("--proxy-allow-from", "trusted_proxy", "trusted", settings="proxy_allow_ips"),
        Row("--protocol", NO_EQUAL, why="HTTP alone, not the uwsgi protocol: let nginx use `proxy_pass`"),
        Row("--uwsgi-allow-from", NO_EQUAL, why="no uwsgi protocol", settings="uwsgi_allow_ips"),
        Row("--keyfile", "tls_key"),
        Row("--certfile", "tls_cert"),
        Row("--ssl-version", ALWAYS, why=_ALPN),
        Row("--cert-reqs", "tls_client_auth", "auth"),
        Row("--ca-certs", "tls_client_ca"),
        Row("--suppress-ragged-eofs --do-handshake-on-connect", ALWAYS, "alone", "the event loop does the handshake"),
        Row("--ciphers", NO_EQUAL, why=_ALPN),
        Row(
            "--http-protocols --http2-cleartext --http2-max-concurrent-streams --http2-initial-window-size "
            "--http2-max-frame-size --http2-max-header-list-size",
            NO_EQUAL,
            why=_HTTP2,
        ),
        Row(
            "--permit-obsolete-folding --strip-header-spaces --permit-unconventional-http-method "
            "--permit-unconventional-http-version --casefold-http-method",
            NO_EQUAL,
            "alone",
            _STRICT,
        ),
        Row(
            "--forwarder-headers --header-map",
            NO_EQUAL,
            why="ASGI has header fields as they came, not a CGI environment",
        ),
        Row("--asgi-loop", "loop", "loop"),
        Row("--asgi-lifespan", "lifespan"),
        Row("--asgi-disconnect-grace-period", NO_EQUAL, why="an application is told at once that its client has left"),
        Row("--websocket-max-message-size", "ws_message_max"),
        Row("--http-parser", ALWAYS, why=_PARSER),
        Row("--root-path", "root_path", "prefix"),
        Row(
            "--dirty-app --dirty-workers --dirty-timeout --dirty-threads --dirty-graceful-timeout",
            NO_EQUAL,
            why="a task queue does this",
            settings="dirty_apps dirty_workers dirty_timeout dirty_threads dirty_graceful_timeout",
        ),
        Row(
            "--control-socket --control-socket-mode", ALWAYS, why="`hotport status`, `restart`, `scale` need no option"
        ),
        Row(
            "--no-control-socket",
            NO_EQUAL,
            "alone",
            "it is what `hotport restart` talks to; its mode is 0600",
            settings="control_socket_disable",
        ),
        Row("", "target", settings="wsgi_app"),
        Row("", NO_EQUAL, why="bodies are not buffered in files", settings="tmp_upload_dir"),
        Row(
            "",
            ALWAYS,
            why="`X-Forwarded-Proto` and `Forwarded` of a `trusted_proxy` are read",
            settings="secure_scheme_headers",
        ),
        Row(
            "",
            NO_EQUAL,
            why="code before the workers: `before_start`; in a worker: the ASGI lifespan; "
            "after a restart: `after_restart`; after a fork from `preload`: `hotport.after_fork`",
            settings="on_starting on_reload when_ready pre_fork post_fork post_worker_init worker_int worker_abort "
            "pre_exec pre_request post_request child_exit worker_exit nworkers_changed on_exit on_dirty_starting "
            "dirty_post_fork dirty_worker_init dirty_worker_exit",
        ),
        Row("", NO_EQUAL, why=_ALPN, settings="ssl_context"),
    ),
    (
        "gunicorn listens on `0.0.0.0:$PORT` where `PORT` is set: here say `--bind :$PORT`.",
        "`WEB_CONCURRENCY`, `GUNICORN_CMD_ARGS` and `FORWARDED_ALLOW_IPS` are not read; each option has a `HOTPORT_*` "
        "variable.",
        "`keep_alive` is 5 s, not 2; a blocked event loop is given 1 min (`hang_timeout`), not 30 s.",
        "`kill -HUP` restarts here as well, start-first; TTIN and TTOU do what they do there.",
    ),
)

GRANIAN: Final = Peer(
    "granian",
    "granian",
    (
        Row("--host", "bind", "host"),
        Row("--port", "bind", "port"),
        Row("--uds", "bind", "uds"),
        Row("--uds-permissions", "socket_mode"),
        Row("--interface", "kind", "interface", "RSGI applications need an ASGI entry; WSGI ones are wrapped"),
        Row("--http", ALWAYS, "http", _HTTP2),
        Row("--ws", ALWAYS, "alone", "WebSockets are always served"),
        Row("--no-ws", NO_EQUAL, "alone", "an application refuses a WebSocket that it does not want"),
        Row("--workers", "workers"),
        Row("--blocking-threads --blocking-threads-idle-timeout", NO_EQUAL, why=_THREADS),
        Row(
            "--runtime-threads --runtime-blocking-threads --runtime-mode",
            ALWAYS,
            why="no runtime beside the event loop: one thread a worker",
        ),
        Row("--loop", "loop", "loop"),
        Row("--task-impl", ALWAYS, why="asyncio's tasks"),
        Row("--backlog", "backlog"),
        Row("--backpressure", "concurrency_max", why="above it the answer is 503; there, requests wait"),
        Row("--http1-buffer-size", "connection_buffer"),
        Row("--http1-header-read-timeout", "head_timeout", "ms"),
        Row(
            "--http1-keep-alive --http1-pipeline-flush --no-http1-pipeline-flush",
            ALWAYS,
            "alone",
            "connections are kept; pipelined answers are written together",
        ),
        Row("--no-http1-keep-alive", "keep_alive", "zero"),
        Row("--http2-adaptive-window --no-http2-adaptive-window", NO_EQUAL, "alone", _HTTP2),
        Row(
            "--http2-initial-connection-window-size --http2-initial-stream-window-size --http2-keep-alive-interval "
            "--http2-keep-alive-timeout --http2-max-concurrent-streams --http2-max-frame-size --http2-max-headers-size "
            "--http2-max-send-buffer-size",
            NO_EQUAL,
            why=_HTTP2,
        ),
        Row("--log", ALWAYS, "alone", "hotport logs to stderr"),
        Row("--no-log", "log_level", "quiet"),
        Row("--log-level", "log_level", "level"),
        Row("--log-config", NO_EQUAL, why=_LOGGING),
        Row("--access-log", "access_log", "combined"),
        Row("--no-access-log", "access_log", "silent"),
        Row("--access-log-fmt", NO_EQUAL, why="`access_log` is `combined`, or `structured` for JSON"),
        Row("--ssl-certificate", "tls_cert"),
        Row("--ssl-keyfile", "tls_key"),
        Row("--ssl-keyfile-password", NO_EQUAL, why=_ENCRYPTED),
        Row("--ssl-protocol-min", ALWAYS, why=_ALPN),
        Row("--ssl-ca", "tls_client_ca"),
        Row("--ssl-crl", NO_EQUAL, why="no lists of revoked certificates: a proxy has them"),
        Row("--ssl-client-verify", "tls_client_auth", "required"),
        Row("--no-ssl-client-verify", "tls_client_auth", "none"),
        Row("--url-path-prefix", "root_path", "prefix"),
        Row("--respawn-failed-workers", ALWAYS, "alone", "a worker that ends is replaced"),
        Row("--no-respawn-failed-workers", NO_EQUAL, "alone", "a worker that ends is replaced"),
        Row("--respawn-interval", ALWAYS, why="new workers start first; `start_parallel` says how many at a time"),
        Row("--rss-sample-interval --rss-samples", ALWAYS, why="memory is read at fixed intervals"),
        Row("--workers-lifetime", "max_age"),
        Row("--workers-max-rss", "max_memory", "MiB"),
        Row("--workers-kill-timeout", "kill_timeout"),
        Row("--factory", "factory", "on"),
        Row("--no-factory", "factory", "off"),
        Row("--working-dir", "app_dir", why="it is where modules are found; for relative paths, `cd` there first"),
        Row("--env-files", "env_file"),
        Row(
            "--static-path-route --static-path-mount --static-path-dir-to-file --static-path-expires",
            NO_EQUAL,
            why="the application, whitenoise or a web server serves files",
        ),
        Row("--metrics", "status_bind", "metrics", _METRICS),
        Row("--no-metrics", ALWAYS, "alone", "there are none unless `status_bind` is set"),
        Row("--metrics-port", "status_bind", "local port", _METRICS),
        Row("--metrics-address", NO_EQUAL, why="it is the host of `status_bind`"),
        Row("--metrics-scrape-interval", ALWAYS, why="figures are computed when they are asked for"),
        Row("--reload", "watch", "on"),
        Row("--no-reload", "watch", "off"),
        Row("--reload-paths", "watch_path"),
        Row(
            "--reload-ignore-dirs --reload-ignore-patterns --reload-ignore-paths",
            "watch_exclude",
            why="names and patterns like `*.tmp`, not regular expressions",
        ),
        Row("--reload-tick", ALWAYS, why="the kernel reports changes (inotify); nothing is polled"),
        Row(
            "--reload-ignore-worker-failure --no-reload-ignore-worker-failure",
            ALWAYS,
            "alone",
            "code that does not start leaves the old code serving",
        ),
        Row("--process-name", "name", "name", "in `hotport status` and the log; processes keep their titles"),
        Row("--pid-file", NO_EQUAL, why=_PIDS),
        Row("--version --help", ALWAYS, "alone", "`hotport --version`, `hotport serve --help`"),
    ),
    (
        "granian takes RSGI unless told otherwise; hotport detects ASGI by itself.",
        "`GRANIAN_*` is not read; each option has a `HOTPORT_*` variable.",
    ),
)

HYPERCORN: Final = Peer(
    "hypercorn",
    "hypercorn",
    (
        Row("-h --help", ALWAYS, "alone", "`hotport serve --help`"),
        Row("--access-log --access-logfile", "access_log", "logfile", _LOGFILE, settings="accesslog"),
        Row(
            "--access-logformat",
            NO_EQUAL,
            why="`access_log` is `combined`, or `structured` for JSON",
            settings="access_log_format",
        ),
        Row("--backlog", "backlog"),
        Row("-b --bind", "bind", "address"),
        Row("--ca-certs", "tls_client_ca"),
        Row("--certfile", "tls_cert"),
        Row("--cert-reqs --verify-mode", "tls_client_auth", "auth"),
        Row("--ciphers", NO_EQUAL, why=_ALPN),
        Row("-c --config", ALWAYS, "config", "`hotport migrate` reads it and prints a `hotport.toml`"),
        Row("-D --daemon", NO_EQUAL, "alone", _BACKGROUND),
        Row("--debug", "log_level", "debug"),
        Row("--error-log --error-logfile --log-file", ALWAYS, why=_LOGFILE, settings="errorlog"),
        Row("--graceful-timeout", "drain_timeout"),
        Row("--read-timeout", "body_timeout", why="a head has `head_timeout`"),
        Row("--max-requests", "max_requests", why="a worker is replaced, and its connections move"),
        Row("--max-requests-jitter", "max_requests_jitter"),
        Row("-g --group", "socket_group", why="of socket files, as there; workers run as `user` and `group`"),
        Row("-k --worker-class", "loop", "class"),
        Row("--keep-alive", "keep_alive", settings="keep_alive_timeout"),
        Row("--keyfile", "tls_key"),
        Row("--keyfile-password", NO_EQUAL, why=_ENCRYPTED),
        Row("--insecure-bind", NO_EQUAL, why="one service has TLS or not: a second one, or a proxy, redirects"),
        Row("--log-config", NO_EQUAL, why=_LOGGING, settings="logconfig logconfig_dict logger_class"),
        Row("--log-level", "log_level", "level", settings="loglevel"),
        Row("-p --pid", NO_EQUAL, why=_PIDS, settings="pid_path"),
        Row("--quic-bind", NO_EQUAL, why=_HTTP2),
        Row("--reload", "watch", "on", settings="use_reloader"),
        Row("--root-path", "root_path", "prefix"),
        Row("--server-name", NO_EQUAL, why="the application or a proxy refuses other hosts", settings="server_names"),
        Row(
            "--statsd-host --statsd-prefix", NO_EQUAL, why=_STATSD, settings="statsd_host statsd_prefix dogstatsd_tags"
        ),
        Row(
            "-m --umask", "socket_mode", "umask", "of socket files; workers keep the umask that hotport is started with"
        ),
        Row("-u --user", "socket_user", why="of socket files, as there; workers run as `user` and `group`"),
        Row("--websocket-ping-interval", "ws_ping_interval"),
        Row("-w --workers", "workers"),
        Row("", "target", settings="application_path"),
        Row("", "ws_message_max", settings="websocket_max_message_size"),
        Row("", "head_max", settings="h11_max_incomplete_size"),
        Row("", "ready_timeout", settings="startup_timeout"),
        Row("", "server_header", settings="include_server_header"),
        Row("", "tls_alpn", why="without `h2`", how="alpn", settings="alpn_protocols"),
        Row("", ALWAYS, why=_DATE, settings="include_date_header"),
        Row(
            "",
            NO_EQUAL,
            why=_HTTP2,
            settings="alt_svc_headers h2_max_concurrent_streams h2_max_header_list_size h2_max_inbound_frame_size",
        ),
        Row("", NO_EQUAL, why="`drain_timeout` and `kill_timeout` end what stays", settings="shutdown_timeout"),
        Row("", "body_max", why="of every application", settings="wsgi_max_body_size"),
        Row(
            "",
            NO_EQUAL,
            why="a limit of hypercorn's own design",
            settings="h11_pass_raw_headers keep_alive_max_requests max_app_queue_size ssl_handshake_timeout "
            "verify_flags",
        ),
    ),
    ("`-k trio`: an application that needs trio runs in hypercorn, [inside a worker](../how-to/foreign-programs.md).",),
)

UWSGI: Final = Peer(
    "uwsgi",
    "uWSGI",
    (
        Row("--ini", ALWAYS, "config", "`hotport migrate` reads it and prints a `hotport.toml`"),
        Row("--http --http-socket", "bind", "address"),
        Row("-s --socket --uwsgi-socket", NO_EQUAL, why="no uwsgi protocol: `bind`, and nginx's `proxy_pass`"),
        Row("-w --module", "target"),
        Row("--wsgi-file --file", "target"),
        Row("--callable", "target", "callable", "it is the part of the target behind the colon"),
        Row("-p --processes --workers", "workers"),
        Row("--threads", NO_EQUAL, why=_THREADS),
        Row(
            "-M --master --enable-threads -T --need-app --single-interpreter -i --vacuum --die-on-term "
            "--lazy-apps --no-orphans --thunder-lock --strict",
            ALWAYS,
            "alone",
            "as hotport works without an option",
        ),
        Row("--chdir", "app_dir", why="it is where modules are found; for relative paths, `cd` there first"),
        Row("--pythonpath --pp", "app_dir", "first", "one directory; `PYTHONPATH` takes more"),
        Row("-H --home --virtualenv --venv", "python", "venv", "hotport must be installed in it"),
        Row("--uid", "user"),
        Row("--gid", "group"),
        Row("--chmod-socket -C", "socket_mode"),
        Row("--chown-socket", "socket_user", "owner"),
        Row("-l --listen", "backlog"),
        Row("-b --buffer-size", "head_max"),
        Row("--limit-post", "body_max"),
        Row("--post-buffering", NO_EQUAL, why="bodies are not buffered; the application reads them as they come"),
        Row("-t --harakiri", "request_timeout", why="the request is cancelled and answered 503; the worker stays"),
        Row("-R --max-requests", "max_requests", why="a worker is replaced, and its connections move"),
        Row("--max-worker-lifetime", "max_age"),
        Row("--reload-on-rss", "max_memory", "MiB"),
        Row("--evil-reload-on-rss", "memory_pressure", "MiB"),
        Row("--worker-reload-mercy --reload-mercy", "drain_timeout"),
        Row("--http-timeout --socket-timeout", "body_timeout"),
        Row("--http-keepalive", ALWAYS, "alone", "connections are kept (`keep_alive`)"),
        Row("--py-autoreload", "watch", "interval"),
        Row("--touch-reload --master-fifo", NO_EQUAL, why="`hotport restart` waits for the outcome and prints it"),
        Row("--env", NO_EQUAL, why="write it into a file of lines NAME=VALUE, and name that in `env_file`"),
        Row("--pidfile", NO_EQUAL, why=_PIDS),
        Row("--daemonize -d", NO_EQUAL, why=_BACKGROUND),
        Row("--logto", ALWAYS, why=_LOGFILE),
        Row("-L --disable-logging", "access_log", "silent"),
        Row("--stats", "status_bind", "address"),
        Row("--cheaper --cheaper-initial", NO_EQUAL, why="`hotport scale N` at any time"),
        Row(
            "--emperor --mule --spooler --cron", NO_EQUAL, why="one service is one application: systemd runs the others"
        ),
        Row("--static-map", NO_EQUAL, why="the application, whitenoise or a web server serves files"),
        Row("--plugin --plugins", ALWAYS, why="there are no plugins"),
        Row("--procname", "name", "name", "in `hotport status` and the log; processes keep their titles"),
        Row("--mount --manage-script-name", NO_EQUAL, why="`root_path`, and the application's own routes"),
    ),
    (
        "uWSGI serves WSGI applications; here they are wrapped, see below, or replaced by the framework's ASGI entry.",
        "The table has the options that sites use most; `hotport migrate` names each one that it does not know.",
    ),
    is_complete=False,
)

#: nginx Unit is configured by JSON alone; rows are the keys of it.
UNIT: Final = Peer(
    "unitd",
    "nginx Unit",
    (
        Row("", "bind", "address", "`*:8000` is `:8000`", settings='listeners."*:8000"'),
        Row("", "tls_cert", settings="listeners.*.tls.certificate"),
        Row("", "trusted_proxy", settings="listeners.*.forwarded.source"),
        Row("", "backlog", settings="listeners.*.backlog"),
        Row("", NO_EQUAL, why="one service is one application; paths are its own, or a proxy's", settings="routes"),
        Row("", "kind", why="`asgi` is detected; WSGI is wrapped, see below", settings="type protocol"),
        Row("", "target", why="`module:callable`", settings="module callable"),
        Row("", "factory", settings="factory"),
        Row("", "app_dir", settings="path"),
        Row("", "python", why="DIR/bin/python, with hotport installed in it", settings="home"),
        Row("", "root_path", settings="prefix"),
        Row("", "workers", why="a fixed number; `hotport scale N` changes it", settings="processes processes.max"),
        Row("", NO_EQUAL, why="`hotport scale N` at any time", settings="processes.spare processes.idle_timeout"),
        Row("", NO_EQUAL, why=_THREADS, settings="threads thread_stack_size"),
        Row("", "request_timeout", settings="limits.timeout"),
        Row("", "max_requests", settings="limits.requests"),
        Row("", "env_file", why="a file of lines NAME=VALUE", settings="environment"),
        Row("", "user", settings="user"),
        Row("", "group", settings="group"),
        Row(
            "",
            ALWAYS,
            why="`cd` there before `hotport serve`, or systemd's `WorkingDirectory=`",
            settings="working_directory",
        ),
        Row("", NO_EQUAL, why="systemd and containers isolate", settings="isolation"),
        Row("", ALWAYS, why=_LOGFILE, settings="stdout stderr"),
        Row("", "access_log", why="`combined`, on stderr", settings="access_log"),
        Row("", "head_timeout", settings="settings.http.header_read_timeout"),
        Row("", "body_timeout", settings="settings.http.body_read_timeout"),
        Row("", "send_timeout", settings="settings.http.send_timeout"),
        Row("", "keep_alive", settings="settings.http.idle_timeout"),
        Row("", "body_max", settings="settings.http.max_body_size"),
        Row("", "server_header", settings="settings.http.server_version"),
        Row("", NO_EQUAL, why="the application, whitenoise or a web server serves files", settings="share"),
    ),
    (
        "Unit's API changes one process at a time; here a file changes, and `hotport restart` reads it.",
        "Unit is no longer maintained and has no `--help` for these keys: they are those of its documentation.",
    ),
    is_complete=False,
)

#: Those with a command line; in the order in which a flag that several have is attributed.
PEERS: Final = (UVICORN, GUNICORN, HYPERCORN, GRANIAN, UWSGI)
