"""Chromium without a window, spoken to over two pipes: what a page looks like, and what is in it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

PATH = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
"""None where it is not installed."""

FLAGS = (
    "--headless",
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    # No name is looked up, so a page cannot fetch anything: what it lacks is seen to be missing.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


class Chromium:
    """One browser with one page.

    ``--remote-debugging-pipe``: commands go to its file descriptor 3, answers come from 4, as JSON
    that ends with a zero byte. See https://chromedevtools.github.io/devtools-protocol/.

    Args:
        profile: an empty folder for what it writes.
        timeout_seconds: that each command may take.
    """

    def __init__(self, profile: Path, timeout_seconds: float = 60.0) -> None:
        assert PATH is not None
        self._timeout_seconds = timeout_seconds
        self._number = 0
        self._unread = b""
        self._events: list[Mapping[str, Any]] = []
        theirs_in, self._write_end = os.pipe()
        self._read_end, theirs_out = os.pipe()
        # The shell moves the two ends to the descriptors that the browser expects.
        moves = f'exec {PATH} "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", moves, "chromium", *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that its own processes can be ended with it
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._session: str | None = None
        try:
            target = self._send("Target.createTarget", url="about:blank")["targetId"]
            attached = self._send("Target.attachToTarget", targetId=target, flatten=True)
            self._session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Network"):
                self._send(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Chromium:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends it with all of its processes."""
        os.close(self._write_end)
        os.close(self._read_end)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)  # It ends by itself when its pipe is closed.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def show(self, path: Path, width: int, scheme: str, media: str = "screen") -> None:
        """Loads a page.

        Args:
            path: of the file.
            width: of the window, in CSS pixels; below 600 it is a telephone's.
            scheme: the colours that the reader prefers, "light" or "dark".
            media: "screen" or "print".
        """
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=844,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._send("Emulation.setEmulatedMedia", media=media, features=features)
        self._events.clear()
        self._send("Page.navigate", url=path.resolve().as_uri())
        self._wait_for("Page.loadEventFired")

    def requests(self) -> list[str]:
        """The addresses that the page has asked for, itself included."""
        return [
            each["params"]["request"]["url"]
            for each in self._events
            if each["method"] == "Network.requestWillBeSent"
        ]

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in JavaScript, or what its promise is kept with.

        Raises:
            RuntimeError: it has thrown something.
        """
        answer = self._send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"], indent=1))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Writes a PNG file of the whole page."""
        answer = self._send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write_end, data) :]
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            answer = self._read(deadline)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, method: str) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        while not any(event["method"] == method for event in self._events):
            self._read(deadline)

    def _read(self, deadline: float) -> Mapping[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read_end], [], [], deadline - time.monotonic())
            data = os.read(self._read_end, 1 << 20) if ready else b""
            if not data:
                why = "has ended" if ready else f"said nothing for {self._timeout_seconds} s"
                raise RuntimeError(f"{PATH} {why}")
            self._unread += data
        text, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message
