"""Profiles and the models they belong to."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import pytest
import torch

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.errors import ProfileError, RefusedError, TemperatureError
from tests.integration import attention_oracle as oracle

LAYERS, HEADS = oracle.LAYERS, oracle.HEADS
IDS = oracle.tokens(1, 2, 9)


@pytest.fixture(scope="module")
def model():
    return oracle.tiny_llama()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_a_profile_knows_its_model(model, tmp_path):
    profile = Profile.from_schedule("linear(1.3,0.7)", model)
    again = Profile.load(profile.save(tmp_path / "p.json"))
    assert again.model == profile.model
    assert again.model["architecture"] == "LlamaForCausalLM"
    assert again.model["shape"] == "4 layers x 4 heads"
    again.check_model(model)
    T = again.temperature
    with tempered(model, again):
        assert (logits(model) - oracle.forward(model, IDS, T).logits).abs().max() < 2e-5


def test_other_weights_are_refused_and_adopted(model):
    other = oracle.tiny_llama(seed=5)
    profile = Profile.from_schedule("linear(1.3,0.7)", other)
    with pytest.raises(ProfileError, match=r"LlamaForCausalLM.*adopt\(model\)"):
        tempered(model, profile)
    with pytest.raises(ProfileError, match="adopt"):
        tempered(model, [Profile.neutral(model), profile])
    mine = profile.adopt(model)
    assert torch.equal(mine.temperature, profile.temperature)
    assert mine.pattern == profile.pattern
    with tempered(model, mine):
        exact = oracle.forward(model, IDS, mine.temperature).logits
        assert (logits(model) - exact).abs().max() < 2e-5


def test_updates_are_checked_like_the_first_profile(model):
    other = Profile.from_schedule("linear(1.3,0.7)", oracle.tiny_llama(seed=5))
    with tempered(model, Profile.neutral(model)) as handle:
        plain = logits(model)
        for wrong in (other, [other], [], Profile.from_matrix([[2.0]])):
            with pytest.raises(ProfileError):
                handle.update(wrong)
            assert torch.equal(logits(model), plain)


def test_another_shape_is_refused_with_both(model):
    shallow = oracle.tiny_llama(num_hidden_layers=2)
    profile = Profile.neutral(shallow)
    with pytest.raises(ProfileError, match="2 layers x 4 heads.*4 layers x 4 heads"):
        profile.adopt(model)
    with pytest.raises(ProfileError, match="2 layers x 4 heads.*4 layers x 4 heads"):
        tempered(model, Profile.from_matrix(torch.ones(2, 4)))


def test_matrices_checked_against_the_model(model):
    per_layer = Profile.from_matrix([1.0, 2.0, 0.5, 1.0], model)
    assert per_layer.temperature.tolist() == [[v] * 4 for v in (1.0, 2.0, 0.5, 1.0)]
    per_layer.check_model(model)
    for shape in ((2,), (5,), (4, 3), (8, 4)):
        with pytest.raises(ProfileError, match="4 layers x 4 heads"):
            Profile.from_matrix(torch.ones(shape), model)


@pytest.mark.parametrize("wrong", ["hot", [], [1.5], None, 2.0], ids=str)
def test_what_is_no_profile(model, wrong):
    # as users call it: the tests' own check of annotations would speak first
    with pytest.raises(ProfileError, match="give a Profile"):
        inspect.unwrap(tempered)(model, wrong)


def rows(value=1.0, count=1):
    return [torch.full((count, HEADS), value) for _ in range(LAYERS)]


@pytest.mark.parametrize(
    "wrong, error, said",
    [
        (rows()[:-1], ProfileError, "3 layers were given, the model has 4"),
        (rows() + rows(), ProfileError, "8 layers were given"),
        ([*rows()[:-1], torch.ones(1, HEADS + 1)], ProfileError, r"layers\.3.*\[rows, 4\]"),
        ([*rows()[:-1], torch.ones(1, 1)], ProfileError, r"layers\.3.*\(1, 1\)"),
        ([*rows()[:-1], torch.ones(HEADS)], ProfileError, r"layers\.3.*\(4,\)"),
        ([*rows()[:-1], torch.ones(0, HEADS)], ProfileError, r"layers\.3.*\(0, 4\)"),
        ([*rows()[:-1], rows(0.0)[0]], TemperatureError, r"layers\.3.*head 0.*0"),
        ([*rows()[:-1], rows(float("nan"))[0]], TemperatureError, r"layers\.3.*nan"),
        ([*rows()[:-1], rows(-2.0, 3)[0]], TemperatureError, r"layers\.3.*-2"),
    ],
)
def test_rows_that_do_not_fit_change_nothing(model, wrong, error, said):
    T = oracle.random_temperatures(2, LAYERS, HEADS)
    with tempered(model, Profile.from_matrix(T)) as handle:
        before = logits(model)
        with pytest.raises(error, match=said):
            handle.set_rows(wrong)
        assert torch.equal(logits(model), before)


def test_the_product_of_nested_handles_stays_within_the_range(model):
    """A product beyond what one profile may hold could push masked logits into the live range."""
    cold = Profile.from_matrix(torch.full((LAYERS, HEADS), 0.01))
    plain = logits(model)
    with tempered(model, cold):
        with pytest.raises(TemperatureError, match=r"layers\.0.*0.0001"):
            tempered(model, cold)
        exact = oracle.forward(model, IDS, cold.temperature).logits
        assert (logits(model) - exact).abs().max() < 1e-3
    assert torch.equal(logits(model), plain)


def test_a_handle_that_was_removed(model):
    handle = tempered(model, Profile.neutral(model))
    handle.remove()
    for use in (
        lambda: handle.update(Profile.neutral(model)),
        lambda: handle.set_rows(rows()),
        handle.calls,
        handle.__enter__,
    ):
        with pytest.raises(RefusedError, match="was removed"):
            use()


def test_calls_are_counted(model):
    with tempered(model, Profile.neutral(model)) as handle:
        logits(model)
        logits(model)
        assert handle.calls() == {f"model.layers.{i}.self_attn": 2 for i in range(LAYERS)}


def test_twelve_profiles_don_t_hash_the_weights_again(model, monkeypatch):
    fingerprint = importlib.import_module("tempering.attention.profiles.fingerprint")
    profiles = [Profile.from_schedule(1 + i / 20, model) for i in range(12)]
    calls, own = [], fingerprint._digest
    monkeypatch.setattr(fingerprint, "_digest", lambda *a: (calls.append(1), own(*a))[1])
    with tempered(model, profiles):
        pass
    assert not calls
    fingerprint.fingerprint(model)  # on demand
    assert len(calls) == 1
