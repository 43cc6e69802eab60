"""Where something was measured."""

from __future__ import annotations

import json
import platform

from hotport.churn.machine import SYSCTLS, machine


def test_machine_tells_what_it_takes_to_judge_a_number() -> None:
    found = machine(("msgspec", "there-is-no-such-package"))
    assert found["kernel"] == platform.release()
    assert found["cores"] >= 1
    assert list(found["packages"]) == ["msgspec"]
    assert list(found["sysctls"]) == list(SYSCTLS)
    assert json.loads(json.dumps(found))["cpu"] == found["cpu"]
