from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hotport.errors import ConfigError
from hotport.model.strategies import Strategy
from hotport.options import (
    OPTIONS,
    Option,
    Options,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    runtime_root,
    service_name,
)
from hotport.options.keywords import Command, Duration, RunOptions, ServeOptions, Share, Size, Texts
from hotport.options.loading import Loaded, load, meant_flag, rows, show
from tests.support import assert_three_lines


def read(
    tmp_path: Path,
    toml: str = "",
    *,
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
    needs_program: bool = True,
    **flags: object,
) -> Loaded:
    """Options from a hotport.toml, an environment and flags, with a target unless the test is about it."""
    if toml:
        (tmp_path / "hotport.toml").write_text(toml)
    if not flags.keys() & {"target", "command"} and "target" not in toml and needs_program:
        flags["target"] = "app:app"
    return load(file=file, environ=environ or {}, flags=flags, cwd=tmp_path, needs_program=needs_program)


def refused(tmp_path: Path, *args: Any, **kwargs: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *args, **kwargs)
    assert_three_lines(str(caught.value), caught.value.code)
    return caught.value


# Durations and sizes


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30.0),
        ("250ms", 0.25),
        ("2m", 120.0),
        ("1h30m", 5400.0),
        ("1d", 86400.0),
        ("1m1s1ms", 61.001),
        ("1.5s", 1.5),
        ("0.5h", 1800.0),
        ("10", 10.0),
        ("0.1", 0.1),
        ("0", 0.0),
    ],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "30 s", "-1s", "1w", "1.s", ".5", "1e3", "30sec", "1s2", "367d", "²s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a duration is"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.25, "250ms"), (1.5, "1.5s"), (60, "1m"), (90, "1m30s"), (5400, "1h30m"), (86400, "1d")],
)
def test_durations_are_shown_as_a_person_writes_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(st.integers(0, 10**9 * 86400 * 366))
@example(999_999_999)
def test_durations_survive_text(nanoseconds: int) -> None:
    seconds = nanoseconds / 10**9
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-9, rel=0)
    assert format_duration(parse_duration(format_duration(seconds))) == format_duration(seconds)


@given(st.integers(0, 366 * 86400 * 1000))
def test_whole_milliseconds_survive_text_exactly(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1000", 1000),
        ("1K", 1024),
        ("64KiB", 65536),
        ("512M", 2**29),
        ("1.5G", 3 * 2**29),
        ("1T", 2**40),
    ],
)
def test_sizes_are_bytes_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "512MB", "512m", "1 G", "1.5", "1P"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a size is"):
        parse_size(text)


@given(st.integers(0, 2**50))
@example(2**60)
def test_sizes_survive_text(size: int) -> None:
    assert parse_size(format_size(size)) == size


# One definition


def test_every_option_has_one_name_in_every_place() -> None:
    by_key = {option.key: option for option in OPTIONS}
    timeout, memory, target = by_key["ready_timeout"], by_key["max_memory"], by_key["target"]
    assert [option.field for option in OPTIONS] == [definition.name for definition in fields(Options)]
    assert (timeout.field, timeout.env, timeout.flag, timeout.default) == (
        "ready_timeout_s",
        "HOTPORT_READY_TIMEOUT",
        "--ready-timeout",
        "1m",
    )
    assert memory.field == "max_memory_bytes"
    assert target.flag is None
    assert by_key["watch"].is_switch
    assert by_key["bind"].is_list
    assert by_key["loop"].choices == ("uvloop", "asyncio")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_option_explains_itself(option: Any) -> None:
    assert option.help.endswith(".")
    assert bool(option.metavar) != option.is_switch
    if option.default not in (None, []):
        assert option.type.from_native(option.default) == getattr(Options(), option.field)


def test_options_travel_to_workers_as_json() -> None:
    options = Options(
        target="app:app", bind=("unix:é.sock", "tcp://[::1]:0"), workers=3, settle_s=0.1, tls_cert=("c", "d")
    )
    assert msgspec.json.decode(msgspec.json.encode(options), type=Options) == options
    assert msgspec.json.decode(b"{}", type=Options) == Options()


