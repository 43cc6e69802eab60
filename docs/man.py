"""The manual page, ``docs/hotport.1``, from the command line's own help; ``python -m docs.generate`` writes it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any, Final

import click

import hotport
from hotport.cli import COMMANDS
from hotport.options import OPTIONS

__all__ = ["man_page"]

FILES: Final = {
    "hotport.toml": "Options, in the working directory; or [tool.hotport] in pyproject.toml.",
    "$HOTPORT_RUNTIME_DIR": "A directory for each running service, with its lock and sockets; by default "
    "$XDG_RUNTIME_DIR/hotport, /run/hotport for root.",
}

EXIT: Final = (
    "0 done; 1 a bug; 2 wrong usage; 3 not started; 4 a restart was aborted, and the old code serves; "
    "5 connections were cut; 6 no supervisor there; 7 not ready; 130 interrupted."
)


def man_page() -> str:
    """Render every command with its options, in man(7)."""
    group = importlib.import_module("hotport.cli")._group
    lines = [f'.TH HOTPORT 1 "" "hotport {hotport.__version__}"']
    lines += [".SH NAME", rf"hotport \- {_escaped(group.help.rstrip('.').lower())}"]
    lines += [".SH SYNOPSIS", r".B hotport", r".I COMMAND", r"[OPTIONS] [ARGUMENTS]", ".SH COMMANDS"]
    parent = group.make_context("hotport", [], resilient_parsing=True)
    for name in COMMANDS:
        command = group.get_command(parent, name)
        lines += _command(command, command.make_context(name, [], parent=parent, resilient_parsing=True))
    lines += [".SH ENVIRONMENT", "Each option of", ".B hotport serve", "has a variable:"]
    lines += [_escaped(", ".join(option.env for option in OPTIONS)) + "."]
    lines += [".SH FILES", *(line for name, says in FILES.items() for line in _item(name, says))]
    lines += [".SH EXIT STATUS", _escaped(EXIT)]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    usage = " ".join(["hotport", context.info_name or "", *command.collect_usage_pieces(context)])
    yield f".SS {_escaped(usage)}"
    is_first = True
    for paragraph in re.split(r"\n\s*\n", (command.help or "").strip()):
        if not is_first:
            yield ".PP"
        is_first = False
        if paragraph.startswith("\b"):
            yield from (".nf", *(_escaped(line) for line in paragraph.splitlines()[1:]), ".fi")
        else:
            yield _escaped(" ".join(paragraph.split()))
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context)):
            yield from _item(*record)


def _item(term: str, says: str) -> Iterator[str]:
    yield from (".TP", f".B {_escaped(term)}", _escaped(" ".join(says.split())))


def _escaped(text: Any) -> str:
    text = str(text).replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{text}" if text.startswith((".", "'")) else text
