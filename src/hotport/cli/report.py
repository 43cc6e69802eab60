"""``hotport report``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click
import msgspec

from hotport.cli import HELP
from hotport.cli._reportfile import ReportFile
from hotport.cli.client import find_service, name_argument
from hotport.cli.output import console, print_json, print_report
from hotport.errors import ControlError, ExitCode
from hotport.options import runtime_root
from hotport.supervisor.recorder import RECORDINGS_MAX, read_recordings
from hotport.wire.recording import Recording
from hotport.wire.trace import trace_of

__all__ = ["command"]


@click.command("report", short_help="Show the last restarts of NAME.", context_settings=HELP)
@name_argument
@click.option(
    "--last", type=click.IntRange(1, RECORDINGS_MAX), metavar="N", default=1, help="Show the last N restarts [1]."
)
@click.option("--json", "as_json", is_flag=True, help="Print the recordings as JSON, a list.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help="Write them as a trace for ui.perfetto.dev and chrome://tracing; -: stdout.",
)
def command(name: str | None, last: int, as_json: bool, trace: Path | None) -> int:
    """Show the last restarts of the service NAME, oldest first, as the flight recorder has kept them.

    They are read from files in its runtime directory: they are there after its supervisor was replaced, was killed or
    has stopped.

    Exit codes: 0 shown; 6 no such service, or it was never restarted.
    """
    directory = _directory(name)
    recordings = _read(directory, last)
    if trace is not None:
        with ReportFile(trace) as file:
            file.write(msgspec.json.encode(trace_of(recordings)) + b"\n")
    elif as_json:
        print_json(recordings)
    else:
        for number, recording in enumerate(recordings):
            _print(recording, is_first=not number)
    return ExitCode.DONE


def _directory(name: str | None) -> Path:
    """The runtime directory of the named service, or of the only one; also of one that has ended."""
    root = runtime_root(os.environ, os.geteuid(), Path(tempfile.gettempdir()))
    found = [path.parent for path in root.glob("*/restarts") if name in (None, path.parent.name)]
    return found[0] if len(found) == 1 else find_service(name)


def _read(directory: Path, last: int) -> list[Recording]:
    try:
        recordings = read_recordings(str(directory), last)
    except PermissionError as error:
        raise ControlError(
            "HP609",
            f"cannot read the restarts of {directory.name}",
            cause=f"{error.filename} is another user's",
            fix=f"ls -ld {error.filename}",
        ) from None
    if not recordings:
        raise ControlError(
            "HP609",
            f"there are no restarts of {directory.name} to show",
            cause=f"none is recorded in {directory}: it was not restarted since that was made",
            fix=f"hotport restart {directory.name}",
        )
    return recordings


def _print(recording: Recording, *, is_first: bool) -> None:
    report = recording.report
    out = console()
    if not is_first:
        out.print()
    at = report.began_at.replace("T", " ").partition(".")[0]
    out.print(f"{at} UTC  from generation {report.previous} to {report.generation}", markup=False)
    print_report(report)
    if recording.leaving:
        one = len(recording.leaving) == 1
        numbers = ", ".join(map(str, recording.leaving))
        out.print(f"{'worker' if one else 'workers'} {numbers} {'has' if one else 'have'} not ended yet", markup=False)
