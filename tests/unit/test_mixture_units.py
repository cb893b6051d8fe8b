"""Fits whose numbers are far apart: units, clusters, weights, strides; and what is said then."""

from __future__ import annotations

import warnings
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.mixture import GaussianMixture

from tempering.errors import DataError, TemperingWarning
from tempering.estimators import AnnealedMixture, MixtureConvergenceWarning
from tests.unit import mixture_oracle as oracle

KINDS = ("full", "tied", "diag", "spherical")


def two(gap: float = 6.0, width: float = 1.0, features: int = 2) -> np.ndarray:
    random = np.random.default_rng(0)
    near = random.normal(0, width, (60, features))
    return np.r_[near, random.normal(gap, width, (60, features))]


def variances(model: AnnealedMixture, features: int) -> np.ndarray:
    matrices = oracle.full(model.covariances_, model.covariance_type, 2, features)
    return np.diagonal(matrices, axis1=1, axis2=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gap", "width"), [(3e7, 1.0), (1e9, 10.0), (-1e12, 100.0)])
def test_clusters_far_apart_keep_their_widths(kind, gap, width):
    x = two(gap, width, 1)
    model = AnnealedMixture(2, covariance_type=kind, n_init=1, random_state=0).fit(x)
    order = np.argsort(abs(model.means_[:, 0]))
    halves = x[:60], x[60:]
    truth = np.array([half.var(0) for half in halves])
    truth = np.array([truth.mean(0)] * 2) if kind == "tied" else truth
    np.testing.assert_allclose(variances(model, 1)[order], truth, rtol=1e-4)
    np.testing.assert_allclose(
        model.means_[order, 0], [half.mean() for half in halves], rtol=1e-12, atol=1e-3 * width
    )
    matrices = oracle.full(model.covariances_, kind, 2, 1)
    joint = oracle.log_density(x, model.means_, matrices, "gaussian") + np.log(model.weights_)
    mean = np.logaddexp.reduce(joint, axis=1).mean()
    assert model.lower_bound_ == pytest.approx(mean, abs=1e-6)
    assert model.converged_


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_far_away_is_a_component_and_costs_the_others_no_digit(kind):
    x = np.r_[np.random.default_rng(0).normal(0, 1, (100, 2)), [[1e9, 1e9]]]
    model = AnnealedMixture(2, covariance_type=kind, random_state=0).fit(x)
    body = int(model.weights_.argmax())
    np.testing.assert_allclose(model.weights_[body], 100 / 101)
    share = 100 / 101 if kind == "tied" else 1
    truth = share * x[:100].var(0) + 1e-6
    truth = truth.mean() if kind == "spherical" else truth
    np.testing.assert_allclose(variances(model, 2)[body], truth, rtol=1e-9)
    np.testing.assert_allclose(model.means_[1 - body], 1e9, rtol=1e-15)


@cache
def ridgeless(kind: str) -> AnnealedMixture:
    return AnnealedMixture(2, covariance_type=kind, reg_covar=0.0, random_state=0).fit(two())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("power", [-480, -66, 63, 500])
def test_a_power_of_two_as_unit_changes_no_bit(kind, power):
    x, scale, one = two(), 2.0**power, ridgeless(kind)
    other = clone(one).fit(x * scale)
    np.testing.assert_array_equal(other.means_, one.means_ * scale)
    np.testing.assert_array_equal(other.covariances_, one.covariances_ * scale * scale)
    np.testing.assert_array_equal(other.weights_, one.weights_)
    np.testing.assert_array_equal(other.temperature_path_, one.temperature_path_)
    np.testing.assert_allclose(other.predict_proba(x * scale), one.predict_proba(x), atol=1e-15)
    nats = x.shape[1] * power * np.log(2)
    assert other.lower_bound_ == pytest.approx(one.lower_bound_ - nats, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e19, 1e-36])
def test_float32_in_small_and_large_units(scale):
    x = two()
    one = AnnealedMixture(2, reg_covar=0.0, random_state=0).fit(x.astype(np.float32))
    other = AnnealedMixture(2, reg_covar=0.0, random_state=0).fit((x * scale).astype(np.float32))
    np.testing.assert_allclose(other.means_ / scale, one.means_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.covariances_ / scale**2, one.covariances_, rtol=1e-4)


@pytest.mark.parametrize(
    ("scale", "match"),
    [
        (1e160, r"about 1e320, outside the range.*about \de\+160"),
        (1e-160, r"about 1e-320, outside"),
    ],
)
def test_units_whose_squares_are_no_float64_are_named(scale, match):
    with pytest.raises(DataError, match=match):
        AnnealedMixture(2, reg_covar=0.0, random_state=0).fit(two() * scale)


