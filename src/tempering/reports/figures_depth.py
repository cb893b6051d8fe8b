"""Figures over depth: the pattern, and the support of every layer and head under it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import geometric_mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tempering.errors import DataError
from tempering.reports.axes import (
    LEGEND_ROW,
    bounds,
    depth_axis,
    handle,
    heatmap,
    legend,
    log_axis,
    log_bounds,
    log_range,
    log_ticks,
    new,
    section,
    styled,
    title,
)
from tempering.reports.record import Record
from tempering.reports.style import COLD, HOT, INK, LINE, series
from tempering.reports.views import (
    BASELINE,
    Number,
    curves,
    is_support,
    order,
    present,
    quantities,
    words,
)

Matrix = list[list[Number] | None]

_UNTEMPERED: dict[str, Any] = {"color": INK, "linestyle": "-", "linewidth": 2.0}


@styled
def figure_pattern(record: Record) -> Figure:
    """Temperature over depth, one curve a pattern, on a log scale around the model's own T = 1.

    Temperatures per head are drawn as their geometric mean with a band from lowest to highest;
    the limits 0 and infinity as triangles at the edge.
    """
    rows = section(record, "pattern")
    position = order(record.results)
    every = [cell for row in rows for layer in row["temperature"] for cell in _cells(layer)]
    low, high = log_range([*every, 1.0])
    reach = max(high, 1 / low, 1.02) ** 1.12
    figure = new(215 + LEGEND_ROW * len(rows))
    ax = figure.add_subplot()
    depth = max(len(row["temperature"]) for row in rows)
    ax.axhspan(1, reach, color=HOT, alpha=0.07, linewidth=0)
    ax.axhspan(1 / reach, 1, color=COLD, alpha=0.07, linewidth=0)
    handles = []
    for row in rows:
        style = series(position[row["label"]]) if row["label"] in position else _UNTEMPERED
        _one_pattern(ax, row["temperature"], style)
        handles.append(handle(**style))
    log_axis(ax, 1 / reach, reach, _around_one(reach))
    ax.grid(axis="y")
    depth_axis(ax, depth)
    title(ax, "temperature T relative to the model's own", "log scale · warm: hotter, blue: colder")
    legend(figure, handles, [row["label"] for row in rows])
    return figure


def _cells(layer: Any) -> list[Number]:
    return layer if isinstance(layer, list) else [layer]


def _one_pattern(ax: Axes, temperature: list[Any], style: dict[str, Any]) -> None:
    middle, lowest, highest = [], [], []
    for x, layer in enumerate(temperature):
        values = present(_cells(layer))
        if math.inf in values:
            _edge(ax, x, 1.0, "^", style)
        if 0.0 in values:
            _edge(ax, x, 0.0, "v", style)
        drawable = [v for v in values if 0 < v < math.inf]
        middle.append(geometric_mean(drawable) if drawable else math.nan)
        lowest.append(min(drawable, default=math.nan))
        highest.append(max(drawable, default=math.nan))
    if any(high > low for low, high in zip(lowest, highest)):
        ax.fill_between(
            range(len(middle)), lowest, highest, color=style["color"], alpha=0.18, linewidth=0
        )
    ax.plot(range(len(middle)), middle, **{"markersize": 3.2, **style})


def _edge(ax: Axes, x: int, y: float, marker: str, style: dict[str, Any]) -> None:
    """A triangle at the edge for 0 or infinity, which a log axis can't show."""
    transform = ax.get_xaxis_transform()
    ax.plot([x], [y], marker=marker, color=style["color"], transform=transform, clip_on=False)


def figure_pattern_heatmap(record: Record, label: str) -> Figure:
    """Temperature of every layer and head of one pattern; blue below 1, warm above.

    All patterns of a record share one colour scale.
    """
    rows = {
        row["label"]: [_cells(layer) for layer in row["temperature"]]
        for row in section(record, "pattern")
    }
    if label not in rows:
        raise DataError(f"no pattern is named '{label}'; this record has {', '.join(rows)}")
    reach = _reach(rows.values())
    return heatmap(
        rows[label], log_bounds(1 / reach, reach), _around_one(reach),
        heading=label, below="temperature T of every layer and head",
    )  # fmt: skip


