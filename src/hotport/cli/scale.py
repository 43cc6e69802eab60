"""``hotport scale``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, waiting, write
from hotport.errors import ExitCode
from hotport.options import WORKERS_MAX
from hotport.wire.messages import ScaleRequest

__all__ = ["command"]


@click.command("scale", context_settings=HELP)
@click.argument("workers", type=click.IntRange(min=1, max=WORKERS_MAX))
@name_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(workers: int, name: str | None, as_json: bool) -> int:
    """Run WORKERS workers from now on, and wait until they serve."""
    with waiting("scaling"):
        for reply in ask(name, ScaleRequest(workers=workers)):
            raise_failure(reply)
            print_json(reply) if as_json else write(reply.detail)
    return ExitCode.DONE
