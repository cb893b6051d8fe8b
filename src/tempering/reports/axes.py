"""Shared by the figures: a page-wide figure, a legend, log ticks, a heatmap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, NullLocator

from tempering.errors import DataError
from tempering.reports.record import Record
from tempering.reports.style import HEAT, INK, LIGHT, QUIET, RC, STEPS, WIDTH
from tempering.reports.views import Number, present, shorten, shown

LEGEND_ROW = 15.5  # height of a line of the legend, in points: 10.5 of text, and its spacing


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Run a figure function under this package's settings, without changing matplotlib's."""

    @wraps(draw)
    def run(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return run


def section(record: Record, name: str) -> Any:
    """A section of the record's results; DataError when this run has none."""
    if not record.results.get(name):
        has = ", ".join(record.results) or "no sections"
        raise DataError(f"this {record.kind} record has no '{name}' to draw; it has {has}")
    return record.results[name]


def new(height: float | int) -> Figure:
    """An empty figure as wide as a phone's page; height in points."""
    figure = Figure(figsize=(WIDTH, height / 72))
    figure.set_layout_engine("constrained", h_pad=6 / 72)
    return figure


def legend(figure: Figure, handles: Sequence[Line2D], labels: Sequence[str]) -> None:
    """A legend under the axes, one entry a line; long labels are cut in the middle."""
    # matplotlib drops labels that start with "_", so the texts are set afterwards.
    box = figure.legend(handles, ["x"] * len(labels), loc="outside lower left", borderaxespad=0.2)
    for text, label in zip(box.get_texts(), labels):
        text.set_text(shorten(label, 44))


def handle(**style: Any) -> Line2D:
    """A legend's sample of a line."""
    return Line2D([], [], **style)


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a log axis over [low, high]: 1-2-5 where three fit, else evenly spaced."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**k for k in decades for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    if len(ticks) > 7:
        ticks = [t for t in ticks if t in {10.0**k for k in decades}]
    if len(ticks) >= 3:
        return ticks
    return [float(t) for t in MaxNLocator(4).tick_values(low, high) if low <= t <= high]


def log_axis(ax: Axes, low: float, high: float, ticks: Sequence[float]) -> None:
    """Make the y axis a log axis over [low, high] with these ticks and no others."""
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_yticks(ticks, [shown(float(tick)) for tick in ticks])


def depth_axis(ax: Axes, layers: int) -> None:
    """The x axis of everything drawn over depth."""
    ax.set_xlim(-0.6, layers - 0.4)
    ax.set_xlabel("layer")
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True))


def title(ax: Axes, text: str, below: str = "") -> None:
    """A title at the left edge of the axes; `below` is a second, quiet line."""
    if below:
        ax.set_title(shorten(text, 44), color=INK, pad=20)
        ax.annotate(
            shorten(below, 56), (0, 1), xytext=(0, 6), xycoords="axes fraction",
            textcoords="offset points", color=QUIET, fontsize=10.5,
        )  # fmt: skip
    else:
        ax.set_title(shorten(text, 44), color=INK, pad=8)


def log_range(values: Iterable[Number]) -> tuple[float, float]:
    """Ends of a log scale that holds every positive finite value; never empty."""
    found = [v for v in present(values) if 0 < v < math.inf]
    if not found:
        return 0.5, 2.0
    low, high = min(found), max(found)
    return (low, high) if high > low * 1.001 else (low / 1.1, high * 1.1)


def log_bounds(low: float, high: float) -> list[float]:
    """The 22 edges of the heat scale's 21 steps, evenly spaced in logs."""
    return [low * (high / low) ** (i / STEPS) for i in range(STEPS + 1)]


def bounds(low: float, high: float) -> list[float]:
    """The 22 edges of the heat scale's 21 steps, evenly spaced."""
    return [low + (high - low) * i / STEPS for i in range(STEPS + 1)]


@styled
def heatmap(
    matrix: Sequence[Sequence[Number] | None],
    edges: Sequence[float],
    ticks: Sequence[float],
    *,
    heading: str,
    below: str,
) -> Figure:
    """Layers across, heads down, colour from cold blue (low) to warm (high).

    edges: of the colour steps. Cells that were not measured stay empty; 0 and infinity have
    the colours of the ends.
    """
    heads = max((len(row) for row in matrix if row), default=1)
    figure = new(min(420, 112 + max(60, 350 / max(len(matrix), 12) * heads)))
    ax = figure.add_subplot()
    norm = BoundaryNorm(edges, STEPS)
    squares: dict[int, list[tuple[int, int]]] = {}
    for layer, row in enumerate(matrix):
        for head, value in enumerate(row or ()):
            if present([value]):
                step = int(norm(min(max(value or 0.0, edges[0]), edges[-1] * (1 - 1e-12))))
                squares.setdefault(min(max(step, 0), STEPS - 1), []).append((layer, head))
    for step, places in sorted(squares.items()):
        # One shape for each colour: it takes a tenth of the bytes of one shape for each cell.
        ax.add_patch(PathPatch(_squares(places), color=LIGHT[f"h{step}"], linewidth=0.3))
    ax.set_ylim(heads - 0.5, -0.5)
    depth_axis(ax, len(matrix))
    ax.set_xlim(-0.5, len(matrix) - 0.5)
    ax.set_ylabel("head")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    ax.spines[:].set_visible(False)
    title(ax, heading, below)
    drawn = ScalarMappable(norm, HEAT)
    bar = figure.colorbar(drawn, ax=ax, location="bottom", aspect=40, pad=0.04)
    bar.outline.set_visible(False)
    bar.set_ticks(list(ticks), labels=[shown(float(t)) for t in ticks])
    bar.ax.minorticks_off()
    return figure


def _squares(places: Sequence[tuple[int, int]]) -> Path:
    """Unit squares around whole-numbered centres, as one shape."""
    corners = ((-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5), (-0.5, -0.5))
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    vertices = [(x + dx, y + dy) for x, y in places for dx, dy in corners]
    return Path(vertices, codes * len(places))
