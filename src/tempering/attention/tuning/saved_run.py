"""The state of a run in a file, so that a stopped run goes on to the same result."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from tempering.errors import DataError, InputError
from tempering.files import write_atomic
from tempering.ranks import here

VERSION = 3


class SavedRun:
    """A file that holds the state after the last finished step; without a path nothing is kept.

    settings: everything the result depends on; a file of other settings is refused.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = settings
        text = json.dumps(settings, sort_keys=True, default=str)
        self._key = hashlib.sha256(text.encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """The state, or None where there is no file; that of rank 0 on all ranks.

        Raises InputError for the file of another run, DataError for one that is damaged.
        """
        found = None
        with here().together():
            if here().first:
                found = self._load()
        return here().same(found)

    def _load(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists():
            return None
        try:
            content = torch.load(io.BytesIO(self.path.read_bytes()), weights_only=True)
            version, key, state = content["version"], content["key"], content["state"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(error) from error
        except pickle.UnpicklingError as error:
            raise self._damaged(error) from error
        if version != VERSION or key != self._key:
            differs = [
                name
                for name, value in self.settings.items()
                if content.get("settings", {}).get(name) != str(value)
            ]
            raise InputError(
                f"{self.path} keeps another run (another {', '.join(differs) or 'version'}); "
                "give the settings and data of that run to go on with it, or delete the file"
            )
        return dict(state)

    def save(self, state: dict[str, Any]) -> None:
        """Replace the file in one step, on rank 0; OutputError when it can't be written."""
        with here().together():
            if self.path is not None and here().first:
                self._save(self.path, state)

    def _save(self, path: Path, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        content = {
            "version": VERSION,
            "key": self._key,
            "settings": {name: str(value) for name, value in self.settings.items()},
            "state": state,
        }
        torch.save(content, buffer)
        write_atomic(path, buffer.getvalue())

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self.path} does not hold a run that can go on ({type(error).__name__}); "
            "delete it to start anew"
        )
