"""``hotport migrate``."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path

import click

from hotport.cli import HELP
from hotport.cli.output import write
from hotport.errors import ConfigError, ExitCode
from hotport.kernel.process import working_directory

__all__ = ["command"]


@click.command(
    "migrate",
    short_help="Print the hotport.toml for another server's command line.",
    context_settings={**HELP, "ignore_unknown_options": True},
    options_metavar="[OPTIONS]",
)
@click.option("--json", "as_json", is_flag=True, help="Print options and remarks as JSON.")
@click.argument("words", nargs=-1, required=True, metavar="'SERVER ...'", type=click.UNPROCESSED)
def command(words: tuple[str, ...], as_json: bool) -> int:
    """Print the hotport.toml for the command line of another server: uvicorn, gunicorn, hypercorn, granian or uWSGI.

    Its configuration file (-c, --ini, or gunicorn.conf.py in this directory) is read; one in Python is run in a process
    of its own, for ten seconds at most. What has no equal stands below as comments.

    Example: hotport migrate 'gunicorn -c conf.py app:app' >hotport.toml
    """
    from hotport.migrate.translate import translate_line

    try:
        line = shlex.split(words[0]) if len(words) == 1 else list(words)
    except ValueError as error:
        cause = f"a shell could not read it either: {str(error).lower()}"
        raise ConfigError("HP341", f"cannot migrate {words[0]!r}", cause=cause, note="close the quotes") from None
    found = translate_line(line, Path(working_directory(os.environ)))
    options = found.native()
    if as_json:
        remarks = [{"theirs": r.theirs, "why": r.why, "has_no_equal": r.is_lost} for r in found.remarks]
        write(json.dumps({"server": found.peer.name, "options": options, "remarks": remarks}, indent=2))
        return ExitCode.DONE
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in options.items()]
    for is_lost, title in ((True, "No equal:"), (False, "Needs nothing here:")):
        said = [f"# - {remark.theirs}: {remark.why}" for remark in found.remarks if remark.is_lost is is_lost]
        lines += ["", f"# {title}", *said] if said else []
    write("\n".join(lines))
    lost = sum(remark.is_lost for remark in found.remarks)
    click.echo(f"{len(options)} options; {lost} without an equal, as comments. Then: hotport serve", err=True)
    return ExitCode.DONE
