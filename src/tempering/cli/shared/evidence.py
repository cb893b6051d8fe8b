"""What was measured about a profile, as tables for `tempering profile show`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tempering.reports.grids import Grid, repair_grid
from tempering.reports.views import shown, signed

_STEPS = 6  # of a fit that are all shown; of a longer fit only the first and the last
_NEEDED = {"label", "family", "numbers", "test", "metric", "untempered", "value", "change"}

_REPAIR = {"label", "test", "compressed", "repaired"}


def evidence_grids(evidence: Mapping[str, Any]) -> list[Grid]:
    """How a profile was found, and one table of measurements for every test."""
    rows = evidence.get("measured", [])
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and row.keys() >= _NEEDED for row in rows
    ):
        rows = []
    repairs = evidence.get("repair", [])
    if not isinstance(repairs, list) or not all(
        isinstance(row, dict) and row.keys() >= _REPAIR for row in repairs
    ):
        repairs = []
    shown_apart = ("measured", "repair") if repairs else ("measured",)
    told = [[name, _told(value)] for name, value in evidence.items() if name not in shown_apart]
    grids = [Grid("How it was found", "", ["", ""], told)]
    if repairs:
        grids.append(repair_grid(repairs))
    for test, metric in dict.fromkeys((row["test"], row["metric"]) for row in rows):
        own = [row for row in rows if (row["test"], row["metric"]) == (test, metric)]
        grids.append(_measured(test, metric, own))
    return grids


def _measured(test: str, metric: str, rows: Sequence[dict[str, Any]]) -> Grid:
    unit = "nats/token; negative is a gain" if metric == "loss" else "share; positive is a gain"
    table = []
    shuffled = [row for row in rows if row["label"].startswith("shuffled")]
    for row in rows:
        if row not in shuffled:
            interval = "–"
            if row.get("low") is not None and row.get("high") is not None:
                interval = f"{signed(row['low'])} to {signed(row['high'])}"
            table.append(_line(row["label"], row["numbers"], row["value"], row["change"], interval))
    if shuffled:
        changes = [row["change"] for row in shuffled]
        mean = sum(row["value"] for row in shuffled) / len(shuffled)
        table.append(
            _line(
                f"shuffled over heads, {len(shuffled)} seeds",
                shuffled[0]["numbers"],
                mean,
                sum(changes) / len(changes),
                f"{signed(min(changes))} to {signed(max(changes))} over seeds",
            )
        )
    first = rows[0]
    remark = (
        f"untempered {shown(first['untempered'], 4)}; change in {unit}; 95% intervals over "
        f"{shown(first.get('n'))} clusters"
    )
    few = next(
        (row for row in rows if (row.get("targets") or 0) < (first.get("targets") or 0)), None
    )
    if few is not None:
        remark += (
            f"; controls on {few['targets']} of them, where the untempered model has "
            f"{shown(few['untempered'], 4)}"
        )
    columns = ["", "numbers", metric, "change", "interval"]
    return Grid(f"{metric.capitalize()}, {test}", remark, columns, table)


def _line(label: str, numbers: int, value: float, change: float, interval: str) -> list[str]:
    return [label, str(numbers), shown(value, 4), signed(change), interval]


def _told(value: Any) -> str:
    """A value on one line."""
    if isinstance(value, float):
        return shown(value, 4)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items() if v is not None)
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        if len(value) > _STEPS:
            return f"{len(value)} steps; the first: {_told(value[0])}; the last: {_told(value[-1])}"
        return "; ".join(_told(item) for item in value)
    return value if isinstance(value, str) else json.dumps(value)
