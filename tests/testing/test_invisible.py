"""A user's test of a service of their own: it passes if nobody noticed, and else says what was noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hotport.errors import ConfigError, StartError
from hotport.testing import assert_invisible_restart, assert_invisible_restart_async
from tests.support import SLOWNESS, assert_three_lines, write_code
from tests.testing import apps

TIMEOUT_S = 30.0 * SLOWNESS

VERSIONED = """\
async def app(scope, receive, send):
    assert scope["type"] == "http"
    await send({{"type": "http.response.start", "status": {status}, "headers": [(b"x-generation", b"{version}")]}})
    await send({{"type": "http.response.body", "body": b"ok"}})
"""


def test_a_restart_of_a_sound_application_is_invisible() -> None:
    result = assert_invisible_restart(apps.app, timeout_s=TIMEOUT_S)
    assert [mark.outcome for mark in result.restarts] == ["done", "done"]
    assert set(result.totals) == {"connect", "keepalive", "late", "halfhead"}
    assert result.verdict.exit_code == 0


def test_the_load_ends_with_the_restarts_and_not_with_the_longest_time_they_may_take() -> None:
    result = assert_invisible_restart(apps.app, kinds=["connect"], restarts=1, workers=1, timeout_s=500)
    assert not result.is_partial
    assert result.duration_ms < 100_000


def test_code_is_edited_before_each_restart_and_answers_after_it(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    write_code(main, VERSIONED.format(version=0, status=200))

    def edit(number: int) -> None:
        write_code(main, VERSIONED.format(version=number, status=200))

    result = assert_invisible_restart(f"{main}:app", kinds={"connect": 100}, edit=edit, timeout_s=TIMEOUT_S)
    found: set[str] = set()
    for bucket in result.buckets:
        found |= set(bucket.answered_by)
    assert found == {"0", "1", "2"}


def test_a_loss_fails_with_every_fate_and_the_log(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    write_code(main, VERSIONED.format(version=0, status=200))

    def edit(_: int) -> None:
        write_code(main, "print('new code', flush=True)\n" + VERSIONED.format(version=1, status=500))

    with pytest.raises(AssertionError) as caught:
        assert_invisible_restart(f"{main}:app", restarts=1, edit=edit, timeout_s=TIMEOUT_S)
    text = str(caught.value)
    assert text.startswith("LOST ")
    assert "wrong status" in text
    assert "within" in text
    assert "connect: wrong status (500)" in text
    assert "new code" in text


def test_a_restart_that_is_aborted_fails_though_nothing_is_lost(tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    write_code(main, VERSIONED.format(version=0, status=200))
    with pytest.raises(AssertionError, match="restart 1 aborted") as caught:
        assert_invisible_restart(
            f"{main}:app", restarts=1, edit=lambda _: write_code(main, "1 / 0\n"), timeout_s=TIMEOUT_S
        )
    assert "nothing lost" in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)


def test_an_edit_that_raises_ends_the_run() -> None:
    def edit(_: int) -> None:
        raise RuntimeError("edit")

    with pytest.raises(RuntimeError, match="edit"):
        assert_invisible_restart(apps.app, kinds=["connect"], edit=edit, timeout_s=500)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)  # both: tests/churn/test_run.py
async def test_it_can_be_awaited() -> None:
    result = await assert_invisible_restart_async(apps.app, kinds=["connect"], restarts=1, timeout_s=TIMEOUT_S)
    assert len(result.restarts) == 1
    with pytest.raises(ConfigError) as caught:
        assert_invisible_restart(apps.app)
    assert_three_lines(str(caught.value), "HP725")


def test_streams_are_spoken_too() -> None:
    # Without a restart: whether a line crosses the end of its connection is up to the application.
    result = assert_invisible_restart(apps.lines, kinds={"stream": 2}, restarts=0, timeout_s=TIMEOUT_S)
    assert set(result.totals) == {"stream"}


def test_what_no_worker_can_import_is_an_error_before_anything_starts() -> None:
    async def local(scope: object, receive: object, send: object) -> None: ...

    for app in (local, lambda stream: stream):
        with pytest.raises(ConfigError) as caught:
            assert_invisible_restart(app)
        assert_three_lines(str(caught.value), "HP330")


def test_a_wrong_option_and_a_wrong_kind_are_errors_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="drain_timeout"):
        assert_invisible_restart(apps.app, graceful_timeout=3)
    wrongs: list[tuple[dict[str, Any], str]] = [({"kinds": ["conect"]}, "HP723"), ({"bind": ":8000"}, "HP724")]
    for wrong, code in wrongs:
        with pytest.raises(ConfigError) as caught:
            assert_invisible_restart(apps.app, **wrong)
        assert_three_lines(str(caught.value), code)


def test_a_service_that_does_not_start_says_what_it_has_logged() -> None:
    with pytest.raises(StartError) as caught:
        assert_invisible_restart("tests.testing.nothing:app", timeout_s=TIMEOUT_S)
    assert_three_lines(str(caught.value), "HP720")
    assert "HP501" in caught.value.__notes__[0]
