"""What TemperatureScaler refuses, and what it says it can't know."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.special import softmax

from tempering.errors import (
    CollapseWarning,
    ConvergenceWarning,
    DataError,
    InputError,
    TemperatureError,
    TemperingWarning,
)
from tempering.estimators import Logits, TemperatureScaler


def draw(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, k))
    y = (z / 1.7 + rng.gumbel(size=(n, k))).argmax(1)
    y[:k] = np.arange(k)
    return z, y


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "contains NaN at row 217, column 2"),
        (np.inf, "contains inf at row 217, column 2"),
    ],
)
@pytest.mark.parametrize("rows", [300, 5000])
def test_rows_that_are_not_numbers(value, message, rows):
    """Named whether or not the warm start's sample met them."""
    z, y = draw(rows)
    z[217, 2] = value
    with pytest.raises(DataError, match=message):
        TemperatureScaler().fit(z, y)
    good = TemperatureScaler().fit(*draw())
    for method in (good.predict_proba, good.predict, good.temperatures):
        with pytest.raises(DataError, match=message):
            method(z)
    with pytest.raises(DataError, match=message):
        good.report(z, y)


def test_no_class_left():
    z, y = draw()
    z[5] = -np.inf
    with pytest.raises(DataError, match="-inf in every column of row 5"):
        TemperatureScaler().fit(z, y)


def test_a_ruled_out_class_is_as_if_absent():
    z, y = draw(400, 3)
    masked = np.concatenate([z, np.full((400, 1), -np.inf)], 1)
    with pytest.warns(TemperingWarning, match=r"1 of 4 classes never occur .* \(3\)"):
        scaler = TemperatureScaler().fit(masked, y)
    assert scaler.temperature_ == pytest.approx(
        TemperatureScaler().fit(z, y).temperature_, rel=1e-9
    )
    assert (scaler.predict_proba(masked)[:, 3] == 0).all()
    huge = np.concatenate([z, np.full((400, 1), np.finfo(np.float32).min)], 1).astype(np.float32)
    with pytest.warns(TemperingWarning, match="never occur"):
        other = TemperatureScaler().fit(huge, y)
    assert other.temperature_ == pytest.approx(scaler.temperature_, rel=1e-5)


def test_a_label_that_is_ruled_out():
    z, y = draw()
    z[31, y[31]] = -np.inf
    with pytest.raises(DataError, match=f"row 31 rules out its own label: .* column {y[31]}"):
        TemperatureScaler().fit(z, y)
    with pytest.raises(DataError, match="row 31 rules out its own label"):
        TemperatureScaler().fit(*draw()).report(z, y)


def test_probabilities_are_never_guessed():
    z, y = draw()
    p = softmax(z, axis=1)
    with pytest.raises(DataError, match=r"these are probabilities, not logits.*inputs='probabil"):
        TemperatureScaler().fit(p, y)
    with pytest.raises(DataError, match=r"row \d+ of X is not a distribution.*inputs='logits'"):
        TemperatureScaler(inputs="probabilities").fit(z, y)
    p[9] *= 1.5
    with pytest.raises(DataError, match=r"row 9 of X is not a distribution .* sum to 1\.5"):
        TemperatureScaler(inputs="probabilities").fit(p, y)
    p[9] = np.nan
    with pytest.raises(DataError, match="NaN or inf at row 9"):
        TemperatureScaler(inputs="probabilities").fit(p, y)


