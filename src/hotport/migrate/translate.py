"""Translate another server's command line and settings into options of hotport."""

from __future__ import annotations

import os.path
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from hotport.errors import ConfigError
from hotport.migrate.files import CALLABLE, read_settings
from hotport.migrate.peers import PEERS
from hotport.migrate.table import ALWAYS, Peer, Row
from hotport.options import OPTIONS, Option
from hotport.options.definition import as_name

__all__ = ["Remark", "Translation", "recognise", "translate", "translate_line"]

_BY_KEY: Final = {option.key: option for option in OPTIONS}
_BY_FLAG: Final = {option.flag: option for option in OPTIONS if option.flag} | {
    f"--no-{option.key.replace('_', '-')}": option for option in OPTIONS if option.is_switch
}
_DEFAULT_FILES: Final = {"gunicorn": "gunicorn.conf.py"}

#: What wraps a WSGI application; {app} is its name.
WRAP: Final = "from a2wsgi import WSGIMiddleware; {app} = WSGIMiddleware({app})  # pip install a2wsgi"


class Remark(NamedTuple):
    """What there is to say about an option of another server.

    Attributes:
        theirs: As it was given: ``--log-config logging.ini``.
        why: Why it has no equal, or what differs.
        is_lost: Whether hotport will not do what it asks for.
    """

    theirs: str
    why: str
    is_lost: bool


@dataclass(frozen=True, slots=True)
class Translation:
    """What a command line of another server is here.

    Attributes:
        peer: The server.
        options: Texts by key, as flags take them; a list has one text for each.
        remarks: What has no equal, and what differs.
    """

    peer: Peer
    options: Mapping[str, tuple[str, ...]]
    remarks: tuple[Remark, ...]

    def command(self) -> str:
        """The line to paste: ``hotport serve app:app --bind :80``."""
        words = ["hotport", "serve", *self.options.get("target", ())]
        for option in OPTIONS:
            for text in self.options.get(option.key, ()) if option.flag else ():
                assert option.flag is not None
                if option.is_switch:
                    words.append(option.flag if text == "true" else f"--no-{option.key.replace('_', '-')}")
                else:
                    words += [option.flag, text]
        return shlex.join(words)

    def native(self) -> dict[str, Any]:
        """The options as TOML has them, in the order of `OPTIONS`."""
        found = {}
        for option in OPTIONS:
            if texts := self.options.get(option.key):
                found[option.key] = option.type.to_native(option.type.from_text(",".join(texts)))
        return found


@dataclass(slots=True)
class Draft:
    """A translation while it is made."""

    options: dict[str, list[str]] = field(default_factory=dict)
    theirs: dict[str, str] = field(default_factory=dict)
    remarks: list[Remark] = field(default_factory=list)
    host: str | None = None
    port: str | None = None
    callable: str | None = None
    config: str | None = None
    is_wsgi: bool | None = None

    def take(self, row: Row, theirs: str, value: str) -> None:
        """Take one option that was given, in the words of its server."""
        try:
            text = READERS[row.how](self, value)
        except ValueError as error:
            self.remarks.append(Remark(theirs, str(error), is_lost=True))
            return
        if row.here not in _BY_KEY:
            if row.how != "config":
                self.remarks.append(Remark(theirs, row.why, is_lost=row.here != ALWAYS))
            return
        if text is not None:
            self.put(_BY_KEY[row.here], theirs, text)

    def put(self, option: Option, theirs: str, text: str) -> None:
        """Take a value of an option of ours, if it is one."""
        try:
            option.type.from_text(text)
        except ValueError as error:  # a ConfigError is one
            cause = error.cause if isinstance(error, ConfigError) else str(error)
            if "$" in text:
                cause = "a shell fills that in: give the line to hotport migrate between double quotes"
            self.remarks.append(Remark(theirs, f"`{option.key}` cannot be {text!r}: {cause}", is_lost=True))
            return
        if option.is_list and option.key in self.options:
            self.options[option.key].append(text)
        else:
            self.options[option.key] = [text]
        self.theirs[option.key] = theirs

    def drop(self, key: str, why: str, *, is_lost: bool = False) -> None:
        """Leave an option out that has no use here."""
        if self.options.pop(key, None) is not None:
            self.remarks.append(Remark(self.theirs[key], why, is_lost))


def _host(draft: Draft, value: str) -> None:
    draft.host = value


def _port(draft: Draft, value: str) -> None:
    draft.port = value


def _callable(draft: Draft, value: str) -> None:
    draft.callable = value


def _config(draft: Draft, value: str) -> None:
    draft.config = value


