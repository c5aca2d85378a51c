"""A headless Chromium, driven over the pipe of its DevTools protocol."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-quic", "--disable-background-networking", "--disable-component-update"),
    *(
        "--disable-sync",
        "--disable-extensions",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
    ),
)
# Whoever starts Chromium so has to open its two ends as the descriptors 3 and 4.
_OPEN_PIPE = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 60  # seconds


def find_browser():
    """The path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class PageError(Exception):
    """A script in the page threw an exception."""


class Browser:
    """A browser with a profile of its own.

    Args:
        folder: For that profile.
    """

    def __init__(self, folder):
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        launch = [sys.executable, "-c", _OPEN_PIPE, str(theirs_in), str(theirs_out)]
        self._process = subprocess.Popen(
            [*launch, find_browser(), *_FLAGS, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out, self._received = ours_in, ours_out, b""
        self._calls = 0
        self.events = []

    def close(self):
        try:
            self.call("Browser.close")
            self._process.wait(10)
        except (OSError, EOFError, TimeoutError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method, session=None, **params):
        """Call a method of the protocol and wait for its result; what else comes goes to ``events``."""
        self._calls += 1
        message = dict(id=self._calls, method=method, params=params)
        if session:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._out, content) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._calls:
                break
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _receive(self):
        deadline = time.monotonic() + _PATIENCE
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._in], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError("Chromium does not answer")
            part = os.read(self._in, 1 << 20)
            if not part:
                raise EOFError("Chromium has ended")
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    @contextmanager
    def page(self, address, width=1200, height=900, before=""):
        """A tab.

        Args:
            address: What to open in it.
            width: Of the window.
            height: Likewise.
            before: A script to run before those of the page.
        """
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "DOM"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.call("Page.navigate", url=address)
        page.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
        try:
            yield page
        finally:
            self.call("Target.closeTarget", targetId=target)


class Page:
    """A tab; see :meth:`Browser.page`."""

    def __init__(self, browser, session):
        self.browser, self._session = browser, session

    def call(self, method, **params):
        return self.browser.call(method, self._session, **params)

    def events(self, method):
        """The parameters of each event of that name so far."""
        found = [e for e in self.browser.events if e.get("sessionId") == self._session]
        return [event["params"] for event in found if event.get("method") == method]

    def evaluate(self, expression):
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise PageError(details.get("exception", details).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, condition, seconds=_PATIENCE):
        """Until a JavaScript expression holds."""
        deadline = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{condition} did not come true: {self.evaluate('document.body.innerText')}"
                )
            time.sleep(0.02)

    def give_file(self, element_id, path):
        """Choose a file in a file input."""
        found = self.call("Runtime.evaluate", expression=f"document.getElementById('{element_id}')")
        self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

    def drop(self, paths, x=300, y=300):
        """Drop files somewhere."""
        data = dict(items=[], files=[str(path) for path in paths], dragOperationsMask=1)
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def press(self, key):
        """Press a key, such as Tab or ArrowRight."""
        codes = dict(Tab=9, Enter=13, ArrowLeft=37, ArrowRight=39)
        for kind in ("keyDown", "keyUp"):
            text = dict(text="\r") if key == "Enter" and kind == "keyDown" else {}
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                **text,
            )

    def resize(self, width, height, scale=1, dark=False):
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, kind="png", **options):
        """Return a screenshot as the bytes of a file."""
        return base64.b64decode(self.call("Page.captureScreenshot", format=kind, **options)["data"])