def test_a_sample_that_looks_like_probabilities_is_not_enough():
    """Rows of probabilities among logits: legal as logits, all rows are looked at."""
    z, y = draw(5000)
    p = softmax(z, axis=1)
    p[4999] = [3.0, 0.0, 0.0, 1.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TemperatureScaler().fit(p, y).converged_


def test_probabilities_are_calibrated_through_their_logs():
    z, y = draw()
    p = softmax(z, axis=1)
    scaler = TemperatureScaler(inputs="probabilities").fit(p, y)
    other = TemperatureScaler().fit(z, y)
    assert scaler.temperature_ == pytest.approx(other.temperature_, rel=1e-9)
    np.testing.assert_allclose(scaler.predict_proba(p), other.predict_proba(z), rtol=1e-9)
    with pytest.raises(DataError, match="not a distribution"):
        scaler.predict_proba(z)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: np.where(np.arange(300) == 7, 4, y), r"y\[7\] = 4 is out of range.* 0\.\.3"),
        (lambda y: np.where(np.arange(300) == 7, -1, y), r"y\[7\] = -1 is out of range"),
        (lambda y: y + 0.5, r"Unknown label type: y\[0\] = 0.5 is not a whole number"),
        (
            lambda y: np.array(list("abcc"))[y],
            r"Unknown label type: y has dtype <U1 and 3 labels for 4 columns.*classes=",
        ),
        (lambda y: y == 1, "Unknown label type: y has dtype bool"),
        (lambda y: np.eye(4)[y], r"y has shape \(300, 4\).*argmax"),
        (lambda y: y[:-1], "y has 299 values for 300 rows"),
        (lambda y: None, "requires y to be passed"),
        (lambda y: np.where(np.arange(300) == 7, np.nan, y), r"y\[7\] = nan is not a whole number"),
    ],
)
def test_labels(labels, message):
    z, y = draw()
    with pytest.raises(DataError, match=message):
        TemperatureScaler().fit(z, labels(y))


def test_labels_with_names():
    z, y = draw()
    names = np.array(["dog", "cat", "eel", "ant"])
    scaler = TemperatureScaler(classes=names).fit(z, names[y])
    assert scaler.temperature_ == TemperatureScaler().fit(z, y).temperature_
    assert (scaler.predict(z) == names[z.argmax(1)]).all()
    with pytest.raises(DataError, match=r"y\[2\] = fox is not among classes"):
        TemperatureScaler(classes=names).fit(z, np.where(np.arange(300) == 2, "fox", names[y]))
    with pytest.raises(DataError, match=r"expected 4 different labels.* got 4 of which 3 differ"):
        TemperatureScaler(classes=["a", "b", "c", "c"]).fit(z, y)
    with pytest.raises(DataError, match="expected 4 different labels"):
        TemperatureScaler(classes=[0, 1]).fit(z, y)


def test_labels_from_one_are_read_as_such_but_not_in_silence():
    z, y = draw()
    with pytest.warns(TemperingWarning, match=r"labels run 1\.\.4 .* say classes="):
        scaler = TemperatureScaler().fit(z, y + 1)
    assert scaler.temperature_ == TemperatureScaler().fit(z, y).temperature_
    assert scaler.predict(z).min() == 1
    quiet = TemperatureScaler(classes=[1, 2, 3, 4]).fit(z, y + 1)
    assert quiet.temperature_ == scaler.temperature_


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.zeros(300), "sample weights sum to zero"),
        (np.where(np.arange(300) == 3, -1.0, 1.0), r"sample_weight\[3\] = -1"),
        (np.where(np.arange(300) == 3, np.nan, 1.0), r"sample_weight\[3\] = nan"),
        (np.ones(299), "sample_weight has 299 values for 300 rows"),
        (np.ones((300, 2)), "sample_weight has shape"),
        (np.array(["a"] * 300), "sample_weight has dtype <U1"),
    ],
)
def test_weights(weights, message):
    with pytest.raises(DataError, match=message):
        TemperatureScaler().fit(*draw(), sample_weight=weights)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"inputs": "scores"}, "inputs = 'scores'; expected one of logits, probabilities"),
        ({"per": "row"}, "per = 'row'; expected one of global, class, group, input"),
        ({"bounds": (2, 1)}, "expected 0 < lowest T < highest T"),
        ({"bounds": (0, 1)}, "expected 0 < lowest T"),
        ({"bounds": 3}, "bounds = 3; expected two finite numbers"),
        ({"prior": (0, 0)}, "sd = 0; expected > 0"),
        ({"prior": (0, np.nan)}, "prior = .*; expected two finite numbers"),
        ({"max_iter": 0}, "max_iter = 0"),
    ],
)
def test_parameters(parameters, message):
    with pytest.raises(InputError, match=message):
        TemperatureScaler(**parameters).fit(*draw())