def _address(_: Draft, value: str) -> str:
    """What gunicorn, hypercorn and uWSGI take: a port may be missing, a path may stand alone."""
    return ",".join(_one_address(each) for each in value.split(","))


def _one_address(value: str) -> str:
    if value.startswith("/"):
        return f"unix:{value}"
    value = value.removeprefix("tcp://").removeprefix("http://")
    has_port = ":" in value.rpartition("]")[2]
    return value.replace("*:", ":", 1) if has_port else f"{value}:8000"


def _loop(_: Draft, value: str) -> str | None:
    if value == "auto":
        return None
    if value not in {"asyncio", "uvloop"}:
        raise ValueError("the event loop is uvloop or asyncio")
    return value


def _class(draft: Draft, value: str) -> str | None:
    """A worker class of gunicorn or hypercorn."""
    name = value.rpartition(".")[2].lower()
    if name in {"asyncio", "uvloop"}:
        return name
    if "uvicorn" in value or "asgi" in name:
        draft.is_wsgi = False
        return None
    if name in {"sync", "gthread"}:
        draft.is_wsgi = True
        return None
    raise ValueError(
        f"there is no worker class {value}: hotport serves ASGI; gunicorn or hypercorn itself can run after --"
    )


def _interface(draft: Draft, value: str) -> None:
    if value == "wsgi":
        draft.is_wsgi = True
    elif value not in {"auto", "asgi", "asgi3", "asginl"}:
        raise ValueError(f"the application must be ASGI, and {value} is not")


def _level(_: Draft, value: str) -> str:
    value = value.lower()
    return {"critical": "error", "trace": "debug", "notset": "debug", "warn": "warning"}.get(value, value)


def _auth(_: Draft, value: str) -> str:
    name = value.rpartition(".")[2].upper().removeprefix("CERT_")
    numbers = {"0": "none", "1": "optional", "2": "required"}
    return numbers.get(name, name.lower())


def _umask(_: Draft, value: str) -> str | None:
    number = int(value, 0) if re.match("0[xob]", value) else int(value, 8)
    return f"{0o777 & ~number:04o}" if number else None


def _logfile(_: Draft, value: str) -> str:
    return "combined"


def _trusted(_: Draft, value: str) -> str:
    return ",".join(part.strip() for part in value.split(","))


def _prefix(_: Draft, value: str) -> str | None:
    return value.rstrip("/") or None


def _proxy(_: Draft, value: str) -> str | None:
    return None if value.lower() in {"off", "false", "0"} else "true"


def _metrics(draft: Draft, value: str) -> str | None:
    return None if "status_bind" in draft.options else "127.0.0.1:9090"  # granian's default


def _http(_: Draft, value: str) -> None:
    if value not in {"1", "auto"}:
        raise ValueError("HTTP/1.1 and WebSockets alone: a proxy in front speaks HTTP/2 and HTTP/3")


def _alpn(_: Draft, value: str) -> str | None:
    return ",".join(name for name in value.split(",") if name != "h2") or None


#: How the values of an option are read: each returns the text that hotport's flag would take, None for nothing, and
#: raises ValueError with the reason if there is no equal for this value.
READERS: Final[Mapping[str, Callable[[Draft, str], str | None]]] = {
    "text": lambda _, value: value,
    "on": lambda _, value: "true",
    "off": lambda _, value: "false",
    "alone": lambda _, value: None,
    "combined": lambda _, value: "combined",
    "silent": lambda _, value: "off",
    "quiet": lambda _, value: "error",
    "debug": lambda _, value: "debug",
    "required": lambda _, value: "required",
    "none": lambda _, value: "none",
    "zero": lambda _, value: "0",
    "nobody": lambda _, value: "192.0.2.1",
    "host": _host,
    "port": _port,
    "local port": lambda _, value: f"127.0.0.1:{value}",
    "metrics": _metrics,
    "uds": lambda _, value: f"unix:{value}",
    "fd": lambda _, value: f"fd://{value}",
    "address": _address,
    "loop": _loop,
    "class": _class,
    "interface": _interface,
    "level": _level,
    "logfile": _logfile,
    "auth": _auth,
    "umask": _umask,
    "ms": lambda _, value: f"{int(value) / 1000:g}",
    "MiB": lambda _, value: f"{int(value)}M",
    "trusted": _trusted,
    "prefix": _prefix,
    "proxy": _proxy,
    "http": _http,
    "alpn": _alpn,
    "name": lambda _, value: as_name(value),
    "first": lambda _, value: value.split(",")[0],
    "extra": lambda _, value: f".,{value}",
    "interval": lambda _, value: "true",
    "owner": lambda _, value: value.partition(":")[0],
    "venv": lambda _, value: os.path.join(value, "bin", "python"),
    "callable": _callable,
    "config": _config,
}