def test_workers_load_neither_click_nor_tomllib_with_the_options() -> None:
    code = "import sys, hotport.options; print(*sys.modules.keys() & {'click', 'rich', 'tomllib', 'socket'})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, check=True, env={}, text=True)  # not measured: that imports
    assert done.stdout.strip() == ""


# Where values come from


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    toml = "workers = 2\ntasks = 2\nbacklog = 2\n"
    environ = {"HOTPORT_TASKS": "3", "HOTPORT_BACKLOG": "3", "PATH": "/bin"}
    loaded = read(tmp_path, toml, environ=environ, backlog="4", loop=None, watch_path=())
    options = loaded.options
    assert (options.workers, options.tasks, options.backlog, options.loop) == (2, 3, 4, "uvloop")
    assert loaded.origins["workers"] == "hotport.toml"
    assert loaded.origins["tasks"] == "HOTPORT_TASKS"
    assert loaded.origins["backlog"] == "--backlog"
    assert loaded.origins["loop"] == "default"
    assert loaded.origins["target"] == "command line"


def test_values_of_every_type_are_read_from_toml(tmp_path: Path) -> None:
    toml = """
        target = "pkg.mod:app"
        bind = [":8000", "unix:app.sock"]
        factory = true
        ready-timeout = "1m30s"
        drain_timeout = 2
        settle = 0.5
        max-memory = "512M"
        log-level = "debug"
        watch = true
        watch_path = "src, templates"
        health_errors_max = 0.05
        health_path = "/health?all"
    """
    assert read(tmp_path, toml).options == Options(
        target="pkg.mod:app",
        bind=("tcp://0.0.0.0:8000", "unix:app.sock"),
        factory=True,
        ready_timeout_s=90.0,
        drain_timeout_s=2.0,
        settle_s=0.5,
        max_memory_bytes=2**29,
        log_level="debug",
        watch=True,
        watch_path=("src", "templates"),
        health_errors_max=0.05,
        health_path="/health?all",
    )


def test_values_of_every_type_are_read_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "HOTPORT_COMMAND": "gunicorn 'my app:app' --workers 2",
        "HOTPORT_BIND": ":8000,unix:app.sock",
        "HOTPORT_PHASED": "yes",
        "HOTPORT_WATCH": "off",
        "HOTPORT_WORKERS": "2",
        "HOTPORT_READY": "exec",
        "HOTPORT_SETTLE": "1s",
        "HOTPORT_MAX_AGE": "1d",
        "HOTPORT_MAX_MEMORY": "1G",
        "HOTPORT_NAME": "",
        "HOTPORT_RUNTIME_DIR": "/run/x",
    }
    loaded = read(tmp_path, environ=environ, target=None)
    assert loaded.options == Options(
        command=("gunicorn", "my app:app", "--workers", "2"),
        bind=("tcp://0.0.0.0:8000", "unix:app.sock"),
        phased=True,
        workers=2,
        ready="exec",
        settle_s=1.0,
        max_age_s=86400.0,
        max_memory_bytes=2**30,
    )
    assert loaded.origins["name"] == "default"


@given(st.integers(0, 10**9))
def test_shares_survive_text(billionths: int) -> None:
    share = next(option.type for option in OPTIONS if option.key == "health_errors_max")
    assert share.from_text(share.to_native(billionths / 10**9)) == pytest.approx(billionths / 10**9, abs=1e-12)


def test_flags_are_text_or_values(tmp_path: Path) -> None:
    as_text = read(tmp_path, workers="2", kill_timeout="1s", bind=(":80", ":81"), phased=True, max_memory="1K")
    as_values = read(tmp_path, workers=2, kill_timeout=1, bind=":80,:81", phased="true", max_memory=1024)
    assert as_text.options == as_values.options
    assert as_text.options.bind == ("tcp://0.0.0.0:80", "tcp://0.0.0.0:81")


