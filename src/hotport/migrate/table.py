"""What a table of another server's options is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["ALWAYS", "FLAGS_ALONE", "NO_EQUAL", "Peer", "Row"]

#: In `Row.here`: hotport has nothing like it.
NO_EQUAL: Final = ""

#: In `Row.here`: hotport does so without an option, or needs no such thing.
ALWAYS: Final = "-"

#: Of `Row.how`: no value follows the flag.
FLAGS_ALONE: Final = frozenset(
    {"on", "off", "alone", "combined", "silent", "quiet", "debug", "required", "none", "zero", "nobody", "metrics"}
)


class Row(NamedTuple):
    """One option of another server.

    Attributes:
        flags: All its names on the command line, separated by spaces: ``-b --bind``.
        here: The key of hotport's option; `ALWAYS` or `NO_EQUAL`.
        how: How its value is read, by the names of `hotport.migrate.translate.READERS`.
        why: For a page and for who migrates: why there is no equal, or what differs.
        settings: Its names in the server's configuration file, if they are not the long flag with ``_``.
    """

    flags: str
    here: str
    how: str = "text"
    why: str = ""
    settings: str = ""

    @property
    def takes_value(self) -> bool:
        """Whether a value follows the flag."""
        return self.how not in FLAGS_ALONE

    def names(self) -> tuple[str, ...]:
        """Its names in a configuration file."""
        if self.settings:
            return tuple(self.settings.split())
        return tuple(flag[2:].replace("-", "_") for flag in self.flags.split() if flag.startswith("--"))


@dataclass(frozen=True, slots=True)
class Peer:
    """Another server.

    Attributes:
        name: Its command.
        title: Its name in prose.
        rows: Every option that its ``--help`` names; of uWSGI those that sites use.
        differs: What is different without any option; each a sentence.
        is_complete: Whether `rows` has every option.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    differs: tuple[str, ...] = ()
    is_complete: bool = True

    def flag(self, flag: str) -> Row | None:
        """Return the option that has this name on the command line."""
        return next((row for row in self.rows if flag in row.flags.split()), None)

    def setting(self, name: str) -> Row | None:
        """Return the option that has this name in a configuration file."""
        return next((row for row in self.rows if name in row.names()), None)
