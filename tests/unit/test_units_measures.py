"""Reports of activations: against closed forms and brute force, and the law of data processing."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.errors import EnergyError, InputError, RefusedError, TemperatureError
from tempering.kernels import (
    Angular,
    Centred,
    Gaussian,
    Huber,
    Laplace,
    Logistic,
    Prototypes,
    Signed,
    StudentT,
)
from tempering.posterior import information
from tempering.units import STATISTICS, information_kept, report

Z = torch.linspace(-4, 4, 1001, dtype=torch.float64)


def test_slopes_of_tanh():
    found = report("gaussian", "mean", 0.5, Z)
    slopes = 2 / np.cosh(2 * Z.numpy()) ** 2
    assert found.sensitivity == pytest.approx(slopes.mean())
    assert found.steepest == pytest.approx(2.0)
    assert found.saturation == pytest.approx((slopes <= 0.02).mean())


def test_saturation_grows_as_temperature_falls():
    shares = [report("gaussian", "mean", t, Z).saturation for t in (4.0, 1.0, 0.25, 0.0)]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


def test_slopes_of_vectors_are_jacobian_norms():
    vectors = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]], dtype=torch.float64)
    torch.manual_seed(0)
    z = torch.randn(7, 2, dtype=torch.float64)
    found = report(Gaussian(Prototypes(vectors)), "mean", 0.8, z)

    def mean(point):
        return torch.softmax(-(point - vectors).square().sum(-1) / 1.6, 0) @ vectors

    norms = [float(torch.func.jacrev(mean)(point).norm()) for point in z]
    assert found.sensitivity == pytest.approx(np.mean(norms))
    assert found.steepest == pytest.approx(max(norms))


def test_trade_off_against_its_definition():
    found = report("laplace", "mean", 0.7, Z, noise=0.3, seed=5)
    generator = torch.Generator().manual_seed(5)
    shaken = Z + 0.3 * torch.randn(Z.shape, generator=generator, dtype=torch.float64)

    def on(z):
        return (1 + np.tanh(np.clip(z.numpy(), -1, 1) / 0.7)) / 2

    here, there = on(Z), on(shaken)
    entropy = -(here * np.log(here) + (1 - here) * np.log(1 - here))
    assert found.decisiveness == pytest.approx(1 - entropy.mean() / math.log(2))
    assert found.robustness == pytest.approx(1 - math.sqrt(((there - here) ** 2).mean()))
    rms = math.sqrt(float((shaken - Z).square().mean()))
    assert found.noise_gain == pytest.approx(math.sqrt(((2 * (there - here)) ** 2).mean()) / rms)


@pytest.mark.parametrize(
    "kernel", [Gaussian(), Laplace(), Logistic(), Gaussian(Centred([-2.0, 0, 1]))]
)
def test_heat_buys_robustness_and_costs_decisiveness(kernel):
    curve = report(kernel, "mean", 1.0, Z).trade_off
    assert len(curve.temperature) == 33
    assert list(curve.temperature) == sorted(curve.temperature)
    assert (np.diff(curve.decisiveness) <= 1e-12).all()
    assert (np.diff(curve.robustness) >= -1e-3).all()
    assert curve.decisiveness[0] > 0.9 > 0.1 > curve.decisiveness[-1]
    assert curve.robustness[0] < 0.95 < 0.999 < curve.robustness[-1]


def test_trade_off_does_not_depend_on_the_gauge():
    """sigma -> 3 sigma divides the energies by 9: temperatures follow, the curve stays."""
    narrow, wide = (report(Gaussian(1.0, s), "mean", 1.0, Z).trade_off for s in (1.0, 3.0))
    np.testing.assert_allclose(np.array(wide.temperature) * 9, narrow.temperature)
    np.testing.assert_allclose(wide.decisiveness, narrow.decisiveness, atol=1e-9)
    np.testing.assert_allclose(wide.robustness, narrow.robustness, atol=1e-9)


def test_information_of_a_mode_against_brute_force():
    kernel = Gaussian(Centred([-2.0, 0.0, 1.0]))
    kept = information_kept(kernel, 0.6, Z)
    r = torch.softmax(-kernel.energies(Z) / 0.6, -1).numpy()
    assert kept["full"] == pytest.approx(float(information(kernel.energies(Z), 0.6)))

    def entropy(p):
        return -sum(x * math.log(x) for x in p if x > 0)

    winner = r.argmax(1)
    left = sum((winner == h).mean() * entropy(r[winner == h].mean(0)) for h in range(3))
    # No input ties here, and the three modes are told apart at any resolution.
    assert kept["mode"] == pytest.approx(entropy(r.mean(0)) - left)


def test_signed_statistics_keep_what_they_should():
    kept = information_kept("gaussian", 0.5, Z)
    assert kept["mean"] == pytest.approx(kept["full"], rel=0.02)  # the mean is the posterior
    assert kept["mode"] < 0.95 * kept["mean"]  # a sign without its confidence
    assert kept["variance"] == pytest.approx(0.0, abs=1e-3)  # blind to the sign
    assert kept["entropy"] == pytest.approx(0.0, abs=1e-3)
    assert information_kept("gaussian", math.inf, Z) == dict.fromkeys(STATISTICS, 0.0)
    cold = information_kept("gaussian", 0.0, Z[Z != 0])
    assert cold["full"] == cold["mean"] == cold["mode"] == pytest.approx(math.log(2))


@settings(max_examples=25, deadline=None)
@given(
    temperature=st.floats(0.0, 30.0),
    hypotheses=st.sampled_from([Signed(1.0), Signed(0.5, (1, 4)), Centred([-1.0, 0.2, 0.9, 3.0])]),
    kind=st.sampled_from([Gaussian, Laplace, StudentT, Huber, Angular]),
    levels=st.integers(2, 300),
)
def test_no_statistic_keeps_more_than_the_posterior(temperature, hypotheses, kind, levels):
    kept = information_kept(kind(hypotheses), temperature, Z[::5], levels=levels)
    for statistic in STATISTICS:
        assert -1e-12 <= kept[statistic] <= kept["full"] + 1e-12


def test_a_report_is_plain_values_and_repeats_itself():
    z = torch.randn(100)
    found = report(StudentT(), "entropy", 2.0, z)
    loaded = json.loads(json.dumps(found.as_dict()))
    assert loaded["kernel"] == "StudentT" and loaded["n"] == 100 and loaded["seed"] == 0
    assert set(loaded["information"]) == set(STATISTICS)
    assert len(loaded["trade_off"]["robustness"]) == 33
    assert found == report(StudentT(), "entropy", 2.0, z)
    assert found.robustness != report(StudentT(), "entropy", 2.0, z, seed=1).robustness


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("gaussian", "mean", 1.0, torch.zeros(5)), InputError, "at least 2 inputs that differ"),
        (("gaussian", "mean", 1.0, torch.ones(1)), InputError, r"got 1 of shape \[1\]"),
        (("gaussian", "mean", 1.0, torch.tensor([0.0, math.nan])), EnergyError, r"z\[1\] is nan"),
        (("gaussian", "mean", -1.0, Z), TemperatureError, "temperature is -1"),
        (("gaussian", "median", 1.0, Z), InputError, "no statistic 'median'"),
        (("identity", "mean", 1.0, Z), RefusedError, "identity is not an activation"),
    ],
)
def test_bad_input(given, error, message):
    with pytest.raises(error, match=message):
        report(*given)


def test_bad_options():
    with pytest.raises(InputError, match=r"noise is 0; expected a positive"):
        report("gaussian", "mean", 1.0, Z, noise=0.0)
    with pytest.raises(InputError, match=r"levels = 1; expected a whole number, 2 or more"):
        information_kept("gaussian", 1.0, Z, levels=1)
