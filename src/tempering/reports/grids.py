"""The tables of a record as text, one definition for the terminal and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tempering.reports.record import Record
from tempering.reports.sections import SECTIONS
from tempering.reports.views import (
    BASELINE,
    curves,
    interval,
    layer_means,
    level,
    present,
    quantities,
    shown,
    signed,
    verdict,
    words,
)


class Grid(NamedTuple):
    """A table: a heading, a remark that says how to read it, column names and rows of text."""

    heading: str
    remark: str
    columns: list[str]
    rows: list[list[str]]


Row = dict[str, Any]
Column = Callable[[Row], str]


def _grid(
    heading: str, remark: str, rows: Sequence[Row], columns: dict[str, Column], used: set[str]
) -> Grid:
    """The named columns that are not empty, then every other field of the rows."""
    every = dict(columns)
    for key in dict.fromkeys(key for row in rows for key in row if key not in used):
        every[words(key)] = _field(key)
    cells = {name: [column(row) for row in rows] for name, column in every.items()}
    kept = {name: cell for name, cell in cells.items() if any(c not in ("–", "") for c in cell)}
    return Grid(heading, remark, list(kept), [list(row) for row in zip(*kept.values())])


def _field(key: str) -> Column:
    return lambda row: shown(row.get(key))


def _stated(rows: Sequence[Row]) -> str:
    """The intervals' confidence, where the record states one."""
    found = level(rows)
    return f"; {found}" if found != "intervals" else ""


def cost_grid(rows: Sequence[Row]) -> Grid:
    """What every pattern costs, with its interval and what that interval says."""
    unit = rows[0]["unit"]
    return _grid(
        f"Cost, {unit}",
        "the mean rise of the negative log-likelihood on text against the untempered model; "
        "negative is a gain" + _stated(rows),
        rows,
        {
            "pattern": lambda row: row["label"],
            "cost": lambda row: signed(row["cost"]),
            "s.e.": lambda row: shown(row.get("se"), 2),
            "interval": interval,
            "reading": verdict,
            "KL": lambda row: shown(row.get("kl")),
            "KL s.e.": lambda row: shown(row.get("kl_se"), 2),
            "n": lambda row: shown(row.get("n")),
        },
        {"label", "cost", "se", "low", "high", "kl", "kl_se", "n", "unit", "level"},
    )


def depth_grid(rows: Sequence[Row]) -> Grid:
    """One way to lay a pattern over depth a row, beside its own control."""
    return _grid(
        f"Depth, {rows[0]['unit']}",
        "cost of each case, of the same values in other orders (shuffled), and the difference; "
        "intervals are over chunks, not over orders: more shuffles tell more" + _stated(rows),
        rows,
        {
            "case": lambda row: row["label"],
            "layers": lambda row: f"{row['first']}-{row['last']}",
            "layers a stage": lambda row: shown(row["layers_a_stage"]),
            "cost": lambda row: signed(row["cost"]),
            "interval": interval,
            "shuffled": lambda row: signed(row["shuffled"]),
            "difference": lambda row: signed(row.get("difference")),
            "its interval": lambda row: interval(row, "difference_low", "difference_high"),
            "spread": lambda row: shown(row.get("spread")),
            "n": lambda row: shown(row.get("n")),
        },
        {"label", "family", "place", "cycles", "first", "last", "layers", "layers_a_stage", "cost",
         "se", "low", "high", "n", "unit", "level", "shuffled", "difference", "difference_low",
         "difference_high", "spread", "spread_low", "spread_high"},
    )  # fmt: skip


def trials_grid(rows: Sequence[Row]) -> Grid:
    """The policies that a search tried, best first, and the untuned one."""

    def rank(row: Row) -> tuple[bool, float]:
        found = present([row["score"]])
        return bool(row.get("left")), -found[0] if found else math.inf

    return _grid(
        "Trials",
        "share of right samples over the tasks of the search; trial 0 is untuned; left: clearly "
        "below the best before its last task, so that the score is an estimate",
        sorted(rows, key=rank),
        {
            "trial": lambda row: f"{row['trial']}{' chosen' if row.get('chosen') else ''}",
            "score": lambda row: shown(row["score"]),
            "policy": lambda row: row["policy"],
            "tasks": lambda row: shown(row.get("tasks")),
            "left": lambda row: shown(row.get("left")),
        },
        {"trial", "policy", "score", "tasks", "left", "chosen"},
    )


