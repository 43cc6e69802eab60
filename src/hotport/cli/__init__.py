"""The ``hotport`` command. One module a subcommand, imported only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TextIO

import click

from hotport.errors import ExitCode, HotportError, nearest

__all__ = ["HELP", "is_terminal", "main"]

#: For every command; a help option that only the group knew would not be in a command's own help text.
HELP = {"help_option_names": ["-h", "--help"]}

COMMANDS = (
    *("serve", "restart", "undo", "reload-tls", "status", "scale", "rebalance", "log-level", "stop", "upgrade"),
    *("report", "why", "doctor", "demo", "churn", "migrate", "completion"),
)


#: What other programs call it.
ELSEWHERE = {"dev": "serve --watch", "kill": "stop", "list": "why", "ps": "status", "reload": "restart"}
ELSEWHERE |= dict.fromkeys(("run", "server", "start", "up"), "serve")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that was closed before the start is None."""
    return stream is not None and stream.isatty()


class _Commands(click.Group):
    """Finds ``hotport.cli.NAME`` for a subcommand (with ``_`` for ``-``).

    So ``serve`` does not load what draws progress bars.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = import_module(f"hotport.cli.{cmd_name.replace('-', '_')}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = ELSEWHERE.get(args[0]) or nearest(args[0], COMMANDS)
            hint = f" Did you mean {near!r}?" if near else f" Commands: {', '.join(COMMANDS)}."
            ctx.fail(f"There is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings=HELP)
@click.version_option(package_name="hotport")
def _group() -> None:
    """A server whose restarts no connection notices."""


def main() -> None:
    """Run the command line and exit with hotport's exit code."""
    try:
        code = _group.main(prog_name="hotport", standalone_mode=False)
    except HotportError as error:
        from hotport.cli.output import console  # rich, of which a service that starts has no need

        console(stderr=True).out(error, highlight=False)
        code = error.exit_code
    except OSError as error:
        from hotport.cli.output import output_error

        code = output_error(error)
    except click.exceptions.Abort:
        code = ExitCode.INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = ExitCode.USAGE
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)
