"""Metrics, bins and intervals of a calibration report, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from tempering.errors import DataError, InputError
from tempering.estimators import TemperatureScaler, calibration_report
from tempering.estimators.calibration.scores import equal_mass, equal_width
from tempering.reports import Record, render_html


def draw(n=900, k=5, temperature=1.7, seed=0):
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, k))
    y = (z / temperature + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return z, y


def by_definition(p, y, weights, bins):
    """NLL, Brier score and both ECEs, row by row and bin by bin."""
    rows, top = np.arange(len(y)), p.argmax(1)
    onehot = np.eye(p.shape[1])[y]
    confidence, hit = p.max(1), top == y
    order = np.argsort(confidence, kind="stable")
    share = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    mass_bin = np.empty(len(y), int)
    mass_bin[order] = np.floor(share * bins)
    width_bin = np.minimum(np.ceil(confidence * bins).astype(int) - 1, bins - 1)

    def ece(place):
        gaps = [abs(np.sum((weights * (hit - confidence))[place == b])) for b in range(bins)]
        return sum(gaps) / weights.sum()

    return [
        np.average(-np.log(p[rows, y]), weights=weights),
        np.average(((p - onehot) ** 2).sum(1), weights=weights),
        ece(mass_bin),
        ece(width_bin),
    ]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("per", ["global", "class"])
def test_metrics_are_their_definitions(weighted, per):
    z, y = draw()
    weights = np.random.default_rng(1).uniform(0, 2, 900) if weighted else np.ones(900)
    scaler = TemperatureScaler(per=per).fit(z, y)
    report = scaler.report(z, y, sample_weight=weights if weighted else None, bins=10)
    after = softmax(z / scaler.temperatures(z)[:, None], axis=1)
    for p, side in ((softmax(z, axis=1), "before"), (after, "after")):
        found = [getattr(metric, side).value for metric in report.metrics]
        np.testing.assert_allclose(found, by_definition(p, y, weights, 10), rtol=1e-9)
    for metric in report.metrics:
        assert metric.difference.value == pytest.approx(metric.after.value - metric.before.value)
    assert [m.name for m in report.metrics] == ["nll", "brier", "ece_equal_mass", "ece_equal_width"]
    assert report["nll"] is report.metrics[0]


@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=60),
    st.integers(1, 12),
)
def test_bins(confidences, bins):
    c = np.array(confidences)
    w = np.ones(len(c))
    width = equal_width(c, w, bins)
    assert ((c > width / bins - 1e-12) & (c <= (width + 1) / bins + 1e-12)).all()
    mass = equal_mass(c, w, bins)
    assert (mass >= 0).all() and (mass < bins).all()
    order = np.argsort(c)
    assert (np.diff(mass[order]) >= 0).all()
    for value in set(confidences):
        assert len(set(mass[c == value])) == 1
    if len(set(confidences)) == len(c) and len(c) % bins == 0:
        assert (np.bincount(mass, minlength=bins) == len(c) // bins).all()


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Brier and NLL of known distributions: 90% intervals over 120 tables."""
    big, labels = draw(200000, 4, seed=1)
    scaler = TemperatureScaler().fit(big, labels)
    truth = scaler.report(big, labels, resamples=2)
    held = {"nll": 0, "brier": 0, "difference": 0}
    for seed in range(120):
        report = scaler.report(*draw(200, 4, seed=1000 + seed), resamples=200, level=0.9)
        for name in ("nll", "brier"):
            low, high = report[name].after[1:]
            held[name] += low <= truth[name].after.value <= high
        _, low, high = report["nll"].difference
        held["difference"] += low <= truth["nll"].difference.value <= high
    # Binomial(120, .9) lies between 97 and 117 with probability .998.
    assert all(97 <= count <= 118 for count in held.values()), held


def test_an_interval_is_the_bootstrap_by_hand():
    """Redrawing the rows one by one gives the same ends, up to the noise of resampling."""
    z, y = draw(150)
    scaler = TemperatureScaler().fit(z, y)
    low, high = scaler.report(z, y, resamples=4000)["nll"].after[1:]
    p = softmax(z / scaler.temperature_, axis=1)
    losses = -np.log(p[np.arange(150), y])
    rng = np.random.default_rng(5)
    means = losses[rng.integers(150, size=(4000, 150))].mean(1)
    by_hand = 2 * losses.mean() - np.quantile(means, [0.975, 0.025])
    np.testing.assert_allclose([low, high], by_hand, atol=0.1 * (high - low))


