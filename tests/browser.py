"""Headless Chromium, driven over its DevTools pipe: no driver, no websocket, no package.

Messages are JSON, each ended by a zero byte, on file descriptors 3 (to the browser) and 4 (from it).
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0
# A shell cannot redirect descriptors above 9, and code between fork and exec is unsafe in a process with threads.
LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 64) for fd in sys.argv[1:3]]
for target, fd in zip((3, 4), pipes):
    os.dup2(fd, target)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One tab. ``errors`` collects what its console says about broken scripts and violated policies."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._last, self._rest = into, out, 0, b""
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session: str | None = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command and its result."""
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._last:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            if not select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            data = os.read(self._out, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        method, params = found.get("method"), found.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"].get("exception", params["exceptionDetails"])))
        elif method == "Log.entryAdded" and params["entry"]["source"] in ("security", "javascript"):
            self.errors.append(str(params["entry"]["text"]))
        return found

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def until(self, script: str, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not self.run(script):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:g} s: {script}; console: {self.errors}")
            time.sleep(0.05)

    def text(self, element: str) -> str:
        """The text of the element with this id."""
        return str(self.run(f"document.getElementById({json.dumps(element)}).textContent"))

    def type(self, element: str, value: str) -> None:
        """Set a field as a user would: its listeners hear of it."""
        self.run(
            f"(() => {{ const field = document.getElementById({json.dumps(element)});"
            f" field.value = {json.dumps(value)}; field.dispatchEvent(new Event('input', {{bubbles: true}}));"
            " return true; })()"
        )

    def click(self, element: str) -> None:
        self.run(f"(document.getElementById({json.dumps(element)}).click(), true)")

    def screenshot(self, file: Path, width: int = 1280, height: int = 1000, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


def executable() -> str:
    """Chromium's path; skips the test with a reason where there is none."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    return found


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A fresh browser with an empty profile below ``profile``."""
    program = executable()
    read_in, write_in = os.pipe()
    read_out, write_out = os.pipe()
    flags = (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--no-proxy-server", "--disable-extensions", "--disable-background-networking", "--disable-component-update",
        "--mute-audio", "--remote-debugging-pipe", f"--user-data-dir={profile}",
    )  # fmt: skip
    command = [sys.executable, "-S", "-c", LAUNCH, str(read_in), str(write_out), program, *flags, "about:blank"]
    process = subprocess.Popen(
        command, pass_fds=(read_in, write_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    os.close(read_in)
    os.close(write_out)
    try:
        browser = Browser(write_in, read_out)
        yield browser
        browser._session = None
        browser.call("Browser.close")
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        os.close(write_in)
        os.close(read_out)
