"""A browser without a window, Chromium, asked by the DevTools protocol what a page is to a person.

The protocol, over two pipes: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import subprocess
from pathlib import Path
from typing import Any, Self

_PATIENCE_SECONDS = 300.0  # for an answer; then it is never to come


class Browser:
    """A browser with one page open.

    Attributes:
        requests: every address that the page has asked for, in order.
        complaints: what it said on its console, and exceptions that nobody caught.
    """

    def __init__(self, folder: Path) -> None:
        """Starts it, with its profile in that folder."""
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers, self._received, self._session = itertools.count(1), b"", ""
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # It takes its commands from descriptor 3, and answers on 4.
        ours = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, 16) for number in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [
                *("chromium-headless-shell", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
                *("--hide-scrollbars", "--window-size=1400,900", f"--user-data-dir={folder}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=lambda: [os.dup2(number, place) for number, place in zip(ours, (3, 4), strict=True)],
        )
        for number in (theirs_in, theirs_out, *ours):
            os.close(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def open(self, path: Path) -> None:
        """Opens a file as the page, and waits until it is loaded."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Network", "Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self._ask("Page.navigate", url=path.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of an expression in JavaScript; of a promise, what it comes to."""
        found = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Something that a mouse does at this place of the page, in its pixels: ``mouseMoved``, ``mouseWheel``, ..."""
        self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": arguments}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            pass
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            look = select.poll()  # unlike select, of any number of descriptors that are open
            look.register(self._in, select.POLLIN)
            assert look.poll(_PATIENCE_SECONDS * 1000), "the browser does not answer"
            more = os.read(self._in, 1 << 20)
            assert more, "the browser has ended"
            self._received += more
        text, _, self._received = self._received.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        found = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif message.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(found))
        return message
