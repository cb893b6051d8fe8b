"""TemperatureScaler against independent float64 oracles."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax, softmax

from tempering.estimators import TemperatureScaler
from tempering.estimators.calibration.moments import row_moments


def draw(n=600, k=5, temperature=1.7, scale=2.0, seed=0, dtype=np.float64):
    """Logits and labels whose true temperature is known; every class occurs."""
    rng = np.random.default_rng(seed)
    z = (scale * rng.standard_normal((n, k))).astype(dtype)
    y = (z.astype(np.float64) / np.reshape(temperature, (-1, 1)) + rng.gumbel(size=(n, k))).argmax(
        1
    )
    y[:k] = np.arange(k)
    return z, y


def nll(z, y, temperature, weights=None):
    """Mean loss by scipy, in float64."""
    log_p = log_softmax(z.astype(np.float64) / np.reshape(temperature, (-1, 1)), axis=1)
    return np.average(-log_p[np.arange(len(y)), y], weights=weights)


def best(z, y, weights=None, penalty=lambda log_t: 0.0):
    """The minimiser by a bounded scalar search, in float64."""
    found = minimize_scalar(
        lambda log_t: nll(z, y, np.exp(log_t), weights) + penalty(log_t),
        bounds=(-6, 6),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return np.exp(found.x)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(60, 3000),
    k=st.integers(2, 40),
    log_temperature=st.floats(-1.0, 1.5),
    scale=st.floats(0.5, 8.0),
    single=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_reaches_the_optimum_to_1e_9(n, k, log_temperature, scale, single, seed):
    """Gaussian logits of any size: never above the float64 optimum by more than 1e-9 nats."""
    z, y = draw(n, k, np.exp(log_temperature), scale, seed, np.float32 if single else np.float64)
    if (y == z.argmax(1)).all():
        return  # separable: there is no optimum
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few rows may miss a class or want T beyond the bounds
        scaler = TemperatureScaler().fit(z, y)
    assert scaler.converged_
    target = min(max(best(z, y), 1e-3), 1e3)
    assert nll(z, y, scaler.temperature_) - nll(z, y, target) < 1e-9


def test_row_moments_are_the_loss_and_its_derivatives():
    z, y = draw(40, 6)
    log_beta = torch.linspace(-2, 2, 40, dtype=torch.float64, requires_grad=True)
    logits = torch.from_numpy(z)

    def loss(log_beta):
        log_p = torch.log_softmax(logits * log_beta.exp()[:, None], 1)
        return -log_p.gather(1, torch.from_numpy(y)[:, None]).squeeze(1)

    value = loss(log_beta)
    (slope,) = torch.autograd.grad(value.sum(), log_beta, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), log_beta)
    found = row_moments(
        logits,
        torch.from_numpy(y),
        log_beta.detach(),
        torch.empty(0).double().new_empty(480),
        range(40),
    )
    torch.testing.assert_close(found[0], value.detach())
    torch.testing.assert_close(found[1], slope.detach())
    torch.testing.assert_close(found[2] + found[1], second)
    assert torch.equal(found[3] == 0, torch.from_numpy(z.argmax(1) == y))


@pytest.mark.parametrize("order", ["sorted by label", "periodic", "easy first"])
def test_the_order_of_rows_does_not_matter(order):
    z, y = draw(30000, 10)
    key = {"sorted by label": y, "periodic": np.arange(30000) % 30, "easy first": -z.max(1)}[order]
    rows = np.argsort(key, kind="stable")
    plain, other = TemperatureScaler().fit(z, y), TemperatureScaler().fit(z[rows], y[rows])
    assert other.n_iter_ <= 4
    assert other.temperature_ == pytest.approx(plain.temperature_, rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.05, 20.0), shift=st.floats(-100.0, 100.0))
def test_gauge(scale, shift):
    """z -> a z + c takes T to a T."""
    z, y = draw(300, 4)
    moved = scale * z + shift * np.arange(300)[:, None]
    base, other = TemperatureScaler().fit(z, y), TemperatureScaler().fit(moved, y)
    assert other.temperature_ == pytest.approx(scale * base.temperature_, rel=1e-7)
    np.testing.assert_allclose(other.predict_proba(moved), base.predict_proba(z), atol=1e-9)


def test_weights_count_rows():
    z, y = draw(400, 4)
    times = np.random.default_rng(1).integers(0, 4, 400)
    weighted = TemperatureScaler().fit(z, y, sample_weight=times)
    repeated = TemperatureScaler().fit(z.repeat(times, 0), y.repeat(times))
    assert weighted.temperature_ == pytest.approx(repeated.temperature_, rel=1e-9)
    assert weighted.standard_error_ == pytest.approx(repeated.standard_error_, rel=1e-6)
    assert weighted.temperature_ == pytest.approx(best(z, y, times), rel=1e-6)


def test_standard_error_is_the_spread_of_fits():
    fits = [TemperatureScaler().fit(*draw(400, 4, seed=seed)) for seed in range(150)]
    spread = np.std([np.log(fit.temperature_) for fit in fits])
    stated = np.mean([fit.standard_error_ for fit in fits])
    assert stated == pytest.approx(spread, rel=0.2)  # 150 draws know the spread to 6%


def test_a_temperature_for_each_predicted_class():
    z, y = draw(3000, 3, np.array([0.5, 1.0, 3.0])[draw(3000, 3)[0].argmax(1)])
    scaler = TemperatureScaler(per="class").fit(z, y)
    top = z.argmax(1)
    for c in range(3):
        assert scaler.temperature_[c] == pytest.approx(best(z[top == c], y[top == c]), rel=1e-5)
    p = scaler.predict_proba(z)
    np.testing.assert_allclose(p, softmax(z / scaler.temperature_[top][:, None], axis=1))
    assert (p.argsort(1) == z.argsort(1)).all()
    assert (scaler.predict(z) == top).all()


def test_a_temperature_for_each_group():
    groups = np.array(["b", "a", "c"])[np.arange(3000) % 3]
    z, y = draw(3000, 4, np.array([0.6, 1.0, 2.5])[np.arange(3000) % 3])
    scaler = TemperatureScaler(per="group").fit(z, y, groups=groups)
    assert scaler.groups_.tolist() == ["a", "b", "c"]
    for name, temperature in zip(scaler.groups_, scaler.temperature_):
        rows = groups == name
        assert temperature == pytest.approx(best(z[rows], y[rows]), rel=1e-5)
    np.testing.assert_allclose(
        scaler.temperatures(z, groups)[:3], scaler.temperature_[[1, 0, 2]], rtol=1e-12
    )


def input_loss(scaler, z, y, coefficients):
    """The loss of per-input coefficients, from the definition."""
    p = softmax(z, axis=1)
    features = np.stack([-(p * np.log(p)).sum(1), np.log(p.max(1))], 1)
    standard = (features - scaler.feature_mean_) / scaler.feature_sd_
    log_t = coefficients[0] + standard @ coefficients[1:]
    return nll(z, y, np.exp(np.clip(log_t, *np.log(scaler.bounds))))


def test_a_temperature_from_the_input_itself():
    rng = np.random.default_rng(3)
    z = rng.standard_normal((2000, 4)) * rng.uniform(0.3, 4, (2000, 1))
    p = softmax(z, axis=1)
    entropy = -(p * np.log(p)).sum(1)
    _, y = z, (z / np.exp(1.2 - entropy)[:, None] + rng.gumbel(size=z.shape)).argmax(1)
    scaler = TemperatureScaler(per="input").fit(z, y)
    found = input_loss(scaler, z, y, scaler.coef_)
    search = minimize(
        lambda c: input_loss(scaler, z, y, c), scaler.coef_ + 0.3, options={"gtol": 1e-9}
    )
    assert found - search.fun < 1e-9
    assert found < nll(z, y, best(z, y)) - 0.01
    assert scaler.coef_[1] < 0  # certain inputs were drawn hotter
    features = np.stack([entropy, np.log(p.max(1))], 1)
    np.testing.assert_allclose(scaler.feature_mean_, features.mean(0))
    np.testing.assert_allclose(scaler.feature_sd_, features.std(0))
    np.testing.assert_allclose(
        scaler.predict_proba(z), softmax(z / scaler.temperatures(z)[:, None], axis=1)
    )


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.05), (1.0, 0.2), (-2.0, 1.0)])
def test_prior_on_log_temperature(mean, sd):
    z, y = draw(100, 4)
    scaler = TemperatureScaler(prior=(mean, sd)).fit(z, y)

    def penalty(log_t):
        return (log_t - mean) ** 2 / (2 * sd**2) / len(y)

    assert scaler.n_iter_ <= 13  # two starts, each quadratic
    target = best(z, y, penalty=penalty)
    assert scaler.temperature_ == pytest.approx(target, rel=1e-5)
    second = 1e-4
    f = [
        len(y) * (nll(z, y, target * np.exp(s)) + penalty(np.log(target) + s))
        for s in (-second, 0, second)
    ]
    stated = scaler.standard_error_**-2
    assert stated == pytest.approx((f[0] - 2 * f[1] + f[2]) / second**2, rel=1e-3)


def test_of_two_minima_the_deeper_is_found():
    """A far, narrow prior on very sure logits leaves a minimum near each."""
    z, y = draw(40, 3, temperature=0.05, scale=0.3)
    for mean in (4.0, 5.0):  # the deeper one is near the data, then near the prior
        scaler = TemperatureScaler(prior=(mean, 0.9)).fit(z, y)
        grid = np.linspace(-6, 6.9, 8001)
        values = [40 * nll(z, y, np.exp(t)) + (t - mean) ** 2 / (2 * 0.9**2) for t in grid]
        inner = np.array(values)
        minima = np.flatnonzero((inner[1:-1] < inner[:-2]) & (inner[1:-1] < inner[2:]))
        assert len(minima) == 2
        assert np.log(scaler.temperature_) == pytest.approx(grid[np.argmin(inner)], abs=2e-3)


def test_prior_by_group_and_by_input():
    z, y = draw(90, 3)
    groups = np.arange(90) % 3
    by_group = TemperatureScaler(per="group", prior=(0.3, 0.1)).fit(z, y, groups=groups)
    for g in range(3):
        own = TemperatureScaler(prior=(0.3, 0.1)).fit(z[groups == g], y[groups == g])
        assert by_group.temperature_[g] == pytest.approx(own.temperature_, rel=1e-6)
    by_input = TemperatureScaler(per="input", prior=(0.3, 1e-4)).fit(z, y)
    np.testing.assert_allclose(by_input.coef_, [0.3, 0, 0], atol=1e-4)


def test_parameters_survive_a_second_fit():
    z, y = draw()
    scaler = TemperatureScaler()
    assert scaler.fit(z, y) is scaler
    first = scaler.temperature_
    assert scaler.fit(z, y).temperature_ == first
