"""Texts in Parquet or JSON-lines files, of any size: read in batches, their tokens kept on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tempering.errors import DataError, OutputError

COLUMN = "text"
_FORMATS = {".parquet": "parquet", ".jsonl": "json"}
# Rows tokenised at once, and bytes of JSON lines read at once: a line must fit.
_ROWS, _BLOCK = 256, 1 << 26


class TextTable:
    """The column "text" of a Parquet file, or of all Parquet or JSON-lines files below a folder.

    A row is a document. Files are read in the order of their paths.

    Raises DataError where there is no such file or column, or files of both kinds.
    """

    def __init__(self, path: str | Path) -> None:
        from pyarrow import dataset, json, lib, types

        self.path = Path(path)
        if self.path.is_dir():
            found = (p for p in self.path.rglob("*") if p.suffix.lower() in _FORMATS)
            self.files = tuple(sorted(p for p in found if not p.name.startswith(("_", "."))))
        else:
            self.files = (self.path,)
        kinds = sorted({p.suffix.lower() for p in self.files})
        if len(kinds) != 1:
            raise DataError(
                f"{path} holds files of {' and '.join(kinds) or 'neither .parquet nor .jsonl'}; "
                f"give a folder of one kind, each with a column '{COLUMN}'"
            )
        self._errors = (lib.ArrowException, OSError, ValueError)
        kind: Any = _FORMATS[kinds[0]]
        if kind == "json":
            kind = dataset.JsonFileFormat(read_options=json.ReadOptions(block_size=_BLOCK))
        for file in self.files:  # each by itself, so that an error names it
            try:
                found_here = dataset.dataset(str(file), format=kind)
                field = found_here.schema.field(COLUMN)
            except KeyError:
                names = ", ".join(found_here.schema.names) or "none"
                raise DataError(
                    f"{file} has no column '{COLUMN}' but {names}; rename the one with the texts"
                ) from None
            except self._errors as error:
                raise self._unreadable(file, error) from error
            if not (types.is_string(field.type) or types.is_large_string(field.type)):
                raise DataError(f"{file}: the column '{COLUMN}' holds {field.type}, not texts")
        self._format = kind
        self._ids: tuple[Any, Tensor] | None = None

    def __str__(self) -> str:
        """Names the files, their sizes and times, for a key of finished work."""
        marks = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        return f"{self.path.name}: {marks}"

    def texts(self) -> Iterator[list[str]]:
        """The documents, some at a time; DataError names the file and row of one that is none."""
        from pyarrow import dataset

        for file in self.files:
            row = 0
            try:
                for batch in dataset.dataset(str(file), format=self._format).to_batches(
                    columns=[COLUMN], batch_size=_ROWS, batch_readahead=1, fragment_readahead=1
                ):
                    texts = batch.column(0).to_pylist()
                    if None in texts:
                        raise DataError(
                            f"{file}, row {row + texts.index(None)} (from 0): the column "
                            f"'{COLUMN}' is empty; leave such rows out"
                        )
                    yield texts
                    row += len(texts)
            except self._errors as error:
                if isinstance(error, DataError):
                    raise
                raise self._unreadable(file, error) from error

    def ids(self, tokenizer: Any) -> Int[Tensor, "tokens"]:
        """The token ids of all documents, one after the other, in a temporary file on disk.

        Between two documents stands the tokenizer's end-of-text token, where it has one.
        Raises OutputError where the temporary directory has no room.
        """
        if self._ids is not None and self._ids[0] is tokenizer:
            return self._ids[1]
        between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        try:
            with tempfile.TemporaryFile() as file:
                count = 0
                for texts in self.texts():
                    rows = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
                    for row in filter(None, rows):
                        ids = np.asarray([*(between if count else []), *row], np.int64)
                        file.write(ids.tobytes())
                        count += len(ids)
                file.flush()
                if count == 0:
                    raise DataError(f"{self.path}: the texts have no tokens")
                # Copy on write: torch wants memory that can be written to.
                found = torch.from_numpy(np.memmap(file, np.int64, mode="c", shape=(count,)))
        except DataError:
            raise
        except OSError as error:
            raise OutputError(
                f"can't keep the tokens of {self.path} in {tempfile.gettempdir()}: "
                f"{error.strerror or error}; free some space, or name another place in TMPDIR"
            ) from error
        self._ids = (tokenizer, found)
        return found

    def _unreadable(self, file: Path, error: Exception) -> DataError:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return DataError(
            f"{file} can't be read as {file.suffix} ({reason}); it may be cut short, or of another "
            "kind than its name says: make it anew, or move it out of the folder"
        )


def is_table(path: Path) -> bool:
    """Whether a path names a folder, or a Parquet file."""
    return path.is_dir() or path.suffix.lower() == ".parquet"
