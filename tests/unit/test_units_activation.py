"""Every kernel with every statistic against a posterior summed up in plain float64."""

from __future__ import annotations

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
    Mahalanobis,
    Prototypes,
    PseudoHuber,
    Signed,
    StudentT,
)
from tempering.units import STATISTICS, activation

LINE = (Gaussian, Laplace, StudentT, Huber, PseudoHuber, Logistic, Angular)
VECTORS = torch.tensor([[0.0, 1.0], [-1.0, 0.5], [2.0, -1.0]], dtype=torch.float64)
COVARIANCE = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
PRIOR = {2: (1.0, 3.0), 3: (1.0, 3.0, 0.5)}


def posterior(energies: np.ndarray, temperature: float, prior: np.ndarray) -> np.ndarray:
    """One row, by definition."""
    if temperature == 0:
        weights = prior * (energies == energies.min())
    elif temperature == math.inf:
        weights = prior
    else:
        weights = prior * np.exp(-(energies - energies.min()) / temperature)
    return weights / weights.sum()


def statistic_of(name: str, z, values: np.ndarray, r: np.ndarray, *, vectors: bool):
    """The value of a statistic, from the responsibilities of one row."""
    if name in ("mode", "gate-mode"):
        r = np.isclose(r, r.max(), rtol=1e-12, atol=0) * 1.0
        r = r / r.sum()
    if name == "full":
        return r
    if name == "entropy":
        return -sum(p * math.log(p) for p in r if p > 0)
    if name in ("gate-mean", "gate-mode"):
        return np.outer(r, z) if vectors else z * r[values > 0].sum()
    mean = r @ values
    if name == "variance":
        return r @ (values - mean) ** 2
    return mean


def kernels(prior: bool):
    def weights(count):
        return PRIOR[count] if prior else None

    for kind in LINE:
        yield kind(Signed(1.3, weights(2))), np.array([-1.0, 1.0])
        centres = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.float64)
        yield kind(Centred(centres, weights(3))), centres.numpy()
        yield kind(Prototypes(VECTORS, weights(3))), VECTORS.numpy()
    yield Mahalanobis(Prototypes(VECTORS, weights(3)), COVARIANCE), VECTORS.numpy()
    m = torch.tensor([1.0, -0.5], dtype=torch.float64)
    yield Mahalanobis(Signed(m, weights(2)), COVARIANCE), np.array([-1.0, 1.0])


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.05, 1.0, 7.0, math.inf])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_kernel_against_the_definition(statistic, temperature, prior):
    for kernel, values in kernels(prior):
        shape = (5, 2) if kernel.takes_vectors else (9,)
        z = torch.linspace(-2.9, 3.1, math.prod(shape), dtype=torch.float64).reshape(shape)
        found = activation(z, kernel, statistic, temperature)
        energies = kernel.energies(z).numpy()
        weights = np.array(PRIOR[len(values)]) if prior else np.ones(len(values))
        rows = []
        for index in np.ndindex(kernel.rows(z)):
            r = posterior(energies[index], temperature, weights)
            vectors = isinstance(kernel.hypotheses, Prototypes)
            if kernel.takes_vectors and not vectors and statistic.startswith("gate"):
                on = statistic_of(statistic, 1.0, values, r, vectors=False)
                rows.append(z[index].numpy() * on)
            else:
                rows.append(statistic_of(statistic, z[index].numpy(), values, r, vectors=vectors))
        expected = np.array(rows).reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, err_msg=str(kernel))


@pytest.mark.parametrize("statistic", STATISTICS)
def test_temperature_per_unit_and_as_a_tensor(statistic):
    z = torch.randn(6, 3, dtype=torch.float64)
    level = torch.tensor([0.0, 0.5, math.inf], dtype=torch.float64)
    for hypotheses in (Signed(1.0), Signed(1.0, (1, 2)), Centred([-1.0, 0.0, 2.0], (1, 2, 3))):
        kernel = Gaussian(hypotheses)
        found = activation(z, kernel, statistic, level)
        for unit in range(3):
            alone = activation(z[:, unit], kernel, statistic, float(level[unit]))
            torch.testing.assert_close(found[:, unit], alone)


@settings(max_examples=25, deadline=None)
@given(a=st.floats(0.01, 100.0), temperature=st.floats(0.05, 20.0), m=st.floats(0.1, 3.0))
def test_gauge_energies_and_temperature_scale_together(a, temperature, m):
    """d -> a d with T -> a T: sigma^2 -> sigma^2/a for the Gaussian, b -> b/a for the Laplace."""
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for statistic in STATISTICS:
        torch.testing.assert_close(
            activation(z, Gaussian(m, a**-0.5), statistic, a * temperature),
            activation(z, Gaussian(m), statistic, temperature),
        )
        torch.testing.assert_close(
            activation(z, Laplace(m, 1 / a), statistic, a * temperature),
            activation(z, Laplace(m), statistic, temperature),
        )


@settings(max_examples=25, deadline=None)
@given(z=st.floats(-5, 5), cold=st.floats(0.01, 5.0), ratio=st.floats(1.0, 50.0))
def test_entropy_rises_and_decisions_soften_with_temperature(z, cold, ratio):
    point = torch.tensor(z, dtype=torch.float64)
    for kind in LINE:
        low, high = (activation(point, kind(), "entropy", t) for t in (cold, cold * ratio))
        assert float(high) >= float(low) - 1e-12
        low, high = (activation(point, kind(), "mean", t).abs() for t in (cold, cold * ratio))
        assert float(high) <= float(low) + 1e-12


