"""The activation as a module: regimes of temperature, per unit or shared; its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tempering.errors import EnergyError, InputError, RefusedError, TemperatureError
from tempering.kernels import Centred, Gaussian, Laplace, Prototypes, Signed, StudentT
from tempering.posterior import support
from tempering.temperature import Fixed, Learned, Scheduled, Targeted
from tempering.units import STATISTICS, Activation, activation

Z = torch.linspace(-3, 3, 12, dtype=torch.float64).reshape(4, 3)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_fixed_shared_and_per_unit(statistic):
    for given, level in (
        (0.4, 0.4),
        (Fixed(0.4), 0.4),
        (Fixed(0.0), 0.0),
        (Fixed(math.inf), math.inf),
    ):
        found = Activation("laplace", statistic, given)(Z)
        torch.testing.assert_close(found, activation(Z, "laplace", statistic, level))
    levels = torch.tensor([0.0, 0.4, math.inf], dtype=torch.float64)
    found = Activation("laplace", statistic, Fixed(levels))(Z)
    torch.testing.assert_close(found, activation(Z, "laplace", statistic, levels))


def test_a_fixed_temperature_keeps_its_digits():
    """0.1 in float32 is off by 1e-9 of itself."""
    found = Activation("gaussian", "mean", 0.1)(Z)
    torch.testing.assert_close(found, torch.tanh(Z / 0.1), rtol=1e-14, atol=0.0)


def test_learned_temperature_moves_towards_its_teacher():
    torch.manual_seed(0)
    z = torch.randn(256, 2)
    teacher = torch.tanh(z / torch.tensor([0.5, 2.0]))
    student = Activation("gaussian", "mean", Learned(shape=(2,)))
    optimiser = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        (student(z) - teacher).square().mean().backward()
        optimiser.step()
    torch.testing.assert_close(
        student.temperature().detach(), torch.tensor([0.5, 2.0]), rtol=0.02, atol=0.0
    )


def test_scheduled_temperature_follows_its_clock_and_u():
    module = Activation("gaussian", "mean", Scheduled("geometric(4, 0.25)"))
    torch.testing.assert_close(module(Z), torch.tanh(Z / 4))
    module.temperature.step(1.0)
    torch.testing.assert_close(module(Z), torch.tanh(Z * 4))
    torch.testing.assert_close(module(Z, u=0.5), torch.tanh(Z))


@pytest.mark.parametrize("hypotheses", [Signed(1.0), Centred([-1.0, 0.3, 2.0])])
def test_targeted_temperature_reaches_its_support(hypotheses):
    kernel = Gaussian(hypotheses)
    z = Z + 0.1  # at 0 the signed hypotheses tie, and every T has support 2
    module = Activation(kernel, "full", Targeted(1.5))
    r = module(z)
    reached = torch.special.entr(r).sum(-1).exp()
    torch.testing.assert_close(reached, torch.full((4, 3), 1.5).double(), rtol=1e-5, atol=0.0)
    level = module.level(z, kernel)
    torch.testing.assert_close(support(kernel.energies(z), level), reached)


def test_targeted_refuses_priors_and_bad_input():
    with pytest.raises(RefusedError, match=r"a prior tilts the posterior. Leave the prior out"):
        Activation(Gaussian(Signed(1.0, (1, 2))), "mean", Targeted(1.5))
    with pytest.raises(EnergyError, match=r"z\[1\] is nan"):
        Activation("gaussian", "mean", Targeted(1.5))(torch.tensor([0.1, math.nan]))


def test_tensors_of_the_kernel_belong_to_the_module():
    sigma = nn.Parameter(torch.tensor([1.0, 2.0, 0.5]))
    module = Activation(Gaussian(Signed(torch.tensor(0.7), (1, 3)), sigma), "mean")
    assert set(module.state_dict()) == {"sigma", "m", "prior", "temperature.value"}
    assert [name for name, _ in module.named_parameters()] == ["sigma"]
    module(Z.float()).sum().backward()
    assert sigma.grad is not None and bool((sigma.grad != 0).all())

    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.sigma.fill_(1.0)
    expected = activation(Z.float(), Gaussian(Signed(0.7, (1, 3))), "mean")
    torch.testing.assert_close(twin(Z.float()), expected)
    assert not torch.equal(module(Z.float()), twin(Z.float()))
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(Z.float()), twin(Z.float()))
    assert module.double().kernel.sigma.dtype == torch.float64


def test_a_parameter_that_learns_its_way_out_of_range_is_named():
    module = Activation(Laplace(1.0, nn.Parameter(torch.tensor(1.0))), "mean")
    with torch.no_grad():
        module.b.fill_(-1.0)
    with pytest.raises(InputError, match=r"b of Laplace must be positive"):
        module(Z)


def test_what_a_module_says_of_itself():
    assert "StudentT (Signed) x entropy" in repr(Activation(StudentT(), "entropy"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Activation(nn.Linear(2, 2), "mean"), RefusedError, "linear is not an activation"),
        (lambda: Activation(nn.Identity, "mean"), RefusedError, "identity is not an activation"),
        (lambda: Activation("gaussian", "median"), InputError, "no statistic 'median'"),
        (lambda: Activation("gaussian", "mean", -1.0), TemperatureError, "got -1"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_prototypes_in_a_plain_activation():
    vectors = torch.randn(4, 3, dtype=torch.float64)
    module = Activation(
        Gaussian(Prototypes(vectors)), "mean", Fixed(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    )
    distances = (Z.unsqueeze(1) - vectors).square().sum(-1) / 2
    r = torch.softmax(-distances / torch.tensor([[1.0], [2.0], [3.0], [4.0]]), dim=-1)
    torch.testing.assert_close(module(Z), r @ vectors)
