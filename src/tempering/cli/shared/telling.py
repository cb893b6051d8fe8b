"""What a command says while it runs: notes and progress on stderr, of rank 0 alone."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from tempering.ranks import here

_SILENT = False


def silence() -> None:
    """No notes and no progress from now on (--quiet); errors and results are still shown."""
    global _SILENT
    _SILENT = True
    warnings.simplefilter("ignore")


def note(message: str) -> None:
    """One line on stderr, of rank 0 where a run has several."""
    if not _SILENT and here().first:
        print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def counted(what: str, unit: str = "chunks") -> Iterator[Any]:
    """A callback (done, total) that shows progress on stderr."""
    from tempering.reports import progress

    if _SILENT or not here().first:
        yield lambda done, total: None
        return
    with contextlib.ExitStack() as stack:
        bars: dict[str, Any] = {}

        def report(done: int, total: int) -> None:
            if what not in bars:
                bars[what] = stack.enter_context(progress(what, total, unit=unit))
            bars[what].advance(done - bars[what].done)

        yield report


@contextlib.contextmanager
def staged() -> Iterator[Any]:
    """A callback (stage, done, total) that shows one bar a stage on stderr."""
    from tempering.reports import progress

    if _SILENT or not here().first:
        yield lambda stage, done, total: None
        return
    with contextlib.ExitStack() as stack:
        current: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if current.get("stage") != stage:
                stack.close()
                current.update(stage=stage, bar=stack.enter_context(progress(stage, total)))
            bar = current["bar"]
            bar.advance(done - bar.done)

        yield report
