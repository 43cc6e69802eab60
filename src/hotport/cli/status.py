"""``hotport status``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, raise_failure
from hotport.cli.output import print_json, print_status
from hotport.errors import ExitCode
from hotport.wire.messages import StatusRequest

__all__ = ["command"]


@click.command("status", context_settings=HELP)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> int:
    """Show the service NAME: generations, workers, connections."""
    for reply in ask(name, StatusRequest()):
        raise_failure(reply)
        print_json(reply) if as_json else print_status(reply)
    return ExitCode.DONE