def test_pyproject_is_read_where_there_is_no_hotport_toml(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.hotport]\nworkers = 5\n')
    loaded = read(tmp_path)
    assert loaded.options.workers == 5
    assert loaded.origins["workers"] == "pyproject.toml [tool.hotport]"
    assert read(tmp_path, "workers = 6").options.workers == 6


@pytest.mark.parametrize("text", ["", "[project]\nname = 'x'\n", "tool = 1"])
def test_pyproject_of_somebody_else_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert read(tmp_path).options == Options(target="app:app")


def test_given_file_replaces_the_one_that_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("workers = 7")
    loaded = read(tmp_path, "workers = 2", file=Path("other.toml"))
    assert loaded.options.workers == 7
    assert loaded.origins["workers"] == "other.toml"


def test_config_can_be_shown_and_read_again(tmp_path: Path) -> None:
    loaded = read(tmp_path, 'bind = [":80"]\napp_dir = "a\\"b\\\\é\\u007f"\n', name="web", max_memory="1.5G")
    text = show(loaded)
    assert "# --name" in text
    assert "# tls_client_ca is not set" in text
    again = tmp_path / "again"
    again.mkdir()
    assert (
        load(file=None, environ={}, flags=tomllib.loads(text) | {"command": None}, cwd=again).options == loaded.options
    )
    (again / "hotport.toml").write_text(text)
    assert load(file=None, environ={}, flags={}, cwd=again).options == loaded.options


def test_rows_say_value_and_origin(tmp_path: Path) -> None:
    found = {row.key: row for row in rows(read(tmp_path, 'settle = "1s"'))}
    assert found["settle"] == ("settle", "1s", "hotport.toml")
    assert found["name"] == ("name", None, "default")
    assert list(found) == [option.key for option in OPTIONS]


# What is refused


def test_unknown_key_names_file_key_and_the_nearest(tmp_path: Path) -> None:
    error = refused(tmp_path, "wrokers = 2")
    assert (error.code, error.what, error.fix) == (
        "HP302",
        "unknown option 'wrokers' in hotport.toml",
        "workers = 2",
    )


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("drain-timout", "drain_timeout = 1"),
        ("port", "bind = 1"),
        ("forwarded_allow_ips", "trusted_proxy = 1"),
        ("trusted_proxies", "trusted_proxy = 1"),
        ("xyzzy", "hotport serve --help"),
    ],
)
def test_unknown_key_gets_the_best_advice_there_is(tmp_path: Path, key: str, fix: str) -> None:
    assert refused(tmp_path, f"{key} = 1").fix == fix


def test_unknown_argument_of_a_call_is_no_traceback(tmp_path: Path) -> None:
    error = refused(tmp_path, wrokers=2)
    assert (error.code, error.what, error.fix) == (
        "HP302",
        "unknown option 'wrokers' in the arguments",
        "workers = 2",
    )


def test_key_in_both_spellings_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "max-age = 1\nmax_age = 2")
    assert (error.code, error.what) == ("HP302", "max_age stands twice in hotport.toml")


@pytest.mark.parametrize(
    ("variable", "fix"),
    [
        ("HOTPORT_WORKER_COUNT", "HOTPORT_"),
        ("HOTPORT_WROKERS", "HOTPORT_WORKERS=8000"),
        ("HOTPORT_PORT", "HOTPORT_BIND=8000"),
        ("HOTPORT_RUNTIMEDIR", "HOTPORT_RUNTIME_DIR=8000"),
        ("HOTPORT_XYZZY", "unset HOTPORT_XYZZY"),
    ],
)
def test_unknown_variable_names_the_nearest(tmp_path: Path, variable: str, fix: str) -> None:
    error = refused(tmp_path, environ={variable: "8000"})
    assert error.code == "HP303"
    assert variable in error.what
    assert error.fix.startswith(fix)


