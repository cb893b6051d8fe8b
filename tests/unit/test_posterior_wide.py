"""Support solved on wide rows from a sample of each: exact, whatever the sample said."""

import math

import pytest
import torch

from tempering.posterior import solve, support, temperature_for, wide
from tempering.posterior.wide import WIDE, wide_temperature
from tempering.tokens import parse_policy, temper_logits

VOCABULARY = 6001  # no multiple of the stride


def rows_of(kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(map(ord, kind)))
    rows = torch.randn(3, VOCABULARY, generator=g, dtype=torch.float64)
    if kind == "head":
        rows *= 2.2
        rows[:, 100:130] = 10 - torch.empty(3, 30).exponential_(0.6, generator=g).double()
    elif kind == "one head in one slice":  # the sample's slices miss all of the head but one
        rows[:, : 93 * 40 : 93] += 9
    elif kind == "heavy":
        rows = torch.empty(3, VOCABULARY).exponential_(0.4, generator=g).double()
    elif kind == "masked":
        rows = 3 * rows.masked_fill(torch.rand(rows.shape, generator=g) < 0.95, -math.inf)
    elif kind == "nearly all masked":
        rows[:, 40:] = -math.inf
    elif kind == "ties":
        rows = rows.mul(2).round()
    elif kind == "two plateaus":
        rows = torch.where(rows > 2, 0.0, -50.0)
    elif kind == "far apart":
        rows = rows * 1e4
    elif kind == "close together":
        rows = rows * 1e-6
    top = rows.to(dtype).amax(-1, keepdim=True)
    return top - rows.to(dtype)


KINDS = (
    *("normal", "head", "one head in one slice", "heavy", "masked", "nearly all masked", "ties"),
    *("two plateaus", "far apart", "close together"),
)


def known(excess, target):
    ties = (excess == 0).sum(-1).to(excess)
    reach = (excess < math.inf).sum(-1).to(excess)
    return torch.full_like(ties, target), ties, reach


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_support_is_met_on_wide_rows(kind, dtype):
    excess = rows_of(kind, dtype)
    most = int((excess < math.inf).sum(-1).min())
    least = int((excess == 0).sum(-1).max())
    for share in (0.0003, 0.002, 0.02, 0.3, 0.95):
        target = least + (most - least) * share
        found = wide_temperature(excess, *known(excess, target))
        met = support(excess.double(), found.double())
        # float32 rounds the energies' quotients; what it gives is compared in float64.
        bound = 2e-5 if dtype == torch.float32 else 1e-6
        assert met.tolist() == pytest.approx([target] * 3, rel=bound), share
        # And it is the T that the solver of all rows finds.
        other = temperature_for(excess, target)
        again = support(excess.double(), other.double())
        assert met.tolist() == pytest.approx(again.tolist(), rel=2 * bound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_itself_alone(kind):
    excess = torch.cat([rows_of(kind), rows_of("head"), rows_of("two plateaus")[:1]])
    _, ties, reach = known(excess, 1.0)
    target = ties + (reach - ties) * 0.2
    together = wide_temperature(excess, target, ties, reach)
    for row in range(3):
        own = slice(row, row + 1)
        alone = wide_temperature(excess[own], target[own], ties[own], reach[own])
        assert alone.item() == pytest.approx(together[row].item(), rel=2e-6)


def test_few_readings_of_the_whole_row(monkeypatch):
    count = 0
    original = solve.entropy_and_slope

    def counted(*given):
        nonlocal count
        count += 1
        return original(*given)

    monkeypatch.setattr(wide, "entropy_and_slope", counted)
    monkeypatch.setattr(wide, "temperature_for", None)  # is not needed
    for kind in ("normal", "head", "heavy"):
        for target in (2.0, 12.0, 200.0):
            count = 0
            excess = rows_of(kind)
            wide_temperature(excess, *known(excess, target))
            assert count <= 4, (kind, target)


def test_a_start_that_misleads_changes_nothing(monkeypatch):
    excess = rows_of("head")
    wanted = wide_temperature(excess, *known(excess, 12.0))
    for start in (1e-30, 1e-3, 1e3, 1e30, math.nan, math.inf, 0.0):
        monkeypatch.setattr(wide, "_start", lambda rows, _, start=start: rows.new_full((3,), start))
        found = wide_temperature(excess, *known(excess, 12.0))
        assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)


def test_the_policy_solves_wide_rows_so():
    assert VOCABULARY > WIDE
    logits = -rows_of("masked")
    policy = parse_policy("support(7)")
    result, temperature = temper_logits(policy, logits, [policy.state([])] * 3)
    met = support(-result.double(), 1.0)
    assert met.tolist() == pytest.approx([7.0] * 3, rel=2e-5)
    few = torch.full((2, VOCABULARY), -math.inf)
    few[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    few[1] = logits[1]
    _, temperature = temper_logits(policy, few, [policy.state([])] * 2)
    assert temperature[0] == math.inf and 0 < temperature[1] < math.inf
