"""The closed forms of in-context learning that a benchmark holds against searches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
_regression = pytest.importorskip("_regression")

X = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
W = torch.tensor([1.0, 0.2, 0.6], dtype=torch.float64)
BASE = _regression.Setting(X, W, 0.5, 9)


@pytest.mark.parametrize(
    "setting",
    [
        BASE,
        replace(BASE, inputs=2 * X),
        replace(BASE, tasks=W.flip(0)),
        replace(BASE, noise=2.0),
        replace(BASE, examples=30),
        replace(BASE, examples=2),
    ],
)
def test_moments_agree_with_means_over_prompts(setting):
    weights = _regression.pretrained(BASE) + 0.05 * torch.arange(9.0).double().view(3, 3)
    exact = _regression.moments(weights, setting)
    seen = _regression.drawn(weights, setting, 40_000, torch.Generator().manual_seed(0))
    a, d = seen.shift, seen.left
    for values, expected in zip((a * a, a * d, d * d), exact, strict=True):
        assert abs(float(values.mean()) - expected) < 4 * float(values.std()) / len(values) ** 0.5


def test_pretrained_weights_are_best_at_one_and_best_of_all():
    weights = _regression.pretrained(BASE)
    found = _regression.moments(weights, BASE)
    assert found.best == pytest.approx(1, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = weights + 0.01 * torch.randn(3, 3, dtype=torch.float64, generator=generator)
        assert _regression.moments(other, BASE).error(1.0) > found.error(1.0)


def test_the_error_at_the_best_temperature_is_the_least():
    found = _regression.moments(_regression.pretrained(BASE), replace(BASE, inputs=2 * X))
    assert found.best > 1.5
    assert found.error(found.best) < min(found.error(found.best * x) for x in (0.99, 1.01))


def test_linearised_softmax_is_the_limit_of_blunt_softmax():
    weights = _regression.pretrained(BASE)
    seen = _regression.drawn(weights, BASE, 200, torch.Generator().manual_seed(0))
    for temperature in (0.5, 2.0):
        wanted = float((seen.left - seen.shift / temperature).square().mean())
        assert seen.softmax_error(temperature, 1e-6) == pytest.approx(wanted, rel=1e-4)


def test_temperature_from_labels_is_a_newton_step():
    in_context = pytest.importorskip("in_context")
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(40, 4, dtype=torch.float64, generator=generator)
    slope = torch.randn(40, 4, dtype=torch.float64, generator=generator)
    goals = torch.randint(4, (40,), generator=generator)
    step = in_context.STEP
    found = in_context.from_labels(z + step * slope, z, z - step * slope, goals)

    def loss(beta):
        return torch.nn.functional.cross_entropy(z + (beta - 1) * slope, goals)

    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(loss(one), one, create_graph=True)
    (h,) = torch.autograd.grad(g, one)
    assert found == pytest.approx(float((1 / (1 - g / h)).detach()), rel=1e-9)
    # A slope that the labels want reversed beyond 1/T = 0 gives no temperature.
    along = torch.nn.functional.one_hot(goals, 4).double()
    assert in_context.from_labels(-step * along, 0 * z, step * along, goals) is None


def test_moments_of_logits_leave_out_what_is_hidden():
    in_context = pytest.importorskip("in_context")
    logits = torch.tensor([[[[1.0, 3.0, -torch.inf]]], [[[2.0, 2.0, 8.0]]]], dtype=torch.float64)
    found = object.__new__(in_context.Moments)
    found.sums = torch.zeros(2, 2, dtype=torch.float64)
    found.add(logits)
    p = torch.softmax(logits.flatten(0, 2), -1)
    mean = (p * logits.flatten(0, 2).nan_to_num(neginf=0)).sum(-1)
    square = (p * logits.flatten(0, 2).nan_to_num(neginf=0).square()).sum(-1)
    assert found.sums[0].tolist() == pytest.approx([1.0 + 8.0, 2.0 + 4.0])
    assert found.sums[1].tolist() == pytest.approx(
        [float((square - mean**2).sum()), float(mean.sum())]
    )
