"""A headless Chromium that tests drive over its debugging pipe: open a page, evaluate, take a picture."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--remote-debugging-pipe", "--window-size=1400,900"),
)


def program():
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """Chromium with one page; requests go to descriptor 3, replies come from 4, each ends in a zero byte."""

    def __init__(self, timeout_s=120.0):
        self.timeout_s = timeout_s
        self.profile = tempfile.mkdtemp(prefix="onnxcompress-browser-")
        theirs_in, self.requests = os.pipe()
        self.replies, theirs_out = os.pipe()
        # sh puts the pipes where Chromium looks for them, whatever their numbers are here.
        command = f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$0" "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", command, program(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in), os.close(theirs_out)
        self.number, self.buffer, self.session, self.console = 0, b"", None, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.ask("Page.enable"), self.ask("Runtime.enable")

    def ask(self, method, **params):
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {} if self.session is None else {"sessionId": self.session}
        os.write(self.requests, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + self.timeout_s
        while True:
            reply = self._receive(end)
            if reply.get("id") == self.number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]
            if reply.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                self.console.append(json.dumps(reply["params"])[:500])

    def _receive(self, end):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.replies], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no answer within {self.timeout_s} s"
            data = os.read(self.replies, 1 << 16)
            assert data, "Chromium ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url):
        self.ask("Page.navigate", url=url)

    def evaluate(self, expression):
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression, timeout_s=None):
        """Evaluate until it is true; returns its value. A page that is not there yet is not true."""
        expression = f"(() => {{ try {{ return {expression} }} catch (error) {{ return '' }} }})()"
        end = time.monotonic() + (timeout_s or self.timeout_s)
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression} is {value!r}; console: {self.console[-3:]}"
            time.sleep(0.1)
        return value

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot")["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(20)
        os.close(self.requests), os.close(self.replies)
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def served(folder):
    """A local server of a folder's files; gives its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/"
        finally:
            server.shutdown()