def repair_grid(rows: Sequence[Row]) -> Grid:
    """What compression took on each test, and what came back under each set of temperatures."""
    return _grid(
        "Repair, nats per token",
        "lost: by compression; share: of it that came back; agreement: with the reference's "
        "likeliest next token, before and after" + _stated(rows),
        rows,
        {
            "test": lambda row: row["test"],
            "temperatures": lambda row: row["label"],
            "reference": lambda row: shown(row.get("reference")),
            "compressed": lambda row: shown(row["compressed"]),
            "repaired": lambda row: shown(row["repaired"]),
            "lost": lambda row: signed(row.get("damage")),
            "returned": lambda row: signed(row.get("returned")),
            "its interval": lambda row: interval(row, "returned_low", "returned_high"),
            "share": lambda row: shown(row.get("share")),
            "interval": interval,
            "agreement": lambda row: (
                f"{shown(row.get('agreement_before'))} to {shown(row.get('agreement_after'))}"
            ),
            "n": lambda row: shown(row.get("n")),
        },
        {"label", "test", "kind", "reference", "compressed", "repaired", "damage", "returned",
         "returned_low", "returned_high", "share", "low", "high", "agreement_before",
         "agreement_after", "n", "level"},
    )  # fmt: skip


def _span(row: Row, low: str = "low", high: str = "high") -> str:
    if row.get(low) is None or row.get(high) is None:
        return "–"
    return f"{shown(row[low])} to {shown(row[high])}"


def benefit_grid(rows: Sequence[Row]) -> Grid:
    """What every pattern buys, one row a metric and pattern."""
    return _grid(
        "Benefit",
        "what the samples gain under each pattern" + _stated(rows),
        rows,
        {
            "metric": lambda row: words(row["metric"]),
            "pattern": lambda row: row["label"],
            "value": lambda row: shown(row["value"]),
            "interval": _span,
            "n": lambda row: shown(row.get("n")),
            "k": lambda row: shown(row.get("k")),
        },
        {"metric", "label", "value", "low", "high", "n", "k", "level"},
    )


def frontier_grid(points: Sequence[Row]) -> Grid:
    """The points of the frontier, numbered as in its figure."""
    numbered = [{"number": i, **point} for i, point in enumerate(points, 1)]
    return _grid(
        "Frontier",
        "benefit against cost; a pattern is worth something above and left of plain sampling "
        "temperature",
        numbered,
        {
            "": lambda row: str(row["number"]),
            "label": lambda row: row["label"],
            "family": lambda row: row["family"],
            "cost": lambda row: signed(row["cost"]),
            "cost s.e.": lambda row: shown(row.get("cost_se"), 2),
            "benefit": lambda row: shown(row["benefit"]),
            "interval": lambda row: _span(row, "benefit_low", "benefit_high"),
            "metric": lambda row: words(row.get("metric", "")),
        },
        {
            "number",
            "label",
            "family",
            "cost",
            "cost_se",
            "benefit",
            "benefit_low",
            "benefit_high",
            "metric",
        },
    )


def metrics_grid(rows: Sequence[Row]) -> Grid:
    """Calibration metrics before and after."""
    return _grid(
        "Calibration",
        "each metric before and after; the interval is of the value after",
        rows,
        {
            "metric": lambda row: words(row["metric"]),
            "before": lambda row: shown(row["before"], 4),
            "after": lambda row: shown(row.get("after"), 4),
            "interval": _span,
        },
        {"metric", "before", "after", "low", "high"},
    )


def history_grid(rows: Sequence[Row], most: int | None = None) -> Grid:
    """The training history; at most `most` rows, evenly spaced, the last one always there."""
    kept = list(rows)
    if most is not None and len(rows) > most:
        kept = [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]
    remark = "" if len(kept) == len(rows) else f"{len(kept)} of {len(rows)} steps"
    return _grid("Training", remark, kept, {}, set())


def trade_off_grid(rows: Sequence[Row]) -> Grid:
    """Objective against cost, the chosen point marked."""
    return _grid("Trade-off", "objective against cost on other text", rows, {}, set())


