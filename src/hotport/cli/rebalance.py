"""``hotport rebalance``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, waiting, write
from hotport.errors import ExitCode
from hotport.wire.messages import RebalanceRequest

__all__ = ["command"]


@click.command("rebalance", context_settings=HELP)
@name_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> int:
    """Share the connections of NAME evenly among its workers.

    Workers do so by themselves when the shares differ clearly. Connections move between two requests or messages; one
    that is busy for longer stays where it is.
    """
    with waiting("rebalancing"):
        for reply in ask(name, RebalanceRequest()):
            raise_failure(reply)
            print_json(reply) if as_json else write(reply.detail)
    return ExitCode.DONE
