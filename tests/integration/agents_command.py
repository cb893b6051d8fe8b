"""What the tests of `tempering throb` and `tempering explore` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tempering.cli import _run
from tempering.reports import Record


def call(*arguments: object) -> int:
    return _run([str(item) for item in arguments], debug=False)


def record_of(out: Path, kind: str = "throb") -> Record:
    (path,) = out.glob(f"{kind}-*.json")
    return Record.load(path)


def workers_of(record: Record) -> list[dict[str, Any]]:
    return [row for stage in record.results["stages"] for row in stage["workers"]]


def remote(address: str, out: Path) -> list[object]:
    return ["--engine", f"{address}/v1", "--model", "m", "--out", out]