def support_grid(support: dict[str, Any], quantity: str = "support") -> Grid:
    """One quantity by layer: a row a layer, a column a pattern, means over heads."""
    measured = quantities(support)[quantity]
    columns = curves(quantity, measured)
    unit = measured.get("unit")
    names = support["layers"]
    # Names that differ by the layer's number only are left out: the number stands beside them.
    only_numbers = len({name.replace(str(i), "", 1) for i, name in enumerate(names)}) == 1
    rows = [
        [
            str(i),
            *([] if only_numbers else [name]),
            *(shown(values[i]) for values in columns.values()),
        ]
        for i, name in enumerate(names)
    ]
    heading = f"{words(quantity).capitalize()} by layer{f', {unit}' if unit else ''}"
    remark = "mean over heads" + (", in logs" if "support" in quantity else "")
    return Grid(heading, remark, ["layer", *([] if only_numbers else ["name"]), *columns], rows)


def positions_grid(support: dict[str, Any], quantity: str = "support") -> Grid:
    """One quantity by layer and part of the text, means over heads; a block a pattern."""
    parts = support["positions"]
    measured = parts["quantities"][quantity]
    rows = []
    for label, cube in {BASELINE: measured["before"], **measured["after"]}.items():
        columns = [
            layer_means([row and [cell and cell[i] for cell in row] for row in cube], quantity)
            for i in range(len(parts["edges"]))
        ]
        for i, values in enumerate(zip(*columns)):
            rows.append([*([label] if measured["after"] else []), str(i), *map(shown, values)])
    unit = f", {measured['unit']}" if measured.get("unit") else ""
    heading = f"{words(quantity).capitalize()} by layer and position{unit}"
    first = ["pattern", "layer"] if measured["after"] else ["layer"]
    return Grid(heading, "queries at these positions, mean over heads", [
        *first, *(f"{low}-{high}" for low, high in parts["edges"])
    ], rows)  # fmt: skip


def workers_grid(stages: Sequence[Row]) -> Grid:
    """One row a worker, as narrow as a terminal: where it ran, how hot, and what went wrong."""
    full = stages_grid(stages)
    known = {*full.columns, "T"}
    columns = [name for name in "stage round worker T error".split() if name in known]
    rows = []
    for row in full.rows:
        cells = dict(zip(full.columns, row))
        asked, sent = (cells.get(name, "–") for name in ("T asked", "T sent"))
        cells["T"] = asked if asked == sent else f"{asked}, sent {sent}"
        rows.append([cells[name] for name in columns])
    return Grid(full.heading, "T: asked for, and sent where that differs", columns, rows)


def stages_grid(stages: Sequence[Row]) -> Grid:
    """One row a worker: what was asked, what was sent, what came back."""
    rows = [
        {"stage": stage["stage"], "round": stage.get("round"), "worker": i, **worker}
        for stage in stages
        for i, worker in enumerate(stage["workers"], 1)
    ]
    return _grid(
        "Stages",
        "temperature asked for, and temperature that was sent",
        rows,
        {
            "stage": lambda row: row["stage"],
            "round": lambda row: shown(row["round"]),
            "worker": lambda row: str(row["worker"]),
            "T asked": lambda row: shown(row.get("temperature_asked")),
            "T sent": lambda row: shown(row.get("temperature_sent")),
            "seed": lambda row: shown(row.get("seed")),
            "tokens in": lambda row: shown(row.get("tokens_in")),
            "tokens out": lambda row: shown(row.get("tokens_out")),
            "error": lambda row: shown(row.get("error")),
        },
        {"stage", "round", "worker", "prompt", "output", "temperature_asked", "temperature_sent",
         "seed", "tokens_in", "tokens_out", "error"},
    )  # fmt: skip


def pairs_grid(heading: str, values: dict[str, Any]) -> Grid:
    """A name and its value a row."""
    rows = [[words(name), shown(value, 6)] for name, value in values.items()]
    return Grid(heading, "", ["", ""], rows)


def other_grids(record: Record) -> list[Grid]:
    """A table for every section without a renderer of its own: nothing recorded is left out."""
    grids = []
    for name, value in record.results.items():
        if name in SECTIONS:
            continue
        heading = words(name).capitalize()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            grids.append(_grid(heading, "", value, {}, set()))
        elif isinstance(value, dict):
            grids.append(pairs_grid(heading, value))
        else:
            grids.append(pairs_grid(heading, {name: value}))
    return grids


def details_grid(record: Record) -> Grid:
    """How the run was made: model, seed, settings, machine and versions."""
    model = {
        f"model {name}" if name != "name" else "model": v
        for name, v in (record.model or {}).items()
    }
    return pairs_grid(
        "The run",
        {
            "command": record.kind,
            "made": record.created,
            "seed": record.seed,
            **model,
            **record.settings,
            **record.machine,
            "versions": record.versions,
        },
    )
