"""``hotport status``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask_service, find_service, is_elsewhere, raise_failure
from hotport.cli.output import print_json, print_status
from hotport.errors import ExitCode
from hotport.model.service import Stage
from hotport.wire.messages import StatusRequest

__all__ = ["command"]


@click.command("status", context_settings=HELP)
@click.argument("name", required=False)
@click.option("--ready", "must_be_ready", is_flag=True, help="Fail unless it serves, and is not about to stop.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, must_be_ready: bool, as_json: bool) -> int:
    """Show the service NAME: generations, workers, connections.

    With --ready it is the health check of a container.

    Exit codes: 0 shown; 6 no supervisor there; 7 with --ready: it starts, stops, is a lame duck, no worker serves, or
    its supervisor runs in another container.
    """
    service = find_service(name)
    is_ready = not is_elsewhere(service)
    for reply in ask_service(service, StatusRequest()):
        raise_failure(reply)
        print_json(reply) if as_json else print_status(reply)
        is_ready = is_ready and reply.stage == Stage.READY.value
    return ExitCode.NOT_READY if must_be_ready and not is_ready else ExitCode.DONE