def test_variables_that_kubernetes_makes_for_a_service_named_hotport_are_no_options(tmp_path: Path) -> None:
    environ = {
        "HOTPORT_SERVICE_HOST": "10.0.0.1",
        "HOTPORT_SERVICE_PORT": "80",
        "HOTPORT_SERVICE_PORT_HTTP": "80",
        "HOTPORT_PORT": "tcp://10.0.0.1:80",
        "HOTPORT_PORT_80_TCP": "tcp://10.0.0.1:80",
        "HOTPORT_PORT_80_TCP_ADDR": "10.0.0.1",
    }
    assert read(tmp_path, environ=environ).options == Options(target="app:app")


@pytest.mark.parametrize(
    ("line", "cause", "fix"),
    [
        ('workers = "2"', "without quotes", "workers = 1"),
        ("workers = 0", "at least 1", "workers = 1"),
        ("workers = true", "a whole number", "workers = 1"),
        ("factory = 1", "true or false", "factory = false"),
        ("target = 1", "must be text", 'target = "app:app"'),
        ('name = ""', "not empty", 'name = "NAME"'),
        ('loop = "uvlop"', "one of uvloop, asyncio", 'loop = "uvloop"'),
        ('loop = "async"', "one of uvloop, asyncio", 'loop = "asyncio"'),
        ("ready_timeout = -1", "neither negative", 'ready_timeout = "1m"'),
        ("ready_timeout = nan", "neither negative", 'ready_timeout = "1m"'),
        ("ready_timeout = 0", "longer than nothing", 'ready_timeout = "1m"'),
        ("ready_timeout = false", "a duration is", 'ready_timeout = "1m"'),
        ('drain_timeout = "30 secs"', "a duration is", 'drain_timeout = "30s"'),
        ("socket_mode = 660", "three octal digits", 'socket_mode = "0660"'),
        ('socket_mode = "rw"', "three octal digits", 'socket_mode = "0660"'),
        ("socket_mode = true", "three octal digits", 'socket_mode = "0660"'),
        ("max_memory = 1.5", "a size is", 'max_memory = "512M"'),
        ("bind = 8000", "a list of texts", 'bind = ["tcp://127.0.0.1:8000"]'),
        ("bind = []", "must name an address", 'bind = ["tcp://127.0.0.1:8000"]'),
        ('bind = [":80", "0.0.0.0:80"]', "an address twice", 'bind = ["tcp://127.0.0.1:8000"]'),
        ("watch_path = [1]", "a list of texts", "watch_path = []"),
        (
            'trusted_proxy = ["10.0.0.1/8"]',
            "the network is 10.0.0.0/8",
            'trusted_proxy = ["127.0.0.1", "::1", "unix"]',
        ),
        *((f'root_path = "{wrong}"', "begin with /", 'root_path = "/api"') for wrong in ("api", "/", "/api/", "/%C3")),
        ("root_path = 1", "begin with /", 'root_path = "/api"'),
        ('tls_cert = [""]', "none of them empty", "tls_cert = []"),
        ('tls_alpn = ["é"]', "1 to 255 ASCII", "tls_alpn = []"),
        *(
            (f"health_errors_max = {wrong}", "from 0% to 100%", 'health_errors_max = "5%"')
            for wrong in ('"101%"', "1.5", '"5 %"', "true", "-0.1", '""')
        ),
        *((f'health_path = "{wrong}"', "begin with /", 'health_path = "/healthz"') for wrong in ("x", "/a b", "/#")),
        ("health_path = 1", "begin with /", 'health_path = "/healthz"'),
    ],
)
def test_bad_value_in_a_file_says_where_why_and_what_instead(tmp_path: Path, line: str, cause: str, fix: str) -> None:
    error = refused(tmp_path, line)
    key = line.split(" = ")[0]
    assert error.code == "HP304"
    assert error.what.startswith(f"{key} in hotport.toml cannot be ")
    assert cause in error.cause
    assert error.fix == fix


