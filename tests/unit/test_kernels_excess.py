"""Differences of energies against 800 digits: they survive where energies round to one number."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from mpmath import mpf

import tempering as tp
from tempering.errors import EnergyError
from tempering.kernels import Angular, Huber, Logistic, Mahalanobis, PseudoHuber
from tempering.temperature import Targeted
from tempering.units import Activation, PrototypeLayer

CENTRES = [
    [0.0, 1.0, 2.5],
    [-1.0, 1.0, 5.0],
    [2.0, -3.0, 0.5, 2.0],
    [-1e6, 7.0, 7.5],
    [1e8, 1e8 + 64, -3.0],
]
LENGTHS = [0.0, 1e-20, 0.1, 0.5, 1.75, 2.0, 40.0, 1e5, 1e8, 1e12, 1e17, 1e30]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(800):  # squares of 1e300 beside 1e-30
        yield


def huber(x):
    return x * x / 2 if abs(x) <= mpf(0.5) else mpf(0.5) * (abs(x) - mpf(0.25))


# kernel, and its energy of a deviation; shape parameters are exact in float32
NOISES = {
    "gaussian": (lambda h: tp.Gaussian(h, sigma=0.5), lambda x: 2 * x * x),
    "laplace": (lambda h: tp.Laplace(h, b=0.5), lambda x: 2 * abs(x)),
    "student-t": (
        lambda h: tp.StudentT(h, sigma=0.5, nu=3.0),
        lambda x: 2 * mpmath.log(1 + x * x / mpf(0.75)),
    ),
    "huber": (lambda h: Huber(h, delta=0.5), huber),
    "pseudo-huber": (
        lambda h: PseudoHuber(h, delta=0.5),
        lambda x: (mpmath.sqrt(1 + 4 * x * x) - 1) / 4,
    ),
    "logistic": (lambda h: Logistic(h, b=0.5), lambda x: 2 * mpmath.log(mpmath.cosh(x))),
    "angular": (lambda h: Angular(h, kappa=0.5), lambda x: (1 - mpmath.cos(x)) / 2),
}
EVERY = pytest.mark.parametrize("name", NOISES)


def above_best(energies):
    least = min(energies)
    return [float(energy - least) for energy in energies]


@DTYPES
@EVERY
@pytest.mark.parametrize("centres", CENTRES, ids=str)
def test_centres_on_the_line_at_every_length(name, centres, dtype):
    make, noise = NOISES[name]
    values = torch.tensor(centres, dtype=dtype)
    z = torch.tensor([*LENGTHS, *(-length for length in LENGTHS)], dtype=dtype)
    if name == "logistic":
        z = z[z.abs() < 1e6]  # the oracle's exponentials end there
        values = values.clamp(-1e6, 1e6)
    found = make(tp.Centred(values)).excess(z)
    eps = torch.finfo(dtype).eps
    for z_i, row in zip(z.tolist(), found.tolist()):
        expected = above_best([noise(mpf(z_i) - mpf(c)) for c in values.tolist()])
        expected = [math.inf if wanted > torch.finfo(dtype).max else wanted for wanted in expected]
        # Sines of an angle are known to eps, not to eps of the sine.
        slack = 8 * eps if name == "angular" else 0.0
        assert row == pytest.approx(expected, rel=40 * eps, abs=max(slack, 1e-37)), z_i


@DTYPES
@pytest.mark.parametrize("z", [1e17, -1e17, 3e30, 1e-20])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e17, 1e31, math.inf])
def test_the_gaussian_posterior_far_out_is_that_of_rational_energies(z, temperature, dtype):
    """The nearest centre wins by (c_h - c_k)(2 z - c_h - c_k)/(2 sigma^2), linear in z."""
    z = torch.tensor([z], dtype=dtype)
    centres = [Fraction(-1), Fraction(1), Fraction(3)]
    energies = [(Fraction(z.item()) - c) ** 2 / 2 for c in centres]
    above = [float(energy - min(energies)) for energy in energies]
    if temperature == 0:
        weights = [float(energy == 0) for energy in above]
    else:
        weights = [math.exp(-energy / temperature) for energy in above]
    expected = [weight / sum(weights) for weight in weights]
    kernel = tp.Gaussian(tp.Centred(torch.tensor([-1.0, 1.0, 3.0], dtype=dtype)))
    r = tp.activation(z, kernel, "full", temperature)
    assert r[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-30)
    if temperature == 0:
        mean = sum(weight * float(c) for weight, c in zip(expected, centres))
        for statistic in ("mean", "mode"):
            assert tp.activation(z, kernel, statistic, 0.0).item() == mean


@DTYPES
@EVERY
def test_slopes_of_duplicate_and_distant_centres(name, dtype):
    """Learned centres move by r_h times the slope of their own energy, also where two coincide."""
    make, _ = NOISES[name]
    centres = torch.tensor([0.25, 0.25, 3.0], dtype=torch.float64, requires_grad=True)
    z = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    kernel = make(tp.Centred(centres))
    weights = torch.tensor([0.3, 0.9, -0.4], dtype=torch.float64)

    def total(energies):
        return (torch.log_softmax(-energies / 2, -1) * weights).sum()

    by_excess = torch.autograd.grad(total(kernel.excess(z)), (z, centres))
    by_energies = torch.autograd.grad(total(kernel.energies(z)), (z, centres))
    torch.testing.assert_close(by_excess, by_energies)
    far = torch.tensor([1e6], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(make(tp.Centred(centres.detach())).excess(far).sum(), far)
    assert torch.isfinite(slope).all()


PROTOTYPES = [
    [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
    [[0.0, 0.0], [1e-3, 0.0], [1e6, 1.0], [1e6, 1.0]],
]
PLACES = [(0.3, 0.1), (1e5, 2.0), (1e5, 1e5), (1e10, 0.3), (-1e17, 1e17), (0.5, 0.5), (0.0, 1e12)]
VECTOR_NOISES = {
    "gaussian": (tp.Gaussian, lambda x: sum(v * v for v in x) / 2),
    "laplace": (tp.Laplace, lambda x: sum(map(abs, x))),
    "student-t": (tp.StudentT, lambda x: mpf(5) / 2 * mpmath.log(1 + sum(v * v for v in x) / 3)),
    "pseudo-huber": (PseudoHuber, lambda x: sum(mpmath.sqrt(1 + v * v) - 1 for v in x)),
    "mahalanobis": (lambda h: Mahalanobis(h, torch.eye(2)), lambda x: sum(v * v for v in x) / 2),
}


@DTYPES
@pytest.mark.parametrize("name", VECTOR_NOISES)
@pytest.mark.parametrize("vectors", PROTOTYPES, ids=["triangle", "clusters"])
def test_prototypes_at_every_length(name, vectors, dtype):
    make, noise = VECTOR_NOISES[name]
    vectors = torch.tensor(vectors, dtype=dtype)
    z = torch.tensor(PLACES, dtype=dtype)
    found = make(tp.Prototypes(vectors)).excess(z)
    eps = torch.finfo(dtype).eps
    for place, row in zip(z.tolist(), found.tolist()):
        deviations = [
            [mpf(a) - mpf(b) for a, b in zip(place, vector)] for vector in vectors.tolist()
        ]
        energies = [noise(deviation) for deviation in deviations]
        best = energies.index(min(energies))
        for h, (value, wanted) in enumerate(zip(row, above_best(energies))):
            # Products of the distance between two prototypes and that from the input.
            apart = math.dist(vectors[h].tolist(), vectors[best].tolist())
            near = float(mpmath.norm(deviations[best])) + apart
            scale = apart * near if name in ("gaussian", "mahalanobis") else wanted + apart
            assert value == pytest.approx(wanted, rel=40 * eps, abs=40 * eps * scale), (place, h)


@DTYPES
def test_the_nearest_prototype_wins_at_every_length(dtype):
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    z = torch.tensor([[1e12, 1e11], [-3e16, 1e15], [1e10, 2.0]], dtype=dtype)
    expected = [[0, 1, 0], [0, 0, 1], [0, 1, 0]]
    for make in (tp.Gaussian, tp.StudentT, lambda h: Mahalanobis(h, torch.eye(2) * 0.1)):
        r = tp.activation(z, make(tp.Prototypes(vectors)), "full", 0.0)
        assert r.tolist() == expected


def test_gradients_of_far_prototypes_are_those_of_the_formula():
    vectors = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors.requires_grad_()
    z = torch.tensor([[90.0, 5.0, -3.0], [0.1, 0.2, 0.3], [-400.0, 9.0, 1.0]], dtype=torch.float64)
    z.requires_grad_()
    for make in (tp.Gaussian, tp.StudentT, tp.Laplace):
        kernel = make(tp.Prototypes(vectors))
        losses = [
            (torch.softmax(-energies / 50, -1)[:, :2]).sum()
            for energies in (kernel.excess(z), kernel.energies(z))
        ]
        torch.testing.assert_close(
            *(torch.autograd.grad(loss, (z, vectors), retain_graph=True) for loss in losses)
        )


def test_free_energy_moves_the_nearest_prototype_alone():
    """Far out all energies round to one number; the responsibilities of the loss do not."""
    layer = PrototypeLayer(2, 3)
    layer.vectors.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    z = torch.tensor([[1e10, 2.0]])
    loss = layer.free_energy(z).sum()
    assert loss.item() == pytest.approx(5e19, rel=1e-6)
    loss.backward()
    assert layer.vectors.grad[1].tolist() == pytest.approx([-1e10, -2.0], rel=1e-6)
    assert not layer.vectors.grad[[0, 2]].any()


def test_a_targeted_temperature_far_out():
    """Two signed hypotheses at support N: T = 2 m z/(sigma^2 l), with l fixed by N."""
    unit = Activation("gaussian", "full", Targeted(1.5))
    near, far = (unit(torch.tensor([z]))[0, 0].item() for z in (3.0, 3e9))
    assert far == pytest.approx(near, rel=1e-5)


def test_directions_of_long_and_short_vectors():
    kernel = Angular(tp.Prototypes(torch.tensor([[1.0, 0.0], [0.0, 1e-30]])))
    z = torch.tensor([[3e30, 4e30], [3e-30, 4e-30], [3.0, 4.0]])
    assert torch.allclose(kernel.energies(z), torch.tensor([0.4, 0.2]).expand(3, 2))


def test_differences_that_overflow_are_dead_or_refused():
    kernel = tp.Gaussian(tp.Centred([0.0, 1e30]))
    z = torch.tensor([1.0])
    assert tp.activation(z, kernel, "full").tolist() == [[1.0, 0.0]]
    with pytest.raises(EnergyError, match=r"energy at \[0, 1\] overflows torch.float32"):
        tp.activation(z, kernel, "full", math.inf)
    wide = tp.activation(z.double(), kernel, "full", math.inf)
    assert wide.tolist() == [[0.5, 0.5]]


@DTYPES
@pytest.mark.parametrize("m", [1e-6, 0.3, 0.5, 0.75, 1.0, 1.5, 40.0, 5e7])
def test_log_odds_of_huber_at_every_length(m, dtype):
    """Centres much further apart than delta: the two clips must not be subtracted."""
    kernel = Huber(torch.tensor(m, dtype=dtype), delta=0.5)
    places = [1e-9, 0.1, 0.4, 0.5, 0.8, 1.0, 1.3, 39.7, 5e7, 1e12, 1e30]
    z = torch.tensor([*places, *(-place for place in places)], dtype=dtype, requires_grad=True)
    odds = kernel.log_odds(z)
    own = torch.as_tensor(kernel.hypotheses.m).item()
    expected = [
        float(huber(mpf(place) + mpf(own)) - huber(mpf(place) - mpf(own))) for place in z.tolist()
    ]
    assert odds.tolist() == pytest.approx(expected, rel=30 * torch.finfo(dtype).eps)
    (slope,) = torch.autograd.grad(odds.sum(), z)
    clips = [
        float(max(min(mpf(place) + mpf(own), 0.5), -0.5))
        - float(max(min(mpf(place) - mpf(own), 0.5), -0.5))
        for place in z.tolist()
    ]
    assert slope.tolist() == pytest.approx(clips, rel=1e-5, abs=4 * own * torch.finfo(dtype).eps)
