"""The tables know every option that the installed servers name, and no other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import FunctionType

import pytest
from gunicorn.config import KNOWN_SETTINGS
from hypercorn.config import Config

from hotport.migrate.peers import GUNICORN, HYPERCORN, PEERS, UNIT, UWSGI
from hotport.migrate.table import ALWAYS, NO_EQUAL, Peer
from hotport.migrate.translate import READERS
from hotport.options import OPTIONS
from tests.support import DEADLINE_S

#: A flag as click and argparse show it: at the beginning of its line, or after another one.
FLAG = re.compile(r"(?:^ {2,4}|, | / )(--?[A-Za-z][\w-]*)", re.MULTILINE)


def help_of(name: str) -> str:
    program = Path(sys.executable).with_name(name)
    if not program.exists():
        pytest.skip(f"{name} is not installed beside this interpreter")
    environment = {"COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    asked = subprocess.run(
        [program, "--help"], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    return asked.stdout


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.is_complete], ids=lambda peer: peer.name)
def test_table_has_the_flags_of_the_installed_server(peer: Peer) -> None:
    assert set(FLAG.findall(help_of(peer.name))) == {flag for row in peer.rows for flag in row.flags.split()}


def test_uwsgi_has_every_flag_of_its_table() -> None:
    known = set(re.findall(r"(?:^ +|\|)(--?[A-Za-z][\w-]*)", help_of("uwsgi"), re.MULTILINE))
    assert {flag for row in UWSGI.rows for flag in row.flags.split()} - known == set()


@pytest.mark.parametrize("peer", [*PEERS, UNIT], ids=lambda peer: peer.name)
def test_rows_name_options_and_readers_that_exist(peer: Peer) -> None:
    keys = {option.key for option in OPTIONS} | {ALWAYS, NO_EQUAL}
    assert {row.here for row in peer.rows} <= keys
    assert {row.how for row in peer.rows} <= READERS.keys()
    assert [row for row in peer.rows if row.here in {ALWAYS, NO_EQUAL} and not row.why] == []


@pytest.mark.parametrize("peer", [*PEERS, UNIT], ids=lambda peer: peer.name)
def test_a_name_stands_in_one_row(peer: Peer) -> None:
    flags = [flag for row in peer.rows for flag in row.flags.split()]
    settings = [name for row in peer.rows for name in row.names()]
    assert len(flags) == len(set(flags))
    assert len(settings) == len(set(settings))


def test_gunicorns_table_has_every_setting_of_its_configuration_file() -> None:
    missing = {setting.name for setting in KNOWN_SETTINGS if GUNICORN.setting(setting.name) is None}
    assert missing <= {"config"}


def test_hypercorns_table_has_every_setting_of_its_configuration_file() -> None:
    public = {name for name in vars(Config) if not name.startswith("_")}
    settings = {name for name in public if not isinstance(vars(Config)[name], FunctionType | classmethod)}
    missing = {name for name in settings - {"log", "ssl_enabled"} if HYPERCORN.setting(name) is None}
    assert missing == set()
