"""``hotport churn compare``."""

from __future__ import annotations

import os
from pathlib import Path

import click
import msgspec
from rich.table import Table

from hotport.churn.compare import compare
from hotport.churn.result import FORMAT, Result
from hotport.cli import HELP
from hotport.cli.output import console, write
from hotport.errors import ConfigError, ExitCode, describe_errno

__all__ = ["command"]

CHANGES = {-1: "better", 0: "", 1: "WORSE"}


@click.command("compare", context_settings=HELP)
@click.argument("one", metavar="A.json", type=click.Path(path_type=Path))
@click.argument("other", metavar="B.json", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(one: Path, other: Path, as_json: bool) -> int:
    """Tell what differs between two runs of `hotport churn --json`, and whether chance may have done it.

    With their 95 % bounds: shares of losses (Clopper and Pearson; Fisher's exact test), percentiles of latency (by
    their ranks; they differ if their bounds do not overlap). Within two runs, that is: what differs from day to day on
    a machine only several runs tell.

    Exits with 0, or with 1 if anything is significantly worse in B.
    """
    rows = list(compare(_read(one), _read(other)))
    if as_json:
        write(msgspec.json.encode(rows).decode())
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 1))
        for heading in ("", one.name, other.name, ""):
            table.add_column(heading)
        for row in rows:
            style = "red" if row.change > 0 else "green" if row.change < 0 else ""
            table.add_row(row.what, row.one, row.other, CHANGES[row.change], style=style)
        console().print(table)
    return 1 if any(row.change > 0 for row in rows) else ExitCode.DONE


def _read(path: Path) -> Result:
    """Read a result.

    Raises:
        ConfigError: It is not there, or no result that this version reads (HP716).
    """
    try:
        result = msgspec.json.decode(path.read_bytes(), type=Result)
        if result.format == FORMAT:
            return result
        cause = f"its format is {result.format}, and this version of hotport reads {FORMAT}"
    except OSError as error:
        cause = describe_errno(error.errno or 0)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        cause = f"it is not a result of hotport churn: {error}"
    fix = f"ls -l {os.path.dirname(path) or '.'}"
    raise ConfigError(
        "HP716", f"cannot read {path}", cause=cause, fix=fix, note="hotport churn URL --json FILE writes one"
    )
