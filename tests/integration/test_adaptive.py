"""Temperatures that depend on the query, against bisection in float64 in the model's softmax."""

from __future__ import annotations

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from tempering.attention import adaptive_profile, measure_tokens, tempered
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import rule
from tempering.errors import ProfileError, RefusedError
from tests.integration.rule_oracle import (
    IDS,
    ORACLES,
    PADDED,
    close,
    expected,
    oracle,
    softmax_with,
    velickovic,
)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", ORACLES)
def test_equals_the_oracle(text, implementation):
    model = oracle.in_double(oracle.tiny_llama(attention=implementation))
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with tempered(model, adaptive_profile(text, model)):
            ours = model(IDS, use_cache=False).logits
        again = model(IDS, use_cache=False).logits
    exact = expected(model, ORACLES[text])
    # The solver promises N to 1e-6, and so T; eager attention rounds its softmax to float32.
    solved = text not in ("polynomial()", "log_length(4)") or implementation == "eager"
    close(ours, exact, 2e-5 if solved else 1e-8)
    assert (ours - plain).abs().max() > 0.02 * plain.std()
    assert torch.equal(again, plain)


@pytest.mark.parametrize("text", ["support(3)", "polynomial()", "log_length(4)"])
def test_in_float32_padded_and_windowed(text):
    temperature = ORACLES[text]
    model = oracle.tiny_llama()
    with tempered(model, adaptive_profile(text, model)), torch.no_grad():
        ours = model(IDS, attention_mask=PADDED, use_cache=False).logits
    exact = expected(model, temperature, attention_mask=PADDED)
    close(ours[PADDED.bool()], exact[PADDED.bool()], 2e-4)
    model = oracle.tiny_llama(kind=(MistralConfig, MistralForCausalLM), sliding_window=5)
    with tempered(model, adaptive_profile(text, model)), torch.no_grad():
        ours = model(IDS, use_cache=False).logits
    close(ours, expected(model, temperature), 2e-4)


def test_an_encoder():
    model = oracle.tiny_bert()
    for text in ("support(3)", "log_length(4)"):
        model.set_attn_implementation("sdpa")
        with tempered(model, adaptive_profile(text, model)), torch.no_grad():
            ours = model(IDS, attention_mask=PADDED).last_hidden_state
        model.set_attn_implementation("eager")
        with softmax_with(ORACLES[text]), torch.no_grad():
            exact = model(IDS, attention_mask=PADDED).last_hidden_state
        close(ours[PADDED.bool()], exact[PADDED.bool()], 2e-4)


def test_on_top_of_a_profile_and_in_some_layers():
    """A rule reads the logits as the profile's temperatures leave them."""
    model = oracle.in_double(oracle.tiny_llama())
    T = oracle.random_temperatures(2, oracle.LAYERS, oracle.HEADS)
    base = Profile.from_matrix(T, model)
    profile = adaptive_profile("polynomial()", model, layers=[1, 3], base=base)
    assert profile.rules == (None, rule(PAPER), None, rule(PAPER))
    with tempered(model, profile), torch.no_grad():
        ours = model(IDS, use_cache=False).logits
    exact = expected(model, velickovic, chosen=lambda call: call in (1, 3), base=T)
    close(ours, exact, 1e-8)
    # ... nested as well, in either order
    rule_alone = adaptive_profile("polynomial()", model, layers=[1, 3])
    for pair in ((base, rule_alone), (rule_alone, base)):
        with tempered(model, pair[0]), tempered(model, pair[1]), torch.no_grad():
            close(model(IDS, use_cache=False).logits, exact, 1e-8)


PAPER = "polynomial(-0.037,0.481,-2.3,4.917,-1.791)"


def test_a_level_that_follows_a_pattern_over_depth():
    model = oracle.in_double(oracle.tiny_llama())
    profile = adaptive_profile("support(linear(2,5), 0.01, 100)", model)
    assert profile.rules == tuple(rule(f"support({n},0.01,100)") for n in (2, 3, 4, 5))
    found = measure_tokens(model, IDS, profile=profile, buckets=2)
    for layer, level in enumerate((2, 3, 4, 5)):
        late = found.by_position["support"][layer, :, 1]  # queries that see at least 7 keys
        torch.testing.assert_close(late, torch.full_like(late, level), rtol=2e-6, atol=0)


