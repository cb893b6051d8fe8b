"""Figures of studies: of depth (cost and benefit over cycles and parts of the stack), of trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from tempering.reports.axes import (
    LEGEND_ROW,
    handle,
    legend,
    log_ticks,
    new,
    section,
    styled,
    title,
)
from tempering.reports.record import Record
from tempering.reports.style import INK, QUIET, series
from tempering.reports.views import level, present, shown, whisker

_CONTROL: dict[str, Any] = {
    "color": QUIET, "marker": "o", "linestyle": ":", "markerfacecolor": "none",
}  # fmt: skip
_HEIGHT = 190


@styled
def figure_depth(record: Record) -> Figure:
    """Cost against cycles over depth and against the layers of a sub-stack; spread, if sampled.

    Each pattern stands beside the same values in another order; bars are its intervals.
    """
    rows = section(record, "depth")
    cycles = [row for row in rows if row["family"] == "cycles"]
    parts = [row for row in rows if row["family"] == "sub-stack"]
    places = list(dict.fromkeys(row["place"] for row in parts))
    sampled = any(row.get("spread") is not None for row in rows)
    panels = (2 if parts else 1) * (2 if sampled else 1)
    figure = new(_HEIGHT * panels + LEGEND_ROW * (2 + len(places)))
    axes = iter(figure.subplots(panels, 1, squeeze=False)[:, 0])
    values = ["cost", "spread"] if sampled else ["cost"]
    for value in values:
        ax = next(axes)
        _line(ax, cycles, "cycles", value, series(0))
        if value == "cost":
            _line(ax, cycles, "cycles", "shuffled", _CONTROL)
        _finish(ax, "cycles over the whole depth", value, rows)
    for value in values if parts else ():
        ax = next(axes)
        for i, place in enumerate(places):
            own = [row for row in parts if row["place"] == place]
            _line(ax, own, "layers", value, series(i + 1))
        if value == "cost":
            for place in places:
                own = [row for row in parts if row["place"] == place]
                _line(ax, own, "layers", "shuffled", {**_CONTROL, "linewidth": 0.8})
        _finish(ax, "layers that the pattern runs over", value, rows)
    handles = [handle(**series(0)), handle(**_CONTROL)]
    handles += [handle(**series(i + 1)) for i in range(len(places))]
    labels = ["the pattern, over all layers", "the same values in another order"]
    legend(figure, handles, [*labels, *(f"the pattern, {place} layers" for place in places)])
    return figure


def _line(
    ax: Axes, rows: Sequence[dict[str, Any]], x: str, value: str, style: dict[str, Any]
) -> None:
    spots = [(row[x], row[value]) for row in rows if row.get(value) is not None]
    ax.plot([a for a, _ in spots], [b for _, b in spots], **{"markersize": 4.5, **style})
    prefix = {"cost": "", "spread": "spread_"}.get(value)
    for row in rows if prefix is not None else ():
        ends = {key: row.get(f"{prefix}{key}") for key in ("low", "high")}
        bar = whisker({**ends, value: row[value]}, value) if row.get(value) is not None else None
        if bar is not None:
            ax.plot([row[x], row[x]], bar, color=style["color"], alpha=0.5, linewidth=1.4)


def _finish(ax: Axes, below: str, value: str, rows: Sequence[dict[str, Any]]) -> None:
    ax.set_xlabel(below)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y")
    shown = [row[value] for row in rows if row.get(value) is not None]
    if value == "cost" and any(math.isfinite(cost) for cost in shown):
        ax.axhline(0, color=QUIET, linewidth=1)
        title(ax, f"cost, {rows[0]['unit']}", f"below 0 is a gain · bars: {level(rows)}")
    else:
        title(ax, "spread of samples", "1 - cosine between samples of a prompt")


_OF_A_TRIAL = ("trial", "policy", "score", "tasks", "left", "chosen")
_WIDE = 4.0  # a range of at least this ratio is drawn in logs


@styled
def figure_trials(record: Record) -> Figure:
    """The score of each trial against each number that was searched; the line is the untuned one.

    Hollow: left before its last task. The chosen trial stands out.
    """
    rows = section(record, "trials")
    names = [key for key in dict.fromkeys(k for row in rows for k in row) if key not in _OF_A_TRIAL]
    names = names or ["trial"]
    figure = new(165 * len(names) + LEGEND_ROW * 4)
    untuned = present([row["score"] for row in rows if row["trial"] == 0])
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        for score in untuned:
            ax.axhline(score, color=INK, linestyle=":", linewidth=1.2)
        tried = [
            row for row in rows if row["trial"] and len(present([row.get(name), row["score"]])) == 2
        ]
        for row in tried:
            ax.plot([row[name]], [row["score"]], **_dot(row))
        values = [row[name] for row in tried]
        if values and min(values) > 0 and max(values) >= _WIDE * min(values):
            ax.set_xscale("log")
            ticks = log_ticks(min(values), max(values))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(ticks, [shown(float(tick)) for tick in ticks])
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y")
        title(ax, name, "share of right samples on the tasks of the search")
    samples = [_dot({}), _dot({"left": True}), _dot({"chosen": True})]
    handles = [handle(color=INK, linestyle=":"), *(handle(**dot) for dot in samples)]
    legend(figure, handles, ["untuned", "tried on all tasks", "left early: an estimate", "chosen"])
    return figure


def _dot(row: dict[str, Any]) -> dict[str, Any]:
    """How a trial is drawn."""
    chosen, left = row.get("chosen"), row.get("left")
    colour = series(0)["color"] if chosen else QUIET
    return {
        "color": colour, "marker": "o", "linestyle": "", "markersize": 7 if chosen else 4.5,
        "markerfacecolor": "none" if left else colour, "zorder": 3 if chosen else 2,
    }  # fmt: skip