@pytest.mark.parametrize(
    ("variable", "text", "fix"),
    [
        ("HOTPORT_WORKERS", "two", "HOTPORT_WORKERS=1"),
        ("HOTPORT_WATCH", "maybe", "HOTPORT_WATCH=false"),
        ("HOTPORT_LOG_LEVEL", "warn", "HOTPORT_LOG_LEVEL=warning"),
        ("HOTPORT_COMMAND", "echo 'x", "HOTPORT_COMMAND=COMMAND"),
    ],
)
def test_bad_variable_is_named_with_a_good_value(tmp_path: Path, variable: str, text: str, fix: str) -> None:
    error = refused(tmp_path, environ={variable: text})
    assert (error.code, error.what) == ("HP304", f"{variable} cannot be {text!r}")
    assert error.fix == fix


def test_bad_flag_is_named_with_a_good_value(tmp_path: Path) -> None:
    error = refused(tmp_path, drain_timeout="soon")
    assert error.what == "--drain-timeout cannot be 'soon'"
    assert error.fix == "--drain-timeout 30s"
    assert refused(tmp_path, target="").what == "target cannot be ''"
    error = refused(tmp_path, bind=(":80", "0.0.0.0:80"))
    assert error.what == "--bind cannot be ':80, 0.0.0.0:80'"
    assert error.cause == "it names an address twice: tcp://0.0.0.0:80"
    assert error.fix == "--bind tcp://127.0.0.1:8000"


@pytest.mark.parametrize("target", [":app", ".", "..x", ".mod:app", "pkg..mod:app", "/tmp", "./app:app", "dir/"])
def test_what_is_no_target_is_no_traceback_of_a_worker(tmp_path: Path, target: str) -> None:
    error = refused(tmp_path, target=target)
    assert (error.code, error.what, error.fix) == ("HP304", f"target cannot be {target!r}", "hotport serve app:app")


@pytest.mark.parametrize("target", ["app", "app:", "my-app:a.b", "../a b/app.py:app", ".app.py"])
def test_what_may_be_a_target_is_left_to_the_worker(tmp_path: Path, target: str) -> None:
    assert read(tmp_path, target=target).options.target == target


def test_bad_address_keeps_its_own_error_and_says_where_it_stands(tmp_path: Path) -> None:
    error = refused(tmp_path, 'bind = "8000"')
    assert (error.code, error.fix) == ("HP110", "--bind :8000")
    assert error.what.startswith("bind in hotport.toml: '8000' is not an address")


def test_the_status_port_has_one_address_of_connections(tmp_path: Path) -> None:
    assert read(tmp_path, status_bind=":9000").options.status_bind == "tcp://0.0.0.0:9000"
    assert "UDP has none" in refused(tmp_path, status_bind="udp://:9000").cause
    assert refused(tmp_path, status_bind="127.0.0.1:http").code == "HP112"
    assert refused(tmp_path, 'status_bind = ["127.0.0.1:9000"]\n').fix == 'status_bind = "127.0.0.1:9000"'


@pytest.mark.parametrize(
    ("content", "what", "cause"),
    [
        (b"workers = \n", "hotport.toml is not TOML", "line 1"),
        (b"\xff", "hotport.toml is not TOML", "utf-8"),
        (b"x = " + b"[" * 5000 + b"]" * 5000, "hotport.toml is not TOML", "nested too deeply"),
    ],
)
def test_file_that_is_not_toml_says_where(tmp_path: Path, content: bytes, what: str, cause: str) -> None:
    (tmp_path / "hotport.toml").write_bytes(content)
    error = refused(tmp_path)
    assert (error.code, error.what) == ("HP301", what)
    assert cause in error.cause


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "hotport.toml").write_bytes(b"\xef\xbb\xbfworkers = 3\r\n")
    assert read(tmp_path).options.workers == 3


