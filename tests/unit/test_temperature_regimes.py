"""The four regimes of temperature: one interface, exact values, state that survives."""

import copy
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

from tempering.errors import ScheduleError, SupportError, TemperatureError
from tempering.posterior import responsibilities, support
from tempering.schedules import schedule
from tempering.temperature import Fixed, Learned, Scheduled, Targeted, Temperature

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def regimes():
    return {
        "fixed": Fixed(1.15),
        "fixed by unit": Fixed(torch.tensor([0.5, 1.15, 3.0])),
        "learned": Learned(1.15),
        "learned by unit": Learned(0.7, shape=(3,)),
        "scheduled": Scheduled("throb(12,3,1,12)|amplitude(1.15)"),
        "targeted": Targeted("linear(2,4)"),
    }


def energies(dtype=torch.float64):
    return torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("name", regimes())
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_interface(name, dtype):
    module = regimes()[name]
    d = energies(dtype)
    level = module(d)
    assert isinstance(module, Temperature) and level.dtype == torch.promote_types(
        dtype, torch.float32
    )
    assert torch.broadcast_shapes(level.shape, d.shape[:-1]) == d.shape[:-1]
    assert responsibilities(d, level).shape == d.shape
    if name != "targeted":
        assert module().dtype == torch.float32 and module().shape == level.shape
        assert module(u=0.3).shape == level.shape


@given(st.floats(0, allow_nan=False))
def test_fixed_is_exact(value):
    assert Fixed(value)(energies()).item() == value


def test_fixed_by_unit_is_exact_and_its_own():
    given = torch.tensor([0.0, 1.15, math.inf], dtype=torch.float64)
    module = Fixed(given)
    given.zero_()
    assert module(energies()).tolist() == [0.0, 1.15, math.inf]
    assert module(energies(torch.float32)).tolist() == [0.0, torch.tensor(1.15).item(), math.inf]
    assert Fixed(2)(torch.ones(2, 3, dtype=torch.int64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-1.0, r"is >= 0 \(0 and inf are the limits\), got -1$"),
        (math.nan, "got nan$"),
        (torch.tensor([[1.0, 2.0], [-3.0, 1.0]]), r"got -3 at position \[1, 0\]"),
    ],
)
def test_fixed_refuses(value, message):
    with pytest.raises(TemperatureError, match=message):
        Fixed(value)


def test_scheduled_reads_its_schedule_at_its_clock():
    pattern = schedule("throb(12,3,1,12)|amplitude(1.15)")
    module = Scheduled(pattern)
    for u in (0, 0.1, 0.5, 1.0):
        before = module(energies())
        value = before.item()
        module.step(u)
        assert module(energies()).item() == pattern(u)
        assert before.item() == value  # what was handed out doesn't change
        assert module.progress.item() == u


def test_scheduled_reads_any_progress_without_moving_its_clock():
    module = Scheduled("geometric(4,1)")
    assert module(u=0.5).item() == 2
    places = torch.linspace(0, 1, 3)
    assert module(u=places).tolist() == [4, 2, 1]
    assert module(energies(torch.float64), u=places).dtype == torch.float64
    assert module().item() == 4


def test_scheduled_takes_numbers_and_texts():
    assert Scheduled(1.5)(energies()).item() == Scheduled("constant(1.5)")(energies()).item() == 1.5
    with pytest.raises(ScheduleError, match="did you mean throb"):
        Scheduled("trob(1,2)")
    with pytest.raises(ScheduleError, match=r"progress is a number in \[0, 1\], got 1.5"):
        Scheduled(1.0).step(1.5)


def test_a_shuffled_annealing_runs_on_its_clock():
    control = schedule("shuffle(geometric(4,1), seed=0)")
    with pytest.raises(ScheduleError, match=r"as a function of progress with on_clock\(n\)"):
        Scheduled(control)
    module, path = Scheduled(control.on_clock(10)), []
    for i in range(10):
        module.step(i / 9)
        path.append(module(energies()).item())
    assert path == control.sample(10).tolist() and path != sorted(path, reverse=True)


