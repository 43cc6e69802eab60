"""``hotport doctor``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import print_json, print_strategies, write
from hotport.diagnose.doctor import examine, examine_service, read_machine, read_service
from hotport.diagnose.rights import examine_rights, read_rights
from hotport.errors import ControlError, ExitCode, advice
from hotport.kernel.process import working_directory
from hotport.kernel.steer import can_steer
from hotport.model.strategies import Facts, choose, table
from hotport.options import Options, runtime_root
from hotport.options.loading import load
from hotport.wire.messages import Status, StatusRequest

__all__ = ["command"]


@click.command("doctor", context_settings=HELP)
@name_argument
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> int:
    """Find what makes restarts lossy or fragile.

    Looks at this machine, and at the service NAME if one runs; then shows how listeners can reach the next generation
    here, and what each way promises. Options are read from hotport.toml and the environment,
    as `hotport serve` reads them here. Nothing is changed.

    Exits with 0 if nothing was found, with 1 otherwise.
    """
    loaded = load(file=None, environ=os.environ, flags={}, cwd=Path(working_directory(os.environ)), needs_program=False)
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    findings = list(examine(read_machine(root), loaded.options))
    status = _status(name)
    if status is not None:
        listeners, members, managed = read_service(status)
        serving = [each for each in status.workers if each.phase == "serving" and each.generation == status.generation]
        shares = {each.worker: each.connections for each in serving if each.connections is not None}
        findings += examine_service(listeners, members, gone=status.gone, managed=managed, shares=shares)
        findings += examine_rights(read_rights(status), loaded.options)
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            write("\n".join([finding.what, f"  so:    {finding.consequence}", *advice(finding.fix, finding.note)]))
        if status is not None:
            print_strategies(status.strategies, status.strategy)
        else:
            print_strategies(*_strategies(loaded.options))
        looked = "the machine and the service" if status is not None else "the machine; no service runs here"
        click.echo(f"{len(findings) or 'nothing'} found; looked at {looked}", err=True)
    return 1 if findings else ExitCode.DONE


def _strategies(options: Options) -> tuple[dict[str, str], str]:
    """Explain for a service started here why strategies cannot work, and which one would be used."""
    facts = Facts(
        schemes=tuple(dict.fromkeys(text.partition(":")[0] for text in options.bind)),
        command=options.command[0] if options.command else "",
        kind=options.kind,
        is_phased=options.phased,
        can_steer=can_steer(),
    )
    chosen = choose(options.strategy, facts).strategy
    return {row.strategy.value: row.obstacle for row in table(facts)}, chosen.value if chosen else ""


def _status(name: str | None) -> Status | None:
    """Return the status of the service; None if none runs and none was named."""
    try:
        for reply in ask(name, StatusRequest()):
            raise_failure(reply)
            assert isinstance(reply, Status)
            return reply
    except ControlError:
        if name is not None:
            raise
    return None
