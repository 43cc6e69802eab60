"""``hotport stop``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, raise_failure
from hotport.cli.output import console, print_json, waiting
from hotport.errors import ExitCode
from hotport.wire.messages import StopRequest

__all__ = ["command"]


@click.command("stop", context_settings=HELP)
@click.argument("name", required=False)
@click.option("--now", is_flag=True, help="Do not wait for connections.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, now: bool, as_json: bool) -> int:
    """Stop the service NAME and wait until it is gone.

    Exit codes: 0 stopped; 5 stopped, and connections were cut at the drain deadline; 6 no supervisor there.
    """
    code: int = ExitCode.DONE
    with waiting("stop"):
        for reply in ask(name, StopRequest(now=now)):
            raise_failure(reply)
            if as_json:
                print_json(reply)
            else:
                console().print("stopped" if reply.exit_code == 0 else "stopped; connections were cut")
            code = reply.exit_code
    return code
