"""Solving for the temperature of a stated support: accuracy, gradients, limits, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from tempering import posterior, temperature_for
from tempering.errors import EnergyError, SupportError
from tempering.posterior import solve
from tests.unit import posterior_oracle as oracle

inf, nan = math.inf, math.nan


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def geometric(low: float, high: float, count: int) -> list[float]:
    return [10 ** (low + (high - low) * i / (count - 1)) for i in range(count)]


# Each with its reachable supports.
ADVERSARIAL = {
    "two": ([0.0, 1.0], 1, 2),
    "near tie": ([0.0, 1e-15, 1.0], 1, 3),
    "widest": ([0.0, 1e-300, 1.0, 1e300], 1, 4),
    "two plateaus": ([0.0] * 2 + [1e-12] * 6 + [1.0] * 8 + [1e12] * 16, 2, 32),
    "geometric": (geometric(-300, 300, 64), 1, 64),
    "crowd above": ([0.0] + [5.0] * 1000, 1, 1001),
    "crowd below": ([0.0] * 999 + [5.0], 999, 1000),
    "ruled out": ([inf, 3.0, 0.5, inf, 7.0], 1, 3),
    "far offset": ([1e6 + e for e in (0.0, 0.25, 1.0, 3.0)], 1, 4),
    "below zero": ([-1e300, -0.9e300, 1e299], 1, 3),
    # A plain sum of these would be infinite.
    "sum overflows": ([0.0] + [1e306] * 400, 1, 401),
    "tiny": ([0.0, 1e-290, 3e-290], 1, 3),
    "harmonic": ([float(i) for i in range(200)], 1, 200),
}


@pytest.mark.parametrize("row", ADVERSARIAL.values(), ids=ADVERSARIAL)
def test_support_is_met_on_adversarial_rows(row):
    energies, low, high = row
    wide = high - low
    wanted = [low + wide * share for share in (0.5, 0.01, 0.2, 0.8, 0.99, 1e-4, 1 - 1e-4)]
    wanted += [low * (1 + 1e-9), high * (1 - 1e-9), *range(low + 1, min(high, low + 4))]
    T = temperature_for(float64([energies] * len(wanted)), float64(wanted))
    assert torch.isfinite(T).all()
    assert (T > 0).all()
    for i in range(len(wanted)):
        met = oracle.exact(energies, float(T[i]))["support"]
        assert abs(met / oracle.mpf(wanted[i]) - 1) < 1e-6, (wanted[i], float(T[i]))


@pytest.mark.parametrize("near", [1e-2, 1e-5, 1e-9, 1e-12])
def test_distance_from_one_is_met_too(near):
    T = temperature_for(float64([0.0, 1.0, 1.5]), 1 + near)
    met = oracle.exact([0.0, 1.0, 1.5], float(T))["support"] - 1
    # N itself is rounded to 2e-16 when it is given.
    assert float(met) == pytest.approx((1 + near) - 1, rel=1e-6 + 4e-16 / near)


def test_temperature_matches_bisection_in_60_digits():
    row = [0.2, -1.0, 0.7, 3.0, 1.1]
    for wanted in (1.01, 1.7, 3.0, 4.9):
        low, high = oracle.mpf("1e-4"), oracle.mpf("1e4")
        for _ in range(120):
            middle = oracle.mpmath.sqrt(low * high)
            above = oracle.exact(row, middle)["support"] > oracle.mpf(wanted)
            low, high = (low, middle) if above else (middle, high)
        assert float(temperature_for(float64(row), wanted)) == pytest.approx(float(low), rel=1e-11)


@pytest.mark.parametrize(
    ("dtype", "promise"),
    [
        (torch.bfloat16, 1e-5),
        (torch.float16, 1e-5),
        (torch.float32, 1e-5),
        (torch.float64, 1e-9),
        (torch.int64, 1e-9),
    ],
)
@pytest.mark.parametrize("hypotheses", [3, 64, 3000])
def test_every_dtype(dtype, promise, hypotheses):
    energies = (noise(40, hypotheses, seed=1) * 40).to(dtype)
    ties = (energies == energies.amin(-1, keepdim=True)).sum(-1).double()
    share = torch.linspace(0.02, 0.98, 40, dtype=torch.float64)
    wanted = ties + share * (hypotheses - ties)
    T = temperature_for(energies, wanted)
    assert T.dtype == (torch.float64 if promise == 1e-9 else torch.float32)
    met = posterior.support(energies.double(), T.double())
    torch.testing.assert_close(met, wanted, rtol=promise, atol=0)


@pytest.fixture
def turns(monkeypatch) -> list[int]:
    """The numbers of the solver's turns, as they happen."""
    seen: list[int] = []
    step = solve._step

    def counted(rows, space, turn):
        seen.append(turn)
        return step(rows, space, turn)

    monkeypatch.setattr(solve, "_step", counted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2000, 3), (2000, 64), (20, 50_000)])
