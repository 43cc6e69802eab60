"""``hotport status``."""

from __future__ import annotations

from pathlib import Path

import click

from hotport.cli import HELP
from hotport.cli.client import ask_service, find_service, is_elsewhere, name_argument, raise_failure
from hotport.cli.output import console, print_json, print_status
from hotport.errors import ExitCode
from hotport.model.service import Stage
from hotport.wire.messages import Status, StatusRequest

__all__ = ["command"]


def _watch(service: Path) -> None:
    from hotport.cli._top import watch  # a health check has no need of it
    from hotport.supervisor.recorder import read_recordings

    def ask() -> Status:
        reply: Status | None = None
        for reply in ask_service(service, StatusRequest()):
            raise_failure(reply)
        assert isinstance(reply, Status)
        return reply

    watch(ask, lambda: read_recordings(str(service)), console())


@click.command("status", context_settings=HELP)
@name_argument
@click.option("--ready", "must_be_ready", is_flag=True, help="Fail unless it serves, and is not about to stop.")
@click.option(
    "--watch", "is_watched", is_flag=True, help="Show it as it changes, with its last restarts, until Ctrl-C."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, must_be_ready: bool, is_watched: bool, as_json: bool) -> int:
    """Show the service NAME: generations, workers, connections.

    With --ready it is the health check of a container. With --watch it stays while supervisors come and go; where the
    output is no terminal, it prints a line every second.

    Exit codes: 0 shown; 6 no supervisor there; 7 with --ready: it starts, stops, is a lame duck, no worker serves, or
    its supervisor runs in another container.
    """
    if is_watched and (must_be_ready or as_json):
        raise click.UsageError("--watch shows a service to people: it cannot be used with --ready or --json")
    service = find_service(name)
    if is_watched:
        _watch(service)
        return ExitCode.DONE
    is_ready = not is_elsewhere(service)
    for reply in ask_service(service, StatusRequest()):
        raise_failure(reply)
        print_json(reply) if as_json else print_status(reply)
        is_ready = is_ready and reply.stage == Stage.READY.value
    return ExitCode.NOT_READY if must_be_ready and not is_ready else ExitCode.DONE
