"""``hotport serve``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from hotport.cli import HELP
from hotport.errors import ConfigError, ExitCode, HotportError
from hotport.kernel.process import working_directory
from hotport.options import OPTIONS, Option
from hotport.options.loading import Loaded, load, meant_flag, rows, show
from hotport.runner import supervise
from hotport.supervisor.upgrade import CHECK

__all__ = ["command"]


class _Serve(click.Command):
    """Separates what follows ``--``: a program with options of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        program: list[str] = []
        if "--" in args:
            at = args.index("--")
            args, program = args[:at], args[at + 1 :]
        ctx.obj = tuple(program)
        args_given = [*args]  # click takes words out of args
        try:
            return super().parse_args(ctx, args)
        except (click.NoSuchOption, click.BadOptionUsage, click.BadParameter) as error:
            raise _explained(error, args_given) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except HotportError as error:
            error.fix = _whole_line(error.fix, sys.argv[2:])
            raise


def _whole_line(fix: str, words: list[str]) -> str:
    """Complete a fix that is one flag to the line that can be pasted; its flag replaces the one that was given."""
    flag, _, _ = fix.partition(" ")
    if not flag.startswith("--") or "--" in words or sum(word.partition("=")[0] == flag for word in words) > 1:
        return fix
    at = next((at for at, word in enumerate(words) if word.partition("=")[0] == flag), None)
    if at is not None:
        has_value = "=" in words[at] or " " not in fix
        words = words[:at] + words[at + (1 if has_value else 2) :]
    return f"{shlex.join(['hotport', 'serve', *words])} {fix}"


def _explained(error: click.UsageError, words: list[str]) -> Exception:
    """Explain a flag that cannot be used: another server's with the line that does the same here."""
    from hotport.migrate.translate import recognise  # of which a line without errors has no need

    is_unknown = isinstance(error, click.NoSuchOption)
    if isinstance(error, click.BadParameter) and error.param is not None:
        flag = error.param.opts[0]
    elif isinstance(error, click.NoSuchOption | click.BadOptionUsage):
        flag = error.option_name
    else:
        return error
    found = recognise(words, flag, Path(working_directory(os.environ)))
    if found is None or (not is_unknown and any(r.is_lost and r.theirs.startswith(flag) for r in found.remarks)):
        if not is_unknown:
            return error
        meant = meant_flag(flag)
        cause, note = "hotport has no option of this name", f"did you mean {meant}?" if meant else ""
        return ConfigError("HP302", f"unknown flag {flag}", cause=cause, fix="hotport serve --help", note=note)
    peer = found.peer
    what = f"unknown flag {flag}" if is_unknown else f"{flag} cannot be used like this"
    if (row := peer.flag(flag)) is not None and row.how == "config":
        fix = f"hotport migrate {shlex.quote(shlex.join([peer.name, *words]))} >hotport.toml && hotport serve"
    else:
        fix = found.command()
    note = "; ".join(f"{remark.theirs}: {remark.why}" for remark in found.remarks)
    return ConfigError(
        "HP302", what, cause=f"it is {peer.title}'s, and the line below does the same", fix=fix, note=note
    )


@click.command(
    "serve",
    short_help="Serve an application, or any program, until stopped.",
    cls=_Serve,
    context_settings=HELP,
    options_metavar="[OPTIONS]",
    epilog="Options are also read from hotport.toml, or [tool.hotport] in pyproject.toml, and from HOTPORT_* "
    "variables; a flag is stronger than a variable, a variable stronger than a file.",
)
@click.argument("target", required=False, metavar="[TARGET | -- COMMAND...]")
@click.option("--config", type=click.Path(path_type=Path), help="Read this file in place of ./hotport.toml.")
@click.option("--show-config", is_flag=True, help="Print every value and where it comes from, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="With --show-config: print JSON.")
@click.option("--take-over", is_flag=True, help="Take the port of the supervisor that runs this service, if any.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    target: str | None,
    config: Path | None,
    show_config: bool,
    as_json: bool,
    take_over: bool,
    **flags: Any,
) -> int:
    """Serve TARGET until stopped: module:app or file.py:app; or, after --, any program.

    Without TARGET, the application in app.py or main.py (asgi.py, api.py) is served.

    The program after -- must support socket activation (LISTEN_FDS) and say READY=1, or be given --ready exec.

    Signals: HUP restarts. TERM and INT stop after draining, a second one at once; QUIT stops at once. With
    --lame-duck the first TERM only begins that time, and the next one ends it. TTIN and TTOU mean one worker more or
    less, USR2 upgrades the supervisor, USR1 does nothing. Closing the terminal stops as TERM does, unless it was
    started by nohup or setsid.
    """

    def read(directory: Path, *, needs_program: bool = True) -> Loaded:
        return load(
            file=config,
            environ=os.environ,
            flags={**flags, "target": target, "command": ctx.obj or None},
            cwd=directory,
            needs_program=needs_program,
        )

    if config is not None and config.suffix == ".py":
        from hotport.migrate.peers import GUNICORN, HYPERCORN

        peer = HYPERCORN if "hypercorn" in config.name else GUNICORN
        line = shlex.quote(shlex.join([peer.name, "-c", str(config), target or "app:app"]))
        cause = f"it is a configuration file of {peer.title}, and hotport's is TOML"
        fix = f"hotport migrate {line} >hotport.toml && hotport serve"
        raise ConfigError("HP301", f"cannot read {config}", cause=cause, fix=fix)
    directory = Path(working_directory(os.environ))
    loaded = read(directory, needs_program=False)
    if loaded.options.target is None and not loaded.options.command:
        target = _found(directory / loaded.options.app_dir)
        loaded = read(directory, needs_program=not show_config)
    if show_config:
        from hotport.cli.output import write  # rich, which a supervisor has no use for

        write(_as_json(loaded) if as_json else show(loaded))
        return ExitCode.DONE
    if not loaded.options.watch:
        return supervise(read, takes_over=take_over)
    from hotport.cli.watch import check_watchfiles, watching

    if CHECK in os.environ:  # a supervisor asks whom it would become
        check_watchfiles()
        return supervise(read, takes_over=take_over)
    with watching(loaded.options):
        return supervise(read, takes_over=take_over)


def _found(directory: Path) -> str | None:
    """Find the application in the usual files, and say which one it is."""
    from hotport.cli._find import find_target

    found = find_target(directory)
    if found is None:
        return None
    others = f"; {', '.join(found.others)} may have one, too" if found.others else ""
    click.echo(f"hotport serve {found.target}   (found in {found.file}{others})", err=True)
    return found.target


def _as_json(loaded: Loaded) -> str:
    return json.dumps({row.key: {"value": row.value, "origin": row.origin} for row in rows(loaded)}, indent=2)


def _parameter(option: Option) -> click.Option:
    assert option.flag is not None
    if option.is_switch:
        return click.Option(
            [f"{option.flag}/--no-{option.key.replace('_', '-')}", option.key], default=None, help=option.help
        )
    default = "" if option.default in (None, "", (), []) else f"  [default: {_plain(option.default)}]"
    return click.Option(
        [option.flag, option.key],
        multiple=option.is_list,
        type=click.Choice(option.choices) if option.choices else str,
        metavar=None if option.choices else option.metavar,
        help=option.help + default,
    )


def _plain(default: object) -> str:
    return ", ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


command.params.extend(_parameter(option) for option in OPTIONS if option.flag is not None)
