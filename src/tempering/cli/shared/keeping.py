"""Finished work, which may have been paid for, outlives a full disk and a first Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tempering.cli.shared import common
from tempering.errors import OutputError
from tempering.ranks import here

if TYPE_CHECKING:
    from tempering.evaluation.journal import Journal
    from tempering.reports.record import Record

PART = "part/"  # begins the names of settings in a journal, and no row's name


class JournalLedger:
    """A ledger on a journal, in memory once the disk fails; `failed` then holds the error.

    A run that goes on may do so under other settings. Each row states in `part` under which it was
    made: `parts[part - 1]`; the last of `parts` are this run's `settings`. Earlier parts come from
    a record (`parts`), and from a journal whose run ended without a record.
    """

    def __init__(
        self, journal: Journal, settings: dict[str, Any], parts: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.journal = journal
        self.failed: OutputError | None = None
        self.parts = list(parts)
        for name in sorted(name for name in journal.entries if name.startswith(PART)):
            found = journal.entries.pop(name)
            if int(name.removeprefix(PART)) > len(self.parts):
                self.parts.append(found)
        self.part = len(self.parts)
        if not self.parts or self.parts[-1] != settings:
            self.parts.append(settings)
            self.part += 1
        self.part_kept = False

    def __contains__(self, name: str) -> bool:
        return name in self.journal

    def __getitem__(self, name: str) -> Any:
        return self.journal[name]

    def put(self, name: str, value: Any) -> None:
        """Keep one result, on disk if that can be."""
        value = {**value, "part": self.part}
        if self.failed is None:
            try:
                if not self.part_kept:
                    key = f"{PART}{self.part:06d}"
                    self.journal.put(key, self.parts[-1])
                    del self.journal.entries[key]
                    self.part_kept = True
                self.journal.put(name, value)
                return
            except OutputError as error:
                self.failed = error
        self.journal.entries[name] = value


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """A function that is True after the first Ctrl-C; the second one raises KeyboardInterrupt."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        common.note("stopping: what is under way is finished and kept; Ctrl-C again to leave now")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def finish(
    record: Record,
    out: Path,
    as_json: bool,
    journal: Journal | None,
    beside: tuple[str, str] | None = None,
) -> None:
    """Save a record, elsewhere where its place can't be written, show it, and end the journal.

    journal: is removed; None leaves it alone. beside: (suffix, text) of a file with the record's
    name, such as the samples.
    """
    waiting = beside
    try:
        path = common.reserve(record, out)
        if beside is not None:
            try:
                _write_beside(path, *beside, record)
            except OutputError:
                path.unlink(missing_ok=True)
                raise
            waiting = None
        common.finish(record, out, as_json, path)
    except OutputError as error:
        place = _rescue(record, waiting)
        raise OutputError(f"{error} The record was written to {place} instead") from error
    if journal is not None:
        journal.finish()


def opened_journal(out: Path, kind: str, settings: dict[str, Any]) -> Journal | None:
    """The journal of a run, on rank 0; None on the others."""
    from tempering.evaluation.journal import Journal

    with here().together():
        return Journal(out, kind, settings) if here().first else None


@contextlib.contextmanager
def locked(out: Path, command: str) -> Iterator[None]:
    """`RunLock` on what a run writes, held by rank 0."""
    from tempering.evaluation.run_lock import RunLock

    with contextlib.ExitStack() as stack:
        with here().together():
            if here().first:
                stack.enter_context(RunLock(out, command))
        yield


@contextlib.contextmanager
def resumable(journal: Journal | None) -> Iterator[Callable[[str, int, int], None]]:
    """The stages of a run whose finished pieces are kept; Ctrl-C says where.

    An exception closes the journal; after a run without one, `conclude` does.
    """
    if journal is None:
        with common.staged() as report:
            yield report
        return
    if journal.entries:
        common.note(f"resuming: {len(journal.entries)} finished pieces in {journal.path}")
    try:
        with common.staged() as report:
            yield report
    except KeyboardInterrupt:
        journal.close()
        if not journal.entries:
            raise
        common.note(f"what was finished is kept in {journal.path}; run it again to go on")
        raise typer.Exit(130) from None
    except BaseException:
        journal.close()
        raise


def conclude(
    record: Record, out: Path, as_json: bool, journal: Journal | None, complete: bool
) -> None:
    """Save and show a record; the journal stays for the next run where this one was cut short."""
    with journal or contextlib.nullcontext():
        common.finish(record, out, as_json)
        if not complete:
            common.note("the numbers rest on what was finished; run it again to go on")
            raise typer.Exit(130)
        if journal is not None:
            journal.finish()


def write_somewhere(path: Path, text: str) -> Path:
    """Write a file, into the temporary directory where its own place has no room."""
    from tempering.files import write_atomic

    try:
        return write_atomic(path, text)
    except OutputError:
        return write_atomic(Path(tempfile.gettempdir()) / path.name, text)


def _write_beside(path: Path, suffix: str, text: str, record: Record) -> None:
    """Write a file with a reserved name; in the temporary directory where its own has no room."""
    from tempering.files import write_atomic

    try:
        place = write_atomic(path.with_suffix(suffix), text)
    except OutputError:
        elsewhere = common.reserve(record, Path(tempfile.gettempdir()))
        elsewhere.unlink()
        place = write_atomic(elsewhere.with_suffix(suffix), text)
    common.note(f"{suffix.split('.')[1]}: {place}")


def _rescue(record: Record, beside: tuple[str, str] | None) -> str:
    """Write the record to the temporary directory, or at last to standard output."""
    try:
        path = common.reserve(record, Path(tempfile.gettempdir()))
        if beside is not None:
            _write_beside(path, *beside, record)
        return str(record.save(path))
    except OutputError:
        print(record.to_json(), flush=True)
        return "standard output"
