"""Pages in a browser: nothing wider than the window, on a desktop and on a phone, light and dark."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from onnxcompress.report import write_as

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = {"desktop": 1280, "phone": 390}
RUNS = Path(__file__).with_name("runs")
KEPT = {"verb", "written", "criterion", "metric", "axis", "ranking"}  # these decide what is shown
# Elements that stick out of the window, but for what lies in a box that scrolls by itself.
OUTSIDE = """[...document.querySelectorAll('body *')]
  .filter((one) => !one.closest('.table, pre, svg') && one.getBoundingClientRect().right > innerWidth + 1)
  .map((one) => one.outerHTML.slice(0, 90))"""


class Browser:
    """A headless Chromium spoken to through a pair of pipes, messages ended by NUL (Chrome DevTools Protocol)."""

    def __init__(self, folder: Path) -> None:
        to_read, self.to_write = os.pipe()
        self.from_read, from_write = os.pipe()

        def hand_over() -> None:
            high = [os.dup(end) for end in (to_read, from_write)]  # above 4, whatever number they had
            for number, end in zip((3, 4), high, strict=True):
                os.dup2(end, number)

        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=hand_over, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read), os.close(from_write)
        self.number, self.left, self.events = 0, b"", []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        self.session = None
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self.call("Page.enable"), self.call("Network.enable"), self.call("Log.enable"), self.call("Runtime.enable")

    def _message(self) -> dict:
        while b"\0" not in self.left:
            block = os.read(self.from_read, 1 << 20)
            assert block, "the browser has gone"
            self.left += block
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if getattr(self, "session", None):
            request["sessionId"] = self.session
        os.write(self.to_write, json.dumps(request).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, path: Path, width: int, scheme: str) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def evaluate(self, expression: str):
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.to_write)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.from_read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Recorded runs, and one with names longer than any window."""
    folder = tmp_path_factory.mktemp("pages")
    for path in sorted(RUNS.glob("*.json")):
        content = json.loads(path.read_text())
        write_as(folder / f"{path.stem}.html", content, verb=path.stem)
        write_as(folder / f"{path.stem}-long.html", lengthened(content), verb=path.stem)
    one = json.loads((RUNS / "optimize.json").read_text())
    write_as(folder / "several.html", [one, lengthened(one)], verb="optimize")
    return sorted(folder.glob("*.html"))


def lengthened(value):
    if isinstance(value, dict):
        return {key: inner if key in KEPT else lengthened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [lengthened(inner) for inner in value]
    return value + "/encoder.layers" * 20 + "W" * 120 if isinstance(value, str) and value else value


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WIDTHS)
def test_nothing_is_wider_than_the_window_and_nothing_is_fetched(browser, pages, tmp_path, window, scheme):
    assert len(pages) == 2 * len(list(RUNS.glob("*.json"))) + 1
    backgrounds = set()
    for page in pages:
        browser.open(page, WIDTHS[window], scheme)
        browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.evaluate("innerWidth") == WIDTHS[window]
        assert browser.evaluate("document.documentElement.scrollWidth") <= WIDTHS[window], page.name
        assert browser.evaluate(OUTSIDE) == [], page.name
        fetched = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
        assert fetched == [page.as_uri()]
        complaints = [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
        assert not complaints, complaints[:1]
        backgrounds.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        if page.stem.endswith("-long"):
            continue
        browser.screenshot(tmp_path / f"{page.stem}.png")
        assert (tmp_path / f"{page.stem}.png").stat().st_size > 20_000
    (background,) = backgrounds
    channels = [int(part) for part in background[4:-1].split(",")]
    assert min(channels) > 200 if scheme == "light" else max(channels) < 60


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt install chromium")
def test_a_table_is_sorted_and_searched(browser, pages):
    browser.open(next(page for page in pages if page.name == "optimize.html"), 1280, "light")
    table = "[...document.querySelectorAll('table')].find((t) => t.textContent.includes('rewrites'))"
    column = f"[...{table}.tBodies[0].rows].map((row) => +row.cells[1].textContent)"
    browser.evaluate(f"{table}.tHead.rows[0].cells[1].firstChild.click()")
    found = browser.evaluate(column)
    assert len(found) > 3 and found == sorted(found, reverse=True)
    browser.evaluate(f"{table}.tHead.rows[0].cells[1].firstChild.click()")
    assert browser.evaluate(column) == sorted(found)
    shown = browser.evaluate(
        "(() => { const field = document.querySelector('.filter'); field.value = 'identity';"
        "field.dispatchEvent(new Event('input'));"
        "return [...field.nextElementSibling.querySelectorAll('tbody tr')].map((row) => !row.hidden); })()"
    )
    assert 0 < sum(shown) < len(shown)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt install chromium")
def test_without_our_script_the_page_says_the_same(browser, pages):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(next(page for page in pages if page.name == "quantize.html"), 390, "light")
        text = browser.evaluate("document.body.innerText")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert "Bits per weight" in text and "Environment" in text and "Save them as JSON" not in text
