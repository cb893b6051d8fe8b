"""Steps of the tuner against loops in float64, and what a constrained step promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tempering.attention.tuning.steps import (
    Quadratic,
    Secant,
    constrained_step,
    damped_step,
    quadratic,
    secant_update,
    weighted_sum,
)


def _loss(gradients, counts):
    return quadratic(torch.zeros_like(counts), gradients, counts)


def _data(seed: int, batches: int = 7, numbers: int = 4):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(batches, numbers, dtype=torch.float64, generator=generator)
    counts = torch.randint(1, 40, (batches,), generator=generator).double()
    theta = torch.randn(numbers, dtype=torch.float64, generator=generator)
    return gradients, counts, theta


def _fisher_by_loop(gradients, counts):
    total = float(counts.sum())
    size = gradients.shape[1]
    mean = [
        sum(float(n) / total * float(g[i]) for g, n in zip(gradients, counts)) for i in range(size)
    ]
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for g, n in zip(gradients, counts):
        for i in range(size):
            for j in range(size):
                apart = (float(g[i]) - mean[i]) * (float(g[j]) - mean[j])
                fisher[i, j] += float(n) / total * float(n) * apart
    return torch.tensor(mean, dtype=torch.float64), fisher


@pytest.mark.parametrize("seed", range(4))
def test_the_quadratic_is_the_weighted_mean_and_the_fisher_matrix(seed):
    gradients, counts, _ = _data(seed)
    losses = gradients[:, 0] ** 2
    found = quadratic(losses, gradients, counts)
    mean, fisher = _fisher_by_loop(gradients, counts)
    assert found.value == pytest.approx(float((losses * counts).sum() / counts.sum()), rel=1e-12)
    assert torch.allclose(found.gradient, mean, rtol=1e-12)
    assert torch.allclose(found.curvature, fisher, rtol=1e-12)


def test_drawn_gradients_give_the_fisher_matrix():
    gradients, counts, _ = _data(3)
    drawn = torch.stack([_data(seed)[0] for seed in range(10, 15)])
    found = quadratic(gradients[:, 0], gradients, counts, drawn)
    fisher = torch.zeros(4, 4, dtype=torch.float64)
    for draw in drawn:
        for s, n in zip(draw, counts):
            fisher += torch.outer(s, s) * n * n / counts.sum() / 5
    assert torch.allclose(found.curvature, fisher, rtol=1e-12)
    assert torch.equal(found.gradient, quadratic(gradients[:, 0], gradients, counts).gradient)


@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_a_newton_step_solves_its_equation(damping):
    gradients, counts, theta = _data(5)
    delta = damped_step(_loss(gradients, counts), theta, prior=0.3, damping=damping, radius=1e9)
    mean, fisher = _fisher_by_loop(gradients, counts)
    matrix = fisher + damping * torch.diag(fisher.diagonal()) + 0.3 * torch.eye(4)
    assert torch.allclose(matrix @ delta, -(mean + 0.3 * theta), atol=1e-10)


def test_the_radius_bounds_every_number():
    gradients, counts, theta = _data(6)
    free = damped_step(_loss(gradients, counts), theta, prior=0.01, damping=0.1, radius=1e9)
    kept = damped_step(_loss(gradients, counts), theta, prior=0.01, damping=0.1, radius=0.05)
    assert float(kept.abs().max()) == pytest.approx(0.05)
    assert torch.equal(kept.sign(), free.sign())


def test_a_number_that_does_nothing_goes_back_to_its_prior():
    gradients, counts, theta = _data(7)
    gradients[:, 2] = 0.0
    delta = damped_step(_loss(gradients, counts), theta, prior=0.2, damping=0.5, radius=1e9)
    assert float(delta[2]) == pytest.approx(-float(theta[2]), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), aim=st.floats(0.001, 0.5))
def test_a_constrained_step_keeps_its_prediction_within_the_aim(seed, aim):
    gradients, counts, theta = _data(seed, batches=12)
    other, more, _ = _data(seed + 1, batches=12)
    goal = quadratic(gradients[:, 0], gradients / 5, counts)
    limit = quadratic(torch.zeros(12, dtype=torch.float64), other / 20, more)
    options = {"prior": 0.05, "damping": 0.1, "radius": 0.5}
    delta, multiplier = constrained_step(goal, limit, aim, theta, **options)
    free = damped_step(goal, theta, **options)
    assert float(delta.abs().max()) <= 0.5
    if multiplier == 0.0:
        assert torch.equal(delta, free) and limit.at(free) <= aim
    elif multiplier < 1e6:
        assert limit.at(delta) <= aim < limit.at(free)


def test_the_multiplier_is_no_larger_than_it_needs_to_be():
    goal = Quadratic(0.0, torch.tensor([-1.0]).double(), torch.eye(1).double())
    limit = Quadratic(0.0, torch.zeros(1).double(), torch.eye(1).double() * 2)
    # Undamped delta = 1/(1 + 2 m) and the limit is delta^2, so m = (1/sqrt(aim) - 1)/2.
    options = {"prior": 1e-12, "damping": 1e-12, "radius": 10.0}
    for aim in (0.5, 0.1, 0.01):
        delta, multiplier = constrained_step(goal, limit, aim, torch.zeros(1).double(), **options)
        assert multiplier == pytest.approx((aim**-0.5 - 1) / 2, rel=1e-6)
        assert float(delta) == pytest.approx(aim**0.5, rel=1e-6)


def test_a_constraint_out_of_reach_is_followed_alone():
    goal = Quadratic(1.0, torch.tensor([1.0, 0.0]).double(), torch.eye(2).double())
    limit = Quadratic(5.0, torch.tensor([0.0, 2.0]).double(), torch.eye(2).double() * 0.01)
    delta, multiplier = constrained_step(
        goal, limit, 0.0, torch.zeros(2).double(), prior=1e-6, damping=0.1, radius=0.1
    )
    assert multiplier == 1e6
    assert float(delta[1]) == pytest.approx(-0.1)


def test_weighted_sum_adds_values_gradients_and_curvatures():
    one = Quadratic(1.0, torch.ones(2).double(), torch.eye(2).double())
    two = Quadratic(3.0, torch.tensor([0.0, 4.0]).double(), torch.full((2, 2), 2.0).double())
    found = weighted_sum([(2.0, one), (0.5, two)])
    assert found.value == 3.5
    assert found.gradient.tolist() == [2.0, 4.0]
    assert found.curvature.tolist() == [[3.0, 1.0], [1.0, 3.0]]
    delta = torch.tensor([1.0, -1.0]).double()
    assert found.at(delta) == pytest.approx(2 * one.at(delta) + 0.5 * two.at(delta))


# -- the curvature corrected by what steps show


def positive(seed: int, size: int = 5) -> torch.Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


@given(seed=st.integers(0, 10**6))
def test_a_corrected_curvature_says_what_the_step_showed_and_stays_positive(seed: int) -> None:
    B, A = positive(seed), positive(seed + 1)
    s = torch.randn(5, generator=torch.Generator().manual_seed(seed)).double()
    found = secant_update(B, s, A @ s)
    if s @ A @ s >= 0.2 * (s @ B @ s):
        torch.testing.assert_close(found @ s, A @ s)
    assert torch.linalg.eigvalsh(found).min() > 0
    torch.testing.assert_close(found, found.T)


def test_a_step_that_shows_negative_curvature_keeps_it_positive() -> None:
    B, s = positive(1), torch.ones(5, dtype=torch.float64)
    found = secant_update(B, s, -3 * B @ s)
    assert torch.linalg.eigvalsh(found).min() > 0
    torch.testing.assert_close(s @ found @ s, 0.2 * (s @ B @ s))


def test_a_step_of_nothing_changes_nothing() -> None:
    B = positive(2)
    zero = torch.zeros(5, dtype=torch.float64)
    assert torch.equal(secant_update(B, zero, zero), B)
    assert torch.equal(secant_update(torch.zeros(5, 5).double(), zero + 1, zero + 1), 0 * B)


def test_along_the_last_step_the_curvature_is_exact() -> None:
    A, known = positive(3), Secant()
    for place in range(5):
        theta = torch.eye(5, dtype=torch.float64)[:place].sum(0)
        known.at(theta, Quadratic(0.0, A @ theta, torch.eye(5, dtype=torch.float64)))
    last = torch.eye(5, dtype=torch.float64)[3]
    torch.testing.assert_close(known.known @ last, A @ last)
