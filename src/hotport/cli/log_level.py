"""``hotport log-level``."""

from __future__ import annotations

from typing import get_args

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, write
from hotport.errors import ExitCode
from hotport.options.definition import LogLevel
from hotport.wire.messages import LogLevelRequest

__all__ = ["command"]


@click.command("log-level", context_settings=HELP)
@click.argument("level", type=click.Choice(get_args(LogLevel)))
@name_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(level: LogLevel, name: str | None, as_json: bool) -> int:
    """Log LEVEL and above from now on, in all of NAME.

    This holds until the next restart, which reads log_level again. Loggers to which the application has given a level
    of their own keep it; programs after -- are not told.
    """
    for reply in ask(name, LogLevelRequest(log_level=level)):
        raise_failure(reply)
        print_json(reply) if as_json else write(reply.detail)
    return ExitCode.DONE
