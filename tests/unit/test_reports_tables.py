"""Long-format tables: every number of a record, once, as CSV and as Parquet."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tempering.errors import DataError, OutputError
from tempering.reports import Record, long_format, write_table

SAMPLE = Path(__file__).with_name("test_reports_sample.json")
COLUMNS = ["pattern", "layer", "name", "head", "quantity", "value", "positions"]

SMALL = {
    "pattern": [
        {"label": "warm", "text": "constant(2)", "temperature": [2.0, None]},
        {"label": "heads", "text": "", "temperature": [[0.5, math.inf], [None, 1]]},
    ],
    "support": {
        "layers": ["layers.0", "layers.1"],
        "before": [[3.5, 0.1 + 0.2], None],
        "after": {"warm": [[math.nan, 4.0], [None]]},
        "quantities": {"peak": {"before": [[0.5, 0.25], None], "after": {}}},
        "positions": {
            "edges": [[0, 3], [4, 7]],
            "quantities": {"peak": {"before": [[[0.5, 1.0], None], None], "after": {}}},
        },
    },
}
EXPECTED = [
    ("warm", 0, "layers.0", None, "temperature", 2.0),
    ("warm", 1, "layers.1", None, "temperature", None),
    ("heads", 0, "layers.0", 0, "temperature", 0.5),
    ("heads", 0, "layers.0", 1, "temperature", math.inf),
    ("heads", 1, "layers.1", 0, "temperature", None),
    ("heads", 1, "layers.1", 1, "temperature", 1.0),
    ("untempered", 0, "layers.0", 0, "support", 3.5),
    ("untempered", 0, "layers.0", 1, "support", 0.1 + 0.2),
    ("untempered", 1, "layers.1", None, "support", None),
    ("warm", 0, "layers.0", 0, "support", math.nan),
    ("warm", 0, "layers.0", 1, "support", 4.0),
    ("warm", 1, "layers.1", 0, "support", None),
    ("untempered", 0, "layers.0", 0, "peak", 0.5),
    ("untempered", 0, "layers.0", 1, "peak", 0.25),
    ("untempered", 1, "layers.1", None, "peak", None),
]
EXPECTED = [(*entry, None) for entry in EXPECTED] + [
    ("untempered", 0, "layers.0", 0, "peak", 0.5, "0-3"),
    ("untempered", 0, "layers.0", 1, "peak", None, "0-3"),
    ("untempered", 1, "layers.1", None, "peak", None, "0-3"),
    ("untempered", 0, "layers.0", 0, "peak", 1.0, "4-7"),
    ("untempered", 0, "layers.0", 1, "peak", None, "4-7"),
    ("untempered", 1, "layers.1", None, "peak", None, "4-7"),
]


def new(**results):
    return Record.new("measure", settings={}, results=results)


def test_every_number_once():
    assert repr([tuple(entry) for entry in long_format(new(**SMALL))]) == repr(EXPECTED)


def test_csv_keeps_every_bit(tmp_path):
    path = write_table(new(**SMALL), tmp_path / "a.csv")
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == COLUMNS
    found = [
        (p, int(layer), n, int(h) if h else None, q, float(v) if v else None, at or None)
        for p, layer, n, h, q, v, at in rows
    ]
    assert repr(found) == repr(EXPECTED)


def test_parquet_tells_null_from_nan(tmp_path):
    table = pq.read_table(write_table(new(**SMALL), tmp_path / "a.parquet"))
    assert table.column_names == COLUMNS
    assert repr([tuple(row.values()) for row in table.to_pylist()]) == repr(EXPECTED)


def test_the_sample_has_a_row_a_number():
    entries = long_format(Record.load(SAMPLE))
    assert (
        len(entries) == 3 * 30 + 4 * 30 * 9
    )  # three patterns; support three times, sink share once


def test_patterns_alone_will_do():
    entries = long_format(new(pattern=SMALL["pattern"]))
    assert entries[0] == ("warm", 0, "0", None, "temperature", 2.0, None)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"a file that ends in \.csv or \.parquet"):
        write_table(new(**SMALL), tmp_path / "a.xlsx")
    with pytest.raises(DataError, match=r"measure record has no numbers per layer"):
        write_table(new(), tmp_path / "a.csv")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(OutputError, match="nothing was written"):
            write_table(new(**SMALL), f"/proc/{name}")
    assert not list(tmp_path.iterdir())
