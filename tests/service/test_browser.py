"""A real browser through restarts: headless Chromium, its connection pool, its idea of what may be asked again."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support import DEADLINE_S, SLOWNESS, Service, eventually, need, write_code

APP = '''
import asyncio, json, pathlib

VERSION = "{version}"
PAGE = """<!doctype html><meta charset="utf-8"><title>hotport</title><link rel="icon" href="data:,"><script>
const told = {{answers: {{}}, failures: [], streams: 0, events: [], sockets: 0, echoes: [], closes: []}};
async function ask(method) {{
  try {{
    const answer = await fetch("/version", {{method: method, body: method === "POST" ? "x".repeat(5000) : undefined}});
    const version = await answer.text();
    told.answers[version] = (told.answers[version] || 0) + 1;
    return version;
  }} catch (error) {{ told.failures.push(method + " " + error); return ""; }}
}}
async function load(method) {{ while (await ask(method) !== "three"); }}
function listen() {{
  return new Promise(resolve => {{
    const source = new EventSource("/events");
    source.onopen = () => told.streams++;
    source.onmessage = message => {{
      told.events.push(message.data);
      if (message.data === "three") {{ source.close(); resolve(); }}
    }};
  }});
}}
function echo() {{
  return new Promise(resolve => {{
    const socket = new WebSocket("ws://" + location.host + "/echo");
    let version = "";
    told.sockets++;
    socket.onmessage = message => {{
      if (message.data === version) {{ setTimeout(() => socket.send(version), 5); return; }}
      if (told.echoes.includes(message.data)) return; // was on its way while the socket moved
      version = message.data;
      told.echoes.push(version);
      if (version === "three") {{ socket.onclose = null; socket.close(); resolve(); }} else socket.send(version);
    }};
    socket.onclose = event => {{ told.closes.push(event.code); resolve(echo()); }};
  }});
}}
onload = async () => {{
  await Promise.all([load("GET"), load("GET"), load("POST"), listen(), echo()]);
  await fetch("/report", {{method: "POST", body: JSON.stringify(told)}});
}};
</script>"""

async def echo(receive, send):
    await receive()
    await send({{"type": "websocket.accept"}})
    await send({{"type": "websocket.send", "text": VERSION}})
    while (message := await receive())["type"] == "websocket.receive":
        await send({{"type": "websocket.send", "text": message["text"]}})

async def app(scope, receive, send):
    if scope["type"] == "websocket":
        return await echo(receive, send)
    if scope["type"] != "http":
        raise NotImplementedError
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if scope["path"] == "/events":
        headers = [(b"content-type", b"text/event-stream")]
        await send({{"type": "http.response.start", "status": 200, "headers": headers}})
        await send({{"type": "http.response.body", "body": b"retry: 50\\ndata: " + VERSION.encode() + b"\\n\\n",
                     "more_body": True}})
        await scope["extensions"]["hotport"]["draining"].wait()
        await send({{"type": "http.response.body", "body": b""}})
        return
    answer, kind = VERSION, b"text/plain"
    if scope["path"] == "/":
        answer, kind = PAGE, b"text/html"
    elif scope["path"] == "/report":
        pathlib.Path("report.json").write_bytes(body)
    elif body and body != b"x" * 5000:
        answer = "damaged"
    await send({{"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}})
    await send({{"type": "http.response.body", "body": answer.encode()}})
'''


@contextmanager
def browsing(tmp_path: Path, url: str) -> Iterator[None]:
    """Chromium on a page, until the block ends."""
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
    with (tmp_path / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [need("chromium"), *arguments, f"--user-data-dir={tmp_path / 'profile'}", url], stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def page_report(tmp_path: Path) -> Any:
    """What the page has to tell, when it has."""
    path = tmp_path / "report.json"

    def is_whole() -> bool:
        return path.exists() and path.read_bytes().endswith(b"}")

    eventually(is_whole, "the page reports")
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("handoff", ["auto", "websocket"])
def test_page_that_is_open_in_a_browser_notices_no_restart(tmp_path: Path, handoff: str) -> None:
    """Its WebSocket stays open if it may move; an EventSource has a request in flight, which the application ends."""
    need("chromium")
    write_code(tmp_path / "app.py", APP.format(version="one"))
    options = ("--workers", "2", "--drain-timeout", f"{2 * SLOWNESS:g}s", "--handoff", handoff)
    with Service(tmp_path, "app:app", *options).wait_ready() as service:

        def requests() -> int:
            return sum(worker["requests"] or 0 for worker in service.status()["workers"])

        fates: Counter[str] = Counter()
        with browsing(tmp_path, f"http://127.0.0.1:{service.port}/"):
            for version in ("two", "three"):
                eventually(lambda: requests() > 50, "the page asks")
                write_code(tmp_path / "app.py", APP.format(version=version))
                report = service.restart()
                assert report["outcome"] == "done"
                fates.update(report["connections"])
            told = page_report(tmp_path)
    assert told["failures"] == []
    assert set(told["answers"]) == {"one", "two", "three"}
    assert told["events"] == told["echoes"] == ["one", "two", "three"]
    assert told["streams"] == 3
    if handoff == "websocket":
        assert (told["sockets"], told["closes"]) == (1, [])
        assert fates["moved_websocket"] == 2
    else:
        assert (told["sockets"], told["closes"]) == (3, [1012, 1012])
    assert fates["moved_http"] > 0
    assert set(fates) <= {"moved_http", "moved_websocket", "told_to_close", "finished"}


QUIET_PAGE = """<!doctype html><meta charset="utf-8"><title>hotport</title><link rel="icon" href="data:,"><script>
const told = {opened: 0, broken: [], events: []};
const source = new EventSource("/events");
source.onopen = () => { told.opened++; fetch("/opened", {method: "POST", body: "" + told.opened}); };
source.onerror = () => told.broken.push(source.readyState);
source.onmessage = message => {
  told.events.push(message.data);
  source.close();
  fetch("/report", {method: "POST", body: JSON.stringify(told)});
};
</script>"""

QUIET_APP = """
import asyncio, pathlib

async def app(scope, receive, send):
    if scope["type"] != "http":
        raise NotImplementedError
    path = scope["path"]
    kind = b"text/event-stream" if path == "/events" else b"text/html"
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    answer = b""
    if path == "/events":
        if VERSION == "one":
            await asyncio.Event().wait()
        answer = f"data: {VERSION}\\n\\n".encode()
    elif path == "/":
        answer = pathlib.Path("page.html").read_bytes()
    else:
        pathlib.Path(path[1:] + ".json").write_bytes(body)
    await send({"type": "http.response.body", "body": answer})
"""


@pytest.mark.slow
def test_event_source_without_an_event_opens_and_comes_back_after_the_deadline(tmp_path: Path) -> None:
    """It stayed closed until the first event, and was answered with 503 at the deadline: then it gives up for ever."""
    need("chromium")
    (tmp_path / "page.html").write_text(QUIET_PAGE)
    write_code(tmp_path / "app.py", f"VERSION = 'one'\n{QUIET_APP}")
    with (
        Service(tmp_path, "app:app", "--drain-timeout", "1s").wait_ready() as service,
        browsing(tmp_path, f"http://127.0.0.1:{service.port}/"),
    ):
        eventually((tmp_path / "opened.json").exists, "the stream opens without an event")
        write_code(tmp_path / "app.py", f"VERSION = 'two'\n{QUIET_APP}")
        report = service.restart()
        told = page_report(tmp_path)
    assert report["connections"]["cut_streaming"] == 1
    assert told == {"opened": 2, "broken": [0], "events": ["two"]}
