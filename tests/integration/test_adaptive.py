"""Temperatures that depend on the query, against bisection in float64 in the model's softmax."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tempering.attention import adaptive_profile, measure_tokens, tempered
from tempering.attention.profile import Profile
from tempering.errors import (
    ArchitectureError,
    ProfileError,
    RefusedError,
)

_spec = importlib.util.spec_from_file_location(
    "attention_oracle", Path(__file__).with_name("attention_oracle.py")
)
oracle = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(oracle)

IDS = oracle.tokens(1, 2, 13)
PADDED = torch.ones(2, 13, dtype=torch.long)
PADDED[1, :4] = 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def entropy_at(x, t):
    r = torch.softmax(x / t, 0)
    return float(torch.special.entr(r).sum())


def held(level, coldest=1e-3, hottest=1e3):
    """The temperature of one query by bisection; level in nats."""

    def temperature(x):
        if len(x) == 0 or bool((x == x[0]).all()):
            return 1.0
        if entropy_at(x, coldest) >= level:
            return coldest
        if entropy_at(x, hottest) <= level:
            return hottest
        low, high = math.log(coldest), math.log(hottest)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy_at(x, math.exp(middle)) < level else (low, middle)
        return math.exp((low + high) / 2)

    return temperature


def velickovic(x):
    s = entropy_at(x, 1.0) if len(x) else 0.0
    beta = -0.037 * s**4 + 0.481 * s**3 - 2.3 * s**2 + 4.917 * s - 1.791
    return 1 / max(beta, 1.0) if s > 0.5 else 1.0


def by_length(x):
    return 1 / max(1.0, math.log(max(len(x), 1)) / math.log(4))


ORACLES = {
    "support(3)": held(math.log(3)),
    "entropy(0.7)": held(0.7),
    "support(3,0.8,1.25)": held(math.log(3), 0.8, 1.25),
    "support(1)": held(0.0),
    "polynomial()": velickovic,
    "log_length(4)": by_length,
}


@contextlib.contextmanager
def softmax_with(temperature, chosen=lambda call: True, base=None):
    """Divide each row of each 4-D softmax by its own temperature; eager attention only."""
    original, calls = torch.nn.functional.softmax, []

    def divided(x, *args, **kwargs):
        if x.ndim != 4:
            return original(x, *args, **kwargs)
        call = len(calls) % oracle.LAYERS
        calls.append(call)
        if base is not None:
            x = x / base[call][:, None, None].to(x.dtype)
        if not chosen(call):
            return original(x, dim=-1)
        rows = x.clone().flatten(0, 2)
        for row in rows:
            seen = row > -1e30
            row[seen] = (row[seen].double() / temperature(row[seen].double())).to(row)
        # Without the rounding to float32 that models ask for here.
        return original(rows.view(x.shape), dim=-1)

    with mock.patch.object(torch.nn.functional, "softmax", divided):
        yield


def expected(model, temperature, ids=IDS, **more):
    """The logits of an eager copy of the model, tempered by the oracle."""
    keep = {key: more.pop(key) for key in ("chosen", "base") if key in more}
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with softmax_with(temperature, **keep), torch.no_grad():
            return model(ids, use_cache=False, **more).logits
    finally:
        model.set_attn_implementation(implementation)


def close(ours, exact, relative=2e-5):
    plain = exact.double().std()
    assert (ours.double() - exact.double()).abs().max() < relative * plain


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
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    model = BertModel(config).eval()
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
    assert profile.rules == (None, str(PAPER), None, str(PAPER))
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
    assert profile.rules == tuple(f"support({n},0.01,100)" for n in (2, 3, 4, 5))
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
        assert torch.equal(model(IDS, use_cache=False).logits, plain)


def test_what_cannot_be_exact_is_refused():
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32}
    bloom = BloomForCausalLM(BloomConfig(**shape, n_layer=2, n_head=4)).eval()
    with pytest.raises(ArchitectureError, match="attention code of its own"):
        adaptive_profile("support(3)", bloom)
    shape |= {
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    sinks = GptOssForCausalLM(
        GptOssConfig(**shape, num_local_experts=2, num_experts_per_tok=1)
    ).eval()
    with pytest.raises(ArchitectureError, match="sink logits shared by all queries"):
        adaptive_profile("support(3)", sinks)
    config = Gemma2Config(**shape, attn_logit_softcapping=2.0, sliding_window=64)
    config._attn_implementation = "eager"
    capped = Gemma2ForCausalLM(config).eval()
    with tempered(capped, adaptive_profile("support(3)", capped)), torch.no_grad():
        ours = capped(IDS, use_cache=False).logits
    with softmax_with(held(math.log(3))), torch.no_grad():
        close(ours, capped(IDS, use_cache=False).logits, 2e-4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("support", "no rule"),
        ("warmth(3)", "'warmth.3.' is no rule.*support.keys"),
        ("support(keys)", "'keys' is no number"),
        ("support()", "takes a level"),
        ("support(3,1)", "takes a level, or a level and two bounds"),
        ("support(0.5)", "at least 1"),
        ("entropy(-1)", "at least 0"),
        ("support(nan)", "'nan' is no number"),
        ("support(3,2,1)", "the colder one first; not 2, 1"),
        ("support(3,0,1)", "0.001 to 1000"),
        ("support(wave(1))", "neither a number nor a pattern"),
        ("support(throb(12,3,1,12)", "brackets"),
        ("log_length(1)", "at least 2"),
        ("log_length(3.5)", "one whole number"),
        ("polynomial(x)", "'x' is no number"),
    ],
)
def test_bad_texts(text, words):
    with pytest.raises(ProfileError, match=words):
        adaptive_profile(text, oracle.tiny_llama())


def test_bad_places():
    model = oracle.tiny_llama()
    with pytest.raises(ProfileError, match="layer 4: the model has layers 0 to 3"):
        adaptive_profile("support(3)", model, layers=[0, 4])
    with pytest.raises(ProfileError, match=r"layer \(none\)"):
        adaptive_profile("support(3)", model, layers=[])
    with pytest.raises(ProfileError, match="no stack 'encoder'"):
        adaptive_profile("support(3)", model, stack="encoder")
    with pytest.raises(RefusedError, match="has rules itself .support.2."):
        adaptive_profile("support(3)", model, base=adaptive_profile("support(2)", model))


def test_files(tmp_path):
    """A profile with rules is another version, so that no reader drops them in silence."""
    model = oracle.tiny_llama()
    profile = adaptive_profile("support(linear(5,2),0.1,10)", model, layers=[1, 2])
    path = profile.save(tmp_path / "p.json")
    found = Profile.load(path)
    assert found.rules == profile.rules
    assert profile.to_json()["version"] == 2
    assert Profile.neutral(model).to_json()["version"] == 1
    with torch.no_grad(), tempered(model, found):
        ours = model(IDS, use_cache=False).logits
    with torch.no_grad(), tempered(model, profile):
        assert torch.equal(ours, model(IDS, use_cache=False).logits)
    other = oracle.tiny_llama(seed=1)
    assert found.adopt(other).rules == profile.rules
    damaged = profile.to_json()
    damaged["layers"][1]["rule"] = "warmth(3)"
    with pytest.raises(ProfileError, match="p.json: 'warmth.3.' is no rule"):
        Profile.from_json(damaged, "p.json")
    damaged["layers"][1]["rule"] = 3
    with pytest.raises(ProfileError, match="'rule' of layer 1 is 3"):
        Profile.from_json(damaged, "p.json")


def test_what_takes_matrices_alone_refuses_rules():
    from tempering.attention.bake import bake

    model = oracle.tiny_llama()
    profile = adaptive_profile("support(3)", model)
    for attempt in (
        lambda: bake(model, profile),
        lambda: profile.scaled(0.5),
        lambda: profile.shuffled(0),
    ):
        with pytest.raises(RefusedError, match=r"has rules \(support\(3\)\)"):
            attempt()
