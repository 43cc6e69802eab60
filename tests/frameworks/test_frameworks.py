"""What people do with ASGI frameworks works on hotport, seen by an ordinary client.

Every application in apps/ has the same paths, so one test asks them all. A path that a framework has no means for is
left out of its application; such tests name the frameworks that they ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack

import aiohttp
import httpx
import pytest

from tests.frameworks.conftest import BIG_FILE, STATIC_TEXT, lay_out
from tests.support import DEADLINE_S, RESTARTS, Answer, Hammer, Service, eventually, http_get, write_code

FRAMEWORKS = ("starlette", "fastapi", "django", "channels", "litestar", "quart")

#: ASGI's lifespan protocol: Django does not know it.
WITH_LIFESPAN = ("starlette", "fastapi", "litestar", "quart")

#: FastAPI's ``@app.middleware("http")`` hides from those behind it that the client has left, and ends what they break
#: off; with uvicorn as well.
NOT_BEHIND_BASE_HTTP_MIDDLEWARE = ("starlette", "django", "channels", "litestar", "quart")


def of(*frameworks: str) -> pytest.MarkDecorator:
    """Ask these only."""
    return pytest.mark.parametrize("service", frameworks, indirect=True, scope="module")


@pytest.fixture(scope="module", params=FRAMEWORKS)
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests of one framework."""
    directory = lay_out(tmp_path_factory.mktemp(request.param))
    # It outlives the test that happens to start it: that one must not be blamed.
    with Service(directory, f"{request.param}_app:app", env={"PYTEST_CURRENT_TEST": ""}) as running:
        yield running.wait_ready()


