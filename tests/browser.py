"""A headless Chromium that tests talk to through a pipe (the DevTools protocol): real keys, real layout, and what it complains of."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


class Page:
    """One page of the browser; ``complaints`` are errors in scripts and on the console, ``fetched`` all addresses it asked for."""

    def __init__(self, down: int, up: int) -> None:
        self.down, self.up = os.fdopen(down, "wb"), os.fdopen(up, "rb")
        self.rest, self.number, self.session = b"", 0, ""
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        self.loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask, and wait for the answer."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": params, **({"sessionId": self.session} if self.session else {})}
        self.down.write(json.dumps(asked).encode() + b"\0")
        self.down.flush()
        while True:
            told = self._next()
            if told.get("id") == self.number:
                assert "error" not in told, told
                return told["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            more = self.up.read1(1 << 20)
            assert more, "the browser has gone"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        told = json.loads(message)
        self._note(told.get("method"), told.get("params", {}))
        return told

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.fetched.append(params["request"]["url"][:80])
        elif method == "Runtime.exceptionThrown" or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning")):
            self.complaints.append(json.dumps(params))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self.loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self._next()

    def run(self, script: str) -> Any:
        """The value of an expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as a reader presses it."""
        text = {"Enter": "\r", " ": " "}.get(key)
        known = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="keyDown", **known, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def look(self, scheme: str = "light", media: str = "", width: int = 1280) -> None:
        """Light or dark, on a screen or on paper, and how wide."""
        self.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)

    def picture(self) -> bytes:
        """The whole page as a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A browser with a profile of its own, and its one page."""
    down, up = os.pipe(), os.pipe()
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the protocol's pipe is 3 (to the browser) and 4 (from it), whatever ours are called
        command = f'exec "$0" "$@" 3<&{down[0]} 4>&{up[1]}'
        words = ["bash", "-c", command, CHROMIUM, *flags, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(words, pass_fds=(down[0], up[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(down[0])
        os.close(up[1])
        try:
            yield Page(down[1], up[0])
        finally:
            process.terminate()
            process.wait(30)