def test_a_row_too_far_for_squares_is_named():
    x = two()
    x[17, 1] = 1e300
    with pytest.raises(DataError, match=r"row 17, column 1 is 1e\+300: it lies .* Drop or clip"):
        AnnealedMixture(2, random_state=0).fit(x)
    weights = np.r_[np.zeros(10), np.ones(110)]  # numbers are those of X all the same
    with pytest.raises(DataError, match=r"row 17, column 1"):
        AnnealedMixture(2, random_state=0).fit(x, sample_weight=weights)


def test_columns_of_units_too_far_apart_are_named():
    columns = np.array([1e-100, 1e100])
    with pytest.raises(DataError, match=r"column 0 of X spreads over about .* column 1 over"):
        AnnealedMixture(2, reg_covar=0.0).fit(two() * columns)
    found = AnnealedMixture(2, reg_covar=0.0, random_state=0).fit(two() * [1e-10, 1e10])
    plain = AnnealedMixture(2, reg_covar=0.0, random_state=0).fit(two())
    scaled = np.sort(found.means_ / [1e-10, 1e10], axis=0)
    np.testing.assert_allclose(scaled, np.sort(plain.means_, axis=0), atol=1e-2)


def test_a_ridge_that_is_large_for_the_data_is_said():
    with pytest.warns(TemperingWarning, match=r"reg_covar = 1e-06 is large next to the variance"):
        AnnealedMixture(2, random_state=0).fit(two() * 1e-4)
    with pytest.warns(TemperingWarning, match="in column 1"):
        AnnealedMixture(2, random_state=0).fit(two() * [1, 1e-4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnnealedMixture(2, random_state=0).fit(two() * 1e-2)
        AnnealedMixture(2, random_state=0).fit(np.c_[two(), np.ones(120)])  # a constant column
    with pytest.warns(TemperingWarning) as caught:
        AnnealedMixture(2, random_state=0).fit(np.repeat([[0.0], [1.0]], 20, 0))  # rows repeat
    assert ["2 distinct row(s)" in str(found.message) for found in caught] == [True]


@pytest.mark.parametrize("scale", [1e-7, 1e-9, 1e-12, 1e-80, 1e-160, 1e-300])
@pytest.mark.parametrize("covariance_type", ["full", "tied", "diag", "spherical"])
def test_a_ridge_that_swallows_the_data_is_said(scale, covariance_type):
    """Then the variances within components are lost in rounding."""
    model = AnnealedMixture(2, covariance_type=covariance_type, random_state=0)
    with pytest.warns(TemperingWarning, match=r"reg_covar = 1e-06 is large next to the .* column"):
        model.fit(two() * scale)
    if covariance_type != "spherical":  # which has one variance for all columns, that of column 0
        with pytest.warns(TemperingWarning, match="column 1"):
            model.fit(two() * [1, scale])


@pytest.mark.parametrize("far", [30, 100])
@pytest.mark.parametrize("features", [1, 2])
def test_a_small_group_far_away_is_found_with_tied_covariances(features, far):
    x = np.random.default_rng(0).normal(0, 1, (400, features))
    x[:3] += far
    ours = AnnealedMixture(2, covariance_type="tied", random_state=0).fit(x)
    theirs = GaussianMixture(2, covariance_type="tied", random_state=0).fit(x)
    assert ours.lower_bound_ > theirs.score(x) - 1e-6
    np.testing.assert_allclose(ours.weights_.min(), 3 / 400, rtol=1e-6)
    assert ours.best_start_ == 0  # annealing itself tells the group from the crowd


def test_starts_differ_and_the_likeliest_is_kept():
    x, _ = oracle.clusters(6, rows=60, components=4, gap=1.0)
    values = [
        AnnealedMixture(4, n_init=starts, random_state=0).fit(x).lower_bound_
        for starts in (1, np.int64(2), 8)
    ]
    assert values[0] - 1e-5 <= values[1] <= values[2] + 1e-5
    assert values[2] > values[0] + 0.01


def test_a_start_that_collapses_is_said():
    x = np.r_[np.zeros((70, 1)), np.full((3, 1), 50.0)]
    x[:70, 0] = np.random.default_rng(0).integers(0, 2, 70)
    with pytest.raises(DataError, match="has collapsed"):
        AnnealedMixture(3, reg_covar=0.0, random_state=0).fit(x)
    x = np.r_[np.full((73, 1), 3.0), np.full((3, 1), 1e5)]
    with pytest.raises(DataError, match="has collapsed"):
        AnnealedMixture(2, covariance_type="tied", reg_covar=0.0, random_state=0).fit(x)
    random = np.random.default_rng(0)
    x = np.r_[random.normal(0, 1, (40, 1)), [[6.0]]]
    with pytest.warns(MixtureConvergenceWarning, match="starts put a component on rows that agree"):
        AnnealedMixture(3, covariance_type="spherical", reg_covar=0.0, random_state=0).fit(x)


@cache
def unweighted() -> AnnealedMixture:
    return AnnealedMixture(2, random_state=0).fit(two())


@pytest.mark.parametrize("weight", [1e308, 1e-300, 5e-324])
def test_equal_weights_of_any_size_are_no_weights(weight):
    x, one = two(), unweighted()
    other = clone(one).fit(x, sample_weight=np.full(120, weight))
    np.testing.assert_allclose(other.means_, one.means_, atol=1e-9)
    assert other.lower_bound_ == pytest.approx(one.lower_bound_, abs=1e-9)


def backwards(array: np.ndarray) -> np.ndarray:
    """The same numbers, with strides below 0."""
    return np.ascontiguousarray(array[::-1])[::-1]


def test_strides_and_byte_order_change_nothing():
    x = two()
    weights = np.random.default_rng(1).uniform(0.5, 2, 120)
    shares = np.eye(2)[np.arange(120) // 60]
    model = AnnealedMixture(2, random_state=0)
    plain = model.fit(x, sample_weight=weights).means_
    np.testing.assert_array_equal(
        model.fit(backwards(x), sample_weight=backwards(weights)).means_, plain
    )
    np.testing.assert_array_equal(model.fit(x.astype(">f8"), sample_weight=weights).means_, plain)
    assert model.score_samples(x.astype(">f4")).dtype == np.float32
    assert model.predict(backwards(x)[:1]).shape == (1,)
    given = model.fit(x, responsibilities=shares).means_
    np.testing.assert_array_equal(model.fit(x, responsibilities=backwards(shares)).means_, given)
    flipped = np.ascontiguousarray(shares[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(model.fit(x, responsibilities=flipped).means_, given)
    centres = AnnealedMixture(2, means_init=x[[0, 100]]).fit(x).means_
    again = AnnealedMixture(2, means_init=backwards(x[[0, 100]])).fit(x).means_
    np.testing.assert_array_equal(again, centres)


def test_means_given_far_from_the_pivot_and_chunks_in_odd_units():
    x = two(1e9, 1.0)
    model = AnnealedMixture(2, means_init=[[0, 0], [1e9, 1e9]]).fit(x)
    np.testing.assert_allclose(model.means_, [x[:60].mean(0), x[60:].mean(0)], rtol=1e-12)
    scale = 2.0**400
    one, other = (AnnealedMixture(2, reg_covar=0.0, random_state=0) for _ in range(2))
    for chunk in (two()[::2], two()[1::2]):
        one.partial_fit(chunk)
        other.partial_fit(chunk * scale)
    np.testing.assert_allclose(other.means_ / scale, one.means_, rtol=1e-12)
    np.testing.assert_allclose(other.covariances_ / scale / scale, one.covariances_, rtol=1e-12)


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e30, 2.0**-200])
def test_chunks_count_by_their_weights_as_given(unit):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 1)), rng.normal(10, 1, (200, 1))
    weights = np.repeat([0.01 * unit, unit], 200)
    whole = AnnealedMixture(1).fit(np.concatenate([a, b]), sample_weight=weights)
    parts = AnnealedMixture(1).partial_fit(a, sample_weight=weights[:200])
    parts.partial_fit(b, sample_weight=weights[200:])
    np.testing.assert_allclose(parts.means_, whole.means_, rtol=1e-9)
    np.testing.assert_allclose(parts.covariances_, whole.covariances_, rtol=1e-9)


def test_weights_that_no_other_chunk_can_be_added_to_are_refused():
    model = AnnealedMixture(1).partial_fit(two())
    with pytest.raises(DataError, match="can't be added to those of other chunks"):
        model.partial_fit(two(), sample_weight=np.full(len(two()), 1e307))


def test_missing_values_are_named():
    table = two().astype(object)
    table[4, 1] = None
    with pytest.raises(DataError, match="row 4, column 1"):
        AnnealedMixture(2).fit(table)
    weights = [1.0] * 119 + [None]
    with pytest.raises(DataError, match=r"sample_weight\[119\] is nan"):
        AnnealedMixture(2).fit(torch.tensor(two()), sample_weight=weights)


@pytest.mark.parametrize("nu", [1e6, 1e10, 1e16, 1e200, 1.7e308])
def test_many_degrees_of_freedom_are_a_normal_distribution(nu):
    x = two()
    normal = AnnealedMixture(1).fit(x)
    student = AnnealedMixture(1, kernel="student_t", nu=nu).fit(x)
    assert student.lower_bound_ == pytest.approx(normal.lower_bound_, abs=1e-6)
    np.testing.assert_allclose(student.covariances_, normal.covariances_, rtol=1e-6)
