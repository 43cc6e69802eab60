"""A headless Chromium, asked over its DevTools protocol."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.support import DEADLINE_S, eventually, need


class Page:
    """One page, and everything that it has complained of.

    Attributes:
        complaints: Console messages, exceptions, and log entries such as refused requests.
        requested: Every URL that was asked for.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self._socket = socket
        self._number = 0
        self._events: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> Any:
        """Ask, and wait for the answer; events meanwhile are noted."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while (message := self._hear()).get("id") != self._number:
            pass
        assert "error" not in message, message
        return message["result"]

    def show(self, *, scheme: str = "light", width: int = 1180, height: int = 900) -> None:
        """Show the page in a window of that size."""
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=media)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def open(self, path: Path | str, *, scheme: str = "light", width: int = 1180, height: int = 900) -> None:
        """Open a file or a URL in a window of that size, and wait until its scripts have run."""
        self.show(scheme=scheme, width=width, height=height)
        self.send("Page.navigate", url=path if isinstance(path, str) else path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._hear()
        self._events.clear()

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move(self, x: float, y: float) -> None:
        """The mouse, from the window's top left corner."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """As PNG, of the whole page or of the window."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(data["data"]))

    def _hear(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._socket.recv(DEADLINE_S))
        match message.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.complaints.append(json.dumps(message["params"]))
            case "Network.requestWillBeSent":
                self.requested.append(message["params"]["request"]["url"])
            case str(event):
                self._events.append(event)
        return message


@contextmanager
def browsing(directory: Path) -> Iterator[Page]:
    """A Chromium with a profile of its own in `directory`, until the block ends."""
    profile = directory / "profile"
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    arguments += ["--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"]
    with (directory / "chromium.log").open("wb") as log:
        process = subprocess.Popen(
            [need("chromium"), *arguments, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log
        )
    try:
        told = profile / "DevToolsActivePort"
        eventually(lambda: told.exists() and told.read_text().count("\n") == 1, "Chromium listens")
        port, path = told.read_text().splitlines()
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as browser:
            browser.send(json.dumps({"id": 1, "method": "Target.getTargets"}))
            targets = json.loads(browser.recv(DEADLINE_S))["result"]["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        with connect(f"ws://127.0.0.1:{port}/devtools/page/{target}", max_size=None) as socket:
            yield Page(socket)
    finally:
        process.terminate()
        process.wait(DEADLINE_S)
