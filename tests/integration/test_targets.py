"""Supports asked of a profile are the supports measured under it."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from tempering.attention.control.tempered import tempered
from tempering.attention.measuring.measure import measure_tokens
from tempering.attention.measuring.targets import profile_for_support
from tempering.attention.profiles.profile import Profile
from tempering.errors import DepthWarning, InputError, RefusedError, SupportError
from tempering.schedules import schedule
from tests.integration import attention_oracle as oracle

HEADS = oracle.HEADS
CHUNKS = oracle.tokens(1, 3, 24)
pytestmark = pytest.mark.filterwarnings("ignore::tempering.errors.DepthWarning")


@pytest.fixture(scope="module")
def model():
    return oracle.tiny_llama()


def supports(model, temperature, per):
    """exp of the mean entropy, by the oracle; one column a head, or one a layer."""
    inputs = oracle.forward(model, CHUNKS, temperature).inputs
    entropy = torch.stack([oracle.statistics(x)["entropy"] for x in inputs])
    return (entropy if per == "head" else entropy.mean(1, keepdim=True)).exp()


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_absolute(per, implementation):
    model = oracle.tiny_llama(attention=implementation)
    found = profile_for_support(model, CHUNKS, "throb(6,3,1.5,6)", per=per)
    asked = torch.tensor([6.0, 3.0, 1.5, 6.0], dtype=torch.float64)[:, None]
    columns = HEADS if per == "head" else 1
    torch.testing.assert_close(found.target, asked.expand(-1, columns), rtol=1e-12, atol=0)
    reached = supports(model, found.profile.temperature, per)
    torch.testing.assert_close(reached, found.target, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.reached, reached, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.own, supports(model, None, per), rtol=1e-5, atol=0)
    measured = measure_tokens(model, CHUNKS, profile=found.profile)
    again = measured.support if per == "head" else measured.layer_support[:, None]
    torch.testing.assert_close(again, found.target, rtol=2e-5, atol=0)
    if per == "layer":
        rows = found.profile.temperature
        assert torch.equal(rows, rows[:, :1].expand_as(rows))


@pytest.mark.parametrize("per", ["layer", "head"])
@pytest.mark.parametrize("amplitude", [0.3, 1.0])
def test_relative(model, per, amplitude):
    pattern = "throb(12,3,1,12)"
    found = profile_for_support(
        model, CHUNKS, pattern, reading="relative", amplitude=0.3 * amplitude, per=per
    )
    values = torch.tensor([12.0, 3.0, 1.0, 12.0], dtype=torch.float64)
    centred = values / values.log().mean().exp()
    own = supports(model, None, per)
    asked = own * centred[:, None] ** (0.3 * amplitude)
    torch.testing.assert_close(found.target, asked, rtol=1e-5, atol=0)
    reached = supports(model, found.profile.temperature, per)
    torch.testing.assert_close(reached, asked, rtol=2e-5, atol=0)


@pytest.mark.parametrize("per", ["layer", "head"])
def test_absolute_amplitude_is_geometric(model, per):
    found = profile_for_support(model, CHUNKS, "geometric(6,2)", amplitude=0.5, per=per)
    values = torch.tensor([6.0 * (2 / 6) ** (i / 3) for i in range(4)], dtype=torch.float64)
    asked = (supports(model, None, per) * values[:, None]).sqrt()
    torch.testing.assert_close(found.target, asked, rtol=1e-5, atol=0)
    reached = supports(model, found.profile.temperature, per)
    torch.testing.assert_close(reached, asked, rtol=2e-5, atol=0)


@pytest.mark.parametrize("reading", ["absolute", "relative"])
@pytest.mark.parametrize("per", ["layer", "head"])
def test_amplitude_0_is_the_model_itself(model, reading, per):
    found = profile_for_support(
        model, CHUNKS, "throb(12,3,1,12)", reading=reading, amplitude=0.0, per=per
    )
    ones = torch.ones(4, HEADS, dtype=torch.float64)
    torch.testing.assert_close(found.profile.temperature, ones, rtol=0, atol=2e-5)


def test_a_measurement_at_hand_saves_one(model):
    own = measure_tokens(model, CHUNKS)
    given = profile_for_support(model, CHUNKS, "linear(5,3)", own=own)
    without = profile_for_support(model, CHUNKS, "linear(5,3)")
    assert torch.equal(given.profile.temperature, without.profile.temperature)


def test_the_profile_belongs_to_its_model_and_says_what_it_is(model):
    found = profile_for_support(model, CHUNKS, schedule("linear(5,3)"))
    assert "linear(5, 3)" in found.profile.pattern.replace("5,3", "5, 3")
    found.profile.check_model(model)
    with tempered(model, found.profile):
        pass


def test_out_of_every_reach(model):
    most = math.exp(math.lgamma(25) / 24)
    with pytest.raises(SupportError, match=r"model\.layers\.0\.self_attn.*40 keys"):
        profile_for_support(model, CHUNKS, "linear(40,3)")
    with pytest.raises(SupportError, match=r"model\.layers\.3\.self_attn.*0\.5 keys"):
        profile_for_support(model, CHUNKS, "linear(3,0.5)")
    with pytest.raises(SupportError, match=r"model\.layers\.2\.self_attn"):
        profile_for_support(model, CHUNKS, f"steps(3,3,{most * 1.01},3)")


def test_out_of_the_temperatures_reach():
    """Keys that tie exactly can't be told apart: support stays above their number."""
    model = oracle.tiny_llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.zero_()
    with pytest.raises(SupportError, match=r"model\.layers\.1\.self_attn.*reachable range"):
        profile_for_support(model, CHUNKS, "constant(2)")
    with pytest.raises(SupportError, match=r"model\.layers\.1\.self_attn, head 0.*reachable"):
        profile_for_support(model, CHUNKS, "constant(2)", per="head")
    plain = oracle.tiny_llama()
    assert [sorted(vars(m)) for m in model.modules()] == [sorted(vars(m)) for m in plain.modules()]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"reading": "rough"}, "absolute.*relative.*'rough'"),
        ({"per": "row"}, "layer.*head.*'row'"),
        ({"amplitude": -0.1}, "at least 0, not -0.1"),
        ({"amplitude": float("nan")}, "nan"),
        ({"amplitude": float("inf")}, "inf"),
    ],
)
def test_bad_input(model, wrong, said):
    # as users call it: the tests' own check of annotations would speak first
    unchecked = inspect.unwrap(profile_for_support)
    with pytest.raises(InputError, match=said):
        unchecked(model, CHUNKS, "linear(5,3)", **wrong)


def test_more_stages_than_layers(model):
    with pytest.raises(InputError, match="stages"):
        profile_for_support(model, CHUNKS, "steps(5,4,3,4,5)")


def test_a_tempered_model_is_refused(model):
    with (
        tempered(model, Profile.neutral(model)),
        pytest.raises(RefusedError),
    ):
        profile_for_support(model, CHUNKS, "linear(5,3)")


def test_shallow_models_warn():
    with pytest.warns(DepthWarning):
        profile_for_support(oracle.tiny_llama(), CHUNKS, "throb(6,3,2,6)")


def test_training_flags_are_kept():
    model = oracle.tiny_llama()
    model.train()
    model.model.layers[2].eval()
    flags = [module.training for module in model.modules()]
    profile_for_support(model, CHUNKS, "linear(5,3)")
    assert [module.training for module in model.modules()] == flags
