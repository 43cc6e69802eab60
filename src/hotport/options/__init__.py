"""Every option of a service, defined once; file, environment and flags are read from that definition.

A field of `Options` carries its default, its type and its help; `OPTIONS` derives what the option is called
everywhere. A flag is stronger than the environment, which is stronger than the file: `hotport.options.loading`, which a
worker does not need.
"""

from __future__ import annotations

from hotport.options.definition import OPTIONS, WORKERS_MAX, Option, Options, runtime_root, service_name
from hotport.options.values import format_duration, format_size, parse_duration, parse_size

__all__ = [
    "OPTIONS",
    "WORKERS_MAX",
    "Option",
    "Options",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
    "runtime_root",
    "service_name",
]
