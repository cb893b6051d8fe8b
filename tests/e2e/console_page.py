"""The console's page in a browser, with what tests ask of it."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from typing import Any

from tests.e2e.browser import PATIENCE, Browser
from tests.e2e.console_server import TOKEN, Served

PAGE = "(await import('/static/page.js'))"
WRITING = "(await import('/static/writing.js'))"
STATUS = "document.getElementById('status').textContent"


class Page:
    """The page in the browser, with what tests ask of it."""

    def __init__(self, browser: Browser, server) -> None:
        self.browser, self.server = browser, server

    def open(self, fragment: str = "", *, width: int = 1200, dark: bool = False) -> None:
        # Another address first: a change of the fragment alone would load nothing.
        self.browser.visit("about:blank", width=width, dark=dark)
        self.browser.visit(self.server.url + fragment, width=width, dark=dark)
        self.browser.wait("document.body.dataset.ready === 'yes'")

    def on(self, expression: str):
        """The value of an expression over the module page.js, called `page`."""
        return self.browser.ask(f"(async () => {{ const page = {PAGE}; return {expression}; }})()")

    def rows(self) -> list[list[float]]:
        return self.on("page.active().profile.rows")

    def set(self, name: str, value) -> None:
        """Set a field as a person does: its value, then its events."""
        kind = "checked" if isinstance(value, bool) else "value"
        self.browser.ask(
            f"(() => {{ const e = document.getElementById({json.dumps(name)});"
            f"e.{kind} = {json.dumps(value)};"
            "e.dispatchEvent(new Event('input', {bubbles: true}));"
            "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )

    def quiet(self) -> None:
        """No text and no meter unless a test asks for them."""
        self.set("auto", False)
        self.set("meter", False)

    def cell(self, layer: int, head: int) -> tuple[float, float]:
        """The middle of a cell in the window."""
        return tuple(
            self.browser.ask(
                "(async () => { const { grid: g } = await import('/static/painting.js');"
                "g.canvas.scrollIntoView({block: 'center'});"
                "const b = g.canvas.getBoundingClientRect();"
                f"return [b.x + 34 + ({head} + .5) * g.cellWidth,"
                f" b.y + 16 + ({layer} + .5) * g.cellHeight]; }})()"
            )
        )

    def text(self, name: str) -> str:
        return self.browser.ask(f"document.getElementById({json.dumps(name)}).textContent")

    def says(self, name: str, text: str) -> None:
        """Wait until an element says a text."""
        self.browser.wait(
            f"document.getElementById({json.dumps(name)}).textContent.includes({json.dumps(text)})"
        )

    def write(self) -> None:
        self.browser.ask("document.getElementById('status').textContent = ''")
        self.browser.click("#write")
        self.browser.wait(f"['written', 'not written'].includes({STATUS})")


def painted(*cells: tuple[int, int], value: float = 1.2) -> list[list[float]]:
    rows = [[1.0] * 4 for _ in range(8)]
    for layer, head in cells:
        rows[layer][head] = value
    return rows


@contextlib.contextmanager
def other_tab(server: Served, tokens: int) -> Iterator[Any]:
    """The open answer of another tab's text, which has written its first token."""
    order = {"run": "other", "prompt": "Hot layers", "policy": "constant(2)", "tokens": tokens}
    request = urllib.request.Request(
        f"{server.base}/api/write",
        json.dumps({**order, "profiles": []}).encode(),
        {"authorization": f"token {TOKEN}"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        while json.loads(answer.readline())["type"] != "token":
            pass
        yield answer
