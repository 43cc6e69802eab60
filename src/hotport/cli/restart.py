"""``hotport restart``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, raise_failure
from hotport.cli.output import console, print_json, print_report, waiting
from hotport.errors import ExitCode
from hotport.wire.messages import Progress, Report, RestartRequest

__all__ = ["command"]

WORDS = {
    "restart.began": "starting generation {generation}",
    "restart.ready": "ready; telling it to accept",
    "restart.committed": "committed: generation {generation} accepts",
    "restart.quiesced": "the old generation accepts no more",
    "restart.draining": "draining the old generation",
    "restart.done": "waiting for what is left of the old generation",
    "restart.aborted": "aborting: {detail}",
}


@click.command("restart", context_settings=HELP)
@click.argument("name", required=False)
@click.option("--phased/--all-at-once", default=None, help="Replace workers one by one, or all together.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "inherit", "transfer", "overlap", "rebind"]),
    help="How listeners reach the new workers, this time.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(name: str | None, phased: bool | None, strategy: str | None, as_json: bool) -> int:
    """Restart the service NAME and wait for the outcome.

    Exit codes: 0 done; 4 aborted or refused, and the old generation serves; 6 no supervisor there.
    """
    words = console(stderr=True)
    report: Report | None = None
    with waiting("restart"), words.status("asking the supervisor") as shown:
        for reply in ask(name, RestartRequest(phased=phased, strategy=strategy)):
            raise_failure(reply)
            if isinstance(reply, Progress) and reply.event in WORDS:
                said = WORDS[reply.event].format(generation=reply.generation, detail=reply.detail)
                shown.update(said)
                if not as_json:
                    words.print(f"{reply.ms:8.0f} ms  {said}", markup=False)
            elif isinstance(reply, Report):
                report = reply
    if report is None:
        words.print("the supervisor ended before the restart did: hotport status")
        return ExitCode.NO_SUPERVISOR
    print_json(report) if as_json else print_report(report)
    return ExitCode.DONE if report.outcome == "done" else ExitCode.ABORTED
