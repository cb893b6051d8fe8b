"""Energies of every kernel against scipy's densities and the formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tempering.kernels import (
    Angular,
    Centred,
    Gaussian,
    Huber,
    Laplace,
    Logistic,
    Mahalanobis,
    Prototypes,
    PseudoHuber,
    Signed,
    StudentT,
)

COVARIANCE = [[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]]


def huber(x: float, delta: float) -> float:
    return x * x / 2 if abs(x) <= delta else delta * (abs(x) - delta / 2)


# kernel, and minus the log density of a deviation up to a constant, from scipy where it has one
LINE = {
    "gaussian": (lambda m: Gaussian(m, 0.7), lambda x: -stats.norm(scale=0.7).logpdf(x)),
    "laplace": (lambda m: Laplace(m, 0.7), lambda x: -stats.laplace(scale=0.7).logpdf(x)),
    "student-t": (lambda m: StudentT(m, 0.7, 2.5), lambda x: -stats.t(2.5, scale=0.7).logpdf(x)),
    "huber": (lambda m: Huber(m, 0.7), lambda x: huber(x, 0.7)),
    "pseudo-huber": (
        lambda m: PseudoHuber(m, 0.7),
        lambda x: 0.49 * (math.sqrt(1 + (x / 0.7) ** 2) - 1),
    ),
    "logistic": (lambda m: Logistic(m, 0.7), lambda x: -stats.logistic(scale=0.7).logpdf(x)),
    "angular": (lambda m: Angular(m, 0.7), lambda x: 0.7 * (1 - math.cos(x))),
}
EVERY = pytest.mark.parametrize("name", LINE)


@EVERY
def test_signed_energies_are_minus_log_density(name):
    make, cost = LINE[name]
    z = torch.linspace(-6, 6, 49, dtype=torch.float64)
    found = make(1.3).energies(z)
    for z_i, row in zip(z.tolist(), found.tolist()):
        for centre, energy in zip((-1.3, 1.3), row):
            assert energy == pytest.approx(cost(z_i - centre) - cost(0.0), abs=1e-12)


@EVERY
def test_centred_energies(name):
    make, cost = LINE[name]
    centres = [-2.0, 0.5, 0.6, 3.0]
    found = make(Centred(centres)).energies(torch.tensor([0.5, -1.0], dtype=torch.float64))
    expected = [[cost(z - c) - cost(0.0) for c in centres] for z in (0.5, -1.0)]
    np.testing.assert_allclose(found, expected, atol=1e-7)  # centres came as float32


@EVERY
def test_prototype_energies(name):
    make, cost = LINE[name]
    torch.manual_seed(0)
    vectors = torch.randn(4, 3, dtype=torch.float64)
    z = torch.randn(2, 5, 3, dtype=torch.float64)
    found = make(Prototypes(vectors)).energies(z)
    assert found.shape == (2, 5, 4)
    for i in np.ndindex(2, 5, 4):
        point, vector = z[i[:2]].numpy(), vectors[i[2]].numpy()
        if name == "angular":
            cosine = point @ vector / np.linalg.norm(point) / np.linalg.norm(vector)
            expected = 0.7 * (1 - cosine)
        elif name == "student-t":
            density = stats.multivariate_t(vector, np.eye(3) * 0.49, df=2.5)
            expected = density.logpdf(vector) - density.logpdf(point)
        else:
            expected = sum(cost(x) - cost(0.0) for x in point - vector)
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)


def test_mahalanobis_is_a_correlated_gaussian():
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64)
    vectors = torch.randn(4, 3, dtype=torch.float64)
    z = torch.randn(5, 3, dtype=torch.float64)
    found = Mahalanobis(Prototypes(vectors), covariance).energies(z)
    for i, k in np.ndindex(5, 4):
        density = stats.multivariate_normal(vectors[k].numpy(), covariance.numpy())
        expected = density.logpdf(vectors[k]) - density.logpdf(z[i])
        assert float(found[i, k]) == pytest.approx(expected, abs=1e-12)


def test_mahalanobis_signed_log_odds():
    covariance = torch.tensor(COVARIANCE, dtype=torch.float64)
    m = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    kernel = Mahalanobis(m, covariance)
    z = torch.randn(2, 4, 3, dtype=torch.float64)
    energies = kernel.energies(z)
    assert kernel.rows(z) == (2, 4)
    torch.testing.assert_close(kernel.log_odds(z), energies[..., 0] - energies[..., 1])
    torch.testing.assert_close(kernel.log_odds(z), 2 * z @ torch.linalg.inv(covariance) @ m)


@EVERY
@settings(max_examples=25, deadline=None)
@given(z=st.floats(-40, 40), m=st.floats(1e-3, 3.0), width=st.floats(0.05, 20.0))
def test_log_odds_are_the_difference_of_energies(name, z, m, width):
    extra = {"student-t": (3.0,)}.get(name, ())
    kernel = type(LINE[name][0](1.0))(m, width, *extra)
    point = torch.tensor(z, dtype=torch.float64)
    first, second = kernel.energies(point).tolist()
    slack = 1e-12 * (1 + abs(first) + abs(second))
    assert float(kernel.log_odds(point)) == pytest.approx(first - second, rel=1e-9, abs=slack)


@pytest.mark.parametrize("name", sorted(set(LINE) - {"angular"}))
@pytest.mark.parametrize("m", [0.01, 0.5, 5.0])
def test_small_log_odds_keep_their_digits_in_float32(name, m):
    """The difference of two energies has lost them all at z = 1e-12."""
    kernel = LINE[name][0](m)
    tiny = torch.tensor([1e-12, -1e-12])
    exact = LINE[name][0](m).log_odds(torch.tensor([1e-4, -1e-4], dtype=torch.float64)) * 1e-8
    torch.testing.assert_close(kernel.log_odds(tiny).double(), exact, rtol=1e-5, atol=0.0)


@EVERY
def test_log_odds_of_huge_inputs_stay_finite(name):
    z = torch.tensor([1e30, -1e30, 1e18, -1e4])
    odds = LINE[name][0](1.0).log_odds(z)
    assert torch.isfinite(odds).all()
    if name == "student-t":
        torch.testing.assert_close(odds[:2], torch.zeros(2))


def test_near_prototypes_far_from_the_origin_stay_apart():
    """||z||^2 - 2 z.w + ||w||^2 in float32 gives 0 or 1024 here."""
    kernel = Gaussian(Prototypes(torch.tensor([[1e5, 1e5], [1e5 + 1, 1e5]])))
    energies = kernel.energies(torch.tensor([[1e5, 1e5]]))
    torch.testing.assert_close(energies, torch.tensor([[0.0, 0.5]]))


def test_scale_and_temperature_are_one_control():
    z = torch.linspace(-3, 3, 7)
    wide = Gaussian(1.0, math.sqrt(2.0)).energies(z)
    torch.testing.assert_close(wide, Gaussian(1.0, 1.0).energies(z) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@EVERY
def test_work_is_at_least_float32(name, dtype):
    kernel = LINE[name][0](1.0)
    z = torch.tensor([-2.0, 0.25, 1.5], dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert kernel.energies(z).dtype == kernel.log_odds(z).dtype == wide
    torch.testing.assert_close(
        kernel.energies(z).double(), kernel.energies(z.double()), rtol=1e-6, atol=1e-6
    )


def test_parameters_per_unit():
    m, sigma = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    z = torch.randn(4, 3)
    found = Gaussian(m, sigma)
    for unit in range(3):
        alone = Gaussian(float(m[unit]), float(sigma[unit]))
        torch.testing.assert_close(found.energies(z)[:, unit], alone.energies(z[:, unit]))
        torch.testing.assert_close(found.log_odds(z)[:, unit], alone.log_odds(z[:, unit]))
    rows = Centred(torch.tensor([[0.0, 1.0], [0.0, 2.0], [-1.0, 1.0]]))
    torch.testing.assert_close(
        Laplace(rows).energies(z)[:, 1], Laplace(Centred([0.0, 2.0])).energies(z[:, 1])
    )


def test_prior_is_normalised_and_ratios_matter():
    work = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(
        Signed(1.0, (1, 3)).log_prior(work), torch.log(torch.tensor([0.25, 0.75]).double())
    )
    assert Signed(1.0).log_prior(work) is None
