"""Two runs, compared; and the same verdict for machines."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner

from hotport.churn.compare import compare
from hotport.churn.fates import Fate, Kind
from hotport.churn.junit import junit
from hotport.churn.result import Result
from hotport.cli._compare import command
from tests.churn import results

SCHEMA = Path(__file__).parents[2] / "docs" / "reference" / "churn-result.schema.json"


def run(refused: int = 0, seed: int = 7) -> Result:
    return results.build(
        restarts=[results.mark(1, 1000, 1200)],
        accept_gap_ms=[40.0],
        extra={1100: {(Kind.CONNECT, Fate.REFUSED): refused}},
        seed=seed,
    )


def test_losses_differ_when_chance_would_not_do_that() -> None:
    changes = {row.what: row.change for row in compare(run(), run(9))}
    assert (changes["lost"], changes["refused"], changes["attempts"]) == (1, 1, 0)
    assert {row.what: row.change for row in compare(run(9), run())}["refused"] == -1
    few = {row.what: row for row in compare(run(), run(2))}["refused"]
    assert few.change == 0
    assert few.one.startswith("0 (0 % to ")
    assert few.other.startswith("2 (")


def test_latencies_of_two_runs_alike_do_not_differ_and_of_a_slower_one_do() -> None:
    assert not any(row.change for row in compare(run(), run(seed=8)))
    slower = run()
    for bucket in slower.buckets:
        bucket.latency = {
            kind: {index + 64: count for index, count in found.items()} for kind, found in bucket.latency.items()
        }
    changes = {row.what: row.change for row in compare(run(), slower)}
    assert changes["p50 after"] == 1
    assert changes["p50 before"] == 1
    assert {row.what: row.change for row in compare(slower, run())}["p50 after"] == -1


def test_runs_without_restarts_are_compared_as_far_as_they_go() -> None:
    rows = {row.what: row for row in compare(results.quiet(), results.quiet())}
    assert rows["accept gap, median"].one == "-"
    assert not {"p50 during", "p99 after"} & set(rows)


def test_command_prints_a_table_and_fails_if_something_is_worse(tmp_path: Path) -> None:
    for name, result in (("a.json", run()), ("b.json", run(9))):
        (tmp_path / name).write_bytes(msgspec.json.encode(result))
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    worse = CliRunner().invoke(command, paths, standalone_mode=False)
    assert worse.return_value == 1
    assert "WORSE" in worse.stdout
    better = CliRunner().invoke(command, [*reversed(paths), "--json"], standalone_mode=False)
    assert better.return_value == 0
    assert {row["what"] for row in json.loads(better.stdout)} > {"lost", "refused", "accept gap, median"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "it is not a result"), ("{}", "it is not a result"), (None, "ENOENT"), ("format", "its format is 99")],
)
def test_file_that_is_no_result_is_refused(text: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if text == "format":
        result = run()
        result.format = 99
        path.write_bytes(msgspec.json.encode(result))
    elif text is not None:
        path.write_text(text)
    failed = CliRunner().invoke(command, [str(path), str(path)], standalone_mode=False)
    assert "HP716" in str(failed.exception)
    assert words in str(failed.exception)


def test_junit_has_a_case_for_each_loss_and_fails_those_that_occurred() -> None:
    suite = ElementTree.fromstring(junit(run(9)))
    assert (suite.get("failures"), suite.get("errors"), suite.get("tests")) == ("1", "0", str(len(suite)))
    (failure,) = suite.iter("failure")
    assert (failure.get("message") or "").startswith("9 refused of ")
    clean = ElementTree.fromstring(junit(run()))
    assert not list(clean.iter("failure"))
    limited = run()
    limited.verdict.failed.append("too slow")
    assert [each.get("message") for each in ElementTree.fromstring(junit(limited)).iter("failure")] == ["too slow"]


def test_junit_of_a_run_that_means_nothing_is_an_error_and_no_text_breaks_it() -> None:
    suite = ElementTree.fromstring(junit(results.hostile()))
    assert suite.get("errors") == "1"
    assert len(list(suite.iter("error"))) == 1


@pytest.mark.parametrize("build", [results.clean, results.lossy, results.invalid, results.partial, results.hostile])
def test_result_is_what_the_published_schema_says(build: object) -> None:
    result = json.loads(msgspec.json.encode(build()))  # type: ignore[operator]
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(result, schema)
    del result["verdict"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(result, schema)
