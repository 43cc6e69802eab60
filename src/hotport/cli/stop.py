"""``hotport stop``."""

from __future__ import annotations

import click

from hotport.cli import HELP
from hotport.cli.client import ask, name_argument, raise_failure
from hotport.cli.output import console, print_json, waiting
from hotport.errors import ConfigError, ExitCode
from hotport.options import parse_duration
from hotport.wire.messages import StopRequest

__all__ = ["command"]


@click.command("stop", context_settings=HELP)
@name_argument
@click.option("--now", is_flag=True, help="Do not wait for connections.")
@click.option(
    "--lame-duck",
    metavar="TIME",
    help="Say on the status port that it leaves, and serve on for so long before.  [default: lame_duck of its options]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str | None, now: bool, lame_duck: str | None, as_json: bool) -> int:
    """Stop the service NAME and wait until it has ended.

    A second stop ends the time of a lame duck; one more, or --now, does not wait for connections either.

    Exit codes: 0 stopped; 5 stopped, and connections were cut; 6 no supervisor there.
    """
    lame_duck_s = None if lame_duck is None else _duration(lame_duck)
    code: int = ExitCode.DONE
    with waiting("stop"):
        for reply in ask(name, StopRequest(now=now, lame_duck_s=lame_duck_s)):
            raise_failure(reply)
            if as_json:
                print_json(reply)
            else:
                console().print("stopped" if reply.exit_code == 0 else "stopped; connections were cut")
            code = reply.exit_code
    return code


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(
            "HP304", f"--lame-duck cannot be {text!r}", cause=str(error), fix="hotport stop --lame-duck 10s"
        ) from None
