"""A page in a headless Chromium, spoken to through a pipe: no driver has to be installed."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from contextlib import contextmanager

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
#: Seconds that the browser has for one answer: machines of tests are busy.
PATIENCE = 60


def executable():
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab: what it asked for, what it complained about, what a script in it returns."""

    def __init__(self, send_to, read_from):
        self._send_to, self._read_from = send_to, read_from
        self._rest, self._count, self._session = b"", 0, None
        self.requests, self.complaints, self.loads = [], [], 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self, patience=PATIENCE):
        end = time.monotonic() + patience
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read_from], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError("the browser does not answer")
            self._rest += os.read(self._read_from, 1 << 20)
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        happened, what = message.get("method"), message.get("params", {})
        if happened == "Network.requestWillBeSent":
            self.requests.append(what["request"]["url"])
        elif happened == "Runtime.exceptionThrown":
            self.complaints.append(what["exceptionDetails"])
        elif happened == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.complaints.append(what["entry"])
        elif happened == "Page.loadEventFired":
            self.loads += 1
        return message

    def open(self, path, *, width=1200, height=900, dark=False, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.wait_for_load(lambda: self.call("Page.navigate", url=path.absolute().as_uri()))

    def wait_for_load(self, act=lambda: None):
        before = self.loads
        act()
        while self.loads == before:
            self._receive()
        self.call("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)
        self.call("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)

    def run(self, script):
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def mouse(self, kind, x, y, **more):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def screenshot(self, path, *, whole=True):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **self._clip(whole))
        path.write_bytes(base64.b64decode(shot["data"]))

    def _clip(self, whole):
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}


@contextmanager
def chromium():
    """Start the browser, and yield a page; it is ended by its own id."""
    to_browser, ours = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser[0], ours[1])]

    def connect():  # the browser reads from its file 3 and writes to its file 4
        os.dup2(theirs[0], 3)
        os.dup2(theirs[1], 4)

    with tempfile.TemporaryDirectory() as folder:
        command = [
            executable(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
            f"--user-data-dir={folder}", "--hide-scrollbars", "--no-first-run", "about:blank",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, close_fds=False, preexec_fn=connect, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield Page(to_browser[1], ours[0])
        finally:
            process.terminate()
            process.wait(20)
            for end in (*to_browser, *ours, *theirs):
                os.close(end)
