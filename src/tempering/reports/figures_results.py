"""Figures of what a run cost and bought: intervals, frontier, reliability, training, stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tempering.agents.prompts import deal
from tempering.errors import DataError
from tempering.reports.axes import LEGEND_ROW, handle, legend, new, section, styled, title
from tempering.reports.record import Record
from tempering.reports.style import INK, LINE, QUIET, heat, series
from tempering.reports.views import done, level, order, present, shorten, whisker, words

_DOT_ROW = 36  # points a row of dots takes: the label, then the dot under it
_TRAINING_KEYS = ("loss", "held_out")


def _dots(ax: Axes, rows: Sequence[dict[str, Any]], value: str, place: dict[str, int]) -> None:
    """One row a label: the label in words, under it the value and its interval."""
    for y, row in enumerate(rows):
        colour = series(place[row["label"]])["color"] if row["label"] in place else INK
        ax.annotate(
            shorten(row["label"], 50), (0, y), xytext=(2, 7), xycoords=("axes fraction", "data"),
            textcoords="offset points", color=INK, fontsize=10.5,
        )  # fmt: skip
        ends = whisker(row, value)
        if ends is not None:
            ax.plot(ends, [y, y], color=colour, linewidth=2.2, solid_capstyle="butt")
        if row[value] is None or not math.isfinite(row[value]):
            ax.annotate("not measured", (0.5, y), xycoords=("axes fraction", "data"), color=QUIET)
        else:
            ax.plot([row[value]], [y], marker="o", markersize=6, color=colour)
    ax.set_ylim(len(rows) - 0.55, -0.75)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="x")


@styled
def figure_cost(record: Record) -> Figure:
    """Cost of every pattern in nats per token, with its interval; 0 is the untempered model."""
    rows = section(record, "cost")
    figure = new(62 + _DOT_ROW * len(rows))
    ax = figure.add_subplot()
    ax.axvline(0, color=QUIET, linewidth=1)
    _dots(ax, rows, "cost", order(record.results))
    drawn = [v for row in rows for v in (row["cost"], *(whisker(row) or ())) if v is not None]
    finite = [0.0, *(v for v in drawn if math.isfinite(v))]
    pad = 0.06 * (max(finite) - min(finite) or 1.0)
    ax.set_xlim(min(finite) - pad, max(finite) + pad)
    title(ax, f"cost, {rows[0]['unit']}", f"left of 0 is a gain · bars: {level(rows)}")
    return figure


@styled
def figure_repair(record: Record) -> Figure:
    """The share of the damage that came back, by test, with its interval; controls in grey.

    Without a reference there is no damage: then what came back, in nats per token.
    """
    rows = section(record, "repair")
    shares = any(row.get("share") is not None for row in rows)
    value, low, high = ("share", "low", "high") if shares else (
        "returned", "returned_low", "returned_high",
    )  # fmt: skip
    first = rows[0]["label"]
    drawn = []
    for row in rows:
        label = row["test"] if row["label"] == first else f"{row['test']}, {row['label']}"
        drawn.append({"label": label, value: row.get(value), "low": row.get(low),
                      "high": row.get(high)})  # fmt: skip
    figure = new(62 + _DOT_ROW * len(drawn))
    ax = figure.add_subplot()
    ax.axvline(0, color=QUIET, linewidth=1)
    colours = {row["label"]: 0 for row, own in zip(drawn, rows) if own["label"] == first}
    _dots(ax, drawn, value, colours)
    what = "share of the damage that came back" if shares else "returned, nats per token"
    title(ax, what, f"0: nothing · bars: {level(rows)}")
    return figure


@styled
def figure_benefit(record: Record) -> Figure:
    """Every benefit metric by pattern, with intervals; one panel a metric."""
    rows = section(record, "benefit")
    metrics = {row["metric"]: [r for r in rows if r["metric"] == row["metric"]] for row in rows}
    figure = new(sum(62 + _DOT_ROW * len(group) for group in metrics.values()))
    heights = [1.6 + len(group) for group in metrics.values()]
    panels = figure.subplots(len(metrics), 1, squeeze=False, height_ratios=heights)
    place = order(record.results)
    for ax, (metric, group) in zip(panels[:, 0], metrics.items()):
        _dots(ax, group, "value", place)
        title(ax, words(metric), f"bars: {level(group)}")
    return figure


_FAMILIES: dict[str, dict[str, Any]] = {
    "sampling temperature": {"color": INK, "marker": "o", "linestyle": "-"},
    "attention pattern": {**series(1), "marker": "D", "linestyle": ""},
    "control": {"color": QUIET, "marker": "o", "linestyle": "", "markerfacecolor": "none"},
}


@styled
def figure_frontier(record: Record) -> Figure:
    """Benefit against cost, numbered as in the record; plain sampling temperature is the curve.

    A pattern is worth something if it lies above and to the left of that curve.
    """
    points = section(record, "frontier")
    families = list(dict.fromkeys(point["family"] for point in points))
    figure = new(270 + LEGEND_ROW * len(families))
    ax = figure.add_subplot()
    handles = []
    for i, family in enumerate(families):
        style = _FAMILIES.get(family, {**series(i + 2), "linestyle": ""})
        group = [p for p in points if p["family"] == family and _finite(p)]
        spots = [(point["cost"], point["benefit"]) for point in group]  # a curve in recorded order
        style = {**style, "markersize": 6}
        ax.plot([x for x, _ in spots], [y for _, y in spots], **style, zorder=3)
        for point in group:
            for xs, ys in _frontier_bars(point):
                ax.plot(xs, ys, color=style["color"], alpha=0.45, linewidth=1.4, zorder=1)
        handles.append(handle(**style))
    for number, point in enumerate(points, 1):
        if not _finite(point):
            continue
        ax.annotate(
            str(number), (point["cost"], point["benefit"]), xytext=(5, 4),
            textcoords="offset points", color=INK, fontsize=10.5,
        )  # fmt: skip
    ax.grid(linewidth=0.4)
    ax.margins(0.1)
    ax.set_xlabel("cost, nats per token")
    ax.xaxis.set_major_locator(MaxNLocator(5))
    names = {point.get("metric", "benefit") for point in points}
    name = words(names.pop()) if len(names) == 1 else "benefit"
    title(ax, f"{name} against cost", "better is up and to the left")
    legend(figure, handles, families)
    return figure


def _finite(point: dict[str, Any]) -> bool:
    return math.isfinite(point["cost"]) and math.isfinite(point["benefit"])


def _frontier_bars(point: dict[str, Any]) -> list[tuple[list[float], list[float]]]:
    x, y = float(point["cost"]), float(point["benefit"])
    bars: list[tuple[list[float], list[float]]] = []
    se, low, high = point.get("cost_se"), point.get("benefit_low"), point.get("benefit_high")
    if se is not None and math.isfinite(se):
        bars.append(([x - 2 * se, x + 2 * se], [y, y]))
    if low is not None and high is not None:
        bars.append(([x, x], [float(low), float(high)]))
    return bars


@styled
def figure_reliability(record: Record) -> Figure:
    """How often predictions of each confidence come true, before and after; ideal: the diagonal."""
    reliability = section(record, "reliability")
    figure = new(320)
    ax = figure.add_subplot()
    ax.plot([0, 1], [0, 1], color=QUIET, linestyle=":", linewidth=1.2)
    handles, labels = [handle(color=QUIET, linestyle=":")], ["ideal"]
    styles: dict[str, dict[str, Any]] = {
        "before": {"color": INK, "marker": "o"},
        "after": series(0),
    }
    for name, style in styles.items():
        bins = [
            b
            for b in reliability.get(name, [])
            if b["n"] and len(present((b["confidence"], b["accuracy"]))) == 2
        ]
        if not bins:
            continue
        for b in bins:
            if b.get("low") is not None and b.get("high") is not None:
                x, colour = b["confidence"], style["color"]
                ax.plot([x, x], [b["low"], b["high"]], color=colour, alpha=0.4)
        ax.plot([b["confidence"] for b in bins], [b["accuracy"] for b in bins], **style)
        handles.append(handle(**style))
        labels.append(name)
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.grid()
    ax.set_xlabel("confidence")
    title(ax, "accuracy by confidence", "above the dotted line: too modest; below: too sure")
    legend(figure, handles, labels)
    return figure


@styled
def figure_training(record: Record) -> Figure:
    """Training and held-out loss over steps; below, objective against cost where recorded."""
    training = section(record, "training")
    history, trade_off = training["history"], training.get("trade_off", [])
    if not history:
        raise DataError("training.history is empty: there is no step to draw")
    figure = new(235 + (230 if trade_off else 0))
    panels = figure.subplots(2 if trade_off else 1, 1, squeeze=False)[:, 0]
    ax, handles, labels = panels[0], [], []
    for key, style in zip(_TRAINING_KEYS, ({"color": INK}, series(0))):
        found = [(r["step"], r[key]) for r in history if present([r.get(key)])]
        if found:
            ax.plot(*zip(*found), **{**style, "markersize": 3.2})
            handles.append(handle(**style))
            labels.append(words(key))
    ax.grid(axis="y")
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    title(ax, "loss")
    if trade_off:
        _trade_off(panels[1], trade_off)
    legend(figure, handles, labels)
    return figure


def _trade_off(ax: Axes, points: list[dict[str, Any]]) -> None:
    for point in points:
        if len(present((point["cost"], point["objective"]))) < 2:
            continue
        chosen = point.get("chosen", False)
        ax.plot(
            [point["cost"]], [point["objective"]], marker="o", markersize=7 if chosen else 5,
            color=series(0)["color"] if chosen else QUIET,
        )  # fmt: skip
        if chosen:
            ax.annotate(
                "chosen", (point["cost"], point["objective"]), xytext=(6, 5),
                textcoords="offset points", fontsize=10.5,
            )  # fmt: skip
    ax.grid()
    ax.margins(0.12)
    ax.set_xlabel("cost on other text, nats per token")
    title(ax, "objective against cost")


@styled
def figure_stages(record: Record) -> Figure:
    """The tree of a run in stages: a dot a worker, warm if it ran hot; a cross if it failed.

    A line leads from a worker to those that read what it wrote (`agents.prompts.deal`). Colours
    span the temperatures asked for in this run; workers without one are hollow.
    """
    stages = section(record, "stages")
    rows = [stage["workers"] for stage in stages]
    asked = present([w.get("temperature_asked") for workers in rows for w in workers])
    widest = max((len(workers) for workers in rows), default=1)
    figure = new(40 + min(22 * max(widest, 4), 480))
    size = min(11.0, 440 / max(widest, 1))
    ax = figure.add_subplot()
    places = [
        [(x, i - (len(workers) - 1) / 2) for i in range(len(workers))]
        for x, workers in enumerate(rows)
    ]
    lines = [
        (places[x][i], places[x + 1][j])
        for x, (here, there) in enumerate(pairwise(rows))
        for i, j in _read_by(here, there)
    ]
    ax.add_collection(LineCollection(lines, colors=LINE, linewidths=0.7, zorder=1))
    for spots, workers in zip(places, rows):
        for spot, worker in zip(spots, workers):
            _worker(ax, spot, worker, asked, size)
    # The names of up to six stages fit beside each other; with more stages their numbers are shown.
    room = 48 // len(stages)
    heads = [shorten(s["stage"], room) if room >= 8 else str(i) for i, s in enumerate(stages, 1)]
    names = [f"{head}\n{done(s)} of {s['width']}" for head, s in zip(heads, stages)]
    ax.set_xticks(range(len(stages)), names)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_xlim(-0.6, len(stages) - 0.4)
    ax.set_ylim(widest / 2 + 0.2, -widest / 2 - 0.2)
    return figure


def _read_by(
    here: Sequence[dict[str, Any]], there: Sequence[dict[str, Any]]
) -> list[tuple[int, int]]:
    """(i, j) where worker j of a stage read what worker i of the one before wrote."""
    notes = [i for i, worker in enumerate(here) if worker.get("error") is None]
    found = []
    for j, worker in enumerate(there):
        number, of = worker.get("worker"), worker.get("of")
        if isinstance(number, int) and isinstance(of, int) and 1 <= number <= of:
            found += [(i, j) for i in deal(notes, of)[number - 1]]
        else:
            found += [(i, j) for i in notes]
    return found


def _worker(
    ax: Axes, spot: tuple[int, float], worker: dict[str, Any], asked: list[float], size: float
) -> None:
    if worker.get("error") is not None:
        ax.plot(*spot, marker="X", markersize=0.8 * size, color=QUIET, linestyle="", zorder=3)
        return
    known = present([worker.get("temperature_asked")])
    span = max(asked) - min(asked) if asked else 0.0
    colour = heat((known[0] - min(asked)) / span if span else 0.5) if known else "none"
    ax.plot(
        *spot, marker="o", markersize=size, linestyle="", zorder=3,
        markerfacecolor=colour, markeredgecolor=QUIET,
    )  # fmt: skip
