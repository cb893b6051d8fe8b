"""Every figure that a record can give, by name, and how one is written to a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from tempering.errors import DataError
from tempering.files import replace_atomic
from tempering.reports.figures_depth import (
    figure_pattern,
    figure_pattern_heatmap,
    figure_support_by_layer,
    figure_support_change,
    figure_support_heatmap,
)
from tempering.reports.figures_results import (
    figure_benefit,
    figure_cost,
    figure_frontier,
    figure_reliability,
    figure_repair,
    figure_stages,
    figure_training,
)
from tempering.reports.figures_study import figure_depth, figure_trials
from tempering.reports.record import Record
from tempering.reports.style import CARD, RC

__all__ = [
    "FIGURES",
    "figure_benefit",
    "figure_cost",
    "figure_depth",
    "figure_frontier",
    "figure_pattern",
    "figure_pattern_heatmap",
    "figure_reliability",
    "figure_repair",
    "figure_stages",
    "figure_support_by_layer",
    "figure_support_change",
    "figure_support_heatmap",
    "figure_training",
    "figure_trials",
    "save_figure",
    "svg",
]

# Figures that need nothing but the record: name -> (section, function).
FIGURES: dict[str, tuple[str, Callable[[Record], Figure]]] = {
    "pattern": ("pattern", figure_pattern),
    "support-by-layer": ("support", figure_support_by_layer),
    "support-heatmap": ("support", figure_support_heatmap),
    "cost": ("cost", figure_cost),
    "benefit": ("benefit", figure_benefit),
    "frontier": ("frontier", figure_frontier),
    "reliability": ("reliability", figure_reliability),
    "training": ("training", figure_training),
    "stages": ("stages", figure_stages),
    "depth": ("depth", figure_depth),
    "repair": ("repair", figure_repair),
    "trials": ("trials", figure_trials),
}

_FORMATS = (".png", ".svg", ".pdf")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG (at 200 dpi), SVG or PDF, by the file's suffix, whole or not at all.

    Raises DataError for another suffix, OutputError when the file can't be written.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in _FORMATS:
        raise DataError(f"can't draw to {path}: name a file that ends in {', '.join(_FORMATS)}")

    def fill(temporary: Path) -> None:
        with mpl.rc_context(RC), temporary.open("wb") as file:
            figure.savefig(file, format=kind[1:], dpi=200, facecolor=CARD, metadata=_dateless(kind))

    return replace_atomic(path, fill)


def _dateless(kind: str) -> dict[str, None]:
    """Metadata without a date, so that the same record gives the same bytes."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(kind, {})


def svg(figure: Figure) -> str:
    """A figure as SVG text on a transparent ground."""
    out = StringIO()
    with mpl.rc_context(RC), warnings.catch_warnings():
        # Text stays text in the SVG, and the browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(
            out, format="svg", transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )  # fmt: skip
    return out.getvalue()
