"""Texts in Parquet or JSON-lines files, of any size: read in batches, their tokens kept on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tempering.errors import DataError, OutputError

COLUMN = "text"
_FORMATS = (".jsonl", ".parquet")
# What is not read although it may hold documents: to leave it out in silence would lose them.
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".br", ".zip", ".snappy")
# Rows tokenised at once, and bytes of JSON lines read at once: a line must fit.
_ROWS, _BLOCK = 256, 1 << 26


class TextTable:
    """The column "text" of a Parquet or JSON-lines file, or of all of one kind below a folder.

    A row is a document. Files are read in the order of their paths; names that begin with _ or .
    are left out, and a folder `data.parquet` is read file by file.

    Raises DataError where there is no such file or column, files of both kinds, or packed ones.
    """

    def __init__(self, path: str | Path) -> None:
        from pyarrow import lib, types

        self.path = Path(path)
        self.files = tuple(_below(self.path)) if self.path.is_dir() else (self.path,)
        kinds = sorted({p.suffix.lower() for p in self.files})
        if len(kinds) != 1 or kinds[0] not in _FORMATS:
            raise DataError(
                f"{path} holds files of {' and '.join(kinds) or 'neither .parquet nor .jsonl'}; "
                f"give a folder of one kind, each with a column '{COLUMN}'"
            )
        self._errors = (lib.ArrowException, OSError, ValueError)
        for file in self.files:  # each by itself, so that an error names it
            try:
                with _opened(file) as (schema, _):
                    field = schema.field(COLUMN)
            except KeyError:
                names = ", ".join(schema.names) or "none"
                raise DataError(
                    f"{file} has no column '{COLUMN}' but {names}; rename the one with the texts"
                ) from None
            except self._errors as error:
                raise self._unreadable(file, error) from error
            if not (types.is_string(field.type) or types.is_large_string(field.type)):
                raise DataError(f"{file}: the column '{COLUMN}' holds {field.type}, not texts")
        self._ids: tuple[Any, Tensor] | None = None

    def __str__(self) -> str:
        """Names the files, their sizes and times, for a key of finished work."""
        marks = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.files]
        return f"{self.path.name}: {marks}"

    def texts(self) -> Iterator[list[str]]:
        """The documents, some at a time; DataError names the file and row of one that is none."""
        for file in self.files:
            row = 0
            try:
                with _opened(file) as (_, batches):
                    for batch in batches:
                        texts = batch.column(COLUMN).to_pylist()
                        if None in texts:
                            raise DataError(
                                f"{file}, row {row + texts.index(None)} (from 0): the column "
                                f"'{COLUMN}' is empty; leave such rows out"
                            )
                        for place in range(0, len(texts), _ROWS):
                            yield texts[place : place + _ROWS]
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
        if "straddling object" in reason:
            return DataError(
                f"{file} has a line of more than {_BLOCK >> 20} MiB; cut its document in parts"
            )
        return DataError(
            f"{file} can't be read as {file.suffix} ({reason}); it may be cut short, or of another "
            "kind than its name says: make it anew, or move it out of the folder"
        )


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Iterable[Any]]]:
    """The schema of a file, and its rows in batches."""
    if file.suffix.lower() == ".parquet":
        from pyarrow import dataset

        rows = dataset.dataset(str(file), format="parquet")
        options = {"batch_size": _ROWS, "batch_readahead": 1, "fragment_readahead": 1}
        columns = [name for name in rows.schema.names if name == COLUMN]
        yield rows.schema, rows.to_batches(columns=columns, **options)
        return
    from pyarrow import json

    # pyarrow's datasets of JSON read a file of one line without an end as one of no value.
    with json.open_json(str(file), read_options=json.ReadOptions(block_size=_BLOCK)) as lines:
        yield lines.schema, lines


def _below(folder: Path) -> list[Path]:
    """All files of texts below a folder, in the order of their paths; links are followed.

    Names that begin with _ or . are left out, of folders too. A folder that is linked to from below
    itself is read once.
    """
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        folders[:] = [] if real in seen else [n for n in folders if not n.startswith(("_", "."))]
        if real in seen:
            continue
        seen.add(real)
        for path in (Path(place, name) for name in names if not name.startswith(("_", "."))):
            kinds = [suffix.lower() for suffix in path.suffixes]
            if kinds[-1:] == [".ndjson"] or (
                kinds[-1:] and kinds[-1] in _PACKED and {*kinds} & {*_FORMATS, ".json", ".ndjson"}
            ):
                raise DataError(
                    f"{path} is not read, and may hold documents: unpack it or name it .jsonl, or "
                    "move it out of the folder"
                )
            if kinds[-1:] and kinds[-1] in _FORMATS:
                found.append(path)
    return sorted(found)


def is_table(path: Path) -> bool:
    """Whether a path names a folder, or a file that holds a table."""
    return path.is_dir() or path.suffix.lower() in _FORMATS