@pytest.mark.parametrize("wanted", [1.5, 3, 5.9])
def test_targeted_reaches_its_support(wanted):
    d = energies()
    level = Targeted(wanted)(d)
    assert level.shape == d.shape[:-1]
    r = torch.softmax(-d / level.unsqueeze(-1), -1)
    got = torch.exp(-(r * r.log()).sum(-1))
    torch.testing.assert_close(got, torch.full_like(got, wanted), rtol=1e-6, atol=0)


def test_targeted_follows_its_clock_and_any_progress():
    d, module = energies(), Targeted("linear(2,4)")
    torch.testing.assert_close(support(d, module(d)), torch.full((4, 3), 2.0).double())
    module.step(0.5)
    torch.testing.assert_close(support(d, module(d)), torch.full((4, 3), 3.0).double())
    by_row = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    want = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64).expand(4, 3)
    torch.testing.assert_close(support(d, module(d, u=by_row)), want)


def test_gradient_flows_through_a_targeted_temperature():
    d = energies()[0].requires_grad_()
    assert torch.autograd.gradcheck(Targeted(2.5), (d,))


def test_targeted_refuses():
    for wrong in (0.5, -1, math.inf, math.nan):
        with pytest.raises(SupportError, match="a support is a finite number >= 1, got"):
            Targeted(wrong)
    with pytest.raises(TemperatureError, match=r"solved from energies.*call module\(energies\)"):
        Targeted(2)()
    with pytest.raises(SupportError):
        Targeted(7)(energies())  # six hypotheses


@pytest.mark.parametrize("name", regimes())
def test_state_survives(name, tmp_path):
    d, module = energies(), regimes()[name]
    if hasattr(module, "step"):
        module.step(1 / 3 + 1e-9)
    else:
        for parameter in module.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    torch.save(module.state_dict(), tmp_path / "state.pt")
    fresh = regimes()[name]
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    twin = copy.deepcopy(module)
    assert torch.equal(fresh(d), module(d)) and torch.equal(twin(d), module(d))
    if hasattr(module, "step"):
        assert fresh.progress.item() == module.progress.item()
        twin.step(1)
        assert not torch.equal(twin(d), module(d))  # two modules share no state


@pytest.mark.parametrize("name", regimes())
def test_a_model_in_low_precision_keeps_its_temperature(name):
    d, module = energies(), regimes()[name]
    want = module(d)
    model = nn.Sequential(nn.Linear(2, 2), module)
    assert torch.equal(model.to(torch.bfloat16)[1](d), want)
    assert torch.equal(model.half()[1](d), want)
    assert model[0].weight.dtype == torch.float16
    assert torch.equal(model.float()[1](d), want)
    assert torch.equal(model.to("cpu", torch.bfloat16)[1](d), want)
    torch.testing.assert_close(model.double()[1](d), want, rtol=1e-6, atol=0)
    assert {x.dtype for x in model[1].state_dict().values()} == {torch.float64}


def test_moving_from_meta():
    module = Learned(2.0, shape=(3,)).to("meta")
    assert module.unbounded.is_meta
    restored = module.to_empty(device="cpu")
    restored.load_state_dict(Learned(2.0, shape=(3,)).state_dict())
    assert torch.equal(restored(), Learned(2.0, shape=(3,))())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", regimes())
def test_on_a_device(name):
    d, module = energies(), regimes()[name]
    want = module(d)
    moved = module.to("cuda", torch.bfloat16)
    assert moved(d.cuda()).is_cuda
    torch.testing.assert_close(moved(d.cuda()).cpu(), want)
    if hasattr(moved, "step"):
        moved.step(0.5)
        assert moved(d.cuda(), u=torch.tensor(0.5, device="cuda")).is_cuda


def test_what_a_module_shows():
    assert repr(Fixed(1)) == "Fixed(1)"
    assert repr(Fixed(torch.ones(2, 3))) == "Fixed(shape=(2, 3))"
    assert repr(Scheduled("linear(2,1)")) == "Scheduled(linear(2,1), u=0)"
    assert repr(Targeted(3)) == "Targeted(constant(3), u=0)"
    assert repr(Learned()).startswith("Learned(1, bounds=(0.05, 20), prior=LogNormalPrior(")