def test_groups():
    z, y = draw()
    with pytest.raises(InputError, match="needs the group of each row"):
        TemperatureScaler(per="group").fit(z, y)
    with pytest.raises(InputError, match="groups were given, but per='global'"):
        TemperatureScaler().fit(z, y, groups=y)
    with pytest.raises(InputError, match="groups were given, but per='input'"):
        TemperatureScaler(per="input").fit(z, y, groups=y)
    scaler = TemperatureScaler(per="group").fit(z, y, groups=np.arange(300) % 2)
    with pytest.raises(InputError, match="needs the group of each row"):
        scaler.predict_proba(z)
    with pytest.raises(DataError, match=r"groups\[1\] = 5 was not in the fit.* are 0, 1"):
        scaler.predict_proba(z[:2], groups=[0, 5])


def test_constant_logits_leave_it_unknown():
    y = np.arange(60) % 3
    for per in ("global", "class", "input"):
        with pytest.raises(TemperatureError, match="not identified: every row of logits is const"):
            TemperatureScaler(per=per).fit(np.full((60, 3), 7.0), y)
    with pytest.warns(TemperingWarning, match="T is unknown: it is the prior's"):
        scaler = TemperatureScaler(prior=(0.5, 0.1)).fit(np.full((60, 3), 7.0), y)
    assert np.log(scaler.temperature_) == pytest.approx(0.5)


def test_separable_labels_drive_it_to_the_named_bound():
    z, _ = draw()
    for per in ("global", "input"):
        with pytest.warns(CollapseWarning, match=r"separable.*T -> 0.*its bound 0\.01"):
            scaler = TemperatureScaler(per=per, bounds=(0.01, 10)).fit(z, z.argmax(1))
        assert scaler.temperature_ == pytest.approx(0.01)
        assert np.isnan(scaler.standard_error_)
    steady = TemperatureScaler(prior=(0.0, 0.5)).fit(z, z.argmax(1))
    assert 0.05 < steady.temperature_ < 1
    assert steady.converged_


def test_labels_worse_than_chance_drive_it_up():
    z, _ = draw()
    with pytest.warns(CollapseWarning, match="above the bound 1000.*no better than chance"):
        scaler = TemperatureScaler().fit(z, z.argmin(1))
    assert scaler.temperature_ == pytest.approx(1000)


def test_a_bound_above_the_optimum():
    with pytest.warns(CollapseWarning, match="below the bound 5"):
        assert TemperatureScaler(bounds=(5, 9)).fit(*draw()).temperature_ == pytest.approx(5)


def test_classes_that_are_never_predicted():
    z, y = draw(600, 3)
    z[:, 2] -= 50
    with pytest.warns(TemperingWarning, match="class 2: no row says anything about T: it is NaN"):
        scaler = TemperatureScaler(per="class").fit(z, y)
    assert np.isnan(scaler.temperature_[2]) and np.isfinite(scaler.temperature_[:2]).all()
    odd = np.concatenate([z[:2], [[0.0, 0.0, 5.0]]])
    with pytest.raises(TemperatureError, match="temperature of class 2, which row 2 needs, is not"):
        scaler.predict_proba(odd)
    with pytest.warns(TemperingWarning, match="class 2: .* it is the prior's"):
        scaler = TemperatureScaler(per="class", prior=(0.2, 1.0)).fit(z, y)
    assert np.log(scaler.temperature_[2]) == pytest.approx(0.2)


def test_one_block_may_be_unknown_while_others_are_known():
    z, y = draw(600, 3)
    groups = np.arange(600) % 3
    z[groups == 0] = 1.0
    y[groups == 1] = z[groups == 1].argmax(1)
    with pytest.warns(TemperingWarning) as told:
        scaler = TemperatureScaler(per="group").fit(z, y, groups=groups)
    texts = "\n".join(str(w.message) for w in told)
    assert "group 0: every row of logits is constant" in texts
    assert "group 1: the data are separable" in texts
    assert np.isnan(scaler.temperature_[0])
    assert scaler.temperature_[1] == pytest.approx(1e-3)
    assert 1 < scaler.temperature_[2] < 3


