"""Progress on standard error: a bar on a terminal, occasional lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Where there is no terminal to redraw, a line is printed after each tenth of the work, and in any
# case every half minute.
_SHARE = 0.1
_SECONDS = 30.0


class Bar:
    """Counts steps of work and shows them; made by `progress`."""

    def __init__(
        self, what: str, total: int | None, unit: str, show: Callable[[int, str], None]
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self._show = show

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count `steps` more as done; `note` is a word on how it goes, e.g. "loss 3.18"."""
        self.done += steps
        self._show(self.done, note)


@contextmanager
def progress(
    what: str,
    total: int | None,
    *,
    unit: str = "steps",
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Show how far `what` has come while the block runs: `with progress("compare", 24) as bar`.

    what: the work, in a word or two. total: number of steps, or None when unknown. unit: of a
    step. console: where to; standard error without one. On a terminal a bar is redrawn; elsewhere
    a line is printed each tenth of the way, at most every second, and at least every half minute.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as shown:
            task = shown.add_task(what, total=total, note="")
            yield Bar(
                what, total, unit, lambda done, note: shown.update(task, completed=done, note=note)
            )
        return

    lines = _Lines(what, total, unit, console, clock)
    bar = Bar(what, total, unit, lines.show)
    try:
        yield bar
    except BaseException:
        lines.line(bar.done, "stopped")
        raise
    lines.line(bar.done, "done")


class _Lines:
    """Sparse progress lines for a log file or a pipe."""

    def __init__(
        self, what: str, total: int | None, unit: str, console: Console, clock: Callable[[], float]
    ) -> None:
        self.what, self.total, self.unit, self.console, self.clock = (
            what,
            total,
            unit,
            console,
            clock,
        )
        self.start = self.last = clock()
        self.shown = 0

    def show(self, done: int, note: str) -> None:
        since = self.clock() - self.last
        share = (done - self.shown) / self.total if self.total else 0.0
        finished = self.total is not None and done >= self.total  # `progress` prints the last line
        if not finished and (since >= _SECONDS or (since >= 1 and share >= _SHARE)):
            self.line(done, note)

    def line(self, done: int, note: str) -> None:
        self.last, self.shown = self.clock(), done
        of = f" of {self.total}" if self.total is not None else ""
        passed = self.last - self.start
        text = f"{self.what}: {done}{of} {self.unit}, {passed:.0f} s{f', {note}' if note else ''}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
