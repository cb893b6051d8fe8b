"""One run at a time for what a run keeps on disk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from datetime import datetime
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from tempering.errors import InputError, OutputError


class RunLock:
    """The lock on `kept`, a file that only one run may write; held from here to `release`.

    It is a lock of the operating system on the file `kept` + ".lock", so that it ends with the
    process that holds it, however that ends. What is written in the lock file only describes the
    holder.

    Raises InputError, which names the other run, where one holds the lock; OutputError where the
    directory can't be written to.
    """

    def __init__(self, kept: Path, command: str) -> None:
        self.path = kept.with_name(kept.name + ".lock")
        self._lock: BaseFileLock = FileLock(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            holder = self._holder()  # before the attempt: some releases of filelock empty the file
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"another {command} is running already{holder}, and both would write {kept}; "
                "wait for it to end, or let this one write to another place (--out)"
            ) from None
        except OSError as error:
            raise OutputError(
                f"can't write {self.path}: {error.strerror or error}; free some space or name "
                "another place"
            ) from error
        if isinstance(self._lock, SoftFileLock):
            return  # without locks of its own on this file system, filelock writes the file itself
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        own = {"process": os.getpid(), "machine": platform.node(), "since": now}
        # The lock holds also where a full disk has no room for its description.
        with contextlib.suppress(OSError):
            self.path.write_text(json.dumps(own), encoding="utf-8")

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object still has the lock."""
        return self._lock.is_locked

    def release(self) -> None:
        """Give the lock back, and remove its file; a second call does nothing."""
        if self.held:
            # Removed while the lock is held, so that it is never another run's file. Windows
            # doesn't remove an open file, which then stays and does no harm.
            with contextlib.suppress(OSError):
                self.path.unlink()
            self._lock.release()

    def _holder(self) -> str:
        """The run that the lock file describes, for a message; empty where it describes none."""
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            return f" (process {held['process']} on {held['machine']}, since {held['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return ""
