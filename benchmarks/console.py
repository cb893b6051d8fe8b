"""Whether the console keeps out of the way: what its page adds to the model's own time.

python benchmarks/console.py [--model smollm2] [--repeats 9] [--tokens 32]

The console runs in this process and is read over HTTP on loopback, and by its own page in Chromium
where there is one. Rivals take turns. Written to results/console.json, each with its target:

    first token   from the touch of the brush to the first new token (the page starts again),
                  against the first token of a plain stream: at most 400 ms more
    edit          from an edit that goes on to its first token, in tokens of that text
    a token       streamed without and with live statistics of all heads, against a plain stream:
                  at most 5% and 25% more
    opening       the page, from its address until it is ready: at most 1 s
    painting      80 layers x 128 heads in the page: a stroke at 60 frames a second, and what a
                  repaint of all cells takes of a frame (16.7 ms)
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from _bench import interleave, ratios, show, write

from tempering import Profile
from tempering.console.remote import shape_of
from tempering.console.subject import Subject
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.engines.loading.hub import load_model
from tempering.tokens.policy import ConstantPolicy
from tests.e2e.browser import CHROMIUM, Browser
from tests.e2e.console_page import PAGE, STATUS, Page
from tests.e2e.console_server import TOKEN, Served, served

PROMPT = "Suggest a name for a small bookshop by the sea, and say why."
PATTERN = "throb(12,3,1,12)|amplitude(1.3)"
LAYERS, HEADS = 80, 128
FRAME = 1000 / 60  # ms


def asked(server: Served, path: str, body: Any) -> Any:
    """The open answer of a request."""
    request = urllib.request.Request(
        f"{server.base}/api/{path}",
        json.dumps(body).encode(),
        {"authorization": f"token {TOKEN}"},
    )
    return urllib.request.urlopen(request)


class Rivals:
    """The same text by a plain loop, over HTTP, and in the page."""

    def __init__(self, server: Served, subject: Subject, tokens: int, page: Page | None) -> None:
        self.server, self.subject, self.tokens, self.page = server, subject, tokens, page
        self.profile = Profile.from_schedule(PATTERN, subject.model)
        self.rows = [row.tolist() for row in self.profile.rows]

    def plain(self, tokens: int) -> None:
        ids = prompt_ids(self.subject.tokenizer, PROMPT)
        rows = [Profile.neutral(self.subject.plan), self.profile]
        for _ in stream(
            self.subject.model, self.subject.tokenizer, ids, rows,
            tokens=tokens, policy=ConstantPolicy(0.7),
        ):  # fmt: skip
            pass

    def order(self, watch: bool) -> dict[str, Any]:
        return {
            "run": "bench", "prompt": PROMPT, "tokens": self.tokens, "policy": "constant(0.7)",
            "profiles": [{"rows": self.rows}], "watch": watch,
        }  # fmt: skip

    def over_http(self, watch: bool) -> None:
        with asked(self.server, "write", self.order(watch)) as answer:
            for _ in answer:
                pass

    def in_the_page(self, watch: bool) -> None:
        """The page writes; `prepare` painted its column."""
        assert self.page is not None
        self.page.browser.ask(
            f"(async () => {{ const page = {PAGE};"
            f"document.getElementById('watch').checked = {str(watch).lower()};"
            "const { write } = await import('/static/writing.js'); await write();"
            f"if ({STATUS} !== 'written') throw new Error({STATUS}); }})()"
        )

    def first(self) -> None:
        """From the touch to the first token, as the page starts again."""
        with asked(self.server, "write", self.order(True)) as answer:
            for line in answer:
                if json.loads(line)["type"] == "token":
                    break
        # The page has gone: the next turn waits until the model is free, which is not timed.

    def first_in_the_page(self) -> float:
        """Seconds from the stroke of a brush to the first token that is shown, and its end."""
        assert self.page is not None
        found = self.page.browser.ask(TOUCH)
        self.page.browser.click("#stop")
        self.page.browser.wait(f"['stopped', 'written'].includes({STATUS})")
        return found / 1000

    def edit(self) -> tuple[float, float]:
        """Seconds from an edit to the first token under it, and of a token before it."""
        with asked(self.server, "write", self.order(True)) as answer:
            times: list[float] = []
            sent = 0.0
            for line in answer:
                event = json.loads(line)
                if event["type"] == "token" and event["row"] == 0:
                    times.append(time.perf_counter())
                    if len(times) == max(2, self.tokens // 4):
                        sent = time.perf_counter()
                        body = {"run": "bench", "profiles": [{"rows": self.rows}]}
                        threading.Thread(
                            target=lambda b=body: asked(self.server, "write/change", b).close()
                        ).start()
                if event["type"] == "changed":
                    return time.perf_counter() - sent, statistics.median(
                        b - a for a, b in itertools.pairwise(times)
                    )
        raise SystemExit("the edit did not arrive")


# From the pointer's touch of the canvas to the first token in the page, ms.
TOUCH = """
(async () => {
  const { grid } = await import('/static/painting.js');
  const box = grid.canvas.getBoundingClientRect();
  const at = { clientX: box.x + 40, clientY: box.y + 24, button: 0, pointerId: 1 };
  document.getElementById('auto').checked = true;
  document.getElementById('texts').replaceChildren();
  const shown = new Promise(done => new MutationObserver(() =>
    document.querySelector('.token') && done()).observe(
    document.getElementById('texts'), {subtree: true, childList: true}));
  const start = performance.now();
  grid.canvas.dispatchEvent(new PointerEvent('pointerdown', at));
  grid.canvas.dispatchEvent(new PointerEvent('pointerup', at));
  await shown;
  const taken = performance.now() - start;
  document.getElementById('auto').checked = false;
  return taken;
})()
"""


@contextlib.contextmanager
def opened(server: Served, folder: Path) -> Iterator[Page | None]:
    """The page in Chromium with the column painted; None without a browser."""
    if CHROMIUM is None:
        print("no Chromium on PATH: what the page itself takes is not measured")
        yield None
        return
    browser = Browser(folder)
    try:
        browser.attach()
        yield Page(browser, server)
    finally:
        browser.close()


def prepare(page: Page, tokens: int) -> None:
    page.open(width=1600)
    page.quiet()
    page.set("prompt", PROMPT)
    page.set("tokens", str(tokens))
    page.set("brush", "x 1.001")
    page.set("edit", "again")
    page.set("schedule", PATTERN.split("|")[0])
    page.browser.wait("!document.getElementById('curve').hidden")


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and extremes."""
    found = [scale * value for value in values]
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found * 3)
    return {
        "median": statistics.median(found), "q25": low, "q75": high, "least": min(found),
        "most": max(found), "n": len(found),
    }  # fmt: skip