def test_a_file_in_utf_16_gets_the_line_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "hotport.toml").write_text("workers = 3", encoding="utf-16")
    error = refused(tmp_path)
    assert (error.code, error.cause) == ("HP301", "it is UTF-16, and TOML is UTF-8")
    subprocess.run(error.fix, shell=True, cwd=tmp_path, check=True)
    assert read(tmp_path).options.workers == 3


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (Path.mkdir, "it is not a regular file"),
        (os.mkfifo, "it is not a regular file"),
        (lambda path: path.symlink_to("nowhere"), "no such file or directory"),
        (lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    ],
    ids=["directory", "fifo", "dangling", "loop"],
)
def test_file_that_cannot_be_read_is_not_passed_over(tmp_path: Path, make: Callable[[Path], None], cause: str) -> None:
    make(tmp_path / "hotport.toml")
    error = refused(tmp_path)
    assert (error.code, error.what, error.cause) == ("HP301", "cannot read hotport.toml", cause)


def test_table_of_pyproject_in_hotport_toml_is_told(tmp_path: Path) -> None:
    error = refused(tmp_path, "[tool.hotport]\nworkers = 2")
    assert (error.code, error.cause) == ("HP302", "[tool.hotport] is for pyproject.toml")


def test_given_file_must_exist(tmp_path: Path) -> None:
    error = refused(tmp_path, file=Path("nowhere.toml"))
    assert (error.code, error.what, error.cause) == (
        "HP301",
        "cannot read nowhere.toml",
        "no such file or directory",
    )


def test_tool_hotport_must_be_a_table(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool]\nhotport = 1")
    assert refused(tmp_path).cause == "tool.hotport is not a table"


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"target": "a:b", "command": ("x",)}, "target cannot be used with command"),
        ({"command": ("x",), "kind": "asgi"}, "--kind cannot be used with command"),
        ({"command": ("x",), "factory": True}, "--factory cannot be used with command"),
        ({"command": ("x",), "tls_cert": "c"}, "--tls-cert cannot be used with command"),
        ({"command": ("x",), "max_requests": 9}, "--max-requests cannot be used with command"),
        ({"ready": "exec"}, "--ready cannot be used without command"),
        ({"group": "www-data"}, "--group cannot be used without user"),
        ({"tls_key": "k"}, "--tls-key cannot be used without tls_cert"),
        ({"tls_cert": "c", "tls_key": "k,l"}, "--tls-key cannot be used with --tls-cert"),
        ({"tls_cert": ("c", "d"), "tls_key": "k"}, "--tls-key cannot be used with --tls-cert"),
        ({"tls_client_ca": "ca"}, "--tls-client-ca cannot be used without tls_cert"),
        ({"tls_client_auth": "none"}, "--tls-client-auth cannot be used without tls_cert"),
        ({"tls_alpn": "h2"}, "--tls-alpn cannot be used without tls_cert"),
        ({"tls_cert": "c", "tls_client_auth": "optional"}, "--tls-client-auth cannot be used without tls_client_ca"),
        ({"tls_cert": "c", "kind": "sockets"}, "--tls-cert cannot be used with --kind"),
        ({"command": ("x",), "tls_client_ca": "ca"}, "--tls-client-ca cannot be used with command"),
        ({"max_requests_jitter": 9}, "--max-requests-jitter cannot be used without max_requests"),
        ({"watch_path": ("x",)}, "--watch-path cannot be used without watch"),
        ({"watch_include": ("x",)}, "--watch-include cannot be used without watch"),
        ({"watch_exclude": ("x",)}, "--watch-exclude cannot be used without watch"),
        ({"command": ("x",), "trusted_proxy": ("*",)}, "--trusted-proxy cannot be used with command"),
        ({"command": ("x",), "root_path": "/api"}, "--root-path cannot be used with command"),
        ({"proxy_protocol": True, "kind": "sockets"}, "--proxy-protocol cannot be used with --kind"),
        ({"bind": ("udp://:53",), "kind": "asgi"}, "--bind cannot be used with --kind"),
        ({"bind": ("udp://:53",), "tls_cert": "c"}, "--bind cannot be used with --tls-cert"),
        ({"canary": 1, "phased": True}, "--canary cannot be used with --phased"),
        ({"command": ("x",), "health_path": "/"}, "--health-path cannot be used with command"),
        ({"command": ("x",), "health_lag_max": "1s"}, "--health-lag-max cannot be used with command"),
    ],
)
def test_impossible_combination_names_both(tmp_path: Path, flags: dict[str, object], what: str) -> None:
    error = refused(tmp_path, **flags)
    assert (error.code, error.what) == ("HP305", what)


