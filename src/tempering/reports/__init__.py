"""One record of a run feeds everything that shows it.

    record = Record.new("compare", settings=..., results=..., model=..., seed=0)
    record.save("run.json")                   one JSON file; Record.load reads it back
    print_record(record)                      tables on the terminal
    save_html(record, "run.html")             one page, no network, light and dark
    save_figure(figure_cost(record), "cost.svg")
    write_table(record, "run.parquet")        a number per layer and head, CSV or Parquet

`tempering.reports.sections` describes what `results` may hold. Names load on first use, so that
writing a record needs no matplotlib.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_CONTENTS: dict[str, tuple[str, ...]] = {
    "tempering.reports.record": ("Record",),
    "tempering.reports.html": ("render_html", "save_html"),
    "tempering.reports.terminal": ("print_grid", "print_record", "sparkline"),
    "tempering.reports.progress_bar": ("Bar", "progress"),
    "tempering.reports.tables": ("long_format", "write_table"),
    "tempering.reports.figures": (
        "FIGURES",
        "figure_benefit",
        "figure_cost",
        "figure_depth",
        "figure_frontier",
        "figure_pattern",
        "figure_pattern_heatmap",
        "figure_reliability",
        "figure_stages",
        "figure_support_by_layer",
        "figure_support_change",
        "figure_support_heatmap",
        "figure_training",
        "save_figure",
    ),
}
_HOME = {name: module for module, names in _CONTENTS.items() for name in names}

__all__ = sorted(_HOME)

if TYPE_CHECKING:
    from tempering.reports.figures import *  # noqa: F403
    from tempering.reports.html import *  # noqa: F403
    from tempering.reports.progress_bar import *  # noqa: F403
    from tempering.reports.record import *  # noqa: F403
    from tempering.reports.tables import *  # noqa: F403
    from tempering.reports.terminal import *  # noqa: F403


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tempering.reports' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