class _Word(NamedTuple):
    """An argument of a command line: with its flag, or alone."""

    theirs: str
    row: Row | None
    ours: Option | None
    value: str


def _words(peers: Sequence[Peer], words: Sequence[str], *, with_ours: bool) -> Iterator[_Word]:
    """Split a command line into its arguments by the tables of `peers`, the first one first, and by our own flags."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            yield _Word(word, None, None, word)
            continue
        flag, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        row = next((row for peer in peers if (row := peer.flag(flag))), None)
        ours = _BY_FLAG.get(flag) if with_ours else None
        if ours is not None and ours.choices and (value or (rest or [""])[0]) in ours.choices:
            row = None  # --access-log structured
        is_optional = row is not None and row.how == "proxy"
        takes_value = row.takes_value if row else (not ours.is_switch if ours else False)
        if is_optional and not (rest and rest[0] in {"off", "v1", "v2", "auto", "on", "true", "false"}):
            takes_value = False
        if takes_value and not equals and rest:
            value = rest.pop(0)
        theirs = shlex.join([flag, value]) if value or takes_value else flag
        if row is not None or ours is not None:
            yield _Word(theirs, row, None if row else ours, value if takes_value or equals else _switched(flag))
        else:
            yield _Word(word, None, None, "")


def _switched(flag: str) -> str:
    return "false" if flag.startswith("--no-") else "true"


def translate(peer: Peer, words: Sequence[str], directory: Path, *, others: Iterable[Peer] = ()) -> Translation:
    """Translate the arguments of another server's command line; its configuration file is read.

    Args:
        words: What follows the name of the server.
        directory: Where it would be started.
        others: Servers whose flags are understood as well, and hotport's own; for a line that mixes them.

    Raises:
        ConfigError: The configuration file cannot be read (HP340).
    """
    mixes = bool(others)
    given = Draft()
    targets = []
    for word in _words([peer, *others], words, with_ours=mixes):
        if word.row is not None:
            given.take(word.row, word.theirs, word.value)
        elif word.ours is not None:
            given.put(word.ours, word.theirs, word.value)
        elif word.theirs.startswith("-"):
            why = f"hotport does not know this option of {peer.title}"
            given.remarks.append(Remark(word.theirs, why, is_lost=True))
        elif peer.name == "uwsgi" and word.value.endswith(".ini"):
            given.config = word.value
        else:
            targets.append(word.value)
    config = given.config or _DEFAULT_FILES.get(peer.name)
    if config is not None and not mixes and (given.config or (directory / config).is_file()):
        given = _over(_settings(peer, config, directory), given)
    if targets:
        given.options["target"] = targets[:1]
        given.remarks += [Remark(extra, "one service serves one application", is_lost=True) for extra in targets[1:]]
    if mixes and given.is_wsgi is None:
        given.is_wsgi = False  # hotport was called by its name: the application is looked at when it is loaded
    return _finish(peer, given, directory)


def _settings(peer: Peer, config: str, directory: Path) -> Draft:
    draft = Draft()
    for name, value in read_settings(config, directory).items():
        row = peer.setting(name)
        if row is None:
            if peer.name != "gunicorn":  # in its file, any other name is a variable of the file's own
                why = f"hotport does not know this setting of {peer.title}"
                draft.remarks.append(Remark(name, why, is_lost=True))
        elif value is CALLABLE:
            draft.remarks.append(Remark(f"{name}()", row.why, is_lost=True))
        elif value is not None and (row.takes_value or value not in (False, "0", "", 0)):
            for each in value if isinstance(value, list) else [value]:
                text = str(each).lower() if isinstance(each, bool) else str(each)
                if name == "umask" and isinstance(each, int):
                    text = f"0o{each:o}"
                draft.take(row, f"{name} = {each!r}", text)
    return draft


def _over(file: Draft, flags: Draft) -> Draft:
    """Put the options of a command line over those of a file."""
    if flags.host or flags.port:
        file.options.pop("bind", None)
    return replace(
        flags,
        options={**file.options, **flags.options},
        theirs={**file.theirs, **flags.theirs},
        remarks=[*file.remarks, *flags.remarks],
        callable=flags.callable or file.callable,
        is_wsgi=file.is_wsgi if flags.is_wsgi is None else flags.is_wsgi,
    )


def _finish(peer: Peer, draft: Draft, directory: Path) -> Translation:
    options = draft.options
    if (draft.host or draft.port) and "bind" not in options:  # a socket file is stronger there, too
        host = draft.host or "127.0.0.1"
        text = f"[{host}]" if ":" in host and not host.startswith("[") else host
        draft.put(_BY_KEY["bind"], f"{host} {draft.port or ''}".strip(), f"{text}:{draft.port or 8000}")
    if not any("unix:" in text for text in options.get("bind", ())):
        for key in ("socket_mode", "socket_user", "socket_group"):
            draft.drop(key, "there is no socket file")
    if not options.get("max_requests"):
        draft.drop("max_requests_jitter", "there is no number of requests to add it to")
    if "watch" not in options:
        for key in ("watch_path", "watch_include", "watch_exclude"):
            draft.drop(key, "nothing is watched")
    if not options.get("user"):
        draft.drop("group", "without `user` workers of root would stay root", is_lost=True)
    if not options.get("tls_cert"):
        for key in ("tls_key", "tls_client_ca", "tls_alpn"):
            draft.drop(key, "there is no certificate", is_lost=True)
    if not options.get("tls_client_ca"):
        draft.drop("tls_client_auth", "there is no authority to judge certificates of clients by")
    _find_target(peer, draft, directory)
    return Translation(peer, {key: tuple(texts) for key, texts in options.items()}, tuple(dict.fromkeys(draft.remarks)))


def _find_target(peer: Peer, draft: Draft, directory: Path) -> None:
    target = (draft.options.get("target") or [""])[0]
    if not target:
        return
    module, _, name = target.partition(":")
    name = draft.callable or name or ("application" if peer.name in {"gunicorn", "uwsgi"} else "app")
    if name.endswith("()"):
        name = name.removesuffix("()")
        draft.options["factory"] = ["true"]
    is_wsgi = draft.is_wsgi if draft.is_wsgi is not None else peer.name == "uwsgi" or _looks_wsgi(peer, module)
    if is_wsgi:
        beside = module.replace(".wsgi", ".asgi").replace("wsgi.py", "asgi.py")
        place = directory / (draft.options.get("app_dir") or ["."])[0]
        path = beside if beside.endswith(".py") else beside.replace(".", "/") + ".py"
        if beside != module and (place / path).is_file():
            why = f"hotport serves ASGI: {beside} is the same site"
            draft.remarks.append(Remark(target, why, is_lost=False))
            module = beside
        else:
            why = f"hotport serves ASGI; below the application: {WRAP.format(app=name)}"
            draft.remarks.append(Remark(target, why, is_lost=True))
    draft.options["target"] = [f"{module}:{name}"]


def _looks_wsgi(peer: Peer, module: str) -> bool:
    """Whether an application is WSGI as far as its name and its server say."""
    return "wsgi" in module if peer.name != "gunicorn" else "asgi" not in module


def translate_line(line: Sequence[str], directory: Path) -> Translation:
    """Translate a command line that begins with a server, or with what starts it: ``env X=1 python -m gunicorn ...``.

    Raises:
        ConfigError: It names no server that hotport knows (HP341), or its configuration file cannot be read (HP340).
    """
    by_name = {peer.name: peer for peer in PEERS}
    for at, word in enumerate(line):
        name = word.rpartition("/")[2]
        if peer := by_name.get(name.removesuffix("3")):
            found = translate(peer, line[at + 1 :], directory)
            variables = [each for each in line[:at] if re.fullmatch(r"[A-Za-z_]\w*=.*", each)]
            why = "write it into a file of lines NAME=VALUE, and name that in `env_file`"
            extra = tuple(Remark(each, why, is_lost=True) for each in variables)
            return replace(found, remarks=(*extra, *found.remarks))
    raise ConfigError(
        "HP341",
        f"cannot migrate {shlex.join(line)!r}",
        cause=f"it starts none of {', '.join(by_name)}",
        fix="hotport migrate 'gunicorn -w 4 app:app'",
    )


def recognise(words: Sequence[str], unknown: str, directory: Path) -> Translation | None:
    """Translate arguments of ``hotport serve`` that are another server's; None if `unknown` is no flag of any.

    The server is the one that knows most of the flags. A configuration file is not read: that would run its code.
    """
    if not any(peer.flag(unknown) for peer in PEERS):
        return None
    flags = [word.partition("=")[0] if word.startswith("--") else word[:2] for word in words if word.startswith("-")]
    known = [sum(peer.flag(flag) is not None for flag in flags) for peer in PEERS]
    at = known.index(max(known))
    return translate(PEERS[at], words, directory, others=[*PEERS[:at], *PEERS[at + 1 :]])