def _around_one(reach: float) -> list[float]:
    """Ticks of a log scale from 1 / reach to reach, at 1 and on both sides of it."""
    below = [tick for tick in log_ticks(1 / reach, 1.0) if tick < 1][:2] or [1 / reach]
    above = [tick for tick in log_ticks(1.0, reach) if tick > 1][-2:] or [reach]
    return [*below, 1.0, *above]


def _reach(matrices: Iterable[list[list[Number]]]) -> float:
    """The greatest factor by which a number differs from 1, up or down."""
    low, high = log_range([cell for matrix in matrices for row in matrix for cell in row])
    return max(high, 1 / low, 1.01)


def _measured(record: Record, quantity: str) -> dict[str, Any]:
    found = quantities(section(record, "support"))
    if quantity not in found:
        raise DataError(f"'{quantity}' was not measured; this record has {', '.join(found)}")
    return found[quantity]


def _matrix(record: Record, quantity: str, label: str) -> Matrix:
    measured = _measured(record, quantity)
    if label not in measured["after"]:
        known = ", ".join(measured["after"]) or "none but the untempered model"
        raise DataError(f"'{quantity}' was not measured under '{label}'; measured are {known}")
    return measured["after"][label]


def figure_support_heatmap(
    record: Record, label: str | None = None, *, quantity: str = "support"
) -> Figure:
    """Support (or another measured quantity) of every layer and head.

    label: the pattern, or None for the untempered model. All labels share one colour scale, so
    that pictures can be laid side by side; supports are on a log scale.
    """
    measured = _measured(record, quantity)
    matrix = measured["before"] if label is None else _matrix(record, quantity, label)
    every = [measured["before"], *measured["after"].values()]
    values = [cell for m in every for row in m for cell in row or ()]
    scale = "log scale" if is_support(quantity) else "linear scale"
    if is_support(quantity):
        low, high = log_range(values)
        edges, ticks = log_bounds(low, high), log_ticks(low, high)
    else:
        found = [v for v in present(values) if math.isfinite(v)] or [0.0, 1.0]
        low, high = min(found), max(found)
        high = high if high > low else low + 1.0
        edges = bounds(low, high)
        ticks = [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]
    unit = measured.get("unit")
    below = f"{words(quantity)}{f', {unit}' if unit else ''} · {scale}"
    return heatmap(matrix, edges, ticks, heading=label or BASELINE, below=below)


def figure_support_change(record: Record, label: str) -> Figure:
    """By what factor a pattern made the support of every layer and head grow (warm) or shrink.

    All patterns of a record share one colour scale.
    """
    support = _measured(record, "support")
    ratio = _ratio(_matrix(record, "support", label), support["before"])
    reach = _reach(_ratio(after, support["before"]) for after in support["after"].values())
    return heatmap(
        ratio, log_bounds(1 / reach, reach), _around_one(reach),
        heading=label, below="support, as a multiple of the untempered",
    )  # fmt: skip


def _ratio(after: Matrix, before: Matrix) -> list[list[Number]]:
    return [
        [
            a / b if a is not None and b is not None and b > 0 else None
            for a, b in zip(row_after or (), row_before or ())
        ]
        for row_after, row_before in zip(after, before)
    ]


@styled
def figure_support_by_layer(record: Record, *, quantity: str = "support") -> Figure:
    """The mean over heads by layer: one curve a pattern beside the untempered model."""
    measured = _measured(record, quantity)
    position = order(record.results)
    lines = curves(quantity, measured)
    figure = new(215 + LEGEND_ROW * len(lines))
    ax = figure.add_subplot()
    handles = []
    for label, values in lines.items():
        style = _UNTEMPERED if label == BASELINE else series(position[label])
        heights = [math.nan if v is None else v for v in values]
        ax.plot(range(len(heights)), heights, **{"markersize": 3.2, **style})
        handles.append(handle(**style))
    scale = ""
    if is_support(quantity):
        low, high = log_range([v for values in lines.values() for v in values])
        log_axis(ax, low / 1.15, high * 1.15, log_ticks(low / 1.15, high * 1.15))
        scale = " · log scale"
    ax.grid(axis="y", color=LINE)
    depth_axis(ax, len(measured["before"]))
    unit = measured.get("unit")
    title(ax, f"{words(quantity)} by layer", f"mean over heads{f', {unit}' if unit else ''}{scale}")
    legend(figure, handles, list(lines))
    return figure
