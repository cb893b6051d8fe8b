"""The bootstrap over clusters, and the tables that `profile show` prints."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.cli.shared.evidence import evidence_grids
from tempering.evaluation.clusters import cluster_bootstrap


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_mean_is_weighted_and_the_interval_a_bootstrap_over_clusters():
    values, weights = _tensor([1.0, 3.0, -2.0, 0.5, 4.0]), _tensor([1.0, 2.0, 1.0, 4.0, 3.0])
    clusters = [7, 7, 1, 1, 4]
    found = cluster_bootstrap(values, weights, torch.tensor(clusters), seed=3, draws=500)
    # The same draws, cluster by cluster in plain Python; clusters in sorted order.
    names = sorted(set(clusters))
    picks = torch.randint(3, (500, 3), generator=torch.Generator().manual_seed(3)).tolist()
    means = []
    for draw in picks:
        top = bottom = 0.0
        for pick in draw:
            for value, weight, cluster in zip(values.tolist(), weights.tolist(), clusters):
                if cluster == names[pick]:
                    top, bottom = top + value * weight, bottom + weight
        means.append(top / bottom)
    means.sort()

    def quantile(share):
        place = share * 499
        low = math.floor(place)
        return means[low] + (place - low) * (means[min(low + 1, 499)] - means[low])

    assert found.value == pytest.approx((1 + 6 - 2 + 2 + 12) / 11)
    assert (found.low, found.high) == pytest.approx((quantile(0.025), quantile(0.975)))
    assert found.n == 3


@settings(max_examples=25, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-5, 5), st.integers(1, 9), st.integers(0, 4)), min_size=2, max_size=20
    ),
    shift=st.floats(-3, 3),
)
def test_a_shift_of_all_values_shifts_the_interval(data, shift):
    values, weights, clusters = (list(item) for item in zip(*data))
    group = torch.tensor(clusters)
    one = cluster_bootstrap(_tensor(values), _tensor(weights), group, seed=0, draws=200)
    two = cluster_bootstrap(_tensor(values) + shift, _tensor(weights), group, seed=0, draws=200)
    assert two.value == pytest.approx(one.value + shift, abs=1e-9)
    if one.n == 1:
        assert math.isnan(one.low)
    else:
        assert two.low == pytest.approx(one.low + shift, abs=1e-9)
        assert one.low - 1e-9 <= one.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for trial in range(200):
        shared = torch.randn(30, dtype=torch.float64, generator=generator)
        clusters = torch.arange(30).repeat_interleave(3)
        noise = torch.randn(90, dtype=torch.float64, generator=generator) * 0.3
        found = cluster_bootstrap(
            shared[clusters] + noise, torch.ones(90).double(), clusters, seed=trial, draws=300
        )
        inside += found.low <= 0 <= found.high
    # 95% less what a percentile interval over 30 clusters loses; pieces alone would give 75%.
    assert 0.88 <= inside / 200 <= 0.99


def _row(label, change, test="t", metric="loss", low=-0.1, high=0.1):
    return {
        "label": label,
        "family": "tuned",
        "numbers": 12,
        "test": test,
        "metric": metric,
        "untempered": 3.0,
        "value": 3.0 + change,
        "change": change,
        "low": low,
        "high": high,
        "n": 5,
    }


def test_a_table_for_every_test_and_one_line_for_all_shuffles():
    rows = [
        _row("tuned", -0.02),
        _row("shuffled, seed 0", 0.01),
        _row("shuffled, seed 1", 0.03),
        _row("tuned", 0.25, metric="accuracy", low=None, high=None),
    ]
    first, loss, accuracy = evidence_grids(
        {"seed": 3, "held out": {"tuned": 2.5}, "measured": rows}
    )
    assert first.rows == [["seed", "3"], ["held out", "tuned 2.5"]]
    assert loss.heading == "Loss, t" and "negative is a gain" in loss.remark
    assert [row[0] for row in loss.rows] == ["tuned", "shuffled over heads, 2 seeds"]
    assert loss.rows[1][3].startswith("+0.02") and loss.rows[1][4].endswith("over seeds")
    assert accuracy.heading == "Accuracy, t" and "positive is a gain" in accuracy.remark
    assert accuracy.rows[0][4] == "–"


@pytest.mark.parametrize(
    "evidence", [{"note": "by hand"}, {"measured": "yes"}, {"measured": [{"label": "x"}]}]
)
def test_evidence_of_another_shape_is_shown_as_far_as_it_is_understood(evidence):
    (grid,) = evidence_grids(evidence)
    assert grid.heading == "How it was found"
