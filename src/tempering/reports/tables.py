"""Numbers per layer and head in long format, as CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tempering.errors import DataError
from tempering.files import replace_atomic, write_atomic
from tempering.reports.record import Record
from tempering.reports.views import BASELINE, quantities


class Entry(NamedTuple):
    """One number of one head: what was measured, where, under which pattern.

    head is None where the number belongs to the whole layer; value is None where nothing was
    measured (a layer without softmax). positions: the part of the text, e.g. "0-127", or None
    for all of it.
    """

    pattern: str
    layer: int
    name: str
    head: int | None
    quantity: str
    value: float | None
    positions: str | None = None


def long_format(record: Record) -> list[Entry]:
    """Every temperature and every measured quantity of a record, one entry a number.

    Raises DataError when the record has neither pattern nor support.
    """
    results = record.results
    if not results.get("support") and not results.get("pattern"):
        raise DataError(
            f"this {record.kind} record has no numbers per layer: it has neither 'support' nor "
            "'pattern'; write the table from a measure, compare or generate record"
        )
    support = results.get("support", {"layers": [], "before": [], "after": {}})
    names = dict(enumerate(support["layers"]))
    entries = [
        entry
        for row in results.get("pattern", [])
        for entry in _entries(row["label"], "temperature", row["temperature"], names)
    ]
    for quantity, measured in quantities(support).items():
        entries += _entries(BASELINE, quantity, measured["before"], names)
        for label, matrix in measured["after"].items():
            entries += _entries(label, quantity, matrix, names)
    return entries + list(_by_position(support, names))


def _by_position(support: dict[str, Any], names: dict[int, str]) -> Iterator[Entry]:
    parts = support.get("positions", {"edges": [], "quantities": {}})
    for quantity, measured in parts["quantities"].items():
        for label, cube in {BASELINE: measured["before"], **measured["after"]}.items():
            for part, (low, high) in enumerate(parts["edges"]):
                matrix = [row and [cell and cell[part] for cell in row] for row in cube]
                for entry in _entries(label, quantity, matrix, names):
                    yield entry._replace(positions=f"{low}-{high}")


def _entries(
    pattern: str, quantity: str, matrix: list[Any], names: dict[int, str]
) -> Iterator[Entry]:
    for layer, row in enumerate(matrix):
        heads = list(enumerate(row)) if isinstance(row, list) else [(None, row)]
        for head, value in heads:
            number = None if value is None else float(value)
            yield Entry(pattern, layer, names.get(layer, str(layer)), head, quantity, number)


def write_table(record: Record, path: str | Path) -> Path:
    """Write `long_format(record)` as CSV or Parquet, by the file's suffix, whole or not at all.

    Raises DataError for another suffix or a record without such numbers, OutputError when the
    file can't be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".parquet"):
        raise DataError(f"can't write a table to {path}: name a file that ends in .csv or .parquet")
    entries = long_format(record)
    if suffix == ".csv":
        return write_atomic(path, _csv(entries))

    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "pattern": pa.dictionary(pa.int32(), pa.string()),
        "layer": pa.int32(),
        "name": pa.dictionary(pa.int32(), pa.string()),
        "head": pa.int32(),
        "quantity": pa.dictionary(pa.int32(), pa.string()),
        "value": pa.float64(),
        "positions": pa.dictionary(pa.int32(), pa.string()),
    }
    columns = zip(*entries) if entries else ([] for _ in kinds)
    table = pa.table(
        {name: pa.array(list(c), kind) for (name, kind), c in zip(kinds.items(), columns)}
    )
    return replace_atomic(path, lambda temporary: pq.write_table(table, temporary))


def _csv(entries: list[Entry]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Entry._fields)
    for entry in entries:
        value = entry.value
        # repr keeps every bit. An empty cell means "not measured"; nan is a measured value.
        text = "" if value is None else repr(value)
        head = "" if entry.head is None else entry.head
        writer.writerow([*entry[:3], head, entry.quantity, text, entry.positions or ""])
    return out.getvalue()
