"""TemperatureScaler keeps scikit-learn's contract."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.base import clone, is_classifier
from sklearn.calibration import CalibrationDisplay
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from sklearn.model_selection import cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from tempering.errors import DataError, InputError, TemperingWarning
from tempering.estimators import TemperatureScaler

# What scikit-learn asks of all classifiers, and this one does otherwise on purpose.
ON_PURPOSE = {
    "check_classifiers_one_label": "columns are classes, also those that no label names",
    "check_classifier_not_supporting_multiclass": "the tag spares two columns three labels",
    "check_fit1d": "one score a row is the log odds of two classes",
}


@pytest.mark.parametrize(
    "parameters",
    [{}, {"prior": (0.0, 1.0)}, {"per": "input"}, {"per": "class", "prior": (0.0, 1.0)}],
    ids=str,
)
def test_check_estimator(parameters):
    with warnings.catch_warnings():
        # The checks' random labels miss classes, run from 1, and prefer T beyond the bounds.
        warnings.simplefilter("ignore")
        results = check_estimator(
            TemperatureScaler(**parameters), on_fail=None, expected_failed_checks=ON_PURPOSE
        )
    status = {result["check_name"]: result["status"] for result in results}
    # The array API is checked by scikit-learn only where SCIPY_ARRAY_API is set.
    assert {name for name, found in status.items() if found != "passed"} <= {
        "check_array_api_input",
        *ON_PURPOSE,
    }
    assert "failed" not in status.values()
    assert len(status) > 40


def test_parameters_are_kept_as_given():
    scaler = TemperatureScaler(per="class", prior=[0, 1], bounds=[0.1, 9])
    assert clone(scaler).get_params() == scaler.get_params()
    assert repr(TemperatureScaler(per="class")) == "TemperatureScaler(per='class')"


def draw(n=300, k=3, seed=0):
    rng = np.random.default_rng(seed)
    z = 2 * rng.standard_normal((n, k))
    return z, (z / 1.7 + rng.gumbel(size=(n, k))).argmax(1)


def test_scikit_learn_takes_it_for_a_classifier():
    z, y = draw()
    scaler = TemperatureScaler().fit(z, y)
    assert is_classifier(scaler)
    assert scaler.score(z, y) == accuracy_score(y, z.argmax(1))
    weights = np.arange(300) % 2
    assert scaler.score(z, y, sample_weight=weights) == (z.argmax(1) == y)[1::2].mean()
    # Stratified folds: a regressor's would not shuffle sorted labels among folds.
    order = np.argsort(y)
    scores = cross_val_score(TemperatureScaler(), z[order], y[order], cv=3)
    assert scores.mean() == pytest.approx((z.argmax(1) == y).mean(), abs=0.02)
    losses = cross_val_score(TemperatureScaler(), z, y, scoring="neg_log_loss", cv=3)
    assert (losses < 0).all()


def test_it_ends_a_pipeline_and_is_drawn():
    z, y = draw(k=2)
    chain = make_pipeline(FunctionTransformer(lambda x: 5 * x), TemperatureScaler()).fit(z, y)
    expected = 5 * TemperatureScaler().fit(z, y).temperature_
    assert chain[-1].temperature_ == pytest.approx(expected, rel=1e-9)
    display = CalibrationDisplay.from_estimator(chain, z, y, n_bins=5)
    np.testing.assert_allclose(display.y_prob, chain.predict_proba(z)[:, 1])


def test_the_scores_of_a_classifier_with_named_classes():
    """Labels in sorted order are scikit-learn's columns; a warning says that they were read so."""
    iris = load_iris()
    names = iris.target_names[iris.target]
    model = LogisticRegression(C=1e-2, max_iter=500)
    z = cross_val_predict(model, iris.data, names, method="decision_function")
    with pytest.warns(
        TemperingWarning, match="setosa, versicolor, virginica are not column indices"
    ):
        scaler = TemperatureScaler().fit(z, names)
    assert scaler.temperature_ == TemperatureScaler().fit(z, iris.target).temperature_ < 1
    assert set(scaler.predict(z)) == set(iris.target_names)
    quiet = TemperatureScaler(classes=iris.target_names).fit(z, names)
    assert quiet.temperature_ == scaler.temperature_
    frame = pytest.importorskip("pandas").DataFrame(z, columns=iris.target_names)
    shuffled = frame[["virginica", "setosa", "versicolor"]]
    named = TemperatureScaler().fit(shuffled, names)  # by the names of the columns, no warning
    assert named.temperature_ == pytest.approx(scaler.temperature_, rel=1e-9)
    assert list(named.classes_) == list(shuffled.columns)


@pytest.mark.parametrize("shape", [(300,), (300, 1)])
@pytest.mark.parametrize("how", ["array", "tensor", "reversed", "list"])
def test_binary_scores_are_log_odds(shape, how):
    torch = pytest.importorskip("torch")
    z, y = draw(k=2)
    s = (z[:, 1] - z[:, 0]).reshape(shape)
    x = {
        "array": s,
        "tensor": torch.from_numpy(s),
        "reversed": np.ascontiguousarray(s[::-1])[::-1],
        "list": s.tolist(),
    }[how]
    both = TemperatureScaler().fit(z, y)
    scaler = TemperatureScaler().fit(x, y)
    assert scaler.temperature_ == pytest.approx(both.temperature_, rel=1e-9)
    sigmoid = 1 / (1 + np.exp(-s.ravel() / scaler.temperature_))
    p = np.asarray(scaler.predict_proba(x))
    np.testing.assert_allclose(p, np.stack([1 - sigmoid, sigmoid], 1), rtol=1e-9, atol=1e-12)
    assert (scaler.predict(x) == (s.ravel() > 0)).all()
    assert scaler.report(x, y, resamples=2)["nll"].before.value == pytest.approx(
        both.report(z, y, resamples=2)["nll"].before.value
    )
    assert scaler.n_features_in_ == 1


def test_binary_probabilities_in_one_column():
    z, y = draw(k=2)
    p = 1 / (1 + np.exp(z[:, 0] - z[:, 1]))
    expected = TemperatureScaler().fit(z, y).temperature_
    scaler = TemperatureScaler(inputs="probabilities").fit(p, y)
    assert scaler.temperature_ == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DataError, match=r"every score of X lies between 0 and 1.*say inputs='prob"):
        TemperatureScaler().fit(p, y)
    with pytest.raises(DataError, match="not a distribution"):
        TemperatureScaler(inputs="probabilities").fit(2 * p, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"max_iter": True}, "max_iter = True; expected a whole number, 1 or more"),
        ({"max_iter": np.True_}, "max_iter = np.True_"),
        ({"max_iter": 5.0}, "max_iter = 5.0; expected a whole number"),
        ({"classes": 3}, "classes = 3; expected an array-like or None"),
        ({"prior": "flat"}, "prior = 'flat'"),
        ({"bounds": (1e-310, 1)}, "expected temperatures from 1e-300 to 1e.300"),
    ],
)
def test_constraints_are_declared(parameters, message):
    assert set(TemperatureScaler._parameter_constraints) == set(TemperatureScaler().get_params())
    with pytest.raises(InputError, match=message):
        TemperatureScaler(**parameters).fit(*draw())
