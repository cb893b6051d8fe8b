"""Values of the posterior's quantities against 60-digit arithmetic, limits, dtypes, shapes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tempering import posterior
from tests.unit import posterior_oracle as oracle

inf = math.inf
PER_ROW = (
    "log_partition",
    "free_energy",
    "mean_energy",
    "entropy",
    "support",
    "heat_capacity",
    "peak",
)
ROWS = {
    "plain": [0.3, -1.2, 2.5, 0.0, 1.7],
    "ties": [2.0, 2.0, 3.0, 3.0],
    "ruled out": [1.0, inf, -0.5, inf],
    "single": [-3.0],
    "all but one out": [inf, 4.0, inf],
    "far offset": [1e6, 1e6 + 1, 1e6 + 2],
    "near tie": [0.0, 1e-9, 1.0],
    "wide": [0.0, 1.0, 1e300, 1e-300],
}


def float64(row: list[float]) -> torch.Tensor:
    return torch.tensor(row, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1e-3, 0.03, 0.7, 1.0, 5.0, 1e3, 1e8])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_quantities_match_60_digits(row, temperature):
    wanted = oracle.exact(row, temperature)
    got = posterior.thermodynamics(float64(row), temperature)
    np.testing.assert_allclose(
        got.responsibilities.numpy(),
        [float(r) for r in wanted["responsibilities"]],
        rtol=1e-9 if abs(row[0]) > 1e3 else 1e-12 * max(1, 10 / temperature),
        atol=1e-300,
    )
    for name in PER_ROW:
        single = getattr(posterior, name)(float64(row), temperature)
        assert torch.equal(single, getattr(got, name)), name
        # The condition of the problem: an energy's rounding, times its share in the result.
        loose = 1e-13 * max(1.0, max(abs(e) for e in row if abs(e) < 1e200) / temperature)
        assert float(single) == pytest.approx(float(wanted[name]), rel=loose, abs=1e-300), name


@pytest.mark.parametrize("beta", [20, 50, 200, 500, 700])
def test_small_entropy_keeps_its_relative_accuracy(beta):
    row, T = [0.0, 1.0, 1.25], 1.0 / beta
    wanted = oracle.exact(row, T)
    for name in ("entropy", "heat_capacity"):
        value = float(getattr(posterior, name)(float64(row), T))
        assert value > 0
        assert value == pytest.approx(float(wanted[name]), rel=1e-12)


def test_entropy_near_infinite_temperature():
    row = [0.0, 0.5, 3.0, -2.0]
    for T in (1e3, 1e6, 1e9):
        missing = math.log(4) - float(posterior.entropy(float64(row), T))
        # log H - S -> Var/(2 T^2): all digits of S are right, so the gap is to 1e-15 absolute.
        assert missing == pytest.approx(np.var(row) / (2 * T**2), rel=4 / T, abs=1e-15)


def test_cold_limit_is_shared_by_the_ties():
    got = posterior.thermodynamics(float64([1.0, -2.0, 5.0, -2.0, inf]), 0.0)
    assert got.responsibilities.tolist() == [0.0, 0.5, 0.0, 0.5, 0.0]
    assert got.log_partition == inf
    assert got.free_energy == -2.0
    assert got.mean_energy == -2.0
    assert got.entropy == pytest.approx(math.log(2), rel=1e-15)
    assert got.support == 2.0
    assert got.heat_capacity == 0.0
    assert got.peak == 0.5


def test_hot_limit_is_uniform_over_finite_energies():
    got = posterior.thermodynamics(float64([1.0, -2.0, 5.0, inf]), inf)
    third = 1 / 3
    assert got.responsibilities.tolist() == [third, third, third, 0.0]
    assert got.log_partition == pytest.approx(math.log(3), rel=1e-15)
    assert got.free_energy == -inf
    assert got.mean_energy == pytest.approx(4 / 3, rel=1e-15)
    assert got.entropy == pytest.approx(math.log(3), rel=1e-15)
    assert got.support == 3.0
    assert got.heat_capacity == 0.0
    assert got.peak == third


def test_limits_of_a_lone_hypothesis_and_of_log_partition():
    alone = float64([inf, 7.0])
    assert posterior.free_energy(alone, inf) == 7.0
    assert posterior.log_partition(alone, inf) == 0.0
    assert posterior.log_partition(alone, 0.0) == -inf
    assert posterior.log_partition(float64([0.0, 0.0, 1.0]), 0.0) == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tensor", [False, True])
def test_extreme_temperatures_give_the_limits_in_every_dtype(dtype, tensor):
    energies = torch.tensor([[1.0, 2.0, 1.0], [-4.0, 3.0, inf]], dtype=dtype)
    for tiny, huge in ((1e-30, 1e30), (1e-45, 1e38), (5e-324, 1.7e308)):
        for given, limit in ((tiny, 0.0), (huge, inf)):
            T = torch.tensor(given, dtype=torch.float64) if tensor else given
            got = posterior.responsibilities(energies, T)
            assert torch.equal(got, posterior.responsibilities(energies, limit))
            assert torch.isfinite(posterior.support(energies, T)).all()
            assert torch.isfinite(posterior.entropy(energies, T)).all()
            assert torch.isfinite(posterior.mean_energy(energies, T)).all()


def test_both_limits_in_one_temperature():
    energies = float64([[0.0, 1.0, 3.0]]).expand(4, 3)
    T = float64([0.0, 1.0, inf, 0.5])
    together = posterior.thermodynamics(energies, T)
    for i in range(4):
        alone = posterior.thermodynamics(energies[i], float(T[i]))
        for name in ("responsibilities", *PER_ROW):
            assert torch.equal(getattr(together, name)[i], getattr(alone, name)), name


@pytest.mark.parametrize(
    ("given", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int32, torch.float64),
        (torch.int64, torch.float64),
        (torch.uint8, torch.float64),
    ],
)
def test_dtypes(given, result):
    energies = torch.tensor([[0, 1, 2], [3, 1, 7]], dtype=given)
    for value in posterior.thermodynamics(energies, 1.5):
        assert value.dtype == result
    wanted = posterior.responsibilities(energies.double(), 1.5)
    assert torch.allclose(
        posterior.responsibilities(energies, 1.5).double(), wanted, rtol=1e-6, atol=0
    )


def test_large_integers_are_not_rounded_into_ties():
    energies = torch.tensor([2**40, 2**40 + 1])
    assert posterior.responsibilities(energies, 0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis(dim):
    energies = torch.randn(4, 5, 6, dtype=torch.float64, generator=torch.manual_seed(1))
    T = torch.rand(energies.amin(dim).shape, dtype=torch.float64) + 0.5
    moved = posterior.thermodynamics(energies.movedim(dim, -1).contiguous(), T)
    got = posterior.thermodynamics(energies, T, dim=dim)
    torch.testing.assert_close(got.responsibilities.movedim(dim, -1), moved.responsibilities)
    for a, b in zip(got[1:], moved[1:]):
        torch.testing.assert_close(a, b)


def test_temperature_broadcasts_without_the_hypothesis_axis():
    energies = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.manual_seed(2))
    for T in (torch.tensor([[0.5], [2.0]]), torch.tensor([0.5, 1.0, 2.0]), torch.tensor(3)):
        spread = torch.broadcast_to(T.double(), (2, 3))
        got = posterior.support(energies, T)
        for i in range(2):
            for j in range(3):
                one = posterior.support(energies[i, j], float(spread[i, j]))
                assert float(got[i, j]) == pytest.approx(float(one), rel=1e-14)


def test_empty_batch():
    got = posterior.thermodynamics(torch.empty(0, 3), 1.0)
    assert got.responsibilities.shape == (0, 3)
    assert all(value.shape == (0,) for value in got[1:])
    assert posterior.temperature_for(torch.empty(0, 3), 2.0).shape == (0,)


def test_energies_near_the_end_of_float32():
    huge = 3.4e38
    energies = torch.tensor([-1.0, 2.0, huge, huge])
    wanted = posterior.responsibilities(torch.tensor([-1.0, 2.0, inf, inf]), 1.0)
    assert torch.equal(posterior.responsibilities(energies, 1.0), wanted)
    assert torch.isfinite(posterior.mean_energy(energies, inf))
    assert torch.isfinite(posterior.canonical(energies).spread)


def test_susceptibility_matches_its_formula_and_limits():
    row = [0.0, 0.4, 1.3, inf]
    r = oracle.exact(row, 0.7)["responsibilities"]
    wanted = [[-r[h] * ((h == k) - r[k]) / oracle.mpf(0.7) for k in range(4)] for h in range(4)]
    got = posterior.susceptibility(float64(row), 0.7)
    np.testing.assert_allclose(got.numpy(), np.array(wanted, dtype=float), rtol=1e-13)
    cold = posterior.susceptibility(float64([[0.0, 1.0, 2.0], [0.0, 0.0, 2.0]]), 0.0)
    assert torch.equal(cold[0], torch.zeros(3, 3, dtype=torch.float64))
    assert cold[1].tolist() == [[-inf, inf, 0.0], [inf, -inf, 0.0], [0.0, 0.0, 0.0]]
    assert not posterior.susceptibility(float64(row), inf).any()
    assert posterior.susceptibility(torch.randn(2, 3, 5)).shape == (2, 3, 5, 5)


def test_susceptibility_of_a_near_certain_row_has_no_cancellation():
    got = posterior.susceptibility(float64([0.0, 60.0]), 1.0)
    assert float(got[0, 0]) == pytest.approx(-math.exp(-60), rel=1e-12)


def test_information_matches_its_formula():
    energies = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.manual_seed(3))
    weights = torch.rand(3, 5, dtype=torch.float64, generator=torch.manual_seed(4))
    d, w = energies.numpy().reshape(-1, 4), weights.numpy().reshape(-1)
    r = np.exp(-d / 0.6)
    r /= r.sum(1, keepdims=True)

    def entropy(p):
        return -(p * np.log(p)).sum(-1)

    equal = entropy(r.mean(0)) - entropy(r).mean()
    weighted = entropy(w @ r / w.sum()) - w @ entropy(r) / w.sum()
    assert float(posterior.information(energies, 0.6)) == pytest.approx(equal, rel=1e-12)
    got = posterior.information(energies, 0.6, weights=weights)
    assert float(got) == pytest.approx(weighted, rel=1e-12)
    moved = posterior.information(energies.movedim(-1, 0), 0.6, dim=0, weights=weights)
    assert float(moved) == pytest.approx(weighted, rel=1e-12)


def test_information_at_its_ends():
    certain = torch.where(torch.eye(4, dtype=torch.bool), 0.0, inf).double()
    assert float(posterior.information(certain)) == pytest.approx(math.log(4))
    assert float(posterior.information(certain, inf)) == pytest.approx(math.log(4))
    same = float64([0.1, 0.7, 2.0]).expand(6, 3)
    assert 0 <= float(posterior.information(same)) < 1e-15
    assert float(posterior.information(same[0])) < 1e-15
    unused = float64([[0.0, 1.0, inf], [1.0, 0.0, inf]]).requires_grad_()
    posterior.information(unused).backward()
    assert torch.isfinite(unused.grad).all()


def test_canonical_gauge():
    energies = float64([[5.0, 7.0, inf, 9.0], [2.0, 2.0, 2.0, inf]])
    got = posterior.canonical(energies)
    assert got.shift.tolist() == [5.0, 2.0]
    assert got.spread.tolist() == [2.0, 1.0]
    assert got.energies.tolist() == [[0.0, 1.0, inf, 2.0], [0.0, 0.0, 0.0, inf]]
    back = got.shift.unsqueeze(-1) + got.spread.unsqueeze(-1) * got.energies
    assert torch.equal(back, energies)
    sideways = posterior.canonical(energies.T, dim=0)
    assert torch.equal(sideways.energies.T, got.energies)
    assert sideways.shift.shape == sideways.spread.shape == (2,)


def test_variance_and_temperature_are_one_control():
    raw = float64([0.0, 3.0, 1.0])
    T = posterior.temperature_from_variance(2.5)
    assert posterior.variance_from_temperature(T) == 2.5
    torch.testing.assert_close(
        posterior.responsibilities(raw / 2.5, 1.0), posterior.responsibilities(raw, T)
    )
    assert posterior.temperature_from_variance(raw) is raw
