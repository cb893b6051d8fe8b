"""Finished pieces of a long run, kept on disk so that a second run goes on where one stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from tempering.errors import InputError, OutputError
from tempering.evaluation.run_lock import RunLock
from tempering.files import whole_characters

# Told of a long run: (stage, pieces that are done, of how many).
Progress = Callable[[str, int, int], None]


class Journal:
    """Results by name in a file of JSON lines, one line each, synced as they come.

    The file's name holds a hash of `settings`, so a run with other settings starts anew. A last
    line cut off by an interruption is dropped.

    One run at a time holds a journal, from here to `close` or `finish`. Raises what `RunLock`
    raises: InputError where another run holds it, OutputError where it can't be written.
    """

    def __init__(self, directory: str | Path, kind: str, settings: dict[str, Any]) -> None:
        text = json.dumps(settings, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.path = Path(directory) / f"{kind}-{digest}.partial.jsonl"
        self.entries: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._lock = RunLock(self.path, kind)
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
            for line in lines:
                try:
                    entry = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(entry, dict) and entry.keys() >= {"name", "value"}:
                    self.entries[str(entry["name"])] = _whole(entry["value"])

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    def put(self, name: str, value: Any) -> None:
        """Keep one result; OutputError when it can't be written.

        Halves of characters, which a record in UTF-8 can't hold, become U+FFFD.
        """
        if not self._lock.held:
            raise InputError(f"the journal {self.path} is closed; open another to keep '{name}'")
        value = _whole(value)
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
                if self._file.tell():
                    self._file.write("\n")  # ends a line that an interruption cut off
            self._file.write(json.dumps({"name": name, "value": value}) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"can't write {self.path}: {error.strerror}; results so far are kept there. "
                "Free some space or name another place, and run the same command again"
            ) from error
        self.entries[name] = value

    def close(self) -> None:
        """Close the file and keep it, for the next run."""
        self._close_file()
        self._lock.release()

    def finish(self) -> None:
        """The run is complete: remove the file."""
        self._close_file()
        self.path.unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _whole(value: Any) -> Any:
    """`value` with whole characters in all its texts."""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, dict):
        return {_whole(name): _whole(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return value