def test_clusters_are_resampled_whole():
    """Rows written ten times over tell no more than once, if the clusters say so."""
    z, y = draw(200)
    scaler = TemperatureScaler().fit(z, y)
    once = scaler.report(z, y)["nll"].after
    copied = scaler.report(z.repeat(10, 0), y.repeat(10))["nll"].after
    grouped = scaler.report(z.repeat(10, 0), y.repeat(10), clusters=np.arange(200).repeat(10))[
        "nll"
    ].after
    width = [e.high - e.low for e in (once, copied, grouped)]
    assert width[1] < 0.4 * width[0]
    assert width[2] == pytest.approx(width[0], rel=0.1)


def test_bundles_of_rows_spread_as_rows_do():
    z, y = draw(20000)
    scaler = TemperatureScaler().fit(z, y)
    report = scaler.report(z, y)
    assert report.units == 4096
    estimate = report["nll"].after
    p = softmax(z / scaler.temperature_, axis=1)
    error = np.std(-np.log(p[np.arange(len(y)), y])) / np.sqrt(len(y))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_report_on_each_group():
    z, y = draw()
    by = np.array(["b", "a", "c"])[np.arange(900) % 3]
    scaler = TemperatureScaler().fit(z, y)
    report = scaler.report(z, y, by=by)
    assert list(report.groups) == ["a", "b", "c"]
    for name, (n, metrics) in report.groups.items():
        alone = scaler.report(z[by == name], y[by == name])
        assert n == 300
        assert metrics == alone.metrics


def test_reliability_bins():
    z, y = draw()
    report = TemperatureScaler().fit(z, y).report(z, y, bins=9)
    assert [b.n for b in report.before] == [100] * 9
    p = softmax(z, axis=1)
    order = np.argsort(p.max(1))
    hit = (p.argmax(1) == y)[order].reshape(9, 100)
    for found, confidence, hits in zip(report.before, np.sort(p.max(1)).reshape(9, 100), hit):
        assert found.confidence == pytest.approx(confidence.mean())
        assert found.accuracy == hits.mean()
        assert 0 <= found.low < found.accuracy < found.high <= 1


def test_seeds_repeat():
    z, y = draw()
    scaler = TemperatureScaler().fit(z, y)
    assert scaler.report(z, y) == scaler.report(z, y)
    assert scaler.report(z, y).metrics != scaler.report(z, y, seed=1).metrics


def test_one_cluster_has_no_interval():
    z, y = draw()
    scaler = TemperatureScaler().fit(z, y)
    estimate = scaler.report(z, y, clusters=np.zeros(900))["nll"].after
    assert np.isfinite(estimate.value) and np.isnan([estimate.low, estimate.high]).all()


def test_a_record_draws_it():
    z, y = draw()
    report = TemperatureScaler().fit(z, y).report(z, y, by=y % 2)
    record = Record.new("calibrate", settings={}, results=report.results())
    assert len(record.results["groups"]) == 8
    page = render_html(record)
    assert "<svg" in page and "ece equal mass" in page
    assert f"{report['nll'].after.value:.4f}" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 0}, "bins = 0; expected a whole number, 1 or more"),
        ({"resamples": 1}, "resamples = 1"),
        ({"level": 1.0}, r"level = 1\.0; expected a share between 0 and 1"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_options(options, message):
    z, y = draw(50)
    with pytest.raises(InputError, match=message):
        calibration_report(TemperatureScaler().fit(z, y), z, y, **options)


def test_labels_and_groups_must_match():
    z, y = draw(50)
    scaler = TemperatureScaler().fit(z, y)
    with pytest.raises(DataError, match=r"y\[0\] = 9 is not among classes"):
        scaler.report(z, np.full(50, 9))
    with pytest.raises(DataError, match="by has 49 values for 50 rows"):
        scaler.report(z, y, by=y[1:])
    with pytest.raises(DataError, match="clusters has 49 values for 50 rows"):
        scaler.report(z, y, clusters=y[1:])
