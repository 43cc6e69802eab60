"""``hotport upgrade``."""

from __future__ import annotations

import os

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, waiting, write
from hotport.errors import ExitCode
from hotport.wire.messages import UpgradeRequest

__all__ = ["command"]


@click.command("upgrade", short_help="Renew the supervisor of NAME; its workers serve on.", context_settings=HELP)
@name_argument
@click.option("--python", metavar="FILE", help="Go on with this interpreter, and the hotport that is installed for it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, python: str | None, as_json: bool) -> int:
    """Replace the supervisor of NAME by the installed hotport; its pid and its workers stay.

    The new one is tried out first. The application is not restarted; hotport restart does that.
    """
    if python is not None and "/" in python:  # as seen from here, and not from the service's directory
        python = os.path.abspath(python)
    with waiting("upgrade"):
        for reply in ask(name, UpgradeRequest(python=python)):
            raise_failure(reply)
            print_json(reply) if as_json else write(reply.detail)
    return ExitCode.DONE
