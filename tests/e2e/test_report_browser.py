"""The HTML report in a real browser: nothing complained of, nothing loaded, nothing cut off.

Chromium is driven through --remote-debugging-pipe, which needs no port, no driver and no package.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tempering.reports import Record, save_html

SAMPLE = Path(__file__).parents[1] / "unit" / "test_reports_sample.json"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on PATH; install one to run this (apt install chromium)"
)

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
# Chromium reads commands from descriptor 3 and answers on 4; this puts the pipes there.
SHIM = """
import fcntl, os, sys
commands, answers = (fcntl.fcntl(int(n), fcntl.F_DUPFD, 10) for n in sys.argv[1:3])
os.dup2(commands, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60.0


class Browser:
    """One page of a headless Chromium; all that it logs or asks the network for is kept."""

    def __init__(self, folder: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        commands, self._write = os.pipe()
        self._read, answers = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", SHIM, str(commands), str(answers), str(CHROMIUM),
             f"--user-data-dir={folder}", *FLAGS],
            pass_fds=(commands, answers), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(commands)
        os.close(answers)
        os.set_blocking(self._read, False)

    def attach(self) -> None:
        """Take hold of the one page that is open."""
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        session = self.call("Target.attachToTarget", targetId=page, flatten=True)
        self._session = session["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert time.monotonic() < end, "the browser does not answer"
            assert self._process.poll() is None, "the browser ended"
            try:
                self._buffer += os.read(self._read, 1 << 20)
            except BlockingIOError:
                time.sleep(0.01)
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        """Load a file in a window `width` CSS pixels wide and wait until it is there."""
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def ask(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def complaints(self) -> list[str]:
        """Console messages, log entries and uncaught exceptions since `open`."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e["params"]) for e in self.events if e["method"] in methods]

    def requests(self) -> list[str]:
        """Addresses asked for since `open`."""
        sent = (e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [parameters["request"]["url"] for parameters in sent]

    def close(self) -> None:
        """End the browser."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        browser.attach()
        yield browser
    finally:
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return save_html(Record.load(SAMPLE), tmp_path_factory.mktemp("report") / "run.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_opens_without_a_complaint(browser, report, width, dark):
    browser.open(report, width=width, dark=dark)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [report.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelectorAll('figure svg').length") == 15
    assert browser.ask("document.scripts.length + document.images.length") == 0


def test_figures_are_readable_on_a_phone(browser, report):
    browser.open(report, width=390, dark=False)
    smallest = browser.ask(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(text => {"
        "const to = text.getScreenCTM();"
        "return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(to.a, to.b); }))"
    )
    assert smallest >= 10  # CSS pixels


def colours(browser, selector: str) -> tuple[list[float], list[float]]:
    """Text colour of the first match, and the colour of the card that it stands on."""
    found = browser.ask(
        f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
        "const style = getComputedStyle(node); const ground = node.closest('figure, .card, body');"
        "return [node instanceof SVGElement ? style.fill : style.color,"
        " getComputedStyle(ground).backgroundColor]; })()"
    )
    first, second = ([float(x) for x in c[c.index("(") + 1 : -1].split(",")[:3]] for c in found)
    return first, second


def contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("selector", ["h1", ".quiet", ".card .text", "th", "figure svg text"])
def test_text_stands_out_in_light_and_dark(browser, report, selector, dark):
    browser.open(report, width=1280, dark=dark)
    text, ground = colours(browser, selector)
    assert contrast(text, ground) >= 4.5
    assert (sum(ground) < 200) is dark


def test_hostile_text_stays_text(browser, tmp_path):
    hostile = "</script></style><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
    results = {
        "generations": {
            "prompt": hostile,
            "samples": [{"label": hostile, "seed": 0, "text": hostile, "tokens": 1}],
        },
        "pattern": [{"label": hostile, "text": hostile, "temperature": [1.0, 2.0]}],
    }
    record = Record.new("generate", settings={hostile: hostile}, results=results)
    browser.open(save_html(record, tmp_path / "run.html"), width=390, dark=False)
    assert browser.ask("window.hit === undefined") is True
    assert hostile in browser.ask("document.body.innerText")
    assert browser.complaints() == []


def test_even_an_unescaped_script_could_not_run(browser, report, tmp_path):
    """The policy in the page holds by itself: a script put into it is refused, loudly."""
    spoilt = tmp_path / "spoilt.html"
    page = report.read_text().replace("<main>", "<main><script>window.hit=1</script>")
    spoilt.write_text(page)
    browser.open(spoilt, width=390, dark=False)
    assert browser.ask("window.hit === undefined") is True
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_the_record_can_be_taken_from_the_page(browser, report):
    browser.open(report, width=390, dark=False)
    text = browser.ask("atob(document.querySelector('a[download]').href.split('base64,')[1])")
    assert Record.from_json(text.encode("latin-1").decode()) == Record.load(SAMPLE)
