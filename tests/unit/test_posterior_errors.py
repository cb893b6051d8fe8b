"""Bad input to the posterior: refused, with the position and the reason."""

from __future__ import annotations

import math

import pytest
import torch

from tempering import posterior
from tempering.errors import EnergyError, InputError, TemperatureError

inf, nan = math.inf, math.nan
EVERY = [
    posterior.responsibilities,
    posterior.log_partition,
    posterior.free_energy,
    posterior.mean_energy,
    posterior.entropy,
    posterior.support,
    posterior.heat_capacity,
    posterior.peak,
    posterior.thermodynamics,
    posterior.susceptibility,
    posterior.information,
]


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (nan, r"energies\[1, 0, 2\] is NaN \(1 in all\)"),
        (-inf, r"energies\[1, 0, 2\] is -inf \(1 in all\).*to rule a hypothesis out give \+inf"),
    ],
)
def test_bad_energy_is_named(function, bad, text):
    energies = torch.zeros(2, 2, 3)
    energies[1, 0, 2] = bad
    with pytest.raises(EnergyError, match=text):
        function(energies)


@pytest.mark.parametrize("function", [*EVERY, posterior.canonical], ids=lambda f: f.__name__)
def test_row_without_finite_energy_is_named(function):
    energies = torch.zeros(2, 2, 3)
    energies[1, 1] = inf
    with pytest.raises(EnergyError, match=r"row\[1, 1\] has no finite energy along dim 2 \(1 such"):
        function(energies)


def test_row_is_named_along_another_axis():
    energies = torch.zeros(3, 4)
    energies[:, 2] = inf
    with pytest.raises(EnergyError, match=r"row\[2\] has no finite energy along dim 0"):
        posterior.entropy(energies, dim=0)


@pytest.mark.parametrize("function", EVERY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("bad", [-1.0, -1e-30, nan, -inf])
def test_bad_temperature_is_named(function, bad):
    with pytest.raises(TemperatureError, match=r"temperature\[0, 1\] is .* expected 0\.\.inf"):
        function(torch.zeros(2, 2, 3), torch.tensor([1.0, bad]))
    with pytest.raises(TemperatureError, match=r"temperature.* is .* expected 0\.\.inf"):
        function(torch.zeros(3), bad)


@pytest.mark.parametrize("shape", [(3,), (2, 1, 1), (2, 2, 3), (5, 2, 2)])
def test_temperature_of_a_wrong_shape_names_both(shape):
    with pytest.raises(TemperatureError) as caught:
        posterior.responsibilities(torch.zeros(2, 2, 3), torch.ones(shape))
    assert f"shape {shape}" in str(caught.value)
    assert "(2, 2), the shape of the energies (2, 2, 3)" in str(caught.value)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.bool), torch.ones(2) * 1j])
def test_temperature_must_be_real(value):
    with pytest.raises(TemperatureError, match="temperature must be real, got torch"):
        posterior.support(torch.zeros(2, 3), value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_energies_must_be_real(dtype):
    with pytest.raises(EnergyError, match=f"energies must be real numbers, got {dtype}"):
        posterior.entropy(torch.zeros(2, 3, dtype=dtype))


def test_there_must_be_hypotheses():
    with pytest.raises(EnergyError, match=r"shape \(2, 0\) have no hypotheses along dim -1"):
        posterior.entropy(torch.zeros(2, 0))
    with pytest.raises(EnergyError, match=r"shape \(\) have no dimension -1"):
        posterior.entropy(torch.tensor(1.0))
    with pytest.raises(EnergyError, match=r"shape \(2, 3\) have no dimension 2"):
        posterior.entropy(torch.zeros(2, 3), dim=2)


def test_a_spread_beyond_the_dtype_is_refused():
    energies = torch.tensor([[0.0, 1.0], [-3e38, 3e38]])
    with pytest.raises(EnergyError, match=r"energies\[1, 1\] lies further .* torch.float32"):
        posterior.responsibilities(energies, 1e38)
    assert posterior.support(energies.double(), 1e38).isfinite().all()


def test_bad_weights():
    energies = torch.zeros(2, 3)
    for weights in ([1.0, -1.0], [0.0, 0.0], [1.0, nan], [1.0, inf]):
        with pytest.raises(InputError, match="weights must be finite, not negative, and not all"):
            posterior.information(energies, weights=torch.tensor(weights))
    with pytest.raises(InputError, match=r"weights of shape \(3,\) doesn't broadcast to \(2,\)"):
        posterior.information(energies, weights=torch.ones(3))
    with pytest.raises(InputError, match=r"shape \(0, 3\) hold no inputs"):
        posterior.information(torch.zeros(0, 3))


@pytest.mark.parametrize("bad", [-1.0, nan])
def test_bad_variance(bad):
    with pytest.raises(TemperatureError, match="sigma2 is"):
        posterior.temperature_from_variance(bad)
    with pytest.raises(TemperatureError, match=r"temperature\[1\] is"):
        posterior.variance_from_temperature(torch.tensor([1.0, bad]))