def test_rows_of_a_batch_with_rules_of_their_own():
    model = oracle.in_double(oracle.tiny_llama())
    profiles = [
        adaptive_profile("support(3)", model),
        Profile.neutral(model),
        adaptive_profile("log_length(4)", model),
    ]
    ids = IDS[:1].expand(3, -1)
    with tempered(model, profiles), torch.no_grad():
        rows = model(ids, use_cache=False).logits
    for row, profile in zip(rows, profiles, strict=True):
        with tempered(model, profile), torch.no_grad():
            close(row, model(IDS[:1], use_cache=False).logits[0], 1e-8)
    with (
        tempered(model, profiles),
        pytest.raises(ProfileError, match="3 profiles.*batch of 2 rows"),
    ):
        model(IDS, use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
@pytest.mark.parametrize("text", ["support(3)", "polynomial()", "log_length(4)"])
def test_generation_with_caches(text, cache):
    """Step by step through a cache is the same as all at once."""
    more = {}
    kind = {}
    if cache == "sliding":
        kind = {"kind": (MistralConfig, MistralForCausalLM), "sliding_window": 6}
    elif cache == "static":
        more = {"cache_implementation": "static"}
    model = oracle.tiny_llama(**kind)
    model.generation_config.pad_token_id = 0
    with tempered(model, adaptive_profile(text, model)), torch.no_grad():
        found = model.generate(
            IDS,
            attention_mask=PADDED,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
        whole = torch.cat([PADDED, torch.ones(2, 8, dtype=torch.long)], 1)[:, :-1]
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        at_once = model(
            found.sequences[:, :-1], attention_mask=whole, position_ids=positions, use_cache=False
        ).logits
    steps = torch.stack(found.logits, 1)
    close(steps, at_once[:, -8:], 2e-4)


def test_unreachable_levels_are_held_at_the_nearest_and_counted():
    model = oracle.in_double(oracle.tiny_llama())
    with tempered(model, adaptive_profile("support(6)", model)) as handle:
        model(IDS, use_cache=False)
        counts = handle.rules()
    heads, rows = oracle.HEADS, len(IDS)
    for (count,) in counts.values():
        assert count.rule == "support(6)"
        assert count.queries == rows * heads * 13
        # Queries that see 2 to 6 keys; one key has nothing to hold.
        assert count.hottest == rows * heads * 5
        assert count.coldest == 0
    found = measure_tokens(model, IDS, profile=adaptive_profile("support(6)", model), buckets=13)
    keys = torch.arange(1, 14).double()
    wanted = keys.clamp(max=6).expand(oracle.LAYERS, heads, 13)
    torch.testing.assert_close(found.by_position["support"], wanted, rtol=1e-4, atol=0)
    with tempered(model, adaptive_profile("support(1,0.5,2)", model)) as handle:
        model(IDS, use_cache=False)
        assert all(count.coldest == rows * heads * 12 for (count,) in handle.rules().values())


def test_gradients_flow_through_the_rule():
    for text in ("support(3)", "polynomial()"):
        model = oracle.in_double(oracle.tiny_llama())
        weight = model.model.layers[1].self_attn.q_proj.weight

        def loss(model=model):
            return model(IDS, use_cache=False).logits.logsumexp(-1).mean()

        with tempered(model, adaptive_profile(text, model)):
            (gradient,) = torch.autograd.grad(loss(), weight)
            for place in ((0, 0), (3, 7)):
                with torch.no_grad():
                    before, step = float(weight[place]), 1e-4
                    ends = []
                    for sign in (1, -1):
                        weight[place] = before + sign * step
                        ends.append(float(loss()))
                    weight[place] = before
                slope = (ends[0] - ends[1]) / (2 * step)
                assert float(gradient[place]) == pytest.approx(slope, rel=1e-2, abs=1e-6)


def test_handles():
    model = oracle.tiny_llama()
    profile = adaptive_profile("support(3)", model)
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with tempered(model, profile) as handle:
            with (
                pytest.raises(RefusedError, match=r"has a rule already \(support\(3\)\)"),
                tempered(model, adaptive_profile("polynomial()", model)),
            ):
                pass
            held_at_3 = model(IDS, use_cache=False).logits
            handle.update(Profile.neutral(model))
            assert torch.equal(model(IDS, use_cache=False).logits, plain)
            assert handle.rules() == {}
            handle.update(profile)
            assert torch.equal(model(IDS, use_cache=False).logits, held_at_3)
            with tempered(model, Profile.neutral(model)) as inner:
                cold = Profile.from_schedule("constant(0.5)", model)
                with pytest.raises(RefusedError, match="has a rule already"):
                    inner.update(adaptive_profile("support(2)", model, layers=[3], base=cold))
                # Nothing of it is in force.
                assert torch.equal(model(IDS, use_cache=False).logits, held_at_3)
        assert torch.equal(model(IDS, use_cache=False).logits, plain)