@pytest.fixture
def client(service: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", timeout=DEADLINE_S, verify=False) as client:
        yield client


def wait_seen(client: httpx.Client, word: str) -> None:
    eventually(lambda: word in client.get("/seen").json(), f"the application has noticed: {word}")


# -- requests -----------------------------------------------------------------------------------------------


def test_path_parameter_in_unicode_arrives_decoded(client: httpx.Client) -> None:
    assert client.get("/hello/Grüße & 茶").json() == {"name": "Grüße & 茶"}
    assert client.get("/hello/50%25%3Fx%3D1").json() == {"name": "50%?x=1"}


def test_path_is_decoded_and_raw_path_is_not(client: httpx.Client) -> None:
    told = client.get("/anything/a%2Fb/%C3%BC").json()
    assert told == {"path": "/anything/a/b/ü", "raw_path": "/anything/a%2Fb/%C3%BC"}


def test_query_keeps_repeated_and_unicode_values(client: httpx.Client) -> None:
    assert client.get("/query", params={"a": ["1", "2"], "u": "ü+ &"}).json() == {"a": ["1", "2"], "u": ["ü+ &"]}


def test_json_is_returned_as_it_was(client: httpx.Client) -> None:
    value = {"text": "ü\u2028\0", "list": [1, 2.5, None, True], "nested": {"a": []}}
    assert client.post("/json", json=value).json() == value


def test_form_fields_arrive(client: httpx.Client) -> None:
    assert client.post("/form", data={"one": "ü", "two": "a&b=c"}).json() == {"one": "ü", "two": "a&b=c"}


def test_large_upload_arrives_whole(client: httpx.Client) -> None:
    file = BIG_FILE * 3
    answer = client.post("/upload", data={"note": "ü"}, files={"file": ("größe.bin", file)})
    expected = {"name": "größe.bin", "note": "ü", "size": len(file), "sha256": hashlib.sha256(file).hexdigest()}
    assert answer.json() == expected


@pytest.mark.parametrize("is_chunked", [False, True], ids=["content_length", "chunked"])
def test_large_body_arrives_whole(client: httpx.Client, is_chunked: bool) -> None:
    pieces = [BIG_FILE[at : at + 100_000] for at in range(0, len(BIG_FILE), 100_000)]
    answer = client.post("/receive", content=iter(pieces) if is_chunked else BIG_FILE)
    assert answer.json() == {"size": len(BIG_FILE), "sha256": hashlib.sha256(BIG_FILE).hexdigest()}


def test_many_requests_of_one_client_at_once_are_not_mixed_up(service: Service) -> None:
    async def ask_all() -> list[str]:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{service.port}") as session:

            async def ask(number: int) -> str:
                async with session.get(f"/hello/{number}") as answer:
                    return str((await answer.json())["name"])

            return await asyncio.gather(*(ask(number) for number in range(200)))

    assert asyncio.run(ask_all()) == [str(number) for number in range(200)]


# -- answers ------------------------------------------------------------------------------------------------


def test_streamed_answer_arrives_whole(client: httpx.Client) -> None:
    answer = client.get("/stream", headers={"accept-encoding": "identity"})
    assert answer.text == "".join(f"chunk {number}\n" for number in range(200))
    assert answer.headers["transfer-encoding"] == "chunked"


@of(*NOT_BEHIND_BASE_HTTP_MIDDLEWARE)
def test_streamed_answer_that_breaks_off_does_not_look_whole(client: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        client.get("/break-off", headers={"accept-encoding": "identity"})


def test_file_arrives_whole(client: httpx.Client) -> None:
    assert client.get("/file").content == BIG_FILE


def test_file_is_read_by_a_slow_client(service: Service) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(DEADLINE_S)
        sock.connect(("127.0.0.1", service.port))
        sock.sendall(b"GET /file HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        received = b"".join(iter(lambda: sock.recv(4096), b""))
    assert received.endswith(BIG_FILE)


@of("starlette", "fastapi", "quart")
def test_part_of_a_file_is_sent(client: httpx.Client) -> None:
    answer = client.get("/file", headers={"range": "bytes=1000-1999", "accept-encoding": "identity"})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == f"bytes 1000-1999/{len(BIG_FILE)}"
    assert answer.content == BIG_FILE[1000:2000]


def test_static_file_is_sent(client: httpx.Client) -> None:
    answer = client.get("/static/lines.txt")
    assert answer.content == STATIC_TEXT
    assert answer.headers["content-type"].startswith("text/plain")
    assert client.get("/static/missing.txt").status_code == 404
    assert client.get("/static/..%2fcommon.py").status_code in (400, 404)


@of("starlette", "fastapi", "quart")
def test_static_file_is_sent_in_part(client: httpx.Client) -> None:
    answer = client.get("/static/lines.txt", headers={"range": "bytes=100-199", "accept-encoding": "identity"})
    assert (answer.status_code, answer.content) == (206, STATIC_TEXT[100:200])
    beyond = client.get("/static/lines.txt", headers={"range": "bytes=999999-", "accept-encoding": "identity"})
    assert beyond.status_code == 416


@of("starlette", "fastapi", "django", "channels", "quart")
def test_static_file_that_the_client_has_is_not_sent_again(client: httpx.Client) -> None:
    whole = client.get("/static/lines.txt")
    field, name = ("if-none-match", "etag") if "etag" in whole.headers else ("if-modified-since", "last-modified")
    again = client.get("/static/lines.txt", headers={field: whole.headers[name]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(("path", "status"), [("/empty", 204), ("/unchanged", 304)], ids=["204", "304"])
def test_answer_without_a_body_ends_where_it_should(client: httpx.Client, path: str, status: int) -> None:
    answer = client.get(path)
    assert (answer.status_code, answer.content) == (status, b"")
    assert "transfer-encoding" not in answer.headers
    assert client.get("/hello/again").json() == {"name": "again"}  # on the same connection


@of("starlette", "django", "channels", "litestar", "quart")
def test_head_has_the_headers_and_no_body(client: httpx.Client) -> None:
    answer = client.head("/hello/ann")
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.get("/hello/ann").json() == {"name": "ann"}  # on the same connection


def test_method_that_a_path_has_not_is_refused(client: httpx.Client) -> None:
    answer = client.delete("/hello/ann")
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]


@of("litestar", "quart")
def test_options_are_told(client: httpx.Client) -> None:
    answer = client.options("/hello/ann")
    assert answer.is_success
    assert "GET" in answer.headers["allow"]


def test_redirect_leads_there(client: httpx.Client) -> None:
    answer = client.get("/old", follow_redirects=True)
    assert [step.is_redirect for step in answer.history] == [True]
    assert answer.json() == {"name": "new"}


@of("starlette", "fastapi", "django", "channels", "quart")
def test_missing_slash_is_added(client: httpx.Client) -> None:
    answer = client.get("/slash?a=1")
    assert answer.is_redirect
    assert httpx.URL(answer.headers["location"]).raw_path == b"/slash/?a=1"
    assert "slash" in client.get("/slash", follow_redirects=True).text


@of("starlette", "fastapi")
def test_missing_slash_is_added_behind_a_root_path(service: Service, client: httpx.Client) -> None:
    answer = client.get("/api/slash")
    assert answer.headers["location"] == f"http://127.0.0.1:{service.port}/api/slash/"
    assert "slash" in client.get("/api/slash", follow_redirects=True).text


def test_exception_is_a_500_that_tells_nothing_and_a_traceback_in_the_log(
    service: Service, client: httpx.Client
) -> None:
    answer = client.get("/boom")
    assert answer.status_code == 500
    assert "secret words" not in answer.text
    eventually(lambda: "secret words" in service.log(), "the traceback is in the log")
    assert client.get("/hello/again").json() == {"name": "again"}


# -- middleware ---------------------------------------------------------------------------------------------


def test_middleware_adds_its_header(client: httpx.Client) -> None:
    assert client.get("/hello/ann").headers["x-middleware"] == "on"


@of("starlette", "fastapi", "django", "channels", "litestar")
def test_answer_is_compressed_for_who_can_read_it(client: httpx.Client) -> None:
    small = client.get("/big", headers={"accept-encoding": "gzip"})
    large = client.get("/big", headers={"accept-encoding": "identity"})
    assert small.headers["content-encoding"] == "gzip"
    assert "content-encoding" not in large.headers
    assert small.text == large.text == "hotport " * 20_000


@of("starlette", "fastapi", "litestar")
def test_cross_origin_preflight_is_answered(client: httpx.Client) -> None:
    asks = {"origin": "https://example.org", "access-control-request-method": "PUT"}
    answer = client.options("/hello/ann", headers=asks)
    assert answer.is_success
    assert answer.headers["access-control-allow-origin"] == "https://example.org"
    assert "PUT" in answer.headers["access-control-allow-methods"]
    assert "access-control-allow-origin" in client.get("/hello/ann", headers={"origin": "https://example.org"}).headers


@of("starlette", "fastapi", "django", "channels")
def test_host_that_is_not_ours_is_refused(client: httpx.Client) -> None:
    assert client.get("/hello/ann", headers={"host": "evil.example"}).status_code == 400


def test_session_is_kept_by_the_client(client: httpx.Client) -> None:
    assert client.get("/session").text == ""
    assert client.get("/session/blue").status_code == 204
    assert client.get("/session").text == "blue"


# -- beside requests ----------------------------------------------------------------------------------------


@of(*WITH_LIFESPAN)
def test_what_start_up_made_is_there(client: httpx.Client) -> None:
    assert client.get("/state").text == "v0"


@of(*WITH_LIFESPAN)
def test_background_task_runs_after_the_answer(client: httpx.Client) -> None:
    assert client.get("/background").status_code == 202
    wait_seen(client, "background")


def test_application_notices_that_the_reader_of_its_events_has_left(client: httpx.Client) -> None:
    with client.stream("GET", "/sse", headers={"accept-encoding": "identity"}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        while next(lines) != "data: tick":
            pass
    wait_seen(client, "sse")


@of(*NOT_BEHIND_BASE_HTTP_MIDDLEWARE)
def test_application_notices_that_the_client_of_a_slow_request_has_left(service: Service, client: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", service.port), DEADLINE_S) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        wait_seen(client, "slow has begun")
    wait_seen(client, "slow")


@of(*(framework for framework in FRAMEWORKS if framework != "django"))  # which leaves them to Channels
def test_websocket_echoes(service: Service, client: httpx.Client) -> None:
    async def talk() -> list[str]:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://127.0.0.1:{service.port}/ws") as websocket,
        ):
            said = ["hello", "ü" * 100_000]
            for text in said:
                await websocket.send_str(text)
            return [await websocket.receive_str() for _ in said]

    assert asyncio.run(talk()) == ["hello", "ü" * 100_000]
    wait_seen(client, "websocket")


def test_log_has_no_error_that_is_not_the_application_s(service: Service, client: httpx.Client) -> None:
    before = len(service.log_lines())
    for path in ("/hello/ann", "/stream", "/empty", "/unchanged", "/old", "/big"):
        client.get(path)
    assert unusual(service, before) == []


def test_client_that_leaves_is_no_error_in_the_log(service: Service, client: httpx.Client) -> None:
    before = len(service.log_lines())
    with client.stream("GET", "/sse", headers={"accept-encoding": "identity"}) as answer:
        next(answer.iter_lines())
    client.get("/hello/ann")
    eventually(lambda: service.status()["workers"][0]["connections"] == 1, "only our connection is left")
    assert unusual(service, before) == []


def unusual(service: Service, before: int) -> list[tuple[str, str | None]]:
    """The warnings and errors that were logged since."""
    lines = service.log_lines()[before:]
    return [(line["event"], line.get("exception")) for line in lines if line["level"] not in ("info", "debug")]


# -- restarts -----------------------------------------------------------------------------------------------


def ask_version(port: int) -> Answer:
    status, body = http_get(port, "/version")
    if status != 200:
        raise ValueError(f"status {status}")
    version, generation, pid = body.decode().split()
    return Answer(version, generation, int(pid))


@pytest.mark.parametrize("framework", ["django", "quart"])  # others: below, and tests/service
def test_restart_with_changed_code_fails_nobody(tmp_path_factory: pytest.TempPathFactory, framework: str) -> None:
    directory = lay_out(tmp_path_factory.mktemp("restart"))
    code = (directory / f"{framework}_app.py").read_text()
    with Service(directory, f"{framework}_app:app") as service:
        with Hammer(service.wait_ready().port, ask=ask_version) as hammer:
            hammer.wait_answers(version="v0")
            write_code(directory / f"{framework}_app.py", code.replace('VERSION = "v0"', 'VERSION = "v1"'))
            report = service.restart()
            hammer.wait_answers(version="v1")
        assert hammer.failures == {}
        assert not any(fate.startswith(("cut_", "workers_")) for fate in report["connections"]), report
        assert (directory / "stopped-v0").exists() == (framework in WITH_LIFESPAN)
        status, body = http_get(service.port, "/hello/ann")
        assert (status, json.loads(body)) == (200, {"name": "ann"})


def redeploy(service: Service, framework: str, version: str) -> None:
    path = service.directory / f"{framework}_app.py"
    write_code(path, re.sub('VERSION = "v.*"', f'VERSION = "{version}"', path.read_text()))


#: Quart reads ahead, into a queue of its own: a WebSocket that moves would leave behind what is in it.
RESUMING = ("starlette", "fastapi", "channels", "litestar")


@pytest.mark.parametrize(
    ("framework", "handoff"), [*((framework, "websocket") for framework in RESUMING), ("starlette", "auto")]
)
def test_websocket_is_resumed_by_the_new_code(
    tmp_path_factory: pytest.TempPathFactory, framework: str, handoff: str
) -> None:
    """One that counts agrees, and goes on counting; one that knows nothing of it is moved by the option.

    No request of others fails meanwhile.
    """
    directory = lay_out(tmp_path_factory.mktemp("resume"))
    paths = ("/ws", "/ws/count") if handoff == "websocket" else ("/ws/count",)

    async def talk(service: Service) -> None:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(aiohttp.ClientSession(f"http://127.0.0.1:{service.port}"))
            websockets = {path: await stack.enter_async_context(session.ws_connect(path)) for path in paths}
            for number in range(1, 20 * RESTARTS + 1):
                for websocket in websockets.values():
                    await websocket.send_str(f"message {number}")
                if number % 20 == 0:  # while these are under way
                    redeploy(service, framework, f"v{number // 20}")
                    restarting = asyncio.create_task(asyncio.to_thread(service.restart))
                    for path, websocket in websockets.items():
                        for answered in range(number - 19, number + 1):
                            answer = await websocket.receive_str()
                            assert answer == (f"{answered} " if path == "/ws/count" else "") + f"message {answered}"
                    fates = (await restarting)["connections"]
                    assert fates.pop("moved_websocket") == len(paths)
                    assert not any(fate.startswith(("cut_", "workers_", "told_")) for fate in fates), fates

    with Service(directory, f"{framework}_app:app", "--handoff", handoff).wait_ready() as service:
        with Hammer(service.port, clients=1, ask=ask_version) as hammer:
            hammer.wait_answers(version="v0")
            asyncio.run(talk(service))
            hammer.wait_answers(version=f"v{RESTARTS}")
        assert hammer.failures == {}
        assert (directory / "stopped-v0").exists() == (framework in WITH_LIFESPAN)
        told = [event for event, _ in unusual(service, 0)]
    # Each generation's worker has resumed one that never agreed.
    assert len(told) == ("/ws" in paths) * RESTARTS
    assert all("has not called movable()" in event for event in told)


@pytest.mark.parametrize("framework", [*RESUMING, "quart"])
def test_websocket_without_handoff_is_closed_with_1012(
    tmp_path_factory: pytest.TempPathFactory, framework: str
) -> None:
    directory = lay_out(tmp_path_factory.mktemp("close"))

    async def talk(service: Service) -> int | None:
        async with (
            aiohttp.ClientSession(f"http://127.0.0.1:{service.port}") as session,
            session.ws_connect("/ws") as websocket,
        ):
            await websocket.send_str("hello")
            assert await websocket.receive_str() == "hello"
            restarting = asyncio.create_task(asyncio.to_thread(service.restart))
            assert (await websocket.receive()).type == aiohttp.WSMsgType.CLOSE
            assert (await restarting)["connections"] == {"told_to_close": 1}
            return websocket.close_code

    options = ("--handoff", "off", "--drain-timeout", "2s")
    with Service(directory, f"{framework}_app:app", *options).wait_ready() as service:
        assert asyncio.run(talk(service)) == 1012
        assert unusual(service, 0) == []
