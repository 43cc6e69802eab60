"""The verdict on a run as JUnit XML, which continuous integration shows as tests. Pure."""

from __future__ import annotations

from xml.etree import ElementTree

from hotport.churn.certainty import bounds, percent
from hotport.churn.fates import LOSSES
from hotport.churn.result import Result
from hotport.churn.verdict import attempts_of, losses_of, named

__all__ = ["junit"]


def junit(result: Result) -> bytes:
    """Write a test case for the validity of a run, for each kind of loss, and for the limits.

    A loss that was not allowed and a limit that was not kept are failures; a run that means nothing is an error.

    Sources: the format that Jenkins' and Surefire's schema describe.
    """
    verdict, losses, attempts = result.verdict, losses_of(result.totals), attempts_of(result.totals)
    suite = ElementTree.Element("testsuite", name=f"hotport churn {result.target.url}")

    def case(name: str) -> ElementTree.Element:
        return ElementTree.SubElement(
            suite, "testcase", classname="hotport.churn", name=name, time=f"{result.duration_ms / 1000:.3f}"
        )

    valid = case("the run means something")
    for why in verdict.why_invalid:
        ElementTree.SubElement(valid, "error", message=why)
    failures = 0
    for fate in LOSSES:
        count = losses.get(fate.value, 0)
        found = case(f"nothing is lost: {fate.value}")
        budget = verdict.allowed.get(fate.value, 0)
        low, high = bounds(count, attempts)
        if budget is not None and count > budget:
            failures += 1
            message = f"{named(count, fate.value)} of {attempts:,} attempts ({percent(low)} to {percent(high)}, 95 %)"
            ElementTree.SubElement(found, "failure", message=message)
    kept = case("limits are kept")
    for failure in verdict.failed:
        failures += 1
        ElementTree.SubElement(kept, "failure", message=failure)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(failures))
    suite.set("errors", str(len(verdict.why_invalid)))
    suite.set("time", f"{result.duration_ms / 1000:.3f}")
    suite.set("timestamp", result.started_at)
    text: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
    return text + b"\n"
