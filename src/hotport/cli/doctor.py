"""``hotport doctor``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from hotport.cli import HELP
from hotport.cli.client import ask, raise_failure
from hotport.cli.output import print_json, write
from hotport.diagnose.doctor import Finding, examine, examine_service, read_machine, read_service
from hotport.errors import ControlError, ExitCode
from hotport.options import runtime_root
from hotport.options.loading import load
from hotport.wire.messages import StatusRequest

__all__ = ["command"]


@click.command("doctor", context_settings=HELP)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, as_json: bool) -> int:
    """Find what makes restarts lossy or fragile.

    Looks at this machine, and at the service NAME if one runs. Options are read from hotport.toml and the environment,
    as `hotport serve` reads them here. Nothing is changed.

    Exits with 0 if nothing was found, with 1 otherwise.
    """
    loaded = load(file=None, environ=os.environ, flags={}, cwd=Path.cwd(), needs_program=False)
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    findings = list(examine(read_machine(root), loaded.options))
    service = _service(name)
    if service is not None:
        findings += service
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            write(f"{finding.what}\n  so:    {finding.consequence}\n  try:   {finding.fix}")
        looked = "the machine and the service" if service is not None else "the machine; no service runs here"
        click.echo(f"{len(findings) or 'nothing'} found; looked at {looked}", err=True)
    return 1 if findings else ExitCode.DONE


def _service(name: str | None) -> list[Finding] | None:
    """What is found in the service; None if there is none, and none was named."""
    try:
        for reply in ask(name, StatusRequest()):
            raise_failure(reply)
            return list(examine_service(*read_service(reply)))
    except ControlError:
        if name is not None:
            raise
    return None
