"""TemperatureScaler keeps scikit-learn's contract."""

from __future__ import annotations

import warnings

import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from tempering.estimators import TemperatureScaler


@pytest.mark.parametrize(
    "parameters",
    [{}, {"prior": (0.0, 1.0)}, {"per": "input"}, {"per": "class", "prior": (0.0, 1.0)}],
    ids=str,
)
def test_check_estimator(parameters):
    with warnings.catch_warnings():
        # The checks' random labels miss classes, run from 1, and prefer T beyond the bounds.
        warnings.simplefilter("ignore")
        results = check_estimator(TemperatureScaler(**parameters), on_fail=None)
    status = {result["check_name"]: result["status"] for result in results}
    # The array API is checked by scikit-learn only where SCIPY_ARRAY_API is set.
    assert {name for name, found in status.items() if found != "passed"} <= {
        "check_array_api_input"
    }
    assert "failed" not in status.values()
    assert len(status) > 40


def test_parameters_are_kept_as_given():
    scaler = TemperatureScaler(per="class", prior=[0, 1], bounds=[0.1, 9])
    assert clone(scaler).get_params() == scaler.get_params()
    assert repr(TemperatureScaler(per="class")) == "TemperatureScaler(per='class')"
