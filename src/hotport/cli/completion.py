"""``hotport completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from hotport.cli import HELP
from hotport.errors import ExitCode

__all__ = ["command"]

#: Where each shell looks for it.
PLACES = {
    "bash": "~/.local/share/bash-completion/completions/hotport",
    "zsh": "a directory of $fpath, as _hotport",
    "fish": "~/.config/fish/completions/hotport.fish",
}


@click.command("completion", short_help="Print what completes hotport's words in a shell.", context_settings=HELP)
@click.argument("shell", type=click.Choice(list(PLACES)))
@click.pass_context
def command(ctx: click.Context, /, shell: str) -> int:
    """Print the script that completes commands, flags, their values and the names of services in SHELL.

    \b
    hotport completion bash >~/.local/share/bash-completion/completions/hotport
    hotport completion zsh >~/.zfunc/_hotport      # with fpath+=~/.zfunc before compinit in .zshrc
    hotport completion fish >~/.config/fish/completions/hotport.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "hotport", "_HOTPORT_COMPLETE").source())
    return ExitCode.DONE
