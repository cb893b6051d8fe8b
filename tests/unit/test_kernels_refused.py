"""What kernels refuse, and what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tempering.errors import EnergyError, InputError, RefusedError
from tempering.kernels import (
    KERNELS,
    Angular,
    Centred,
    Gaussian,
    Laplace,
    Mahalanobis,
    Prototypes,
    Signed,
    StudentT,
    as_kernel,
)


@pytest.mark.parametrize(
    "given", ["linear", "identity", "Identity", nn.Linear(2, 2), nn.Identity(), nn.Linear]
)
def test_linear_and_identity_are_refused_with_the_reason(given):
    with pytest.raises(RefusedError, match=r"hypotheses that compete.*has none.*no temperature"):
        as_kernel(given)


def test_kernels_by_name():
    for name, kind in KERNELS.items():
        if kind is Mahalanobis:
            with pytest.raises(InputError, match="needs the covariance"):
                as_kernel(name)
        else:
            assert type(as_kernel(name)) is kind
    assert as_kernel("Gaussian").m.m == 1.0
    with pytest.raises(
        InputError, match=r"no kernel 'gausian'; expected a Kernel or one of: gauss"
    ):
        as_kernel("gausian")
    with pytest.raises(InputError, match=r"no kernel ReLU\(\)"):
        as_kernel(nn.ReLU())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(1.0, 0.0), r"sigma of Gaussian must be positive and finite; got 0.0"),
        (lambda: Laplace(1.0, -1.0), r"b of Laplace must be positive"),
        (lambda: StudentT(1.0, 1.0, float("nan")), r"nu of StudentT must be positive.*got nan"),
        (lambda: Gaussian(-1.0), r"m, the distance of the signed centres from 0, must be positive"),
        (lambda: Gaussian(float("inf")), r"m, .* must be positive and finite; got inf"),
        (lambda: Gaussian(1.0, torch.tensor([1.0, -2.0])), r"got \[1.0, -2.0\]"),
        (lambda: Angular(4.0), r"m of Angular, an angle in radians, must be .* under 3.14159"),
        (lambda: Signed(torch.tensor([1.0, float("nan")])), r"m must be finite; got nan at \[1\]"),
        (lambda: Signed(torch.tensor([1, 2])), r"m must be floating point; got torch.int64"),
        (lambda: Centred([1.0]), r"centres have shape \[1\]; expected .*has no rival"),
        (lambda: Centred([1.0, float("inf")]), r"centres must be finite; got inf at \[1\]"),
        (lambda: Prototypes(torch.zeros(1, 3)), r"prototypes have shape \[1, 3\].*no rival"),
        (
            lambda: Prototypes(torch.tensor([[0.0], [float("nan")]])),
            r"prototypes must be finite; got nan at \[1, 0\]",
        ),
        (lambda: Signed(1.0, (1.0, 2.0, 3.0)), r"the prior has shape \[3\]; expected .* the 2 hyp"),
        (
            lambda: Signed(1.0, (0.0, 1.0)),
            r"prior of hypothesis 0 is 0.0; .*Leave out",
        ),
        (lambda: Centred([0.0, 1.0], (1.0, -1.0)), r"prior of hypothesis 1 is -1.0"),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("m", "covariance", "message"),
    [
        (torch.ones(2), None, "needs the covariance of the noise"),
        (torch.ones(3), torch.eye(2), r"shape \[2, 2\]; the hypotheses have 3 features"),
        (torch.ones(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), r"not symmetric.*up to 0.5"),
        (torch.ones(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), r"not positive definite \(minor 2"),
        (1.0, torch.eye(1), r"compares vectors; got m = 1.0.*on the line use Gaussian"),
        (torch.zeros(2), torch.eye(2), r"that is not 0"),
        (Centred([0.0, 1.0]), torch.eye(2), r"compares vectors; got Centred"),
    ],
)
def test_mahalanobis_refuses(m, covariance, message):
    with pytest.raises(InputError, match=message):
        Mahalanobis(m, covariance)


def test_inputs_that_do_not_fit():
    with pytest.raises(InputError, match=r"z has shape \[4\]; the hypotheses have 3 features"):
        Gaussian(Prototypes(torch.randn(2, 3))).energies(torch.zeros(4))
    with pytest.raises(InputError, match=r"last dimension of z must be 2"):
        Mahalanobis(torch.ones(2), torch.eye(2)).log_odds(torch.zeros(5, 3))
    with pytest.raises(InputError, match=r"log odds need the two signed hypotheses; got Centred"):
        Gaussian(Centred([0.0, 1.0])).log_odds(torch.zeros(1))


def test_directions_of_null_vectors():
    kernel = Angular(Prototypes(torch.eye(2)))
    with pytest.raises(EnergyError, match=r"z at \[1\] is the vector 0, which has no direction"):
        kernel.energies(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(EnergyError, match=r"prototypes at \[0\] is the vector 0"):
        Angular(Prototypes(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))).energies(torch.ones(1, 2))