def told(name: str, found: dict[str, float], unit: str, target: float | None = None) -> None:
    said = "" if target is None else f"  target {target:g}: {verdict(found['median'], target)}"
    print(
        f"{name:44} {found['median']:9.2f} {unit:6} quartiles {found['q25']:.2f} to "
        f"{found['q75']:.2f}{said}"
    )


def verdict(value: float, target: float) -> str:
    return "met" if value <= target else "MISSED"


def first_tokens(rivals: Rivals, repeats: int) -> dict[str, Any]:
    """First tokens in turns: plain, over HTTP, in the page; ms more than the plain one."""
    ways: dict[str, Callable[[], Any]] = {"plain": lambda: rivals.plain(1), "http": rivals.first}
    if rivals.page is not None:
        ways["page"] = rivals.first_in_the_page
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, act in ways.items():
            rivals.server.idle()
            start = time.perf_counter()
            own = act()
            if turn:
                times[name].append(own if own is not None else time.perf_counter() - start)
    found: dict[str, Any] = {name: spread(own, 1000) for name, own in times.items()}
    told("first token of a plain stream", found["plain"], "ms")
    for name in list(ways)[1:]:
        more = [a - b for a, b in zip(times[name], times["plain"], strict=True)]
        found[f"{name}, more"] = {**spread(more, 1000), "target": 400}
        told(f"after a touch, {name}: more", found[f"{name}, more"], "ms", 400)
    return found


def edits(rivals: Rivals, repeats: int) -> dict[str, Any]:
    """From an edit that goes on to its first token."""
    pairs = []
    for _ in range(repeats):
        pairs.append(rivals.edit())
        rivals.server.idle()
    found = {
        "edit to its first token": spread([edit for edit, _ in pairs], 1000),
        "a token before it": spread([token for _, token in pairs], 1000),
    }
    for name, own in found.items():
        told(name, own, "ms")
    return found


