"""Every option of a service, defined once; file, environment and flags are read from that definition.

A field of `Options` carries its default, its type and its help; `OPTIONS` derives what the option is called
everywhere. A flag is stronger than the environment, which is stronger than the file.
"""

from __future__ import annotations

from hotport.options.definition import OPTIONS, Option, Options, runtime_root, service_name
from hotport.options.loading import Loaded, Row, load, rows, show
from hotport.options.values import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "OPTIONS",
    "Loaded",
    "Option",
    "Options",
    "Row",
    "format_duration",
    "format_size",
    "load",
    "parse_duration",
    "parse_size",
    "rows",
    "runtime_root",
    "service_name",
    "show",
]
