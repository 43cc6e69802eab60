"""``hotport undo``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, write
from hotport.cli.restart import follow
from hotport.errors import ExitCode
from hotport.wire.messages import UndoRequest

__all__ = ["command"]


@click.command("undo", short_help="Take back the restart of NAME that is not over.", context_settings=HELP)
@name_argument
@click.option("--keep", is_flag=True, help="The opposite: keep the new generation, and end the bake or the window now.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, keep: bool, as_json: bool) -> int:
    """Take back the restart of the service NAME that is in progress or in its undo window.

    The old generation accepts again, the new one hands its connections back. Waits until it is gone.

    Exit codes: 0 done; 4 refused: there is nothing to undo; 6 no supervisor there.
    """
    if keep:
        for reply in ask(name, UndoRequest(keep=True)):
            raise_failure(reply)
            print_json(reply) if as_json else write(reply.detail)
        return ExitCode.DONE
    report = follow(name, UndoRequest(), "undo", as_json=as_json)
    if report is None:
        return ExitCode.NO_SUPERVISOR
    return ExitCode.ABORTED if report.outcome == "done" else ExitCode.DONE
