"""Learned temperatures: the parametrisation, its prior, the collapse guard, and a real fit."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from tempering.errors import CollapseWarning, SupportError, TemperatureError
from tempering.posterior import log_partition
from tempering.temperature import Collapse, Learned, LogNormalPrior


@given(st.floats(0.051, 19.9))
def test_it_starts_where_it_is_told(initial):
    assert Learned(initial).double()().item() == pytest.approx(initial, rel=1e-5)
    assert Learned(initial, shape=(2, 3))().shape == (2, 3)


@given(st.floats(-50, 50), st.floats(0.01, 0.9), st.floats(1.1, 100))
def test_no_parameter_leaves_the_bounds(x, low, high):
    module = Learned(1.0, bounds=(low, high)).double()
    torch.nn.init.constant_(module.unbounded, x)
    centre, width = math.log(low * high) / 2, math.log(high / low) / 2
    want = math.exp(centre + width * math.tanh((x - centre) / width))
    assert module().item() == pytest.approx(want, rel=1e-9)
    assert low * (1 - 1e-12) <= module().item() <= high * (1 + 1e-12)


def test_near_the_centre_the_parameter_is_log_temperature():
    module = Learned(1.0).double()
    assert module.unbounded.item() == 0
    (slope,) = torch.autograd.grad(module.log_temperature, module.unbounded)
    assert slope.item() == 1
    torch.nn.init.constant_(module.unbounded, 0.1)
    assert module().item() == pytest.approx(math.exp(0.1), rel=1e-4)


def test_gradients():
    module = Learned(0.7, shape=(3,), bounds=(0.1, 5)).double()
    d = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def loss(x):
        level = torch.func.functional_call(module, {"unbounded": x}, (d,))
        return log_partition(d, level)

    def penalty(x):
        with torch.nn.utils.stateless._reparametrize_module(module, {"unbounded": x}):
            return module.penalty()

    x = module.unbounded.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (x,))
    assert torch.autograd.gradcheck(penalty, (x,))


def test_penalty_is_the_negative_log_prior_without_its_constant():
    module = Learned(2.0, shape=(3,), prior=LogNormalPrior(0.3, 0.7)).double()
    torch.nn.init.uniform_(module.unbounded, -1, 1, generator=torch.Generator().manual_seed(0))
    normal = torch.distributions.Normal(0.3, 0.7)
    centre = normal.log_prob(torch.tensor(0.3))
    want = (centre - normal.log_prob(module().log())).sum()
    torch.testing.assert_close(module.penalty(), want)
    at_mean = Learned(math.exp(0.3), prior=LogNormalPrior(0.3, 0.7)).double()
    assert at_mean.penalty().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"initial": 0.0},
            "starts strictly between its bounds 0.05 and 20, got 0; move the bounds",
        ),
        ({"initial": 20.0}, "starts strictly between its bounds 0.05 and 20, got 20"),
        ({"initial": math.nan}, "got nan"),
        ({"bounds": (0, 1)}, "bounds are 0 < lowest < highest < inf, got 0, 1"),
        ({"bounds": (2, 1)}, "got 2, 1"),
        ({"bounds": (1, math.inf)}, "got 1, inf"),
    ],
)
def test_what_it_refuses(arguments, message):
    with pytest.raises(TemperatureError, match=message):
        Learned(**arguments)


def test_what_a_prior_and_a_floor_refuse():
    for mean, sd in ((math.nan, 1), (0, 0), (0, -1), (0, math.inf)):
        with pytest.raises(TemperatureError, match="finite mean and 0 < sd < inf, got mean"):
            LogNormalPrior(mean, sd)
    with pytest.raises(SupportError, match=r"a support floor is >= 1, got 0\.5"):
        Learned(support_floor=0.5)


def test_a_sound_temperature_is_not_reported():
    d = torch.randn(20, 3, 6, generator=torch.Generator().manual_seed(0))
    assert Learned(1.0).check() is None
    assert Learned(1.0, shape=(3,)).check(d) is None
    assert Learned(0.0515).check() is None and Learned(19.7).check() is None


def test_the_guard_reports_bounds_by_unit():
    module = Learned(1.0, shape=(2, 2))
    with torch.no_grad():
        module.unbounded.copy_(torch.tensor([[-99.0, 0.0], [0.1, 99.0]]))
    with pytest.warns(CollapseWarning, match=r"lower bound at \[0, 0\]; T at its upper bound at"):
        found = module.check()
    assert found == Collapse(cold=((0, 0),), hot=((1, 1),), thin=())
    assert str(found) == "T at its lower bound at [0, 0]; T at its upper bound at [1, 1]"
    with pytest.warns(
        CollapseWarning, match=r"bound \(the only unit\); try a prior with a smaller"
    ):
        assert Learned(0.0504).check() == Collapse(cold=((),), hot=(), thin=())


def test_the_guard_reports_thin_support_by_unit():
    # rows [batch, unit]: unit 1 is decided in every row, unit 0 in one of four only
    d = torch.zeros(4, 2, 3)
    d[0, 0, 1:] = 1e3
    d[:, 1, 1:] = 1e3
    with pytest.warns(CollapseWarning, match=r"support under its floor at \[1\]"):
        assert Learned(1.0, shape=(2,)).check(d) == Collapse((), (), ((1,),))
    # one temperature in all: the mean of 1, 3, 3, 3 and 1, 1, 1, 1 is 14/8
    assert Learned(1.0, support_floor=1.74).check(d) is None
    with pytest.warns(CollapseWarning, match="support under its floor"):
        assert Learned(1.0, support_floor=1.76).check(d) == Collapse((), (), ((),))


def test_the_guard_names_three_of_many():
    with pytest.warns(CollapseWarning, match=r"at \[0\], \[1\], \[2\] and 7 more"):
        Learned(0.0504, shape=(10,)).check()


def calibrated(prior_weight, logits, labels, steps=80):
    """Fit one temperature by maximum likelihood plus the prior, as calibration does."""
    module = Learned(1.0, prior=LogNormalPrior(0, 0.5))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        d = -logits
        chosen = d.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        level = module(d)
        nll = (chosen / level + log_partition(d, level)).sum()
        (nll + prior_weight * module.penalty()).backward()
        optimizer.step()
    return module


def test_a_fit_finds_the_temperature_that_made_the_labels():
    draw = torch.Generator().manual_seed(0)
    logits = 2.3 * torch.randn(3000, 10, generator=draw)
    labels = torch.multinomial(torch.softmax(logits / 2.3, -1), 1, generator=draw).squeeze(-1)
    module = calibrated(1.0, logits, labels)
    assert module().item() == pytest.approx(2.3, rel=0.05)  # 3000 labels tell it to 2 %
    assert module.check(-logits) is None


def test_without_a_prior_separable_data_collapse_and_with_it_they_do_not():
    logits = 3 * torch.eye(4)
    labels = torch.arange(4)
    with pytest.warns(CollapseWarning, match="support under its floor"):
        assert calibrated(0.0, logits, labels).check(-logits) == Collapse((), (), ((),))
    held = calibrated(4.0, logits, labels)
    assert held.check(-logits) is None and 0.3 < held().item() < 1
