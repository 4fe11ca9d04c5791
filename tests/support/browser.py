"""A headless Chromium, driven over its debugging pipe: pages as people see them.

JSON messages that end with a zero byte go through two pipes, which the browser has as descriptors 3
and 4. The page's own policy does not bind what is evaluated from here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tolerances import HANG_SECONDS

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync")
FLAGS += ("--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe")


class Page:
    """One tab. `messages`: what its console said, errors of the network and of policies included;
    `requests`: the addresses that it asked for."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.buffer, self.number, self.session = b"", 0, None
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int, dark: bool = False) -> None:
        """Loads it as a screen of that size shows it; forgets what the last page said."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.messages, self.requests, self.loaded = [], [], False
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._note(self._receive())
        self.value("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")

    def value(self, expression: str) -> object:
        """What a JavaScript expression comes to."""
        given = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        answer = self.ask("Runtime.evaluate", **given)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def ask(self, method: str, **parameters: object) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _receive(self) -> dict:
        end = time.monotonic() + HANG_SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.from_browser], [], [], max(0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {HANG_SECONDS} seconds"
            part = os.read(self.from_browser, 1 << 16)
            assert part, "the browser ended"
            self.buffer += part
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        method, given = event.get("method", ""), event.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(given["request"]["url"])
        elif method in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.messages.append(json.dumps(given))


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A tab of a browser with that new, empty profile."""
    ends = [os.pipe(), os.pipe()]
    (commands, to_browser), (from_browser, answers) = ends
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 10) for one in (commands, answers)]  # not 3 or 4

    def give() -> None:
        for number, one in zip((3, 4), high, strict=True):
            os.dup2(one, number)

    browser = subprocess.Popen(
        [FOUND, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=give,
        pass_fds=(3, 4),
    )
    for one in (commands, answers, *high):
        os.close(one)
    try:
        yield Page(to_browser, from_browser)
    finally:
        for one in (to_browser, from_browser):
            os.close(one)  # which ends it, too
        try:
            browser.wait(10)
        except subprocess.TimeoutExpired:
            browser.kill()
            browser.wait()
