"""A record as rich tables on a terminal, and as plain columns elsewhere."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tempering.reports import grids
from tempering.reports.grids import Grid
from tempering.reports.record import Record
from tempering.reports.views import (
    Number,
    curves,
    is_support,
    numeric,
    order,
    present,
    quantities,
    shown,
    words,
)

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = "_.-~=+*#"
_FEW = 4  # patterns in the table by layer: more columns don't fit into 80 characters
_ENDLESS = 10_000  # width in characters where there is no terminal, so that nothing is folded
_PLAIN = str.maketrans(
    {"−": "-", "–": "-", "∞": "inf", "…": "..."}
)  # the signs of tables, in ASCII
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_record(record: Record, console: Console | None = None) -> None:
    """Print the results of a record: generations, support, cost and benefit with intervals.

    console: where to; standard output without one. Where that is not a terminal, columns are plain,
    without colours, and as wide as they need to be. On a terminal that is too narrow for the
    patterns' names, tables show letters, and a key comes first.
    """
    console = console or Console()
    if record.results.get("generations"):
        _generations(record, console)
    if record.results.get("stages"):
        _answers(record, console)
    tables = _tables(record, console)
    wide = [not _fits(grid, console) for grid in tables]
    keys = _letters(record) if any(wide) else {}
    if keys:
        rows = [[letter, label] for label, letter in keys.items()]
        print_grid(Grid("Patterns", "", ["", ""], rows), console)
    for grid, too_wide in zip(tables, wide):
        print_grid(_abbreviated(grid, keys) if too_wide else grid, console)


def _abbreviated(grid: Grid, keys: dict[str, str]) -> Grid:
    columns = [keys.get(name, name) for name in grid.columns]
    return grid._replace(columns=columns, rows=[[keys.get(c, c) for c in row] for row in grid.rows])


def _tables(record: Record, console: Console) -> list[Grid]:
    """The tables of a record in reading order."""
    results = record.results
    tables = _support(results["support"], console) if results.get("support") else []
    made = {
        "cost": grids.cost_grid,
        "benefit": grids.benefit_grid,
        "frontier": grids.frontier_grid,
        "depth": grids.depth_grid,
        "repair": grids.repair_grid,
        "trials": grids.trials_grid,
        "stages": grids.workers_grid,
    }
    tables += [make(results[name]) for name, make in made.items() if results.get(name)]
    if metrics := results.get("reliability", {}).get("metrics"):
        tables.append(grids.metrics_grid(metrics))
    training = results.get("training", {})
    if training.get("history"):
        tables.append(grids.history_grid(training["history"], most=12))
    if training.get("trade_off"):
        tables.append(grids.trade_off_grid(training["trade_off"]))
    return [*tables, *grids.other_grids(record)]


def _letters(record: Record) -> dict[str, str]:
    """Pattern -> letter, A for the first."""
    return {label: _letter(i) for label, i in order(record.results).items()}


def _letter(i: int) -> str:
    return chr(65 + i) if i < 26 else _letter(i // 26 - 1) + chr(65 + i % 26)


def sparkline(values: Sequence[Number], *, log: bool = False, utf: bool = True) -> str:
    """One character a value, between the lowest and the highest of them; a blank for none."""
    bars = _BARS if utf else _ASCII_BARS
    heights = [_height(value, log) for value in values]
    found = [h for h in heights if h is not None]
    if not found:
        return " " * len(values)
    low, span = min(found), max(found) - min(found)
    return "".join(
        " " if h is None else bars[min(7, int((h - low) / span * 8)) if span else 3]
        for h in heights
    )


def _height(value: Number, log: bool) -> float | None:
    if not present([value]) or value is None or math.isinf(value) or (log and value <= 0):
        return None
    return math.log(value) if log else float(value)


def print_grid(grid: Grid, console: Console) -> None:
    """Print one table, all of it: where it is too wide for the terminal, text is folded."""
    if grid.heading:
        console.print(_safe(grid.heading, console), style="bold")
    table = _table(grid, console, rigid=True)
    if not console.is_terminal:
        lines = console.render_lines(table, console.options.update_width(_ENDLESS), pad=False)
        text = "\n".join("".join(part.text for part in line).rstrip() for line in lines)
        console.print(Text(text), soft_wrap=True)
    elif _wide(console, table).minimum > console.width:
        console.print(_table(grid, console, rigid=False))
    else:
        console.print(table)
    if grid.remark:
        console.print(_safe(grid.remark, console), style="dim", soft_wrap=not console.is_terminal)
    console.print()


def _wide(console: Console, table: Table) -> Measurement:
    """The least width of a table, and the width that it has unfolded."""
    return console.measure(table, options=console.options.update(max_width=_ENDLESS))


def _fits(grid: Grid, console: Console) -> bool:
    """Whether a table fits without folding; always true where there is no terminal."""
    if not console.is_terminal:
        return True
    return _wide(console, _table(grid, console, rigid=True)).maximum <= console.width


def _table(grid: Grid, console: Console, *, rigid: bool) -> Table:
    """The rich table; rigid: numbers and sparklines stay in one piece."""
    table = Table(show_header=any(grid.columns), box=None, pad_edge=False, header_style="dim")
    for i, name in enumerate(grid.columns):
        cells = [row[i] for row in grid.rows]
        right = all(map(numeric, cells))
        whole = right or any(set(cell) <= {*_BARS, *_ASCII_BARS, " "} for cell in cells)
        table.add_column(
            _safe(name, console),
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=rigid and whole,
        )
    for row in grid.rows:
        table.add_row(*(_safe(cell, console) for cell in row))
    return table


def _safe(text: str, console: Console) -> Text:
    """Text that can't steer the terminal: no markup, no escape codes, nothing it can't encode."""
    if not _utf(console):
        text = text.translate(_PLAIN)
    text = _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", text)
    return Text(text.encode(console.encoding, "backslashreplace").decode(console.encoding))


def _utf(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _generations(record: Record, console: Console) -> None:
    """The samples side by side where the terminal is wide enough, below each other elsewhere."""
    generations = record.results["generations"]
    samples = generations["samples"]
    endless = not console.is_terminal
    prompt = _safe(generations["prompt"], console)
    console.print(Text("prompt ", style="dim").append_text(prompt), soft_wrap=endless)
    if console.is_terminal and console.width >= 36 * len(samples) > 0:
        table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2, 0, 0))
        for sample in samples:
            table.add_column(_safe(sample["label"], console), ratio=1, overflow="fold")
        table.add_row(*(_safe(sample["text"], console) for sample in samples))
        console.print(table)
    else:
        for sample in samples:
            console.print(_safe(f"--- {sample['label']}", console), style="bold", soft_wrap=endless)
            console.print(_safe(sample["text"], console), soft_wrap=endless)
    console.print()


def _support(section: dict[str, Any], console: Console) -> list[Grid]:
    """A sparkline over depth a pattern, and every layer's number where the columns are few."""
    tables = []
    for name, measured in quantities(section).items():
        rows = []
        for label, values in curves(name, measured).items():
            line = sparkline(values, log=is_support(name), utf=_utf(console))
            ends = [shown(values[i]) if values else "–" for i in (0, -1)]
            found = present(values)
            extremes = [shown(f(found)) if found else "–" for f in (min, max)]
            rows.append([label, line, *ends, *extremes])
        columns = ["pattern", "layers", "first", "last", "lowest", "highest"]
        tables.append(Grid(f"{words(name).capitalize()} over depth", "", columns, rows))
    if len(section["after"]) <= _FEW:
        tables.append(grids.support_grid(section))
    if "support" in section.get("positions", {"quantities": {}})["quantities"]:
        tables.append(grids.positions_grid(section))
    return tables


def _answers(record: Record, console: Console) -> None:
    """What the last stage wrote, worker by worker."""
    for worker in record.results["stages"][-1]["workers"]:
        if worker["output"] is not None:
            console.print(_safe(worker["output"], console), soft_wrap=not console.is_terminal)
            console.print()
