"""``hotport reload-tls``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, print_tls_report
from hotport.errors import ExitCode
from hotport.wire.messages import ReloadTlsRequest

__all__ = ["command"]


@click.command("reload-tls", context_settings=HELP)
@name_argument
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def command(name: str | None, as_json: bool) -> int:
    """Read the certificates of the service NAME again.

    New connections get the new certificates; open ones go on. A worker that cannot use what the files hold now keeps
    what it had, and its error is printed.

    Exit codes: 0 all workers use the new files; 4 refused, or not all do; 6 no supervisor there.
    """
    code: int = ExitCode.DONE
    for reply in ask(name, ReloadTlsRequest()):
        raise_failure(reply)
        print_json(reply) if as_json else print_tls_report(reply)
        if any(worker.error for worker in reply.workers):
            code = ExitCode.ABORTED
    return code
