"""What a mixture can't be fitted to, and what is said then."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.utils._param_validation import InvalidParameterError
from sklearn.utils.estimator_checks import check_param_validation

from tempering.errors import DataError, InputError, ScheduleError, TemperingWarning
from tempering.estimators import AnnealedMixture

X = np.random.default_rng(0).standard_normal((20, 3))


def with_value(value: float) -> np.ndarray:
    x = X.copy()
    x[7, 2] = value
    return x


@pytest.mark.parametrize("kind", [np.asarray, torch.tensor, np.float32])
def test_rows_that_are_not_finite_are_named(kind):
    with pytest.raises(DataError, match="Input X contains NaN: row 7, column 2"):
        AnnealedMixture().fit(kind(with_value(np.nan)))
    with pytest.raises(DataError, match="Input X contains infinity: row 7, column 2"):
        AnnealedMixture().fit(kind(with_value(np.inf)))
    fitted = AnnealedMixture().fit(kind(X))
    for ask in (fitted.predict, fitted.score_samples, fitted.partial_fit):
        with pytest.raises(DataError, match="row 7, column 2"):
            ask(kind(with_value(-np.inf)))


def test_a_row_far_down_is_named_too():
    x = np.zeros((2**16 + 10, 1), dtype=np.float32)
    x[2**16 + 3] = np.nan
    with pytest.raises(DataError, match="row 65539, column 0"):
        AnnealedMixture().fit(x)


def test_empty_and_one_sample():
    with pytest.raises(ValueError, match=r"0 sample"):
        AnnealedMixture().fit(np.empty((0, 3)))
    with pytest.raises(ValueError, match=r"1 sample|minimum of 2"):
        AnnealedMixture().fit(X[:1])
    with pytest.raises(DataError, match=r"1 sample\(s\) and 3 feature\(s\)"):
        AnnealedMixture().fit(torch.tensor(X[:1]))
    with pytest.raises(ValueError, match=r"0 feature"):
        AnnealedMixture().fit(np.empty((5, 0)))
    with pytest.raises(DataError, match=r"Expected 2D array.*\(20,\)"):
        AnnealedMixture().fit(torch.tensor(X[:, 0]))
    with pytest.raises(DataError, match="Complex data"):
        AnnealedMixture().fit(torch.tensor(X) * 1j)
    with pytest.raises(ValueError, match="5 features"):
        AnnealedMixture().fit(X).predict(np.ones((2, 5)))


def test_constant_rows():
    x = np.full((30, 2), 4.0)
    fitted = AnnealedMixture().fit(x)
    np.testing.assert_allclose(fitted.means_, [[4, 4]])
    np.testing.assert_allclose(fitted.covariances_[0], 1e-6 * np.eye(2))
    with pytest.raises(DataError, match=r"1 distinct row\(s\) of 30; fit at most 1 component"):
        AnnealedMixture(2).fit(x)
    with pytest.raises(DataError, match=r"component 0 of 1 has collapsed.*raise reg_covar"):
        AnnealedMixture(reg_covar=0.0).fit(x)


@pytest.mark.parametrize("value", [-1e5, 1e12, 1e148])
@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
def test_constant_rows_of_any_size_have_the_ridge_for_variance(kind, value):
    model = AnnealedMixture(covariance_type=kind).fit(np.full((7, 2), value))
    np.testing.assert_array_equal(model.means_, [[value, value]])
    truth = -math.log(2 * math.pi) - math.log(1e-6)
    assert model.lower_bound_ == pytest.approx(truth, abs=1e-9)


def test_more_components_than_rows():
    with pytest.raises(DataError, match=r"n_components = 21 with n_samples = 20"):
        AnnealedMixture(21).fit(X)
    twice = np.repeat(X[:4], 10, 0)
    with pytest.raises(DataError, match=r"4 distinct row\(s\) of 40; fit at most 4"):
        AnnealedMixture(5).fit(twice)
    with pytest.warns(TemperingWarning, match=r"4 distinct row\(s\) for the 39 free numbers"):
        assert AnnealedMixture(4, random_state=0).fit(twice).n_components_ == 4


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", None])
def test_numbers_of_components(count):
    with pytest.raises(InputError, match="The 'n_components' parameter of AnnealedMixture must be"):
        AnnealedMixture(count).fit(X)


def test_constraints_are_declared_as_scikit_learns():
    check_param_validation("AnnealedMixture", AnnealedMixture())
    for raised in (InputError, InvalidParameterError, ValueError):
        with pytest.raises(raised, match=r"'tol' parameter .* Got -1 instead"):
            AnnealedMixture(tol=-1).fit(X)
    with pytest.raises(InputError, match="'reg_covar' parameter"):
        AnnealedMixture(reg_covar=-1.0).partial_fit(X)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"covariance_type": "round"}, "'covariance_type' .* must be a str among .*'tied'"),
        ({"kernel": "cauchy"}, "'kernel' .* must be a str among .*'laplace'.* Got 'cauchy'"),
        ({"kernel": "student_t", "nu": 0}, "'nu' .* must be a float in the range .* Got 0"),
        ({"nu": np.inf}, "'nu' .* Got inf"),
        ({"reg_covar": -1e-3}, "'reg_covar' .* Got -0.001"),
        ({"reg_covar": True}, "'reg_covar' .* Got True"),
        ({"tol": 0}, "'tol' .* Got 0"),
        ({"tol": float("nan")}, "'tol' .* Got nan"),
        ({"max_iter": 0}, "'max_iter' .* Got 0"),
        ({"n_init": 0}, "'n_init' .* Got 0"),
        ({"random_state": "one"}, "'random_state' .* Got 'one'"),
        ({"criterion": "aic"}, "'criterion' .* must be a str among .*or None. Got 'aic'"),
        ({"schedule": 3.0}, "'schedule' .* Got 3.0"),
        ({"criterion": "bic", "schedule": "geometric(9,1)"}, 'needs schedule = "adaptive"'),
        ({"distributed": "yes"}, "'distributed' .* Got 'yes'"),
        ({"distributed": True}, "no process group; call torch.distributed.init_process_group"),
        ({"means_init": X[:3]}, r"means_init has shape \(3, 3\); expected \(2, 3\)"),
        ({"means_init": with_value(np.nan)[6:8]}, r"means_init\[1, 2\] is not finite"),
        ({"means_init": [["a", "b", "c"]] * 2}, "means_init can't be read as numbers; give a row"),
        ({"means_init": [[1, 2], [3]]}, "means_init can't be read as numbers"),
        ({"means_init": X[:2], "criterion": "bic"}, "chooses how many components"),
    ],
    ids=str,
)
def test_settings(setting, match):
    with pytest.raises(InputError, match=match):
        AnnealedMixture(2, **setting).fit(X)


@pytest.mark.parametrize(
    ("text", "match"),
    [("geometric(50,2)", "ends at 2"), ("linear(0,1)", "outside 0 < T < inf"), ("warm(3)", "warm")],
)
def test_schedules(text, match):
    with pytest.raises(ScheduleError, match=match):
        AnnealedMixture(2, schedule=text).fit(X)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        (np.zeros(20), "every sample_weight is zero"),
        (np.r_[np.ones(9), -1, np.ones(10)], r"sample_weight\[9\] is -1; expected"),
        (np.r_[np.ones(9), np.nan, np.ones(10)], r"sample_weight\[9\] is nan"),
        (np.ones(19), r"sample_weight has shape \(19,\); expected \(20,\)"),
        (["a"] * 20, "sample_weight can't be read as numbers"),
    ],
    ids=["zero", "negative", "nan", "short", "text"],
)
def test_weights(weights, match):
    with pytest.raises(DataError, match=match):
        AnnealedMixture().fit(X, sample_weight=weights)


def test_weights_that_leave_too_few_rows():
    weights = np.zeros(20)
    weights[:2] = 1
    with pytest.raises(DataError, match=r"n_components = 3 with n_samples = 2 row\(s\) of weight"):
        AnnealedMixture(3).fit(X, sample_weight=weights)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (np.ones((20, 3)) / 3, r"shape \(20, 3\); expected \(20, 2\)"),
        (np.ones((20, 2)), r"responsibilities in row 0 are not a distribution"),
        (np.r_[np.ones((5, 2)) / 2, [[1.5, -0.5]], np.ones((14, 2)) / 2], "in row 5"),
        (np.tile([1.0, 0.0], (20, 1)), "leave component 1 without any row"),
        ([["a", "b"]] * 20, "can't be read as numbers"),
    ],
    ids=["shape", "sum", "negative", "empty", "text"],
)
def test_responsibilities(given, match):
    with pytest.raises(DataError, match=match):
        AnnealedMixture(2).fit(X, responsibilities=given)


def test_two_starts():
    with pytest.raises(InputError, match="give one"):
        AnnealedMixture(2, means_init=X[:2]).fit(X, responsibilities=np.ones((20, 2)) / 2)


def test_columns_that_depend_on_each_other():
    x = np.c_[X, X.sum(1)]
    assert AnnealedMixture(random_state=0).fit(x).converged_
    with pytest.raises(DataError, match="columns that depend on each other"):
        AnnealedMixture(reg_covar=0.0).fit(np.c_[X[:, :1], X[:, :1]])


@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("ratio", [1e-6, 1e-11])
def test_a_ridge_that_float64_holds_mends_columns_that_depend_on_each_other(kind, ratio):
    x = np.c_[X[:, 0], 2 * X[:, 0]]
    variance = X[:, 0].var()
    model = AnnealedMixture(covariance_type=kind, reg_covar=ratio * variance).fit(x)
    # The eigenvalues are r and 5 v + r, and the mean squared distance is 5 v / (5 v + r).
    small, large = ratio * variance, (5 + ratio) * variance
    truth = -math.log(2 * math.pi) - (math.log(small) + math.log(large) + 5 / (5 + ratio)) / 2
    assert model.lower_bound_ == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("kind", ["full", "tied"])
@pytest.mark.parametrize("ratio", [1e-15, 1e-17, 1e-60])
@pytest.mark.parametrize("count", [1, 3])
def test_a_ridge_that_is_lost_in_rounding_mends_nothing(kind, ratio, count):
    x = np.c_[X[:, 0], 2 * X[:, 0]]
    model = AnnealedMixture(count, covariance_type=kind, reg_covar=ratio * X[:, 0].var())
    with pytest.raises(DataError, match="columns that depend on each other"):
        model.fit(x)
    # Each column is scaled by itself: columns of different units are no columns that depend.
    assert AnnealedMixture(covariance_type=kind, reg_covar=0.0).fit(X * [1, 1e9, 1e-9]).converged_


@pytest.mark.parametrize(
    ("kind", "free", "advice"),
    [
        ("full", 29, "'tied' (17 numbers) or 'diag' (20 numbers) or"),
        ("diag", 20, "'tied' (17 numbers) or 'spherical' (14"),
        ("tied", 17, None),
        ("spherical", 14, None),
    ],
)
def test_fewer_rows_than_free_numbers_are_said(kind, free, advice):
    x = np.random.default_rng(0).standard_normal((free, 3))
    settings = {"covariance_type": kind, "n_init": 1, "random_state": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AnnealedMixture(3, **settings).fit(x)
        AnnealedMixture(1, **settings).fit(x[:5])  # one component has one maximum
    with pytest.warns(TemperingWarning, match="do not determine a mixture") as caught:
        AnnealedMixture(3, **settings).fit(np.r_[x[1:], x[1:3]])  # repeats count once
    message = str(caught[0].message)
    assert f"{free - 1} distinct row(s) for the {free} free numbers of 3 components" in message
    assert advice is None or advice in message


def test_too_few_rows_to_hold_out():
    with pytest.raises(DataError, match=r"2 distinct row\(s\), too few to hold out 20%"):
        AnnealedMixture(2, criterion="held-out").fit(np.repeat(X[:2], 5, 0))
