"""``hotport restart``."""

from __future__ import annotations

from typing import Any

import click
from rich.text import Text

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import console, print_json, print_report, waiting
from hotport.errors import ExitCode
from hotport.options import OPTIONS, WORKERS_MAX, parse_duration
from hotport.wire.messages import Progress, Report, RestartRequest

__all__ = ["command", "follow"]

WORDS = {
    "restart.began": "starting generation {generation}",
    "restart.preparing": "running before_start",
    "restart.prepared": "before_start has succeeded; starting the workers",
    "restart.ready": "ready; telling it to accept",
    "restart.baking": "the canary accepts; it bakes for {detail}; hotport undo takes it back",
    "restart.committed": "committed: generation {generation} accepts",
    "restart.quiesced": "the old generation accepts no more",
    "restart.watching": "watching generation {generation} for {detail}; hotport undo takes it back",
    "restart.undoing": "taking the old generation back: {detail}",
    "restart.undone": "undone; waiting for the last workers of generation {generation}",
    "restart.draining": "draining the old generation",
    "restart.done": "waiting for the last workers of the old generation",
    "restart.aborted": "aborting: {detail}",
}


def _duration(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command("restart", context_settings=HELP)
@name_argument
@click.option("--phased/--all-at-once", default=None, help="Replace workers one by one, or all together.")
@click.option(
    "--strategy",
    type=click.Choice(next(option.choices for option in OPTIONS if option.key == "strategy")),
    help="How listeners reach the new workers, this time.",
)
@click.option(
    "--canary", type=click.IntRange(0, WORKERS_MAX), metavar="N", help="First start N new workers beside the old ones."
)
@click.option("--bake", "bake_s", callback=_duration, metavar="TIME", help="How long to watch them before the others.")
@click.option(
    "--undo-window",
    "undo_window_s",
    callback=_duration,
    metavar="TIME",
    help="How long the old ones stay, for an undo.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(name: str | None, as_json: bool, **overrides: Any) -> int:
    """Restart the service NAME and wait for the outcome.

    What is not given here is as the service's own options say.

    Exit codes: 0 done; 4 aborted, undone or refused, and the old generation serves; 6 no supervisor there.
    """
    report = follow(name, RestartRequest(**overrides), "restart", as_json=as_json)
    if report is None:
        return ExitCode.NO_SUPERVISOR
    return ExitCode.DONE if report.outcome == "done" else ExitCode.ABORTED


def follow(name: str | None, request: Any, what: str, *, as_json: bool) -> Report | None:
    """Send a request that ends with a restart's report, and show its progress; None if the supervisor ended."""
    words = console(stderr=True)
    report: Report | None = None
    with waiting(what), words.status("asking the supervisor") as shown:
        for reply in ask(name, request):
            raise_failure(reply)
            if isinstance(reply, Progress) and reply.event in WORDS:
                said = WORDS[reply.event].format(generation=reply.generation, detail=reply.detail)
                shown.update(Text(said))
                if not as_json:
                    words.print(f"{reply.ms:8.0f} ms  {said}", markup=False)
            elif isinstance(reply, Report):
                report = reply
    if report is None:
        words.print("the supervisor ended before the restart did: hotport status")
        return None
    print_json(report) if as_json else print_report(report)
    return report
