"""Logits in files: .npy (memory-mapped), .npz and Parquet (streamed), CSV (read whole)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.calibration.source import CHUNK, ArrayLogits, Logits
from tempering.files import read_text
from tempering.tensors import from_numpy

# Bytes of one read from a compressed file: enough to make the calls' cost small, few beside logits.
_READ_BYTES = 1 << 22


def open_logits(path: str | Path) -> Logits:
    """Logits in a file, read a chunk at a time.

    .npy is memory-mapped; .npz streams its only array, or the one called "logits"; .parquet
    streams its only list column, or all its floating columns in their order. .csv has a column a
    class, under a header line or, where its first line is of numbers alone, without one.

    Raises DataError when the file is missing, cut short, of another kind, or not a table.
    """
    path = Path(path)
    readers = {".npy": _npy, ".npz": NpzLogits, ".parquet": ParquetLogits, ".csv": _csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: expected a file that ends in {', '.join(readers)}")
    try:
        return reader(path)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: there is no such file") from error
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> DataError:
    """The error of a file that is not what its name says."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(
        f"{path}: can't be read as {path.suffix} ({reason}); it may be cut short, or of another "
        "kind than its name says: make it anew"
    )


def check_table(shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> None:
    """DataError unless this is a table of real numbers, or one score a row."""
    if len(shape) not in (1, 2) or dtype.kind not in "fiu":
        raise DataError(
            f"{name}: expected logits of shape (rows, classes) and a real dtype, got shape "
            f"{tuple(shape)} of {dtype}"
        )


def _npy(path: Path) -> Logits:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected one array; rename it to .npz if it is an archive")
    check_table(array.shape, array.dtype, str(path))
    return ArrayLogits(array, str(path))


class NpzLogits(Logits):
    """One array of an .npz archive, compressed or not, never held whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        with zipfile.ZipFile(path) as archive:
            names = [member.removesuffix(".npy") for member in archive.namelist()]
            chosen = names[0] if len(names) == 1 else "logits"
            if chosen not in names:
                raise DataError(
                    f"{path}: holds the arrays {', '.join(names) or '(none)'}; save the logits "
                    "under the name 'logits'"
                )
            self.member = f"{chosen}.npy"
            with archive.open(self.member) as stream:
                shape, by_column, self.dtype = read_header(stream)
        check_table(shape, self.dtype, f"{path}[{chosen}]")
        if by_column:
            raise DataError(
                f"{path}[{chosen}] is stored by column, so it can't be streamed by row; save "
                "np.ascontiguousarray(logits)"
            )
        self.n_rows, self.n_columns = shape if len(shape) == 2 else (*shape, 1)

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        width = self.n_columns * self.dtype.itemsize
        size = max(1, _READ_BYTES // width) * width
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self.member) as stream:
                read_header(stream)
                while data := stream.read(size):
                    rows = np.frombuffer(data[: len(data) // width * width], self.dtype)
                    yield from ArrayLogits(rows.reshape(-1, self.n_columns)).pieces()
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise unreadable(self.path, error) from error


def read_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, stored by column, dtype) of a .npy stream, which is left at the data."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


class ParquetLogits(Logits):
    """The only list column of a Parquet file, or its floating columns in order."""

    def __init__(self, path: Path) -> None:
        from pyarrow import lib, parquet, types

        self.path, self.name = path, str(path)
        self.errors = (lib.ArrowException, OSError, ValueError)
        try:
            file = parquet.ParquetFile(path)
        except lib.ArrowException as error:
            raise unreadable(path, error) from error
        with file:
            fields = list(file.schema_arrow)
            self.n_rows = file.metadata.num_rows
            lists = [f.name for f in fields if _is_list(types, f.type)]
            self.columns = lists or [f.name for f in fields if types.is_floating(f.type)]
            self.nested = bool(lists)
            if len(lists) > 1 or not self.columns:
                raise DataError(
                    f"{path}: expected one column of lists, or floating columns, one a class; it "
                    f"has {', '.join(f'{f.name} ({f.type})' for f in fields)}"
                )
            whole = [f.name for f in fields if types.is_integer(f.type)]
            if whole and not self.nested:
                raise DataError(
                    f"{path}: the columns {', '.join(whole)} hold integers, which logits are not; "
                    "drop them, or store the logits as one column of lists"
                )
            self.n_columns = len(self.columns)
            self.column_names = None if self.nested else tuple(self.columns)
            if self.nested:
                first = next(file.iter_batches(1, columns=self.columns), None)
                self.n_columns = len(first.column(0)[0]) if first is not None else 0

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        from pyarrow import parquet

        rows = max(1, CHUNK // max(1, self.n_columns))
        try:
            with parquet.ParquetFile(self.path) as file:
                first = 0
                for batch in file.iter_batches(rows, columns=self.columns):
                    yield self._table(batch, first)
                    first += batch.num_rows
        except self.errors as error:
            if isinstance(error, DataError):
                raise
            raise unreadable(self.path, error) from error

    def _table(self, batch: Any, first: int) -> Tensor:
        for name, column in zip(self.columns, batch.columns):
            if column.null_count:
                row = first + column.is_null().to_pylist().index(True)
                raise DataError(f"{self.path}: row {row} of column '{name}' is null")
        if not self.nested:
            columns = [column.to_numpy(zero_copy_only=False) for column in batch.columns]
            return from_numpy(np.column_stack(columns))
        values = batch.column(0)
        flat = values.flatten()
        if flat.null_count:
            raise DataError(f"{self.path}: a null among the logits, in rows {first} and after")
        if len(flat) != batch.num_rows * self.n_columns:
            lengths = np.array([len(row) for row in values])
            row = int(np.flatnonzero(lengths != self.n_columns)[0])
            raise DataError(
                f"{self.path}: row {first + row} has {lengths[row]} logits, the first row "
                f"has {self.n_columns}"
            )
        table = flat.to_numpy(zero_copy_only=False).reshape(batch.num_rows, self.n_columns)
        return from_numpy(table)


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _csv(path: Path) -> Logits:
    from pyarrow import types

    table = _read_csv(path)
    for field, column in zip(table.schema, table.columns):
        if not types.is_integer(field.type) and not types.is_floating(field.type):
            raise DataError(
                f"{path}: the column '{field.name}' holds {field.type}, not numbers; leave out "
                "what is not logits"
            )
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise DataError(f"{path}: row {row} of column '{field.name}' is empty or NaN")
    whole = [field.name for field in table.schema if types.is_integer(field.type)]
    if whole and len(whole) < table.num_columns:
        raise DataError(
            f"{path}: the columns {', '.join(map(repr, whole))} hold integers, which "
            "logits are not; leave them out, or write logits with a decimal point"
        )
    columns = [column.to_numpy() for column in table.columns]
    logits = ArrayLogits(np.column_stack(columns).astype(np.float64), str(path))
    logits.column_names = tuple(table.column_names)
    return logits


def _read_csv(path: Path, texts: Sequence[str] = ()) -> Any:
    """A CSV file as a pyarrow table; cells are separated by commas, semicolons or tabs.

    texts: columns that are read as they are written.
    """
    from pyarrow import csv, string

    first = next((line for line in read_text(path).splitlines() if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    cells = [cell.strip().strip('"') for cell in first.split(delimiter)]
    if len(cells) > 1 and cells[0] == "":
        raise DataError(
            f"{path}: the first column has no name: pandas writes the index of a table so, "
            "which is no column of it; write it with index=False, or name that column"
        )
    counted = len(cells) > 1 and cells == [str(place) for place in range(len(cells))]
    if counted and len(cells) == 2:
        raise DataError(
            f"{path}: the first line, {first.strip()}, may be names of columns, as pandas writes "
            "them, or a row of numbers; name the columns (a,b), or write 0.0 and 1.0"
        )
    return csv.read_csv(
        path,
        # A single block, so that the type of a column is inferred from all of its rows.
        csv.ReadOptions(
            autogenerate_column_names=all(map(_is_number, cells)) and not counted,
            block_size=min(path.stat().st_size + (1 << 20), 2**31 - 1),
        ),
        csv.ParseOptions(delimiter=delimiter),
        csv.ConvertOptions(column_types=dict.fromkeys(texts, string())),
    )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def open_vector(path: str | Path, name: str) -> np.ndarray:
    """One value a row from a file: .npy, .npz, .parquet or .csv, or .txt, a value a line.

    name: of the values ("labels", "groups"), the array to take from an .npz that has several, or
    the column from a table that has several. A CSV file has a header line, unless its first line
    is of numbers alone. Raises DataError when the file is missing or holds no such thing.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the {name}, one a row")
    try:
        values = _vector(path, name)
    except DataError:
        raise
    except Exception as error:  # numpy and pyarrow raise many kinds on a broken file
        raise unreadable(path, error) from error
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise DataError(f"{path}: {name} have shape {values.shape}; expected one value a row")
    return values


def _vector(path: Path, name: str) -> np.ndarray:
    kind = path.suffix.lower()
    if kind == ".npy":
        return np.load(path, allow_pickle=False)
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return archive[_only(list(archive), name, path)]
    if kind in (".parquet", ".csv"):
        from pyarrow import parquet, types

        if kind == ".csv":
            table = _read_csv(path)
            column = _only(table.column_names, name, path)
            values = table.column(column)
            if types.is_integer(values.type) and not values.null_count:
                texts = _read_csv(path, [column]).column(column).to_pylist()
                return _numbers_or_names(np.array(texts))
        else:
            with parquet.ParquetFile(path) as file:
                column = _only(file.schema_arrow.names, name, path)
                values = file.read([column]).column(0)
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise DataError(
                f"{path}: row {row} of column '{column}' is empty; every row needs one of {name}"
            )
        return values.to_numpy()
    if kind == ".txt":
        lines = np.array(read_text(path).split("\n"))
        lines = lines[:-1] if lines[-1] == "" else lines
        return _numbers_or_names(lines)
    raise DataError(f"{path}: expected a file that ends in .npy, .npz, .parquet, .csv or .txt")


def _numbers_or_names(texts: np.ndarray) -> np.ndarray:
    """Whole numbers, if all texts are that; what numpy reads as one number may be several names.

    So 007 and 7 stay apart, and 1_12 and 11_2.
    """
    try:
        numbers = texts.astype(np.int64)
    except (ValueError, OverflowError):
        return texts
    return numbers if bool((numbers.astype(str) == np.char.strip(texts)).all()) else texts


def _only(names: list[str], name: str, path: Path) -> str:
    chosen = names[0] if len(names) == 1 else name
    if chosen not in names:
        raise DataError(f"{path}: holds {', '.join(names) or 'nothing'}; expected '{name}' there")
    return chosen