def test_features_that_never_vary():
    rng = np.random.default_rng(0)
    z = np.array([rng.permutation([2.0, 1.0, 0.0]) for _ in range(300)])
    y = (z / 1.5 + rng.gumbel(size=z.shape)).argmax(1)
    with pytest.warns(TemperingWarning, match="entropy and the log peak .* coefficient is 0"):
        scaler = TemperatureScaler(per="input").fit(z, y)
    assert scaler.coef_[1:].tolist() == [0, 0]
    assert scaler.temperature_ == pytest.approx(TemperatureScaler().fit(z, y).temperature_)


def test_inputs_at_a_bound_are_counted():
    z, y = draw()
    for bounds in ((0.5, 1.6), (0.5, 1.2)):  # near the optimum, far from it
        with pytest.warns(CollapseWarning, match="of 300 rows have their temperature at a bound"):
            scaler = TemperatureScaler(per="input", bounds=bounds).fit(z, y)
        assert scaler.temperatures(z).max() == pytest.approx(bounds[1])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((1, 4)), "n_samples = 1"),
        (np.zeros((1, 1)), "n_samples = 1"),
        (torch.zeros(4, 2, 2), "tensor of shape"),
        (torch.zeros(4, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(0, 3), "n_samples = 0"),
        (np.zeros((4, 2), bool), "real dtype"),
    ],
)
def test_tables_that_are_none(x, message):
    with pytest.raises(DataError, match=message):
        TemperatureScaler().fit(x, np.zeros(len(x), int))


def test_another_width_than_fitted():
    z, y = draw()
    scaler = TemperatureScaler().fit(torch.from_numpy(z), y)
    with pytest.raises(DataError, match=r"X has 3 columns; .* fitted on 4 classes"):
        scaler.predict_proba(torch.from_numpy(z[:, :3]))


def test_too_few_passes():
    with pytest.warns(ConvergenceWarning, match="did not converge in 1 passes; raise max_iter"):
        assert not TemperatureScaler(max_iter=1).fit(*draw(9000)).converged_


class Stubborn(Logits):
    """Logits whose n-th pass is interrupted."""

    def __init__(self, z, good_passes):
        self.z, self.left = torch.from_numpy(z), good_passes
        self.n_rows, self.n_columns = z.shape

    def pieces(self):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        yield self.z


@pytest.mark.parametrize("per", ["global", "class", "input"])
@pytest.mark.parametrize("good_passes", [1, 2, 3])
def test_interrupted_fit_gives_the_best_so_far(per, good_passes):
    z, y = draw(9000)
    full = TemperatureScaler(per=per, max_iter=100).fit(z, y)
    done = 1 + full.n_iter_ + (2 if per == "input" else 0)  # the sample, passes, statistics
    if good_passes >= done:
        pytest.skip("the fit is over by then")
    with pytest.warns(ConvergenceWarning, match=r"interrupted after \d+ passes"):
        scaler = TemperatureScaler(per=per).fit(Stubborn(z, good_passes), y)
    assert not scaler.converged_
    np.testing.assert_allclose(scaler.temperature_, full.temperature_, rtol=0.2)


def test_interrupted_before_anything_is_known():
    z, y = draw(9000)
    with pytest.raises(KeyboardInterrupt):
        TemperatureScaler().fit(Stubborn(z, 0), y)


@pytest.mark.parametrize("bins", [10_001, 10**9, 10**30, np.int64(2**62)])
def test_more_bins_than_memory_holds_are_refused(bins):
    z, y = draw()
    with pytest.raises(InputError, match="expected at most 10000"):
        TemperatureScaler().fit(z, y).report(z, y, bins=bins, resamples=2)