def tokens(rivals: Rivals, repeats: int) -> dict[str, Any]:
    """The time of a text relative to a plain stream's, in turns."""
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: rivals.plain(rivals.tokens),
        "streamed over HTTP": lambda: rivals.over_http(False),
        "with heads, over HTTP": lambda: rivals.over_http(True),
    }
    if rivals.page is not None:
        ways["streamed to the page"] = lambda: rivals.in_the_page(False)
        ways["with heads, to the page"] = lambda: rivals.in_the_page(True)
    found: dict[str, Any] = ratios(interleave(ways, repeats), "plain")
    show(found, "plain")
    for name, own in found.items():
        if name != "plain":
            own["target"] = 1.25 if "heads" in name else 1.05
            print(f"{name:44} target {own['target']}: {verdict(own['median'], own['target'])}")
    return found


def openings(page: Page, repeats: int) -> dict[str, Any]:
    """The page from its address until it is ready."""
    times = []
    for _ in range(repeats):
        page.browser.visit("about:blank", width=1600)
        start = time.perf_counter()
        page.browser.visit(page.server.url, width=1600)
        page.browser.wait("document.body.dataset.ready === 'yes'")
        times.append(time.perf_counter() - start)
    found = {**spread(times, 1000), "target": 1000}
    told("opening in Chromium", found, "ms", 1000)
    return found


# A stroke over the matrix, one move of the pointer a frame: intervals of frames, and the page's
# own work in each; then repaints of all cells.
STROKE = """
(async () => {
  const { grid } = await import('/static/painting.js');
  const box = grid.canvas.getBoundingClientRect();
  const at = i => ({ clientX: box.x + 36 + (i * 7) % (box.width - 40),
    clientY: box.y + 20 + (i * 5) % (box.height - 24), button: 0, pointerId: 1 });
  const frames = [], work = [], repaints = [];
  grid.canvas.dispatchEvent(new PointerEvent('pointerdown', at(0)));
  let last = await new Promise(requestAnimationFrame);
  for (let i = 1; i <= 180; i++) {
    const start = performance.now();
    grid.canvas.dispatchEvent(new PointerEvent('pointermove', at(i)));
    work.push(performance.now() - start);
    const now = await new Promise(requestAnimationFrame);
    frames.push(now - last);
    last = now;
  }
  grid.canvas.dispatchEvent(new PointerEvent('pointerup', at(180)));
  for (let i = 0; i < 60; i++) {
    await new Promise(requestAnimationFrame);
    const start = performance.now();
    grid.paintNow();
    repaints.push(performance.now() - start);
  }
  return [frames, work, repaints];
})()
"""


def painting(folder: Path) -> dict[str, Any]:
    """A stroke over 80 x 128 heads in the page itself; a shape needs no weights."""
    rows = tuple(Profile.from_matrix([[1.0] * HEADS] * LAYERS).rows)
    wide = Profile(rows, tuple(f"layers.{i}.attn" for i in range(LAYERS)))
    with (
        served(shape_of(wide, "wide"), folder / "wide") as server,
        opened(server, folder / "wide-browser") as page,
    ):
        assert page is not None
        page.open(width=1600)
        page.quiet()
        frames, work, repaints = page.browser.ask(STROKE)
    found = {
        "frame of a stroke": {**spread(frames), "target": 1.1 * FRAME},
        "work of a stroke's step": {**spread(work), "target": FRAME},
        "repaint of all cells": {**spread(repaints), "target": FRAME},
    }
    for name, own in found.items():
        own["q95"] = sorted({"f": frames, "w": work, "r": repaints}[name[0]])[-1 - len(work) // 20]
        told(f"{LAYERS} x {HEADS}: {name}", own, "ms", own["target"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=32)
    given = parser.parse_args()
    subject = Subject.of(given.model, *load_model(given.model))
    found: dict[str, Any] = {"model": given.model, "tokens": given.tokens}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with served(subject, folder) as server, opened(server, folder / "browser") as page:
            if page is not None:
                found["opening"] = openings(page, given.repeats)
                prepare(page, given.tokens)
            rivals = Rivals(server, subject, given.tokens, page)
            found["first token"] = first_tokens(rivals, given.repeats)
            found["edit"] = edits(rivals, given.repeats)
            found["a token"] = tokens(rivals, given.repeats)
        if CHROMIUM is not None:
            found["painting"] = painting(folder)
    print(write("console", found))


if __name__ == "__main__":
    main()