@pytest.mark.parametrize("kind", LINE)
@pytest.mark.parametrize("hypotheses", [Signed(1.0), Signed(1.0, (1.0, 3.0)), Centred([-1.0, 1.5])])
def test_limits_are_approached(kind, hypotheses):
    z = torch.tensor([-2.5, -0.7, 0.4, 1.9], dtype=torch.float64)
    for statistic in STATISTICS:
        for near, limit in ((1e-9, 0.0), (1e12, math.inf)):
            if statistic in ("mode", "gate-mode") and limit == math.inf:
                continue  # the mode jumps to a tie only at T = inf itself
            torch.testing.assert_close(
                activation(z, kind(hypotheses), statistic, near),
                activation(z, kind(hypotheses), statistic, limit),
                rtol=1e-9, atol=1e-9,
            )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("statistic", STATISTICS)
def test_dtype_is_kept_and_work_is_wide(dtype, statistic):
    z = torch.linspace(-3, 3, 25).to(dtype)
    for kernel in (Gaussian(1.0, 0.6), Laplace(), Logistic(), Gaussian(Centred([-1.0, 0.5]))):
        for temperature in (1e-30, 0.7):
            found = activation(z, kernel, statistic, temperature)
            assert found.dtype == dtype
            exact = activation(z.double(), kernel, statistic, temperature)
            rounding = max(torch.finfo(dtype).eps, 2e-6)
            torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=rounding)


def test_a_sign_too_small_for_the_energies_is_still_seen():
    """(1e-20 - 1)^2 and (1e-20 + 1)^2 are the same number; the step is not."""
    z = torch.tensor([1e-20, -1e-20, 0.0])
    for kernel in (Gaussian(), StudentT(), Logistic(), Gaussian(Signed(1.0, (2.0, 2.0)))):
        assert activation(z, kernel, "mode").tolist() == [1.0, -1.0, 0.0]
        assert activation(z, kernel, "mean", 0.0).tolist() == [1.0, -1.0, 0.0]


def test_prior_decides_ties_at_zero_and_everything_at_infinity():
    z = torch.zeros(1)
    kernel = Gaussian(Signed(1.0, (1.0, 3.0)))
    for temperature in (0.0, 0.3, math.inf):
        found = activation(z, kernel, "full", temperature)
        torch.testing.assert_close(found, torch.tensor([[0.25, 0.75]]))
    assert activation(torch.tensor([-5.0]), kernel, "mode", math.inf).tolist() == [1.0]
    assert activation(torch.tensor([-5.0]), kernel, "mode", 0.0).tolist() == [-1.0]


def test_student_t_gives_up_far_out():
    z = torch.tensor([1.0, 100.0, 1e6])
    close, far, farther = activation(z, StudentT(), "mean").tolist()
    assert close > 0.5 > far > farther > 0


@pytest.mark.parametrize(
    ("z", "message"),
    [
        ([[0.0, 1.0], [math.nan, 1.0]], r"z\[1, 0\] is nan \(1 in all\)"),
        ([[0.0, math.inf], [math.inf, 1.0]], r"z\[0, 1\] is inf \(2 in all\)"),
    ],
)
@pytest.mark.parametrize("kernel", [Logistic(), Gaussian(Centred([0.0, 1.0, 2.0]))])
def test_inputs_that_are_not_finite_are_named(z, message, kernel):
    with pytest.raises(EnergyError, match=message):
        activation(torch.tensor(z), kernel, "mean")


@pytest.mark.parametrize("statistic", ["mean", "variance", "gate-mean", "mode", "gate-mode"])
def test_closed_forms_pass_not_a_number_on(statistic):
    for temperature in (0.0, 0.7):
        if statistic == "variance" and temperature == 0:
            continue
        found = activation(torch.tensor([math.nan, 1.0]), Gaussian(), statistic, temperature)
        assert math.isnan(found[0]) and not math.isnan(found[1])


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        (-1.0, r"temperature is -1; it must lie in 0..inf"),
        (math.nan, r"temperature is nan"),
        (torch.tensor(-2.0), r"temperature\[\] is -2 \(1 in all\)"),
        (torch.tensor([1.0, math.nan, 1.0]), r"temperature\[1\] is nan \(1 in all\)"),
        (torch.ones(4), r"shape \[4\] doesn't broadcast to the rows of z, \[2, 3\]"),
        (torch.ones(2, 2, 3), r"shape \[2, 2, 3\] doesn't broadcast"),
    ],
)
@pytest.mark.parametrize("kernel", [Gaussian(), Gaussian(Centred([0.0, 1.0]))])
def test_bad_temperatures(temperature, message, kernel):
    with pytest.raises(TemperatureError, match=message):
        activation(torch.zeros(2, 3), kernel, "mean", temperature)


def test_other_bad_input():
    with pytest.raises(InputError, match=r"no statistic 'median'; expected one of: mean, mode"):
        activation(torch.zeros(1), "gaussian", "median")
    with pytest.raises(RefusedError, match="linear is not an activation of this family"):
        activation(torch.zeros(1), "linear", "mean")
    with pytest.raises(RefusedError, match="identity is not an activation of this family"):
        activation(torch.zeros(1), torch.nn.Identity(), "mean")
    with pytest.raises(InputError, match=r"last dimension of z must be 2"):
        activation(torch.zeros(4, 3), Gaussian(Prototypes(VECTORS)), "mean")


@pytest.mark.parametrize("statistic", STATISTICS)
def test_empty_inputs_give_empty_outputs(statistic):
    for kernel in (Gaussian(), Logistic(), Gaussian(Centred([0.0, 1.0, 2.0]))):
        found = activation(torch.zeros(0, 3), kernel, statistic)
        count = (kernel.hypotheses.count,) if statistic == "full" else ()
        assert found.shape == (0, 3, *count)