def test_random_rows_take_few_turns(shape, dtype, turns):
    energies = noise(*shape, seed=2).to(dtype)
    for wanted in (1.05, 1.9, 12.0, 0.5 * shape[1], 0.97 * shape[1]):
        if wanted < shape[1]:
            T = temperature_for(energies, wanted)
            met = posterior.support(energies.double(), T.double())
            torch.testing.assert_close(met, torch.full_like(met, wanted), rtol=1e-5, atol=0)
    assert max(turns) < 12


def test_adversarial_rows_take_a_bounded_number_of_turns(turns):
    for energies, low, high in ADVERSARIAL.values():
        wanted = low + (high - low) * torch.linspace(1e-6, 1 - 1e-6, 99, dtype=torch.float64)
        temperature_for(float64(energies).expand(99, -1), wanted)
    assert max(turns) < 40


def test_finite_fill_values_count_as_hypotheses():
    energies = torch.cat([noise(20, 30, seed=2).float(), torch.full((20, 10), 3.4e38)], -1)
    T = temperature_for(energies, 8.0)
    torch.testing.assert_close(
        posterior.support(energies, T), torch.full((20,), 8.0), rtol=1e-5, atol=0
    )
    T = temperature_for(energies, 35.0)
    met = posterior.support(energies.double(), T.double())
    torch.testing.assert_close(met, torch.full_like(met, 35.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_blocks_change_nothing(size, monkeypatch):
    energies = noise(101, 9, seed=3)
    energies[::7, 3:5] = inf
    wanted = 1.5 + 4 * torch.rand(101, dtype=torch.float64, generator=torch.manual_seed(4))
    whole = temperature_for(energies, wanted)
    monkeypatch.setitem(solve._BLOCK, "cpu", size)
    torch.testing.assert_close(temperature_for(energies, wanted), whole, rtol=1e-9, atol=0)


def test_shapes_and_axes():
    energies = noise(3, 5, 4, seed=5)
    per_row = 1.2 + torch.rand(3, 4, dtype=torch.float64, generator=torch.manual_seed(6))
    T = temperature_for(energies, per_row, dim=1)
    assert T.shape == (3, 4)
    torch.testing.assert_close(posterior.support(energies, T, dim=1), per_row, rtol=1e-9, atol=0)
    by_column = temperature_for(energies, per_row[0], dim=1)
    torch.testing.assert_close(by_column[0], T[0])
    one = temperature_for(energies[0, :, 0], float(per_row[0, 0]))
    assert one.shape == ()
    torch.testing.assert_close(one, T[0, 0])


def test_gauge():
    energies = noise(30, 12, seed=7)
    T = temperature_for(energies, 3.0)
    torch.testing.assert_close(temperature_for(8.0 * energies, 3.0), 8.0 * T, rtol=1e-12, atol=0)
    torch.testing.assert_close(temperature_for(energies + 5.0, 3.0), T, rtol=1e-9, atol=0)


def test_ends_are_reached_at_the_limits():
    energies = float64([[0.0, 0.0, 1.0, inf], [4.0, 2.0, 3.0, 5.0]])
    assert temperature_for(energies, float64([2.0, 1.0])).tolist() == [0.0, 0.0]
    assert temperature_for(energies, float64([3.0, 4.0])).tolist() == [inf, inf]
    mixed = temperature_for(energies, float64([3.0, 1.0]))
    assert mixed.tolist() == [inf, 0.0]
    assert posterior.support(energies, mixed).tolist() == [3.0, 1.0]


@pytest.mark.parametrize("shares", [(0.3,), (0.01, 0.5, 0.97)])
def test_first_and_second_derivatives(shares):
    energies = noise(len(shares), 6, seed=8)
    energies[:, 2] = 50.0
    wanted = float64([1 + 5 * share for share in shares])

    def solved(d, n):
        return temperature_for(torch.cat([d, d.new_full((len(d), 1), inf)], -1), n)

    inputs = (energies.requires_grad_(), wanted.requires_grad_())
    assert gradcheck(solved, inputs, rtol=1e-5)
    assert gradgradcheck(solved, inputs, rtol=1e-5)


def test_gradient_is_the_implicit_one():
    energies, wanted = noise(40, 10, seed=9).requires_grad_(), float64(3.0).requires_grad_()
    T = temperature_for(energies, wanted)
    by_energy, by_support = grad(T.sum(), (energies, wanted))
    state = posterior.thermodynamics(energies, T.detach())
    r, S, C = state.responsibilities, state.entropy, state.heat_capacity
    expected = r * (-r.log() - S.unsqueeze(-1)) / C.unsqueeze(-1)
    torch.testing.assert_close(by_energy, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(by_support, (T / (3.0 * C)).sum(), rtol=1e-9, atol=0)
    # Euler: T is of degree 1 in the energies, and blind to their shift.
    torch.testing.assert_close((by_energy * energies).sum(-1), T, rtol=1e-9, atol=0)
    torch.testing.assert_close(by_energy.sum(-1), torch.zeros_like(T), rtol=0, atol=1e-12)


def test_gradients_at_limits_and_plateaus_are_zero_not_nan():
    energies = float64([[0.0, 1.0, inf], [0.0, 1.0, inf], [0.0, 1e-300, 1.0]]).requires_grad_()
    wanted = float64([1.0, 2.0, 2.0]).requires_grad_()
    T = temperature_for(energies, wanted)
    assert T[:2].tolist() == [0.0, inf]
    for slope in grad(T[:2].sum(), (energies, wanted), retain_graph=True):
        assert not slope.any()
    for slope in grad(T[2], (energies, wanted)):
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("wanted", [0.5, -1.0, 0.0, 4.0001, nan, inf])
def test_out_of_reach(wanted):
    energies = noise(2, 3, 5, seed=11)
    energies[1, 2, :2] = energies[1, 2, 2]
    energies[1, 2, 4] = inf
    target = torch.full((2, 3), 3.5, dtype=torch.float64)
    target[1, 2] = wanted
    with pytest.raises(SupportError, match=r"row\[1, 2\]: support .* is out of reach.* to 4 \("):
        temperature_for(energies, target)


def test_out_of_reach_names_ties_and_values():
    with pytest.raises(
        SupportError,
        match=r"the row: support 1 is out of reach; these energies allow 2 \(tied minimisers, at "
        r"T = 0\) to 3 \(finite energies, at T = inf\)",
    ):
        temperature_for(float64([0.0, 0.0, 4.0]), 1)


def test_rows_are_numbered_across_blocks(monkeypatch):
    monkeypatch.setitem(solve._BLOCK, "cpu", 8)
    energies = noise(9, 4, seed=12)
    wanted = torch.full((9,), 2.0, dtype=torch.float64)
    wanted[7] = 9.0
    with pytest.raises(SupportError, match=r"row\[7\]: support 9 is out of reach"):
        temperature_for(energies, wanted)


@pytest.mark.parametrize("row", [[2.0, 2.0, 2.0], [5.0], [inf, 1.0, inf]])
def test_a_row_that_ties_fixes_no_temperature(row):
    finite = sum(e < inf for e in row)
    with pytest.raises(SupportError, match=rf"the row: all {finite} finite energies tie, so"):
        temperature_for(float64(row), float(finite))


@pytest.mark.parametrize(
    ("row", "wanted"), [([0.0, 1e-37], 1 + 1e-6), ([0.0, 1e-42], 1.5), ([0.0, 3e38], 2 - 1e-6)]
)
def test_a_temperature_beyond_the_dtype_is_refused_or_right(row, wanted):
    wanted = torch.tensor(wanted)
    try:
        T = temperature_for(torch.tensor(row), wanted)
    except SupportError as error:
        assert "needs a temperature that torch.float32 can't hold; give float64" in str(error)
    else:
        met = oracle.exact(torch.tensor(row).tolist(), float(T))["support"]
        assert float(met) == pytest.approx(float(wanted), rel=1e-5)


def test_a_temperature_beyond_float64_is_refused():
    with pytest.raises(SupportError, match=r"row\[1\]: .* torch.float64 can.t hold; give energies"):
        temperature_for(float64([[0.0, 1.0], [0.0, 1e-310]]), 1.2)


def test_bad_energies_and_shapes():
    energies = noise(3, 4, seed=13)
    with pytest.raises(SupportError, match=r"support of shape \(4,\) doesn't broadcast to \(3,\)"):
        temperature_for(energies, torch.full((4,), 2.0))
    energies[2, 1] = nan
    with pytest.raises(EnergyError, match=r"energies\[2, 1\] is NaN"):
        temperature_for(energies, 2.0)
    energies[2] = inf
    with pytest.raises(EnergyError, match=r"row\[2\] has no finite energy"):
        temperature_for(energies, 2.0)
    with pytest.raises(EnergyError, match=r"lies further from its row's minimum"):
        temperature_for(torch.tensor([-3e38, 0.0, 3e38]), 2.0)