@pytest.mark.parametrize(
    "flags",
    [
        {"command": ("x",), "ready": "exec", "bind": ("udp://:53",), "max_age": "1h"},
        {"tls_cert": ("c", "d")},
        {"tls_cert": "c,d", "tls_key": "k,l"},
        {"tls_cert": "c", "tls_client_ca": "ca", "tls_client_auth": "none", "tls_alpn": "h2,http/1.1"},
        {"tls_cert": "c", "tls_key": "k", "watch": True, "watch_path": ("x",)},
        {"max_requests": 100, "max_requests_jitter": 10},
        {"bind": ("udp://:53",), "kind": "protocol"},
        {"bind": ("udp://:53",)},
    ],
)
def test_possible_combination_is_taken(tmp_path: Path, flags: dict[str, object]) -> None:
    read(tmp_path, **flags)  # type: ignore[arg-type]


def test_clash_across_sources_names_the_file(tmp_path: Path) -> None:
    error = refused(tmp_path, 'target = "a:b"', command=("x",))
    assert error.what == "target in hotport.toml cannot be used with command"


def test_something_must_be_served_where_it_is_needed(tmp_path: Path) -> None:
    error = refused(tmp_path, target=None)
    assert (error.code, error.fix) == ("HP306", "hotport serve app:app")
    assert read(tmp_path, needs_program=False).options == Options()


# Names and places


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (Options(target="app:app"), "app"),
        (Options(target="pkg.mod:create"), "pkg.mod"),
        (Options(target="path/to/server.py:echo"), "server"),
        (Options(target="app"), "app"),
        (Options(target="./my server.py"), "my-server"),
        (Options(target=".py:x"), "app"),
        (Options(target="a" * 99), "a" * 48),
        (Options(command=("/usr/bin/gunicorn", "app:app")), "gunicorn"),
        (Options(target="app:app", name="web"), "web"),
        (Options(), "embedded"),
    ],
)
def test_service_is_named_after_what_it_serves(options: Options, name: str) -> None:
    assert service_name(options) == name


@pytest.mark.parametrize(
    ("name", "fix"), [("a/b", "--name a-b"), ("..", "--name app"), ("-x", "--name x"), ("é", "--name app")]
)
def test_name_must_be_a_safe_file_name(tmp_path: Path, name: str, fix: str) -> None:
    error = refused(tmp_path, name=name)
    assert (error.code, error.fix) == ("HP307", fix)


@given(st.text(min_size=1, max_size=80))
def test_name_made_from_any_target_is_one_that_may_be_given(target: str) -> None:
    name = service_name(Options(target=target))
    loaded = load(file=None, environ={}, flags={"name": name}, cwd=Path("/nonexistent"), needs_program=False)
    assert service_name(loaded.options) == name


