"""The competitive layer: its loss, its volume controls, its monitor; trained on digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import normalized_mutual_info_score
from torch import nn

from tempering.errors import EnergyError, InputError, TemperatureError
from tempering.kernels import Angular, Gaussian, Laplace, StudentT
from tempering.temperature import Learned
from tempering.units import PrototypeLayer, monitor, volume_terms


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, labels


def trained(images, *, encoder: bool, controls: bool, seed: int):
    torch.manual_seed(seed)
    net = nn.Linear(64, 8) if encoder else nn.Identity()
    layer = PrototypeLayer(8 if encoder else 64, 10)
    optimiser = torch.optim.Adam([*net.parameters(), *layer.parameters()], lr=0.02)
    for _ in range(150):
        z = net(images[torch.randint(len(images), (256,))])
        loss = layer.free_energy(z).mean()
        if controls:
            loss = loss + sum(layer.regulariser(z))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return layer.responsibilities(net(images))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("encoder", [True, False])
def test_digits_collapse_without_controls_and_not_with_them(digits, encoder, seed):
    images, labels = digits
    free = monitor(trained(images, encoder=encoder, controls=False, seed=seed))
    r = trained(images, encoder=encoder, controls=True, seed=seed)
    held = monitor(r)
    assert free.collapsed and not held.collapsed
    assert not held.dead and not held.dominant
    # An encoder pulls all inputs into one point; without one, prototypes start too far and die.
    assert free.information < 0.05 < 0.6 < held.information
    assert encoder or free.dead
    assert normalized_mutual_info_score(labels, r.argmax(-1)) > 0.4


@pytest.mark.parametrize(
    "kernel", [Gaussian(1.0, 0.8), Laplace(), StudentT(), Angular(), "gaussian"]
)
@pytest.mark.parametrize("prior", [None, [1, 2, 3]])
def test_free_energy_has_responsibilities_for_its_gradient(kernel, prior):
    torch.manual_seed(0)
    layer = PrototypeLayer(4, 3, kernel, temperature=0.6, prior=prior).double()
    z = torch.randn(5, 4, dtype=torch.float64)
    energies = layer.kernel.energies(z).detach()
    weights = torch.ones(3) if prior is None else torch.tensor(prior) / sum(prior)
    weights = weights.double()
    z_sum = (weights * torch.exp(-energies / 0.6)).sum(-1)
    torch.testing.assert_close(layer.free_energy(z), -0.6 * torch.log(z_sum))
    r = weights * torch.exp(-energies / 0.6) / z_sum.unsqueeze(-1)
    torch.testing.assert_close(layer.responsibilities(z), r)

    # dF/dw = sum_k r_k dd_k/dw: the gradient of EM, with responsibilities held fixed.
    (grad,) = torch.autograd.grad(layer.free_energy(z).sum(), layer.vectors)
    (em,) = torch.autograd.grad((r * layer.kernel.energies(z)).sum(), layer.vectors)
    torch.testing.assert_close(grad, em)


def test_layer_statistics_and_shapes():
    z = torch.randn(2, 5, 4)
    assert PrototypeLayer(4, 3)(z).shape == (2, 5, 3)
    assert PrototypeLayer(4, 3, statistic="mean")(z).shape == (2, 5, 4)
    assert PrototypeLayer(4, 3, statistic="entropy")(z).shape == (2, 5)
    assert PrototypeLayer(4, 3, statistic="gate-mean")(z).shape == (2, 5, 3, 4)
    layer = PrototypeLayer(4, 3, temperature=Learned(0.5))
    layer(z)[..., 0].sum().backward()
    assert layer.vectors.grad is not None and layer.temperature.unbounded.grad is not None


def oracle(r: np.ndarray, floor: float, minimum: float) -> list[float]:
    """The four terms from their formulas, in loops."""
    count = r.shape[1]
    mean = r.mean(0)
    variance = ((r - mean) ** 2).mean(0)
    balanced = (1 - 1 / count) / count
    pairs = []
    for h in range(count):
        for k in range(count):
            if h != k:
                covariance = ((r[:, h] - mean[h]) * (r[:, k] - mean[k])).mean()
                pairs.append(max(0.0, covariance / math.sqrt(variance[h] * variance[k])) ** 2)
    return [
        float(np.mean([max(0.0, math.log(balanced / v)) for v in variance])),
        float(np.mean(pairs)),
        max(0.0, math.log(floor) + float((mean * np.log(mean)).sum())),
        float(np.mean([max(0.0, math.log(minimum / m)) for m in mean])),
    ]


def test_volume_terms_against_their_formulas():
    torch.manual_seed(0)
    logits = 2 * torch.randn(40, 5, dtype=torch.float64)
    logits[:, 1] = logits[:, 0] + 0.3 * logits[:, 1]
    logits[:, 4] -= 5
    log_r = torch.log_softmax(logits, -1)
    terms = volume_terms(log_r.reshape(8, 5, 5), support_floor=4.8, minimum=0.15)
    expected = oracle(log_r.exp().numpy(), 4.8, 0.15)
    assert all(value > 0 for value in expected)
    np.testing.assert_allclose([float(term) for term in terms], expected, rtol=1e-4)


def test_volume_terms_are_0_for_a_fair_hard_assignment():
    log_r = torch.where(torch.eye(4, dtype=torch.bool), 0.0, -60.0).repeat(5, 1).log_softmax(-1)
    for term in volume_terms(log_r):
        assert float(term) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("gap", [20.0, 1e3, 1e6])
def test_the_dead_are_pulled_back_however_dead(gap):
    """exp(-1e6) is no number that a gradient survives; its logarithm is."""
    z = torch.randn(64, 2)
    layer = PrototypeLayer(2, 3)
    with torch.no_grad():
        layer.vectors[0] = torch.tensor([math.sqrt(2 * gap), 0.0])
    before = layer.vectors[0].norm()
    (grad,) = torch.autograd.grad(layer.regulariser(z).minimum_mean, layer.vectors)
    assert torch.isfinite(grad).all()
    after = (layer.vectors[0] - 1e-3 * grad[0]).norm()
    assert after < before


def test_volume_gradients():
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    for name in ("variance", "decorrelation", "entropy_floor", "minimum_mean"):
        assert torch.autograd.gradcheck(
            lambda x, name=name: getattr(
                # the scale of each column is detached: it cancels, so the gradient is whole
                volume_terms(torch.log_softmax(x, -1), support_floor=4, minimum=0.25), name
            ),
            logits, atol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"support_floor": 5}, r"support_floor is 5; expected 1..4"),
        ({"minimum": 0.3}, r"minimum is 0.3; expected over 0 and at most 1/K = 0.25"),
        ({"minimum": 0}, r"minimum is 0; expected over 0"),
    ],
)
def test_floors_that_no_posterior_reaches(given, message):
    with pytest.raises(InputError, match=message):
        volume_terms(torch.zeros(3, 4), **given)


def test_other_refusals():
    with pytest.raises(InputError, match=r"got 1 input\(s\), expected at least 2"):
        PrototypeLayer(4, 3).regulariser(torch.zeros(1, 4))
    with pytest.raises(InputError, match="got 4 features and 1 prototypes"):
        PrototypeLayer(4, 1)
    for level in (0.0, math.inf):
        with pytest.raises(TemperatureError, match="need 0 < T < inf"):
            PrototypeLayer(4, 3, temperature=level).free_energy(torch.zeros(2, 4))
    with pytest.raises(EnergyError, match=r"z\[0, 1\] is nan"):
        PrototypeLayer(2, 3)(torch.tensor([[0.0, math.nan]]))
    layer = PrototypeLayer(2, 3)
    with torch.no_grad():
        layer.vectors[2, 0] = math.nan
    with pytest.raises(InputError, match=r"prototypes must be finite; got nan at \[2, 0\]"):
        layer(torch.zeros(1, 2))


def test_monitor_names_the_dead_and_the_dominant():
    r = torch.tensor([[0.9, 0.1, 0.0, 0.0], [0.7, 0.28, 0.02, 0.0]]).repeat(50, 1)
    found = monitor(r)
    assert (found.n, found.dead, found.dominant) == (100, (2, 3), (0,))
    assert found.collapsed
    assert found.mean == pytest.approx((0.8, 0.19, 0.01, 0.0), abs=1e-6)
    mean = np.array([0.8, 0.19, 0.01])
    assert found.used == pytest.approx(math.exp(-(mean * np.log(mean)).sum()), rel=1e-5)
    text = str(found)
    assert "2 dead (2, 3), 1 dominant (0)" in text and "collapsed" in text
    assert found.as_dict()["collapsed"] is True


def test_monitor_sees_a_collapse_with_all_alive():
    """Prototypes that coincide: none dead, none dominant, nothing said."""
    found = monitor(torch.full((20, 5), 0.2))
    assert not found.dead and not found.dominant and found.collapsed
    assert found.information == pytest.approx(0.0, abs=1e-9)
    healthy = monitor(torch.eye(5).repeat(4, 1))
    assert not healthy.collapsed and "healthy" in str(healthy)
    assert healthy.information == pytest.approx(math.log(5))
    assert healthy.used == pytest.approx(5) and healthy.support == pytest.approx(1)


def test_monitor_of_two_hypotheses():
    assert not monitor(torch.tensor([[0.9, 0.1], [0.4, 0.6]])).collapsed
    assert monitor(torch.tensor([[0.99, 0.01], [0.97, 0.03]])).dominant == (0,)


@pytest.mark.parametrize(
    ("r", "message"),
    [
        (torch.tensor([[0.5, 0.5], [0.5, 0.6]]), r"row 1 is \[0.5, 0.6.*not responsibilities"),
        (torch.tensor([[1.5, -0.5]]), r"row 0 is \[1.5, -0.5\]"),
        (torch.tensor([[math.nan, 0.5]]), r"row 0 is \[nan"),
        (torch.zeros(0, 3), r"shape \[0, 3\]; expected"),
        (torch.ones(3, 1), r"K >= 2"),
    ],
)
def test_monitor_refuses_what_is_not_responsibilities(r, message):
    with pytest.raises(InputError, match=message):
        monitor(r)
