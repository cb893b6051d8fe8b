"""Whether the console keeps out of the way: time to the first token, per token, of live heads.

python benchmarks/console.py [--model smollm2] [--repeats 7]

On the server in this process, over HTTP on loopback, rivals in turns:

    first token   after a touch of the brush ("starts again") against a plain stream's first token
    next token    after a touch of the brush that goes on, in tokens of a plain stream
    a token       streamed without and with live statistics, against a plain stream
    opening       the page, its files and its state
    repaint       80 layers x 128 heads in Chromium, where there is one
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from _bench import interleave, ratios, show

from tempering import Profile
from tempering.console.subject import Subject
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.engines.loading.hub import load_model
from tempering.tokens.policy import ConstantPolicy
from tests.e2e.browser import CHROMIUM, Browser
from tests.e2e.console_server import TOKEN, Served, served

PROMPT = "Suggest a name for a small bookshop by the sea, and say why."
TOKENS = 32


def asked(server: Served, path: str, body: Any) -> Any:
    """The open answer of a request."""
    request = urllib.request.Request(
        f"{server.base}/api/{path}",
        None if body is None else json.dumps(body).encode(),
        {"authorization": f"token {TOKEN}"},
    )
    return urllib.request.urlopen(request)


class Rivals:
    """The same text by a plain loop and over HTTP."""

    def __init__(self, server: Served, subject: Subject) -> None:
        self.server, self.subject = server, subject
        self.profile = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.3)", subject.model)
        self.rows = [row.tolist() for row in self.profile.rows]

    def plain(self, tokens: int) -> None:
        ids = prompt_ids(self.subject.tokenizer, PROMPT)
        rows = [Profile.neutral(self.subject.plan), self.profile]
        for _ in stream(
            self.subject.model, self.subject.tokenizer, ids, rows,
            tokens=tokens, policy=ConstantPolicy(0.7),
        ):  # fmt: skip
            pass

    def order(self, tokens: int, watch: bool) -> dict[str, Any]:
        return {
            "run": "bench", "prompt": PROMPT, "tokens": tokens, "policy": "constant(0.7)",
            "profiles": [{"rows": self.rows}], "watch": watch,
        }  # fmt: skip

    def over_http(self, tokens: int, watch: bool) -> None:
        with asked(self.server, "write", self.order(tokens, watch)) as answer:
            for _ in answer:
                pass

    def first(self) -> None:
        """From the touch to the first token, as the page starts again."""
        with asked(self.server, "write", self.order(TOKENS, True)) as answer:
            for line in answer:
                if json.loads(line)["type"] == "token":
                    break
        # The page has gone: the next turn waits until the model is free, which is not timed.

    def edit(self) -> tuple[float, float]:
        """Seconds from an edit to the first token under it, and of a token before it."""
        with asked(self.server, "write", self.order(TOKENS, True)) as answer:
            times: list[float] = []
            sent = 0.0
            for line in answer:
                event = json.loads(line)
                if event["type"] == "token" and event["row"] == 0:
                    times.append(time.perf_counter())
                    if len(times) == 8:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    subject = Subject.of(given.model, *load_model(given.model))
    with tempfile.TemporaryDirectory() as folder, served(subject, Path(folder)) as server:
        rivals = Rivals(server, subject)

        def first() -> None:
            rivals.first()

        plain, touched = [], []
        for turn in range(given.repeats + 1):
            for times, act in ((plain, lambda: rivals.plain(1)), (touched, first)):
                server.idle()
                start = time.perf_counter()
                act()
                if turn:
                    times.append(time.perf_counter() - start)
        before, after = (1000 * statistics.median(times) for times in (plain, touched))
        print(f"first token, plain stream        {before:8.0f} ms")
        print(f"first token after a touch        {after:8.0f} ms")
        print(f"difference (target 400)          {after - before:8.0f} ms")
        server.idle()
        edits = []
        for _ in range(given.repeats):
            edits.append(rivals.edit())
            server.idle()
        for name, times in (
            ("edit to the next token", [e for e, _ in edits]),
            ("a token before it", [t for _, t in edits]),
        ):
            print(f"{name:32} {1000 * statistics.median(times):8.0f} ms")
        found = interleave(
            {
                "plain": lambda: rivals.plain(TOKENS),
                "streamed (target 1.05)": lambda: rivals.over_http(TOKENS, False),
                "with heads live (1.25)": lambda: rivals.over_http(TOKENS, True),
            },
            given.repeats,
        )
        show(ratios(found, "plain"), "plain")
        start = time.perf_counter()
        urllib.request.urlopen(server.url).read()
        for name in server.console._files:
            urllib.request.urlopen(f"{server.base}/static/{name}").read()
        asked(server, "state", None).read()
        print(f"opening: page, files and state   {1000 * (time.perf_counter() - start):8.0f} ms")
        if CHROMIUM is not None:
            in_the_browser(server, Path(folder))


REPAINT = """
(async () => {
  const { Grid } = await import('/static/grid.js');
  const canvas = document.createElement('canvas'), box = document.createElement('div');
  document.body.append(box); box.append(canvas);
  const heads = new Array(80).fill(128), no = () => {};
  const grid = new Grid(canvas, heads.map((_, i) => ({layer: i, index: i, stack: ''})), heads,
    {begin: no, paint: no, end: no, moved: no, chosen: no, key: () => false});
  grid.view = {values: heads.map((n, l) => Array.from({length: n}, (_, h) => Math.sin(l + h))),
    kind: 'diverging', low: -1, high: 1, label: String};
  const times = [];
  for (let i = 0; i < 60; i++) {
    await new Promise(requestAnimationFrame);
    const start = performance.now(); grid.paintNow(); times.push(performance.now() - start);
  }
  box.remove();
  return times.sort((a, b) => a - b);
})()
"""


def in_the_browser(server: Served, folder: Path) -> None:
    """Repaints of a wide matrix, and the page from its address to ready."""
    browser = Browser(folder / "browser")
    try:
        browser.attach()
        start = time.perf_counter()
        browser.visit(server.url, width=1600)
        browser.wait("document.body.dataset.ready === 'yes'")
        print(f"opening in Chromium (target 1000) {1000 * (time.perf_counter() - start):7.0f} ms")
        times = browser.ask(REPAINT)
        print(f"repaint of 80 x 128, median      {statistics.median(times):8.1f} ms")
        print(f"repaint, 95% (a frame is 16.7)   {times[int(0.95 * len(times))]:8.1f} ms")
    finally:
        browser.close()


if __name__ == "__main__":
    main()
