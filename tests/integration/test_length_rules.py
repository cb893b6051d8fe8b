"""Rules of length against their formulas in plain Python, inside the model's own softmax."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import pytest
import torch
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tempering.attention import Profile, adaptive_profile, layout, measure_tokens, tempered
from tempering.attention.baking.bake import bake
from tempering.attention.profiles.length_rules import Power
from tempering.attention.profiles.rule_base import PerHead
from tempering.errors import ArchitectureError, InputError, ProfileError, RefusedError
from tests.integration.rule_oracle import IDS, PADDED, close, oracle

SLOPES = (0.3, -0.2, 0.0, 0.15)
# text -> T of head h at n keys, from the formulas of the papers
FORMULAS = {
    "power(-0.3,4)": lambda n, h: (n / 4) ** -0.3,
    "power(heads(0.3,-0.2,0.0,0.15),5)": lambda n, h: math.exp(SLOPES[h] * math.log(n / 5)),
    "power(0.5,2,0.9,1.5)": lambda n, h: min(max(math.sqrt(n / 2), 0.9), 1.5),
    "log_length(4)": lambda n, h: 1 / max(1.0, math.log(n) / math.log(4)),
    "ssmax(0.6)": lambda n, h: 1 / (0.6 * math.log(n)) if n > 1 else 1.0,
    "ssmax(heads(0.4,0.6,0.8,1))": lambda n, h: (
        1 / ((0.4 + 0.2 * h) * math.log(n)) if n > 1 else 1.0
    ),
    "affine(0.5,0.2)": lambda n, h: 1 / (0.5 * math.log(n) + 0.2) if n > 1 else 1.0,
    "log_steps(0.4,3)": lambda n, h: 1 / (1 + 0.4 * math.log(1 + n // 3)),
    "log_steps(0.4,3,1)": lambda n, h: 1 / (1 + 0.4 * math.log(1 + (n - 1) // 3)),
}


def expected(model, temperature, ids=IDS, **more):
    """Logits of an eager run where head h of a query that sees n keys has T = temperature(n, h)."""
    original = torch.nn.functional.softmax

    def divided(x, *args, **kwargs):
        if x.ndim != 4:
            return original(x, *args, **kwargs)
        out = x.clone()
        for b, h, q in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
            seen = x[b, h, q] > -1e30
            n = int(seen.sum())
            if n:
                out[b, h, q, seen] = (x[b, h, q, seen].double() / temperature(n, h)).to(x)
        return original(out, dim=-1)

    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with mock.patch.object(torch.nn.functional, "softmax", divided), torch.no_grad():
            return model(ids, use_cache=False, **more).logits
    finally:
        model.set_attn_implementation(implementation)


@pytest.mark.parametrize("text", FORMULAS)
def test_equals_the_formula(text):
    model = oracle.in_double(oracle.tiny_llama())
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with tempered(model, adaptive_profile(text, model)):
            ours = model(IDS, use_cache=False).logits
        again = model(IDS, use_cache=False).logits
    # Eager attention rounds its softmax to float32.
    close(ours, expected(model, FORMULAS[text]), 2e-6)
    assert (ours - plain).abs().max() > 0.02 * plain.std()
    assert torch.equal(again, plain)


@pytest.mark.parametrize("text", ["power(heads(0.3,-0.2,0.0,0.15),5)", "ssmax(0.6)"])
def test_padded_windowed_and_on_top_of_a_profile(text):
    formula = FORMULAS[text]
    model = oracle.tiny_llama()
    with tempered(model, adaptive_profile(text, model)), torch.no_grad():
        ours = model(IDS, attention_mask=PADDED, use_cache=False).logits
    exact = expected(model, formula, attention_mask=PADDED)
    close(ours[PADDED.bool()], exact[PADDED.bool()], 2e-4)
    windowed = oracle.tiny_llama(kind=(MistralConfig, MistralForCausalLM), sliding_window=5)
    with tempered(windowed, adaptive_profile(text, windowed)), torch.no_grad():
        ours = windowed(IDS, use_cache=False).logits
    close(ours, expected(windowed, formula), 2e-4)
    base = Profile.from_matrix(torch.tensor([[0.5, 2.0, 1.0, 1.3]] * 4), model)
    with tempered(model, adaptive_profile(text, model, base=base)), torch.no_grad():
        ours = model(IDS, use_cache=False).logits
    close(ours, expected(model, lambda n, h: formula(n, h) * float(base.rows[0][h])), 2e-4)


@pytest.mark.parametrize("cache", ["dynamic", "static", "sliding"])
def test_generation_with_caches(cache):
    """Token by token through a cache, with padding, is the same as all at once."""
    kind = {}
    if cache == "sliding":
        kind = {"kind": (MistralConfig, MistralForCausalLM), "sliding_window": 6}
    more = {"cache_implementation": "static"} if cache == "static" else {}
    model = oracle.tiny_llama(**kind)
    model.generation_config.pad_token_id = 0
    profile = adaptive_profile("power(heads(0.3,-0.2,0.0,0.15),5)", model)
    with tempered(model, profile), torch.no_grad():
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
    close(torch.stack(found.logits, 1), at_once[:, -8:], 2e-4)


def test_rows_of_a_batch_have_rules_of_their_own():
    model = oracle.in_double(oracle.tiny_llama())
    texts = ["power(heads(0.3,-0.2,0.0,0.15),5)", "ssmax(0.6)", "power(heads(0,0,0,1),5)"]
    profiles = [adaptive_profile(text, model) for text in texts] + [Profile.neutral(model)]
    with tempered(model, profiles), torch.no_grad():
        rows = model(IDS[:1].expand(4, -1), use_cache=False).logits
    for row, profile in zip(rows, profiles, strict=True):
        with tempered(model, profile), torch.no_grad():
            close(row, model(IDS[:1], use_cache=False).logits[0], 1e-8)


def llama4(**settings):
    kind = (Llama4TextConfig, Llama4ForCausalLM)
    own = {"attn_temperature_tuning": True, "attn_scale": 0.5, "floor_scale": 4}
    experts = {"num_local_experts": 1, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    return oracle.tiny_llama(
        kind=kind, no_rope_layers=[1, 0, 1, 0], **{**own, **experts, **settings}
    )


def ministral(scale=0.5):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 128 / 3,
        "original_max_position_embeddings": 3,
        "llama_4_scaling_beta": scale,
    }
    kind = (Ministral3Config, Ministral3ForCausalLM)
    return oracle.tiny_llama(kind=kind, rope_parameters=rope, sliding_window=None)


def test_the_law_that_a_model_has_is_read_and_shown():
    assert [layer.law for layer in layout(llama4()).layers] == [
        None,
        "log_steps(0.5,4.0)",
        None,
        "log_steps(0.5,4.0)",
    ]
    assert {layer.law for layer in layout(ministral()).layers} == {"log_steps(0.5,3.0,1)"}
    assert {layer.law for layer in layout(llama4(attn_temperature_tuning=False)).layers} == {None}
    assert {layer.law for layer in layout(oracle.tiny_llama()).layers} == {None}


@pytest.mark.parametrize("padded", [False, True])
def test_the_law_that_a_model_has_is_replaced(padded):
    """Replaced by T = 1 it is the model without its law; by another, that law alone."""
    more = {"attention_mask": PADDED} if padded else {}
    kept = PADDED.bool() if padded else torch.ones_like(PADDED).bool()
    off = llama4(attn_temperature_tuning=False)
    for own, without, model in (
        ("log_steps(0.5,4)", off, llama4()),
        ("log_steps(0.5,3,1)", ministral(0.0), ministral()),
    ):
        for inner in ("power(0,5)", "power(0.4,5)"):
            profile = adaptive_profile(f"{inner}|instead_of({own})", model)
            plain = adaptive_profile(inner, without)
            with torch.no_grad(), tempered(model, profile):
                ours = model(IDS, use_cache=False, **more).logits
            with torch.no_grad(), tempered(without, plain):
                wanted = without(IDS, use_cache=False, **more).logits
            close(ours[kept], wanted[kept], 2e-5)
            with torch.no_grad():
                unchanged = model(IDS, use_cache=False, **more).logits
            assert (ours - unchanged)[kept].abs().max() > 1e-3 * wanted.std()


def test_a_replaced_law_through_a_cache():
    for own, without, model in (
        ("log_steps(0.5,4)", llama4(attn_temperature_tuning=False), llama4()),
        ("log_steps(0.5,3,1)", ministral(0.0), ministral()),
    ):
        profile = adaptive_profile(f"power(0.4,5)|instead_of({own})", model)
        ask = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": PADDED}
        keep = {"output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad(), tempered(model, profile):
            ours = model.generate(IDS, **ask, **keep)
        with torch.no_grad(), tempered(without, adaptive_profile("power(0.4,5)", without)):
            wanted = without.generate(IDS, **ask, **keep)
        assert torch.equal(ours.sequences, wanted.sequences)
        close(torch.stack(ours.logits), torch.stack(wanted.logits), 2e-5)


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(ProfileError, match="none of these layers has a law of its own"):
        adaptive_profile("power(0,5)|instead_of(log_steps(0.5,4))", oracle.tiny_llama())
    with pytest.raises(ArchitectureError, match=r"has the law log_steps\(0.5,4.0\), so .*shows"):
        adaptive_profile("power(0,5)|instead_of(log_steps(0.1,4))", llama4())
    with pytest.raises(ProfileError, match="one law can be replaced, and by one rule"):
        adaptive_profile(
            "power(0,5)|instead_of(log_steps(0.5,4))|instead_of(log_steps(0.5,4))", llama4()
        )
    with pytest.raises(ProfileError, match="no rule of length is called 'support'"):
        adaptive_profile("power(0,5)|instead_of(support(4))", llama4())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("power()", r"power\(slope, length, coldest, hottest\) needs slope"),
        ("power(0.1)", "needs length"),
        ("power(0.1,0)", "length is a number of keys, at least 1, not 0"),
        ("power(inf,9)", "slope is a finite number, not inf"),
        ("power(heads(),9)", r"column 7: heads\(a, b, ..\) takes a number for every head"),
        ("power(heads(1,x),9)", r"column 16: expected '\('"),
        ("power(heads(1,2),heads(1,2,3))", "its numbers are for 2 and for 3 heads"),
        ("power(heads(0.1,0.2,0.3),9)", "has 4 heads, and power.heads.*has numbers for 3"),
        ("power(0.1,9,2,1)", "the colder one first; not 2, 1"),
        ("power(0.1,9,1e-9,1)", "bounds of T lie in 0.001 to 1000"),
        ("ssmax(0)", "s is a number above 0, not 0"),
        ("ssmax(heads(1,-1,1,1))", "head 1: s is a number above 0, not -1"),
        ("affine(0.5)", "needs b"),
        ("log_steps(0.1,0)", "step is a number of keys, at least 1, not 0"),
        ("log_steps(0.1,9,2)", "shift is 0 or 1, not 2"),
        ("heads(1,2)", "no rule is called 'heads'"),
        ("power(support(3),9)", "slope takes a number, not a rule"),
    ],
)
def test_bad_texts(text, words):
    model = oracle.tiny_llama()
    with pytest.raises(ProfileError, match=words), tempered(model, adaptive_profile(text, model)):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("power(heads(0,0,9,0),5)", r"head 2: power\(heads\(..\),5\) has T = .* 1.* keys"),
        ("power(-4,5)", r"layers.0.self_attn: power\(-4,5\) has T = .* the context has 128"),
        ("affine(-0.3,1)", "has T = 2953 for a query that sees 28 keys"),
        ("log_steps(-1,2)", "1/T = "),
    ],
)
def test_slopes_that_leave_the_limits_within_the_context(text, words):
    """The error names layer, head and length; with bounds of T the same slope is held there."""
    model = oracle.tiny_llama()
    with pytest.raises(ProfileError, match=words), tempered(model, adaptive_profile(text, model)):
        pass
    held = adaptive_profile("power(-4,5,0.5,2)", model)
    with tempered(model, held) as handle, torch.no_grad():
        model(IDS, use_cache=False)
        (count,) = handle.rules()[layout(model).layers[0].name]
    # T = 2 up to 4 keys, 0.5 from 6 keys on.
    heads, rows = oracle.HEADS, len(IDS)
    assert (count.hottest, count.coldest) == (4 * heads * rows, 8 * heads * rows)


def test_lengths_beyond_the_context_are_looked_at_when_they_come():
    model = oracle.tiny_llama(max_position_embeddings=8)
    profile = adaptive_profile("power(6,2)", model)  # T = 1000 at 6.3 keys
    with pytest.raises(ProfileError, match="keys"), tempered(model, profile):
        pass
    model = oracle.tiny_llama(max_position_embeddings=6)
    with tempered(model, adaptive_profile("power(6,2)", model)), torch.no_grad():
        model(IDS[:, :6], use_cache=False)
        with pytest.raises(ProfileError, match="that sees 7 keys, and the context has 13"):
            model(IDS, use_cache=False)


def test_the_product_with_the_profile_is_held_to_the_limits_too():
    model = oracle.tiny_llama()
    rule = "power(-1,1)"  # T = 1/13 at 13 keys
    cold = Profile.from_matrix(torch.full((4, oracle.HEADS), 0.002), model)
    for attempt in (
        lambda: tempered(model, adaptive_profile(rule, model, base=cold)),
        lambda: nested(model, cold, adaptive_profile(rule, model)),
        lambda: nested(model, adaptive_profile(rule, model), cold),
    ):
        with pytest.raises(ProfileError, match="with the profile's T has T = 0.000"), attempt():
            model(IDS, use_cache=False)
    # What changes under a rule that is in force is looked at anew.
    mild = Profile.neutral(model)
    with tempered(model, adaptive_profile(rule, model)), tempered(model, mild) as handle:
        model(IDS, use_cache=False)
        handle.update(cold)
        with pytest.raises(ProfileError, match="with the profile's T"):
            model(IDS, use_cache=False)


@contextlib.contextmanager
def nested(model, outer, inner):
    with tempered(model, outer), tempered(model, inner):
        yield


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9, -1e4])
def test_keys_hidden_by_any_number_are_not_seen(low):
    model = oracle.tiny_llama()
    length = IDS.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = torch.zeros(len(IDS), 1, length, length).masked_fill(future, low)
    with torch.no_grad(), tempered(model, adaptive_profile("power(-0.5,4)", model)):
        found = model(IDS, attention_mask=mask, use_cache=False).logits
        close(found, model(IDS, use_cache=False).logits)


def test_eager_attention_without_a_mask_sees_all_keys():
    from transformers import SplinterConfig, SplinterModel

    torch.manual_seed(0)
    model = SplinterModel(
        SplinterConfig(
            vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, initializer_range=0.5, question_token_id=1,
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 60, (1, 9))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=ids.dtype)], 1)
    mask = (torch.arange(14) < 9)[None].long()
    law = adaptive_profile("power(-0.5,4)", model)
    with torch.no_grad():
        plain = model(ids)[0]
        with tempered(model, law):
            alone = model(ids)[0]
            beside = model(padded, attention_mask=mask)[0][:, :9]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)
    assert (alone - plain).abs().max() > 0.1


def test_texts_and_files(tmp_path):
    model = oracle.tiny_llama()
    for text in (*FORMULAS, "power(0.1,5)|instead_of(log_steps(0.1,8192))"):
        from tempering.attention.profiles.rules import rule

        item = rule(text)
        assert rule(str(item)) == item and hash(rule(str(item))) == hash(item)
    profile = adaptive_profile("power(heads(0.3,-0.2,0.1,0.15),5)", model)
    found = Profile.load(profile.save(tmp_path / "p.json"))
    assert found.rules == profile.rules and profile.to_json()["version"] == 2
    broken = profile.to_json()
    broken["layers"][2]["rule"] = "power(heads(0.3,-0.2),5)"
    with pytest.raises(
        ProfileError, match=r"p.json: layer 2 has 4 heads, and power.*numbers for 2"
    ):
        Profile.from_json(broken, "p.json")


def test_a_slope_that_follows_a_pattern_over_depth():
    profile = adaptive_profile("power(linear(0,0.3),5)", oracle.tiny_llama())
    assert [item.slope for item in profile.rules] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_scaled_shuffled_and_constant():
    model = oracle.tiny_llama()
    base = Profile.from_matrix(oracle.random_temperatures(1, 4, 4), model)
    profile = adaptive_profile("power(heads(0.3,-0.2,0.1,0.15),5,0.5,3)", model, base=base)
    half = profile.scaled(0.5)
    assert torch.allclose(half.temperature, base.temperature.sqrt())
    assert half.rules[0].slope == pytest.approx((0.15, -0.1, 0.05, 0.075))
    assert half.rules[0].bounds == pytest.approx((0.5**0.5, 3**0.5))
    assert profile.scaled(-1.0).rules[0].bounds == pytest.approx((1 / 3, 2))
    moved = profile.shuffled(3)
    pairs = {
        (round(float(t), 9), slope)
        for row, item in zip(moved.rows, moved.rules, strict=True)
        for t, slope in zip(row, item.slope, strict=True)
    }
    assert pairs == {
        (round(float(t), 9), slope)
        for row in base.rows
        for t, slope in zip(row, (0.3, -0.2, 0.1, 0.15), strict=True)
    }
    constant = profile.at_length(40)
    assert not any(constant.rules)
    for head, slope in enumerate((0.3, -0.2, 0.1, 0.15)):
        logs = [math.log(min(max((n / 5) ** slope, 0.5), 3)) for n in range(1, 41)]
        wanted = float(base.rows[1][head]) * math.exp(sum(logs) / 40)
        assert float(constant.rows[1][head]) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ProfileError, match="at least 1 token, not 0"):
        profile.at_length(0)
    with pytest.raises(ProfileError, match="up to 100000000 tokens, not 1000000"):
        profile.at_length(10**30)
    held = adaptive_profile("support(3)", model)
    with pytest.raises(RefusedError, match="only rules of length have constants for a length"):
        held.at_length(40)
    for attempt in (
        lambda: held.scaled(2.0),
        lambda: adaptive_profile("ssmax(1)", model).scaled(2.0),
    ):
        with pytest.raises(RefusedError, match="can't be scaled"):
            attempt()


def test_constants_of_layers_with_windows():
    model = oracle.tiny_llama()
    profile = adaptive_profile("power(-0.1,16)", model)
    found = profile.at_length(100, [None, 8, 8, 200])
    for row, window in zip(found.rows, (100, 8, 8, 200), strict=True):
        logs = [-0.1 * math.log(min(n, window) / 16) for n in range(1, 101)]
        assert row.tolist() == pytest.approx([math.exp(sum(logs) / 100)] * 4, rel=1e-12)
    assert torch.equal(profile.at_length(100, 8).rows[0], found.rows[1])
    with pytest.raises(ProfileError, match="2 windows were given for 4 layers"):
        profile.at_length(100, [8, 8])
    with pytest.raises(InputError, match="a window = 0"):
        profile.at_length(100, 0)


def test_a_rule_with_one_bound_keeps_the_other_side_open():
    model = oracle.tiny_llama()
    rule = adaptive_profile("power(-0.1,100,0.001,2)", model)
    for room, bounds in ((1.5, (1e-3, 2**1.5)), (0.5, (1e-3, 2**0.5)), (-1.0, (0.5, 1e3))):
        assert rule.scaled(room).rules[0].bounds == pytest.approx(bounds)
    own = Power(PerHead((0.1, 0.2, 0.3, 0.4)), PerHead((10.0, 20.0, 30.0, 40.0)))
    with pytest.raises(RefusedError, match="can't be shuffled"):
        Profile.neutral(model).with_rules([own] * 4).shuffled(1)


def test_what_takes_numbers_offers_the_constants():
    model = oracle.tiny_llama()
    profile = adaptive_profile("power(heads(0.3,-0.2,0.1,0.15),5)", model)
    with pytest.raises(RefusedError, match=r"rules \(power\(heads\(..\),5\)\).*at_length\(N\)"):
        bake(model, profile)
    with torch.no_grad():
        with tempered(model, profile.at_length(13)):
            wanted = model(IDS, use_cache=False).logits
        baked = bake(model, profile.at_length(13))
        close(baked(IDS, use_cache=False).logits, wanted, 2e-4)


def test_measured_under_a_rule_of_length():
    """`log_length` and `power` act on what `measure` sees."""
    model = oracle.in_double(oracle.tiny_llama())
    plain = measure_tokens(model, IDS, buckets=13)
    cold = measure_tokens(model, IDS, profile=adaptive_profile("power(-0.5,1)", model), buckets=13)
    difference = cold.by_position["entropy"] - plain.by_position["entropy"]
    assert bool((difference[:, :, 0] == 0).all())  # one key
    assert bool((difference[0, :, 3:] < 0).all())