@pytest.mark.parametrize(
    ("environ", "uid", "root"),
    [
        ({"HOTPORT_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}, 0, "/a"),
        ({"HOTPORT_RUNTIME_DIR": "", "XDG_RUNTIME_DIR": "/b"}, 0, "/b/hotport"),
        ({"XDG_RUNTIME_DIR": "relative"}, 0, "/run/hotport"),
        ({}, 1000, "/tmp/hotport-1000"),
    ],
)
def test_runtime_root_is_where_the_environment_or_the_system_has_it(
    environ: dict[str, str], uid: int, root: str
) -> None:
    assert runtime_root(environ, uid, Path("/tmp")) == Path(root)


def test_relative_runtime_dir_is_refused() -> None:
    with pytest.raises(ConfigError, match="HP308") as caught:
        runtime_root({"HOTPORT_RUNTIME_DIR": "run"}, 0, Path("/tmp"))
    assert caught.value.fix == 'HOTPORT_RUNTIME_DIR="$PWD/run"'


def test_drain_is_short_where_code_is_watched_unless_it_is_given(tmp_path: Path) -> None:
    loaded = load(file=None, environ={}, flags={"target": "a:b", "watch": True}, cwd=tmp_path)
    assert loaded.options.drain_timeout_s == 1.0
    assert loaded.origins["drain_timeout"] == "default with watch"
    flags = {"target": "a:b", "watch": True, "drain_timeout": "9s"}
    assert load(file=None, environ={}, flags=flags, cwd=tmp_path).options.drain_timeout_s == 9.0
    assert load(file=None, environ={}, flags={"target": "a:b"}, cwd=tmp_path).options.drain_timeout_s == 30.0


def test_a_program_that_cannot_say_ready_has_to_live_longer(tmp_path: Path) -> None:
    flags = {"command": ("server",), "ready": "exec"}
    loaded = load(file=None, environ={}, flags=flags, cwd=tmp_path)
    assert loaded.options.settle_s == 5.0
    assert loaded.origins["settle"] == "default with ready = exec"
    assert load(file=None, environ={}, flags={**flags, "settle": "1s"}, cwd=tmp_path).options.settle_s == 1.0


@pytest.mark.parametrize(("flag", "meant"), [("--reload", "--watch"), ("--worker", "--workers"), ("--zzz", None)])
def test_flags_of_other_servers_lead_to_ours(flag: str, meant: str | None) -> None:
    assert meant_flag(flag) == meant


@pytest.mark.parametrize("given", ["alembic upgrade 'the head'", ["alembic", "upgrade", "the head"]])
def test_a_hook_is_a_command_in_one_text_or_a_list(tmp_path: Path, given: Any) -> None:
    expected = ("alembic", "upgrade", "the head")
    assert read(tmp_path, f"before_start = {given!r}").options.before_start == expected
    assert read(tmp_path, before_start=given).options.before_start == expected
    if isinstance(given, str):
        assert read(tmp_path, environ={"HOTPORT_BEFORE_START": given}).options.before_start == expected


@pytest.mark.parametrize("given", ["''", "' '", "['']", "7", "[7]", '"\'"', "'a\\0'"])
def test_a_hook_without_a_program_is_refused(tmp_path: Path, given: str) -> None:
    given = given if given != "'a\\0'" else '["a", "\\u0000"]'
    assert refused(tmp_path, f"before_start = {given}").code == "HP304"


# Keyword arguments


def annotation(option: Option) -> object:
    """What may be given for an option in Python."""
    if option.is_switch:
        return bool
    if option.choices:
        return Literal[option.choices]
    if option.is_list:
        return Texts
    kind: Any = {"COMMAND": Command, "TIME": Duration, "SIZE": Size, "SHARE": Share, "N": int}.get(option.metavar, str)
    return kind | None if option.default is None else kind


def test_strategies_to_choose_from_are_those_that_there_are() -> None:
    (option,) = [option for option in OPTIONS if option.key == "strategy"]
    assert option.choices == ("auto", *(strategy.value for strategy in Strategy))


def test_keyword_arguments_have_the_names_and_types_of_the_options() -> None:
    own_parameters = {"target", "command", "bind"}
    assert get_type_hints(RunOptions) == {o.key: annotation(o) for o in OPTIONS if o.key not in own_parameters}
    assert get_type_hints(ServeOptions).keys() < get_type_hints(RunOptions).keys()


@pytest.mark.parametrize("written", ["0o660", '"660"', '"0660"'])
def test_a_mode_is_written_as_chmod_takes_it_or_as_a_number(tmp_path: Path, written: str) -> None:
    (tmp_path / "hotport.toml").write_text(f"socket_mode = {written}\n")
    assert read(tmp_path).options.socket_mode == "0660"
