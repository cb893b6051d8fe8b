"""Figures: they show the numbers of the record, survive its gaps, and are written whole."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import matplotlib as mpl
import pytest

from tempering.errors import DataError, OutputError
from tempering.reports import (
    FIGURES,
    Record,
    figure_cost,
    figure_frontier,
    figure_pattern,
    figure_pattern_heatmap,
    figure_repair,
    figure_support_by_layer,
    figure_support_change,
    figure_support_heatmap,
    figure_training,
    figure_trials,
    save_figure,
)
from tempering.reports.axes import log_bounds, log_ticks
from tempering.reports.figures import svg
from tempering.reports.style import HEAT, INK, LIGHT, QUIET, series
from tempering.reports.views import layer_means

SAMPLE = Path(__file__).with_name("test_reports_sample.json")
THROB = "throb(12,3,1,12)|amplitude(1.15)"


def new(**results):
    return Record.new("compare", settings={}, results=results)


@pytest.fixture(scope="module")
def sample() -> Record:
    return Record.load(SAMPLE)


def curve(figure, i):
    return list(figure.axes[0].get_lines()[i].get_ydata())


def test_the_curves_are_the_records_numbers(sample):
    rows = sample.results["pattern"]
    drawn = figure_pattern(sample)
    assert [curve(drawn, i) for i in range(3)] == [
        pytest.approx(row["temperature"]) for row in rows
    ]
    support = sample.results["support"]
    expected = [math.exp(sum(map(math.log, row)) / len(row)) for row in support["after"][THROB]]
    assert curve(figure_support_by_layer(sample), 1) == pytest.approx(expected)


def test_layer_means_are_in_logs_for_support_only():
    matrix = [[1.0, 4.0, None], None, [math.nan], []]
    assert layer_means(matrix, "support_without_sink") == [pytest.approx(2.0), None, None, None]
    assert layer_means(matrix, "peak") == [2.5, None, None, None]


def cell_colours(figure) -> dict[tuple[int, int], str]:
    """(layer, head) -> colour of a heatmap, read back from its shapes."""
    found = {}
    for patch in figure.axes[0].patches:
        for x, y in patch.get_path().vertices[::5]:
            found[int(x + 0.5), int(y + 0.5)] = mpl.colors.to_hex(patch.get_facecolor())
    return found


def test_a_heatmap_goes_from_blue_for_few_to_warm_for_many():
    before = [[1.0, 144.0], [12.0, None], None]
    support = {
        "layers": ["a", "b", "c"],
        "before": before,
        "after": {"p": [[2.0, 144.0], [6.0, 3.0], None]},
    }
    record = new(support=support)
    colours = cell_colours(figure_support_heatmap(record))
    assert colours == {(0, 0): LIGHT["h0"], (0, 1): LIGHT["h20"], (1, 0): LIGHT["h10"]}
    changed = cell_colours(figure_support_change(record, "p"))
    assert changed == {(0, 0): LIGHT["h20"], (0, 1): LIGHT["h10"], (1, 0): LIGHT["h0"]}


def test_heatmaps_of_one_record_share_their_scale(sample):
    labels = list(sample.results["support"]["after"])
    for draw in (figure_support_change, figure_pattern_heatmap):
        assert len({draw(sample, label).axes[1].get_xlim() for label in labels}) == 1
    limits = {
        tuple(figure_support_heatmap(sample, label).axes[1].get_xlim())
        for label in (None, *sample.results["support"]["after"])
    }
    assert len(limits) == 1


def test_warm_is_hotter_than_the_models_own_temperature():
    row = {"label": "p", "text": "", "temperature": [[0.5, 1.0], [2.0, None], [math.inf, 0.0]]}
    colours = cell_colours(figure_pattern_heatmap(new(pattern=[row]), "p"))
    cold, middle, hot = LIGHT["h0"], LIGHT["h10"], LIGHT["h20"]
    assert colours == {(0, 0): cold, (0, 1): middle, (1, 0): hot, (2, 0): hot, (2, 1): cold}


def test_limits_of_temperature_are_marked_at_the_edge():
    row = {"label": "p", "text": "", "temperature": [0.0, 1.0, math.inf, None]}
    axes = figure_pattern(new(pattern=[row])).axes[0]
    marks = {
        (line.get_marker(), line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[:2]
    }
    assert marks == {("v", 0, 0.0), ("^", 2, 1.0)}


def test_a_cost_without_interval_shows_two_standard_errors():
    rows = [
        {"label": "a", "cost": 0.1, "se": 0.02, "unit": "nats/token"},
        {"label": "b", "cost": 0.1, "se": 0.02, "low": 0.0, "high": 0.3, "unit": "nats/token"},
        {"label": "c", "cost": math.nan, "unit": "nats/token"},
    ]
    axes = figure_cost(new(cost=rows)).axes[0]
    bars = [list(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert pytest.approx([0.06, 0.14]) in bars
    assert [0.0, 0.3] in bars
    assert "not measured" in [text.get_text() for text in axes.texts]


def test_a_repair_is_drawn_by_test_with_controls_in_ink():
    rows = [
        {"label": "repaired", "test": "play", "compressed": 4.0, "repaired": 3.5, "share": 0.5,
         "low": 0.4, "high": 0.6, "damage": 1.0},
        {"label": "negated", "test": "play", "compressed": 4.0, "repaired": 4.5, "share": -0.5,
         "low": -0.6, "high": -0.4, "damage": 1.0},
    ]  # fmt: skip
    axes = figure_repair(new(repair=rows)).axes[0]
    assert [t.get_text() for t in axes.texts][:2] == ["play", "play, negated"]
    bars = {tuple(line.get_xdata()): line.get_color() for line in axes.lines}
    assert bars[(0.4, 0.6)] == series(0)["color"] != bars[(-0.6, -0.4)] == INK
    known = ("share", "damage", "low", "high")
    own = [{k: v for k, v in row.items() if k not in known} for row in rows]
    own[0] |= {"returned": 0.5, "returned_low": 0.4, "returned_high": 0.6}
    axes = figure_repair(new(repair=own)).axes[0]
    assert (0.4, 0.6) in {tuple(line.get_xdata()) for line in axes.lines}
    assert "not measured" in [t.get_text() for t in axes.texts]


def test_trials_are_drawn_against_each_number_that_was_searched():
    rows = [
        {"trial": 0, "policy": "constant(1)", "score": 0.4, "tasks": 9},
        {
            "trial": 1,
            "policy": "a",
            "score": 0.5,
            "left": False,
            "chosen": True,
            "T": 0.2,
            "p": 0.9,
        },
        {"trial": 2, "policy": "b", "score": 0.1, "left": True, "T": 2.0, "p": 0.8},
        {"trial": 3, "policy": "c", "score": None, "left": False, "T": 1.0, "p": 0.8},
    ]
    first, second = figure_trials(new(trials=rows)).axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("T", "p")
    assert (first.get_xscale(), second.get_xscale()) == ("log", "linear")
    line, *dots = first.lines
    assert list(line.get_ydata()) == [0.4, 0.4]
    assert [(d.get_xdata()[0], d.get_ydata()[0]) for d in dots] == [(0.2, 0.5), (2.0, 0.1)]
    assert [d.get_color() for d in dots] == [series(0)["color"], QUIET]
    assert dots[1].get_markerfacecolor() == "none" != dots[0].get_markerfacecolor()
    assert [d.get_xdata()[0] for d in second.lines[1:]] == [0.9, 0.8]


def test_points_of_the_frontier_are_numbered_and_gaps_left_out(sample):
    points = copy.deepcopy(sample.results["frontier"])
    points[1]["cost"] = math.inf
    texts = [text.get_text() for text in figure_frontier(new(frontier=points)).axes[0].texts]
    assert texts[:-1] == ["1", "3", "4", "5", "6"]  # the last one is the subtitle


@pytest.mark.parametrize(
    ("low", "high"), [(1, 144), (0.87, 1.15), (1.0, 1.01), (1e-9, 1e9), (3, 4)]
)
def test_log_ticks_are_few_and_inside(low, high):
    ticks = log_ticks(float(low), float(high))
    assert 2 <= len(ticks) <= 20
    assert all(low <= tick <= high for tick in ticks)
    edges = log_bounds(float(low), float(high))
    assert len(edges) == len(HEAT.colors) + 1
    assert edges[0] == low
    assert edges[-1] == pytest.approx(high)


SPARSE = {
    "trials without numbers": {"trials": [{"trial": 0, "policy": "a", "score": None}]},
    "one layer": {"support": {"layers": ["0"], "before": [[3.0]], "after": {}}},
    "no softmax": {
        "support": {"layers": ["0", "1"], "before": [None, [None]], "after": {"p": [None, None]}}
    },
    "quantity only": {
        "support": {
            "layers": ["0"],
            "before": [[3.0]],
            "after": {},
            "quantities": {"peak": {"before": [[0.5]], "after": {"p": [[0.25]]}}},
        },
        "pattern": [{"label": "untempered", "text": "", "temperature": [1.0]}],
    },
    "ragged": {"support": {"layers": ["0", "1"], "before": [[3.0], [1.0, 2.0, 5.0]], "after": {}}},
    "all alike": {
        "support": {"layers": ["0"], "before": [[1.0, 1.0]], "after": {"p": [[1.0, 1.0]]}}
    },
    "whole numbers": {
        "support": {"layers": ["0"], "before": [[1, 2]], "after": {"p": [[2, math.inf]]}}
    },
    "null pattern": {"pattern": [{"label": "p", "text": "", "temperature": [None, None]}]},
    "no cost": {"cost": [{"label": "p", "cost": None, "unit": "nats/token"}]},
    "no benefit": {"benefit": [{"label": "p", "metric": "m", "value": None}]},
    "one point": {
        "frontier": [{"label": "p", "family": "x", "cost": 0, "benefit": 1, "cost_se": 1}]
    },
    "empty bins": {"reliability": {"before": [{"confidence": None, "accuracy": None, "n": 0}]}},
    "one step": {"training": {"history": [{"step": 0, "loss": 3.0}]}},
    "lost steps": {"training": {"history": [{"step": 0, "loss": math.nan}], "trade_off": []}},
    "nobody": {"stages": [{"stage": "x", "width": 3, "workers": []}]},
    "odd labels": {
        "cost": [
            {"label": label, "cost": 0.1, "unit": "nats/token"}
            for label in ("_hidden", "$\\frac$", "日本 🜂", "", "x" * 200, "\x00\x1b[31m\n")
        ]
    },
}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_records_can_be_drawn(name):
    results = SPARSE[name]
    record = new(**results)
    for section, draw in FIGURES.values():
        if section in results:
            assert svg(draw(record)).startswith("<?xml")


def test_every_measured_quantity_can_be_drawn():
    record = new(**SPARSE["quantity only"])
    assert curve(figure_support_by_layer(record, quantity="peak"), 1) == [0.25]
    colours = cell_colours(figure_support_heatmap(record, "p", quantity="peak"))
    assert colours == {(0, 0): LIGHT["h0"]}


def test_labels_are_text_and_not_mathematics(sample):
    rows = [{"label": "_$x_1$", "text": "", "temperature": [1.0, 2.0]}]
    assert ">_$x_1$</text>" in svg(figure_pattern(new(pattern=rows)))


@pytest.mark.parametrize(
    ("draw", "match"),
    [
        (
            lambda r: figure_cost(new(benefit=[])),
            r"compare record has no 'cost' to draw; it has benefit",
        ),
        (
            lambda r: figure_support_heatmap(r, "warm"),
            r"not measured under 'warm'; measured are throb",
        ),
        (
            lambda r: figure_support_by_layer(r, quantity="peak"),
            r"'peak' was not measured; .* sink_share",
        ),
        (lambda r: figure_pattern_heatmap(r, "warm"), r"no pattern is named 'warm'"),
        (lambda r: figure_training(new(training={"history": []})), r"no step to draw"),
    ],
)
def test_what_cannot_be_drawn_says_what_there_is(sample, draw, match):
    with pytest.raises(DataError, match=match):
        draw(sample)


def test_files_by_suffix(sample, tmp_path):
    magic = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
    for suffix, start in magic.items():
        first = save_figure(figure_cost(sample), tmp_path / f"a{suffix}").read_bytes()
        assert first.startswith(start)
        again = save_figure(figure_cost(sample), tmp_path / f"b{suffix}").read_bytes()
        assert again == first
    assert len(list(tmp_path.iterdir())) == 6


def test_files_that_cannot_be_written(sample, tmp_path):
    with pytest.raises(DataError, match=r"a file that ends in \.png, \.svg, \.pdf"):
        save_figure(figure_cost(sample), tmp_path / "a.bmp")
    with pytest.raises(OutputError, match="nothing was written"):
        save_figure(figure_cost(sample), "/proc/a.png")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_matplotlib_as_it_was(sample):
    before = dict(mpl.rcParams)
    svg(figure_cost(sample))
    assert dict(mpl.rcParams) == before
