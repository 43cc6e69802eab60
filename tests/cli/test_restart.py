from __future__ import annotations

from dataclasses import fields

from hotport.cli.restart import command
from hotport.options import Options
from hotport.wire.messages import RestartRequest


def test_every_override_of_a_restart_has_a_flag_and_is_an_option() -> None:
    overrides = set(RestartRequest.__struct_fields__)
    assert {parameter.name for parameter in command.params} - {"name", "as_json"} == overrides
    assert overrides <= {field.name for field in fields(Options)}
