"""The posterior takes numbers as users hold them: arrays of any strides, lists, and tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tempering as tp
from tempering.errors import EnergyError, InputError, SupportError, TemperatureError

D = np.array([[0.3, 1.1, 0.2, 2.0], [1.0, 0.0, 4.0, 0.5], [2.0, 2.5, 0.1, 0.0]])
T = np.array([0.5, 1.0, 2.0])
QUANTITIES = {
    "responsibilities": tp.responsibilities,
    "log_partition": tp.log_partition,
    "free_energy": tp.free_energy,
    "mean_energy": tp.mean_energy,
    "entropy": tp.entropy,
    "support": tp.support,
    "heat_capacity": tp.heat_capacity,
    "peak": tp.peak,
    "susceptibility": tp.susceptibility,
    "information": tp.information,
    "temperature_for": lambda d, t: tp.temperature_for(d, 1.7),
    "canonical": lambda d, t: tp.canonical(d).energies,
    "thermodynamics": lambda d, t: tp.thermodynamics(d, t).support,
}


def record_field(a):
    record = np.zeros(len(a), dtype=[("flag", "i1"), ("value", a.dtype, a.shape[1:])])
    record["value"] = a
    return record["value"]


def frozen(a):
    a = a.copy()
    a.flags.writeable = False
    return a


FORMS = {
    "array": lambda a: a,
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(map(tuple, a.tolist())) if a.ndim == 2 else tuple(a.tolist()),
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "by column": np.asfortranarray,
    "field of a record": record_field,
    "other byte order": lambda a: a.astype(">f8"),
    "long double": lambda a: a.astype(np.longdouble),
    "read-only": frozen,
    "data frame": lambda a: pytest.importorskip("pandas").DataFrame(a).squeeze(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", QUANTITIES)
def test_every_form_gives_the_float64_tensor(name, form):
    expected = QUANTITIES[name](torch.from_numpy(D), torch.from_numpy(T))
    found = QUANTITIES[name](FORMS[form](D), FORMS[form](T))
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float64
    assert torch.equal(found, expected)


def test_float32_arrays_stay_float32_and_integers_are_exact():
    assert tp.support(D.astype(np.float32), np.float32(0.5)).dtype == torch.float32
    assert tp.support(np.array([0, 1], np.uint8)).dtype == torch.float64
    assert tp.support([0, 0, 5], 0.0).item() == 2
    assert tp.temperature_for(D, [1.5, 2.0, 3.0]).shape == (3,)


def test_weights_of_information_may_have_any_size():
    expected = tp.information(torch.from_numpy(D), weights=torch.tensor([1.0, 2.0, 3.0]))
    for factor in (1e308 / 3, 1e-310, 1.0):
        weights = np.array([1.0, 2.0, 3.0]) * factor
        assert tp.information(D, weights=weights).item() == pytest.approx(expected.item(), rel=1e-9)
        single = tp.information(D.astype(np.float32), weights=weights)
        assert single.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(InputError, match="weights must be finite, not negative, and not all 0"):
        tp.information(D, weights=[-1.0, -2.0, -3.0])


def test_variance_and_temperature():
    assert tp.temperature_from_variance(2.0) == 2.0
    assert tp.variance_from_temperature(np.array([1.0, 2.0])[::-1]).tolist() == [2.0, 1.0]
    with pytest.raises(TemperatureError, match=r"sigma2\[1\] is -1"):
        tp.temperature_from_variance([1.0, -1.0])


@pytest.mark.parametrize(
    ("energies", "message"),
    [
        ("0 1", "energies must be a tensor, an array or a list of real numbers; got str"),
        ([0.0, None], "got list of object"),
        (np.array([True, False]), "got ndarray of bool"),
        (np.array([1j, 2.0]), "got ndarray of complex128"),
        ([[0.0, 1.0], [2.0]], "got a list whose rows differ in length"),
        ([0.0, math.nan], r"energies\[1\] is NaN"),
        (3.0, "have no dimension"),
        (np.array(["a"]), "got ndarray of <U1"),
    ],
)
def test_what_holds_no_energies(energies, message):
    with pytest.raises(EnergyError, match=message):
        tp.responsibilities(energies)


def test_what_holds_no_temperature_or_support():
    with pytest.raises(TemperatureError, match="temperature must be a tensor.*got bool"):
        tp.support(D, True)
    with pytest.raises(TemperatureError, match="temperature must be a tensor.*got list of <U1"):
        tp.support(D, ["a"])
    with pytest.raises(TemperatureError, match=r"temperature of shape \(2,\) doesn't broadcast"):
        tp.support(D, [1.0, 2.0])
    with pytest.raises(SupportError, match="support must be a tensor.*got str"):
        tp.temperature_for(D, "2")


def test_units_and_regimes_take_them_too():
    z = np.array([-1.0, 0.5, 2.0])[::-1]
    expected = torch.tanh(torch.from_numpy(z.copy()))
    assert torch.allclose(tp.activation(z, "gaussian", "mean"), expected)
    assert torch.allclose(tp.activation(z.tolist(), "gaussian", "mean"), expected)
    assert torch.allclose(tp.Activation("gaussian", "mean")(z), expected)
    per_unit = tp.activation(z, "gaussian", "mean", np.array([1.0, 2.0, 4.0])[::-1])
    assert torch.allclose(per_unit, torch.tanh(torch.from_numpy(z / np.array([4.0, 2.0, 1.0]))))
    assert tp.Laplace(b=z[:2] + 3).log_odds(z[:2]).shape == (2,)
    assert tp.Fixed(np.array([1.0, 2.0])[::-1])().tolist() == [2.0, 1.0]
    assert tp.Targeted(2.0)(D).tolist() == tp.temperature_for(D, 2.0).tolist()
    layer = tp.PrototypeLayer(2, np.int64(3))
    assert layer([[0.0, 1.0]]).shape == (1, 3)
    assert layer.free_energy(np.zeros((4, 2))).shape == (4,)
    with pytest.raises(InputError, match="z must be floating point; got torch.int64"):
        tp.activation(np.array([1, 2]), "gaussian", "entropy")
    with pytest.raises(InputError, match="z must be a tensor.*got str"):
        tp.Activation("gaussian", "mean")("1")


def test_masked_entries_are_refused_wherever_an_array_is_taken():
    """numpy, torch and scikit-learn would use the value that lies under the mask."""
    from tempering.estimators import AnnealedMixture, TemperatureScaler

    rows = np.random.default_rng(0).normal(size=(12, 2))
    hidden = np.ma.array(rows, mask=rows == rows[3, 1])
    labels = (rows[:, 1] > rows[:, 0]).astype(int)
    labels[:2] = 1 - labels[:2]  # else they are separable, and the best T is 0
    masked_labels = np.ma.array(labels, mask=np.arange(12) == 5)
    weights = np.ma.array(np.ones(12), mask=np.arange(12) == 7)
    mixture, scaler = AnnealedMixture(1).fit(rows), TemperatureScaler().fit(rows, labels)
    for place, call in {
        r"energies\[3, 1\]": lambda: tp.responsibilities(hidden, 1.0),
        r"X\[3, 1\] ": lambda: AnnealedMixture(1).fit(hidden),
        r"X\[3, 1\] is": lambda: mixture.predict_proba(hidden),
        r"sample_weight\[7\]": lambda: AnnealedMixture(1).fit(rows, sample_weight=weights),
        r"X\[3, 1\] is masked": lambda: TemperatureScaler().fit(hidden, labels),
        r"X\[3, 1\] is masked, so": lambda: scaler.predict_proba(hidden),
        r"y\[5\]": lambda: TemperatureScaler().fit(rows, masked_labels),
        r"sample_weight\[7\] is": lambda: scaler.fit(rows, labels, sample_weight=weights),
        r"groups\[5\]": lambda: TemperatureScaler(per="group").fit(
            rows, labels, groups=masked_labels
        ),
    }.items():
        with pytest.raises(InputError, match=place):
            call()
    shown = np.ma.array(rows, mask=False)  # no entry is masked
    assert np.array_equal(mixture.predict_proba(shown), mixture.predict_proba(rows))
    assert np.array_equal(scaler.predict_proba(shown), scaler.predict_proba(rows))
